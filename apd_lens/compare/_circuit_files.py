"""Circuits from the files of other tools."""

import csv
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from apd_lens._errors import ApdError, ArtifactError
from apd_lens._files import user_path
from apd_lens.compare._circuits import _END, Circuit, circuit_of_edges, circuit_of_scores, edge, node


def read_circuit(path: str | Path, axes: str = "layer head", baseline: float = 0.0) -> Circuit:
    """Reads a circuit from a file, according to its ending:

    - .pt, .safetensors: a tensor of scores, with `axes` and `baseline` as in `circuit_of_scores`; a graph of EAP-IG or
      MIB; a graph of circuit-tracer. Nothing in the file is run: what is no tensor or plain data is not built.
    - .json: name -> score, of nodes or edges; a list of {"node" or "edge" or "source" and "target", "score"}; a graph
      of EAP-IG or MIB; a graph of circuit-tracer as its viewer and Neuronpedia have it.
    - .csv: with a header: node,score or edge,score or source,target,score.

    The nodes of circuit-tracer are features and errors of transcoders; those of layer 3 stand for its MLP "m3", tokens
    for "input", and an edge's score is the sum of |weight| over them.

    Raises:
        ArtifactError: no such file, or nothing in it that is known; says what was found.
    """
    path = user_path(path)
    if not path.is_file():
        raise ArtifactError(f"There is no file {path}.")
    try:
        match path.suffix:
            case ".json":
                return _of_json(json.loads(path.read_text(encoding="utf-8-sig")))
            case ".csv":
                with path.open(newline="", encoding="utf-8-sig") as file:
                    return _of_records(list(csv.DictReader(file)))
            case ".pt":
                return _of_saved(_load(path), axes, baseline)
            case ".safetensors":
                from safetensors.torch import load_file

                return _of_saved(load_file(path), axes, baseline)
    except ApdError as error:
        raise type(error)(f"{path}: {error}") from error
    except (ValueError, KeyError, TypeError, IndexError, RuntimeError) as error:
        raise ArtifactError(f"{path} cannot be read as a circuit: {type(error).__name__}: {error}") from error
    raise ArtifactError(f"Expected a file that ends in .json, .csv, .pt or .safetensors, got {path}.")


class _Record:
    """Stands in the place of any class in a saved graph; built of plain data only, and never looked at."""

    def __new__(cls, *args: Any) -> "_Record":
        return super().__new__(cls)

    def __init__(self, *args: Any):
        pass

    def __setstate__(self, state: Any) -> None:
        pass


def _load(path: Path) -> Any:
    """torch.load of tensors and plain data, with a `_Record` for everything else."""
    names = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    with torch.serialization.safe_globals([(_Record, name) for name in names]):
        return torch.load(path, map_location="cpu", weights_only=True)


def _of_saved(saved: Any, axes: str, baseline: float) -> Circuit:
    if isinstance(saved, Mapping) and len(saved) == 1:
        (only,) = saved.values()
        saved = only if isinstance(only, Tensor) else saved
    if isinstance(saved, Tensor):
        return circuit_of_scores(saved, axes, baseline)
    if isinstance(saved, Mapping) and {"adjacency_matrix", "active_features"} <= saved.keys():
        return _of_adjacency(saved)
    if isinstance(saved, Mapping) and {"src_nodes", "dst_nodes", "edges_scores"} <= saved.keys():
        return _of_eap_tensors(saved)
    found = sorted(map(str, saved)) if isinstance(saved, Mapping) else type(saved).__name__
    raise ArtifactError(
        "Expected a tensor of scores, a graph of EAP-IG (src_nodes, dst_nodes, edges_scores) or of circuit-tracer "
        f"(adjacency_matrix, active_features), got {found}."
    )


def _of_adjacency(graph: Mapping[str, Any]) -> Circuit:
    """circuit-tracer: rows are targets, columns sources, each [features, errors by layer and position, tokens,
    logits]."""
    weights, n_pos = graph["adjacency_matrix"].float().abs(), len(graph["input_tokens"])
    layers = graph["active_features"][graph["selected_features"]][:, 0].tolist()
    n_logits = len(graph["logit_probabilities"])
    n_layers, left = divmod(len(weights) - len(layers) - n_pos - n_logits, n_pos)
    if left or n_layers < 0:
        raise ArtifactError(f"The adjacency matrix of {len(weights)} nodes does not fit {len(layers)} features.")
    kinds = [f"m{int(layer)}" for layer in layers]
    kinds += [f"m{layer}" for layer in range(n_layers) for _ in range(n_pos)]
    kinds += ["input"] * n_pos + ["logits"] * n_logits
    names = sorted(set(kinds))
    member = torch.zeros(len(kinds), len(names), dtype=torch.float32, device="cpu")
    member[
        torch.arange(len(kinds), device="cpu"), torch.tensor([names.index(kind) for kind in kinds], device="cpu")
    ] = 1
    sums = member.T @ weights @ member
    edges = {
        (names[source], names[target], ""): sums[target, source].item()
        for target, source in sums.nonzero().tolist()
        if source != target
    }
    return circuit_of_edges(edges)


