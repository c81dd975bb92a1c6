"""Self-distillation from feedback, in one file. Run it: python sd.py --condition critique

The student writes an attempt at a problem. The teacher is the same model before training, with a
*context* in its prompt that knows the answer. It scores every token of the attempt, and the student
is trained towards its distributions. Which context teaches best? A reference solution takes another
route, so the teacher finds even right tokens unlikely, and loss is spent on wording. A *critique*
is the attempt, corrected by a critic that knows the reference (a larger model; in our toy, a rule).
Given it, the teacher finds only the error unlikely. This is the thesis of *The Role of Feedback
Alignment in Self-Distillation* (Kara & Ersoy, arXiv 2606.11173). The toy is sums of products. Its
base, pretrained to write both routes and to use a solution in its prompt (tests/toy/README.md), is
right in 11% of its attempts at the test problems. Critiques take it to 93%, references to 87%, GRPO
(a binary reward, no teacher, 8 attempts a problem, where the others take 1) to 20%.

Below, an attempt at 9*5+6*3+3*3 (tags cut) before training: only the prompts differ. A token y_t is
followed by its advantage A_t = log teacher_t(y_t) − log student_t(y_t), in nats, if |A_t| >= 1.

    reference:  product of 3 and 3 is 9, product of 6 and 3 is 18, sum of 9 and 18 is 27, ...
    attempt     9[-1.6] * 5 = 45, 6[-1.7] * 3 = 18, sum[+2.1] of 45 and 18 is 63,
                3[-1.7] * 3 = 21[-8.3], 63[-1.5] + 21 = 84, 84

    critique:   9 * 5 = 45, 6 * 3 = 18, sum of 45 and 18 is 63, 3 * 3 = 9, 63 + 9 = 72, 72
    attempt     9 * 5 = 45, 6 * 3 = 18, sum[+2.3] of 45 and 18 is 63, 3 * 3 = 21[-10.5],
                63 + 21 = 84, 84

Both teachers find the error, 3 * 3 = 21, but with a reference the teacher wants steps to begin with
`product` or `sum`. (84 is not marked: it follows from 21. `sum` is: the student begins one step in
ten with it, and both contexts have it.) In 12 attempts at each test problem, values that are wrong
in their own step (21, not 84) are 4% of the tokens. They get 88% of |A_t| with critiques, 60% with
references. That this makes the gap of 6 points is the thesis, not shown here. On a 0.5B chat model
(base 18%, τ = 1) A_t is sharp too, but critiques reach 48 to 55%, GRPO 63 to 76%, references do not
help (README.md). `python eval.py --advantages tests/toy` prints this attempt and the shares.

    problem x; attempt y ~ π_θ(· | x), no gradient through sampling; context c: reference, critique
    student_t = π_θ(· | x, y_<t)   teacher_t = π_0(· | x, c, y_<t), fixed   π = softmax(logits / τ)
    loss         mean over tokens of KL(teacher_t ‖ student_t). One token's KL has the gradient
                 (student_t − teacher_t) / τ at the student's logits; τ is the temperature.
    grpo's loss  mean over tokens of −A_i log student_t(y_t), A_i = (r_i − mean r) / std r for the
                 rewards r_i of a group of attempts (0 if they agree); one A_i for each attempt

A_t is a diagnostic, not trained on. In the policy gradient of reverse KL, KL(student_t ‖
teacher_t), it would stand where A_i stands. Forward KL (the paper's, and ours) makes the student
cover all that the teacher might write; reverse KL makes it drop what the teacher would not. Means
are over all tokens of an update, as in DAPO; GRPO first averages each attempt. Left out: ratio
clipping (ratios are 1 with one update per batch), a KL penalty, a learning-rate schedule.

The lesson ends with `train`; loading, checkpoints and flags (`cfg`) follow. To read, on arXiv: GRPO
2402.03300; GKD (distillation on the student's own samples) 2306.13649; SDPO (a teacher that sees
feedback) 2601.20802; OPSD (a reference) 2601.18734; DAPO 2503.14476; LoRA 2106.09685.
Shapes: B sequences of P prompt and T completion tokens, L = max(P + T); G rollouts of a problem; N
completion tokens in a micro-batch, n in a chunk (logits held at once); H hidden size; V vocabulary.
"""

import gc
import hashlib
import inspect
import json
import math
import random
import subprocess
import sys
from argparse import SUPPRESS
from collections import Counter
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Literal

import torch
import torch.nn.functional as F
from filelock import FileLock
from safetensors import SafetensorError
from torch import nn
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, HfArgumentParser
from transformers.utils import logging

import critic
from critic import UserError, atomic_write, correction, first_difference, is_correct, parse_steps

# ================================================================================ prompts
SOLVE = """\
Solve the problem below. Write your whole reply as XML in this form, with a step for each
calculation:

<step_1>...</step_1>
<step_2>...</step_2>
<step_3>...</step_3>
<answer>...</answer>

The answer is a number or expression alone. Begin with <step_1> and write nothing outside
the tags."""
HELP = "The following may help. Do not mention it, and answer in the format asked for."
CRITICISE = """\
Below are a problem, its reference solution, its right answer, and a student's attempt. Rewrite the
attempt with its errors corrected. Keep the student's words and notation where they are right.
A. If everything is right, repeat the attempt word for word.
B. If the answer is right but a step is missing, repeat the attempt and insert the step.
C. If the attempt is unfinished, repeat its right steps, shortened if they are long, and finish it.
D. If a step is wrong, repeat the steps before it word for word, rewrite that step, and carry on
from the corrected value to the answer in the student's own way. Do not repeat the wrong step.

Write steps in tags, <step_1>...</step_1>, <step_2>...</step_2> and so on, and then the final answer
in <answer>...</answer>. Write nothing else: no comment, no verdict, no mention of the reference.

Problem: {statement}
Reference solution: {solution}
Right answer: {answer}
Student's attempt: {attempt}"""


def solver_message(problem, context=None):
    """The student's message; with a context, the teacher's. One template for both."""
    return "\n\n".join([SOLVE, problem.statement] + ([HELP, context] if context else []))


