"""Whole runs of sd.py on a tiny random model: order, checkpoints, kills, and bad input."""

import builtins
import itertools
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import flags, read_lines
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import critic
import sd

BEST = "best/model.safetensors"


def files_of(folder):
    names = "metrics.jsonl", "samples.jsonl", "config.json", BEST
    return {name: (folder / name).read_bytes().replace(bytes(folder), b"") for name in names}


def state_of(folder):
    return torch.load(folder / "last.pt", weights_only=True)


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
@pytest.mark.parametrize("condition", ["grpo", "reference", "critique", "quote", "omit", "empty"])
def test_a_run_leaves_its_folder_and_is_tested(condition, run, tmp_path):
    out = tmp_path / "run"
    assert run(out, condition=condition)[0] == 0
    metrics = read_lines(out / "metrics.jsonl")
    assert [m["step"] for m in metrics] == [0, 1, 2, 3, 4]
    assert [m["step"] for m in metrics if "val_avg" in m] == [0, 2, 4]
    assert all((m["abs_advantage"] > 0) != (condition in ("empty", "grpo")) for m in metrics[1:])
    samples = read_lines(out / "samples.jsonl")
    assert [s["step"] for s in samples] == [n for n in (1, 2, 3, 4) for _ in range(3)]
    assert all(len(s["tokens"]) == len(s["completion"]) == len(s["advantages"]) for s in samples)
    config = json.loads((out / "config.json").read_text())
    assert config["condition"] == condition and config["lr"] == sd.Config(condition).lr
    AutoModelForCausalLM.from_pretrained(out / "best")
    assert not list(out.rglob("*.new")) and [args[0] for args in run.tested] == [str(out)]


def test_every_problem_once_an_epoch_in_an_order_of_the_seed(run, tmp_path, problems, monkeypatch):
    orders, step = [], sd.train_step

    def record(model, tokenizer, optimizer, batch, *more):
        orders[-1] += batch
        return step(model, tokenizer, optimizer, batch, *more)

    monkeypatch.setattr(sd, "train_step", record)
    for name, seed in ("a", 0), ("b", 1), ("c", 1):
        orders.append([])
        run(tmp_path / name, seed=seed, steps=6, condition="empty", eval_every=6)
    for order in orders:  # 6 steps of 3: two epochs of 8 and a bit
        assert len(order) == 18 and order[:8] != order[8:16]
        assert set(order[:8]) == set(order[8:16]) == set(problems)
    assert problems != orders[0][:8] != orders[1][:8] and orders[1] == orders[2]
    a, b, c = (files_of(tmp_path / name) for name in "abc")
    assert b == c and a["samples.jsonl"] != b["samples.jsonl"]  # the same seed, the same bytes


def test_the_optimizer_takes_the_rate_and_no_weight_decay(run, tmp_path):
    """AdamW's first step is the rate in each weight, whatever the gradient, and B starts at 0."""
    run(tmp_path / "run", condition="reference", steps=1, lr=0.01)
    state = state_of(tmp_path / "run")
    assert state["best_avg"] == 0  # a random model never improves: the best is step 0
    for name, after in state["adapters"].items():
        before = state["best_adapters"][name]
        if before.any():
            assert torch.equal(after, before)  # A, which has no gradient while B is 0
        else:
            assert after.abs().max().item() == pytest.approx(0.01, rel=1e-3)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_best_is_the_first_best_step_merged_in_fp32(dtype, run, tmp_path, tiny_folder, scores):
    settings = {"dtype": dtype, "eval_every": 1, "condition": "reference", "lr": 5e-6}
    scores[:] = [0, 5]
    run(tmp_path / "one", steps=1, **settings)
    scores[:] = [0, 5, 5, 1, 4]
    run(tmp_path / "run", **settings)
    state, merged = state_of(tmp_path / "run"), load_file(tmp_path / "run" / BEST)
    best = state["best_adapters"]
    assert (len(state["metrics"]), state["best_avg"], scores) == (5, 5, [])
    for name, adapter in state_of(tmp_path / "one")["adapters"].items():
        assert torch.equal(adapter, best[name])
    assert {weight.dtype for weight in merged.values()} == {torch.float32}
    pairs = iter(best.values())  # A and B of each layer, in the model's order
    base = AutoModelForCausalLM.from_pretrained(tiny_folder, dtype=getattr(torch, dtype)).float()
    for name, layer in base.model.named_modules():
        if isinstance(layer, torch.nn.Linear):
            A, B = next(pairs), next(pairs)
            ours = merged[f"model.{name}.weight"]
            torch.testing.assert_close(ours, layer.weight + 8 / 4 * B @ A, rtol=0, atol=1e-7)
            assert (ours - layer.weight).abs().max() > 1e-6


