"""Attributions: how much each component is estimated to matter for the output on each data point.

Gradient attributions in four steps: run the target once and keep x and y of every use; pull cotangents v back through
it, many at once, to get ∂(v · f)/∂y; multiply with what each component writes, x P_c; take the root mean square over
the cotangents. One-hot cotangents, one an output, make it exact; a few random ones estimate it. Where components are
fewer than outputs, what each writes is pushed forward to all outputs instead.

Integrated gradients do that on a path of weights; ablations run the model without each component instead.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any, Literal

import torch
from einops import einsum, rearrange
from jaxtyping import Float
from torch import Tensor

from apd_lens._checks import check_fields
from apd_lens._components import ParameterComponents
from apd_lens._errors import InvalidSetting, ShapeMismatch
from apd_lens._finite import on_gpu
from apd_lens._jacobian import (
    Cotangents,
    Jacobians,
    Part,
    jacobians_in_parts,
    one_hot_cotangents,
    random_cotangents,
)
from apd_lens._jvp import Pushforward, pushforward
from apd_lens._padding import zero_at_padding
from apd_lens._passes import Call, WatchedPass, replace_weights, subtract_weights, subtract_weights_of_each
from apd_lens._product import component_outputs, inner_activations, inner_activations_of_many

# What a data point is: an example, or each position of an example.
Granularity = Literal["example", "position"]

# "auto": exact up to so many outputs of an example, estimated from so many projections beyond.
EXACT_UP_TO = 128
AUTO_PROJECTIONS = 8

# On a CPU, what is summed over outputs at once stays in the cache, unless it would be of too few examples.
_CACHE = 2**22
_FEWEST_EXAMPLES = 128

# What it costs to write and read an inner activation, in multiply-adds.
_PER_INNER = 60

# Jacobian-vector products are taken where so many times as many vector-Jacobian products would have to be. One costs
# about as much as the other (benchmarks/growth.py), but a linear readout and equal examples save some of the latter,
# and before the former the target is run again.
CLEARLY_FEWER = 2


@dataclass(frozen=True)
class GradientAttribution:
    """A_c(x) = sqrt( mean_o ( Σ_l Σ_uses <∂f_o/∂y_l , x_l P_c,l> )² ), exact or estimated.

    Gradients and x are those of the target model. For positions as data points the sum over positions is left out.
    The examples of a batch must not influence each other in the model. Outputs at padding (where the batch's
    `attention_mask` is 0) do not count, and padding itself has attribution 0. Where an `attention_mask` of queries and
    keys keeps several documents in one row apart, the mean at a position is over the outputs of its own document, so
    attributions are those of the document alone; of an example, the row, it is over the whole. Source: Braun et al.
    2025, arXiv 2501.14926.

    Exact takes one vector-Jacobian product for each output of an example, or one Jacobian-vector product for each
    component (each component at each position, where data points are positions) if those are fewer than half as many
    and the model can be differentiated twice. The estimate takes K of the former whatever the number of outputs: for
    random v with E v vᵀ = 1, E (vᵀ J P_c)² = Σ_o (J_o P_c)², so the mean over K of them is unbiased (A_c², not its
    root). `Decomposition.attribution_error` says how far it is off.

    Attributes:
        projections: "exact"; the number K; or "auto", exact for up to 128 outputs of an example (positions times
            outputs), and where 4 Jacobian-vector products are enough; K = 8 beyond.
        kind: entries of v are ±1 ("rademacher", the smaller variance) or standard "normal".
        memory: bytes that the temporaries may take; what is larger is computed in chunks.
    """

    projections: int | Literal["auto", "exact"] = "auto"
    kind: Literal["rademacher", "normal"] = "rademacher"
    memory: int = 2**29

    def __post_init__(self) -> None:
        check_fields(self)
        _check_projections(self.projections)

    def __call__(
        self,
        watched: WatchedPass,
        components: ParameterComponents,
        granularity: Granularity,
        generator: torch.Generator | None = None,
    ) -> Float[Tensor, "batch *pos C"]:
        with torch.no_grad():
            return self.squares(watched, components, granularity, generator).sqrt_()

    def squares(
        self,
        watched: WatchedPass,
        components: ParameterComponents,
        granularity: Granularity,
        generator: torch.Generator | None = None,
    ) -> Float[Tensor, "batch *pos C"]:
        """A_c(x)². Where gradients are enabled, in a graph that leads to the factors and keeps v · batch · C numbers
        for each use of a matrix; the target's gradients are constants in it."""
        J = None if torch.is_grad_enabled() else self.pushforward(watched, components, granularity)
        if J is not None:
            return mean_over_outputs(squared_effects(J, watched, components, granularity, self.memory), watched)
        cotangents = self.cotangents(watched.output, generator)
        squares = []
        for part, chunks in jacobians_in_parts(watched, cotangents, self.memory):
            total = None
            for jacobians in chunks:
                effects = effects_of_calls(jacobians, part.calls, components, granularity, self.memory)
                some = torch.cat([sum_of_squares(effect) for effect in effects])
                total = some if total is None else total.add_(some)
            assert total is not None
            squares.append(mean_over_outputs(total / cotangents.scale, part))
        return torch.cat(squares)

    def samples(
        self,
        watched: WatchedPass,
        components: ParameterComponents,
        granularity: Granularity,
        generator: torch.Generator | None = None,
    ) -> Float[Tensor, "K batch *pos C"]:
        """What each projection alone estimates; the root of the mean of their squares is the estimate."""
        cotangents = self.cotangents(watched.output, generator)
        effects = effects_on_outputs(watched, cotangents, components, granularity, self.memory)
        squares = effects.square() * (cotangents.count / cotangents.scale)
        return torch.stack([_root_mean(some, watched) for some in squares])

    def cotangents(
        self, output: Float[Tensor, "batch *pos n_outputs"], generator: torch.Generator | None = None
    ) -> Cotangents:
        """One-hot ones for exact attributions, or K random ones."""
        return _cotangents(output, self.projections, self.kind, generator)

    def pushforward(
        self, watched: WatchedPass, components: ParameterComponents, granularity: Granularity
    ) -> Pushforward | None:
        """J of the pass, if Jacobian-vector products are clearly fewer than cotangents, and possible."""
        if isinstance(self.projections, int) or watched.jacobians is not None:
            return None
        positions = {call.y.shape[1:-1] for call in watched.calls} if granularity == "position" else {torch.Size()}
        n_jvps = components.n_components * max(axes.numel() for axes in positions)
        n_vjps = watched.output[0].numel() if are_exact(watched.output, self.projections) else AUTO_PROJECTIONS
        if len(positions) > 1 or n_jvps * CLEARLY_FEWER > n_vjps:
            return None
        return pushforward(watched)

    def is_exact(self, watched: WatchedPass, components: ParameterComponents, granularity: Granularity) -> bool:
        """Whether attributions on this pass are exact, and not estimated from random projections of the output.

        With "auto" they stay so where the Jacobian of the pass was kept, by seeds that were attributed together."""
        return (
            are_exact(watched.output, self.projections)
            or (self.projections == "auto" and watched.jacobians is not None)
            or self.pushforward(watched, components, granularity) is not None
        )


