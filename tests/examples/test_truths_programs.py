"""What compiled programs compute, beside Python; and what their truth says."""

import sys
from itertools import pairwise, permutations, product

import pytest
import torch
from programs import PROGRAMS, compile_program
from torch.testing import assert_close

import apd_lens as apd

# Sequence -> the index of the value at each position, or the number; None where nothing is said.
PYTHON = {
    "reverse": lambda x: list(reversed(x)),
    "sort": sorted,
    "hist": lambda x: [x.count(token) for token in x],
    "pair-balance": lambda x: [(x[:n].count("(") - x[:n].count(")")) / n for n in range(1, len(x) + 1)],
    "detect-pattern": lambda x: [None, *(pair == ("a", "b") for pair in pairwise(x))],
}


@pytest.fixture(autouse=True)
def compiler():
    pytest.importorskip("tracr")


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_program_does_what_python_does(name: str):
    target = compile_program(name, max_length=4, seed=1)
    _, vocabulary, once = PROGRAMS[name]
    for place, length in enumerate((2, 3, 4)):
        sequences = list(permutations(vocabulary, length) if once else product(vocabulary, repeat=length))
        assert target.examples[place].shape == (len(sequences), length + 1)
        assert target.is_right(place).all()
        said = [PYTHON[name](list(x)) for x in sequences]
        outputs = target.model(target.examples[place])
        if not target.categorical:
            assert_close(outputs[..., 0], torch.tensor(said), rtol=0, atol=0.02)
        else:
            values = sorted({value for x in said for value in x if value is not None})
            columns = outputs.flatten(0, 1).amax(0) > 0.5  # values that this length cannot give are never on
            one_hot = torch.tensor([[[value == each for each in values] for value in x] for x in said])
            assert torch.equal(outputs[..., columns] > 0.5, one_hot)


@pytest.mark.parametrize("name", ["reverse", "pair-balance"])
def test_each_weight_belongs_to_one_node(name: str):
    target = compile_program(name, seed=3)
    weights = apd.wrap(target.model).weights
    assert set(weights) == set(target.weights)
    for matrix, mechanisms in target.mechanisms.items():
        assert_close(mechanisms.sum(0), weights[matrix].value())
        owned = target.owned(matrix)
        assert (owned.sum(0) <= 1).all()
        assert owned.any()
        left, right = target.turns[matrix]
        assert_close(left @ left.mT, torch.eye(len(left)), rtol=0, atol=1e-5)
        assert_close(right @ right.mT, torch.eye(len(right)), rtol=0, atol=1e-5)
    assert all(any(m[node].any() for m in target.mechanisms.values()) for node in range(len(target.nodes)))


def test_turning_changes_the_weights_and_not_the_function():
    plain, turned = (compile_program("pair-balance", turned=turned, seed=5) for turned in (False, True))
    for ours, theirs in zip(plain.examples, turned.examples, strict=True):
        assert_close(plain.model(ours), turned.model(theirs), rtol=0, atol=1e-3)
    name = "blocks.1.query.weight"
    before, after = (target.mechanisms[name].sum(0) for target in (plain, turned))
    assert (before != 0).float().mean() < 0.5 < 0.9 < (after.abs() > 1e-3).float().mean()
    assert_close(turned.turned_back(name, after[None])[0], before, rtol=0, atol=1e-4)


def test_without_a_node_the_program_fails():
    target = compile_program("pair-balance", seed=2)
    for node in range(len(target.nodes)):
        model = compile_program("pair-balance", seed=2).model
        for name, mechanisms in target.mechanisms.items():
            model.get_parameter(name).data -= mechanisms[node].mT
        assert not target.agrees(model(target.examples[-1])).all()


def test_batches_are_sequences_of_one_length():
    target = compile_program("sort", max_length=3)
    batches = target.batches(10, seed=1)
    assert [batches(step).shape for step in range(3)] == [(10, 3), (10, 4), (10, 3)]
    assert torch.equal(batches(1), batches(1))
    assert all(len(set(row)) == len(row) for row in batches(1).tolist())


def test_the_compiler_brings_in_neither_jax_nor_haiku():
    compile_program("hist", max_length=2)
    assert not {"jax", "haiku"} & set(sys.modules)
    assert "tracr.compiler" not in sys.modules


def test_what_is_missing_is_named(monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(apd.errors.InvalidSetting, match="got 'quicksort'"):
        compile_program("quicksort")
    monkeypatch.setattr("programs.find_spec", lambda name: None)
    with pytest.raises(apd.errors.MissingExtra, match="tracr-pypi"):
        compile_program("hist")
