"""Exact attributions by Jacobian-vector products: equal to those by vector-Jacobian ones, on every host."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from support.attribution_hosts import HOSTS, host
from support.bridges import bridge
from support.toy_models import (
    Snapshot,
    TinyGPT,
    decomposition_of,
    keep_in_float64,
    substituted,
    tiny_gpt2,
    tiny_llama,
    with_fingerprints_renewed,
)
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.testing import assert_close

import apd_lens as apd
from apd_lens.attribution import _gradient
from apd_lens.attribution._pushforward import pushforward
from apd_lens.masks._error import AttributionError

GRANULARITIES = ("example", "position")
TOKENS = torch.randint(2, 11, (3, 5), generator=torch.Generator().manual_seed(1))


def attributing(decomposition: apd.Decomposition, *args: Any, **changes: Any) -> apd.Decomposition:
    """The same, with these gradient attributions."""
    attribution = apd.GradientAttribution(*args, **changes)
    return replace(decomposition, settings=replace(decomposition.settings, attribution=attribution))


def exact(monkeypatch: pytest.MonkeyPatch, by: str, decomposition: apd.Decomposition, batch: Any, **changes) -> Tensor:
    """Exact attributions by the one kind of products or the other."""
    with monkeypatch.context() as patch:
        patch.setattr(_gradient, "CLEARLY_FEWER", {"jvps": 0, "vjps": 10**9}[by])
        return attributing(decomposition, "exact", **changes).attributions(batch)


def has_jvps(decomposition: apd.Decomposition, batch: Any) -> bool:
    return pushforward(decomposition.watch(batch)) is not None


def in_float64(batch: Any) -> Any:
    if isinstance(batch, dict):
        return {name: in_float64(value) for name, value in batch.items()}
    if isinstance(batch, tuple):
        return tuple(map(in_float64, batch))
    return batch.double() if batch.is_floating_point() else batch


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("name", HOSTS)
def test_both_kinds_of_products_agree(monkeypatch, name: str, granularity):
    keep_in_float64(monkeypatch)
    decomposition, batch = host(name, granularity)
    decomposition.target.model.double(), decomposition.components.double()
    decomposition, batch = with_fingerprints_renewed(decomposition), in_float64(batch)
    assert has_jvps(decomposition, batch)
    expected = exact(monkeypatch, "vjps", decomposition, batch)
    assert expected.max() > 1e-3
    assert_close(exact(monkeypatch, "jvps", decomposition, batch), expected, rtol=1e-9, atol=1e-9)


LANGUAGE_MODELS = {
    "gpt2": (tiny_gpt2, "*"),
    "gpt2, eager": (lambda: tiny_gpt2(attn_implementation="eager"), "transformer.h.*"),
    "llama": (tiny_llama, "*"),
    "bridge of gpt2": (lambda: bridge("gpt2"), "*"),
    "bridge of llama": (lambda: bridge("llama"), "*"),
    "bridge of mixtral": (lambda: bridge("mixtral"), "*"),
}


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("name", LANGUAGE_MODELS)
def test_language_models_in_float32(monkeypatch, name: str, granularity):
    """3 components against 5 · 13 outputs; fused attention, which has no second derivative, is left aside."""
    make_model, weights = LANGUAGE_MODELS[name]
    decomposition = decomposition_of(make_model(), weights, n_components=3, selection=apd.TopK(1, granularity))
    assert has_jvps(decomposition, TOKENS)
    came = exact(monkeypatch, "jvps", decomposition, TOKENS)
    assert_close(came, exact(monkeypatch, "vjps", decomposition, TOKENS), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("memory", [1, 20_000])
def test_chunks_change_nothing(monkeypatch, memory: int, granularity):
    """One product at a time, and a few."""
    decomposition, batch = host("padding", granularity)
    whole = exact(monkeypatch, "jvps", decomposition, batch)
    assert_close(exact(monkeypatch, "jvps", decomposition, batch, memory=memory), whole, rtol=1e-5, atol=1e-7)


def test_finite_differences_of_a_thousand_outputs():
    """5 · 1000 outputs, 6 components, whose attributions are no others' (the null control)."""
    model = TinyGPT(d_vocab=1000).double()
    decomposition = attributing(decomposition_of(model, n_components=6), "exact")
    weights, components, step = decomposition.target.weights, decomposition.components, 1e-6
    expected = []
    for component in range(6):
        outputs = []
        for sign in (1, -1):
            values = {name: weights[name].value() + sign * step * components.component_weights(name)[component].detach()
                      for name in weights}  # fmt: skip
            with substituted(decomposition.target, values), torch.no_grad():
                outputs.append(model(TOKENS))
        expected.append(((outputs[0] - outputs[1]) / (2 * step)).flatten(1).square().mean(1).sqrt())
    expected, came = torch.stack(expected, 1), decomposition.attributions(TOKENS)
    assert_close(came, expected, rtol=1e-6, atol=1e-9)
    assert (came.roll(1, 1) / expected - 1).abs().max() > 0.05


