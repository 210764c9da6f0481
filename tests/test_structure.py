"""The floor plan holds: rooms stand on rooms below them, no file stands on itself, adapters stand on `host` alone."""

import ast
import re
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

# From the ground up. A room, or a file that is one by itself, imports only what stands before it.
ROOMS = re.findall(
    r"\w+",
    """
    _errors errors _block _files _memory _draws _checks _codec _table _schedules _processes _shards data host
    components passes attribution losses masks moves start _settings decomposition training metrics responses scan
    language compare plots monitor report toys __init__
    """,
)


def modules() -> dict[str, Path]:
    """Name -> file, of every module of the package and of the adapters."""
    found = {}
    for base, folder in ((ROOT, "apd_lens"), (ROOT / "adapters", ".")):
        for file in sorted((base / folder).rglob("*.py")):
            parts = file.relative_to(base).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = file
    return found


MODULES = modules()


def imports(name: str) -> Iterator[str]:
    """The modules of ours that a module imports anywhere in its file, inside functions too."""
    for node in ast.walk(ast.parse(MODULES[name].read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module:
            inside = {f"{node.module}.{alias.name}" for alias in node.names} & MODULES.keys()
            yield from inside or {node.module} & MODULES.keys()
        elif isinstance(node, ast.Import):
            yield from {alias.name for alias in node.names} & MODULES.keys()


def room(name: str) -> str:
    """`apd_lens.data._batch` is in `data`, `apd_lens` is `__init__`."""
    return name.split(".")[1] if "." in name else "__init__"


@pytest.mark.parametrize("name", [name for name in MODULES if name.startswith("apd_lens")])
def test_no_import_runs_up(name: str):
    above = ROOMS[ROOMS.index(room(name)) + 1 :]
    assert not [imported for imported in imports(name) if room(imported) in above]


def test_no_file_stands_on_itself():
    list(TopologicalSorter({name: set(imports(name)) - {name} for name in MODULES}).static_order())  # or CycleError


@pytest.mark.parametrize("name", [name for name in MODULES if not name.startswith("apd_lens")])
def test_adapters_stand_on_the_host_alone(name: str):
    ours = {imported for imported in imports(name) if imported.startswith("apd_lens")}
    assert ours <= {"apd_lens.host", "apd_lens._errors"}


@pytest.mark.parametrize("name", [name for name in MODULES if name.startswith("apd_lens")])
def test_a_room_hands_out_no_library_of_others(name: str):
    """What a module of ours re-exports (`x as x`) is ours."""
    tree = ast.parse(MODULES[name].read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and any(alias.asname == alias.name for alias in node.names):
            assert str(node.module).startswith("apd_lens")


@pytest.mark.parametrize("folder", ["apd_lens", "adapters", "examples", "benchmarks", "tests"])
def test_what_is_private_in_a_decomposition_is_used_in_its_room_alone(folder: str):
    files = [file for file in (ROOT / folder).rglob("*.py") if file.parent != ROOT / "apd_lens" / "decomposition"]
    assert files
    for file in files:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute) and re.match(r"_(?!_|repr_html_$)", node.attr):
                assert not ast.unparse(node.value).endswith("decomposition"), f"{file}:{node.lineno}"


# Modules whose tests are those of another module, which is nothing without them.
TESTED_WITH = {
    "attribution/attribution": "attribution/gradient",
    "attribution/effects": "attribution/gradient",
    "attribution/linearity": "attribution/pushforward",
    "attribution/over_outputs": "attribution/gradient",
    "attribution/pullback": "attribution/gradient",
    "compare/attribution_map": "compare/architecture",
    "compare/gates": "compare/location",
    "compare/splice": "compare/faithfulness",
    "host/adapter": "host/torch_modules",
    "host/patch": "host/interrupts",
    "plots/attributions": "plots/plots",
    "plots/audit": "plots/plots",
    "plots/draw": "plots/plots",
    "plots/watch": "plots/monitor",
    "report/collect": "report/report",
    "report/examples": "report/report",
    "report/figures": "report/report",
    "report/page": "report/report",
    "responses/ablation": "responses/responses",
    "responses/groups": "responses/responses",
    "responses/top": "responses/responses",
    "scan/groups": "scan/where",
    "scan/passes": "scan/where",
    "scan/result": "scan/where",
    "shards": "processes",
    "training/step": "training/loop",
}


def test_every_module_has_a_test_of_its_name():
    """apd_lens/room/_module.py -> tests/room/test_module.py."""
    missing = []
    for name, file in MODULES.items():
        if not name.startswith("apd_lens") or file.name == "__init__.py":
            continue
        module = "/".join([*name.split(".")[1:-1], file.stem.removeprefix("_")])
        folder, _, stem = TESTED_WITH.get(module, module).rpartition("/")
        if not (ROOT / "tests" / folder / f"test_{stem}.py").exists():
            missing.append(module)
    assert not missing
    assert not [m for m in TESTED_WITH if (ROOT / "tests" / Path(m).with_name(f"test_{Path(m).name}.py")).exists()]
