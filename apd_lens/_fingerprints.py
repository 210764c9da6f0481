"""Whether a model's matrices are what they were: digests of them, and marks that tell cheaply that nothing changed."""

import hashlib
import warnings
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from apd_lens._errors import ApdWarning, WeightsChanged

if TYPE_CHECKING:
    from apd_lens._target import TargetModel, WeightMatrix

# So many numbers are looked at: of a matrix where torch says that it did not change, of tensors beside the matrices.
_SAMPLED = 2**20


def mark(matrix: "WeightMatrix") -> tuple[Any, ...]:
    """Differs once a matrix was put in another place, or written to through torch."""
    tensors = [matrix.parameter] if matrix.bias is None else [matrix.parameter, matrix.bias_parameter]
    return tuple(
        (id(tensor), 0 if tensor.is_meta else tensor.data_ptr(), tensor.dtype, _version(tensor)) for tensor in tensors
    )


def _version(tensor: Tensor) -> int:
    """0 where torch does not count."""
    return 0 if tensor.is_inference() else tensor._version


def sums_of(matrix: "WeightMatrix") -> Tensor:
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
        sums = sums_of(matrix) if thorough or known is None or known[0] != place else known[1]
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


def digests_of_others(target: "TargetModel", names: Iterable[str]) -> dict[str, str]:
    """Key -> a short digest of each tensor in the model's state dict that is not of the named matrices. Large ones are
    looked at in part."""
    decomposed = {key for name in names for key in target.weights[name].state(target.weights[name].value())}
    return {
        key: _short_digest(tensor)
        for key, tensor in target.model.state_dict().items()
        if key not in decomposed and isinstance(tensor, Tensor) and tensor.layout == torch.strided
        if not tensor.is_meta and not tensor.is_quantized
    }


def _short_digest(tensor: Tensor) -> str:
    numbers = tensor.detach().flatten()[:: 1 + tensor.numel() // _SAMPLED].cpu().contiguous()
    digest = hashlib.blake2b(f"{tensor.dtype} {tuple(tensor.shape)} ".encode(), digest_size=4)
    digest.update(numbers.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def warn_of_others(target: "TargetModel", names: Iterable[str], saved: Mapping[str, str]) -> None:
    """Warns where tensors of the model that are not of the named matrices differ from those with the saved digests."""
    here = digests_of_others(target, names)
    differing = [key for key in {**saved, **here} if saved.get(key) != here.get(key)]
    if differing:
        warnings.warn(
            f"The decomposed matrices are those of this {type(target.model).__name__}, but {len(differing)} of its "
            f"other {len({**saved, **here})} parameters and buffers are not what they were when the decomposition was "
            f"saved: {', '.join(differing[:3])}{', ...' if len(differing) > 3 else ''}. Outputs and attributions are "
            "then of another model. Load it onto the model that was decomposed, with all that it had (biases, norms, "
            "other layers).",
            ApdWarning,
            stacklevel=3,
        )
