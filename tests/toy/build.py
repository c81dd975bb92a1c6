"""Builds the toy: a tiny language model, its tokenizer, and its problems.

    python tests/toy/build.py --drift 0.4 --seed 1 --out runs/toy-0.4
    python sd.py --model runs/toy-0.4 --data runs/toy-0.4 --critic runs/toy-0.4/scribe.py \\
        --lr 4e-3 --max-new-tokens 64

The model is pretrained on problems of scribe.py, with and without a context in the prompt. It
learns only some of the times tables. Three ingredients make it behave as large models do:

- If the prompt holds a worked solution, its products have made-up values. Only the prompt shows
  them, so the model learns to read its context.
- Half of all responses contain a wrong value, masked in the loss, and continue from it. So the
  model follows its own prefix, errors included.
- Each step goes the reference's way with probability `drift` if the prompt holds a reference,
  otherwise 0.1.
"""

import argparse
import itertools
import json
import random
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from torch.nn.utils.rnn import pad_sequence
from torch.optim.lr_scheduler import OneCycleLR
from tqdm import tqdm
from transformers import GenerationConfig, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parents[1]), str(HERE)]

from scribe import OWN, REFERENCE, calculate, join_steps, read_step, work_out  # noqa: E402

import critic  # noqa: E402
import sd  # noqa: E402

FACTS = list(itertools.product(range(1, 10), repeat=2))  # the times tables
WORDS = ["product", "sum", "of", "and", "is", "*", "+", "=", ".", ":"]
WORDS += ["Every", "Step", "step", "correct", "wrong", "Correct", "Answer"]
KNOWN = 14  # products the model knows, of the 36 without a factor 1 (2 * 3 and 3 * 2 count as one)
LARGEST = 3 * 9 * 9  # the largest answer
PROBLEMS = {"train": 282, "val": 50, "test": 100}
STEPS, BATCH = 3000, 32
MATRIX_LR, OTHER_LR = 0.06, 1e-2  # of Muon, and of AdamW for embeddings and norms
ARCHITECTURE = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 32,
    "max_position_embeddings": 512,
    "initializer_range": 0.06,
    "tie_word_embeddings": True,
}


