"""What each system's truth says of a decomposition. Nothing here was seen in training.

A judge has two parts. `owners` says which component stands for which mechanism; `measure` says what these components
are and do. So the second can be asked about other components in their place, such as equally often active ones.
"""

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

import apd_lens as apd
from apd_lens import toys

Numbers = dict[str, float]
Owners = Int[Tensor, " mechanism"]


def active(decomposition: apd.Decomposition, batch: Any) -> Bool[Tensor, "batch *pos C"]:
    """The mask; of a masking that does not say it, what has a tenth of a data point's largest attribution."""
    if decomposition.settings.masking.says_what_is_active:
        return decomposition.select(batch)
    attributions = decomposition.attributions(batch)
    return attributions >= 0.1 * attributions.amax(-1, keepdim=True)


def usage_matched(owners: Owners, mask: Bool[Tensor, "*data C"]) -> Owners:
    """For each owner another component, of those that are ever active the one that is most nearly as often."""
    usage = mask.flatten(0, -2).float().mean(0)
    apart = (usage[owners][:, None].log() - usage.log()).abs()
    apart[torch.arange(len(owners)), owners] = torch.inf
    return apart.nan_to_num(torch.inf).argmin(1)


def n_alone(owners: Owners) -> int:
    """Mechanisms whose component is that of no other."""
    return int(alone(owners).sum())


def alone(owners: Owners) -> Bool[Tensor, " mechanism"]:
    return owners.bincount(minlength=int(owners.max()) + 1)[owners] == 1


def forgotten(
    decomposition: apd.Decomposition, owners: Owners, right: Callable[[], Bool[Tensor, " case"]]
) -> Bool[Tensor, "mechanism case"]:
    """Which cases are right in the model as it is, and wrong without the component of a mechanism."""
    before, found = right(), {}
    for component in set(owners.tolist()):
        with decomposition.ablate(component):
            found[component] = before & ~right()
    return torch.stack([found[component] for component in owners.tolist()])


def own_and_others(lost: Float[Tensor, "mechanism mechanism"] | Bool[Tensor, "mechanism mechanism"]) -> Numbers:
    """Shares of what is lost of each mechanism's own cases, and of those of others."""
    lost = lost.float()
    own = lost.diagonal()
    n = len(own)
    return {"own forgotten": own.mean().item(), "others forgotten": ((lost.sum() - own.sum()) / (n * (n - 1))).item()}


def sparse_accuracy(
    decomposition: apd.Decomposition, batch: Any, right: Callable[[], Bool[Tensor, " case"]]
) -> Numbers:
    """Share of cases that are right on the active components alone, and how many these are on average."""
    mask = active(decomposition, batch)
    with decomposition.sparse(mask):
        return {"sparse accuracy": right().float().mean().item(), "active": mask.sum(-1).float().mean().item()}


def squared_norms(decomposition: apd.Decomposition) -> dict[str, Float[Tensor, " C"]]:
    """Name -> ‖P_c‖² of each component in this matrix."""
    parts = decomposition.components
    return {name: apd.components.singular_values(parts, name).square().sum(1) for name in parts.names}


# Redundancy: a component for each token, which holds all that the blocks do for it.


def cipher_owners(target: toys.CipherTarget, decomposition: apd.Decomposition) -> Owners:
    """The component with the largest attribution to each token, all blocks on."""
    return decomposition.attributions(target.tokens).argmax(1)


def measure_cipher(target: toys.CipherTarget, decomposition: apd.Decomposition, owners: Owners) -> Numbers:
    """A token is found if a component is its own, spans all blocks, and is all that makes the model know this token,
    whichever blocks are on, and no other with all of them on.

    A mechanism, what one block does for one token, is skipped if the token is still right with this block alone on and
    the token's component out. It is whole if the token is right with this block alone on and only that component.
    """
    n_tokens, n_blocks = len(owners), len(target.model.blocks)
    lost = torch.stack([forgotten(decomposition, owners, lambda on=on: target.is_right(on)) for on in target.subsets])
    own = lost.diagonal(dim1=1, dim2=2)  # subset, token
    norms = squared_norms(decomposition)
    of_blocks = torch.stack([norms[a] + norms[b] for a, b in zip(*[iter(target.weights)] * 2, strict=True)])
    spans = (of_blocks / of_blocks.sum(0)).amin(0)[owners] >= 0.1
    whole = torch.zeros(n_tokens, n_blocks)
    for token, component in enumerate(owners.tolist()):
        with decomposition.only(component):
            whole[token] = torch.stack([target.is_right(on)[token] for on in target.subsets[:n_blocks]])
    others = lost[-1].float().sum(1) - lost[-1].diagonal().float()
    return {
        "found": float((alone(owners) & spans & own.all(0) & (others == 0)).sum()),
        "of": float(n_tokens),
        "own component": float(n_alone(owners)),
        "spans all blocks": float(spans.sum()),
        **own_and_others(lost[-1]),
        "own forgotten, worst subset": own.float().mean(1).min().item(),
        "mechanisms skipped": float((~own[:n_blocks]).sum()),
        "mechanisms whole": float(whole.sum()),
        **sparse_accuracy(decomposition, target.tokens, target.is_right),
    }


def cipher_is_complete(numbers: Numbers) -> bool:
    """The goal of the subsets: nothing skipped, nothing shattered."""
    return cipher_is_apart(numbers) and numbers["own forgotten, worst subset"] >= 0.95 and not shattered(numbers)


def shattered(numbers: Numbers) -> bool:
    return numbers["mechanisms whole"] < 0.95 * 3 * numbers["of"]


def cipher_is_apart(numbers: Numbers) -> bool:
    """The goal with all blocks on."""
    n = numbers["of"]
    apart = numbers["own component"] == numbers["spans all blocks"] == n
    return apart and numbers["own forgotten"] >= 0.95 and numbers["others forgotten"] <= 0.01


def cipher_in_superposition(numbers: Numbers) -> bool:
    return numbers["own component"] >= 30 and numbers["sparse accuracy"] >= 0.98
