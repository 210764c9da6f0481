"""Activations at named places of the user's model, read or written anew by forward hooks that are taken away again."""

import difflib
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from typing import Any, NoReturn

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from apd_lens._block import Block, Handles
from apd_lens._errors import InvalidSetting, SiteNotCalled


def site_module(model: nn.Module, site: str) -> nn.Module:
    """The submodule, such as a hook point of TransformerLens, whose output is the activation.

    Raises:
        InvalidSetting: no such submodule; names the closest ones.
    """
    try:
        return model.get_submodule(site)
    except AttributeError:
        names = [name for name, _ in model.named_modules() if name]
        closest = difflib.get_close_matches(site, names, n=3, cutoff=0.0)
        raise InvalidSetting(
            f"{type(model).__name__} has no submodule {site!r} whose output could be read. The closest are "
            f"{', '.join(map(repr, closest)) or 'none'}. Give site=, a name that model.get_submodule finds."
        ) from None


class _Activations(dict[str, Tensor]):
    def __missing__(self, site: str) -> NoReturn:
        raise SiteNotCalled(
            f"The forward pass did not call {site!r}. Choose a place that it goes through, or switch on the option "
            "that does so."
        )


def reading(model: nn.Module, sites: Iterable[str]) -> Block:
    """Inside, the activations at the sites in the first forward are kept by name, copied, without a graph.

    Raises:
        InvalidSetting: no such submodule, or one that returns no tensor.
        SiteNotCalled: where one is asked for that no forward came to.
    """
    kept = _Activations()

    def keep(site: str, activation: Tensor) -> Tensor:
        if site not in kept:
            kept[site] = activation.detach().clone()
        return activation

    return rewriting(model, {site: partial(keep, site) for site in sites}, kept)


def rewriting(model: nn.Module, changes: Mapping[str, Callable[[Tensor], Tensor]], entered: Any = None) -> Block:
    """Inside, every forward of the model goes on with what a site's function makes of the activation there.

    Args:
        entered: what entering the block gives.

    Raises:
        InvalidSetting: no such submodule, or one that returns no tensor (or tuple that begins with one).
    """

    def change(site: str, function: Callable[[Tensor], Tensor], module: nn.Module, args: Any, output: Any) -> Any:
        activation = output[0] if isinstance(output, tuple) and output else output
        if not isinstance(activation, Tensor):
            raise InvalidSetting(
                f"The submodule {site!r} returns a {type(output).__name__}, not a tensor. Choose one that returns the "
                "activation itself."
            )
        changed = function(activation)
        if changed is activation:
            return output
        return (changed, *output[1:]) if isinstance(output, tuple) else changed

    return Block(
        lambda: Handles(
            (
                site_module(model, site).register_forward_hook(partial(change, site, function))
                for site, function in changes.items()
            ),
            entered,
        )
    )


def activations_kept(model: nn.Module, names: Iterable[str]) -> Block:
    """Inside, the outputs of the named submodules (a TransformerLens hook point is one) in forwards of this thread are
    kept by name."""
    kept: dict[str, Tensor] = {}
    here = threading.get_ident()

    def keep(name: str, module: nn.Module, args: Any, activation: Any) -> None:
        if threading.get_ident() != here:
            return
        if not isinstance(activation, Tensor):
            raise InvalidSetting(
                f"The submodule {name!r} returns a {type(activation).__name__}, not a tensor to compare."
            )
        kept[name] = activation

    def handles() -> Iterator[RemovableHandle]:
        for name in names:
            try:
                module = model.get_submodule(name)
            except AttributeError:
                raise InvalidSetting(
                    f"The model has no submodule {name!r} whose activations could be compared."
                ) from None
            yield module.register_forward_hook(partial(keep, name))

    return Block(lambda: Handles(handles(), kept))
