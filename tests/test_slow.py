"""The default toy: its base, what critique training makes of it, and a base built anew."""

import runpy
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, TOY

import critic
import sd

pytestmark = pytest.mark.slow


def average(folder, k=12):
    """Avg@k on the test problems, in percent."""
    cfg = sd.Config(device="cpu")
    torch.manual_seed(2)
    problems = critic.load_problems(TOY)[2]
    rollouts = sd.sample_rollouts(*sd.load_model(str(folder), cfg), problems, k, cfg)
    return 100 * sd.mean(r.reward for r in rollouts)


def reading(folder):
    """Percent right with a worked solution in the prompt: in the base's own way, in another."""
    model, tokenizer = sd.load_model(str(folder), sd.Config(device="cpu"))
    problems, rates = critic.load_problems(TOY)[2] * 3, []
    solve = runpy.run_path(str(TOY / "scribe.py"))["critique"]  # of an empty attempt: all of it
    for contexts in [solve(p, "") for p in problems], [p.solution for p in problems]:
        messages = [sd.solver_message(p, c) for p, c in zip(problems, contexts, strict=True)]
        torch.manual_seed(0)
        prompts = sd.encode_chats(tokenizer, messages)
        ids = sd.generate(model, tokenizer, prompts, 512, 64, 1.0)
        texts = tokenizer.batch_decode(ids, skip_special_tokens=True)
        right = [critic.is_correct(t, p.answer) for t, p in zip(texts, problems, strict=True)]
        rates.append(100 * sum(right) / len(right))
    return rates


def test_the_base_is_in_the_papers_band_and_reads_solutions_in_both_ways():
    base, rates = average(TOY), reading(TOY)
    assert 10 <= base <= 20 and min(rates) >= 97, (base, rates)


def test_critique_training_reaches_85(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "eval", SimpleNamespace(main=lambda argv: None))
    sd.main(["--out", str(tmp_path / "run"), "--device", "cpu"])
    assert average(tmp_path / "run" / "best") >= 85


def test_a_base_built_anew_is_of_the_same_kind(tmp_path):
    build = [sys.executable, TOY / "build.py", "--seed", "1", "--out", tmp_path / "toy"]
    subprocess.run(build, check=True, cwd=ROOT)
    base, rates = average(tmp_path / "toy", 4), reading(tmp_path / "toy")
    assert 5 <= base <= 30 and min(rates) >= 95, (base, rates)
