"""Signed attributions: exact where the metric is linear in the weights, complete where it is not."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from nnsight import NNsight
from support.hooked import hooked_transformer as one_layer
from support.hooked import tokens
from support.toy_models import Snapshot, decomposition_of, linear_of_known_parts
from torch import Tensor, nn
from torch.testing import assert_close

import apd_lens as apd
from apd_lens import compare

hooked_transformer = partial(one_layer, n_layers=2)


def logit_difference(logits: Tensor) -> Tensor:
    return logits[:, -1, 3] - logits[:, -1, 5]


def test_a_linear_model_is_exact():
    """y = x W: component c brings x_c times its size, at the position where x_c is."""
    model, components = linear_of_known_parts()
    decomposition = replace(decomposition_of(model, n_components=4), components=components.requires_grad_(False))
    x = torch.tensor([[[1.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, -1.0]], [[1.0, 1.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]]])
    found = compare.signed_attributions(decomposition, [x], lambda y: y.sum((1, 2)), steps=1)
    assert_close(found.attribution, torch.tensor([1.0, 1.0, 0.0, -2.0]))
    assert_close(found.ablation, found.attribution)
    assert_close(found.by_position, torch.tensor([[1.0, 1.0, 0.0, 0.0], [0.0, 0.0, 0.0, -2.0]]))
    assert found.change == 0.0
    assert found.error == 0.0
    assert (found.correlation, found.slope) == (pytest.approx(1), pytest.approx(1))
    assert found.table().index.tolist() == [0, 1, 2, 3]
    assert found.table().loc[3, "largest position"] == 1
    assert "slope 1.000" in str(found)
    longer = compare.signed_attributions(decomposition, [x, x[:, :1]], lambda y: y.sum((1, 2)), steps=1)
    assert_close(longer.by_position[0], torch.tensor([1.0, 0.5, 0.0, 0.0]) + torch.tensor([0.0, 0.5, 0.0, 0.0]))
    assert_close(longer.by_position[1], torch.tensor([0.0, 0.0, 0.0, -2.0]))


def test_a_product_of_two_matrices_is_halved_by_the_midpoint_of_a_quadratic():
    """y = x U V with one component: m = 6, and the gradient at t is 2 · 6 (1 - t), whose mean is 6."""
    model = nn.Sequential(nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False))
    model[0].weight.data.fill_(2.0), model[1].weight.data.fill_(3.0)
    A = {"0.weight": torch.full((1, 1, 1), 2.0), "1.weight": torch.full((1, 1, 1), 3.0)}
    B = {name: torch.ones(1, 1, 1) for name in A}
    components = apd.ParameterComponents(A, B).requires_grad_(False)
    decomposition = replace(
        decomposition_of(model, n_components=1, rank=1, selection=apd.BatchTopK(1.0)), components=components
    )
    found = compare.signed_attributions(decomposition, [torch.ones(1, 1)], lambda y: y[:, 0], steps=1)
    assert_close(found.attribution, torch.tensor([6.0]))
    assert found.by_position is None
    assert decomposition.attributions(torch.ones(1, 1), lambda y: y[:, 0]).item() == pytest.approx(12)  # at t = 0


@pytest.mark.parametrize("changes", [{}, {"n_key_value_heads": 1}])
def test_the_sum_comes_to_the_true_change_with_more_steps(changes):
    model = hooked_transformer(**changes)
    decomposition = decomposition_of(model, "blocks.*.attn.*", n_components=4)
    with torch.no_grad():
        for factor in decomposition.components.B.values():
            factor *= 0.25
    before = Snapshot.of(model)
    few, many = (
        compare.signed_attributions(decomposition, [tokens(3), tokens(2)], logit_difference, steps=steps)
        for steps in (1, 16)
    )
    before.assert_unchanged(model)
    assert abs(many.error) < 0.005 * many.attribution.abs().sum()
    assert abs(many.error) < 0.2 * abs(few.error)
    assert_close(many.by_position.sum(0), many.attribution)
    with decomposition.ablate(range(4)):
        without = torch.cat([logit_difference(model(tokens(n))) for n in (3, 2)]).mean()
    whole = torch.cat([logit_difference(model(tokens(n))) for n in (3, 2)]).mean()
    assert many.change == pytest.approx((whole - without).item(), abs=1e-5)
    with decomposition.ablate(2):
        without = torch.cat([logit_difference(model(tokens(n))) for n in (3, 2)]).mean()
    assert_close(many.ablation[2], whole - without, atol=1e-5, rtol=1e-5)


def test_the_null_random_components_do_not_predict_the_ablation_of_others():
    decomposition = decomposition_of(hooked_transformer(), "blocks.*.mlp.*", n_components=12)
    found = compare.signed_attributions(decomposition, [tokens(8)], logit_difference)
    null = replace(decomposition, components=apd.components.random_components(decomposition.components))
    other = compare.signed_attributions(null, [tokens(8)], logit_difference)
    assert abs(torch.corrcoef(torch.stack([other.attribution, found.ablation]))[0, 1]) < 0.6


def test_nnsight_gives_the_same():
    module = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    found = [
        compare.signed_attributions(decomposition_of(model), [torch.eye(3)], lambda y: y[:, 0])
        for model in (module, NNsight(module))
    ]
    assert_close(found[0].attribution, found[1].attribution)


def test_what_is_no_metric():
    decomposition = decomposition_of(nn.Linear(3, 2), n_components=2)
    with pytest.raises(apd.ShapeMismatch, match="one scalar an example"):
        compare.signed_attributions(decomposition, [torch.eye(3)], lambda y: y)
    with pytest.raises(apd.errors.InvalidSetting, match="at least 1 step"):
        compare.signed_attributions(decomposition, [torch.eye(3)], lambda y: y[:, 0], steps=0)