def _of_eap_tensors(graph: Mapping[str, Any]) -> Circuit:
    """EAP-IG and MIB: scores `source target`; targets are written a0.h0<q>."""
    edges = {}
    for source, row in zip(graph["src_nodes"], graph["edges_scores"].tolist(), strict=True):
        for target, score in zip(graph["dst_nodes"], row, strict=True):
            if score:  # 0 also where there is no edge
                edges[f"{source}->{target}"] = score
    of_nodes = {node(str(name)): 0.0 for name in graph["src_nodes"] if node(str(name)) not in _END.values()}
    circuit = circuit_of_edges(edges)
    circuit = replace(circuit, nodes={**of_nodes, **circuit.nodes})
    if "nodes_in_graph" not in graph:
        return circuit
    inside = zip(graph["src_nodes"], graph["nodes_in_graph"].tolist(), strict=True)
    chosen = frozenset(node(name) for name, is_in in inside if is_in) - {"input"}
    return replace(circuit, chosen=chosen) if chosen else circuit


def _of_json(content: Any) -> Circuit:
    if isinstance(content, list):
        return _of_records(content)
    if not isinstance(content, dict) or not content:
        raise ArtifactError(f"Expected an object or a list with something in it, got {str(content)[:80]}.")
    if isinstance(content.get("nodes"), list) and isinstance(content.get("links"), list):
        return _of_links(content)
    if isinstance(content.get("nodes"), dict) or isinstance(content.get("edges"), dict):
        return _of_graph(content.get("nodes") or {}, content.get("edges") or {})
    if all(isinstance(score, int | float) for score in content.values()):
        return _of_records([{"edge" if "->" in name else "node": name, "score": s} for name, s in content.items()])
    raise ArtifactError(
        "Expected name -> score, or 'nodes' and 'edges' with scores (EAP-IG), or 'nodes' and 'links' (circuit-tracer), "
        f"got an object with {sorted(content)[:6]}."
    )


def _of_graph(nodes: Mapping[str, Any], edges: Mapping[str, Any]) -> Circuit:
    """EAP-IG and MIB: name -> score, or {"score", "in_graph"}, or whether it is in the graph."""

    def read(given: Any) -> tuple[float | None, bool | None]:
        if isinstance(given, bool):
            return None, given
        if isinstance(given, Mapping):
            score, inside = given.get("score"), given.get("in_graph")
            return (None if score is None or math.isnan(score) else float(score)), inside
        return float(given), None

    scores = {name: read(given)[0] for name, given in edges.items()}
    circuit = circuit_of_edges({name: score for name, score in scores.items() if score is not None})
    named = {node(name): read(given) for name, given in nodes.items()}
    named = {name: given for name, given in named.items() if name not in _END.values()}
    of_nodes = {
        name: score if score is not None else circuit.nodes.get(name, float(bool(inside)))
        for name, (score, inside) in named.items()
    }
    chosen = {name for name, (_, inside) in named.items() if inside}
    if not named:
        inside = [edge(name)[:2] for name, given in edges.items() if read(given)[1]]
        chosen = {name for ends in inside for name in ends} - set(_END.values())
    return replace(circuit, nodes={**circuit.nodes, **of_nodes}, chosen=frozenset(chosen) if chosen else None)


def _of_links(graph: Mapping[str, Any]) -> Circuit:
    """circuit-tracer: nodes with "node_id", "layer" and "feature_type", links with "source", "target", "weight"."""
    kinds = {}
    for given in graph["nodes"]:
        kind = given["feature_type"]
        if kind not in ("embedding", "logit") and "transcoder" not in kind and "mlp" not in kind:
            raise ArtifactError(
                f"Node {given['node_id']!r} is a {kind!r}. Read are features and errors of transcoders of MLPs."
            )
        kinds[given["node_id"]] = {"embedding": "input", "logit": "logits"}.get(kind, f"m{given['layer']}")
    edges: dict[tuple[str, str, str], float] = {}
    for link in graph["links"]:
        ends = kinds[link["source"]], kinds[link["target"]], ""
        if ends[0] != ends[1]:
            edges[ends] = edges.get(ends, 0.0) + abs(float(link["weight"]))
    return circuit_of_edges(edges)


def _of_records(records: Sequence[Mapping[str, Any]]) -> Circuit:
    nodes: dict[str, float] = {}
    edges: dict[str, float] = {}
    for number, record in enumerate(records, 1):
        score = record.get("score", record.get("weight")) if isinstance(record, Mapping) else None
        score = None if score is None or not str(score).strip() else float(score)
        if score is None or math.isnan(score):
            raise ArtifactError(f"Entry {number} has no score: {record}. Leave out what was not scored.")
        if "edge" in record:
            edges[record["edge"]] = score
        elif "source" in record and "target" in record:
            edges[f"{record['source']}->{record['target']}"] = score
        elif "node" in record:
            nodes[node(record["node"])] = score
        else:
            raise ArtifactError(f"Entry {number} names neither a node, an edge, nor source and target: {record}.")
    if not nodes and not edges:
        raise ArtifactError("It holds neither nodes nor edges.")
    circuit = circuit_of_edges(edges)
    return replace(circuit, nodes={**circuit.nodes, **nodes})
