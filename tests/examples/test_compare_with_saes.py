"""The example beside SAEs runs, with few steps; what it finds takes minutes."""

import pytest
from support.examples import run


@pytest.mark.thorough
def test_compare_with_saes(tmp_path):
    pytest.importorskip("sae_lens", reason="needs sae-lens, which works with transformer-lens 3 only")
    few = ["--steps", "20", "--target-steps", "50", "--sae-steps", "20"]
    folders = ["--out", str(tmp_path / "out"), "--figures", str(tmp_path)]
    printed = run("compare_with_saes.py", *few, *folders)
    assert printed.count("pairs found by direction alone: F1") == 2
    assert printed.count("random components") == 3 + 7 + 6  # three tables of directions, and a curve for each k
    assert [line.split()[0] for line in printed.splitlines() if "features above" in line] == ["features"]
    for name in ("compare_tms.png", "compare_facts.png"):
        assert (tmp_path / name).stat().st_size > 10_000
    assert (tmp_path / "out" / "facts" / "components.safetensors").is_file()
