"""Gradients of the outputs with respect to y of every use: v · f pulled back for many cotangents v at once.

The cost is that of the backward passes through the target, one for each v and example. What is the same for all
examples is computed once.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.graph import Node, get_gradient_edge

from apd_lens._finite import on_gpu
from apd_lens._passes import WatchedPass

# Gradients count as the same for all examples if they differ by no more than so many roundings.
_ROUNDINGS = 64

# Operations that only move numbers, each to one place, or change their dtype; as autograd calls their backward.
_MOVES = frozenset(
    f"{name}Backward0"
    for name in (
        "Alias", "Clone", "Permute", "ReshapeAlias", "Squeeze", "T", "ToCopy", "Transpose", "UnsafeView", "Unsqueeze",
        "View",
    )
)  # fmt: skip
_SUMS = frozenset({"AddBackward0", "AddBackward1", "SubBackward0"})
_PRODUCTS = frozenset({"AddmmBackward0", "MmBackward0"})

# ∂(v · f)/∂y of each call of a watched pass, `v examples *pos d_out`, `examples` being 1 where it is the same for all;
# None where the output does not depend on y.
Jacobians = list[Tensor | None]


@dataclass(frozen=True, eq=False)
class Cotangents:
    """Vectors v in the space of one example's outputs, so that Σ_v (v · e)² is Σ_o e_o² times `scale`.

    Attributes:
        count: how many.
        rows: the ones from first to last, `v *pos n_outputs`.
        scale: number of cotangents that bring as much as one output each.
        exact: not only on average.
    """

    count: int
    rows: Callable[[int, int], Tensor]
    scale: int = 1
    exact: bool = True

    def some(self, first: int, last: int) -> "Cotangents":
        """The ones from first to last."""
        return Cotangents(last - first, lambda start, end: self.rows(first + start, first + end), self.scale, False)


def one_hot_cotangents(output: Float[Tensor, "batch *pos n_outputs"]) -> Cotangents:
    """One for every output of an example."""

    def rows(first: int, last: int) -> Tensor:
        one_hot = torch.zeros(last - first, output[0].numel(), device=output.device, dtype=output.dtype)
        return one_hot.fill_diagonal_(1).roll(first, 1).unflatten(1, output.shape[1:])

    return Cotangents(output[0].numel(), rows)


def random_cotangents(
    output: Float[Tensor, "batch *pos n_outputs"],
    K: int,
    kind: Literal["rademacher", "normal"],
    generator: torch.Generator | None,
) -> Cotangents:
    """K random ones with E v vᵀ = 1, the same for all examples."""
    shape = (K, *output.shape[1:])
    if kind == "normal":
        drawn = torch.randn(shape, generator=generator, device=output.device, dtype=output.dtype)
    else:
        drawn = torch.randint(2, shape, generator=generator, device=output.device, dtype=torch.int8).mul_(2).sub_(1)
    return Cotangents(K, lambda first, last: drawn[first:last].to(output.dtype), scale=K, exact=False)


@dataclass(frozen=True)
class Readout:
    """How the output depends on the decomposed matrices, as far as it saves backward passes.

    Attributes:
        shared: for each call, whether ∂f/∂y is the same for all examples.
        start: index (into `_inputs`) of an x that all gradients which are not shared come through, and from which
            only linear maps lead to the output; None if there is none.
    """

    shared: tuple[bool, ...]
    start: int | None


def jacobians_in_parts(
    watched: WatchedPass, cotangents: Cotangents, memory: int
) -> Iterator[tuple[WatchedPass, Iterator[Jacobians]]]:
    """The pass in parts of some examples each, and for each part its Jacobians in chunks of cotangents.

    There is one part and one chunk if the Jacobians and what it takes to compute them fit into `memory` bytes. If not,
    the target is run again on some examples at a time, so that what is multiplied with the Jacobians later is not
    computed again for each chunk of cotangents. Uses up the pass's graph.
    """
    if watched.jacobians is not None and cotangents.exact:
        yield watched, iter([watched.jacobians])
        return
    probe = cotangents.count > 2 and len(watched.output) > 1
    find = readout_of_graph if on_gpu(watched.output.device) else find_readout
    readout = find(watched) if probe else Readout((False,) * len(watched.calls), None)
    n_examples = len(watched.output)
    bytes_per_example = cotangents.count * _bytes_per_cotangent(watched, readout) / n_examples
    examples_at_once = max(1, int(memory / bytes_per_example)) if bytes_per_example else n_examples
    if examples_at_once >= n_examples:
        yield watched, _chunks(watched, readout, cotangents, memory)
        return
    watched.spent = True  # what is left of its graph is not worth keeping
    for first in range(0, n_examples, examples_at_once):
        part = watched.again(None, slice(first, first + examples_at_once))
        yield part, _chunks(part, readout, cotangents, memory)


def _chunks(watched: WatchedPass, readout: Readout, cotangents: Cotangents, memory: int) -> Iterator[Jacobians]:
    output, ys = watched.output, [call.y for call in watched.calls]
    shared = [y for y, is_shared in zip(ys, readout.shared, strict=True) if is_shared]
    own = [y for y, is_shared in zip(ys, readout.shared, strict=True) if not is_shared]
    start = output if readout.start is None else _inputs(watched)[readout.start]
    chunk = min(cotangents.count, max(1, int(memory / max(1, _bytes_per_cotangent(watched, readout)))))
    for first in range(0, cotangents.count, chunk):
        last = min(first + chunk, cotangents.count)
        vs = cotangents.rows(first, last)
        gradients = dict(zip(shared, _spread_over_examples(output, vs, shared), strict=True))
        if own:
            # One cotangent serves all examples at once, since they do not influence each other.
            (at_start,) = [vs[:, None]] if start is output else _spread_over_examples(output, vs, [start])
            pulled = torch.autograd.grad(
                start,
                own,
                at_start.expand(-1, *start.shape),
                is_grads_batched=True,
                retain_graph=last < cotangents.count,
                allow_unused=True,
            )
            gradients |= dict(zip(own, pulled, strict=True))
        jacobians: Jacobians = [gradients[y] for y in ys]
        watched.spent = watched.spent or (bool(own) and last == cotangents.count)
        if chunk == cotangents.count and cotangents.exact:  # good for the same batch the next time too
            watched.jacobians = jacobians
        yield jacobians


def find_readout(watched: WatchedPass) -> Readout:
    """Probes the pass with one random v.

    ∂f/∂y is the same for all examples if vᵀ ∂f/∂y is. An x is a start if that holds for it too, and the gradients of
    all other y are what comes through it.
    """
    output, ys, xs = watched.output, [call.y for call in watched.calls], _inputs(watched)
    v = torch.randn(output.shape[1:], generator=torch.Generator().manual_seed(0)).to(output)
    # Also for bfloat16, where equal rows come out equal, and 64 roundings would be a half.
    tolerance = _ROUNDINGS * min(torch.finfo(output.dtype).eps, torch.finfo(torch.float32).eps)

    def gradients(root: Tensor, cotangent: Tensor, tensors: Sequence[Tensor]) -> Sequence[Tensor | None]:
        return torch.autograd.grad(root, tensors, cotangent, retain_graph=True, allow_unused=True)

    def equal(some: Tensor | None, others: Tensor | None) -> bool:
        if some is None or others is None:
            return some is others
        return bool((some - others).abs().max() <= tolerance * some.abs().max())

    full = gradients(output, v.expand_as(output), [*ys, *xs])
    same = [gradient is not None and equal(gradient, gradient[:1]) for gradient in full]
    shared = tuple(same[: len(ys)])
    own = {y: gradient for y, gradient, is_shared in zip(ys, full, shared, strict=False) if not is_shared}
    for index, (x, at_x) in enumerate(zip(xs, full[len(ys) :], strict=True)):
        if own and at_x is not None and same[len(ys) + index]:
            through_x = gradients(x, at_x, list(own))
            if all(equal(whole, part) for whole, part in zip(own.values(), through_x, strict=True)):
                return Readout(shared, index)
    return Readout(shared, None)


def readout_of_graph(watched: WatchedPass) -> Readout:
    """What `find_readout` finds, as far as the autograd graph says it without a look at any number: no device is waited
    for.

    ∂f/∂y is the same for all examples if only additions, products with constant matrices, and what moves numbers are
    on all ways from y to the output. What is not known to be one of these counts as not linear.
    """
    ys, xs = [_edge(call.y) for call in watched.calls], [_edge(x) for x in _inputs(watched)]
    linear, others = _reached(watched.output, set(ys))
    is_shared = linear - others
    shared = tuple(y in is_shared for y in ys)
    own = (linear | others).intersection(ys) - is_shared
    for index, x in enumerate(xs):
        if own and x in is_shared and not own & set().union(*_reached(watched.output, set(ys), without=x)):
            return Readout(shared, index)
    return Readout(shared, None)


_Edge = tuple[Node, int]


def _edge(tensor: Tensor) -> _Edge:
    """Where autograd takes the gradient of a tensor from: an operation, and which of its results."""
    edge = get_gradient_edge(tensor)
    return edge.node, edge.output_nr


def _reached(output: Tensor, ys: set[_Edge], without: _Edge | None = None) -> tuple[set[_Edge], set[_Edge]]:
    """All edges of the graph behind the output that are reached on linear ways, and those reached on others.

    Args:
        without: the edge that no way may go through.
    """
    reached: tuple[set[_Edge], set[_Edge]] = (set(), set())
    todo = [(_edge(output), False)]
    while todo:
        edge, is_other = todo.pop()
        if edge == without or edge in reached[is_other]:
            continue
        reached[is_other].add(edge)
        is_other = is_other or not _is_linear(edge[0], ys)
        todo += [((node, number), is_other) for node, number in edge[0].next_functions if node is not None]
    return reached


def _is_linear(node: Node, ys: set[_Edge]) -> bool:
    if node.name() not in _PRODUCTS:
        return node.name() in _MOVES or node.name() in _SUMS
    # The right factor: a constant on the left would mix examples, or differ between them.
    return _is_constant(node.next_functions[-1][0], ys)


def _is_constant(node: Node | None, ys: set[_Edge]) -> bool:
    """Whether nothing is behind a node but one tensor that is no y."""
    while node is not None and node.name() in _MOVES:
        node = node.next_functions[0][0]
    return node is None or (not node.next_functions and (node, 0) not in ys)


def _inputs(watched: WatchedPass) -> list[Tensor]:
    """Every x that a matrix multiplies and that depends on a decomposed one, in the order of the calls."""
    xs = [call.x_in_graph for call in watched.calls] + watched.before_others
    return [x for x in xs if x.requires_grad and len(x) == len(watched.output)]


def _spread_over_examples(
    output: Tensor, vs: Float[Tensor, "v *pos n_outputs"], tensors: Sequence[Tensor]
) -> list[Tensor]:
    """Gradients `v 1 *rest` of v · f that are the same for all examples: each example is given another v."""
    if not tensors:
        return []
    parts = []
    for some in vs.split(len(output)):
        each = output.new_zeros(output.shape)
        each[: len(some)] = some
        gradients = torch.autograd.grad(output, tensors, each, retain_graph=True)
        parts.append([gradient[: len(some), None] for gradient in gradients])
    return [torch.cat(part) for part in zip(*parts, strict=True)]


def _bytes_per_cotangent(watched: WatchedPass, readout: Readout) -> int:
    """What one cotangent takes for all examples: the gradients that are not shared, and as much on the way to them."""
    own = sum(call.y.numel() for call, is_shared in zip(watched.calls, readout.shared, strict=True) if not is_shared)
    start = watched.output if readout.start is None else _inputs(watched)[readout.start]
    return (2 * own + start.numel()) * watched.output.element_size() if own else 0
