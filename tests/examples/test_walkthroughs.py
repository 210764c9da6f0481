"""The examples that go through everything in one page run, with few steps, and say what they should."""

from pathlib import Path

import pytest
from support.browser import data_of
from support.examples import run


@pytest.mark.thorough
def test_the_walkthrough(tmp_path: Path):
    printed = run("walkthrough.py", "--steps", "20", "--out", str(tmp_path))
    for part in ("components kept", "neurons kept", "one to one", "undone: 100.0% right", "random components"):
        assert part in printed
    page = tmp_path / "walkthrough.html"
    assert "subject 63" in str(data_of(page))
    assert "best latent" in page.read_text() + str(data_of(page))  # the matches with the SAE


@pytest.mark.thorough
def test_induction(tmp_path: Path):
    printed = run("induction.py", "--steps", "5", "--target-steps", "20", "--out", str(tmp_path))
    for part in ("head detector", "components that matter", "random components", "untrained model", "AUROC"):
        assert part in printed
