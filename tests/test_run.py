"""Whole runs of sd.py on a tiny random model: the folder, the same twice, stop and resume, and bad input."""

import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import ROOT
from transformers import AutoModelForCausalLM, AutoTokenizer

import sd
from critic import Critique

FAST = "--steps 4 --eval-every 2 --problems-per-step 3 --max-new-tokens 8 --val-samples 1 --test-samples 2 --lora-rank 4"


def run(folder, tiny_folder, *more):
    """main() in this process; returns the exit status."""
    try:
        sd.main([*FAST.split(), "--model", str(tiny_folder), "--out", str(folder), *map(str, more)])
    except SystemExit as stop:
        return stop.code
    return 0


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(autouse=True)
def short(monkeypatch):
    """Few validation and test problems: a random model is slow to say nothing."""
    problems = sd.embedded_problems()
    monkeypatch.setattr(sd, "embedded_problems", lambda: (problems[0], problems[1][:4], problems[2][:4]))


@pytest.mark.parametrize("condition", sd.CONTEXTS)
def test_a_run_leaves_its_folder_and_a_table(condition, tmp_path, tiny_folder, capsys):
    folder = tmp_path / "run"
    assert run(folder, tiny_folder, "--condition", condition) == 0
    printed = capsys.readouterr().out
    result = json.loads((folder / "result.json").read_text())
    assert (result["condition"], result["seed"], result["steps"]) == (condition, 0, 4)
    for row in "base", "test":
        assert set(result[row]) == {"avg", "pass", "maj", "length"}
        assert f"{result[row]['length']:9.2f}" in printed
    assert "Pass@2   Maj@2   Avg@2" in printed and "before training" in printed and "after training" in printed
    metrics = lines(folder / "metrics.jsonl")
    assert [m["step"] for m in metrics] == [0, 1, 2, 3, 4]
    assert [m["step"] for m in metrics if "val_avg" in m] == [0, 2, 4]
    names = {"loss", "reward", "grad_norm", "length", "advantage", "abs_advantage", "masked"}
    assert names | {"solver_tokens", "teacher_tokens", "critic_tokens"} <= set(metrics[1])
    samples = lines(folder / "samples.jsonl")
    assert [s["step"] for s in samples] == [n for n in (1, 2, 3, 4) for _ in range(3)]
    assert {"problem", "completion", "reward", "context", "advantage"} <= set(samples[0])
    config = json.loads((folder / "config.json").read_text())
    assert config["condition"] == condition and config["lr"] > 0 and config["versions"]["torch"] == torch.__version__
    AutoModelForCausalLM.from_pretrained(folder / "best"), AutoTokenizer.from_pretrained(folder / "best")
    assert not list(folder.rglob("*.new")) and not list(folder.rglob("*.old")) and "\x1b" not in printed


@pytest.mark.parametrize("condition", ["grpo", "critique"])
def test_the_same_seed_gives_the_same_metrics_to_the_last_digit(condition, tmp_path, tiny_folder):
    for name, seed in ("a", 1), ("b", 1), ("c", 2):
        run(tmp_path / name, tiny_folder, "--condition", condition, "--seed", seed)
    a, b, c = ((tmp_path / name / "metrics.jsonl").read_bytes() for name in "abc")
    assert a == b != c


