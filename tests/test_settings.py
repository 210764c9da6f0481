import math

import pytest
import torch
from support import outside

import apd_lens as apd
from apd_lens._settings import learning_rate

WRONG = {
    "apd.Losses(schatten_p=0)": "schatten_p must be positive, got 0.",
    "apd.Losses(distance='l1')": "Losses(distance=...) takes",
    "apd.Losses(normalization='none')": "Losses(normalization=...) takes Literal['paper', 'relative'], got 'none'.",
    "apd.Losses(hidden=1.0)": "hidden and hidden_at go together",
    "apd.Losses(faithfulness='1')": "Losses(faithfulness=...) takes float | HoldThenDecay | Ramp, got '1'.",
    "apd.HoldThenDecay(1.0, hold=0.9, zero=0.8)": "needs 0 <= hold <= zero, got hold=0.9, zero=0.8.",
    "apd.TopK(1.5)": "TopK(k=...) takes int, got 1.5.",
    "apd.TopK(1, granularity='token')": "TopK(granularity=...) takes Literal['example', 'position'], got 'token'.",
    "apd.BatchTopK('1')": "BatchTopK(k=...) takes float | Ramp | Needed | Callable[[Any], float], got '1'.",
    "apd.masks.Needed(0.05)": "Needed takes 0 < lowest <= now, and a growth and a decline from 1 on",
    "apd.BatchTopK(apd.masks.Needed())": "BatchTopK(k=Needed()) needs least > 0",
    "apd.BatchTopK(1.0, least=1.0)": "least is a share of the largest attribution, 0 <= least < 1, got 1.0.",
    "apd.Lp(0.0)": "Lp needs a positive p, got p=0.0.",
    "apd.Lp(apd.Ramp(2.0, -1.0))": "Lp needs a positive p, got p=Ramp(start=2.0, end=-1.0",
    "apd.Lp(threshold=-1.0)": "Attributions are never negative, so threshold=-1.0 selects all.",
    "apd.GradientAttribution('exakt')": "GradientAttribution(projections=...) takes",
    "apd.GradientAttribution(0)": "projections must be at least 1, got 0.",
    "apd.moves.SplitMoves(every=0)": "SplitMoves needs every >= 1 step, got 0.",
    "apd.Optimization(steps=-1)": "Optimization needs 0 steps or more, got -1.",
    "apd.Optimization(schedule='cos')": "takes Literal['cosine', 'linear', 'constant'], got 'cos'.",
    "apd.Optimization(warmup=1.0)": "warmup is a share of the steps, 0 <= warmup < 1, got 1.0.",
    "apd.decompose(linear, [x], n_components='3')": "'n_components'.\nActual value: '3'\nExpected type: <class 'int'>.",
    "apd.init(linear, n_components=3, losses={'path': 1})": "'losses'.",
}


def test_what_cannot_work_is_refused():
    setup = "import torch, apd_lens as apd; linear, x = torch.nn.Linear(2, 2), torch.ones(1, 2)"
    for (code, message), came in zip(WRONG.items(), outside.errors_of(setup, WRONG), strict=True):
        assert came.startswith("InvalidSetting: "), code
        assert message in came, code


def test_whole_numbers_are_welcome_as_floats():
    assert outside.run("import apd_lens as apd; print(apd.Losses(faithfulness=30).faithfulness)") == "30\n"


@pytest.mark.parametrize(
    ("schedule", "at_half"), [("constant", 1.0), ("linear", 0.5), ("cosine", math.cos(math.pi / 4))]
)
def test_learning_rate(schedule, at_half: float):
    plain = apd.Optimization(steps=100, lr=2.0, schedule=schedule, warmup=0.0)
    assert learning_rate(plain, 0) == 2.0
    assert learning_rate(plain, 50) == pytest.approx(2.0 * at_half)
    warm = apd.Optimization(steps=100, lr=2.0, schedule=schedule, warmup=0.1)
    assert [learning_rate(warm, step) for step in (0, 4, 9, 10)] == pytest.approx([0.2, 1.0, 2.0, 2.0])
    assert learning_rate(warm, 55) == pytest.approx(2.0 * at_half)


def test_nothing_said_is_the_default_settings_and_none_switches_moves_off():
    model = torch.nn.Linear(30, 20)
    state = apd.init(model, n_components=2)
    nothing_to_fit = apd.Optimization(start="random")
    assert state.settings == apd.decomposition.Settings(optimization=nothing_to_fit)
    assert state.settings.moves == apd.moves.ClusterMoves()
    assert state.components.A["weight"].shape == (2, 30, 4)
    assert apd.init(model, n_components=2, moves=None).settings.moves is None


def test_the_papers_own_form_is_asked_for_by_name():
    state = apd.init(torch.nn.Linear(30, 20), n_components=2, **apd.paper())
    settings, losses = state.settings, state.settings.losses
    assert (settings.selection, settings.moves) == (apd.BatchTopK(1.0), None)
    assert (losses.path, losses.simplicity_floor, losses.normalization) == (0.0, 0.0, "paper")
    assert state.components.A["weight"].shape == (2, 30, 20)
    assert state.components.A["weight"].std().item() == pytest.approx((2 / 50) ** 0.5, rel=0.1)


@pytest.mark.parametrize(("scaled", "of_A", "of_B"), [(False, 0.1, 0.1), (True, 0.3 * (2 / 44) ** 0.5, 0.3 * 0.5)])
def test_a_scaled_learning_rate_is_in_units_of_xaviers_start(scaled: bool, of_A: float, of_B: float):
    """Adam's first step has the size of the learning rate. The matrix is nine times one of Xavier's."""
    optimization = apd.Optimization(steps=9, lr=0.1, scaled=scaled, schedule="constant", warmup=0.0)
    model = torch.nn.Linear(40, 4)
    model.weight.data *= 9 * (2 / 44) ** 0.5 / model.weight.square().mean().sqrt()
    state = apd.init(model, n_components=3, rank=4, optimization=optimization)
    A, B = (factors["weight"].detach().clone() for factors in (state.components.A, state.components.B))
    state, info = apd.step(state, torch.randn(50, 40))
    assert info.learning_rate == 0.1
    assert (state.components.A["weight"] - A).abs().max().item() == pytest.approx(of_A, rel=1e-3)
    assert (state.components.B["weight"] - B).abs().max().item() == pytest.approx(of_B, rel=1e-3)
