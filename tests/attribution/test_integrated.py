"""Integrated gradients and ablations: against known answers, completeness, and ablating one by one."""

import itertools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from support.attribution_hosts import HOSTS, host
from support.examples import run
from support.toy_models import Mixing, Snapshot, TinyGPT, decomposition_of, known
from torch import Tensor, nn
from torch.testing import assert_close

import apd_lens as apd
from apd_lens._settings import Attribution
from apd_lens.components._components import ParameterComponents
from apd_lens.data._batch import call
from apd_lens.data._inputs import read_batch
from apd_lens.data._points import zero_at_padding
from apd_lens.passes._cotangents import one_hot_cotangents
from apd_lens.passes._watch import watched_pass

GRANULARITIES = ("example", "position")

FORMS = [apd.IntegratedGradients(2), apd.IntegratedGradients(2, "zero", 3), apd.AblationAttribution()]


def attributing(decomposition: apd.Decomposition, attribution: Attribution) -> apd.Decomposition:
    """The same, with other attributions."""
    return replace(decomposition, settings=replace(decomposition.settings, attribution=attribution))


def brute_force(decomposition: apd.Decomposition, batch: Any) -> Tensor:
    """Each component (at each position) taken out alone, in a forward of its own."""
    target, valid = decomposition.target, read_batch(batch).valid
    n_components, granularity = decomposition.components.n_components, decomposition.settings.selection.granularity

    def output() -> Tensor:
        assert decomposition.output is not None
        return zero_at_padding(decomposition.output(call(target.model, batch)), valid).detach()

    full = output()
    n_outputs = torch.full((len(full),), full[0].numel())
    if valid is not None:
        n_outputs = valid.sum(1) * full.shape[-1]

    def effect(ablated: Tensor) -> Tensor:
        return ((full - ablated).square().flatten(1).sum(1) / n_outputs).sqrt()

    if granularity == "example":
        effects = []
        for c in range(n_components):
            with decomposition.ablate([c]):
                effects.append(effect(output()))
        return torch.stack(effects, 1)
    watched = watched_pass(target, decomposition.components.names, batch, decomposition.output)
    positions = watched.calls[0].y.shape[1:-1]
    effects = torch.zeros(len(full), *positions, n_components)
    for c in range(n_components):
        for position in itertools.product(*map(range, positions)):
            with target.intercepted(decomposition.components.names, without(decomposition.components, c, position)):
                effects[(slice(None), *position, c)] = effect(output())
    return zero_at_padding(effects, valid)


def without(components: ParameterComponents, c: int, position: tuple[int, ...]) -> Callable[..., Tensor]:
    def intercept(use: Any, x: Tensor, original: Callable[[], Tensor], bias: Tensor | None) -> Tensor:
        y = original().clone()
        at = (slice(None), *position)
        y[at] -= apd.components.component_outputs(x, *components.factors(use))[(*at, c)]
        return y

    return intercept


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("name", HOSTS)
def test_ablations_are_those_of_one_component_after_the_other(name, granularity):
    decomposition, batch = host(name, granularity)
    before = Snapshot.of(decomposition.target.model)
    attributions = attributing(decomposition, apd.AblationAttribution()).attributions(batch)
    before.assert_unchanged(decomposition.target.model)
    expected = brute_force(decomposition, batch)
    assert expected.max() > 0.01
    assert_close(attributions, expected, rtol=1e-4, atol=2e-6)


@pytest.mark.parametrize("method", [apd.AblationAttribution(), apd.IntegratedGradients(2, projections=5)])
@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("name", ["layers", "padding", "pixels"])
def test_chunks_change_nothing(name, granularity, method):
    decomposition, batch = host(name, granularity)
    expected = attributing(decomposition, method).attributions(batch)
    for memory in (1, 5000):
        chunked = attributing(decomposition, replace(method, memory=memory)).attributions(batch)
        assert_close(chunked, expected, rtol=1e-4, atol=2e-6)


