"""Writes sums for a chat model as it comes: train, val and test.jsonl.

    python tests/sums/problems.py --out runs/sums
    python sd.py --model MODEL --data runs/sums --critic tests/sums/scribe.py ...

`--terms` and `--digits` make the sums as hard as the model needs: it should solve 10% to 35%.
"""

import argparse
import json
import random
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parents[1]), str(HERE)]

from scribe import REFERENCE, join_steps, work_out  # noqa: E402

from critic import Problem  # noqa: E402

SIZES = {"train": 300, "val": 50, "test": 100}
# The form of a step stands in letters: numbers would be copied.
TEXT = "Add the numbers two at a time, in steps of the form a + b = c: {}"


def draw_terms(rng: random.Random, args) -> list[int]:
    return [rng.randrange(10 ** (args.digits - 1), 10**args.digits) for _ in range(args.terms)]


def make_problem(terms: list[int]) -> Problem:
    solution = join_steps(*work_out((terms, []), REFERENCE), gap="\n")
    return Problem(TEXT.format(" + ".join(map(str, terms))), solution, answer=str(sum(terms)))


def draw_problems(args) -> dict[str, list[Problem]]:
    """The three sets, without duplicates and the same every time."""
    rng, problems = random.Random("problems"), {}
    while len(problems) < sum(SIZES.values()):
        problem = make_problem(draw_terms(rng, args))
        problems[problem.statement] = problem
    rest = iter(problems.values())
    return {name: [next(rest) for _ in range(n)] for name, n in SIZES.items()}


def write_problems(sets: dict[str, list[Problem]], folder: Path) -> None:
    for name, problems in sets.items():
        rows = [
            {"problem": p.statement, "solution": p.solution, "answer": p.answer} for p in problems
        ]
        lines = [json.dumps(row) + "\n" for row in rows]
        (folder / f"{name}.jsonl").write_text("".join(lines))


def main() -> None:
    parser = argparse.ArgumentParser(description="Writes sums as train, val and test.jsonl.")
    parser.add_argument("--terms", type=int, default=4, help="numbers in a sum")
    parser.add_argument("--digits", type=int, default=2, help="digits of each number")
    parser.add_argument("--out", type=Path, required=True, help="folder")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    write_problems(draw_problems(args), args.out)


if __name__ == "__main__":
    main()