# ================================================================================ conditions
@dataclass
class Rollout:
    problem: critic.Problem  # .statement, .solution (the reference) and .answer, all strings
    prompt: list[int]  # P token ids
    completion: list[int]  # T token ids as sampled, with any end token; never re-tokenised
    text: str  # the completion, decoded, without end token
    reward: float  # r_i: 1 right, 0 wrong
    cut_off: bool = False  # max_new_tokens came before an end token
    other_problem: critic.Problem | None = None  # the next one of the batch, for `shuffled`
    group_advantage: float = 0.0  # A_i, used by grpo alone
    critique: str | None = None  # the corrected attempt; None: unusable or not asked
    feedback: critic.Critique = critic.Critique(None)  # share of steps kept etc., or why it failed
    context: str | None = None  # what the teacher sees besides the problem
    teacher_prompt: list[int] | None = None  # its token ids
    masked: str = ""  # why the whole rollout is left out of training; "": it is not
    advantages: list[float] = field(default_factory=list)  # A_t of each token; empty in grpo


def omit(rollout):
    """Without the attempt: "Step 1 is correct. Step 2 is wrong. Correct: 2: 4 * 5 = 20"."""
    attempt, critique = rollout.text, rollout.critique
    wrong = first_difference(attempt, critique)  # the first changed step, or None
    steps = parse_steps(attempt)
    verdicts = [f"{s.title} is correct." for s in steps if not wrong or s.end <= wrong.start]
    return " ".join([*verdicts, correction(attempt, critique)])  # may end "Every step is correct."


def shuffled(rollout):
    """Another problem and its reference. None if the batch has no other problem."""
    other = rollout.other_problem
    if other and other != rollout.problem:
        return f"{other.statement}\n\n{other.solution}"


# THE FORK POINT. What the teacher sees, as a function of the rollout: a string, "" for nothing, or
# None for "no teacher for this rollout". A new design is one entry here; its key is a --condition.
# If it needs no critique, add it to NO_CRITIC. The toy knows only the words in its README.md.
# Examples for the attempt  1: 2 * 3 = 6  2: 4 * 5 = 21  3: 6 + 21 = 27  answer: 27  (tags cut)
CONTEXTS = {
    "grpo": None,  # no teacher, for any rollout
    # 1: product of 4 and 5 is 20  2: product of 2 and 3 is 6  3: sum of 20 and 6 is 26  answer: 26
    "reference": lambda rollout: rollout.problem.solution,
    # 1: 2 * 3 = 6  2: 4 * 5 = 20  3: 6 + 20 = 26  answer: 26
    "critique": lambda rollout: rollout.critique,  # of a right attempt: the attempt itself
    # answer: 26  (from here ablations and controls)
    "answer": lambda rollout: f"<answer>{rollout.problem.answer}</answer>",
    # 1: 2 * 3 = 6  2: 4 * 5 = 21 ... answer: 27  Step 2 is wrong. Correct: 2: 4 * 5 = 20
    "quote": lambda rollout: f"{rollout.text} {correction(rollout.text, rollout.critique)}",
    "omit": omit,
    "shuffled": shuffled,
    "empty": lambda rollout: "",  # the student's prompt: A_t is 0, nothing to train on
}
NO_CRITIC = {"grpo", "reference", "answer", "shuffled", "empty"}  # contexts that need no critique


# ================================================================================ 1. rollouts
def group_advantages(rewards):
    """GRPO's A_i = (r_i − mean r) / std r: [problems, G] -> same shape; 0 where all r_i agree."""
    agree = (rewards == rewards[:, :1]).all(-1, keepdim=True)  # then 0 / 0, or nearly
    std = rewards.std(-1, unbiased=False, keepdim=True)  # population std: divides by G
    return torch.where(agree, 0.0, (rewards - rewards.mean(-1, keepdim=True)) / std)


def sample_rollouts(model, tokenizer, problems, group_size, cfg):
    """group_size graded rollouts of each problem, grouped by problem."""
    problems = [p for p in problems for _ in range(group_size)]
    others = problems[group_size:] + problems[:group_size]
    prompts = encode_chats(tokenizer, [solver_message(p) for p in problems])
    rows = generate(model, tokenizer, prompts, cfg.gen_batch, cfg.max_new_tokens, cfg.temperature)
    rollouts = []
    for problem, other, prompt, completion in zip(problems, others, prompts, rows, strict=True):
        text = completion_text(model, tokenizer, completion)
        reward = float(is_correct(text, problem.answer))  # by value: 0.5 is 1/2
        cut_off = completion[-1] not in model.generation_config.eos_token_id  # a list
        rollouts.append(Rollout(problem, prompt, completion, text, reward, cut_off, other))
    rewards = torch.tensor([r.reward for r in rollouts]).view(-1, group_size)  # [problems, G]
    for rollout, advantage in zip(rollouts, group_advantages(rewards).flatten(), strict=True):
        rollout.group_advantage = advantage.item()
    return rollouts


# ================================================================================ 2. contexts
def ask_critic(rollouts, ask):
    """Sets critiques. ask: the critic. A rule reads the rollouts, a model the messages."""
    messages = [CRITICISE.format(**vars(r.problem), attempt=r.text) for r in rollouts]
    for rollout, critique in zip(rollouts, ask(rollouts, messages), strict=True):
        rollout.critique, rollout.feedback = critique.text, critique


def give_context(rollout, condition, tokenizer, thinking):
    """Sets context and teacher_prompt, or `masked`. thinking: its template's thinking mode."""
    if rollout.critique is None and condition not in NO_CRITIC:
        rollout.masked = f"no critique: {rollout.feedback.failure}"
        return
    context = CONTEXTS[condition](rollout)
    if context is None:
        rollout.masked = "the context is None"
        return
    if not isinstance(context, str):
        raise UserError(f"context {condition} must return str or None, got {context!r}")
    prompt = encode_chats(tokenizer, [solver_message(rollout.problem, context)], thinking)[0]
    if len(prompt) + len(rollout.completion) > tokenizer.model_max_length:  # see load_model
        rollout.masked = f"longer than the model's {tokenizer.model_max_length} positions"
    else:
        rollout.context, rollout.teacher_prompt = context, prompt


