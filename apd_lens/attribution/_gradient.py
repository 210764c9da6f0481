"""Attributions: how much each component is estimated to matter for the output on each data point.

Gradient attributions in four steps: run the target once and keep x and y of every use; pull cotangents v back through
it, many at once, to get ∂(v · f)/∂y; multiply with what each component writes, x P_c; take the root mean square over
the cotangents. One-hot cotangents, one an output, make it exact; a few random ones estimate it. Where components are
fewer than outputs, what each writes is pushed forward to all outputs instead.

Integrated gradients do that on a path of weights; ablations run the model without each component instead.
"""

from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from apd_lens._checks import check_fields
from apd_lens._codec import saved
from apd_lens._memory import BUDGET
from apd_lens.attribution._effects import effects_of_calls, effects_on_outputs
from apd_lens.attribution._over_outputs import mean_over_outputs, root_mean, sum_of_squares
from apd_lens.attribution._projections import AUTO_PROJECTIONS, are_exact, check_projections, cotangents_for
from apd_lens.attribution._pullback import jacobians_in_parts
from apd_lens.attribution._pushforward import Pushforward, pushforward, squared_effects
from apd_lens.attribution._sketch import sketched, unembedding
from apd_lens.components._components import ParameterComponents
from apd_lens.data._points import Granularity
from apd_lens.passes._cotangents import Cotangents
from apd_lens.passes._watch import WatchedPass

# Jacobian-vector products are taken where so many times as many vector-Jacobian products would have to be. One costs
# about as much as the other (benchmarks/growth.py), but a linear readout and equal examples save some of the latter,
# and before the former the target is run again.
CLEARLY_FEWER = 2


