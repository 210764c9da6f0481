import re
from collections import defaultdict
from itertools import compress
from operator import not_
from pathlib import Path

import beartype  # noqa: F401  # before nnsight, after which it cannot be imported
import pytest
from jaxtyping import install_import_hook
from support import shapes

shapes.install()

# --jaxtyping-packages checks apd_lens. With a type checker that takes arguments it can name one package only (jaxtyping
# 0.3.11 counts the commas before the parenthesis wrongly), so the adapters are named here.
install_import_hook("apd_transformer_lens", "beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))")

# Imported after the hook, so that the names that it imports are checked too.
from support.coverage_table import pytest_addoption, pytest_configure  # noqa: E402, F401
from support.thinning import on_the_diagonal  # noqa: E402

collect_ignore = ["bare_environment.py"]  # make wheel runs it; pytest would import it to look for doctests


@pytest.fixture(autouse=True)
def _doctest_names(doctest_namespace):
    import torch  # here, since a run's first process only hands out tests

    doctest_namespace["torch"] = torch


@pytest.fixture(autouse=True)
def _seed():
    import torch

    torch.manual_seed(0)
    shapes.seen.clear()


# `-m quick`: all doctests, and the modules of tests that import no host and start no process, but for these.
LONG = re.findall(
    r"\w+",
    """
    test_gradient test_products test_habits test_interrupts test_owner test_plots test_no_waiting test_toys
    test_substituted_weights test_benchmarks test_files test_docs test_hub
    """,
)
SLOW_IMPORT = re.compile(
    r"^ *(from|import) ((transformer_lens|transformers|nnsight|sae_lens|pyvene|tokenizers|subprocess)\b"
    r"|support\.(attribution_hosts|bridges|examples|hooked|outside|padding|processes|tools|words)\b"
    r"|support import .*outside)"
    r"|tiny_gpt2|tiny_llama|importorskip\(\"(transformer_lens|nnsight|sae_lens)",
    re.MULTILINE,
)


def is_quick(file: Path) -> bool:
    if file.suffix != ".py" or Path(__file__).parent not in file.parents:
        return True
    return file.stem not in LONG and not SLOW_IMPORT.search(file.read_text(encoding="utf-8"))


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Of a quick run the other modules are not imported either."""
    is_other = collection_path.is_file() and not is_quick(collection_path)
    return True if config.option.markexpr == "quick" and is_other else None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks what is quick, and of the others, what is left to `-m thorough`: most cases of products of parameters."""
    quick = {path for path in {item.path for item in items} if is_quick(path)}
    products: dict[str, list[pytest.Item]] = defaultdict(list)
    for item in items:
        if item.get_closest_marker("thorough"):
            continue
        if item.path in quick:
            item.add_marker(pytest.mark.quick)
        elif hasattr(item, "callspec"):
            products[item.nodeid.partition("[")[0]].append(item)
    for cases in products.values():
        taken = on_the_diagonal([case.callspec._idlist for case in cases])  # type: ignore[attr-defined]
        for case in compress(cases, map(not_, taken)):
            case.add_marker(pytest.mark.thorough)
