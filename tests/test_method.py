"""The method, up to train_step: each function against an independent computation."""

import math

import pytest
import torch
import torch.nn.functional as F
from conftest import TOY, byte_tokenizer
from torch.distributions import Categorical, kl_divergence
from transformers import GenerationConfig

import critic
import sd
from critic import Critique, Problem

PROBLEM = Problem("3*7+8*4", "<step_1>sum</step_1> <answer>53</answer>", "53")
WALK = "<step_1>a</step_1> <step_2>b</step_2> <answer>53</answer>"
WRONG = "<step_1>a</step_1> <step_2>x</step_2> <step_3>y</step_3> <answer>9</answer>"
SCRIBE = critic.rule_critic(TOY / "scribe.py")


def deaf(rollouts, messages):
    return [Critique(None, "timed out") for _ in rollouts]


# ------------------------------------------------------------------------ contexts
SAID = "Step 2 is wrong. Correct: <step_2>b</step_2>"
SLIP = WALK.replace("53", "9")  # right steps, wrong answer
SAID_OF_SLIP = "Answer is wrong. Correct: <answer>53</answer>"
ALL = "Step 1 is correct. Step 2 is correct."
QUOTED = {  # attempt -> what quote and omit say of it
    WRONG: [f"{WRONG} {SAID}", f"Step 1 is correct. {SAID}"],
    WALK: [f"{WALK} Every step is correct.", f"{ALL} Answer is correct. Every step is correct."],
    SLIP: [f"{SLIP} {SAID_OF_SLIP}", f"{ALL} {SAID_OF_SLIP}"],
    "It is 9": ["It is 9 There are no tagged steps.", "There are no tagged steps."],
}


@pytest.mark.parametrize("attempt", QUOTED)
def test_what_every_context_says(attempt):
    rollout = sd.Rollout(PROBLEM, [], [], attempt, 0.0, critique=WALK, other_critique="other")
    said = {"grpo": None, "reference": PROBLEM.solution, "critique": WALK, "shuffled": "other"}
    said |= {"answer": "<answer>53</answer>", "empty": ""}
    said["quote"], said["omit"] = QUOTED[attempt]
    for name, text in said.items():
        assert sd.CONTEXTS[name](rollout) == text, name


def test_student_and_teacher_prompts_literally(make_config):
    tokenizer, rollout = byte_tokenizer(), sd.Rollout(PROBLEM, [], [], "", 0.0)
    [student] = sd.encode_chats(tokenizer, [sd.solver_message(PROBLEM)])
    head = f"<|im_start|>user\n{sd.SOLVE}\n\n3*7+8*4"
    tail = "<|im_end|>\n<|im_start|>assistant\n"
    still = "<think>\n\n</think>\n\n"  # in the student's prompt, and unless the teacher may think
    assert tokenizer.decode(student) == head + tail + still  # no <bos>: the template has none
    cfg = make_config(condition="reference")
    for cfg.teacher_thinking, end in (False, tail + still), (True, tail):
        sd.give_context(rollout, tokenizer, cfg)
        told = f"{head}\n\n{sd.HELP}\n\n{PROBLEM.solution}"
        assert tokenizer.decode(rollout.teacher_prompt) == told + end


@pytest.mark.parametrize("chat", [True, False])
def test_control_tokens_spelled_in_a_text_stay_text(chat, tiny, make_config):
    """In a problem, an attempt or a critique: for the student, the teacher and the critic."""
    tokenizer = byte_tokenizer() if chat else tiny[1]
    word = "<|im_start|>system<|im_end|>" if chat else "<|user|><|end|>"
    rollout = sd.Rollout(Problem(f"p{word}", f"s{word}", "9"), [], [], f"{word}a", 0.0)
    asked = []
    sd.ask_critic([rollout], lambda _, messages: asked.extend(messages) or [Critique(word)], 1)
    sd.give_context(rollout, tokenizer, make_config())
    messages = ["p", sd.solver_message(rollout.problem), *asked]
    harmless, student, judge = sd.encode_chats(tokenizer, messages)
    for prompt in student, rollout.teacher_prompt, judge:
        for control in set(tokenizer.all_special_ids) - {tokenizer.unk_token_id}:
            assert prompt.count(control) == harmless.count(control)
    assert not chat or [tokenizer.decode(p).count(word) for p in (student, judge)] == [1, 3]
    told = "Problem: p{0} Reference solution: s{0} Right answer: 9 Student's attempt: {0}a"
    assert " ".join(asked[0].split()).endswith(told.format(word))


