"""Self-distillation from feedback, in one file.

A language model learns from itself: the student writes an attempt, and a teacher, the model it
started from, with a *context* in its prompt, says at every token of that attempt what it would have
written. This is a reference for *The Role of Feedback Alignment in Self-Distillation* (Kara & Ersoy,
arXiv 2606.11173), which varies one thing, what the teacher sees:

    grpo        there is no teacher: a binary reward, compared within a group of rollouts
    reference   a reference solution: another derivation of the right answer
    critique    a frozen critic's corrected walk through the student's own attempt

One training step, and the function that takes it:

    1. rollout      y ~ π_θ(· | x), with its reward                                sample_rollouts
    2. context      c = CONTEXTS[condition](x, y, critique of y)                     give_contexts
    3. student      log π_θ(· | x, y_<t) at every completion token t  completion_states, log_probs
    4. teacher      log π_0(· | x, c, y_<t), adapters off, no gradient                    the same
    5. advantage    A_t = log π_0(y_t | x, c, y_<t) − log π_θ(y_t | x, y_<t)      token_advantages
                    what the context says of token t; it is looked at, and is not in the loss
    6. loss         KL(teacher_t ‖ student_t), averaged over the step's tokens          forward_kl
       or, in grpo, −A_i log π_θ(y_t) with A_i = (r_i − mean r) / std r       policy_gradient_loss
    7. update       one AdamW step on the LoRA adapters                                 train_step

What is left out: GRPO's ratio clipping (one update per batch of rollouts: the ratio is 1) and its
average over each rollout before that over rollouts (here all tokens of a step count the same), a KL
penalty, learning-rate schedules, and models that do not fit on one device.

Shapes: B rollouts, each with P prompt and T completion tokens; L = max(P + T); N completion tokens
of all B rollouts, one rollout after another, no padding; H hidden size; V vocabulary size.
"""

import argparse, contextlib, dataclasses, hashlib, inspect, itertools, json  # noqa: E401
import math, os, random, re, shutil, signal, sys, tempfile, time  # noqa: E401
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

try:
    import fcntl
except ImportError:
    fcntl = None  # Windows: two runs into one folder are not noticed there

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
import transformers
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.pytorch_utils import Conv1D

import critic
from critic import OWN, PROBLEM, REFERENCE, Stop, carry_on, extract_answer, factors, first_difference, is_correct
from critic import join_steps, judge, keeps_format, no_walk, parse_steps, read_step, scribe, times


# ================================================================================ config
def setting(default, help, least=None):
    return field(default=default, metadata={"help": help, "least": least})


@dataclass(frozen=True)
class Config:
    """Every setting. The command line's flags are made from these lines, and from nothing else."""

    condition: str = setting("critique", "what the teacher sees: a name in CONTEXTS")
    seed: int = setting(0, "seed of adapters, problem order and sampling", 0)
    out: str = setting("", "folder of the run; empty: runs/CONDITION, with -SEED behind if not 0")
    resume: bool = setting(False, "go on from the folder's last checkpoint")
    model: str = setting("", "solver, a folder or hub id of a chat model; empty: the embedded base model")
    device: str = setting("", "where to run; empty: cuda if there is one, else cpu")
    data: str = setting("", "training problems, JSON lines of problem, solution, answer; empty: the embedded task")
    val_data: str = setting("", "validation problems; empty: a tenth of --data, 50 at most")
    test_data: str = setting("", "test problems; empty: a fifth of --data, 100 at most")
    # the critic
    critic: str = setting("scribe", "scribe (embedded task only), a folder or hub id, or http://HOST:PORT/v1")
    critic_model: str = setting("", "model's name on the server")
    critic_max_tokens: int = setting(4096, "longest answer of the critic, its thinking included, in tokens", 1)
    critic_batch: int = setting(8, "prompts that the critic works on at once", 1)
    critic_timeout: float = setting(600.0, "seconds to wait for one answer of a server", 1e-3)
    # the method
    teacher_thinking: bool = setting(False, "teacher's chat template with thinking on, as in the paper")
    steps: int = setting(70, "training steps", 1)
    problems_per_step: int = setting(32, "problems in a training step", 1)
    group_size: int = setting(0, "rollouts of each problem; 0: 8 in grpo, else 1", 0)
    lr: float = setting(0.0, "learning rate; 0: the condition's own in LEARNING_RATES", 0)
    divergence: str = setting("forward_kl", "teacher against student: a name in DIVERGENCES")
    temperature: float = setting(1.0, "of sampling, and so of every scoring pass", 1e-3)
    max_new_tokens: int = setting(48, "longest completion, in tokens", 1)
    lora_rank: int = setting(64, "rank of the adapters", 1)
    lora_alpha: float = setting(128.0, "adapters are scaled by lora_alpha / lora_rank", 0)
    max_grad_norm: float = setting(1.0, "gradients are clipped to this norm", 1e-9)
    # memory: the first decides which rollout gets which random numbers, the others change rounding only
    gen_batch: int = setting(512, "rollouts sampled at once", 1)
    micro_batch: int = setting(64, "rollouts scored at once", 1)
    chunk: int = setting(256, "completion tokens whose logits are held at once", 1)
    gradient_checkpointing: bool = setting(False, "keep only each layer's input for the backward pass: slower, smaller")
    # evaluation
    eval_every: int = setting(10, "steps between validations", 1)
    val_samples: int = setting(8, "samples of each validation problem", 1)
    test_samples: int = setting(12, "samples of each test problem", 1)
    # the embedded base model
    drift: float = setting(0.8, "how often a step slips into a reference's way, 0 to 1", 0)
    base_seed: int = setting(0, "seed of its pretraining", 0)
    base_dir: str = setting("runs/base", "folder where embedded base models are kept")


# Each condition's own, the best of a grid on the validation problems (README). Others: as critique.
LEARNING_RATES = {"grpo": 5e-4, "reference": 1e-3, "critique": 1e-3}