# ================================================================================ 3. scoring
class LoRALinear(nn.Module):
    """W x + (α/rank) B A x: a frozen linear layer W and a low-rank update, A and B in fp32."""

    enabled = True  # one switch for all layers. Off: the teacher, without a second network

    def __init__(self, linear, rank, alpha):
        super().__init__()
        self.linear, self.scale = linear, alpha / rank
        self.weight, self.bias = linear.weight, linear.bias  # some models read them
        outputs, inputs = linear.weight.shape
        self.A = nn.Parameter(linear.weight.new_empty(rank, inputs, dtype=torch.float32))
        # B starts at zero: the student starts as the teacher
        self.B = nn.Parameter(linear.weight.new_zeros(outputs, rank, dtype=torch.float32))
        nn.init.kaiming_uniform_(self.A, a=math.sqrt(5))

    def forward(self, x):
        y = self.linear(x)
        if self.enabled:
            y = y + self.scale * F.linear(F.linear(x, self.A.to(x.dtype)), self.B.to(x.dtype))
        return y


@contextmanager
def adapters_off():
    """Inside, the model is the teacher: the initial policy, bit for bit."""
    LoRALinear.enabled = False
    try:
        yield
    finally:
        LoRALinear.enabled = True


def hidden_states(model, prompts, completions):
    """Last-layer states at the positions that predict the completion tokens: [N, H]."""
    sequences = [torch.tensor(p + c) for p, c in zip(prompts, completions, strict=True)]
    # right-padded; causal attention never sees the padding, so no mask is needed
    ids = nn.utils.rnn.pad_sequence(sequences, batch_first=True).to(model.device)  # [B, L]
    states = model.base_model(ids, use_cache=False).last_hidden_state  # [B, L, H]
    spans = zip(states, prompts, completions, strict=True)  # a state predicts the next token
    return torch.cat([row[len(p) - 1 : len(p) + len(c) - 1] for row, p, c in spans])  # [N, H]


def log_probs(model, states, temperature):
    """log π at temperature τ, fp32; the output layer is frozen: [n, H] -> [n, V]."""
    return F.log_softmax(output_logits(model, states) / temperature, dim=-1)


# ================================================================================ 4. losses
def token_advantages(student, teacher, tokens):
    """A_t = log π_0(y_t | x, c, y_<t) − log π_θ(y_t | x, y_<t): [n, V], [n, V], [n] -> [n], nats.

    In reverse KL's policy gradient, y_<t fixed: −∇ KL(student ‖ teacher) = E[A_t ∇ log π_θ(y_t)].
    """
    return (teacher - student).gather(-1, tokens[:, None])[:, 0].detach()


def kl(log_p, log_q):
    """KL(p ‖ q) = Σ_v p_v (log p_v − log q_v): log-probs [n, V], [n, V] -> [n], in nats."""
    p, q = log_p.exp(), log_q.exp()
    # Adding q − p changes no value, since Σ_v (q − p) = 0. But the gradient is now exactly zero
    # where p = q; otherwise AdamW would scale rounding errors up to full steps.
    return (p * (log_p - log_q) + q - p).sum(-1)


def jsd(student, teacher):
    """½ KL(teacher ‖ m) + ½ KL(student ‖ m), with the mixture m = ½ teacher + ½ student."""
    # log(½ eˢ + ½ eᵗ) = s + log(1 + eᵗ⁻ˢ) − log 2, which is exactly s where s = t
    mixture = student + (F.softplus(teacher - student) - math.log(2))
    return (kl(teacher, mixture) + kl(student, mixture)) / 2


# D(student, teacher): log-probs [n, V], [n, V] -> [n]. The paper's is forward_kl.
DIVERGENCES = {"forward_kl": lambda s, t: kl(t, s), "reverse_kl": kl, "jsd": jsd}


def accumulate_gradients(model, rollouts, step_tokens, cfg):
    """Adds a micro-batch's part of the step's gradient. Returns its part of (loss, entropy)."""
    completions = [r.completion for r in rollouts]
    tokens = torch.tensor([t for c in completions for t in c], device=model.device)  # [N]
    student_states = hidden_states(model, [r.prompt for r in rollouts], completions)  # [N, H]
    if cfg.condition != "grpo":
        prompts = [r.teacher_prompt for r in rollouts]
        with torch.no_grad(), adapters_off():
            teacher_states = hidden_states(model, prompts, completions)  # [N, H]
    A_i = [r.group_advantage for r in rollouts for _ in r.completion]  # for grpo only
    A_i = torch.tensor(A_i, device=model.device)  # [N]

    # Logits of all N tokens may not fit in memory. So backward has two stages: each chunk's loss
    # gives the gradient of its hidden states; these then go into the network, all at once.
    chunks = [states.detach().requires_grad_() for states in student_states.split(cfg.chunk)]
    loss, entropy, advantages = 0.0, 0.0, []
    for number, states in enumerate(chunks):  # [n, H]
        here = slice(number * cfg.chunk, (number + 1) * cfg.chunk)
        student = log_probs(model, states, cfg.temperature)  # [n, V]
        if cfg.condition == "grpo":  # −A_i log π_θ(y_t)
            losses = -A_i[here] * student.gather(-1, tokens[here, None])[:, 0]  # [n]
        else:  # KL(teacher ‖ student); A_t is logged, not trained on
            teacher = log_probs(model, teacher_states[here], cfg.temperature)  # [n, V], no LoRA
            losses = DIVERGENCES[cfg.divergence](student, teacher)  # [n]
            advantages += token_advantages(student, teacher, tokens[here]).tolist()
        (losses.sum() / step_tokens).backward()
        loss += losses.sum().item() / step_tokens
        student = student.detach()
        entropy -= (student.exp() * student).sum().item() / step_tokens
    student_states.backward(torch.cat([states.grad for states in chunks]))
    for rollout in rollouts:
        length = len(rollout.completion)
        rollout.advantages, advantages = advantages[:length], advantages[length:]
    return loss, entropy


# ================================================================================ 5. training
def train_step(model, tokenizer, optimizer, problems, ask, cfg):
    """One update on the problems. Returns the rollouts, with their advantages, and its metrics."""
    rollouts = sample_rollouts(model, tokenizer, problems, cfg.group_size, cfg)
    if cfg.condition not in NO_CRITIC:
        ask_critic(rollouts, ask)
    if cfg.condition != "grpo":
        for rollout in rollouts:
            give_context(rollout, cfg.condition, tokenizer, cfg.teacher_thinking)
    trained = [r for r in rollouts if not r.masked]
    # A mean over all trained tokens of the step: the gradient does not depend on micro_batch.
    step_tokens = sum(len(r.completion) for r in trained)
    loss, entropy, starts = 0.0, 0.0, range(0, len(trained), cfg.micro_batch)
    for start in tqdm(starts, "scoring", leave=False, disable=None):
        batch = trained[start : start + cfg.micro_batch]
        share = accumulate_gradients(model, batch, step_tokens, cfg)
        loss, entropy = loss + share[0], entropy + share[1]
    grad_norm = nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], cfg.max_grad_norm)
    if not math.isfinite(loss + grad_norm):
        raise UserError(f"loss {loss}, gradient norm {grad_norm:g}: stopped; try a lower --lr")
    optimizer.step()  # without a rollout to train on, gradients are None and this does nothing
    optimizer.zero_grad()
    return rollouts, {"loss": loss, "grad_norm": grad_norm.item(), "entropy": entropy}


