"""eval.py: numbers against independent ones, the first wrong step, the page as an HTML parser sees it, bad input."""

import dataclasses
import importlib
import json
import math
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch

import sd
from critic import first_difference, scribe
from test_run import FAST

evaluation = importlib.import_module("eval")  # `import eval` would hide the builtin
PROBLEM = "3*7+8*4+6*6"
WRONG = "<step_1>3*7=1</step_1><step_2>8*4=3</step_2><step_3>×66→6</step_3><step_4>1+3=4</step_4><step_5>4+6=0</step_5><answer>0</answer>"
RIGHT = WRONG.replace("8*4=3", "8*4=2").replace("1+3=4", "1+2=3").replace("4+6=0", "3+6=9").replace("r>0<", "r>9<")


def rollout_of(text, tokenizer, problem=PROBLEM, answer="9"):
    ids = tokenizer.encode(text, add_special_tokens=False) + [tokenizer.eos_token_id]
    [prompt] = sd.build_prompts(tokenizer, [problem], [None])
    graded = float(sd.is_correct(text, answer))
    return sd.Rollout(sd.Problem(problem, RIGHT, answer), prompt, ids, text, graded, 0.0, critique=RIGHT)


# ------------------------------------------------------------------------ numbers
def test_interval_on_known_cases():
    assert evaluation.interval(evaluation.bootstrap([3.0] * 20)) == (3, 3, 3)
    mean, low, high = evaluation.interval(evaluation.bootstrap([0.0, 1.0] * 100))
    half = 1.96 * math.sqrt(0.25 / 200)  # the normal approximation for 200 coin flips
    assert mean == 0.5 and abs(low - (0.5 - half)) < 0.01 and abs(high - (0.5 + half)) < 0.01
    ratio, low, high = evaluation.interval(evaluation.bootstrap([1.0, 4.0], [1.0, 2.0]))
    assert (ratio, low, high) == (5 / 3, 1, 2)  # of sums, not a mean of ratios; samples: 1/1, 5/3, 8/4
    assert all(map(math.isnan, evaluation.interval(evaluation.bootstrap([0.0, 0.0], [0.0, 0.0]))))


def test_differences_are_paired():
    """Two runs that swing together from problem to problem: their difference is known far better than either."""
    swing = [100.0 * (n % 2) for n in range(50)]
    better = {"avg": {"problems": [value + 1 for value in swing]}}
    assert evaluation.differences({"a": {"avg": {"problems": swing}}, "b": better}) == {"b − a": (1, 1, 1)}


def test_seeds_are_pooled_and_their_spread_kept(monkeypatch, tiny):
    _, tokenizer = tiny
    right, wrong = rollout_of(RIGHT, tokenizer), rollout_of(WRONG, tokenizer)
    sampled = {"one": [[right, right], [wrong, wrong]], "two": [[right, wrong], [wrong, wrong]]}
    monkeypatch.setattr(evaluation, "sample_or_recall", lambda name, *_: sampled[name])
    rows = {"critique": [evaluation.Subject(name, name, "base") for name in sampled]}
    row = evaluation.measure(rows, [None, None], 2, 0, None)["critique"]
    assert row["avg"]["seeds"] == [50, 25] and row["avg"]["problems"] == [75, 0] and row["avg"]["mean"] == 37.5
    assert row["pass"]["mean"] == 50 and row["maj"]["seeds"] == [50, 25]  # a tie of two answers is half a point


# ------------------------------------------------------------------------ per-token advantage
def test_the_first_wrong_step_and_the_kinds_of_tokens(tiny):
    _, tokenizer = tiny
    texts, around, kinds = evaluation.places(rollout_of(WRONG, tokenizer), tokenizer)
    assert "".join(texts) == WRONG
    assert around == ["before"] * 7 + ["in"] * 7 + ["after"] * 25  # a step is 7 tokens; the end token stands after
    step = ["right step"] * 7
    wrong = ["rest of wrong step"] * 5 + ["wrong value"] + ["rest of wrong step"]
    assert kinds == step + wrong + step * 3 + ["answer"] * 3 + [""]
    assert set(evaluation.places(rollout_of(RIGHT, tokenizer), tokenizer)[1]) == {"before"}


@pytest.mark.parametrize(
    "attempt, critique, name",
    [
        ("<step_1>a</step_1><answer>1</answer>", "<step_1>a</step_1><answer>2</answer>", "answer"),
        ("<step_1>a  b</step_1>", "<step_1>a\nb</step_1><answer>2</answer>", None),  # unfinished, not wrong
        ("<step_1>a</step_1><step_2>b</step_2>", "<step_1>a</step_1>", "step_2"),
        ("<answer>1</answer>", "<step_1>a</step_1><answer>1</answer>", "answer"),
        ("no tags", "<step_1>a</step_1>", None),
    ],
)
def test_first_difference(attempt, critique, name):
    difference = first_difference(attempt, critique)
    assert (difference and difference.name) == name


