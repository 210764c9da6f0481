"""Projections that skip the unembedding estimate the same attributions as those that go through it."""

from typing import Any

import pytest
import torch
from support.hooked import hooked_transformer
from support.toy_models import tiny_gpt2, tiny_llama
from torch import Tensor, nn
from torch.testing import assert_close

import apd_lens as apd
from apd_lens.attribution import _sketch
from apd_lens.attribution._sketch import sketched, unembedding
from apd_lens.passes._output import default_output
from apd_lens.passes._watch import watched_pass

VOCABULARY = 40


@pytest.fixture(autouse=True)
def _few(monkeypatch):
    for name, value in (("LIKELIEST", 4), ("DRAWN", 8), ("FEWEST_OUTPUTS", 0)):
        monkeypatch.setattr(_sketch, name, value)


def llama(**options: Any) -> nn.Module:
    torch.manual_seed(0)
    model = tiny_llama(vocab_size=VOCABULARY, **options)
    with torch.no_grad():
        model.lm_head.weight.mul_(30)  # some outputs are likelier than others
    return model


def decomposition(model: nn.Module, weights: str, **options: Any) -> apd.Decomposition:
    settings = {"losses": apd.Losses(distance="kl"), "selection": apd.TopK(1, "position"), "moves": None} | options
    return apd.init(model, weights=weights, n_components=6, rank=2, **settings).decomposition()


class Capped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = llama()

    def forward(self, tokens: Tensor) -> Tensor:
        return 5 * (self.inner(tokens).logits / 5).tanh()


HOSTS = {
    "tied": (lambda: llama(tie_word_embeddings=True), "model.layers.0.*proj*", True),
    "untied": (lambda: llama(tie_word_embeddings=False), "model.layers.0.*proj*", True),
    "GPT-2": (lambda: tiny_gpt2(vocab_size=VOCABULARY), "transformer.h.0.mlp*", True),
    "HookedTransformer": (lambda: hooked_transformer(d_vocab=VOCABULARY), "blocks.0.mlp.W_*", None),
    "capped": (Capped, "inner.model.layers.0.*proj*", False),
    "decomposed": (lambda: llama(tie_word_embeddings=False), ["lm_head*", "model.layers.0.*proj*"], False),
}


@pytest.mark.parametrize("host", HOSTS)
def test_the_unembedding_is_found_where_it_comes_last(host: str):
    make, weights, expected = HOSTS[host]
    target = apd.wrap(make())
    watched = watched_pass(target, target.match(weights), torch.randint(VOCABULARY, (2, 5)), default_output)
    found = unembedding(watched)
    assert expected is None or (found is not None) == expected
    if found is None:
        return
    offset = watched.output.detach() - found.x.detach() @ found.W
    assert_close(offset, offset[:1, :1].expand_as(offset), rtol=0, atol=1e-4)
    assert sketched(watched, found, 3, "rademacher", None).shape == (3, *found.x.shape)


@pytest.mark.parametrize("kind", ["rademacher", "normal"])
@pytest.mark.parametrize("mask", [False, True], ids=["", "padding"])
def test_many_are_exact_on_average_and_their_spread_is_that_of_dense_ones(kind: str, mask: bool, monkeypatch):
    model, weights, K = llama(tie_word_embeddings=True), "model.layers.0.self_attn.*", 600
    batch: Any = torch.randint(VOCABULARY, (2, 4))
    if mask:
        batch = {"input_ids": batch, "attention_mask": torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0]])}
    attribution = apd.GradientAttribution(projections=K, kind=kind, fixed=True)
    d = decomposition(model, weights, attribution=attribution)
    exact = decomposition(model, weights, attribution=apd.GradientAttribution(projections="exact")).attributions(batch)
    assert_close(d.attributions(batch), exact, rtol=0.2, atol=1e-3 * exact.max().item())

    def spread() -> Tensor:
        samples = attribution.samples(d.watch(batch), d.components, "position").square()
        return (samples.std(0) / samples.mean(0).clamp_min(1e-12))[exact > 0].mean()

    ours = spread()
    monkeypatch.setattr(_sketch, "FEWEST_OUTPUTS", 10**6)
    assert ours < 1.25 * spread()


def test_a_small_memory_changes_nothing_and_neither_does_keeping():
    model, batch = llama(), torch.randint(VOCABULARY, (4, 5))
    found = [
        decomposition(
            model, "*self_attn*", attribution=apd.GradientAttribution(projections=5, fixed=True, memory=memory)
        ).attributions(batch)
        for memory in (2**28, 3000)
    ]
    assert_close(*found, rtol=1e-4, atol=1e-5)


def test_fixed_ones_are_kept_with_a_batch_that_comes_again():
    attribution, batch = apd.GradientAttribution(projections=5, fixed=True), torch.randint(VOCABULARY, (4, 5))
    state = apd.init(
        llama(), weights="*layers.0.self_attn*", n_components=6, rank=2, attribution=attribution, moves=None,
        losses=apd.Losses(distance="kl"), selection=apd.TopK(2, "position"), batches=[batch],
    )  # fmt: skip
    for _ in range(3):
        state, _ = apd.step(state, batch)
    jacobians = state.seen[0].pass_.jacobians
    assert jacobians.of == ("fisher", 5)
    state, _ = apd.step(state, batch)
    assert state.seen[0].pass_.jacobians is jacobians
