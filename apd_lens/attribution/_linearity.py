"""How the output depends on the decomposed matrices, as far as that saves backward passes.

Where there are only linear maps between y of a call and the output, ∂f/∂y is the same for all examples. Where there
are, besides, linear maps to y of later calls, it is a sum of products with their gradients, which may be much narrower:
in a residual stream of width 1000, what a layer writes is read by the 25 neurons of the next one and by the readout.
And where the last thing that happens is a nonlinearity of each output on its own, all that is linear in front of it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node, get_gradient_edge

from apd_lens._block import Block, Handles
from apd_lens.passes._watch import WatchedPass

# Gradients count as the same for all examples if they differ by no more than so many roundings.
_ROUNDINGS = 64

# So many times narrower must y_b be than the gradients that are built from it, and than the batch is long: it takes a
# product of M_b with every component, and saves one for every example.
_NARROWER = 2

# Operations, as autograd calls their backward, that only move numbers, each to one place, or change their dtype;
_MOVES = frozenset(
    f"{name}Backward0"
    for name in (
        "Alias", "Clone", "Permute", "ReshapeAlias", "Squeeze", "T", "ToCopy", "Transpose", "UnsafeView", "Unsqueeze",
        "View",
    )
)  # fmt: skip
_SUMS = frozenset({"AddBackward0", "AddBackward1", "SubBackward0"})
_PRODUCTS = frozenset({"AddmmBackward0", "MmBackward0"})
# and those of one tensor, each number of which has to do with one number of the result alone.
_ELEMENTWISE = frozenset(
    f"{name}Backward0"
    for name in (
        "Elu", "Exp", "Gelu", "Hardtanh", "LeakyRelu", "Relu", "Sigmoid", "Silu", "Softplus", "Tanh",
    )
)  # fmt: skip

# ∂y_b/∂t of a tensor t, `d_b d_t`, for later calls b.
Maps = Mapping[int, Tensor]


@dataclass(frozen=True)
class Stage:
    """Calls whose gradients are pulled back together, from a place that all of them come through.

    Attributes:
        calls: which.
        start: of the x that is this place, its key in `inputs`; None for the output.
        maps: of that x, on which the gradient there depends as `Readout` says.
    """

    calls: tuple[int, ...]
    start: int | None = None
    maps: Maps = field(default_factory=dict)


@dataclass(frozen=True)
class Readout:
    """How gradients are found without a backward pass through all of the target for each of them.

    Attributes:
        affine: calls with ∂(v · f)/∂y = S(v) + Σ_b ∂(v · f)/∂y_b M_b, S being the same for all examples: the M_b, by b.
            Without any the gradient itself is the same for all.
        stages: the other calls, in the order in which their gradients are found; b is always of an earlier stage.
    """

    affine: Mapping[int, Maps]
    stages: tuple[Stage, ...]


def unknown_readout(watched: WatchedPass) -> Readout:
    """All gradients come from the output."""
    return Readout({}, (Stage(tuple(range(len(watched.calls)))),))


def inputs(watched: WatchedPass) -> dict[int, Tensor]:
    """Every x in the graph that a matrix multiplies, by its place, which is the same in a pass on some examples."""
    xs = [call.x_in_graph for call in watched.calls] + [x for _, x in watched.others_after]
    return {place: x for place, x in enumerate(xs) if x.requires_grad and len(x) == len(watched.output)}


def in_front_of_nonlinearity(
    output: Float[Tensor, "batch *pos n_outputs"],
) -> tuple[GradientEdge, Float[Tensor, "outputs batch"]] | None:
    """z and ∂f_o/∂z_o, if f_o = σ(z_o) for each output alone; None if no such operation comes last."""
    node = output.grad_fn
    if node is None or node.name() not in _ELEMENTWISE:
        return None
    before, number = node.next_functions[0]
    if before is None:
        return None
    z = GradientEdge(before, number)
    (slopes,) = torch.autograd.grad(output, z, torch.ones_like(output), retain_graph=True)
    return z, slopes.flatten(1).mT


def find_readout(watched: WatchedPass, root: Tensor | GradientEdge) -> Readout:
    """Probes the pass with one random v, pulled back from `root`, the output or what stands for it.

    ∂f/∂y is the same for all examples if vᵀ ∂f/∂y is. An x is a start if that holds for it too, and gradients of y are
    what comes through it. When those of some y_b are known, what comes through them is cut off, and it is looked again.
    """
    ys, xs = [call.y for call in watched.calls], inputs(watched)
    tensors = [*ys, *xs.values()]
    v = torch.randn(
        watched.output.shape[1:], generator=torch.Generator().manual_seed(0), dtype=torch.float32, device="cpu"
    ).expand_as(watched.output)
    v = v.to(watched.output)
    full = {i: gradient for i, gradient in enumerate(_gradients(root, v, tensors)) if gradient is not None}
    calls, places = [i for i in full if i < len(ys)], [i for i in full if i >= len(ys)]
    place_of = dict(enumerate(xs, len(ys)))
    through: dict[int, list[int]] = {}  # x -> y all of whose gradient comes through it

    def through_x(x: int) -> list[int]:
        if x not in through:
            at_ys = _gradients(tensors[x], full[x], [ys[call] for call in calls])
            through[x] = [
                call
                for call, at_y in zip(calls, at_ys, strict=True)
                if at_y is not None and _are_equal(full[call], at_y, full[call])
            ]
        return through[x]

    stages, affine, left, known = list[Stage](), dict[int, Maps](), calls, list[int]()
    while left:
        maps = _affine_maps(root, v, tensors, full, [*left, *places], known)
        affine |= {call: maps[call] for call in left if call in maps}
        left = [call for call in left if call not in affine]
        starts = (x for x in places if x in maps and (maps[x] or not stages))
        found = ((x, [call for call in left if call in through_x(x)]) for x in starts)
        start, here = next(((x, here) for x, here in found if here), (None, []))
        if start is None:
            break
        stages.append(Stage(tuple(here), place_of[start], maps[start]))
        left = [call for call in left if call not in here]
        widest = max((ys[call].shape[-1] for call in left), default=0)
        known += [b for b in here if ys[b].ndim == 2 and _NARROWER * ys[b].shape[1] <= min(widest, len(ys[b]))]
    if not left:
        return Readout(affine, tuple(stages))
    # All others in one go: what comes from further back comes through what was in a stage again.
    own = [call for call in calls if call not in affine]
    same_for_all = _affine_maps(root, v, tensors, full, places, known=[])
    starts = (place_of[x] for x in same_for_all if set(own) <= set(through_x(x)))
    return Readout(affine, (Stage(tuple(own), next(starts, None)),))


def _affine_maps(
    root: Tensor | GradientEdge,
    v: Tensor,
    tensors: Sequence[Tensor],
    full: Mapping[int, Tensor],
    of: Sequence[int],
    known: Sequence[int],
) -> dict[int, Maps]:
    """For the tensors `of` whose gradients depend on those of the known y_b as `Readout` says: their M_b.

    Args:
        full: their gradients.
    """
    direct = {i: full[i] for i in of}
    if known:
        with cut_off([tensors[b] for b in known]):
            found = zip(of, _gradients(root, v, [tensors[i] for i in of]), strict=True)
        direct = {i: gradient for i, gradient in found if gradient is not None}
    maps: dict[int, dict[int, Tensor]] = {i: {} for i in of}
    for b in known:
        y = tensors[b]
        wide = [i for i in of if tensors[i].ndim == 2 and tensors[i].shape[1] >= y.shape[1]]
        with cut_off([tensors[other] for other in known if other != b]):
            rows = spread_over_examples(
                y, y, torch.eye(y.shape[1], dtype=y.dtype, device=y.device), [tensors[i] for i in wide]
            )
        for i, M in zip(wide, rows, strict=True):
            if M is not None:
                maps[i][b] = M[:, 0]

    def is_affine(i: int) -> bool:
        whole = sum((full[b] @ M for b, M in maps[i].items()), start=direct[i])
        return _are_equal(direct[i], direct[i][:1], full[i]) and (not known or _are_equal(whole, full[i], full[i]))

    return {i: maps[i] for i in direct if is_affine(i)}


def cut_off(ys: Sequence[Tensor]) -> Block:
    """Inside, no gradient comes through these."""
    return Block(lambda: Handles(y.register_hook(torch.zeros_like) for y in ys))


def _gradients(root: Tensor | GradientEdge, at_root: Tensor, tensors: Sequence[Tensor]) -> Sequence[Tensor | None]:
    return torch.autograd.grad(root, tensors, at_root, retain_graph=True, allow_unused=True)


def _are_equal(some: Tensor, others: Tensor, scale: Tensor) -> bool:
    """Whether two gradients are, but for roundings of numbers as large as the largest of a third."""
    # Also for bfloat16, where equal rows come out equal, and 64 roundings would be a half.
    tolerance = _ROUNDINGS * min(torch.finfo(some.dtype).eps, torch.finfo(torch.float32).eps)
    return bool((some - others).abs().max() <= tolerance * scale.abs().max())


def spread_over_examples(
    root: Tensor | GradientEdge,
    like: Tensor,
    vs: Float[Tensor, "v *pos n_outputs"],
    tensors: Sequence[Tensor],
) -> list[Tensor | None]:
    """Gradients `v 1 *rest` of v · root, as they are for the first examples: each example is given another v, and when
    there are more v than examples, the first one starts again. None where the root does not depend on a tensor.

    Args:
        like: of the root's shape, `examples *pos n_outputs`.
    """
    parts = []
    for some in vs.split(len(like)) if tensors else ():
        each = like.new_zeros(like.shape)
        each[: len(some)] = some
        gradients = torch.autograd.grad(root, tensors, each, retain_graph=True, allow_unused=True)
        parts.append([None if gradient is None else gradient[: len(some), None] for gradient in gradients])
    return [None if part[0] is None else torch.cat(part) for part in zip(*parts, strict=True)]


def readout_of_graph(watched: WatchedPass, root: Tensor | GradientEdge) -> Readout:
    """What `find_readout` finds, as far as the autograd graph says it without a look at any number: no device is waited
    for.

    ∂f/∂y is the same for all examples if only additions, products with constant matrices, and what moves numbers are
    on all ways from y to the output. What is not known to be one of these counts as not linear.
    """
    ys, xs = [edge(call.y) for call in watched.calls], {place: edge(x) for place, x in inputs(watched).items()}
    linear, others = reached(edge(root), set(ys))
    is_shared = linear - others
    affine = {call: {} for call, y in enumerate(ys) if y in is_shared}
    own = tuple(call for call, y in enumerate(ys) if y in others)
    if not own:
        return Readout(affine, ())
    for place, x in xs.items():
        if x in is_shared and not {ys[call] for call in own} & set().union(*reached(edge(root), set(ys), without=x)):
            return Readout(affine, (Stage(own, place),))
    return Readout(affine, (Stage(own),))


Edge = tuple[Node, int]


def edge(place: Tensor | GradientEdge) -> Edge:
    """Where autograd takes the gradient of a tensor from: an operation, and which of its results."""
    found = get_gradient_edge(place) if isinstance(place, Tensor) else place
    return found.node, found.output_nr


def reached(
    root: Edge, ys: set[Edge], without: Edge | None = None, also: frozenset[str] = frozenset()
) -> tuple[set[Edge], set[Edge]]:
    """All edges of the graph behind the root that are reached on linear ways, and those reached on others.

    Args:
        without: the edge that no way may go through.
        also: other operations that count as linear.
    """
    found: tuple[set[Edge], set[Edge]] = (set(), set())
    todo = [(root, False)]
    while todo:
        here, is_other = todo.pop()
        if here == without or here in found[is_other]:
            continue
        found[is_other].add(here)
        is_other = is_other or not (here[0].name() in also or _is_linear(here[0], ys))
        todo += [((node, number), is_other) for node, number in here[0].next_functions if node is not None]
    return found


def _is_linear(node: Node, ys: set[Edge]) -> bool:
    if node.name() not in _PRODUCTS:
        return node.name() in _MOVES or node.name() in _SUMS
    # The right factor: a constant on the left would mix examples, or differ between them.
    return _is_constant(node.next_functions[-1][0], ys)


def _is_constant(node: Node | None, ys: set[Edge]) -> bool:
    """Whether nothing is behind a node but one tensor that is no y."""
    while node is not None and node.name() in _MOVES:
        node = node.next_functions[0][0]
    return node is None or (not node.next_functions and (node, 0) not in ys)
