"""Whether a model's matrices are what they were: digests of them, and marks that tell cheaply that nothing changed."""

from typing import Any

import torch
from torch import Tensor, nn

from apd_lens.host._matrix import WeightMatrix

# So many numbers are looked at: of a matrix where torch says that it did not change, of tensors beside the matrices.
SAMPLED = 2**20


def mark(matrix: "WeightMatrix") -> tuple[Any, ...]:
    """Differs once a matrix was put in another place, or written to through torch."""
    return tuple(map(_mark, [matrix.parameter] if matrix.bias is None else [matrix.parameter, matrix.bias_parameter]))


def mark_of_model(model: nn.Module) -> tuple[Any, ...]:
    """The same of all parameters and buffers."""
    return tuple(map(_mark, [*model.parameters(), *model.buffers()]))


def _mark(tensor: Tensor) -> tuple[Any, ...]:
    return id(tensor), 0 if tensor.is_meta else tensor.data_ptr(), tensor.dtype, _version(tensor)


def _version(tensor: Tensor) -> int:
    """0 where torch does not count."""
    return 0 if tensor.is_inference() else tensor._version


def sums_of(matrix: "WeightMatrix") -> Tensor:
    """Sums of rows with fixed coefficients, which also differ where torch was not told of a change (through `.data`,
    numpy). Large matrices are looked at in part."""
    value = matrix.value()
    rows = value[:: 1 + value.numel() // SAMPLED]
    rows = rows.to(torch.promote_types(rows.dtype, torch.float32))
    return (rows @ torch.arange(1, rows.shape[1] + 1, dtype=rows.dtype, device=rows.device).cos()).cpu()


class Fingerprints:
    """Digests of a model's matrices as they are, each computed anew only if its matrix may have changed."""

    def __init__(self) -> None:
        self._known: dict[str, tuple[tuple[Any, ...], Tensor, str]] = {}

    def of(self, matrix: "WeightMatrix", thorough: bool = True) -> str:
        """The matrix's digest.

        Args:
            thorough: look for changes that torch was not told of.
        """
        known = self._known.get(matrix.name)
        place = mark(matrix)
        if known is not None and known[0] == place and not thorough:
            return known[2]
        sums = sums_of(matrix)
        if known is None or known[0] != place or not torch.equal(known[1], sums):
            known = self._known[matrix.name] = place, sums, matrix.fingerprint()
        return known[2]
