"""A state that is taken apart and put back goes on bit for bit as it would have."""

import copy
from dataclasses import replace

import pytest
import torch
from support.toy_models import ResidualMLP

import apd_lens as apd
from apd_lens.masks._selection import Needed

N = 2
SELECTIONS = {
    "BatchTopK": apd.BatchTopK(1.5),
    "TopK": apd.TopK(1),
    "Needed": apd.BatchTopK(Needed(hold=0.0), least=0.1),
    "Lp": apd.Lp(threshold=1.0),
}
MOVES = {"none": None, "split": apd.moves.SplitMoves(every=1), "cluster": apd.moves.ClusterMoves(every=1)}
MOVES["division"] = apd.moves.DivisionMoves(every=1)


def batch(step: int) -> torch.Tensor:
    return torch.randn(12, 4, generator=torch.Generator().manual_seed(step))


def go_on(state, n_steps: int):
    for _ in range(n_steps):
        state, _ = apd.step(state, batch(state.step))
    return state


@pytest.mark.parametrize("moves", MOVES.values(), ids=MOVES)
@pytest.mark.parametrize("selection", SELECTIONS.values(), ids=SELECTIONS)
def test_twice_n_steps_are_n_steps_kept_and_n_steps_more(selection, moves):
    torch.manual_seed(0)
    model = ResidualMLP(4, 6, 5, 1)
    losses = apd.Losses(path=0.0 if isinstance(selection, apd.Lp) else 1.0)

    def fresh(model=model):
        return apd.init(
            model, n_components=6, rank=2, selection=selection, moves=moves, losses=losses,
            optimization=apd.Optimization(steps=10, lr=1e-2), seed=1,
        )  # fmt: skip

    expected = go_on(fresh(), 2 * N).tensors()
    half = go_on(fresh(), N)
    kept = half.tensors()
    go_on(half, 1)  # which changes the factors and moments in place, and not those that were taken
    came = go_on(fresh().restored(kept), N).tensors()
    assert came.keys() == expected.keys()
    assert not [name for name, tensor in expected.items() if not torch.equal(tensor, came[name])]


def test_a_masking_of_the_users_goes_on_where_it_was():
    """Its selection finds the number of active components step by step."""
    model, masks = ResidualMLP(4, 6, 5, 1), apd.Attributed(selection=SELECTIONS["Needed"])

    def fresh():
        optimization = apd.Optimization(steps=10, lr=1e-2)
        return apd.init(model, n_components=6, rank=2, masks=masks, moves=None, optimization=optimization)

    half = go_on(fresh(), N)
    assert half.settings.masking != masks
    restored = fresh().restored(half.tensors())
    assert restored.settings == half.settings


def test_a_copy_goes_on_by_itself():
    state = go_on(apd.init(ResidualMLP(4, 6, 5, 1), n_components=6, rank=2), 1)
    copied = copy.deepcopy(state)
    expected = go_on(state, 1).tensors()
    assert int(copied.tensors()["step"]) == 1
    came = go_on(copied, 1).tensors()
    assert not [name for name, tensor in expected.items() if not torch.equal(tensor, came[name])]


def test_a_decomposition_is_a_copy():
    state = go_on(apd.init(ResidualMLP(4, 6, 5, 1), n_components=6, rank=2), 1)
    decomposition = state.decomposition()
    before = [factor.clone() for factor in decomposition.components.parameters()]
    go_on(state, 1)
    assert all(torch.equal(*pair) for pair in zip(before, decomposition.components.parameters(), strict=True))
    assert state.updates() == 2  # the optimizer is changed in place


def test_a_state_is_whole_until_a_step_changes_it():
    fresh = apd.init(ResidualMLP(4, 6, 5, 1), n_components=6, rank=2)
    assert fresh.is_whole()
    first = go_on(fresh, 1)
    assert first.is_whole()
    assert not fresh.is_whole()  # it shares the factors and moments
    assert not replace(first, step=2).is_whole()


def test_a_start_of_two_kinds_is_refused():
    with pytest.raises(apd.errors.InvalidSetting, match="needs others beside them"):
        apd.init(torch.nn.Linear(3, 3), n_components=1, moves=None, optimization=apd.Optimization(start="matrices"))
    with pytest.raises(apd.errors.InvalidSetting, match="are its shorthands; give one"):
        apd.init(torch.nn.Linear(3, 3), n_components=2, masks=apd.Lp(), selection=apd.TopK(1))
