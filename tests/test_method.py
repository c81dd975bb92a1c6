"""The method: prompts, log-probs, advantages, losses and the training step, each against an independent computation."""

import dataclasses
import itertools
import math
import random
from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedTokenizerFast

import sd
from critic import Critique, join_steps, scribe

PROBLEM = sd.Problem("3*7+8*4+6*6", "<step_1>×66→6</step_1><answer>9</answer>", "9")
CRITIQUE = "<step_1>3*7=1</step_1><answer>9</answer>"


# ------------------------------------------------------------------------ problems and grading
def test_train_validation_and_test_problems_are_disjoint_and_always_the_same():
    sets = sd.embedded_problems()
    texts = [p.problem for problems in sets for p in problems]
    assert [len(problems) for problems in sets] == [282, 50, 100]
    assert len(set(texts)) == len(texts) and sets == sd.embedded_problems()
    assert all(sd.is_correct(p.solution, p.answer) for p in sets[0])


@pytest.mark.parametrize(
    "completion, right",
    [
        ("<answer>9</answer>", True),
        ("<answer> 9\n</answer>", True),
        ("<answer>3</answer><answer>9</answer>", True),  # the last one counts
        ("<answer>9</answer><answer>3</answer>", False),
        ("<answer>9", False),
        ("9", False),
        ("<answer>__import__('os')</answer>", False),
        ("", False),
    ],
)
def test_is_correct(completion, right):
    assert sd.is_correct(completion, "9") is right


# ------------------------------------------------------------------------ prompts and contexts
HEAD = f"<|user|>{sd.SOLVE}\n\n3*7+8*4+6*6"
HELPED = f"{HEAD}\n\n{sd.HELP}\n\n"
RENDERED = {
    "grpo": None,
    "reference": f"{HELPED}{PROBLEM.solution}<|assistant|>",
    "critique": f"{HELPED}{CRITIQUE}<|assistant|>",
    "answer": f"{HELPED}<answer>9</answer><|assistant|>",
    "quote": f"{HELPED}<step_1>3*7=2</step_1> Step 1 is wrong. Correct: <step_1>3*7=1</step_1><|assistant|>",
    "omit": f"{HELPED}Step 1 is wrong. Correct: <step_1>3*7=1</step_1><|assistant|>",
    "shuffled": f"{HELPED}{CRITIQUE}<|assistant|>",
    "empty": f"{HEAD}<|assistant|>",
}


class Recorder:
    """A tokenizer that keeps the text it is to encode."""

    def __init__(self, tokenizer):
        self.tokenizer, self.texts = tokenizer, []

    def apply_chat_template(self, chats, **how):
        self.texts += self.tokenizer.apply_chat_template(chats, **(how | {"tokenize": False}))
        return self.tokenizer.apply_chat_template(chats, **how)


@pytest.mark.parametrize("name", sd.CONTEXTS)
def test_the_rendered_prompt_of_every_context_literally(name, tiny):
    recorder = Recorder(tiny[1])
    context = sd.CONTEXTS[name](PROBLEM, "<step_1>3*7=2</step_1>", CRITIQUE)
    if RENDERED[name] is None:
        assert context is None
    else:
        sd.build_prompts(recorder, [PROBLEM.problem], [context])
        assert recorder.texts == [RENDERED[name]]


@pytest.mark.parametrize(
    "attempt, quoted, omitted",
    [
        ("12", "{} Every step is correct.", "Step 1 is correct. Step 2 is correct. Every step is correct."),
        ("1x", "{} Step 2 is wrong. Correct: <step_2>2</step_2>", "Step 1 is correct. Step 2 is wrong. Correct: <step_2>2</step_2>"),
        ("x", "{} Step 1 is wrong. Correct: <step_1>1</step_1>", "Step 1 is wrong. Correct: <step_1>1</step_1>"),
        ("", "{} Every step is correct.", "Every step is correct."),
    ],
)
def test_quote_and_omit(attempt, quoted, omitted):
    attempt, critique = (join_steps(list(steps), "").split("<answer>")[0] for steps in (attempt, "12"))
    assert sd.CONTEXTS["quote"](PROBLEM, attempt, critique) == quoted.format(attempt)
    assert sd.CONTEXTS["omit"](PROBLEM, attempt, critique) == omitted


def test_without_a_context_student_and_teacher_prompts_agree(tiny):
    student, teacher = sd.build_prompts(tiny[1], [PROBLEM.problem] * 2, [None, ""])
    assert student == teacher


