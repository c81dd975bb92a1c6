"""Speed and memory: of your own model, or each as a ratio of two things measured in one process.

python tests/bench.py fit MODEL ...   does it fit? one step of sd.py with these flags, see bench_fit
python tests/bench.py step       the training step against its bare parts
python tests/bench.py loss       the loss in chunks against the loss in one piece (12 GB)
python tests/bench.py trl        grpo without sampling, against TRL; needs `pip install trl peft`
"""

import itertools
import resource
import statistics
import sys
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    Qwen3Config,
    Qwen3ForCausalLM,
)

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import critic  # noqa: E402
import sd  # noqa: E402

SHAPES = {
    "toy": {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 3, "head_dim": 16},
    "25M": {"hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 8, "head_dim": 64},
}


def clock(*functions, repeats=5):
    """Median seconds of each function; they take turns, so that a busy machine slows them all."""
    times = [[] for _ in functions]
    for _ in range(repeats + 1):
        for function, mine in zip(functions, times, strict=True):
            began = time.perf_counter()
            function()
            mine.append(time.perf_counter() - began)
    return [statistics.median(mine[1:]) for mine in times]  # the first turn warms up


def peak(function):
    """Bytes above those resident before. A process has one peak: what needs less comes first."""
    before = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    function()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before


def network(name, vocabulary=None):
    """(untrained model, the toy's tokenizer); no end token, so every completion has full length."""
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(sd.TOY)
    heads = {"num_attention_heads": 8, "num_key_value_heads": 8, "max_position_embeddings": 4096}
    heads["tie_word_embeddings"] = True
    config = Qwen3Config(vocab_size=vocabulary or len(tokenizer), **heads, **SHAPES[name])
    model = Qwen3ForCausalLM(config).eval()
    pad = tokenizer.pad_token_id
    model.generation_config = GenerationConfig(eos_token_id=[-1], pad_token_id=pad)
    tokenizer.model_max_length = 4096
    return model, tokenizer


def bench_step():
    for name in SHAPES:
        model, tokenizer = network(name)
        cfg = sd.parse_args(["--max-new-tokens=48", "--lr=1e-9"])
        optimizer = torch.optim.AdamW(sd.add_adapters(model, 64, 128.0), lr=cfg.lr)
        problems = critic.load_problems(cfg.data)[0][: cfg.problems_per_step]
        walks = [critic.Critique(problem.solution) for problem in problems]
        messages = [[sd.solver_message(p), sd.solver_message(p, p.solution)] for p in problems]
        own, taught = (sd.encode_chats(tokenizer, side) for side in zip(*messages, strict=True))
        own, taught = torch.tensor(own), torch.tensor(taught)

        def step(parts=(model, tokenizer, optimizer, problems), walks=walks, cfg=cfg):
            torch.manual_seed(0)
            sd.train_step(*parts, lambda rollouts, messages: walks, cfg)

        def bare(model=model, own=own, taught=taught):
            torch.manual_seed(0)
            sampling = {"do_sample": True, "top_k": 0, "max_new_tokens": 48}
            output = model.generate(own, attention_mask=torch.ones_like(own), **sampling)
            sampled = output[:, own.shape[1] :]
            with torch.no_grad(), sd.adapters_off():
                ids = torch.cat([taught, sampled], 1)
                teacher = model(ids, use_cache=False).logits[:, taught.shape[1] - 1 : -1]
            ids = torch.cat([own, sampled], 1)
            student = model(ids, use_cache=False).logits[:, own.shape[1] - 1 : -1]
            pair = student.log_softmax(-1), teacher.log_softmax(-1)
            F.kl_div(*pair, log_target=True, reduction="sum").backward()

        whole, parts = clock(step, bare)
        print(f"{name}: step / (generate, teacher, student, backward) {whole / parts:.2f}")


def bench_loss(positions=2048, hidden=1024, vocabulary=151_936):
    """The real code on a model that is an output layer only: its hidden states are given."""
    torch.manual_seed(0)
    head = torch.nn.Linear(hidden, vocabulary, bias=False).requires_grad_(False)
    config = SimpleNamespace(get_text_config=lambda: None)
    model = SimpleNamespace(device="cpu", get_output_embeddings=lambda: head, config=config)
    states = torch.randn(positions, hidden)
    sd.hidden_states = lambda *_: states.clone().requires_grad_(torch.is_grad_enabled())
    rollout = sd.Rollout(None, [], [0] * positions, "", 0.0)

    def run(chunk):
        sd.accumulate_gradients(model, [rollout], positions, sd.parse_args([f"--chunk={chunk}"]))

    functions = partial(run, sd.parse_args([]).chunk), partial(run, positions)
    memory = peak(functions[0]) / peak(functions[1])
    seconds = clock(*functions, repeats=1)
    print(f"loss in chunks / in one piece: memory {memory:.2f}, time {seconds[0] / seconds[1]:.2f}")


def bench_trl(count=32, prompt_length=32, length=128, vocabulary=49_152):
    """50M parameters, the same rollouts. By default TRL recomputes activations; we time both."""
    from datasets import Dataset
    from peft import LoraConfig
    from trl import GRPOConfig, GRPOTrainer

    sd.is_correct = lambda text, answer: len(text) % 2 == 0  # some reward
    problems = critic.load_problems(sd.TOY)[0][: count // 8]
    prompts = [[5 + n] * prompt_length for n in range(count // 8) for _ in range(8)]
    completions = [[5 + (7 * n * t) % 200 for t in range(length)] for n in range(count)]
    fixed = {"prompt_ids": prompts, "completion_ids": completions, "logprobs": None}
    for recompute in (True, False):
        model, tokenizer = network("25M", vocabulary)
        options = {"per_device_train_batch_size": count, "max_completion_length": length}
        options |= {"use_cpu": True, "bf16": False, "gradient_checkpointing": recompute}
        options |= {"report_to": "none", "save_strategy": "no", "output_dir": "runs/trl"}
        trainer = GRPOTrainer(
            model,
            reward_funcs=lambda completions, **_: [float(len(c) % 2 == 0) for c in completions],
            args=GRPOConfig(**options, max_steps=1, disable_tqdm=True),
            train_dataset=Dataset.from_list([{"prompt": p.statement} for p in problems]),
            processing_class=tokenizer,
            peft_config=LoraConfig(r=64, lora_alpha=128, target_modules="all-linear"),
            rollout_func=lambda prompts, trainer: fixed,
        )
        model, tokenizer = network("25M", vocabulary)
        cfg = sd.parse_args(["--condition=grpo", f"--micro-batch={count}"])
        optimizer = torch.optim.AdamW(sd.add_adapters(model, 64, 128.0), lr=1e-9)
        sd.encode_chats = lambda *_: prompts
        sd.generate = lambda *_: completions
        ours = partial(sd.train_step, model, tokenizer, optimizer, problems, None, cfg)
        theirs, ours = clock(trainer.train, ours, repeats=3)
        print(f"TRL / ours, TRL recomputes activations {recompute}: {theirs / ours:.2f}")


class Meter:
    """Seconds and peak memory of each part of a step."""

    def __init__(self, device):
        self.cuda, self.parts, self.label = "cuda" in device, {}, "peak"

    def reset(self):
        if self.cuda:
            return torch.cuda.reset_peak_memory_stats()
        try:
            Path("/proc/self/clear_refs").write_text("5")  # Linux: resets the resident peak
        except OSError:
            self.label = "peak so far"

    def peak(self):
        """Bytes: what tensors hold on a GPU, or this whole process on a CPU."""
        if self.cuda:
            torch.cuda.synchronize()
            return torch.cuda.max_memory_allocated()
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

    def measured(self, name, function):
        """The function, which adds each of its calls to the part. Says so if it does not fit."""

        def call(*args, **kwargs):
            self.reset()
            began = time.perf_counter()
            try:
                result = function(*args, **kwargs)
            except (RuntimeError, MemoryError) as error:
                if isinstance(error, RuntimeError) and "allocate" not in str(error):
                    raise
                said = ". ".join(str(error).split(". ")[:2])  # how much it asked for
                raise critic.UserError(f"does not fit, in {name}: {said}") from None
            peak, (seconds, before) = self.peak(), self.parts.get(name, (0.0, 0))
            self.parts[name] = seconds + time.perf_counter() - began, max(before, peak)
            return result

        return call


def bench_fit(*argv):
    """One step on a model with random weights: MODEL's config and tokenizer, and sd.py's flags.

    The worst case: the longest problems of --data, no end token, and critiques as long as the
    completions. Not measured: a critic that is a model, and the test.
    """
    cfg = sd.parse_args(["--model", *argv])
    meter = Meter(cfg.device)
    tokenizer = AutoTokenizer.from_pretrained(cfg.model)

    def build():
        with torch.device(cfg.device):
            config = AutoConfig.from_pretrained(cfg.model)
            return AutoModelForCausalLM.from_config(config, dtype=getattr(torch, cfg.dtype)).eval()

    model = meter.measured("model", build)()
    tokenizer.model_max_length = model.config.get_text_config().max_position_embeddings
    tokenizer.pad_token_id = tokenizer.pad_token_id or 0
    model.generation_config = GenerationConfig(eos_token_id=[-1], pad_token_id=0)
    optimizer = torch.optim.AdamW(sd.add_adapters(model, cfg.lora_rank, cfg.lora_alpha), lr=cfg.lr)
    problems = sorted(critic.load_problems(cfg.data)[0], key=lambda p: -len(p.statement))
    problems = list(itertools.islice(itertools.cycle(problems), cfg.problems_per_step))
    walk = tokenizer("1 " * cfg.max_new_tokens, add_special_tokens=False)["input_ids"]
    critique = critic.Critique(tokenizer.decode(walk[: cfg.max_new_tokens]))

    sd.generate = meter.measured("generation", sd.generate)
    sd.accumulate_gradients = meter.measured("scoring and backward", sd.accumulate_gradients)
    optimizer.step = meter.measured("update", optimizer.step)
    step = (model, tokenizer, optimizer, problems, lambda rollouts, _: [critique] * len(rollouts))
    began = time.perf_counter()
    rollouts, _ = sd.train_step(*step, cfg)
    seconds = time.perf_counter() - began
    meter.parts["whole step"] = seconds, max(peak for _, peak in meter.parts.values())
    for name, (seconds, peak) in meter.parts.items():
        print(f"{name:20} {seconds:8.1f} s {peak / 2**30:8.2f} GiB {meter.label}")
    trained = [r for r in rollouts if not r.masked]
    longest = max(len(r.teacher_prompt or r.prompt) + len(r.completion) for r in rollouts)
    print(f"{len(trained)} of {len(rollouts)} rollouts trained on, the longest of {longest} tokens")


if __name__ == "__main__":
    benches = {"fit": bench_fit, "step": bench_step, "loss": bench_loss, "trl": bench_trl}
    name, *flags = sys.argv[1:] or [""]
    if name not in benches:
        sys.exit(__doc__)
    with sd.command_line("bench.py"):
        benches[name](*flags)
