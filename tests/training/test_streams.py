"""Several streams in one step: what each asks for is added up."""

import copy
from dataclasses import replace

import pytest
import torch
from support.toy_models import ResidualMLP
from torch.testing import assert_close

import apd_lens as apd
from apd_lens.masks._sampling import path_mask
from apd_lens.masks._selection import Needed
from apd_lens.training._streams import Stream


def states() -> tuple[apd.training.State, apd.training.State]:
    """With the settings of a stream of its own each, and the same components."""
    torch.manual_seed(1)
    model = ResidualMLP(4, 6, 5, 1)
    first = apd.Losses(path=0.0, normalization="paper", simplicity=0.5)
    second = apd.Losses(faithfulness=0.0, simplicity=0.0, minimality=3.0, path=0.0, normalization="paper")
    options = {"n_components": 5, "rank": 2, "moves": None, "seed": 3}
    return (
        apd.init(model, losses=first, selection=apd.TopK(1), **options),
        apd.init(model, losses=second, selection=apd.TopK(3), **options),
    )


def test_the_losses_of_two_streams_are_added_up():
    first, second = states()
    x, y = torch.randn(8, 4), torch.randn(6, 4)
    both = replace(first, others=(Stream(second.settings.masking, second.settings.losses, "others"),))
    _, info = apd.step(both, x, y)
    _, info_first = apd.step(states()[0], x)
    _, info_second = apd.step(second, y)
    assert_close(info.loss, info_first.loss + info_second.loss)
    assert info.terms.keys() == {*info_first.terms, *(f"others {name}" for name in info_second.terms)}
    assert_close(info.terms["others minimality"], info_second.terms["minimality"])
    assert info.k == info_first.k == 1


def test_the_maskings_of_all_streams_go_on_and_are_restored():
    first, second = states()
    masking = apd.Attributed(selection=apd.BatchTopK(Needed(hold=0.0), least=0.1))
    both = replace(first, others=(Stream(masking, second.settings.losses, "others"),))
    on, _ = apd.step(both, torch.randn(8, 4), torch.randn(6, 4))
    assert on.others[0].masking.selection.k.now != masking.selection.k.now
    fresh = replace(states()[0], others=both.others)
    assert fresh.restored(on.tensors()).others == on.others


def test_every_stream_needs_a_batch():
    first, _ = states()
    with pytest.raises(apd.errors.InvalidBatches, match="a batch for each of the 1 streams, got 2"):
        apd.step(first, torch.randn(8, 4), torch.randn(6, 4))


def test_with_others_the_rest_is_off_on_the_data_and_on_elsewhere():
    """Each term is what substituted weights give, with the draws of the step."""
    torch.manual_seed(1)
    model = ResidualMLP(4, 6, 5, 1)
    state = apd.init(
        model,
        n_components=5,
        rank=2,
        moves=None,
        selection=apd.TopK(1),
        losses=apd.Losses(faithfulness=0.0, path=2.0, normalization="paper"),
        elsewhere=apd.Elsewhere(weight=3.0),
    )
    x, y = torch.randn(8, 4), torch.randn(6, 4)
    d = state.decomposition()

    def distance(batch: torch.Tensor, on: torch.Tensor, rest: torch.Tensor) -> torch.Tensor:
        errors = []
        for i in range(len(batch)):
            other = copy.deepcopy(model)
            for name, matrix in apd.wrap(other).weights.items():
                P = d.components.component_weights(name)
                W = matrix.value()
                mixed = rest[i] * W + torch.einsum("c,cio->io", on[i] - rest[i], P)
                matrix.parameter.data.copy_(mixed if matrix.parameter.shape == mixed.shape else mixed.mT)
            errors.append((other(batch[i : i + 1]) - model(batch[i : i + 1])).square().mean())
        return torch.stack(errors).mean()

    active = d.select(x)
    draws = state.draws("path")
    on = path_mask(active, draws)
    rest = torch.rand(8, generator=draws)
    elsewhere = path_mask(torch.zeros(6, 5, dtype=torch.bool), state.draws("others path"), bare=0.5)
    _, info = apd.step(state, x, y)
    assert_close(info.terms["minimality"], distance(x, active.float(), torch.zeros(8)), rtol=1e-4, atol=1e-6)
    assert_close(info.terms["path"], distance(x, on, rest), rtol=1e-4, atol=1e-6)
    assert_close(info.terms["others minimality"], distance(y, elsewhere, torch.ones(6)), rtol=1e-4, atol=1e-6)
    assert (elsewhere.sum(1) == 0).any()
    assert (elsewhere.sum(1) > 0).any()


def test_with_others_nothing_may_ask_that_components_sum_to_the_weights():
    model = ResidualMLP(4, 6, 5, 1)
    with pytest.raises(apd.errors.InvalidSetting, match="faithfulness=0"):
        apd.init(model, n_components=5, losses=apd.Losses(), elsewhere=apd.Elsewhere())
    with pytest.raises(apd.errors.InvalidSetting, match="give others="):
        apd.decompose(model, [torch.randn(3, 4)], n_components=5, elsewhere=apd.Elsewhere())


def test_with_others_there_is_nothing_without_sparse_passes():
    model, losses = ResidualMLP(4, 6, 5, 1), apd.Losses(faithfulness=0.0, path=0.0)
    with pytest.raises(apd.errors.InvalidSetting, match=r"sparse passes alone say .*Lp\(.*Use TopK"):
        apd.init(model, n_components=5, losses=losses, moves=None, masks=apd.Lp(), elsewhere=apd.Elsewhere())


def test_with_others_what_components_lack_is_given_to_none():
    """Moves at each step, which would else give it to a component that is active on nothing."""
    model = ResidualMLP(4, 6, 5, 1)
    moves = apd.moves.ClusterMoves(every=1, until=1.0, merge_above=1.0, split_below=-1.0, split_read_below=-1.0)
    options = {"n_components": 5, "rank": 2, "moves": moves, "selection": apd.TopK(1)}
    x, y = torch.rand(8, 4), torch.rand(6, 4)
    _, alone = apd.step(apd.init(model, **options), x)
    losses = apd.Losses(faithfulness=0.0)
    _, beside = apd.step(apd.init(model, **options, losses=losses, elsewhere=apd.Elsewhere()), x, y)
    assert (alone.moves, beside.moves) == (1, 0)


def test_the_state_of_a_targeted_training_is_restored():
    torch.manual_seed(1)
    model = ResidualMLP(4, 6, 5, 1)

    def fresh() -> apd.training.State:
        losses = apd.Losses(faithfulness=0.0)
        return apd.init(model, n_components=5, rank=2, moves=None, losses=losses, elsewhere=apd.Elsewhere())

    x, y = torch.randn(8, 4), torch.randn(6, 4)
    state, _ = apd.step(fresh(), x, y)
    restored = fresh().restored(state.tensors())
    on, on_restored = (apd.step(one, x, y)[0].tensors() for one in (state, restored))
    assert on.keys() == on_restored.keys()
    assert all(torch.equal(on[name], on_restored[name]) for name in on)


def test_a_targeted_decomposition_is_saved_with_its_settings(tmp_path):
    model = ResidualMLP(4, 6, 5, 1)
    d = apd.decompose(
        model,
        [torch.randn(8, 4)],
        n_components=5,
        others=[torch.randn(6, 4)],
        optimization=apd.Optimization(steps=3),
        progress=False,
    )
    d.save(tmp_path / "targeted")
    loaded = apd.load(tmp_path / "targeted", model)
    assert loaded.settings == d.settings
    assert loaded.settings.elsewhere == apd.Elsewhere()
