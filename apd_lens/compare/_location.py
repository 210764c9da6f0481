"""Components beside a known circuit: whether scored nodes agree with it, and whether the components that matter lie in
it."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import pandas as pd
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from apd_lens._errors import InvalidSetting
from apd_lens._table import Printed, as_table
from apd_lens.attribution._metric import Metric, metric_on
from apd_lens.compare._architecture import weight_map
from apd_lens.compare._attribution_map import attribution_map
from apd_lens.compare._circuits import Circuit, node
from apd_lens.compare._nodes import Level
from apd_lens.components._components import ParameterComponents
from apd_lens.components._measures import random_components
from apd_lens.data._batch import Batch
from apd_lens.data._points import without_padding
from apd_lens.data._stream import one_pass
from apd_lens.decomposition._decomposition import Decomposition, check_fits
from apd_lens.host._matrix import Units
from apd_lens.metrics._auroc import mean_ranks, share_above


@dataclass(frozen=True, eq=False, repr=False)
class Overlap(Printed):
    """How well the nodes with the largest scores agree with a known circuit.

    Attributes:
        nodes: all that were scored.
        scores: of the nodes.
        known: which belong to the circuit.
        found: the nodes of the largest |score|.
        measures: precision, recall and IoU of `found`, AUROC of the scores' sizes (ties count half).
        null: the same measures with the scores permuted over the nodes, one entry for each draw.
    """

    nodes: list[str]
    scores: Float[Tensor, " nodes"]
    known: Bool[Tensor, " nodes"]
    found: Bool[Tensor, " nodes"]
    measures: Mapping[str, float]
    null: Mapping[str, Float[Tensor, " draws"]]

    def table(self) -> pd.DataFrame:
        """One row for each measure, beside its null; p is the share of draws that are at least as good."""
        rows = {
            name: {
                "value": value,
                "null mean": self.null[name].mean().item(),
                "null 95 %": self.null[name].quantile(0.95).item(),
                "p": (1 + int((self.null[name] >= value - 1e-9).sum())) / (1 + len(self.null[name])),
            }
            for name, value in self.measures.items()
        }
        return pd.DataFrame.from_dict(rows, orient="index").rename_axis("measure")

    def _parts(self) -> list[str]:
        found = [name for name, is_found in zip(self.nodes, self.found.tolist(), strict=True) if is_found]
        known = [name for name, is_known in zip(self.nodes, self.known.tolist(), strict=True) if is_known]
        return [f"found {', '.join(found)}; known {', '.join(known)}; of {len(self.nodes)}", as_table(self.table())]


def overlap(
    scores: Mapping[str, float] | Circuit,
    known: Iterable[str | Sequence[int]] | Circuit,
    k: int | None = None,
    *,
    n_null: int = 1000,
    seed: int = 0,
) -> Overlap:
    """Precision, recall, IoU and AUROC of scored nodes against a known circuit, beside those of random scores.

    Args:
        scores: of every node that could be in the circuit; those of a circuit, or of `Location.node_scores`.
        known: the circuit's nodes, or a `Circuit` with chosen nodes.
        k: number of nodes that count as found; default as many as are known.

    Raises:
        InvalidSetting: none or all of the scored nodes are known, or a known one has no score; a circuit without
            chosen nodes; k out of range.
    """
    given = dict(scores.nodes if isinstance(scores, Circuit) else scores)
    given = {node(name): score for name, score in given.items()}
    of_circuit = _chosen(known)
    missing = sorted(of_circuit - given.keys())
    if missing or not 0 < len(of_circuit) < len(given):
        scored = ", ".join(list(given)[:6]) + (", ..." if len(given) > 6 else "")
        raise InvalidSetting(
            f"Expected a circuit of some of the {len(given)} nodes that have scores ({scored}), got "
            f"{sorted(of_circuit)[:12]}" + (f"; without a score: {missing[:12]}." if missing else ".")
        )
    k = len(of_circuit) if k is None else k
    if not 0 < k <= len(given):
        raise InvalidSetting(f"k must be between 1 and {len(given)}, the number of nodes, got {k}.")
    nodes = list(given)
    is_known = torch.tensor([name in of_circuit for name in nodes], device="cpu")
    sizes = torch.tensor([abs(given[name]) for name in nodes], dtype=torch.float64, device="cpu")
    order = sizes.argsort(dim=0, descending=True, stable=True)
    found = torch.zeros(len(nodes), dtype=torch.bool, device="cpu").index_fill_(0, order[:k], True)
    ranks = mean_ranks(sizes)
    return Overlap(
        nodes=nodes,
        scores=torch.tensor([float(given[name]) for name in nodes], dtype=torch.float32, device="cpu"),
        known=is_known,
        found=found,
        measures={name: value.item() for name, value in _measures(found, ranks, is_known).items()},
        null=_measures(found, ranks, _random_sets(is_known, n_null, seed)),
    )


def _chosen(known: Iterable[str | Sequence[int]] | Circuit) -> set[str]:
    if not isinstance(known, Circuit):
        return {node(name) for name in known}
    if known.chosen is None:
        raise InvalidSetting("The known circuit has scores only. Say how many of its nodes count: circuit.top(k).")
    return set(known.chosen)


def _random_sets(known: Bool[Tensor, " nodes"], n: int, seed: int) -> Bool[Tensor, "n nodes"]:
    """n random sets of as many nodes."""
    drawn = torch.rand(
        n, len(known), generator=torch.Generator().manual_seed(seed), dtype=torch.float32, device="cpu"
    ).argsort(dim=1)
    return torch.zeros(n, len(known), dtype=torch.bool, device="cpu").scatter_(1, drawn[:, : int(known.sum())], True)


def _measures(
    found: Bool[Tensor, " nodes"], ranks: Float[Tensor, " nodes"], known: Bool[Tensor, "*sets nodes"]
) -> dict[str, Float[Tensor, "*sets"]]:
    both, n_known, n_found = (found & known).sum(-1).double(), known.sum(-1), found.sum()
    return {
        "precision": both / n_found,
        "recall": both / n_known,
        "IoU": both / (n_found + n_known - both),
        "AUROC": share_above(ranks, known),
    }


@dataclass(frozen=True, eq=False, repr=False)
class Location(Printed):
    """Whether the components that matter lie in the nodes of a known circuit.

    Attributes:
        nodes: all nodes of the level.
        known: which belong to the circuit.
        importance: mean over data points of |attribution|, of each component.
        top: the components that matter.
        weight, attribution: share of each component's weight, and of its attribution, that lies in each node, of what
            lies in nodes of this level; rows sum to 1.
        weight_of_model: share of ‖W‖² of the decomposed matrices that lies in each node.
        null_shares: the weight's and the attribution's share in the circuit, of the components that matter among random
            ones with the same singular values; one row a draw.
    """

    nodes: list[str]
    known: Bool[Tensor, " nodes"]
    importance: Float[Tensor, " C"]
    top: list[int]
    weight: Float[Tensor, "C nodes"]
    attribution: Float[Tensor, "C nodes"]
    weight_of_model: Float[Tensor, " nodes"]
    null_shares: Float[Tensor, "draws 2"]

    def shares(self) -> tuple[float, float]:
        """Share of weight and of attribution of `top` in the circuit, mean weighted by importance."""
        weight, attribution = self._by_node()[:, self.known].sum(1).tolist()
        return weight, attribution

    def _by_node(self) -> Float[Tensor, "2 nodes"]:
        """Shares of weight and of attribution of `top` in each node, mean weighted by importance."""
        weights = self.importance[self.top]
        weights = weights / weights.sum().clamp_min(torch.finfo(weights.dtype).tiny)
        return torch.stack([weights @ self.weight[self.top], weights @ self.attribution[self.top]])

    def node_scores(self) -> dict[str, float]:
        """Σ over `top` of importance times the share of the attribution that lies in the node."""
        scores = self.importance[self.top] @ self.attribution[self.top]
        return dict(zip(self.nodes, scores.tolist(), strict=True))

    def overlap(self, k: int | None = None) -> Overlap:
        """The nodes in which the components that matter have their effect, against the circuit; see `overlap`."""
        return overlap(self.node_scores(), [n for n, known in zip(self.nodes, self.known, strict=True) if known], k)

    def table(self) -> pd.DataFrame:
        """One row a component that matters, the most important first."""
        rows = [
            {
                "component": c,
                "importance": self.importance[c].item(),
                "weight in circuit": self.weight[c, self.known].sum().item(),
                "attribution in circuit": self.attribution[c, self.known].sum().item(),
                "largest by weight": self.nodes[int(self.weight[c].argmax())],
                "largest by attribution": self.nodes[int(self.attribution[c].argmax())],
            }
            for c in self.top
        ]
        return pd.DataFrame(rows).set_index("component")

    def nulls(self) -> pd.DataFrame:
        """Shares in the circuit: of the components that matter, and what they would be by chance. One row a case."""
        sets = _random_sets(self.known, 1000, seed=0)
        draws = {
            f"{len(self.null_shares)} sets of random components": self.null_shares,
            "other sets of as many nodes": sets[(sets != self.known).any(1)].float() @ self._by_node().T,
        }
        alike = torch.stack([self.weight, self.attribution])[:, :, self.known].sum(2).mean(1)
        rows = {
            "components that matter": list(self.shares()),
            "all components alike": alike.tolist(),
            "the model's weights": [self.weight_of_model[self.known].sum().item(), math.nan],
        }
        for name, shares in draws.items():
            if len(shares):
                rows[f"{name}, mean"] = shares.mean(0).tolist()
                rows[f"{name}, largest"] = shares.max(0).values.tolist()
        columns = ["weight in circuit", "attribution in circuit"]
        return pd.DataFrame.from_dict(rows, orient="index", columns=columns).rename_axis("shares of")

    def _parts(self) -> list[str]:
        known = ", ".join(name for name, is_known in zip(self.nodes, self.known.tolist(), strict=True) if is_known)
        head = f"{len(self.top)} of {len(self.importance)} components matter; circuit: {known}, of {len(self.nodes)}"
        return [head, as_table(self.table()), "", as_table(self.nulls()), "", *self.overlap()._parts()]


def locate(
    decomposition: Decomposition,
    batches: Iterable[Batch],
    known: Iterable[str | Sequence[int]] | Circuit,
    metric: Metric | None = None,
    *,
    top: int | None = None,
    level: Level = "head",
    units: Mapping[str, Units] | None = None,
    n_null: int = 5,
    seed: int = 0,
) -> Location:
    """Tests whether the components that matter lie in the nodes of a known circuit. `print` shows the answer and its
    nulls.

    Args:
        batches: a list of batches or another iterable that can be gone through again.
        known: the circuit's nodes, such as ["a0.3", "a1.6"].
        metric: the scalar for which components matter, output -> `batch` or (output, batch) -> `batch`; default all
            outputs.
        top: number of components that count as mattering; default the fewest with 90 % of the importance.
        level: what the nodes are.
        units: as in `weight_map`.
        n_null: number of sets of random components. Each is measured in the same way and costs as much as the whole.

    Raises:
        InvalidSetting: a known node is none of the model's, or not decomposed; top out of range.
        ApdError: what `attribution_map` raises.
    """
    weight = weight_map(decomposition, units)
    nodes, of_nodes = weight.nodes(level), weight.amounts(level)
    of_circuit = _chosen(known)
    if not of_circuit or not of_circuit <= set(nodes):
        raise InvalidSetting(
            f"Expected a circuit of {level}s among those of the decomposed matrices ({', '.join(nodes[:12])}"
            f"{', ...' if len(nodes) > 12 else ''}), got {sorted(of_circuit)[:12]}. Of a circuit with nodes of several "
            "kinds give those of one: [node for node in circuit.chosen if node.startswith('a')]."
        )
    is_known = torch.tensor([name in of_circuit for name in nodes], device="cpu")
    importance, chosen, attribution = _what_matters(decomposition, batches, metric, top, level, units)
    location = Location(
        nodes=nodes,
        known=is_known,
        importance=importance,
        top=chosen,
        weight=_rows(of_nodes),
        attribution=attribution,
        weight_of_model=_rows(weight_map(_model_as_component(decomposition), units).amounts(level))[0],
        null_shares=torch.zeros(0, 2, dtype=torch.float32, device="cpu"),
    )
    shares = []
    for draw in range(n_null):
        other = replace(decomposition, components=random_components(decomposition.components, seed + draw))
        importance, chosen, attribution = _what_matters(other, batches, metric, top, level, units)
        null = replace(
            location,
            importance=importance,
            top=chosen,
            weight=_rows(weight_map(other, units).amounts(level)),
            attribution=attribution,
        )
        shares.append(null.shares())
    return replace(location, null_shares=torch.tensor(shares, dtype=torch.float32, device="cpu").reshape(-1, 2))


def _what_matters(
    decomposition: Decomposition,
    batches: Iterable[Batch],
    metric: Metric | None,
    top: int | None,
    level: Level,
    units: Mapping[str, Units] | None,
) -> tuple[Float[Tensor, " C"], list[int], Float[Tensor, "C nodes"]]:
    """Importance, the components that matter, and the shares of their attribution."""
    total, n_data = torch.zeros(decomposition.components.n_components, dtype=torch.float64, device="cpu"), 0
    for batch in one_pass(batches):
        inputs = decomposition.read(batch)
        attributions = decomposition.attributions(inputs, None if metric is None else metric_on(metric, inputs.batch))
        sizes = without_padding(attributions, inputs.valid).abs().flatten(0, -2)
        total += sizes.double().sum(0).cpu()
        n_data += len(sizes)
    importance = (total / n_data).float()
    order = importance.argsort(dim=0, descending=True, stable=True)
    if top is None:
        held = importance[order].cumsum(0) / importance.sum()
        top = min(len(order), int((held < 0.9).sum()) + 1)
    if not 0 < top <= len(order):
        raise InvalidSetting(f"top must be between 1 and the {len(order)} components, got {top}.")
    shares = _rows(attribution_map(decomposition, batches, metric, units).amounts(level))
    return importance, order[:top].tolist(), shares


def _model_as_component(decomposition: Decomposition) -> Decomposition:
    """The weights themselves as the one component."""
    check_fits(decomposition)
    A = {name: decomposition.target.weights[name].value()[None] for name in decomposition.components.names}
    A = {name: value.to(decomposition.components.A[name].dtype) for name, value in A.items()}
    B = {name: torch.eye(value.shape[2], dtype=value.dtype, device=value.device)[None] for name, value in A.items()}
    return replace(decomposition, components=ParameterComponents(A, B))


def _rows(amounts: Float[Tensor, "C nodes"]) -> Float[Tensor, "C nodes"]:
    """Scaled to sum to 1, on the CPU."""
    amounts = amounts.detach().float().cpu()
    return amounts / amounts.sum(1, keepdim=True).clamp_min(torch.finfo(amounts.dtype).tiny)
