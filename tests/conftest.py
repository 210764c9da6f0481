import pytest
from jaxtyping import install_import_hook

# --jaxtyping-packages checks apd_lens. With a type checker that takes arguments it can name one package only (jaxtyping
# 0.3.11 counts the commas before the parenthesis wrongly), so the adapters are named here.
install_import_hook("apd_transformer_lens", "beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))")

# Imported after the hook, so that the names that it imports are checked too.
from support.coverage_table import pytest_addoption, pytest_configure  # noqa: E402, F401

collect_ignore = ["bare_environment.py"]  # make wheel runs it; pytest would import it to look for doctests


@pytest.fixture(autouse=True)
def _doctest_names(doctest_namespace):
    import torch  # here, since a run's first process only hands out tests

    doctest_namespace["torch"] = torch


@pytest.fixture(autouse=True)
def _seed():
    import torch

    torch.manual_seed(0)
