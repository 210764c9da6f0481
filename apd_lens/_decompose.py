"""Training: `init` makes a state, `step` takes it one batch further, `decompose` loops over them.

One step: watch the target on the batch; attribute; select the active components; run the model on them alone; add up
the losses; take an optimizer step. Now and then, split components that serve too much.
"""

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointError
from tqdm.auto import tqdm

from apd_lens._attribution import Attribution, GradientAttribution
from apd_lens._batches import Batch, Kept, stream, tensors
from apd_lens._cluster_moves import ClusterMoves, make_cluster_moves
from apd_lens._components import (
    ParameterComponents,
    full_precision,
    initial_components,
    normalize_columns,
    remove_parallel_gradients,
    xavier_std,
)
from apd_lens._decomposition import Decomposition
from apd_lens._division_moves import DivisionMoves, make_division_moves, start_as_a_whole
from apd_lens._errors import InvalidSetting, NonFinite, UnsupportedModel
from apd_lens._fingerprints import check_unchanged
from apd_lens._finite import LateChecks, Reading, on_gpu, raise_first, reading_of_attributions
from apd_lens._inputs import ValidFn, readings_of_inputs
from apd_lens._losses import (
    Losses,
    hidden_activation_loss,
    lp_of_squares,
    minimality_loss,
    path_mask,
    weight_losses,
)
from apd_lens._moves import make_splits, start_with_matrices
from apd_lens._padding import padded, without_padding
from apd_lens._passes import (
    OutputFn,
    WatchedPass,
    default_output,
    reading_of_output,
    sparse_pass,
    watched_pass,
)
from apd_lens._product import Mask
from apd_lens._schedules import value_at
from apd_lens._selection import Lp, Selection, check_k
from apd_lens._settings import DEFAULTS, RANK, Moves, Optimization, Settings, learning_rate
from apd_lens._target import TargetModel, evaluating
from apd_lens._wrap import wrap

# A component counts as alive if it was active at least once in so many steps.
ALIVE_WINDOW = 100


@dataclass(frozen=True, eq=False)
class Seen:
    """A batch as the user gave it, and the target's pass over it.

    The target never changes, so when the same batch comes again (training on all the data at once), its pass and the
    Jacobian need not be computed again.

    Attributes:
        readings: of the batch and the target's output; looked at already where checks are not late.
    """

    kept: Kept
    watched: WatchedPass
    readings: list[Reading]


@dataclass(frozen=True)
class Scales:
    """Divisors of faithfulness and simplicity, sums over all matrices."""

    faithfulness: float
    simplicity: float


@dataclass(frozen=True, eq=False)
class State:
    """What the next step needs. The factors, the optimizer's moments and `late` are changed in place by `step`.

    Attributes:
        step: number of steps done.
        weights, fingerprints: the decomposed matrices, in the dtype of the factors, and digests of the originals.
        scales: what the sums of squared errors and of Schatten norms are divided by.
        last_active: for every component the step in which it was last active.
        late: on a GPU, checks for NaN and infinity that are looked at a step later; None where they are made at once.
        seen: the last batch, and what the target made of it.
    """

    target: TargetModel
    components: ParameterComponents
    settings: Settings
    output: OutputFn
    optimizer: torch.optim.Optimizer
    host_generator: torch.Generator
    device_generator: torch.Generator
    weights: dict[str, Tensor]
    fingerprints: dict[str, str]
    scales: Scales
    last_active: Tensor
    late: LateChecks | None = None
    step: int = 0
    seen: Seen | None = None

    def decomposition(self) -> Decomposition:
        """The decomposition as it is now: a copy that further steps do not change.

        Raises:
            NonFinite: on a GPU, of the last step; see `step`. Asked again, it gives the components before that step.
        """
        if self.late is not None:
            self.late.read()
        A = {name: factor.detach().clone() for name, factor in self.components.A.items()}
        B = {name: factor.detach().clone() for name, factor in self.components.B.items()}
        components = ParameterComponents(A, B).requires_grad_(False)
        return Decomposition(self.target, components, self.settings, self.output, self.fingerprints)

    def __deepcopy__(self, memo: dict[int, Any]) -> "State":
        """A state that goes on by itself, on the same model. The target's last pass is left out: it is run again."""
        if self.late is not None:
            self.late.read()
        kept = {field.name: getattr(self, field.name) for field in fields(self) if field.name != "seen"}
        return State(**copy.deepcopy(kept, memo))

    def updates(self) -> int:
        """Number of steps that changed the components; less than `step` where one failed that was looked at late."""
        # An interrupt in the first update may have left moments that are not filled yet.
        moments = next(iter(self.optimizer.state.values()), {})
        return int(moments.get("step", 0))


