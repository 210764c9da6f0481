"""Pipelines as people have them in TransformerLens, nnsight and SAELens, and with APD in ten changed lines."""

import difflib
import re
import warnings
from pathlib import Path

import pytest
from support.examples import EXAMPLES, run

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    pytest.importorskip("transformer_lens")

BEFORE = sorted((EXAMPLES / "language_model").glob("pipeline_*[!d].py"))
NUMBER = r"-?[\d.]+"


def with_apd(before: Path) -> Path:
    return before.with_name(f"{before.stem}_with_apd.py")


@pytest.mark.parametrize("before", BEFORE, ids=lambda file: file.stem)
def test_apd_in_a_pipeline_takes_ten_changed_lines(before: Path):
    one, other = (file.read_text().split('"""\n', 1)[1].splitlines() for file in (before, with_apd(before)))
    changed = [line for line in difflib.ndiff(one, other) if line[:2] == "+ " and line[2:].strip()]
    assert 0 < len(changed) <= 10
    assert len(BEFORE) == 3


def both(name: str, folder: Path) -> tuple[str, str]:
    """What the two print, on the tiny model."""
    before = EXAMPLES / "language_model" / f"pipeline_{name}.py"
    files = (before, with_apd(before))
    return tuple(run(str(file.relative_to(EXAMPLES)), "--stand-in", "--out", str(folder)) for file in files)


def test_transformer_lens(tmp_path: Path):
    plain, with_components = both("transformer_lens", tmp_path)
    (clean, corrupted) = re.findall(rf"difference of logits: ({NUMBER}), of the other prompts ({NUMBER})", plain)[0]
    assert float(clean) > 5 > -5 > float(corrupted)
    assert plain.splitlines()[:3] == with_components.splitlines()[:3]
    (left,) = re.findall(rf"without each prompt's own component: difference ({NUMBER})", with_components)
    assert float(left) < float(clean) / 2
    assert with_components.count("its heads patched") == 1


def test_nnsight(tmp_path: Path):
    plain, with_components = both("nnsight", tmp_path)
    assert "the right answer: 9" in plain
    assert plain.splitlines()[:3] == with_components.splitlines()[:3]
    written, without = (re.findall(r"capital of (\w+) is (\w+)", text) for text in (plain, with_components))
    assert written[:2] == [("France", "Paris"), ("Germany", "Berlin")]
    assert [country for country, _ in without] == [country for country, _ in written]
    assert without != written


@pytest.mark.thorough
def test_sae_lens(tmp_path: Path):
    pytest.importorskip("sae_lens", reason="needs sae-lens, which works with transformer-lens 3 only")
    plain, with_components = both("sae_lens", tmp_path)
    assert float(re.findall(r"variance lost ([\d.]+)%", plain)[0]) < 5
    rights = [int(right) for right in re.findall(r"right (\d+)%", with_components)]
    assert with_components.startswith(plain)
    assert rights[1] > 80 > 50 > rights[2]  # on active components, and without each prompt's own