def validate(model, tokenizer, problems, step, cfg):
    """Avg@k and Pass@k of k = val_samples attempts at each validation problem, in percent."""
    torch.manual_seed(1)  # the same random draws every time
    rollouts = sample_rollouts(model, tokenizer, problems, cfg.val_samples, cfg)
    metrics = summarise(rollouts)
    if step == 0:
        report_base(metrics, len(rollouts), cfg)
    passed = torch.tensor([r.reward for r in rollouts]).view(-1, cfg.val_samples).amax(-1)
    return {"val_avg": 100 * metrics["reward"], "val_pass": 100 * passed.mean().item()}


def train(cfg, run):
    """Trains for cfg.steps steps. `run`: metrics, samples, best step; see open_run."""
    (train_set, val_set, _), model, tokenizer = prepare(cfg, run)
    ask = None if cfg.condition in NO_CRITIC else open_critic(cfg, model, tokenizer)
    torch.manual_seed(cfg.seed)
    adapters = add_adapters(model, cfg.lora_rank, cfg.lora_alpha)
    optimizer = torch.optim.AdamW(adapters, lr=cfg.lr, weight_decay=0.0)
    batches = draw_batches(train_set, cfg)
    with run_folder(cfg, run, model, tokenizer, adapters, optimizer) as bar:  # resumes, too
        for step in range(len(run["metrics"]), cfg.steps + 1):  # from the last checkpoint on
            row = {"step": step}
            run["metrics"].append(row)
            if step > 0:  # step 0 only validates the base
                torch.manual_seed(1_000_003 * cfg.seed + step)  # a resumed run draws the same
                batch = batches[step - 1]
                rollouts, metrics = train_step(model, tokenizer, optimizer, batch, ask, cfg)
                row |= metrics | summarise(rollouts)
                log_rollouts(rollouts, run, tokenizer, cfg)
                bar.update()
            if step % cfg.eval_every == 0 or step == cfg.steps:
                bar.set_postfix_str(f"validation of step {step}")
                row |= validate(model, tokenizer, val_set, step, cfg)
                save_checkpoint(adapters, optimizer, run, cfg)
            bar.set_postfix(best_avg=run["best_avg"], loss=row.get("loss", "–"))
            write_logs(run, cfg)


# ================================================================================ end of the lesson
def encode_chats(tokenizer, messages, thinking=False):
    """Chat prompts: B messages -> a list of P token ids for each."""
    unknown = tokenizer.unk_token or "<unk>"  # the one token that cannot be sanitized
    chats = [[{"role": "user", "content": m.replace(unknown, "< unk>")}] for m in messages]
    # A template that prints today's date gets a fixed one: prompts must not change overnight.
    date = "{% macro strftime_now(format) %}26 Jul 2024{% endmacro %}\n"
    template = date + tokenizer.get_chat_template()
    # sanitize_control_tokens: an <|im_start|> in a message is encoded as plain text
    options = {"add_generation_prompt": True, "sanitize_control_tokens": True, "return_dict": False}
    options |= {"enable_thinking": thinking, "thinking": thinking}  # Qwen's switch, Granite's
    return tokenizer.apply_chat_template(chats, chat_template=template, **options)


@torch.no_grad()
def generate(model, tokenizer, prompts, batch_size, max_new_tokens, temperature):
    """One completion of each prompt, up to and including the first end token: B lists of T ids."""
    end_ids = model.generation_config.eos_token_id  # a list: see load_model
    # Full softmax, as in scoring: no top-k; load_model resets the rest. Temperature 0 is greedy.
    sampling = {"do_sample": temperature > 0, "temperature": temperature or 1.0, "top_k": 0}
    completions, starts = [], range(0, len(prompts), batch_size)
    for start in tqdm(starts, "sampling", leave=False, disable=None):  # None: not in a log file
        batch = {"input_ids": prompts[start : start + batch_size]}
        batch = tokenizer.pad(batch, padding_side="left", return_tensors="pt").to(model.device)
        output = model.generate(**batch, max_new_tokens=max_new_tokens, **sampling)
        for row in output[:, batch["input_ids"].shape[1] :].tolist():
            # Cut after the first end token. Don't look for padding: pad may be the end token.
            length = next((t + 1 for t, token in enumerate(row) if token in end_ids), len(row))
            completions.append(row[:length])
    return completions


def output_logits(model, states):
    """fp32 logits, which some models scale or cap: [n, H] -> [n, V]. No LoRA here."""
    logits = model.get_output_embeddings()(states).float()
    config = model.config.get_text_config()
    logits = logits * (getattr(config, "logit_scale", None) or 1)
    logits = logits / (getattr(config, "logits_scaling", None) or 1)
    if cap := getattr(config, "final_logit_softcapping", None):
        logits = cap * torch.tanh(logits / cap)
    return logits


def completion_text(model, tokenizer, completion):
    """The text of T token ids, without the end token. Special tokens stay: one may be <answer>."""
    end_ids = model.generation_config.eos_token_id
    return tokenizer.decode([token for token in completion if token not in end_ids])


def add_adapters(model, rank, alpha):
    """Freezes the model, adapts each linear layer of its blocks and returns the new parameters."""
    model.requires_grad_(False)
    decoder = model.get_decoder()  # without output layer or vision tower
    for name, layer in list(decoder.named_modules()):
        if type(layer) is nn.Linear:  # a subclass may be a router, with other outputs
            decoder.set_submodule(name, LoRALinear(layer, rank, alpha))
    return nn.ParameterList(p for p in model.parameters() if p.requires_grad)


def draw_batches(problems, cfg):
    """The problems of each step, reshuffled every epoch."""
    rng, order, size = random.Random(cfg.seed), [], cfg.problems_per_step
    while len(order) < cfg.steps * size:
        order += rng.sample(problems, len(problems))
    return [order[i : i + size] for i in range(0, cfg.steps * size, size)]


