"""Which components raise or lower a metric, at which positions, with their sum checked against the true change."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from apd_lens._block import no_grad, no_inference_mode
from apd_lens._errors import InvalidSetting
from apd_lens._table import Printed, as_table
from apd_lens.attribution._integrated import mean_on_path
from apd_lens.attribution._metric import Metric, metric_effects, metric_on, metric_scalars
from apd_lens.data._batch import Batch
from apd_lens.data._points import Granularity, Valid, padded
from apd_lens.data._stream import one_pass
from apd_lens.decomposition._decomposition import Decomposition
from apd_lens.host._target import evaluating
from apd_lens.passes._replace import Mixture
from apd_lens.passes._watch import WatchedPass, replaced_pass


@dataclass(frozen=True, eq=False, repr=False)
class SignedAttributions(Printed):
    """How much each component raises a metric, and how the metric really changes without it.

    Attributes:
        attribution: mean over examples; positive where the component raises the metric.
        by_position: the part of `attribution` that comes in at each position; None where matrices are not all used on
            `batch pos`. Padding left out, and the mean over examples that are long enough.
        ablation: m(W) − m(W − P_c), the true change on taking out one component, mean over examples.
        change: m(W) − m(W − Σ_c P_c), the true change on taking out all of them, which `attribution` should sum to.
    """

    attribution: Float[Tensor, " C"]
    by_position: Float[Tensor, "pos C"] | None
    ablation: Float[Tensor, " C"]
    change: float

    @property
    def error(self) -> float:
        """Σ_c attribution_c − change, in units of the metric: the error of the finite number of steps."""
        return self.attribution.sum().item() - self.change

    @property
    def correlation(self) -> float:
        """Pearson correlation, over components, of the attribution with the effect of ablating each alone."""
        return torch.corrcoef(torch.stack([self.attribution, self.ablation]))[0, 1].item()

    @property
    def slope(self) -> float:
        """Least-squares slope, through 0, of the effect of ablating each component against its attribution. It is 1 if
        they agree, below 1 where components replace each other, and above 1 where they need each other."""
        return ((self.ablation @ self.attribution) / self.attribution.square().sum()).item()

    def table(self) -> pd.DataFrame:
        """One row for each component, from the one that raises the metric most to the one that lowers it most."""
        table = pd.DataFrame(
            {"attribution": self.attribution.numpy(), "metric lost on ablation": self.ablation.numpy()}
        ).rename_axis("component")
        if self.by_position is not None:
            table["largest position"] = self.by_position.abs().argmax(0).numpy()
        return table.sort_values("attribution", ascending=False, kind="stable")

    def _parts(self) -> list[str]:
        return [
            as_table(self.table()),
            f"sum {self.attribution.sum().item():.4g}, metric lost without all components {self.change:.4g}; "
            f"each alone: correlation {self.correlation:.3f}, slope {self.slope:.3f}",
        ]


@no_inference_mode()
def signed_attributions(
    decomposition: Decomposition,
    batches: Iterable[Batch],
    metric: Metric,
    *,
    steps: int = 16,
) -> SignedAttributions:
    """Integrated gradients of a metric along the path W − t Σ_c P_c, split over components and positions:

        a_c = mean_t Σ_l Σ_uses <∂m/∂y_l(t) , x_l(t) P_c,l>,  t = (i + 1/2) / steps

    so that Σ_c a_c is m(W) − m(W − Σ_c P_c) up to the error of the midpoint rule, which `error` says; more steps make
    it smaller. A batch costs `steps` forward and backward passes, and a forward pass for each component.

    Args:
        metric: the explained output -> one scalar an example, `batch`, such as a logit difference; or (output, batch)
            -> that.
        steps: points on the path.

    Raises:
        InvalidSetting: steps < 1.
        ShapeMismatch: the metric does not give one scalar an example.
        InvalidBatches: no batches.
        NonFinite: a batch, or the output, holds NaN or infinity.

    Source: Sundararajan et al. 2017, arXiv 1703.01365, over weights in the place of inputs.
    """
    if steps < 1:
        raise InvalidSetting(f"signed_attributions needs at least 1 step, got {steps}.")
    components = decomposition.components
    n_components = components.n_components
    attribution = torch.zeros(n_components, dtype=torch.float64, device="cpu")
    ablation, change, n_data = torch.zeros_like(attribution), 0.0, 0
    by_position = attribution.new_zeros(0, n_components)
    counts = attribution.new_zeros(0, 1)
    has_positions = True
    for batch in one_pass(batches):
        with evaluating(decomposition.target.model):
            watched = decomposition.watch(batch)
            has_positions = has_positions and _on_positions(watched)
            of_output = metric_on(metric, watched.run.batch)
            granularity: Granularity = "position" if has_positions else "example"
            effects = mean_on_path(
                watched,
                components,
                lambda at_t: metric_effects(at_t, components, granularity, of_output),  # noqa: B023
                steps,
            )
            effects = effects.double().cpu()
            lost, lost_with_all = _lost(watched, decomposition, of_output)
        ablation += lost
        change += lost_with_all
        n_data += len(effects)
        if has_positions:
            summed, n_there = _over_examples(effects, padded(effects, watched.valid))
            by_position, counts = _added(by_position, summed), _added(counts, n_there)
            effects = effects.sum(1)
        attribution += effects.sum(0)
    return SignedAttributions(
        attribution=(attribution / n_data).float(),
        by_position=(by_position / counts).float() if has_positions else None,
        ablation=(ablation / n_data).float(),
        change=change / n_data,
    )


def _on_positions(watched: WatchedPass) -> bool:
    """Whether all matrices are used on the same `batch pos`."""
    return len({call.y.shape[1:-1] for call in watched.calls}) == 1 and watched.calls[0].y.ndim == 3


def _over_examples(
    effects: Float[Tensor, "batch pos C"], valid: Valid
) -> tuple[Float[Tensor, "longest C"], Float[Tensor, "longest 1"]]:
    """Sums over the examples that have a position, counted from the first that is data, and how many these are."""
    if valid is None:
        return effects.sum(0), torch.full_like(effects[0, :, :1], len(effects))
    valid, order = valid.cpu().sort(dim=1, descending=True, stable=True)
    effects = effects.gather(1, order[..., None].expand_as(effects)) * valid[..., None]
    counts = valid.sum(0)[:, None].to(effects)
    longest = int(valid.any(0).sum())
    return effects.sum(0)[:longest], counts[:longest]


def _added(some: Float[Tensor, "pos n"], more: Float[Tensor, "more_pos n"]) -> Float[Tensor, "longer n"]:
    """Their sum, the shorter one filled up with zeros."""
    total = some.new_zeros(max(len(some), len(more)), some.shape[1])
    total[: len(some)] += some
    total[: len(more)] += more
    return total


@no_grad()
def _lost(
    watched: WatchedPass, decomposition: Decomposition, metric: Callable[[Tensor], Tensor]
) -> tuple[Float[Tensor, " C"], float]:
    """The metric of the model less that without each component, and without all; summed over examples."""
    run, components = watched.run, decomposition.components

    def without(chosen: list[int]) -> Tensor:
        off = Mixture(components.picked(chosen), on=0.0, rest=1.0)
        return total(replaced_pass(run.target, run.names, off, run.inputs, run.output)[0])

    def total(output: Tensor) -> Tensor:
        return metric_scalars(metric, output).double().sum().cpu()

    model = total(watched.output)
    lost = [model - without([component]) for component in range(components.n_components)]
    return torch.stack(lost), (model - without(list(range(components.n_components)))).item()
