import sys

import pytest
import torch

import apd_lens as apd
from apd_lens import toys

pytestmark = pytest.mark.filterwarnings("ignore:HookedTransformer is deprecated")


def test_sequences_repeat_from_their_period_on():
    batch = toys.sequences(50, seed=3)
    assert (batch.tokens[:, 0] == 24).all()
    assert torch.equal(batch.tokens[:, 1:], batch.next[:, :-1])
    for row, known in zip(batch.next.tolist(), batch.known, strict=True):
        period = int((~known).sum()) - 1
        assert 6 <= period <= 12
        assert row[period:] == row[:-period]
        assert known.tolist() == [place > period for place in range(24)]


def test_two_heads_are_trained_and_the_others_stay():
    pytest.importorskip("transformer_lens")
    before, after = (toys.train_induction(steps=steps, seed=4) for steps in (0, 3))
    assert before.heads == ["a0.1", "a1.2"]
    for layer, head in ((0, 1), (1, 2)):
        for side in ("W_Q", "W_K", "W_V", "W_O"):
            moved = getattr(after.model.blocks[layer].attn, side) != getattr(before.model.blocks[layer].attn, side)
            assert moved.flatten(1).any(1).nonzero().tolist() == [[head]]
    batch = toys.sequences(8, seed=5)
    assert before.is_right(batch).shape == (batch.known.sum(),)
    assert before.loss > 2


def test_a_missing_transformer_lens_is_named(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "transformer_lens", None)
    with pytest.raises(apd.errors.MissingExtra, match=r"apd-lens\[transformer-lens\]"):
        toys.train_induction()
