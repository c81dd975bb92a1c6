"""Who answers when asked for a critique. Knows nothing of training.

A critic reads a problem, a solver's step-tagged attempt and the ground truth, and writes a
*corrected walk through that very attempt*: right steps word for word, the first wrong step
rewritten, then on from the corrected value. The paper (Kara & Ersoy, arXiv 2606.11173) asks its
critic to be such a faithful scribe in four cases:

    A  all steps right                 reproduce the attempt
    B  right answer, a step missing    insert the step
    C  unfinished                      finish it
    D  a wrong step                    reproduce up to it, rewrite it, carry on

Every critic answers the same call, `ask(problems, attempts) -> [Critique]`, one for each attempt.
A failure is a value, `Critique(None, failure="why")`, and never text that reaches a prompt.

The one here needs no model. It is the scribe of the embedded task, last-digit arithmetic, where
truth is known by redoing the arithmetic.
"""

import re
from dataclasses import dataclass
from itertools import zip_longest

# ------------------------------------------------------------------------ step-tagged text
# Tags are found in one pass and paired by hand. A pattern such as `<step_(\d+)>(.*?)</step_\1>`
# takes quadratic time on an attempt that opens ten thousand tags and closes none.
TAG = re.compile(r"<(/?)(step_[0-9]{1,4}|answer)>")


@dataclass(frozen=True)
class Step:
    name: str  # "step_1", "step_2", … or "answer"
    text: str  # what stands between the tags
    start: int  # the span of characters in the attempt, tags included: attempt[start:end]
    end: int


def parse_steps(attempt: str) -> list[Step]:
    """The closed steps of an attempt and its answer, in the order they stand there.

    An opening tag counts if the next tag closes it; anything else is passed over. Never raises.
    """
    steps, opening = [], None
    for tag in TAG.finditer(attempt):
        closes, name = tag.groups()
        if closes and opening and opening[2] == name:
            steps.append(Step(name, attempt[opening.end() : tag.start()], opening.start(), tag.end()))
        opening = None if closes else tag
    return steps


def first_difference(attempt: str, critique: str) -> Step | None:
    """The attempt's first step (or answer) that the critique does not have, word for word, in the same place."""
    for ours, theirs in zip_longest(parse_steps(attempt), parse_steps(critique)):
        if ours is None or theirs is None or (ours.name, ours.text.split()) != (theirs.name, theirs.text.split()):
            return ours  # None if the attempt ends before the critique does
    return None


def join_steps(steps: list[str], answer) -> str:
    """Tags the steps 1, 2, 3, … and adds the answer."""
    tagged = [f"<step_{n}>{text}</step_{n}>" for n, text in enumerate(steps, 1)]
    return "".join(tagged) + f"<answer>{answer}</answer>"


# ------------------------------------------------------------------------ last-digit arithmetic
# `3*7+8*4+6*6`, every result kept modulo 10. There are two ways to work, equally right:
#   own        3*7=1  8*4=2  6*6=6  1+2=3  3+6=9     all products from the left, then the sums
#   reference  6×6→6  8×4→2  6⊕2→8  3×7→1  8⊕1→9     from the right, each sum as soon as it can be
OWN, REFERENCE = "*+=", "×⊕→"  # the symbols of a notation: times, plus, equals
CALCULATION = re.compile(r"([0-9])([*+×⊕])([0-9])([=→])([0-9])")
PROBLEM = re.compile(r"[0-9]\*[0-9](\+[0-9]\*[0-9])*")


def times(a: int, b: int) -> int:
    return a * b % 10


def carry_on(products, values, notation, product=times, slip=None):
    """Works a problem out from any point on. Returns (the remaining steps' texts, the answer).

    products: the factors (a, b) of the products still to take, in the problem's order.
    values: the results still to be added up.
    product: what a times b is; pretraining passes a made-up table.
    slip: (n, value) writes that value into the n-th step from here, and carries on from it.
    """
    products, values, steps = list(products), list(values), []
    multiply, add, equals = notation
    while products or len(values) > 1:
        if len(values) > 1 and (notation == REFERENCE or not products):
            symbol, (a, b), values = add, values[:2], values[2:]
            result = (a + b) % 10
        else:
            symbol, (a, b) = multiply, products.pop(0 if notation == OWN else -1)
            result = product(a, b)
        if slip and slip[0] == len(steps):
            result = slip[1]
        steps.append(f"{a}{symbol}{b}{equals}{result}")
        values = [result] + values if symbol == add else values + [result]
    return steps, values[0]


