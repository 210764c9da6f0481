"""Matches of directions and of activity, on components and dictionaries whose similarity is known."""

import pytest
import torch
from support.hooked import hooked_transformer, tokens
from support.known import ORDER, one_component_a_feature, one_hot_batches, permuted_rows
from support.toy_models import Snapshot, decomposition_of, interrupted_in_forward
from torch.testing import assert_close

import apd_lens as apd
from apd_lens import compare


def test_matching_known_by_hand():
    """Both components like latent 0 best; together they like 1 and 0 best."""
    found = compare.matching(torch.tensor([[0.9, 0.8, 0.0], [1.0, 0.1, 0.0]]), threshold=0.5)
    assert found.latent.tolist() == [0, 0]
    assert found.component.tolist() == [1, 0, 0]
    assert found.partner.tolist() == [1, 0]
    assert_close(found.one_to_one, torch.tensor([0.8, 1.0]))
    assert found.latents_above.tolist() == [2, 1]
    assert found.components_above.tolist() == [2, 1, 0]
    numbers = found.numbers
    assert numbers["components with a match above 0.5"] == 1
    assert numbers["    with several (split)"] == 0.5
    assert numbers["latents with a match above 0.5"] == pytest.approx(2 / 3)
    one = compare.matching(torch.tensor([[0.9, 0.8], [1.0, 0.1]]), latents=torch.tensor([False, True]))
    assert one.latent.tolist() == [1, 1]
    assert one.partner.tolist() == [1, -1]
    assert one.component.tolist() == [-1, 0]
    assert one.table(of="latent").shape == (1, 4)
    with pytest.raises(apd.errors.InvalidSetting, match="None of the 2 latents counts"):
        compare.matching(torch.eye(2), latents=torch.zeros(2).bool())
    with pytest.raises(apd.ShapeMismatch, match="each of the 2 components"):
        compare.matching(torch.eye(2), components=torch.ones(3).bool())


def test_pairs_of_one_likeness_checked_by_another():
    found = compare.matching(torch.eye(6)[ORDER])
    own, exchanged = found.of_pairs(torch.eye(6)[ORDER] * 0.7)
    assert own == pytest.approx(0.7)
    assert exchanged == 0
    with pytest.raises(apd.ShapeMismatch, match=r"similarity of shape \(6, 6\)"):
        found.of_pairs(torch.eye(4))


def test_bad_data_and_settings_are_refused():
    decomposition = one_component_a_feature()
    dictionary, batches, model = permuted_rows(decomposition), one_hot_batches(), decomposition.target.model
    before = Snapshot.of(model)

    def refused(error: type[apd.ApdError], match: str, data=batches, some=dictionary, **options) -> None:
        with pytest.raises(error, match=match):
            compare.activation_match(decomposition, data, some, **options)
        before.assert_unchanged(model)

    refused(apd.errors.InvalidBatches, "There are no batches", data=[])
    refused(apd.errors.InvalidBatches, "cannot be shuffled", data=[torch.eye(6)[:1]])
    refused(apd.errors.InvalidSetting, "No latent of 6 latents .* is above 99", least=99.0)
    refused(apd.errors.InvalidSetting, "no submodule 'acts'.*'act'", some=compare.Dictionary.neurons("acts", 6))
    refused(apd.NonFinite, "NaN or infinite", data=[torch.full((4, 6), torch.nan)])
    with pytest.raises(apd.errors.InvalidBatches, match="can be only once"):
        compare.direction_match(decomposition, dictionary, "last.weight", batches=iter(batches))
    with interrupted_in_forward(model.act, 1), pytest.raises(KeyboardInterrupt):
        compare.activation_match(decomposition, batches, dictionary)
    before.assert_unchanged(model)


def test_a_hooked_transformer():
    model = hooked_transformer().requires_grad_(False)
    decomposition = decomposition_of(model, "*.mlp.*", selection=apd.BatchTopK(2.0, "position"))
    before, batches = Snapshot.of(model), [tokens(4), tokens(3)]
    neurons = compare.Dictionary.neurons("blocks.0.mlp.hook_post", 10)
    match = compare.activation_match(decomposition, batches, neurons, by="jaccard")
    assert match.n == 7 * 4
    directions = compare.direction_match(decomposition, neurons, "blocks.0.mlp.W_out", "read", batches=batches)
    A, B = decomposition.components.A["blocks.0.mlp.W_out"], decomposition.components.B["blocks.0.mlp.W_out"]
    assert_close(directions.cosine.abs(), compare.direction_cosines(B.mT, A.mT, torch.eye(10)))
    before.assert_unchanged(model)
