"""Whole runs of sd.py on a tiny random model: order, checkpoints, kills, and bad input."""

import builtins
import gc
import io
import json
import os
import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path
from unittest.mock import DEFAULT, Mock

import pytest
import torch
from conftest import read_lines, reward_some
from filelock import FileLock
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import critic
import sd
from critic import UserError

BEST = "best/model.safetensors"


def files_of(folder):
    names = "metrics.jsonl", "samples.jsonl", "config.json", BEST
    files = [folder / name for name in names if (folder / name).exists()]  # best/ may be missing
    return {file.name: file.read_bytes().replace(bytes(folder), b"") for file in files}


@pytest.fixture
def scores(monkeypatch):
    """The Avg of the next validations; nothing else in these runs samples twice a problem."""
    given, sample = [], sd.sample_rollouts

    def scripted(model, tokenizer, problems, group_size, cfg):
        rollouts = sample(model, tokenizer, problems, group_size, cfg)
        if group_size == cfg.val_samples and given:
            avg = given.pop(0)
            assert problems == critic.load_problems(cfg.data)[1]
            for rollout in rollouts:
                rollout.reward = avg / 100
        return rollouts

    monkeypatch.setattr(sd, "sample_rollouts", scripted)
    return given


# ------------------------------------------------------------------------ what a run leaves
@pytest.mark.parametrize("condition", ["grpo", "reference", "critique", "quote"])
def test_a_run_leaves_its_folder_and_is_tested(condition, run, tmp_path, scores, monkeypatch):
    monkeypatch.setitem(sd.CONTEXTS, "quote", lambda r: f"<answer>{r.critique[-12]}</answer>")
    out, scores[:] = tmp_path / "run", [0, 5, 3, 5, 3, 0]
    if condition == "grpo":
        monkeypatch.setattr(sd, "is_correct", reward_some)

    def test(command):  # the trained model's memory is free by then
        tensors = [thing for thing in gc.get_objects() if isinstance(thing, torch.Tensor)]
        assert not any(4 in tensor.shape and tensor.dim() == 2 for tensor in tensors)  # rank 4
        return 0

    run.test.side_effect = test
    assert run(out, condition=condition, test_samples=3)[0] == 0
    assert re.findall("step (.): validation Avg", run.said) == ["2", "4"]
    metrics = read_lines(out / "metrics.jsonl")
    assert [m["step"] for m in metrics] == [0, 1, 2, 3, 4]
    assert [m["step"] for m in metrics if "val_avg" in m] == [0, 2, 4]
    measure = {"grpo": "group_advantage"}.get(condition, "token_advantage")
    assert all(m[measure] and m["entropy"] > 0 for m in metrics[1:])
    samples = read_lines(out / "samples.jsonl")
    assert [s["step"] for s in samples] == [n for n in (1, 2, 3, 4) for _ in range(3)]
    for s in samples:
        lengths = {len(s["tokens"]), len(s["completion"])}
        assert lengths == {len(s["advantages"] or s["tokens"])} and not s["masked"]
    assert json.loads((out / "config.json").read_text())["condition"] == condition
    AutoModelForCausalLM.from_pretrained(out / "best")
    assert not list(out.rglob("*.new"))
    assert run.test.call_args.args[0][2:5] == [str(out), "--k", "3"]
    assert run(tmp_path / "again", condition=condition, test_samples=0)[0] == 0
    assert run.test.call_count == 1 and not (tmp_path / "again/best").exists()  # the base is


