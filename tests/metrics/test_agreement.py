import math

import pytest
import torch

from apd_lens import metrics


def test_agreement_by_hand():
    """softmax(0, 0) = (½, ½) and softmax(ln 3, 0) = (¾, ¼): KL = ½ ln(½ / ¾) + ½ ln(½ / ¼) = ½ ln(4/3)."""
    target = torch.tensor([[1.0, 0.0], [0.0, 0.0]])
    other = torch.tensor([[1.0, 0.0], [math.log(3), 0.0]])
    found = metrics.agreement(target, other)
    assert found.mse == pytest.approx(math.log(3) ** 2 / 4)
    assert found.kl == pytest.approx(math.log(4 / 3) / 4)
    assert found.top1 == 1
    assert metrics.agreement(target, target) == metrics.Agreement(0.0, 0.0, 1.0)
    assert metrics.agreement(target, torch.tensor([[0.0, 1.0], [1.0, 0.0]])).top1 == 0.5
