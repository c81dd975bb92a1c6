"""Models write anything: ten thousand hostile strings through everything that reads one, and bombs of 100 kB in linear time."""

import random
import time
from xml.etree import ElementTree

import pytest

import critic
import eval as evaluation
import sd

PROBLEM = sd.Problem("3*7+8*4+6*6", "<step_1>×66→6</step_1><answer>9</answer>", "9")
PIECES = [
    "<step_1>", "</step_1>", "<step_2>", "<answer>", "</answer>", "<step_", "</", "<", ">", "<answer", "<think>", "</think>",
    "3*7=1", "8*4=2", "×66→6", "⊕12→3", "3*7=", "*", "9" * 50, "-", "1", ",", "234", ".", "/", "%", "$", "=", "x", " is ",
    "\\frac", "\\boxed{", "\\text{", "{", "}", "(", "^", "٣", "½", "−", "\x00", "\x1b[31m", "\u202e", "\u2066", "\ud800",
    "{0}", "%s", "__import__('os')", "<script>", "&lt;", "]]>", "../..", "\n", "\r", "\t", " ", "🙂", "a" * 30,
]  # fmt: skip


def page(text):
    """An attempt's picture on the page, which must stay well-formed."""
    pieces = [text[i : i + 5] for i in range(0, len(text), 5)]
    ElementTree.fromstring(evaluation.heat_map(pieces, ["in"] * len(pieces), {"critique": [-1.0] * len(pieces)}))


READERS = {
    "parse_steps": critic.parse_steps,
    "canonical": critic.canonical,
    "is_correct": lambda text: critic.is_correct(text, "9"),
    "keeps_format": critic.keeps_format,
    "judge": critic.judge,
    "scribe": lambda text: critic.scribe([PROBLEM.problem], [text], [""]),
    "scribe, of a problem": lambda text: critic.scribe([text], ["<step_1>3*7=1</step_1>"], [""]),
    "thinking": lambda text: critic.without_thinking(text).encode(),
    "critique": lambda text: critic.no_walk(text, "9"),
    "first_difference": lambda text: critic.first_difference(text, text[::-1]),
    "quote": lambda text: sd.CONTEXTS["quote"](PROBLEM, text, "<step_1>1</step_1>" + text),
    "omit": lambda text: sd.CONTEXTS["omit"](PROBLEM, text, "<step_1>1</step_1>" + text),
    "paint": sd.paint,
    "page": page,
}


@pytest.mark.parametrize("name", READERS)
def test_ten_thousand_hostile_strings(name):
    rng, read = random.Random(0), READERS[name]
    for _ in range(10_000):
        read("".join(rng.choices(PIECES, k=rng.randrange(20))))
    for text in ("", *PIECES):
        read(text)


@pytest.mark.parametrize("name", [name for name in READERS if name != "page"])
def test_bombs_of_100_kb_take_linear_time(name):
    """A pattern with a back-reference took minutes on ten thousand tags that open and never close."""
    read = READERS[name]
    for piece in (*PIECES, "<step_1>3*7=1</step_1>", "<step_1></step_1><answer>1</answer>", "<step_1", "1 ", "a ", "\\frac{1}{"):
        began = time.perf_counter()
        read(piece * (100_000 // len(piece)))
        read("<step_1>" + piece * (100_000 // len(piece)) + "</step_1><answer>1</answer>")
        read("<answer>" + (piece * 1000)[:990] + "</answer>")  # below the length from which answers are not read
        assert time.perf_counter() - began < 2, piece


@pytest.mark.parametrize("text", PIECES)
def test_the_scribe_ends_in_the_right_answer_whatever_it_reads(text):
    for attempt in text, f"<step_1>3*7=1</step_1>{text}", f"<step_1>{text}</step_1>", f"<step_1>3*7=1{text}</step_1>":
        assert critic.corrected_walk(PROBLEM.problem, attempt).endswith("<answer>9</answer>")