@dataclass(frozen=True)
class StepInfo:
    """What a person wants to see of a step. Loss terms are scalars without coefficients, before the update.

    Attributes:
        step: counted from 0.
        loss: the sum that was minimised, coefficients included.
        terms: name -> value of each loss term that was computed.
        mean_active: see `k`; None with `Lp` without a threshold, where nothing says what is active.
        last_active: for every component the step in which it was last active.
        learning_rate: of this step.
        moves: number of moves made after this step.
    """

    step: int
    loss: Tensor
    terms: dict[str, Tensor]
    mean_active: Tensor | None
    last_active: Tensor
    learning_rate: float
    moves: int = 0

    # Properties, so that nothing is fetched from the device unless somebody looks.

    @property
    def k(self) -> float | None:
        """Mean number of active components a data point."""
        return None if self.mean_active is None else self.mean_active.item()

    @property
    def alive(self) -> int | None:
        """Number of components that were active in the last 100 steps."""
        return None if self.mean_active is None else int((self.last_active > self.step - ALIVE_WINDOW).sum())


@torch.inference_mode(False)
def init(
    model: Any,
    *,
    weights: str | Iterable[str] = "*",
    n_components: int,
    rank: int | None = RANK,
    selection: Selection | None = None,
    attribution: Attribution | None = None,
    losses: Losses | None = None,
    optimization: Optimization | None = None,
    moves: Moves | None = DEFAULTS.moves,
    output: OutputFn = default_output,
    valid: ValidFn | None = None,
    seed: int = 0,
) -> State:
    """A fresh training state: random components and an optimizer. Arguments as in `decompose`. Runs no forward pass.

    Raises:
        UnknownWeight, UnsupportedModel: see `TargetModel.match`.
        InvalidSetting: n_components, rank, or a selection that asks for more components than there are; `Lp` with
            what needs gradients or masks that there are not; or a start that there are too few components for.
        NonFinite: a weight matrix holds NaN or infinity.
    """
    target = wrap(model)
    target = target if valid is None else target.with_valid(valid)
    names = target.match(weights)
    settings = Settings(
        selection=selection or DEFAULTS.selection,
        attribution=attribution or DEFAULTS.attribution,
        losses=losses or DEFAULTS.losses,
        optimization=optimization or DEFAULTS.optimization,
        moves=moves,
        seed=seed,
    )
    _check_selection(settings, n_components)
    _check_start(settings, n_components, len(names))
    for name in names:
        value = target.weights[name].value()
        if not bool(value.isfinite().all()):
            raise NonFinite(
                f"The target's {name} holds {int((~value.isfinite()).sum())} values that are NaN or infinite, so it "
                "cannot be decomposed."
            )
    host_generator = torch.Generator().manual_seed(seed)
    components = initial_components(
        [target.weights[name] for name in names], n_components, rank, host_generator, settings.optimization.init_scale
    )
    originals = {name: target.weights[name].value().to(components.A[name].dtype).clone() for name in names}
    if isinstance(moves, DivisionMoves):
        start_as_a_whole(components, originals)
    if settings.optimization.start == "matrices":
        start_with_matrices(components, originals)
    if settings.optimization.unit_norm:
        normalize_columns(components)
    device = next(iter(originals.values())).device
    optimizer = adam(components, settings.optimization)
    late = LateChecks(device) if on_gpu(device) else None
    if late is not None:
        optimizer.found_inf = late.failed  # type: ignore[attr-defined]
    return State(
        target=target,
        components=components,
        settings=settings,
        output=output,
        optimizer=optimizer,
        host_generator=host_generator,
        device_generator=torch.Generator(device).manual_seed(seed),
        weights=originals,
        fingerprints={name: target.fingerprints.of(target.weights[name]) for name in names},
        scales=_scales(settings.losses, list(originals.values())),
        last_active=torch.full((n_components,), -ALIVE_WINDOW, device=device),
        late=late,
    )


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


