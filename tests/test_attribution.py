"""Attributions on models whose answer is known by hand, or by brute force."""

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close
from toy_models import ResidualMLP, decomposition_of, linear_of_known_parts

import apd_lens as apd
from apd_lens import _attribution
from apd_lens._attribution import component_effects
from apd_lens._decomposition import Decomposition


def known() -> Decomposition:
    """y = x @ diag(1, 2, 3, 4), the four diagonal entries as components."""
    model, components = linear_of_known_parts()
    start = decomposition_of(model, n_components=4, rank=1, selection=apd.TopK(1))
    return Decomposition(start.target, components, start.settings, start.output, start.fingerprints)


def test_known_parts_have_known_attributions():
    """∂y_o/∂y = 1, so A_c(x) = sqrt(mean_o (scale_c x_c [o = c])²) = scale_c |x_c| / 2 with four outputs."""
    x = torch.tensor([[1.0, -1.0, 0.0, 0.5], [0.0, 0.0, 2.0, 1.0]])
    expected = torch.tensor([[0.5, 1.0, 0.0, 1.0], [0.0, 0.0, 3.0, 2.0]])
    assert_close(known().attributions(x), expected)


def test_known_parts_have_the_right_top_component_and_are_faithful():
    decomposition = known()
    x = torch.eye(4)
    assert torch.equal(decomposition.select(x), torch.eye(4, dtype=torch.bool))
    assert decomposition.residuals() == {"weight": 0.0, "all": 0.0}
    weight = decomposition.target.weights["weight"].value()
    assert apd.faithfulness_loss(weight, decomposition.components.summed("weight")) == 0
    with decomposition.sparse(decomposition.select(x)):
        assert_close(decomposition.target.model(x), torch.diag(torch.tensor([1.0, 2.0, 3.0, 4.0])))
    assert torch.equal(decomposition.select(x[:1], k=3).sum(-1), torch.tensor([3]))


def test_signed_attributions_to_a_metric():
    """y_0 − y_3 = x_0 − 4 x_3."""
    x = torch.tensor([[1.0, 1.0, 1.0, 1.0], [2.0, 0.0, 0.0, -1.0]])
    signed = known().attributions(x, metric=lambda y: y[:, 0] - y[:, 3])
    assert_close(signed, torch.tensor([[1.0, 0.0, 0.0, -4.0], [2.0, 0.0, 0.0, 4.0]]))


def test_a_metric_that_is_no_scalar_an_example_is_refused():
    with pytest.raises(apd.ShapeMismatch, match=r"one scalar an example, shape \(2,\), got \(\)"):
        known().attributions(torch.ones(2, 4), metric=lambda y: y.sum())


@pytest.mark.parametrize("method", [apd.GradientAttribution(), apd.ActivationAttribution()])
def test_reordering_components_reorders_results(method):
    model, x, order = ResidualMLP(4, 6, 5, 1), torch.randn(3, 4), torch.tensor([3, 0, 4, 1, 2])
    state = apd.init(model, n_components=5, rank=2, attribution=method, selection=apd.BatchTopK(2.0))
    decomposition, components = state.decomposition(), state.components
    reordered = Decomposition(
        decomposition.target,
        apd.ParameterComponents(
            {name: A[order] for name, A in components.A.items()}, {name: B[order] for name, B in components.B.items()}
        ),
        decomposition.settings,
        decomposition.output,
        decomposition.fingerprints,
    )
    assert_close(reordered.attributions(x), decomposition.attributions(x)[:, order])
    assert torch.equal(reordered.select(x), decomposition.select(x)[:, order])
    with decomposition.sparse(decomposition.select(x)):
        expected = model(x)
    with reordered.sparse(reordered.select(x)):
        assert_close(model(x), expected)


def test_chunks_of_outputs_change_nothing(monkeypatch):
    decomposition, x = decomposition_of(ResidualMLP(7, 6, 5, 2)), torch.randn(3, 7)
    whole = decomposition.attributions(x)
    monkeypatch.setattr(_attribution, "_CHUNK_BYTES", 1)
    assert_close(decomposition.attributions(x), whole)


