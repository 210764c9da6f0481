"""Sparse autoencoders that SAELens splices into a HookedTransformer, inside our contexts and before them."""

import copy
import warnings
from functools import partial

import pytest
import torch
from support.hooked import MIXTURE, check_effects, hooked_transformer, tokens
from support.tools import Case, case_of
from support.toy_models import Snapshot, decomposition_of, double, keep_in_float64
from torch import Tensor

import apd_lens as apd

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    sae_lens = pytest.importorskip("sae_lens", reason="needs sae-lens, which works with transformer-lens 3 only")

CONTEXTS = ["sparse", "ablate", "only"]
WIDTHS = {  # hook point -> number of activations
    "blocks.0.hook_resid_post": 8,
    "blocks.0.hook_mlp_out": 8,
    "blocks.0.attn.hook_z": 8,
    "blocks.0.mlp.hook_in": 8,
    "blocks.0.mlp.hook_post": 10,
}


def sae_transformer(**options):
    return hooked_transformer(sae_lens.HookedSAETransformer, **options)


def sae_at(hook_name: str, dtype: str = "float32"):
    config = sae_lens.StandardSAEConfig(
        d_in=WIDTHS[hook_name],
        d_sae=16,
        dtype=dtype,
        reshape_activations="hook_z" if hook_name.endswith("hook_z") else "none",
        metadata=sae_lens.saes.sae.SAEMetadata(hook_name=hook_name),
    )
    torch.manual_seed(0)
    return sae_lens.StandardSAE(config)


def transcoder():
    metadata = sae_lens.saes.sae.SAEMetadata(hook_name="blocks.0.mlp.hook_in", hook_name_out="blocks.0.hook_mlp_out")
    options = {"d_in": 8, "d_out": 8, "d_sae": 16, "apply_b_dec_to_input": False}
    return sae_lens.Transcoder(sae_lens.TranscoderConfig(**options, metadata=metadata))


@pytest.fixture(params=CONTEXTS)
def case(request) -> Case:
    return case_of(sae_transformer(n_layers=2), request.param)


@pytest.mark.parametrize("hook_name", [*WIDTHS, "all"])
@pytest.mark.parametrize("context", CONTEXTS)
def test_run_with_saes(monkeypatch, context: str, hook_name: str):
    """In float64: five random SAEs in a row make activations of 137 that cancel to 0.04."""
    keep_in_float64(monkeypatch)
    case = case_of(sae_transformer(n_layers=2, dtype=torch.float64), context)
    check = partial(case.check, tolerance=1e-9)
    saes = [sae_at(name, "float64") for name in (WIDTHS if hook_name == "all" else [hook_name])]
    check(lambda model: model.run_with_saes(tokens(3), saes=saes))
    check(lambda model: model.run_with_saes(tokens(3), saes=saes, use_error_term=True))

    def features_and_more(model) -> dict[str, Tensor]:
        cache = model.run_with_cache_with_saes(tokens(3), saes=saes)[1]
        assert f"{saes[0].cfg.metadata.hook_name}.hook_sae_acts_post" in cache
        return dict(cache.items())

    check(features_and_more)
    hook = (f"{saes[0].cfg.metadata.hook_name}.hook_sae_acts_post", double)
    check(lambda model: model.run_with_hooks_with_saes(tokens(3), saes=saes, fwd_hooks=[hook]))


def test_transcoder(case: Case):
    spliced = transcoder()
    case.check(lambda model: model.run_with_saes(tokens(3), saes=[spliced]))
    case.check(lambda model: model.run_with_saes(tokens(3), saes=[spliced], use_error_term=True))


@pytest.mark.parametrize("context", CONTEXTS)
@pytest.mark.parametrize("hook_name", WIDTHS)
def test_saes_added_before_wrapping_and_taken_away_inside(hook_name: str, context: str):
    model = sae_transformer()
    model.add_sae(sae_at(hook_name))
    case = case_of(model, context)
    case.check(lambda model: model(tokens(3)))
    case.check(lambda model: dict(model.run_with_cache(tokens(3))[1].items()))

    def without_and_with(model) -> list[Tensor]:
        model.reset_saes()
        outputs = [model(tokens(3))]
        model.add_sae(sae_at(hook_name))
        return [*outputs, model(tokens(3))]

    case.check(without_and_with)


@pytest.mark.parametrize(
    "options", [{}, {"gated_mlp": True}, {"act_fn": "solu_ln"}, MIXTURE], ids=["plain", "gated", "solu", "experts"]
)
def test_matrices_read_what_the_user_makes_of_hook_in(options):
    for context in CONTEXTS:
        case = case_of(sae_transformer(**options), context)
        case.check(lambda model: model.run_with_hooks(tokens(3), fwd_hooks=[("blocks.0.mlp.hook_in", double)]))
        case.check(lambda model: model.run_with_saes(tokens(3), saes=[sae_at("blocks.0.mlp.hook_in")]))


@pytest.mark.parametrize("hook_name", WIDTHS)
def test_attributions_are_those_of_the_spliced_model(hook_name: str, monkeypatch):
    keep_in_float64(monkeypatch)
    model = sae_transformer(dtype=torch.float64)
    decomposition = decomposition_of(model)
    without = decomposition.attributions(tokens(2))
    model.add_sae(sae_at(hook_name, "float64"))
    check_effects(decomposition, lambda: model(tokens(2)), tokens(2))
    assert (decomposition.attributions(tokens(2)) - without).abs().max() > 1e-3


def test_leaves_model_and_sae_as_they_were():
    model, sae = sae_transformer(), sae_at("blocks.0.attn.hook_z")
    model.add_sae(sae, use_error_term=True)
    expected, before, sae_before = model(tokens(3)), Snapshot.of(model), Snapshot.of(sae)
    decomposition = apd.decompose(
        model, [tokens(3)], n_components=3, rank=1, optimization=apd.Optimization(steps=3), progress=False
    )
    with decomposition.ablate([]):
        assert torch.equal(model(tokens(3)), expected)
    before.assert_unchanged(model)
    sae_before.assert_unchanged(sae)


def test_a_deepcopy_runs_the_mlp_of_its_original_and_is_refused():
    """SAELens's own closure: it goes on calling the MLP that it was made for."""
    model = sae_transformer()
    decomposition = decomposition_of(copy.deepcopy(model), "*.mlp.*")
    with pytest.raises(apd.errors.SiteNotCalled, match=r"went past blocks.0.mlp.hook_post, blocks.0.mlp.hook_pre"):
        decomposition.attributions(tokens(3))