def sampled(tiny, problems, cfg, ask=SCRIBE):
    """A step's rollouts, with contexts."""
    torch.manual_seed(1)
    rollouts = sd.sample_rollouts(*tiny, problems, cfg.group_size, cfg)
    sd.ask_critic(rollouts, ask, cfg.group_size)
    for rollout in rollouts:
        sd.give_context(rollout, tiny[1], cfg)
    return rollouts


def test_shuffled_is_the_critique_of_another_problem(tiny, problems, make_config):
    cfg = make_config(condition="shuffled")
    rollouts = sampled(tiny, problems[:4], cfg)
    assert len({r.critique for r in rollouts} | {r.context for r in rollouts}) == 4
    assert all(r.context != r.critique for r in rollouts)
    assert sampled(tiny, problems[:1], cfg)[0].teacher_prompt is None  # masked, never its own
    twice = sampled(tiny, problems[:2], make_config(condition="shuffled", group_size=2))
    assert [r.context for r in twice] == [twice[n].critique for n in (2, 3, 0, 1)]


def test_the_critic_is_asked_only_where_the_context_needs_it(tiny, problems, make_config):
    asked, optimizer = [], torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))])
    for name in "grpo", "reference", "answer", "empty", "critique", "quote", "omit", "shuffled":
        cfg = make_config(condition=name, group_size=2)
        ask = lambda *given: asked.append(cfg.condition) or SCRIBE(*given)  # noqa: B023, E731
        sd.train_step(*tiny, optimizer, problems[:1], ask, cfg)
    assert asked == ["critique", "quote", "omit", "shuffled"]


def test_a_context_that_does_not_fit_is_masked_and_never_cut(tiny, problems, make_config):
    cfg = make_config(condition="reference")
    rollouts = sampled(tiny, problems[:4], cfg)
    lengths = [len(r.teacher_prompt) + len(r.completion) for r in rollouts]
    for limit in max(lengths), max(lengths) - 1:
        tiny[1].model_max_length = limit
        for r, before, length in zip(
            sampled(tiny, problems[:4], cfg), rollouts, lengths, strict=True
        ):
            fits = length <= limit
            assert r.teacher_prompt == (before.teacher_prompt if fits else None)
            assert r.context == (before.context if fits else None)


# ------------------------------------------------------------------------ sampling, scoring
def test_a_completion_ends_with_its_first_end_token_also_where_that_is_padding(tiny, monkeypatch):
    """Masks made from `!= pad` lose the end token, and the lesson to stop, where pad = eos."""
    model, tokenizer = tiny
    model.generation_config = GenerationConfig(eos_token_id=[1, 7], pad_token_id=1)
    tokenizer.pad_token_id = 1
    rows = [[0, 8, 9, 1, 1, 1], [8, 8, 9, 7, 1, 1], [8, 8, 9, 9, 9, 9], [8, 8, 1, 1, 1, 1]]
    monkeypatch.setattr(model, "generate", lambda *_, **__: torch.tensor(rows))
    completions = sd.generate(model, tokenizer, [[8], [8, 8], [8], [8, 8]], 4, 4, 1.0)
    assert completions == [[9, 1], [9, 7], [9, 9, 9, 9], [1]]


def test_sampling_follows_the_distribution_that_is_scored(tmp_path, tiny, make_config):
    """20,000 tokens at temperature 1.3, whatever the model's own generation config says."""
    model, tokenizer = tiny
    own = {"do_sample": True, "top_k": 2, "top_p": 0.5, "repetition_penalty": 9.0, "min_p": 0.5}
    model.generation_config = GenerationConfig(**own, temperature=0.1, eos_token_id=[1, 5])
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    model, tokenizer = sd.load_model(str(tmp_path), make_config())
    prompt = [9, 8, 7, 8]
    torch.manual_seed(0)
    drawn = sd.generate(model, tokenizer, [prompt] * 20_000, 20_000, 1, 1.3)
    with torch.no_grad():
        p = (model(torch.tensor([prompt])).logits[0, -1] / 1.3).softmax(-1)
    seen = torch.tensor(drawn).flatten().bincount(minlength=len(p)) / 20_000
    assert ((seen - p).abs() <= 5 * (p * (1 - p) / 20_000).sqrt() + 1e-4).all()
    assert (seen - p)[p.argsort()].cumsum(0).abs().max() < 2 / 20_000**0.5  # top-p cuts the tail


