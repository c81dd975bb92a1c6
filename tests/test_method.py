"""The method, up to train_step: each function against an independent computation."""

import copy
import math
import sys
from dataclasses import replace
from unittest.mock import Mock

import pytest
import torch
from conftest import TOY, byte_tokenizer, plain_log_probs
from torch.distributions import Categorical, kl_divergence
from transformers import GenerationConfig

import critic
import sd
from critic import Critique, Problem, UserError

PROBLEM = Problem("3*7+8*4", "<step_1>sum</step_1> <answer>53</answer>", "53")
WALK = "<step_1>a</step_1> <step_2>b</step_2> <answer>53</answer>"
WRONG = "<step_1>a</step_1> <step_2>x</step_2> <step_3>y</step_3> <answer>9</answer>"
SCRIBE = critic.rule_critic(TOY / "scribe.py")


# ------------------------------------------------------------------------ contexts
B, WRONG_2 = "<step_2>b</step_2>", "Step 2 is wrong. Correct: <step_2>b</step_2>"
QUOTED = [  # attempt, verdicts on the steps before the first difference, the correction
    (WRONG, "Step 1 is correct. ", WRONG_2),
    (WRONG.replace("</step_1>", " " * 30), "Step 1 is correct. ", WRONG_2),  # not closed
    (WALK, "Step 1 is correct. Step 2 is correct. Answer is correct. ", "Every step is correct."),
    ("It is 9", "", "Correct: <step_1>a</step_1>"),
    # right, but a step is missing; unfinished
    (WALK.replace(B, ""), "Step 1 is correct. ", f"Correct: {B}"),
    ("<step_1>a</step_1> <step_2>", "Step 1 is correct. ", f"Correct: {B}"),
]


@pytest.mark.parametrize("attempt, verdicts, correction", QUOTED)
def test_what_every_context_says(attempt, verdicts, correction):
    other = Problem("1*2", "<step_1>2</step_1> <answer>2</answer>", "2")
    rollout = sd.Rollout(PROBLEM, [], [], attempt, 0.0, critique=WALK, other_problem=other)
    said = {"reference": PROBLEM.solution, "critique": WALK, "answer": "<answer>53</answer>"}
    said |= {"shuffled": f"1*2\n\n{other.solution}", "empty": ""}
    said |= {"quote": f"{attempt} {correction}", "omit": verdicts + correction}
    assert {name: sd.CONTEXTS[name](rollout) for name in said} == said
    assert sd.CONTEXTS.keys() == said.keys() | {"grpo"}


def test_student_and_teacher_prompts_literally():
    tokenizer, rollout = byte_tokenizer(), sd.Rollout(PROBLEM, [], [], "", 0.0)
    [student] = sd.encode_chats(tokenizer, [sd.solver_message(PROBLEM)])
    head = f"<|im_start|>user\n{sd.SOLVE}\n\n3*7+8*4"
    tail = "<|im_end|>\n<|im_start|>assistant\n"
    still = "<think>\n\n</think>\n\n"  # in the student's prompt, and unless the teacher may think
    assert tokenizer.decode(student) == head + tail + still  # no <bos>: the template has none
    for thinking, end in (False, tail + still), (True, tail):
        sd.give_context(rollout, "reference", tokenizer, thinking)
        told = f"{head}\n\n{sd.HELP}\n\n{PROBLEM.solution}"
        assert tokenizer.decode(rollout.teacher_prompt) == told + end


def test_control_tokens_spelled_in_a_text_stay_text():
    """In a problem, an attempt or a critique: for the student, the teacher and the critic."""
    tokenizer, word = byte_tokenizer(), "<|im_start|>system<|im_end|>"
    rollout = sd.Rollout(Problem(f"p{word}", f"s{word}", "9"), [], [], f"{word}a", 0.0)
    ask = Mock(return_value=[Critique(word)])
    sd.ask_critic([rollout], ask)
    [asked] = ask.call_args.args[1]
    sd.give_context(rollout, "critique", tokenizer, False)
    messages = ["p", sd.solver_message(rollout.problem), asked]
    harmless, student, judge = sd.encode_chats(tokenizer, messages)
    for prompt, count in (student, 1), (rollout.teacher_prompt, 2), (judge, 3):
        assert tokenizer.decode(prompt).count(word) == count
        for control in tokenizer.all_special_ids:
            assert prompt.count(control) == harmless.count(control)
    told = "Problem: p{0} Reference solution: s{0} Right answer: 9 Student's attempt: {0}a"
    assert " ".join(asked.split()).endswith(told.format(word))


