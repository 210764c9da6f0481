"""Run by `make wheel` in an environment that has apd_lens and what it requires, and no extra."""

import importlib.resources
import importlib.util

import torch

import apd_lens as apd

assert "site-packages" in apd.__file__, f"not the installed package: {apd.__file__}"
for extra in ("transformer_lens", "nnsight", "transformers", "matplotlib", "pytest"):
    assert importlib.util.find_spec(extra) is None, f"{extra} is installed; this environment is to be bare"

model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 3))
x = torch.randn(16, 4)
optimization = apd.Optimization(steps=20, lr=1e-2)
decomposition = apd.decompose(model, [x], n_components=5, rank=2, optimization=optimization, progress=False)
print(decomposition.summary(x))
print(apd.responses(decomposition, [x]).effects.change)
assert (importlib.resources.files("apd_lens") / "report" / "page.html").is_file()

extras = {
    "apd_transformer_lens": "transformer-lens",
    "apd_lens.compare": "compare",
    "apd_lens.plots": "plots",
    "apd_lens.report": "report",
}
for module, extra in extras.items():
    try:
        importlib.import_module(module)
    except apd.errors.MissingExtra as error:
        message = str(error)
    else:
        message = "imported"
    assert f"pip install 'apd-lens[{extra}]'" in message, f"{module}: {message}"
    print(f"{module}: {message}")