def weighted_sum(losses: Losses, terms: Mapping[str, Tensor], progress: float) -> Tensor:
    """Loss terms times their coefficients, when `progress`, a share of the steps, is done."""
    return torch.stack([value_at(getattr(losses, name), progress) * term for name, term in terms.items()]).sum(0)


def adam(components: ParameterComponents, optimization: Optimization) -> torch.optim.Optimizer:
    """Adam for the factors; those of one scale are one group."""
    groups: dict[float, list[Tensor]] = {}
    for factor in components.parameters():
        scale = xavier_std(factor.shape[-2], factor.shape[-1]) if optimization.scaled else 1.0
        groups.setdefault(scale, []).append(factor)
    return torch.optim.Adam(
        [{"params": factors, "scale": scale} for scale, factors in groups.items()], lr=optimization.lr, fused=True
    )


def update(
    optimizer: torch.optim.Optimizer,
    components: ParameterComponents,
    loss: Tensor,
    optimization: Optimization,
    step: int,
    model: nn.Module,
) -> float:
    """One step of the optimizer down the gradient of the loss, which came through passes of the model; returns its
    learning rate."""
    rate = learning_rate(optimization, step)
    for group in optimizer.param_groups:
        group["lr"] = rate * group["scale"]
    optimizer.zero_grad()
    try:
        loss.backward(inputs=list(components.parameters()))
    except CheckpointError as error:
        raise UnsupportedModel(
            f"step {step}: this {type(model).__name__} uses torch.utils.checkpoint in eval mode too, and parts of "
            "it would be run again without the components. Switch it off while decomposing."
        ) from error
    if optimization.unit_norm:
        remove_parallel_gradients(components)
    optimizer.step()
    if optimization.unit_norm:
        normalize_columns(components, keep_products=False, unless=getattr(optimizer, "found_inf", None))
    return rate


@torch.inference_mode(False)
def decompose(
    model: Any,
    batches: Iterable[Batch] | Callable[[int], Batch],
    weights: str | Iterable[str] = "*",
    *,
    n_components: int,
    rank: int | None = RANK,
    selection: Selection | None = None,
    attribution: Attribution | None = None,
    losses: Losses | None = None,
    optimization: Optimization | None = None,
    moves: Moves | None = DEFAULTS.moves,
    output: OutputFn = default_output,
    valid: ValidFn | None = None,
    seed: int = 0,
    on_step: Callable[[int, StepInfo], Any] | None = None,
    progress: bool = True,
) -> Decomposition:
    """Takes the named weight matrices of a trained model apart into parameter components.

    Args:
        model: a HookedTransformer, TransformerBridge, nnsight model, torch.nn.Module, or `apd_lens.wrap(...)` of one.
            It is never changed: after this call, and after any error in it, it is bit for bit what it was and carries
            no hook of ours. It is run in eval mode.
        batches: what the model is called with (a tensor, a tuple of positional or a dict of keyword arguments), as an
            iterable that can be gone through again or a function step -> batch. Examples come first in every tensor,
            and must not influence each other in the model. Positions that a keyword argument `attention_mask` marks
            with 0 are padding: no data points, and in no loss.
        weights: names or shell patterns, see `apd_lens.wrap(model).weights`.
        n_components: number of components C.
        rank: m, the rank that a component may have in each matrix, or what the matrix has if that is less; None for
            min(d_in, d_out).
        selection: which components are active on a data point; the default finds their number, see `Settings` and
            `BatchTopK`. `Lp()` is the form without a selection, which needs `losses=Losses(path=0)` and `moves=None`.
        attribution: how much a component matters on a data point; default `GradientAttribution()`.
        losses: default `Losses()`.
        optimization: default `Optimization()`.
        moves: `ClusterMoves()`, `SplitMoves()`, `DivisionMoves()`, or None for none.
        output: picks the tensor `batch *pos n_outputs` that is explained from what the model returns; the default takes
            a tensor as it is and `.logits` of a Hugging Face output.
        valid: a function of a batch, as the model is called with it, that returns which positions of the explained
            output are data, bool `batch pos`. The default goes by masks of attention (`attention_mask`, a decoder's own
            `decoder_attention_mask`) and raises ShapeMismatch where these do not say it.
        seed: the same seed on the same machine with the same number of threads gives the same factors bit for bit.
        on_step: called as on_step(step, info) after every step. On a GPU also after one that failed: NaN and infinity
            are looked at a step late there, see `step`.
        progress: whether to show a bar with the losses, the components alive and the time left.

    Raises:
        ApdError: see `init`, `step` and `TargetModel.intercepted`. An error or interrupt in the middle of the training
            carries the unfinished result as its attribute `decomposition`.
    """
    state = init(
        model,
        weights=weights,
        n_components=n_components,
        rank=rank,
        selection=selection,
        attribution=attribution,
        losses=losses,
        optimization=optimization,
        moves=moves,
        output=output,
        valid=valid,
        seed=seed,
    )
    n_steps = state.settings.optimization.steps
    try:
        with tqdm(total=n_steps, desc="decompose", disable=not progress, mininterval=0.5, dynamic_ncols=True) as bar:
            for batch in stream(batches):
                state, info = step(state, batch)
                if on_step is not None:
                    on_step(info.step, info)
                if bar.update():  # drawn anew just now; so the terms are fetched from the device only then
                    bar.set_postfix_str(_postfix(info))
                if state.step == n_steps:
                    break
        return state.decomposition()
    except BaseException as error:
        if state.late is not None:
            try:
                state.late.read()
            except NonFinite as before:
                error.add_note(f"Before that: {before}")
        if updates := state.updates():
            error.decomposition = state.decomposition()  # type: ignore[attr-defined]
            error.add_note(f"The components after {updates} steps are in this error's attribute `decomposition`.")
        raise


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