def sampled(tiny, problems, cfg):
    """A step's rollouts, with contexts."""
    torch.manual_seed(1)
    rollouts = sd.sample_rollouts(*tiny, problems, cfg.group_size, cfg)
    sd.ask_critic(rollouts, SCRIBE)
    for rollout in rollouts:
        sd.give_context(rollout, cfg.condition, tiny[1], False)
    return rollouts


def test_shuffled_is_another_problem_and_its_reference(tiny, problems, make_config):
    cfg = make_config(condition="shuffled", group_size=2)
    others = [r.other_problem for r in sampled(tiny, problems[:3], cfg)]
    assert others == [problems[n] for n in (1, 1, 2, 2, 0, 0)]
    assert sampled(tiny, problems[:1], cfg)[0].teacher_prompt is None  # masked, never its own


def test_a_context_that_does_not_fit_is_masked_and_never_cut(tiny, problems, make_config):
    cfg = make_config(condition="reference")
    free = sampled(tiny, problems[:4], cfg)
    lengths = [len(r.teacher_prompt) + len(r.completion) for r in free]
    for room in sorted(lengths)[1], max(lengths) - 1:
        tiny[1].model_max_length = room
        for before, r in zip(free, sampled(tiny, problems[:4], cfg), strict=True):
            fits = len(before.teacher_prompt) + len(before.completion) <= room
            assert r.teacher_prompt == (before.teacher_prompt if fits else None)
            assert r.context == (before.context if fits else None) and fits == (r.masked == "")


def test_a_context_of_another_type_is_refused(monkeypatch):
    monkeypatch.setitem(sd.CONTEXTS, "empty", lambda r: ["a"])
    with pytest.raises(UserError, match=r"context empty must return str or None, got \['a'\]"):
        sd.give_context(sd.Rollout(PROBLEM, [], [], "", 0.0), "empty", None, False)


def test_the_attempt_that_is_shown(tiny, capsys, monkeypatch):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    logged = {"advantages": [-2, 0.5, 3], "teacher_prompt": [1], "context": "Oh dear 9 Step"}
    rollout = sd.Rollout(PROBLEM, [], [], "abc", 0.0, **logged)
    sd.show(rollout, ["a", " b ", "c\x1b"], tiny[1])
    shown = capsys.readouterr().out
    assert "\x1b[97;48;5;166ma[-2.0]\x1b[0m b \x1b[97;48;5;25mc [+3.0]\x1b[0m\n" in shown
    assert ": Oh dear\n" in shown
    sd.show(replace(rollout, context=""), ["a"], tiny[1])
    assert "A_t" not in capsys.readouterr().out  # in grpo there is none


# ------------------------------------------------------------------------ sampling, scoring
def test_sampling_follows_the_distribution_that_is_scored(tmp_path, tiny):
    """20,000 tokens at temperature 1.3, whatever the model's own generation config says."""
    model, tokenizer = tiny
    own = {"do_sample": True, "top_k": 2, "top_p": 0.5, "repetition_penalty": 9.0, "min_p": 0.5}
    model.generation_config = GenerationConfig(**own, temperature=0.1, eos_token_id=[1, 5])
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    model, tokenizer = sd.load_model(str(tmp_path), "cpu", "float32")
    prompt = [9, 8, 7, 8]
    torch.manual_seed(0)
    drawn = sd.generate(model, tokenizer, [prompt] * 20_000, 20_000, 1, 1.3)
    with torch.no_grad():
        p = (model(torch.tensor([prompt])).logits[0, -1] / 1.3).softmax(-1)
    seen = torch.tensor(drawn).flatten().bincount(minlength=len(p)) / 20_000
    assert ((seen - p).abs() <= 5 * (p * (1 - p) / 20_000).sqrt() + 1e-4).all()
    assert (seen - p)[p.argsort()].cumsum(0).abs().max() < 2 / 20_000**0.5  # top-p cuts the tail
    states = torch.ones(1, 32, dtype=torch.bfloat16)
    scored = sd.log_probs(model.bfloat16(), states, 1.0)  # bf16 would lose 0.1 nats
    assert {p.dtype for p in [scored, *sd.add_adapters(model, 2, 4.0)]} == {torch.float32}
    dtypes = [sd.parse_args(["--device", device]).dtype for device in ("cuda:1", "cpu")]
    assert dtypes == ["bfloat16", "float32"]


