"""Faithfulness curves: a model whose metric is a sum over components, where every number is known; heads and neurons
against TransformerLens's own hooks."""

from functools import partial

import pytest
import torch
from nnsight import NNsight
from support.hooked import hooked_transformer as one_layer
from support.hooked import tokens
from support.known import additive
from support.toy_models import Snapshot, TinyGPT, decomposition_of, tiny_gpt2
from torch import Tensor
from torch.testing import assert_close

import apd_lens as apd
from apd_lens import compare

hooked_transformer = partial(one_layer, n_layers=2)


def total(y: Tensor) -> Tensor:
    return y.flatten(1).sum(1)


def logit_difference(logits: Tensor) -> Tensor:
    return logits[:, -1, 3] - logits[:, -1, 5]


def test_an_additive_model_has_the_curve_of_the_largest_parts_first():
    curve = compare.faithfulness_curve(additive(), [torch.ones(2, 4), torch.ones(1, 4)], total)
    assert curve.kept.tolist() == [0, 1, 2, 3, 4]
    assert (curve.model, curve.none) == (10.0, 0.0)
    assert_close(curve.own, torch.tensor([0.0, 0.4, 0.7, 0.9, 1.0]))
    assert_close(curve.worst, curve.own)  # every part helps, so the worst is to have the rest off
    assert (curve.random[:-1] > curve.own[:-1]).all()
    assert (curve.shuffled[1:-1] < curve.own[1:-1]).all()
    assert curve.areas().loc["own", "CPR"] == pytest.approx(0.25 * (0.2 + 0.55 + 0.8 + 0.95))
    assert curve.areas().loc["own", "CMD"] == pytest.approx(1 - curve.areas().loc["own", "CPR"])
    assert curve.table().loc[2, "own"] == pytest.approx(0.7)
    assert "of 4" in str(curve)


def test_random_ablation_keeps_half_of_the_rest_on_average():
    curve = compare.faithfulness_curve(additive(), [torch.ones(64, 4)], total, n_draws=8, ascent_steps=1)
    assert_close(curve.random, (curve.own + 1) / 2, atol=0.03, rtol=0)


def test_a_component_that_works_against_the_metric_is_found_by_the_worst_case_only():
    """x reads part 3 with the other sign: 1 + 2 + 3 - 4 = 2."""
    x = torch.tensor([[1.0, 1.0, 1.0, -1.0]])
    scores = torch.tensor([1.0, 2.0, 3.0, 0.0])
    curve = compare.faithfulness_curve(additive(), [x], total, scores=scores, ascent_steps=20)
    assert_close(curve.own, torch.tensor([0.0, 1.5, 2.5, 3.0, 1.0]))
    assert_close(curve.worst, torch.tensor([-2.0, -0.5, 0.5, 1.0, 1.0]))
    assert curve.areas().loc["own", "CPR"] > 1  # what CPR rewards, CMD does not
    assert curve.areas().loc["own", "CMD"] == pytest.approx(0.25 * (0.75 + 1.0 + 1.75 + 1.0))


def test_a_metric_that_falls_is_recovered_downwards():
    curve = compare.faithfulness_curve(additive(), [torch.ones(1, 4)], lambda y: -total(y))
    assert_close(curve.own, torch.tensor([0.0, 0.4, 0.7, 0.9, 1.0]))
    assert_close(curve.worst, curve.own)


def test_scores_for_each_example_and_position():
    """Each data point has one part; kept by a score of its own, one unit is enough."""
    decomposition = additive()
    x = torch.eye(4)
    every = compare.faithfulness_curve(decomposition, [x], total, scores=lambda x: x, sizes=[1])
    assert_close(every.own, torch.ones(1))
    fixed = compare.faithfulness_curve(decomposition, [x], total, sizes=[1])
    assert_close(fixed.own, torch.tensor([0.4]))
    positions = compare.faithfulness_curve(decomposition, [x[None]], total, scores=lambda x: x, sizes=[1])
    assert_close(positions.own, torch.ones(1))
    assert_close(positions.worst, torch.ones(1))


