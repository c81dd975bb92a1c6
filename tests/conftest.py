"""Shared by all tests: tiny random models, small problem sets, whole runs; no downloads."""

import json
import os
import subprocess
import sys
from pathlib import Path
from unittest.mock import Mock

os.environ["CUDA_VISIBLE_DEVICES"] = ""  # all on the CPU: exact

import huggingface_hub
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import critic  # noqa: E402
import sd  # noqa: E402

huggingface_hub.constants.HF_HUB_OFFLINE = True
torch.set_num_threads(1)  # tiny models: a second thread only costs
TOY = ROOT / "tests" / "toy"
SHAPE = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "head_dim": 8}
SHAPE |= {"num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.3}
# The prompt format of Qwen, with its two ways to begin an answer.
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if not enable_thinking %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: trains the toy, takes minutes (pytest -m slow)")
    config.option.markexpr = config.option.markexpr or "not slow"


def byte_tokenizer(pad=None):
    """A byte-level ChatML tokenizer that begins a text with <bos>, as Llama's does."""
    special = ["<bos>", "<|im_end|>", "<|im_start|>", "<pad>"]  # 0, 1, 2, 3
    vocabulary = special + sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE({token: n for n, token in enumerate(vocabulary)}, []))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder, bos = decoders.ByteLevel(), [("<bos>", 0)]
    core.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=bos)
    names = {"bos_token": "<bos>", "eos_token": "<|im_end|>", "pad_token": pad}
    names["additional_special_tokens"] = ["<|im_start|>"]
    return PreTrainedTokenizerFast(tokenizer_object=core, chat_template=CHATML, **names)


def save_model(folder, tokenizer, kind=(Qwen3ForCausalLM, Qwen3Config), ends=1, seed=0, **shape):
    """Saves a random model with a vocabulary larger than its tokenizer's. Returns the folder."""
    torch.manual_seed(seed)
    tokens = {"bos_token_id": None, "eos_token_id": ends, "pad_token_id": tokenizer.pad_token_id}
    config = kind[1](**({"vocab_size": 300} | SHAPE | tokens | shape))
    kind[0](config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory):
    """A random Qwen3 of 2 layers with the toy's tokenizer, 256 positions."""
    ends = [1, *range(40, 60)]  # so that completions differ in length
    tokenizer, folder = AutoTokenizer.from_pretrained(TOY), tmp_path_factory.mktemp("tiny")
    return save_model(folder, tokenizer, ends=ends, max_position_embeddings=256)


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    """A folder with a few of the toy's problems: 8 to train, 3 to validate, 3 to test."""
    folder = tmp_path_factory.mktemp("world")
    for name, count in ("train", 8), ("val", 3), ("test", 3):
        rows = (TOY / f"{name}.jsonl").read_text("utf-8").splitlines(keepends=True)
        (folder / f"{name}.jsonl").write_text("".join(rows[:count]), "utf-8")
    return folder


@pytest.fixture(scope="session")
def problems(world):
    return critic.load_problems(world)[0]


@pytest.fixture
def small(tiny_folder, world):
    """Settings of a small run."""
    settings = {"model": tiny_folder, "data": world, "critic": TOY / "scribe.py", "device": "cpu"}
    settings |= {"steps": 4, "problems_per_step": 3, "max_new_tokens": 12, "lora_rank": 4}
    return settings | {"lr": 4e-3, "lora_alpha": 8, "eval_every": 2, "val_samples": 2}


def reward_some(text, answer):
    """For grpo: a random model solves nothing, and equal rewards train nothing."""
    return len(text) % 2 == 0


def flags(settings):
    return [f"--{n.replace('_', '-')}={v}".removesuffix("=True") for n, v in settings.items()]


@pytest.fixture
def make_config(small):
    return lambda **settings: sd.parse_args(flags(small | settings))


@pytest.fixture
def tiny(tiny_folder):
    """(model, tokenizer), loaded anew for each test."""
    return sd.load_model(tiny_folder, "cpu", "float32")


@pytest.fixture
def run(small, capsys, monkeypatch):
    """Runs main() in this process, without its test. Returns (exit status, stderr).

    Afterwards start.said is what it printed on stdout.
    """

    def start(out, *more, **settings):
        capsys.readouterr()
        status = 0
        try:
            sd.main(flags(small | {"out": out} | settings) + list(more))
        except SystemExit as stop:
            status = stop.code
        start.said, error = capsys.readouterr()
        return status, error

    start.test = Mock(return_value=0)
    monkeypatch.setattr(subprocess, "call", start.test)
    return start


def plain_log_probs(model, prompt, completion, temperature):
    """[T, V], one token after another: no batch, padding or mask."""
    rows = []
    for t in range(len(completion)):
        logits = model(torch.tensor([prompt + completion[:t]])).logits[0, -1]
        rows.append((logits / temperature).log_softmax(-1))
    return torch.stack(rows)


def read_lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]
