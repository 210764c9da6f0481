import pytest
import torch
from support.toy_models import Snapshot
from torch import nn
from torch.testing import assert_close

import apd_lens as apd
from apd_lens.host._sites import activations_kept, reading, rewriting, site_module


def model() -> nn.Sequential:
    return nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))


def test_activations_are_read_and_written():
    module, x = model(), torch.randn(5, 3)
    before = Snapshot.of(module)
    with reading(module, ["1"]) as read, activations_kept(module, ["0"]) as kept:
        module(x)
    assert torch.equal(read["1"], module[:2](x).detach())
    assert kept["0"].requires_grad
    expected = module[2](2 * module[:2](x))
    with rewriting(module, {"1": lambda activation: 2 * activation}):
        assert_close(module(x), expected)
    before.assert_unchanged(module)


def test_unknown_and_uncalled_sites_are_named():
    with pytest.raises(apd.errors.InvalidSetting, match=r"has no submodule '7'.*closest are"):
        site_module(model(), "7")
    with reading(module := model(), ["2"]) as kept:
        module[0](torch.randn(1, 3))
    with pytest.raises(apd.errors.SiteNotCalled, match="did not call '2'"):
        kept["2"]
