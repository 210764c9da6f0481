"""One step: watch the target on the batch; attribute; select the active components; run the model on them alone; add up
the losses; take an optimizer step. Now and then, make moves.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from apd_lens._block import full_precision, no_inference_mode
from apd_lens._errors import InvalidBatches, ShapeMismatch
from apd_lens._memory import memory
from apd_lens._processes import copy_from_first, n_processes, raised_in_all
from apd_lens.data._batch import Batch
from apd_lens.data._finite import Reading, raise_first, reading_of_attributions
from apd_lens.data._points import without_padding
from apd_lens.host._adapter import Intercept
from apd_lens.host._target import evaluating
from apd_lens.host._unchanged import check_unchanged
from apd_lens.losses._losses import Losses
from apd_lens.losses._terms import (
    LOSS_TERMS,
    are_shares,
    damped,
    distance_scale,
    hidden_terms,
    output_distance,
    weight_terms,
    weighted_sum,
)
from apd_lens.masks._masking import Masks
from apd_lens.moves._moves import MoveContext, are_due
from apd_lens.passes._replace import Mixture
from apd_lens.passes._watch import WatchedPass, replaced_pass
from apd_lens.training._attack import Attack
from apd_lens.training._optimizer import moments, pull_back, update
from apd_lens.training._seen import remembered, watch
from apd_lens.training._state import State, StepInfo
from apd_lens.training._streams import Stream
from apd_lens.training._unit_norm import normalize_columns


@raised_in_all()
@no_inference_mode()
def step(state: State, *batches: Batch) -> tuple[State, StepInfo]:
    """One training step on a batch of each stream (`State.streams`; by default there is one). The model is only looked
    at: afterwards it is as it was. Steps beyond `Optimization(steps=...)` go on with the learning rate of the last one,
    and with all schedules at their end.

    Raises:
        InvalidBatches: not one batch for each stream.
        NonFinite: NaN or infinity in a batch, the target's output or a loss term; the components are as they were
            before the step. On a GPU, which is not waited for, the next step raises it at its end, or
            `state.decomposition()` does, or moves that are due; no step since then has changed the components.
        WeightsChanged: a decomposed matrix was changed since `init`, by training the model meanwhile perhaps.
    """
    settings, streams = state.settings, state.streams
    if len(batches) != len(streams):
        raise InvalidBatches(f"Expected a batch for each of the {len(streams)} streams, got {len(batches)}.")
    progress = min(1.0, state.step / settings.optimization.steps)
    check_unchanged(state.target, state.fingerprints, thorough=False)

    with memory(state.memory), evaluating(state.target.model):
        names, device, where = state.components.names, state.last_active.device, f"step {state.step}"
        seen = [
            watch(state.seen, stream, batch, state.target, names, device, state.late, where)
            for stream, batch in zip(streams, batches, strict=True)
        ]
        terms, losses, readings, masks, attack = {}, [], [], None, state.attack
        state.optimizer.zero_grad()
        for stream, one in zip(streams, seen, strict=True):
            of_stream, stream_masks, attack = stream_terms(state, stream, one.pass_, progress, attack)
            losses.append(weighted_sum(stream.losses, of_stream, progress))
            named = {stream.named(name): term for name, term in of_stream.items()}
            readings += [reading_of_attributions(stream_masks.attributions, where), *readings_of_terms(named, where)]
            terms |= named
            masks = masks or stream_masks
        assert masks is not None
        loss = torch.stack(losses).sum()
        if state.late is None:
            raise_first(readings)
        else:
            changed = [kept for one, batch in zip(seen, batches, strict=True) for kept in one.kept.changes(batch)]
            state.late.add([*(reading for one in seen for reading in one.readings), *readings, *changed])
        rate = update(
            state.optimizer, state.components, loss, settings.optimization, state.step, state.target.model, attack
        )

    last_active, mean_active, watched = state.last_active, None, seen[0].pass_
    if masks.active is not None:
        was_active = masks.active.flatten(0, -2).any(0).to(last_active.device)
        last_active = torch.where(was_active, state.step, last_active)
        mean_active = without_padding(masks.active, watched.run.inputs.of_all.valid).sum(-1).float().mean()
    due = are_due(settings.moves, state.step, settings.optimization.steps)
    if state.late is not None:
        state.late.read(but=0 if due else 1)
    n_moves = make_moves(state, watched, masks) if due else 0
    info = StepInfo(
        step=state.step,
        loss=loss.detach(),
        terms={name: term.detach() for name, term in terms.items()},
        mean_active=mean_active,
        last_active=last_active,
        learning_rate=rate,
        moves=n_moves,
    )
    settings = settings.after(info.terms["minimality"], progress)
    steps = settings.optimization.steps
    others = tuple(one.after(info.terms[one.named("minimality")], progress, steps) for one in state.others)
    later = replace(
        state,
        settings=settings,
        others=others,
        attack=attack,
        last_active=last_active,
        step=state.step + 1,
        seen=remembered(state.seen, seen, streams, state.late, state.returning),
    )
    return later, info


def stream_terms(
    state: State, stream: Stream, watched: WatchedPass, progress: float, attack: Attack | None
) -> tuple[dict[str, Tensor], Masks, Attack | None]:
    """The loss terms of a stream on a batch, without coefficients, its masks, and the attack, begun where it is to.

    Gradients of sparse passes are pulled back here, one pass after the other; what is returned has a graph to the rest.
    """
    losses, components, run = stream.losses, state.components, watched.run
    scale = distance_scale(watched, losses)
    device = watched.output.device  # where masks and losses are; factors are where their matrices are
    draws = state.draws(stream.named("attribution"), device)
    masks = stream.masking.masks(watched, components, progress, scale, draws)
    whole = run.inputs.of_all
    if len(masks.importance) != whole.n_examples:
        raise ShapeMismatch(
            f"{type(stream.masking).__name__} gave masks of {len(masks.importance)} examples, but the batch of all "
            f"processes has {whole.n_examples}, and masks are of the whole: see `Masking.masks`."
        )
    importance = without_padding(masks.importance, whole.valid)
    share, hidden, terms = 1.0, {}, {}
    if masks.minimality is not None:
        terms["minimality"] = masks.minimality
    else:
        if losses.normalization == "relative":
            share = importance.float().mean().clamp_min(1e-12)  # none may be active
        path = state.draws(stream.named("path"), masks.importance.device)
        shares = None
        if losses.attack:
            places = masks.at_least.shape[:-1]
            n_units = components.n_components + 1
            attack = attack or Attack.drawn(places.numel(), n_units, masks.attributions, state.settings.seed)
            shares = attack.of(places)
        mixtures = stream.mixtures(components, masks, losses, path, shares)
        for name, mixture in mixtures.items():
            hidden_at = losses.hidden_at if name == "minimality" else ()
            distance = partial(_distance, state, watched, losses, scale, name)
            if isinstance(mixture, Mixture) and not (hidden_at or mixture.requires_grad):
                # Nothing but this term needs the graph of the pass, which is large.
                terms[name] = _pulled_back(state, losses, name, progress, partial(distance, mixture), watched)
            else:
                term, found = distance(mixture, hidden_at)
                hidden |= found
                terms[name] = damped(term, term, losses)
    if losses.faithfulness or losses.simplicity:
        of_weights = weight_terms(losses, state.scales, state.weights, components, importance, share)
        terms |= {name: term for name, term in of_weights.items() if getattr(losses, name)}
    terms |= hidden_terms(losses, watched, hidden)
    if masks.sparsity is not None:
        terms["sparsity"] = masks.sparsity
    return {name: terms[name] for name in LOSS_TERMS if name in terms}, masks, attack


def _distance(
    state: State,
    watched: WatchedPass,
    losses: Losses,
    scale: Tensor | float,
    name: str,
    mixture: Intercept,
    hidden_at: Sequence[str] = (),
    examples: slice | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """How far the output of a mixture of components is from the one that is wanted; and hidden activations.

    Args:
        name: of the term.
        examples: those that a pass is made of, where the mixture is a plain one; then it is what they add.
    """
    run, components = watched.run, state.components
    of_some, inputs, wanted = mixture, run.inputs, None
    if examples is not None:
        assert isinstance(mixture, Mixture)
        of_some, inputs = mixture.some(examples), inputs.some(examples)
    output, found = replaced_pass(state.target, components.names, of_some, inputs, run.output, hidden_at)
    if name == "completeness":
        with torch.no_grad():
            bare = Mixture(components, on=0.0)
            wanted, _ = replaced_pass(state.target, components.names, bare, inputs, run.output)
    return output_distance(watched, output, losses, scale, wanted, examples), found


def _pulled_back(
    state: State,
    losses: Losses,
    name: str,
    progress: float,
    distance: Callable[..., tuple[Tensor, dict[str, Tensor]]],
    watched: WatchedPass,
) -> Tensor:
    """A distance, whose gradient is added to those of the components, in as many passes as fit into the memory."""
    pieces, total, parts = _pieces(watched, losses), None, []
    if len(pieces) > 1 and are_shares(losses):
        with torch.no_grad():
            total = torch.stack([distance(examples=examples)[0] for examples in pieces]).sum()
    for examples in pieces:
        term, _ = distance(examples=examples)
        weighted = weighted_sum(losses, {name: damped(term, term if total is None else total, losses)}, progress)
        pull_back(weighted, state.components.parameters(), state.step, state.target.model)
        parts.append(term.detach())
    return torch.stack(parts).sum()


def _pieces(watched: WatchedPass, losses: Losses) -> list[slice] | list[None]:
    """Examples whose pass, with its graph, fits into the memory; [None] for all at once."""
    pieces = watched.pieces()
    can_be_added = isinstance(losses.distance, str) and n_processes() == 1
    return pieces if len(pieces) > 1 and can_be_added else [None]


@full_precision()
def make_moves(state: State, watched: WatchedPass, masks: Masks) -> int:
    """Makes the moves that the settings ask for, in place; returns how many."""
    moves, optimizer = state.settings.moves, state.optimizer
    assert moves is not None
    parts, components = state.components, state.components.whole()
    if parts.is_sharded:  # whose moments stay as they are
        for one, part in zip(components.parameters(), parts.parameters(), strict=True):
            optimizer.state[one] = optimizer.state[part]
    n_moves = moves(
        MoveContext(
            components=components,
            optimizer=optimizer,
            weights=state.weights,
            watched=watched.of_all(),
            attributions=masks.attributions,
            active=masks.active,
            generator=state.draws("moves"),
            sums_to_weights=state.settings.elsewhere is None,
        )
    )
    if n_moves and state.settings.optimization.unit_norm:
        normalize_columns(components)
    # Processes may round otherwise.
    copy_from_first([*components.parameters(), *(() if parts.is_sharded else moments(optimizer))])
    if parts.is_sharded:
        parts.take(components)
        for one in components.parameters():
            del optimizer.state[one]
    return n_moves


def readings_of_terms(terms: Mapping[str, Tensor], where: str) -> list[Reading]:
    """Every loss term that is NaN or infinite, and 0 for the others."""

    def reading(name: str, term: Tensor) -> Reading:
        return Reading(
            torch.where(term.isfinite(), 0.0, term),
            lambda value: (
                f"{where}: the {name} is {value}; nothing before it was. The components are as they were before this "
                "step."
            ),
        )

    return [reading(name, term.detach()) for name, term in terms.items()]
