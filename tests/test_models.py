"""Other people's models: tiny random ones of several families, and what their tokenizers and templates do."""

import dataclasses
import json

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GemmaConfig,
    GemmaForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
)
from transformers.modeling_layers import GradientCheckpointingLayer

import sd

SHAPE = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)
FAMILIES = {
    "qwen3": (Qwen3ForCausalLM, Qwen3Config, SHAPE | {"head_dim": 8}),
    "llama": (LlamaForCausalLM, LlamaConfig, SHAPE),
    "gemma": (GemmaForCausalLM, GemmaConfig, SHAPE | {"head_dim": 8}),
    "gpt2": (GPT2LMHeadModel, GPT2Config, dict(n_embd=32, n_layer=2, n_head=4, n_positions=2048)),
}
TEMPLATES = {
    "plain": "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}",
    "no system role": "{{ bos_token }}{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}",
    "thinks": "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}{% if add_generation_prompt %}[assistant]"
    "{% if not enable_thinking %}<think></think>{% endif %}{% endif %}",
}


def byte_tokenizer(template="plain", pad=None):
    """A byte-level tokenizer that puts a BOS before every text it encodes, as Llama's does."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE({c: n for n, c in enumerate(["<bos>", "<end>", "<pad>", *alphabet])}, []))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 0)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<bos>", eos_token="<end>", pad_token=pad)
    tokenizer.chat_template = TEMPLATES[template]
    return tokenizer


def save(folder, family="qwen3", tokenizer=None, vocabulary=300, **more):
    """A random model with more entries in its vocabulary than its tokenizer has."""
    kind, config, shape = FAMILIES[family]
    tokenizer = tokenizer or byte_tokenizer()
    torch.manual_seed(0)
    ends = dict(bos_token_id=0, eos_token_id=1, pad_token_id=tokenizer.pad_token_id)
    model = kind(config(vocab_size=vocabulary, initializer_range=0.3, **shape, **ends, **more))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def data(path, count=12):
    rows = [{"problem": f"What is {n} + 1?", "solution": f"<step_1>1 + {n} = {n + 1}</step_1>", "answer": f"{n + 1}"} for n in range(count)]
    path.write_text("\n".join(map(json.dumps, rows)))
    return str(path)


@pytest.mark.parametrize("condition", ["grpo", "reference"])
@pytest.mark.parametrize("family", FAMILIES)
def test_two_steps_of_every_family_train_adapters_and_leave_an_ordinary_model(family, condition, tmp_path):
    model = save(tmp_path / "model", family)
    flags = f"--model {model} --data {data(tmp_path / 'data.jsonl')} --condition {condition} --out {tmp_path / 'run'}"
    flags += " --steps 2 --problems-per-step 2 --max-new-tokens 8 --lora-rank 2 --eval-every 2 --val-samples 2 --test-samples 2"
    sd.main(flags.split() + ["--device", "cpu", "--lr", "0.05"])
    steps = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert len(steps) == 3 and steps[2]["masked"] == 0 and (condition == "grpo" or steps[2]["grad_norm"] > 0)
    best = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "best")
    plain = AutoModelForCausalLM.from_pretrained(model)
    assert type(best) is type(plain) and set(best.state_dict()) == set(plain.state_dict())


@pytest.mark.parametrize("family", FAMILIES)
def test_merging_and_scoring_agree_with_the_models_own_forward_pass(family, tmp_path):
    model, tokenizer = sd.load(save(tmp_path / "model", family), "cpu")
    for adapter in sd.add_adapters(model, 2, 4.0):
        torch.nn.init.normal_(adapter, std=0.3)
    prompts, completions = [[3, 4, 5], [6, 7, 8, 9, 10]], [[11, 12, 1], [13, 14]]
    with torch.no_grad():
        ours = sd.log_probs(model, sd.completion_states(model, prompts, completions), 1.0)
        own = [model(torch.tensor([p + c])).logits[0, len(p) - 1 : -1].log_softmax(-1) for p, c in zip(prompts, completions)]
        torch.testing.assert_close(ours, torch.cat(own), atol=1e-4, rtol=1e-4)
        model.save_pretrained(tmp_path / "merged", state_dict=sd.merged_state_dict(model))
        merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
        ids = torch.tensor([[3, 4, 5, 6]])
        torch.testing.assert_close(merged(ids).logits, model(ids).logits, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_gradient_checkpointing_changes_memory_and_not_the_gradient(family, tmp_path, config):
    """Dropout, which GPT-2 has, stays off: transformers checkpoints layers only while they train."""
    gradients = []
    for on in False, True:
        model, _ = sd.load(save(tmp_path / f"model{on}", family), "cpu")
        torch.manual_seed(0)
        adapters = sd.add_adapters(model, 2, 4.0)
        for adapter in adapters:
            torch.nn.init.normal_(adapter, std=0.3)
        model.activation_checkpointing_enable({"use_reentrant": False})
        problem = sd.Problem("p", "s", "1")
        rollout = sd.Rollout(problem, [3, 4], [5, 6, 7, 1], "", 0.0, 0.0, context="s", teacher_prompt=[3, 8, 9])
        saved = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()) or t, lambda t: t):
            cfg = config(condition="reference", gradient_checkpointing=on)
            states, _, _, gradient = sd.token_losses(model, [rollout], cfg)
        states.backward(gradient)
        gradients.append((torch.cat([p.grad.flatten() for p in adapters]), sum(saved)))
        assert not any(m.training for m in model.modules() if isinstance(m, (GradientCheckpointingLayer, torch.nn.Dropout)))
    (plain, much), (again, little) = gradients
    torch.testing.assert_close(again, plain)
    assert plain.abs().max() > 0 and little < much / 2


@pytest.mark.parametrize("condition", ["grpo", "reference"])
def test_a_bf16_model_trains_fp32_adapters_and_is_saved_in_bf16(condition, tmp_path, config, monkeypatch):
    """As on CUDA."""
    monkeypatch.setattr(sd, "is_correct", lambda text, answer: len(text) % 2 == 0)
    model, tokenizer = sd.load(save(tmp_path / "model"), "cpu")
    adapters = sd.add_adapters(model.bfloat16(), 2, 4.0)
    before = [adapter.detach().clone() for adapter in adapters]
    problems = [sd.Problem("What?", "so", "1"), sd.Problem("Why?", "so", "1")]
    cfg = config(condition=condition, max_new_tokens=20)
    _, metrics = sd.train_step(model, tokenizer, torch.optim.AdamW(adapters, lr=0.01), problems, None, cfg)
    assert metrics["grad_norm"] > 0 and any(not torch.equal(a, b) for a, b in zip(before, adapters))
    assert {a.dtype for a in adapters} == {torch.float32}
    assert {w.dtype for w in sd.merged_state_dict(model).values()} == {torch.bfloat16}


@pytest.mark.parametrize("template", TEMPLATES)
def test_one_bos_at_most_and_no_system_role(template, tmp_path):
    tokenizer = byte_tokenizer(template)
    [prompt] = sd.build_prompts(tokenizer, ["What?"], [None])
    assert prompt.count(0) == (template == "no system role")
    assert tokenizer.decode(prompt).endswith("What?[assistant]" + "<think></think>" * (template == "thinks"))


def test_the_teacher_may_think_and_the_student_does_not(tmp_path, config):
    model, tokenizer = sd.load(save(tmp_path / "model", tokenizer=byte_tokenizer("thinks")), "cpu")
    cfg = config(condition="reference", teacher_thinking=True)
    rollouts = sd.sample_rollouts(model, tokenizer, [sd.Problem("What?", "so", "1")], 1, cfg)
    sd.give_contexts(rollouts, None, model, tokenizer, cfg)
    assert tokenizer.decode(rollouts[0].prompt).endswith("[assistant]<think></think>")
    assert tokenizer.decode(rollouts[0].teacher_prompt).endswith("so[assistant]")


@pytest.mark.parametrize("pad", [None, "<end>", "<pad>"])
def test_padding_may_be_missing_or_be_the_end_token_or_one_of_its_own(pad, tmp_path, config):
    model, tokenizer = sd.load(save(tmp_path / "model", tokenizer=byte_tokenizer(pad=pad)), "cpu")
    cfg = config(condition="reference", max_new_tokens=40)
    prompts = [[5] * n for n in (2, 9, 4)] * 10
    torch.manual_seed(0)
    completions = sd.sample(model, prompts, cfg)
    assert any(c[-1] == 1 for c in completions) and all(1 not in c[:-1] for c in completions)
    assert all(len(c) == 40 or c[-1] == 1 for c in completions)


def test_a_token_that_the_tokenizer_does_not_have_is_no_text_and_is_scored(tmp_path):
    """Vocabularies are padded to round numbers: a model may sample an entry without a name."""
    model, tokenizer = sd.load(save(tmp_path / "model"), "cpu")
    ids = [*tokenizer.encode("ab", add_special_tokens=False), 299, *tokenizer.encode("c", add_special_tokens=False), 1]
    assert sd.token_texts(tokenizer, ids) == ["a", "b", "", "c", ""]
    with torch.no_grad():
        assert sd.log_probs(model, sd.completion_states(model, [[3]], [ids]), 1.0).isfinite().all()


def test_a_model_that_caps_its_logits_is_refused(tmp_path):
    torch.manual_seed(0)
    shape = SHAPE | {"head_dim": 8, "final_logit_softcapping": 1.0, "initializer_range": 2.0}
    Gemma2ForCausalLM(Gemma2Config(vocab_size=300, bos_token_id=0, eos_token_id=1, **shape)).save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(sd.Stop, match="caps or scales"):
        sd.load(str(tmp_path), "cpu")


def test_a_prompt_that_leaves_no_room_for_the_completion_is_refused(tmp_path, config):
    model, tokenizer = sd.load(save(tmp_path / "model", max_position_embeddings=300), "cpu")
    problems = [[sd.Problem("short", "s", "1")], [sd.Problem("long " * 30, "s", "1")], []]
    with pytest.raises(sd.Stop, match="takes 300 tokens.*'long long"):
        sd.check_lengths(model, tokenizer, problems, config(max_new_tokens=40))
    sd.check_lengths(model, tokenizer, problems[:1], config(max_new_tokens=40))


def test_a_model_without_a_layer_for_adapters_is_refused():
    class Other(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.base_model = torch.nn.Sequential(torch.nn.Embedding(3, 3))

    with pytest.raises(sd.Stop, match="Other has no linear layer"):
        sd.add_adapters(Other(), 2, 4.0)


def test_every_part_of_a_rollout_survives_other_alphabets(tmp_path, config):
    tokenizer = byte_tokenizer()
    text = "<step_1>½ × 4 = 2 🙂</step_1><answer>2</answer>"
    rollout = sd.Rollout(sd.Problem("p", "s", "2"), [], tokenizer.encode(text, add_special_tokens=False), text, 1.0, 0.0)
    rollout.advantages = [0.0] * len(rollout.completion)
    assert "".join(t for _, tokens in sd.advantage_by_step(tokenizer, rollout) for t, _ in tokens) == text
    assert dataclasses.asdict(rollout)["completion"] == tokenizer(text, add_special_tokens=False)["input_ids"]
