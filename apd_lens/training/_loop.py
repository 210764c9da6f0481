"""`decompose`: steps over a stream of batches."""

import os
import warnings
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

from tqdm.auto import tqdm

from apd_lens import _processes
from apd_lens._block import Block, no_inference_mode
from apd_lens._errors import ApdWarning, InvalidSetting, NonFinite
from apd_lens._settings import DEFAULTS, RANK, Elsewhere, Optimization
from apd_lens.attribution._attribution import Attribution
from apd_lens.data._inputs import ValidFn
from apd_lens.decomposition._decomposition import Decomposition
from apd_lens.losses._losses import Losses
from apd_lens.losses._terms import are_shares
from apd_lens.masks._masking import Masking
from apd_lens.masks._selection import Selection
from apd_lens.moves._moves import Moves
from apd_lens.passes._output import OutputFn, default_output
from apd_lens.training._checkpoint import Checkpoint, Run, checkpoints_at
from apd_lens.training._state import Batches, State, StepInfo, init, settled
from apd_lens.training._step import step

# Trainings of fewer steps are trials, of which nobody expects an output that is given back; of the others at least one
# that misses no more than this share of the output's variance.
TRIAL = 1000
LEFT = 0.1


@_processes.raised_in_all()
@no_inference_mode()
def decompose(
    model: Any,
    batches: Batches,
    weights: str | Iterable[str] = "*",
    *,
    n_components: int,
    rank: int | None = RANK,
    selection: Selection | None = None,
    attribution: Attribution | None = None,
    losses: Losses | None = None,
    optimization: Optimization | None = None,
    moves: Moves | None = DEFAULTS.moves,
    masks: Masking | None = None,
    others: Batches | None = None,
    elsewhere: Elsewhere | None = None,
    output: OutputFn = default_output,
    valid: ValidFn | None = None,
    seed: int = 0,
    sharded: bool = False,
    memory: int | str | None = None,
    on_step: Callable[[int, StepInfo], Any] | None = None,
    progress: bool = True,
    checkpoint: Checkpoint | None = None,
    resume: str | os.PathLike[str] | None = None,
) -> Decomposition:
    """Takes the named weight matrices of a trained model apart into parameter components.

    In a process group of torch.distributed the processes train together: each is given the same batches and takes its
    part of the examples of each, and all get what one would.

    Args:
        model: a HookedTransformer, TransformerBridge, nnsight model, torch.nn.Module, or `apd_lens.wrap(...)` of one.
            It is never changed: after this call, and after any error in it, it is bit for bit what it was and carries
            no hook of ours. It is run in eval mode.
        batches: what the model is called with (a tensor, a tuple of positional or a dict of keyword arguments), as an
            iterable that can be gone through again or a function step -> batch. The start may look at the first ones
            before the training does, so a function goes by the step that it is given. Examples come first in every
            tensor, and must not influence each other in the model. Positions that a keyword argument `attention_mask`
            marks with 0 are padding: no data points, and in no loss.
        weights: names or shell patterns, see `apd_lens.wrap(model).weights`.
        n_components: number of components C.
        rank: m, the rank that a component may have in each matrix, or what the matrix has if that is less; None for
            min(d_in, d_out).
        selection: which components are active on a data point; the default, `BatchTopK(k=masks.Needed(), least=0.15)`,
            finds their number. `Lp()` is the form without a selection. It needs `losses=Losses(path=0)` and
            `moves=None`.
        attribution: how much a component matters on a data point; default `GradientAttribution()`.
        losses: default `Losses()`.
        optimization: default `Optimization()`.
        moves: `ClusterMoves()`, `SplitMoves()` or `DivisionMoves()` of `apd_lens.moves`, or None for none.
        masks: a `Masking`, which says what is active in the place of selection and attribution.
        others: batches that the components are not about, in the same forms as `batches`; a step takes one of each.
            With them components hold what the `batches` use, and the rest W − Σ P_c stays in the model: on the others
            the rest, with any part of the components, gives what the model gave. The default losses then are
            `Losses(faithfulness=0)`. Without others components sum to the weights.
        elsewhere: what is asked of components on the others; default `Elsewhere()`.
        output: picks the tensor `batch *pos n_outputs` that is explained from what the model returns; the default takes
            a tensor as it is and `.logits` of a Hugging Face output. `apd_lens.last_position()` and
            `apd_lens.positions(...)` pick logits at positions that are data, whatever padding a batch has.
        valid: a function of a batch, as the model is called with it, that returns which positions of the explained
            output are data, bool `batch pos`. The default goes by masks of attention (`attention_mask`, a decoder's own
            `decoder_attention_mask`) and raises ShapeMismatch where these do not say it.
        seed: the same seed on the same machine with the same number of threads gives the same factors bit for bit.
        sharded: of several processes, each keeps a part of the components, of their gradients and of Adam's moments,
            so that more components fit. The factors of a matrix are gathered where it is used. The result is sharded
            too: what looks at its components, `save` too, is then called in all processes.
        memory: bytes, or a text such as "4 GB", that a step may take beside the model, factors, gradients and moments:
            see `apd_lens.memory`. Default: no limit.
        on_step: called as on_step(step, info) after every step. On a GPU also after one that failed: NaN and infinity
            are looked at a step late there, see `step`.
        progress: whether to show a bar with k, the components alive, the losses and the time left. Minimality
            is how far the output on the active components is from the target's.
        checkpoint: where and how often the training is saved; also where it is ended by an error, Ctrl-C or SIGTERM.
        resume: a checkpoint, or a folder of them, of which the newest is taken: the training goes on from there, and
            ends bit for bit as it would have. Give all other arguments as they were. `optimization` may have another
            number of steps, for which the training goes on with the learning rate and the coefficients of its share of
            the new number: schedules are functions of step / steps. Where `checkpoint` has the same folder and nothing
            is in it yet, the training begins, so that one script serves every time. On another version of torch, number
            of threads or device it warns that bits may differ.

    Raises:
        ArtifactError: a checkpoint cannot be written or read, or is of another training: says in what they differ.
        InvalidBatches: the data are not those of the checkpoint, or a generator, which cannot be resumed.
        ApdError: see `init`, `step` and `TargetModel.intercepted`. An error or interrupt in the middle of the training
            carries the unfinished result as its attribute `decomposition`.
    """
    if elsewhere is not None and others is None:
        raise InvalidSetting("elsewhere= says what is asked of components on the others; give others= too.")
    resumed = [] if resume is None else checkpoints_at(resume, checkpoint)
    optimization = settled(optimization, n_components, moves, batches, others)
    state = init(
        model,
        weights=weights,
        n_components=n_components,
        rank=rank,
        selection=selection,
        attribution=attribution,
        losses=losses,
        optimization=replace(optimization, start="random") if resumed else optimization,  # what was fitted is read
        moves=moves,
        masks=masks,
        elsewhere=None if others is None else elsewhere or Elsewhere(),
        output=output,
        valid=valid,
        seed=seed,
        memory=memory,
        batches=batches,
        others=others,
        sharded=sharded,
        progress=progress,
    )
    state = replace(state, settings=replace(state.settings, optimization=optimization))
    run = Run(state, [batches] if others is None else [batches, others], checkpoint, resumed)
    state, n_steps = run.state, optimization.steps
    silent = not (progress and _processes.is_first())
    shown = {"initial": state.step, "disable": silent, "mininterval": 0.5, "dynamic_ncols": True}
    with Block(lambda: run), tqdm(total=n_steps, desc="decompose", **shown) as bar:
        try:
            with _processes.raised_in_all():  # before it is saved, which all do together
                first = info = None
                for some in run.batches if state.step < n_steps else ():
                    state, info = step(state, *some)
                    first = first or info
                    run.reached(state, some)
                    if on_step is not None:
                        on_step(info.step, info)
                    if bar.update():  # drawn anew just now; so the terms are fetched from the device only then
                        bar.set_postfix_str(_postfix(info))
                    run.save_if_due()
                    if state.step == n_steps:
                        break
                _processes.wait_for_all()
            if first is not None and info is not None and state.settings.losses.normalization == "relative":
                _warn_of_divergence(first, info)
                _warn_of_what_is_left(state, info)
            return state.decomposition()
        except BaseException as error:
            if state.late is not None:
                try:
                    state.late.read()
                except NonFinite as before:
                    error.add_note(f"Before that: {before}")
            run.save_at_error(error)
            if updates := state.updates():
                error.decomposition = state.decomposition()  # type: ignore[attr-defined]
                error.add_note(f"The components after {updates} steps are in this error's attribute `decomposition`.")
            raise


