"""The figure of where a behaviour is."""

from dataclasses import replace

import pytest
import torch
from support.figures import shown
from torch.testing import assert_close

import apd_lens as apd
from apd_lens import plots


def test_where_shows_the_rows_with_an_effect_in_the_order_of_the_model():
    effects = torch.tensor([[0.0, 2.0], [0.01, 0.0], [-1.0, torch.nan], [0.5, 0.5]])
    found = apd.scan.Where.from_effects(
        effects, [f"m.{name}.weight" for name in "abcd"], ["subject", "last"], unit="nats"
    )
    found = replace(found, estimated=torch.full((4, 2), 0.25))
    ax, bar = plots.where(found, top=3).axes
    assert_close(shown(ax), torch.tensor([[0.0, 2.0], [-1.0, 0.25], [0.5, 0.5]]), check_dtype=False)
    assert [label.get_text() for label in ax.get_yticklabels()] == ["a", "c", "d"]
    assert [label.get_text() for label in ax.get_xticklabels()] == ["subject", "last"]
    assert [text.get_text() for text in ax.texts] == ["0.00", "2.00", "-1.00", "0.50", "0.50"]  # those measured
    assert "nats" in bar.get_ylabel()
    with pytest.raises(apd.errors.InvalidSetting, match="No effect can be drawn"):
        plots.where(replace(found, measured=torch.zeros(4, 2), estimated=torch.zeros(4, 2)))
