"""The examples run, with few steps. Their goals are met with the steps they have by default, which takes minutes."""

import subprocess
import sys
from pathlib import Path

import apd_lens as apd

EXAMPLES = Path(__file__).parent.parent / "examples"


def run(script: str, *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, EXAMPLES / script, *arguments], capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_facts_in_an_mlp(tmp_path):
    printed = run("facts_in_an_mlp.py", "--steps", "20", "--out", str(tmp_path))
    assert "seed 0: 100.0% of 64 facts known, 0.0% without the MLP" in printed
    assert printed.count("→ object") == 64
    assert "edited_state_dict(ablate=" in printed
    assert (tmp_path / "facts_in_an_mlp.png").stat().st_size > 10_000
    assert (tmp_path / "facts_in_an_mlp" / "components.safetensors").is_file()
    assert apd.__version__ in (tmp_path / "facts_in_an_mlp" / "decomposition.json").read_text()


def test_bigrams_for_several_seeds():
    printed = run("bigrams.py", "--steps", "20", "--seeds", "2")
    assert "seed 1: 100.0% of 40 bigrams known" in printed
    assert printed.count("facts with a component of their own") == 1
    assert "mean" in printed


def test_bigrams_for_one_seed():
    assert run("bigrams.py", "--steps", "20").count(" → ") == 40


def test_tms():
    header, row = run("tms.py", "--system", "5-2", "--steps", "20").splitlines()
    assert "null MMCS" in header
    assert row.startswith("seed 0")
    assert " of 5 " in row
