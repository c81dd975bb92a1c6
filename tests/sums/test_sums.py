"""tests/sums: the critic's four cases, its verdicts, and what the preparation leaves untrained."""

import random
import re
import runpy
import sys
from types import SimpleNamespace

import pytest
from conftest import ROOT, byte_tokenizer

from critic import Problem

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


@pytest.mark.parametrize("share", [0, 1])
def test_only_wrong_values_are_untrained(share, monkeypatch):
    monkeypatch.delitem(sys.modules, "scribe", raising=False)  # the toy's has the same name
    prepare, tokenizer = runpy.run_path(ROOT / "tests/sums/prepare.py"), byte_tokenizer()
    rng = random.Random(0)
    args = SimpleNamespace(terms=4, digits=3, wrong_share=share)
    samples = [prepare["draw_sample"](rng, args, n % 3 > 0) for n in range(100)]
    _, responses, trained = prepare["encode"](tokenizer, samples, 1)
    for ids, keep in zip(responses, trained, strict=True):
        assert ids[-1] == 1 and keep[-1]  # the end token
        text, wrong = tokenizer.decode(ids[:-1]), []  # a token is a byte
        for operands, value in re.findall(r"([0-9 +]+) = ([0-9]+)", text):
            if sum(map(int, operands.split("+"))) != int(value):
                wrong.append(value)
        assert len(wrong) == share
        assert "".join(wrong) == "".join(text[t] for t, kept in enumerate(keep) if not kept)