@pytest.mark.parametrize("granularity", ["example", "position"])
def test_both_orders_of_multiplication_agree(granularity):
    """One output or rank one takes another path than several outputs with a higher rank."""
    jacobian, x = torch.randn(3, 2, 4, 5), torch.randn(2, 4, 6)
    A, B = torch.randn(7, 6, 2), torch.randn(7, 2, 5)
    together = component_effects(jacobian, x, A, B, granularity)
    for out in range(3):
        alone = component_effects(jacobian[out : out + 1], x, A, B, granularity)
        assert_close(together[out : out + 1], alone, rtol=1e-4, atol=1e-5)
    parts = sum(component_effects(jacobian, x, A[..., m : m + 1], B[:, m : m + 1], granularity) for m in range(2))
    assert_close(together, parts, rtol=1e-4, atol=1e-5)


class Mixing(torch.nn.Module):
    """Positions mix: each sees the sum of those up to it."""

    def __init__(self):
        super().__init__()
        self.read, self.write = torch.nn.Linear(3, 4), torch.nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.write(torch.tanh(self.read(x)).cumsum(1))


@pytest.mark.parametrize("component", [0, 1])
def test_attributions_of_positions_equal_finite_differences(component: int):
    """∂f/∂ε where component c is scaled by 1 + ε at one position, with components that sum to the weights."""
    model = Mixing().double()
    read, write = model.read.weight.detach().T, model.write.weight.detach().T
    part = torch.rand(3, 4, dtype=torch.float64)
    A = {"read.weight": torch.eye(3).double().expand(2, 3, 3), "write.weight": write[None].repeat(2, 1, 1) / 2}
    B = {"read.weight": torch.stack([part, read - part]), "write.weight": torch.eye(2).double().expand(2, 2, 2)}
    start = decomposition_of(model, n_components=2, selection=apd.TopK(1, granularity="position"))
    decomposition = Decomposition(
        start.target, apd.ParameterComponents(A, B), start.settings, start.output, start.fingerprints
    )
    x, step = torch.randn(2, 5, 3, dtype=torch.float64), 1e-5
    attributions = decomposition.attributions(x)
    assert attributions.shape == (2, 5, 2)
    for position in range(5):
        outputs = []
        for sign in (1, -1):
            mask = torch.ones(2, 5, 2, dtype=torch.float64)
            mask[:, position, component] += sign * step
            with decomposition.sparse(mask):
                outputs.append(model(x).detach())
        derivative = ((outputs[0] - outputs[1]) / (2 * step)).flatten(1)
        expected = derivative.square().mean(1).sqrt()
        assert_close(attributions[:, position, component], expected, rtol=1e-6, atol=1e-8)


def test_matrices_on_different_positions_cannot_share_position_attributions():
    class Pooling(Mixing):
        def forward(self, x: Tensor) -> Tensor:
            return self.write(torch.tanh(self.read(x)).sum(1))

    decomposition = decomposition_of(Pooling(), selection=apd.TopK(1, granularity="position"))
    with pytest.raises(apd.ShapeMismatch, match=r"write\.weight was used on \(2,\)|\(2, 5\)"):
        decomposition.attributions(torch.randn(2, 5, 3))


def test_an_output_that_no_matrix_reaches_is_reported():
    model = torch.nn.ModuleDict({"linear": torch.nn.Linear(2, 2)})
    model.forward = lambda x: (model["linear"](x), x * model["linear"].bias)
    decomposition = decomposition_of(model, output=lambda pair: pair[1])
    with pytest.raises(apd.ShapeMismatch, match="does not depend on any of the decomposed matrices"):
        decomposition.attributions(torch.ones(1, 2))


def test_attributions_leave_no_graph_and_work_without_gradients():
    decomposition, x = known(), torch.randn(2, 4)
    expected = decomposition.attributions(x)
    assert not expected.requires_grad
    with torch.no_grad():
        assert torch.equal(decomposition.attributions(x), expected)
    with torch.inference_mode():
        assert torch.equal(decomposition.attributions(x), expected)
        assert torch.equal(decomposition.attributions(x + 0), expected)  # a tensor of inference mode


def test_dropout_is_off_during_attributions_and_back_after():
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Dropout(0.5), torch.nn.BatchNorm1d(4)).train()
    model[2].eval()
    decomposition, x = decomposition_of(model), torch.randn(3, 4)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    assert torch.equal(decomposition.attributions(x), decomposition.attributions(x))
    assert [module.training for module in model] == [True, True, False]
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
