import pytest
from torch import nn

import apd_lens as apd
from apd_lens.host import Adapter
from apd_lens.host._torch_modules import TorchAdapter


def test_torch_modules_are_taken_apart_by_their_leaves():
    model = nn.Sequential(nn.Linear(2, 3), nn.ReLU())
    target = apd.wrap(model)
    assert target.model is model
    assert isinstance(target.adapter, TorchAdapter)
    assert isinstance(target.adapter, Adapter)
    assert apd.wrap(target) is target
    assert apd.wrap(target, biases=True).weights["0.weight"].d_in == 3


@pytest.mark.parametrize("value", ["model", 3, None, nn.Linear])
def test_what_is_no_model_is_refused(value):
    with pytest.raises(apd.UnsupportedModel, match=r"Expected a model, got builtins\."):
        apd.wrap(value)
