"""Several processes, as on several GPUs: two on this machine's CPU come to what one comes to."""

import json
import os
import subprocess
import sys

import pytest
import torch
from conftest import ROOT

SCRIPT = """
# sd.py with a sampler that draws the same completion for the same prompt, whoever asks.
import sys
sys.path.insert(0, {root!r})
import torch
import sd
sample = sd.sample

def sample_by_prompt(model, prompts, cfg, title=""):
    completions, seen = [], {{}}
    for prompt in map(tuple, prompts):
        seen[prompt] = seen.get(prompt, 0) + 1
        torch.manual_seed(hash((prompt, seen[prompt])) % 2**31)
        completions += sample(model, [list(prompt)], cfg)
    return completions

sd.sample = sample_by_prompt
sd.is_correct = lambda text, answer: len(text) % 2 == 0  # so that grpo has something to compare
problems = sd.embedded_problems()
sd.embedded_problems = lambda: (problems[0], problems[1][:3], problems[2][:3])
sd.main()
"""


def run(processes, folder, model, script, *flags):
    launcher = [sys.executable]
    if processes > 1:  # as `torchrun --nproc_per_node 2` does
        launcher += ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    settings = "--steps 2 --eval-every 1 --max-new-tokens 8 --val-samples 2 --test-samples 2 --lora-rank 4 --device cpu"
    settings += f" --max-grad-norm 1e9 --model {model} --out {folder}"
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONHASHSEED": "0"}
    command = [*launcher, str(script), *settings.split(), *flags]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=200)


CASES = {  # five problems cannot be shared evenly; of one the second process gets nothing
    "critique": "--problems-per-step 5",
    "grpo": "--problems-per-step 3 --group-size 4",
    "reference": "--problems-per-step 1",
}


@pytest.mark.parametrize("condition", CASES)
def test_two_processes_come_to_the_gradient_and_the_metrics_of_one(condition, tmp_path, tiny_folder):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT.format(root=str(ROOT)))
    results = {}
    for processes in 1, 2:
        folder = tmp_path / str(processes)
        done = run(processes, folder, tiny_folder, script, "--condition", condition, "--steps", "1", *CASES[condition].split())
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("The run is in") == 1  # the first speaks for all
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        moments = torch.load(folder / "last" / "state.pt", weights_only=True)["optimizer"]["state"]
        gradient = torch.cat([moment["exp_avg"].flatten() for moment in moments.values()]) / 0.1
        results[processes] = lines, gradient, json.loads((folder / "result.json").read_text())
    (lines, gradient, result), (others, another, other) = results[1], results[2]
    torch.testing.assert_close(another, gradient, atol=1e-6, rtol=1e-5)
    assert gradient.abs().max() > 1e-3
    assert [line["step"] for line in others] == [0, 1]
    for name, value in lines[1].items():
        assert others[1][name] == pytest.approx(value, rel=1e-5, abs=1e-6), name
    assert result["base"] == pytest.approx(other["base"]) and result["best_step"] == other["best_step"]


def test_bad_input_ends_all_processes_with_the_message(tmp_path, tiny_folder):
    done = run(2, tmp_path / "run", tiny_folder, ROOT / "sd.py", "--condition", "praise")
    assert done.returncode != 0 and "sd.py: --condition praise: choose one of" in done.stderr
    assert not (tmp_path / "run").exists()
