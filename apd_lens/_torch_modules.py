"""The adapter for plain torch modules: nn.Linear, transformers' Conv1D and nn.Embedding leaves, tied or not.

A matrix is named by its key in the state dict. A leaf counts only if it runs the forward of its library class: a
subclass with a forward of its own may do anything with its weight.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from apd_lens._patch import PatchedForward
from apd_lens._target import Intercept, Use, WeightMatrix

_AS_STORED = "d_in d_out -> d_in d_out"
_TRANSPOSED = "d_out d_in -> d_in d_out"


class TorchAdapter:
    """Takes any `torch.nn.Module` apart by its leaves."""

    def matrices(self, model: nn.Module) -> Iterator[WeightMatrix]:
        leaves = {path: module for path, module in _modules_with_aliases(model) if _reason_against(module) is None}
        for path in [path for path in leaves if _inside_attention(model, path)]:
            del leaves[path]

        tied: dict[int, list[str]] = defaultdict(list)
        for path, module in leaves.items():
            tied[id(module.weight)].append(path)

        for paths in tied.values():
            name, *tied_to = [_key(path) for path in paths]
            module = leaves[paths[0]]
            layout = _layout(module)
            assert layout is not None
            uses = {  # one a module: a module that is reachable by two paths is still one place
                id(leaves[path]): Use(matrix=name, site=path, transposed=_layout(leaves[path]) != layout)
                for path in reversed(paths)
            }
            yield WeightMatrix(
                name=name,
                module=module,
                attribute="weight",
                layout=layout,
                uses=tuple(reversed(uses.values())),
                state_keys=(name, *tied_to),
                tied_to=tuple(tied_to),
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
                yield module, _leaf_forward(use, intercept)

    def runs_every_use(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
        return True


def _leaf_forward(use: Use, intercept: Intercept) -> PatchedForward:
    def forward(module: nn.Module, original: Callable[..., Tensor], *args: Tensor, **kwargs: Tensor) -> Tensor:
        (x,) = (*args, *kwargs.values())
        return intercept(use, x, lambda: original(x), getattr(module, "bias", None))

    return forward


def _modules_with_aliases(model: nn.Module) -> Iterable[tuple[str, nn.Module]]:
    return model.named_modules(remove_duplicate=False)


def _key(path: str) -> str:
    return f"{path}.weight" if path else "weight"


def _inside_attention(model: nn.Module, path: str) -> bool:
    return bool(path) and isinstance(model.get_submodule(path.rpartition(".")[0]), nn.MultiheadAttention)


def _layout(module: nn.Module) -> str | None:
    """The layout of a leaf's weight, or None where the module is no leaf that multiplies by one matrix."""
    if isinstance(module, nn.Linear):
        return _TRANSPOSED
    if isinstance(module, nn.Embedding) or _conv1d_class(module) is not None:
        return _AS_STORED
    return None


def _conv1d_class(module: nn.Module) -> type | None:
    """transformers' Conv1D, recognised without importing transformers."""
    for cls in type(module).__mro__:
        if cls.__name__ == "Conv1D" and cls.__module__ == "transformers.pytorch_utils":
            return cls
    return None


def _reason_against(module: nn.Module) -> str | None:
    """Why a module's weight cannot be decomposed, or None if it can."""
    kind = type(module).__name__
    if _layout(module) is None:
        return f"{kind} is not among the layers that are understood (nn.Linear, transformers' Conv1D, nn.Embedding)"
    library_class = next(
        cls for cls in (nn.Linear, nn.Embedding, _conv1d_class(module)) if cls is not None and isinstance(module, cls)
    )
    if type(module).forward is not library_class.forward:
        return f"{kind} overrides the forward of {library_class.__name__}, so what it does with its weight is unknown"
    if "weight" not in dict(module.named_parameters(recurse=False)):
        return f"the weight of this {kind} is computed (a parametrization), not a parameter"
    assert isinstance(module.weight, Tensor)
    if not module.weight.is_floating_point():
        return f"its dtype is {module.weight.dtype}, and only floating-point weights can be decomposed"
    if isinstance(module, nn.Embedding) and module.max_norm is not None:
        return "max_norm makes nn.Embedding change its weight in every forward"
    return None
