import pytest
import torch

from apd_lens._table import as_text, frame, table


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
