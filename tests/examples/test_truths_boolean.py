import pytest
import torch
from boolean import TABLES, gate_bits, gate_values, train_boolean

import apd_lens as apd

GATES = (lambda a, b: a != b, lambda a, b: a and b, lambda a, b: a or b)


def test_gates_are_xor_and_or():
    pairs = torch.tensor([[0, 1], [1, 2], [2, 0]])
    bits = torch.cartesian_prod(*[torch.tensor([0.0, 1.0])] * 3)
    values = gate_values(bits, pairs, torch.tensor(TABLES).float())
    for row, value in zip(bits.bool().tolist(), values.tolist(), strict=True):
        expected = [bool(gate(row[a], row[b])) for gate, (a, b) in zip(GATES, pairs.tolist(), strict=True)]
        assert value == expected


def test_bits_are_those_of_gates_that_are_asked():
    pairs = torch.tensor([[0, 1], [1, 4]])
    bits = gate_bits(4000, torch.Generator().manual_seed(0), pairs=pairs, n_inputs=5, probability=0.1)
    assert not bits[:, 2:4].any()
    # Two of the three patterns of a gate turn a given bit on.
    for bit, share in ((0, 0.1 * 2 / 3), (1, 1 - (1 - 0.1 * 2 / 3) ** 2)):
        assert abs(bits[:, bit].mean().item() - share) < 4 * (share / 4000) ** 0.5


def test_a_small_circuit_is_learnt():
    target = train_boolean(3, 6, 6, probability=0.3, steps=600, batch_size=128, seed=2)
    bits = target.data(500, torch.Generator().manual_seed(9))
    assert target.is_right(bits).float().mean() > 0.97
    assert target.loss < 0.05
    assert len({tuple(pair) for pair in target.pairs.tolist()}) == 3
    assert sorted(map(tuple, target.tables.int().tolist())) == sorted(TABLES)
    untrained = train_boolean(3, 6, 6, probability=0.3, steps=0, seed=2)
    assert untrained.is_right(bits).float().mean() < 0.9
    assert torch.equal(untrained.pairs, target.pairs)


def test_pairs_can_be_given():
    pairs = torch.arange(6).view(3, 2)
    target = train_boolean(3, 6, 4, pairs=pairs, steps=1)
    assert torch.equal(target.pairs, pairs)
    assert target.batches(7)(0).shape == (7, 6)


def test_too_few_inputs_are_refused():
    with pytest.raises(apd.errors.InvalidSetting, match="4 inputs make 6 pairs, too few for n_gates=7"):
        train_boolean(7, 4)