@pytest.mark.parametrize("ablation", ["zero", "mean"])
@pytest.mark.parametrize("option", ["", "use_attn_result"])
def test_heads_are_ablated_as_hooks_do_it(ablation, option):
    model = hooked_transformer(n_key_value_heads=1)
    if option:
        setattr(model.cfg, option, True)
    decomposition = decomposition_of(model, "blocks.0.attn.W_Q", n_components=2)
    before = Snapshot.of(model)
    scores = torch.tensor([3.0, 1.0, 0.0, 2.0])  # of a0.0 a0.1 a1.0 a1.1
    batches = [tokens(3), tokens(2)]
    curve = compare.faithfulness_curve(
        decomposition,
        batches,
        logit_difference,
        unit="head",
        scores=scores,
        sizes=[0, 2, 4],
        ablation=ablation,
        n_draws=2,
        ascent_steps=2,
    )
    before.assert_unchanged(model)
    z_0 = {}
    for layer in range(2):
        name = f"blocks.{layer}.attn.hook_z"
        zs = torch.cat([model.run_with_cache(batch)[1][name].flatten(0, 1) for batch in batches])
        z_0[name] = zs.mean(0) if ablation == "mean" else 0 * zs[0]

    def kept(heads: dict[str, list[int]]) -> float:
        def ablated(z, hook):
            z = z.clone()
            off = [head for head in range(2) if head not in heads[hook.name]]
            z[:, :, off] = z_0[hook.name][off]
            return z

        hooks = [(name, ablated) for name in z_0]
        return torch.cat([logit_difference(model.run_with_hooks(b, fwd_hooks=hooks)) for b in batches]).mean().item()

    none = kept({"blocks.0.attn.hook_z": [], "blocks.1.attn.hook_z": []})
    two = kept({"blocks.0.attn.hook_z": [0], "blocks.1.attn.hook_z": [1]})
    whole = torch.cat([logit_difference(model(batch)) for batch in batches]).mean().item()
    assert curve.names == ["a0.0", "a0.1", "a1.0", "a1.1"]
    assert (curve.none, curve.model) == (pytest.approx(none, abs=1e-5), pytest.approx(whole, abs=1e-5))
    assert_close(curve.own, torch.tensor([0.0, (two - none) / (whole - none), 1.0]), atol=1e-3, rtol=1e-3)
    assert (curve.worst <= torch.minimum(curve.own, curve.random) + 1e-5).all()


def test_neurons_of_a_torch_module_and_of_nnsight():
    """GPT-2 with heads and neurons said by hand; nnsight gives the same."""
    module = tiny_gpt2(n_layer=1)
    units = {"*.mlp.c_proj.weight": apd.host.Units("neuron", "in", 32)}
    options = {"unit": "neuron", "units": units, "sizes": [0, 5, 32], "n_draws": 1, "ascent_steps": 1}
    found = []
    for model in (module, NNsight(module)):
        decomposition = decomposition_of(model, "transformer.h.0.mlp.c_fc.weight", n_components=2)
        found.append(compare.faithfulness_curve(decomposition, [tokens(3)], logit_difference, **options))
    assert len(found[0].names) == 32
    assert found[0].names[3] == "m0.3"
    assert_close(found[0].own, found[1].own)
    assert_close(found[0].own[[0, 2]], torch.tensor([0.0, 1.0]))
    off = lambda module, args: (0 * args[0],)  # noqa: E731
    handle = module.transformer.h[0].mlp.c_proj.register_forward_pre_hook(off)
    expected = logit_difference(module(tokens(3)).logits).mean().item()
    handle.remove()
    assert found[0].none == pytest.approx(expected, abs=1e-5)
    heads = compare.faithfulness_curve(decomposition, [tokens(3)], logit_difference, unit="head", sizes=[0, 2])
    assert heads.names == ["a0.0", "a0.1"]
    without_heads = decomposition_of(TinyGPT(), "fc.weight", n_components=2)
    with pytest.raises(apd.UnsupportedModel, match="known to read heads"):
        compare.faithfulness_curve(without_heads, [tokens(3)], total, unit="head")


def test_what_cannot_be_measured():
    decomposition, x = additive(), torch.ones(2, 4)
    curve = partial(compare.faithfulness_curve, decomposition)
    with pytest.raises(apd.errors.InvalidSetting, match="nothing to recover"):
        curve([x], lambda y: 0 * total(y))
    with pytest.raises(apd.errors.InvalidSetting, match=r"between 0 and 4, got \[5\]"):
        curve([x], total, sizes=[5])
    with pytest.raises(apd.ShapeMismatch, match=r"shape \(4,\)"):
        curve([x], total, scores=torch.ones(3))
    with pytest.raises(apd.ShapeMismatch, match="one scalar an example"):
        curve([x], lambda y: y)
    with pytest.raises(apd.errors.InvalidBatches):
        curve(iter([x]), total)
    with pytest.raises(apd.errors.InvalidSetting, match="at least 1"):
        curve([x], total, n_draws=0)
