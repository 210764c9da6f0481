import math

import pytest
import torch
from torch.testing import assert_close

import apd_lens as apd
from apd_lens import toys

N_DRAWN = 20_000


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def within_four_sigma(share: float, probability: float, n: int) -> bool:
    return abs(share - probability) < 4 * math.sqrt(probability * (1 - probability) / n)


def test_tms_data_is_sparse_and_uniform():
    x = toys.tms_data(N_DRAWN, seeded(), n_features=5)
    active = x > 0
    assert within_four_sigma(active.float().mean().item(), 0.05, x.numel())
    assert x[active].mean().item() == pytest.approx(0.5, abs=0.02)
    assert x.max() < 1
    # Independent: both of a pair are active as often as chance has it.
    assert within_four_sigma((active[:, 0] & active[:, 1]).float().mean().item(), 0.05**2, N_DRAWN)


def test_co_occurring_features_are_active_in_pairs_with_values_of_their_own():
    x = toys.tms_data(N_DRAWN, seeded(), n_features=6, co_occurring=True)
    active = x > 0
    assert torch.equal(active[:, 0::2], active[:, 1::2])
    assert within_four_sigma(active[:, 0].float().mean().item(), 0.05, N_DRAWN)
    assert within_four_sigma((active[:, 0] & active[:, 2]).float().mean().item(), 0.05**2, N_DRAWN)
    both = x[active[:, 0], :2]
    assert abs(torch.corrcoef(both.T)[0, 1]) < 4 / math.sqrt(len(both))


def test_residual_mlp_data_is_sparse_and_uniform():
    x = toys.residual_mlp_data(N_DRAWN, seeded())
    active = x != 0
    assert within_four_sigma(active.float().mean().item(), 0.01, x.numel())
    values = x[active].sort().values
    uniform = torch.linspace(-1, 1, len(values))
    assert (values - uniform).abs().max() < 4 / math.sqrt(len(values))  # Kolmogorov-Smirnov, twice over


def test_gated_data_has_an_input_and_control_bits():
    x = toys.gated_data(N_DRAWN, seeded())
    assert x.shape == (N_DRAWN, 5)
    assert 0 <= x[:, 0].min() < 0.01
    assert 4.99 < x[:, 0].max() < 5
    assert set(x[:, 1:].flatten().tolist()) == {0.0, 1.0}
    assert within_four_sigma(x[:, 1:].mean().item(), 0.05, 4 * N_DRAWN)


@pytest.fixture(scope="module")
def tms() -> toys.TMSTarget:
    return toys.train_tms(steps=600, lr=2e-2)


@pytest.fixture(scope="module")
def tms_with_identity() -> toys.TMSTarget:
    return toys.train_tms(4, 2, identity_layer=True, co_occurring=True, steps=5)


@pytest.fixture(scope="module", params=[1, 2])
def residual_mlp(request) -> toys.ResidualMLPTarget:
    return toys.train_residual_mlp(request.param, n_features=8, d_resid=64, n_neurons=8, probability=0.1, steps=400)


@pytest.fixture(scope="module")
def gated() -> toys.GatedTarget:
    return toys.make_gated_functions()


def test_a_step_has_the_same_batch_every_time(tms: toys.TMSTarget):
    batches = tms.batches(7)
    assert batches(3).shape == (7, 5)
    assert torch.equal(batches(3), tms.batches(7)(3))
    assert not torch.equal(tms.batches(64)(3), tms.batches(64)(4))
    assert not torch.equal(tms.batches(64)(3), tms.batches(64, seed=1)(3))


def test_tms_has_one_matrix_with_two_uses(tms: toys.TMSTarget):
    matrix = apd.wrap(tms.model).weights["linear1.weight"]
    assert [(use.site, use.transposed) for use in matrix.uses] == [("linear1", False), ("linear2", True)]
    assert_close(matrix.value(), tms.rows, rtol=0, atol=0)
    assert torch.equal(tms.model.linear2.weight, tms.model.linear1.weight.mT)


def test_tms_is_what_its_formula_says(tms: toys.TMSTarget, tms_with_identity: toys.TMSTarget):
    for target in (tms, tms_with_identity):
        x, W, b = target.batches(32)(0), target.rows, target.model.linear2.bias
        assert_close(target.model(x), torch.relu(x @ W @ W.mT + b))


def test_tms_stays_tied_when_it_is_moved():
    model = toys.TMS(3, 2).to(torch.float64)
    assert len(apd.wrap(model).weights) == 1
    assert model.linear2.weight.requires_grad


def test_training_a_tms_makes_it_better_than_giving_zero_or_the_mean(tms: toys.TMSTarget):
    """Var x = p/3 − p²/4 = 0.01604 is the error of the best constant."""
    assert tms.loss < 0.5 * (0.05 / 3 - 0.05**2 / 4)
    assert not any(parameter.requires_grad for parameter in tms.model.parameters())


