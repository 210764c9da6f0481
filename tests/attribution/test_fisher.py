"""Attributions in the metric of the output's own distribution."""

import pytest
import torch
from scipy.stats import spearmanr
from support.toy_models import ResidualMLP
from torch.testing import assert_close
from transformers import GPT2Config, GPT2LMHeadModel

import apd_lens as apd
from apd_lens.losses._outputs import kl_divergence
from apd_lens.passes._watch import fisher_coordinates


def decomposition(n_outputs: int = 6, **options) -> apd.Decomposition:
    torch.manual_seed(0)
    model = ResidualMLP(n_outputs, 12, 9, 2)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2)
    settings = {"n_components": 7, "rank": 2, "moves": None, "losses": apd.Losses(distance="kl")} | options
    return apd.init(model, **settings).decomposition()


def test_lengths_are_those_of_kl():
    f = torch.randn(5, 3, 11, dtype=torch.float64)
    change = torch.randn_like(f)
    _, moved = torch.autograd.functional.jvp(fisher_coordinates, f, change)
    small = 1e-4
    assert_close(moved.square().mean(-1) / 2, kl_divergence(f, f + small * change) / small**2, rtol=1e-2, atol=1e-6)


@pytest.mark.parametrize("granularity", ["example"])
def test_attributions_are_brute_force(granularity):
    d = decomposition(attribution=apd.GradientAttribution(projections="exact"))
    x = torch.randn(4, 6)
    model, C = d.target.model, d.components.n_components
    p = model(x).detach().softmax(-1)
    small, effects = 1e-3, []
    for c in range(C):
        for parameter_change in (small,):
            weights = {name: d.target.weights[name].parameter for name in d.components.names}
            before = {name: weight.detach().clone() for name, weight in weights.items()}
            outputs = []
            for sign in (1, -1):
                with torch.no_grad():
                    for name, weight in weights.items():
                        P = d.components.component_weights(name)[c]
                        weight.copy_(before[name] + sign * parameter_change * (P if weight.shape == P.shape else P.T))
                    outputs.append(model(x).double())
                    for name, weight in weights.items():
                        weight.copy_(before[name])
            effects.append((outputs[0] - outputs[1]) / (2 * parameter_change))
    e = torch.stack(effects, 1)  # batch C outputs
    centred = e - (p[:, None].double() * e).sum(-1, keepdim=True)
    expected = (p[:, None].double() * centred.square()).sum(-1).sqrt().float()
    assert_close(d.attributions(x), expected, rtol=2e-2, atol=1e-3)


def test_they_are_the_default_where_the_distance_is_kl():
    x = torch.randn(3, 6)
    by_default = decomposition().attributions(x)
    assert_close(by_default, decomposition(attribution=apd.GradientAttribution(metric="fisher")).attributions(x))
    outputs = decomposition(attribution=apd.GradientAttribution(metric="outputs")).attributions(x)
    assert_close(outputs, decomposition(losses=apd.Losses()).attributions(x))
    assert not torch.allclose(outputs, by_default, rtol=0.1)


def test_few_projections_and_many_outputs_agree_on_average():
    d = decomposition(attribution=apd.GradientAttribution(projections=3000))
    exact = decomposition(attribution=apd.GradientAttribution(projections="exact"))
    x = torch.randn(3, 6)
    assert_close(d.attributions(x), exact.attributions(x), rtol=0.1, atol=1e-2)


def test_small_memory_changes_nothing():
    x = torch.randn(6, 6)
    for projections in ("exact", 5):
        of = {
            memory: decomposition(
                attribution=apd.GradientAttribution(projections=projections, fixed=True, memory=memory)
            ).attributions(x)
            for memory in (2**20, 2000)
        }
        assert_close(of[2**20], of[2000])


def test_fixed_projections_are_pulled_back_once(monkeypatch):
    import apd_lens.attribution._pullback as pullback

    torch.manual_seed(0)
    model = ResidualMLP(6, 12, 9, 2)
    attribution = apd.GradientAttribution(projections=5, fixed=True)
    state = apd.init(model, n_components=5, attribution=attribution, losses=apd.Losses(distance="kl"))
    counts = []
    original = pullback._chunks
    monkeypatch.setattr(pullback, "_chunks", lambda *args: counts.append(1) or original(*args))
    x = torch.randn(4, 6)
    for _ in range(3):
        state, _ = apd.step(state, x)
    assert len(counts) == 1
    state, _ = apd.step(state, torch.randn(4, 6))
    assert len(counts) == 2


def last(output) -> torch.Tensor:
    return output.logits[:, -1]


def test_ranks_agree_better_with_kl_than_ranks_by_outputs():
    """Each component out, on a softmax over many outputs of which few have probability."""
    torch.manual_seed(0)
    config = GPT2Config(n_layer=2, n_head=2, n_embd=32, vocab_size=500, n_positions=8, bos_token_id=0, eos_token_id=0)
    model = GPT2LMHeadModel(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(4)
        model.transformer.wte.weight.mul_(6)  # a few tokens have nearly all probability, as in a language model
    agreement = {}
    for metric in ("outputs", "fisher"):
        attribution = apd.GradientAttribution(projections=8, metric=metric, fixed=True)
        d = apd.init(
            model,
            weights="*attn*",
            n_components=40,
            rank=2,
            attribution=attribution,
            losses=apd.Losses(distance="kl"),
            output=last,
        ).decomposition()
        x = torch.randint(500, (12, 5), generator=torch.Generator().manual_seed(1))
        with torch.no_grad():
            target, kls = last(model(x)), []
            for c in range(40):
                with d.ablate([c]):
                    kls.append(kl_divergence(target, last(model(x))))
        kl, attributions = torch.stack(kls, 1), d.attributions(x)
        ranks = [spearmanr(kl[i], attributions[i]).statistic for i in range(len(x))]
        agreement[metric] = sum(ranks) / len(ranks)
    assert agreement["fisher"] > agreement["outputs"] + 0.1, agreement
