"""Gradients of the outputs with respect to y of every use: v · f pulled back for many cotangents v at once.

The cost is that of the backward passes through the target, one for each v and example. What is the same for all
examples is computed once.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.graph import GradientEdge

from apd_lens._memory import chunks
from apd_lens.attribution._linearity import (
    Readout,
    cut_off,
    find_readout,
    in_front_of_nonlinearity,
    inputs,
    readout_of_graph,
    spread_over_examples,
    unknown_readout,
)
from apd_lens.data._finite import on_gpu
from apd_lens.passes._cotangents import Cotangents
from apd_lens.passes._watch import WatchedPass

# values `v examples *pos d` and through `d d_out` (None for the identity): values @ through. `examples` is 1 where the
# values are the same for all.
Part = tuple[Tensor, Tensor | None]

Of = int | Literal["outputs"] | tuple[Literal["fisher"], int]


@dataclass(frozen=True, eq=False)
class Jacobians:
    """∂(v · f)/∂y of every call of a watched pass.

    Attributes:
        of_calls: for each call the parts that add up to it; none where the output does not depend on y.
        slopes: `v examples`, what all of them are multiplied with; None for 1.
        of: what v are: one for each of the "outputs", or so many projections, perhaps in the metric of "fisher".
    """

    of_calls: Sequence[Sequence[Part]]
    slopes: Tensor | None = None
    of: Of = "outputs"

    @classmethod
    def whole(cls, gradients: Sequence[Tensor | None]) -> "Jacobians":
        """Of gradients `v examples *pos d_out`, each in one part."""
        return cls([[] if gradient is None else [(gradient, None)] for gradient in gradients])

    def tensors(self) -> list[Tensor]:
        """The ones that it holds."""
        parts = [tensor for parts in self.of_calls for part in parts for tensor in part if tensor is not None]
        return parts if self.slopes is None else [*parts, self.slopes]

    def as_whole(self) -> list[Float[Tensor, "v examples *pos d_out"] | None]:
        """The gradients, multiplied out and added up."""
        gradients = []
        for parts in self.of_calls:
            total = None
            for values, through in parts:
                gradient = values if through is None else values @ through
                total = gradient if total is None else total + gradient
            if total is not None and self.slopes is not None:
                total = total * self.slopes.reshape(*self.slopes.shape, *[1] * (total.ndim - 2))
            gradients.append(total)
        return gradients


def jacobians_in_parts(
    watched: WatchedPass, cotangents: Cotangents, memory: int
) -> Iterator[tuple[WatchedPass, Iterator[Jacobians]]]:
    """The pass in parts of some examples each, and for each part its Jacobians in chunks of cotangents.

    There is one part and one chunk if the Jacobians and what it takes to compute them fit into `memory` bytes. If not,
    the target is run again on some examples at a time, so that what is multiplied with the Jacobians later is not
    computed again for each chunk of cotangents. Uses up the pass's graph.
    """
    if watched.jacobians is not None and cotangents.lasting and watched.jacobians.of == _of(cotangents):
        yield watched, iter([watched.jacobians])
        return
    root, slopes = _root(watched, cotangents)
    readout = unknown_readout(watched)
    if cotangents.at_input is not None:
        readout = Readout({}, (replace(readout.stages[0], start=cotangents.at_input[0]),))
    elif cotangents.count > 2 and len(watched.output) > 1:
        find = readout_of_graph if on_gpu(watched.output.device) else find_readout
        readout = find(watched, root)
    n_examples = len(watched.output)
    parts = chunks(n_examples, cotangents.count * _bytes_per_cotangent(watched, readout) / n_examples, memory)
    if len(parts) == 1:
        yield watched, _chunks(watched, root, slopes, readout, cotangents, memory)
        return
    watched.free_graph()
    for examples in parts:
        part = watched.again(None, examples)
        yield part, _chunks(part, *_root(part, cotangents), readout, cotangents.of_examples(examples), memory)


def _of(cotangents: Cotangents) -> Of:
    if cotangents.at_input is not None:
        return "fisher", cotangents.count
    return "outputs" if cotangents.exact else cotangents.count


def _root(watched: WatchedPass, cotangents: Cotangents) -> tuple[Tensor | GradientEdge, Tensor | None]:
    """Where gradients of outputs start, and what they are multiplied with afterwards, `outputs batch`; None for 1."""
    found = in_front_of_nonlinearity(watched.output) if cotangents.exact else None
    return (watched.output, None) if found is None else found


def _chunks(
    watched: WatchedPass,
    root: Tensor | GradientEdge,
    slopes: Tensor | None,
    readout: Readout,
    cotangents: Cotangents,
    memory: int,
) -> Iterator[Jacobians]:
    ys, xs, output = [call.y for call in watched.calls], inputs(watched), watched.output
    for some in chunks(cotangents.count, _bytes_per_cotangent(watched, readout), memory):
        known, is_last = dict[int, Tensor](), some.stop == cotangents.count
        if cotangents.at_input is None:
            vs = cotangents.rows(some.start, some.stop)
            direct = _direct(readout, root, output, vs, ys, xs)
        else:
            place, at_input = cotangents.at_input
            vs, direct = at_input[some], {xs[place]: at_input[some]}
        for number, stage in enumerate(readout.stages):
            own = [ys[call] for call in stage.calls]
            if stage.start is None:
                start, at_start = root, vs[:, None].expand(-1, *output.shape)
            else:
                start = xs[stage.start]
                at_start = direct[start].expand(-1, *start.shape)
                for b, M in stage.maps.items():
                    at_start = at_start + known[b] @ M
            # One cotangent serves all examples at once, since they do not influence each other.
            pulled = torch.autograd.grad(
                start,
                own,
                at_start,
                is_grads_batched=True,
                retain_graph=not is_last or number + 1 < len(readout.stages),
                allow_unused=True,
            )
            known |= {call: at_y for call, at_y in zip(stage.calls, pulled, strict=True) if at_y is not None}
        of_calls: list[Sequence[Part]] = [[(known[call], None)] if call in known else [] for call in range(len(ys))]
        for call, maps in readout.affine.items():
            of_calls[call] = [(direct[ys[call]], None), *((known[b], M) for b, M in maps.items())]
        jacobians = Jacobians(of_calls, None if slopes is None else slopes[some], _of(cotangents))
        watched.graph_freed = watched.graph_freed or (bool(readout.stages) and is_last)
        if is_last and some.start == 0 and cotangents.lasting:  # good for the same batch the next time too
            watched.jacobians = jacobians
        yield jacobians


def _direct(
    readout: Readout,
    root: Tensor | GradientEdge,
    output: Tensor,
    vs: Float[Tensor, "v *pos n_outputs"],
    ys: Sequence[Tensor],
    xs: Mapping[int, Tensor],
) -> dict[Tensor, Float[Tensor, "v 1 *rest"]]:
    """S(v) of `Readout`, for every y that is affine and every x that a stage starts from."""
    maps = {ys[call]: maps for call, maps in readout.affine.items()}
    maps |= {xs[stage.start]: stage.maps for stage in readout.stages if stage.start is not None}
    found: dict[Tensor, Tensor] = {}
    for cut in {frozenset(of_one) for of_one in maps.values()}:
        tensors = [tensor for tensor, of_one in maps.items() if frozenset(of_one) == cut]
        with cut_off([ys[b] for b in cut]):
            gradients = spread_over_examples(root, output, vs, tensors)
        found |= {tensor: at for tensor, at in zip(tensors, gradients, strict=True) if at is not None}
    return found


def _bytes_per_cotangent(watched: WatchedPass, readout: Readout) -> int:
    """What one cotangent takes for all examples: the gradients that are not shared, and as much on the way to them."""
    xs, numbers = inputs(watched), 0
    for stage in readout.stages:
        start = watched.output if stage.start is None else xs[stage.start]
        numbers += start.numel() + 2 * sum(watched.calls[call].y.numel() for call in stage.calls)
    return numbers * watched.output.element_size()
