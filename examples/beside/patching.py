"""Attribution patching onto components: which of them carry the difference between two countries, and at which token?

The clean prompt asks for one country's capital, the corrupted one for another's. The metric is the logit of the clean
answer over that of the other. For W_V and W_O of attention 23 the output goes from corrupted to clean, and the change
of the metric is split over components and what they leave over.

    python examples/beside/patching.py               # a minute on one core, once the components are there
    python examples/beside/patching.py --stand-in    # a tiny model, for a look at the code
"""

from dataclasses import replace

import setting
import torch
from matplotlib import pyplot as plt
from setting import Setting
from torch import Tensor

import apd_lens as apd
from apd_lens import compare, plots

STEPS = 8


def own_components(decomposition: apd.Decomposition, tokens: Tensor) -> Tensor:
    """Of the active components of each prompt the one whose attribution is largest beside its mean over prompts."""
    seen = decomposition.observe(tokens)
    return torch.where(seen.mask, seen.attributions / seen.attributions.mean(0), -1).argmax(1)


def of_pairs(of: Setting) -> tuple[Tensor, Tensor, setting.Metric]:
    """Clean and corrupted prompts of the countries kept aside, and the metric."""
    here = of.aside.nonzero()[:, 0]
    there = torch.tensor(of.other())[here]
    return of.tokens[here], of.tokens[there], setting.difference(of.answers[here], of.answers[there])


def row(of: Setting, decomposition: apd.Decomposition, own: Tensor) -> dict[str, float]:
    """Sums over matrices' positions, means over pairs, in units of the metric."""
    clean, corrupted, metric = of_pairs(of)
    here = of.aside.nonzero()[:, 0]
    mine, others = own[here], own[torch.tensor(of.other())[here]]
    found = compare.patching(decomposition, clean, corrupted, metric)
    along = compare.patching(decomposition, clean, corrupted, metric, steps=STEPS)
    numbers = {"clean": found.clean.mean().item(), "corrupted": found.corrupted.mean().item()}
    rows = torch.arange(len(mine))
    for name in found.effects:
        kind = name.split(".")[-2][0].upper()
        first, path = found.effects[name].sum(1), along.effects[name].sum(1)
        numbers |= {
            f"W_{kind} patched": found.patched[name].mean().item(),
            f"W_{kind}, first order": found.of_matrix(name).mean().item(),
            f"W_{kind}, along the path": along.of_matrix(name).mean().item(),
            f"W_{kind}, own of clean": path[rows, mine].mean().item(),
            f"W_{kind}, own of corrupted": path[rows, others].mean().item(),
            f"W_{kind}, largest other": largest_other(path, mine, others),
            f"W_{kind}, rest": along.rest[name].sum(1).mean().item(),
            f"W_{kind}, own is largest": (first.argmax(1) == mine).float().mean().item(),
        }
    return numbers


def largest_other(effects: Tensor, mine: Tensor, others: Tensor) -> float:
    """Mean over pairs of the largest |effect| of a component that is neither prompt's own."""
    rest = effects.abs().scatter(1, torch.stack([mine, others], 1), 0.0)
    return rest.max(1).values.mean().item()


def draw(of: Setting, decomposition: apd.Decomposition, own: Tensor) -> None:
    """A heat map for each matrix of the first pair: components down, tokens across."""
    clean, corrupted, metric = of_pairs(of)
    found = compare.patching(decomposition, clean, corrupted, metric, steps=STEPS)
    here = int(of.aside.nonzero()[0, 0])
    names = [of.words[here], of.words[of.other()[here]]]
    figure, grid = plt.subplots(1, len(found.effects), figsize=(11, 4.2), layout="constrained")
    for ax, (name, effects) in zip(grid, found.effects.items(), strict=True):
        most = effects[0].abs().sum(0).topk(12).indices
        shown = most[effects[0].sum(0)[most].argsort(descending=True)].tolist()
        tokens = [of.tokenizer.decode([token]) for token in clean[0].tolist()]
        plots.signed_by_position(effects[0], components=shown, positions=tokens, ax=ax, metric="logit difference")
        labels = {int(own[here]): names[0], int(own[of.other()[here]]): names[1]}
        ax.set_yticks(range(len(shown)), [f"{c}  {labels.get(c, '')}" for c in shown])
        ax.set_title(".".join(name.split(".")[2:-1]))
    figure.suptitle(f"{names[1]} → {names[0]}: what carries the difference")
    figure.savefig(of.out / "patching.png", dpi=110)
    plt.close(figure)


def main() -> None:
    of, _ = setting.opened(__doc__)
    found = {}
    for seed in (0, 1):
        decomposition = of.decomposition(seed)
        own = own_components(decomposition, of.tokens)
        found[f"components, seed {seed}"] = row(of, decomposition, own)
        random = replace(decomposition, components=apd.components.random_components(decomposition.components, seed))
        found[f"random components, seed {seed}"] = row(of, random, own)
        if seed == 0:
            draw(of, decomposition, own)
    setting.written(of, "patching", found)
    print(setting.turned(found))


if __name__ == "__main__":
    main()
