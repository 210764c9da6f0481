"""Padded batches: what a batch's attention_mask leaves out changes nothing."""

import pytest
import torch
from support.padding import LENGTHS, alone, gpt2, padded
from support.toy_models import decomposition_of
from torch.testing import assert_close
from transformers import BertConfig, BertForMaskedLM

import apd_lens as apd


def bert() -> BertForMaskedLM:
    config = BertConfig(
        vocab_size=13,
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=12,
        max_position_embeddings=8,
        initializer_range=0.3,
    )
    return BertForMaskedLM(config).eval()


MODELS = {"gpt2": (gpt2, "transformer.h.0.mlp.*"), "bert": (bert, "bert.encoder.layer.0.intermediate.*")}


@pytest.mark.parametrize("granularity", ["example", "position"])
@pytest.mark.parametrize("host", MODELS)
def test_attributions_are_those_of_each_example_without_padding(host: str, granularity):
    model, weights = MODELS[host]
    selection = apd.BatchTopK(2, granularity=granularity)
    decomposition = decomposition_of(model(), weights, selection=selection)
    batch = padded()
    attributions = decomposition.attributions(batch)
    for index, length in enumerate(LENGTHS):
        expected = decomposition.attributions(alone(batch, index))[0]
        came = attributions[index, :length] if granularity == "position" else attributions[index]
        assert_close(came, expected, rtol=1e-5, atol=1e-7)
    if granularity == "position":
        padding = batch["attention_mask"] == 0
        assert attributions[padding].abs().max() == 0
        assert decomposition.select(batch).sum() == 2 * sum(LENGTHS)
        assert decomposition.select(batch)[padding].sum() == 0
        assert decomposition_of(model(), weights, selection=apd.TopK(3, granularity="position")).select(batch)[
            ~padding
        ].sum(-1).unique().tolist() == [3]


@pytest.mark.parametrize("distance", ["mse", "kl", "function"])
@pytest.mark.parametrize("granularity", ["example", "position"])
@pytest.mark.parametrize("host", MODELS)
def test_training_is_that_without_padding(host: str, granularity, distance):
    """Two steps, the second with split moves, on a batch with two columns of padding and on the same without."""
    model, weights = MODELS[host]
    functions = {"function": lambda target, sparse: (target - sparse).abs().amax(-1)}
    batch = padded(lengths=(4, 4, 4), width=6)
    cut = {name: value[:, :4] for name, value in batch.items()}
    states = []
    for some_batch in (batch, cut):
        torch.manual_seed(0)
        state = apd.init(
            model(),
            weights=weights,
            n_components=5,
            rank=2,
            selection=apd.BatchTopK(1.5, granularity=granularity),
            losses=apd.Losses(
                hidden=1.0,
                hidden_at=(weights.replace("*", "c_fc" if host == "gpt2" else "dense"),),
                distance=functions.get(distance, distance),
                path=0.0,  # its draws have the batch's shape
            ),
            moves=apd.moves.SplitMoves(every=2, noise=0.0),
            optimization=apd.Optimization(steps=10, lr=1e-3),
        )
        for _ in range(3):
            state, info = apd.step(state, some_batch)
            states.append((info.terms, info.k, info.moves))
    for (terms, k, splits), (expected, expected_k, expected_splits) in zip(states[:3], states[3:], strict=True):
        assert (k, splits) == (pytest.approx(expected_k), expected_splits)
        assert terms.keys() == expected.keys()
        for name, value in terms.items():
            assert_close(value, expected[name], rtol=5e-4, atol=1e-6)  # moves solve a system, in another order


def test_what_the_padding_holds_does_not_matter():
    decomposition = decomposition_of(gpt2(), "transformer.h.0.mlp.*", selection=apd.TopK(2, granularity="position"))
    first, second = decomposition.summary(padded(filler=0)), decomposition.summary(padded(filler=5))
    assert_close(first.active, second.active)
    assert_close(first.attribution, second.attribution)
    assert_close(first.active.sum(), torch.tensor(2.0))


def test_the_checks_above_can_fail():
    """Without an attention_mask the filler counts."""
    decomposition = decomposition_of(gpt2(), "transformer.h.0.mlp.*")
    with_mask, without = padded(), {"input_ids": padded()["input_ids"]}
    difference = decomposition.attributions(with_mask) - decomposition.attributions(without)
    assert difference.abs().max() > 0.1 * decomposition.attributions(with_mask).max()
