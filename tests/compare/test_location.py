"""Components beside circuits whose overlap with them is known."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from support.hooked import hooked_transformer as one_layer
from support.hooked import tokens
from support.known import additive, only_head
from support.toy_models import Snapshot, decomposition_of
from torch import Tensor, nn
from torch.testing import assert_close

import apd_lens as apd
from apd_lens import compare

hooked_transformer = partial(one_layer, n_layers=2)
ROWS = {"weight": apd.host.Units("head", "in", 4)}


def logit_difference(logits: Tensor) -> Tensor:
    return logits[:, -1, 3] - logits[:, -1, 5]


def of_the_input(y: Tensor, x: Tensor) -> Tensor:
    return (y * x).sum(1)


def test_overlap_of_known_numbers():
    scores = {"a0.0": 0.9, "a0.1": -0.8, "a1.0": 0.1, "a1.1": 0.3, "m0": 0.0}
    found = compare.overlap(scores, ["a0.h0", "a1.1"], k=3)
    assert [n for n, f in zip(found.nodes, found.found, strict=True) if f] == ["a0.0", "a0.1", "a1.1"]
    assert found.measures == pytest.approx({"precision": 2 / 3, "recall": 1.0, "IoU": 2 / 3, "AUROC": 5 / 6})
    assert compare.overlap(scores, ["a0.0", "a0.1"]).measures["IoU"] == 1
    assert compare.overlap(dict.fromkeys(scores, 1.0), ["m0"]).measures["AUROC"] == 0.5
    null = found.table()
    assert null.loc["AUROC", "null mean"] == pytest.approx(0.5, abs=0.03)
    assert null.loc["precision", "null mean"] == pytest.approx(2 / 5, abs=0.03)
    assert null.loc["recall", "p"] == pytest.approx(0.3, abs=0.05)  # 3 of the 10 pairs lie in any three


def test_what_has_no_overlap():
    scores = {"a0.0": 0.9, "a0.1": 0.8}
    with pytest.raises(apd.errors.InvalidSetting, match=r"without a score: \['a7.7'\]"):
        compare.overlap(scores, ["a7.7"])
    with pytest.raises(apd.errors.InvalidSetting, match=r"circuit of some of the 2"):
        compare.overlap(scores, ["a0.0", "a0.1"])
    with pytest.raises(apd.errors.InvalidSetting, match=r"circuit\.top"):
        compare.overlap(scores, compare.Circuit(scores, {}))
    with pytest.raises(apd.errors.InvalidSetting, match="k must be"):
        compare.overlap(scores, ["a0.0"], k=3)


@pytest.mark.parametrize("granularity", ["example", "position"])
def test_components_of_two_heads_are_located_there_and_random_ones_are_not(granularity):
    """Two components are one head each, and large; two are anywhere, and of no size."""
    model = hooked_transformer(n_heads=4, n_key_value_heads=2)
    decomposition = decomposition_of(
        model, "blocks.*.attn.*", n_components=4, selection=apd.BatchTopK(2, granularity=granularity)
    )
    only_head(decomposition, 0, layer=0, head=2, group=2)
    only_head(decomposition, 3, layer=1, head=1, group=2)
    for A in decomposition.components.A.values():
        A.data[1:3] *= 0.01
    before = Snapshot.of(model)
    batches = [tokens(4), tokens(3)]
    known = ["a0.2", "a0.3", "a1.0", "a1.1"]  # heads share keys and values with their neighbours
    found = compare.locate(decomposition, batches, known, logit_difference, top=2, n_null=2)
    before.assert_unchanged(model)
    assert set(found.top) == {0, 3}
    assert found.shares() == (pytest.approx(1), pytest.approx(1))
    nulls = found.nulls()
    assert nulls.loc["2 sets of random components, largest", "weight in circuit"] < 0.9
    assert nulls.loc["other sets of as many nodes, mean", "weight in circuit"] < 0.7
    assert nulls.loc["the model's weights", "weight in circuit"] == pytest.approx(0.5, abs=0.1)
    assert found.table().loc[0, "largest by weight"] in ("a0.2", "a0.3")
    assert found.overlap().measures["AUROC"] == 1
    assert "2 of 4 components matter; circuit: a0.2, a0.3, a1.0, a1.1, of 8" in str(found)


def test_without_a_number_those_that_hold_nine_tenths_matter():
    decomposition = decomposition_of(hooked_transformer(), "blocks.*.attn.*", n_components=3)
    found = compare.locate(decomposition, [tokens(3)], ["a0.1"], n_null=0)
    importance = decomposition.attributions(tokens(3)).mean(0)
    assert_close(found.importance, importance)
    held = importance[found.top].sum() / importance.sum()
    assert held >= 0.9
    assert held - importance[found.top[-1]] / importance.sum() < 0.9
    assert "random components" not in str(found.nulls())


def test_a_circuit_of_mlps_and_one_of_another_model():
    decomposition = decomposition_of(hooked_transformer(), "blocks.*.mlp.*", n_components=3)
    found = compare.locate(decomposition, [tokens(3)], ["m1"], level="mlp", n_null=1)
    assert found.nodes == ["m0", "m1"]
    with pytest.raises(apd.errors.InvalidSetting, match=r"None of the decomposed matrices has heads"):
        compare.locate(decomposition, [tokens(3)], ["a0.0"])
    with pytest.raises(
        apd.errors.InvalidSetting, match=r"among those of the decomposed matrices \(m0, m1\), got \['m4'\]"
    ):
        compare.locate(decomposition, [tokens(3)], ["m4"], level="mlp")


def test_a_torch_module():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList([nn.Linear(4, 4, bias=False)])

        def forward(self, x: Tensor) -> Tensor:
            return self.layers[0](x)

    decomposition = decomposition_of(Model(), n_components=2)
    B = decomposition.components.B["layers.0.weight"].data
    B[0, :, :2], B[1, :, 2:] = 0, 0
    units = {"layers.0.weight": apd.host.Units("head", "out", 2)}
    found = compare.locate(decomposition, [torch.eye(4)], ["a0.1"], lambda y: y[:, 2:].sum(1), units=units)
    assert found.top == [0]
    assert found.shares() == (pytest.approx(1), pytest.approx(1))
    other = replace(decomposition, components=apd.components.random_components(decomposition.components))
    assert compare.weight_map(other, units).shares("head").max() < 0.95


def test_a_metric_may_depend_on_the_batch():
    """The size of output x, said by the batch: so is that of the component that writes it."""
    decomposition = additive()
    batches = [torch.tensor([[1.0, 0.0, 0.0, 0.0]]), torch.tensor([[0.0, 0.0, 1.0, 0.0]])]
    found = compare.locate(decomposition, batches, ["a0"], of_the_input, n_null=0, units=ROWS)
    assert_close(found.importance, torch.tensor([0.5, 0.0, 1.5, 0.0]))
    signed = compare.signed_attributions(decomposition, batches, of_the_input, steps=1)
    assert_close(signed.attribution, found.importance)
    curve = compare.faithfulness_curve(decomposition, batches, of_the_input)
    assert_close(curve.own, torch.tensor([0.0, 0.75, 1.0, 1.0, 1.0]))
