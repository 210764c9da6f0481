"""NaN and infinity, reported where they first appear: at once on a CPU; on a GPU a step late, so that it need not be
waited for, with the optimizer told on the device not to learn from them."""

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from apd_lens._errors import ApdError, NonFinite
from apd_lens._processes import summed

# Numbers that are looked at at once.
_AT_ONCE = 2**22


@dataclass(frozen=True, eq=False)
class Reading:
    """A number that is 0 if all is well, and what there is to say if it is not."""

    value: Float[Tensor, ""] | Int[Tensor, ""]
    message: Callable[[float], str]
    error: type[ApdError] = NonFinite


def on_gpu(device: torch.device) -> bool:
    """Whether work on a device is only queued there, and whoever looks at a result has to wait for it."""
    return device.type == "cuda"


def count_not_finite(values: Tensor) -> Int[Tensor, ""]:
    """How many values are NaN or infinite."""
    # Of some at a time: torch makes the absolute values of all.
    return torch.stack([(~some.isfinite()).sum() for some in values.reshape(-1).split(_AT_ONCE)]).sum()


def reading_of_attributions(attributions: Tensor, where: str) -> Reading:
    """How many attributions are NaN or infinite."""
    return Reading(
        count_not_finite(attributions),
        lambda count: (
            f"{where}: {count:.0f} attributions are NaN or infinite, though the target's output is not. Its gradient "
            "is: such as that of a softmax over nothing, where a position attends to none. Let every position attend "
            "to itself, those of padding too. Nothing was learnt from it."
        ),
    )


def raise_first(readings: Sequence[Reading]) -> None:
    """Raises NonFinite for the first reading that is not 0. Waits for the device."""
    for reading in readings:
        if value := reading.value.item():
            raise reading.error(reading.message(value))


class LateChecks:
    """Readings of the steps of a training that the host has not looked at yet.

    Attributes:
        failed: on the device, 1 from the first reading on that is not 0, until it is raised. Torch's fused optimizers
            take it for their `found_inf` and change nothing while it is 1, so a late look is early enough.
    """

    def __init__(self, device: torch.device):
        self.failed = torch.zeros((), device=device, dtype=torch.float32)
        self._unread: deque[tuple[Tensor, torch.cuda.Event | None, Sequence[Reading]]] = deque()

    def add(self, readings: Sequence[Reading]) -> None:
        """Readings of one step, before its update."""
        values = torch.stack([reading.value.to(self.failed) for reading in readings])
        of_all = summed(values)
        self.failed.masked_fill_((of_all != 0).any(), 1.0)
        on_host = torch.stack([values, of_all]).to("cpu", non_blocking=True)  # pinned
        arrived = None
        if values.is_cuda:
            arrived = torch.cuda.Event()
            arrived.record()
        self._unread.append((on_host, arrived, readings))

    def read(self, but: int = 0) -> None:
        """Raises NonFinite for the first reading that is not 0, of all steps but the last so many. Afterwards the
        training can go on."""
        while len(self._unread) > but:
            on_host, arrived, readings = self._unread.popleft()
            if arrived is not None:
                arrived.synchronize()
            for value, of_all, reading in zip(*on_host.tolist(), readings, strict=True):
                if of_all:
                    self._unread.clear()
                    self.failed.zero_()
                    raise reading.error(reading.message(value) if value else "Another process met NaN or infinity.")
