"""What importing brings in, and what is said where an extra is missing. Each in a process of its own."""

import ast
import importlib.metadata
import inspect
import re
from importlib.util import find_spec
from pathlib import Path

import pytest
from support import outside

import apd_lens as apd

HOSTS = ("transformer_lens", "nnsight", "transformers", "matplotlib", "sae_lens", "huggingface_hub")
PRINT_HOSTS = f"import sys; print([name for name in {HOSTS} if name in sys.modules])"


def test_neither_importing_nor_decomposing_brings_in_a_host():
    code = "import torch, apd_lens as apd; apd.init(torch.nn.Linear(2, 2), n_components=1)"
    assert outside.fresh(f"import apd_lens; {PRINT_HOSTS}; {code}; {PRINT_HOSTS}") == "[]\n[]\n"


def test_nnsight_may_be_imported_first():
    """beartype cannot be imported after it, by itself."""
    printed = outside.fresh(
        """
        import nnsight, torch
        try:
            import beartype
        except TypeError:
            print("beartype alone fails")
        import apd_lens as apd
        model = nnsight.NNsight(torch.nn.Linear(2, 2))
        apd.init(model, n_components=1)
        with model.trace(torch.ones(1, 2)):
            y = model.output.save()
        print(y.shape)
        """
    )
    assert printed.splitlines()[-1] == "torch.Size([1, 2])"


def test_the_check_above_can_fail():
    assert "huggingface_hub" in outside.fresh(f"import apd_lens, huggingface_hub; {PRINT_HOSTS}")


# Module, what it needs, and the extra that has it.
EXTRAS = [
    ("apd_transformer_lens", "transformer_lens", "transformer-lens"),
    ("apd_nnsight", "nnsight", "nnsight"),
    ("apd_lens.plots", "matplotlib", "plots"),
    ("apd_lens.compare", "pandas", "compare"),
    ("apd_lens.report", "jinja2", "report"),
    ("apd_lens.report", "plotly", "report"),
]


def test_a_missing_extra_is_named():
    printed = outside.fresh(
        f"""
        import importlib, sys
        import apd_lens as apd
        for module, needs, _ in {EXTRAS}:
            sys.modules[needs] = None  # as if it were not installed
            try:
                importlib.import_module(module)
            except apd.errors.MissingExtra as error:
                print(isinstance(error, ImportError), error)
            del sys.modules[needs]
        """
    )
    for line, (*_, extra) in zip(printed.splitlines(), EXTRAS, strict=True):
        assert line.startswith("True ")
        assert f"pip install 'apd-lens[{extra}]'" in line


def test_the_extras_that_are_named_exist():
    extras = importlib.metadata.metadata("apd-lens").get_all("Provides-Extra")
    assert set(extras) == {
        "transformer-lens",
        "nnsight",
        "sae-lens",
        "hub",
        "plots",
        "compare",
        "report",
        "docs",
        "dev",
    }


def test_an_adapter_is_found_by_the_package_of_the_models_class():
    """A third party's host: one entry point, a function that puts an adapter with four methods to a model."""
    printed = outside.fresh(
        """
        import importlib.metadata, sys, types
        import torch
        import apd_lens as apd
        from apd_lens.host._torch_modules import TorchAdapter

        host = types.ModuleType("my_host")
        class Model(torch.nn.Sequential):
            pass
        Model.__module__ = "my_host.models"
        class Adapter(TorchAdapter):
            pass
        host.wrap = lambda model: apd.TargetModel(model, Adapter())
        sys.modules["my_host"] = host
        entry = importlib.metadata.EntryPoint("my_host", "my_host:wrap", "apd_lens.adapters")
        importlib.metadata.entry_points = lambda group: [entry]

        print(isinstance(Adapter(), apd.host.Adapter))
        print(type(apd.wrap(Model(torch.nn.Linear(2, 2))).adapter).__module__)
        print(type(apd.wrap(torch.nn.Linear(2, 2)).adapter).__name__)
        """
    )
    assert printed.split() == ["True", "__main__", "TorchAdapter"]


# What a user types. Types that functions return, errors and extras of a subject are in the rooms.
NAMES = re.findall(
    r"\w+",
    """
    wrap decompose init step load from_factors from_pretrained apply_edit where responses Decomposition
    ParameterComponents TargetModel WeightMatrix Checkpoint Optimization Losses Elsewhere HoldThenDecay Ramp
    language_model paper memory saved last_position positions BatchTopK TopK Lp Gates Attributed GradientAttribution
    IntegratedGradients AblationAttribution ActivationAttribution faithfulness_loss minimality_loss simplicity_loss
    ApdError UnknownWeight UnsupportedModel ShapeMismatch NonFinite ArtifactError
    """,
)


def test_the_top_holds_what_a_user_types():
    public = [name for name, value in vars(apd).items() if name[0] != "_" and not inspect.ismodule(value)]
    assert sorted(public) == sorted(NAMES)
    assert len(NAMES) < 46


@pytest.mark.parametrize("folder", ["examples", "benchmarks"])
def test_what_scripts_import_of_ours_is_there(folder: str):
    pytest.importorskip("matplotlib", reason="scripts use extras that this environment is without")
    for file in sorted((Path(__file__).parent.parent / folder).rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and str(node.module).startswith("apd_lens"):
                module = importlib.import_module(str(node.module))
                for name in node.names:
                    found = hasattr(module, name.name) or find_spec(f"{node.module}.{name.name}")
                    assert found, f"{file.name}:{node.lineno}: {name.name}"


def test_versions_agree():
    assert importlib.metadata.version("apd-lens") == apd.__version__
    citation = (Path(__file__).parent.parent / "CITATION.cff").read_text(encoding="utf-8")
    assert f"\nversion: {apd.__version__}\n" in citation


def test_everything_public_has_a_docstring():
    public = [value for name, value in vars(apd).items() if not name.startswith("_") and not inspect.ismodule(value)]
    documented = [value for value in public if inspect.isclass(value) or inspect.isfunction(value)]
    assert len(documented) == len(NAMES)
    assert not [value for value in documented if not (value.__doc__ or "").strip()]