# ================================================================================ what is printed
def summarise(rollouts):
    """Means over the rollouts, {metric: number}; measures without values are left out.

    formatted: share with a closed <answer>. cut_off: share that max_new_tokens ended. aligned: part
    of an attempt's steps that the critique keeps before its first change. dropped: part of the
    critic's reply outside the critique. step_changed: share of corrections that change a step.
    """
    critiques = [r.feedback for r in rollouts if r.critique]
    corrections = [r.feedback for r in rollouts if r.critique and not r.reward]
    measures = {
        "reward": [r.reward for r in rollouts],
        "length": [len(r.completion) for r in rollouts],
        "formatted": [critic.last_answer(r.text) != "" for r in rollouts],
        "cut_off": [r.cut_off for r in rollouts],
        "masked": [r.masked != "" for r in rollouts],
        "token_advantage": [a for r in rollouts for a in r.advantages],  # A_t
        "group_advantage": [abs(r.group_advantage) for r in rollouts],  # |A_i|
        "critic_failed": [r.feedback.failure != "" for r in rollouts],
        "aligned": [critique.aligned for critique in critiques],
        "dropped": [critique.dropped for critique in critiques],
        "step_changed": [critique.step_changed for critique in corrections],
    }
    return {name: fmean(values) for name, values in measures.items() if values}


def paint(text, advantage=0.0):
    """The text for a terminal. If |A_t| >= 1, A_t follows, on blue (keep) or orange (change)."""
    text = "".join(c if c.isprintable() else " " for c in text)  # no control codes from a model
    if abs(advantage) < 1:
        return text
    text = f"{text}[{advantage:+.1f}]"
    colour = 25 if advantage > 0 else 166  # blue or orange
    return f"\x1b[97;48;5;{colour}m{text}\x1b[0m" if sys.stdout.isatty() else text


def token_texts(tokenizer, ids, text):
    """[T] each token's part of the text. If it ends within a character, the next one gets all."""
    texts, start, whole, end = [], 0, 0, 0  # ids[:whole] are text[:end]
    for n in range(1, len(ids) + 1):
        # What a token adds depends on what is before it, so decode from the last cut but one.
        before, window = tokenizer.decode(ids[start:whole]), tokenizer.decode(ids[start:n])
        old, complete = end, not window.endswith("\ufffd")
        if complete and text.startswith(window, end - len(before)):
            start, whole, end = whole, n, end + len(window) - len(before)
        texts.append(text[old:end])
    return [*texts[:-1], text[old:]]  # it may stop within a character


def unknown_words(text, tokenizer):
    encoded = {word: tokenizer.encode(word, add_special_tokens=False) for word in text.split()}
    return [word for word, ids in encoded.items() if tokenizer.unk_token_id in ids]


def solver_prompts(tokenizer, problems):
    """A list of P token ids for each problem. Raises UserError if there are unknown words."""
    for problem in problems:
        if words := unknown_words(problem.statement, tokenizer):
            said = "the model does not know these words, so pass another --model"
            raise UserError(f"{said}: {' '.join(words)}")
    return encode_chats(tokenizer, [solver_message(problem) for problem in problems])


def show(rollout, tokens, tokenizer):
    """Prints an attempt, coloured by A_t, and what the teacher sees."""
    end = ", cut off" * rollout.cut_off
    tqdm.write(f"\nproblem: {paint(rollout.problem.statement)}, reward {rollout.reward:g}{end}")
    if not rollout.context:  # nothing to mark: masked, or a condition without a context
        reason = f" (not trained on: {rollout.masked})" * bool(rollout.masked)
        wrote = f" The critic wrote: {rollout.feedback.reply}" * bool(rollout.feedback.reply)
        return tqdm.write(paint(f"attempt{reason}: {rollout.text}{wrote}"))
    tqdm.write(f"attempt: {''.join(map(paint, tokens, rollout.advantages))}")
    tqdm.write(f"marked if |A_t| >= 1 nat: {paint('change it', -1)}, {paint('keep it', 1)}")
    tqdm.write(f"teacher sees: {paint(rollout.context)}")
    if rollout.critique == rollout.context:
        steps = len(parse_steps(rollout.text))
        kept = round(steps * rollout.feedback.aligned)
        said = f"{kept} of {steps} steps come before the critique's first change (an answer is one)"
        tqdm.write(f"aligned: {said if steps else 'no, the attempt has no steps in tags'}")
    if words := unknown_words(rollout.context, tokenizer):
        tqdm.write(f"WARNING: context words unknown to this model: {paint(' '.join(words))}")


def log_rollouts(rollouts, run, tokenizer, cfg):
    """Keeps three rollouts for samples.jsonl and shows the run's first. Then checks."""
    row = run["metrics"][-1]
    # wrong ones first, and of these the latest error, if the critic has found it
    for rollout in sorted(rollouts, key=lambda r: (r.reward, -r.feedback.aligned))[:3]:
        tokens = token_texts(tokenizer, rollout.completion, rollout.text)
        if not run["samples"]:
            show(rollout, tokens, tokenizer)
        run["samples"].append({"step": row["step"], "tokens": tokens} | asdict(rollout))
    if row["step"] == 1 and row.get("aligned", 1.0) < 0.1:
        tqdm.write("WARNING: critiques keep almost no step of the attempts: they act as references")
    check_trained(rollouts, run["metrics"][1:], cfg)


def check_trained(rollouts, rows, cfg):
    """Says why the last step trained on nothing. Ends a run whose first steps all did."""
    if rows[-1]["grad_norm"] > 0:
        return
    agree = "equal rewards in its group" if cfg.condition == "grpo" else "the teacher agrees"
    reasons = Counter(rollout.masked or agree for rollout in rollouts)
    said = "; ".join(f"{count} x {reason}" for reason, count in reasons.most_common())
    tqdm.write(paint(f"step {len(rows)} trained on nothing: {said}"))
    seen = len(rows) * cfg.problems_per_step  # 16 problems are more than bad luck
    if all(row["grad_norm"] == 0 for row in rows) and (seen >= 16 or len(rows) == cfg.steps):
        raise UserError(f"nothing to train on in {len(rows)} steps: {said}")


