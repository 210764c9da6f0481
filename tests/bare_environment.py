"""Run by `make wheel` in an environment that has apd_lens and what it requires, and by `make wheel-extras` in one that
has the extra that is named, too."""

import importlib.resources
import importlib.util
import sys
import tempfile
from pathlib import Path

import torch

import apd_lens as apd

# Extra -> what it brings, and what needs it.
EXTRAS = {
    "transformer-lens": ("transformer_lens", "apd_transformer_lens"),
    "nnsight": ("nnsight", "apd_nnsight"),
    "hub": ("huggingface_hub", None),
    "plots": ("matplotlib", "apd_lens.plots"),
    "compare": ("pandas", "apd_lens.compare"),
    "report": ("plotly", "apd_lens.report"),
}
extra = sys.argv[1] if len(sys.argv) > 1 else None
assert "site-packages" in apd.__file__, f"not the installed package: {apd.__file__}"
brought = {name: importlib.util.find_spec(package) is not None for name, (package, _) in EXTRAS.items()}
assert importlib.util.find_spec("pytest") is None, "pytest is installed; this environment is to be bare"
assert brought[extra] if extra else not any(brought.values()), f"{extra} is asked for, installed are {brought}"

model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 3))
x = torch.randn(16, 4)
FEW = {"n_components": 5, "rank": 2, "optimization": apd.Optimization(steps=20, lr=1e-2), "progress": False}
decomposition = apd.decompose(model, [x], **FEW)
assert (importlib.resources.files("apd_lens") / "report" / "page.html").is_file()
for name, (_, module) in EXTRAS.items() if extra is None else ():
    if module in (None, "apd_nnsight"):  # which import without
        continue
    try:
        importlib.import_module(module)
    except apd.errors.MissingExtra as error:
        message = str(error)
    else:
        message = "imported"
    assert f"pip install 'apd-lens[{name}]'" in message, f"{module}: {message}"
    print(f"{module}: {message}")
if extra is None:
    print(decomposition.summary(x))
    print(apd.responses(decomposition, [x]).effects.change)


def transformer_lens() -> object:
    from transformer_lens import HookedTransformer, HookedTransformerConfig

    config = HookedTransformerConfig(
        n_layers=1, d_model=8, n_ctx=4, d_head=4, n_heads=2, d_vocab=6, act_fn="relu", device="cpu"
    )
    return apd.decompose(HookedTransformer(config), [torch.randint(0, 6, (8, 4))], ["blocks.*.W_*"], **FEW)


def nnsight() -> object:
    from nnsight import NNsight

    return apd.decompose(NNsight(model), [x], **FEW)


def hub() -> object:
    decomposition.save(folder / "kept")
    return apd.from_pretrained(str(folder / "kept"), model)


def plots() -> object:
    from apd_lens import plots

    return plots.attribution_matrix(decomposition.attributions(x)).savefig(folder / "figure.png")


def compare() -> object:
    from apd_lens import compare

    return compare.weight_map(decomposition).table()


def report() -> object:
    return decomposition.report([x], folder / "report.html")


if extra is not None:
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        print(f"{extra}: {globals()[extra.replace('-', '_')]()}")
