"""Attribution patching onto components: known by hand in a linear model, and what its sum is in others."""

from functools import partial

import pytest
import torch
from support.hooked import hooked_transformer, tokens
from support.known import additive
from support.toy_models import Snapshot, decomposition_of
from torch import Tensor
from torch.testing import assert_close

import apd_lens as apd
from apd_lens import compare
from apd_lens.compare._location import _model_as_component

CLEAN, CORRUPTED = tokens(6)[:3], tokens(6)[3:]
PATCHED = {"blocks.0.attn.W_V": "blocks.0.attn.hook_v", "blocks.1.mlp.W_in": "blocks.1.mlp.hook_pre"}


def difference(logits: Tensor) -> Tensor:
    return logits[:, -1, 3] - logits[:, -1, 5]


@pytest.fixture(scope="module")
def decomposition() -> apd.Decomposition:
    return decomposition_of(hooked_transformer(n_layers=2).requires_grad_(False), list(PATCHED), n_components=5)


def test_a_linear_model_is_exact():
    """y = x W in four parts: what the clean input has more of a part's axis, times the part's size."""
    clean = torch.tensor([[[1.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 1.0]], [[1.0, 1.0, 1.0, 1.0], [0.0, 0.0, 0.0, 0.0]]])
    corrupted = torch.zeros_like(clean)
    corrupted[0, 1, 2] = 2.0
    found = compare.patching(additive(), clean, corrupted, lambda y: y.sum((1, 2)))
    (effects,), (rest,), (patched,) = (list(of.values()) for of in (found.effects, found.rest, found.patched))
    expected = (clean - corrupted) * torch.tensor([1.0, 2.0, 3.0, 4.0])
    assert_close(effects, expected)
    assert_close(rest, torch.zeros(2, 2), atol=1e-6, rtol=0)
    assert_close(patched, expected.sum((1, 2)))
    assert_close(found.clean - found.corrupted, patched)
    assert_close(found.by_position(), expected.mean(0))


def test_each_matrix_is_patched_as_transformer_lens_patches_it(decomposition):
    model = decomposition.target.model
    before = Snapshot.of(model)
    found = compare.patching(decomposition, CLEAN, CORRUPTED, difference)
    before.assert_unchanged(model)
    _, cache = model.run_with_cache(CLEAN)
    assert_close(found.clean, difference(model(CLEAN)))
    assert_close(found.corrupted, difference(model(CORRUPTED)))
    for name, site in PATCHED.items():
        patched = model.run_with_hooks(CORRUPTED, fwd_hooks=[(site, lambda y, hook: cache[hook.name])])
        assert_close(found.patched[name], difference(patched) - difference(model(CORRUPTED)))
    assert "first order" in str(found)


def test_the_sum_is_the_derivative_towards_the_clean_output(decomposition):
    """Components do not add up to the weights here, so that the rest has a part too."""
    found = compare.patching(decomposition, CLEAN, CORRUPTED, difference)
    model = decomposition.target.model
    _, cache = model.run_with_cache(CLEAN)

    def towards(y: Tensor, hook, t: Tensor) -> Tensor:
        return y + t.reshape(-1, *[1] * (y.ndim - 1)) * (cache[hook.name] - y)

    for name, site in PATCHED.items():
        t = torch.zeros(len(CLEAN), requires_grad=True)
        metric = difference(model.run_with_hooks(CORRUPTED, fwd_hooks=[(site, partial(towards, t=t))]))
        (derivative,) = torch.autograd.grad(metric.sum(), t)
        assert_close(found.of_matrix(name), derivative)
        assert found.rest[name].abs().max() > 1e-3 * found.of_matrix(name).abs().max()


def test_along_the_path_the_sum_is_the_whole_effect(decomposition):
    errors = {}
    for steps in (0, 2, 16):
        found = compare.patching(decomposition, CLEAN, CORRUPTED, difference, steps=steps)
        errors[steps] = max((found.of_matrix(name) - found.patched[name]).abs().max().item() for name in PATCHED)
    assert errors[16] < 0.1 * errors[2] + 1e-5 < errors[0]


def test_one_component_that_is_the_matrix_carries_all_of_it(decomposition):
    whole = _model_as_component(decomposition)
    found = compare.patching(whole, CLEAN, CORRUPTED, difference)
    for name in PATCHED:
        assert_close(found.effects[name].sum((1, 2)), found.of_matrix(name))
        assert_close(found.rest[name], torch.zeros_like(found.rest[name]), atol=1e-5, rtol=0)


def test_what_does_not_fit_is_refused(decomposition):
    with pytest.raises(apd.ShapeMismatch, match="Pair prompts with as many tokens"):
        compare.patching(decomposition, CLEAN, CORRUPTED[:, :-1], difference)
    with pytest.raises(apd.ShapeMismatch, match="one scalar an example"):
        compare.patching(decomposition, CLEAN, CORRUPTED, lambda logits: logits[:, -1])
    with pytest.raises(apd.errors.InvalidSetting, match="steps of 0 or more, got -1"):
        compare.patching(decomposition, CLEAN, CORRUPTED, difference, steps=-1)
