"""Where in the architecture components have their effect."""

from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch
import torch.nn.functional as F
from einops import einsum
from jaxtyping import Float, Int
from torch import Tensor

from apd_lens._block import no_inference_mode
from apd_lens._memory import chunks, fitting
from apd_lens.attribution._effects import effects_of_calls
from apd_lens.attribution._gradient import GradientAttribution
from apd_lens.attribution._metric import Metric, metric_gradients, metric_on
from apd_lens.attribution._over_outputs import mean_over_outputs
from apd_lens.attribution._pullback import Jacobians, jacobians_in_parts
from apd_lens.compare._architecture import ArchitectureMap, MatrixAmounts
from apd_lens.compare._nodes import unit_numbers, units_by_name
from apd_lens.components._components import ParameterComponents
from apd_lens.components._products import inner_activations
from apd_lens.data._batch import Batch
from apd_lens.data._points import Granularity
from apd_lens.data._stream import one_pass
from apd_lens.decomposition._decomposition import Decomposition
from apd_lens.host._matrix import Units
from apd_lens.host._target import evaluating
from apd_lens.passes._watch import Call, WatchedPass


def attribution_map(
    decomposition: Decomposition,
    batches: Iterable[Batch],
    metric: Metric | None = None,
    units: Mapping[str, Units] | None = None,
) -> ArchitectureMap:
    """Where each component acts on the output: its squared attribution by matrix, layer, head and neuron.

    a_l² is the squared gradient attribution through matrix l alone, as if the component had no part in the others; mean
    over data points. a_lu² is the same through the rows or columns of one unit. The map divides a_l² within the matrix
    in proportion to a_lu². Parts that work together, or against each other, are each counted alone, so Σ_l a_l² is not
    A_c².

    Args:
        batches: several inputs of the model, iterated once. None is kept.
        metric: a scalar to attribute to instead of the whole output: output -> `batch`, or (output, batch) -> `batch`.
        units: as in `weight_map`.

    Raises as `weight_map` does, and:
        NonFinite: a batch, or the output, holds NaN or infinity.
        InvalidBatches: no batches, or a tensor in the place of a list of them.
    """
    known = units_by_name(decomposition.target, decomposition.components.names, units)
    like, n_components = next(decomposition.components.parameters()), decomposition.components.n_components
    totals = {name: like.new_zeros(n_components) for name in known}
    totals_of_units = {
        name: like.new_zeros(n_components, some.number + 1) for name, some in known.items() if some is not None
    }
    n_data = 0
    for batch in one_pass(batches):
        n_data += _add_squares(decomposition, batch, metric, known, totals, totals_of_units)
    matrices = []
    for name in decomposition.components.names:
        total, of_units = totals[name] / n_data, totals_of_units.get(name)
        if of_units is not None:
            of_units = of_units * (total / of_units.sum(1).clamp_min(torch.finfo(total.dtype).tiny))[:, None]
            of_units = of_units[:, :-1]
        matrices.append(MatrixAmounts(name, known[name], total, of_units))
    return ArchitectureMap("attribution", tuple(matrices))


@no_inference_mode()
def _add_squares(
    decomposition: Decomposition,
    batch: Batch,
    metric: Metric | None,
    units: Mapping[str, Units | None],
    totals: Mapping[str, Float[Tensor, " C"]],
    totals_of_units: Mapping[str, Float[Tensor, "C units_and_rest"]],
) -> int:
    """Adds Σ a_l² and Σ a_lu² over the data points of a batch to those of each matrix; returns their number."""
    settings = decomposition.settings
    attribution = (
        settings.attribution if isinstance(settings.attribution, GradientAttribution) else GradientAttribution()
    )
    granularity = settings.selection.granularity

    def add(total: Tensor, squares: Tensor, watched: WatchedPass, scale: int) -> None:
        """Squares that were summed over outputs, of some examples."""
        if metric is None:
            squares = mean_over_outputs(squares / scale, watched)
        total += squares.flatten(0, -2).sum(0).view_as(total)

    with evaluating(decomposition.target.model):
        watched = decomposition.watch(batch)
        n_data = len(watched.output)
        if granularity == "position":
            n_data = int(watched.valid.sum()) if watched.valid is not None else watched.calls[0].y[..., 0].numel()
        if metric is None:
            cotangents = attribution.cotangents(watched.output, torch.Generator(watched.output.device).manual_seed(0))
            parts, scale = jacobians_in_parts(watched, cotangents, attribution.memory), cotangents.scale
        else:
            parts, scale = [(watched, iter([metric_gradients(watched, metric_on(metric, watched.run.batch))]))], 1
        with torch.no_grad():
            for part, chunks in parts:
                for jacobians in chunks:
                    gradients = jacobians.as_whole()
                    for name, of_matrix in units.items():
                        chosen = [(j, c) for j, c in zip(gradients, part.calls, strict=True) if c.use.matrix == name]
                        if all(jacobian is None for jacobian, _ in chosen):
                            continue
                        total, of_units = _squares(
                            chosen, decomposition.components, granularity, of_matrix, attribution.memory
                        )
                        add(totals[name], total, part, scale)
                        if of_units is not None:
                            add(totals_of_units[name], of_units, part, scale)
    return n_data