def other(tiny_folder):
    """Another model of the same shape."""
    model, _ = sd.load(str(tiny_folder), "cpu")
    for parameter in model.parameters():
        parameter.data += 0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
    return model


def test_scores_are_what_training_calls_the_advantage(tiny, tiny_folder, config):
    """Against sd.token_advantages, from the full log-probs, one rollout at a time."""
    (student, tokenizer), teacher, cfg = tiny, other(tiny_folder), config(temperature=0.7, micro_batch=2, chunk=5)
    rollouts = [rollout_of(text, tokenizer) for text in (WRONG, RIGHT, WRONG[:40])]
    scores = evaluation.score(rollouts, student, teacher, tokenizer, scribe, cfg)
    assert list(scores) == [name for name in sd.CONTEXTS if name != "grpo"]  # no teacher there
    for name in "reference", "critique":
        for rollout, values in zip(rollouts, scores[name]):
            context = sd.CONTEXTS[name](rollout.problem, rollout.text, rollout.critique)
            [prompt] = sd.build_prompts(tokenizer, [PROBLEM], [context])
            with torch.no_grad():
                told = sd.log_probs(teacher, sd.completion_states(teacher, [prompt], [rollout.completion]), 0.7)
                own = sd.log_probs(student, sd.completion_states(student, [rollout.prompt], [rollout.completion]), 0.7)
            expected = sd.token_advantages(own, told, torch.tensor(rollout.completion))
            torch.testing.assert_close(torch.tensor(values), expected, atol=1e-5, rtol=1e-4)


def test_identical_prompts_give_zero_advantage(tiny, config):
    model, tokenizer = tiny
    scores = evaluation.score([rollout_of(WRONG, tokenizer)], model, model, tokenizer, scribe, config())
    assert scores["empty"] == [[0.0] * 39] and any(scores["critique"][0])


def test_analysis_by_hand(tiny):
    _, tokenizer = tiny
    groups = [[rollout_of(WRONG, tokenizer), rollout_of(RIGHT, tokenizer)]]
    located = [evaluation.places(r, tokenizer) for r in groups[0]]
    wrong = [-0.1] * 7 + [0.0] * 5 + [-6.0, 0.0] + [0.0] * 24 + [0.3]  # 0.7 before, 6 in, 0.3 after
    right = [-0.6] * 13 + [0.0] * 26
    result = evaluation.analyse(groups, {"critique": [wrong, right], "none": [None, None]}, located)
    value = {key: round(numbers[0], 4) for key, numbers in result["critique"].items()}
    assert value["A before"] == -0.1 and value["A in"] == round(-6 / 7, 4) and value["|A| after"] == round(0.3 / 25, 4)
    assert (value["share before"], value["share in"], value["share after"]) == (10, 85.7143, 4.2857)
    assert (value["share right step"], value["share wrong value"], value["share answer"]) == (10, 85.7143, 0)
    assert (value["A right step"], value["A wrong value"]) == (round(-0.7 / 28, 4), -6)  # steps 1, 3, 4 and 5 hold
    assert value["mean A_t"] == -0.2 and value["pushed down"] == round(100 / 3, 4)
    assert round(result["tokens"]["share in"][0], 4) == round(100 * 7 / 39, 4) and "none" not in result
    tables = evaluation.advantage_tables(result)
    assert tables[1].header[1:] == ["right step", "wrong value", "rest of wrong step", "answer"] and len(tables) == 5 + 1
    assert tables[1].rows[0][2].startswith("-6.00")
    unchecked = {"critique": {name: numbers for name, numbers in result["critique"].items() if "step" not in name}}
    for name in "wrong value", "answer":
        del unchecked["critique"][f"A {name}"], unchecked["critique"][f"|A| {name}"], unchecked["critique"][f"share {name}"]
    assert len(evaluation.advantage_tables(unchecked)) == 4  # none by kind of token


def test_the_summary_sets_what_a_context_came_to_beside_what_it_says():
    results = {name: {"avg": {"mean": 50.0, "low": 40.0, "high": 60.0}} for name in ("base", "critique", "untaught")}
    told = {"A in": (-6, -7, -5), "A before": (0, 0, 0), "share in": (80, 70, 90), "pushed down": (3, 2, 4)}
    curves = [(({"step": 0}, 20.0), ({"step": 10}, start)) for start in (30.0, 35.0)]  # of two seeds
    rows = {"critique": [evaluation.Subject("", "", "", curve=curve) for curve in curves]}
    plain = evaluation.summary_table(rows, results, {"tokens": told, "critique": told, "untrained": told}, 8)
    assert plain.header[1:5] == ["Avg@8", "validation", "A_t in", "A_t before"]  # of the first wrong step
    [row] = plain.rows
    assert row[:4] == ["critique", "50.0 [40.0, 60.0]", "20.0 to 32.5", "-6.00 [-7.00, -5.00]"]
    assert row[4:] == ["0.00 [0.00, 0.00]", "80.0 [70.0, 90.0]", "3.0 [2.0, 4.0]"]
    told |= {"A wrong value": (-9, -9, -9), "share wrong value": (85, 80, 90)}
    [row] = evaluation.summary_table(rows, results, {"tokens": told, "critique": told}, 8).rows
    assert row[3:6] == ["-9.00 [-9.00, -9.00]", "–", "85.0 [80.0, 90.0]"]  # where steps can be checked


