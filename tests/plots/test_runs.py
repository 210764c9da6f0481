"""Figures of runs: losses, living components, seeds."""

import math
from dataclasses import replace

import pytest
import torch
from support.figures import lines, shown
from support.toy_models import linear_of_known_parts
from torch.testing import assert_close

import apd_lens as apd
from apd_lens import plots


def history_of_a_run(steps: int) -> list[apd.training.StepInfo]:
    model, _ = linear_of_known_parts()
    history: list[apd.training.StepInfo] = []
    apd.decompose(
        model,
        lambda step: torch.eye(4)[torch.randint(4, (32,), generator=torch.Generator().manual_seed(step))],
        n_components=6,
        losses=apd.Losses(path=0.5, simplicity=apd.HoldThenDecay(0.7)),
        moves=apd.moves.SplitMoves(every=4),
        optimization=apd.Optimization(steps=steps),
        on_step=lambda step, info: history.append(info),
        progress=False,
    )
    return history


def test_losses_of_a_run_are_drawn_without_coefficients():
    history = history_of_a_run(20)
    (ax,) = plots.loss_curves(history).axes
    assert ax.get_yscale() == "log"
    assert list(lines(ax)) == ["faithfulness", "minimality", "simplicity", "path"]
    for name, (steps, values) in lines(ax).items():
        assert steps == list(range(20))
        assert values == pytest.approx([info.terms[name].item() for info in history])


def test_long_histories_are_averaged_and_gaps_left_out():
    history = [{"step": 10 * i, "loss": 1.0 + i % 2, "alive": 3} for i in range(200)]
    history += [{"step": 2000 + 10 * i, "loss": 0.0} for i in range(2)]
    (ax,) = plots.loss_curves(history).axes
    steps, values = lines(ax)["loss"]
    assert steps[:2] == [10, 40]  # of 3 entries each
    assert values[:2] == pytest.approx([4 / 3, 5 / 3])
    faint = ax.get_lines()[0].get_ydata()
    assert faint[:2].tolist() == [1, 2]
    assert all(math.isnan(value) for value in faint[-2:])
    assert list(lines(ax)) == ["loss"]


def test_alive_components_and_moves_are_those_of_the_run():
    history = history_of_a_run(20)
    (ax,) = plots.alive_components(history).axes
    assert lines(ax)["alive"] == (list(range(20)), [info.alive for info in history])
    assert lines(ax)["all 6"][1] == [6, 6]
    (ax,) = plots.alive_components([replace(info, moves=info.step == 7) for info in history]).axes
    assert [segment[0][0] for segment in ax.collections[0].get_segments()] == [7]
    (ax,) = plots.alive_components([{"alive": 5, "moves": 0}, {"alive": 4, "moves": 2}, {"alive": 3}]).axes
    assert [segment[0][0] for segment in ax.collections[0].get_segments()] == [1]
    assert ax.collections[0].get_label() == "moves, 2 in all"
    assert lines(ax) == {"alive": ([0, 1, 2], [5, 4, 3])}


@pytest.mark.parametrize("draw", [plots.loss_curves, plots.alive_components])
def test_an_empty_history_is_refused(draw):
    with pytest.raises(apd.errors.InvalidSetting, match=r"decompose\(..., on_step=...\)"):
        draw([])
    with pytest.raises(apd.errors.InvalidSetting, match=r"alive|no loss term"):
        draw([{"moves": 1}])


def test_seed_stability_has_the_null_below():
    similarity, null = torch.rand(2, 3, 3), torch.rand(2, 3)
    figure = plots.seed_stability(similarity, null, names=["W", "whole"])
    for ax, name, values, random in zip(figure.axes, ("W", "whole"), similarity, null, strict=False):
        assert ax.get_title() == name
        assert_close(shown(ax)[:3], values, check_dtype=False)
        assert shown(ax)[3].isnan().all()
        assert_close(shown(ax)[4], random, check_dtype=False)
        assert ax.get_yticklabels()[-1].get_text() == "null"
        assert ax.texts[0].get_text() == f"{values[0, 0]:.2f}"
        assert len(ax.texts) == 12
    with pytest.raises(apd.errors.InvalidSetting, match="2 names, one for each matrix"):
        plots.seed_stability(similarity, null, names=["W"])
