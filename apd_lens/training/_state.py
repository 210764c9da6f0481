"""What a training knows between two steps, and what it reports of one."""

import copy
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from apd_lens import _processes, _shards
from apd_lens._block import no_inference_mode
from apd_lens._codec import encode_settings, updated
from apd_lens._draws import draws
from apd_lens._errors import InvalidSetting, NonFinite
from apd_lens._memory import memory as limited
from apd_lens._memory import n_bytes
from apd_lens._settings import DEFAULTS, RANK, TARGETED, Elsewhere, Optimization, Settings
from apd_lens.attribution._attribution import Attribution
from apd_lens.components._components import ParameterComponents, initial_components, unit_of, warn_of_too_few
from apd_lens.data._batch import Batch
from apd_lens.data._finite import LateChecks, on_gpu
from apd_lens.data._inputs import Inputs, ValidFn
from apd_lens.data._stream import check_again, one_pass
from apd_lens.decomposition._decomposition import Decomposition
from apd_lens.host._target import TargetModel, evaluating
from apd_lens.host._wrap import wrap
from apd_lens.losses._losses import Losses
from apd_lens.losses._terms import Scales, scales_of
from apd_lens.masks._masking import Masking
from apd_lens.masks._selection import Selection
from apd_lens.moves._moves import Moves
from apd_lens.moves._start import start_with_matrices
from apd_lens.passes._output import OutputFn, default_output
from apd_lens.start._data import fit_to_data
from apd_lens.training._attack import Attack
from apd_lens.training._optimizer import adam
from apd_lens.training._seen import Seen, before_training, digest_of
from apd_lens.training._streams import Stream, first_stream, stream_of_others
from apd_lens.training._unit_norm import normalize_columns

# Batches without end: an iterable that can be gone through again, or a function step -> batch.
Batches = Iterable[Batch] | Callable[[int], Batch]

# A component counts as alive if it was active at least once in so many steps.
ALIVE_WINDOW = 100

# A start that is fitted to data sees so many batches at most, and of a function step -> batch those of so many steps.
FITTED_BATCHES = 256
FITTED_STEPS = 32


