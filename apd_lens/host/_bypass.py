"""Whether a forward uses a decomposed matrix in a way that interception does not see.

The first forward of each form inside a context is looked at, operator by operator:

- an operator that reads a decomposed parameter's memory outside the modules where its use is intercepted is a bypass:
  components would not stand in for the matrix there;
- at each use, the host's own y must be x W + b, with W as it is stored. It is not where the host masks, scales,
  quantises or swaps the weight on the way;
- uses whose x all examples share are found, see `_shared`.

A later forward of the same form (names, shapes, dtypes and flags of the arguments, modes, places of the weights in
memory, hooks of their modules) is not looked at, and costs nothing.
"""

import linecache
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from itertools import takewhile
from types import FrameType
from typing import TYPE_CHECKING, Any

import jaxtyping
import torch
from torch import Tensor, nn
from torch._guards import detect_fake_mode
from torch.overrides import _get_current_function_mode_stack
from torch.utils import _python_dispatch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from apd_lens._block import AUTOCAST_DEVICES, Block, Part, Together, full_precision, no_grad
from apd_lens._errors import ApdError, SiteNotCalled, UnsupportedModel
from apd_lens.host import _patch
from apd_lens.host._fingerprints import mark, sums_of
from apd_lens.host._owner import Owner
from apd_lens.host._patch import Patch, PatchedForward
from apd_lens.host._shared import Constants, Place, Separation, SharedUses, lacks_batch_axis

if TYPE_CHECKING:
    from apd_lens.host._adapter import Adapter
    from apd_lens.host._matrix import Use, WeightMatrix

# So many rows of y are compared at each use.
_ROWS = 512
# Code that is not the model's.
_OURS = os.path.dirname(os.path.dirname(__file__))
_OF_LIBRARIES = (*(os.path.dirname(file) for file in (torch.__file__, jaxtyping.__file__)), _OURS, "<@beartype")


