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
from apd_lens import compare, toys

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


# Boolean gates: a component for each gate.


def boolean_data(target: toys.BooleanTarget) -> tuple[Tensor, Tensor]:
    """Bits that no step saw, and where each gate's output is on."""
    bits = target.batches(4096, seed=10**6)(0)
    return bits, target.labels(bits) > 0.5


def boolean_owners(target: toys.BooleanTarget, decomposition: apd.Decomposition) -> Owners:
    """The component with the largest mean attribution to a gate's output, where it is on."""
    bits, on = boolean_data(target)
    owners = []
    for gate in range(on.shape[1]):
        effect = decomposition.attributions(bits[on[:, gate]], metric=lambda output, gate=gate: output[:, gate])
        owners.append(effect.mean(0).argmax())
    return torch.stack(owners)


def measure_boolean(target: toys.BooleanTarget, decomposition: apd.Decomposition, owners: Owners) -> Numbers:
    """A gate is found if a component is its own, and without it the gate's output is off where it was on, and that of
    other gates is not. Cases are data points at which a gate is on and the model right."""
    bits, on = boolean_data(target)
    right = lambda: target.is_right(bits)  # noqa: E731
    before = right() & on
    lost = forgotten(decomposition, owners, right) & on
    lost = lost.sum(1) / before.sum(0).clamp_min(1)  # mechanism, gate
    off = ~torch.eye(len(owners), dtype=torch.bool)
    clean = (lost.diagonal() >= 0.95) & ((lost * off).amax(1) <= 0.05)
    return {
        "found": float((alone(owners) & clean).sum()),
        "of": float(len(owners)),
        "own component": float(n_alone(owners)),
        **own_and_others(lost),
        "target's accuracy where on": right()[on].float().mean().item(),
        **sparse_accuracy(decomposition, bits, lambda: right()[on]),
    }


# Modular addition: a component for each key frequency.


def component_power(target: toys.AdditionTarget, decomposition: apd.Decomposition) -> Float[Tensor, "C frequencies"]:
    parts = (decomposition.components.component_weights(name) for name in target.weights)
    return toys.frequency_power(*parts, target.model)


def addition_owners(target: toys.AdditionTarget, decomposition: apd.Decomposition) -> Owners:
    """For each key frequency the component that has most of its power."""
    return component_power(target, decomposition)[:, target.key_frequencies].argmax(0)


def measure_addition(target: toys.AdditionTarget, decomposition: apd.Decomposition, owners: Owners) -> Numbers:
    """Alignment: the share of a component's own power that is at its frequency. A frequency is found if it has a
    component of its own with an alignment of 0.9, which has half of the target's power there or more."""
    keys, power = target.key_frequencies, component_power(target, decomposition)[owners]
    at_key = power.gather(1, keys[:, None])[:, 0]
    alignment = at_key / power.sum(1).clamp_min(1e-12)
    ranks = apd.components.effective_rank(
        apd.components.singular_values(decomposition.components, "mlp_in.weight")[owners]
    )
    found = alone(owners) & (alignment >= 0.9) & (at_key >= 0.5 * target.power[keys])
    return {
        "found": float(found.sum()),
        "of": float(len(keys)),
        "own component": float(n_alone(owners)),
        "alignment": alignment.mean().item(),
        "least alignment": alignment.min().item(),
        "share of the frequency": (at_key / target.power[keys]).mean().item(),
        "effective rank": ranks.mean().item(),
        **sparse_accuracy(decomposition, target.pairs, target.is_right),
    }


def neurons_of_addition(target: toys.AdditionTarget) -> Numbers:
    """The same of single neurons, in the matrices that have them; the strongest neuron of each frequency."""
    model, keys = target.model, target.key_frequencies
    one = torch.eye(model.mlp_in.out_features)
    read, written = model.mlp_in.weight.mT * one[:, None], model.mlp_out.weight.mT * one[..., None]
    power = toys.frequency_power(torch.zeros(len(one), *model.embed.weight.shape), read, written, model)
    owners = power[:, keys].argmax(0)
    at_key = power[owners, keys]
    alignment = at_key / power[owners].sum(1)
    share = (at_key / target.power[keys]).mean().item()
    return {
        "alignment": alignment.mean().item(),
        "least alignment": alignment.min().item(),
        "share of the frequency": share,
    }


# Compiled programs: components for each node.


