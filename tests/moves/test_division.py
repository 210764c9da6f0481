"""Division moves on components whose right division is known."""

import pytest
import torch
from support import outside
from support.moves import context_of
from support.toy_models import ResidualMLP, Snapshot
from torch.testing import assert_close

import apd_lens as apd
from apd_lens.host._matrix import Use
from apd_lens.moves._division import Flow, best_part, flows_of_data_points, two_groups
from apd_lens.passes._watch import watched_pass

QUIET = apd.moves.DivisionMoves(noise=0.0)


def linear_state(n_components: int = 3, moves: apd.moves.DivisionMoves = QUIET) -> apd.training.State:
    """A linear layer with W = diag(1, 2, 3, 4)."""
    model = torch.nn.Linear(4, 4, bias=False)
    with torch.no_grad():
        model.weight.copy_(torch.diag(torch.tensor([1.0, 2.0, 3.0, 4.0])))
    return apd.init(model, n_components=n_components, selection=apd.TopK(1), moves=moves)


def one_hot_inputs(*features: int) -> torch.Tensor:
    return torch.eye(4)[list(features)] * torch.linspace(0.5, 1.0, len(features))[:, None]


def divided(state: apd.training.State, x: torch.Tensor) -> tuple[int, torch.Tensor]:
    watched = watched_pass(state.target, ["weight"], x, state.output)
    attributions = torch.zeros(len(x), state.components.n_components)
    attributions[:, 0] = 1.0
    made = QUIET(context_of(state, watched, attributions, attributions > 0))
    return made, state.components.component_weights("weight").detach()


def test_the_first_component_starts_as_the_whole():
    parts = linear_state().components.component_weights("weight").detach()
    assert_close(parts[0], torch.diag(torch.tensor([1.0, 2.0, 3.0, 4.0])), rtol=0, atol=1e-5)
    assert parts[1:].abs().max() < 1e-3


def test_a_whole_is_divided_until_every_part_serves_one_feature():
    """Three features are in the data: two divisions in one move. What serves none of them stays where it is."""
    state = linear_state()
    before = state.components.summed("weight").detach()
    made, parts = divided(state, one_hot_inputs(*[0, 1, 2] * 10))
    assert made == 2
    assert_close(parts.sum(0), before, rtol=0, atol=1e-5)
    served = sorted(tuple((part.diagonal()[:3] > 0.1).tolist()) for part in parts)
    assert served == [(False, False, True), (False, True, False), (True, False, False)]
    off_diagonal = parts - torch.diag_embed(parts.diagonal(dim1=1, dim2=2))
    assert off_diagonal.abs().max() < 1e-2


def test_one_thing_is_left():
    state = linear_state()
    before = state.components.component_weights("weight").detach()
    made, parts = divided(state, one_hot_inputs(*[0] * 20))
    assert made == 0
    assert torch.equal(parts, before)


def test_two_groups():
    """Two bundles at right angles: the eigenvalue is 1, all are clear. One bundle: it is near 0."""
    angles = torch.tensor([0.0, 0.1, 0.05, 0.02, 0.08])
    bundle = torch.stack([angles.cos(), angles.sin(), torch.zeros(5), torch.zeros(5)], 1)
    in_first, clear, eigenvalue = two_groups(torch.cat([bundle, bundle.roll(2, 1)]))
    assert in_first.tolist() in ([True] * 5 + [False] * 5, [False] * 5 + [True] * 5)
    assert clear.all()
    assert eigenvalue == pytest.approx(1.0, abs=1e-5)
    assert two_groups(bundle)[2] < 0.05


def test_a_data_point_of_both_groups_is_not_clear():
    directions = torch.eye(2).repeat_interleave(20, 0)
    both = torch.full((1, 2), 0.5**0.5)
    _, clear, _ = two_groups(torch.cat([directions, both]))
    assert clear.tolist() == [True] * 40 + [False]


