"""Circuits from the tensors and files of other tools.

Nodes are heads "a3.7", MLPs "m3", neurons "m3.12", matrices by their names, and "input" and "logits". Other ways to
write them ("a3.h7", "L3H7", (3, 7), "mlp_3", and those of EAP-IG, AutoCircuit and ACDC) are read as these.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import pandas as pd
from torch import Tensor

from apd_lens._errors import ArtifactError, InvalidSetting, ShapeMismatch
from apd_lens._table import Tabled
from apd_lens.compare._nodes import node_name

_HEAD = re.compile(
    r"(?:[al]|attn|head)?[_ ]?(\d+)(?:\.h?|h)(\d+)(?:[._]([qkv])|<([qkv])>)?"  # EAP-IG; AutoCircuit: "A0.1.Q"
    r"|[(\[]\s*(\d+)\s*,\s*(\d+)\s*[)\]]"  # a pair
    r"|blocks\.(\d+)\.attn\.hook_(?:result|z|([qkv])(?:_input)?)\s*\[[^\d\]]*(\d+)\]",  # ACDC
    re.IGNORECASE,
)
_MLP = re.compile(
    r"m(?:lp)?[_ ]?(\d+)(?:\.(\d+))?|blocks\.(\d+)\.hook_mlp_(?:in|out)\s*(?:\[[^\d\]]*\])?", re.IGNORECASE
)
_INPUTS = ("input", "embed", "embeds", "resid start", "hook_embed", "hook_pos_embed", "blocks.0.hook_resid_pre")
_END: dict[str, str] = {
    **dict.fromkeys(_INPUTS, "input"),
    **dict.fromkeys(("logits", "output", "resid end", "unembed"), "logits"),
}


@dataclass(frozen=True, eq=False, repr=False)
class Circuit(Tabled):
    """A circuit: nodes and edges with their scores.

    Attributes:
        nodes: name -> score, of every node that was scored.
        edges: (from, to, by) -> score; `by` is "q", "k" or "v" for an edge into one input of a head, else "".
        chosen: the nodes that belong to the circuit according to its source; None if the source only has scores.
    """

    nodes: Mapping[str, float]
    edges: Mapping[tuple[str, str, str], float]
    chosen: frozenset[str] | None = None

    def top(self, k: int) -> list[str]:
        """The k nodes of the largest |score|."""
        return sorted(self.nodes, key=lambda node: -abs(self.nodes[node]))[:k]

    def table(self, of: Literal["nodes", "edges"] = "nodes") -> pd.DataFrame:
        """One row a node, or an edge, the largest |score| first."""
        if of == "nodes":
            table = pd.DataFrame({"score": dict(self.nodes)}).rename_axis("node")
            if self.chosen is not None:
                table["in circuit"] = [node in self.chosen for node in table.index]
        else:
            columns = ["from", "to", "by", "score"]
            table = pd.DataFrame([(*edge, score) for edge, score in self.edges.items()], columns=columns)
        return table.sort_values("score", key=abs, ascending=False, kind="stable")


def node(name: str | Sequence[int]) -> str:
    """A node's name as it is written here.

    >>> [node(name) for name in ("a3.h7", "L3H7", (3, 7), "mlp_2", "m2.11", "embed", "blocks.0.attn.W_Q")]
    ['a3.7', 'a3.7', 'a3.7', 'm2', 'm2.11', 'input', 'blocks.0.attn.W_Q']

    Raises:
        InvalidSetting: neither a name nor a pair of layer and head.
    """
    return _node_and_input(name)[0]


def _node_and_input(name: str | Sequence[int]) -> tuple[str, str]:
    """A node's name as it is written here, and which input of a head is meant: "q", "k", "v", or ""."""
    if not isinstance(name, str):
        if not isinstance(name, Sequence) or len(name) != 2:
            raise InvalidSetting(f"Expected a node's name such as 'a3.7' or 'm3', or (layer, head), got {name!r}.")
        name = f"({name[0]}, {name[1]})"
    name = name.strip()
    if (end := _END.get(name.lower().removesuffix("[:]"))) is not None:
        return end, ""
    if head := _HEAD.fullmatch(name):
        layer, unit = head[1] or head[5] or head[7], head[2] or head[6] or head[9]
        return f"a{int(layer)}.{int(unit)}", (head[3] or head[4] or head[8] or "").lower()
    if mlp := _MLP.fullmatch(name):
        return f"m{int(mlp[1] or mlp[3])}" + ("" if mlp[2] is None else f".{int(mlp[2])}"), ""
    return name, ""


