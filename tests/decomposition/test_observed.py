"""One pass of the target shows output, attributions and mask."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from support.toy_models import ResidualMLP, decomposition_of
from torch.testing import assert_close

import apd_lens as apd


@pytest.fixture
def decomposition() -> apd.Decomposition:
    return decomposition_of(ResidualMLP(4, 6, 5, 1), ["layers.*"], n_components=5, rank=2)


@contextmanager
def counted(model: torch.nn.Module) -> Iterator[list[None]]:
    """Inside, the list has an entry for each forward of the model."""
    passes: list[None] = []
    hook = model.register_forward_pre_hook(lambda *_: passes.append(None))
    yield passes
    hook.remove()


def test_observe_shows_all_of_a_batch_in_one_pass(decomposition: apd.Decomposition):
    x, model = torch.randn(8, 4), decomposition.target.model
    with counted(model) as passes:
        seen = decomposition.observe(x, k=2.0)
        mask = seen.mask
    assert len(passes) == 1
    assert_close(seen.output, model(x))
    assert not seen.output.requires_grad
    assert torch.equal(seen.attributions, decomposition.attributions(x))
    assert torch.equal(mask, decomposition.select(x, k=2.0))
    assert torch.equal(seen.select(1.0), decomposition.select(x, k=1.0))
    assert seen.valid is None
    assert seen.inputs.n_examples == 8


def test_attributions_are_seen_where_nothing_says_what_is_active(decomposition: apd.Decomposition):
    x, settings = torch.randn(8, 4), apd.decomposition.Settings(selection=apd.Lp())
    seen = replace(decomposition, settings=settings).observe(x)
    assert seen.attributions.shape == (8, 5)
    with pytest.raises(apd.errors.InvalidSetting, match="trained without a mask"):
        seen.mask  # noqa: B018
    assert seen.select(2.0).sum() == 16


def test_a_summary_says_how_far_estimates_are_off_from_the_same_pass(decomposition: apd.Decomposition):
    x, model = torch.randn(8, 4), decomposition.target.model
    attribution = apd.GradientAttribution(projections=4)
    settings = apd.decomposition.Settings(selection=apd.BatchTopK(1.0), attribution=attribution)
    estimated = replace(decomposition, settings=settings)
    with counted(model) as passes:
        summary = estimated.summary(x)
    assert len(passes) == 1
    assert summary.agreement == pytest.approx(estimated.attribution_error(x).agreement)
    assert_close(summary.attribution, estimated.attributions(x).mean(0))


def test_what_looks_at_a_batch_runs_the_target_once(decomposition: apd.Decomposition):
    """The other passes are those of sparse models: one of a monitor, many of an audit."""
    x, model = torch.randn(8, 4), decomposition.target.model
    decomposition = replace(decomposition, settings=apd.decomposition.Settings(selection=apd.BatchTopK(1.0)))
    for look, n in (
        (lambda: decomposition.summary(x), 1),
        (lambda: apd.monitor.fit(decomposition, [x]), 2),
        (lambda: apd.monitor.fit(decomposition, [x]).score(x), 4),
        (lambda: apd.metrics.audit(decomposition, [x], ladder=(1,), unions=(), n_draws=1, progress=False), 1 + 30),
    ):
        with counted(model) as passes:
            look()
        assert len(passes) == n