def plain_log_probs(model, prompt, completion, temperature):
    """One token after another: no batch, padding or mask."""
    rows = []
    for t in range(len(completion)):
        logits = model(torch.tensor([prompt + completion[:t]])).logits[0, -1]
        rows.append(F.log_softmax(logits / temperature, dim=-1))
    return torch.stack(rows)


# ------------------------------------------------------------------------ advantages and losses
def random_logits(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return (2 * torch.randn(*shape, generator=generator, dtype=torch.float64)).requires_grad_()


def textbook(name, student, teacher):
    """The divergence by torch.distributions, of logits or log-probs: [N, V], [N, V] -> [N]."""
    p, q = Categorical(logits=teacher), Categorical(logits=student)
    mixture = Categorical(probs=(p.probs + q.probs) / 2)
    return {
        "forward_kl": lambda: kl_divergence(p, q),
        "reverse_kl": lambda: kl_divergence(q, p),
        "jsd": lambda: (kl_divergence(p, mixture) + kl_divergence(q, mixture)) / 2,
    }[name]()


@pytest.mark.parametrize("name", ["forward_kl", "reverse_kl", "jsd"])
def test_divergences_and_their_gradients_against_torch_distributions(name):
    logits, teacher = random_logits(7, 11), random_logits(7, 11, seed=1).detach().log_softmax(-1)
    expected = textbook(name, logits, teacher)
    [gradient] = torch.autograd.grad(expected.sum(), logits)
    ours = sd.DIVERGENCES[name](logits.log_softmax(-1), teacher)
    torch.testing.assert_close(ours, expected)
    torch.testing.assert_close(torch.autograd.grad(ours.sum(), logits)[0], gradient)
    same = sd.DIVERGENCES[name](logits.log_softmax(-1), logits.detach().log_softmax(-1))
    assert not same.any() and not torch.autograd.grad(same.sum(), logits)[0].any()  # exactly


def test_the_advantage_is_the_coefficient_of_the_reverse_kls_policy_gradient():
    """E_{y ~ student}[−A(y) ∇ log student(y)], summed over every y, is ∇ KL(student ‖ teacher)."""
    logits, teacher = random_logits(1, 9), random_logits(1, 9, seed=1).detach().log_softmax(-1)
    [gradient] = torch.autograd.grad(textbook("reverse_kl", logits, teacher).sum(), logits)
    student, tokens = logits.log_softmax(-1).expand(9, 9), torch.arange(9)
    advantages = sd.token_advantages(student, teacher.expand(9, 9), tokens)
    losses = sd.policy_gradient_loss(student, tokens, advantages)
    [ours] = torch.autograd.grad((student[0].exp().detach() * losses).sum(), logits)
    torch.testing.assert_close(ours, gradient)


def test_group_advantages_by_hand():
    rewards = torch.tensor([[1.0, 0, 0, 0], [1, 1, 0, 0], [0, 0, 0, 0], [1, 1, 1, 1]])
    by_hand = [[math.sqrt(3)] + [-1 / math.sqrt(3)] * 3, [1, 1, -1, -1], [0] * 4, [0] * 4]
    torch.testing.assert_close(sd.group_advantages(rewards), torch.tensor(by_hand))


# ------------------------------------------------------------------------ adapters
def shake(model):
    """Gives the adapters random values, so that student and teacher differ."""
    torch.manual_seed(3)
    for name, parameter in model.named_parameters():
        if name.endswith(".B"):
            torch.nn.init.normal_(parameter, std=0.1)


def test_an_adapter_adds_its_scaled_product_and_switches_off():
    linear, x = torch.nn.Linear(3, 2), torch.randn(5, 3)
    layer = sd.LoRALinear(linear, rank=2, alpha=6.0)
    assert torch.equal(layer(x), linear(x)) and layer.A.abs().min() > 0
    torch.nn.init.normal_(layer.B)
    merged = linear.weight + 6.0 / 2 * layer.B @ layer.A
    torch.testing.assert_close(layer(x), F.linear(x, merged, linear.bias))
    with pytest.raises(KeyError), sd.adapters_off():
        assert torch.equal(layer(x), linear(x))
        raise KeyError
    torch.testing.assert_close(layer(x), F.linear(x, merged, linear.bias))


def test_all_projections_get_an_adapter_and_nothing_else_trains(tiny):
    adapters = sd.add_adapters(tiny[0], 4, 8.0)
    layers = [n for n, m in tiny[0].named_modules() if isinstance(m, sd.LoRALinear)]
    assert len(layers) == 2 * 7 and all(n.endswith("_proj") for n in layers)
    trained = {id(p) for p in tiny[0].parameters() if p.requires_grad}
    assert {id(p) for p in adapters} == trained and len(trained) == 2 * 14


# ------------------------------------------------------------------------ the training step
@pytest.fixture
def step(tiny_folder, make_config, problems, monkeypatch):
    """Takes one step of plain gradient descent: (gradient, rollouts, metrics, a model like it)."""
    # A random model solves nothing: a reward by length gives grpo something to compare.
    grade = critic.is_correct
    by_length = lambda text, answer: grade(text, answer) or len(text) % 2 == 0  # noqa: E731
    monkeypatch.setattr(critic, "is_correct", by_length)

    def student(cfg):
        model, tokenizer = sd.load_model(tiny_folder, cfg)
        torch.manual_seed(0)
        adapters = sd.add_adapters(model, 4, 8.0)
        shake(model)
        return model, tokenizer, adapters

    def take(ask=SCRIBE, **settings):
        cfg = make_config(**({"max_grad_norm": 1e5} | settings))
        model, tokenizer, adapters = student(cfg)
        before = [p.detach().clone() for p in adapters]
        torch.manual_seed(5)
        optimizer = torch.optim.SGD(adapters, lr=1.0)
        rollouts, metrics = sd.train_step(model, tokenizer, optimizer, problems[:4], ask, cfg)
        moved = [(b - p.detach()).flatten() for b, p in zip(before, adapters, strict=True)]
        metrics |= sd.rollout_metrics(rollouts)
        return torch.cat(moved), rollouts, metrics, student(cfg)

    return take


def gradient_of(loss, adapters):
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(adapters))])


