"""Collecting what each component responds to, in one pass over the data."""

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from apd_lens._block import no_inference_mode
from apd_lens._errors import InvalidSetting
from apd_lens._memory import BUDGET, chunks
from apd_lens.attribution._ablation import AblationAttribution
from apd_lens.data._batch import Batch
from apd_lens.data._inputs import Inputs
from apd_lens.data._stream import one_pass
from apd_lens.decomposition._decomposition import Decomposition
from apd_lens.decomposition._observed import Observed
from apd_lens.host._target import evaluating
from apd_lens.masks._selection import K
from apd_lens.responses._ablation import LossFn, ablation_effects
from apd_lens.responses._groups import component_groups
from apd_lens.responses._responses import CoActivation, Responses, TopExamples, add_coactivation


def responses(
    decomposition: Decomposition,
    batches: Iterable[Batch],
    *,
    examples: int = 8,
    outputs: int = 8,
    k: K | None = None,
    centred: bool | None = None,
    loss: LossFn | None = None,
    memory: int = BUDGET,
) -> Responses:
    """Finds what every component responds to, in one pass over the data and one more over the examples that were kept.

    Args:
        batches: all batches to look at; iterated once.
        examples: n, how many examples are kept for each component.
        outputs: how many outputs are named that a component promotes, and how many that it suppresses.
        k: how many components are active, as in `Decomposition.select`.
        centred: whether outputs are logits. Their mean over units says nothing, and is taken off every effect; and what
            a component promotes and suppresses is found by the change of probability. None: if the decomposition's
            distance is "kl".
        loss: a function (batch, explained output) -> one scalar an example, whose change by ablation is wanted as well.
            The batch is what the model was called with (tokens, not texts, where a tokenizer is at work).
        memory: bytes that temporaries may take, about. Beside them C × C numbers are kept, and for every component the
            attributions of its examples' positions.

    Raises:
        InvalidBatches: not iterable, empty, or a bare tensor.
        InvalidSetting: fewer than one example or output.
        NonFinite: a batch, or the output, holds NaN or infinity.
    """
    seen = (decomposition.observe(batch, k) for batch in one_pass(batches))
    return respond(decomposition, seen, examples, outputs=outputs, centred=centred, loss=loss, memory=memory)


def respond(
    decomposition: Decomposition,
    observations: Iterable[Observed],
    examples: int,
    *,
    outputs: int,
    memory: int,
    **measured: Any,
) -> Responses:
    """`responses`, of batches that were observed already; `measured` are other arguments of `ablation_effects`."""
    if examples < 1 or outputs < 1:
        raise InvalidSetting(f"Expected at least one example and one output, got examples={examples}, {outputs=}.")
    seen = look(decomposition, observations, examples, memory)
    effects = ablation_effects(decomposition, seen["top"], outputs=outputs, memory=memory, **measured)
    return Responses(**seen, effects=effects)


def look(decomposition: Decomposition, observations: Iterable[Observed], examples: int, memory: int) -> dict[str, Any]:
    """The fields of `Responses` that one pass over the data gives: all but the effects."""
    C = decomposition.components.n_components
    n_seen, n_data_points, top = 0, 0, None
    attribution = torch.zeros(C, dtype=torch.float64, device="cpu")
    counts = torch.zeros(C, C, dtype=torch.int64, device="cpu")
    for some in observations:
        data, mask = some.data(some.attributions), some.data(some.mask)
        attribution += data.sum(0, dtype=torch.float64).cpu()
        add_coactivation(counts, mask)
        new = _top_of_batch(some, n_seen, examples)
        top = new if top is None else _merged(top, new, examples)
        n_seen, n_data_points = n_seen + len(some.attributions), n_data_points + len(mask)
    assert top is not None  # there was a batch
    if top.positions is None:
        top = replace(top, positions=_attributions_of_positions(decomposition, top, memory))
    return {
        "n_examples": n_seen,
        "n_data_points": n_data_points,
        "attribution": (attribution / max(1, n_data_points)).float(),
        "top": top,
        "together": CoActivation(counts, n_data_points),
    }


