"""Split moves: what is given to whom, and that nothing is lost on the way."""

import pytest
import torch
from support.hooked import hooked_transformer, tokens
from support.moves import context_of
from support.toy_models import TMS, ResidualMLP, TinyGPT
from torch.testing import assert_close

import apd_lens as apd
from apd_lens.moves import _split, _surgery
from apd_lens.moves._split import plan_splits
from apd_lens.moves._surgery import Split, part_for, split_component
from apd_lens.passes._output import default_output
from apd_lens.passes._watch import watched_pass


def test_the_most_crowded_is_split_first_into_the_weakest_dead():
    #                component: 0    1    2    3    4
    attributions = torch.tensor(
        [
            [9.0, 0.0, 0.3, 0.1, 0.0],
            [9.0, 0.0, 0.1, 0.1, 0.0],
            [0.0, 7.0, 0.1, 0.1, 0.0],
            [0.0, 7.0, 0.1, 0.2, 0.0],
            [0.0, 7.0, 0.1, 0.1, 0.0],
            [0.0, 0.0, 0.1, 0.1, 5.0],
        ]
    )
    alike = torch.tensor([0.1, 2.0, 0.5, -3.0, 3.0, 9.0])
    first, second = plan_splits(attributions, alike)
    assert (first.old, first.new) == (1, 3)
    assert first.given.tolist() == [False, False, False, True, True, False]
    assert first.kept.tolist() == [False, False, True, False, False, False]
    assert (second.old, second.new) == (0, 2)
    assert second.given.tolist() == [False, True, False, False, False, False]


def test_nothing_is_split_without_a_dead_component():
    assert plan_splits(torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]]), torch.rand(3)) == []


def test_the_part_acts_on_the_given_inputs_and_not_on_the_kept():
    A, given, kept = torch.randn(8, 2), torch.randn(3, 8), torch.randn(2, 8)
    part = part_for(A, given, kept)
    scale = (torch.cat([given, kept]) @ A).norm()
    assert (given @ part - given @ A).norm() < 0.02 * scale
    assert (kept @ part).norm() < 0.02 * scale


def test_both_forms_of_the_ridge_regression_agree():
    """With few inputs it is solved in their number, with many in d_in; all inputs nine times with nine times the ridge
    are the same problem."""
    A, given, kept = torch.randn(8, 2), torch.randn(3, 8), torch.randn(2, 8)
    few, many = part_for(A, given, kept), part_for(A, given.repeat(9, 1), kept.repeat(9, 1), 9e-3)
    assert_close(few, many, rtol=1e-3, atol=1e-4)


def test_with_a_ridge_what_is_on_by_chance_does_not_decide():
    """Feature 0 is given away and 1 kept, on 25 data points each, in which the other 48 are on now and then. The part
    does what the whole did for features 0 and 1; to the others it does less than the whole, or without a ridge more."""
    to_others: dict[float, list[float]] = {0.1: [], 1e-6: []}
    for _ in range(10):
        A = 0.05 * torch.randn(50, 2)
        A[:2] += torch.eye(2)
        points = (torch.rand(2, 25, 50) < 0.02) * torch.rand(2, 25, 50)
        points[:, :, :2] = torch.eye(2)[:, None] * (2 * torch.rand(2, 25, 1) - 1)
        for ridge, ratios in to_others.items():
            part = part_for(A, points[0], points[1], ridge)
            ratios.append((part[2:].norm() / A[2:].norm()).item())
            if ridge == 0.1:
                assert (part[0] - A[0]).norm() < 0.05
                assert part[1].norm() < 0.05
    assert max(to_others[0.1]) < 0.6
    assert max(to_others[1e-6]) > 1.5


def test_the_part_of_a_lookup_is_the_rows_that_were_looked_up():
    A = torch.ones(6, 2)
    part = part_for(A, torch.tensor([[1, 4], [1, 0]]), torch.tensor([[0, 2]]))
    assert part[:, 0].tolist() == [0.5, 1.0, 0.0, 0.0, 1.0, 0.0]


def test_data_points_that_look_alike_stay_together():
    """Two directions, at many lengths and with both signs: a split never cuts through one of them."""
    directions = torch.linalg.qr(torch.randn(5, 5)).Q[:2]
    which = torch.arange(40) % 2
    x = directions[which] * torch.randn(40, 1)
    for seed in range(20):
        alike = _split._random_projection(x, 5, torch.Generator().manual_seed(seed))
        (split,) = plan_splits(torch.tensor([[1.0, 0.0]]).expand(40, 2), alike)
        assert split.given.tolist() in ((which == 0).tolist(), (which == 1).tolist())