# ------------------------------------------------------------------------ interrupted and killed
def test_ctrl_c_leaves_the_best_model_and_resume_ends_as_if_nothing_had_been(
    run, world, tmp_path, scores, monkeypatch
):
    whole, out, step, calls = tmp_path / "whole", tmp_path / "run", sd.train_step, []
    settings = {"condition": "reference", "lr": 0.05}
    scores[:] = [0, 5, 3]
    run(whole, **settings)

    def interrupted(*arguments):
        calls.append(1)
        if len(calls) == 4:  # after the checkpoint of step 2, and after step 3 was logged
            raise KeyboardInterrupt  # as Ctrl-C does
        return step(*arguments)

    monkeypatch.setattr(sd, "train_step", interrupted)
    scores[:] = [0, 5]
    status, error = run(out, **settings)
    assert status == 2 and "sd.py: interrupted" in error and "Traceback" not in error
    assert [m["step"] for m in read_lines(out / "metrics.jsonl")] == [0, 1, 2, 3]
    assert (out / BEST).read_bytes() == (whole / BEST).read_bytes()
    before = (out / "last.pt").read_bytes()
    changed = world / "train.jsonl"
    content = changed.read_text()
    for more, said in [
        ([], "is not empty"),
        (["--resume", "--steps", "70"], "was started with --steps 4, now 70"),
        (["--resume", "--seed", "3"], "was started with --seed 0, now 3"),
        (["--resume"], "--model or --data have changed"),
    ]:
        changed.write_text(content.replace("8", "7", 1) if more == ["--resume"] else content)
        status, error = run(out, *more, **settings)
        assert status == 2 and said in error and len(error.strip().splitlines()) == 1
    changed.write_text(content)
    assert (out / "last.pt").read_bytes() == before
    for scores[:] in [3], []:  # the second time it is finished, and writes the same again
        assert run(out, "--resume", **settings)[0] == 0 and files_of(out) == files_of(whole)


