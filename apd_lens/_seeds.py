"""Several seeds at once: runs of `decompose` on the same batches, as one computation.

The target's pass and its Jacobians are the same for all seeds and computed once. The components of all seeds stand one
after another on one axis, which is all that gradient attributions need to know. The model runs once for all seeds, on
the batch replicated, each replicate with the components and masks of its own seed. The losses are those of `decompose`,
mapped over seeds. Their sum has each seed's gradient for that seed's factors, so one backward pass and one step of
Adam serve all.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from tqdm.auto import tqdm

from apd_lens._errors import InvalidSetting, UnsupportedModel
from apd_lens._settings import DEFAULTS, RANK, Attribution, Moves, Optimization
from apd_lens.attribution._ablation import AblationAttribution
from apd_lens.attribution._gradient import GradientAttribution
from apd_lens.components._components import ParameterComponents
from apd_lens.data._batch import Batch, replicated
from apd_lens.data._finite import raise_first
from apd_lens.data._points import without_padding
from apd_lens.data._stream import stream
from apd_lens.decomposition._decomposition import Decomposition
from apd_lens.host._target import evaluating
from apd_lens.host._wrap import wrap
from apd_lens.losses._losses import Losses
from apd_lens.losses._terms import loss_terms, weighted_sum
from apd_lens.masks._sampling import path_mask
from apd_lens.masks._selection import Lp, Selection
from apd_lens.passes._output import OutputFn, default_output
from apd_lens.passes._replace import replace_weights_of_each
from apd_lens.passes._watch import WatchedPass, replaced_pass
from apd_lens.training._optimizer import adam, update
from apd_lens.training._state import Seen, State, StepInfo, init
from apd_lens.training._step import after_step, make_moves, moves_are_due, readings_of_terms, watch

# Seeds are attributed together as long as the effects of their components on all outputs take no more bytes than this:
# what is larger than a CPU's caches gains nothing by it, and loses.
_EFFECTS_TOGETHER = 2**23


@dataclass(frozen=True, eq=False)
class SeedsState:
    """What the next step needs. Factors and the optimizer's moments are changed in place by `step_seeds`.

    Attributes:
        singles: what `init` made for each seed; the components are views of those here.
        components: those of all S seeds, one seed after another, `(S C) d_in m` and `(S C) m d_out`.
        last_active: for every component the step in which it was last active.
        step: number of steps done.
        seen: the last batch, and what the target made of it.
    """

    singles: tuple[State, ...]
    components: ParameterComponents
    optimizer: torch.optim.Optimizer
    last_active: Int[Tensor, "S C"]
    step: int = 0
    seen: Seen | None = None

    def single(self, index: int) -> State:
        """The state of one seed, which `step` would take further. Factors and moments share memory with these."""
        single, some = self.singles[index], _own(index, self.singles[index].components.n_components)
        optimizer = adam(single.components, single.settings.optimization)
        for factor, of_all in zip(single.components.parameters(), self.components.parameters(), strict=True):
            moments = self.optimizer.state.get(of_all, {})
            optimizer.state[factor] = {
                name: value[some] if value.ndim > 0 else value.clone() for name, value in moments.items()
            }
        return replace(single, optimizer=optimizer, step=self.step, last_active=self.last_active[index])

    def decompositions(self) -> list[Decomposition]:
        """Those of all seeds as they are now: copies that further steps do not change."""
        return [single.decomposition() for single in self.singles]


def init_seeds(singles: Sequence[State]) -> SeedsState:
    """Fresh states with the same settings but for the seed, as one."""
    first = singles[0]
    components = ParameterComponents(
        A={name: torch.cat([single.components.A[name].detach() for single in singles]) for name in first.weights},
        B={name: torch.cat([single.components.B[name].detach() for single in singles]) for name in first.weights},
    )
    views = [_some_components(components, _own(i, first.components.n_components)) for i in range(len(singles))]
    return SeedsState(
        singles=tuple(replace(single, components=view, late=None) for single, view in zip(singles, views, strict=True)),
        components=components,
        optimizer=adam(components, first.settings.optimization),
        last_active=torch.stack([single.last_active for single in singles]),
    )


def step_seeds(state: SeedsState, batch: Batch) -> tuple[SeedsState, list[StepInfo]]:
    """One training step of all seeds on one batch, and what `step` would report of each.

    Raises:
        UnsupportedModel: in the first step, if the model does not give the same outputs on a replicated batch.
        ApdError: as `step`.
    """
    first, settings = state.singles[0], state.singles[0].settings
    progress = state.step / settings.optimization.steps

    with evaluating(first.target.model):
        seen = watch(replace(first, step=state.step, seen=state.seen), batch)
        watched = seen.watched
        if state.step == 0:
            _check_replicated(state, seen)
        attributions = _attributions(state, watched)
        mask = torch.stack(
            [
                single.settings.selection.at(progress, batch)(of_seed, watched.real)
                for single, of_seed in zip(state.singles, attributions, strict=True)
            ]
        )
        terms = _loss_terms(state, seen.on_device, watched, mask)
        loss = weighted_sum(settings.losses, terms, progress)
        _check_finite(state, terms)
        rate = update(
            state.optimizer, state.components, loss.sum(), settings.optimization, state.step, first.target.model
        )

    last_active = torch.where(mask.flatten(1, -2).any(1), state.step, state.last_active)
    n_moves = [0] * len(state.singles)
    if moves_are_due(settings, state.step):
        n_moves = [
            make_moves(state.single(index), watched, attributions[index], mask[index]) for index in range(len(n_moves))
        ]
    n_active = without_padding(mask.movedim(0, -2), watched.real).sum(-1).float()
    mean_active = n_active.flatten(0, -2).mean(0)
    infos = [
        StepInfo(
            step=state.step,
            loss=loss.detach()[index],
            terms={name: term.detach()[index] for name, term in terms.items()},
            mean_active=mean_active[index],
            last_active=last_active[index],
            learning_rate=rate,
            moves=n_moves[index],
        )
        for index in range(len(n_moves))
    ]
    singles = tuple(
        replace(single, settings=after_step(single.settings, minimality, progress))
        for single, minimality in zip(state.singles, terms["minimality"].detach(), strict=True)
    )
    return replace(state, singles=singles, last_active=last_active, step=state.step + 1, seen=seen), infos


def decompose_seeds(
    model: Any,
    batches: Iterable[Batch] | Callable[[int], Batch],
    weights: str | Iterable[str] = "*",
    *,
    seeds: Iterable[int] = range(8),
    n_components: int,
    rank: int | None = RANK,
    selection: Selection | None = None,
    attribution: Attribution | None = None,
    losses: Losses | None = None,
    optimization: Optimization | None = None,
    moves: Moves | None = DEFAULTS.moves,
    output: OutputFn = default_output,
    on_step: Callable[[int, list[StepInfo]], Any] | None = None,
    progress: bool = True,
) -> list[Decomposition]:
    """The decompositions that `decompose` gives for each of several seeds, computed together: for small models, where
    much of a step is the cost of starting many small operations.

    Equal to `[decompose(..., seed=seed) for seed in seeds]` on the same batches, up to rounding (which now and then
    decides the sign of a singular vector in a move, and so what the move's noise does, as in a run on another machine).
    All seeds take every step together and need their memory together; the model runs on batches that many times as
    large, or twice that with a path loss, so its examples must not influence each other. Whatever in a batch has an
    entry for each example is repeated.

    Args:
        seeds: one run each.
        on_step: called as on_step(step, infos) after every step, with a `StepInfo` for each seed.
        progress: whether to show one bar for all, with means over seeds.

    All other arguments are as in `decompose`.

    Raises:
        UnsupportedModel: the model does not take a replicated batch, or gives other outputs on it; loop over seeds.
        InvalidSetting: no seeds, or the Lp form.
        ApdError: as `decompose`. An error or interrupt in the middle of the training carries the unfinished results
            as its attribute `decompositions`.
    """
    target, seeds = wrap(model), list(seeds)
    if not seeds:
        raise InvalidSetting("decompose_seeds needs at least one seed, got none.")
    if isinstance(selection, Lp):
        raise InvalidSetting(
            "decompose_seeds needs BatchTopK or TopK; for Lp loop over seeds: "
            "[apd_lens.decompose(..., seed=seed) for seed in seeds]."
        )
    state = init_seeds(
        [
            init(
                target,
                weights=weights,
                n_components=n_components,
                rank=rank,
                selection=selection,
                attribution=attribution,
                losses=losses,
                optimization=optimization,
                moves=moves,
                output=output,
                seed=seed,
            )
            for seed in seeds
        ]
    )
    n_steps = state.singles[0].settings.optimization.steps
    try:
        with tqdm(total=n_steps, desc=f"decompose, {len(seeds)} seeds", disable=not progress, mininterval=0.5,
                  dynamic_ncols=True) as bar:  # fmt: skip
            for batch in stream(batches):
                state, infos = step_seeds(state, batch)
                if on_step is not None:
                    on_step(infos[0].step, infos)
                if bar.update():
                    bar.set_postfix_str(_postfix(infos))
                if state.step == n_steps:
                    break
    except BaseException as error:
        if state.step > 0:
            error.decompositions = state.decompositions()  # type: ignore[attr-defined]
            error.add_note(f"The components after {state.step} steps are in this error's attribute `decompositions`.")
        raise
    return state.decompositions()


def _own(index: int, n_components: int) -> slice:
    """Where the components of a seed are among those of all seeds."""
    return slice(index * n_components, (index + 1) * n_components)


def _some_components(components: ParameterComponents, some: slice) -> ParameterComponents:
    """Some of the components, in the same memory."""
    return ParameterComponents(
        A={name: factor.detach()[some] for name, factor in components.A.items()},
        B={name: factor.detach()[some] for name, factor in components.B.items()},
    )


def _attributions(state: SeedsState, watched: WatchedPass) -> Float[Tensor, "S batch *pos C"]:
    """Where nothing in an attribution depends on the other components or is drawn at random, those of several seeds are
    computed as if they were of one; otherwise one seed after another."""
    first = state.singles[0]
    attribution, granularity = first.settings.attribution, first.settings.selection.granularity
    n_seeds, n_components = len(state.singles), first.components.n_components
    if isinstance(attribution, GradientAttribution) and attribution.is_exact(watched, first.components, granularity):
        attribution = replace(attribution, projections="exact")  # also where it depends on the number of components
    if isinstance(attribution, AblationAttribution) or (
        isinstance(attribution, GradientAttribution) and attribution.projections == "exact"
    ):
        effects_of_one = watched.output.numel() * n_components * watched.output.element_size()
        together = max(1, _EFFECTS_TOGETHER // effects_of_one)
        parts = []
        for start in range(0, n_seeds, together):
            some = slice(start * n_components, min(start + together, n_seeds) * n_components)
            parts.append(attribution(watched, _some_components(state.components, some), granularity))
        return torch.cat(parts, -1).unflatten(-1, (n_seeds, n_components)).movedim(-2, 0)
    each = []
    for single in state.singles:
        fresh = watched.again(None, slice(None)) if watched.spent else watched
        each.append(attribution(fresh, single.components, granularity, single.device_generator))
    return torch.stack(each)


def _loss_terms(
    state: SeedsState, batch: Batch, watched: WatchedPass, mask: Bool[Tensor, "S batch *pos C"]
) -> dict[str, Float[Tensor, " S"]]:
    """Of each seed, from one pass of the model for all seeds and masks."""
    first, n_seeds = state.singles[0], len(state.singles)
    losses = first.settings.losses
    masks = {"minimality": mask.to(next(state.components.parameters()).dtype)}
    if losses.path:
        drawn = [
            path_mask(of_seed, single.device_generator) for of_seed, single in zip(mask, state.singles, strict=True)
        ]
        masks["path"] = torch.stack(drawn)
    outputs, hidden = _passes(state, batch, masks)
    A, B = (
        {name: factor.unflatten(0, (n_seeds, -1)) for name, factor in factors.items()}
        for factors in (state.components.A, state.components.B)
    )

    def of_seed(
        A: dict[str, Tensor],
        B: dict[str, Tensor],
        mask: Tensor,
        outputs: dict[str, Tensor],
        hidden: dict[str, Tensor],
    ) -> dict[str, Tensor]:
        return loss_terms(losses, first.scales, first.weights, watched, A, B, mask, outputs, hidden)

    if not callable(losses.distance):
        return torch.vmap(of_seed)(A, B, mask, outputs, hidden)
    # A function of the user's need not be one that vmap can map.
    each = [of_seed(_at(A, i), _at(B, i), mask[i], _at(outputs, i), _at(hidden, i)) for i in range(n_seeds)]
    return {name: torch.stack([terms[name] for terms in each]) for name in each[0]}


def _at(values: Mapping[str, Tensor], index: int) -> dict[str, Tensor]:
    return {name: value[index] for name, value in values.items()}


def _passes(
    state: SeedsState, batch: Batch, masks: Mapping[str, Float[Tensor, "S batch *pos C"]]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The explained output `S batch *pos n_outputs` under each of the masks, and the hidden activations under the
    first, in one pass of the model."""
    first, replicates = state.singles[0], (len(state.singles), len(masks))
    replaced = replace_weights_of_each(state.components, torch.cat(list(masks.values()), 1))
    n_replicates = len(state.singles) * len(masks)
    output, hidden = replaced_pass(
        first.target,
        first.components.names,
        replaced,
        replicated(batch, n_replicates),
        first.output,
        first.settings.losses.hidden_at,
    )
    for name, activation in hidden.items():
        if len(activation) != len(output):
            raise _unsupported(
                first, f"the activations of {name!r} have shape {tuple(activation.shape)} on {len(output)} examples"
            )
    outputs = output.unflatten(0, (*replicates, -1)).unbind(1)
    return (
        dict(zip(masks, outputs, strict=True)),
        {name: activation.unflatten(0, (*replicates, -1))[:, 0] for name, activation in hidden.items()},
    )


@torch.no_grad()
def _check_replicated(state: SeedsState, seen: Seen) -> None:
    """Raises UnsupportedModel unless the target's output on the replicated batch is the output on the batch, over and
    over."""
    first, expected = state.singles[0], seen.watched.output
    n = len(state.singles) * (1 + bool(first.settings.losses.path))
    try:
        output, _ = replaced_pass(
            first.target, [], lambda use, x, original, bias: original(), replicated(seen.on_device, n), first.output
        )
        difference = (output.unflatten(0, (n, -1)) - expected).abs().max()
    except Exception as error:
        raise _unsupported(first, f"on the batch given {n} times over it fails ({error})") from error
    if not bool(difference <= torch.finfo(expected.dtype).eps ** 0.5 * expected.abs().max()):
        raise _unsupported(
            first,
            f"on the batch given {n} times over its outputs differ by up to {difference.item():.2g} from those on the "
            "batch, so examples influence each other, or outputs are random",
        )


def _unsupported(first: State, reason: str) -> UnsupportedModel:
    return UnsupportedModel(
        f"Several seeds cannot run at once on this {type(first.target.model).__name__}: {reason}. Loop over seeds: "
        "[apd_lens.decompose(..., seed=seed) for seed in seeds]."
    )


def _check_finite(state: SeedsState, terms: Mapping[str, Float[Tensor, " S"]]) -> None:
    if bool(torch.stack(list(terms.values())).isfinite().all()):
        return
    for index, single in enumerate(state.singles):
        raise_first(readings_of_terms(_at(terms, index), f"step {state.step}, seed {single.settings.seed}"))


def _postfix(infos: Sequence[StepInfo]) -> str:
    means = {name: torch.stack([info.terms[name] for info in infos]).mean().item() for name in infos[0].terms}
    terms = ", ".join(f"{name} {value:.1e}" for name, value in means.items())
    return f"{sum(info.alive or 0 for info in infos) / len(infos):.1f} alive, {terms}"