def _squares(
    chosen: Sequence[tuple[Tensor | None, Call]],
    components: ParameterComponents,
    granularity: Granularity,
    units: Units | None,
    memory: int,
) -> tuple[Float[Tensor, "examples *data_pos C"], Float[Tensor, "examples *data_pos C_and_units"] | None]:
    """Of the calls of one matrix: effects squared and summed over outputs; and those of each unit, `(C units)`."""
    jacobians, calls = Jacobians.whole([jacobian for jacobian, _ in chosen]), [call for _, call in chosen]
    effects = torch.cat(list(effects_of_calls(jacobians, calls, components, granularity, memory)), 1)
    squares = effects.square_().sum(0)
    if units is None:
        return squares, None
    of_units = []
    n_examples, (n_components, _, m) = len(calls[0].x), components.A[calls[0].use.matrix].shape
    positions = calls[0].y[0, ..., 0].numel()
    numbers = len(effects) * positions * n_components * (m + 2 * units.number)
    for examples in chunks(n_examples, numbers * squares.element_size(), memory):
        total = None
        for jacobian, call in chosen:
            if jacobian is not None:
                jacobian = jacobian if jacobian.shape[1] == 1 else jacobian[:, examples]
                effect = _effects_of_units(jacobian, call, components, granularity, units, examples, memory)
                total = effect if total is None else total + effect
        assert total is not None
        of_units.append(total.square_().sum(0).flatten(-2))
    return squares, torch.cat(of_units)


def _effects_of_units(
    jacobian: Float[Tensor, "v some *pos d_out"],
    call: Call,
    components: ParameterComponents,
    granularity: Granularity,
    units: Units,
    examples: slice,
    memory: int,
) -> Float[Tensor, "v examples *data_pos C units_and_rest"]:
    """<∂(v · f)/∂y , x P_c> through the rows or columns of each unit alone; last, through those of none (a bias)."""
    use, (A, B) = call.use, components.factors(call.use)
    x = call.x[examples] if call.x.is_floating_point() else F.one_hot(call.x[examples], A.shape[1])
    positions = x.shape[1:-1]
    x = x.to(A.dtype).reshape(len(x), -1, x.shape[-1])
    jacobian = jacobian.to(A.dtype).expand(-1, len(x), *jacobian.shape[2:])
    jacobian = jacobian.reshape(len(jacobian), *x.shape[:2], -1)
    on_columns = (units.side == "out") != use.transposed
    stored = components.B[use.matrix].shape[2] if units.side == "out" else components.A[use.matrix].shape[1]
    numbers = unit_numbers(units, stored)[use.columns if on_columns else use.rows]
    summed = "v e {} C" if granularity == "example" else "v e p {} C"
    whole = inner_activations(x, A) if on_columns else einsum(jacobian, B, "v e p d_out, C m d_out -> v e p C m")
    at_once = fitting(whole.numel() * len(jacobian) * whole.element_size(), memory)
    at_places = () if granularity == "example" else x.shape[1:2]
    effects = A.new_zeros(len(jacobian), len(x), *at_places, units.number + 1, len(A))
    for unit, index in _blocks(numbers.to(A.device), at_once):
        if on_columns:
            pulled = einsum(jacobian[..., index], B[..., index], "v e p u w, C m u w -> v e p u C m")
            some = einsum(pulled, whole, f"v e p u C m, e p C m -> {summed.format('u')}")
        else:
            inner = einsum(x[..., index], A[:, index], "e p u w, C u w m -> e p u C m")
            some = einsum(whole, inner, f"v e p C m, e p u C m -> {summed.format('u')}")
        effects[..., unit, :] = some
    return effects.mT.reshape(len(jacobian), len(x), *(positions if at_places else ()), len(A), units.number + 1)


def _blocks(
    numbers: Int[Tensor, " width"], at_once: int
) -> Iterator[tuple[Int[Tensor, " units"], Int[Tensor, "units w"]]]:
    """Units of one width, and which rows or columns belong to each; so many units at once."""
    present, counts = numbers.unique(return_counts=True)
    members = numbers.argsort(stable=True).split(counts.tolist())
    for width in counts.unique().tolist():
        same = torch.where(counts == width)[0]
        for some in same.split(at_once):
            yield present[some], torch.stack([members[unit] for unit in some.tolist()])