def loss_terms(
    losses: Losses,
    scales: Scales,
    weights: Mapping[str, Tensor],
    watched: WatchedPass,
    A: Mapping[str, Tensor],
    B: Mapping[str, Tensor],
    mask: Mask,
    outputs: Mapping[str, Tensor],
    hidden: Mapping[str, Tensor],
) -> dict[str, Tensor]:
    """Every loss term whose coefficient can be other than zero, by the name of its coefficient in `Losses`.

    Args:
        A, B: name -> the factors of a matrix.
        outputs: "minimality" and "path" (if it counts) -> the explained output on the components that are compared.
        hidden: activations of `losses.hidden_at` on the active components.
    """
    target_output, real = _at_least_float32(watched.output.detach()), watched.real
    relative = losses.normalization == "relative"
    distance_scale = _variance(without_padding(target_output, real)) if relative and losses.distance == "mse" else 1.0
    distances = {
        name: minimality_loss(target_output, _at_least_float32(output), losses.distance, real) / distance_scale
        for name, output in outputs.items()
    }
    activity = without_padding(mask, real)
    mean_activity = activity.float().mean().clamp_min(1e-12) if relative else 1.0  # none may be active
    minimality = distances.pop("minimality")
    terms = {**_terms(losses, scales, weights, A, B, minimality, activity, mean_activity), **distances}
    if losses.hidden:
        kept, kept_sparse = (
            {name: without_padding(activation, real) for name, activation in activations.items()}
            for activations in (watched.hidden, hidden)
        )
        terms["hidden"] = _hidden_term(kept, kept_sparse, relative)
    return terms


def _terms(
    losses: Losses,
    scales: Scales,
    weights: Mapping[str, Tensor],
    A: Mapping[str, Tensor],
    B: Mapping[str, Tensor],
    minimality: Tensor,
    activity: Mask,
    mean_activity: Tensor | float = 1.0,
) -> dict[str, Tensor]:
    """The three losses of the method.

    Args:
        activity: the mask, or what has its place in simplicity, without padding.
        mean_activity: what simplicity is divided by besides its scale.
    """
    with torch.autocast(minimality.device.type, enabled=False):  # sums of weights, not a pass of the model
        faithfulness, simplicity = minimality.new_zeros(()), minimality.new_zeros(())
        for name in A:
            error, norms = weight_losses(
                weights[name], A[name], B[name], activity, losses.schatten_p, losses.simplicity_floor
            )
            faithfulness, simplicity = faithfulness + error, simplicity + norms
    return {
        "faithfulness": faithfulness / scales.faithfulness,
        "minimality": minimality,
        "simplicity": simplicity / (scales.simplicity * mean_activity),
    }