@saved
@dataclass(frozen=True)
class GradientAttribution:
    """A_c(x) = sqrt( mean_o ( Σ_l Σ_uses <∂f_o/∂y_l , x_l P_c,l> )² ), exact or estimated.

    Gradients and x are those of the target model. Where data points are positions, the sum over positions is left out.
    The examples of a batch must not influence each other in the model. Outputs at padding (where the batch's
    `attention_mask` is 0) do not count, and padding has attribution 0. An `attention_mask` of queries and keys may keep
    several documents in one row apart. Then the mean at a position is over the outputs of its own document, as if the
    document were alone. The mean of an example, which is the row, is over the whole row. Source: Braun et al. 2025,
    arXiv 2501.14926.

    Exact takes one vector-Jacobian product for each output of an example, or one Jacobian-vector product for each
    component (each component at each position, where data points are positions) if those are fewer than half as many
    and the model can be differentiated twice. The estimate takes K of the former whatever the number of outputs: for
    random v with E v vᵀ = 1, E (vᵀ J P_c)² = Σ_o (J_o P_c)², so the mean over K of them is unbiased (A_c², not its
    root). `Decomposition.attribution_error` says how far it is off.

    Where outputs are compared as distributions (`Losses(distance="kl")`), the same is done in the metric of the
    output's own distribution, that of the Fisher information. Then A_c² / 2 is about the KL in nats that taking c out
    costs, and an output that has no probability does not count.

    Attributes:
        metric: "outputs" counts all outputs alike, "fisher" as just said; "auto" goes by the distance.
        fixed: the same projections are drawn each time. What is pulled back for them is kept with a batch that comes
            again in a training, so that it is computed once: take more of them then.
        projections: "exact"; the number K; or "auto", exact for up to 128 outputs of an example (positions times
            outputs), and where 4 Jacobian-vector products are enough; K = 8 beyond.
        kind: entries of v are ±1 ("rademacher", the smaller variance) or standard "normal".
        memory: bytes that temporaries may take; larger computations run in chunks.
    """

    projections: int | Literal["auto", "exact"] = "auto"
    kind: Literal["rademacher", "normal"] = "rademacher"
    memory: int = BUDGET
    metric: Literal["auto", "outputs", "fisher"] = "auto"
    fixed: bool = False

    UNSAVED: ClassVar[dict[str, str]] = {"metric": "outputs"}  # of decompositions of apd_lens 0.2

    def __post_init__(self) -> None:
        check_fields(self)
        check_projections(self.projections)

    def seen(self, watched: WatchedPass) -> WatchedPass:
        """The pass with its outputs in the metric of these attributions."""
        return watched.in_fisher_metric() if self._is_fisher(watched) and not watched.run.in_fisher_metric else watched

    def _is_fisher(self, watched: WatchedPass) -> bool:
        return self.metric == "fisher" or (self.metric == "auto" and watched.run.compares == "distributions")

    def _sketch(
        self, watched: WatchedPass, components: ParameterComponents, generator: torch.Generator | None
    ) -> Cotangents | None:
        """Projections in the metric of the output's distribution, at the input of the unembedding; None without one."""
        are_few = components.n_components * CLEARLY_FEWER <= AUTO_PROJECTIONS  # then exact ones are as cheap
        if not self._is_fisher(watched) or are_exact(watched.output, self.projections) or are_few:
            return None
        K = AUTO_PROJECTIONS if isinstance(self.projections, str) else self.projections
        found, at_x = unembedding(watched), None
        if watched.jacobians is not None and watched.jacobians.of == ("fisher", K):
            at_x = (0, watched.output)  # they were kept
        elif found is not None:
            draws = torch.Generator(watched.output.device).manual_seed(0) if self.fixed else generator
            gradients = sketched(watched, found, K, self.kind, draws)
            at_x = None if gradients is None else (found.place, gradients)
        if at_x is None:
            return None
        return Cotangents(K, lambda first, last: watched.output, K, exact=False, lasting=self.fixed, at_input=at_x)

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
        if watched.graph_freed and not watched.can_be_attributed:
            again = (watched.again(None, examples) for examples in watched.pieces())
            return torch.cat([self.squares(some, components, granularity, generator) for some in again])
        sketch = self._sketch(watched, components, generator)
        if sketch is None:
            watched = self.seen(watched)
            J = None if torch.is_grad_enabled() else self.pushforward(watched, components, granularity)
            if J is not None:
                return mean_over_outputs(squared_effects(J, watched, components, granularity, self.memory), watched)
        cotangents = sketch or self.cotangents(watched.output, generator)
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
        if watched.graph_freed and not watched.can_be_attributed:
            again = (watched.again(None, examples) for examples in watched.pieces())
            return torch.cat([self.samples(some, components, granularity, generator) for some in again], 1)
        sketch = self._sketch(watched, components, generator)
        watched = watched if sketch else self.seen(watched)
        cotangents = sketch or self.cotangents(watched.output, generator)
        effects = effects_on_outputs(watched, cotangents, components, granularity, self.memory)
        squares = effects.square() * (cotangents.count / cotangents.scale)
        return torch.stack([root_mean(some, watched) for some in squares])

    def cotangents(
        self, output: Float[Tensor, "batch *pos n_outputs"], generator: torch.Generator | None = None
    ) -> Cotangents:
        """One-hot ones for exact attributions, or K random ones."""
        if not self.fixed:
            return cotangents_for(output, self.projections, self.kind, generator)
        generator = torch.Generator(output.device).manual_seed(0)
        return replace(cotangents_for(output, self.projections, self.kind, generator), lasting=True)

    def pushforward(
        self, watched: WatchedPass, components: ParameterComponents, granularity: Granularity
    ) -> Pushforward | None:
        """J of the pass, if Jacobian-vector products are clearly fewer than cotangents, and possible."""
        if isinstance(self.projections, int) or self._knows_all(watched):
            return None
        positions = {call.y.shape[1:-1] for call in watched.calls} if granularity == "position" else {torch.Size()}
        n_jvps = components.n_components * max(axes.numel() for axes in positions)
        n_vjps = watched.output[0].numel() if are_exact(watched.output, self.projections) else AUTO_PROJECTIONS
        if len(positions) > 1 or n_jvps * CLEARLY_FEWER > n_vjps:
            return None
        return pushforward(watched)

    def is_exact(self, watched: WatchedPass, components: ParameterComponents, granularity: Granularity) -> bool:
        """Whether attributions on this pass are exact, and not estimated from random projections of the output."""
        watched = self.seen(watched)
        return (
            are_exact(watched.output, self.projections)
            or (self.projections == "auto" and self._knows_all(watched))
            or self.pushforward(watched, components, granularity) is not None
        )

    @staticmethod
    def _knows_all(watched: WatchedPass) -> bool:
        """Whether the gradients of all outputs were kept with the pass."""
        return watched.jacobians is not None and watched.jacobians.of == "outputs"
