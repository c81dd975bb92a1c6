"""eval.py: numbers against independent ones, kinds of tokens, the cache, the page, bad input."""

import html
import importlib
import json
import math
import random
import re
import shutil
import statistics
from dataclasses import replace
from itertools import accumulate
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from conftest import TOY, byte_tokenizer, flags, plain_log_probs, save_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

import critic
import sd
from critic import Problem

ev = importlib.import_module("eval")  # `import eval` would hide the builtin
RIGHT = "<step_1>2 * 3 = 6</step_1> <step_2>6 + 5 = 11</step_2> <answer>11</answer>"
WRONG = "<step_1>2 * 3 = 6</step_1> <step_2>6 + 7 = 13</step_2> <answer>13</answer>"
PROBLEM, NAN = Problem("2*3+1*5", RIGHT, "11"), math.nan


def attempt_of(text, tokenizer=None, problem=PROBLEM, **more):
    ids = tokenizer.encode(text, add_special_tokens=False) + [1] if tokenizer else [5] * 4
    more = {"reward": float(critic.is_correct(text, problem.answer)), "critique": RIGHT} | more
    return ev.Attempt(problem, [7, 8, 9], ids, text=text, **more)


def test_intervals_against_a_direct_computation():
    values = torch.rand(40, 2)
    values[::3, 0] = values[:, 1] = NAN
    drawn = torch.randint(40, (2000, 40), generator=torch.Generator().manual_seed(0)).tolist()
    draws = [values[problems, 0].tolist() for problems in [range(40), *drawn]]
    mean, *means = [statistics.mean(v for v in draw if v == v) for draw in draws]
    cuts = statistics.quantiles(means, n=40, method="inclusive")
    expected = {"some": pytest.approx([mean, cuts[0], cuts[-1]], abs=1e-5)}
    assert ev.intervals(values, ["some", "none"]) == expected


def test_pass_maj_and_avg_of_one_problem():
    def scores(*answers):
        texts = [f"<answer>{answer}</answer>" if answer else "it is 11" for answer in answers]
        return pytest.approx(ev.group_scores([attempt_of(text) for text in texts]))

    assert scores("11", "11", "3", None) == [50, 100, 100, 4]
    assert scores("11", "3", "4", "4") == [25, 0, 100, 4]
    assert scores("11", "3", "2", None) == [25, 100 / 3, 100, 4]  # three answers tie
    assert scores(None, None, None, "11.0") == [25, 100, 100, 4]  # no answer is no vote
    split = ["11 apples"] * 3 + ["11"] * 3 + ["9"] * 4  # votes that are graded equal count as one
    assert scores(*split) == [60, 100, 100, 4] and scores(None) == [0, 0, 0, 4]


def test_rows_of_the_table(make_config):
    cfgs = make_config(), make_config(seed=1, out="z", micro_batch=1), make_config(lr=0.5)
    curves = {0: 1.0, 5: 2.0}, {0: 2.0, 5: 2.0}, {0: 2.0, 5: 2.0}
    curves, best = [*curves], (5, 0, 0)
    runs = [ev.Subject("xyw"[i], "xyw"[i], "root", cfgs[i], curves[i], best[i]) for i in range(3)]
    rows = ev.rows_of([*runs, ev.Subject("root", "root", "root")])
    names = {label: [s.model for s in row] for label, row in rows.items()}
    assert names == {"base": ["root"], "x": ["x", "y"], "w": ["w"]}
    swing = torch.tensor([0.0, 100.0] * 10)[None, :, None]  # [S, P, 1]
    scores = {"base": swing, "x": torch.cat([swing + 1, swing + 5]), "w": swing}
    shown = {row: columns["Avg"] for row, columns in ev.score_rows(rows, scores, ["Avg"]).items()}
    assert shown["x"][0] == 53 and shown["x, 2 seeds"] == [53, 51, 55]
    assert shown["x − base"] == pytest.approx([3, 3, 3]) and shown["w"] == shown["base"]
    said = ev.describe_training(runs)
    assert said.startswith("x: 5 steps of 3 x 1 rollouts, lr 0.004; best step 5\ny: ")
    assert "best step 0, the base\n" in said and "WARN" not in said
    curves[2][7] = 0.0
    assert "WARNING: unequal budgets" in ev.describe_training(runs)
    contexts = {"critique": {"teacher right": [70.0]}, "empty": {"teacher right": [20.0]}}
    drawn = ev.charts(rows, {"base": [10.0], "x": [53.0], "w": [30.0]}, contexts)
    assert len(set(re.findall('stroke="(.*?)"', drawn))) == 3  # grid, x, w
    for mark in 'points="0.0,1.0 128.6,2.0"', 'points="0.0,2.0 128.6,2.0 180.0,0.0"':
        assert mark in drawn and "translate(50 210) scale(2 -2)" in drawn  # y grows upwards
    assert "<circle cx=126.0 cy=53.0 " in drawn and "<circle cx=36.0 cy=10.0 " in drawn


