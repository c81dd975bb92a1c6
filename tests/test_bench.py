"""bench.py fit: one step of a model that has no weights."""

import shutil
from unittest.mock import Mock

import bench
import pytest
from conftest import flags

import critic
import sd


def test_fit_measures_the_longest_step_without_weights(
    small, problems, tmp_path, monkeypatch, capsys
):
    model, memory = shutil.copytree(small.pop("model"), tmp_path / "model"), "CUDA out of memory. "
    (model / "model.safetensors").unlink()
    for name in "generate", "accumulate_gradients":  # fit replaces them
        monkeypatch.setattr(sd, name, getattr(sd, name))
    bench.bench_fit(str(model), *flags(small))
    *parts, last = capsys.readouterr().out.splitlines()
    names = ["model", "generation", "scoring and backward", "update", "whole step"]
    assert [line[:20].strip() for line in parts] == names
    seconds = [float(line.split(" s ")[0].split()[-1]) for line in parts]
    assert seconds[4] + 0.2 > sum(seconds[1:4]) and all("GiB peak" in line for line in parts)
    tokenizer = bench.AutoTokenizer.from_pretrained(model)
    [prompt] = sd.encode_chats(tokenizer, [sd.solver_message(problems[0])])
    longest = len(prompt) + 1 + 12 + 12  # the token of HELP, the critique, the attempt
    assert last == f"3 of 3 rollouts trained on, the longest of {longest} tokens"
    error = RuntimeError(memory + "Tried to allocate 2.00 GiB. GPU 0 has a total of")
    monkeypatch.setattr(sd, "accumulate_gradients", Mock(side_effect=error))
    said = f"does not fit, in scoring and backward: {memory}Tried to allocate 2.00 GiB"
    with pytest.raises(critic.UserError, match=f"^{said}$"):
        bench.bench_fit(str(model), *flags(small))
