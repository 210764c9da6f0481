"""The example runs, with few steps."""

import pytest
from support.examples import run


@pytest.mark.thorough
def test_edit_and_watch(tmp_path):
    printed = run("edit_and_watch.py", "--steps", "5", "--reference", "500", "--out", str(tmp_path))
    assert "taken out: forgotten are" in printed
    assert "undone: forgotten are []" in printed
    assert printed.count("shuffled labels, surprise") == 3
    assert (tmp_path / "edit_and_watch.png").stat().st_size > 10_000
