"""A pytest plugin that makes docs/coverage.md of the contract's results: host × variant × matrix, or why not.

Every subclass of `AdapterContract` is one row; its row stands in the table only if all its tests passed.
`make coverage-table` writes the table, and every other run of the tests fails where a row differs from what is written.
"""

import inspect
import re
import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from support.adapter_contract import AdapterContract

FILE = Path(__file__).parents[2] / "docs" / "coverage.md"
HEAD = """# What can be decomposed

The tests make this page (`make coverage-table`). Every row is a small model on which the whole contract of
`tests/support/adapter_contract.py` passes. The contract checks the listed matrices, and that a pass through an empty
context is the target bit for bit. It checks the sparse pass against the model with each data point's summed weights
really put into it, and attributions against finite differences. It also covers removal, copies, errors and clean-up.
`*` stands for every layer, head of a group or expert.
"""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--coverage-table", action="store_true", help="write docs/coverage.md instead of comparing it")


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(CoverageTable(config))


class CoverageTable:
    """Collects the outcomes of the contract's tests, class by class, from all processes in which they run."""

    def __init__(self, config: pytest.Config):
        self.config = config
        self.classes: dict[str, type[AdapterContract]] = {}  # of tests that run in this process
        self.lines: dict[str, tuple[str, str]] = {}  # class -> host and row
        self.failed: set[str] = set()
        self.refused: list[tuple[str, str, str]] = []

    def pytest_runtest_setup(self, item: pytest.Item) -> None:
        cls, contract = getattr(item, "cls", None), sys.modules.get("support.adapter_contract")
        if cls is not None and contract is not None and issubclass(cls, contract.AdapterContract):
            self.classes[class_of(item)] = cls

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            self.failed.add(class_of(report))
        if report.when == "call" and report.passed:
            self.refused += [value for name, value in report.user_properties if name == "refused"]

    @pytest.hookimpl(optionalhook=True)
    def pytest_testnodedown(self, node: Any) -> None:
        self.lines |= getattr(node, "workeroutput", {}).get("coverage", {})

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        for node, cls in self.classes.items():
            if node not in self.failed:
                self.lines[node] = cls.host, row(cls())
        if hasattr(self.config, "workeroutput"):
            self.config.workeroutput["coverage"] = self.lines
        elif self.lines:
            self.write_or_compare(session)

    def write_or_compare(self, session: pytest.Session) -> None:
        rows: dict[str, list[str]] = {}
        for node, (host, line) in self.lines.items():
            if node not in self.failed:
                rows.setdefault(host, []).append(line)
        for host, variant_, reason in self.refused:
            line = f"| {variant_} | – | {reason} |"
            if line not in rows.setdefault(host, []):
                rows[host].append(line)
        if self.config.option.coverage_table:
            FILE.write_text(document(rows))
            return
        written = FILE.read_text().splitlines() if FILE.exists() else []
        now = document(rows).splitlines()
        hosts = [line.removeprefix("## ") for line in written if line.startswith("## ")]
        option = self.config.option
        all_tests = option.markexpr in ("", "not thorough") and not option.keyword
        whole = rows.keys() >= set(hosts) and all_tests and not self.failed
        stale = [line for line in now if line not in written]
        stale += [line for line in written if whole and line not in now]
        if stale:
            print("\ndocs/coverage.md is stale: run `make coverage-table`. Differing lines:", *stale, sep="\n")
            session.exitstatus = pytest.ExitCode.TESTS_FAILED


def class_of(test: pytest.Item | pytest.TestReport) -> str:
    return test.nodeid.rpartition("::")[0]


def row(contract: "AdapterContract") -> str:
    import apd_lens as apd  # here, since a run's first process only hands out tests

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the host, on its models
        target = apd.wrap(contract.model())
    refused = "; ".join(f"{names}: {reason}" for reason, names in by_reason(target.refused).items())
    ties = [f"`{name}` = " + " = ".join(f"`{n}`" for n in w.tied_to) for name, w in target.weights.items() if w.tied_to]
    decomposed = ", ".join([condensed(contract.names), *(f"tied: {starred(tie)}" for tie in dict.fromkeys(ties))])
    return f"| {variant(type(contract))} | {decomposed} | {refused or '–'} |"


def variant(cls: type) -> str:
    text = inspect.cleandoc(cls.__doc__ or "")
    if not text:
        raise LookupError(f"{cls.__name__} needs a docstring that says which variant of {cls.host} it is")
    return " ".join(text.partition("\n\n")[0].split()).rstrip(".").replace("|", "/")


def by_reason(refused) -> dict[str, str]:
    reasons: dict[str, list[str]] = {}
    for name, reason in refused.items():
        reasons.setdefault(reason, []).append(name)
    return {reason: condensed(names) for reason, names in reasons.items()}


def starred(text: str) -> str:
    return re.sub(r"(?<=[.`])\d+(?=[.`]|$)", "*", text)


def condensed(names) -> str:
    """Names with * for numbers, each once; those that are beside each other in one pair of braces."""
    beside: dict[tuple[str, str], list[str]] = {}
    for name in dict.fromkeys(starred(name) for name in names):
        path, suffix = (name.removesuffix(".weight"), ".weight") if name.endswith(".weight") else (name, "")
        parent, _, last = path.rpartition(".")
        beside.setdefault((f"{parent}." if parent else "", suffix), []).append(last)
    return ", ".join(
        f"`{parent}{lasts[0] if len(lasts) == 1 else '{' + ', '.join(lasts) + '}'}{suffix}`"
        for (parent, suffix), lasts in beside.items()
    )


def document(rows: dict[str, list[str]]) -> str:
    parts = [HEAD]
    for host, lines in sorted(rows.items()):
        parts += [f"## {host}\n", "| variant | decomposed | refused |", "| --- | --- | --- |", *lines, ""]
    return "\n".join(parts)
