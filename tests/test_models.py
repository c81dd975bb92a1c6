"""Other people's models: families, their tokenizers and templates, and what is refused."""

import builtins
import json
from unittest.mock import Mock

import pytest
import torch
import transformers
from conftest import byte_tokenizer, save_model
from safetensors.torch import load_file, save_file

import critic
import sd
from critic import UserError


@torch.no_grad()
@pytest.mark.parametrize("family", ["Qwen3", "Llama", "Gemma"])
def test_scores_and_the_merged_model_agree_with_plain_transformers(family, tmp_path):
    kind = [getattr(transformers, family + part) for part in ("ForCausalLM", "Config")]
    folder = save_model(tmp_path / "model", byte_tokenizer(), kind)
    model, tokenizer = sd.load_model(folder, "cpu", "float32")
    for adapter in sd.add_adapters(model, 2, 6.0):
        torch.nn.init.normal_(adapter, std=0.1)
    up = model.base_model.layers[0].mlp.up_proj
    prompts, completions = [[3, 4, 5], [6, 7, 8, 9, 10]], [[11, 12, 1], [13, 14]]
    ours = sd.log_probs(model, sd.hidden_states(model, prompts, completions), 1.0)
    greedy = sd.generate(model, tokenizer, prompts, 2, 20, 0)
    assert greedy == [sd.generate(model, tokenizer, [p], 1, 20, 0)[0] for p in prompts]
    assert not model.training  # no dropout
    sd.save_merged(model, tokenizer, tmp_path / "best")
    best = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "best")
    base = transformers.AutoModelForCausalLM.from_pretrained(folder)
    assert type(best) is type(base) and set(best.state_dict()) == set(base.state_dict())
    merged = base.base_model.layers[0].mlp.up_proj.weight + 6.0 / 2 * up.B @ up.A
    torch.testing.assert_close(best.base_model.layers[0].mlp.up_proj.weight, merged)
    rows = []
    for p, c in zip(prompts, completions, strict=True):
        rows.append(best(torch.tensor([p + c])).logits[0, len(p) - 1 : -1])
    torch.testing.assert_close(ours, torch.cat(rows).log_softmax(-1), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("pad", [None, "<|im_end|>", "<pad>"])
def test_a_completion_ends_with_its_first_end_token_with_any_padding(pad, tmp_path):
    ends = [1, *range(60, 70)]  # those of the model's config, not the tokenizer's one
    folder = save_model(tmp_path / "model", byte_tokenizer(pad), ends=ends)
    torch.manual_seed(0)
    prompts = [[5] * n for n in (2, 9, 4)] * 100
    completions = sd.generate(*sd.load_model(folder, "cpu", "float32"), prompts, 300, 60, 1.0)
    assert {c[-1] for c in completions if len(c) < 60} == set(ends)
    assert all(token not in ends for c in completions for token in c[:-1])


def test_a_prompt_needs_room_for_the_completion(run, tmp_path, tiny, world, monkeypatch):
    monkeypatch.setattr(sd, "open_critic", Mock(side_effect=UserError("it fits")))
    messages = [sd.solver_message(p) for part in critic.load_problems(world) for p in part]
    room = 256 - max(len(prompt) for prompt in sd.encode_chats(tiny[1], messages))
    assert "it fits" in run(tmp_path / "run", max_new_tokens=room)[1]
    assert "no room" in run(tmp_path / "run", max_new_tokens=room + 1)[1]


def edit_weights(folder, change):
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def edit_config(folder, **values):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


MAMBA = transformers.MambaForCausalLM, transformers.MambaConfig
GPT2 = transformers.GPT2LMHeadModel, transformers.GPT2Config
FLAWS = [  # what is done to the folder, what is said
    (lambda f: edit_weights(f, lambda w: w.pop("model.norm.weight")), "lacks weights"),
    (lambda f: edit_weights(f, lambda w: w["model.norm.weight"].mul_(torch.nan)), "not finite"),
    (lambda f: save_model(f, byte_tokenizer(), ends=[1, 300]), "no end token"),
    (lambda f: save_model(f, byte_tokenizer(), MAMBA), "is recurrent"),
    (lambda f: save_model(f, byte_tokenizer(), GPT2), "no linear layers"),
    (lambda f: edit_config(f, final_logit_softcapping=30.0), "caps or scales logits"),
    (lambda f: (f / "chat_template.jinja").unlink(), "chat_template is not set"),
    (lambda f: (f / "chat_template.jinja").write_text("{{ 1 / 0 }}"), "division by zero"),
    (lambda f: (f / "model.safetensors").write_text("{}"), "cannot load"),
]


@pytest.mark.parametrize("spoil, said", FLAWS)
def test_a_model_that_is_damaged_or_unsupported_is_refused(spoil, said, tmp_path):
    save_model(tmp_path, byte_tokenizer())
    spoil(tmp_path)
    with pytest.raises(UserError, match=said) as error:
        sd.load_model(str(tmp_path), "cpu", "float32")
    assert str(tmp_path) in str(error.value)


def test_a_models_own_code_is_never_run(tmp_path, monkeypatch):
    """Left to itself, transformers asks, and a `y` on stdin runs it."""
    save_model(tmp_path, byte_tokenizer())
    (tmp_path / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass C: pass\n")
    own = {"AutoConfig": "own.C", "AutoModelForCausalLM": "own.C"}
    edit_config(tmp_path, model_type="own", auto_map=own)
    monkeypatch.setattr(builtins, "input", lambda *_: "y")
    with pytest.raises(UserError, match="cannot load"):
        sd.load_model(str(tmp_path), "cpu", "float32")
    assert not (tmp_path / "ran").exists()