@pytest.mark.parametrize("condition", ["grpo", "reference"])
def test_a_stopped_run_resumes_to_the_same_metrics_and_weights(condition, tmp_path, tiny_folder, monkeypatch, capsys):
    run(tmp_path / "whole", tiny_folder, "--condition", condition)
    step, seen = sd.train_step, []

    def interrupted(*arguments):
        seen.append(1)
        if len(seen) == 4:  # after the checkpoint of step 2, and after step 3 was logged
            raise KeyboardInterrupt
        return step(*arguments)

    monkeypatch.setattr(sd, "train_step", interrupted)
    cut = tmp_path / "cut"
    assert run(cut, tiny_folder, "--condition", condition) == 130
    assert "--resume" in capsys.readouterr().err and [m["step"] for m in lines(cut / "metrics.jsonl")] == [0, 1, 2, 3]
    AutoModelForCausalLM.from_pretrained(cut / "best")
    assert run(cut, tiny_folder, "--condition", condition) == 2 and "add --resume" in capsys.readouterr().err
    assert run(cut, tiny_folder, "--condition", condition, "--resume", "--lr", "0.1") == 2
    assert "started with another lr" in capsys.readouterr().err
    assert run(cut, tiny_folder, "--condition", condition, "--resume") == 0
    for name in "metrics.jsonl", "samples.jsonl":
        assert (cut / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    states = [torch.load(tmp_path / name / "last" / "state.pt", weights_only=True) for name in ("whole", "cut")]
    assert all(torch.equal(a, b) for a, b in zip(states[0]["adapters"], states[1]["adapters"], strict=True))


def test_a_loss_that_is_not_finite_keeps_the_last_good_checkpoint(tmp_path, tiny_folder, monkeypatch, capsys):
    good, calls = sd.DIVERGENCES["forward_kl"], []

    def bad_in_the_third_step(student, teacher):
        calls.append(1)
        return good(student, teacher) * (float("nan") if len(calls) > 3 else 1)

    monkeypatch.setitem(sd.DIVERGENCES, "forward_kl", bad_in_the_third_step)
    assert run(tmp_path / "run", tiny_folder, "--condition", "reference") == 2
    error = capsys.readouterr().err
    assert "nan" in error and "--lr" in error and "Traceback" not in error
    state = torch.load(tmp_path / "run" / "last" / "state.pt", weights_only=True)
    assert state["step"] >= 2 and all(p.isfinite().all() for p in state["adapters"])
    AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "best")


def test_a_step_that_nobody_criticised_is_said(tmp_path, tiny_folder, monkeypatch, capsys):
    monkeypatch.setattr(sd, "scribe", lambda problems, attempts, prompts: [Critique(None, failure="no answer")] * len(problems))
    assert run(tmp_path / "run", tiny_folder) == 0
    assert "step 1: no rollout has a teacher" in capsys.readouterr().out
    assert {m["masked"] for m in lines(tmp_path / "run" / "metrics.jsonl") if m["step"]} == {1}


def test_a_new_context_is_one_entry_and_then_a_condition(tmp_path, tiny_folder, monkeypatch):
    monkeypatch.setitem(sd.CONTEXTS, "hint", lambda problem, attempt, critique: f"<answer>{critique[-10]}</answer>")
    assert run(tmp_path / "run", tiny_folder, "--condition", "hint") == 0
    assert json.loads((tmp_path / "run" / "result.json").read_text())["condition"] == "hint"


# ------------------------------------------------------------------------ bad input
BAD = [
    (["--condition", "praise"], "--condition praise: choose one of grpo, reference, critique"),
    (["--divergence", "l2"], "--divergence l2: choose one of forward_kl"),
    (["--steps", "0"], "--steps is 0: it must be at least 1"),
    (["--steps", "-3"], "--steps is -3"),
    (["--steps", "many"], "argument --steps: invalid int value: 'many'"),
    (["--problems-per-step", "0"], "--problems-per-step is 0"),
    (["--lr", "nan"], "--lr is nan"),
    (["--lr", "-1"], "--lr is -1"),
    (["--temperature", "0"], "--temperature is 0"),
    (["--drift", "1.5"], "--drift is 1.5"),
    (["--seed", "-1"], "--seed is -1"),
    (["--lora-rank", "0"], "--lora-rank is 0"),
    (["--condition", "grpo", "--group-size", "1"], "--group-size is 1"),
    (["--device", "abacus"], "--device abacus"),
    (["--no-such-flag"], "unrecognized arguments: --no-such-flag"),
    (["--resume"], "holds no run to resume"),
    (["--model", "/no/such/model"], "cannot load the model /no/such/model"),
]


@pytest.mark.parametrize("arguments, message", BAD, ids=lambda value: " ".join(value) if isinstance(value, list) else "")
def test_bad_input_is_one_clear_line_and_leaves_nothing(arguments, message, tmp_path, tiny_folder, capsys):
    assert run(tmp_path / "run", tiny_folder, *arguments) == 2
    error = capsys.readouterr().err
    assert message in error and error.startswith("sd.py: ") and error.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_written(tmp_path, tiny_folder, capsys):
    (tmp_path / "file").write_text("")
    assert run(tmp_path / "file" / "run", tiny_folder) == 2
    assert "cannot write to the folder" in capsys.readouterr().err


