"""The runner of the systems with known mechanisms, with few steps; and its judges, on components that are the truth."""

import importlib
import json
from dataclasses import replace
from types import ModuleType

import pytest
import torch
from addition import frequency_power, train_addition
from programs import compile_program
from redundancy import train_cipher
from support.examples import run

import apd_lens as apd


@pytest.fixture(scope="module")
def judges() -> ModuleType:
    pytest.importorskip("transformer_lens")
    return importlib.import_module("judges")


def decomposition_of(model: torch.nn.Module, mechanisms: dict[str, torch.Tensor]) -> apd.Decomposition:
    """Components that are the given mechanisms, `C d_in d_out` of each matrix."""
    A, B = {}, {}
    for name, m in mechanisms.items():
        eye = torch.eye(min(m.shape[1:])).expand(len(m), -1, -1).contiguous()
        A[name], B[name] = (eye, m) if m.shape[1] <= m.shape[2] else (m, eye)
    return apd.from_factors(model, A, B)


def test_the_runner_goes_on_where_it_was(tmp_path):
    few = ["--systems", "cipher-16", "--steps", "2", "--target-steps", "20", "--results", str(tmp_path)]
    printed = run("truths/truths.py", *few, "--seeds", "0", "--untrained")
    assert printed.count("does not meet the goal:") == 2
    result = json.loads((tmp_path / "cipher-16.topk.0.json").read_text())
    assert set(result["nulls"]) == {"random", "usage-matched"}
    assert result["numbers"]["of"] == 32
    assert "|  | components | random | usage-matched | untrained |" in printed
    more = run("truths/truths.py", *few, "--seeds", "0", "1", "--forms", "topk", "lp")
    assert [line.split(" does")[0] for line in more.splitlines() if "does not" in line] == [
        "cipher-16 topk 1",
        "cipher-16 lp 0",
        "cipher-16 lp 1",
    ]
    assert more.count("meets it on 0 of 2 targets (seeds 0, 1)") == 2


def test_the_nodes_of_a_program_are_found_where_components_are_its_nodes(judges: ModuleType):
    pytest.importorskip("tracr")
    target = compile_program("pair-balance", max_length=3)
    truth = decomposition_of(target.model, target.mechanisms)
    numbers = judges.measure_program(target, truth, None)
    assert numbers["found"] == numbers["of"] == 5
    assert numbers["least AUROC"] == 1
    random = replace(truth, components=apd.components.random_components(truth.components))
    assert judges.measure_program(target, random, None)["AUROC"] < 0.8
    assert judges.matrices_of_program(target)["found"] < 3


def test_tokens_are_found_where_a_component_is_all_that_is_done_for_one(judges: ModuleType):
    """Blocks read one half of the stream and write the other, with a neuron for each token, so the truth is known."""
    target = train_cipher(8, 4, n_tokens=4, n_blocks=2, steps=0)
    model, owner, mechanisms = target.model, torch.arange(4), {}
    halves = torch.eye(8).unflatten(0, (2, 4))
    model.E.copy_(halves.sum(0) / 2**0.5)
    for name in target.weights:
        weight = halves[0].mT if "mlp_in" in name else 6 * halves[1][target.partner]
        model.get_parameter(name).data = weight.mT.clone()
        one = torch.eye(4)[:, None] if "mlp_in" in name else torch.eye(4)[..., None]
        mechanisms[name] = weight * one
    for block in model.blocks:
        block.mlp_in.bias.data.zero_()
    assert all(target.is_right(on).all() for on in target.subsets)
    truth = decomposition_of(model, mechanisms)
    numbers = judges.measure_cipher(target, truth, judges.cipher_owners(target, truth))
    assert numbers["found"] == numbers["own component"] == numbers["spans all blocks"] == 4
    assert numbers["mechanisms skipped"] == 0
    assert numbers["mechanisms whole"] == 8
    assert judges.cipher_owners(target, truth).tolist() == owner.tolist()
    # Half of the blocks in another component: these mechanisms are skipped.
    apart = {name: torch.cat([m * (name[7] == "0"), m * (name[7] == "1")]) for name, m in mechanisms.items()}
    split = decomposition_of(model, apart)
    numbers = judges.measure_cipher(target, split, owner)
    assert numbers["found"] == numbers["spans all blocks"] == 0
    assert numbers["mechanisms skipped"] == 4


def test_frequencies_are_found_where_components_are_of_one(judges: ModuleType):
    """Waves of two frequencies in the neurons, and a component for each."""
    target = train_addition(11, 6, 8, steps=0)
    model, numbers = target.model, torch.arange(11)
    waves = torch.stack([(2 * torch.pi * f * numbers / 11).cos() for f in (2, 3)], 1)
    model.embed.weight.copy_(torch.cat([waves, torch.zeros(11, 4)], 1))
    model.mlp_in.weight.data.zero_()
    model.mlp_in.weight[:2, :2] = torch.eye(2)
    model.mlp_out.weight.data.zero_()
    model.mlp_out.weight[:, :2] = waves
    parts = (model.embed.weight, model.mlp_in.weight.mT, model.mlp_out.weight.mT)
    target = replace(target, power=frequency_power(*parts, model))
    assert sorted(target.key_frequencies.tolist()) == [2, 3]
    E, W_in, W_out = (torch.zeros(2, *part.shape) for part in parts)
    for c in (0, 1):
        E[c, :, c], W_in[c, c], W_out[c, c] = parts[0][:, c], parts[1][c], parts[2][c]
    truth = decomposition_of(model, dict(zip(target.weights, (E, W_in, W_out), strict=True)))
    found = judges.measure_addition(target, truth, judges.addition_owners(target, truth))
    assert found["found"] == found["of"] == 2
    assert found["least alignment"] > 0.999
    one = torch.zeros(2, dtype=torch.long)
    assert judges.measure_addition(target, truth, one)["least alignment"] < 0.01


def test_usage_matched_components_are_others(judges: ModuleType):
    mask = torch.tensor([[1, 1, 0, 1], [1, 0, 1, 0], [1, 0, 0, 0]]).bool()
    assert judges.usage_matched(torch.tensor([1, 0]), mask)[0] in (2, 3)
    assert judges.usage_matched(torch.tensor([1, 0]), mask)[1] != 0
    assert judges.n_alone(torch.tensor([2, 3, 3, 1])) == 2
