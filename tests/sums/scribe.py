"""Sums in steps, and their rule-based critic. Numbers of up to 99 digits, any number of terms.

There are two ways to work out `34 + 57 + 86`:

    own way    34 + 57 = 91, 91 + 86 = 177
               running totals, from the left
    reference  add 10s: 30 + 50 + 80 = 160, add 1s: 4 + 7 + 6 = 17, add all: 160 + 17 = 177
               one place at a time

The state is a pair: the terms still to be added (a running total comes first) and the sums of
whole places. Together they add up to the answer as long as every step is right.
"""

import re

from critic import parse_steps

OWN, REFERENCE = "", "add all: "  # first words of a step; the reference also has "add 10s: "
STEP = re.compile(r"\s*(add (?:10*s|all): )?[0-9]{1,99}(?: \+ [0-9]{1,99})+ = [0-9]{1,99}\s*")


def read_problem(text: str) -> list[int]:
    """The terms of the first sum in the text, such as `34 + 57 + 86`. Empty if there is none."""
    sums = re.search(r"\b[1-9][0-9]{0,98}( \+ [1-9][0-9]{0,98})+", text)
    return [int(term) for term in sums[0].split(" + ")] if sums else []


def read_step(text: str) -> tuple[str, list[re.Match]] | None:
    """(first words, numbers) of a step, the value being the last number. None: cannot be read."""
    if not (match := STEP.fullmatch(text)):
        return None
    return match[1] or OWN, list(re.compile("[0-9]+").finditer(text, max(match.end(1), 0)))


def place_of(words: str) -> int | None:
    """The place that a step adds: 10 for "add 10s: ". None if it adds whole values."""
    return None if words in (OWN, REFERENCE) else int(words[len("add ") : -len("s: ")])


def operands_there(state: tuple, words: str) -> list[int]:
    """The operands that a step may take. The 10s of 34 and 157 are 30 and 50."""
    terms, sums = state
    place = place_of(words)
    return [t // place % 10 * place for t in terms] if place else sums + terms


def replace(state: tuple, words: str, rest: list[int], value: int) -> tuple[list[int], list[int]]:
    """The state after a step. rest: available operands that the step does not take."""
    terms, sums = state
    if not place_of(words):
        return [value, *rest], []
    pairs = zip(terms, operands_there(state, words), strict=True)
    terms = [term - operand for term, operand in pairs]
    return terms if any(terms) else [], [*sums, value]


def work_out(state: tuple, words: str = OWN) -> tuple[list[str], int]:
    """Continues from the state in the way of a step with these words: (step texts, answer)."""
    texts = []
    while len(state[0] + state[1]) > 1:
        if words != OWN:
            place = 10 ** (len(str(max(state[0], default=0))) - 1)
            words = f"add {place}s: " if len(state[0]) > 1 else REFERENCE
        there = operands_there(state, words)
        operands = there[:2] if words == OWN else there
        value = sum(operands)
        texts.append(f"{words}{' + '.join(map(str, operands))} = {value}")
        state = replace(state, words, there[len(operands) :], value)
    return texts, (state[0] + state[1])[0]


def take(state: tuple, text: str) -> tuple[tuple, tuple[int, int] | None]:
    """The state after an attempt's step, and the span of its first error, or None.

    An unavailable operand uses up an available one. So later steps can still be right.
    """
    step = read_step(text)
    rest = operands_there(state, step[0]) if step else []
    if not any(rest):  # unreadable, or a place that was already added or that no term has
        return state, (0, len(text))
    words, [*numbers, total] = step
    operands, value, wrong = [int(number[0]) for number in numbers], int(total[0]), []
    for operand, number in zip(operands, numbers, strict=True):
        if operand in rest:
            rest.remove(operand)
        else:
            wrong.append(number)
    if value != sum(operands) or (place_of(words) and rest):  # a place must be added in full
        wrong.append(total)
    rest = rest[sum(number is not total for number in wrong) :]
    return replace(state, words, rest, value), wrong[0].span() if wrong else None


def judge(problem, attempt: str) -> list[tuple[int, int] | None]:
    """For each step and answer: None if it is right, else (start, end) of its first error.

    attempt[start:end] is an unavailable operand, else the value, or the whole text if it cannot
    be read. Terms and values computed by the attempt, right or wrong, are available until they
    are added: a step that continues correctly from an earlier error is right. The answer is right
    if it repeats the one value that is left.
    """
    state, verdicts = (read_problem(problem.statement), []), []
    for step in parse_steps(attempt):
        if step.name == "answer":
            right = [step.text.strip()] == [str(value) for value in state[0] + state[1]]
            span = None if right else (0, len(step.text))
        else:
            state, span = take(state, step.text)
        start = step.start + len(f"<{step.name}>")
        verdicts.append((start + span[0], start + span[1]) if span else None)
    return verdicts


def join_steps(texts: list[str], answer: int, gap: str = " ") -> str:
    tagged = [f"<step_{n}>{text}</step_{n}>" for n, text in enumerate(texts, 1)]
    return gap.join([*tagged, f"<answer>{answer}</answer>"])


def critique(problem, attempt: str) -> str | None:
    """A corrected version of the attempt, or None if the problem is not of this task.

    A  all steps right: repeats them          C  unfinished: repeats the steps and finishes
    B  a step is missing: inserts it          D  a wrong step: repeats those before it, rewrites it

    From there it continues in the way, own or reference, of the last step it read.
    """
    state, copied, words = (read_problem(problem.statement), []), [], OWN
    if not state[0]:
        return None
    for step in parse_steps(attempt):
        if step.name == "answer":
            break
        new_state, wrong = take(state, step.text)
        words = (read_step(step.text) or [words])[0]
        if wrong:
            break
        copied.append(step.text)
        state = new_state
    texts, answer = work_out(state, words)
    return join_steps(copied + texts, answer)