@dataclass(frozen=True, eq=False)
class State:
    """What the next step needs. The factors, the optimizer's moments and `late` are changed in place by `step`.

    Attributes:
        step: number of steps done.
        weights, fingerprints: the decomposed matrices, in the dtype of the factors, and digests of the originals.
        scales: what the sums of squared errors and of Schatten norms are divided by.
        last_active: for every component the step in which it was last active.
        late: on a GPU, checks for NaN and infinity that are looked at a step later; None where they are made at once.
        seen: batches that may come again, and what the target made of them.
        fitted: of each kind of data, how many batches the start drew; () for none.
        others: streams beside that of the settings.
        attack: of the first stream, once it has begun.
        returning: names of streams whose batches come again; of others only the last one is kept.
        memory: bytes that a step may take; None for no limit.
    """

    target: TargetModel
    components: ParameterComponents
    settings: Settings
    output: OutputFn
    optimizer: torch.optim.Optimizer
    weights: dict[str, Tensor]
    fingerprints: dict[str, str]
    scales: Scales
    last_active: Tensor
    late: LateChecks | None = None
    step: int = 0
    seen: tuple[Seen, ...] = ()
    fitted: tuple[int, ...] = ()
    others: tuple[Stream, ...] = ()
    attack: Attack | None = None
    returning: frozenset[str] = frozenset()
    memory: int | None = None

    @property
    def streams(self) -> tuple[Stream, ...]:
        """What is asked on each kind of data; a step takes a batch of each. Moves look at the first one."""
        return (first_stream(self.settings, self.output), *self.others)

    def draws(self, what: str, device: torch.device | str = "cpu") -> torch.Generator:
        """A generator for one purpose in the next step."""
        return draws(self.settings.seed, self.step, what, device=device)

    def tensors(self) -> dict[str, Tensor]:
        """Copies of all that changes from step to step, by name: with them a fresh state goes on as this one would.

        Sharded ones are whole, on the CPU of the first process; the others have empty ones.
        """
        if self.late is not None:
            self.late.read()
        named = dict(self.components.named_parameters())
        moments = {
            f"optimizer.{name}.{key}": _shards.for_first(value)
            for name, factor in named.items()
            for key, value in self.optimizer.state.get(factor, {}).items()
        }
        if self.attack is not None:
            shares = self.attack.shares
            moments |= {f"attack.{key}": value.clone() for key, value in self.attack.optimizer.state[shares].items()}
            moments["attack.shares"] = shares.detach().clone()
        factors = {f"components.{name}": _shards.for_first(factor.detach()) for name, factor in named.items()}
        maskings = json.dumps([encode_settings(stream.masking) for stream in self.streams]).encode()  # `Needed` changes
        text = torch.tensor(list(maskings), dtype=torch.uint8, device="cpu")
        return {
            "step": torch.tensor(self.step, device="cpu"),
            "maskings": text,
            "last_active": self.last_active,
            **factors,
            **moments,
        }

    def restored(self, tensors: Mapping[str, Tensor]) -> "State":
        """This state, fresh from `init` with the same arguments, as it was when `tensors` were taken."""
        for name, factor in self.components.named_parameters():
            _shards.put(tensors[f"components.{name}"], factor)
            prefix = f"optimizer.{name}."
            moments = {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
            if moments:
                on_device = {key: value.to(factor.device, copy=True) for key, value in moments.items()}
                of_parts = {key: _shards.like(value, factor) for key, value in on_device.items() if value.ndim}
                self.optimizer.state[factor] = on_device | of_parts
        saved = json.loads(bytes(tensors["maskings"].tolist()))
        maskings = [updated(stream.masking, encoded) for stream, encoded in zip(self.streams, saved, strict=True)]
        others = tuple(map(Stream.with_masking, self.others, maskings[1:]))
        settings = self.settings.with_masking(maskings[0])
        last_active = tensors["last_active"].to(self.last_active).clone()
        step = int(tensors["step"])
        attack, kept = None, {key: value for key, value in tensors.items() if key.startswith("attack.")}
        if kept:
            attack = Attack.starting(kept.pop("attack.shares").to(last_active.device))
            attack.optimizer.state[attack.shares] = {
                key.removeprefix("attack."): value.to(attack.shares.device if value.ndim else "cpu", copy=True)
                for key, value in kept.items()
            }
        return replace(
            self, settings=settings, others=others, last_active=last_active, step=step, seen=(), attack=attack
        )

    def is_whole(self) -> bool:
        """Whether the factors and moments are those of this step, and no later step has begun to change them."""
        return all(moments.get("step", self.step) == self.step for moments in self.optimizer.state.values())

    def decomposition(self) -> Decomposition:
        """The decomposition as it is now: a copy that further steps do not change.

        Raises:
            NonFinite: on a GPU, of the last step; see `step`. Asked again, it gives the components before that step.
        """
        if self.late is not None:
            self.late.read()
        components = copy.deepcopy(self.components).requires_grad_(False)
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


@_processes.raised_in_all()
@no_inference_mode()
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
    masks: Masking | None = None,
    elsewhere: Elsewhere | None = None,
    output: OutputFn = default_output,
    valid: ValidFn | None = None,
    seed: int = 0,
    batches: Batches | None = None,
    others: Batches | None = None,
    sharded: bool = False,
    memory: int | str | None = None,
    progress: bool = False,
) -> State:
    """A fresh training state: components and an optimizer. Arguments as in `decompose`. Runs forward passes only where
    the start is fitted to data.

    Args:
        batches, others: what a start is fitted to; without them it is random, unless `Optimization(start="data")` is
            asked for. Of lists that are shorter than the training the batches come again, and what the target makes of
            them is kept.
        sharded: as in `decompose`. Where a start is random each factor is divided when it was drawn; others need all of
            them in every process first, so give `Optimization(start="random")` where they do not fit.
        progress: whether to show a bar while a start is fitted.

    Raises:
        UnknownWeight, UnsupportedModel: see `TargetModel.match`.
        InvalidSetting: n_components or rank; a selection that asks for more components than there are; `Lp` with a
            path loss, or with an attribution that has no gradients; a start that needs more components.
        NonFinite: a weight matrix holds NaN or infinity.
    """
    target = wrap(model)
    target = target if valid is None else target.with_valid(valid)
    names = target.match(weights)
    settings = Settings(
        selection=selection or DEFAULTS.selection,
        attribution=attribution or DEFAULTS.attribution,
        losses=losses or (DEFAULTS if elsewhere is None else TARGETED).losses,
        optimization=settled(optimization, n_components, moves, batches, others),
        moves=moves,
        seed=seed,
        masks=masks,
        elsewhere=elsewhere,
    )
    if masks is not None and not (selection is attribution is None):
        raise InvalidSetting(
            "masks= says what is active, and selection= and attribution= are its shorthands; give one."
        )
    _check(settings, n_components)
    _check_start(settings, n_components, len(names))
    for name in names:
        value = target.weights[name].value()
        if not bool(value.isfinite().all()):
            raise NonFinite(
                f"The target's {name} holds {int((~value.isfinite()).sum())} values that are NaN or infinite, so it "
                "cannot be decomposed."
            )
    generator, matrices = torch.Generator().manual_seed(seed), [target.weights[name] for name in names]
    scale, has_start = settings.optimization.init_scale, moves is not None and moves.has_start
    in_parts = sharded and settings.optimization.start == "random" and not has_start  # each factor when it is drawn
    own = _shards.sharded if in_parts else lambda factor: factor
    units = {matrix.name: unit_of(matrix.value()) for matrix in matrices}
    components = initial_components(
        matrices, n_components, rank, generator, scale, own, units if settings.optimization.scaled else None
    )
    if settings.losses.faithfulness:
        warn_of_too_few(components)
    dtypes = {name: factor.dtype for name, factor in zip(names, components.parameters(), strict=False)}
    originals = {name: target.weights[name].value().to(dtypes[name]).clone() for name in names}
    if moves is not None:
        moves.start(components, originals)
    if settings.optimization.start == "matrices":
        start_with_matrices(components, originals)
    seen: tuple[Seen, ...] = ()
    fitted: tuple[int, ...] = ()
    if settings.optimization.start == "data":
        with limited(memory):
            seen, fitted = _fit(target, components, settings, originals, output, batches, others, progress)
    if settings.optimization.unit_norm:
        normalize_columns(components)
    fingerprints = {name: target.fingerprints.of(target.weights[name]) for name in names}
    encoded = json.dumps(encode_settings(settings), default=lambda value: type(value).__name__)
    _processes.check_same(
        (fingerprints, n_components, rank, re.sub(r" at 0x[0-9a-f]+", "", encoded)),
        InvalidSetting(
            "The processes were given different models or settings. All must call with the same arguments, and have a "
            "model of the same weights: load it, or seed it, torch.manual_seed(0), in all."
        ),
    )
    uses = [use for name in names for use in target.weights[name].uses]
    gates = settings.masking.learned(components, uses, draws(seed, 0, "gates"))
    if gates is not None:
        gates.place(next(components.parameters()))
        components.gates = gates
    # Processes may round otherwise.
    _processes.copy_from_first([*units.values(), *(() if components.is_sharded else components.parameters())])
    if sharded:
        components.shard()
    device = next(iter(originals.values())).device
    optimizer = adam(components, settings.optimization, units)
    late = LateChecks(device) if on_gpu(device) else None
    if late is not None:
        optimizer.found_inf = late.failed  # type: ignore[attr-defined]
    return State(
        target=target,
        components=components,
        settings=settings,
        output=output,
        optimizer=optimizer,
        weights=originals,
        fingerprints=fingerprints,
        scales=scales_of(settings.losses, originals),
        last_active=torch.full((n_components,), -ALIVE_WINDOW, device=device),
        late=late,
        seen=seen,
        fitted=fitted,
        returning=frozenset(
            name for name, some in (("", batches), ("others", others)) if _come_again(some, settings.optimization.steps)
        ),
        memory=None if memory is None else n_bytes(memory),
        others=() if elsewhere is None else (stream_of_others(settings, elsewhere, output, gates is not None),),
    )


