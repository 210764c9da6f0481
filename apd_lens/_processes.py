"""Several processes that train together, of a `torch.distributed` group that the user has started; alone: the identity.

Each process is given the same batches and takes its part of the examples of each. What looks at the whole batch is
computed in all of them, from gathered numbers. A gradient that leads back through `summed` is that of this process's
part, as many times as there are processes. So the mean of the processes' gradients (`average_gradients`) is what one
process would have of the whole batch.
"""

import atexit
import hashlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Float, Shaped
from torch import Tensor

from apd_lens import _errors
from apd_lens._errors import ApdError

# So long a process that failed waits for the others to hear of it.
_PATIENCE = timedelta(seconds=50)

_CONTROL: list[Any] = []  # the default group, and a group on the CPU of the same processes
_LOST: list[Any] = []  # a default group of which a process ended, and what was said then


def n_processes() -> int:
    """How many train together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def is_first() -> bool:
    """Whether this is the process that shows and writes what all know."""
    return n_processes() == 1 or dist.get_rank() == 0


def part(n: int) -> slice:
    """Which of n examples are this process's."""
    count = n_processes()
    number = dist.get_rank() if count > 1 else 0
    return slice(n * number // count, n * (number + 1) // count)


def own(values: Shaped[Tensor, "n *rest"]) -> Shaped[Tensor, "part *rest"]:
    """The part of this process."""
    return values if n_processes() == 1 else values[part(len(values))]


def gathered(values: Shaped[Tensor, "part *rest"], n: int) -> Shaped[Tensor, "n *rest"]:
    """The parts of all processes, of n examples."""
    if n_processes() == 1:
        return values
    whole = values.new_zeros(n, *values.shape[1:])
    whole[part(n)] = values
    return summed(whole)


def with_own(whole: Shaped[Tensor, "n *rest"], own: Shaped[Tensor, "part *rest"]) -> Shaped[Tensor, "n *rest"]:
    """What was gathered, without a graph but for this process's part: for what only this part is used of."""
    if n_processes() == 1:
        return own
    whole = whole.detach().clone()
    whole[part(len(whole))] = own
    return whole


def summed(values: Shaped[Tensor, "*shape"]) -> Shaped[Tensor, "*shape"]:
    """The sum of what each process has."""
    return values if n_processes() == 1 else _Summed.apply(values)


class _Summed(torch.autograd.Function):
    @staticmethod
    def forward(values: Tensor) -> Tensor:
        total = values.clone(memory_format=torch.contiguous_format)
        with together(f"a sum of {tuple(values.shape)}"):
            dist.all_reduce(total, group=group_of(total))
        return total

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None: ...

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return gradient * n_processes()


def mean(of_part: Float[Tensor, ""], count: int) -> Float[Tensor, ""]:
    """The mean over the values of all processes.

    Args:
        of_part: the mean over those of this process.
        count: how many these are; of none the mean may be NaN.
    """
    if n_processes() == 1:
        return of_part
    total = (of_part if count else of_part.nan_to_num()).double() * count
    total, n = summed(torch.stack([total, total.new_tensor(count)]))
    return (total / n).to(of_part.dtype)


def variance(values: Float[Tensor, "..."]) -> Float[Tensor, ""]:
    """The variance of the values of all processes."""
    count = n_processes()
    if count == 1:
        return values.var()
    center = values.sum().double() / max(1, values.numel())
    errors = (values - center.to(values)).square().sum()
    of_each = gathered(torch.stack([center.new_tensor(values.numel()), center, errors.double()])[None], count)
    n, centers, squares = of_each.T
    total = squares.sum() + (n * (centers - (n * centers).sum() / n.sum()).square()).sum()
    return (total / (n.sum() - 1)).to(values.dtype)


def check_same(what: Any, error: ApdError) -> None:
    """Raises the error in all processes unless `what`, by its text, is the same in all."""
    if n_processes() > 1 and not _say("a check", repr(what)):
        raise error


def copy_from_first(tensors: Iterable[Tensor]) -> None:
    """Gives all processes the numbers of the first one, in place."""
    if n_processes() == 1:
        return
    with together("a copy"):
        for tensor in tensors:
            numbers = tensor.detach().contiguous()
            dist.broadcast(numbers, 0, group=group_of(numbers))
            tensor.detach().copy_(numbers)


def average_gradients(parameters: Iterable[Tensor]) -> None:
    """The mean of the processes' gradients in the place of each one's own."""
    if n_processes() == 1:
        return
    with together("gradients"):
        sums = []
        for parameter in parameters:
            parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.contiguous()
            sums.append((parameter.grad, dist.all_reduce(parameter.grad, group=group_of(parameter), async_op=True)))
        for gradient, work in sums:
            work.wait()
            gradient.div_(n_processes())


@contextmanager
def together(doing: str) -> Iterator[None]:
    """Inside, all do the same; an error of torch.distributed says that another process ended."""
    _say(doing)
    with _reached(doing):
        yield


def wait_for_all() -> None:
    """Waits until all processes are here."""
    if n_processes() > 1:
        _say("the end")


@contextmanager
def raised_in_all() -> Iterator[None]:
    """What is raised inside in one process is raised in all of them. Also a decorator."""
    try:
        yield
    except BaseException as error:
        if n_processes() > 1 and not hasattr(error, "_said"):
            error._said = True  # type: ignore[attr-defined]
            _say("an error", error=error)
        raise


def _say(doing: str, detail: str = "", error: BaseException | None = None) -> bool:
    """Says to the other processes what this one does next, or that it failed. All do so before anything together, so
    that a failure is heard wherever they are. Returns whether all say the same.

    Raises:
        ApdError: another process failed, ended, or does something else. Of the class that was raised there, if it is
            one of ours.
    """
    digest = int.from_bytes(hashlib.sha256(f"{doing}: {detail}".encode()).digest()[:7])
    state = torch.tensor([int(error is not None), digest, -digest], device="cpu")
    try:
        if _LOST and _LOST[0] is dist.group.WORLD:  # those that are left may wait for each other without end
            raise ApdError(_LOST[1])
        with _reached(doing):
            work: Any = dist.all_reduce(state, dist.ReduceOp.MAX, group=_control(), async_op=True)
            work.wait(timedelta(0) if error is None else _PATIENCE)  # 0 is as long as the group waits
            failed, highest, lowest = state.tolist()
            if not failed and highest == -lowest:
                return True
            said: list[Any] = [None] * n_processes()
            failure = None
            if error is not None:
                failure = type(error).__name__, ". ".join([str(error), *getattr(error, "__notes__", [])])
            dist.all_gather_object(said, (doing, failure), group=_control())
        _raise_first(said)
    except ApdError as heard:
        heard._said = True  # type: ignore[attr-defined]
        if error is None:
            raise
        if str(error) not in str(heard):
            error.add_note(str(heard))
    return False


def _raise_first(said: Iterable[tuple[str, tuple[str, str] | None]]) -> None:
    """Raises what the first other process that failed says; or that they do different things."""
    failures = {number: failure for number, (_, failure) in enumerate(said) if failure is not None}
    for number, (name, message) in failures.items():
        if number != dist.get_rank():
            cls = getattr(_errors, name, None)
            raise (cls or ApdError)(f"Process {number} stopped: {message if cls else f'{name}: {message}'}")
    doings = sorted({doing for doing, _ in said})
    if len(doings) > 1 and not failures:
        raise ApdError(
            f"The processes do different things, {' and '.join(doings)}. Each must make the same calls, with the same "
            "arguments and a model of the same weights."
        )


@contextmanager
def _reached(doing: str) -> Iterator[None]:
    """Inside, an error of torch.distributed becomes one that says that another process ended."""
    try:
        yield
    except RuntimeError as error:
        message = (
            f"Another of the {n_processes()} processes ended, or cannot be reached, while this one was at {doing}. See "
            "what it printed. A training that has checkpoints goes on by decompose(…, resume=…), in any number of "
            f"processes. This one saw: {str(error).splitlines()[0]:.200}"
        )
        _LOST[:] = [dist.group.WORLD, message]
        raise ApdError(message) from error


def group_of(values: Tensor) -> Any:
    """What is on the CPU goes by a group of our own, whatever the user's is for."""
    return _control() if values.device.type == "cpu" else dist.group.WORLD


def _control() -> Any:
    """Waits as long as the user's group does, `init_process_group(timeout=…)`."""
    world: Any = dist.group.WORLD
    if not _CONTROL or _CONTROL[0] is not world:
        timeout = world._get_backend(world._device_types[0]).options._timeout
        _CONTROL[:] = [world, dist.new_group(backend="gloo", timeout=timeout)]
    return _CONTROL[1]


@atexit.register
def _end_control() -> None:
    """Ends the threads of our group. One that let go of a tensor when Python is gone would abort the process."""
    if _CONTROL and _CONTROL[0] is dist.group.WORLD:
        dist.destroy_process_group(_CONTROL[1])
    _CONTROL.clear()
