"""The default toy: its base, what critique training makes of it, and a base built anew."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, TOY

import sd
from eval import main as evaluate

pytestmark = pytest.mark.slow


def score(base, folder, monkeypatch):
    """Percent of a base's attempts that are right: alone, with a solution in the worse way."""
    monkeypatch.chdir(folder)
    for name in sd.CONTEXTS.keys() - {"critique", "reference"}:
        monkeypatch.delitem(sd.CONTEXTS, name)
    evaluate([base, "--advantages", base, "--device", "cpu", "--json", "scores.json"])
    numbers = json.loads(Path("scores.json").read_text())
    told = [numbers["contexts"][name]["teacher right"][0] for name in ("critique", "reference")]
    return numbers["scores"]["base"]["Avg@12"][0], min(told)


def test_the_base_is_in_the_papers_band_and_reads_solutions_in_both_ways(tmp_path, monkeypatch):
    alone, told = score(str(TOY), tmp_path, monkeypatch)
    assert 10 <= alone <= 20 and told >= 97


def test_a_base_built_anew_is_of_the_same_kind(tmp_path, monkeypatch):
    build = [sys.executable, TOY / "build.py", "--seed", "1", "--out", tmp_path / "toy"]
    subprocess.run(build, check=True, cwd=ROOT)
    alone, told = score(str(tmp_path / "toy"), tmp_path, monkeypatch)
    assert 5 <= alone <= 30 and told >= 95


def test_critique_training_reaches_85(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    sd.main(["--device", "cpu"])
    result = json.loads(Path("runs/critique/result.json").read_text())
    assert result["scores"]["runs/critique"]["Avg@12"][0] >= 85