def edge(name: str) -> tuple[str, str, str]:
    """From, to, and by which input of a head.

    >>> edge("input->a0.h0<q>"), edge("a0.1->m2"), edge("MLP 0->A1.3.K")
    (('input', 'a0.0', 'q'), ('a0.1', 'm2', ''), ('m0', 'a1.3', 'k'))
    """
    start, arrow, end = name.partition("->")
    if not (start.strip() and arrow and end.strip()):
        raise ArtifactError(f"Expected an edge such as 'a0.1->m2' or 'input->a0.0<q>', got {name!r}.")
    return node(start), *_node_and_input(end)


def circuit_of_scores(scores: Tensor, axes: str = "layer head", baseline: float = 0.0) -> Circuit:
    """Makes a circuit from a tensor of scores, such as one of `transformer_lens.patching` or attribution patching.

    If there are positions, a node's score is the one with the largest absolute value over them.

    Args:
        scores: one number for each patch.
        axes: what its axes are: "layer" and "head" ("layer pos head", "layer head dest_pos src_pos"), "layer" and
            "neuron", or "mlp" for the layers of MLPs ("mlp pos" for what `get_act_patch_mlp_out` gives); all others are
            positions.
        baseline: subtracted from the scores. Patching gives the metric, so this is the metric of the run that was
            patched into.

    Raises:
        ShapeMismatch: axes do not fit the tensor.
        InvalidSetting: axes name neither heads, MLPs nor neurons.
    """
    names = axes.split()
    if len(names) != scores.ndim or len(set(names)) != len(names):
        raise ShapeMismatch(f"Expected a tensor with the axes {axes!r}, got one of shape {tuple(scores.shape)}.")
    kept = next((kept for kept in (["layer", "head"], ["layer", "neuron"], ["mlp"]) if set(kept) <= set(names)), None)
    if kept is None:
        raise InvalidSetting(f"axes must name 'layer' and 'head', 'layer' and 'neuron', or 'mlp', got {axes!r}.")
    rest = [name for name in names if name not in kept]
    flat = scores.detach().double().cpu().permute([names.index(name) for name in (*kept, *rest)]) - baseline
    flat = flat.reshape(*flat.shape[: len(kept)], -1)
    flat = flat.gather(-1, flat.abs().argmax(-1, keepdim=True))[..., 0]
    if kept == ["mlp"]:
        return Circuit({f"m{layer}": score for layer, score in enumerate(flat.tolist())}, {})
    level = "head" if kept[1] == "head" else "neuron"
    return Circuit(
        {
            node_name(level, layer, unit): score
            for layer, of_layer in enumerate(flat.tolist())
            for unit, score in enumerate(of_layer)
        },
        {},
    )


def circuit_of_edges(edges: Mapping[str, float] | Mapping[tuple[str, str, str], float]) -> Circuit:
    """A circuit of edges with scores; a node's score is the largest |score| of its edges. "input" and "logits" have
    none.

    >>> circuit_of_edges({"input->a0.h0<q>": 0.5, "a0.h0->logits": -2.0}).nodes
    {'a0.0': 2.0}
    """
    split = {edge(name) if isinstance(name, str) else name: float(score) for name, score in edges.items()}
    nodes: dict[str, float] = {}
    for (start, end, _), score in split.items():
        for name in (start, end):
            if name not in _END.values():
                nodes[name] = max(nodes.get(name, 0.0), abs(score))
    return Circuit(nodes, split)
