"""Training: `init` makes a state, `step` takes it one batch further, `decompose` loops over them.

One step: watch the target on the batch; attribute; select the active components; run the model on them alone; add up
the losses; take an optimizer step. Now and then, split components that serve too much.
"""

from collections.abc import Mapping
from dataclasses import replace

import torch
from jaxtyping import Bool
from torch import Tensor

from apd_lens._schedules import value_at
from apd_lens._settings import Settings
from apd_lens.attribution._gradient import GradientAttribution
from apd_lens.components._factors import Mask, full_precision
from apd_lens.data._batch import Batch, Kept, tensors
from apd_lens.data._finite import Reading, raise_first, reading_of_attributions
from apd_lens.data._inputs import readings_of_inputs
from apd_lens.data._points import padded, without_padding
from apd_lens.host._target import evaluating
from apd_lens.host._unchanged import check_unchanged
from apd_lens.losses._terms import at_least_float32, loss_terms, method_terms, variance, weighted_sum
from apd_lens.losses._weights import lp_of_squares
from apd_lens.masks._sampling import path_mask
from apd_lens.masks._selection import Lp
from apd_lens.moves._cluster import ClusterMoves, make_cluster_moves
from apd_lens.moves._division import DivisionMoves, make_division_moves
from apd_lens.moves._split import make_splits
from apd_lens.passes._watch import WatchedPass, reading_of_output, sparse_pass, watched_pass
from apd_lens.training._optimizer import update
from apd_lens.training._state import Seen, State, StepInfo
from apd_lens.training._unit_norm import normalize_columns


@torch.inference_mode(False)  # with gradients, whatever they are outside
def step(state: State, batch: Batch) -> tuple[State, StepInfo]:
    """One training step on one batch. The model is only looked at: afterwards it is as it was. Steps beyond
    `Optimization(steps=...)` go on with the learning rate of the last one, and with all schedules at their end.

    Raises:
        NonFinite: NaN or infinity in the batch, the target's output or a loss term; the components are as they were
            before the step. On a GPU, which is not waited for, the next step raises it at its end, or
            `state.decomposition()` does, or moves that are due; no step since then has changed the components.
        WeightsChanged: a decomposed matrix was changed since `init`, by training the model meanwhile perhaps.
    """
    settings = state.settings
    progress = min(1.0, state.step / settings.optimization.steps)
    check_unchanged(state.target, state.fingerprints, thorough=False)

    with evaluating(state.target.model):
        seen = watch(state, batch)
        watched = seen.watched
        selection = settings.selection.at(progress, batch)
        if isinstance(selection, Lp):
            attributions, mask, terms = _lp_attributed(state, watched, selection)
        else:
            attributions = settings.attribution(
                watched, state.components, selection.granularity, state.device_generator
            )
            mask = selection(attributions, watched.real)
            # Known without asking the device, but for padding.
            n_active = selection.n_active(mask[..., 0].numel()) if padded(mask, watched.real) is None else None
            terms = _loss_terms(state, watched, mask, n_active)
        loss = weighted_sum(settings.losses, terms, progress)
        where = f"step {state.step}"
        readings = [reading_of_attributions(attributions, where), *readings_of_terms(terms, where)]
        if state.late is None:
            raise_first(readings)
        else:
            state.late.add([*seen.readings, *readings, *seen.kept.changes(batch)])
        rate = update(state.optimizer, state.components, loss, settings.optimization, state.step, state.target.model)

    last_active, mean_active = state.last_active, None
    if mask is not None:
        last_active = torch.where(mask.flatten(0, -2).any(0), state.step, last_active)
        mean_active = without_padding(mask, watched.real).sum(-1).float().mean()
    due = moves_are_due(settings, state.step)
    if state.late is not None:
        state.late.read(but=0 if due else 1)
    n_moves = make_moves(state, watched, attributions, mask) if due else 0
    info = StepInfo(
        step=state.step,
        loss=loss.detach(),
        terms={name: term.detach() for name, term in terms.items()},
        mean_active=mean_active,
        last_active=last_active,
        learning_rate=rate,
        moves=n_moves,
    )
    settings = after_step(settings, info.terms["minimality"], progress)
    return replace(state, settings=settings, last_active=last_active, step=state.step + 1, seen=seen), info