def squared_effects(
    J: Pushforward, watched: WatchedPass, components: ParameterComponents, granularity: Granularity, memory: int
) -> Float[Tensor, "examples *data_pos C"]:
    """Σ_o ( Σ_l Σ_uses <∂f_o/∂y_l , x_l P_c,l> )², pushing x P_c forward for each component (and position)."""
    at_once = max(1, memory // (len(watched.output) * watched.bytes_per_example()))
    positions = J.calls[0].y.shape[1:-1] if granularity == "position" else torch.Size()
    places_at_once = min(positions.numel(), at_once)
    factors = [components.factors(call.use) for call in J.calls]
    squares = next(components.parameters()).new_empty(len(watched.output), positions.numel(), components.n_components)
    for places, chosen in product(
        _slices(positions.numel(), places_at_once), _slices(components.n_components, at_once // places_at_once)
    ):
        where = places if granularity == "position" else None
        tangents = [
            _written(call, A[chosen], B[chosen], where).to(call.y.dtype)
            for call, (A, B) in zip(J.calls, factors, strict=True)
        ]
        here = squares[:, places, chosen]
        effects = J(tangents).to(squares.dtype).square_().flatten(2).sum(-1)
        here.copy_(rearrange(effects, "(C place) example -> example place C", place=here.shape[1]))
    return squares.view(len(squares), *positions, -1)


def _written(
    call: Call, A: Float[Tensor, "C d_in m"], B: Float[Tensor, "C m d_out"], places: slice | None
) -> Float[Tensor, "jvps examples *pos d_out"]:
    """x P_c of every component; with places, of every component at each of them, and zero at all other positions."""
    if places is None:
        return component_outputs(call.x, A, B).movedim(-2, 0)
    n_examples, *positions, d_out = call.y.shape
    x = call.x.reshape(n_examples, -1, *call.x.shape[call.y.ndim - 1 :])[:, places]
    written = A.new_zeros(len(A), x.shape[1], n_examples, torch.Size(positions).numel(), d_out)
    at_places = written[:, :, :, places].diagonal(dim1=1, dim2=3)
    at_places.copy_(rearrange(component_outputs(x, A, B), "example place C d_out -> C example d_out place"))
    return written.reshape(-1, *call.y.shape)


def _check_projections(projections: int | Literal["auto", "exact"]) -> None:
    if isinstance(projections, int) and projections < 1:
        raise InvalidSetting(f"projections must be at least 1, got {projections}.")


def _cotangents(
    output: Float[Tensor, "batch *pos n_outputs"],
    projections: int | Literal["auto", "exact"],
    kind: Literal["rademacher", "normal"],
    generator: torch.Generator | None,
) -> Cotangents:
    if are_exact(output, projections):
        return one_hot_cotangents(output)
    K = AUTO_PROJECTIONS if isinstance(projections, str) else projections
    return random_cotangents(output, K, kind, generator)


def are_exact(output: Float[Tensor, "batch *pos n_outputs"], projections: int | Literal["auto", "exact"]) -> bool:
    """Whether attributions to this output are exact, and not estimated from random projections of it."""
    return projections == "exact" or (projections == "auto" and output[0].numel() <= EXACT_UP_TO)


def _root_mean(
    squares: Float[Tensor, "examples *pos C"], watched: WatchedPass, examples: slice = slice(None)
) -> Float[Tensor, "examples *pos C"]:
    """Root of the mean over outputs of what was summed over them, for some examples of the pass."""
    return mean_over_outputs(squares, watched, examples).sqrt()


def mean_over_outputs(
    squares: Float[Tensor, "examples *pos C"], watched: WatchedPass, examples: slice = slice(None)
) -> Float[Tensor, "examples *pos C"]:
    if squares.ndim > 2:
        watched.check_padding_of_positions()
    n_outputs = watched.n_outputs(torch.Size([len(watched.output), *squares.shape[1:-1]]))[examples].to(squares.dtype)
    n_outputs = n_outputs.reshape(*n_outputs.shape, *[1] * (squares.ndim - n_outputs.ndim))
    return zero_at_padding(squares / n_outputs, None if watched.real is None else watched.real[examples])


def sum_of_squares(effects: Float[Tensor, "v *data C"]) -> Float[Tensor, "*data C"]:
    """Over v; in place where nothing else needs the effects."""
    return (effects.square() if effects.requires_grad else effects.square_()).sum(0)


@dataclass(frozen=True)
class ActivationAttribution:
    """Σ_l Σ_uses ‖x_l P_c,l‖², with x from the forward pass of the summed components. Needs no gradients.

    Squared units of the activations. It says how much a component writes, not whether anything reads it.
    """

    def __call__(
        self,
        watched: WatchedPass,
        components: ParameterComponents,
        granularity: Granularity,
        generator: torch.Generator | None = None,
    ) -> Float[Tensor, "batch *pos C"]:
        total = None
        watched.check_padding_of_positions()  # x at padding counts
        with torch.no_grad():
            for call in watched.again(components, slice(None)).calls:
                norms = component_outputs(call.x, *components.factors(call.use)).square().sum(-1)
                norms = zero_at_padding(norms, watched.real)
                if granularity == "example" and norms.ndim > 2:
                    norms = norms.sum(tuple(range(1, norms.ndim - 1)))
                total = norms if total is None else total + norms
        assert total is not None
        return total


@dataclass(frozen=True)
class IntegratedGradients:
    """A_c(x) = sqrt( mean_o ( mean_t Σ_l Σ_uses <∂f_o/∂y_l(t) , x_l(t) P_c,l> )² ), t on a path of weights.

    As `GradientAttribution`, but the effect on an output is averaged over t before it is squared, with gradients and x
    of the model at each t. The path is a straight line along Σ_c P_c, so the effects of all components on an output
    (all uses, all positions) sum to the difference that the whole path makes to it, up to the error of the midpoint
    rule. Costs `steps` forward passes, and as many times the backward passes. The path is Sundararajan et al. 2017,
    arXiv 1703.01365, over weights in the place of inputs.

    Attributes:
        steps: number of points t = (i + 1/2) / steps.
        start: "all" goes from the target, where all components are on, to the target without them: W − t Σ_c P_c, and
            the effects sum to f(W) − f(W − Σ_c P_c). "zero" goes from no weights to the components alone: t Σ_c P_c,
            and the effects sum to f(Σ_c P_c) − f(0). Where the components sum to the weights it is the same line.
        projections: "exact", a number, or "auto"; as in `GradientAttribution`. All t share them.
        memory: bytes that the temporaries may take; what is larger is computed in chunks.
    """

    steps: int = 8
    start: Literal["all", "zero"] = "all"
    projections: int | Literal["auto", "exact"] = "auto"
    memory: int = 2**29

    def __post_init__(self) -> None:
        check_fields(self)
        _check_projections(self.projections)
        if self.steps < 1:
            raise InvalidSetting(f"IntegratedGradients needs at least 1 step, got {self.steps}.")

    def __call__(
        self,
        watched: WatchedPass,
        components: ParameterComponents,
        granularity: Granularity,
        generator: torch.Generator | None = None,
    ) -> Float[Tensor, "batch *pos C"]:
        cotangents = _cotangents(watched.output, self.projections, "rademacher", generator)
        n_places = _positions(watched.calls).numel() if granularity == "position" else 1
        n_effects = 2 * n_places * components.n_components  # of one v and example, and what is added to them
        pairs_at_once = max(1, self.memory // (n_effects * watched.output.element_size()))
        vs_at_once = min(cotangents.count, pairs_at_once)
        examples_at_once = pairs_at_once // vs_at_once
        attributions = []
        for first in range(0, len(watched.output), examples_at_once):
            examples, squares = slice(first, first + examples_at_once), []
            for first_v in range(0, cotangents.count, vs_at_once):
                some = cotangents.some(first_v, min(first_v + vs_at_once, cotangents.count))
                effects = self.effects(watched, some, components, granularity, examples)
                squares.append(effects.square_().sum(0))
            total = torch.stack(squares).sum(0)
            attributions.append(_root_mean(total / cotangents.scale, watched, examples))
        return torch.cat(attributions)

    def effects(
        self,
        watched: WatchedPass,
        cotangents: Cotangents,
        components: ParameterComponents,
        granularity: Granularity,
        examples: slice = slice(None),
    ) -> Float[Tensor, "v examples *data_pos C"]:
        """mean_t Σ_l Σ_uses <∂(v · f)/∂y_l(t) , x_l(t) P_c,l> of some examples, signed; see `start` for their sum."""
        total, whole = None, sum_as_one_component(components)
        for point in range(self.steps):
            t = (point + 0.5) / self.steps
            scaled = ParameterComponents({name: t * A for name, A in whole.A.items()}, whole.B).requires_grad_(False)
            replaced = replace_weights(scaled) if self.start == "zero" else subtract_weights(scaled, [0])
            passed = watched.replacing(replaced, examples)
            effects = effects_on_outputs(passed, cotangents, components, granularity, self.memory)
            total = effects if total is None else total.add_(effects)
        assert total is not None
        return total.div_(self.steps)


@torch.no_grad()
def sum_as_one_component(components: ParameterComponents) -> ParameterComponents:
    """Σ_c P_c as a single component, the smaller of its two factors the identity."""
    A, B = {}, {}
    for name in components.names:
        summed = components.summed(name)
        d_in, d_out = summed.shape
        identity = torch.eye(min(d_in, d_out), dtype=summed.dtype, device=summed.device)
        A[name], B[name] = (summed[None], identity[None]) if d_out < d_in else (identity[None], summed[None])
    return ParameterComponents(A, B).requires_grad_(False)


@dataclass(frozen=True)
class AblationAttribution:
    """A_c(x) = sqrt( mean_o ( f_o(x, W) − f_o(x, W − P_c) )² ): the effect that other attributions estimate.

    For positions as data points the component is taken out at one position only, and the effect is that on the outputs
    at all positions. The cost is that of C forward passes, or C times the number of positions; they run as few large
    ones, in which the batch is repeated. The examples of a batch must not influence each other in the model. Outputs
    at padding do not count, and padding itself has attribution 0.

    Attributes:
        memory: bytes that a forward pass may take (estimated from the inputs and outputs of the target's matrices);
            the batch is repeated, or cut, accordingly. A CPU is faster with less, such as 2**26.
    """

    memory: int = 2**29

    def __post_init__(self) -> None:
        check_fields(self)
        if self.memory < 1:
            raise InvalidSetting(f"memory must be at least 1 byte, got {self.memory}.")

    def __call__(
        self,
        watched: WatchedPass,
        components: ParameterComponents,
        granularity: Granularity,
        generator: torch.Generator | None = None,
    ) -> Float[Tensor, "batch *pos C"]:
        n_examples, n_components = len(watched.output), components.n_components
        positions = _positions(watched.calls) if granularity == "position" else torch.Size()
        n_at_once = max(1, self.memory // watched.bytes_per_example())
        examples_at_once = min(n_examples, n_at_once)
        replicates = n_at_once // examples_at_once
        places_at_once = min(positions.numel(), replicates)
        chosen_at_once = replicates // places_at_once
        full = watched.output.detach().to(next(components.parameters()).dtype).flatten(1)
        squares = full.new_empty(n_examples, positions.numel(), n_components)
        with torch.no_grad():
            for examples, places, chosen in product(
                _slices(n_examples, examples_at_once),
                _slices(positions.numel(), places_at_once),
                _slices(n_components, chosen_at_once),
            ):
                here = squares[examples, places, chosen]
                subtracted = subtract_weights_of_each(
                    components, chosen, places if granularity == "position" else None, len(here)
                )
                ablated = watched.replicates(subtracted, examples, here[0].numel())
                ablated = rearrange(
                    ablated, "(C place example) ... o -> example place C (... o)", C=here.shape[2], place=here.shape[1]
                )
                here.copy_((full[examples, None, None] - ablated).square_().sum(-1))
        return _root_mean(squares.view(n_examples, *positions, n_components), watched)


def _slices(length: int, at_once: int) -> list[slice]:
    return [slice(first, min(first + at_once, length)) for first in range(0, length, at_once)]


def _positions(calls: Sequence[Call]) -> torch.Size:
    """The position axes of all calls.

    Raises:
        ShapeMismatch: they differ.
    """
    first, *others = calls
    for call in others:
        if call.y.shape[1:-1] != first.y.shape[1:-1]:
            raise ShapeMismatch(
                f"With positions as data points every decomposed matrix must be used on the same positions, but "
                f"{call.use.matrix} was used on {tuple(call.y.shape[:-1])} (batch *pos) and the ones before it on "
                f"{tuple(first.y.shape[:-1])}. Decompose them separately, or use granularity='example'."
            )
    return first.y.shape[1:-1]


Attribution = GradientAttribution | ActivationAttribution | IntegratedGradients | AblationAttribution


def metric_effects(
    watched: WatchedPass,
    components: ParameterComponents,
    granularity: Granularity,
    metric: Callable[[Tensor], Tensor],
    memory: int = 2**29,
) -> Float[Tensor, "batch *pos C"]:
    """Σ_l Σ_uses <∂metric/∂y_l , x_l P_c,l>: signed, positive where a component raises the metric.

    Args:
        metric: the explained output -> one scalar an example, `batch`.

    Raises:
        ShapeMismatch: the metric does not return one scalar an example.
    """
    jacobians = metric_gradients(watched, metric)
    with torch.no_grad():
        return torch.cat(list(effects_of_calls(jacobians, watched.calls, components, granularity, memory)), 1)[0]


def metric_gradients(watched: WatchedPass, metric: Callable[[Tensor], Tensor]) -> Jacobians:
    """∂metric/∂y of every call, `1 batch *pos d_out`. Uses up the pass's graph. Raises as `metric_effects` does."""
    with torch.enable_grad():
        scalars = metric_scalars(metric, watched.output)
    ys = [call.y for call in watched.calls]
    gradients = torch.autograd.grad(scalars, ys, torch.ones_like(scalars), allow_unused=True)
    return Jacobians.whole([None if gradient is None else gradient[None] for gradient in gradients])


def metric_scalars(
    metric: Callable[[Tensor], Tensor], output: Float[Tensor, "batch *pos n_outputs"]
) -> Float[Tensor, " batch"]:
    """The metric of each example, checked. Raises as `metric_effects` does."""
    scalars = metric(output)
    if not isinstance(scalars, Tensor) or scalars.shape != output.shape[:1]:
        came = tuple(scalars.shape) if isinstance(scalars, Tensor) else type(scalars).__name__
        raise ShapeMismatch(
            f"Expected the metric to give one scalar an example, shape ({len(output)},), got {came} from an output of "
            f"shape {tuple(output.shape)}."
        )
    return scalars


def effects_on_outputs(
    watched: WatchedPass,
    cotangents: Cotangents,
    components: ParameterComponents,
    granularity: Granularity,
    memory: int,
) -> Float[Tensor, "v batch *data_pos C"]:
    """Σ_l Σ_uses <∂(v · f)/∂y_l , x_l P_c,l> for every v, signed. Uses up the pass's graph."""
    parts = []
    with torch.no_grad():
        for part, chunks in jacobians_in_parts(watched, cotangents, memory):
            effects = [
                torch.cat(list(effects_of_calls(jacobians, part.calls, components, granularity, memory)), 1)
                for jacobians in chunks
            ]
            parts.append(torch.cat(effects))
    return torch.cat(parts, 1)


def effects_of_calls(
    jacobians: Jacobians,
    calls: Sequence[Call],
    components: ParameterComponents,
    granularity: Granularity,
    memory: int,
) -> Iterator[Float[Tensor, "v data *pos C"]]:
    """Σ_l Σ_uses <∂(v · f)/∂y_l , x_l P_c,l> for every v, in chunks of examples whose temporaries fit into `memory`."""
    used = [(parts, call) for parts, call in zip(jacobians.of_calls, calls, strict=True) if parts]
    if not used:
        raise ShapeMismatch(
            "The output does not depend on any of the decomposed matrices, so there is nothing to attribute. Check "
            "output= and weights=."
        )
    if granularity == "position":
        _positions([call for _, call in used])
    terms = _terms([(parts, call, *components.factors(call.use)) for parts, call in used])
    inner_of = {
        number: _inner_activations_of_some(used[number][1], components, memory)
        for number in sorted({number for term in terms for number in term.calls})
    }
    factor = next(components.parameters())
    itemsize = torch.finfo(factor.dtype).bits // 8
    numbers = max(term.numbers_per_example() for term in terms)
    chunk = max(1, memory // (numbers * itemsize))
    if not on_gpu(factor.device):
        chunk = min(chunk, max(_FEWEST_EXAMPLES, _CACHE // (numbers * itemsize)))
    slopes = None if jacobians.slopes is None else jacobians.slopes.to(factor.dtype)
    n_examples = len(used[0][1].x)
    for first in range(0, n_examples, chunk):
        examples, total = slice(first, first + chunk), None
        inner = {number: of_call(examples) for number, of_call in inner_of.items()}
        for term in terms:
            effects = term([inner[number] for number in term.calls], examples, granularity)
            total = effects if total is None else total.add_(effects)
        assert total is not None
        if slopes is not None:
            total.mul_(slopes[:, examples].reshape(len(total), -1, *[1] * (total.ndim - 2)))
        yield total


def _inner_activations_of_some(
    call: Call, components: ParameterComponents, memory: int
) -> Callable[[slice], Float[Tensor, "examples *pos C m"]]:
    """Examples -> their x A; computed at once for all if it fits into `memory`."""
    A, x = components.factors(call.use)[0], call.x
    positions = x.numel() // (A.shape[1] if x.is_floating_point() else 1)
    if 8 * positions * A.shape[0] * A.shape[2] > memory:
        return lambda examples: inner_activations(x[examples], A)
    whole = inner_activations_of_many(x, A)
    return lambda examples: whole[examples]


@dataclass(frozen=True, eq=False)
class _Term:
    """A sum of effects over calls whose gradients are a common factor, or are all the same for all examples.

    The calls' A and B stand side by side, as if they were components of a higher rank; `inner` is x A of each.

    Attributes:
        calls: which.
        B: of all of them; times what the common factor goes through.
        values: the common factor; None where there is J Bᵀ in the place of B, which is the same for all examples.
    """

    calls: Sequence[int]
    B: Float[Tensor, "C m d"] | Float[Tensor, "v *pos C m"]
    values: Float[Tensor, "v examples *pos d"] | None

    def __call__(
        self, inner: Sequence[Tensor], examples: slice, granularity: Granularity
    ) -> Float[Tensor, "v examples *data_pos C"]:
        side_by_side = inner[0] if len(inner) == 1 else torch.cat(list(inner), -1)
        if self.values is None:
            return shared_effects(self.B, side_by_side, granularity)
        return component_effects(self.values[:, examples], side_by_side, self.B, granularity)

    def numbers_per_example(self) -> int:
        """How many numbers the temporaries of one example hold, about."""
        if self.values is None:
            n_cotangents, *positions, n_components, m = self.B.shape
            return torch.Size(positions).numel() * 2 * n_components * (m + n_cotangents)
        (n_cotangents, _, *positions, d), (n_components, m, _) = self.values.shape, self.B.shape
        per_position = 2 * n_components * (m + n_cotangents)
        if _pulls_back(n_cotangents, m):
            per_position += 2 * n_cotangents * n_components * m
        else:
            per_position += 2 * n_components * d + n_cotangents * d
        return torch.Size(positions).numel() * per_position


@dataclass(frozen=True, eq=False)
class _OneMap:
    """A sum of effects over calls whose gradients are the same for all examples, as one linear map: x (A B Jᵀ).

    Attributes:
        x: of all calls, side by side.
        calls: whose x A are needed: none.
    """

    x: Float[Tensor, "examples d"]
    map: Float[Tensor, "d v C"]
    calls: Sequence[int] = ()

    def __call__(
        self, inner: Sequence[Tensor], examples: slice, granularity: Granularity
    ) -> Float[Tensor, "v examples C"]:
        effects = self.x[examples].to(self.map.dtype) @ self.map.flatten(1)
        return effects.unflatten(1, self.map.shape[1:]).movedim(1, 0)

    def numbers_per_example(self) -> int:
        """How many numbers the temporaries of one example hold, about."""
        return 2 * self.map[0].numel()


# The factors of a call, with the parts of its gradient.
_Used = tuple[Sequence[Part], Call, Tensor, Tensor]


def _terms(used: Sequence[_Used]) -> list[_Term | _OneMap]:
    """The parts of the gradients of several calls, taken together where they have much in common."""
    together: dict[Any, list[tuple[int, Tensor]]] = {}
    common: dict[Any, Tensor] = {}
    for number, (parts, call, _, B) in enumerate(used):
        for values, through in parts:
            if values.shape[1] < len(call.y):
                pulled = einsum(values[:, 0].to(B.dtype), B, "v ... d_out, C m d_out -> v ... C m")
                together.setdefault(call.y.shape[1:-1], []).append((number, pulled))
            else:
                common[id(values)] = values.to(B.dtype)
                B_through = B if through is None else B @ through.to(B.dtype).mT
                together.setdefault(id(values), []).append((number, B_through))
    terms = []
    for key, items in together.items():
        numbers, of_calls = [number for number, _ in items], [B for _, B in items]
        values = common.get(key)
        if values is None and _is_cheaper_as_one_map([used[number] for number in numbers], len(of_calls[0])):
            maps = [
                einsum(used[number][2], pulled, "C d_in m, v C m -> d_in v C")
                for number, pulled in zip(numbers, of_calls, strict=True)
            ]
            terms.append(_OneMap(torch.cat([used[number][1].x for number in numbers], 1), torch.cat(maps)))
        else:
            stacked = of_calls[0] if len(items) == 1 else torch.cat(of_calls, -1 if values is None else 1)
            terms.append(_Term(numbers, stacked, values))
    return terms


def _is_cheaper_as_one_map(used: Sequence[_Used], n_cotangents: int) -> bool:
    """Whether it is cheaper to multiply x by A B Jᵀ than by A and then B Jᵀ, for an example and a component."""
    if any(len(parts) > 1 or call.y.ndim > 2 or not call.x.is_floating_point() for parts, call, _, _ in used):
        return False
    at_once = sum(A.shape[1] * n_cotangents for _, _, A, _ in used)
    one_by_one = sum(A.shape[2] * (A.shape[1] + n_cotangents + _PER_INNER) for _, _, A, _ in used)
    return at_once <= one_by_one


def component_effects(
    jacobian: Float[Tensor, "v examples *pos d_out"],
    inner: Float[Tensor, "examples *pos C m"],
    B: Float[Tensor, "C m d_out"],
    granularity: Granularity,
) -> Float[Tensor, "v examples *data_pos C"]:
    """<∂(v · f)/∂y , x P_c> of one use, from x A, for every v and component; summed over positions for examples."""
    if _pulls_back(len(jacobian), inner.shape[-1]):
        # (J Bᵀ) · (x A): no tensor of size batch × C × d_out.
        pulled = einsum(jacobian, B, "v ... d_out, C m d_out -> v ... C m")
        effects = (pulled * inner).sum(-1)
        positions = tuple(range(2, effects.ndim - 1))
        return effects.sum(positions) if granularity == "example" and positions else effects
    # With several v and rank > 1 it pays to build x P_c once: m + v instead of m · v multiplications.
    written = einsum(inner, B, "... C m, C m d_out -> ... C d_out")
    if granularity == "example":
        return einsum(
            rearrange(jacobian, "v examples ... d_out -> examples v (... d_out)"),
            rearrange(written, "examples ... C d_out -> examples C (... d_out)"),
            "examples v p, examples C p -> v examples C",
        )
    return einsum(jacobian, written, "v ... d_out, ... C d_out -> v ... C")


def shared_effects(
    pulled: Float[Tensor, "v *pos C m"], inner: Float[Tensor, "examples *pos C m"], granularity: Granularity
) -> Float[Tensor, "v examples *data_pos C"]:
    """The same where J, and so `pulled` = J Bᵀ, is the same for all examples."""
    if granularity == "example":
        return einsum(
            rearrange(inner, "examples ... C m -> C examples (... m)"),
            rearrange(pulled, "v ... C m -> C (... m) v"),
            "C examples p, C p v -> v examples C",
        )
    return einsum(inner, pulled, "examples ... C m, v ... C m -> v examples ... C")


def _pulls_back(n_cotangents: int, rank: int) -> bool:
    return n_cotangents == 1 or rank == 1
