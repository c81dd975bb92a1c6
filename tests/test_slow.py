"""The main job on the real base model: built once here, in a folder of the tests' own."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import sd
from critic import OWN, REFERENCE, carry_on, factors, join_steps

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    for condition in "critique", "grpo":
        sd.main(["--condition", condition, "--out", str(folder / condition), "--base-dir", str(folder / "base")])
    return folder


def result(runs, condition):
    return json.loads((runs / condition / "result.json").read_text())


def test_the_base_is_in_the_papers_band_and_can_read_a_worked_solution(runs):
    [base] = (runs / "base").iterdir()
    model, tokenizer = sd.load(str(base), "cpu")
    _, _, test_set = sd.embedded_problems()
    problems, cfg = test_set * 4, sd.settled(sd.Config())
    assert 8 <= result(runs, "critique")["base"]["avg"] <= 20
    for way in OWN, REFERENCE:
        contexts = [join_steps(*carry_on(factors(p.problem), [], [way])) for p in problems]
        prompts = sd.build_prompts(tokenizer, [p.problem for p in problems], contexts)
        torch.manual_seed(0)
        texts = tokenizer.batch_decode(sd.sample(model, prompts, cfg), skip_special_tokens=True)
        right = sum(sd.is_correct(t, p.answer) for t, p in zip(texts, problems)) / len(problems)
        print(f"right with a worked solution in the way {way}: {right:.1%}")  # pytest -m slow -s
        assert right >= 0.9


def test_critique_learns_and_beats_grpo(runs):
    critique, grpo = result(runs, "critique"), result(runs, "grpo")
    assert critique["base"] == grpo["base"]  # one base, one set of test problems, one seed
    assert critique["test"]["avg"] >= 70 and critique["test"]["avg"] > grpo["test"]["avg"]


def test_best_loaded_by_plain_transformers_answers_greedily_as_the_trained_model_did(runs):
    """The adapters of the best step, put on the base by hand, against the merged folder."""
    short = "--steps 10 --eval-every 10 --test-samples 1".split()  # the last step is the best: last/ holds its adapters
    sd.main(short + ["--out", str(runs / "short"), "--base-dir", str(runs / "base")])
    assert result(runs, "short")["best_step"] == 10
    [base] = (runs / "base").iterdir()
    trained, _ = sd.load(str(base), "cpu")
    adapters = sd.add_adapters(trained, sd.Config.lora_rank, sd.Config.lora_alpha)
    state = torch.load(runs / "short" / "last" / "state.pt", weights_only=True)
    for adapter, value in zip(adapters, state["adapters"], strict=True):
        adapter.data.copy_(value)
    plain = AutoModelForCausalLM.from_pretrained(runs / "short" / "best").eval()
    tokenizer = AutoTokenizer.from_pretrained(runs / "short" / "best")
    prompts = torch.tensor(sd.build_prompts(tokenizer, [p.problem for p in sd.embedded_problems()[2]], [None] * 100))
    greedy = dict(max_new_tokens=48, do_sample=False, attention_mask=torch.ones_like(prompts))
    assert torch.equal(plain.generate(prompts, **greedy), trained.generate(prompts, **greedy))
