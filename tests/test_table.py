import dataclasses
import importlib
import pkgutil

import pytest
import torch

import apd_lens
from apd_lens import _codec
from apd_lens._table import Printed, Tabled, as_table, example_of, frame, listed, short_names, table

ROOMS = ("compare", "metrics", "language", "monitor")


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
    assert as_table(columns).splitlines()[2] == " 1.235  a"
    assert as_table(columns.rename_axis("row")).splitlines()[0] == "row  number  name"


def test_names_stay_distinct():
    assert short_names(["a.0.b.W", "a.0.c.W"]) == ["L0 b.W", "L0 c.W"]
    assert short_names(["0.weight", "2.weight"]) == ["0", "2"]
    assert short_names(["weight"]) == ["weight"]
    assert short_names(["a.0.w", "a.1.w", "a.0.w"]) == ["L0 w", "L1 w", "L0 w"]
    assert short_names(["h.0.x.q_proj.weight", "h.0.x.q.weight"]) == ["L0 q_proj", "L0 q"]
    assert example_of(["L0 q", "x"], ["h.0.q.weight", "x.weight"]) == ["L0 q is h.0.q.weight"]
    assert example_of(["x", "L0 q"], ["m.x.weight", "h.0.q.weight"]) == ["L0 q is h.0.q.weight"]
    assert example_of(["x"], ["x.weight"]) == []
    assert listed(["a", "b", "c"], 2) == "a, b and 1 others"
    assert listed(["a", "b"], 2) == "a, b"


class Both(Printed):
    def _parts(self) -> list[str]:
        return ["a < b", table(["name", "<n>"], [["L0 q", "5%"]], {"L0 q": 'h.0.q "x"'})]


def test_a_notebook_shows_lines_and_tables_with_whole_names_under_the_pointer():
    assert repr(Both()) == str(Both()) == "a < b\nname  <n>\n────  ───\nL0 q   5%"
    html = Both()._repr_html_()
    assert "<pre>a &lt; b</pre><table>" in html
    assert "&lt;n&gt;</th>" in html
    assert 'title="h.0.q &quot;x&quot;">L0 q</td>' in html
    assert 'text-align: right; white-space: pre">5%</td>' in html
    assert "overflow: auto" in html


class Many(Tabled):
    def table(self):
        return frame({"n": list(range(30))})


def test_a_long_table_prints_its_first_rows(monkeypatch: pytest.MonkeyPatch):
    lines = str(Many()).splitlines()
    assert lines[-2:] == ["19", "20 of 30 rows; .table() has all"]
    monkeypatch.setitem(__import__("sys").modules, "pandas", None)
    assert str(Many()).startswith("Many. Tables need pandas")


def test_all_results_that_print_show_themselves_in_notebooks():
    """What has a `table()`, or lines of its own to print, is `Printed`, and a dataclass has left its repr alone."""
    pytest.importorskip("scipy")
    names = [m.name for m in pkgutil.walk_packages(apd_lens.__path__, "apd_lens.") if ".plots" not in m.name]
    classes = {
        found
        for name in names
        for found in vars(importlib.import_module(name)).values()
        if isinstance(found, type) and found.__module__.startswith("apd_lens")
    }
    printed = {found for found in classes if issubclass(found, Printed)}
    assert len(printed) > 24
    assert {found for found in printed if found.__repr__ is not Printed.__repr__} == set()
    own = {found for found in classes - printed if "table" in vars(found) or "__str__" in vars(found)}
    assert {found.__name__ for found in own} <= {"Table", "DescriptionLength", "Dictionary"}


def test_what_is_public_and_does_not_print_is_no_result():
    """Of the dataclasses that users get or give: settings, which are saved, and those that hold no table of numbers."""
    pytest.importorskip("scipy")
    rooms = [importlib.import_module(name) for name in ("apd_lens", *(f"apd_lens.{room}" for room in ROOMS))]
    public = {
        found
        for room in rooms
        for name, found in vars(room).items()
        if isinstance(found, type) and dataclasses.is_dataclass(found) and found.__module__.startswith("apd_lens")
    }
    shown = {found for found in public if issubclass(found, Printed)}
    assert len(shown) > 15
    silent = {found.__name__ for found in public - shown - set(_codec._CLASSES.values())}
    assert silent <= {
        "Card", "Observed", "WeightMatrix", "State", "StepInfo", "Checkpoint", "Mixture",
        "ActivationSums", "MatrixAmounts", "Dictionary", "Agreement", "DescriptionLength", "Prompts", "Template",
        "Monitor", "Mahalanobis",
    }  # fmt: skip
