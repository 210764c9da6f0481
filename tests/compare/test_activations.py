"""Latents and components that are on for the same data."""

import pytest
import torch
from support.known import ORDER, one_component_a_feature, one_hot_batches, permuted_rows
from support.toy_models import Snapshot, decomposition_of, tiny_gpt2
from torch.testing import assert_close

import apd_lens as apd
from apd_lens import compare
from apd_lens.host._sites import reading


def test_measures_known_by_hand():
    """Ten data points: the component on 4, the latent on 5, both on 3."""
    component = torch.tensor([1, 1, 1, 1, 0, 0, 0, 0, 0, 0])[:, None].bool()
    latent = torch.tensor([1, 1, 1, 0, 1, 1, 0, 0, 0, 0])[:, None].bool()
    values = torch.rand(2, 10, 1)
    parts = [
        compare.activation_sums(component[part], values[0, part], latent[part], values[1, part])
        for part in (slice(4), slice(4, 10))
    ]
    found = {name: value.item() for name, value in compare.activation_measures(parts[0] + parts[1]).items()}
    assert found["precision"] == pytest.approx(3 / 5)
    assert found["recall"] == pytest.approx(3 / 4)
    assert found["f1"] == pytest.approx(6 / 9)
    assert found["jaccard"] == pytest.approx(3 / 6)
    assert found["correlation"] == pytest.approx(torch.corrcoef(values[:, :, 0])[0, 1].item(), abs=1e-6)


def test_what_is_never_active_or_never_varies_has_likeness_0():
    off = torch.zeros(8, 1).bool()
    sums = compare.activation_sums(off, torch.full((8, 1), 0.1), ~off, torch.rand(8, 1))
    assert {name: value.item() for name, value in compare.activation_measures(sums).items()} == {
        **dict.fromkeys(("precision", "recall", "f1", "jaccard", "correlation"), 0.0)
    }


def test_latents_that_are_on_where_their_component_is_have_f1_of_one():
    decomposition = one_component_a_feature()
    before = Snapshot.of(decomposition.target.model)
    match = compare.activation_match(decomposition, one_hot_batches(), permuted_rows(decomposition))
    assert_close(match.found.best_of_component, torch.ones(6))
    assert torch.equal(ORDER[match.found.partner], torch.arange(6))
    assert match.n == 4 * 48
    assert match.shuffled.numbers["best latent of a component"] < 0.5
    assert_close(match.component_active.sum(), torch.tensor(1.0))
    assert_close(match.component_active, match.latent_active[match.found.partner])
    frame = match.table()
    assert_close(torch.tensor(frame["precision"].to_numpy()), torch.ones(6))
    assert (frame["correlation"] > 0.99).all()  # attributions are linear in x here
    assert len(match.table(of="latent")) == 6
    assert "f1 of activity, 192 data points" in str(match)
    before.assert_unchanged(decomposition.target.model)


def test_streaming_gives_what_all_data_at_once_give():
    decomposition = one_component_a_feature()
    batches, dictionary = one_hot_batches(), permuted_rows(decomposition)
    options = {"by": "correlation", "value": "mask"}
    streamed = compare.activation_match(decomposition, batches, dictionary, **options)
    at_once = compare.activation_match(decomposition, [torch.cat(batches)], dictionary, **options)
    for name in ("precision", "recall", "f1", "jaccard", "correlation"):
        assert_close(getattr(streamed, name), getattr(at_once, name))
    mask, latents = decomposition.select(torch.cat(batches)).float(), dictionary.encode(torch.cat(batches))
    expected = torch.corrcoef(torch.cat([mask, latents], 1).mT)[:6, 6:]
    assert_close(streamed.correlation, expected, rtol=0, atol=1e-5)


def test_where_each_unit_has_one_data_point_the_null_is_as_good():
    decomposition = one_component_a_feature()
    match = compare.activation_match(decomposition, [torch.eye(6)], permuted_rows(decomposition))
    assert match.found.numbers["one to one"] == match.shuffled.numbers["one to one"] == 1
    found, exchanged = compare.direction_match(
        decomposition, permuted_rows(decomposition), "last.weight"
    ).found.of_pairs(match.f1)
    assert (found, exchanged) == (1, 0)


@pytest.mark.parametrize("granularity", ["example", "position"])
def test_activity_on_positions_leaves_padding_out(granularity):
    """A batch with padding, and its examples one by one without."""
    model = tiny_gpt2().requires_grad_(False)
    decomposition = decomposition_of(model, "*.mlp.*", selection=apd.BatchTopK(2.0, granularity))
    lengths = [3, 5, 4, 5]
    attention_mask = (torch.arange(5) < torch.tensor(lengths)[:, None]).long()
    ids = torch.randint(13, (4, 5), generator=torch.Generator().manual_seed(0))
    batch = {"input_ids": ids, "attention_mask": attention_mask}
    dictionary = compare.Dictionary.neurons("transformer.h.0.mlp.act", 32)
    match = compare.activation_match(decomposition, [batch], dictionary, pool="max")
    assert match.n == (4 if granularity == "example" else sum(lengths))
    with reading(model, [dictionary.site]) as kept:
        model(**batch)
    active = kept[dictionary.site] > 0
    valid = attention_mask.bool()
    expected = (active & valid[..., None]).any(1) if granularity == "example" else active[valid]
    mask = decomposition.select(batch)
    mask = mask if granularity == "example" else mask[valid]
    both = mask.float().mT @ expected.float()
    assert_close(match.recall, both / mask.sum(0)[:, None].clamp_min(1))


def test_pooling_over_positions():
    latents = torch.tensor([[[1.0], [3.0], [2.0]], [[4.0], [0.0], [9.0]]])
    valid = torch.tensor([[True, True, True], [True, True, False]])
    pooled = compare._activations.pooled
    assert pooled(latents, None, "max").tolist() == [[3], [9]]
    assert pooled(latents, valid, "max").tolist() == [[3], [4]]
    assert pooled(latents, valid, "mean").tolist() == [[2], [2]]
    assert pooled(latents, None, "last").tolist() == [[2], [9]]
    assert pooled(latents, valid, "last").tolist() == [[2], [0]]
