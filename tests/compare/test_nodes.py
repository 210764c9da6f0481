import pytest
import torch
from torch import nn

import apd_lens as apd

pytest.importorskip("pandas")
from apd_lens.compare._nodes import layer_of, node_name, unit_numbers, units_by_name
from apd_lens.host._matrix import Units


def test_names_and_layers():
    assert [layer_of(name) for name in ("h.2.mlp.0", "embed", "blocks.10")] == [2, None, 10]
    assert [node_name("head", 3, 7), node_name("neuron", None, 12)] == ["a3.7", "m12"]


def test_units_of_columns_in_blocks():
    assert unit_numbers(Units("head", "out", 2), 4).tolist() == [0, 0, 1, 1]
    assert unit_numbers(Units("head", "out", 2, copies=2), 8).tolist() == [0, 0, 1, 1] * 2
    assert unit_numbers(Units("neuron", "in", 3), 4).tolist() == [0, 1, 2, 3]  # the last row is that of the bias


def test_units_that_the_user_gives():
    target = apd.wrap(nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)))
    given = units_by_name(target, list(target.weights), {"0.*": Units("head", "out", 2)})
    assert given["0.weight"] == Units("head", "out", 2)
    with pytest.raises(apd.errors.InvalidSetting, match="cannot be cut into blocks of one width"):
        units_by_name(target, list(target.weights), {"0.*": Units("head", "out", 3)})
    assert torch.equal(unit_numbers(given["0.weight"], 4), torch.tensor([0, 0, 1, 1]))
