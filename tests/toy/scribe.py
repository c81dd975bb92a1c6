"""The toy's world, arithmetic in steps, and its rule-based critic.

A problem is a sum of products of digits, `7*3+1*5+8*8`. There are two ways to work it out:

    own way    7 * 3 = 21, 1 * 5 = 5, 8 * 8 = 64, 21 + 5 = 26, 26 + 64 = 90
               all products from the left, then the sums
    reference  product of 8 and 8 is 64, product of 1 and 5 is 5, sum of 64 and 5 is 69, ...
               in words, from the right, each sum as soon as there are two values

The state is a list of pending terms: a pair (a, b) is a product to compute, a number is a value
to add. A step replaces the terms it uses by its value.
"""

import re
from collections import Counter
from dataclasses import dataclass

from critic import parse_steps

OWN = {"*": "{} * {} = {}", "+": "{} + {} = {}"}
REFERENCE = {"*": "product of {} and {} is {}", "+": "sum of {} and {} is {}"}
NUMBERS = ["(?P<a>[0-9]{1,9})", "(?P<b>[0-9]{1,9})", "(?P<value>[0-9]{1,9})"]


@dataclass(frozen=True)
class Calculation:
    way: dict  # OWN or REFERENCE
    symbol: str  # "*" or "+"
    match: re.Match  # groups: a, b, value

    def __getitem__(self, group: str) -> int:
        return int(self.match[group])


def read_step(text: str) -> Calculation | None:
    """The calculation in a step's text, in either way, or None if there is none."""
    for way in (OWN, REFERENCE):
        for symbol, template in way.items():
            pattern = template.replace(symbol, "\\" + symbol).replace(" ", r"\s*").format(*NUMBERS)
            if match := re.fullmatch(rf"\s*{pattern}\s*", text):
                return Calculation(way, symbol, match)
    return None


def read_problem(text: str) -> list:
    """The terms of `7*3+1*5`: [(7, 3), (1, 5)]. Empty if the text is no problem of this task."""
    if not re.fullmatch(r"[0-9]\*[0-9](\+[0-9]\*[0-9])*", text):
        return []
    return [(int(term[0]), int(term[2])) for term in text.split("+")]


def calculate(symbol: str, a: int, b: int) -> int:
    return a * b if symbol == "*" else a + b


def replace(terms: list, used: list, symbol: str, value: int) -> list:
    """The terms after a step. A sum comes first: the next sum goes on from it."""
    rest = list(terms)
    for term in used:
        rest.remove(term)
    return [value, *rest] if symbol == "+" else [*rest, value]


def work_out(terms: list, ways: list, calculate=calculate) -> tuple[list[str], int]:
    """Works the terms out. Returns the texts of the steps, and the answer.

    ways: OWN or REFERENCE for each step; the last one also for all steps beyond.
    calculate: pretraining passes its own, which makes values up.
    """
    texts = []
    while len(terms) > 1 or isinstance(terms[0], tuple):
        way = ways[min(len(texts), len(ways) - 1)]
        products = [term for term in terms if isinstance(term, tuple)]
        values = [term for term in terms if isinstance(term, int)]
        if len(values) > 1 and (way is REFERENCE or not products):
            symbol, used = "+", values[:2]
            a, b = used
        else:
            symbol, used = "*", [products[-1 if way is REFERENCE else 0]]
            a, b = used[0]
        value = calculate(symbol, a, b)
        texts.append(way[symbol].format(a, b, value))
        terms = replace(terms, used, symbol, value)
    return texts, terms[0]


def apply_step(terms: list, step: Calculation) -> tuple[list, str | None]:
    """The terms after an attempt's step, and its first error: "a", "b", "value" or None.

    A wrong operand still uses up a term: the pending product that shares the most factors with the
    step, or the first pending value. So later steps can be right again.
    """
    operands = [step["a"], step["b"]]
    if step.symbol == "*":
        products = [term for term in terms if isinstance(term, tuple)]
        products.sort(key=lambda product: (Counter(product) & Counter(operands)).total())
        available = [factor for product in products[-1:] for factor in product]
    else:
        available = [term for term in terms if isinstance(term, int)]
    used, wrong = [], None
    for name in "ab":
        if step[name] in available:
            available.remove(step[name])
            used.append(step[name])
        else:
            wrong = wrong or name
    used = products[-1:] if step.symbol == "*" else used + available[: 2 - len(used)]
    if not wrong and step["value"] != calculate(step.symbol, *operands):
        wrong = "value"
    return replace(terms, used, step.symbol, step["value"]), wrong


def judge(problem, attempt: str) -> list[tuple[int, int] | None]:
    """For each step and answer: None if it is right, else (start, end) of its first error.

    attempt[start:end] is the wrong operand, else the wrong value, or the whole text if it is
    unreadable. A product must be pending; its factors may be swapped. The operands of a sum must
    be pending values, right or wrong: a step that follows correctly from an earlier error is
    right. The answer is right if it repeats the only value left.
    """
    terms, verdicts = read_problem(problem.statement), []
    for step in parse_steps(attempt):
        span, calculation = (0, len(step.text)), read_step(step.text)
        if step.name == "answer":
            span = None if [step.text.strip()] == [str(term) for term in terms] else span
        elif calculation:
            terms, wrong = apply_step(terms, calculation)
            span = calculation.match.span(wrong) if wrong else None
        start = step.start + len(f"<{step.name}>")
        verdicts.append((start + span[0], start + span[1]) if span else None)
    return verdicts


def join_steps(texts: list[str], answer: int) -> str:
    tagged = [f"<step_{n}>{text}</step_{n}>" for n, text in enumerate(texts, 1)]
    return " ".join([*tagged, f"<answer>{answer}</answer>"])


def critique(problem, attempt: str) -> str | None:
    """A corrected version of the attempt, or None if the problem is not of this task.

    A  all steps right: repeats them          C  unfinished: repeats the steps and finishes
    B  a step is missing: inserts it          D  a wrong step: repeats those before it, rewrites it

    It then continues in the way, own or reference, that the attempt uses at each step.
    An attempt without a readable step gets an OWN solution.
    """
    terms, kept_texts, ways, right = read_problem(problem.statement), [], [], True
    for step in parse_steps(attempt):
        calculation = read_step(step.text)
        if step.name == "answer" or not terms:
            break
        next_terms, wrong = apply_step(terms, calculation) if calculation else (terms, "text")
        ways.append(calculation.way if calculation else (ways or [OWN])[-1])
        right = right and not wrong
        if right:
            kept_texts.append(step.text)
            terms = next_terms
    if not terms:
        return None
    texts, answer = work_out(terms, ways[len(kept_texts) :] or ways[-1:] or [OWN])
    return join_steps(kept_texts + texts, answer)
