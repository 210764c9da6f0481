"""What the model runs on where inactive components are on in part: against substituted weights."""

import pytest
import torch
from support.toy_models import ResidualMLP
from torch import Tensor
from torch.testing import assert_close

import apd_lens as apd
from apd_lens._draws import draws
from apd_lens.passes._output import default_output
from apd_lens.passes._watch import replaced_pass
from apd_lens.training._parts import PARTS, attacked, inactive


def run(state: apd.training.State, replaced, x: Tensor) -> Tensor:
    with torch.no_grad():
        return replaced_pass(state.target, state.components.names, replaced, state.target.read(x), default_output)[0]


@pytest.fixture
def state() -> apd.training.State:
    torch.manual_seed(0)
    return apd.init(ResidualMLP(4, 6, 5, 2), n_components=5, rank=2, moves=None)


ON = torch.tensor([[1, 1, 0, 0, 0], [0, 0, 1, 0, 0], [0, 0, 0, 0, 1]], dtype=torch.bool)


@pytest.mark.parametrize("with_rest", [False, True])
def test_in_some_matrices_the_others_are_the_models_own(state: apd.training.State, with_rest: bool):
    x, model = torch.randn(3, 4), state.target.model
    found = run(state, PARTS["matrices"](state.components, ON, draws(0, "a"), with_rest), x)
    # the same draws again
    again, names = draws(0, "a"), state.components.names
    mask = torch.maximum(ON.float(), torch.rand(ON.shape, generator=again))
    sizes = 1 + (len(names) * torch.rand(3, 1, generator=again)).long()
    chosen = torch.rand(3, len(names), generator=again).argsort(1).argsort(1) < sizes
    rest = torch.rand(3, generator=again) if with_rest else torch.zeros(3)
    assert 0 < chosen.float().mean() < 1
    weights = {name: matrix.value().clone() for name, matrix in state.target.weights.items()}
    for example in range(3):
        with torch.no_grad():
            for place, name in enumerate(names):
                if chosen[example, place]:
                    left = weights[name] - state.components.summed(name)
                    of_components = state.components.summed(name, mask[example])
                    matrix = state.target.weights[name]
                    matrix.parameter.copy_(matrix.to_host(of_components + rest[example] * left))
            expected = model(x[[example]])
            for name in names:
                matrix = state.target.weights[name]
                matrix.parameter.copy_(matrix.to_host(weights[name]))
        assert_close(found[[example]], expected)


def test_what_is_inactive_leaves_the_active_ones_out(state: apd.training.State):
    x = torch.randn(3, 4)
    everything, again, last = torch.ones_like(ON), draws(0, "a"), torch.eye(6)[5]
    whole = torch.rand(3, generator=again) < 0.5
    torch.rand(ON.shape, generator=again)
    rest = torch.rand(3, generator=again).masked_fill(whole, 1.0)
    assert_close(
        run(state, inactive(state.components, everything, draws(0, "a")), x),
        run(state, attacked(state.components, ~everything, rest[:, None] * last, True), x),
    )


def test_in_half_of_the_examples_all_that_is_inactive_is_on(state: apd.training.State):
    """With a seed that draws both."""
    x, nothing = torch.randn(40, 4), torch.zeros(40, 5, dtype=torch.bool)
    off = (run(state, inactive(state.components, nothing, draws(0, "a")), x) - state.target.model(x)).abs().amax(1)
    assert 10 < (off < 1e-6).sum() < 30


def test_an_attack_of_all_is_everything(state: apd.training.State):
    x = torch.randn(3, 4)
    found = run(state, attacked(state.components, ON, torch.ones(3, 6), True), x)
    assert_close(found, state.target.model(x))


def test_noise_stands_for_inactive_ones_alone(state: apd.training.State):
    x, make = torch.randn(3, 4), PARTS["noise"]
    alone = run(state, attacked(state.components, torch.ones_like(ON), torch.zeros(3, 6), False), x)
    assert_close(run(state, make(state.components, torch.ones_like(ON), draws(0, "a"), False), x), alone)
    one, other = (run(state, make(state.components, ON, draws(seed, "a"), False), x) for seed in (0, 1))
    assert (one != other).any()


@pytest.mark.parametrize("parts", PARTS)
def test_each_can_be_trained_with(parts: str):
    model, x = ResidualMLP(4, 6, 5, 1), torch.randn(8, 4)
    state = apd.init(model, n_components=5, rank=2, losses=apd.Losses(parts=parts, completeness=1.0), moves=None)
    state, info = apd.step(state, x)
    assert info.terms["path"] > 0
    assert info.terms["completeness"] > 0
