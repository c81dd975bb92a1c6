"""Runs that are interrupted, killed, started twice, or run out of memory: nothing is lost, and nothing is wrong."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import ROOT
from transformers import AutoModelForCausalLM

import sd

SHORT = "--steps 4 --eval-every 2 --problems-per-step 3 --max-new-tokens 8 --val-samples 1 --test-samples 2 --lora-rank 4"


def run(folder, model, *more):
    """Runs sd.main, returns its exit status."""
    try:
        sd.main(["--model", str(model), "--out", str(folder), "--device", "cpu", *SHORT.split(), *more])
    except SystemExit as stop:
        return stop.code
    return 0


def endless(folder, model):
    """A real process that trains until it is stopped; waits for its first checkpoint."""
    flags = "--steps 100000 --eval-every 1 --problems-per-step 2 --max-new-tokens 4 --val-samples 1".split()
    command = [sys.executable, str(ROOT / "sd.py"), "--model", str(model), "--out", str(folder), *flags]
    environment = os.environ | {"PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, env=environment, text=True)
    for _ in range(600):
        if (folder / "last" / "state.pt").exists() or process.poll() is not None:
            return process
        time.sleep(0.1)
    return process


@pytest.mark.parametrize("number, said, status", [(signal.SIGINT, "interrupted", 130), (signal.SIGTERM, "terminated", 143)])
def test_control_c_and_sigterm_keep_a_usable_run_and_a_second_run_is_refused_meanwhile(
    number, said, status, tmp_path, tiny_folder, capsys
):
    process = endless(tmp_path / "run", tiny_folder)
    assert run(tmp_path / "run", tiny_folder) == 2
    assert "another run is writing to the folder" in capsys.readouterr().err
    process.send_signal(number)
    _, error = process.communicate(timeout=60)
    assert process.returncode == status, error
    assert said in error and "--resume" in error and "Traceback" not in error
    AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "best")
    assert all(json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines())


def test_a_signal_waits_until_what_is_being_written_is_whole():
    signal.signal(signal.SIGTERM, sd.terminated)
    for number in signal.SIGINT, signal.SIGTERM:
        done = []
        with pytest.raises(KeyboardInterrupt):
            with sd.undisturbed():
                os.kill(os.getpid(), number)
                time.sleep(0.05)
                done.append(number)
        assert done == [number]
    with sd.undisturbed():
        pass
    assert signal.getsignal(signal.SIGTERM) is sd.terminated


def stopped(folder, model, monkeypatch, error):
    """A run that stops in its third step."""
    step, calls = sd.train_step, []

    def failing(*arguments):
        calls.append(1)
        if len(calls) == 3:
            raise error
        return step(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(sd, "train_step", failing)
        return run(folder, model)


def test_out_of_memory_says_which_setting_to_lower_and_the_run_goes_on_with_it(tmp_path, tiny_folder, monkeypatch, capsys):
    assert stopped(tmp_path / "run", tiny_folder, monkeypatch, torch.OutOfMemoryError("CUDA out of memory")) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    for setting in "--gen-batch", "--micro-batch", "--gradient-checkpointing", "--resume":
        assert setting in error
    smaller = "--resume --micro-batch 1 --chunk 5 --gradient-checkpointing".split()
    assert run(tmp_path / "run", tiny_folder, *smaller) == 0
    assert run(tmp_path / "whole", tiny_folder) == 0
    ends = [(tmp_path / name / "metrics.jsonl").read_text().splitlines()[-1] for name in ("run", "whole")]
    one, other = map(json.loads, ends)
    assert one["step"] == other["step"] == 4 and one["loss"] == pytest.approx(other["loss"], rel=1e-4)


def test_a_full_disk_is_one_line_and_the_run_goes_on_later(tmp_path, tiny_folder, monkeypatch, capsys):
    assert stopped(tmp_path / "run", tiny_folder, monkeypatch, OSError(28, "No space left on device", "metrics.jsonl")) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert "No space left" in error and "metrics.jsonl" in error and "--resume" in error
    state = tmp_path / "run" / "last" / "state.pt"
    torch.save(torch.load(state, weights_only=True) | {"seconds": 1000.0}, state)
    assert run(tmp_path / "run", tiny_folder, "--resume") == 0
    assert json.loads((tmp_path / "run" / "result.json").read_text())["train_seconds"] > 1000  # both parts of the run


@pytest.mark.parametrize(
    "changed, said", [(["--lr", "0.5"], "another lr"), (["--seed", "3", "--temperature", "2"], "another seed, temperature")]
)
def test_resuming_with_a_changed_setting_says_which_one(changed, said, tmp_path, tiny_folder, monkeypatch, capsys):
    assert stopped(tmp_path / "run", tiny_folder, monkeypatch, KeyboardInterrupt()) == 130
    before = {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file()}
    assert run(tmp_path / "run", tiny_folder, "--resume", *changed) == 2
    assert said in capsys.readouterr().err
    assert before == {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file()}


DAMAGE = {
    "config.json": ["", "{", "[1]", "3"],
    "last/state.pt": [b"", b"not a checkpoint", b"PK\x03\x04 half of one"],
    "metrics.jsonl": ["{\n", "[]\n", "{}\n"],
}


@pytest.mark.parametrize("file, content", [(file, content) for file, contents in DAMAGE.items() for content in contents])
def test_a_damaged_run_is_refused_in_one_line(file, content, tmp_path, tiny_folder, monkeypatch, capsys):
    stopped(tmp_path / "run", tiny_folder, monkeypatch, KeyboardInterrupt())
    (tmp_path / "run" / file).write_bytes(content if isinstance(content, bytes) else content.encode())
    capsys.readouterr()
    assert run(tmp_path / "run", tiny_folder, "--resume") == 2
    error = capsys.readouterr().err
    assert error.startswith("sd.py: cannot resume") and error.count("\n") == 1
    assert file in error or "a log is damaged" in error


KILLER = """
# Starts the run, kills it after a random time, starts it again with --resume, and so on; at last lets it finish.
import os, random, signal, sys, time
sys.path.insert(0, sys.argv[1])
import torch
torch.set_num_threads(1)
import sd
sd.BASE.update(steps=2, batch=4)
sd.ARCHITECTURE.update(hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2,
                       num_key_value_heads=2)