def test_all_forms_agree_on_a_linear_model():
    """y = x diag(1, 2, 3, 4): removing component c changes y_c by scale_c x_c, and nothing bends in between."""
    x = torch.tensor([[1.0, -1.0, 0.0, 0.5], [0.0, 0.0, 2.0, 1.0]])
    expected = torch.tensor([[0.5, 1.0, 0.0, 1.0], [0.0, 0.0, 3.0, 2.0]])
    for attribution in (
        apd.GradientAttribution(),
        apd.IntegratedGradients(steps=1),
        apd.IntegratedGradients(steps=3, start="zero"),
        apd.AblationAttribution(),
    ):
        assert_close(attributing(known(), attribution).attributions(x), expected)


def test_the_forms_differ_where_the_model_bends_in_a_known_way():
    """y = x w², the matrix used twice, one component P = w: a gradient says 2 w² x, the ends of the path w² x."""

    class Twice(nn.Linear):
        def __init__(self):
            super().__init__(1, 1, bias=False)
            self.linear = nn.Linear(1, 1, bias=False)
            del self.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(self.linear(x))

    model, x = Twice(), torch.tensor([[1.0], [-2.0]])
    with torch.no_grad():
        model.linear.weight.fill_(3.0)
    start = decomposition_of(model, "linear.weight", n_components=1, rank=1, selection=apd.TopK(1))
    w = torch.full((1, 1, 1), 3.0)
    decomposition = replace(
        start, components=apd.ParameterComponents({"linear.weight": w}, {"linear.weight": w.new_ones(1, 1, 1)})
    )
    for attribution, factor in (
        (apd.GradientAttribution(), 18.0),
        (apd.IntegratedGradients(steps=1), 9.0),  # the midpoint rule is exact for what is linear in t
        (apd.IntegratedGradients(start="zero"), 9.0),
        (apd.AblationAttribution(), 9.0),
    ):
        assert_close(attributing(decomposition, attribution).attributions(x), factor * x.abs())


def ends(decomposition: apd.Decomposition, start: str, batch: Any) -> Tensor:
    """The difference that the whole path makes to each output."""
    model, everything = decomposition.target.model, range(decomposition.components.n_components)
    on, off = {
        "all": (decomposition.ablate([]), decomposition.ablate(everything)),
        "zero": (decomposition.only(everything), decomposition.only([])),
    }[start]
    with torch.no_grad():
        with on:
            last = call(model, batch)
        with off:
            return last - call(model, batch)


@pytest.mark.parametrize("start", ["all", "zero"])
@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("name", ["one matrix", "layers", "positions", "HookedTransformer"])
def test_integrated_effects_are_complete(name, granularity, start):
    """Σ_c (and Σ over positions) is the difference between the ends of the path; more points bring it nearer."""
    decomposition, batch = host(name, granularity)
    components = decomposition.components
    watched = watched_pass(decomposition.target, components.names, batch, decomposition.output)
    expected = ends(decomposition, start, batch).flatten(1).mT
    errors = []
    for steps in (3, 24):
        method = apd.IntegratedGradients(steps, start)
        effects = method.effects(watched, one_hot_cotangents(watched.output), components, granularity)
        assert (effects.ndim > 3) == (granularity == "position" and name in ("positions", "HookedTransformer"))
        errors.append((effects.flatten(2).sum(2) - expected).abs().max().item())
    assert errors[1] < 0.01 * expected.abs().max() + 1e-5
    assert errors[1] < errors[0] or errors[0] < 1e-5


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("form", FORMS)
def test_training_with_each_form_and_saving(form, granularity, tmp_path):
    model, batch = TinyGPT(), torch.randint(11, (3, 4))
    before = Snapshot.of(model)
    decomposition = apd.decompose(
        model,
        [batch],
        ["fc.*", "proj.*"],
        n_components=4,
        rank=2,
        attribution=form,
        selection=apd.TopK(1, granularity),
        optimization=apd.Optimization(steps=3),
        progress=False,
    )
    before.assert_unchanged(model)
    assert decomposition.attributions(batch).shape == ((3, 4) if granularity == "example" else (3, 4, 4))
    decomposition.save(tmp_path)
    loaded = apd.load(tmp_path, model)
    assert loaded.settings.attribution == form
    assert torch.equal(loaded.attributions(batch), decomposition.attributions(batch))


