"""The examples run, with few steps. Their goals are met with the steps they have by default, which takes minutes."""

import json
import re

import pytest
from support.examples import EXAMPLES, run

import apd_lens as apd


@pytest.mark.thorough
def test_facts_in_an_mlp(tmp_path):
    printed = run("facts/facts_in_an_mlp.py", "--steps", "20", "--out", str(tmp_path))
    assert "seed 0: 100.0% of 64 facts known, 0.0% without the MLP" in printed
    assert printed.count("→ object") == 64
    assert "edited_state_dict(ablate=" in printed
    assert (tmp_path / "facts_in_an_mlp.png").stat().st_size > 10_000
    assert (tmp_path / "facts_in_an_mlp" / "components.safetensors").is_file()
    assert apd.__version__ in (tmp_path / "facts_in_an_mlp" / "config.json").read_text()


def test_capitals(tmp_path):
    """In the place of the language model a tiny one, which is trained on the spot."""
    printed = run("language_model/capitals.py", "--stand-in", "--steps", "10", "--out", str(tmp_path))
    assert "12 of 39 prompts known" in printed
    assert "Chosen: model.layers.0.self_attn.v_proj" in printed
    assert printed.count("on the active components alone: KL; same answer") == 2
    assert "component of France out of the weights" in printed
    assert "raises 'Berlin'" in printed
    assert (tmp_path / "decomposition" / "components.safetensors").is_file()
    assert (tmp_path / "where.png").stat().st_size > 10_000
    assert "raises" in (tmp_path / "report.html").read_text()


def test_a_language_model(tmp_path):
    """The same tiny model in all that is measured on the real one."""
    printed = run(
        "language_model/run.py", "--stand-in", "--steps", "5", "--out", str(tmp_path), "--results", str(tmp_path / "r")
    )
    assert "## stand-in" in printed
    assert "| prompts with a component of their own | 12 of 12 | 12 of 12 |  |" in printed
    found = json.loads((tmp_path / "r" / "stand-in-0.json").read_text())
    assert found["trained"]["own off, forgotten"] >= 11
    assert found["start"]["KL on the active components"] < 1e-4


def test_a_part_of_toys():
    printed = run("targeted.py", "--seeds", "1", "--steps", "10", "--target-steps", "200")
    assert printed.count("seeds 0 to 0") == 3
    assert "facts with a component of their own: 8" in printed


@pytest.mark.thorough
def test_bigrams_for_several_seeds():
    printed = run("facts/bigrams.py", "--steps", "20", "--seeds", "2")
    assert "seed 1: 100.0% of 40 bigrams known" in printed
    assert printed.count("facts with a component of their own") == 1
    assert "mean" in printed


def test_bigrams_for_one_seed():
    assert run("facts/bigrams.py", "--steps", "20").count(" → ") == 40


SYSTEMS = {"tms-5-2": "TMS 5-2", "residual-mlp-1": "residual MLP, 1 layer", "gated": "gated functions"}


@pytest.mark.parametrize("keys", [["tms-5-2"], pytest.param(list(SYSTEMS), marks=pytest.mark.thorough)], ids=len)
def test_the_papers_systems(tmp_path, keys: list[str]):
    """A run that is there already is not made again; the table and the figures come from what the runs left."""
    folders = ["--results", str(tmp_path / "results"), "--out", str(tmp_path / "out")]
    systems = ["--systems", *keys]
    few = ["--seeds", "1", "--steps", "20", "--target-steps", "20"]
    printed = run("paper/paper.py", *systems, *few, *folders)
    assert printed.count("does not meet the goal") == len(keys)
    again = run("paper/paper.py", *systems, *few, *folders).splitlines()
    assert again == printed.splitlines()[-len(again) :]
    assert [line.split(" | ")[0] for line in again[2:]] == [f"| {SYSTEMS[key]}" for key in keys]
    result = json.loads((tmp_path / "results" / "tms-5-2-0.json").read_text())
    assert result["settings"]["losses"]["simplicity"]["value"] == 0.1
    assert result["numbers"]["of"] == 5
    if len(keys) < len(SYSTEMS):
        return
    drawn = run("paper/figures.py", *systems, *folders, "--figures", str(tmp_path / "figures"), "--target-steps", "20")
    valley = run("paper/valley.py", "--seeds", "2", "--steps", "5", *folders[:2], "--figures", str(tmp_path / "valley"))
    assert "best cosine between seeds" in valley
    assert len(list((tmp_path / "valley").glob("*.png"))) == 2
    assert len(drawn.splitlines()) == len(list((tmp_path / "figures").glob("*.png"))) > 12


def test_directions_by_hand(tmp_path):
    printed = run("directions.py", "--steps", "300", "--out", str(tmp_path / "directions.safetensors"))
    difference, moved = re.findall(r"by hand: (\S+) from .*\n.* up to (\S+)", printed)[0]
    assert float(difference) < 1e-6 < 0.1 < float(moved)
    feature = re.findall(r"for input (\d)", printed)[0]
    raised = [float(after) > float(before) for before, after in re.findall(r"(\S+) -> (\S+)", printed)]
    assert raised[int(feature)]
    assert sum(raised) > 2


@pytest.mark.thorough
def test_the_report(tmp_path):
    printed = run(
        "report.py", "--saved", str(tmp_path / "none"), "--steps", "5", "--out", str(tmp_path / "report.html")
    )
    assert "decomposing in 5 steps" in printed
    assert "64 facts in an MLP of 48 neurons" in (tmp_path / "report.html").read_text()


def test_examples_stand_alone():
    """A script in examples/ imports no other; a folder there is one example, whose scripts import each other alone."""
    scripts = list(EXAMPLES.rglob("*.py"))
    for file in scripts:
        of_others = {other.stem for other in scripts if other.parent != file.parent or file.parent == EXAMPLES}
        text = file.read_text(encoding="utf-8")
        assert not of_others.intersection(re.findall(r"^ *(?:from|import) (\w+)", text, re.MULTILINE)), file.name
        assert "sys.path" not in text, file.name
