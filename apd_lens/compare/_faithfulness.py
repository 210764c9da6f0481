"""How much of a metric a few components, heads or neurons keep, and whether the rest is really inactive.

A unit u that is on to the share γ_u runs as γ_u of itself. With components that is Σ_c γ_c P_c; a head's or a neuron's
activation z becomes γ z + (1 − γ) z₀ with z₀ zero or its mean, in front of the matrix that reads it (W_O, W_out).
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from apd_lens._block import no_inference_mode
from apd_lens._errors import InvalidSetting, ShapeMismatch
from apd_lens._table import Printed, as_table
from apd_lens.attribution._metric import Metric
from apd_lens.compare._gates import _Gates, component_gates, unit_gates
from apd_lens.data._batch import Batch
from apd_lens.data._stream import one_pass
from apd_lens.decomposition._decomposition import Decomposition
from apd_lens.host._matrix import Units
from apd_lens.masks._adversary import ascend, harder

UnitKind = Literal["component", "head", "neuron"]
# Of all units, MIB's sizes of circuits.
_SHARES = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5)

# How much each unit matters: `units` for all data, or a function of the batch -> `batch units` or `batch pos units`.
Scores = Float[Tensor, " units"] | Callable[[Batch], Tensor]


@dataclass(frozen=True, eq=False, repr=False)
class FaithfulnessCurve(Printed):
    """The part of a metric that comes back with some units kept: f = (m(kept) − m(none)) / (m(model) − m(none)).

    Attributes:
        unit: what is kept: components, heads or neurons.
        names: names of the units: component indices, heads "a3.7", neurons "m3.12".
        kept: numbers of units.
        own: f with the rest off.
        random: f with each unit of the rest at γ ~ U[0, 1] on its own; mean over draws.
        worst: f with each unit of the rest where it does most harm in [0, 1]. It is found by projected gradient for
            each example, so the true worst may be lower; never above the other two.
        shuffled: the null: `own` with the units in random order; mean over draws.
        model, none: the metric of the model as it is, and with all units off; means over examples.
    """

    unit: UnitKind
    names: list[str]
    kept: Int[Tensor, " sizes"]
    own: Float[Tensor, " sizes"]
    random: Float[Tensor, " sizes"]
    worst: Float[Tensor, " sizes"]
    shuffled: Float[Tensor, " sizes"]
    model: float
    none: float

    def curves(self) -> dict[str, Float[Tensor, " sizes"]]:
        """The three maskings and the null, by name."""
        return {"own": self.own, "random": self.random, "worst": self.worst, "shuffled": self.shuffled}

    def areas(self) -> pd.DataFrame:
        """CPR and CMD of each masking, see `cpr` and `cmd`."""
        share = self.kept / len(self.names)
        rows = {name: {"CPR": cpr(share, f), "CMD": cmd(share, f)} for name, f in self.curves().items()}
        return pd.DataFrame.from_dict(rows, orient="index").rename_axis("masking")

    def table(self) -> pd.DataFrame:
        """One row for each number of units kept."""
        curves = {name: curve.numpy() for name, curve in self.curves().items()}
        return pd.DataFrame({f"{self.unit}s kept": self.kept.numpy(), **curves}).set_index(f"{self.unit}s kept")

    def _parts(self) -> list[str]:
        head = f"{self.unit}s kept, of {len(self.names)}; metric {self.model:.4g} of the model, {self.none:.4g} of none"
        return [head, as_table(self.table()), as_table(self.areas())]


def cpr(share: Float[Tensor, " sizes"], f: Float[Tensor, " sizes"]) -> float:
    """Circuit performance ratio: ∫ f over the share of units kept, by the trapezoid rule; larger is better.

    Source: MIB, Mueller et al. 2025, arXiv 2504.13151, which integrates from 0.1 % of the edges to all.

    >>> cpr(torch.tensor([0.0, 0.5, 1.0]), torch.tensor([0.0, 1.0, 1.0]))
    0.75
    """
    return torch.trapezoid(f, share).item()


def cmd(share: Float[Tensor, " sizes"], f: Float[Tensor, " sizes"]) -> float:
    """Circuit-model distance: ∫ |1 − f| over the share of units kept, by the trapezoid rule; 0 is perfect.

    Unlike `cpr` it does not reward a metric above the model's. Source as there.

    >>> cmd(torch.tensor([0.0, 0.5, 1.0]), torch.tensor([0.0, 1.5, 1.0]))
    0.5
    """
    return torch.trapezoid((1 - f).abs(), share).item()


@no_inference_mode()
def faithfulness_curve(
    decomposition: Decomposition,
    batches: Iterable[Batch],
    metric: Metric,
    *,
    unit: UnitKind = "component",
    scores: Scores | None = None,
    sizes: Sequence[int] | None = None,
    ablation: Literal["zero", "mean"] = "zero",
    units: Mapping[str, Units] | None = None,
    n_draws: int = 4,
    ascent_steps: int = 10,
    seed: int = 0,
) -> FaithfulnessCurve:
    """Metric recovered against the number of components, heads or neurons kept, under three maskings; see
    `FaithfulnessCurve`.

    Args:
        batches: a list of batches or another iterable that can be gone through again.
        metric: the explained output -> one scalar an example, `batch`, such as a logit difference; or (output, batch)
            -> that.
        unit: components of the decomposition, or heads or neurons of the model (of all its layers, decomposed or not).
        scores: the largest are kept first: `units`, or a function of the batch that gives them for each example (or
            position, where the model has positions). Default: the mean over the batches of |attribution to the metric|;
            for heads and neurons that is |∂m/∂γ|, attribution patching.
        sizes: numbers of units kept. Default: 0, all, and about nine between them at MIB's shares, 0.1 % to 50 %, or
            all numbers where there are few.
        ablation: where heads and neurons go: to zero, or to their mean over all real positions of the batches.
        units: where heads or neurons are, if the adapter cannot know; as in `weight_map`.
        n_draws: random γ, and random orders, for each size.
        ascent_steps: steps of signed gradient for the worst case, of size 2.5 / ascent_steps.

    Raises:
        InvalidSetting: the metric is the same with all units off; sizes out of range; no draws or steps.
        UnsupportedModel: no heads or neurons are known.
        ShapeMismatch: the metric does not give one scalar an example, or scores are not one a unit.
        InvalidBatches: no batches.
    """
    if unit == "component":
        gates = component_gates(decomposition)
    else:
        gates = unit_gates(decomposition, unit, units, batches if ablation == "mean" else None)
    n_units = len(gates.names)
    sizes = default_sizes(n_units) if sizes is None else list(sizes)
    if not sizes or min(sizes) < 0 or max(sizes) > n_units:
        raise InvalidSetting(f"sizes must be numbers of {unit}s between 0 and {n_units}, got {sizes}.")
    if n_draws < 1 or ascent_steps < 1:
        raise InvalidSetting(f"Expected n_draws and ascent_steps of at least 1, got {n_draws} and {ascent_steps}.")
    totals = {
        name: torch.zeros(len(sizes), dtype=torch.float64, device="cpu")
        for name in ("own", "random", "worst", "shuffled")
    }
    model, none, mean_scores = _whole(gates, batches, metric, scores is None)
    if model == none:
        raise InvalidSetting(
            f"The metric is {model:.4g} with all {n_units} {unit}s on and with all off, so there is nothing to recover."
        )
    sign = 1.0 if model > none else -1.0
    generator = torch.Generator().manual_seed(seed)
    shuffles = [torch.rand(n_units, generator=generator, dtype=torch.float32, device="cpu") for _ in range(n_draws)]
    n_data = 0
    for batch in one_pass(batches):
        inputs = gates.read(batch)
        given = mean_scores if scores is None else scores(batch) if callable(scores) else scores
        order = _order(given, inputs.n_examples, n_units, gates.device)
        shuffled = [_order(shuffle, inputs.n_examples, n_units, gates.device) for shuffle in shuffles]
        metric_under = partial(gates.metric, inputs, metric)
        for index, size in enumerate(sizes):
            own, random, worst = _three_maskings(
                metric_under, _first(order, size), sign, n_draws, ascent_steps, generator
            )
            with torch.no_grad():
                nulls = [metric_under(_first(order, size)) for order in shuffled]
            values = {"own": own, "random": random, "worst": worst, "shuffled": torch.stack(nulls).mean(0)}
            for name, value in values.items():
                totals[name][index] += value.double().sum().cpu()
        n_data += inputs.n_examples
    recovered = {name: ((total / n_data - none) / (model - none)).float() for name, total in totals.items()}
    return FaithfulnessCurve(unit, gates.names, torch.tensor(sizes, device="cpu"), **recovered, model=model, none=none)


def default_sizes(n_units: int) -> list[int]:
    """0, all, and MIB's shares of the units between; all numbers up to 12."""
    if n_units <= 12:
        return list(range(n_units + 1))
    return sorted({0, n_units} | {round(share * n_units) for share in _SHARES})


