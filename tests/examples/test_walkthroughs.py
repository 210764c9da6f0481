"""The examples that go through everything in one page run, with few steps, and say what they should."""

import difflib
from pathlib import Path

import pytest
from support import outside
from support.examples import EXAMPLES, run


@pytest.mark.thorough
def test_the_walkthrough(tmp_path: Path):
    printed = run("walkthrough.py", "--steps", "20", "--out", str(tmp_path))
    for part in ("components kept", "neurons kept", "one to one", "undone: 100.0% right", "random components"):
        assert part in printed
    page = (tmp_path / "walkthrough.html").read_text()
    assert "subject 63" in page
    assert "best latent" in page  # the matches with the SAE


def test_apd_in_a_pipeline_takes_ten_changed_lines(tmp_path: Path):
    before, after = (
        (EXAMPLES / name).read_text().split('"""\n', 1)[1]
        for name in ("nnsight_pipeline.py", "nnsight_pipeline_with_apd.py")
    )
    changes = difflib.ndiff(before.splitlines(), after.splitlines())
    assert len([line for line in changes if line.startswith("+ ") and line[2:].strip()]) <= 10
    script = tmp_path / "few_steps.py"
    script.write_text(after.replace("steps=2000", "steps=20"))
    printed = outside.script(script)
    assert "components, one alone a prompt" in printed
    assert printed.count("of answers follow") == 2


@pytest.mark.thorough
def test_induction(tmp_path: Path):
    printed = run("induction.py", "--steps", "5", "--target-steps", "20", "--out", str(tmp_path))
    for part in ("head detector", "components that matter", "random components", "untrained model", "AUROC"):
        assert part in printed
