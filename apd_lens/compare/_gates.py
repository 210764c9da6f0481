"""Components, heads or neurons that are scaled between off and on."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from apd_lens._block import no_grad
from apd_lens._errors import UnsupportedModel
from apd_lens.attribution._metric import Metric, metric_on, metric_scalars
from apd_lens.compare._nodes import layer_of, node_name, unit_numbers, units_by_name
from apd_lens.data._batch import Batch
from apd_lens.data._inputs import Inputs, check_finite
from apd_lens.data._points import without_padding
from apd_lens.data._stream import one_pass
from apd_lens.decomposition._decomposition import Decomposition, output_function
from apd_lens.host._adapter import Intercept
from apd_lens.host._bypass import as_it_is
from apd_lens.host._matrix import Units, Use
from apd_lens.host._target import TargetModel, evaluating
from apd_lens.passes._output import OutputFn
from apd_lens.passes._replace import Mixture
from apd_lens.passes._watch import replaced_pass


@dataclass(frozen=True, eq=False)
class _Gates:
    """Units of a model that can be on to a share γ.

    Attributes:
        names: of the units.
        matrices: whose uses are replaced.
        replaced: γ -> what stands in their place.
    """

    target: TargetModel
    output: OutputFn
    device: torch.device
    names: list[str]
    matrices: list[str]
    replaced: Callable[[Tensor], Intercept]

    def read(self, batch: Batch) -> Inputs:
        """What the model is called with, on its device."""
        inputs = self.target.read(batch, self.device)
        check_finite(inputs, "faithfulness_curve")
        return inputs

    def metric(self, inputs: Inputs, metric: Metric, gamma: Tensor | None) -> Float[Tensor, " batch"]:
        """The metric of each example with the units on to γ; None for the model as it is."""
        replaced = as_it_is if gamma is None else self.replaced(gamma)
        with evaluating(self.target.model):
            output, _ = replaced_pass(self.target, self.matrices, replaced, inputs, self.output)
        return metric_scalars(metric_on(metric, inputs.batch), output)

    def attributions(self, inputs: Inputs, metric: Metric) -> Float[Tensor, "batch units"]:
        """∂metric/∂γ with all units on."""
        with torch.enable_grad():
            gamma = torch.ones(
                inputs.n_examples, len(self.names), device=self.device, requires_grad=True, dtype=torch.float32
            )
            return torch.autograd.grad(self.metric(inputs, metric, gamma).sum(), gamma)[0]


def component_gates(decomposition: Decomposition) -> _Gates:
    components = decomposition.components
    return _Gates(
        target=decomposition.target,
        output=output_function(decomposition),
        device=next(components.parameters()).device,
        names=[str(component) for component in range(components.n_components)],
        matrices=components.names,
        replaced=lambda gamma: Mixture(components, gamma),
    )


def unit_gates(
    decomposition: Decomposition,
    kind: Literal["head", "neuron"],
    given: Mapping[str, Units] | None,
    mean_over: Iterable[Batch] | None,
) -> _Gates:
    """Of heads or neurons, in front of every matrix whose rows they are; decomposed or not."""
    target = decomposition.target.with_biases(False) if decomposition.target.biases else decomposition.target
    known = units_by_name(target, list(target.weights), given)
    read_by = {
        name: units for name, units in known.items() if units is not None and (units.kind, units.side) == (kind, "in")
    }
    if not read_by:
        raise UnsupportedModel(
            f"No matrix of this {type(target.model).__name__} is known to read {kind}s. Those of a transformer_lens "
            "model are known, and of a Hugging Face model whose config says them; for others say where they are with "
            f"units={{pattern: apd_lens.host.Units({kind!r}, 'in', n)}}."
        )
    names: list[str] = []
    places: dict[str, Tensor] = {}  # of each row of the matrix, the number of its unit among all
    device = next(decomposition.components.parameters()).device
    for name, units in read_by.items():
        places[name] = (len(names) + unit_numbers(units, target.weights[name].d_in)).to(device)
        names += [node_name(kind, layer_of(name), unit) for unit in range(units.number)]
    gates = _Gates(target, output_function(decomposition), device, names, list(read_by), lambda gamma: as_it_is)
    where = _means(gates, mean_over) if mean_over is not None else {}
    weights = {name: target.weights[name].value() for name in read_by}

    def replaced(gamma: Float[Tensor, "batch *pos units"]) -> Intercept:
        def gate(use: Use, x: Tensor, original: Callable[[], Tensor], bias: Tensor | None) -> Tensor:
            off = (1 - gamma)[..., places[use.matrix][use.rows]]
            off = off if off.ndim == x.ndim else off.unflatten(0, (-1, *[1] * (x.ndim - off.ndim)))
            away = where[use.matrix][use.rows] - x if where else -x
            y = original()
            return y + ((off * away).to(x.dtype) @ weights[use.matrix][use.rows, use.columns]).to(y.dtype)

        return gate

    return replace(gates, replaced=replaced)


@no_grad()
def _means(gates: _Gates, batches: Iterable[Batch]) -> dict[str, Float[Tensor, " d_in"]]:
    """Mean of what each matrix reads, over all real positions."""
    sums = {
        name: torch.zeros(gates.target.weights[name].d_in, device=gates.device, dtype=torch.float32)
        for name in gates.matrices
    }
    counts = {name: torch.zeros_like(some) for name, some in sums.items()}

    for batch in one_pass(batches):
        inputs = gates.read(batch)
        valid = inputs.valid

        def watch(use: Use, x: Tensor, original: Callable[[], Tensor], bias: Tensor | None) -> Tensor:
            rows = without_padding(x, valid).reshape(-1, x.shape[-1])  # noqa: B023
            sums[use.matrix][use.rows] += rows.float().sum(0)
            counts[use.matrix][use.rows] += len(rows)
            return original()

        with evaluating(gates.target.model):
            replaced_pass(gates.target, gates.matrices, watch, inputs, gates.output)
    return {name: sums[name] / counts[name] for name in sums}