class Bypasses:
    """Looks for bypasses of the named matrices in the forwards of one context.

    Args:
        weights: all matrices of the model.
        seen: the forms of forwards that were looked at, and their shared uses; those of this context are added.
    """

    def __init__(
        self,
        model: nn.Module,
        adapter: "Adapter",
        weights: Mapping[str, "WeightMatrix"],
        names: Sequence[str],
        seen: dict[Any, SharedUses],
    ):
        self._model, self._adapter, self._weights = model, adapter, weights
        self._matrices = {name: weights[name] for name in names}
        self._seen = seen
        self._look: _Look | None = None
        self.owner: Owner | None = None  # of the context, once it is entered

    def around(self, module: nn.Module, forward: PatchedForward) -> PatchedForward:
        """The forward that stands in for a module's; inside, the matrices whose uses are there may be read."""

        def inside(host: nn.Module, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            if self._look is None:
                return forward(host, original, *args, **kwargs)
            with self._look.reading_allowed_in(module):
                return forward(host, original, *args, **kwargs)

        return inside

    def run(
        self,
        original: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        start: Callable[[SharedUses], None],
    ) -> Any:
        """A forward of the whole model, looked at if it is the first of its form.

        Args:
            start: called before it with its shared uses, which are found on the way if it is looked at.

        Raises:
            UnsupportedModel: a bypass; says which matrix, and where.
            SiteNotCalled: one of a matrix none of whose uses was reached.
        """
        form = self._form(args, kwargs)
        uses = self._seen.get(form, SharedUses())
        start(uses)
        if form in self._seen or self._look is not None or _without_numbers():
            return original(*args, **kwargs)
        look = _Look(self._model, self._weights, self._matrices, uses)
        try:
            self._look = look
            with Block(partial(self._parts, look)):
                output = original(*args, **kwargs)
        except Exception as error:
            if look.reads:
                raise look.bypass() from error
            raise
        finally:
            self._look = None
        if look.reads:
            raise look.bypass()
        self._seen[form] = uses
        return output

    def _parts(self, look: "_Look") -> Together:
        """What is in place while a forward is looked at."""
        owner = self.owner
        assert owner is not None
        untied = self._adapter.patches(self._model, look.untied(), as_it_is)
        patches = [Patch(module, self.around(module, forward), owner) for module, forward in untied]
        return Together([*patches, _WithoutAutocastCache(), _Operators(look)])

    def compare(self, use: "Use", x: Tensor, original: Callable[[], Tensor], bias: Tensor | None) -> None:
        """At a use: the host's own y with x W + b. Raises as `run` does."""
        if self._look is not None and use.matrix in self._matrices:
            self._look.compare(use, x, original, bias)

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Inside, what runs is not the host's code."""
        look = self._look
        if look is None:
            yield
            return
        look.separation.aside = True
        try:
            yield
        finally:
            look.separation.aside = False

    def find_shared(self, place: Place, x: Tensor, n_examples: int) -> None:
        """At a use: whether all examples share x, and it has no batch axis. Raises as `run` does."""
        if self._look is not None:
            self._look.find_shared(place, x, n_examples)

    def follow(self, place: Place, x: Tensor, y: Tensor, given: Tensor, is_shared: bool, n_examples: int) -> None:
        """What the host makes of y, at a use of x; `given` is y as the host gets it."""
        if self._look is not None:
            self._look.follow(place, x, y, given, is_shared, n_examples)

    def _form(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        matrices = self._matrices.values()
        return (
            tuple(self._matrices),
            tuple(None if isinstance(value, str) else _form_of(value) for value in args),  # a string is a text
            tuple((name, _form_of(value)) for name, value in kwargs.items()),
            self._model.training,
            torch.is_grad_enabled(),
            torch.is_inference_mode_enabled(),
            tuple(map(torch.is_autocast_enabled, AUTOCAST_DEVICES)),
            tuple(_place(matrix.parameter) for matrix in matrices),
            tuple((*matrix.module._forward_pre_hooks, *matrix.module._forward_hooks) for matrix in matrices),
        )


def _form_of(value: Any, flag: bool = True) -> Any:
    """Equal for two arguments that a model treats alike, as far as can be told without their numbers."""
    if isinstance(value, Tensor):
        return value.shape, value.dtype
    if isinstance(value, Mapping):
        return tuple((name, _form_of(item, flag=False)) for name, item in value.items())
    if isinstance(value, list | tuple):
        return tuple(_form_of(item, flag=False) for item in value)
    return value if flag and isinstance(value, bool | int | str) else type(value)


class _Look:
    """At one forward.

    Attributes:
        reads: bare reads: the matrix, and where it is read.
        constants: what does not depend on the batch.
        separation: whether each example can get its own of what all share.
    """

    def __init__(
        self,
        model: nn.Module,
        weights: Mapping[str, "WeightMatrix"],
        matrices: Mapping[str, "WeightMatrix"],
        uses: SharedUses,
    ):
        self.reads: list[tuple[Any, str]] = []
        self.constants = Constants(model)
        self.separation = Separation(uses, self.constants)
        self._uses = uses
        self._places_of_examples: set[Place] = set()
        self._model, self._weights = model, weights
        self._matrices = matrices
        self._called: set[str] = set()
        self._allowed: list[set[str]] = []
        self._before = {name: (mark(matrix), sums_of(matrix)) for name, matrix in matrices.items()}
        self._in_storage: dict[int, list[Any]] = {}
        for matrix in matrices.values():
            self._in_storage.setdefault(_storage(matrix.parameter), []).append(matrix)
        self._in_storage.pop(0, None)
        self._places = [  # before the forward, in which a host's adapter may stand in for submodules
            (matrix, place)
            for matrix in weights.values()
            for place in (matrix.module, *(model.get_submodule(use.site) for use in matrix.uses))
        ]
        self._root = next(frame for frame in _frames() if frame.f_code.co_filename == _patch.__file__)

    def untied(self) -> "list[WeightMatrix]":
        """Matrices that share memory with a decomposed one, and were untied from it: their uses are theirs."""
        others = [matrix for name, matrix in self._weights.items() if name not in self._matrices]
        return [matrix for matrix in others if _storage(matrix.parameter) in self._in_storage]

    @contextmanager
    def reading_allowed_in(self, module: nn.Module) -> Iterator[None]:
        """Inside, the matrices whose uses are in the module may be read, and those that were untied from one."""
        self._allowed.append({matrix.name for matrix in self._used_in(module)})
        try:
            yield
        finally:
            self._allowed.pop()

    def _used_in(self, module: nn.Module) -> Iterator["WeightMatrix"]:
        here = set(module.modules())
        used = [matrix for matrix, place in self._places if place in here or module in set(place.modules())]
        for matrix in self._matrices.values():
            if any(overlap(matrix.parameter, other.parameter) for other in used):
                yield matrix

    def read(self, tensors: Iterable[Tensor], results: Sequence[Tensor], operator: Any) -> None:
        """Called at every operator, with what it was given and what it gave."""
        for tensor in tensors:
            for matrix in self._in_storage.get(_storage(tensor), ()):
                if any(matrix.name in names for names in self._allowed) or not overlap(tensor, matrix.parameter):
                    continue
                if any(_storage(result) != _storage(tensor) for result in results):  # else a view, read later if at all
                    self.reads.append((matrix, f"{_where(self._root)} by {operator}"))

    def find_shared(self, place: Place, x: Tensor, n_examples: int) -> None:
        shared = self._uses.without_batch_axis
        (shared if x in self.constants and lacks_batch_axis(x, n_examples) else self._places_of_examples).add(place)
        if place in shared & self._places_of_examples:
            site, shape = place
            raise UnsupportedModel(
                f"{site} is called on {tuple(shape)} both of the {n_examples} examples and of what they share, and "
                "these calls cannot be told apart. Give another number of examples."
            )

    def follow(self, place: Place, x: Tensor, y: Tensor, given: Tensor, is_shared: bool, n_examples: int) -> None:
        self.constants.found([given], is_shared and len(y) == 1 and x in self.constants)
        places = self.separation.places(x)
        if n_examples == 1 or not (is_shared or places):
            return
        has_axis = place not in self._uses.without_batch_axis if is_shared else self.separation.has_batch_axis(x)
        self.separation.follow(given, places | {place} if is_shared else places, y, has_axis, n_examples)

    def bypass(self) -> ApdError:
        """What to raise of the first bare read."""
        matrix, where = self.reads[0]
        sites = [use.site for use in matrix.uses]
        advice = (
            f"{matrix.name} is read {where}, not by a call of {' or '.join(sites)}, where components can stand in for "
            "it: masks and ablations would have no effect there. Leave it out of `weights`, or call the module there. "
            "A hook of yours should read it before the context is entered."
        )
        if self._called.isdisjoint(sites):
            return SiteNotCalled(f"The forward pass went past {', '.join(sites)}. {advice}")
        return UnsupportedModel(advice)

    @no_grad()
    def compare(self, use: "Use", x: Tensor, original: Callable[[], Tensor], bias: Tensor | None) -> None:
        """The host's own y with x W + b, on some rows. Without a graph, which checkpoints would find too large."""
        y = original()
        self._called.add(use.site)
        matrix = self._matrices[use.matrix]
        place, sums = self._before[use.matrix]
        if mark(matrix) != place or not torch.allclose(sums_of(matrix), sums, equal_nan=True):
            raise UnsupportedModel(
                f"{use.matrix} is changed in the forward before it is used at {use.site}: by a hook, or by what loads "
                "offloaded weights. Make its value a parameter that stays (load the model whole: for accelerate, "
                "remove_hook_from_module(model, recurse=True) and move it to its device), or leave it out of `weights`."
            )
        with full_precision():
            error = _relative_error(use, matrix, x, y, bias)
        epsilon = max(torch.finfo(dtype).eps for dtype in _dtypes(y, matrix.parameter))
        if error > max(8 * epsilon, min(4 * epsilon**0.5, 2e-3)):
            raise UnsupportedModel(
                f"At {use.site}, {type(matrix.module).__name__} does not multiply by {use.matrix} as it is stored: its "
                f"y is off from x W + b by {error:.1%}. Something masks, scales, quantises or adds to the weight on "
                "the way (a forward put over its own, an adapter, a pruning mask). Make that permanent in the "
                f"parameter (merge it, remove the wrapper), or leave {use.matrix} out of `weights`."
            )


class _Operators(Part):
    """Every operator is shown to a look."""

    def __init__(self, look: _Look):
        self._separation, self._mode = look.separation, _Mode(look)
        # Entering and leaving a mode are Python too, so they may be interrupted before torch puts its flags back.
        self._flags = {name: flag for name, flag in vars(_python_dispatch).items() if name.startswith("_is_in_")}

    def do(self) -> None:
        self._mode.__enter__()

    def undo(self) -> None:
        if self._mode in _python_dispatch._get_current_dispatch_mode_stack():
            _python_dispatch._pop_mode()
        for name, flag in self._flags.items():
            setattr(_python_dispatch, name, flag)
        if set_flag := getattr(_python_dispatch, "set_is_in_mode_without_ignore_compile_internals", None):
            set_flag(self._flags["_is_in_any_mode_without_ignore_compile_internals"])
        if self._separation in _get_current_function_mode_stack():
            self._separation.__exit__(None, None, None)


class _Mode(TorchDispatchMode):
    def __init__(self, look: _Look):
        super().__init__()
        self._look = look

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        results = [leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]
        self._look.read(given, results, func)
        self._look.constants.made(given, results, func)
        return out


class _WithoutAutocastCache(Part):
    """A copy of a weight in there would be read unseen."""

    def do(self) -> None:
        self._cached = torch.is_autocast_cache_enabled()
        torch.set_autocast_cache_enabled(False)

    def undo(self) -> None:
        if hasattr(self, "_cached"):
            torch.set_autocast_cache_enabled(self._cached)


def as_it_is(use: "Use", x: Tensor, original: Callable[[], Tensor], bias: Tensor | None) -> Tensor:
    """Stands in the place of nothing."""
    return original()


def _relative_error(use: "Use", matrix: "WeightMatrix", x: Tensor, y: Tensor, bias: Tensor | None) -> float:
    """‖y − (x W + b)‖ over ‖y‖ or, where much cancels out, over what its terms are in the mean; 0 where not finite."""
    dtype = torch.promote_types(y.dtype, torch.float32)
    rows = y.reshape(-1, y.shape[-1])
    every = max(1, len(rows) // _ROWS)
    rows, W = rows[::every].to(dtype), replace(matrix, bias=None).value()
    W = (W.mT if use.transposed else W)[use.rows, use.columns].to(dtype)
    b = torch.zeros((), dtype=dtype, device=y.device) if bias is None else bias.detach().reshape(-1).to(dtype)
    if x.is_floating_point():
        x = x.reshape(-1, x.shape[-1])[::every].to(dtype)
        product, squares = x @ W, x.square() @ W.square().sum(1)
    else:
        product = W[x.reshape(-1)[::every]]
        squares = product.square().sum(1)
    error = (rows - use.scale * product - b).square().sum(1)
    scale = torch.maximum(rows.square().sum(1), use.scale**2 * squares) + b.square().sum()
    finite = error.isfinite() & scale.isfinite()
    error, scale = error[finite].sum().item(), scale[finite].sum().item()
    return (error / scale) ** 0.5 if error else 0.0


def _dtypes(y: Tensor, weight: Tensor) -> Iterator[torch.dtype]:
    yield from (y.dtype, weight.dtype)
    if torch.is_autocast_enabled(y.device.type):
        yield torch.get_autocast_dtype(y.device.type)


def _without_numbers() -> bool:
    """Whether numbers cannot be looked at: a function of `torch.func` is at work, or tensors are fake."""
    in_functorch = torch._C._functorch.peek_interpreter_stack() is not None  # pyright: ignore[reportAttributeAccessIssue]
    return in_functorch or detect_fake_mode() is not None


def _place(tensor: Tensor) -> int:
    try:
        return tensor.data_ptr()
    except RuntimeError:  # a tensor without memory of its own
        return 0


def _storage(tensor: Tensor) -> int:
    """Where the memory is that a tensor is a view of; 0 where it has none."""
    try:
        return tensor.untyped_storage().data_ptr()
    except (RuntimeError, NotImplementedError):
        return 0


def overlap(one: Tensor, other: Tensor) -> bool:
    """Whether two strided tensors have a number in memory in common."""
    if _storage(one) != _storage(other) or not _storage(one):
        return False
    places = [(each.dtype, each.storage_offset(), each.shape, each.stride()) for each in (one, other)]
    if one.dtype != other.dtype or places[0] == places[1]:
        return True
    ends = [(t.storage_offset(), t.storage_offset() + _extent(t)) for t in (one, other) if t.numel()]
    if len(ends) < 2 or max(start for start, _ in ends) >= min(end for _, end in ends):
        return False
    taken = torch.zeros(max(end for _, end in ends), dtype=torch.bool)
    taken.as_strided(one.shape, one.stride(), one.storage_offset()).fill_(True)
    return bool(taken.as_strided(other.shape, other.stride(), other.storage_offset()).any())


def _extent(tensor: Tensor) -> int:
    return 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))


def _frames() -> Iterator[FrameType]:
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        yield frame
        frame = frame.f_back


def _where(root: FrameType | None) -> str:
    """The line of the model's code that is being run, `root` being what runs the forward of the whole model."""
    frames = list(takewhile(lambda frame: frame is not root, _frames()))
    of_the_model = (frame for frame in frames if not frame.f_code.co_filename.startswith(_OF_LIBRARIES))
    frame = next(of_the_model, frames[-1])
    file, line = frame.f_code.co_filename, frame.f_lineno
    return f"in {frame.f_code.co_qualname} ({file}:{line}: {linecache.getline(file, line).strip()})"