def test_the_same_seed_gives_the_same_target_and_leaves_torchs_own_alone():
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    first, again, other = (toys.train_tms(steps=3, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(torch.rand(1), expected)
    assert torch.equal(first.rows, again.rows)
    assert not torch.equal(first.rows, other.rows)


def test_the_mechanisms_of_a_tms_are_its_rows(tms: toys.TMSTarget):
    mechanisms = tms.mechanisms["linear1.weight"]
    assert_close(mechanisms.sum(0), tms.rows)
    for feature in range(5):
        assert_close(mechanisms[feature, feature], tms.rows[feature])
        assert mechanisms[feature].count_nonzero() == 2


def test_features_that_co_occur_are_one_mechanism_and_the_identity_layer_is_one(tms_with_identity: toys.TMSTarget):
    target = tms_with_identity
    assert target.weights == ["linear1.weight", "hidden.weight"] == list(apd.wrap(target.model).weights)
    rows, hidden = (target.mechanisms[name] for name in target.weights)
    assert_close(rows[0], torch.cat([target.rows[:2], torch.zeros(2, 2)]))
    assert_close(rows[1], torch.cat([torch.zeros(2, 2), target.rows[2:]]))
    assert not rows[2].any()
    assert torch.equal(hidden, torch.cat([torch.zeros(2, 2, 2), torch.eye(2)[None]]))
    assert torch.equal(target.model.hidden.weight, torch.eye(2))  # training left it alone


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


def test_gated_functions_are_coded_right(gated: toys.GatedTarget):
    x = gated.batches()(0)
    assert_close(gated.model(x), toys.gated_labels(x, gated.values), rtol=0, atol=1e-5)
    assert toys.gated_labels(x, gated.values).std() > 0.1
    assert gated.loss < 1e-10


def test_each_control_bit_switches_its_own_function(gated: toys.GatedTarget):
    x = torch.linspace(0, 5, 50)
    bits = torch.eye(4).repeat_interleave(50, 0)
    y = gated.model(torch.cat([x.repeat(4)[:, None], bits], 1)).view(4, 50)
    assert_close(y, toys.piecewise_linear(x, gated.values).mT, rtol=0, atol=1e-5)
    assert not gated.model(torch.cat([x[:, None], torch.zeros(50, 4)], 1)).any()


def test_each_function_owns_ten_neurons_over_two_layers(gated: toys.GatedTarget):
    for layer in (0, 1):
        read, written = (gated.owned[f"layers.{layer}.{side}.weight"] for side in ("mlp_in", "mlp_out"))
        assert read.any(1).sum(1).tolist() == [5, 5, 5, 5]
        assert torch.equal(read.any(1), written.any(2))
    # A piece reads x and the bit; the constant, one of the ten, reads the bit.
    assert sum(gated.owned[f"layers.{layer}.mlp_in.weight"].sum() for layer in (0, 1)) == 4 * 19


def test_gated_mechanisms_sum_to_the_weights_and_do_their_function_alone(gated: toys.GatedTarget):
    weights = apd.wrap(gated.model).weights
    assert gated.weights == list(weights)
    for name, mechanisms in gated.mechanisms.items():
        assert_close(mechanisms.sum(0), weights[name].value(), rtol=0, atol=0)
        assert gated.owned[name].sum(0).max() == 1
    identities = {name: torch.eye(m.shape[1]).expand(4, -1, -1) for name, m in gated.mechanisms.items()}
    components = apd.ParameterComponents(identities, gated.mechanisms)
    state = apd.init(gated.model, n_components=4, rank=1)
    decomposition = apd.Decomposition(
        apd.wrap(gated.model), components.requires_grad_(False), state.settings, state.output, state.fingerprints
    )
    x = gated.batches(500)(0)
    with decomposition.sparse(x[:, 1:].bool()):
        alone = gated.model(x)
    with decomposition.sparse(x[:, 1:].roll(1, dims=1).bool()):
        wrong = gated.model(x)
    assert_close(alone, gated.model(x), rtol=0, atol=1e-5)
    assert (wrong - gated.model(x)).abs().max() > 0.1


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: toys.train_tms(5, 2, co_occurring=True), "n_features must be even, got 5"),
        (lambda: toys.train_residual_mlp(2, n_neurons=25), "got n_neurons=25 and n_layers=2"),
        (lambda: toys.make_gated_functions(neurons_per_function=9), "got neurons_per_function=9 and n_layers=2"),
        (lambda: toys.make_gated_functions(neurons_per_function=1, n_layers=1), "must be at least 2, got 1"),
    ],
)
def test_sizes_that_cannot_be_are_refused(make, message: str):
    with pytest.raises(apd.InvalidSetting, match=message):
        make()