def test_a_table_is_as_wide_as_its_contents():
    rows = {"runs/x": {"a": [1.25, -0.04, 100], "bc": [-0.04, 0, 0.04]}, "longer": {"bc": [5] * 3}}
    lines = ["title", f"{'a':>24}   bc", "     x  1.2 [0.0, 100.0]  0.0", f"longer{'–':>18}  5.0"]
    assert ev.table("title", ["a", "bc"], rows).split("\n")[1:-1] == lines
    assert "-0.04 [0.00, 0.04]" in ev.table("", ["bc"], rows, decimals=2)


def test_advantages_are_those_of_training(tiny, tmp_path, make_config, monkeypatch):
    monkeypatch.chdir(tmp_path)
    teacher, tokenizer = tiny
    cfg = make_config(temperature=0.7, micro_batch=2)
    cfg.contexts = [*sd.CONTEXTS]
    student, _ = sd.load_model(save_model(tmp_path, tokenizer, seed=1), "cpu", "float32")
    attempts = [attempt_of(text, tokenizer) for text in (WRONG, RIGHT, "<answer>")]
    attempts[1].critique = None
    readings = ev.read_contexts(attempts, student, teacher, tokenizer, cfg)
    assert "grpo" not in readings  # it has no teacher
    assert [bool(a.advantages) for a in readings["critique"]] == [True, False, True]
    for a in readings["reference"] + readings["critique"][::2]:
        told = plain_log_probs(teacher, a.teacher_prompt, a.completion, 0.7)
        own = plain_log_probs(student, [7, 8, 9], a.completion, 0.7)
        expected = (told - own)[range(len(a.completion)), a.completion].tolist()
        assert a.advantages == pytest.approx(expected, abs=1e-4)
    [attempts[0].prompt] = sd.encode_chats(tokenizer, [sd.solver_message(PROBLEM)])
    readings = ev.read_contexts(attempts[:1], student, student, tokenizer, cfg)
    assert set(readings["empty"][0].advantages) == {0} and any(readings["critique"][0].advantages)