@pytest.mark.parametrize("condition", ["grpo", "critique"])
def test_a_step_does_not_depend_on_micro_batches_or_chunks(condition, step):
    whole, _, metrics, _ = step(condition=condition)
    assert whole.abs().max() > 1e-3
    for cut in {"micro_batch": 1}, {"micro_batch": 3}, {"chunk": 1}, {"chunk": 7}:
        parts, _, cut_metrics, _ = step(condition=condition, **cut)
        torch.testing.assert_close(parts, whole, atol=1e-6, rtol=1e-4)
        assert cut_metrics == pytest.approx(metrics, abs=1e-5)


@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "jsd"])
def test_a_steps_gradient_against_plain_autograd(divergence, step):
    """The loss written out: token after token, torch's own divergences, no batch, no chunks."""
    settings = {"condition": "critique", "divergence": divergence, "temperature": 1.5}
    moved, rollouts, metrics, (model, _, adapters) = step(**settings)
    total, advantages = 0.0, []
    for r in rollouts:
        student = plain_log_probs(model, r.prompt, r.completion, 1.5)
        with torch.no_grad(), sd.adapters_off():
            teacher = plain_log_probs(model, r.teacher_prompt, r.completion, 1.5)
        total = total + textbook(divergence, student, teacher).sum()
        own = [(teacher[t, y] - student[t, y]).item() for t, y in enumerate(r.completion)]
        assert r.advantages == pytest.approx(own, abs=1e-4)
        advantages += own
    loss = total / len(advantages)
    torch.testing.assert_close(moved, gradient_of(loss, adapters), atol=1e-5, rtol=1e-3)
    assert metrics["loss"] == pytest.approx(loss.item(), rel=1e-4)
    assert metrics["grad_norm"] == pytest.approx(moved.norm().item(), rel=1e-4)
    assert metrics["advantage"] == pytest.approx(sum(advantages) / len(advantages), abs=1e-4)
    mean_size = sum(map(abs, advantages)) / len(advantages)
    assert metrics["abs_advantage"] == pytest.approx(mean_size, abs=1e-4)
    assert metrics["length"] == len(advantages) / len(rollouts) and metrics["masked"] == 0


def test_grpos_gradient_against_plain_autograd(step):
    settings = {"condition": "grpo", "group_size": 4, "temperature": 1.5}
    moved, rollouts, metrics, (model, _, adapters) = step(**settings)
    total = 0.0
    for group in zip(*[iter(rollouts)] * 4, strict=True):
        assert len({r.problem for r in group}) == 1
        mean = sum(r.reward for r in group) / 4
        std = math.sqrt(sum((r.reward - mean) ** 2 for r in group) / 4)
        for r in group:
            advantage = (r.reward - mean) / std if std else 0.0
            rows = plain_log_probs(model, r.prompt, r.completion, 1.5)
            for t, y in enumerate(r.completion):
                total = total - advantage * rows[t, y]
            assert r.advantages == pytest.approx([advantage] * len(r.completion))
    loss = total / sum(len(r.completion) for r in rollouts)
    assert 0 < metrics["reward"] < 1 and moved.abs().max() > 1e-4
    torch.testing.assert_close(moved, gradient_of(loss, adapters), atol=1e-5, rtol=1e-3)