@pytest.mark.parametrize("side", ["input", "output"])
def test_a_matrix_is_divided_on_the_side_where_the_groups_differ(side: str):
    """The other side has the same values for all data points, so nothing can be told from it."""
    P = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    same, different = torch.ones(20, 2), torch.eye(2).repeat_interleave(10, 0)
    x, g = (different, same) if side == "input" else (same, different)
    flow = Flow(Use("weight", "site"), x, g[:, None])
    left, right, separation = best_part(flow, P, torch.eye(2), torch.arange(10), torch.arange(10, 20))
    expected = torch.tensor([[1.0, 2.0], [0.0, 0.0]]) if side == "input" else torch.tensor([[1.0, 0.0], [3.0, 0.0]])
    assert_close(left @ right, expected, rtol=0, atol=0.02)
    assert separation > 1.98
    _, _, nowhere = best_part(
        Flow(flow.use, same, torch.ones(20, 1, 2)), P, torch.eye(2), torch.arange(10), torch.arange(10, 20)
    )
    assert nowhere < 1.1


def test_gradients_are_those_of_the_target():
    """y = x W: ∂(v · y)/∂y is v itself, entries ±1, at every data point; padding there is none."""
    state, x = linear_state(), one_hot_inputs(*[0, 1] * 5)
    watched = watched_pass(state.target, ["weight"], x, state.output)
    (flow,) = flows_of_data_points(state.components, torch.ones(10, 3, dtype=torch.bool), watched, projections=2)
    assert torch.equal(flow.x, x)
    assert flow.g.shape == (10, 2, 4)
    assert torch.equal(flow.g, flow.g[:1].expand(10, 2, 4))
    assert torch.equal(flow.g.abs(), torch.ones(10, 2, 4))


def test_training_with_divisions_over_several_matrices(tmp_path):
    model, x = ResidualMLP(6, 8, 5, 2), torch.randn(64, 6)
    before = Snapshot.of(model)
    decomposition = apd.decompose(
        model, [x], n_components=6, rank=2, selection=apd.TopK(1),
        moves=apd.moves.DivisionMoves(every=2, projections=2),
        losses=apd.Losses(path=1.0, normalization="relative"), optimization=apd.Optimization(steps=10, lr=1e-2),
        progress=False,
    )  # fmt: skip
    before.assert_unchanged(model)
    decomposition.save(tmp_path / "saved")
    assert apd.load(tmp_path / "saved", model).settings == decomposition.settings


def test_settings_that_cannot_be():
    with pytest.raises(apd.errors.InvalidSetting, match="every >= 1"):
        apd.moves.DivisionMoves(every=0)
    with pytest.raises(apd.errors.InvalidSetting, match="projections >= 1"):
        apd.moves.DivisionMoves(projections=0)
    with pytest.raises(apd.errors.InvalidSetting, match="DivisionMoves look at which components are active"):
        apd.init(
            torch.nn.Linear(4, 4, bias=False), n_components=2, selection=apd.Lp(), moves=apd.moves.DivisionMoves(),
            losses=apd.Losses(path=0.0),
        )  # fmt: skip


GATED = """
import torch, apd_lens as apd
from apd_lens import toys
torch.set_num_threads(1)
target = toys.make_gated_functions(seed=2)
decomposition = apd.decompose(
    target.model, target.batches(2048, seed=1002), target.weights, n_components=4, rank=None,
    selection=apd.BatchTopK(apd.Ramp(0.2, 0.35)),
    losses=apd.Losses(path=1, simplicity=apd.HoldThenDecay(2), schatten_p=0.9, simplicity_floor=0.5,
                      normalization="relative"),
    moves=apd.moves.DivisionMoves(), optimization=apd.Optimization(steps=60, lr=2e-3, scaled=False), progress=False,
)
for components in (decomposition.components, apd.components.random_components(decomposition.components)):
    owned = sum((components.component_weights(name).abs()[:, None] * mask).sum((2, 3))
                for name, mask in target.owned.items())
    print((owned.max(0).values / owned.sum(0)).min().item(), owned.argmax(0).unique().numel())
"""


def test_gated_functions_and_their_null_control():
    """Each of four functions has a component that holds its weights, in both layers; random twins hold no more than
    their share."""
    (share, distinct), (random_share, _) = [map(float, line.split()) for line in outside.run(GATED).splitlines()]
    assert share > 0.95
    assert distinct == 4
    assert random_share < 0.4