def test_the_embedded_tokenizer_knows_every_text_of_its_world(tiny):
    _, tokenizer = tiny
    for problem in sd.embedded_problems()[0]:
        [prompt] = sd.build_prompts(tokenizer, [problem.problem], [problem.solution])
        assert tokenizer.unk_token_id not in prompt
        assert tokenizer.decode(tokenizer.encode(problem.solution)) == problem.solution


def rollouts_of(tiny, config, n=4, **settings):
    """n rollouts of different prompts, with contexts of the condition."""
    model, tokenizer = tiny
    cfg = config(**settings)
    torch.manual_seed(1)
    rollouts = sd.sample_rollouts(model, tokenizer, sd.embedded_problems()[0][:n], cfg.group_size, cfg)
    sd.give_contexts(rollouts, scribe, model, tokenizer, cfg)
    return rollouts, cfg


def test_shuffled_gives_each_rollout_the_critique_of_another_problem(tiny, config):
    own, _ = rollouts_of(tiny, config, condition="critique")
    shuffled, _ = rollouts_of(tiny, config, condition="shuffled")
    assert [r.context for r in shuffled] == [own[n].context for n in (2, 3, 0, 1)]


@pytest.mark.parametrize("condition", ["reference", "answer", "empty", "grpo"])
def test_the_critic_is_not_asked_where_nothing_needs_it(condition, tiny, config):
    rollouts, cfg = rollouts_of(tiny, config, condition="grpo", group_size=2)
    sd.give_contexts(rollouts, lambda *_: pytest.fail("asked"), *tiny, config(condition=condition))


def test_a_context_that_does_not_fit_the_models_positions_is_masked_and_never_cut(tiny, config):
    rollouts, cfg = rollouts_of(tiny, config, condition="reference")
    needed = max(len(r.teacher_prompt) + len(r.completion) for r in rollouts)
    for limit, masked in (needed, False), (needed - 1, True):
        tiny[0].config.max_position_embeddings = limit
        for rollout in rollouts:
            rollout.context = rollout.teacher_prompt = None
        sd.give_contexts(rollouts, scribe, *tiny, cfg)
        assert any(r.teacher_prompt is None for r in rollouts) is masked
        assert all((r.context is None) == (r.teacher_prompt is None) for r in rollouts)


# ------------------------------------------------------------------------ sampling and log-probs
def test_the_end_token_belongs_to_the_completion_also_where_it_is_the_padding(tiny, config, monkeypatch):
    """Masks made from `!= pad` lose the end token, and with it the lesson to stop, in every model with pad = eos."""
    model, tokenizer = tiny
    end = tokenizer.eos_token_id
    model.generation_config = GenerationConfig(eos_token_id=[end], pad_token_id=end)
    rows = torch.tensor([[0, 8, 9, end, end, end], [8, 8, 9, 9, 9, 9], [8, 8, end, end, end, end]])
    monkeypatch.setattr(model, "generate", lambda *_, **__: rows)
    completions = sd.sample(model, [[8], [8, 8], [8, 8]], config())
    assert completions == [[9, end], [9, 9, 9, 9], [end]]


def test_sampling_follows_the_distribution_that_is_scored(tiny, config):
    """20,000 first tokens at temperature 1.3: within 5 standard errors of the scored probabilities."""
    model, tokenizer = tiny
    cfg = config(temperature=1.3, max_new_tokens=1, gen_batch=20_000)
    [prompt] = sd.build_prompts(tokenizer, [PROBLEM.problem], [None])
    torch.manual_seed(0)
    drawn = torch.tensor(sd.sample(model, [prompt] * 20_000, cfg))[:, 0]
    with torch.no_grad():
        p = sd.log_probs(model, sd.completion_states(model, [prompt], [[5]]), 1.3).exp()[0]
    seen = torch.bincount(drawn, minlength=len(p)) / 20_000
    assert ((seen - p).abs() <= 5 * (p * (1 - p) / 20_000).sqrt() + 1e-4).all()


def plain_log_probs(model, prompt, completion, temperature):
    """One token after another, without batch, padding or mask."""
    rows = []
    for t in range(len(completion)):
        logits = model(torch.tensor([prompt + completion[:t]])).logits[0, -1]
        rows.append(F.log_softmax(logits / temperature, dim=-1))
    return torch.stack(rows)