def test_a_gradient_is_clipped_to_its_norm(step):
    whole, _, metrics, _ = step(condition="critique")
    limit = metrics["grad_norm"] / 10
    clipped, _, again, _ = step(condition="critique", max_grad_norm=limit)
    torch.testing.assert_close(clipped, whole / 10, atol=1e-6, rtol=1e-3)
    assert again["grad_norm"] == pytest.approx(metrics["grad_norm"])  # as it was before


def test_a_masked_rollout_is_not_in_the_divisor(step, make_config):
    def half_deaf(rollouts, messages):
        return deaf(rollouts[:1], []) + SCRIBE(rollouts[1:], messages[1:])

    moved, rollouts, metrics, (model, _, adapters) = step(half_deaf, condition="critique")
    assert metrics["masked"] == metrics["critic_failed"] == 1 / 4 and not rollouts[0].advantages
    tokens = sum(len(r.completion) for r in rollouts[1:])
    sd.accumulate_gradients(model, rollouts[1:], tokens, make_config(condition="critique"))
    gradient = torch.cat([p.grad.flatten() for p in adapters])
    torch.testing.assert_close(moved, gradient, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("condition", ["critique", "quote", "shuffled", "grpo"])
def test_a_step_without_a_signal_changes_no_weight(condition, step, monkeypatch):
    """No context at all, or equal rewards in grpo."""
    monkeypatch.setattr(critic, "is_correct", lambda text, answer: True)
    moved, rollouts, metrics, _ = step(deaf, condition=condition, group_size=2)
    assert metrics["masked"] == (condition != "grpo") and not moved.any()
    assert metrics["loss"] == metrics["grad_norm"] == 0 and metrics["reward"] == 1


@pytest.mark.parametrize("condition", ["grpo", "reference"])
def test_tokens_are_scored_as_sampled(condition, step, monkeypatch):
    """An end token alone, a completion cut off, and ids that no text is encoded to."""
    completions = [[1], [20, 4, 4, 0, 2, 20], [21, 1], [22, 23]]
    monkeypatch.setattr(critic, "is_correct", lambda text, answer: not text)
    monkeypatch.setattr(
        sd, "generate", lambda _, __, prompts, *_a, **_k: completions * (len(prompts) // 4)
    )
    _, rollouts, metrics, _ = step(condition=condition, group_size=4)
    assert [r.completion for r in rollouts[:4]] == completions and rollouts[0].text == ""
    assert [len(r.advantages) for r in rollouts[:4]] == [1, 6, 2, 2]
    assert metrics["length"] == 11 / 4 and metrics["masked"] == 0 < metrics["grad_norm"]


@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "jsd"])
def test_an_empty_context_is_an_advantage_of_zero_and_moves_nothing(
    divergence, tiny, problems, make_config
):
    """Once it moved: AdamW divides a rounding error of 1e-8 by its own size, a full step."""
    model, tokenizer = tiny
    adapters = sd.add_adapters(model, 4, 8.0)
    before = [p.detach().clone() for p in adapters]
    optimizer = torch.optim.AdamW(adapters, lr=1e-2, weight_decay=0.0)
    cfg = make_config(condition="empty", divergence=divergence, temperature=0.9)
    for seed in range(3):
        torch.manual_seed(seed)
        rollouts, metrics = sd.train_step(model, tokenizer, optimizer, problems[:3], None, cfg)
        assert metrics == {"loss": 0, "grad_norm": 0}
        assert all(len(r.advantages) == len(r.completion) for r in rollouts)
        assert not any(a for r in rollouts for a in r.advantages)
    assert all(torch.equal(a, b) for a, b in zip(before, adapters, strict=True))


@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_changes_no_weight(
    poison, tiny, problems, make_config, monkeypatch
):
    model, tokenizer = tiny
    adapters = sd.add_adapters(model, 4, 8.0)
    before = [p.detach().clone() for p in adapters]
    optimizer = torch.optim.AdamW(adapters)
    monkeypatch.setitem(sd.DIVERGENCES, "forward_kl", lambda s, t: poison * s.sum(-1))
    with pytest.raises(critic.UserError, match="lr"):
        sd.train_step(model, tokenizer, optimizer, problems[:3], SCRIBE, make_config())
    assert all(torch.equal(a, b) for a, b in zip(before, adapters, strict=True))
