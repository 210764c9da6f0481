"""What comes before the first decomposed matrix, kept from one pass over a batch for the others.

A module that has returned before a decomposed matrix is used cannot depend on one. So later passes over the same batch
need not run it: it gives what it gave. Of the modules that a pass calls, the outermost such ones are kept, in the order
of their calls. Of their outputs those that only other kept modules read are not stored: a stand-in full of NaN has
their place, which takes no memory. The first time, a pass with what was kept is compared bit for bit with the one
before; where it differs, nothing is kept for this model.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from apd_lens.host._fingerprints import mark_of_model
from apd_lens.host._patch import PatchedForward

# Modules that so few decomposable matrices come before are as quickly run as looked up.
FEWEST_MATRICES = 8

Patches = Sequence[tuple[nn.Module, PatchedForward]]


@dataclass(frozen=True, eq=False)
class Prefix:
    """Outputs of modules, in the order of their calls.

    Attributes:
        mark: of the model that gave them.
        derived_of: numbers of examples of the batches that it was made of, one of the other; none if it was recorded.
    """

    kept: Sequence[tuple[nn.Module, Any]]
    mark: tuple[Any, ...]
    derived_of: tuple[int, ...] = ()

    @property
    def shape(self) -> tuple[Any, ...]:
        """Equal for batches in which the same modules are kept, and the same of their outputs are stand-ins; where they
        are derived, in the same way."""

        def of_leaf(leaf: Any) -> Any:
            return _is_stand_in(leaf), leaf.shape[1:] if self.derived_of and isinstance(leaf, Tensor) else None

        return self.derived_of, *((id(module), *map(of_leaf, tree_leaves(output))) for module, output in self.kept)

    def changed(self, n_examples: int, n: int, change: Callable[[Tensor], Tensor]) -> "Prefix":
        """With change(tensor) in the place of each tensor that has an entry for each of so many examples, n then."""

        def of_leaf(leaf: Any) -> Any:
            if not isinstance(leaf, Tensor) or not leaf.ndim or len(leaf) != n_examples:
                return leaf
            return leaf[:1].expand(n, *leaf.shape[1:]) if _is_stand_in(leaf) else change(leaf)

        return Prefix(
            [(module, tree_map(of_leaf, output)) for module, output in self.kept],
            self.mark,
            (*self.derived_of, n_examples),
        )

    @staticmethod
    def joined(some: Sequence["Prefix"]) -> "Prefix | None":
        """Those of several batches of one example, as of one batch; None where other modules are kept, or shapes."""

        def of_leaf(leaf: Any, *others: Any) -> Any:
            if not isinstance(leaf, Tensor) or not leaf.ndim:
                return leaf
            if _is_stand_in(leaf):
                return leaf[:1].expand(len(some), *leaf.shape[1:])
            return torch.cat([leaf, *others])

        first, *others = some
        alike = (first.mark, [module for module, _ in first.kept])
        if any((one.mark, [module for module, _ in one.kept]) != alike for one in others):
            return None
        try:
            kept = [
                (module, tree_map(of_leaf, output, *(one.kept[place][1] for one in others)))
                for place, (module, output) in enumerate(first.kept)
            ]
        except (RuntimeError, ValueError):  # they do not fit each other
            return None
        return Prefix(kept, first.mark, (*first.derived_of, 1))

    def tensors(self) -> list[Tensor]:
        """Those that take memory."""
        leaves = tree_leaves([output for _, output in self.kept])
        return [leaf for leaf in leaves if isinstance(leaf, Tensor) and not _is_stand_in(leaf)]


class Replay:
    """Gives the kept outputs in the places of the modules, in a pass.

    Attributes:
        n_given: how many were given since `start`.
    """

    def __init__(self, prefix: Prefix | None):
        self._kept = () if prefix is None else prefix.kept
        self.n_given = 0

    def start(self) -> None:
        """To be called before each forward of the model."""
        self.n_given = 0

    @property
    def is_whole(self) -> bool:
        """Whether all that was kept was asked for."""
        return self.n_given == len(self._kept)

    def patches(self) -> Patches:
        """What stands in for the modules' forwards."""
        return [(module, self._forward) for module in dict.fromkeys(module for module, _ in self._kept)]

    def _forward(self, module: nn.Module, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if self.is_whole or self._kept[self.n_given][0] is not module:
            return original(*args, **kwargs)
        output = self._kept[self.n_given][1]
        self.n_given += 1
        return tree_map(
            lambda leaf: leaf.clone() if isinstance(leaf, Tensor) and not _is_stand_in(leaf) else leaf, output
        )


@dataclass(frozen=True, eq=False)
class _Returned:
    module: nn.Module
    output: Any
    read: set[int]


class Recorder:
    """Finds in a pass what can be kept of it.

    Tensors are told apart by what they are, not by what they hold, so all that modules returned is held until `prefix`.
    """

    def __init__(self, model: nn.Module):
        self._model = model
        self.start()

    def start(self) -> None:
        """To be called before each forward of the model."""
        self._returned: list[_Returned] = []
        self._read_by_others: set[int] = set()
        self.is_over = False  # whether a decomposed matrix was used

    def patches(self) -> Patches:
        """What stands in for the modules' forwards."""
        return [
            (module, self._forward) for module in self._model.modules() if module is not self._model and _runs(module)
        ]

    def _forward(self, module: nn.Module, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        read = {id(leaf) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        if self.is_over:
            self._read_by_others |= read
            return original(*args, **kwargs)
        n_before = len(self._returned)
        output = original(*args, **kwargs)
        if self.is_over or not _can_be_kept(output):
            self._read_by_others |= read
        else:
            # What a module gives as it came is read behind it.
            self._returned[n_before:] = [_Returned(module, output, read - {id(leaf) for leaf in tree_leaves(output)})]
        return output

    def prefix(self) -> Prefix:
        """What is kept."""
        read = set().union(*(returned.read for returned in self._returned)) - self._read_by_others

        def kept(leaf: Any) -> Any:
            if not isinstance(leaf, Tensor):
                return leaf
            if id(leaf) in read and leaf.is_floating_point():
                return leaf.new_full((), torch.nan).detach().expand(leaf.shape)
            return leaf.detach().clone()

        outputs = [(returned.module, tree_map(kept, returned.output)) for returned in self._returned]
        found = Prefix(outputs, mark_of_model(self._model))
        self.start()
        return found


def is_worth_it(names: Iterable[str], weights: Iterable[str]) -> bool:
    """Whether enough matrices come before the first one of these names."""
    chosen = set(names)
    return next((place for place, name in enumerate(weights) if name in chosen), 0) >= FEWEST_MATRICES


def _can_be_kept(output: Any) -> bool:
    leaves = tree_leaves(output)
    return any(isinstance(leaf, Tensor) for leaf in leaves) and all(
        isinstance(leaf, Tensor | int | float | bool | None) for leaf in leaves
    )


def _runs(module: nn.Module) -> bool:
    """Whether a module has a forward of its own that can be stood in for."""
    return not isinstance(module, torch.jit.ScriptModule) and type(module).forward is not nn.Module.forward


def _is_stand_in(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and leaf.numel() > 1 and not any(leaf.stride())