def node_shares(target: toys.ProgramTarget, parts: dict[str, Tensor]) -> Float[Tensor, "C node"]:
    """How much of each node's weights each component has: Σ ⟨P_c, M_n⟩ / Σ ‖M_n‖², over matrices."""
    held = [torch.einsum("cio,nio->cn", part, target.mechanisms[name]) for name, part in parts.items()]
    norms = [target.mechanisms[name].square().sum((1, 2)) for name in parts]
    return torch.stack(held).sum(0) / torch.stack(norms).sum(0)


def node_aurocs(target: toys.ProgramTarget, parts: dict[str, Tensor]) -> Float[Tensor, " node"]:
    """How well components tell the weights of a node from those of all others.

    A component is given to the node of which it has most. An entry of the program's weights, in the basis in which they
    were compiled, scores what the components of a node hold of it, as a share of what all components hold there. A node
    without a component scores nothing anywhere, 0.5.
    """
    node = node_shares(target, parts).argmax(1)
    given = torch.eye(len(target.nodes))[node].mT  # node, component
    scores, owned = [], []
    for name, part in parts.items():
        entries = target.owned(name).flatten(1)
        back = target.turned_back(name, part).flatten(1)[:, entries.any(0)]
        of_node, of_others = (given @ back).abs(), ((1 - given) @ back).abs()
        scores.append(of_node / (of_node + of_others).clamp_min(1e-12))
        owned.append(entries[:, entries.any(0)])
    pairs = zip(torch.cat(scores, 1), torch.cat(owned, 1), strict=True)
    return torch.tensor([apd.metrics.auroc(score, label) for score, label in pairs])


def measure_program(target: toys.ProgramTarget, decomposition: apd.Decomposition, owners: None) -> Numbers:
    """A node is found if the AUROC of its components is 0.95."""
    parts = {name: decomposition.components.component_weights(name) for name in target.weights}
    aurocs = node_aurocs(target, parts)
    right = [
        sparse_accuracy(decomposition, some, lambda i=i: target.is_right(i)) for i, some in enumerate(target.examples)
    ]
    return {
        "found": float((aurocs >= 0.95).sum()),
        "of": float(len(aurocs)),
        "AUROC": aurocs.mean().item(),
        "least AUROC": aurocs.min().item(),
        "nodes with a component": float(len(node_shares(target, parts).argmax(1).unique())),
        **{what: sum(numbers[what] for numbers in right) / len(right) for what in right[0]},
    }


def matrices_of_program(target: toys.ProgramTarget) -> Numbers:
    """The same of each whole matrix as a component of its own."""
    whole = {name: target.mechanisms[name].sum(0) for name in target.weights}
    parts = {name: torch.zeros(len(whole), *matrix.shape) for name, matrix in whole.items()}
    for place, (name, matrix) in enumerate(whole.items()):
        parts[name][place] = matrix
    aurocs = node_aurocs(target, parts)
    return {"found": float((aurocs >= 0.95).sum()), "AUROC": aurocs.mean().item(), "least AUROC": aurocs.min().item()}


# Induction: the components that matter lie in the two heads that do it.


def right_logit(batch: toys.Sequences) -> Callable[[Float[Tensor, "batch pos d_vocab"]], Float[Tensor, " batch"]]:
    """Mean logit of the next token, where it can be known."""
    weights = batch.known.float() / batch.known.sum(1, keepdim=True)
    return lambda logits: (logits.gather(2, batch.next[..., None])[..., 0] * weights).sum(1)


def measure_induction(target: toys.InductionTarget, decomposition: apd.Decomposition, owners: None) -> Numbers:
    """Share of weight in the two heads, of the components that matter for the right logit, weighted by that; and how
    much of this logit comes back with as many components on as are active, the others off or under attack."""
    batch, few = toys.sequences(64, seed=2), toys.sequences(16, seed=3)
    sparse = sparse_accuracy(decomposition, batch.tokens, lambda: target.is_right(batch))
    n_active = max(1, round(sparse["active"]))
    scores, sizes = decomposition.attributions, (n_active,)
    curve = compare.faithfulness_curve(decomposition, [few.tokens], right_logit(few), scores=scores, sizes=sizes)
    return {
        "weight in the two heads": compare.locate(
            decomposition, [batch.tokens], target.heads, right_logit(batch)
        ).shares()[0],
        "right logit": curve.own.item(),
        "right logit, attacked": curve.worst.item(),
        "target's accuracy": target.is_right(batch).float().mean().item(),
        **sparse,
    }