# ------------------------------------------------------------------------ the training step
# An end token alone, a completion cut off, and ids that no text is encoded to.
COMPLETIONS = [[1], [20, 4, 4, 0, 2, 20], [21, 1], [22, 23]]


@pytest.fixture
def step(tiny_folder, make_config, problems, monkeypatch):
    """Takes a step of gradient descent: (gradient, rollouts, metrics, (model, adapters) before it).

    The first completion of four is right, for a random model solves nothing.
    """
    grade = critic.is_correct
    monkeypatch.setattr(sd, "is_correct", lambda text, a: not text or grade(text, a))

    def take(ask=SCRIBE, noise=0.1, **settings):
        cfg = make_config(**({"max_grad_norm": 1e5} | settings))

        def generate(model, tokenizer, prompts, *sampling):
            assert sampling == (cfg.gen_batch, cfg.max_new_tokens, cfg.temperature)
            return COMPLETIONS * (len(prompts) // 4)

        monkeypatch.setattr(sd, "generate", generate)
        model, tokenizer = sd.load_model(tiny_folder, cfg.device, cfg.dtype)
        torch.manual_seed(0)
        adapters = sd.add_adapters(model, 4, 8.0)
        for adapter in adapters:
            adapter.data += noise * torch.randn(adapter.shape)
        before = copy.deepcopy((model, adapters))
        optimizer = torch.optim.SGD(adapters, lr=1.0)
        rollouts, metrics = sd.train_step(model, tokenizer, optimizer, problems[:4], ask, cfg)
        metrics |= sd.summarise(rollouts)
        assert [r.completion for r in rollouts[-4:]] == COMPLETIONS
        moved = [(b - p).detach().flatten() for b, p in zip(before[1], adapters, strict=True)]
        return torch.cat(moved), rollouts, metrics, before

    return take


def textbook(name, student, teacher):
    """The divergence by torch.distributions, of logits or log-probs: [N, V], [N, V] -> [N]."""
    p, q = Categorical(logits=teacher), Categorical(logits=student)
    if name == "jsd":
        mixture = Categorical(probs=(p.probs + q.probs) / 2)
        return (kl_divergence(p, mixture) + kl_divergence(q, mixture)) / 2
    return kl_divergence(p, q) if name == "forward_kl" else kl_divergence(q, p)


def gradient_of(loss, adapters):
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(adapters))])


@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "jsd"])
def test_a_steps_gradient_against_plain_autograd(divergence, step):
    """The loss written out: token after token, torch's own divergences, no micro-batch, no chunks.

    One rollout has no critique: it is neither in the sum nor in the divisor.
    """

    def ask(rollouts, messages):
        return [Critique(None, "timed out"), *SCRIBE(rollouts[1:], messages[1:])]

    settings = {"divergence": divergence, "temperature": 1.5, "micro_batch": 2, "chunk": 3}
    moved, rollouts, metrics, (model, adapters) = step(ask, condition="critique", **settings)
    total, entropy, advantages = 0.0, 0.0, []
    for r in rollouts[1:]:
        student = plain_log_probs(model, r.prompt, r.completion, 1.5)
        with torch.no_grad(), sd.adapters_off():
            teacher = plain_log_probs(model, r.teacher_prompt, r.completion, 1.5)
        total += textbook(divergence, student, teacher).sum()
        entropy += Categorical(logits=student).entropy().sum().item()
        own = [(teacher[t, y] - student[t, y]).item() for t, y in enumerate(r.completion)]
        assert r.advantages == pytest.approx(own, abs=1e-4)
        advantages += own
    loss = total / len(advantages)
    torch.testing.assert_close(moved, gradient_of(loss, adapters), atol=1e-5, rtol=1e-3)
    expected = {"loss": loss.item(), "grad_norm": moved.norm().item(), "length": 11 / 4}
    expected |= {"reward": 1 / 4, "masked": 1 / 4, "critic_failed": 1 / 4, "formatted": 0}
    expected |= {"cut_off": 1 / 2, "aligned": 0, "step_changed": 1, "dropped": 0}  # no steps
    expected |= {"entropy": entropy / len(advantages), "group_advantage": 0}
    expected["token_advantage"] = sum(advantages) / len(advantages)
    assert metrics == pytest.approx(expected, rel=1e-3) and not rollouts[0].advantages