def _top_of_batch(some: Observed, first: int, n: int) -> TopExamples:
    """Of one batch, whose first example has that number."""
    attributions, mask = some.attributions, some.mask
    by_position = attributions.ndim > 2
    largest = attributions.flatten(1, -2).amax(1) if by_position else attributions
    values, order = (found[:n].mT for found in largest.sort(dim=0, descending=True, stable=True))
    components = torch.arange(len(values), device=values.device)[:, None]
    kept = order.unique().tolist()
    read = {first + index: some.inputs.picked([index]) for index in kept}
    if by_position:
        positions = attributions.flatten(1, -2)[order, :, components].cpu()
        active_positions = mask.flatten(1, -2)[order, :, components].cpu()
        active = active_positions.any(2)
    else:
        positions, active_positions, active = None, None, mask[order, components].cpu()
    return TopExamples(order.cpu() + first, values.float().cpu(), active, positions, active_positions, read)


def _merged(top: TopExamples, new: TopExamples, n: int) -> TopExamples:
    """The n largest of both; of equal ones those that came first."""
    attribution = torch.cat([top.attribution, new.attribution], 1)
    attribution, order = (found[:, :n] for found in attribution.sort(dim=1, descending=True, stable=True))

    def pick(one: Tensor, other: Tensor) -> Tensor:
        return torch.cat([one, other], 1).gather(1, order)

    def pick_rows(one: Tensor | None, other: Tensor | None, filler: float) -> Tensor | None:
        if one is None or other is None:
            return None
        width = max(one.shape[2], other.shape[2])
        both = [F.pad(rows, (0, width - rows.shape[2]), value=filler) for rows in (one, other)]
        return torch.cat(both, 1).gather(1, order[:, :, None].expand(-1, -1, width))

    example = pick(top.example, new.example)
    read = {**top.read, **new.read}
    return TopExamples(
        example=example,
        attribution=attribution,
        active=pick(top.active, new.active),
        positions=pick_rows(top.positions, new.positions, float("nan")),
        active_positions=pick_rows(top.active_positions, new.active_positions, False),
        read={number: read[number] for number in example.unique().tolist()},
    )


def _attributions_of_positions(
    decomposition: Decomposition, top: TopExamples, memory: int
) -> Float[Tensor, "C n pos"] | None:
    """Attributions of every position of the kept examples, where these are the data points."""
    parts = []

    def keep(numbers: list[int], found: Tensor) -> None:
        place = {number: i for i, number in enumerate(numbers)}
        places = torch.tensor([place.get(n, -1) for n in top.example.flatten().tolist()], device="cpu")
        component, rank = (places.view(top.example.shape) >= 0).nonzero(as_tuple=True)
        parts.append((component, rank, found.cpu()[places[places >= 0], :, component]))

    at_positions(decomposition, top, keep, memory)
    if not parts:
        return None
    width = max(values.shape[1] for _, _, values in parts)
    by_position = torch.full((*top.example.shape, width), float("nan"), dtype=torch.float32, device="cpu")
    for component, rank, values in parts:
        by_position[component, rank, : values.shape[1]] = values
    return by_position


@no_inference_mode()
def at_positions(
    decomposition: Decomposition, top: TopExamples, use: Callable[[list[int], Tensor], None], memory: int
) -> None:
    """Gives `use` the attributions of every position of the kept examples, `examples pos C`, behind their numbers.

    Some examples come at a time. None comes where the matrices are used without positions or on different ones, or
    where attributions are by ablation, which would take a forward pass for every component and position.
    """
    attribution, components = decomposition.settings.attribution, decomposition.components
    if isinstance(attribution, AblationAttribution):
        return
    with evaluating(decomposition.target.model):
        groups = component_groups(top)
        lengths = [_n_positions(decomposition, group.inputs) for group in groups]
        for group, length in zip(groups, lengths, strict=True):
            numbers = list(group.place)
            for some in chunks(len(numbers), 8 * length * components.n_components, memory) if all(lengths) else ():
                watched = decomposition.watch(group.inputs.some(some))
                generator = torch.Generator(watched.output.device).manual_seed(0)
                use(numbers[some], attribution(watched, components, "position", generator).flatten(1, -2))


def _n_positions(decomposition: Decomposition, inputs: Inputs) -> int:
    """Of one example, if all matrices are used on the same ones; else 0."""
    positions = {call.y.shape[1:-1] for call in decomposition.watch(inputs.some(slice(0, 1))).calls}
    shape = positions.pop()
    return shape.numel() if shape and not positions else 0
