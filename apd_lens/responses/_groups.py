"""Components that are handled together."""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from apd_lens.data._batch import same_but_for_examples
from apd_lens.data._inputs import Inputs, joined_inputs
from apd_lens.responses._responses import TopExamples


@dataclass(frozen=True, eq=False)
class _Group:
    """Kept examples of one shape, as one batch.

    Attributes:
        place: number of an example -> where it is in the batch.
    """

    inputs: Inputs
    place: dict[int, int]

    def places(self, numbers: Tensor) -> Int[Tensor, "..."]:
        """Where the examples of these numbers are in the batch; −1 for those that are not."""
        found = [self.place.get(number, -1) for number in numbers.flatten().tolist()]
        return torch.tensor(found, dtype=torch.long, device="cpu").view(numbers.shape)


def component_groups(top: TopExamples) -> list[_Group]:
    alike: dict[Any, list[int]] = {}
    for number, inputs in top.read.items():
        alike.setdefault(same_but_for_examples(inputs.batch, inputs.of_examples), []).append(number)
    return [
        _Group(joined_inputs([top.read[number] for number in numbers]), {number: i for i, number in enumerate(numbers)})
        for numbers in alike.values()
    ]