def die_at(n):
    """Kills this process before its n-th operation on a file, or half-way through a write."""
    operations = itertools.count(1)

    def strike():
        if next(operations) == n:
            os.kill(os.getpid(), signal.SIGKILL)

    def guard(module, name):
        function = getattr(module, name)

        def call(*args, **kwargs):
            if name != "open" or "w" in str(args[1:]):
                strike()
            return function(*args, **kwargs)

        setattr(module, name, call)

    def write_text(path, text):
        strike()
        with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), "w") as file:
            file.write(text[: len(text) // 2])
            file.flush()
            strike()
            file.write(text[len(text) // 2 :])

    Path.write_text = write_text
    guard(builtins, "open"), guard(os, "replace"), guard(os, "fsync")
    guard(torch, "save"), guard(sd, "save_merged")


def start(out, argv, n=0):
    child = os.fork()
    if child == 0:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        os.dup2(os.open(out + ".err", os.O_WRONLY | os.O_CREAT | os.O_APPEND), 2)
        die_at(n)
        sd.main([*argv, "--out", out, *["--resume"] * os.path.exists(out + "/last.pt")])
        os._exit(0)
    return child


def is_killed(child):
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) or status == 0
    return os.WIFSIGNALED(status)


def kill_runs(points, out, argv):
    """Starts runs in child processes that are killed, and resumes them.

    No progress bar here: children share its lock, and one that is killed may hold it.
    """
    sys.modules["eval"] = SimpleNamespace(main=lambda argv: None)  # the test that follows
    rng = random.Random(0)
    for _ in range(-points[0]):  # kills at random moments
        child = start(f"{out}-{points[0]}", argv)
        time.sleep(rng.uniform(0.05, 0.6))
        os.kill(child, signal.SIGKILL)
        assert is_killed(child), "the run was too short"
    for n in points:
        if n < 0 or is_killed(start(f"{out}-{n}", argv, n)):
            assert not is_killed(start(f"{out}-{n}", argv))


def check_kills(points, run, small, tmp_path, **settings):
    """Kills runs in a process that has not used autograd yet: after that, it may not fork."""
    settings = small | {"condition": "grpo", "group_size": 3, "lr": 0.05} | settings
    assert run(tmp_path / "whole", **settings)[0] == 0
    command = [sys.executable, __file__, json.dumps(points), tmp_path / "killed", *flags(settings)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500)
    folders = [path for path in tmp_path.glob("killed*") if path.is_dir()]
    errors = [path.read_text() for path in tmp_path.glob("*.err")]
    assert done.returncode == 0, [done.stderr, *errors]
    assert all(files_of(folder) == files_of(tmp_path / "whole") for folder in folders)
    return len(folders)


def test_a_run_that_is_killed_ends_as_if_nothing_had_been(run, small, tmp_path):
    # Before the second checkpoint is written, before the third is in place, within its logs.
    assert check_kills([12, 24, 28], run, small, tmp_path, steps=2, eval_every=1) == 3


@pytest.mark.slow
def test_a_run_killed_before_every_operation_on_a_file(run, small, tmp_path):
    points = list(range(1, 55))  # there are 49
    assert check_kills(points, run, small, tmp_path, condition="critique") == len(points)


@pytest.mark.slow
@pytest.mark.parametrize("condition", ["grpo", "reference", "critique"])
def test_a_run_killed_twenty_times_at_random(condition, run, small, tmp_path):
    settings = {"condition": condition, "steps": 150, "eval_every": 1}
    assert check_kills([-20], run, small, tmp_path, **settings) == 1


# ------------------------------------------------------------------------ bad input
BAD = {  # flags -> what is said
    "--condition praise": "--condition praise: choose one of grpo, reference, critique",
    "--divergence l2": "invalid choice: 'l2'",
    "--steps 0": "--steps is 0",
    "--steps many": "invalid int value: 'many'",
    "--lr nan": "--lr is nan",
    "--seed 9999999999": "below a million",
    "--no_such_flag": "--no_such_flag",
    "--device abacus": "abacus",
    "--resume": "cannot resume",
    "--model /no/such/model": "cannot load the model /no/such/model",
    "--data /no/such/data.jsonl": "/no/such/data.jsonl",
    "--critic /no/such/rule.py": "/no/such/rule.py",
    "--critic /no/such/critic": "cannot load the model /no/such/critic",
}


@pytest.mark.parametrize("more", BAD)
def test_bad_input_is_said_without_a_traceback_and_leaves_nothing(more, run, tmp_path):
    status, error = run(tmp_path / "run", *more.split())
    assert status == 2 and BAD[more] in error.strip().splitlines()[-1] and "Traceback" not in error
    assert not list(tmp_path.iterdir())


def test_a_foreign_folder_or_a_damaged_run_is_left_alone_in_one_line(run, tmp_path):
    files = {"mine/config.json": "mine", "file": "file", "damaged/last.pt": "damaged"}
    for content in b"", b"junk", b"PK\x03\x04 half of one":
        for file, out in files.items():
            (tmp_path / file).parent.mkdir(exist_ok=True)
            (tmp_path / file).write_bytes(content)
            more = ["--resume"] if out == "damaged" else []
            status, error = run(tmp_path / out, *more, condition="empty")
            assert status == 2 and len(error.strip().splitlines()) == 1, error
            assert not more or "sd.py: cannot resume" in error
            assert (tmp_path / file).read_bytes() == content
    assert {p.name for p in tmp_path.rglob("*")} == {
        "mine",
        "config.json",
        "file",
        "damaged",
        "last.pt",
    }


def test_a_new_context_is_one_entry_and_its_bug_shows_a_traceback(run, tmp_path, monkeypatch):
    monkeypatch.setitem(sd.CONTEXTS, "hint", lambda r: f"<answer>{r.critique[-12]}</answer>")
    assert run(tmp_path / "run", condition="hint", steps=1)[0] == 0
    [row, *_] = read_lines(tmp_path / "run" / "samples.jsonl")
    assert row["context"].startswith("<answer>") and any(row["advantages"])
    monkeypatch.setitem(sd.CONTEXTS, "hint", lambda r: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run(tmp_path / "another", condition="hint")


if __name__ == "__main__":
    kill_runs(json.loads(sys.argv[1]), sys.argv[2], sys.argv[3:])