def test_equal_rewards_are_an_advantage_of_exactly_zero():
    for value in 0.1, 0.3, 0.7, 1.0:  # partial credit, whose mean is rounded
        assert not sd.group_advantages(torch.full((1, 7), value)).any()
    rewards = torch.tensor([[0.1, 0.3, 0.5, 0.7, 0.9, 0.9, 0.1]])
    z = (rewards.double() - rewards.double().mean()) / rewards.double().std(correction=0)
    assert torch.allclose(sd.group_advantages(rewards).double(), z, atol=1e-5)


def test_grpos_gradient_against_plain_autograd_clipped_to_its_norm(step):
    settings = {"group_size": 4, "temperature": 1.5, "micro_batch": 3, "chunk": 7}
    settings |= {"condition": "grpo", "max_grad_norm": 0.01}
    moved, rollouts, metrics, (model, adapters) = step(**settings)
    by_hand = [math.sqrt(3)] + [-1 / math.sqrt(3)] * 3  # rewards 1, 0, 0, 0
    total = 0.0
    for r, advantage in zip(rollouts, by_hand * 4, strict=True):
        student = plain_log_probs(model, r.prompt, r.completion, 1.5)
        total -= advantage * student[range(len(r.completion)), r.completion].sum()
        assert r.group_advantage == pytest.approx(advantage) and not r.advantages
    gradient = gradient_of(total / sum(len(r.completion) for r in rollouts), adapters)
    norm = gradient.norm().item()
    torch.testing.assert_close(moved, gradient * 0.01 / norm, atol=1e-6, rtol=1e-3)
    assert metrics["grad_norm"] == pytest.approx(norm, rel=1e-3) and metrics["masked"] == 0
    assert metrics["group_advantage"] == pytest.approx(math.sqrt(3) / 2)  # the mean of |A_i|


@pytest.mark.parametrize("condition", sd.CONTEXTS)
def test_the_critic_is_asked_only_where_the_context_needs_it(condition, step, monkeypatch):
    ask, give = Mock(side_effect=SCRIBE), Mock(wraps=sd.give_context)
    monkeypatch.setattr(sd, "give_context", give)
    step(ask, condition=condition, teacher_thinking=True)
    assert ask.called == (condition not in sd.NO_CRITIC)
    assert give.called == (condition != "grpo") and (not give.called or give.call_args.args[3])


@pytest.mark.parametrize("condition", ["critique", "quote", "grpo"])
def test_a_step_without_a_signal_changes_no_weight(condition, step, monkeypatch):
    """No context at all, or equal rewards in grpo."""
    monkeypatch.setattr(sd, "is_correct", lambda text, answer: True)
    deaf = Mock(return_value=[Critique(None, "timed out")] * 8)
    moved, _, metrics, _ = step(deaf, condition=condition, group_size=2)
    assert metrics["masked"] == (condition != "grpo") and not moved.any()
    assert metrics["loss"] == metrics["grad_norm"] == 0 and metrics["reward"] == 1


@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "jsd"])
def test_an_empty_context_is_an_advantage_of_zero_and_moves_nothing(divergence, step):
    """Exactly: AdamW divides a rounding error of 1e-8 by its own size, a full step."""
    settings = {"divergence": divergence, "temperature": 0.9, "group_size": 8}
    moved, rollouts, metrics, _ = step(None, noise=0, condition="empty", **settings)
    assert not moved.any() and metrics["loss"] == metrics["grad_norm"] == 0
    assert all(r.advantages == [0.0] * len(r.completion) for r in rollouts)


@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_changes_no_weight(poison, step, monkeypatch):
    monkeypatch.setitem(sd.DIVERGENCES, "forward_kl", lambda s, t: poison * s.sum(-1))
    monkeypatch.setattr(torch.optim.SGD, "step", None)
    with pytest.raises(critic.UserError, match="lr"):
        step(condition="critique")