def _three_maskings(
    metric_under: Callable[[Tensor], Tensor],
    kept: Float[Tensor, "batch *pos units"],
    sign: float,
    n_draws: int,
    ascent_steps: int,
    generator: torch.Generator,
) -> tuple[Float[Tensor, " batch"], Float[Tensor, " batch"], Float[Tensor, " batch"]]:
    """The metric with the rest off, on at random (mean over draws), and where it does most harm.

    Args:
        sign: of the model's metric over that of nothing; harm is what brings the metric the other way.
    """

    def harm(gamma: Tensor) -> Tensor:
        return -sign * metric_under(gamma)

    with torch.no_grad():
        if bool(kept.all()):
            alone = metric_under(kept)
            return alone, alone, alone
        hardest, largest = kept, harm(kept)
        own, draws = largest, []
        for _ in range(n_draws):
            gamma = torch.maximum(
                kept, torch.rand(kept.shape, generator=generator, dtype=torch.float32, device="cpu").to(kept)
            )
            draws.append(harm(gamma))
            hardest, largest = harder(hardest, largest, gamma, draws[-1])
    _, largest = ascend(harm, hardest, largest, kept, 2.5 / ascent_steps, ascent_steps)
    return -sign * own, -sign * torch.stack(draws).mean(0), -sign * largest