# ------------------------------------------------------------------------ the page
class Structure(HTMLParser):
    """The tags of a page in their order; fails on one that is closed and was not open."""

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.tags, self.text = [], ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, tuple(name for name, _ in attributes)))

    def handle_endtag(self, tag):
        self.tags.append("/" + tag)

    def handle_data(self, data):
        self.text += data


HOSTILE = [
    "<script>alert(1)</script>", "</td></table></div>", "\"' onload=x \"", "&amp;&#60;script&gt;", "\x00\x07\x1b[31m",
    "\u202egnp.exe\u2066\u200f", "<!-- <![CDATA[ ]]>", "</svg></title></code>", "x" * 10_000, "{0} %s \\n", "\ud800",
]  # fmt: skip


@pytest.mark.parametrize("hostile", HOSTILE, ids=range(len(HOSTILE)))
def test_hostile_text_leaves_the_pages_structure_intact(hostile):
    def page(text):
        rollout = sd.Rollout(sd.Problem(text, text, text), [], [], text, 0.0, 0.0, critique=text)
        pieces = [text[i : i + 9] for i in range(0, len(text), 9)]
        located = (pieces, ["in"] * len(pieces), [""] * len(pieces))
        figure = evaluation.example(rollout, located, {text: [-1.0] * len(pieces)})
        points = (({text: 0}, 10.0), ({text: 10}, 20.0))
        curve = evaluation.curve_chart({text: [evaluation.Subject(text, "", "", sd.Config(), points)]}, text)
        for picture in (part[part.index("<svg") : part.index("</svg>") + 6] for part in (figure, curve)):
            ElementTree.fromstring(picture)  # well-formed: it can stand in a file of its own
        table = evaluation.Table(text, [text], [[text]])
        return Structure(evaluation.page([table], {}, [table], [figure, curve], text, text))

    harmless = "y" * len(hostile)
    assert page(hostile).tags == page(harmless).tags
    assert not any(ord(c) in range(0x202A, 0x202F) or ord(c) in range(0x2066, 0x206A) for c in page(hostile).text)


def test_the_page_asks_for_nothing_and_runs_nothing():
    text = evaluation.page([], {}, [], [], "base", "python eval.py")
    tags = {tag[0] for tag in Structure(text).tags if isinstance(tag, tuple)}
    assert not tags & {"script", "link", "img", "iframe", "object"} and "@import" not in text and "url(" not in text


# ------------------------------------------------------------------------ whole
@pytest.fixture
def runs(tmp_path, tiny_folder, monkeypatch):
    """Two seeds of critique and one of grpo on a tiny random model, in the folder we are in."""
    problems = sd.embedded_problems()
    monkeypatch.setattr(sd, "embedded_problems", lambda: (problems[0], problems[1][:4], problems[2][:4]))
    monkeypatch.chdir(tmp_path)
    for condition, seed in ("critique", 0), ("critique", 1), ("grpo", 0):
        sd.main([*FAST.split(), "--model", str(tiny_folder), "--condition", condition, "--seed", str(seed)])
    return tmp_path


def status(*args):
    try:
        evaluation.main(list(map(str, args)))
    except SystemExit as stop:
        return stop.code
    return 0


