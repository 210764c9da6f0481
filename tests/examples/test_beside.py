"""The scripts beside SAEs and circuits of a language model run on a tiny one, and what they print is of its numbers."""

import json
from pathlib import Path

import pytest
from support.examples import run


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    return "--stand-in", "--steps", "0", "--out", str(tmp_path_factory.mktemp("beside"))


def results(shared, name: str) -> dict:
    return json.loads((Path(shared[-1]) / "results" / f"{name}.json").read_text())


def test_patching_sums_to_what_is_measured(shared):
    run("beside/patching.py", *shared)
    for row in results(shared, "patching").values():
        for matrix in ("W_V", "W_O"):
            assert row[f"{matrix}, along the path"] == pytest.approx(row[f"{matrix} patched"], rel=0.05)
    found = results(shared, "patching")
    own, random = (found[f"{kind}, seed 0"]["W_V, own of clean"] for kind in ("components", "random components"))
    assert own > 3 * abs(random)


@pytest.mark.thorough
def test_edges_add_up_and_both_tools_find_the_same_first_head(shared):
    printed = run("beside/circuits.py", *shared)
    (line,) = [line for line in printed.splitlines() if line.startswith("gradients of all destinations")]
    assert float(line.split()[-1]) < 1e-5
    heads = [row["heads"].split()[0] for row in results(shared, "circuits")["first nodes"].values()]
    assert heads[0] == heads[1]
    assert results(shared, "circuits")["curves"]["components, own"]["0"] == 0


@pytest.mark.thorough
def test_dictionaries(shared):
    pytest.importorskip("sae_lens", reason="needs sae-lens, which works with transformer-lens 3 only")
    run("beside/dictionaries.py", *shared, "--sae-steps", "20")
    found = results(shared, "dictionaries")
    assert set(found) == {
        "quality", "directions written", "whose unit", "active together", "by token", "edits", "yardstick"
    }  # fmt: skip
    assert (
        found["quality"]["SAE 64, seed 0"]["variance explained"]
        > found["quality"]["SAE 64, untrained"]["variance explained"]
    )
    edits = found["edits"]
    assert edits["own component"]["nats lost"] > 10 * abs(edits["random component of its size"]["nats lost"])
    alone = found["yardstick"]
    assert (
        alone["attention alone: components, k = 2"]["loss"] < 0.1 * alone["attention alone: components, k = 0"]["loss"]
    )
