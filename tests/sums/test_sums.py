"""tests/sums: the critic's four cases and its verdicts, and the problems."""

import runpy
import sys

import pytest
from conftest import ROOT

from critic import Problem, is_correct, load_problems

SCRIBE = runpy.run_path(ROOT / "tests/sums/scribe.py")
PROBLEM = Problem("Add, in steps of the form a + b = c: 34 + 57 + 86", "a reference", "177")
RIGHT = "<step_1>34 + 57 = 91</step_1> <step_2>91 + 86 = 177</step_2> <answer>177</answer>"
PLACES = (
    "<step_1>add 10s: 30 + 50 + 80 = 160</step_1> <step_2>add 1s: 4 + 7 + 6 = 17</step_2> "
    "<step_3>add all: 160 + 17 = 177</step_3> <answer>177</answer>"
)


@pytest.mark.parametrize(
    "attempt, critique, wrong",  # wrong: the text that judge marks in each step and answer
    [
        (RIGHT, RIGHT, ["", "", ""]),  # A
        (PLACES, PLACES, ["", "", "", ""]),
        ("<step_1>91 + 86 = 177</step_1> <answer>177</answer>", RIGHT, ["91", "177"]),  # B
        ("<step_1>34 + 57 = 91</step_1> <step_2>91 + ", RIGHT, [""]),  # C
        (RIGHT.replace("91", "81"), RIGHT, ["81", "177", ""]),  # D
        (RIGHT.replace("91", "81").replace("177", "167"), RIGHT, ["81", "", ""]),
        (PLACES.replace("17<", "19<"), PLACES, ["", "19", "17", ""]),
        (PLACES.replace("30 + ", ""), PLACES, ["160", "", "", ""]),
        (RIGHT.replace("34 + 57 = 91", "I add"), RIGHT, ["I add", "91", "177"]),
        ("no steps", RIGHT, []),
    ],
)
def test_scribe(attempt, critique, wrong):
    assert SCRIBE["critique"](PROBLEM, attempt) == critique
    spans = SCRIBE["judge"](PROBLEM, attempt)
    assert [attempt[slice(*span)] if span else "" for span in spans] == wrong


def test_scribe_other_task():
    assert SCRIBE["critique"](Problem("What is twice 2?", "s", "4"), RIGHT) is None


def test_the_problems_answer_is_their_solutions_and_their_critiques(tmp_path, monkeypatch):
    monkeypatch.delitem(sys.modules, "scribe", raising=False)  # the toy's has the same name
    monkeypatch.setattr(sys, "argv", ["problems.py", "--out", str(tmp_path), "--digits", "3"])
    runpy.run_path(ROOT / "tests/sums/problems.py", run_name="__main__")
    sets = load_problems(tmp_path)  # which raises if two are the same
    assert [len(problems) for problems in sets] == [300, 50, 100]
    for problem in sets[2]:
        total = sum(int(number) for number in problem.statement.split(": ")[1].split(" + "))
        for text in problem.solution, SCRIBE["critique"](problem, "no steps"):
            assert is_correct(text, problem.answer) and problem.answer == str(total)