def _lp_attributed(
    state: State, watched: WatchedPass, selection: Lp
) -> tuple[Tensor, Bool[Tensor, "batch *pos C"] | None, dict[str, Tensor]]:
    """Attributions; which are active, if that can be said; and the terms of the Lp form, which need no sparse pass."""
    attribution, p = state.settings.attribution, value_at(selection.p, 1.0)
    assert isinstance(attribution, GradientAttribution)
    squares = attribution.squares(watched, state.components, selection.granularity, state.device_generator)
    scale = 1.0
    if state.settings.losses.normalization == "relative":
        scale = _variance(without_padding(_at_least_float32(watched.output.detach()), watched.real))
    sparsity = without_padding(lp_of_squares(squares / scale, p), watched.real)
    components = state.components
    terms = _terms(
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


def _variance(output: Tensor) -> Tensor:
    """1 where there is none."""
    variance = output.var()
    return torch.where(variance > 0, variance, 1.0)


def _at_least_float32(output: Tensor) -> Tensor:
    return output.to(torch.promote_types(output.dtype, torch.float32))


def _hidden_term(target: dict[str, Tensor], sparse: dict[str, Tensor], relative: bool) -> Tensor:
    """Σ_places mean over data points Σ_units squared error, over the number of units (times the target's variance)."""
    errors = torch.stack([hidden_activation_loss(target[name], sparse[name]) for name in target]).sum()
    units = sum(activation.shape[-1] for activation in target.values())
    if not relative:
        return errors / units
    return errors / torch.stack([activation.var() * activation.shape[-1] for activation in target.values()]).sum()


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


def _scales(losses: Losses, weights: Sequence[Tensor]) -> Scales:
    if losses.normalization == "paper":
        n_parameters = float(sum(weight.numel() for weight in weights))
        return Scales(n_parameters, n_parameters)
    return Scales(
        faithfulness=sum(weight.square().sum().item() for weight in weights),
        simplicity=sum(torch.linalg.svdvals(weight).pow(losses.schatten_p).sum().item() for weight in weights),
    )


def _check_selection(settings: Settings, n_components: int) -> None:
    selection = settings.selection
    if isinstance(selection, Lp):
        _check_lp(settings, selection)
    else:
        check_k(selection, n_components)


def _check_start(settings: Settings, n_components: int, n_matrices: int) -> None:
    if settings.optimization.start == "random":
        return
    if isinstance(settings.moves, DivisionMoves):
        raise InvalidSetting(
            "DivisionMoves start with component 0 as the whole of all matrices, Optimization(start='matrices') with "
            "a component for each; use one of them."
        )
    if n_components <= n_matrices:
        raise InvalidSetting(
            f"Optimization(start='matrices') takes a component for each of the {n_matrices} matrices and needs others "
            f"beside them; got n_components={n_components}."
        )


def _check_lp(settings: Settings, selection: Lp) -> None:
    if not isinstance(settings.attribution, GradientAttribution):
        raise InvalidSetting(
            f"Lp needs attributions that it can take gradients of, GradientAttribution; got {settings.attribution}."
        )
    losses = settings.losses
    if losses.path or losses.hidden or losses.distance != "mse":
        raise InvalidSetting(
            "Lp has no mask and no sparse pass, so its losses are faithfulness, minimality and simplicity alone; got "
            f"Losses(path={losses.path}, hidden={losses.hidden}, distance={losses.distance!r}). Leave these out, or "
            "use BatchTopK or TopK."
        )
    if isinstance(settings.moves, ClusterMoves | DivisionMoves) and selection.threshold is None:
        raise InvalidSetting(
            f"{type(settings.moves).__name__} look at which components are active, which Lp alone does not say. Give "
            "Lp(threshold=...), or use SplitMoves."
        )


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


def _postfix(info: StepInfo) -> str:
    terms = ", ".join(f"{name} {value.item():.1e}" for name, value in info.terms.items())
    return terms if info.alive is None else f"{info.alive} alive, {terms}"
