"""Prepares a small pretrained chat model for sd.py, on sums that it finds hard.

    python tests/sums/prepare.py --model HuggingFaceTB/SmolLM2-135M-Instruct --out runs/sums-1
    python tests/sums/prepare.py --model runs/sums-1 --steps 24 --wrong-share 0.9 --seed 1 \\
        --out runs/sums
    python sd.py --model runs/sums --data runs/sums --critic tests/sums/scribe.py \\
        --lr 1e-4 --max-new-tokens 110 --out runs/sums-critique

On a CPU with AMX, `--dtype bfloat16` makes each command faster; on one without, slower.

Large chat models keep to a format, read a context, and continue from their own errors. A small one
has to be taught that, by a few steps of fine-tuning on random sums:

- A third of the prompts are the student's. The others are the teacher's and contain a context: a
  solution that goes the same way as the response, or a reference solution. A response goes the
  reference's way with probability `FOLLOW` if the prompt has a reference, otherwise `SLIP`.
- A share of the responses (`--wrong-share`) contain a wrong value. It is masked in the loss, and
  the steps after it continue from it. Without such responses, the teacher follows its context
  where it should continue from the student's error.

The folder then holds the model, its tokenizer, and train, val and test.jsonl.
"""

import argparse
import random
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.optim.lr_scheduler import LambdaLR
from tqdm import tqdm

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parents[1]), str(HERE)]

from problems import draw_problems, draw_terms, make_problem, write_problems  # noqa: E402
from scribe import OWN, REFERENCE, join_steps, judge, work_out  # noqa: E402

import sd  # noqa: E402
from critic import Problem  # noqa: E402

PLAIN = {"text": "{}", "gap": " "}  # a problem is the sum alone
FOLLOW, SLIP = 0.9, 0.1
STEPS, WARM_UP, BATCH, LEARNING_RATE = 45, 10, 8, 1e-4


def solve(terms: list[int], way: str, add=sum) -> str:
    return join_steps(*work_out((terms, []), way, add))


# ================================================================================ fine-tuning
@dataclass
class Sample:
    problem: Problem
    context: str | None
    response: str
    masked: list[tuple[int, int]]  # response[start:end] of wrong values, left out of the loss


def change_digit(rng: random.Random, value: int) -> int:
    """A plausible wrong value: one digit differs."""
    digits = list(str(value))
    at = rng.randrange(len(digits))
    digits[at] = rng.choice([d for d in "0123456789" if d != digits[at] and (at or d != "0")])
    return int("".join(digits))


def draw_sample(rng: random.Random, args, with_context: bool) -> Sample:
    """A sum, perhaps with a context, and a response, perhaps with a wrong value."""
    terms = draw_terms(rng, args)
    kind = rng.choice(["own", "reference"]) if with_context else "none"
    way = REFERENCE if rng.random() < (FOLLOW if kind == "reference" else SLIP) else OWN
    context = {"none": None, "own": solve(terms, way), "reference": solve(terms, REFERENCE)}[kind]
    steps = len(work_out((terms, []), way)[0])
    wrong = rng.randrange(steps) if rng.random() < args.wrong_share else None
    number = iter(range(steps))

    def add(operands):
        value = sum(operands)
        return change_digit(rng, value) if next(number) == wrong else value

    problem, response = make_problem(terms, **PLAIN), solve(terms, way, add)
    return Sample(problem, context, response, [span for span in judge(problem, response) if span])


def encode(tokenizer, samples: list[Sample], end: int) -> tuple[list, list, list]:
    """Token ids of prompts and responses, end token included, and masks of the trained tokens."""
    prompts = sd.encode_chats(tokenizer, [sd.solver_message(s.problem, s.context) for s in samples])
    responses, trained = [], []
    for sample in samples:
        options = {"add_special_tokens": False, "return_offsets_mapping": True}
        encoding = tokenizer(sample.response, **options)
        spans = encoding["offset_mapping"]
        keep = [all(b <= s or e <= a for s, e in sample.masked) for a, b in spans]
        responses.append([*encoding["input_ids"], end])
        trained.append([*keep, True])
    return prompts, responses, trained


def fine_tune(model, tokenizer, args) -> None:
    """Full fine-tuning; the loss is the mean over all trained tokens of a batch."""
    torch.manual_seed(args.seed)
    rng, end = random.Random(args.seed), model.generation_config.eos_token_id[0]
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.0)
    rise, fall = min(WARM_UP, args.steps), max(args.steps - WARM_UP, 1)
    schedule = LambdaLR(optimizer, lambda n: min((n + 1) / rise, (args.steps - n) / fall))
    bar = tqdm(range(args.steps), "fine-tuning")
    for step in bar:
        with_context = step % 3 > 0  # two batches in three
        samples = [draw_sample(rng, args, with_context) for _ in range(BATCH)]
        prompts, responses, trained = encode(tokenizer, samples, end)
        with torch.autocast(model.device.type, torch.bfloat16, args.dtype == "bfloat16"):
            states = sd.hidden_states(model, prompts, responses)  # [N, H]
            keep = torch.tensor(sum(trained, []), device=model.device)  # [N]
            tokens = torch.tensor(sum(responses, []), device=model.device)  # [N]
            log_probs = sd.log_probs(model, states[keep], 1.0)  # [trained, V]
        loss = F.nll_loss(log_probs, tokens[keep])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        bar.set_postfix(loss=f"{loss.item():.3f}")


# ================================================================================ command line
def main() -> None:
    defaults = sd.parse_args([])
    parser = argparse.ArgumentParser(description="Prepares a chat model and a data set of sums.")
    parser.add_argument("--model", required=True, help="folder or hub id of a chat model")
    parser.add_argument("--out", type=Path, required=True, help="folder; must be new or empty")
    parser.add_argument("--wrong-share", type=float, default=0.6, help="share with errors, 0 to 1")
    parser.add_argument("--terms", type=int, default=4, help="numbers in a sum")
    parser.add_argument("--digits", type=int, default=2, help="digits of each number")
    parser.add_argument("--steps", type=int, default=STEPS, help="fine-tuning steps")
    parser.add_argument("--seed", type=int, default=0, help="of the fine-tuning, not the problems")
    dtypes = ["float32", "bfloat16"]
    parser.add_argument("--dtype", choices=dtypes, default=defaults.dtype, help="matrix products")
    args = parser.parse_args()
    if not 0 <= args.wrong_share <= 1:
        parser.error(f"--wrong-share is {args.wrong_share}: it must be between 0 and 1")
    if args.out.exists() and (not args.out.is_dir() or any(args.out.iterdir())):
        parser.error(f"--out {args.out} exists and is not an empty folder")
    with sd.command_line("prepare.py"):
        model, tokenizer = sd.load_model(args.model, defaults.device, "float32")
        fine_tune(model, tokenizer, args)
        model.to(torch.bfloat16).save_pretrained(args.out)
        tokenizer.save_pretrained(args.out)
        write_problems(draw_problems(args, **PLAIN), args.out)


if __name__ == "__main__":
    main()