kills, out, flags = int(sys.argv[2]), sys.argv[3], sys.argv[4:]
rng, killed = random.Random(0), 0
while not os.path.exists(f"{out}/result.json"):
    resume = ["--resume"] if os.path.exists(f"{out}/last/state.pt") else []
    child = os.fork()
    if child == 0:
        os.close(1), os.close(2), os.open(os.devnull, os.O_WRONLY), os.open(os.devnull, os.O_WRONLY)
        sd.main([*flags, "--out", out, *resume])
        os._exit(0)
    if killed < kills:
        time.sleep(rng.uniform(0.05, 0.7))
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    killed += os.WIFSIGNALED(status)
    assert os.WIFSIGNALED(status) or status == 0, status
print(killed)
"""


@pytest.mark.slow
@pytest.mark.parametrize("condition", ["critique", "reference", "grpo"])
def test_a_run_that_is_killed_ten_times_comes_to_the_same_numbers_and_weights(condition, tmp_path):
    """SIGKILL at random moments, while the base is built and checkpoints are written, too."""
    flags = f"--condition {condition} --steps 400 --eval-every 1 --problems-per-step 3 --group-size 2 --max-new-tokens 8"
    flags += " --val-samples 1 --test-samples 1 --lora-rank 4 --lr 0.01 --device cpu"
    for name, kills in ("killed", 10), ("whole", 0):
        (tmp_path / name).mkdir()
        command = [sys.executable, "-c", KILLER, str(ROOT), str(kills), str(tmp_path / name / "run"), *flags.split()]
        command += ["--base-dir", str(tmp_path / name / "base")]
        done = subprocess.run(command, capture_output=True, text=True, timeout=500)
        assert done.returncode == 0, done.stderr
        assert int(done.stdout) == kills
    killed, whole = tmp_path / "killed" / "run", tmp_path / "whole" / "run"
    assert (killed / "metrics.jsonl").read_text() == (whole / "metrics.jsonl").read_text()
    assert (killed / "samples.jsonl").read_text() == (whole / "samples.jsonl").read_text()
    assert (killed / "best" / "model.safetensors").read_bytes() == (whole / "best" / "model.safetensors").read_bytes()
    states = [torch.load(folder / "last" / "state.pt", weights_only=True) for folder in (killed, whole)]
    assert states[0]["step"] == states[1]["step"] == 400
    assert all(torch.equal(a, b) for a, b in zip(states[0]["adapters"], states[1]["adapters"], strict=True))
    assert len(list((tmp_path / "killed" / "base").glob("*/config.json"))) == 1  # and it is whole: the run used it