def spell(step: str, notation: str) -> str:
    """The same step in the symbols of a notation."""
    return step.translate(str.maketrans(OWN + REFERENCE, notation + notation))


def factors(problem: str) -> list[tuple[int, int]]:
    """`3*7+8*4` as [(3, 7), (8, 4)]. Raises ValueError if the text is no such problem."""
    if not PROBLEM.fullmatch(problem):
        raise ValueError(f"not a problem of the embedded task: {problem[:60]!r}")
    return [(int(term[0]), int(term[2])) for term in problem.split("+")]


def judge(attempt: str) -> list[bool]:
    """For each step and answer that `parse_steps` finds: is it right in itself?

    A step is, when its own arithmetic holds, even if it starts from an earlier wrong value; an
    answer, when it repeats the value of the step before.
    """
    verdicts, previous = [], None
    for step in parse_steps(attempt):
        parts = CALCULATION.fullmatch(step.text)
        if step.name == "answer":
            verdicts.append(step.text.strip() == previous)
        else:
            verdicts.append(bool(parts) and _result(parts) == int(parts[5]))
            previous = parts[5] if parts else None
    return verdicts


def _result(parts) -> int:
    a, b = int(parts[1]), int(parts[3])
    return times(a, b) if parts[2] in "*×" else (a + b) % 10


def corrected_walk(problem: str, attempt: str) -> str:
    """What the faithful scribe writes (see the four cases above).

    Copies steps while each takes a product or a sum that is still open, and takes it right; then
    carries on from there, in the attempt's own order and in the symbols its steps have at the same
    places. An attempt that cannot be read gets a fresh solution in the solver's own notation.
    """
    terms = factors(problem)
    products, values, copied = list(terms), [], []
    texts = [step.text for step in parse_steps(attempt)]
    parsed = [CALCULATION.fullmatch(text) for text in texts]
    for text, parts in zip(texts, parsed):
        if parts is None or _result(parts) != int(parts[5]):
            break
        a, symbol, b = int(parts[1]), parts[2], int(parts[3])
        if symbol in "*×" and (a, b) in products:
            products.remove((a, b))
            values.append(int(parts[5]))
        elif symbol in "+⊕" and _takes(values, a, b):
            values.insert(0, int(parts[5]))
        else:
            break
        copied.append(text)
    written = [REFERENCE if "→" in text else OWN for text, parts in zip(texts, parsed) if parts]
    first = next(filter(None, parsed), None)
    from_the_right = first and (int(first[1]), int(first[3])) == terms[-1] != terms[0]
    rest, answer = carry_on(products, values, REFERENCE if from_the_right else OWN)
    for n, step in enumerate(rest):
        at = min(len(copied) + n, len(written) - 1)  # beyond the attempt's end: as its last step
        rest[n] = spell(step, written[at] if written else OWN)
    return join_steps(copied + rest, answer)


def _takes(values: list[int], a: int, b: int) -> bool:
    """Takes a and b out of the values if both are there."""
    left = list(values)
    for value in (a, b):
        if value not in left:
            return False
        left.remove(value)
    values[:] = left
    return True


# ------------------------------------------------------------------------ critics
@dataclass(frozen=True)
class Critique:
    text: str | None  # the corrected walk, or None: the critic failed
    failure: str = ""  # why it failed, in a few words


def scribe(problems: list[str], attempts: list[str]) -> list[Critique]:
    """The rule-based critic of the embedded task."""
    critiques = []
    for problem, attempt in zip(problems, attempts, strict=True):
        try:
            critiques.append(Critique(corrected_walk(problem, attempt)))
        except ValueError as error:
            critiques.append(Critique(None, failure=str(error)))
    return critiques