def _order(scores: Tensor, n: int, n_units: int, device: torch.device) -> Int[Tensor, "batch *pos units"]:
    """Units by their scores, the largest first."""
    if scores.shape[-1] != n_units or (scores.ndim > 1 and len(scores) != n):
        raise ShapeMismatch(
            f"Expected scores of shape ({n_units},), ({n}, {n_units}) or ({n}, pos, {n_units}), one for each unit, got "
            f"{tuple(scores.shape)}."
        )
    order = scores.detach().to(device).argsort(dim=-1, descending=True, stable=True)
    return order.expand(n, -1) if order.ndim == 1 else order


def _first(order: Int[Tensor, "batch *pos units"], size: int) -> Float[Tensor, "batch *pos units"]:
    """1 for the first units of the order, 0 for the rest."""
    return torch.zeros(order.shape, device=order.device, dtype=torch.float32).scatter_(-1, order[..., :size], 1.0)


def _whole(gates: "_Gates", batches: Iterable[Batch], metric: Metric, score: bool) -> tuple[float, float, Tensor]:
    """The metric with all units on, as the model is, and with all off; and how much each unit matters, if asked."""
    model, none, n_data = 0.0, 0.0, 0
    scores = torch.zeros(len(gates.names), device=gates.device, dtype=torch.float32)
    for batch in one_pass(batches):
        inputs = gates.read(batch)
        n = inputs.n_examples
        off = torch.zeros(n, len(gates.names), device=gates.device, dtype=torch.float32)
        with torch.no_grad():
            model += gates.metric(inputs, metric, None).double().sum().item()
            none += gates.metric(inputs, metric, off).double().sum().item()
        if score:
            scores += gates.attributions(inputs, metric).abs().sum(0)
        n_data += n
    return model / n_data, none / n_data, scores / n_data
