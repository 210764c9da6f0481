"""What is kept of a batch for the time that it comes again."""

from dataclasses import replace

import pytest
import torch
from support.toy_models import ResidualMLP, tiny_llama
from torch.testing import assert_close

import apd_lens as apd
from apd_lens.training import _seen


@pytest.fixture
def passes(monkeypatch) -> list[str]:
    """Which passes of the target were run."""
    found = []
    for name, attribute in (("watched_pass", "watched_in_pieces"), ("replaced_pass", "replaced_pass")):
        original = getattr(_seen, attribute)
        monkeypatch.setattr(
            _seen,
            attribute,
            lambda *args, name=name, original=original, **kw: found.append(name) or original(*args, **kw),
        )
    return found


def state(**options) -> apd.training.State:
    torch.manual_seed(1)
    model = ResidualMLP(4, 6, 5, 1)
    settings = {"n_components": 5, "rank": 2, "moves": None, "selection": apd.TopK(1)}
    settings |= {"optimization": apd.Optimization(start="random")} | options
    return apd.init(model, **settings)


def of_list(batches: list[tuple[torch.Tensor]], **options) -> apd.training.State:
    """Of a training on a list, whose batches come again."""
    return state(batches=[x for (x,) in batches], **options)


def run(state: apd.training.State, *batches) -> apd.training.State:
    for batch in batches:
        state, _ = apd.step(state, *batch)
    return state


def test_a_batch_that_comes_again_is_watched_once_in_each_stream(passes):
    x, y = torch.randn(8, 4), torch.randn(6, 4)
    some = state(elsewhere=apd.Elsewhere(), losses=apd.Losses(faithfulness=0.0))
    run(some, (x, y), (x, y), (x, y))
    assert passes == ["watched_pass"] * 2


def test_of_many_batches_each_is_watched_once(passes):
    batches = [(torch.randn(3, 4),) for _ in range(4)]
    after = run(of_list(batches), *batches, *batches)
    assert passes == ["watched_pass"] * 4
    assert len(after.seen) == 4


def test_with_what_was_kept_factors_are_bit_for_bit_the_same():
    batches = [(torch.randn(3, 4),) for _ in range(3)]
    kept, fresh = of_list(batches), state()
    for batch in [*batches, *batches]:
        kept, _ = apd.step(kept, *batch)
        fresh, _ = apd.step(replace(fresh, seen=()), *batch)
    for one, other in zip(kept.components.parameters(), fresh.components.parameters(), strict=True):
        assert torch.equal(one, other)


def test_a_batch_that_was_changed_is_another(passes):
    x = torch.randn(3, 4)
    some = run(state(), (x,))
    x.data[0] = 0
    run(some, (x,))
    assert passes == ["watched_pass"] * 2


def test_batches_that_the_user_has_given_up_are_forgotten():
    some = of_list([(torch.randn(3, 4),)])
    for _ in range(5):
        some = run(some, (torch.randn(3, 4),))
    assert len(some.seen) <= 2


def test_of_batches_that_may_not_come_again_the_last_one_is_kept(passes):
    batches = [(torch.randn(3, 4),) for _ in range(3)]
    after = run(state(), *batches, batches[-1], batches[0])
    assert len(after.seen) == 1
    assert passes == ["watched_pass"] * 4
    many = state(batches=[x for (x,) in batches], optimization=apd.Optimization(steps=3))
    assert not many.returning


def test_a_model_that_was_changed_beside_the_decomposed_matrices_is_watched_again(passes):
    x = torch.randn(3, 4)
    some = run(state(weights="layers.0.mlp_out*"), (x,), (x,))
    assert passes == ["watched_pass"]
    with torch.no_grad():
        some.target.weights["layers.0.mlp_in.weight"].parameter.mul_(2)
    after = run(some, (x,))
    assert passes == ["watched_pass"] * 2
    torch.testing.assert_close(after.seen[-1].watched.output, some.target.model(x))


def test_where_memory_is_short_outputs_go_first_and_nothing_changes(passes, monkeypatch):
    batches = [(torch.randn(3, 4),) for _ in range(3)]
    whole = run(of_list(batches), *batches, *batches)
    passes.clear()
    n_bytes = whole.seen[0].n_bytes
    monkeypatch.setattr(_seen, "KEPT", 2 * n_bytes - 10)
    short = run(of_list(batches), *batches, *batches)
    assert passes == ["watched_pass"] * 3 + ["replaced_pass"] + ["watched_pass"]
    for one, other in zip(short.components.parameters(), whole.components.parameters(), strict=True):
        assert_close(one, other)


def test_fresh_projections_watch_again():
    passes = []
    attribution = apd.GradientAttribution(projections=2)
    some, x = state(attribution=attribution), torch.randn(3, 4)
    original = _seen.watched_in_pieces
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_seen, "watched_in_pieces", lambda *args, **kw: passes.append(1) or original(*args, **kw))
        run(some, (x,), (x,))
    assert len(passes) == 2


def test_what_a_fitted_start_looked_at_serves_the_steps():
    torch.manual_seed(0)
    x, y = torch.randint(13, (4, 5)), torch.randint(13, (3, 6))
    fitted = apd.init(
        tiny_llama(num_hidden_layers=3),
        weights="model.layers.2.self_attn.[vo]_proj*",
        n_components=6,
        batches=[x],
        others=[y, y],
        **apd.language_model(),
    )
    assert [(one.stream, one.watched) for one in fitted.seen] == [("", None), ("others", None)]
    assert all(one.inputs.kept for one in fitted.seen)
    after, _ = apd.step(fitted, x, y)
    assert [one.inputs for one in after.seen] == [one.inputs for one in fitted.seen]


def test_a_fitted_start_needs_data():
    with pytest.raises(apd.errors.InvalidSetting, match=r"init\(…, batches="):
        state(optimization=apd.Optimization(start="data"))
