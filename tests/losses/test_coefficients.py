"""Every coefficient of `Losses` moves its own metric: raised, with all else as it was, the term it weighs gets smaller.

A small residual MLP is taken apart, inputs being one feature at a time, with the coefficient small and large. What is
compared is measured on fresh data afterwards, by hand, and not read from the training.
"""

import json

import pytest
from support import outside

MEASURE = """
import json, sys
from dataclasses import replace
import torch
sys.path.insert(0, "tests")
torch.set_num_threads(1)
import apd_lens as apd
from support.toy_models import ResidualMLP

BASE = apd.Losses(faithfulness=3.0, minimality=1.0, simplicity=0.0375, simplicity_floor=0.0, path=0.0)
CASES = {
    "faithfulness": ((0.1, 10.0), {}),
    "minimality": ((0.1, 10.0), {}),
    "simplicity": ((0.0, 2.5), {}),
    "path": ((0.0, 3.0), {"faithfulness": 0.0}),  # nothing else holds what is inactive
    "hidden after": ((0.1, 3.0), {"hidden_at": ("layers.0.act",)}),
    "hidden before": ((0.1, 3.0), {"hidden_at": ("layers.0.mlp_in",)}),
}

def measured(losses, seed):
    torch.manual_seed(seed)
    model = ResidualMLP(6, 8, 5, 1)
    generator = torch.Generator().manual_seed(seed)
    def batch(n):
        return torch.eye(6)[torch.randint(6, (n,), generator=generator)] * torch.randn(n, 1, generator=generator)
    decomposition = apd.decompose(
        model, lambda step: batch(32), ["layers.*"], n_components=8, rank=2, selection=apd.TopK(1),
        losses=losses, optimization=apd.Optimization(steps=50, lr=1e-2, scaled=False, init_scale=1.0), moves=None,
        seed=seed, progress=False,
    )
    x, seen = batch(512), {}
    for name in ("mlp_in", "act"):
        model.layers[0][name].register_forward_hook(lambda module, args, y, name=name: seen.update({name: y}))
    mask = decomposition.select(x)
    def run(some_mask):
        with torch.no_grad(), decomposition.sparse(some_mask):
            return {"y": model(x), **seen}
    with torch.no_grad():
        target = {"y": model(x), **seen}
    sparse, partial = run(mask), run(apd.masks.path_mask(mask, torch.Generator().manual_seed(0)))
    parts = decomposition.components
    size = sum(apd.simplicity_loss(parts.A[name], parts.B[name], mask, 0.9).item() for name in parts.names)
    def error(other, place):
        return (other[place] - target[place]).square().mean().item()
    return {
        "faithfulness": decomposition.residuals()["all"] ** 2, "minimality": error(sparse, "y"), "simplicity": size,
        "path": error(partial, "y"), "hidden after": error(sparse, "act"), "hidden before": error(sparse, "mlp_in"),
    }

def mean(name, value, others):
    losses = replace(BASE, **{name.split()[0]: value}, **others)
    return sum(measured(losses, seed)[name] for seed in (0, 1)) / 2

again = measured(BASE, 0) == measured(BASE, 0)
means = {name: [mean(name, value, others) for value in values] for name, (values, others) in CASES.items()}
print(json.dumps({"again": again} | means))
"""


@pytest.fixture(scope="module")
def means() -> dict[str, list[float]]:
    """For each metric its mean over two seeds, at a small and at a large coefficient."""
    return json.loads(outside.run(MEASURE))


@pytest.mark.thorough
@pytest.mark.parametrize(
    "metric", ["faithfulness", "minimality", "simplicity", "path", "hidden after", "hidden before"]
)
def test_raising_a_coefficient_lowers_its_metric(means, metric: str):
    small, large = means[metric]
    assert large < 0.8 * small


def test_nothing_but_the_coefficient_changes_the_metrics(means):
    """The null control: with the same losses and the same seed they come out the same."""
    assert means["again"]
