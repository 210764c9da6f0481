"""The adapter for plain torch modules: nn.Linear, transformers' Conv1D, nn.Embedding and convolutions, tied or not.

A matrix is named by its key in the state dict. A leaf counts only if it runs the forward of its library class: a
subclass with a forward of its own may do anything with its weight. (Hugging Face's embeddings that multiply their
rows by a constant are known.)

A convolution is a matrix product for each output pixel: x is the patch under the kernel, `(c_in height width)` in one
axis, and the pixels are the positions.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from apd_lens.host._adapter import Intercept
from apd_lens.host._matrix import Bias, Use, WeightMatrix
from apd_lens.host._patch import PatchedForward
from apd_lens.host._units import units_of

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d)


class TorchAdapter:
    """Takes any `torch.nn.Module` apart by its leaves."""

    def matrices(self, model: nn.Module) -> Iterator[WeightMatrix]:
        paths_to: dict[nn.Module, list[str]] = defaultdict(list)
        for path, module in _modules_with_aliases(model):
            if _reason_against(module) is None and not _inside_attention(model, path):
                paths_to[module].append(path)
        for module, paths in paths_to.items():
            name, *aliases = [_key(path) for path in paths]
            yield WeightMatrix(
                name=name,
                module=module,
                attribute="weight",
                layout=_layout(module),
                axes=_axes(module),
                uses=(Use(matrix=name, site=paths[0], scale=_scale(module)),),
                state_keys=(name, *aliases),
                tied_to=tuple(aliases),
                bias=_bias(module, paths),
                units=units_of(model, paths[0]),
            )

    def refused(self, model: nn.Module) -> dict[str, str]:
        supported = {key for matrix in self.matrices(model) for key in matrix.state_keys}
        refused = {}
        for path, module in _modules_with_aliases(model):
            for attribute, parameter in module.named_parameters(recurse=False):
                key = f"{path}.{attribute}".lstrip(".")
                if parameter.ndim >= 2 and key not in supported:
                    refused[key] = (
                        "nn.MultiheadAttention multiplies by it without calling a submodule"
                        if isinstance(module, nn.MultiheadAttention) or _inside_attention(model, path)
                        else _reason_against(module) or "only the leaf's `weight` can be decomposed"
                    )
        return refused

    def patches(
        self, model: nn.Module, matrices: Iterable[WeightMatrix], intercept: Intercept
    ) -> Iterator[tuple[nn.Module, PatchedForward]]:
        for matrix in matrices:
            for use in matrix.uses:
                module = model.get_submodule(use.site)
                forward = _convolution_forward if isinstance(module, _CONVOLUTIONS) else _leaf_forward
                yield module, partial(forward, use, intercept)

    def runs_every_use(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
        return True


def _leaf_forward(
    use: Use, intercept: Intercept, module: nn.Module, original: Callable[..., Tensor], *args: Tensor, **kwargs: Tensor
) -> Tensor:
    (x,) = (*args, *kwargs.values())
    return intercept(use, x, lambda: original(x), getattr(module, "bias", None))


def _convolution_forward(
    use: Use,
    intercept: Intercept,
    convolution: nn.Conv1d | nn.Conv2d,
    original: Callable[..., Tensor],
    input: Tensor,  # as torch calls it, since users may
) -> Tensor:
    unbatched = input.ndim == convolution.weight.ndim - 1
    x = _patches(convolution, input[None] if unbatched else input)

    def host_y() -> Tensor:
        y = original(input)
        return (y[None] if unbatched else y).movedim(1, -1)

    y = intercept(use, x, host_y, convolution.bias).movedim(-1, 1)
    return y[0] if unbatched else y


def _patches(convolution: nn.Conv1d | nn.Conv2d, images: Tensor) -> Tensor:
    """What lies under the kernel at each output pixel: `batch c_in *size` -> `batch *pos (c_in *kernel)`."""
    mode = "constant" if convolution.padding_mode == "zeros" else convolution.padding_mode
    windows = F.pad(images, convolution._reversed_padding_repeated_twice, mode=mode)
    spatial = range(2, images.ndim)
    for axis, size, stride, dilation in zip(
        spatial, convolution.kernel_size, convolution.stride, convolution.dilation, strict=True
    ):
        windows = windows.unfold(axis, dilation * (size - 1) + 1, stride)[..., ::dilation]
    n = len(spatial)  # batch c_in *pos *kernel
    return windows.movedim(1, 1 + n).flatten(1 + n)


def _modules_with_aliases(model: nn.Module) -> Iterable[tuple[str, nn.Module]]:
    return model.named_modules(remove_duplicate=False)


def _key(path: str) -> str:
    return f"{path}.weight" if path else "weight"


def _bias(module: nn.Module, paths: Iterable[str]) -> Bias | None:
    """None where there is none, or none that is a parameter."""
    if "bias" not in dict(module.named_parameters(recurse=False)):
        return None
    return Bias("bias", tuple(f"{path}.bias".lstrip(".") for path in paths))


def _inside_attention(model: nn.Module, path: str) -> bool:
    return bool(path) and isinstance(model.get_submodule(path.rpartition(".")[0]), nn.MultiheadAttention)


def _library_class(module: nn.Module) -> type[nn.Module] | None:
    """The class whose forward is understood that a module is of; None for all other modules."""
    known = (nn.Linear, nn.Embedding, *_CONVOLUTIONS, _conv1d_class(module))
    return next((cls for cls in known if cls is not None and isinstance(module, cls)), None)


def _layout(module: nn.Module) -> str:
    if isinstance(module, nn.Conv2d):
        return "d_out c_in height width -> (c_in height width) d_out"
    if isinstance(module, nn.Conv1d):
        return "d_out c_in width -> (c_in width) d_out"
    return "d_out d_in -> d_in d_out" if isinstance(module, nn.Linear) else "d_in d_out -> d_in d_out"


def _axes(module: nn.Module) -> dict[str, int]:
    if not isinstance(module, _CONVOLUTIONS):
        return {}
    sizes = (module.in_channels, *module.kernel_size)
    return dict(zip(("c_in", "height", "width") if len(sizes) == 3 else ("c_in", "width"), sizes, strict=True))


def _scale(module: nn.Module) -> float:
    """What an embedding multiplies its rows by. Hugging Face does it in the dtype of the weights."""
    scale = getattr(module, "embed_scale", 1.0) if _is_scaled_embedding(module) else 1.0
    return float(torch.as_tensor(scale, device="cpu").to(module.weight.dtype))  # pyright: ignore[reportCallIssue, reportArgumentType]


def _is_scaled_embedding(module: nn.Module) -> bool:
    cls = type(module)
    known = cls.__module__.startswith("transformers.") and cls.__name__.endswith("ScaledWordEmbedding")
    alone = len(list(module.parameters())) == 1  # one has rows that it puts in the place of some of the weight's
    return known and alone and isinstance(module, nn.Embedding) and hasattr(module, "embed_scale")


def _conv1d_class(module: nn.Module) -> type | None:
    """transformers' Conv1D, recognised without importing transformers."""
    for cls in type(module).__mro__:
        if cls.__name__ == "Conv1D" and cls.__module__ == "transformers.pytorch_utils":
            return cls
    return None


def _reason_against(module: nn.Module) -> str | None:
    """Why a module's weight cannot be decomposed, or None if it can."""
    kind = type(module).__name__
    library_class = _library_class(module)
    if library_class is None:
        return (
            f"{kind} is not among the layers that are understood (nn.Linear, nn.Embedding, nn.Conv1d, nn.Conv2d, "
            "transformers' Conv1D)"
        )
    if type(module).forward is not library_class.forward and not _is_scaled_embedding(module):
        return f"{kind} overrides the forward of {library_class.__name__}, so what it does with its weight is unknown"
    if "weight" not in dict(module.named_parameters(recurse=False)):
        return f"the weight of this {kind} is computed (a parametrization), not a parameter"
    assert isinstance(module.weight, Tensor)
    if not module.weight.is_floating_point():
        return f"its dtype is {module.weight.dtype}, and only floating-point weights can be decomposed"
    if isinstance(module, nn.Embedding) and module.max_norm is not None:
        return "max_norm makes nn.Embedding change its weight in every forward"
    if isinstance(module, _CONVOLUTIONS) and module.groups > 1:
        return "a convolution in groups is several matrices"
    return None
