"""Circuits in the files that other tools write."""

import json
from dataclasses import dataclass

import pytest
import torch
from safetensors.torch import save_file

import apd_lens as apd
from apd_lens import compare

EDGES = {"input->a0.h0<q>": 0.5, "a0.h0->m1": -2.0, "m1->logits": 1.0, "a0.h1->logits": 0.1}


NODES = {"a0.0": 2.0, "m1": 2.0, "a0.1": 0.1}


def eap_graph() -> dict:
    nodes = {"input": True, "a0.h0": True, "a0.h1": False, "m1": True, "logits": True}
    return {
        "cfg": {"n_layers": 2},
        "nodes": {name: {"in_graph": inside} for name, inside in nodes.items()},
        "edges": {name: {"score": score, "in_graph": abs(score) > 0.4} for name, score in EDGES.items()},
    }


FILES = {
    "scores.json": json.dumps(EDGES),
    "records.json": json.dumps([{"edge": name, "score": score} for name, score in EDGES.items()]),
    "eap.json": json.dumps(eap_graph()),
    "edges.csv": "edge,score\n" + "".join(f"{name},{score}\n" for name, score in EDGES.items()),
    "links.csv": "source,target,score\ninput,a0.h0<q>,0.5\na0.h0,m1,-2\nm1,logits,1\na0.h1,logits,0.1\n",
}


@pytest.mark.parametrize("name", FILES)
def test_edges_in_files(tmp_path, name: str):
    (tmp_path / name).write_text(FILES[name])
    circuit = compare.read_circuit(tmp_path / name)
    assert circuit.edges == {
        ("input", "a0.0", "q"): 0.5,
        ("a0.0", "m1", ""): -2.0,
        ("m1", "logits", ""): 1.0,
        ("a0.1", "logits", ""): 0.1,
    }
    assert circuit.nodes == NODES
    assert circuit.chosen == (frozenset({"a0.0", "m1"}) if name == "eap.json" else None)
    assert circuit.table("edges")["score"].tolist() == [-2.0, 1.0, 0.5, 0.1]


def test_nodes_in_files(tmp_path):
    (tmp_path / "nodes.csv").write_text("node,score\nL0H3,0.5\nmlp_1,-2\n")
    assert compare.read_circuit(tmp_path / "nodes.csv").nodes == {"a0.3": 0.5, "m1": -2.0}
    save_file({"scores": torch.tensor([[1.0, 2.0]])}, tmp_path / "scores.safetensors")
    assert compare.read_circuit(tmp_path / "scores.safetensors").nodes == {"a0.0": 1.0, "a0.1": 2.0}
    torch.save(torch.tensor([[1.0, 2.0]]), tmp_path / "scores.pt")
    assert compare.read_circuit(tmp_path / "scores.pt", baseline=1.0).nodes == {"a0.0": 0.0, "a0.1": 1.0}
    saved = {
        "src_nodes": ["input", "a0.h0"],
        "dst_nodes": ["a0.h0<q>", "logits"],
        "edges_scores": torch.tensor([[0.5, 0.0], [0.0, -2.0]]),
        "nodes_in_graph": torch.tensor([True, True]),
    }
    torch.save(saved, tmp_path / "eap.pt")
    circuit = compare.read_circuit(tmp_path / "eap.pt")
    assert circuit.edges == {("input", "a0.0", "q"): 0.5, ("a0.0", "logits", ""): -2.0}
    assert circuit.chosen == {"a0.0"}


@dataclass
class _Config:
    """Stands for the object of its own that circuit-tracer saves; reading must not build it."""

    n_layers: int = 2

    def __setstate__(self, state):
        raise AssertionError("the class in the file was used")


def test_graphs_of_circuit_tracer(tmp_path):
    """Two features (of layers 0 and 1), errors of 2 layers at 2 positions, 2 tokens, 1 logit: 9 nodes."""
    adjacency = torch.zeros(9, 9)
    adjacency[1, 0] = -0.5  # from the feature of layer 0 to that of layer 1
    adjacency[1, 2] = 0.25  # from the error of layer 0
    adjacency[8, 1] = 2.0
    adjacency[0, 6] = 1.0
    graph = {
        "adjacency_matrix": adjacency,
        "active_features": torch.tensor([[0, 1, 17], [1, 0, 4], [1, 1, 5]]),
        "selected_features": torch.tensor([0, 2]),
        "input_tokens": torch.tensor([5, 6]),
        "logit_probabilities": torch.tensor([1.0]),
        "cfg": _Config(),
    }
    torch.save(graph, tmp_path / "graph.pt")
    circuit = compare.read_circuit(tmp_path / "graph.pt")
    assert circuit.edges == {("m0", "m1", ""): 0.75, ("m1", "logits", ""): 2.0, ("input", "m0", ""): 1.0}
    assert circuit.nodes == {"m0": 1.0, "m1": 2.0}
    node = lambda name, layer, kind: {"node_id": name, "layer": layer, "feature_type": kind}  # noqa: E731
    content = {
        "metadata": {},
        "nodes": [
            node("E_5_0", "E", "embedding"),
            node("0_17_1", "0", "cross layer transcoder"),
            node("0_-1_1", "0", "mlp reconstruction error"),
            node("1_5_1", "1", "cross layer transcoder"),
            node("3_9_1", "3", "logit"),
        ],
        "links": [
            {"source": "0_17_1", "target": "1_5_1", "weight": -0.5},
            {"source": "0_-1_1", "target": "1_5_1", "weight": 0.25},
            {"source": "1_5_1", "target": "3_9_1", "weight": 2.0},
            {"source": "E_5_0", "target": "0_17_1", "weight": 1.0},
        ],
    }
    (tmp_path / "graph.json").write_text(json.dumps(content))
    assert compare.read_circuit(tmp_path / "graph.json").edges == circuit.edges


class _Evil:
    def __reduce__(self):
        return print, ("run",)


def test_files_that_are_no_circuits(tmp_path, capsys):
    bad = {
        "empty.json": "{}",
        "broken.json": '{"a0.0": ',
        "other.json": '{"what": [1]}',
        "no_score.csv": "node\na0.0\n",
        "no_name.csv": "score\n1\n",
        "word.csv": "node,score\na0.0,much\n",
        "edge.json": '[{"edge": "a0.0", "score": 1}]',
        "circuit.txt": "a0.0",
    }
    for name, content in bad.items():
        (tmp_path / name).write_text(content)
        with pytest.raises(apd.ArtifactError, match=name):
            compare.read_circuit(tmp_path / name)
    with pytest.raises(apd.ArtifactError, match="no file"):
        compare.read_circuit(tmp_path / "nothing.json")
    torch.save({"x": _Evil(), "y": 1}, tmp_path / "evil.pt")
    with pytest.raises(apd.ArtifactError, match=r"evil\.pt.*got \['x', 'y'\]"):
        compare.read_circuit(tmp_path / "evil.pt")
    assert capsys.readouterr().out == ""
