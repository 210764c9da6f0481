"""Integrated gradients: first-order effects averaged along a path from no component to all."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from apd_lens._block import no_grad
from apd_lens._checks import check_fields
from apd_lens._codec import saved
from apd_lens._errors import InvalidSetting
from apd_lens._memory import BUDGET, fitting, slices
from apd_lens.attribution._effects import effects_on_outputs
from apd_lens.attribution._over_outputs import root_mean, shared_positions
from apd_lens.attribution._projections import check_projections, cotangents_for
from apd_lens.components._components import ParameterComponents
from apd_lens.data._points import Granularity
from apd_lens.passes._cotangents import Cotangents
from apd_lens.passes._replace import Mixture
from apd_lens.passes._watch import WatchedPass

Start = Literal["all", "zero"]


@saved
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
        memory: bytes that temporaries may take; larger computations run in chunks.
    """

    steps: int = 8
    start: Start = "all"
    projections: int | Literal["auto", "exact"] = "auto"
    memory: int = BUDGET

    def __post_init__(self) -> None:
        check_fields(self)
        check_projections(self.projections)
        if self.steps < 1:
            raise InvalidSetting(f"IntegratedGradients needs at least 1 step, got {self.steps}.")

    def __call__(
        self,
        watched: WatchedPass,
        components: ParameterComponents,
        granularity: Granularity,
        generator: torch.Generator | None = None,
    ) -> Float[Tensor, "batch *pos C"]:
        cotangents = cotangents_for(watched.output, self.projections, "rademacher", generator)
        n_places = shared_positions(watched.calls).numel() if granularity == "position" else 1
        n_effects = 2 * n_places * components.n_components  # of one v and example, and what is added to them
        pairs_at_once = fitting(n_effects * watched.output.element_size(), self.memory)
        vs_at_once = min(cotangents.count, pairs_at_once)
        examples_at_once = pairs_at_once // vs_at_once
        attributions = []
        for examples in slices(len(watched.output), examples_at_once):
            squares = []
            for vs in slices(cotangents.count, vs_at_once):
                some = cotangents.some(vs.start, vs.stop)
                effects = self.effects(watched, some, components, granularity, examples)
                squares.append(effects.square_().sum(0))
            total = torch.stack(squares).sum(0)
            attributions.append(root_mean(total / cotangents.scale, watched, examples))
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

        def effects(at_t: WatchedPass) -> Tensor:
            return effects_on_outputs(at_t, cotangents, components, granularity, self.memory)

        return mean_on_path(watched, components, effects, self.steps, self.start, examples)


def mean_on_path(
    watched: WatchedPass,
    components: ParameterComponents,
    effects: Callable[[WatchedPass], Tensor],
    steps: int,
    start: Start = "all",
    examples: slice = slice(None),
) -> Tensor:
    """The mean over t = (i + 1/2) / steps of the effects in the pass at t, of some examples; see `IntegratedGradients`
    for the path."""
    total, whole = None, sum_as_one_component(components)
    for point in range(steps):
        t = (point + 0.5) / steps
        scaled = ParameterComponents({name: t * A for name, A in whole.A.items()}, whole.B).requires_grad_(False)
        replaced = Mixture(scaled) if start == "zero" else Mixture(scaled, on=0.0, rest=1.0)
        at_t = effects(watched.replacing(replaced, examples))
        total = at_t if total is None else total.add_(at_t)
    assert total is not None
    return total.div_(steps)


@no_grad()
def sum_as_one_component(components: ParameterComponents) -> ParameterComponents:
    """Σ_c P_c as a single component, the smaller of its two factors the identity."""
    A, B = {}, {}
    for name in components.names:
        summed = components.summed(name)
        d_in, d_out = summed.shape
        identity = torch.eye(min(d_in, d_out), dtype=summed.dtype, device=summed.device)
        A[name], B[name] = (summed[None], identity[None]) if d_out < d_in else (identity[None], summed[None])
    return ParameterComponents(A, B).requires_grad_(False)