def report_base(metrics, count, cfg):
    """Prints how the base copes with the prompt, and what to change if it does not."""
    shares = "Avg {:.1f}, {:.0f}% have a closed <answer>, {:.0f}% cut off at --max-new-tokens {}"
    percent = [100 * metrics[name] for name in ("reward", "formatted", "cut_off")]
    tqdm.write(f"base, {count} validation attempts: {shares.format(*percent, cfg.max_new_tokens)}")
    if count < 20:
        tqdm.write("WARNING: Avg of so few is luck: take more problems, or raise --val-samples")
    if metrics["formatted"] < 0.6:
        tqdm.write(
            "WARNING: attempts without an answer are graded wrong. Read the first one below: if"
        )
        tqdm.write("it needs more room, raise --max-new-tokens; if not, change SOLVE, or the model")
    elif metrics["cut_off"] > 0.2:
        tqdm.write("WARNING: a cut-off attempt is graded wrong: raise --max-new-tokens")
    if metrics["reward"] == 0 and cfg.condition == "grpo":
        tqdm.write("WARNING: no attempt is right; grpo needs some: take easier problems")


# ================================================================================ loading
@torch.no_grad()
def scoring_error(model, tokenizer, prompts):
    """Mean difference, in nats, between the log-probs we score and those generation draws from.

    Prompts of different lengths are padded left in generation, and right in scoring.
    """
    batch = tokenizer.pad({"input_ids": prompts}, padding_side="left", return_tensors="pt")
    options = {"max_new_tokens": 2, "output_scores": True, "return_dict_in_generate": True}
    output = model.generate(**batch.to(model.device), **options)
    completions = output.sequences[:, max(map(len, prompts)) :].tolist()
    sampled = torch.stack(output.scores, 1).flatten(0, 1).log_softmax(-1)  # [N, V]
    scored = log_probs(model, hidden_states(model, prompts, completions), 1.0)
    return (scored - sampled).abs().mean().item()


