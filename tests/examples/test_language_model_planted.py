"""The example on planted facts runs on a tiny model that is trained on the spot."""

import json

from support.examples import run


def test_planted_facts(tmp_path):
    few = ["--steps", "0", "--fit-steps", "30", "--seeds", "1"]
    printed = run("language_model/planted.py", "--stand-in", *few, "--out", str(tmp_path))
    assert printed.count("cosine with ΔW_k") == 3
    result = json.loads((tmp_path / "planted.json").read_text())
    assert result["planted"]["facts left"] >= 6
    assert len(result["facts"]) == 8
    found = {(of["way"], of["kind"]): of for of in result["runs"]}
    assert len(found) == 6
    faithful, whole = found["planted", "difference, faithful"], found["planted", "weights"]
    assert faithful["share of D explained"] > 0.85 > 0.1 > whole["share of D explained"]
    assert sum(faithful["cosine with ΔW_k"]) > 1.5 * sum(whole["cosine with ΔW_k"])
    assert faithful["all own off"]["facts left"] == 0 < faithful["their random twins off"]["facts left"]
    assert found["fine-tuned", "difference, faithful"]["all own off"]["facts left"] == 0
