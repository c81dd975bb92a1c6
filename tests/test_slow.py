"""The default toy: its base, what critique training makes of it, and a base built anew."""

import json
import math
import random
import sys
from pathlib import Path

import pytest
import torch
from conftest import TOY
from transformers import AutoModelForCausalLM

import sd
from critic import Problem
from eval import main as evaluate

sys.path.insert(0, str(TOY))

import build  # noqa: E402

pytestmark = pytest.mark.slow
WEIGHTS = "model.safetensors"


def load(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


@torch.no_grad()
def excess_loss(model, seed, kind, drift=0.8, count=128):
    """Nats a token above the least possible on build.py's samples with this kind of context.

    The prompt settles all but the ways of the steps, and a context in the response's own ways
    settles those, too. So the least is the entropy of the ways, or 0.
    """
    ways, draw_ways = [], build.draw_ways

    def record(rng, rate):
        ways.append((draw_ways(rng, rate), rate))
        return ways[-1][0]

    samples, least, rng = [], 0.0, random.Random("samples")
    unknown = build.draw_unknown(random.Random(seed))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build, "draw_ways", record)
        patch.setattr(build, "CONTEXTS", {kind: 1})
        for _ in range(count):
            samples.append(build.draw_sample(rng, unknown, drift, kind != "none"))
            drawn, rate = ways[-1]  # those of the response
            rates = [rate if way is build.REFERENCE else 1 - rate for way in drawn]
            least -= sum(map(math.log, rates)) if kind != "own" else 0
    ids, labels = build.encode(build.build_tokenizer(), samples)
    loss = model(input_ids=ids, labels=labels, use_cache=False).loss.item()
    return loss - least / (labels >= 0).sum().item()


@torch.no_grad()
def known_products(model):
    """The products of two digits above 1 whose right value is the model's first choice."""
    tokenizer = build.build_tokenizer()
    facts = [fact for fact in build.FACTS if 1 not in fact]
    terms = [build.write_problem([fact, (1, 1), (1, 1)]) for fact in facts]
    messages = [sd.solver_message(Problem(text, "", "")) for text in terms]
    prompts = sd.encode_chats(tokenizer, messages)
    begun = [tokenizer(f"<step_1>{a} * {b} =")["input_ids"] for a, b in facts]
    ids = torch.tensor([prompt + step for prompt, step in zip(prompts, begun, strict=True)])
    values = tokenizer.batch_decode(model(ids).logits[:, -1].argmax(-1)[:, None])
    return {(a, b) for (a, b), value in zip(facts, values, strict=True) if value == str(a * b)}


def test_the_base_is_in_the_papers_band_and_reads_solutions_in_both_ways(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in sd.CONTEXTS.keys() - {"critique", "reference"}:
        monkeypatch.delitem(sd.CONTEXTS, name)
    base = str(TOY)
    evaluate([base, "--advantages", base, "--device", "cpu", "--json", "scores.json"])
    numbers = json.loads(Path("scores.json").read_text())
    told = [numbers["contexts"][name]["teacher right"][0] for name in ("critique", "reference")]
    assert 10 <= numbers["scores"]["base"]["Avg@12"][0] <= 20 and min(told) >= 97


def test_the_base_is_what_the_recipe_converges_to():
    """No model does better on the recipe's samples, and it knows the recipe's products alone."""
    base = load(TOY)
    assert all(excess_loss(base, 0, kind) < 0.003 for kind in ("none", "reference", "own"))
    unknown = set(build.draw_unknown(random.Random(0)))
    assert known_products(base) == {fact for fact in build.FACTS if 1 not in fact} - unknown
    assert min(excess_loss(base, 0, "reference", drift) for drift in (0.6, 0.95)) > 0.005


def build_anew(folder, steps, monkeypatch):
    """Runs build.py with a schedule of so few steps. Returns the model as sd.py loads it."""
    monkeypatch.setattr(build, "STEPS", steps)
    monkeypatch.setattr(sys, "argv", ["build.py", "--seed", "1", "--out", str(folder)])
    build.main()
    return sd.load_model(str(folder), "cpu", "float32")[0]


def test_the_recipe_builds_a_complete_folder_and_learns_from_nothing(tmp_path, monkeypatch):
    model = build_anew(tmp_path, 60, monkeypatch)
    names = {file.name for file in TOY.iterdir()} - {"README.md", "build.py", "__pycache__"}
    assert {file.name for file in tmp_path.iterdir()} == names
    for name in names - {WEIGHTS}:
        assert (tmp_path / name).read_bytes() == (TOY / name).read_bytes()
    assert excess_loss(model, 1, "none") < 1.3  # a uniform guess: 5.7


def test_the_recipe_teaches_other_products_and_still_to_read(tmp_path, monkeypatch):
    """From the shipped weights on, with another seed's products: it need not start from nothing."""
    monkeypatch.setattr(build, "Qwen3ForCausalLM", lambda config: load(TOY).train())
    model = build_anew(tmp_path, 60, monkeypatch)
    assert excess_loss(model, 1, "none") < 0.02 < 0.03 < excess_loss(model, 0, "none")
    assert excess_loss(model, 1, "own") < 0.02 and excess_loss(model, 1, "reference") < 0.02


def test_critique_training_reaches_85(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    sd.main(["--device", "cpu"])
    result = json.loads(Path("runs/critique/result.json").read_text())
    assert result["scores"]["runs/critique"]["Avg@12"][0] >= 85