def _warn_of_divergence(first: StepInfo, last: StepInfo) -> None:
    """Warns where the components sum to something twice as far from the weights as at the start, and as nothing is."""
    start, end = (info.terms["faithfulness"].item() if "faithfulness" in info.terms else 0.0 for info in (first, last))
    if _processes.is_first() and end > 4 * max(1.0, start):
        warnings.warn(
            f"The training diverged: W − Σ_c P_c has {end**0.5:.3g} times the norm of the weights, and had "
            f"{start**0.5:.3g} times at the start. Give Optimization(lr=…) a smaller value, or leave out losses and "
            "moves that were set.",
            ApdWarning,
            stacklevel=3,
        )


def _warn_of_what_is_left(state: State, last: StepInfo) -> None:
    """Warns where a training that was no mere trial ended with the output not given back."""
    settings = state.settings
    means_shares = are_shares(settings.losses) and settings.masking.runs_sparse_passes
    if settings.optimization.steps < TRIAL or not means_shares or not _processes.is_first():
        return
    left = last.terms["minimality"].item() if "minimality" in last.terms else 0.0
    if left > LEFT:
        active = "" if last.k is None else f", with {last.k:.3g} active on a data point"
        warnings.warn(
            f"The active components alone do not give the output back: on the last batch {left:.0%} of its variance is "
            f"missing{active}. Let more be active (selection=BatchTopK(k=masks.Needed(now=…), least=0.15)), or give "
            "more components, a larger rank or more steps.",
            ApdWarning,
            stacklevel=3,
        )


def _postfix(info: StepInfo) -> str:
    """How many components are active and alive, and the losses, minimality first: the distance on the active ones."""
    counts = [] if info.k is None else [f"k {info.k:.3g}", f"{info.alive} alive"]
    names = sorted(info.terms, key=lambda name: name != "minimality")
    return ", ".join(counts + [f"{name} {info.terms[name].item():.2g}" for name in names])