def test_a_finished_run_is_not_overwritten(tmp_path, tiny_folder, capsys):
    run(tmp_path / "run", tiny_folder)
    before = {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file()}
    for more in [], ["--resume"]:
        assert run(tmp_path / "run", tiny_folder, *more) == 2
        assert "holds a finished run: choose another --out" in capsys.readouterr().err
    assert before == {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file()}


@pytest.mark.parametrize("damage", ["config.json", "model.safetensors", "tokenizer.json", "chat_template.jinja"])
def test_a_damaged_model_folder(damage, tmp_path, tiny, capsys):
    model, tokenizer = tiny
    broken = tmp_path / "broken"
    model.save_pretrained(broken), tokenizer.save_pretrained(broken)
    if damage == "chat_template.jinja":
        (broken / damage).unlink()
    else:
        (broken / damage).write_bytes((broken / damage).read_bytes()[:100])
    assert run(tmp_path / "run", broken) == 2
    error = capsys.readouterr().err
    assert str(broken) in error and "Traceback" not in error and not (tmp_path / "run").exists()


def test_help_explains_every_setting_with_its_default(capsys):
    with pytest.raises(SystemExit):
        sd.main(["--help"])
    text = re.sub(r"\s+", " ", capsys.readouterr().out)
    for f in sd.dataclasses.fields(sd.Config):
        assert f"--{f.name.replace('_', '-')} " in text and f"{f.metadata['help']} (default: {f.default})" in text


# ------------------------------------------------------------------------ colour, control codes, the base
def test_paint_colours_only_a_terminal_and_drops_control_codes(monkeypatch):
    assert sd.paint("a\x1b[2Jb\x07", -3) == "a [2Jb "
    monkeypatch.setattr(sd.sys.stdout, "isatty", lambda: True, raising=False)
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert sd.paint("7", -10.0) == "\x1b[30;48;2;255;100;100m7\x1b[0m"
    assert sd.paint("7", 10.0) == "\x1b[30;48;2;100;100;255m7\x1b[0m"
    assert sd.paint("7", 0.0) == "\x1b[30;48;2;255;255;255m7\x1b[0m"
    assert "\x1b[2J" not in sd.paint("\x1b[2J", 1)
    monkeypatch.setenv("NO_COLOR", "1")
    assert sd.paint("7", -10.0) == "7"


def test_the_base_is_built_once_per_recipe_and_an_interrupted_build_leaves_none(tmp_path, monkeypatch, config):
    monkeypatch.setitem(sd.BASE, "steps", 2)
    cfg = config(base_dir=str(tmp_path / "bases"))
    with monkeypatch.context() as patched:
        patched.setattr(sd, "pretraining_loss", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            sd.embedded_base(cfg)
    assert not list((tmp_path / "bases").iterdir())
    folder = sd.embedded_base(cfg)
    AutoModelForCausalLM.from_pretrained(folder)
    monkeypatch.setattr(sd, "Qwen3Config", lambda **_: pytest.fail("built again"))
    assert sd.embedded_base(cfg) == folder
    with pytest.raises(pytest.fail.Exception, match="built again"):
        sd.embedded_base(config(base_dir=str(tmp_path / "bases"), drift=0.2))


def test_two_builds_at_once_leave_one_whole_base(tmp_path, monkeypatch, config):
    monkeypatch.setitem(sd.BASE, "steps", 2)
    cfg, make = config(base_dir=str(tmp_path / "bases")), sd.Qwen3Config

    def slower(**shape):
        monkeypatch.setattr(sd, "Qwen3Config", make)
        sd.embedded_base(cfg)  # the other one is done first
        return make(**shape)

    monkeypatch.setattr(sd, "Qwen3Config", slower)
    folder = sd.embedded_base(cfg)
    assert sd.Qwen3Config is make and [str(p) for p in (tmp_path / "bases").iterdir()] == [folder]
    AutoModelForCausalLM.from_pretrained(folder)
