"""Shared by all tests: a tiny random model in the embedded task's own shape. Nothing is downloaded or built."""

import os
import sys
from pathlib import Path

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from transformers import Qwen3Config, Qwen3ForCausalLM  # noqa: E402

import sd  # noqa: E402


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: builds the real base model and trains; takes minutes (pytest -m slow)")


def pytest_collection_modifyitems(config, items):
    if config.option.markexpr:
        return
    slow = [item for item in items if item.get_closest_marker("slow")]
    config.hook.pytest_deselected(items=slow)
    items[:] = [item for item in items if item not in slow]


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory):
    """A saved random Qwen3 of 2 layers with the embedded tokenizer."""
    folder = tmp_path_factory.mktemp("tiny")
    tokenizer = sd.embedded_tokenizer()
    torch.manual_seed(0)
    shape = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, head_dim=8)
    shape |= dict(num_key_value_heads=2, max_position_embeddings=256, initializer_range=0.3)
    ends = dict(eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, bos_token_id=None)
    Qwen3ForCausalLM(Qwen3Config(vocab_size=len(tokenizer), **shape, **ends)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def tiny(tiny_folder):
    """(model, tokenizer), loaded anew for each test."""
    return sd.load(str(tiny_folder), "cpu")


@pytest.fixture
def config():
    """Makes settled settings, small ones unless told otherwise."""

    def make(**settings):
        small = dict(problems_per_step=3, max_new_tokens=12, lora_rank=4, lora_alpha=8.0, device="cpu")
        return sd.settled(sd.Config(**(small | settings)))

    return make