@pytest.mark.parametrize("form", FORMS)
def test_padding_has_no_attribution_and_gives_none(form):
    """Each example alone, without its padding, has the same."""
    decomposition, batch = host("padding", "position")
    decomposition = attributing(decomposition, replace(form, **({} if form == FORMS[2] else {"projections": "exact"})))
    attributions = decomposition.attributions(batch)
    assert attributions[batch["attention_mask"] == 0].abs().max() == 0
    for index, length in enumerate(batch["attention_mask"].sum(1).tolist()):
        alone = {"input_ids": batch["input_ids"][index : index + 1, :length]}
        assert_close(attributions[index, :length], decomposition.attributions(alone)[0], rtol=1e-4, atol=2e-6)


def test_estimates_of_integrated_gradients_are_unbiased():
    decomposition, x = host("layers")
    exact = attributing(decomposition, apd.IntegratedGradients(3, projections="exact")).attributions(x)
    many = attributing(decomposition, apd.IntegratedGradients(3, projections=3000)).attributions(x)
    assert_close(many, exact, rtol=0.15, atol=1e-4)


def test_ablations_of_matrices_on_different_positions_cannot_share_attributions():
    class Pooling(Mixing):
        def forward(self, x: Tensor) -> Tensor:
            return self.write(torch.tanh(self.read(x)).sum(1))

    decomposition, x = decomposition_of(Pooling(), selection=apd.TopK(1, "position")), torch.randn(2, 5, 3)
    for form in FORMS:
        with pytest.raises(apd.ShapeMismatch, match=r"write\.weight was used on \(2,\).*before it on \(2, 5\)"):
            attributing(decomposition, form).attributions(x)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: apd.IntegratedGradients(0), "at least 1 step, got 0"),
        (lambda: apd.IntegratedGradients(projections=0), "projections must be at least 1"),
        (lambda: apd.AblationAttribution(memory=0), "memory must be at least 1 byte"),
    ],
)
def test_settings_that_cannot_work_are_refused(make, message):
    with pytest.raises(apd.errors.InvalidSetting, match=message):
        make()


def test_a_batch_is_replicated_where_it_has_an_entry_for_each_example():
    tokens, scale = torch.arange(6).view(3, 2), torch.tensor(2.0)
    batch = {"tokens": tokens, "scale": scale, "positions": torch.arange(2), "flag": True}
    twice = read_batch(batch).replicated(2).batch
    assert torch.equal(twice["tokens"], torch.cat([tokens, tokens]))
    assert all(twice[name] is batch[name] for name in ("scale", "positions", "flag"))
    assert torch.equal(read_batch((tokens, scale)).replicated(3).batch[0], tokens.repeat(3, 1))
    assert read_batch(["a", "b"]).replicated(2).batch == ["a", "b", "a", "b"]
    assert torch.equal(read_batch(tokens).replicated(4).some(slice(3, 6)).batch, tokens)


def test_ablations_run_as_few_passes():
    """7 components of one matrix, 5 examples: one pass where memory is ample."""
    model, passes = nn.Linear(4, 3), []
    model.register_forward_hook(lambda module, args, y: passes.append(len(y)))
    decomposition, x = decomposition_of(model, n_components=7), torch.randn(5, 4)
    attributing(decomposition, apd.AblationAttribution()).attributions(x)
    assert passes == [5, 35]
    passes.clear()
    attributing(decomposition, apd.AblationAttribution(memory=15 * 4 * (4 + 3 + 9))).attributions(x)
    assert passes == [5, 15, 15, 5]


@pytest.mark.thorough
def test_the_example_compares_methods():
    printed = run("attribution_methods.py", "--steps", "20", "--prompts", "8")
    assert printed.count("integrated gradients, 8 points") == printed.count("null: gradient, shuffled") == 5