def test_the_table_repeats_what_training_printed_and_samples_once(runs, monkeypatch, capsys):
    command = "runs/critique", "runs/critique-1", "runs/grpo", "--k", 2, "--json", "numbers.json", "--html", "page.html"
    assert status(*command) == 0
    first, numbers = capsys.readouterr().out, json.loads((runs / "numbers.json").read_text())
    assert list(numbers["results"]) == ["base", "critique", "grpo"]
    trained = [json.loads((runs / "runs" / name / "result.json").read_text()) for name in ("critique", "critique-1", "grpo")]
    for metric in "avg", "pass", "maj", "length":
        assert numbers["results"]["critique"][metric]["seeds"] == pytest.approx([t["test"][metric] for t in trained[:2]])
        assert numbers["results"]["grpo"][metric]["mean"] == pytest.approx(trained[2]["test"][metric])
        assert numbers["results"]["base"][metric]["mean"] == pytest.approx(trained[2]["base"][metric])
    assert "its 2 seeds" in first and "grpo − critique" in first
    assert "what training with each context came to" in first
    took = first[first.index("what training took") :].splitlines()[2:4]
    assert [line.split()[:2] for line in took] == [["critique", "12"], ["grpo", "96"]]  # 4 steps of 3 problems; 8 each in grpo
    for line, name in zip(took, ("critique", "grpo")):
        folders = [f for f in (runs / "runs").iterdir() if f.name.startswith(name)]
        steps = [json.loads(text) for f in folders for text in (f / "metrics.jsonl").read_text().splitlines()]
        for kind, printed in zip(evaluation.TOKENS, line.split()[2:]):
            assert printed == f"{sum(step.get(kind, 0) for step in steps) / len(folders):,.0f}"
    assert "critique" in Structure((runs / "page.html").read_text()).text
    monkeypatch.setattr(sd, "evaluate", None)  # nothing is sampled again
    assert status(*command) == 0
    assert capsys.readouterr().out == first


def test_a_model_may_stand_where_a_run_does_and_an_unfinished_run_is_evaluated(runs, tiny_folder, capsys):
    (runs / "runs/critique/result.json").unlink()
    assert status("runs/critique", tiny_folder, "--k", 1, "--advantages", tiny_folder) == 0
    printed = capsys.readouterr().out
    assert "runs/critique never finished (step 4 of 4)" in printed and printed.count("base") == 2  # and in the difference
    assert status(runs / "runs/critique/best", "--k", 1) == 0


def change(path, **settings):
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))


@pytest.mark.parametrize("band, kept", [(("0", "0.35"), 3), (("0.05", "0.35"), 0)])
def test_keep_band_writes_the_problems_that_are_solved_that_often(band, kept, tiny_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    rows = [{"problem": f"{n}*7+1*1", "solution": "½", "answer": "none"} for n in range(3)]
    Path("all.jsonl").write_text("\n".join(map(json.dumps, rows)))
    flags = "--data all.jsonl --k 2 --max-new-tokens 4 --gen-batch 3 --device cpu --out hard.jsonl --keep-band"
    evaluation.main([str(tiny_folder), *flags.split(), *band])
    assert [json.loads(line) for line in Path("hard.jsonl").read_text(encoding="utf-8").splitlines()] == rows[:kept]
    assert f"{kept} of 3 problems" in capsys.readouterr().out


def test_bad_input_is_one_line_and_status_2(runs, capsys):
    (runs / "neither").mkdir()
    (runs / "early").mkdir()
    (runs / "early/config.json").write_text((runs / "runs/grpo/config.json").read_text())
    (runs / "early/metrics.jsonl").write_text("")
    for name in "broken", "other":
        (runs / name).mkdir()
        (runs / name / "config.json").write_text((runs / "runs/grpo/config.json").read_text())
        (runs / name / "metrics.jsonl").write_text("")
        (runs / name / "best").mkdir()
    (runs / "broken/config.json").write_text("{")
    change(runs / "other/config.json", data="other.jsonl")
    capsys.readouterr()
    for args, said in [
        ((), "name runs or models"),
        (("neither",), "neither a run's folder nor a model's"),
        (("early",), "no checkpoint yet"),
        (("broken",), "cannot be read"),
        (("runs/grpo", "other"), "different problems"),
        (("runs/grpo", "--k", 0), "--k is 0"),
        (("runs/grpo", "--k", "x"), "--k"),
        (("runs/grpo", "--data", "nowhere.jsonl"), "nowhere.jsonl"),
        (("runs/grpo", "--k", 1, "--json", "nowhere/numbers.json"), "nowhere"),
        (("nowhere/at/all",), "nowhere/at/all"),
        (("runs/grpo", "--temperature", -1), "--temperature"),
        (("runs/grpo", "--gen-batch", 0), "--gen-batch"),
        (("runs/grpo", "--keep-band", 0, 1), "--keep-band needs"),
    ]:
        assert status(*args) == 2, args
        error = capsys.readouterr().err
        line = [text for text in error.splitlines() if text.startswith("eval.py:")]
        assert len(line) == 1 and said in line[0] and "Traceback" not in error, (args, error)


def test_rows_keep_recipes_apart(config):
    run = lambda name, **settings: evaluation.Subject(name, name + "/best", "base", config(**settings))  # noqa: E731
    rows = evaluation.rows_of([run("a"), run("b", seed=1), run("c", lr=1.0), evaluation.Subject("m", "m", "m")])
    assert {label: [s.name for s in members] for label, members in rows.items()} == {
        "base": ["base"], "m": ["m"], "critique": ["a", "b"], "critique (c)": ["c"],
    }  # fmt: skip
    assert dataclasses.replace(run("a"), curve=()) == run("a")
