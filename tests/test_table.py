import pytest
import torch

from apd_lens._table import as_text, frame, listed, short_names, table


def test_numbers_stand_to_the_right_and_words_to_the_left():
    shown = table(["name", "share"], [["a", "5%"], ["long name", "12.5%"], ["b", "-"]])
    assert shown.splitlines() == [
        "name       share",
        "─────────  ─────",
        "a             5%",
        "long name  12.5%",
        "b              -",
    ]


def test_a_frame_of_tensors_and_lists_prints_four_digits():
    pytest.importorskip("pandas")
    columns = frame({"number": torch.tensor([1.23456, 2.0]), "name": ["a", "b"]})
    assert columns["name"].tolist() == ["a", "b"]
    assert columns["number"].tolist() == pytest.approx([1.23456, 2.0])
    assert "1.235" in as_text(columns)


def test_names_stay_distinct():
    assert short_names(["a.0.b.W", "a.0.c.W"]) == ["L0 b.W", "L0 c.W"]
    assert short_names(["0.weight", "2.weight"]) == ["0", "2"]
    assert short_names(["weight"]) == ["weight"]
    assert short_names(["h.0.x.q_proj.weight", "h.0.x.q.weight"]) == ["L0 q_proj", "L0 q"]
    assert listed(["a", "b", "c"], 2) == "a, b and 1 others"
    assert listed(["a", "b"], 2) == "a, b"