def test_bf16_autocast_and_the_model_unchanged(monkeypatch):
    decomposition = decomposition_of(tiny_gpt2(), "transformer.h.*", n_components=3)
    expected = exact(monkeypatch, "vjps", decomposition, TOKENS)
    before = Snapshot.of(decomposition.target.model)
    with torch.autocast("cpu", torch.bfloat16):
        assert has_jvps(decomposition, TOKENS)
        came = exact(monkeypatch, "jvps", decomposition, TOKENS)
    before.assert_unchanged(decomposition.target.model)
    assert came.dtype == torch.float32
    assert_close(came, expected, rtol=0.05, atol=0)


def test_the_fewer_products_are_taken(monkeypatch):
    taken = []
    monkeypatch.setattr(_gradient, "pushforward", lambda watched: taken.append("jvps") or pushforward(watched))
    x = torch.randn(3, 5)

    def asked(n_outputs: int, n_components: int, projections: Any = "auto") -> list[str]:
        taken.clear()
        decomposition = decomposition_of(nn.Linear(5, n_outputs), n_components=n_components)
        decomposition = attributing(decomposition, projections)
        decomposition.attributions(x)
        return list(taken)

    assert (asked(20, 10), asked(20, 11)) == (["jvps"], [])
    assert (asked(200, 100, "exact"), asked(200, 101, "exact")) == (["jvps"], [])
    assert (asked(200, 4), asked(200, 5)) == (["jvps"], [])  # beside 8 projections
    assert asked(200, 4, 8) == []


def test_few_components_make_auto_exact():
    x = torch.randn(8, 6)
    for n_components, is_exact in ((4, True), (5, False)):
        decomposition = decomposition_of(nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 300)),
                                         n_components=n_components)  # fmt: skip
        expected = attributing(decomposition, "exact").attributions(x)
        came = attributing(decomposition, "auto")
        assert torch.allclose(came.attributions(x), expected, rtol=1e-4) == is_exact
        assert (came.attribution_error(x) == AttributionError(0.0, 1.0)) == is_exact


class OnlyOnce(torch.autograd.Function):
    """sin, marked as not to be differentiated twice."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.sin()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient * ctx.saved_tensors[0].cos()


class WithoutGraph(OnlyOnce):
    """sin, whose backward pass leaves no graph and says nothing of it, as one in a kernel of its own."""

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        with torch.no_grad():
            return gradient * ctx.saved_tensors[0].cos()


class Beside(nn.Module):
    """The operation is one of two ways from `first` to the output."""

    def __init__(self, operation: Any, size: float):
        super().__init__()
        self.first, self.last, self.operation, self.size = nn.Linear(4, 4), nn.Linear(4, 300), operation, size

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        return self.last(y.sigmoid() + self.size * self.operation(y))


@pytest.mark.parametrize("operation", [OnlyOnce, WithoutGraph])
@pytest.mark.parametrize("size", [0.1, 0.003])
def test_what_cannot_be_differentiated_twice_takes_the_other_products(operation, size: float):
    generator = torch.Generator().manual_seed(0)
    x, results = torch.randn(3, 4, generator=generator), {}
    for used in (torch.sin, operation.apply):
        torch.manual_seed(0)
        decomposition = decomposition_of(Beside(used, size), n_components=3)
        assert has_jvps(decomposition, x) == (used is torch.sin)
        results[used] = attributing(decomposition, "exact").attributions(x)
        auto = attributing(decomposition, "auto")
        assert (auto.attribution_error(x) == AttributionError(0.0, 1.0)) == (used is torch.sin)
    assert_close(results[operation.apply], results[torch.sin], rtol=1e-4, atol=1e-6)


def test_the_lp_form_still_has_gradients():
    """Its attributions lead to the factors, so it keeps to vector-Jacobian products."""
    exact = apd.GradientAttribution("exact")
    options = {"losses": apd.Losses(path=0.0), "moves": None}
    state = apd.init(nn.Linear(5, 40), n_components=3, selection=apd.Lp(0.9), attribution=exact, **options)
    before = state.components.A["weight"].detach().clone()
    state, info = apd.step(state, torch.randn(6, 5))
    assert info.terms["minimality"] > 0
    assert not torch.equal(state.components.A["weight"], before)
