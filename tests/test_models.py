"""Other people's models: families, their tokenizers and templates, and what is refused."""

import builtins
import json
from unittest.mock import Mock

import pytest
import torch
import transformers
from conftest import CHATML, TOY, byte_tokenizer, plain_log_probs, save_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import critic
import sd
from critic import UserError

EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_n_groups": 1}
LINEAR = {"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8}
LINEAR |= {"linear_value_head_dim": 8, "layer_types": ["linear_attention", "full_attention"]}
LONGROPE = {"rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 700}
LONGROPE |= {"short_factor": [1.0] * 4, "long_factor": [4.0] * 4}


def gemma4(**shape):
    """A wrapper: a decoder of the given shape beside a vision tower."""
    layers = ["sliding_attention", "full_attention"]
    shape |= {"layer_types": layers, "num_kv_shared_layers": 0, "vocab_size_per_layer_input": 300}
    shape |= {"max_position_embeddings": 8192}
    tower = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    return transformers.Gemma4Config(text_config=shape, vision_config=tower, audio_config=None)


def save_family(folder, name, config=None, **shape):
    model = getattr(transformers, name)
    config = config or getattr(transformers, name.partition("For")[0] + "Config")
    return save_model(folder, byte_tokenizer("<pad>"), (model, config), **shape)


LIMITS = {"Llama": 700, "Gemma": 8192, "Qwen3": 32768}  # positions, by the start of the name
FAMILIES = [  # a model class, a part of its config
    ("LlamaForCausalLM", {"rope_parameters": LONGROPE}),
    ("Gemma2ForCausalLM", {"final_logit_softcapping": 5.0}),
    ("Gemma4ForConditionalGeneration", {"config": gemma4, "final_logit_softcapping": 5.0}),
    ("CohereForCausalLM", {"logit_scale": 0.25}),
    ("GraniteForCausalLM", {"logits_scaling": 8.0}),
    ("Qwen3_5ForCausalLM", LINEAR | {"config": transformers.Qwen3_5TextConfig}),
    ("BambaForCausalLM", MAMBA | {"attn_layer_indices": [1]}),
    ("PhimoeForCausalLM", EXPERTS),  # its routers are a subclass of nn.Linear
    ("MambaForCausalLM", {"state_size": 8}),  # it reads a layer's weight
]


@pytest.mark.parametrize("family, shape", FAMILIES)
def test_a_step_and_the_merged_model_agree_with_plain_transformers(
    family, shape, tmp_path, make_config, problems
):
    folder = save_family(tmp_path / "model", family, **shape)
    model, tokenizer = sd.load_model(folder, "cpu", "float32")
    assert family[:5] not in LIMITS or tokenizer.model_max_length == LIMITS[family[:5]]
    optimizer = torch.optim.AdamW(sd.add_adapters(model, 2, 6.0), lr=0.05)
    assert not any("vision" in n for n, m in model.named_modules() if isinstance(m, sd.LoRALinear))
    cfg = make_config(condition="reference", model=folder)
    rollouts, metrics = sd.train_step(model, tokenizer, optimizer, problems[:2], None, cfg)
    assert not any(r.masked for r in rollouts) and metrics["grad_norm"] > 0
    prompts, completions = [[3, 4, 5], [6, 7, 8, 9, 10]], [[11, 12, 1], [13, 14]]
    greedy = sd.generate(model, tokenizer, prompts, 2, 8, 0)
    assert greedy == [sd.generate(model, tokenizer, [p], 1, 8, 0)[0] for p in prompts]
    with torch.no_grad():
        ours = sd.log_probs(model, sd.hidden_states(model, prompts, completions), 1.0)
        sd.save_merged(model, tokenizer, tmp_path / "best")
        best = AutoModelForCausalLM.from_pretrained(tmp_path / "best")
        base = AutoModelForCausalLM.from_pretrained(folder)
        pairs = list(zip(prompts, completions, strict=True))
        expected = torch.cat([plain_log_probs(best, *pair, 1.0) for pair in pairs])
        before = torch.cat([plain_log_probs(base, *pair, 1.0) for pair in pairs])
    torch.testing.assert_close(ours, expected, atol=1e-4, rtol=1e-4)
    assert (expected - before).abs().max() > 0.01
    assert type(best) is type(base) and set(best.state_dict()) == set(base.state_dict())


@pytest.mark.parametrize("pad", [None, "<|im_end|>", "<pad>"])
def test_a_completion_ends_with_its_first_end_token_with_any_padding(pad, tmp_path):
    ends = list(range(60, 70))  # those of the model's config; the tokenizer's is 1
    folder = save_model(tmp_path / "model", byte_tokenizer(pad), ends=ends)
    torch.manual_seed(0)
    prompts = [[5] * n for n in (2, 9, 4)] * 100
    completions = sd.generate(*sd.load_model(folder, "cpu", "float32"), prompts, 300, 60, 1.0)
    assert {c[-1] for c in completions if len(c) < 60} == {1, *ends}
    assert all(token not in {1, *ends} for c in completions for token in c[:-1])


def test_a_text_keeps_special_tokens_and_drops_the_end_token(tmp_path):
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<answer>", "</answer>"]})
    model, tokenizer = sd.load_model(save_model(tmp_path, tokenizer), "cpu", "float32")
    ids = tokenizer.encode("<answer>7</answer>", add_special_tokens=False)
    assert len(ids) == 3 and sd.completion_text(model, tokenizer, ids) == "<answer>7</answer>"
    assert sd.completion_text(model, tokenizer, [*ids, 1]) == "<answer>7</answer>"


def test_a_prompt_does_not_change_overnight_and_has_either_thinking_switch():
    tokenizer = byte_tokenizer()
    date = "{%- macro today() %}{{ strftime_now('%d %b %Y') }}{% endmacro -%} {{ today() }}"
    tokenizer.chat_template = date + "{% if thinking %}hm{% endif %}{{ messages[0].content }}"
    for thinking, said in (False, "26 Jul 2024hello"), (True, "26 Jul 2024hmhello"):
        assert tokenizer.decode(sd.encode_chats(tokenizer, ["hello"], thinking)[0]) == said
    toy = AutoTokenizer.from_pretrained(TOY)
    assert sd.encode_chats(toy, ["12 <unk> 3"])[0][-2] == toy.convert_tokens_to_ids("3")


def test_the_fingerprint_sees_what_a_model_computes_and_nothing_else(tmp_path):
    def fingerprint(dtype="float32"):
        return sd.load_model(str(tmp_path), "cpu", dtype)[0].fingerprint

    up = "model.layers.0.mlp.up_proj.weight"
    save_model(tmp_path, byte_tokenizer())
    edit_weights(tmp_path, lambda w: w[up][0].mul_(0).neg_())  # -0.0
    model, tokenizer = sd.load_model(str(tmp_path), "cpu", "float32")
    sd.add_adapters(model, 2, 6.0)
    sd.save_merged(model, tokenizer, tmp_path)
    seen = {model.fingerprint, fingerprint()}
    assert len(seen) == 1  # merged without an update
    seen.add(fingerprint("bfloat16"))
    edit_weights(tmp_path, lambda w: w[up].copy_(w[up].flip(0)))
    seen.add(fingerprint())
    edit_config(tmp_path, rope_parameters={"rope_type": "default", "rope_theta": 500.0})
    seen.add(fingerprint())
    (tmp_path / "chat_template.jinja").write_text("Today: " + CHATML)
    seen.add(fingerprint())
    assert len(seen) == 5


def test_the_share_of_the_weights_that_adapters_reach(tmp_path, make_config, capsys):
    cfg = make_config(model=save_family(tmp_path / "moe", "PhimoeForCausalLM", **EXPERTS))
    sd.prepare(cfg, {})
    assert "LoRA adapts 14% of the weights" in capsys.readouterr().out
    gpt2 = save_family(tmp_path / "gpt2", "GPT2LMHeadModel", transformers.GPT2Config)
    with pytest.raises(UserError, match="no linear layers"):
        sd.prepare(make_config(model=gpt2), {})


def test_a_prompt_needs_room_for_the_completion(run, tmp_path, tiny, world, monkeypatch):
    monkeypatch.setattr(sd, "add_adapters", Mock(side_effect=UserError("it fits")))
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


def end_nowhere(folder):
    tokenizer = byte_tokenizer()
    tokenizer.eos_token = None
    save_model(folder, tokenizer, ends=300)


IMAGES = "{% for m in messages %}{% for part in m.content %}{{ part.text }}{% endfor %}{% endfor %}"
MINIMAX = EXPERTS | {"block_size": 4, "layer_types": ["linear_attention", "full_attention"]}
FP8 = {"quant_method": "fp8", "weight_block_size": [128, 128], "activation_scheme": "dynamic"}
FLAWS = [  # what is done to the folder, what is said
    (lambda f: edit_weights(f, lambda w: w.pop("model.norm.weight")), "lacks weights"),
    (lambda f: edit_weights(f, lambda w: w["model.norm.weight"].mul_(torch.nan)), "nan nats"),
    (end_nowhere, "no end token"),
    (lambda f: edit_config(f, quantization_config=FP8), "quantized"),
    (lambda f: edit_config(f, final_logit_softcapping=30.0), "nats"),  # Qwen3 has no cap
    (lambda f: save_family(f, "ModernBertDecoderForCausalLM", bos_token_id=0), "nats"),
    (lambda f: save_family(f, "HyperCLOVAXForCausalLM", logits_scaling=0.5), "nats"),
    (lambda f: save_family(f, "MiniMaxForCausalLM", **MINIMAX), "nats"),  # reads padding
    (lambda f: (f / "chat_template.jinja").write_text(IMAGES), "drops the message"),
    (lambda f: (f / "chat_template.jinja").unlink(), "chat_template is not set"),
    (lambda f: (f / "chat_template.jinja").write_text("{{ 1 / 0 }}"), "division by zero"),
    (lambda f: (f / "model.safetensors").write_text("{}"), "cannot use"),
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
    with pytest.raises(UserError, match="cannot use"):
        sd.load_model(str(tmp_path), "cpu", "float32")
    assert not (tmp_path / "ran").exists()
