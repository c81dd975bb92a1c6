"""Speed and memory, each as a ratio of two things measured in this one process.

    python tests/bench.py            all three (several minutes on a CPU, 16 GB of memory)
    python tests/bench.py step       the training step against its bare parts
    python tests/bench.py loss       the loss in chunks against the loss in one piece
    python tests/bench.py growth     the step's time as its size doubles
"""

import statistics
import sys
import threading
import time
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parent.parent)]

import torch
import torch.nn.functional as F
from transformers import Qwen3Config, Qwen3ForCausalLM

import sd
from critic import scribe

sd.transformers.utils.logging.set_verbosity_error()  # it warns that nothing ends a completion, which is meant
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def clock(*functions, repeats=5):
    """The median seconds of each function; they take turns, so that a busy machine slows them all."""
    times = [[] for _ in functions]
    for _ in range(repeats + 1):
        for function, mine in zip(functions, times):
            if DEVICE == "cuda":
                torch.cuda.synchronize()
            began = time.perf_counter()
            function()
            if DEVICE == "cuda":
                torch.cuda.synchronize()
            mine.append(time.perf_counter() - began)
    return [statistics.median(mine[1:]) for mine in times]  # the first turn warms up


def peak(function) -> float:
    """How much memory the function takes at its peak, in GB, above what was there before."""
    if DEVICE == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        return (torch.cuda.max_memory_allocated() - before) / 1e9
    resident = lambda: int(Path("/proc/self/statm").read_text().split()[1]) * 4096  # noqa: E731
    before = most = resident()
    done = threading.Event()

    def watch():
        nonlocal most
        while not done.wait(0.002):
            most = max(most, resident())

    watcher = threading.Thread(target=watch)
    watcher.start()
    function()
    done.set()
    watcher.join()
    return (most - before) / 1e9


def network(vocabulary=0, **shape):
    """The embedded base's architecture, untrained, with its tokenizer, or with another vocabulary or shape."""
    torch.manual_seed(0)
    tokenizer = sd.embedded_tokenizer()
    ends = dict(eos_token_id=[-1], pad_token_id=tokenizer.pad_token_id)  # never: every completion is as long as it may be
    shape = sd.ARCHITECTURE | {"max_position_embeddings": 4096, "vocab_size": vocabulary or len(tokenizer)} | shape
    model = Qwen3ForCausalLM(Qwen3Config(**shape)).to(DEVICE).eval()
    model.generation_config = sd.GenerationConfig(**ends)
    return model, tokenizer


def step_of(problems=32, tokens=48, vocabulary=0, **shape):
    """(a training step, its bare parts): generate, teacher forward, student forward and backward, nothing else."""
    model, tokenizer = network(vocabulary, **shape)
    cfg = sd.settled(sd.Config(problems_per_step=problems, max_new_tokens=tokens, device=DEVICE))
    optimizer = torch.optim.AdamW(sd.add_adapters(model, cfg.lora_rank, cfg.lora_alpha), lr=1e-9)
    batch = (sd.embedded_problems()[0] * 2)[:problems]
    prompts = torch.tensor(sd.build_prompts(tokenizer, [p.problem for p in batch], [None] * problems), device=DEVICE)
    taught = torch.tensor(sd.build_prompts(tokenizer, [p.problem for p in batch], [p.answer * 40 for p in batch]), device=DEVICE)
    how = dict(do_sample=True, temperature=1.0, top_k=0, max_new_tokens=tokens)

    def step():
        torch.manual_seed(0)
        sd.train_step(model, tokenizer, optimizer, batch, scribe, cfg)

    def parts():
        torch.manual_seed(0)
        sampled = model.generate(prompts, attention_mask=torch.ones_like(prompts), **how)[:, prompts.shape[1] :]
        with torch.no_grad(), sd.adapters_off(model):
            teacher = model(torch.cat([taught, sampled], 1), use_cache=False).logits[:, taught.shape[1] - 1 : -1]
        student = model(torch.cat([prompts, sampled], 1), use_cache=False).logits[:, prompts.shape[1] - 1 : -1]
        F.kl_div(student.log_softmax(-1), teacher.log_softmax(-1), log_target=True, reduction="sum").backward()

    return step, parts


def bench_step():
    larger = {"hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 8, "head_dim": 64}
    print("training step / (generate + teacher forward + student forward and backward):", end=" ")
    for name, shape in {"embedded model": {}, "25 million parameters": larger}.items():
        whole, bare = clock(*step_of(**shape))
        print(f"{name} {whole / bare:.2f}", end=", " if not shape else "\n")


def bench_loss(positions=2048, hidden=1024, vocabulary=151_936):
    torch.manual_seed(0)
    head = torch.nn.Linear(hidden, vocabulary, bias=False, device=DEVICE).requires_grad_(False)
    model = type("Head", (), {"get_output_embeddings": lambda self: head})()
    student, teacher = torch.randn(2, positions, hidden, device=DEVICE)
    tokens = torch.randint(vocabulary, (positions,), device=DEVICE)

    def loss(student_states, tokens, teacher_states):
        student, teacher = (sd.log_probs(model, states, 1.0) for states in (student_states, teacher_states))
        return sd.forward_kl(student, teacher), sd.token_advantages(student, teacher, tokens)

    def chunked():
        states = student.clone().requires_grad_()
        states.backward(sd.in_chunks(loss, sd.Config.chunk, states, tokens, teacher)[2])

    def naive():
        loss(student.clone().requires_grad_(), tokens, teacher)[0].sum().backward()

    memory = peak(chunked) / peak(naive)
    seconds = clock(chunked, naive, repeats=3)
    print(f"loss in chunks / loss in one piece, {positions} positions, {vocabulary:,} tokens in the vocabulary:", end=" ")
    print(f"memory {memory:.2f}, time {seconds[0] / seconds[1]:.2f}")


def bench_growth():
    small, rollouts, longer, wider = clock(
        step_of(32, 64, 16_000)[0], step_of(64, 64, 16_000)[0], step_of(32, 128, 16_000)[0], step_of(32, 64, 32_000)[0], repeats=3
    )
    print(f"the step's time when it doubles: rollouts {rollouts / small:.2f}, tokens {longer / small:.2f}, vocabulary {wider / small:.2f}")


if __name__ == "__main__":
    benches = {"step": bench_step, "loss": bench_loss, "growth": bench_growth}
    for name in sys.argv[1:] or benches:
        benches[name]()
