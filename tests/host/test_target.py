import pytest
import torch
from support.toy_models import Snapshot
from torch import nn

import apd_lens as apd
from apd_lens.host._target import evaluating


def model() -> nn.Sequential:
    return nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.5), nn.Linear(4, 2), nn.Linear(2, 2))


def test_patterns_match_in_the_models_order_and_once():
    target = apd.wrap(model())
    assert target.match("*") == ["0.weight", "2.weight", "3.weight"]
    assert target.match(["3.*", "*.weight"]) == ["0.weight", "2.weight", "3.weight"]
    with pytest.raises(apd.UnknownWeight, match=r"No weight matches '9\.\*'"):
        target.match("9.*")


def test_inside_the_model_is_in_eval_mode_and_afterwards_as_it_was():
    module = model().train()
    module[0].eval()
    before = Snapshot.of(module)
    with evaluating(module):
        assert not any(part.training for part in module.modules())
    before.assert_unchanged(module)


def test_what_is_intercepted_sees_the_input_and_gives_the_output():
    module, x = model().eval(), torch.randn(5, 3)
    seen = []

    def twice(use, given, original, bias):
        seen.append((use.matrix, given.shape, bias is not None))
        return 2 * original()

    expected = module[3](module[2](2 * module[0](x)))
    with apd.wrap(module).intercepted(["0.weight"], twice):
        assert torch.allclose(module(x), expected)
    assert seen == [("0.weight", (5, 3), True)]
