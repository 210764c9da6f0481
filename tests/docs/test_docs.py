"""The pages under docs/: their code runs, with few steps; their links lead somewhere; the reference is complete."""

import importlib
import inspect
import re
import warnings
from pathlib import Path
from typing import Any

import pytest

import apd_lens as apd
from apd_lens import _codec

DOCS = Path(__file__).parents[2] / "docs"
PAGES = sorted(DOCS.glob("*.md"))


def code_of(page: Path) -> str:
    blocks = re.findall(r"^```python\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)
    return "\n".join(blocks)


def small(code: str) -> str:
    """With a tiny model, which is trained on the spot, in the place of the language model."""
    return code.replace("smollm2", "stand_in").replace("n=288, length=32", "n=64, length=8")


@pytest.mark.parametrize("page", [page for page in PAGES if code_of(page)], ids=lambda page: page.stem)
def test_the_code_of_a_page_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    ours = {name: cls for name, cls in _codec._CLASSES.items() if cls.__module__.startswith("apd_lens.")}
    monkeypatch.setattr(_codec, "_CLASSES", ours)  # other tests save classes of these names too
    names: dict[str, Any] = {"__name__": page.stem}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of other libraries
        exec(compile(re.sub(r"steps=\d{3,}", "steps=10", small(code_of(page))), page.name, "exec"), names)


def slug(heading: str) -> str:
    return re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", heading).strip().lower())


@pytest.mark.parametrize("page", [*PAGES, *sorted(DOCS.glob("api/*.md"))], ids=lambda page: page.stem)
def test_what_a_page_points_to_is_there(page: Path):
    for link in re.findall(r"\]\((?!http)([^)]*)\)", page.read_text()):
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        assert target.is_file(), link
        if anchor and not anchor.startswith("apd_lens."):
            headings = re.findall(r"^#+ (.*)$", target.read_text(), re.MULTILINE)
            assert anchor in map(slug, headings), link


def test_every_public_name_is_in_the_reference():
    page = (DOCS / "api/apd_lens.md").read_text()
    listed = set(re.findall(r"^::: apd_lens\.(?:\w+\._\w+\.)?(\w+)$", page, re.MULTILINE))
    pages = {page.stem for page in DOCS.glob("api/*.md")}
    ours = {name for name, value in vars(apd).items() if getattr(value, "__module__", "").startswith("apd_lens")}
    assert {name for name in ours if not name.startswith("_")} <= listed <= set(vars(apd))
    assert {"compare", "language", "metrics", "plots", "toys", "monitor"} <= pages


def test_the_reference_shows_what_a_room_hands_out():
    griffe = pytest.importorskip("griffe")
    extensions = griffe.load_extensions(str(DOCS / "extensions/griffe_apd.py"))
    package = griffe.load("apd_lens", search_paths=[DOCS.parent], extensions=extensions)
    for room in ("compare", "language", "metrics", "plots", "toys"):
        ours = importlib.import_module(f"apd_lens.{room}")
        public = {name for name, value in vars(ours).items() if name[0] != "_" and not inspect.ismodule(value)}
        shown = {name for name, member in package[room].members.items() if member.is_public}
        assert shown >= public - {"annotations", "MissingExtra", "checked"}
