import math

import pytest
import torch
from support.shares import N_DRAWN, seeded, within_four_sigma
from torch.testing import assert_close

import apd_lens as apd
from apd_lens import toys


def test_residual_mlp_data_is_sparse_and_uniform():
    x = toys.residual_mlp_data(N_DRAWN, seeded())
    active = x != 0
    assert within_four_sigma(active.float().mean().item(), 0.01, x.numel())
    values = x[active].sort().values
    uniform = torch.linspace(-1, 1, len(values))
    assert (values - uniform).abs().max() < 4 / math.sqrt(len(values))  # Kolmogorov-Smirnov, twice over


@pytest.fixture(scope="module", params=[1, 2])
def residual_mlp(request) -> toys.ResidualMLPTarget:
    return toys.train_residual_mlp(request.param, n_features=8, d_resid=64, n_neurons=8, probability=0.1, steps=400)


def test_the_residual_mlp_has_fixed_embeddings(residual_mlp: toys.ResidualMLPTarget):
    model = residual_mlp.model
    W_E = model.W_E.weight.mT
    assert_close(W_E.norm(dim=1), torch.ones(8))
    assert torch.equal(model.W_U.weight.mT, W_E.mT)
    assert set(residual_mlp.weights) == set(apd.wrap(model).match("layers.*"))
    n_layers = len(model.layers)
    torch.manual_seed(0)
    assert torch.equal(toys.ResidualMLP(8, 64, 8 // n_layers, n_layers).W_E.weight, model.W_E.weight)


def test_the_folded_residual_mlp_is_the_same_function(residual_mlp: toys.ResidualMLPTarget):
    x = residual_mlp.batches(64)(0)
    assert_close(residual_mlp.model.folded(x), residual_mlp.model(x))


def test_training_a_residual_mlp_with_enough_neurons_computes_relu(residual_mlp: toys.ResidualMLPTarget):
    """Without its MLPs the error is at least E[relu(x)²] = p/6, were W_E orthogonal."""
    without = toys.train_residual_mlp(1, n_features=8, d_resid=64, n_neurons=8, probability=0.1, steps=0)
    assert residual_mlp.loss < 0.2 * 0.1 / 6 < without.loss


def test_contributions_are_what_neurons_do_to_their_own_outputs(residual_mlp: toys.ResidualMLPTarget):
    """The slope of output i in input i through each neuron of a layer that reads the embedding, found by running it."""
    model, target = residual_mlp.model, residual_mlp.contributions
    mlp = model.layers[0]
    read = mlp.mlp_in(model.W_E.weight.mT)
    for neuron in range(read.shape[1]):
        only = torch.zeros_like(read)
        only[:, neuron] = read[:, neuron]
        assert_close(model.W_U(mlp.mlp_out(only)).diag(), target[:, neuron])
    assert target.shape == (8, 8)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: toys.train_residual_mlp(2, n_neurons=25), "got n_neurons=25 and n_layers=2"),
    ],
)
def test_sizes_that_cannot_be_are_refused(make, message: str):
    with pytest.raises(apd.errors.InvalidSetting, match=message):
        make()