def _check(settings: Settings, n_components: int) -> None:
    settings.masking.check(n_components, settings.losses)
    if settings.elsewhere is not None and not settings.masking.runs_sparse_passes:
        raise InvalidSetting(
            f"Where there are others, sparse passes alone say what components must do, and {settings.selection} makes "
            "none. Use TopK or BatchTopK."
        )
    if settings.moves is not None and settings.moves.needs_active and not settings.masking.says_what_is_active:
        raise InvalidSetting(
            f"{type(settings.moves).__name__} look at which components are active, which {settings.selection} does not "
            "say. Give Lp(threshold=...), or use SplitMoves or moves=None."
        )


def _fit(
    target: TargetModel,
    components: ParameterComponents,
    settings: Settings,
    weights: dict[str, Tensor],
    output: OutputFn,
    batches: Batches | None,
    others: Batches | None,
    progress: bool,
) -> tuple[tuple[Seen, ...], tuple[int, ...]]:
    """Fits the components to data; returns the batches that were looked at, and how many of each kind were drawn."""
    if batches is None:
        raise InvalidSetting("Optimization(start='data') is fitted to data. Give them: init(…, batches=[…]).")
    device, seen, numbers = next(components.parameters()).device, list[Seen](), dict[str, int]()

    def inputs(name: str, some: Batches) -> Iterator[Inputs]:
        known = set[str]()
        for number, batch in enumerate(first_batches(some, settings.optimization.steps)):
            numbers[name] = number + 1
            if (digest := digest_of(batch)) not in known:
                known.add(digest)
                seen.append(before_training(name, batch, target, device, f"step {number}"))
                yield seen[-1].inputs
        numbers[name] = min(numbers[name] + 1, FITTED_BATCHES)  # to its end, at which a sampler may draw

    with evaluating(target.model):
        fit_to_data(
            target,
            components,
            weights,
            inputs("", batches),
            None if others is None else inputs("others", others),
            output,
            distance=settings.losses.distance,
            granularity=settings.selection.granularity,
            generator=draws(settings.seed, 0, "start"),
            progress=progress and _processes.is_first(),
        )
    return tuple(seen), tuple(numbers.values())