def test_validation_reports_avg_and_pass(monkeypatch, problems, make_config):
    rewards = [1.0, 0.0, 0.0, 0.0, 1.0, 1.0]  # 2 samples of each of 3 problems
    rollouts = [sd.Rollout(problems[n // 2], [], [1], "", r) for n, r in enumerate(rewards)]
    monkeypatch.setattr(sd, "sample_rollouts", lambda *_: rollouts)
    row = sd.validate(None, None, problems[:3], 4, make_config(val_samples=2))
    assert row == pytest.approx({"val_avg": 50, "val_pass": 200 / 3})


def test_every_problem_once_an_epoch_and_new_draws_a_step(run, tmp_path, problems, monkeypatch):
    monkeypatch.setattr(torch, "manual_seed", seeded := Mock(wraps=torch.manual_seed))
    texts, orders = {p.statement for p in problems}, []
    for seed in 1, 2:
        run(tmp_path / f"{seed}", seed=seed, steps=6, condition="reference", eval_every=6)
        order = [s["problem"]["statement"] for s in read_lines(tmp_path / f"{seed}/samples.jsonl")]
        assert len(order) == 18  # 6 steps of 3: two epochs of 8 and a bit
        assert set(order[:8]) == set(order[8:16]) == texts and order[:8] != order[8:16]
        orders.append(order[:8])
    seeds = [call.args for call in seeded.mock_calls]  # the first run's adapters, 4 validations: 1
    assert len(set(seeds)) == 12 + 2 and seeds.count((1,)) == 5 and orders[0] != orders[1]


def test_the_optimizer_takes_the_rate_the_rank_and_no_weight_decay(run, tmp_path):
    """AdamW's first step is the rate in each weight, whatever the gradient, and B starts at 0."""
    run(tmp_path / "run", condition="reference", steps=1, lr=0.01)
    state = torch.load(tmp_path / "run/last.pt")
    assert state["best_avg"] == 0  # a random model never improves: the best is step 0
    for name, before in state["best_adapters"].items():
        moved = (state["adapters"][name] - before).abs().max()  # A has no gradient while B is 0
        assert moved == (0 if before.any() else pytest.approx(0.01, rel=1e-3)) and 4 in before.shape


def test_best_is_the_first_best_step_merged_in_fp32(run, tmp_path, tiny_folder, scores):
    settings = {"dtype": "bfloat16", "eval_every": 1, "condition": "reference", "lr": 5e-6}
    scores[:] = [0, 5]
    run(tmp_path / "one", steps=1, **settings)
    scores[:] = [0, 5, 5, 1, 4]
    run(tmp_path / "run", **settings)
    assert not scores
    assert (tmp_path / "run" / BEST).read_bytes() == (tmp_path / "one" / BEST).read_bytes()
    base = load_file(f"{tiny_folder}/model.safetensors")
    for name, weight in load_file(tmp_path / "run" / BEST).items():
        moved = (weight - base[name].bfloat16().float()).abs().max()
        assert 1e-7 < moved < 1e-4 if "_proj" in name else moved == 0  # in bf16, 0 or 1e-3


# ------------------------------------------------------------------------ nothing is silent
NOTHING = {  # a condition that cannot be trained on -> the reason that is given
    "critique": "3 x no critique: no steps or no answer",
    "answer": "3 x the context is None",
    "empty": "3 x the teacher agrees",
    "reference": "[1-3] x longer than the model's 256 positions",
    "grpo": "24 x equal rewards in its group",
}


@pytest.mark.parametrize("condition", NOTHING)
def test_a_run_that_trains_on_nothing_stops_and_says_why(condition, run, tmp_path, monkeypatch):
    monkeypatch.setitem(sd.CONTEXTS, "answer", lambda r: None)
    monkeypatch.setitem(sd.CONTEXTS, "reference", lambda r: "1 " * 300)
    reason, rule = NOTHING[condition], tmp_path / "rule.py"
    rule.write_text("def critique(problem, attempt):\n    return 'It is wrong.'\n")
    settings = {"condition": condition, "critic": rule}
    status, error = run(tmp_path / "run", **settings)
    assert status == 2 and re.search(f"nothing to train on in 4 steps: {reason}", error)
    assert re.search(f"step 1 trained on nothing: {reason}", run.said)
    warned = "fails on the first reference solution: no steps or no answer" in run.said
    assert warned == (condition == "critique")  # the only one of them that asks the critic
    assert "in 6 steps" in run(tmp_path / "long", steps=9, **settings)[1]  # 18 are no accident


def test_a_faulty_context_is_found_before_the_base_is_validated(run, tmp_path, monkeypatch):
    monkeypatch.setitem(sd.CONTEXTS, "reference", lambda rollout: ["a"])
    status, error = run(tmp_path / "run", condition="reference")
    assert status == 2 and "must return str or None" in error and not (tmp_path / "run").exists()


def test_a_step_without_a_critique_does_not_end_a_run(run, tmp_path):
    rule = tmp_path / "rule.py"
    lines = (sd.TOY / "scribe.py").read_text() + "\nright, calls = critique, []\n"
    lines += "def critique(problem, attempt):\n    calls.append(1)\n"
    rule.write_text(lines + "    return right(problem, attempt) if len(calls) > 1 else 'cut o'\n")
    assert run(tmp_path / "run", critic=rule, problems_per_step=1)[0] == 0
    assert "step 1 trained on nothing: 1 x no critique" in run.said
    assert "The critic wrote: cut o" in run.said
    masked = [m["masked"] for m in read_lines(tmp_path / "run/metrics.jsonl")[1:]]
    [first, *_] = read_lines(tmp_path / "run/samples.jsonl")
    assert masked == [1, 0, 0, 0] and first["feedback"]["reply"] == "cut o"


def test_what_the_base_does_with_the_prompt_is_said_with_what_to_change(run, tmp_path, capsys):
    run(tmp_path / "run", condition="grpo", steps=1)
    row = "base, [0-9]+ validation attempts: Avg 0.0, 0% have a closed <answer>, [1-9][0-9]*% "
    row += "cut off at --max-new-tokens 12\nWARNING: .* raise --val-samples\n"
    noise = "WARNING: .*\n.* raise --max-.* change SOLVE.*\nWARNING: no attempt is right"
    assert re.search(row + noise, run.said)
    for formatted, cut_off, said in (0.5, 0.1, "change SOLVE"), (0.8, 0.3, "a cut-off attempt"):
        shares = {"reward": 0.1, "formatted": formatted, "cut_off": cut_off}
        sd.report_base(shares, 20, sd.parse_args([]))
        assert said in capsys.readouterr().out
    sd.report_base({"reward": 0.1, "formatted": 0.8, "cut_off": 0.1}, 20, sd.parse_args([]))
    assert "WARNING" not in capsys.readouterr().out


def test_the_toy_and_a_model_of_ones_own_keep_their_defaults_apart(run, tmp_path, world):
    own = ["--model", "some/model", "--data", "all.jsonl"]
    with pytest.raises(UserError, match="--critic --max-new-tokens .start from 300. --lr .start"):
        sd.parse_args(own)
    with pytest.raises(UserError, match="needs --data --lr .start from 2e-5.: the defaults are"):
        sd.parse_args([*own[:2], "--condition", "grpo", "--max-new-tokens", "9"])
    assert sd.parse_args([*own, "--condition=grpo", "--lr=1", "--max-new-tokens=9"]).critic is None
    assert [sd.parse_args(["--condition", c]).lr for c in ("grpo", "critique")] == [5e-4, 4e-3]
    data = tmp_path / "data.jsonl"
    row = '{"problem": "How many of %d?", "solution": "5", "answer": "5"}'
    data.write_text("\n".join(row % n for n in range(20)))
    status, error = run(tmp_path / "run", data=data)
    assert status == 2 and "does not know these words, so pass another --model: How many" in error
    assert not (tmp_path / "run").exists()


def test_the_first_sample_says_what_the_critique_keeps_and_if_it_was_cut_off(capsys):
    steps = "<step_1>a</step_1> <step_2>{}</step_2> <answer>{}</answer>"
    attempt, tokenizer = steps.format("b", 8), sd.AutoTokenizer.from_pretrained(sd.TOY)
    rollout = sd.Rollout(critic.Problem("p", "s", "9"), [], [], attempt, 0.0, cut_off=True)
    rollout.feedback = critic.parse_critique(steps.format("c", 9), rollout)
    rollout.context = rollout.critique = rollout.feedback.text
    sd.show(rollout, [], tokenizer)
    said = capsys.readouterr().out
    assert "reward 0, cut off\n" in said and "1 of 3 steps come before" in said
    feedback = [critic.Critique(None, aligned=aligned) for aligned in (0.2, 0.6)]
    rollouts = [replace(rollout, completion=[5], feedback=each) for each in feedback]
    logs = {"metrics": [{}, {"step": 1, "grad_norm": 1.0}], "samples": []}
    sd.log_rollouts(rollouts, logs, tokenizer, None)
    assert [sample["feedback"]["aligned"] for sample in logs["samples"]] == [0.6, 0.2]
    for aligned in 0.05, 0.5:
        row = {"step": 1, "aligned": aligned, "grad_norm": 1.0}
        sd.log_rollouts([], {"metrics": [{}, row], "samples": []}, tokenizer, None)
        assert ("act as references" in capsys.readouterr().out) == (aligned < 0.1)


# ------------------------------------------------------------------------ interrupted and killed
def test_ctrl_c_leaves_the_best_model_and_resume_ends_as_if_nothing_had_been(
    run, world, tiny_folder, tmp_path, scores, monkeypatch
):
    whole, out = tmp_path / "whole", tmp_path / "run"
    settings = {"condition": "critique", "lr": 0.05, "micro_batch": 2}
    settings["critic"] = str(shutil.copy(sd.TOY / "scribe.py", tmp_path))
    scores[:] = [0, 5, 3]
    run(whole, **settings)
    # Ctrl-C after the checkpoint of step 2, and after step 3 was logged.
    step = Mock(wraps=sd.train_step, side_effect=[DEFAULT] * 3 + [KeyboardInterrupt])
    monkeypatch.setattr(sd, "train_step", step)
    scores[:] = [0, 5]
    status, error = run(out, **settings)
    assert status == 2 and f"to go on: python sd.py --out {out} --resume" in error
    assert [m["step"] for m in read_lines(out / "metrics.jsonl")] == [0, 1, 2, 3]
    assert (out / BEST).read_bytes() == (whole / BEST).read_bytes()

    def is_refused(said, *more):
        status, error = run(out, *more, **settings)
        return status == 2 and said in error and "\n" not in error.strip()

    before = (out / "last.pt").read_bytes()
    assert is_refused("is not empty")
    assert is_refused("was started with --steps 4, now 3", "--resume", "--steps", "3")
    assert is_refused("was started with --critic", "--resume", "--critic", "http://127.0.0.1/v1")
    template = Path(tiny_folder, "chat_template.jinja")
    rule = Path(settings["critic"])
    for file, old, part in (
        (world / "train.jsonl", "8", "data"),
        (rule, "8", "rule"),
        (template, "{", "model"),
    ):
        content = file.read_text()
        file.write_text(content.replace(old, f" {old}", 1))
        assert is_refused(f"changed since its start: {part};", "--resume")
        file.write_text(content)
    with monkeypatch.context() as patch:
        patch.setitem(sd.CONTEXTS, "critique", lambda rollout: "")
        patch.setattr(sd, "HELP", "Help:")
        assert is_refused("changed since its start: prompts, context; undo", "--resume")
    with FileLock(out / "lock"):
        assert is_refused("lock", "--resume")
    step.side_effect = None
    assert (out / "last.pt").read_bytes() == before
    for scores[:] in [3], []:  # the second time it is finished, and writes the same again
        out = out.rename(tmp_path / f"moved-{len(scores)}")
        sd.main(["--resume", "--out", str(out), "--device", "cpu"])
        assert files_of(out) == files_of(whole)
    sd.main(["--resume", "--out", str(out), "--steps", "6"])  # a longer run is no other run
    assert [m["step"] for m in read_lines(out / "metrics.jsonl")] == [0, 1, 2, 3, 4, 5, 6]
    saved = torch.load(out / "last.pt")
    saved["settings"]["critic"] = "http://dead/v1"
    torch.save(saved, out / "last.pt")
    moved = ["--resume", "--out", str(out), "--critic", "http://other/v1"]
    assert sd.open_run(moved)[0].critic == "http://other/v1"


def test_a_run_that_failed_in_its_first_step_may_start_over(run, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(sd, "train_step", Mock(side_effect=UserError("a bad rule")))
        assert run(tmp_path / "run")[0] == 2 and (tmp_path / "run/last.pt").exists()
    assert run(tmp_path / "run")[0] == run(tmp_path / "whole")[0] == 0
    assert files_of(tmp_path / "run") == files_of(tmp_path / "whole")


def test_a_run_killed_after_any_operation_on_a_file(run, small, tmp_path, monkeypatch):
    """A kill leaves what the folder holds at that moment, so a copy of it stands for the kill."""
    whole, copies = tmp_path / "whole", []
    monkeypatch.setattr(sd, "is_correct", reward_some)  # so that a checkpoint beats the base

    def copy_after(module, name):
        function = getattr(module, name)

        def call(*args, **kwargs):
            result = function(*args, **kwargs)
            if name != "open" or "w" in str(args[1:]):  # opening it has emptied it
                copies.append(tmp_path / f"killed-{len(copies)}")
                subprocess.run(["cp", "-r", whole, copies[-1]], check=True)
            return result

        patch.setattr(module, name, call)

    settings = {"condition": "critique", "lr": 0.05, "steps": 2, "eval_every": 1}
    with monkeypatch.context() as patch:
        for module, name in (builtins, "open"), (io, "open"), (os, "fsync"), (os, "replace"):
            copy_after(module, name)
        copy_after(sd, "save_merged")
        assert run(whole, **settings)[0] == 0
    assert len(copies) > 15 and (whole / BEST).exists()
    for out in copies:
        resume = ["--resume"] if (out / "last.pt").exists() else []
        assert run(out, *resume, **settings)[0] == 0 and files_of(out) == files_of(whole)


# ------------------------------------------------------------------------ bad input
BAD = {  # flags -> what is said
    "--condition praise": "argument --condition: invalid choice: 'praise'",
    "--lr nan": "--lr is nan",
    "--seed 9999999999": "--seed is 9999999999",
    "--condition grpo --group-size 1": "--group-size 1: grpo compares",
    "--device abacus": " on abacus: ",
    "--model no/such/x": "cannot use the model no/such/x on cpu: no such folder",
    "--teacher-thinking": "no thinking mode",
    "--critic /no/such/rule.py": "sd.py: /no/such/rule.py: No such file or directory",
}


@pytest.mark.parametrize("more", BAD)
def test_bad_input_is_said_without_a_traceback_and_leaves_nothing(more, run, tmp_path):
    status, error = run(tmp_path / "run", *more.split())
    assert status == 2 and BAD[more] in error.strip().splitlines()[-1] and "Traceback" not in error
    assert not list(tmp_path.iterdir())


def test_a_faulty_rule_is_found_before_the_model_is_loaded(run, tmp_path, monkeypatch):
    monkeypatch.setattr(sd, "load_model", None)
    (tmp_path / "rule.py").write_text("def critique(problem, attempt):\n    return [attempt]\n")
    status, error = run(tmp_path / "run", critic=tmp_path / "rule.py")
    assert status == 2 and "rule.py: critique() must return str or None, got ['" in error


def test_a_reference_without_tags_is_tried_in_tags(run, tmp_path, monkeypatch):
    monkeypatch.setattr(sd, "load_model", Mock(side_effect=UserError("loaded")))
    rule, data, row = tmp_path / "rule.py", tmp_path / "data.jsonl", '{"problem": "%d", %s}\n'
    rule.write_text("def critique(problem, attempt):\n    return attempt\n")
    data.write_text("".join(row % (n, '"solution": "5", "answer": "5"') for n in range(20)))
    assert "loaded" in run(tmp_path / "run", critic=rule, data=data)[1] and "fails" not in run.said


DAMAGED = [b"", b"junk", b"PK\x03\x04 half of one", b"cos\nmkdir\n(S'ran'\ntR."]  # pickled code


@pytest.mark.parametrize("content", DAMAGED)
def test_a_foreign_folder_or_a_damaged_run_is_left_alone(content, run, tmp_path, monkeypatch):
    file = tmp_path / "last.pt"
    file.write_bytes(content)
    monkeypatch.chdir(tmp_path)  # where code in a checkpoint would make a folder
    cases = {"is not empty": [tmp_path], "cannot resume": [tmp_path, "--resume"]}
    for said, arguments in (cases | {"Not a directory": [file]}).items():
        status, error = run(*arguments, condition="empty")
        assert status == 2 and said in error and "\n" not in error.strip()
        assert file.read_bytes() == content and list(tmp_path.iterdir()) == [file]


ERRORS = [  # an error, what is printed
    (RuntimeError("can't allocate memory:\n you tried"), "can't allocate memory: you tried"),
    (SafetensorError("incomplete metadata"), "incomplete metadata"),
    (UserError("a \x1b[2Jbad \u202eanswer\x07"), "a [2Jbad answer"),
]


@pytest.mark.parametrize("error, line", ERRORS)
def test_an_error_of_the_user_or_the_machine_is_one_printable_line(error, line, capsys):
    with pytest.raises(SystemExit, match="^2$"), sd.command_line("sd.py"):
        raise error
    assert capsys.readouterr().err == f"\nsd.py: {line}\n"
    with pytest.raises(RuntimeError, match="shapes"), sd.command_line("sd.py"):
        raise RuntimeError("shapes differ")  # a bug of ours: it shows its traceback
