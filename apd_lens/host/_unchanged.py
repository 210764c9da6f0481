"""Whether a model is what was decomposed."""

import hashlib
import warnings
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from apd_lens._errors import ApdWarning, WeightsChanged
from apd_lens.host._fingerprints import SAMPLED
from apd_lens.host._target import TargetModel


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
        key: short_digest(tensor)
        for key, tensor in target.model.state_dict().items()
        if key not in decomposed and isinstance(tensor, Tensor) and tensor.layout == torch.strided
        if not tensor.is_meta and not tensor.is_quantized
    }


def short_digest(tensor: Tensor) -> str:
    """A digest of dtype, shape and numbers; of large tensors some of the numbers."""
    numbers = tensor.detach().flatten()[:: 1 + tensor.numel() // SAMPLED].cpu().contiguous()
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