def _come_again(batches: Batches | None, n_steps: int) -> bool:
    """Whether the same tensors come several times, as far as can be said before."""
    return isinstance(batches, Sequence) and len(batches) < n_steps


def first_batches(batches: Batches, n_steps: int) -> Iterator[Batch]:
    """Batches that end; of a function only those of steps that there are, or, for a start alone, of the first ones."""
    if not isinstance(batches, Iterable):
        return map(batches, range(min(FITTED_STEPS, n_steps or FITTED_STEPS)))
    check_again(batches, 2)
    return islice(one_pass(batches), FITTED_BATCHES)


def settled(
    optimization: Optimization | None,
    n_components: int,
    moves: Moves | None,
    batches: Batches | None,
    others: Batches | None,
) -> Optimization:
    """The same with a start that says what it is, in the place of "auto"."""
    optimization = optimization or DEFAULTS.optimization
    if optimization.start != "auto":
        return optimization
    can_come_again = batches is not None and not isinstance(batches, Iterator) and not isinstance(others, Iterator)
    has_own = moves is not None and moves.has_start
    return replace(optimization, start="data" if can_come_again and n_components > 1 and not has_own else "random")


def _check_start(settings: Settings, n_components: int, n_matrices: int) -> None:
    start = settings.optimization.start
    if start == "random":
        return
    if settings.moves is not None and settings.moves.has_start:
        raise InvalidSetting(
            f"{type(settings.moves).__name__} have a start of their own, and Optimization(start={start!r}) is "
            "another; use one of them."
        )
    if start == "matrices" and n_components <= n_matrices:
        raise InvalidSetting(
            f"Optimization(start='matrices') takes a component for each of the {n_matrices} matrices and needs others "
            f"beside them; got n_components={n_components}."
        )
