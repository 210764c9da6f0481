"""A small model of facts: it knows them by its MLP, and is made without touching the global random numbers."""

import sys

import pytest
import torch

import apd_lens as apd
from apd_lens import toys

pytestmark = pytest.mark.filterwarnings("ignore:HookedTransformer is deprecated")


def test_the_mlp_knows_the_facts():
    pytest.importorskip("transformer_lens")
    before = torch.get_rng_state()
    target = toys.train_facts(8, 4, d_model=32, n_neurons=16, steps=200, seed=3)
    assert torch.equal(torch.get_rng_state(), before)
    assert target.prompts.tolist() == [[8, subject] for subject in range(8)]
    assert target.answers.min() > 8
    assert target.accuracy() == 1
    with target.model.hooks(fwd_hooks=[("blocks.0.hook_mlp_out", lambda out, hook: torch.zeros_like(out))]):
        assert target.accuracy() < 0.8
    assert not any(parameter.requires_grad for parameter in target.model.parameters())
    again = toys.train_facts(8, 4, d_model=32, n_neurons=16, steps=200, seed=3)
    assert torch.equal(again.model.W_in, target.model.W_in)
    decomposition = apd.decompose(target.model, [target.prompts], progress=False, **toys.facts_settings(steps=3))
    assert list(decomposition.components.names) == ["blocks.0.mlp.W_in", "blocks.0.mlp.W_out"]
    assert decomposition.attributions(target.prompts).shape == (8, 100)


def test_centred_logits_are_those_of_the_last_position():
    logits = torch.randn(3, 2, 5)
    torch.testing.assert_close(toys.centred_logits(logits).softmax(-1), logits[:, -1].softmax(-1))
    torch.testing.assert_close(toys.centred_logits(logits).sum(-1), torch.zeros(3))


def test_a_missing_transformer_lens_is_named(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "transformer_lens", None)
    with pytest.raises(apd.errors.MissingExtra, match=r"apd-lens\[transformer-lens\]"):
        toys.train_facts()