def fingerprint(model, tokenizer):
    """SHA-256 of all that decides the outputs: weights, config, end tokens and chat template."""
    config = model.config.get_text_config().to_dict()
    config |= {"_name_or_path": "", "architectures": "", "transformers_version": ""}
    identity = [config, model.generation_config.eos_token_id, tokenizer.chat_template]
    digest = hashlib.sha256(repr(identity).encode())
    for weight in model.state_dict().values():
        digest.update(weight.cpu().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def load_model(name, device, dtype):
    """Loads (model, tokenizer) from a folder or hub id. Raises UserError on unusable models."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
        first, second = encode_chats(tokenizer, ["1", "2 + 3"])  # raises without a template
        if first == second:
            raise UserError("its chat template drops the message")
        model, info = AutoModelForCausalLM.from_pretrained(
            name, dtype=dtype, trust_remote_code=False, output_loading_info=True
        )
        model.to(device).eval()  # eval: no dropout
        if info["missing_keys"] or hasattr(model, "is_quantized"):
            raise UserError("it is quantized, or lacks weights")
        vocabulary = range(model.get_input_embeddings().num_embeddings)
        ends = model.generation_config.eos_token_id
        ends = {tokenizer.eos_token_id, *(ends if isinstance(ends, list) else [ends])}
        end_ids = sorted(ends & {*vocabulary})
        if not end_ids:
            raise UserError("it has no end token in its vocabulary")
        if tokenizer.pad_token_id not in vocabulary:
            tokenizer.pad_token_id = end_ids[0]
        # A fresh config: the model's own may set top-k, top-p or penalties, which scoring ignores.
        model.generation_config = GenerationConfig(eos_token_id=end_ids, pad_token_id=end_ids[0])
        error = scoring_error(model, tokenizer, [first[-2:], second[-5:]])
        # A wrong formula is off by over 0.01. Rounding hides the smallest in bfloat16: up to 0.1.
        if not error < (1e-3 if dtype == "float32" else 0.3):  # or NaN
            raise UserError(f"we would score it wrongly: its log-probs differ by {error:.2g} nats")
    except Exception as error:  # the libraries raise many exception types
        reason = "no such folder" if "Repo id must" in str(error) else error
        raise UserError(f"cannot use the model {name} on {device}: {reason}") from None
    config = model.config.get_text_config()
    tokenizer.model_max_length = getattr(config, "max_position_embeddings", None) or 10**9
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type") == "longrope":  # a longer sequence changes all positions' encoding
        tokenizer.model_max_length = rope["original_max_position_embeddings"]
    model.fingerprint = fingerprint(model, tokenizer)
    return model, tokenizer


def open_critic(cfg, model, tokenizer):
    """Returns ask(rollouts, messages) -> [Critique] of the configured critic."""
    if cfg.critic.endswith(".py"):
        return critic.rule_critic(cfg.critic)
    if cfg.critic.startswith(("http://", "https://")):
        return critic.server_critic(cfg)
    if cfg.critic != cfg.model:
        model, tokenizer = load_model(cfg.critic, cfg.device, cfg.dtype)

    def complete(messages):  # yields (text, failure) for each
        prompts = encode_chats(tokenizer, messages)
        with adapters_off():  # a critic that is also the trained model uses its base weights
            rows = generate(model, tokenizer, prompts, cfg.critic_batch, cfg.critic_max_tokens, 0)
        for prompt, completion in zip(prompts, rows, strict=True):
            ended = completion[-1] in model.generation_config.eos_token_id
            fits = len(prompt + completion) <= tokenizer.model_max_length
            text = completion_text(model, tokenizer, completion)
            limit = f"the reply is cut off: --critic-max-tokens {cfg.critic_max_tokens}"
            yield text, "" if ended and fits else limit

    return critic.cached(complete, [model.fingerprint, cfg.critic_max_tokens])  # ask()


# ================================================================================ the run's folder
# Settings that may change on resume. On another kind of device the random draws differ.
OVERRIDES = {"out", "resume", "device", "micro_batch", "chunk", "critic_batch", "test_samples"}


def open_run(argv):
    """Returns (settings, state) of a new run or, with --resume, of the last checkpoint in --out."""
    cfg = parse_args(argv)
    folder = Path(cfg.out)
    if not cfg.resume:
        leftovers = ("lock", "last.pt.")  # of a run that was killed before its first checkpoint
        metrics = folder / "metrics.jsonl"
        rows = metrics.read_text().splitlines() if metrics.exists() else []
        if len(rows) == 1 and "val_avg" in rows[0]:  # of one that failed in its first step
            leftovers += ("config.json", "metrics.jsonl", "samples.jsonl", "last.pt")
        if folder.exists() and any(not f.name.startswith(leftovers) for f in folder.iterdir()):
            raise UserError(f"{folder} is not empty: pass --resume, delete it or change --out")
        return cfg, {"best_avg": -1.0, "best_step": 0, "metrics": [], "samples": []}
    try:
        run = torch.load(folder / "last.pt", map_location=cfg.device, weights_only=True)
        saved = run["settings"]
    except Exception as error:  # torch raises many exception types
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"cannot resume {folder}/last.pt: {reason}") from None
    cfg = parse_args(argv, saved)  # a changed setting in argv is refused below
    for name, value in saved.items():
        flag, now = name.replace("_", "-"), getattr(cfg, name)
        longer = name == "steps" and now > value
        moved = name == "critic" and all("://" in str(url) for url in (value, now))
        if now != value and not (name in OVERRIDES or longer or moved):
            said = f"{folder} was started with --{flag} {value}, now {now}"
            raise UserError(f"{said}: leave it out, or change --out")
    cfg.resume = False  # so that config.json equals that of an uninterrupted run
    return cfg, run


def write_logs(run, cfg):
    """Writes what can be read while training: config.json, metrics.jsonl and samples.jsonl."""
    Path(f"{cfg.out}/config.json").write_text(json.dumps(vars(cfg), indent=2))
    for name in ("metrics", "samples"):
        lines = [json.dumps(row) + "\n" for row in run[name]]
        Path(f"{cfg.out}/{name}.jsonl").write_text("".join(lines))


def save_checkpoint(adapters, optimizer, run, cfg):
    """Writes last.pt, and keeps the adapters if they are the best on validation so far."""
    row = run["metrics"][-1]
    if row["step"] > 0:
        tqdm.write(f"step {row['step']}: validation Avg {row['val_avg']:.1f}")
    if row["val_avg"] > run["best_avg"]:
        run |= {"best_avg": row["val_avg"], "best_step": row["step"]}
        run["best_adapters"] = {k: v.clone() for k, v in adapters.state_dict().items()}
    run |= {"adapters": adapters.state_dict(), "optimizer": optimizer.state_dict()}
    with atomic_write(f"{cfg.out}/last.pt") as file:
        torch.save(run | {"settings": vars(cfg)}, file)


@torch.no_grad()
def save_merged(model, tokenizer, folder):
    """Saves the model with its adapters merged, in fp32: bf16 would round most updates away."""
    model.float()
    for name, layer in list(model.named_modules()):
        if isinstance(layer, LoRALinear):
            if layer.B.any():  # adding zero turns -0.0 into 0.0, which changes the fingerprint
                layer.linear.weight += layer.scale * layer.B @ layer.A
            model.set_submodule(name, layer.linear)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def prepare(cfg, run):
    """Loads problems and model; checks that they fit each other and, on resume, the run."""
    problems = critic.load_problems(cfg.data)
    first, rule = problems[0][0], ""
    # A faulty critic or context raises now, not after the base's validation.
    steps = f"<step_1>{first.solution}</step_1> <answer>{first.answer}</answer>"
    solved = Rollout(first, [], [], first.solution if parse_steps(first.solution) else steps, 1.0)
    if cfg.condition not in NO_CRITIC and (cfg.critic.endswith(".py") or "://" in cfg.critic):
        rule = "" if "://" in cfg.critic else Path(cfg.critic).read_text()
        print(f"trying {cfg.critic} on the first reference solution", flush=True)
        ask_critic([solved], open_critic(cfg, None, None))
        if said := solved.feedback.failure:
            print(f"WARNING: {cfg.critic} fails on the first reference solution: {said}")
    print(f"loading {cfg.model} on {cfg.device} in {cfg.dtype}", flush=True)
    model, tokenizer = load_model(cfg.model, cfg.device, cfg.dtype)
    decoder = model.get_decoder()
    linear = sum(m.weight.numel() for m in decoder.modules() if type(m) is nn.Linear)
    share = linear / decoder.num_parameters(exclude_embeddings=True)
    print(f"LoRA adapts {share:.0%} of the weights between embedding and output layer")
    if not linear:
        raise UserError(f"the model {cfg.model} has no linear layers to adapt")
    prompts = solver_prompts(tokenizer, [problem for part in problems for problem in part])
    silent, thinking = (encode_chats(tokenizer, ["a"], mode) for mode in (False, True))
    if cfg.teacher_thinking and silent == thinking:
        raise UserError(f"the model {cfg.model} has no thinking mode: no --teacher-thinking")
    longest = max(map(len, prompts)) + cfg.max_new_tokens
    if longest > tokenizer.model_max_length:
        raise UserError(f"the model has no room for a prompt and completion of {longest} tokens")
    context = CONTEXTS[cfg.condition]
    if context:
        give_context(solved, cfg.condition, tokenizer, cfg.teacher_thinking)
    code, prompts = context and inspect.getsource(context), SOLVE + HELP + CRITICISE
    inputs = {"model": model.fingerprint, "data": repr(problems), "rule": rule}
    inputs |= {"prompts": prompts, "context": code}
    before = run.setdefault("inputs", inputs)  # a new run gets them
    if changed := [name for name, text in inputs.items() if text != before[name]]:
        said = f"changed since its start: {', '.join(changed)}; undo it, or change --out"
        raise UserError(f"cannot resume {cfg.out}: {said}")
    return problems, model, tokenizer


@contextmanager
def run_folder(cfg, run, model, tokenizer, adapters, optimizer):
    """Locks the folder, restores a checkpoint, and saves the best model however training ends."""
    with FileLock(f"{cfg.out}/lock", timeout=0):  # of one process at a time; makes the folder, too
        done = max(0, len(run["metrics"]) - 1)
        if run["metrics"]:
            adapters.load_state_dict(run["adapters"])
            optimizer.load_state_dict(run["optimizer"])
            write_logs(run, cfg)  # the files may be older or newer than the checkpoint
        if done == cfg.steps:
            print(f"{cfg.out} is finished: to go on, pass more --steps")
        bar = tqdm(total=cfg.steps, initial=done, desc=cfg.condition)
        try:
            yield bar
        except KeyboardInterrupt:
            again = f"python sd.py --out {cfg.out} --resume"
            raise KeyboardInterrupt(f"interrupted; to go on: {again}") from None
        finally:
            bar.close()
            if run["best_step"] > 0:  # at step 0 it is the base, which needs no copy
                adapters.load_state_dict(run["best_adapters"])
                save_merged(model, tokenizer, f"{cfg.out}/best")


# ================================================================================ flags
TOY = Path(__file__).resolve().parent / "tests/toy"  # default model, problems and critic


@dataclass
class Settings:
    condition: Literal[*CONTEXTS] = "critique"  # sets the context
    seed: int = 0  # of adapters, problem order and sampling
    out: str = None  # folder of the run [runs/CONDITION, or runs/CONDITION-SEED]
    resume: bool = False  # go on from the last validation of the run in --out
    # your own model, data and critic
    model: str = str(TOY)  # model to train: folder or hub id of a chat model
    data: str = None  # JSONL file, or folder of train, val and test.jsonl [the toy's]
    critic: str = None  # rule (.py), model, or server (http://) [the toy's rule]
    critic_model: str = None  # model name on the critic's server
    critic_max_tokens: int = 4096  # longest critique
    device: str = "cuda" if torch.cuda.is_available() else "cpu"
    dtype: Literal["float32", "bfloat16"] = None  # of frozen weights [bfloat16 on cuda]
    # the method
    teacher_thinking: bool = False  # enable_thinking in the teacher's prompt, as in the paper
    steps: int = 70  # training steps
    problems_per_step: int = 32
    group_size: int = None  # rollouts per problem [8 in grpo, else 1]
    lr: float = None  # learning rate [the toy's: 5e-4 in grpo, else 4e-3]
    divergence: Literal[*DIVERGENCES] = "forward_kl"  # the loss
    temperature: float = 1.0  # in sampling and scoring
    max_new_tokens: int = None  # longest completion [the toy's: 64]
    lora_rank: int = 64  # the adapters' rank
    lora_alpha: float = 128.0  # α: scales adapters by α/rank
    max_grad_norm: float = 1.0  # clips the gradient's norm
    eval_every: int = 10  # steps between validations
    val_samples: int = 8  # samples per validation problem
    test_samples: int = 12  # samples per test problem after training; 0: no test
    # memory (of these, only gen_batch changes the samples)
    gen_batch: int = 512  # rollouts sampled at once
    micro_batch: int = 64  # rollouts scored at once
    chunk: int = 256  # tokens whose logits are held at once
    critic_batch: int = 8  # critiques written at once


def parse_args(argv, defaults=None):
    """The settings, one flag each: --val-samples is val_samples. Raises UserError."""
    if {"-h", "--help"} & set(argv):
        code = Path(__file__).read_text("utf-8")
        contexts = code[code.index("\nCONTEXTS = ") : code.index("NO_CRITIC = ")]
        print(__doc__.partition("Below,")[0] + contexts + "\n" + inspect.getsource(Settings))
        sys.exit()
    parser = HfArgumentParser(Settings, usage=SUPPRESS)
    parser.set_defaults(**defaults or {})
    cfg = parser.parse_args(argv)
    fill_in(cfg)
    for name, value in vars(cfg).items():
        least = 1 if type(value) is int else 1e-12
        if name in ("seed", "test_samples"):
            least = 0
        if type(value) in (int, float) and not least <= value < 10**6:
            raise UserError(
                f"--{name.replace('_', '-')} is {value}: must be at least {least:g} and below 10^6"
            )
    return cfg


def fill_in(cfg):
    """Sets what depends on other settings. The toy's values are for the toy alone."""
    own = {"data": str(TOY), "critic": f"{TOY}/scribe.py", "max_new_tokens": 64}
    own["lr"] = 5e-4 if cfg.condition == "grpo" else 4e-3  # best on the toy's validation problems
    toy = Path(cfg.model).resolve() == TOY
    if cfg.condition in NO_CRITIC and not toy:
        del own["critic"]
    missing = [name for name in own if getattr(cfg, name) is None]
    if missing and not toy:
        start = {"max_new_tokens": " (start from 300)", "lr": " (start from 2e-5)"}
        flags = [f"--{name.replace('_', '-')}{start.get(name, '')}" for name in missing]
        raise UserError(f"--model {cfg.model} needs {' '.join(flags)}: the defaults are the toy's")
    vars(cfg).update({name: own[name] for name in missing})
    cfg.out = cfg.out or f"runs/{cfg.condition}" + (f"-{cfg.seed}" if cfg.seed else "")
    cfg.dtype = cfg.dtype or ("bfloat16" if "cuda" in cfg.device else "float32")
    cfg.group_size = cfg.group_size or (8 if cfg.condition == "grpo" else 1)
    if cfg.condition == "grpo" and cfg.group_size == 1:
        raise UserError("--group-size 1: grpo compares the rollouts of a group, so it needs 2")


@contextmanager
def command_line(program):
    """Turns user and system errors into a one-line message and exit status 2."""
    sys.stdout.reconfigure(errors="replace")  # a model may write what the terminal cannot show
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    except (UserError, OSError, RuntimeError, SafetensorError, KeyboardInterrupt) as error:
        file = getattr(error, "filename", None)  # of an OSError; its text is [Errno 2] No such ...
        said = f"{file}: {error.strerror}" if file else str(error)
        text = " ".join(paint(said).split())[:300] or "interrupted"
        if isinstance(error, RuntimeError) and not ("allocate" in text or "out of memory" in text):
            raise  # a bug, unlike out of memory, which is a RuntimeError too
        print(f"\n{program}: {text}", file=sys.stderr)
        sys.exit(2)


def main(argv):
    with command_line("sd.py"):
        cfg, run = open_run(argv)
        print(f"condition {cfg.condition}, run {cfg.out}, flags:", *argv, flush=True)
        train(cfg, run)
        best = f"best/ has step {run['best_step']}, the best on validation"
        saved = best if run["best_step"] else "no step beat the base on validation"
        if cfg.test_samples:  # eval.py in a new process: training's memory is free
            run.clear()
            gc.collect()
            torch.cuda.empty_cache()
            test = [sys.executable, Path(__file__).with_name("eval.py"), cfg.out]
            test += ["--k", str(cfg.test_samples), "--json", f"{cfg.out}/result.json"]
            if status := subprocess.call(test):
                sys.exit(status)
            saved += f". Next: python eval.py {cfg.out} --k 1 --html report.html"
        print(f"{cfg.out}: {saved}")


if __name__ == "__main__":
    main(sys.argv[1:])
