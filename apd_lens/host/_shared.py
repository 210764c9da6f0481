"""Uses of a matrix on what all examples share, such as learned vectors or a table of relative positions.

Such an x is made of parameters and of nothing that came with the batch. It may have no batch axis, even where its first
axis is as long as the batch; then the host adds y `*pos d_out` to what has one. With masks of each example there are as
many y as examples. Whether the host's code gives each example its own is seen as that code runs: each operator on y is
run on one made-up y of each example, and on that of a single example as the host would have it. Both must agree.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.weak import WeakTensorKeyDictionary

# A site, and the shape of its x.
Place = tuple[str, torch.Size]
# What computes nothing.
_OF_GRADIENTS = (Tensor.register_hook, Tensor.retain_grad, Tensor.requires_grad_)


@dataclass(frozen=True, eq=False)
class SharedUses:
    """Of forwards of one form.

    Attributes:
        without_batch_axis: where x has none.
        inseparable: where the host's code needs one y for all examples.
    """

    without_batch_axis: set[Place] = field(default_factory=set)
    inseparable: set[Place] = field(default_factory=set)


class Constants:
    """Tensors that are made of a model's parameters, buffers and tensor attributes, or of nothing but sizes.

    They are known by their memory. What comes from elsewhere (the batch, a hook, a list of numbers, a random draw) is
    none.
    """

    def __init__(self, model: nn.Module):
        own = [value for module in model.modules() for value in vars(module).values() if isinstance(value, Tensor)]
        held = [_memory(tensor) for tensor in (*model.parameters(), *model.buffers(), *own)]
        self._memories: set[StorageWeakRef | None] = {*held} - {None}

    def __contains__(self, tensor: Tensor) -> bool:
        return _memory(tensor) in self._memories

    def made(self, given: Sequence[Tensor], results: Sequence[Tensor], operator: Any) -> None:
        """Called at every operator, with what it was given and what it gave."""
        is_random = torch.Tag.nondeterministic_seeded in getattr(operator, "tags", ())
        self.found(results, not is_random and all(tensor in self for tensor in given))

    def found(self, tensors: Sequence[Tensor], are_constant: bool) -> None:
        """Tensors of which is known whether they are constant."""
        memories = {*map(_memory, tensors)} - {None}
        (self._memories.update if are_constant else self._memories.difference_update)(memories)


def _memory(tensor: Tensor) -> StorageWeakRef | None:
    """A storage, equal to no later one that gets the same address."""
    try:
        return StorageWeakRef(tensor.untyped_storage())
    except (RuntimeError, NotImplementedError):
        return None


def lacks_batch_axis(x: Tensor, n_examples: int) -> bool:
    """Whether what all examples share has no batch axis: no first axis of length 1, and none without changes."""
    if x.ndim == 0 or (x.is_floating_point() and x.ndim == 1):
        return True
    return len(x) != 1 and (len(x) != n_examples or not torch.equal(x, x[:1].expand_as(x)))


@dataclass(frozen=True, eq=False)
class _Followed:
    """What the host has made of a shared y.

    Attributes:
        places: of the uses whose y it is made of.
        of_each: with a made-up y of each example.
        of_one: example -> with the y of that example, as the host would have it.
    """

    places: frozenset[Place]
    of_each: Tensor
    of_one: dict[int, Tensor]


class Separation(TorchFunctionMode):
    """Finds uses whose y must be one for all examples.

    Args:
        uses: whose `inseparable` grows.
    """

    def __init__(self, uses: SharedUses, constants: Constants):
        super().__init__()
        self.aside = False  # whether what runs is not the host's code
        self._uses, self._constants = uses, constants
        self._followed = WeakTensorKeyDictionary()

    def places(self, x: Tensor) -> frozenset[Place]:
        """Of the shared uses that x is made of."""
        return self._followed[x].places if x in self._followed else frozenset()

    def has_batch_axis(self, x: Tensor) -> bool:
        """Whether the host has one, in something that is followed."""
        followed: _Followed = self._followed[x]
        return next(iter(followed.of_one.values())).ndim == followed.of_each.ndim

    def follow(self, y: Tensor, places: frozenset[Place], like: Tensor, has_batch_axis: bool, n_examples: int) -> None:
        """From here on, what the host makes of y.

        Args:
            like: values of y, with a batch axis.
        """
        if self not in _get_current_function_mode_stack():  # not before: hosts take slower paths inside such a mode
            self.__enter__()
        like = like.detach()[:1]
        shape = (n_examples, *like.shape[1:])
        numbers = torch.arange(like[0].numel() * n_examples, device=like.device, dtype=torch.float64).sin()
        of_each = like + numbers.view(shape).to(like.dtype)
        one = {example: of_each[example : example + 1].clone() for example in (0, n_examples - 1)}
        of_one = one if has_batch_axis else {example: value[0] for example, value in one.items()}
        self._followed[y] = _Followed(places, of_each, of_one)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        given = [tensor for tensor in tensors if tensor in self._followed]
        if self.aside or not given or func in _OF_GRADIENTS:
            return func(*args, **kwargs)
        followed: list[_Followed] = [self._followed[tensor] for tensor in given]
        places = frozenset[Place]().union(*(each.places for each in followed))
        run = partial(self._run, func, args, kwargs)
        of_each: list[Tensor] = []
        of_one: dict[int, list[Tensor]] = {}
        try:
            with torch.no_grad(), _disable_current_modes():
                of_each = run(lambda each: each.of_each)
                of_one = {example: run(lambda each, i=example: each.of_one[i]) for example in followed[0].of_one}
                agree = all(
                    _agree(whole, example, ones[index])
                    for index, whole in enumerate(of_each)
                    for example, ones in of_one.items()
                )
        except Exception:  # whatever the host's code raises for a shape that it does not expect
            agree = False
        if not agree:
            self._uses.inseparable.update(places)
            return func(*args, **kwargs)
        with_examples = any(tensor not in self._followed and tensor not in self._constants for tensor in tensors)
        result = func(*args, **kwargs)
        for index, tensor in enumerate(_tensors(result, args)):
            ones = {example: tensors[index] for example, tensors in of_one.items()}
            if not (with_examples and ones[0].shape == of_each[index].shape):  # else it is the examples' own
                self._followed[tensor] = _Followed(places, of_each[index], ones)
        return result

    def _run(self, func: Any, args: Any, kwargs: Any, value_of: Callable[[_Followed], Tensor]) -> list[Tensor]:
        """The operator's results with other values for what is followed. All else stays as it is."""

        def value(leaf: Any) -> Any:
            if not isinstance(leaf, Tensor):
                return leaf
            return value_of(self._followed[leaf]) if leaf in self._followed else leaf.detach().clone()

        args, kwargs = tree_map(value, (args, kwargs))
        return _tensors(func(*args, **kwargs), args)


def _tensors(result: Any, args: Sequence[Any]) -> list[Tensor]:
    """What an operator gave; what it changed, where it gives nothing."""
    return [leaf for leaf in tree_leaves(args[0] if result is None else result) if isinstance(leaf, Tensor)]


def _agree(of_each: Tensor, example: int, of_one: Tensor) -> bool:
    """Whether what an operator made of every y has, for an example, what it made of that y alone: along a batch axis
    that only the first has, one of length 1, or one that came from elsewhere."""
    if not of_each.ndim or len(of_each) <= example:
        return False
    if of_one.ndim == of_each.ndim:
        of_one = of_one[0 if len(of_one) == 1 else example] if len(of_one) in (1, len(of_each)) else of_one
    one, other = of_each[example], of_one
    tolerance = max(1e-3, 16 * torch.finfo(one.dtype).eps) if one.is_floating_point() else 0.0
    return one.shape == other.shape and torch.allclose(
        one.double(), other.double(), rtol=tolerance, atol=tolerance, equal_nan=True
    )
