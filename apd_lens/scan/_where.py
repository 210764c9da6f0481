"""Finding which matrices, at which positions, carry a behaviour."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from apd_lens._block import no_inference_mode
from apd_lens._errors import InvalidBatches, InvalidOutput, InvalidSetting
from apd_lens._memory import slices
from apd_lens.attribution._metric import Metric, metric_on, metric_scalars
from apd_lens.data._batch import Batch, are_texts
from apd_lens.data._inputs import Inputs, ValidFn, check_finite
from apd_lens.data._stream import one_pass
from apd_lens.host._target import evaluating
from apd_lens.host._wrap import wrap
from apd_lens.passes._output import OutputFn, default_output
from apd_lens.scan._groups import (
    Groups,
    Positions,
    check_enough,
    donors,
    each_position,
    given_positions,
    names_of_positions,
)
from apd_lens.scan._passes import Part, Passes, Place, explained_rows, layout
from apd_lens.scan._result import Side, Together, Where

# Prefixes of the places of a side whose joint effects are measured.
_PREFIXES = 16
# How many of them in one go.
_AT_ONCE = 4
# A joint effect of this share of the total needs no further places.
_ENOUGH = 0.98


@no_inference_mode()
def where(
    model: Any,
    prompts: Batch | Iterable[Batch],
    metric: Metric | None = None,
    *,
    weights: str | Iterable[str] = "*",
    output: OutputFn = default_output,
    ablation: Literal["mean", "resample"] = "mean",
    positions: Positions | None = None,
    measure: int | Literal["all"] = 48,
    steps: int = 5,
    decode: Callable[[Any], str] | None = None,
    valid: ValidFn | None = None,
    seed: int = 0,
    memory: int | None = None,
) -> Where:
    """Finds which matrices, at which positions, carry a behaviour, by measured effect.

    The output y of one use of a matrix at one group of positions is replaced by ȳ, its mean over prompts. The effect is
    what the metric loses: mean over prompts of metric(y) − metric(ȳ). All effects are estimated to first order, by
    Σ (y − ȳ) · ∂metric/∂y; the largest are measured, each in a forward of its own. The estimate of a large effect may
    be far off, so it only says what to measure. The model stays as it is.

    Args:
        model: whatever `apd_lens.wrap` takes.
        prompts: one batch (a tensor, tuple, mapping or list of texts), or several in a list or other iterable.
        metric: the explained output `batch *pos n_outputs`, and if it takes two arguments the batch -> one scalar a
            prompt. Default for language models: the log probability, in nats, of the model's own most likely token at
            the last position that is no padding.
        weights: names or patterns of the matrices to scan.
        output: picks the explained output from what the model returns.
        ablation: "mean"; or "resample", where y of another prompt of the batch, drawn by the seed, takes y's place.
        positions: name -> positions of a group: an index (−1 is the last that is no padding), integers `batch`, or bool
            `batch pos`; of several batches a list with one of these for each. Then all prompts stand in for each other,
            and of several positions the last for the last. Default: each position on its own. Then prompts of one
            length stand in for each other, and positions are counted from the end where lengths differ.
        measure: how many of the largest estimates are measured; or "all".
        steps: the gradient of the estimates is a mean over so many passes, in which the embeddings go from ȳ to y. With
            1 it is the gradient at y: cheap, but close to 0 where the model is sure of its answer.
        decode: token -> text, for the names of positions, such as `tokenizer.decode`.
        valid: batch -> which positions are no padding, bool `batch pos`; default what the masks of the batch say.
        seed: of the draws of prompts.
        memory: bytes that the outputs of one forward may take; the batch is replicated accordingly. Default 2**29, and
            2**26 on a CPU.

    Raises:
        InvalidSetting: a prompt has no other that could stand in for it; wrong positions; or nothing differs.
        InvalidBatches: no prompts; or padding in the input of an encoder that stands before a decoder.
        InvalidOutput: the default metric on an output of one number.
        ShapeMismatch: the metric does not give one scalar a prompt.
        NonFinite: a batch, or the model's output, holds NaN or infinity.
        UnknownWeight: a pattern matches no matrix.
        UnsupportedModel: no matrix can be scanned.
        AlreadyActive: the model is inside a context.
    """
    if isinstance(measure, int) and measure < 1:
        raise InvalidSetting(f"where(measure=...) takes at least 1, or 'all', got {measure}.")
    if steps < 1:
        raise InvalidSetting(f"where(steps=...) takes at least 1, got {steps}.")
    if positions is not None and not positions:
        raise InvalidSetting("positions={} has no group. Leave it out to have each position on its own.")
    target = wrap(model)
    target = target if valid is None else target.with_valid(valid)
    names = target.match(weights)
    device = next(iter(target.weights.values())).parameter.device
    with ExitStack() as stack:
        stack.enter_context(evaluating(target.model))
        stack.enter_context(torch.no_grad())
        batches = [target.read(batch, device) for batch in _batches(prompts)]
        for inputs in batches:
            check_finite(inputs, "where")
            if inputs.encoder_valid is not None and not bool(inputs.encoder_valid.all()):
                raise InvalidBatches(
                    "The encoder's input has padding, and where does not tell it from the decoder's positions. Give "
                    "batches of one length, without padding in the encoder."
                )
        passes = Passes(target, layout(target, names, batches, output), output, memory)
        groups = _groups(batches, passes.layout.n_positions, positions, device)
        if not passes.layout.has_positions:
            group_names = ["all"]
        elif positions is not None:
            group_names = list(positions)
        else:
            group_names = names_of_positions(groups, batches, decode)
        check_enough(groups, group_names, within_batch=ablation == "resample")
        _start(passes, batches, groups, metric, ablation, seed)
        return _scanned(passes, group_names, measure, steps, metric)


def _batches(prompts: Any) -> list[Batch]:
    is_one = isinstance(prompts, Tensor | tuple | Mapping) or are_texts(prompts)
    return [prompts] if is_one else list(one_pass(prompts))


def _groups(
    batches: Sequence[Inputs], n_positions: Sequence[int], positions: Positions | None, device: torch.device
) -> list[Groups]:
    """Of each batch, with as many groups and slots in all."""
    masks = [
        inputs.valid.to(device)
        if inputs.valid is not None and n and inputs.valid.shape[1] == n
        else torch.ones(inputs.n_examples, max(1, n), dtype=torch.bool, device=device)
        for inputs, n in zip(batches, n_positions, strict=True)
    ]
    if positions is None:
        longest = max(int(mask.sum(1).max()) for mask in masks)
        return [each_position(mask, longest) for mask in masks]
    found = []
    for number, mask in enumerate(masks):
        given = {name: value[number] if isinstance(value, list) else value for name, value in positions.items()}
        found.append(given_positions(given, mask))
    n_slots = max(each.index.shape[-1] for each in found)
    return [each.with_slots(n_slots) for each in found]


def _start(
    passes: Passes,
    batches: Sequence[Inputs],
    groups: Sequence[Groups],
    metric: Metric | None,
    ablation: str,
    seed: int,
) -> None:
    """The clean passes: means, and the metric before."""
    lengths = torch.cat([each.alike for each in groups]).unique()
    sums: dict[tuple[int, int], Tensor] | None = {} if ablation == "mean" else None
    for number, (inputs, given) in enumerate(zip(batches, groups, strict=True)):
        each = _numbered(given, lengths)
        clean = passes.clean(inputs, each, sums, len(lengths))
        last = explained_rows(clean, each)
        if metric is None and last.shape[-1] < 2:
            raise InvalidOutput(
                f"The explained output has the shape {tuple(clean.shape)}: one number, so no most likely token. Give "
                "metric=, a function of the output that returns one scalar a prompt."
            )
        top = last.argmax(-1)
        of_output = _own_answer(top, each) if metric is None else metric_on(metric, inputs.batch)
        before = metric_scalars(of_output, clean).detach()
        donor = donors(given, seed, number) if ablation == "resample" else None
        passes.parts.append(Part(inputs, each, donor, of_output, before, top))
    counts = torch.zeros(len(lengths), len(groups[0].own), device=lengths.device, dtype=torch.float32)
    for part in passes.parts:
        counts.index_add_(0, part.groups.alike, part.groups.has.T.float())
    passes.means = {key: total / counts[:, :, None, None].clamp_min(1) for key, total in (sums or {}).items()}


def _numbered(groups: Groups, lengths: Tensor) -> Groups:
    return Groups(groups.index, groups.own, torch.searchsorted(lengths, groups.alike), groups.valid)


def _own_answer(top: Tensor, groups: Groups) -> Callable[[Tensor], Tensor]:
    """The log probability of the most likely token at the last position."""

    def log_probability(output: Float[Tensor, "batch *pos n_outputs"]) -> Float[Tensor, " batch"]:
        row = explained_rows(output, groups)
        row = row.float() if row.dtype in (torch.float16, torch.bfloat16) else row
        return row.log_softmax(-1).gather(-1, top[:, None])[:, 0]

    return log_probability


def _scanned(
    passes: Passes, group_names: list[str], measure: int | Literal["all"], steps: int, metric: Metric | None
) -> Where:
    """Estimates, measures, and looks for the way from the prompt to the answer."""
    moves, reads, at_answer = passes.structure()
    estimated = passes.estimates(steps)
    n_prompts = passes.n_prompts()
    if not bool(estimated.any()):
        raise InvalidSetting(
            "No place has an effect: prompts that stand in for each other do not differ in what any matrix gives, or "
            "the metric does not depend on it. Give prompts that differ in what the behaviour is about."
        )
    n = estimated.numel() if measure == "all" else min(measure, estimated.numel())
    chosen = estimated.abs().flatten().argsort(descending=True, stable=True)[:n].sort().values.tolist()
    places: list[Place] = [divmod(place, len(group_names)) for place in chosen]
    measured = torch.full_like(estimated, torch.nan)
    kept = measured.clone()
    lost, stayed = passes.ablated([[place] for place in places])
    for (row, group), effect, share in zip(places, lost, stayed, strict=True):
        measured[row, group], kept[row, group] = effect, share
    rows = passes.layout.rows
    found = Where(
        names=tuple(name for name, _ in rows),
        sites=tuple(site for _, site in rows),
        groups=tuple(group_names),
        estimated=estimated,
        measured=measured,
        kept=kept,
        n_prompts=n_prompts,
        before=float(torch.cat([part.before for part in passes.parts]).float().mean()),
        unit="nats" if metric is None else "",
        moves=moves,
        reads=reads,
        at_answer=at_answer,
        ends=passes.layout.lookups | {passes.last_row},
        skipped=passes.layout.skipped,
    )
    together = _together(passes, found)
    return replace(found, together=together, n_forward=passes.n_forward, n_backward=passes.n_backward)


def _together(passes: Passes, found: Where) -> tuple[Together, ...]:
    """Joint effects of the places by which `Where.best` chooses."""
    every = [(row, group) for row in range(len(found.names)) for group in range(len(found.groups))]
    of_side: dict[Side, list[Place]] = {
        "sends": [place for place in every if found.side(*place) == "sends"],
        "receives": [place for place in every if found.side(*place) == "receives"],
        "answer": [place for place in every if found.at_answer[place[1]] and place[0] not in found.ends],
    }
    of_side = {side: places for side, places in of_side.items() if places}
    totals = dict(zip(of_side, zip(*_ablated(passes, list(of_side.values())), strict=True), strict=True))
    lost = {side: 1 - kept if found.unit else effect for side, (effect, kept) in totals.items()}
    is_received = {"sends", "receives"} <= lost.keys() and lost["receives"] >= 0.5 * lost["answer"] > 0
    sides: tuple[Side, ...] = ("sends", "receives") if is_received else ("answer",)
    return tuple(_prefixes(passes, found, side, of_side[side], *totals[side]) for side in sides if side in totals)


def _ablated(passes: Passes, plans: Sequence[Sequence[Place]]) -> tuple[list[float], list[float]]:
    effects, kept = passes.ablated(plans)
    return effects.tolist(), kept.tolist()


def _prefixes(
    passes: Passes, found: Where, side: Side, places: list[Place], total: float, total_kept: float
) -> Together:
    """The joint effect of the first place, the first two, and so on, until nearly all of the total is lost."""
    allowed = set(places)
    first = [place for place in found.order() if place in allowed and found.measured[place] > 0][:_PREFIXES]
    none = torch.zeros(0, dtype=torch.float32, device="cpu")
    together = Together(side, (), none, none, total, total_kept, found.unit != "")
    for some in slices(len(first), _AT_ONCE):
        effects, kept = passes.ablated([first[: n + 1] for n in range(some.start, some.stop)])
        together = replace(
            together,
            places=tuple(first[: some.stop]),
            effects=torch.cat([together.effects, effects]),
            kept=torch.cat([together.kept, kept]),
        )
        if bool(together.shares().max() >= _ENOUGH):
            break
    return together