# ================================================================================ tokenizer
def build_tokenizer() -> PreTrainedTokenizerFast:
    """A token for each number, symbol, word and tag, and one for each of sd.py's instructions."""
    words = ["<|pad|>", "<|end|>", "<|user|>", "<|assistant|>", "<unk>", sd.SOLVE, sd.HELP]
    tags = ["answer"] + [f"step_{n}" for n in range(1, 10)]
    words += [f"<{slash}{tag}>" for tag in tags for slash in ("", "/")]
    words += WORDS + [str(number) for number in range(LARGEST + 1)]
    vocabulary = {word: n for n, word in enumerate(words)}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    no_spaces = pre_tokenizers.Split(Regex(r"\s+"), "removed")
    pieces = pre_tokenizers.Split(Regex(r"</?\w+>|[0-9]+|[A-Za-z]+|."), "isolated")
    core.pre_tokenizer = pre_tokenizers.Sequence([no_spaces, pieces])
    # Decoding puts a space before every token, then drops those inside tags and before . and :
    spaced = decoders.WordPiece(prefix="##", cleanup=False)
    no_space = Regex(r" (?=</|[.:])|(?<=<answer>|<step_[1-9]>) ")
    core.decoder = decoders.Sequence([spaced, decoders.Fuse(), decoders.Replace(no_space, "")])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<|pad|>",
        eos_token="<|end|>",
        unk_token="<unk>",
        additional_special_tokens=["<|user|>", "<|assistant|>"],
        clean_up_tokenization_spaces=False,
    )
    tokenizer.add_tokens([sd.SOLVE, sd.HELP])
    tokenizer.chat_template = (
        "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    return tokenizer


# ================================================================================ problems
def write_problem(terms: list) -> str:
    return "+".join(f"{a}*{b}" for a, b in terms)


def draw_problems() -> list[dict]:
    """All problems, without duplicates and the same in every build."""
    rng, rows = random.Random("problems"), {}
    while len(rows) < sum(PROBLEMS.values()):
        terms = rng.choices(FACTS, k=3)
        steps, answer = work_out(terms, [REFERENCE])
        row = {"problem": write_problem(terms), "solution": join_steps(steps, answer)}
        rows[row["problem"]] = row | {"answer": str(answer)}
    return list(rows.values())


# ================================================================================ pretraining
# Sampling weights. reference, own: a solution in the reference's or the response's way; begun,
# some: its first or random steps; omit, quote: as in sd.py, 0 or 1 errors; answer: its answer.
CONTEXTS = {"reference": 9, "own": 4, "begun": 1, "some": 1, "omit": 2, "quote": 2, "answer": 1}


@dataclass
class Sample:
    statement: str
    context: str | None
    response: str
    masked: list[int]  # steps of the response whose value is left out of the loss; the first is 1


def draw_unknown(rng: random.Random) -> list:
    """The products that the model does not learn."""
    known = rng.sample([(a, b) for a, b in FACTS if 1 < a <= b], KNOWN)
    return [fact for fact in FACTS if 1 not in fact and tuple(sorted(fact)) not in known]


def draw_value(rng: random.Random, symbol: str) -> int:
    """A value that a product, or a sum, of some problem has."""
    products = [a * b for a, b in rng.choices(FACTS, k=3)]
    return products[0] if symbol == "*" else sum(products[: rng.choice([2, 3])])


def draw_ways(rng: random.Random, rate: float) -> list:
    return rng.choices([REFERENCE, OWN], [rate, 1 - rate], k=5)


def solve(rng: random.Random, terms: list, ways: list, made_up: dict, wrong: int = 0) -> str:
    """A solution with made-up products, and with a wrong value in step `wrong`; 0: none."""
    number = itertools.count(1)

    def made_up_value(symbol, a, b):
        right = calculate(symbol, a, b)
        if symbol == "*":
            right = made_up.get((a, b), right)
        value, is_wrong = right, next(number) == wrong
        while is_wrong and value == right:
            value = draw_value(rng, symbol)
        return value

    return join_steps(*work_out(terms, ways, made_up_value))


def draw_sample(rng: random.Random, unknown: list, drift: float, with_context: bool) -> Sample:
    """A problem, perhaps with a context, and a response.

    Products that are unknown or shown in the context get made-up values; the others are right.
    """
    terms, ways, context = rng.choices(FACTS, k=3), draw_ways(rng, 0.1), None
    kind = rng.choices(list(CONTEXTS), CONTEXTS.values())[0] if with_context else "none"
    context_step = rng.randint(1, 6)  # the step that the context is about; 6 is the answer
    shown_steps = {
        "none": [],
        "begun": range(1, context_step + 1),
        "some": sorted(rng.sample(range(1, 7), k=rng.randint(1, 5))),
        "omit": [context_step],
        "answer": [6],
    }.get(kind, range(1, 7))
    steps = map(read_step, work_out(terms, ways)[0])
    facts = {n: (step["a"], step["b"]) for n, step in enumerate(steps, 1) if step.symbol == "*"}
    shown_facts = [fact for n, fact in facts.items() if n in shown_steps]
    made_up = {fact: draw_value(rng, "*") for fact in terms if fact in shown_facts + unknown}
    masked = [n for n, fact in facts.items() if fact in made_up and fact not in shown_facts]

    walk = solve(rng, terms, ways, made_up)
    if kind == "reference":
        context, ways = solve(rng, terms, [REFERENCE], made_up), draw_ways(rng, drift)
    elif kind in ("omit", "quote"):
        attempt = solve(rng, terms, ways, made_up, context_step)
        context = sd.CONTEXTS[kind](SimpleNamespace(text=attempt, critique=walk))
    elif with_context:
        parts = [walk[s.start : s.end] for s in critic.parse_steps(walk)]
        context = " ".join(parts[n - 1] for n in shown_steps)
    wrong = rng.randint(1, 10)  # above 5: none
    if kind == "quote":
        wrong = context_step  # the base is not taught to copy the error, nor to correct it
    response = solve(rng, terms, ways, made_up, wrong)
    masked += [wrong] if wrong <= 5 else []
    return Sample(write_problem(terms), context, response, masked)


def encode(tokenizer, samples: list[Sample]) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and labels, right-padded; the label -100 marks what is not in the loss."""
    prompts = sd.encode_chats(tokenizer, [sd.solver_message(s, s.context) for s in samples])
    ids, labels = [], []
    for prompt, sample in zip(prompts, samples, strict=True):
        response = tokenizer(sample.response + tokenizer.eos_token)["input_ids"]
        targets = list(response)
        for n in sample.masked:
            end_tag = tokenizer.convert_tokens_to_ids(f"</step_{n}>")
            targets[response.index(end_tag) - 1] = -100
        ids.append(torch.tensor(prompt + response))
        labels.append(torch.tensor([-100] * len(prompt) + targets))
    pad = tokenizer.pad_token_id
    return pad_sequence(ids, True, pad), pad_sequence(labels, True, -100)


def pretrain(tokenizer, seed: int, drift: float) -> Qwen3ForCausalLM:
    torch.manual_seed(seed)
    rng = random.Random(seed)
    unknown = draw_unknown(rng)
    tokens = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id}
    config = Qwen3Config(**ARCHITECTURE, **tokens, vocab_size=len(tokenizer), bos_token_id=None)
    model = Qwen3ForCausalLM(config)
    matrices = [p for p in model.model.layers.parameters() if p.ndim == 2]
    others = [p for p in model.parameters() if all(p is not m for m in matrices)]
    optimizers = [
        torch.optim.Muon(matrices, lr=MATRIX_LR, weight_decay=0.03),
        torch.optim.AdamW(others, lr=OTHER_LR),
    ]
    schedules = [
        OneCycleLR(o, o.defaults["lr"], total_steps=STEPS, cycle_momentum=False) for o in optimizers
    ]
    bar = tqdm(range(STEPS), desc="pretraining")
    for step in bar:
        with_context = step % 3 > 0  # two batches in three
        samples = [draw_sample(rng, unknown, drift, with_context) for _ in range(BATCH)]
        ids, labels = encode(tokenizer, samples)
        loss = model(input_ids=ids, labels=labels, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for part in (*optimizers, *schedules):
            part.step()
        model.zero_grad()
        if step % 20 == 0:
            bar.set_postfix(loss=f"{loss.item():.3f}")
    model.generation_config = GenerationConfig(**tokens)
    return model.to(torch.bfloat16)


# ================================================================================ command line
def main() -> None:
    parser = argparse.ArgumentParser(description="Builds a toy: model, tokenizer and problems.")
    parser.add_argument("--drift", type=float, default=0.8, help="imitation rate, 0 to 1")
    parser.add_argument("--seed", type=int, default=0, help="changes weights and known facts")
    parser.add_argument("--out", type=Path, required=True, help="folder; must be new or empty")
    args = parser.parse_args()
    if not 0 <= args.drift <= 1:
        parser.error(f"--drift is {args.drift}: it must be between 0 and 1")
    if args.out.exists() and (not args.out.is_dir() or any(args.out.iterdir())):
        parser.error(f"--out {args.out} exists and is not an empty folder")
    args.out.mkdir(parents=True, exist_ok=True)
    tokenizer = build_tokenizer()
    model = pretrain(tokenizer, args.seed, args.drift)
    model.save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)
    rows = draw_problems()
    for name, number in PROBLEMS.items():
        lines = [json.dumps(row) + "\n" for row in rows[:number]]
        (args.out / f"{name}.jsonl").write_text("".join(lines))
        rows = rows[number:]
    shutil.copy(HERE / "scribe.py", args.out)


if __name__ == "__main__":
    main()
