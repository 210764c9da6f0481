"""What the examples measure of a decomposition: does each component hold one fact, and only that?"""

import statistics
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool
from torch import Tensor

import apd_lens as apd
from apd_lens.toys import FactsTarget as Target


@dataclass(frozen=True)
class Forgetting:
    """What taking each prompt's component out of the model does.

    Attributes:
        component: the one that is taken out, for each prompt.
        own: whether the prompt itself is then answered wrongly.
        others: how many other prompts are.
    """

    component: list[int]
    own: list[bool]
    others: list[int]

    @property
    def own_share(self) -> float:
        return sum(self.own) / len(self.own)

    @property
    def others_share(self) -> float:
        return sum(self.others) / len(self.others) / (len(self.others) - 1)


def forgetting(decomposition: apd.Decomposition, component: list[int], target: Target) -> Forgetting:
    """Takes each prompt's component out, one at a time, and asks for all prompts again."""
    own, others = [], []
    for prompt, index in enumerate(component):
        with decomposition.ablate(index):
            wrong = ~target.is_right()
        own.append(bool(wrong[prompt]))
        others.append(int(wrong.sum()) - int(wrong[prompt]))
    return Forgetting(component, own, others)


def top_components(decomposition: apd.Decomposition, target: Target) -> list[int]:
    """The component with the largest attribution, for each prompt."""
    return decomposition.attributions(target.prompts).argmax(1).tolist()


def n_alone(component: list[int]) -> int:
    """Prompts whose component is that of no other prompt."""
    return sum(component.count(index) == 1 for index in component)


def sparse_accuracy(decomposition: apd.Decomposition, mask: Bool[Tensor, "fact C"], target: Target) -> float:
    """Accuracy on the masked components alone."""
    with decomposition.sparse(mask):
        return target.accuracy()


def scrubbed_accuracy(
    decomposition: apd.Decomposition, mask: Bool[Tensor, "fact C"], target: Target, seed: int, n_draws: int = 20
) -> float:
    """The same with a random half of the inactive components taken out and the rest left on, mean over draws."""
    generator = torch.Generator().manual_seed(seed)
    draws = [apd.metrics.scrubbed_mask(mask, generator) for _ in range(n_draws)]
    return statistics.mean(sparse_accuracy(decomposition, draw, target) for draw in draws)


def measure(
    decomposition: apd.Decomposition, target: Target, seed: int
) -> tuple[dict[str, float], Forgetting, Forgetting]:
    """All measures by name; and what removing each prompt's component does, and what removing its random twin does.

    The null control is a decomposition into random components, twins of the real ones: each has the norm and the
    singular values of its twin in every matrix.
    """
    null = replace(decomposition, components=apd.components.random_components(decomposition.components, seed))
    component, null_component = top_components(decomposition, target), top_components(null, target)
    mask, null_mask = decomposition.select(target.prompts), null.select(target.prompts)
    found, twin = forgetting(decomposition, component, target), forgetting(null, component, target)
    never_active = (~mask.any(0)).nonzero()[:, 0].tolist()
    with decomposition.ablate(never_active):
        without_never_active = target.accuracy()
    measures = {
        "facts with a component of their own": n_alone(component),
        "    random components": n_alone(null_component),
        "component removed: own fact forgotten": found.own_share,
        "    its random twin removed": twin.own_share,
        "component removed: other facts forgotten": found.others_share,
        "    its random twin removed, others": twin.others_share,
        "sparse accuracy": sparse_accuracy(decomposition, mask, target),
        "    with random halves of the inactive on": scrubbed_accuracy(decomposition, mask, target, seed),
        "    random components, sparse": sparse_accuracy(null, null_mask, target),
        "residual ‖Δ‖ / ‖W‖": decomposition.residuals()["all"],
        "components that are never active": len(never_active),
        "    accuracy without all of them": without_never_active,
    }
    return measures, found, twin


def print_components(decomposition: apd.Decomposition, found: Forgetting, twin: Forgetting, facts: list[str]) -> None:
    """A row for each fact: its component, that component's norm and effective rank in each matrix, and what removing it
    does, beside its random twin."""
    spectra = {
        name: apd.components.singular_values(decomposition.components, name) for name in decomposition.components.names
    }
    width = max(map(len, facts))
    matrices = "".join(f" │ {name.rpartition('.')[2]:>12}" for name in spectra)
    print(f"\n{'':{width}}          {matrices} │ removed, forgets │ its random twin")
    print(f"{'fact':{width}} component{' │    norm rank' * len(spectra)} │  own      others │  own     others")
    for row, (fact, component) in enumerate(zip(facts, found.component, strict=True)):
        cells = "".join(
            f" │ {spectrum[component].norm():7.2f} {apd.components.effective_rank(spectrum)[component]:4.1f}"
            for spectrum in spectra.values()
        )
        print(
            f"{fact:{width}} {component:9}{cells} │ {_yes(found.own[row]):>4} {found.others[row]:11} "
            f"│ {_yes(twin.own[row]):>4} {twin.others[row]:10}"
        )


def print_measures(results: list[dict[str, float]]) -> None:
    """A row for each measure: its value for each seed, and mean and spread if there are several."""
    several = len(results) > 1
    seeds = "".join(f"{f'seed {seed}':>11}" for seed in range(len(results)))
    print(f"\n{'':44}{seeds}" + (f"{'mean':>11}{'std':>11}" if several else ""))
    for name in results[0]:
        values = [float(result[name]) for result in results]
        if several:
            values += [statistics.mean(values), statistics.pstdev(values)]
        print(f"{name:44}" + "".join(f"{value:11.4g}" for value in values))


def _yes(value: bool) -> str:
    return "yes" if value else "no"