def after_step(settings: Settings, minimality: Tensor, progress: float) -> Settings:
    """The settings of the next step, in which another number of components may be active (`Needed`)."""
    selection = settings.selection.after(minimality, progress, settings.optimization.steps)
    return settings if selection is settings.selection else replace(settings, selection=selection)


def watch(state: State, batch: Batch) -> Seen:
    """The target's pass over the batch: the last one, if this is the same batch again."""
    last = state.seen
    if (
        last is not None
        and tensors(batch)
        and last.kept.is_same(batch)
        and not (last.watched.spent and last.watched.jacobians is None)
    ):
        return last
    where = f"step {state.step}"
    kept = Kept.of(batch)
    inputs = state.target.read(batch, state.last_active.device)
    readings = readings_of_inputs(inputs, where)
    if state.late is None:
        raise_first(readings)
    hidden = state.settings.losses.hidden_at
    watched = watched_pass(state.target, state.components.names, inputs, state.output, hidden=hidden)
    readings.append(reading_of_output(watched.output, where, watched))
    if state.late is None:
        raise_first(readings[-1:])
    return Seen(kept, watched, readings)


def _loss_terms(state: State, watched: WatchedPass, mask: Mask, n_active: int | None = None) -> dict[str, Tensor]:
    """The passes of the model on components that the losses need, and the losses."""
    losses, components, inputs = state.settings.losses, state.components, watched.run.inputs
    outputs = {}
    outputs["minimality"], hidden = sparse_pass(
        state.target, components, inputs, mask, state.output, losses.hidden_at, n_active
    )
    if losses.path:
        path = path_mask(mask, state.device_generator)
        outputs["path"], _ = sparse_pass(state.target, components, inputs, path, state.output)
    return loss_terms(losses, state.scales, state.weights, watched, components.A, components.B, mask, outputs, hidden)


def _lp_attributed(
    state: State, watched: WatchedPass, selection: Lp
) -> tuple[Tensor, Bool[Tensor, "batch *pos C"] | None, dict[str, Tensor]]:
    """Attributions; which are active, if that can be said; and the terms of the Lp form, which need no sparse pass."""
    attribution, p = state.settings.attribution, value_at(selection.p, 1.0)
    assert isinstance(attribution, GradientAttribution)
    squares = attribution.squares(watched, state.components, selection.granularity, state.device_generator)
    scale = 1.0
    if state.settings.losses.normalization == "relative":
        scale = variance(without_padding(at_least_float32(watched.output.detach()), watched.real))
    sparsity = without_padding(lp_of_squares(squares / scale, p), watched.real)
    components = state.components
    terms = method_terms(
        state.settings.losses,
        state.scales,
        state.weights,
        components.A,
        components.B,
        sparsity.sum(-1).mean(),
        sparsity,
    )
    attributions = squares.detach().sqrt()
    return attributions, None if selection.threshold is None else selection(attributions, watched.real), terms


def moves_are_due(settings: Settings, step: int) -> bool:
    """Whether moves are made after a step, counted from 0."""
    moves, done = settings.moves, step + 1
    return moves is not None and done % moves.every == 0 and done < moves.until * settings.optimization.steps


@full_precision()
def make_moves(state: State, watched: WatchedPass, attributions: Tensor, mask: Tensor | None) -> int:
    """Makes the moves that the settings ask for, in place; returns how many."""
    moves, components, optimizer = state.settings.moves, state.components, state.optimizer
    if isinstance(moves, DivisionMoves):
        assert mask is not None
        n_moves = make_division_moves(components, optimizer, attributions, mask, watched, moves, state.host_generator)
    elif isinstance(moves, ClusterMoves):
        assert mask is not None
        n_moves = make_cluster_moves(components, optimizer, state.weights, mask, watched, moves, state.host_generator)
    else:
        assert moves is not None
        n_moves = make_splits(
            components, optimizer, attributions, watched.real, watched.calls, moves.noise, state.host_generator
        )
    if n_moves and state.settings.optimization.unit_norm:
        normalize_columns(components)
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