def settled(cfg: Config) -> Config:
    """cfg with every automatic value filled in. Raises Stop on a value that makes no sense."""
    for f in dataclasses.fields(cfg):
        value, least = getattr(cfg, f.name), f.metadata["least"]
        if least is not None and not (least <= value < math.inf):
            raise Stop(f"--{f.name.replace('_', '-')} is {value}: it must be at least {least}")
    for name, table in ("condition", CONTEXTS), ("divergence", DIVERGENCES):
        if getattr(cfg, name) not in table:
            raise Stop(f"--{name} {getattr(cfg, name)}: choose one of {', '.join(table)}")
    if cfg.drift > 1:
        raise Stop(f"--drift is {cfg.drift}: it must be at most 1")
    if cfg.condition == "grpo" and cfg.group_size == 1:
        raise Stop("--group-size is 1: grpo compares the rollouts of a problem and needs two or more")
    if cfg.condition == "shuffled" and cfg.problems_per_step < 2:
        raise Stop("--problems-per-step is 1: shuffled needs another problem in the step to take a critique from")
    if cfg.critic.startswith(("http://", "https://")) and not cfg.critic_model:
        raise Stop(f"--critic {cfg.critic}: name the model that the server runs with --critic-model")
    if cfg.critic == "scribe" and cfg.data and cfg.condition not in WITHOUT_CRITIC:
        raise Stop("--critic scribe knows the embedded task only: for --data name a model or a server with --critic")
    device = cfg.device or (f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise Stop(f"--device {device}: {str(error).splitlines()[0]}") from None
    return dataclasses.replace(
        cfg,
        out=cfg.out or f"runs/{cfg.condition}" + (f"-{cfg.seed}" if cfg.seed else ""),
        device=device,
        group_size=cfg.group_size or (8 if cfg.condition == "grpo" else 1),
        lr=cfg.lr or LEARNING_RATES.get(cfg.condition, LEARNING_RATES["critique"]),
    )


# ================================================================================ problems
@dataclass(frozen=True)
class Problem:
    problem: str
    solution: str  # the reference solution
    answer: str


def embedded_problems() -> tuple[list[Problem], list[Problem], list[Problem]]:
    """282 train, 50 validation and 100 test problems, all different, the same in every run."""
    drawn = random.Random(0).sample(range(10**6), 282 + 50 + 200)  # six digits are a problem
    problems = []
    for number in drawn:
        problem = "{}*{}+{}*{}+{}*{}".format(*f"{number:06d}")
        steps, answer = carry_on(factors(problem), [], [REFERENCE])
        problems.append(Problem(problem, join_steps(steps, answer), str(answer)))
    return problems[:282], problems[282:332], problems[432:]  # 332 to 431 were used up: the base was chosen on them


def read_problems(path: str) -> list[Problem]:
    """The problems of a JSONL file, one object a line. Raises Stop with file and line where one is not right."""
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise Stop(f"cannot read {path}: {error}") from None
    problems, names = {}, [f.name for f in dataclasses.fields(Problem)]
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            json.dumps(row, ensure_ascii=False).encode()  # JSON may hold half a character, which breaks a tokenizer
        except (ValueError, RecursionError):
            raise Stop(f"{path}, line {number}: not JSON; expected an object with {', '.join(names)}") from None
        for name in names:
            if not isinstance(row, dict) or not isinstance(row.get(name), str) or not row[name].strip():
                raise Stop(f'{path}, line {number}: expected an object with a text, not empty, as "{name}"')
        if row["problem"] in problems:
            raise Stop(f"{path}, line {number}: this problem is there already: remove one of the two")
        problems[row["problem"]] = Problem(*(row[name] for name in names))
    if not problems:
        raise Stop(f"{path}: there is no problem in it")
    return list(problems.values())


def problem_sets(cfg: Config) -> tuple[list[Problem], list[Problem], list[Problem]]:
    """Train, validation and test problems, disjoint. Raises Stop if a file is bad, too small, or shares a problem."""
    if not cfg.data:
        if cfg.val_data or cfg.test_data:
            raise Stop("--val-data and --test-data need --data")
        return embedded_problems()
    train = read_problems(cfg.data)
    random.Random(0).shuffle(train)
    rest, n = [], len(train)
    for name, path, share in ("test", cfg.test_data, min(n // 5, 100)), ("val", cfg.val_data, min(n // 10, 50)):
        rest.append(read_problems(path) if path else train[:share])
        train = train if path else train[share:]
        if not rest[-1]:
            raise Stop(f"{cfg.data}: {n} problems are too few to split: 10 are needed, or --{name}-data")
    texts = Counter(p.problem for problems in (train, *rest) for p in problems)
    if shared := [text for text, n in texts.items() if n > 1]:
        raise Stop(f"training, validation and test problems must differ; twice there: {shared[0][:60]!r}")
    return train, rest[1], rest[0]


# ================================================================================ prompts
SOLVE = (
    "Solve the problem step by step. Write each step in tags of its own, <step_1>...</step_1>, "
    "<step_2>...</step_2> and so on, and then the final answer in <answer>...</answer>."
)
HELP = "The following may help. Do not mention it, and answer in the format asked for."

CRITICISE = """Below are a problem, its reference solution, its right answer, and a student's attempt. Write a \
corrected walk through that attempt. Be a faithful scribe: keep the student's own steps, words and notation wherever \
they are right.

A. If every step is right, repeat the attempt word for word.
B. If the answer is right but a step is missing, repeat the attempt and insert the step.
C. If the attempt is unfinished, repeat its right steps, shortened if they are long, and finish it.
D. If a step is wrong, repeat the steps before it word for word, write that step anew as it should be, and carry on \
from the corrected value to the answer, in the student's own way. Do not repeat the wrong step.

Write nothing else: no comment, no verdict, no mention of the reference. Write each step in tags of its own, \
<step_1>...</step_1>, <step_2>...</step_2> and so on, and then the final answer in <answer>...</answer>."""


def critic_prompt(problem: Problem, attempt: str) -> str:
    parts = {"Problem": problem.problem, "Reference solution": problem.solution, "Right answer": problem.answer}
    parts = "\n\n".join(f"{name}:\n{text}" for name, text in (parts | {"Student's attempt": attempt}).items())
    return f"{CRITICISE}\n\n{parts}"


def build_prompts(tokenizer, problems: list[str], contexts: list[str | None], thinking=False) -> list[list[int]]:
    """Token ids of each prompt. Without a context (None or "") teacher and student prompts agree.

    With thinking the template opens the answer for a model that thinks first. A teacher so prompted expects
    <think> where the student's first token stands: A_1 is far below zero, whatever the context says, and the
    loss pulls the student towards <think>. Later tokens mind less: by then the student's own prefix is there.
    """
    chats = []
    for problem, context in zip(problems, contexts, strict=True):
        parts = [SOLVE, problem, HELP, context] if context else [SOLVE, problem]
        chats.append([{"role": "user", "content": "\n\n".join(parts)}])
    how = {"add_generation_prompt": True, "enable_thinking": thinking, "return_dict": False}
    return tokenizer.apply_chat_template(chats, **how)


# ================================================================================ contexts: the fork point
def correction(attempt, critique):
    """What is wrong first, and how the critique has it."""
    wrong = first_difference(attempt, critique)
    if wrong is None:
        return "Every step is correct."
    better = "".join(critique[s.start : s.end] for s in parse_steps(critique) if s.name == wrong.name)
    return f"{wrong.name.replace('_', ' ').capitalize()} is wrong. Correct: {better}"


def quote(problem, attempt, critique):
    """The whole attempt, the wrong step too, and then what is wrong and how it should be."""
    return f"{attempt} {correction(attempt, critique)}"


def omit(problem, attempt, critique):
    """A verdict on each step up to the first wrong one, and its correction: nothing of the attempt itself."""
    wrong = first_difference(attempt, critique)
    right = [s.name for s in parse_steps(attempt) if wrong is None or s.start < wrong.start]
    verdicts = [f"{name.replace('_', ' ').capitalize()} is correct." for name in right]
    return " ".join(verdicts + [correction(attempt, critique)])


# What the teacher sees: a function of (problem, attempt, critique) that returns a text, "" for
# nothing, or None for "no teacher here". A new design is one function and one entry; it is then
# a --condition. `critique` is the critic's text; where the critic failed, the function is not called.
CONTEXTS = {
    "grpo": lambda problem, attempt, critique: None,
    "reference": lambda problem, attempt, critique: problem.solution,
    "critique": lambda problem, attempt, critique: critique,
    # to take the paper's account apart, and to control it
    "answer": lambda problem, attempt, critique: f"<answer>{problem.answer}</answer>",
    "quote": quote,
    "omit": omit,
    "shuffled": lambda problem, attempt, critique: critique,  # of another problem: see give_contexts
    "empty": lambda problem, attempt, critique: "",
}
WITHOUT_CRITIC = {"grpo", "reference", "answer", "empty"}  # no need to ask (and pay) the critic here


# ================================================================================ adapters
class LoRALinear(nn.Module):
    """W x + (α/r) B A x: a frozen linear layer W, and a trained correction of rank r.

    B starts at zero, so the student starts as the teacher. With `enabled` false the layer is W
    alone, which is the teacher: no second copy of the network is needed.
    """

    def __init__(self, linear: nn.Linear | Conv1D, rank: int, alpha: float):
        super().__init__()
        self.linear, self.scale, self.enabled = linear, alpha / rank, True
        self.transposed = isinstance(linear, Conv1D)  # GPT-2's linear layer: y = x W, not x Wᵀ
        outs, ins = linear.weight.T.shape if self.transposed else linear.weight.shape
        like = {"device": linear.weight.device, "dtype": torch.float32}  # also over bf16 weights
        self.A = nn.Parameter(torch.empty(rank, ins, **like))
        self.B = nn.Parameter(torch.zeros(outs, rank, **like))
        nn.init.kaiming_uniform_(self.A, a=math.sqrt(5))

    def forward(self, x):
        y = self.linear(x)
        if self.enabled:
            y = y + (self.scale * F.linear(F.linear(x.to(self.A.dtype), self.A), self.B)).to(y.dtype)
        return y


def add_adapters(model, rank: int, alpha: float) -> list[nn.Parameter]:
    """Freezes the model and puts an adapter on every linear layer of its blocks; returns their weights."""
    model.requires_grad_(False)
    for parent in list(model.base_model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, (nn.Linear, Conv1D)):
                setattr(parent, name, LoRALinear(child, rank, alpha))
    if adapters := [p for p in model.parameters() if p.requires_grad]:
        return adapters
    raise Stop(f"{type(model).__name__} has no linear layer in its blocks that an adapter could sit on")


@contextlib.contextmanager
def adapters_off(model):
    """Inside, the model is the teacher: the initial policy, bit for bit."""
    layers = [m for m in model.modules() if isinstance(m, LoRALinear)]
    for layer in layers:
        layer.enabled = False
    try:
        yield
    finally:
        for layer in layers:
            layer.enabled = True


def merged_state_dict(model) -> dict:
    """The weights of a plain model that computes what this one does with its adapters on, but for rounding."""
    state = dict(model.state_dict())
    for name, layer in model.named_modules():
        if isinstance(layer, LoRALinear):
            a, b, weight = (state.pop(f"{name}.{part}") for part in ("A", "B", "linear.weight"))
            change = layer.scale * b @ a
            state[f"{name}.weight"] = (weight.float() + (change.T if layer.transposed else change)).to(weight.dtype)
            if layer.linear.bias is not None:
                state[f"{name}.bias"] = state.pop(f"{name}.linear.bias")
    return state


# ================================================================================ several GPUs
# `torchrun --nproc_per_node N sd.py …` starts N of these processes. Each samples and scores every Nth problem, and
# their gradients are added up. Alone, with N = 1, nothing below differs.
RANK, PROCESSES = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def of_all_processes(items: list) -> list:
    """The items of all processes, one process after another, in every process."""
    parts = [items]
    if PROCESSES > 1:
        parts = [None] * PROCESSES
        dist.all_gather_object(parts, items)
    return list(itertools.chain(*parts))


def add_up_gradients(adapters: list[nn.Parameter]) -> None:
    for adapter in adapters if PROCESSES > 1 else ():
        adapter.grad = torch.zeros_like(adapter) if adapter.grad is None else adapter.grad
        dist.all_reduce(adapter.grad)


# ================================================================================ 1. rollouts
def positions(model) -> float:
    """How many tokens the model can take."""
    return getattr(model.config, "max_position_embeddings", None) or math.inf


@dataclass
class Rollout:
    problem: Problem
    prompt: list[int]  # P token ids
    completion: list[int]  # T token ids, the end token included, as sampled: never encoded again
    text: str  # the completion, decoded
    reward: float  # 1 right, 0 wrong
    group_advantage: float  # A_i, all that grpo uses
    critique: str | None = None
    critic_failure: str = ""  # why there is no critique
    critic_tokens: int = 0  # read and written by the critic
    context: str | None = None  # what the teacher sees beside the problem
    teacher_prompt: list[int] | None = None  # None: this rollout has no teacher
    advantages: list[float] = field(default_factory=list)  # A_t of each completion token


def group_advantages(rewards: torch.Tensor) -> torch.Tensor:
    """GRPO's A_i = (r_i − mean r) / std r within each group: [problems, G] -> [problems, G].

    Zero where all rewards of a group agree. std is the population's.
    """
    centred = rewards - rewards.mean(-1, keepdim=True)
    std = rewards.std(-1, correction=0, keepdim=True)
    return torch.where(std > 0, centred / std, 0.0)


@torch.no_grad()
def sample(model, prompts: list[list[int]], cfg: Config, title="") -> list[list[int]]:
    """One completion for each prompt, as token ids, up to and including the first end token. A title shows a bar.

    Samples from the distribution that is scored later: temperature only, no top-k, no top-p.
    """
    completions, settings = [], model.generation_config
    for start in tqdm(range(0, len(prompts), cfg.gen_batch), title, disable=not title or RANK > 0, leave=False):
        batch = prompts[start : start + cfg.gen_batch]
        width = max(map(len, batch))
        ids = [[settings.pad_token_id] * (width - len(p)) + p for p in batch]
        mask = [[0] * (width - len(p)) + [1] * len(p) for p in batch]
        how = {"do_sample": True, "temperature": cfg.temperature, "top_k": 0, "top_p": 1.0}
        ids, mask = torch.tensor(ids, device=model.device), torch.tensor(mask, device=model.device)
        output = model.generate(ids, attention_mask=mask, max_new_tokens=cfg.max_new_tokens, **how)
        for row in output[:, width:].tolist():
            # Not "everything that is not padding": in many models padding is the end token.
            end = next((t for t, token in enumerate(row) if token in settings.eos_token_id), len(row))
            completions.append(row[: end + 1])
    return completions


def sample_rollouts(model, tokenizer, problems: list[Problem], group_size: int, cfg: Config, title="") -> list[Rollout]:
    """group_size graded rollouts of each problem that falls to this process, the first problem's first."""
    problems = [p for p in problems[RANK::PROCESSES] for _ in range(group_size)]
    if not problems:
        return []
    prompts = build_prompts(tokenizer, [p.problem for p in problems], [None] * len(problems))
    completions = sample(model, prompts, cfg, title)
    texts = tokenizer.batch_decode(completions, skip_special_tokens=True)
    rewards = [float(is_correct(text, p.answer)) for text, p in zip(texts, problems, strict=True)]
    advantages = group_advantages(torch.tensor(rewards).view(-1, group_size)).flatten().tolist()
    return [Rollout(*parts) for parts in zip(problems, prompts, completions, texts, rewards, advantages)]


# ================================================================================ 2. contexts of rollouts
def ask_critic(rollouts: list[Rollout], ask, tokenizer) -> None:
    """Gives each rollout its critique, or why it has none."""
    prompts = [critic_prompt(r.problem, r.text) for r in rollouts]
    critiques = ask([r.problem.problem for r in rollouts], [r.text for r in rollouts], prompts)
    for rollout, critique in zip(rollouts, critiques, strict=True):
        rollout.critic_failure = critique.failure or no_walk(critique.text, rollout.problem.answer)
        rollout.critique = None if rollout.critic_failure else critique.text
        rollout.critic_tokens = critique.tokens
        if critique.text and not critique.tokens:  # the scribe: what a model would read and write in its place
            texts = [rollout.problem.problem, rollout.problem.solution, rollout.text, critique.text]
            rollout.critic_tokens = len(tokenizer.tokenize(" ".join(texts)))


def give_contexts(rollouts: list[Rollout], ask, model, tokenizer, cfg: Config) -> None:
    """Asks the critic, then gives each rollout its context and teacher prompt.

    Where there is none (the critic failed, the prompt would not fit the model's positions)
    teacher_prompt stays None, and the rollout is not trained on. grpo has none and needs none.
    """
    if cfg.condition not in WITHOUT_CRITIC:
        ask_critic(rollouts, ask, tokenizer)
    critiques = [r.critique for r in rollouts]
    if cfg.condition == "shuffled":  # a control: each rollout gets that of one half a batch away
        critiques = critiques[len(critiques) // 2 :] + critiques[: len(critiques) // 2]
    for rollout, critique in zip(rollouts, critiques):
        if critique is None and cfg.condition not in WITHOUT_CRITIC:
            continue
        context = CONTEXTS[cfg.condition](rollout.problem, rollout.text, critique)
        if context is not None:
            [prompt] = build_prompts(tokenizer, [rollout.problem.problem], [context], cfg.teacher_thinking)
            if len(prompt) + len(rollout.completion) <= positions(model):
                rollout.context, rollout.teacher_prompt = context, prompt


# ================================================================================ 3. and 4. student and teacher
def completion_states(model, prompts: list[list[int]], completions: list[list[int]]) -> torch.Tensor:
    """Last hidden states that predict the completions' tokens: [N, H], one rollout after another.

    The one scorer: the student calls it with its own prompts, the teacher with the context in them.
    States and not logits, since N × V logits do not fit in memory for a real vocabulary.
    """
    length = max(len(p) + len(c) for p, c in zip(prompts, completions, strict=True))
    # Padded on the right, where no token looks: attention is causal, and needs no mask.
    ids = torch.zeros(len(prompts), length, dtype=torch.long)  # [B, L]
    predicts = torch.zeros_like(ids, dtype=torch.bool)  # [B, L]: is the next token the completion's?
    for row, (prompt, completion) in enumerate(zip(prompts, completions)):
        end = len(prompt) + len(completion)
        ids[row, :end] = torch.tensor(prompt + completion)
        predicts[row, len(prompt) - 1 : end - 1] = True
    states = model.base_model(input_ids=ids.to(model.device), use_cache=False).last_hidden_state  # [B, L, H]
    return states[predicts.to(model.device)]  # [B, L, H] -> [N, H]


@contextlib.contextmanager
def checkpointing(model, on: bool):
    """Inside, if on, a layer keeps nothing but its input, and computes the rest again in the backward pass."""
    layers = [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)] if on else []
    for layer in layers:  # the layer itself, and not what is in it: dropout stays off
        layer.training = True
    yield
    for layer in layers:
        layer.training = False


def log_probs(model, states: torch.Tensor, temperature: float) -> torch.Tensor:
    """log π at the temperature sampled with: [N, H] -> [N, V], in fp32."""
    return F.log_softmax(model.get_output_embeddings()(states).float() / temperature, dim=-1)


def in_chunks(function, size: int, states: torch.Tensor, *others: torch.Tensor):
    """function(states, *others) -> (losses [N], advantages [N]), taken over `size` of the N positions at a time.

    Returns both, and ∂ Σ losses / ∂ states: [N, H]. The output layer is frozen, so the states are all that
    the gradient flows through. Each chunk's is taken before the next chunk's logits are made: peak memory
    is that of one chunk, however many tokens there are, and nothing is computed twice.
    """
    parts = []
    for chunk, *rest in zip(states.detach().split(size), *(other.split(size) for other in others), strict=True):
        with torch.enable_grad():
            losses, advantages = function(chunk.requires_grad_(), *rest)
            [gradient] = torch.autograd.grad(losses.sum(), chunk)
        parts.append((losses.detach(), advantages.detach(), gradient))
    return [torch.cat(part) for part in zip(*parts)]


# ================================================================================ 5. advantages
def token_advantages(student: torch.Tensor, teacher: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """A_t = log π_0(y_t | x, c, y_<t) − log π_θ(y_t | x, y_<t): [N, V], [N, V], [N] -> [N], in nats.

    Positive: the context says keep this token; negative: change it. This is exactly the coefficient
    of ∇ log π(y_t) in the sampled-token policy gradient of −KL(student ‖ teacher).
    """
    return (teacher - student).gather(-1, tokens[:, None]).squeeze(-1).detach()


# ================================================================================ 6. losses
# Divergences of [N, V] log-probs, over the full vocabulary: [N], in nats. Written out, since the
# arguments of F.kl_div stand the other way round. Two tokens, student (½, ½), teacher (¼, ¾):
# forward ¼ log ½ + ¾ log 3/2 = 0.131, reverse ½ log 2 + ½ log 2/3 = 0.144. The last two terms add up to
# 1 − 1. They make the gradient exactly zero where student and teacher agree: the rounding that is left
# without them, some 1e-8, AdamW scales up to full steps, and `empty` wanders off.
def forward_kl(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """KL(teacher ‖ student) = Σ_v teacher_v (log teacher_v − log student_v): the paper's D."""
    return (teacher.exp() * (teacher - student) + student.exp() - teacher.exp()).sum(-1)


def reverse_kl(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """KL(student ‖ teacher) = Σ_v student_v (log student_v − log teacher_v)."""
    return (student.exp() * (student - teacher) + teacher.exp() - student.exp()).sum(-1)


def jsd(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """½ KL(teacher ‖ m) + ½ KL(student ‖ m), with the mixture m = ½ teacher + ½ student."""
    mixture = torch.logaddexp(student, teacher) - math.log(2)
    return (forward_kl(mixture, teacher) + forward_kl(mixture, student)) / 2


DIVERGENCES = {"forward_kl": forward_kl, "reverse_kl": reverse_kl, "jsd": jsd}


def policy_gradient_loss(student: torch.Tensor, tokens: torch.Tensor, advantages: torch.Tensor) -> torch.Tensor:
    """−A log π(y_t): [N, V] log-probs, [N] tokens, [N] advantages -> [N].

    GRPO's objective with one update per batch of rollouts: the ratio π/π_old is 1, its gradient is
    ∇ log π, and there is nothing to clip.
    """
    return -advantages * student.gather(-1, tokens[:, None]).squeeze(-1)


def token_losses(model, rollouts: list[Rollout], cfg: Config):
    """Here the conditions part. Returns the student's states that predict each completion token, [N, H], each
    token's loss and advantage, [N] and [N], and the gradient of the losses' sum with respect to the states, [N, H].
    """
    completions = [r.completion for r in rollouts]
    tokens = torch.tensor([token for c in completions for token in c], device=model.device)  # [N]
    with checkpointing(model, cfg.gradient_checkpointing):
        student_states = completion_states(model, [r.prompt for r in rollouts], completions)  # [N, H]

    if cfg.condition == "grpo":
        advantages = [r.group_advantage for r in rollouts for _ in r.completion]  # the same at every token
        advantages = torch.tensor(advantages, device=model.device)  # [N]

        def grpo_loss(student_states, tokens, advantages):
            student = log_probs(model, student_states, cfg.temperature)  # [n, V]
            return policy_gradient_loss(student, tokens, advantages), advantages

        return student_states, *in_chunks(grpo_loss, cfg.chunk, student_states, tokens, advantages)

    with torch.no_grad(), adapters_off(model):  # the output layer has no adapter: one for both
        teacher_states = completion_states(model, [r.teacher_prompt for r in rollouts], completions)  # [N, H]

    def distillation_loss(student_states, tokens, teacher_states):
        student = log_probs(model, student_states, cfg.temperature)  # [n, V]
        teacher = log_probs(model, teacher_states, cfg.temperature)  # [n, V]
        return DIVERGENCES[cfg.divergence](student, teacher), token_advantages(student, teacher, tokens)

    return student_states, *in_chunks(distillation_loss, cfg.chunk, student_states, tokens, teacher_states)


# ================================================================================ 7. a training step
def train_step(model, tokenizer, optimizer, problems: list[Problem], ask, cfg: Config):
    """One update on the problems. Returns the rollouts, with their advantages, and the step's metrics.

    Raises Stop, with nothing changed, if loss or gradient is not finite.
    """
    rollouts = sample_rollouts(model, tokenizer, problems, cfg.group_size, cfg)
    give_contexts(rollouts, ask, model, tokenizer, cfg)
    trained = rollouts if cfg.condition == "grpo" else [r for r in rollouts if r.teacher_prompt is not None]

    # A mean over all tokens of the step, however it is cut: the gradient does not depend on micro_batch.
    step_tokens = sum(of_all_processes([len(r.completion) for r in trained]))
    loss = 0.0
    for start in range(0, len(trained), cfg.micro_batch):
        batch = trained[start : start + cfg.micro_batch]
        states, losses, advantages, gradient = token_losses(model, batch, cfg)
        states.backward(gradient / step_tokens)  # from the states on, through the adapters
        loss += losses.sum().item() / step_tokens
        for rollout, values in zip(batch, advantages.split([len(r.completion) for r in batch])):
            rollout.advantages = values.tolist()

    loss = sum(of_all_processes([loss]))
    rollouts = of_all_processes(rollouts)
    adapters = [p for group in optimizer.param_groups for p in group["params"]]
    if step_tokens:  # without a rollout to train on there is no gradient, and AdamW changes nothing
        add_up_gradients(adapters)
    grad_norm = nn.utils.clip_grad_norm_(adapters, cfg.max_grad_norm).item()
    if not (math.isfinite(loss) and math.isfinite(grad_norm)):
        optimizer.zero_grad()
        raise Stop(f"loss is {loss} and the gradient's norm {grad_norm}: stopped. A lower --lr may help")
    optimizer.step()
    optimizer.zero_grad()
    return rollouts, step_metrics(rollouts, loss, grad_norm)


def words(text: str) -> str:
    return " ".join(re.sub(r"</?(?:step_[0-9]+|answer)>", " ", text).split())


def step_metrics(rollouts: list[Rollout], loss: float, grad_norm: float) -> dict:
    """What a line of metrics.jsonl says of a step. Rewards, lengths and shares are means over rollouts."""
    def mean(values):
        return sum(values) / max(len(values), 1)

    advantages = [a for r in rollouts for a in r.advantages]
    taught = [r for r in rollouts if r.teacher_prompt is not None]
    criticised = [r for r in rollouts if r.critique is not None]
    pasted = [words(r.problem.solution) in words(r.critique) and not r.reward for r in criticised]
    # A wrong attempt, and no step of it was changed: the critique has the wrong step too, and at most another answer.
    changed = [first_difference(r.text, r.critique) for r in criticised if not r.reward and extract_answer(r.text)]
    return {
        "loss": loss,
        "reward": mean([r.reward for r in rollouts]),
        "grad_norm": grad_norm,
        "length": mean([len(r.completion) for r in rollouts]),
        "advantage": mean(advantages),
        "abs_advantage": mean([abs(a) for a in advantages]),
        "format": mean([keeps_format(r.text) for r in rollouts]),
        "masked": mean([not r.advantages for r in rollouts]),
        "critic_failed": mean([bool(r.critic_failure) for r in rollouts]),
        "critic_pasted": sum(pasted),  # rollouts whose critique holds the reference solution, word for word
        "critic_repeated": sum(step is None or step.name == "answer" for step in changed),
        # Tokens read or written: by the solver as it samples, by the teacher, and by the critic.
        "solver_tokens": sum(len(r.prompt) + len(r.completion) for r in rollouts),
        "teacher_tokens": sum(len(r.teacher_prompt) + len(r.completion) for r in taught),
        "critic_tokens": sum(r.critic_tokens for r in rollouts),
    }


# ================================================================================ evaluation
TEST_SEED = 2  # eval.py's default too: it prints what sd.py printed


def summarise(groups: list[list[Rollout]]) -> dict:
    """Avg@k, Pass@k and Maj@k in percent and the mean completion length in tokens, of k rollouts a problem.

    Pass@k: one is right. Maj@k: the most frequent answer is; answers that tie share the point.
    """
    totals = Counter()
    for group in groups:
        rewards = [r.reward for r in group]
        votes = Counter(a for r in group if (a := extract_answer(r.text)) is not None)
        winners = [answer for answer, n in votes.items() if n == max(votes.values())]
        right = {extract_answer(r.text) for r in group if r.reward}
        totals["avg"] += 100 * sum(rewards) / len(group)
        totals["pass"] += 100 * max(rewards)
        totals["maj"] += 100 * sum(w in right for w in winners) / max(len(winners), 1)
        totals["length"] += sum(len(r.completion) for r in group) / len(group)
    return {name: totals[name] / len(groups) for name in ("avg", "pass", "maj", "length")}


def evaluate(model, tokenizer, problems: list[Problem], k: int, seed: int, cfg: Config, title="") -> list[list[Rollout]]:
    """k rollouts of each problem: [problems][k]. The same seed draws the same random numbers."""
    torch.manual_seed(seed + 7919 * RANK)
    rollouts = of_all_processes(sample_rollouts(model, tokenizer, problems, k, cfg, title))
    return [rollouts[i : i + k] for i in range(0, len(rollouts), k)]


# ================================================================================ what a reader sees
def token_texts(tokenizer, ids: list[int]) -> list[str]:
    """What each token adds to the text: "" for one that only begins a character, and for special tokens."""
    texts, before, start = [], 0, 0
    for end in range(1, len(ids) + 1):  # decoded behind the tokens before it: some lose their space at a start
        known, text = tokenizer.batch_decode([ids[before:start], ids[before:end]], skip_special_tokens=True)
        if text.endswith("\ufffd") and end < len(ids):
            texts.append("")
        else:
            texts.append(text[len(known) :])
            before, start = start, end
    return texts


def advantage_by_step(tokenizer, rollout: Rollout) -> list[tuple]:
    """(step, [(token's text, A_t), …]) for each step and the answer, tags included, in their order."""
    texts = token_texts(tokenizer, rollout.completion)
    tokens = list(zip(itertools.accumulate(map(len, texts), initial=0), texts, rollout.advantages))
    return [(s, [(t, a) for at, t, a in tokens if s.start <= at < s.end]) for s in parse_steps(rollout.text)]


def sample_line(step: int, rollout: Rollout, tokenizer) -> dict:
    """A line of samples.jsonl: a rollout, its context, and the mean A_t of each of its steps."""
    by_step = [(s.name, [a for _, a in tokens]) for s, tokens in advantage_by_step(tokenizer, rollout)]
    return {
        "step": step,
        "problem": rollout.problem.problem,
        "completion": rollout.text,
        "reward": rollout.reward,
        "context": rollout.context,
        "critic_failure": rollout.critic_failure,
        "advantage": [[name, sum(values) / len(values)] for name, values in by_step if values],
    }


def paint(text: str, advantage: float = 0.0) -> str:
    """The text for a terminal, coloured by A_t: blue keeps the token, red changes it, white is zero."""
    text = "".join(c if c.isprintable() else " " for c in text)  # a model writes anything: no control codes
    if not sys.stdout.isatty() or "NO_COLOR" in os.environ:
        return text
    fade = 255 - int(155 * min(abs(advantage) / 5, 1))  # full colour from 5 nats on
    red, green, blue = (255, fade, fade) if advantage < 0 else (fade, fade, 255)
    return f"\x1b[30;48;2;{red};{green};{blue}m{text}\x1b[0m"


def verdicts(rollout: Rollout) -> list[str]:
    """Of each step: "right" or "WRONG", by its arithmetic; in another task, as far as the critique tells."""
    if PROBLEM.fullmatch(rollout.problem.problem):
        return ["right" if right else "WRONG" for right in judge(rollout.text)]
    steps = parse_steps(rollout.text)
    if rollout.critique is None:
        return [""] * len(steps)
    wrong = first_difference(rollout.text, rollout.critique)
    return ["right" if wrong is None or s.start < wrong.start else "WRONG" if s == wrong else "" for s in steps]


def show(title: str, model, tokenizer, problems: list[Problem], ask, cfg: Config) -> None:
    """Prints an attempt at the first problem, what the teacher sees, and the advantage of every token."""
    rollouts = [r for group in evaluate(model, tokenizer, problems, cfg.group_size, 0, cfg) for r in group]
    give_contexts(rollouts, ask, model, tokenizer, cfg)
    rollout = rollouts[0]
    rollout.advantages = [0.0] * len(rollout.completion)
    if cfg.condition == "grpo" or rollout.teacher_prompt is not None:
        with torch.no_grad():
            rollout.advantages = token_losses(model, [rollout], cfg)[2].tolist()
    grade = "right" if rollout.reward else "wrong"
    print(f"\n{title}: {rollout.problem.problem}, answered {grade}, should be {rollout.problem.answer}")
    for (step, tokens), verdict in zip(advantage_by_step(tokenizer, rollout), verdicts(rollout)):
        values = [a for _, a in tokens] or [0.0]
        text = "".join(paint(*token) for token in tokens) + " " * (26 - step.end + step.start)
        print(f"  {verdict:5}  {text}  A_t from {min(values):6.2f} to {max(values):5.2f}")
    if not parse_steps(rollout.text):
        print("  no steps:", paint(rollout.text))
    why = "there is none" if cfg.condition == "grpo" else rollout.critic_failure or "the context does not fit the model"
    print("  the teacher sees:", f"nothing: {why}" if rollout.context is None else paint(rollout.context))


# ================================================================================ the run's folder
@contextlib.contextmanager
def replacing(path: Path):
    """Yields a path beside, for a file or folder that takes this one's place when the block has ended well."""
    new, old = path.with_name(path.name + ".new"), path.with_name(path.name + ".old")
    shutil.rmtree(new, ignore_errors=True)
    yield new
    if path.is_dir():
        shutil.rmtree(old, ignore_errors=True)
        path.rename(old)
    os.replace(new, path)
    shutil.rmtree(old, ignore_errors=True)


def load(name: str, device: str):
    """(model, tokenizer) of a folder or hub id, ready to sample. Raises Stop if that fails."""
    dtype = torch.bfloat16 if device.startswith("cuda") else torch.float32
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
        model = AutoModelForCausalLM.from_pretrained(name, dtype=dtype).to(device)
    except Exception as error:  # the libraries below raise whatever they like
        raise Stop(f"cannot load the model {name}: {(str(error) or repr(error)).splitlines()[0]}") from None
    if not tokenizer.chat_template:
        raise Stop(f"the model {name} has no chat template: take an instruct or chat model")
    ends = model.generation_config.eos_token_id
    ends = tokenizer.eos_token_id if ends is None else ends
    if ends is None:
        raise Stop(f"the model {name} has no end token: its completions would never stop")
    ends = [ends] if isinstance(ends, int) else ends
    pad = ends[0] if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    # A fresh one: the model's own may hold top-k, top-p or penalties, and we score what we sample.
    model.generation_config = GenerationConfig(eos_token_id=ends, pad_token_id=pad)
    model.eval()  # no dropout, or what is scored is not what was sampled
    with torch.no_grad():
        logits = model(torch.tensor([ends], device=device)).logits.float().log_softmax(-1)
        ours = log_probs(model, completion_states(model, [ends], [ends])[:1], 1.0)
    if not torch.allclose(logits[0, -1:], ours, atol=0.5):  # bf16 rounds logits of 30 to eighths
        raise Stop(f"the model {name} changes its logits after the output layer (caps or scales them): not supported")
    return model, tokenizer


CRITIQUES = Path("runs/critiques")  # what critics answered, for every run that asks the same again


def open_critic(cfg: Config, model_name: str, model, tokenizer):
    """ask(problems, attempts, prompts) -> [Critique], of the critic that the settings name."""
    limits = cfg.critic_max_tokens, cfg.critic_batch
    if cfg.critic == "scribe":
        return scribe
    if cfg.critic.startswith(("http://", "https://")):
        answers = critic.http_critic(cfg.critic, cfg.critic_model, *limits, cfg.critic_timeout)
    elif cfg.critic == model_name:  # the solver's own base: the same weights, adapters off
        own = critic.local_critic(model, tokenizer, *limits)

        def answers(prompts):
            with adapters_off(model):
                yield from own(prompts)

    else:
        answers = critic.local_critic(*load(cfg.critic, cfg.device), *limits)
    weights = [file.stat().st_mtime_ns for file in sorted(Path(cfg.critic).glob("*.safetensors"))]  # another, once retrained
    who = json.dumps([cfg.critic, cfg.critic_model, cfg.critic_max_tokens, weights])
    return critic.remembering(answers, cfg.critic, CRITIQUES / f"{hashlib.sha256(who.encode()).hexdigest()[:12]}.jsonl")


# What a resumed run may have otherwise: how the work is done, and not what is done. But for rounding it comes to the
# same numbers, save where another gen_batch draws other random ones.
FREE = {"resume", "out", "device", "gen_batch", "micro_batch", "chunk", "gradient_checkpointing"}
FREE |= {"critic_batch", "critic_timeout"}


@contextlib.contextmanager
def open_run(cfg: Config):
    """The run's folder, for this process alone. Raises Stop if it cannot be had, or if that would harm a run there."""
    folder = Path(cfg.out)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
        if fcntl and RANK == 0:
            handle = os.open(folder, os.O_RDONLY)
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)  # gone with the process, however that ends
    except BlockingIOError:
        raise Stop(f"another run is writing to the folder {folder}: choose another --out") from None
    except OSError as error:
        raise Stop(f"cannot write to the folder {folder}: {error.strerror}") from None
    try:
        check_resume(folder, cfg)
        yield folder
    finally:
        if RANK == 0 and not any(folder.iterdir()):  # stopped before there was anything to keep
            folder.rmdir()
        if fcntl and RANK == 0:
            os.close(handle)


def check_resume(folder: Path, cfg: Config) -> None:
    """Raises Stop if the folder holds a run, and it is not this one that goes on."""
    resumable = (folder / "last" / "state.pt").exists()
    if (folder / "result.json").exists():
        raise Stop(f"{folder} holds a finished run: choose another --out, or remove it to run again")
    if cfg.resume and not resumable:
        raise Stop(f"{folder} holds no run to resume: leave --resume out to start one")
    if resumable and not cfg.resume:
        raise Stop(f"{folder} holds an unfinished run: add --resume to go on, or choose another --out")
    if cfg.resume:
        try:
            saved = dict(json.loads((folder / "config.json").read_text()))
        except (OSError, ValueError, TypeError) as error:
            raise Stop(f"cannot resume {folder}: its config.json cannot be read: {error}") from None
        now = {name: value for name, value in dataclasses.asdict(cfg).items() if name not in FREE}
        if changed := [name for name, value in now.items() if saved.get(name) != value]:
            raise Stop(f"cannot resume {folder}: it was started with another {', '.join(changed)}")


def start_logs(folder: Path, cfg: Config, model_name: str) -> None:
    """Writes config.json and empties the logs."""
    versions = {m.__name__: m.__version__ for m in (torch, transformers)} | {"python": sys.version.split()[0]}
    with replacing(folder / "config.json") as new:
        settings = dataclasses.asdict(cfg) | {"base_model": model_name, "versions": versions}
        new.write_text(json.dumps(settings, indent=2) + "\n")
    for name in ("metrics.jsonl", "samples.jsonl"):
        (folder / name).write_text("")


def log_step(folder: Path, line: dict, samples: list[dict]) -> None:
    for name, rows in ("metrics", [line]), ("samples", samples):
        with open(folder / f"{name}.jsonl", "a", encoding="utf-8") as log:
            log.writelines(json.dumps(row) + "\n" for row in rows)


@contextlib.contextmanager
def undisturbed():
    """Ctrl-C and SIGTERM wait until the block has ended: what it writes is whole."""
    waiting = []
    handlers = {s: signal.signal(s, lambda *received: waiting.append(received)) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        if waiting:
            handlers[waiting[0][0]](*waiting[0])


def save(folder: Path, model, tokenizer, optimizer, adapters, state: dict, is_best: bool) -> None:
    """Writes last/, and best/ too if this is it. Each step has a seed of its own: no random state is kept."""
    if is_best:
        with replacing(folder / "best") as new:
            model.save_pretrained(new, state_dict=merged_state_dict(model))
            tokenizer.save_pretrained(new)
    (folder / "last").mkdir(exist_ok=True)
    tensors = {"adapters": [p.data for p in adapters], "optimizer": optimizer.state_dict()}
    with replacing(folder / "last" / "state.pt") as new:
        torch.save(state | tensors, new)


def restore(folder: Path, model_name: str, optimizer, adapters) -> dict:
    """Loads last/ and drops what was logged after it. Returns the state: step, best_step, best_avg, seconds."""
    trained_from = json.loads((folder / "config.json").read_text())["base_model"]
    if trained_from != model_name:
        raise Stop(f"cannot resume {folder}: it was trained from {trained_from}, and the base is now {model_name}")
    try:
        state = torch.load(folder / "last" / "state.pt", map_location=adapters[0].device, weights_only=True)
        for adapter, value in zip(adapters, state.pop("adapters"), strict=True):
            adapter.data.copy_(value)
        optimizer.load_state_dict(state.pop("optimizer"))
        logs = {folder / name: [] for name in ("metrics.jsonl", "samples.jsonl")}
        for file, kept in logs.items():
            lines = file.read_text(encoding="utf-8").splitlines(keepends=True)
            kept += [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= state["step"]]
    except Exception as error:  # torch raises whatever it likes
        said = (str(error) or repr(error)).splitlines()[0]
        raise Stop(f"cannot resume {folder}: last/state.pt or a log is damaged: {said}") from None
    if RANK == 0:
        if (folder / "best.old").exists() and not (folder / "best").exists():  # killed between `replacing`'s renames
            (folder / "best.old").rename(folder / "best")
        for file, kept in logs.items():
            with replacing(file) as new:
                new.write_text("".join(kept), encoding="utf-8")
    return state


# ================================================================================ training
def check_lengths(model, tokenizer, problems, cfg: Config) -> None:
    """Raises Stop if the model has no room for a problem's prompt and the longest completion."""
    for problem in itertools.chain(*problems):
        [prompt] = build_prompts(tokenizer, [problem.problem], [None])
        if len(prompt) + cfg.max_new_tokens > positions(model):
            room = f"{len(prompt)} tokens of prompt and --max-new-tokens {cfg.max_new_tokens}"
            raise Stop(f"the model takes {positions(model)} tokens, less than {room}: {problem.problem[:60]!r}")


def train(cfg: Config, folder: Path, model_name: str, problems) -> dict:
    """Trains adapters on the model, keeps the best of them on validation; returns result.json's content."""
    began = time.time()
    train_set, val_set, test_set = problems
    model, tokenizer = load(model_name, cfg.device)
    check_lengths(model, tokenizer, problems, cfg)
    ask = None if cfg.condition in WITHOUT_CRITIC else open_critic(cfg, model_name, model, tokenizer)
    if cfg.gradient_checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    torch.manual_seed(cfg.seed)
    adapters = add_adapters(model, cfg.lora_rank, cfg.lora_alpha)
    optimizer = torch.optim.AdamW(adapters, lr=cfg.lr, weight_decay=0.0)
    if cfg.resume:
        state = restore(folder, model_name, optimizer, adapters)
        began -= state["seconds"]
    else:
        state = {"step": -1, "best_step": 0, "best_avg": -1.0, "seconds": 0.0}
        show("before training", model, tokenizer, val_set[:2], ask, cfg)  # a critic that is not there stops it here
        if RANK == 0:
            start_logs(folder, cfg, model_name)

    # The training problems in a new order every epoch, one epoch after another.
    rng, order = random.Random(cfg.seed), []
    while len(order) < cfg.steps * cfg.problems_per_step:
        order += rng.sample(train_set, len(train_set))
    shown = {"loss": math.nan, "reward": math.nan, "val_avg": state["best_avg"]}
    steps = range(state["step"] + 1, cfg.steps + 1)  # step 0 only validates: the base may be the best
    bar = tqdm(steps, desc=cfg.condition, initial=steps.start, total=cfg.steps + 1, disable=RANK > 0)
    for step in bar:
        line, rollouts = {"step": step}, []
        if step > 0:
            torch.manual_seed(1_000_003 * cfg.seed + step + 7919 * RANK)
            batch = order[(step - 1) * cfg.problems_per_step : step * cfg.problems_per_step]
            rollouts, metrics = train_step(model, tokenizer, optimizer, batch, ask, cfg)
            line |= metrics
            if metrics["masked"] == 1:
                tqdm.write(f"step {step}: no rollout has a teacher, so no weight was changed")
        if validates := step % cfg.eval_every == 0 or step == cfg.steps:
            groups = evaluate(model, tokenizer, val_set, cfg.val_samples, 1, cfg)
            line["val_avg"] = summarise(groups)["avg"]
        is_best = validates and line["val_avg"] > state["best_avg"]
        if is_best:
            state |= {"best_step": step, "best_avg": line["val_avg"]}
        with undisturbed():
            if RANK == 0:
                log_step(folder, line, [sample_line(step, r, tokenizer) for r in rollouts[:3]])
            if RANK == 0 and validates:
                state |= {"step": step, "seconds": time.time() - began}
                save(folder, model, tokenizer, optimizer, adapters, state, is_best)
        shown |= {name: line[name] for name in shown if name in line}
        bar.set_postfix({name: f"{value:.3g}" for name, value in shown.items()})
    trained_in = time.time() - began

    show("after training", model, tokenizer, val_set[:2], ask, cfg)
    tests = {}
    with adapters_off(model):
        for name, tested in ("base", model), ("test", load(str(folder / "best"), cfg.device)[0]):
            groups = evaluate(tested, tokenizer, test_set, cfg.test_samples, TEST_SEED, cfg, f"testing, {name}")
            tests[name] = summarise(groups)
    result = {"condition": cfg.condition, "seed": cfg.seed, "steps": cfg.steps, "best_step": state["best_step"]}
    result |= tests | {"k": cfg.test_samples, "best_val_avg": state["best_avg"], "train_seconds": trained_in}
    result["seconds"] = time.time() - began
    if RANK == 0:
        with replacing(folder / "result.json") as new:
            new.write_text(json.dumps(result, indent=2) + "\n")
    return result


# ================================================================================ the embedded base model
BASE = {"steps": 1200, "batch": 32, "lr": 2.5e-3, "known_facts": 16}
ARCHITECTURE = {
    "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 3, "num_attention_heads": 8,
    "num_key_value_heads": 8, "head_dim": 16, "max_position_embeddings": 512, "initializer_range": 0.06,
}  # fmt: skip


def embedded_tokenizer():
    """One token for a tag, a digit, a symbol, a word, and for each of the two prompt texts as a whole."""
    words = ["<|pad|>", "<|end|>", "<|user|>", "<|assistant|>", "<unk>", SOLVE, HELP, "<answer>", "</answer>"]
    words += [f"<{slash}step_{n}>" for n in range(1, 10) for slash in ("", "/")]
    words += list("0123456789.:" + OWN + REFERENCE)
    words += ["Every", "Step", "step", "is", "correct", "wrong", "Correct", "Answer"]
    core = Tokenizer(models.WordLevel({word: n for n, word in enumerate(words)}, unk_token="<unk>"))
    no_spaces = pre_tokenizers.Split(Regex(r"\s+"), "removed")
    pieces = pre_tokenizers.Split(Regex(r"</?\w+>|[0-9]|[A-Za-z]+|."), "isolated")
    core.pre_tokenizer = pre_tokenizers.Sequence([no_spaces, pieces])
    core.decoder = decoders.Fuse()
    special = {"pad_token": "<|pad|>", "eos_token": "<|end|>", "unk_token": "<unk>"}
    special["additional_special_tokens"] = ["<|user|>", "<|assistant|>"]
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, **special)
    tokenizer.add_tokens([SOLVE, HELP])
    tokenizer.chat_template = (
        "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    return tokenizer


def pretraining_sample(rng, known, drift: float, with_context: bool):
    """(problem, context or None, response, index of the response's step whose value is left out of the loss or None).

    Without a context the problem is made of facts the base shall know. With one, the products that it
    tells have values made up for this sample, so that they can only be read there. The response goes
    its own way, but its steps slip into the reference's: one in ten, and a share `drift` of them when shown a
    reference; where the context holds its own walk, it is followed step by step. Almost half of all
    responses hold a wrong value and go on from it, as language models go on from what they wrote.
    """
    def slipping(rate):
        return [REFERENCE if rng.random() < rate else OWN for _ in range(5)]

    terms, ways, made_up, context = [rng.choice(known) for _ in range(3)], slipping(0.1), {}, None
    wrong = rng.randrange(5) if rng.random() < 0.5 else 5  # there are five steps: 5 is none of them

    def work_out(ways, slip=None):
        return join_steps(*carry_on(terms, [], ways, lambda a, b: made_up.get((a, b), times(a, b)), slip))

    if with_context and rng.random() < 0.65:  # a worked solution
        terms = [(rng.randrange(10), rng.randrange(10)) for _ in range(3)]
        made_up = {term: rng.randrange(10) for term in terms}
        if rng.random() < 1 / 3:
            context = work_out(ways)
        else:
            context, ways = work_out([REFERENCE]), slipping(drift)
    elif with_context:  # less than a solution, or more; what it does not tell, the base knows
        n = rng.randrange(6)  # the step that it is about
        kind = rng.choice(["begun", "omit", "omit", "quote", "quote", "answer"])
        told = {"begun": slice(n + 1), "omit": slice(n, n + 1), "quote": slice(5), "answer": slice(0)}[kind]
        calculations = map(read_step, carry_on(terms, [], ways)[0][told])
        made_up = {(a, b): rng.randrange(10) for symbol, a, b, _ in calculations if symbol in "*×"}
        walk = work_out(ways)
        steps = parse_steps(walk)
        attempt = work_out(ways, slip=(n, (int(steps[n].text[-1]) + rng.randrange(1, 10)) % 10))
        if kind == "quote":
            wrong = n  # whether a quoted error is copied or mended is not taught: that value is left out
        context = {
            "begun": walk[: steps[n].end], "omit": omit(None, attempt, walk),
            "quote": quote(None, attempt, walk), "answer": walk[steps[5].start :],
        }[kind]  # fmt: skip
    response = work_out(ways, slip=(wrong, rng.randrange(10)))
    return "+".join(f"{a}*{b}" for a, b in terms), context, response, wrong if wrong < 5 else None


def pretraining_loss(model, tokenizer, samples) -> torch.Tensor:
    """Cross-entropy of the responses but for wrong values: the base goes on from them, it does not make them."""
    problems, contexts, responses, wrong_steps = zip(*samples)
    prompts = build_prompts(tokenizer, problems, contexts)
    responses = [r + [tokenizer.eos_token_id] for r in tokenizer(list(responses))["input_ids"]]
    states = completion_states(model, prompts, responses)  # [N, H]
    tokens = torch.tensor(sum(responses, []), device=model.device)
    keep, start = torch.ones_like(tokens, dtype=torch.bool), 0
    for response, wrong in zip(responses, wrong_steps):
        if wrong is not None:
            keep[start + 7 * wrong + 5] = False  # a step is 7 tokens: <step_1> 3 * 7 = 1 </step_1>
        start += len(response)
    return -log_probs(model, states[keep], 1.0).gather(-1, tokens[keep, None]).mean()


def build_base(folder: Path, cfg: Config) -> None:
    """Pretrains the embedded base model and writes it into the folder."""
    torch.manual_seed(cfg.base_seed)
    rng, tokenizer = random.Random(cfg.base_seed), embedded_tokenizer()
    known = rng.sample(list(itertools.product(range(10), repeat=2)), BASE["known_facts"])
    architecture = Qwen3Config(
        **ARCHITECTURE, vocab_size=len(tokenizer), tie_word_embeddings=True,
        bos_token_id=None, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    model = Qwen3ForCausalLM(architecture).to(cfg.device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=BASE["lr"])
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, BASE["lr"], total_steps=BASE["steps"])
    bar = tqdm(range(BASE["steps"]), desc="base model, built once", disable=RANK > 0)
    for step in bar:
        with_context = step % 3 > 0  # two batches of three
        samples = [pretraining_sample(rng, known, cfg.drift, with_context) for _ in range(BASE["batch"])]
        loss = pretraining_loss(model, tokenizer, samples)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 20 == 0:
            bar.set_postfix(loss=f"{loss.item():.3f}")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def embedded_base(cfg: Config) -> str:
    """The folder of the embedded base model of this recipe; builds it if it is not there."""
    made_of = (embedded_tokenizer, build_prompts, pretraining_sample, pretraining_loss, build_base, carry_on, omit)
    made_of += (quote, correction, first_difference, read_step, times, join_steps, completion_states, log_probs)
    recipe = repr((BASE, ARCHITECTURE, cfg.drift, cfg.base_seed, SOLVE, HELP, OWN, REFERENCE))
    recipe += "".join(map(inspect.getsource, made_of))  # edit the recipe, and it is another base
    folder = Path(cfg.base_dir) / hashlib.sha256(recipe.encode()).hexdigest()[:12]
    if not folder.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        # Built beside and renamed: an interrupted build leaves nothing, and of two at once one wins.
        with tempfile.TemporaryDirectory(dir=folder.parent, ignore_cleanup_errors=True) as beside:
            build_base(Path(beside) / "model", cfg)
            with contextlib.suppress(OSError):  # the other one was faster
                (Path(beside) / "model").rename(folder)
    return str(folder)


# ================================================================================ command line
def parse_args(argv=None) -> Config:
    """The settings on the command line. Raises Stop on one that is unknown or makes no sense."""
    parser = argparse.ArgumentParser(
        description="Self-distillation from feedback: trains, tests, and leaves a run's folder.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter, allow_abbrev=False,
    )

    def refuse(message):  # argparse would print the whole usage, thirty flags, above it
        raise Stop(f"{message} (see --help)")

    parser.error = refuse
    for f in dataclasses.fields(Config):
        flag = f"--{f.name.replace('_', '-')}"
        kind = {"action": "store_true"} if isinstance(f.default, bool) else {"type": type(f.default)}
        parser.add_argument(flag, default=f.default, help=f.metadata["help"], **kind)
    return settled(Config(**vars(parser.parse_args(argv))))


def print_result(cfg: Config, result: dict) -> None:
    k, trained = result["k"], f"{cfg.condition}, best at step {result['best_step']}"
    print(f"\n{f'test problems, {k} samples each':40}  Pass@{k}   Maj@{k}   Avg@{k}   tokens")
    for name, row in ("base", result["base"]), (trained, result["test"]):
        print(f"{name:40}" + "".join(f"{row[column]:9.2f}" for column in ("pass", "maj", "avg", "length")))
    print(f"{result['train_seconds']:.0f} s, {result['seconds']:.0f} s with testing. The run is in {cfg.out}.")


def terminated(*_):
    raise KeyboardInterrupt("terminated")


def main(argv=None) -> None:
    sys.stdout.reconfigure(errors="replace")  # a model may write what the terminal cannot show
    transformers.utils.logging.disable_progress_bar()
    signal.signal(signal.SIGTERM, terminated)
    out = Path(os.devnull)
    if RANK > 0:
        sys.stdout = open(os.devnull, "w", encoding="utf-8")
    try:
        cfg = parse_args(argv)
        if PROCESSES > 1:
            if cfg.device.startswith("cuda"):
                torch.cuda.set_device(cfg.device)
            dist.init_process_group("nccl" if cfg.device.startswith("cuda") else "gloo")
        print(" ".join(f"{name}={value}" for name, value in dataclasses.asdict(cfg).items() if value != ""))
        problems = problem_sets(cfg)
        with open_run(cfg) as out:
            print_result(cfg, train(cfg, out, cfg.model or embedded_base(cfg), problems))
        if PROCESSES > 1:
            dist.destroy_process_group()  # left to the interpreter's end, it now and then aborts there
    except (Stop, KeyboardInterrupt, torch.OutOfMemoryError, OSError) as stop:
        said = str(stop) or "interrupted"
        if isinstance(stop, torch.OutOfMemoryError):
            said = "out of memory: lower --gen-batch if it was sampling, else --micro-batch, or use --gradient-checkpointing"
        if (out / "last" / "state.pt").exists():
            said += f": the best so far is in {out / 'best'}, and --resume goes on"
        if not isinstance(stop, KeyboardInterrupt):
            print(f"sd.py: {said}", file=sys.stderr)
            sys.exit(2)
        print(f"\nsd.py: {said}", file=sys.stderr)  # below the bar
        sys.exit(143 if str(stop) else 130)


if __name__ == "__main__":
    main()
