"""Whether a model's matrices are what they were: digests of them, and marks that tell cheaply that nothing changed."""

import hashlib
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from apd_lens._errors import WeightsChanged

if TYPE_CHECKING:
    from apd_lens._target import TargetModel, WeightMatrix

# So many numbers of a tensor are looked at where torch says that it did not change, and in digests of other tensors.
_SAMPLED = 2**20


def digest(value: Tensor) -> str:
    """SHA-256 of a tensor: dtype, shape and bytes."""
    sha = hashlib.sha256(f"{value.dtype} {tuple(value.shape)} ".encode())
    sha.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return sha.hexdigest()


def mark(matrix: "WeightMatrix") -> tuple[Any, ...]:
    """Differs once a matrix was put in another place, or written to through torch."""
    tensors = [matrix.parameter] if matrix.bias is None else [matrix.parameter, matrix.bias_parameter]
    return tuple(
        (id(tensor), 0 if tensor.is_meta else tensor.data_ptr(), tensor.dtype, _version(tensor)) for tensor in tensors
    )


def _version(tensor: Tensor) -> int:
    """0 where torch does not count."""
    return 0 if tensor.is_inference() else tensor._version


def _sums(matrix: "WeightMatrix") -> Tensor:
    """Sums of rows with fixed coefficients, which also differ where torch was not told of a change (through `.data`,
    numpy). Large matrices are looked at in part."""
    value = matrix.value()
    rows = value[:: 1 + value.numel() // _SAMPLED]
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
        sums = _sums(matrix) if thorough or known is None or known[0] != place else known[1]
        if known is None or known[0] != place or not torch.equal(known[1], sums):
            known = self._known[matrix.name] = place, sums, matrix.fingerprint()
        return known[2]


def check_unchanged(target: "TargetModel", fingerprints: Mapping[str, str], thorough: bool = True) -> None:
    """Compares a model's matrices with those that were decomposed.

    Raises:
        WeightsChanged: names the first that differs.
    """
    for name, fingerprint in fingerprints.items():
        if target.fingerprints.of(target.weights[name], thorough) != fingerprint:
            raise WeightsChanged(
                f"{name} has other weights, or another dtype (here {target.weights[name].parameter.dtype}), than when "
                f"it was decomposed, so its components are not those of this {type(target.model).__name__}. Put back "
                "the weights and the dtype that it had, use a copy of the model for what changes them (training, "
                "folding, .half()), or decompose it again."
            )
