import pytest
import torch
from support.shares import N_DRAWN, seeded, within_four_sigma
from torch.testing import assert_close

import apd_lens as apd
from apd_lens import toys


def test_gated_data_has_an_input_and_control_bits():
    x = toys.gated_data(N_DRAWN, seeded())
    assert x.shape == (N_DRAWN, 5)
    assert 0 <= x[:, 0].min() < 0.01
    assert 4.99 < x[:, 0].max() < 5
    assert set(x[:, 1:].flatten().tolist()) == {0.0, 1.0}
    assert within_four_sigma(x[:, 1:].mean().item(), 0.05, 4 * N_DRAWN)


@pytest.fixture(scope="module")
def gated() -> toys.GatedTarget:
    return toys.make_gated_functions()


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
        (lambda: toys.make_gated_functions(neurons_per_function=9), "got neurons_per_function=9 and n_layers=2"),
        (lambda: toys.make_gated_functions(neurons_per_function=1, n_layers=1), "must be at least 2, got 1"),
    ],
)
def test_sizes_that_cannot_be_are_refused(make, message: str):
    with pytest.raises(apd.errors.InvalidSetting, match=message):
        make()