def test_each_character_belongs_to_the_token_that_completes_it(tiny):
    byte_level, text = byte_tokenizer(), "aé→𝒙 中🍎b a"
    vocabulary = ["<unk>", "<end>", *[f"<0x{n:02X}>" for n in range(256)], "a", "b", "▁"]
    core = models.BPE({token: n for n, token in enumerate(vocabulary)}, [], byte_fallback=True)
    core = Tokenizer(core)  # as in Llama 2: what is not in the vocabulary is written in bytes
    steps = decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()
    core.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)])
    sentencepiece = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<end>")
    by_byte = [piece for c in text for piece in [""] * (len(c.encode()) - 1) + [c]] + [""]
    for tokenizer, written in (byte_level, text), (sentencepiece, text.replace(" ", "▁")):
        ids = tokenizer.encode(written, add_special_tokens=False) + [1]
        assert sd.token_texts(tokenizer, ids, text) == by_byte

    core = byte_tokenizer().backend_tokenizer  # with merges that end within a character
    trainer = trainers.BpeTrainer(
        vocab_size=275, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    core.train_from_iterator(["中丁七万 🍎🍏🍐 éè"] * 9, trainer)
    merging = PreTrainedTokenizerFast(tokenizer_object=core)
    text = "中🍎🍐 é万国" * 50
    ids = merging.encode(text, add_special_tokens=False)
    prefixes = [merging.decode(ids[: n + 1]) for n in range(len(ids))]
    whole = [0 if prefix.endswith("\ufffd") else len(prefix) for prefix in prefixes]
    merging.decode = decode = Mock(side_effect=merging.decode)
    texts = sd.token_texts(merging, ids, text)
    assert (
        list(accumulate(map(len, texts))) == list(accumulate(whole, max))
        and "" in texts
        and "".join(texts) == text
    )
    assert sum(len(call.args[0]) for call in decode.call_args_list) < 20 * len(ids)  # linear

    assert sd.token_texts(tiny[1], [5, 6, 5, 1], tiny[1].decode([5, 6, 5]))[1].startswith(" ")
    for tokenizer, characters in (byte_level, "😀"), (sentencepiece, "ééé"):
        ids = tokenizer.encode(characters, add_special_tokens=False)[:-1]  # no valid UTF-8
        ids += tokenizer.encode("ab", add_special_tokens=False)
        assert sd.token_texts(tokenizer, ids + [1], tokenizer.decode(ids))[-2:] == ["b", ""]
    rng = random.Random(0)
    for tokenizer in byte_level, sentencepiece, tiny[1]:
        for _ in range(50):
            ids = rng.choices(range(4, 200), k=20)
            text = tokenizer.decode(ids)
            assert "".join(sd.token_texts(tokenizer, ids + [1], text)) == text


def test_of_what_kind_tokens_are(tiny):
    attempt = attempt_of(WRONG, tiny[1])
    attempt.tokens = sd.token_texts(tiny[1], attempt.completion, WRONG)
    assert attempt.tokens[:4] == ["<step_1>", "2", " *", " 3"] and attempt.tokens[-1] == ""

    def judge(problem, text):  # step 2 is wrong in its second operand; so is the answer
        return [None, (text.index("7"), text.index("7") + 1), (0, 0)]

    wrong = ["rest of wrong step"] * 3 + ["wrong value"] + ["rest of wrong step"] * 3
    by_judge = ["right step"] * 7 + wrong + ["answer"] * 3 + [None]  # the end token
    places = [ev.PLACES[n] for n in [0] * 7 + [1] * 7 + [2] * 4]
    assert ev.token_kinds(attempt, judge) == by_judge and ev.token_kinds(attempt, None) == places
    attempt.critique = RIGHT.replace("= 6", "=" + " " * 20 + "6")  # places are those in the attempt
    assert ev.token_kinds(attempt, None) == places
    attempt.critique = None  # nobody knows where it goes wrong
    assert ev.token_kinds(attempt, None) == [] and ev.token_kinds(attempt, judge) == by_judge
    assert ev.token_kinds(replace(attempt, reward=1.0), judge) == []


def test_quantities_by_hand():
    kinds = ["right step", "wrong value", "wrong value", None]
    wrong = attempt_of(WRONG, kinds=kinds, advantages=[0.5, -4.0, -2.0, 1.5])
    expected = {"right step": 0.5, "wrong value": -3, "share wrong value": 75, "answer": NAN}
    expected |= {"share answer": NAN, "pushed down": NAN, "teacher right": NAN}
    assert {n: ev.metric(wrong, n) for n in expected} == pytest.approx(expected, nan_ok=True)
    right = attempt_of(RIGHT, kinds=[], advantages=[-0.5, -0.51, 9.0, -3.0], teacher_right=1.0)
    assert [ev.metric(right, name) for name in ("pushed down", "teacher right")] == [50, 100]

    def row(*values):  # two problems, two rounds
        return [attempt_of(WRONG, kinds=["answer"], advantages=[v] if v else []) for v in values]

    readings = {"critique": row(-1, -8, None, -6), "mine": row(None, None, None, None)}
    numbers = ev.analyse(readings, ["answer"], k=2)
    assert numbers["critique"]["answer"][0] == (-1 + (-8 - 6) / 2) / 2 and numbers["mine"] == {}


def test_the_example_is_the_wrong_attempt_with_the_latest_error(capsys):
    def column(text, aligned, statement, **more):
        feedback = critic.Critique(more.get("critique"), aligned=aligned)
        a = attempt_of(text, feedback=feedback, tokens=["6 + 7", " = 13", ""], **more)
        a.condition, a.advantages, a.context = "critique", [0.9, -1.5, 2.0], "seen\x1b[2J"
        a.problem = replace(a.problem, statement=statement)
        return a, replace(a, condition="mine", advantages=[], context=None, masked="no teacher")

    early, late, again = column(WRONG, 0.1, "a"), column(WRONG, 0.5, "b"), column(WRONG, 0.4, "b")
    failed, right = column(WRONG, 0.0, "c", critique=None), column(RIGHT, 1.0, "b")
    readings = dict(enumerate(zip(failed, right, early, again, late, right, strict=True)))
    assert ev.pick_examples(readings) == [late, early, failed, right]
    ev.print_example(late)
    *_, shown, seen, nothing, why = capsys.readouterr().out.splitlines()
    assert shown == "critique: 6 + 7 = 13[-1.5][+2.0]" and seen.endswith("teacher sees: seen [2J")
    assert nothing.strip() == "mine:" and why.endswith("no teacher")
    ev.print_example(failed)
    ev.print_example(right)
    assert capsys.readouterr().out == ""


def test_only_what_changed_is_sampled_again(tiny, make_config, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    generate, (model, tokenizer) = Mock(wraps=sd.generate), tiny
    monkeypatch.setattr(sd, "generate", generate)

    def sampled(answer="11", **settings):
        generate.reset_mock()
        problems = [Problem(text, "", answer) for text in "23"]
        cfg = make_config(**settings)
        cfg.k = 2
        attempts = ev.sample_attempts(model, tokenizer, problems, cfg)
        for a in attempts:
            assert [a.prompt] == sd.encode_chats(tokenizer, [sd.solver_message(a.problem)])
            assert a.cut_off == (a.completion[-1] not in [1, *range(40, 60)])  # its end tokens
            assert len(problems) == 1 or a.other_problem != a.problem
        return generate.call_count, [a.completion for a in attempts], [a.reward for a in attempts]

    first = sampled()
    assert first[0] == 1 and sampled() == (0, *first[1:]) and len(first[1]) == 4
    texts = tokenizer.batch_decode(first[1], skip_special_tokens=True)
    monkeypatch.setattr(critic, "is_correct", lambda text, answer: text == answer)
    assert sampled(answer=texts[0]) == (0, first[1], [text == texts[0] for text in texts])
    for change in (
        {"device": "cpu:0"},
        {"seed": 3},
        {"temperature": 0.5},
        {"max_new_tokens": 5},
        {"gen_batch": 2},
    ):
        assert sampled(**change)[0] >= 1 and sampled(**change)[0] == 0
    assert sampled(gen_batch=2)[1][:2] != sampled(gen_batch=2)[1][2:]  # every batch draws anew
    tokenizer.chat_template = "{{ messages[0].content }}"
    assert sampled()[0] == 1 and sampled()[0] == 0
    model.lm_head.weight.data[70] += 0.5
    sd.save_merged(model, tokenizer, "changed")
    model, _ = sd.load_model("changed", "cpu", "float32")
    assert sampled()[0] == 1


def test_an_interrupt_keeps_the_batches_sampled_before(tiny, make_config, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    generate = Mock(side_effect=[[[5]], KeyboardInterrupt, [[6]], [[7]]])
    monkeypatch.setattr(sd, "generate", generate)
    cfg = make_config(gen_batch=1)
    cfg.k = 3
    with pytest.raises(KeyboardInterrupt):
        ev.sample_attempts(*tiny, [PROBLEM], cfg)
    attempts = ev.sample_attempts(*tiny, [PROBLEM], cfg)
    assert [a.completion for a in attempts] == [[5], [6], [7]] and generate.call_count == 4


def test_what_a_model_wrote_cannot_change_the_page(make_config, monkeypatch):
    def page(text):
        a = attempt_of(text, problem=Problem(text, text, text), condition=text, reward=0.0)
        a.tokens, a.advantages = [text[:1], text[1:]], [-1.0, 2.0]
        a.context = a.critique = text
        numbers = {"scores": {text: {"Avg": [1.0, 0.0, 2.0]}}, "contexts": {"tokens": {}, text: {}}}
        monkeypatch.setitem(sd.CONTEXTS, text, Mock(__doc__=text))
        rows = {text: [ev.Subject("", "", "", make_config(), {0: 1.0, 5: 2.0})]}
        return ev.page(rows, text, numbers, text, [[a]], ev.Subject(text, "", "", 1))

    hostile = ["<script>alert(1)</script>", '"\' onload=x "', "</p></pre></style>", "&lt;b>&#60;b>"]
    hostile += ["\x00\x1b[31m", "\u202egnp.exe\u2066\u200f", "<!-- <![CDATA[", "{0} %s", "\ud800"]
    for text in hostile:
        assert re.findall("<[^>]*>", page(text)) == re.findall("<[^>]*>", page("y" * len(text)))
        assert all(c.isprintable() or c == "\n" for c in html.unescape(page(text)))


@pytest.fixture
def runs(tmp_path, small, tiny, monkeypatch):
    """Two seeds of critique, a grpo that never got better; by turns they are wrong and right."""
    monkeypatch.chdir(tmp_path)
    for name, condition, best in ("c", "critique", 4), ("c-1", "critique", 2), ("g", "grpo", 0):
        folder = tmp_path / "runs" / name
        save_model(folder / "best", tiny[1], seed=5)
        cfg = sd.parse_args(flags(small | {"condition": condition, "seed": int("1" in name)}), {})
        (folder / "config.json").write_text(json.dumps(vars(cfg)))
        lines = [{"step": step, "val_avg": 9.0 if step == best else 1.0} for step in (0, 2, 4)]
        (folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, [*lines, {"step": 5}])))
    problems = [
        json.dumps({"problem": p.statement} | vars(p))
        for p in (PROBLEM, Problem("1*5+2*3", RIGHT, "11"))
    ]
    (tmp_path / "data.jsonl").write_text("\n".join(problems))

    def generate(model, tokenizer, prompts, *settings, title=None):
        assert torch.initial_seed() == 2
        texts = [WRONG, RIGHT] if "best" in model.name_or_path else ["", ""]
        return [attempt_of(texts[i % 2], tokenizer).completion for i in range(len(prompts))]

    monkeypatch.setattr(sd, "generate", generate)


def test_table_advantages_json_and_page(runs, make_config, monkeypatch, capsys):
    asked, ask_critic = [], sd.ask_critic
    monkeypatch.setattr(sd, "ask_critic", lambda r, *a: asked.append(len(r)) or ask_critic(r, *a))
    monkeypatch.setitem(sd.CONTEXTS, "mine", lambda r: f"mine & {r.critique}")
    monkeypatch.setitem(sd.CONTEXTS, "silent", lambda r: None)
    monkeypatch.delitem(sd.CONTEXTS, "omit")
    argv = ["--k", "2", "--data", "data.jsonl", "--json", "n.json", "--html", "p.html"]
    ev.main(["runs/c", "runs/c-1", "runs/c", *argv, "runs/g", "--advantages", "runs/c"])
    numbers, page = json.loads(Path("n.json").read_text()), Path("p.html").read_text("utf-8")
    scores = {label: row["Avg@2"] for label, row in numbers["scores"].items()}
    assert list(scores)[:4] == ["base", "runs/c", "runs/c, 2 seeds", "runs/g"]
    assert (
        scores["base"][0] == 0 and scores["runs/c"][0] == 50 and scores["runs/g"] == scores["base"]
    )
    assert asked == [4]  # one call, for all attempts and contexts
    contexts = numbers["contexts"]
    assert {"mine", "reference", "shuffled"} < set(contexts) and "omit" not in contexts
    assert contexts["empty"]["wrong value"][0] != 0  # the run is scored, not its base
    assert "advantages: see p.html" in capsys.readouterr().out
    ev.main([*argv[:6], "--advantages", "runs/c", "--condition", "mine"])
    assert [*json.loads(Path("n.json").read_text())["contexts"]] == ["tokens", "mine", "empty"]
    ev.main(["runs/c", *argv[:4], "--advantages", "runs/c"])  # without a page
    said = capsys.readouterr().out
    assert contexts["mine"]["teacher right"][0] == 0 and "mine: <step_1>" in said
    assert contexts["silent"] == {} and re.search(r"silent( +–){4}\n", said)
    assert "critic_failed 0.00, aligned 0.33" in said
    assert "than without a context, if it is given: " in said and ", quote," in said
    accuracy = {"a": [5, 1, 9], "empty": [4, 2, 5], "b": [5.1, 0, 9]}
    right = {name: {"teacher right": interval} for name, interval in accuracy.items()}
    assert ev.name_unused(right | {"silent": {}}).endswith(" given: a")
    assert ev.name_unused({"empty": {}}) == ""
    assert "&lt;/step_1&gt;</span>\n<span" in page  # a line for each step
    assert re.search(r"<dt>critique, A_t [+-]\d.*<dt>mine", page) and '%)">runs/c</b>' in page
    assert "mine &amp; &lt;step_1&gt;" in page and not re.search("<script|<link|<img|src=", page)
    own = ["--max-new-tokens", "9", "--critic", str(TOY / "scribe.py")]
    ev.main(["--advantages", "runs/c/best", *argv[:4], *own])  # a plain model
    model, _ = ev.open_subject("runs/c").load(make_config(dtype="bfloat16"))
    assert model.dtype == torch.float32  # as it was saved


def test_what_is_evaluated_and_with_which_settings(runs, world, tiny_folder, monkeypatch):
    """Test problems, the base's attempts, flags before the first run's settings, its dtype."""
    monkeypatch.setattr(ev, "measure", Mock(return_value=torch.zeros(1, 3, 4)))
    with monkeypatch.context() as patch:
        explained = {"tokens": {}}, "", [[attempt_of(RIGHT, condition="critique", tokens=[])]]
        patch.setattr(ev, "score_contexts", scored := Mock(return_value=explained))
        more = ["--html", "p.html", "--seed", "5", "--temperature", "0.5"]
        ev.main(["runs/c", *more])
        subject, problems, cfg = scored.call_args.args
        assert subject.model == tiny_folder and problems == critic.load_problems(world)[2]
        assert (cfg.seed, cfg.temperature, cfg.max_new_tokens) == (5, 0.5, 12)
        ev.main(["runs/c", *more, "--advantages", "runs/g"])
        assert scored.call_args.args[-1].condition == "critique"
    cfg.seed, cfg.dtype, cfg.teacher_thinking, cfg.k = 2, "bfloat16", True, 1
    monkeypatch.setattr(sd, "load_model", load := Mock(wraps=sd.load_model))
    monkeypatch.setattr(sd, "give_context", give := Mock(side_effect=sd.give_context))
    ev.score_contexts(subject, problems, cfg)
    assert [call.args[2] for call in load.call_args_list] == ["bfloat16"] * 2
    assert all(call.args[3] for call in give.call_args_list)
    cfg.critic, cfg.teacher_thinking = None, False
    numbers, _, examples = ev.score_contexts(subject, problems, cfg)
    assert set(numbers) == {"tokens"} | sd.NO_CRITIC - {"grpo"}
    [masked] = [replace(examples[0][0], advantages=[], tokens=["<step_1>", "2"])]
    assert ">2</span>" in ev.example([masked])  # without a teacher, too


BAD = """: a run or a model
runs/nix: runs/nix is no run
runs: runs is no run and no model; for all runs in it, pass runs/*
runs/c --data words.jsonl: does not know these words
runs/c other: cannot compare runs of different --model or --data
runs/broken: config.json or metrics.jsonl is broken
runs/c --temperature 0: --temperature
runs/c --k 0: --k is 0: must be at least 1 and
runs/c --html runs: runs is a folder
--advantages runs/c --condition praise: invalid choice
runs/c --data empty.jsonl: no problems"""


@pytest.mark.parametrize("case", BAD.split("\n"))
def test_bad_input_is_one_line_before_any_sampling(case, runs, monkeypatch, capsys):
    monkeypatch.setattr(sd, "generate", None)
    Path("runs/broken").mkdir()
    shutil.copytree("runs/c", "other")  # outside runs/, so that it is not listed
    config = json.loads(Path("other/config.json").read_text()) | {"data": "data.jsonl"}
    Path("other/config.json").write_text(json.dumps(config))
    words = '{"problem": "How many?", "solution": "5", "answer": "5"}'
    Path("words.jsonl").write_text(words)
    for file in "empty.jsonl", "runs/broken/metrics.jsonl", "runs/broken/config.json":
        Path(file).touch()
    data, (command, _, said) = Path("data.jsonl").read_text(), case.partition(": ")
    with pytest.raises(SystemExit, match="^2$"):
        ev.main(command.split())
    error = capsys.readouterr().err.strip()
    assert error.startswith("eval.py: ") and "\n" not in error and said in error
    assert Path("data.jsonl").read_text() == data