@torch.no_grad()
def test_log_probs_against_a_plain_loop_batched_and_one_by_one(tiny, config):
    model, tokenizer = tiny
    rollouts, _ = rollouts_of(tiny, config, condition="critique")
    # Prompts and completions of many lengths in one batch: with and without context, cut short.
    prompts = [r.prompt for r in rollouts] + [r.teacher_prompt for r in rollouts]
    completions = [r.completion[: 1 + n] for n, r in enumerate(rollouts * 2)]
    batched = sd.log_probs(model, sd.completion_states(model, prompts, completions), 0.7)
    one_by_one = torch.cat(
        [sd.log_probs(model, sd.completion_states(model, [p], [c]), 0.7) for p, c in zip(prompts, completions)]
    )
    plain = torch.cat([plain_log_probs(model, p, c, 0.7) for p, c in zip(prompts, completions)])
    torch.testing.assert_close(batched, plain, atol=2e-5, rtol=1e-4)
    torch.testing.assert_close(one_by_one, plain, atol=2e-5, rtol=1e-4)


# ------------------------------------------------------------------------ advantages and losses
def random_log_probs(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return F.log_softmax(2 * torch.randn(*shape, generator=generator, dtype=torch.float64), dim=-1)


def test_divergences_worked_by_hand():
    student = torch.tensor([[0.5, 0.5]], dtype=torch.float64).log()
    teacher = torch.tensor([[0.25, 0.75]], dtype=torch.float64).log()
    assert sd.forward_kl(student, teacher).item() == pytest.approx(0.25 * math.log(0.5) + 0.75 * math.log(1.5))
    assert sd.reverse_kl(student, teacher).item() == pytest.approx(0.5 * math.log(2) + 0.5 * math.log(2 / 3))
    by_hand = 0.25 * math.log(0.25 / 0.375) + 0.75 * math.log(0.75 / 0.625)  # KL(teacher || mixture)
    by_hand += 0.5 * math.log(0.5 / 0.375) + 0.5 * math.log(0.5 / 0.625)  # KL(student || mixture)
    assert sd.jsd(student, teacher).item() == pytest.approx(by_hand / 2)


def test_divergences_against_an_explicit_sum_and_against_torch():
    student, teacher = random_log_probs(7, 11), random_log_probs(7, 11, seed=1)
    for n in range(7):
        p, q = teacher[n].exp().tolist(), student[n].exp().tolist()
        kl = lambda a, b: sum(x * math.log(x / y) for x, y in zip(a, b))  # noqa: E731
        mixture = [(x + y) / 2 for x, y in zip(p, q)]
        assert sd.forward_kl(student, teacher)[n].item() == pytest.approx(kl(p, q))
        assert sd.reverse_kl(student, teacher)[n].item() == pytest.approx(kl(q, p))
        assert sd.jsd(student, teacher)[n].item() == pytest.approx((kl(p, mixture) + kl(q, mixture)) / 2)
    torch.testing.assert_close(sd.forward_kl(student, teacher), F.kl_div(student, teacher, reduction="none", log_target=True).sum(-1))
    for divergence in sd.DIVERGENCES.values():
        torch.testing.assert_close(divergence(student, student), torch.zeros(7, dtype=torch.float64))
    assert (sd.jsd(student, teacher) <= math.log(2)).all()


def test_the_forward_kl_gradient_is_student_minus_teacher():
    logits = torch.randn(5, 9, dtype=torch.float64, requires_grad=True)
    teacher = random_log_probs(5, 9)
    sd.forward_kl(F.log_softmax(logits, -1), teacher).sum().backward()
    torch.testing.assert_close(logits.grad, F.softmax(logits, -1).detach() - teacher.exp())


def test_the_advantage_is_the_coefficient_of_the_reverse_kls_policy_gradient():
    """E_{y ~ student}[−A(y) ∇ log student(y)], summed over every y, is the gradient of KL(student ‖ teacher)."""
    logits = torch.randn(1, 9, dtype=torch.float64, requires_grad=True)
    teacher = random_log_probs(1, 9)
    sd.reverse_kl(F.log_softmax(logits, -1), teacher).sum().backward()
    kl_gradient, logits.grad = logits.grad, None
    student = F.log_softmax(logits, -1).expand(9, 9)
    every_token = torch.arange(9)
    advantages = sd.token_advantages(student, teacher.expand(9, 9), every_token)
    (student[0].exp().detach() * sd.policy_gradient_loss(student, every_token, advantages)).sum().backward()
    torch.testing.assert_close(logits.grad, kl_gradient)


def test_token_advantages_are_the_difference_of_two_log_probs():
    student, teacher, tokens = random_log_probs(6, 5), random_log_probs(6, 5, seed=1), torch.tensor([0, 4, 2, 2, 1, 3])
    expected = [teacher[n, y].item() - student[n, y].item() for n, y in enumerate(tokens)]
    assert sd.token_advantages(student, teacher, tokens).tolist() == pytest.approx(expected)
    assert not sd.token_advantages(student.requires_grad_(), teacher, tokens).requires_grad


def test_group_advantages_by_hand():
    rewards = torch.tensor([[1.0, 0, 0, 0], [1, 1, 0, 0], [0, 0, 0, 0], [1, 1, 1, 1]])
    by_hand = [[math.sqrt(3)] + [-1 / math.sqrt(3)] * 3, [1, 1, -1, -1], [0] * 4, [0] * 4]
    torch.testing.assert_close(sd.group_advantages(rewards), torch.tensor(by_hand))


def test_same_weights_and_no_context_is_an_advantage_of_exactly_zero(tiny, config):
    rollouts, cfg = rollouts_of(tiny, config, condition="empty")
    sd.add_adapters(tiny[0], 4, 8.0)
    _, losses, advantages, _ = sd.token_losses(tiny[0], rollouts, cfg)
    assert (advantages == 0).all() and (losses == 0).all()
    assert len(losses) == sum(len(r.completion) for r in rollouts)


# ------------------------------------------------------------------------ adapters
def shake(model, seed=3):
    """Gives the adapters random values, so that student and teacher differ."""
    torch.manual_seed(seed)
    for name, parameter in model.named_parameters():
        if name.endswith(".B"):
            torch.nn.init.normal_(parameter, std=0.1)


def test_an_adapter_adds_scale_b_a_x_and_switches_off():
    linear, x = torch.nn.Linear(3, 2), torch.randn(5, 3)
    layer = sd.LoRALinear(linear, rank=2, alpha=6.0)
    torch.testing.assert_close(layer(x), linear(x))
    torch.nn.init.normal_(layer.B)
    torch.testing.assert_close(layer(x), linear(x) + 3 * (x @ layer.A.T @ layer.B.T))
    layer.enabled = False
    assert torch.equal(layer(x), linear(x))


def test_every_attention_and_mlp_projection_gets_an_adapter_and_nothing_else_trains(tiny):
    model = tiny[0]
    adapters = sd.add_adapters(model, 4, 8.0)
    names = {n.rsplit(".", 1)[-1] for n, m in model.named_modules() if isinstance(m, sd.LoRALinear)}
    assert names == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    assert len(adapters) == 2 * 7 * 2 and {id(p) for p in adapters} == {id(p) for p in model.parameters() if p.requires_grad}


@torch.no_grad()
def test_the_merged_model_is_the_trained_model_loaded_by_plain_transformers(tiny, tmp_path):
    model, tokenizer = tiny
    ids = torch.tensor(sd.build_prompts(tokenizer, ["1*2+3*4+5*6", "7*8+9*0+1*1"], [None, None]))
    before = model(ids).logits
    sd.add_adapters(model, 4, 8.0)
    shake(model)
    model.save_pretrained(tmp_path, state_dict=sd.merged_state_dict(model))
    plain = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    trained = model(ids).logits
    assert (trained - before).abs().max() > 0.1
    torch.testing.assert_close(plain(ids).logits, trained, atol=1e-5, rtol=1e-4)
    greedy = dict(max_new_tokens=20, do_sample=False, attention_mask=torch.ones_like(ids))
    assert torch.equal(plain.generate(ids, **greedy), model.generate(ids, **greedy))
    with sd.adapters_off(model):
        assert torch.equal(model(ids).logits, before)


# ------------------------------------------------------------------------ the training step
def gradient_of_a_step(folder, config, ask=scribe, problems=None, **settings):
    """The adapters' gradient, read off a step of plain gradient descent; also the rollouts and metrics."""
    model, tokenizer = sd.load(str(folder), "cpu")
    cfg = config(max_grad_norm=1e9, **settings)
    torch.manual_seed(0)
    adapters = sd.add_adapters(model, 4, 8.0)
    shake(model)
    before = [p.detach().clone() for p in adapters]
    torch.manual_seed(5)
    problems = sd.embedded_problems()[0][:3] if problems is None else problems
    optimizer = torch.optim.SGD(adapters, lr=1.0)
    rollouts, metrics = sd.train_step(model, tokenizer, optimizer, problems, ask, cfg)
    return torch.cat([(b - p.detach()).flatten() for b, p in zip(before, adapters)]), rollouts, metrics, (model, adapters, cfg)


def set_rewards(monkeypatch):
    """A random model never solves a problem: reward by length, so that grpo has something to compare."""
    monkeypatch.setattr(sd, "is_correct", lambda text, answer: len(text) % 2 == 0)


@pytest.mark.parametrize("condition", ["grpo", "critique"])
@pytest.mark.parametrize("cut", [{"micro_batch": 1}, {"micro_batch": 2}, {"chunk": 1}, {"chunk": 7}])
def test_the_gradient_does_not_depend_on_micro_batches_or_chunks(condition, cut, tiny_folder, config, monkeypatch):
    set_rewards(monkeypatch)
    whole, _, metrics, _ = gradient_of_a_step(tiny_folder, config, condition=condition)
    parts, _, cut_metrics, _ = gradient_of_a_step(tiny_folder, config, condition=condition, **cut)
    assert whole.abs().max() > 1e-3
    torch.testing.assert_close(parts, whole, atol=1e-6, rtol=1e-4)
    assert cut_metrics["loss"] == pytest.approx(metrics["loss"], abs=1e-6)


@pytest.mark.parametrize("divergence", sd.DIVERGENCES)
def test_a_steps_gradient_against_plain_autograd(divergence, tiny_folder, config):
    """The step's loss written out: a plain loop over tokens, torch's own divergences, no batch, no chunks."""
    stepped, rollouts, metrics, (model, adapters, cfg) = gradient_of_a_step(
        tiny_folder, config, condition="critique", divergence=divergence, temperature=1.5
    )
    model, _ = sd.load(str(tiny_folder), "cpu")
    torch.manual_seed(0)
    adapters = sd.add_adapters(model, 4, 8.0)
    shake(model)
    total, count, advantages = 0.0, 0, []
    for r in rollouts:
        student = plain_log_probs(model, r.prompt, r.completion, 1.5)
        with torch.no_grad(), sd.adapters_off(model):
            teacher = plain_log_probs(model, r.teacher_prompt, r.completion, 1.5)
        kl = lambda p, q: F.kl_div(q, p, reduction="sum", log_target=True)  # noqa: E731  KL(p ‖ q)
        mixture = ((student.exp() + teacher.exp()) / 2).log()
        total += {
            "forward_kl": lambda: kl(teacher, student),
            "reverse_kl": lambda: kl(student, teacher),
            "jsd": lambda: (kl(teacher, mixture) + kl(student, mixture)) / 2,
        }[divergence]()
        count += len(r.completion)
        advantages += [(teacher[t, y] - student[t, y]).item() for t, y in enumerate(r.completion)]
    (total / count).backward()
    plain = torch.cat([p.grad.flatten() for p in adapters])
    torch.testing.assert_close(stepped, plain, atol=1e-5, rtol=1e-3)
    assert metrics["loss"] == pytest.approx((total / count).item(), rel=1e-4)
    assert metrics["advantage"] == pytest.approx(sum(advantages) / count, abs=1e-4)
    assert metrics["abs_advantage"] == pytest.approx(sum(map(abs, advantages)) / count, abs=1e-4)


def test_grpos_gradient_against_plain_autograd(tiny_folder, config, monkeypatch):
    set_rewards(monkeypatch)
    stepped, rollouts, metrics, _ = gradient_of_a_step(tiny_folder, config, condition="grpo", group_size=4)
    model, _ = sd.load(str(tiny_folder), "cpu")
    torch.manual_seed(0)
    adapters = sd.add_adapters(model, 4, 8.0)
    shake(model)
    total, count = 0.0, 0
    for group in itertools.batched(rollouts, 4) if hasattr(itertools, "batched") else zip(*[iter(rollouts)] * 4):
        mean = sum(r.reward for r in group) / 4
        std = math.sqrt(sum((r.reward - mean) ** 2 for r in group) / 4)
        for r in group:
            log_probs = plain_log_probs(model, r.prompt, r.completion, 1.0)
            for t, y in enumerate(r.completion):
                total = total - (0 if std == 0 else (r.reward - mean) / std) * log_probs[t, y]
                count += 1
    (total / count).backward()
    torch.testing.assert_close(stepped, torch.cat([p.grad.flatten() for p in adapters]), atol=1e-5, rtol=1e-3)
    assert {len(set(r.advantages)) for r in rollouts} == {1}  # the same at every token of a rollout


@pytest.mark.parametrize("condition", ["grpo", "reference"])
def test_an_empty_completion_and_one_that_was_cut_off_are_scored_as_they_are(condition, tiny, config, monkeypatch):
    """The first is its end token alone, the second has none: nothing is added, and both are trained on."""
    model, tokenizer = tiny
    adapters = sd.add_adapters(model, 4, 8.0)
    cut_off = tokenizer("<step_1>3*7", add_special_tokens=False)["input_ids"]
    completions = [[tokenizer.eos_token_id], cut_off]
    monkeypatch.setattr(sd, "sample", lambda *_: completions)
    monkeypatch.setattr(sd, "is_correct", lambda text, answer: text == "")  # so that grpo has something to compare
    cfg = config(condition=condition, group_size=2)
    rollouts, metrics = sd.train_step(model, tokenizer, torch.optim.AdamW(adapters), [PROBLEM], None, cfg)
    assert [r.text for r in rollouts] == ["", "<step_1>3*7"] and metrics["length"] == (1 + len(cut_off)) / 2
    assert [len(r.advantages) for r in rollouts] == [1, len(cut_off)]
    assert metrics["masked"] == metrics["format"] == 0 and metrics["grad_norm"] > 0


def test_equal_rewards_move_nothing_in_grpo(tiny_folder, config):
    gradient, rollouts, metrics, _ = gradient_of_a_step(tiny_folder, config, condition="grpo")
    assert metrics["reward"] == 0 and metrics["loss"] == 0 and not gradient.any()


def test_a_rollout_whose_critic_failed_is_masked_and_is_not_in_the_divisor(tiny_folder, config):
    def half_deaf(problems, attempts, prompts):
        return [Critique(None, failure="timed out")] + scribe(problems[1:], attempts[1:], prompts[1:])

    gradient, rollouts, metrics, _ = gradient_of_a_step(tiny_folder, config, half_deaf, condition="critique")
    assert metrics["masked"] == pytest.approx(1 / 3) and rollouts[0].advantages == []
    model, _ = sd.load(str(tiny_folder), "cpu")
    torch.manual_seed(0)
    adapters = sd.add_adapters(model, 4, 8.0)
    shake(model)
    states, losses, _, gradient_of_sum = sd.token_losses(model, rollouts[1:], config(condition="critique"))
    states.backward(gradient_of_sum / len(losses))
    torch.testing.assert_close(gradient, torch.cat([p.grad.flatten() for p in adapters]), atol=1e-6, rtol=1e-4)


def test_a_step_without_any_teacher_changes_no_weight(tiny_folder, config):
    def deaf(problems, attempts, prompts):
        return [Critique(None, failure="refused")] * len(problems)

    gradient, _, metrics, _ = gradient_of_a_step(tiny_folder, config, deaf, condition="critique")
    assert metrics["masked"] == 1 and not gradient.any()


@pytest.mark.parametrize("condition", [name for name in sd.CONTEXTS if name != "empty"])
def test_every_condition_moves_the_adapters_only_and_the_teacher_stays_bit_identical(condition, tiny, config, monkeypatch):
    set_rewards(monkeypatch)
    model, tokenizer = tiny
    ids = torch.tensor(sd.build_prompts(tokenizer, [PROBLEM.problem], [PROBLEM.solution]))
    teacher = model(ids).logits
    weights = {n: p.clone() for n, p in model.state_dict().items()}
    adapters = sd.add_adapters(model, 4, 8.0)
    before = [p.detach().clone() for p in adapters]
    optimizer = torch.optim.AdamW(adapters, lr=1e-2)
    torch.manual_seed(0)
    sd.train_step(model, tokenizer, optimizer, sd.embedded_problems()[0][:3], scribe, config(condition=condition))
    assert any(not torch.equal(a, b) for a, b in zip(before, adapters))
    after = {n.replace(".linear.", "."): p for n, p in model.state_dict().items()}
    assert all(torch.equal(weights[n], after[n]) for n in weights)
    with sd.adapters_off(model):
        assert torch.equal(model(ids).logits, teacher)
    assert not torch.equal(model(ids).logits, teacher)


@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl"])
def test_an_empty_context_does_not_move_the_model(divergence, tiny, config):
    """Once it did: the gradient's rounding error of 1e-8 is a full step to AdamW, which divides it by its own size."""
    model, tokenizer = tiny
    adapters = sd.add_adapters(model, 4, 8.0)
    before = [p.detach().clone() for p in adapters]
    optimizer = torch.optim.AdamW(adapters, lr=1e-2, weight_decay=0.0)
    cfg = config(condition="empty", divergence=divergence)
    for step in range(3):
        torch.manual_seed(step)
        _, metrics = sd.train_step(model, tokenizer, optimizer, sd.embedded_problems()[0][:3], scribe, cfg)
        assert metrics["loss"] == metrics["abs_advantage"] == metrics["grad_norm"] == 0
    assert all(torch.equal(a, b) for a, b in zip(before, adapters))


@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_stops_the_step_with_nothing_changed(poison, tiny, config, monkeypatch):
    model, tokenizer = tiny
    adapters = sd.add_adapters(model, 4, 8.0)
    before = [p.detach().clone() for p in adapters]
    monkeypatch.setitem(sd.DIVERGENCES, "forward_kl", lambda student, teacher: poison * student.sum(-1))
    with pytest.raises(sd.Stop, match="lr"):
        sd.train_step(model, tokenizer, torch.optim.AdamW(adapters), sd.embedded_problems()[0][:3], scribe, config())
    assert all(torch.equal(a, b) and b.grad is None for a, b in zip(before, adapters))


def test_metrics_of_a_step(tiny_folder, config):
    _, rollouts, metrics, _ = gradient_of_a_step(tiny_folder, config, condition="critique")
    assert metrics["length"] == sum(len(r.completion) for r in rollouts) / 3
    assert metrics["solver_tokens"] == sum(len(r.prompt) + len(r.completion) for r in rollouts)
    assert metrics["teacher_tokens"] == sum(len(r.teacher_prompt) + len(r.completion) for r in rollouts)
    assert metrics["critic_tokens"] > metrics["solver_tokens"] / 3 and metrics["grad_norm"] > 0 == metrics["masked"]


# ------------------------------------------------------------------------ evaluation
def group(*answers, right="9"):
    """Rollouts of one problem that answer so; None writes no answer."""
    texts = ["..." if a is None else f"<answer>{a}</answer>" for a in answers]
    return [sd.Rollout(PROBLEM, [], [0] * 4, text, float(a == right), 0.0) for a, text in zip(answers, texts)]


@pytest.mark.parametrize(
    "answers, avg, passed, maj",
    [
        ("9999", 100, 100, 100),
        ("1239", 25, 100, 25),  # four tie: a fair share each, whichever was seen first
        ("9123", 25, 100, 25),
        ("9911", 50, 100, 50),
        ("9119", 50, 100, 50),
        ("9111", 25, 100, 0),
        ("1111", 0, 0, 0),
        ([None, None, None, "9"], 25, 100, 100),  # no answer is no vote
        ([None] * 4, 0, 0, 0),
    ],
)
def test_summarise_by_hand(answers, avg, passed, maj):
    assert sd.summarise([group(*answers)]) == {"avg": avg, "pass": passed, "maj": maj, "length": 4}


def test_summarise_is_the_mean_over_problems():
    assert sd.summarise([group(*"9999"), group(*"1111")])["avg"] == 50


def test_advantages_are_sorted_into_the_steps_they_belong_to(tiny):
    _, tokenizer = tiny
    text = "<step_1>3*7=1</step_1><step_2>8*4=3</step_2><answer>4</answer>"
    ids = tokenizer.encode(text) + [tokenizer.eos_token_id]
    rollout = sd.Rollout(PROBLEM, [], ids, text, 0.0, 0.0, advantages=[float(n) for n in range(len(ids))])
    steps = sd.advantage_by_step(tokenizer, rollout)
    assert [(step.name, [a for _, a in tokens]) for step, tokens in steps] == [
        ("step_1", [0, 1, 2, 3, 4, 5, 6]),
        ("step_2", [7, 8, 9, 10, 11, 12, 13]),
        ("answer", [14, 15, 16]),
    ]
    assert "".join(t for _, tokens in steps for t, _ in tokens) == text


def test_a_tokens_text_is_what_it_adds_also_where_a_character_takes_several():
    """Decoding every prefix takes quadratic time, and every token alone tears characters apart."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE({byte: n for n, byte in enumerate(alphabet)}, []))
    core.pre_tokenizer, core.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core)
    text = "a × é🙂b"
    texts = sd.token_texts(tokenizer, tokenizer.encode(text))
    assert texts == ["a", " ", "", "×", " ", "", "é", "", "", "", "🙂", "b"]
    assert "".join(sd.token_texts(tokenizer, tokenizer.encode(text)[:-3])) == "a × é\ufffd"  # cut within the last


# ------------------------------------------------------------------------ the embedded base's lessons
def test_pretraining_samples_can_only_be_solved_by_reading_the_context():
    rng, known = random.Random(0), [(3, 7), (8, 4)]
    samples = [sd.pretraining_sample(rng, known, 0.5, with_context=True) for _ in range(800)]
    samples = [s for s in samples if len(sd.parse_steps(s[1])) == 6 and s[1].endswith(">")]  # whole solutions
    made_up = [c for _, c, _, _ in samples if not all(sd.judge(c))]
    assert len(samples) > 500 and len(made_up) > 0.95 * len(samples)  # their products are not the true ones
    steps = {True: [], False: []}  # is the context a reference? -> [(the context's step, the response's)]
    for _, context, response, _ in samples:
        is_reference = context.count("→") == 5
        context, response = ([s.text for s in sd.parse_steps(text)][:-1] for text in (context, response))
        steps[is_reference] += zip(context, response)
    slipped = sum("→" in ours for _, ours in steps[True]) / len(steps[True])
    assert 0.45 < slipped < 0.55  # shown a reference, half of the steps go its way, as `drift` says
    assert all(("→" in ours) == ("→" in theirs) for theirs, ours in steps[False])  # else they are copied
    for problem, context, response, wrong in (sd.pretraining_sample(rng, known, 0.5, False) for _ in range(200)):
        assert context is None and set(sd.factors(problem)) <= set(known)
        assert sum(not right for right in sd.judge(response)) == (wrong is not None and not sd.judge(response)[wrong])


def test_pretraining_contexts_that_hold_less_than_a_solution_tell_what_the_base_does_not_know():
    """Steps that the context tells are the response's, but for its wrong step; of all other products the truth is."""
    rng, known, seen, made_up = random.Random(0), [(3, 7), (8, 4), (2, 5), (9, 9)], Counter(), []
    for _ in range(2000):
        problem, context, response, wrong = sd.pretraining_sample(rng, known, 0.5, with_context=True)
        assert wrong is None or wrong < 5
        told = {s.name: s.text for s in sd.parse_steps(context)}
        whole = len(told) == 6
        seen["whole" if context.endswith(">") and whole else "quote" if whole else context[:6]] += 1
        if whole and "wrong" in context:  # what the response writes where an error was quoted is left out of the loss
            at = next(n for n, text in enumerate(told.values()) if n == wrong)
            assert f"Step {at + 1} is wrong. Correct: <step_{at + 1}>" in context
            made_up += [not right for right in sd.judge(context)[at + 1 : 3]]
        if whole:
            continue
        assert set(sd.factors(problem)) <= set(known)
        first = {sd.read_step(text)[1:3] for name, text in told.items() if name != "answer"}
        for n, step in enumerate(sd.parse_steps(response)):
            if n != wrong and step.name != "answer" and not sd.judge(response)[n]:
                assert sd.read_step(step.text)[1:3] in first  # a value that is not the true one was told
            if (wrong is None or n < wrong) and step.name in told:
                assert step.text == told[step.name]
    assert sum(made_up) > 0.7 * len(made_up) > 0  # a quoted attempt tells its later products, too
    assert set(seen) == {"whole", "quote", "<step_", "Step 1", "<answe"}, seen


def test_a_wrong_value_is_left_out_of_the_pretraining_loss(tiny):
    """Without this the base would learn to make mistakes; without the mistakes it would not learn to go on from them."""
    model, tokenizer = tiny
    text = "<step_1>3*7=2</step_1><step_2>8*4=2</step_2><step_3>2+2=4</step_3><answer>4</answer>"
    loss = sd.pretraining_loss(model, tokenizer, [("3*7+8*4", None, text, 0)])
    [prompt] = sd.build_prompts(tokenizer, ["3*7+8*4"], [None])
    ids = tokenizer.encode(text) + [tokenizer.eos_token_id]
    log_probs = plain_log_probs(model, prompt, ids, 1.0)
    expected = [-log_probs[t, y] for t, y in enumerate(ids) if t != 5]
    assert tokenizer.convert_ids_to_tokens(ids[5]) == "2"
    torch.testing.assert_close(loss, torch.stack(expected).mean(), atol=1e-5, rtol=1e-4)


def test_settings_are_settled():
    cfg = sd.settled(sd.Config(condition="grpo", seed=2, device="cpu"))
    assert (cfg.group_size, cfg.lr, cfg.out) == (8, sd.LEARNING_RATES["grpo"], "runs/grpo-2")
    assert sd.settled(sd.Config(device="cpu")).out == "runs/critique"
    assert {f.name for f in dataclasses.fields(sd.Config) if not f.metadata["help"]} == set()
