"""A HookedTransformer in each context, beside one whose weights were really replaced."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import pytest
import torch
from support.toy_models import decomposition_of, substituted
from torch import Tensor
from torch.testing import assert_close
from transformer_lens import HookedTransformer

import apd_lens as apd

MASK = torch.tensor([True, True, False, True, False]).expand(3, -1)


@dataclass(frozen=True, eq=False)
class Case:
    """A decomposition of every matrix, one of our contexts, and the weights that it stands for."""

    decomposition: apd.Decomposition
    enter: Callable[[], AbstractContextManager[None]]
    weights: dict[str, Tensor] = field(default_factory=dict)

    @property
    def model(self) -> HookedTransformer:
        return self.decomposition.target.model

    def replaced(self) -> AbstractContextManager[None]:
        return substituted(self.decomposition.target, self.weights)

    def check(self, run: Callable[[HookedTransformer], Any], tolerance: float = 1e-4) -> None:
        """`run` returns the same inside the context and with replaced weights, and something else outside."""
        with self.replaced():
            expected = run(self.model)
        with self.enter():
            came = run(self.model)
        assert_close(came, expected, rtol=tolerance, atol=tolerance)
        with pytest.raises(AssertionError):
            assert_close(run(self.model), expected, rtol=tolerance, atol=tolerance)


def case_of(model: HookedTransformer, context: str) -> Case:
    decomposition = decomposition_of(model, rank=3)
    components, weights = decomposition.components, decomposition.target.weights
    chosen = torch.tensor([0.0, 1.0, 0.0, 0.0, 1.0])
    match context:
        case "sparse":
            summed = {name: components.summed(name, MASK[0].float()) for name in components.names}
            return Case(decomposition, partial(decomposition.sparse, MASK), summed)
        case "ablate":
            left = {name: weights[name].value() - components.summed(name, chosen) for name in components.names}
            return Case(decomposition, partial(decomposition.ablate, [1, 4]), left)
        case "only":
            summed = {name: components.summed(name, chosen) for name in components.names}
            return Case(decomposition, partial(decomposition.only, [1, 4]), summed)
    raise AssertionError(context)
