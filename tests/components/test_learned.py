import pytest
import torch
from torch import nn

from apd_lens.components._learned import Learned


class Bias(Learned):
    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.arange(4.0))

    @property
    def of_components(self):
        return [self.bias]

    def reset(self, component: int) -> None:
        with torch.no_grad():
            self.bias[component] = -1.0


def test_moves_are_followed():
    learned = Bias()
    learned.copy_to(0, 3)
    learned.join(1, 2)
    assert learned.bias.tolist() == [3.0, 3.0, -1.0, 3.0]


def test_it_says_what_it_needs():
    with pytest.raises(NotImplementedError):
        Learned().copy_to(0, 1)
