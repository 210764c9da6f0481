import warnings

import pytest
from torch import nn

import apd_lens as apd
from apd_lens.host._unchanged import check_unchanged, digests_of_others, warn_of_others


def test_changed_weights_are_named():
    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2))
    target = apd.wrap(model)
    known = {name: matrix.fingerprint() for name, matrix in target.weights.items()}
    check_unchanged(target, known)
    model[1].weight.data[0, 0] += 1
    with pytest.raises(apd.errors.WeightsChanged, match=r"1\.weight has other weights"):
        check_unchanged(target, known)


def test_a_warning_names_what_else_differs():
    model = nn.Sequential(nn.Linear(3, 2), nn.LayerNorm(2))
    target = apd.wrap(model)
    saved = digests_of_others(target, ["0.weight"])
    assert saved.keys() == {"0.bias", "1.weight", "1.bias"}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_of_others(target, ["0.weight"], saved)
    model[1].bias.data[0] = 7
    with pytest.warns(apd.errors.ApdWarning, match=r"1 of its other 3 parameters and buffers .*: 1\.bias"):
        warn_of_others(target, ["0.weight"], saved)