def test_a_component_that_does_one_thing_is_left_alone():
    """All inputs of component 0 point the same way: after giving that direction away, nothing would be left."""
    model = torch.nn.Linear(4, 3)
    components = apd.init(model, n_components=2, rank=2).components
    before = {name: factor.detach().clone() for name, factor in components.named_parameters()}
    x = torch.randn(1, 4) * torch.randn(10, 1)
    (call,) = watched_pass(apd.wrap(model), ["weight"], x, default_output).calls
    first_five = torch.arange(10) < 5
    with torch.no_grad():
        assert not split_component(components, Split(0, 1, first_five, ~first_five), [(call.use, call.x)])
    for name, factor in components.named_parameters():
        assert torch.equal(factor, before[name])


MODELS = {
    "linear": (lambda: ResidualMLP(6, 32, 30, 1), torch.randn(4, 6, generator=torch.Generator().manual_seed(0))),
    "tied": (lambda: TMS(6, 3), torch.randn(4, 6, generator=torch.Generator().manual_seed(0))),
    "lookups": (TinyGPT, torch.tensor([[1], [2], [3], [4]])),
    "heads": (hooked_transformer, tokens(4, 1)),
    "heads one by one": (lambda: hooked_transformer(use_attn_result=True, use_split_qkv_input=True), tokens(4, 1)),
}


@pytest.mark.filterwarnings("ignore:HookedTransformer is deprecated:DeprecationWarning")
@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
def test_the_new_component_takes_over_and_the_sum_stays(make):
    model, batch = make[0](), make[1]
    state = apd.init(model, n_components=3, rank=2)
    components, names = state.components, state.components.names
    with torch.no_grad():
        for name in names:  # component 2 is dead and empty
            components.A[name][2] = 0
            components.B[name][2] = 0
    before = {name: components.component_weights(name).detach().clone() for name in names}
    calls = watched_pass(state.target, names, batch, default_output).calls
    inputs = [_surgery._inputs_of(name, calls) for name in names]
    given = torch.tensor([False, True, False, True])
    with torch.no_grad():
        assert split_component(components, Split(old=0, new=2, given=given, kept=~given), inputs)
    for name, (use, x) in zip(names, inputs, strict=True):
        after = components.component_weights(name).detach()
        assert_close(after.sum(0), before[name].sum(0), rtol=1e-4, atol=1e-5)
        assert torch.equal(after[1], before[name][1])
        if name in ("wpe.weight", "pos_embed.W_pos"):
            continue  # all data points look up the same row, which nothing can tell apart
        old, new = (weights.mT if use.transposed else weights for weights in (before[name][0], after[2]))
        does, did = ((w[x] if not x.is_floating_point() else x @ w) for w in (new, old))
        assert (does[given] - did[given]).norm() < 0.05 * did.norm(), name
        assert does[~given].norm() < 0.05 * did.norm(), name


def test_the_optimizer_forgets_the_touched_components_only():
    model, x = ResidualMLP(4, 6, 5, 1), torch.randn(8, 4)
    state, _ = apd.step(apd.init(model, n_components=4, rank=2, selection=apd.TopK(2)), x)
    watched = watched_pass(state.target, state.components.names, x, default_output)
    attributions = torch.zeros(8, 4)
    attributions[:4, 0], attributions[4:6, 1], attributions[6:, 2] = 2.0, 1.0, 1.0
    before = [factor.detach().clone() for factor in state.components.parameters()]
    assert apd.moves.SplitMoves(noise=0.01)(context_of(state, watched, attributions)) == 1
    for factor, was in zip(state.components.parameters(), before, strict=True):
        moments = state.optimizer.state[factor]
        assert (moments["exp_avg"][[0, 3]] == 0).all()
        assert (moments["exp_avg_sq"][[0, 3]] == 0).all()
        assert (moments["exp_avg_sq"][[1, 2]] != 0).any()
        assert torch.equal(factor[[1, 2]], was[[1, 2]])


def test_moves_are_made_when_asked_for():
    model, x = ResidualMLP(4, 6, 5, 1), torch.randn(8, 4)
    options = {"n_components": 9, "rank": 2, "selection": apd.TopK(1), "optimization": apd.Optimization(steps=20)}
    state = apd.init(model, moves=apd.moves.SplitMoves(every=5, until=0.6), **options)
    splits = []
    for _ in range(20):
        state, info = apd.step(state, x)
        splits.append(info.moves)
    assert [step for step, n_splits in enumerate(splits) if n_splits] == [4, 9]
