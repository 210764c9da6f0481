import pytest
import torch
from torch import nn
from torch.testing import assert_close

import apd_lens as apd
from apd_lens.host import Use, WeightMatrix


def matrix(module: nn.Module, layout: str, **axes: int) -> WeightMatrix:
    use = Use("w", "w")
    return WeightMatrix("w", module, "weight", layout, (use,), ("weight",), axes)


@pytest.mark.parametrize(
    ("shape", "layout", "axes"),
    [
        ((3, 4), "d_out d_in -> d_in d_out", {}),
        ((4, 3), "d_in d_out -> d_in d_out", {}),
        ((2, 4, 3), "head d_in d_head -> d_in (head d_head)", {"head": 2}),
    ],
)
def test_layouts_go_there_and_back(shape, layout, axes):
    module = nn.Module()
    module.weight = nn.Parameter(torch.randn(shape))
    view = matrix(module, layout, **axes)
    assert (view.d_in, view.d_out) == tuple(view.value().shape)
    assert torch.equal(view.to_host(view.value()), module.weight)
    assert torch.equal(view.state(view.value())["weight"], module.weight)


def test_a_bias_is_one_more_row():
    linear = nn.Linear(4, 3)
    view = apd.wrap(linear, biases=True).weights["weight"]
    assert (view.d_in, view.d_out) == (5, 3)
    assert_close(view.value(), torch.cat([linear.weight.mT, linear.bias[None]]).detach())
    state = view.state(2 * view.value())
    assert_close(state["weight"], 2 * linear.weight.detach())
    assert_close(state["bias"], 2 * linear.bias.detach())


def test_digests_tell_numbers_and_dtypes_apart():
    linear = nn.Linear(4, 3)
    view = matrix(linear, "d_out d_in -> d_in d_out")
    first = view.fingerprint()
    assert view.fingerprint() == first
    linear.weight.data[0, 0] += 1
    second = view.fingerprint()
    linear.bfloat16()
    assert len({first, second, view.fingerprint()}) == 3


def test_places_in_memory():
    linear, other = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)
    layout = "d_out d_in -> d_in d_out"
    place = matrix(linear, layout).place_in_memory()
    assert place != matrix(other, layout).place_in_memory()
    other.weight = nn.Parameter(linear.weight.data)
    assert place == matrix(other, layout).place_in_memory()
    other.weight = nn.Parameter(linear.weight.data.T)
    assert place != matrix(other, layout).place_in_memory()


def test_a_matrix_without_numbers_is_refused():
    with pytest.raises(apd.UnsupportedModel, match="w is on the meta device"):
        matrix(nn.Linear(4, 3, device="meta"), "d_out d_in -> d_in d_out").value()
