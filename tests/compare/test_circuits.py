"""Circuits from the tensors and files of other tools."""

from functools import partial

import pytest
import torch
from support.hooked import hooked_transformer as one_layer
from support.hooked import tokens
from torch import Tensor
from transformer_lens import patching

import apd_lens as apd
from apd_lens import compare

hooked_transformer = partial(one_layer, n_layers=2)


def logit_difference(logits: Tensor) -> Tensor:
    return logits[:, -1, 3] - logits[:, -1, 5]


def test_results_of_transformer_lens_patching():
    model = hooked_transformer()
    clean, corrupted = tokens(2)[:1], tokens(2)[1:]
    cache = model.run_with_cache(clean)[1]
    baseline = logit_difference(model(corrupted)).item()
    patch = (model, corrupted, cache, lambda logits: logit_difference(logits).mean())
    by_pos = patching.get_act_patch_attn_head_out_by_pos(*patch)
    circuit = compare.circuit_of_scores(by_pos, "layer pos head", baseline=baseline)
    assert list(circuit.nodes) == ["a0.0", "a0.1", "a1.0", "a1.1"]
    differences = (by_pos - baseline)[1, :, 0]
    assert circuit.nodes["a1.0"] == pytest.approx(differences[differences.abs().argmax()].item(), abs=1e-6)
    all_pos = patching.get_act_patch_attn_head_out_all_pos(
        model, corrupted, cache, lambda y: logit_difference(y).mean()
    )
    assert compare.circuit_of_scores(all_pos).nodes["a0.1"] == pytest.approx(all_pos[0, 1].item())
    mlps = patching.get_act_patch_mlp_out(*patch)
    assert list(compare.circuit_of_scores(mlps, "mlp pos").nodes) == ["m0", "m1"]


def test_scores_with_other_axes():
    scores = torch.tensor([[[0.0, -3.0], [1.0, 2.0]]])  # layer head pos
    assert compare.circuit_of_scores(scores, "layer head pos").nodes == {"a0.0": -3.0, "a0.1": 2.0}
    assert compare.circuit_of_scores(scores[0], "layer neuron").nodes["m1.0"] == 1.0
    assert compare.circuit_of_scores(scores, "layer head pos").top(1) == ["a0.0"]
    with pytest.raises(apd.ShapeMismatch, match=r"'layer head'.*\(1, 2, 2\)"):
        compare.circuit_of_scores(scores)
    with pytest.raises(apd.errors.InvalidSetting, match="'layer pos'"):
        compare.circuit_of_scores(scores[0], "layer pos")
