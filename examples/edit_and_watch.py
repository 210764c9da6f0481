"""Taking a mechanism out for good, and noticing inputs that use mechanisms in an unusual way.

1. 64 facts in an MLP (see toys.train_facts): one is taken out, in the model's own parameters. What does that do to
   it and to the 63 others, beside edits of the same rank that know no components?
2. The same model watches its inputs: it has 48 of the facts as reference, and is shown 16 others.
3. A toy model of superposition, 40 features in 10 dimensions, watches its inputs: features that are never on in the
   reference data, and pairs of known features that are never on together. Every anomaly has a normal twin with as many
   active features, of the same sizes.

    python examples/edit_and_watch.py
"""

import argparse
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from jaxtyping import Float
from matplotlib import pyplot as plt
from torch import Tensor

import apd_lens as apd
from apd_lens import compare, plots, toys
from apd_lens import monitor as watch

N_FEATURES, N_TESTED = 40, 1000
# Active components of a data point, where 2 features are on. Chosen by looking: of 2, a fourth is on by
# interference alone and the scores fall; 1 does about as well.
K = 1.25


def edits(decomposition: apd.Decomposition, target: toys.FactsTarget, facts: range) -> compare.EditEffects:
    """Prints what taking out one fact does, and the mean over some facts; gives the effects of the one."""
    own = decomposition.attributions(target.prompts).argmax(1)

    def effects(fact: int) -> compare.EditEffects:
        other = torch.arange(len(target.prompts)) != fact
        return compare.edit_effects(
            decomposition,
            own[fact],
            [target.prompts[fact : fact + 1]],
            [target.prompts[other]],
            distance="kl",
            metric=lambda logits: logits.softmax(-1)[:, target.answers[fact]],
            others=own.unique(),
        )

    chosen = 7
    one = effects(chosen)
    print(
        f"\nfact {chosen}, of component {own[chosen].item()}; KL in nats, the metric is its answer's probability\n{one}"
    )
    kinds = list(dict.fromkeys(one.kind))
    several = [effects(fact).table() for fact in facts]
    print(f"\nmean over {len(facts)} facts: on target, elsewhere mean and 99th percentile")
    for kind in kinds:
        numbers = [
            sum(table[table["kind"] == kind][column].mean() for table in several) / len(several)
            for column in ("on target", "other, mean", "other, 99th percentile")
        ]
        print(f"{kind:38}" + "".join(f"{number:12.2g}" for number in numbers))

    with apd.apply_edit(target.model, decomposition, ablate=own[chosen]) as edit:
        print(f"\n{edit}: forgotten are {(~target.is_right()).nonzero()[:, 0].tolist()}")
    print(f"{edit}: forgotten are {(~target.is_right()).nonzero()[:, 0].tolist()}")
    return one


@dataclass(frozen=True, eq=False)
class Anomalies:
    """Reference data, and as many anomalous as normal data points to be told apart."""

    name: str
    reference: Tensor
    normal: Tensor
    anomalous: Tensor


def areas(
    decomposition: apd.Decomposition,
    data: Anomalies,
    activations: dict[str, Callable[[Tensor], Tensor]],
    k: float | None = None,
) -> tuple[dict[str, Tensor], Tensor]:
    """Prints the AUROC of each score; gives the scores, and which data points are anomalous."""
    x = torch.cat([data.normal, data.anomalous])
    anomalous = torch.arange(len(x)) >= len(data.normal)
    null = replace(decomposition, components=apd.components.random_components(decomposition.components))
    monitor, null_monitor = (watch.fit(some, data.reference.split(5000), k=k) for some in (decomposition, null))
    scores, null_scores = monitor.score(x), null_monitor.score(x)
    found = {
        "surprise": scores.surprise,
        "residual": scores.residual,
        "number of active components": monitor.selection(decomposition.attributions(x)).sum(1).float(),
    }
    for name, activation in activations.items():
        baseline = watch.mahalanobis([activation(data.reference)])
        found[f"Mahalanobis, {name}"] = baseline.score(activation(x)).float()
    found["random components, surprise"] = null_scores.surprise
    found["random components, residual"] = null_scores.residual
    shuffled = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    found["shuffled labels, surprise"] = scores.surprise[shuffled]
    print(f"\n{data.name}: {len(data.anomalous)} beside {len(data.normal)} normal ones; AUROC\n{monitor}")
    for name, score in found.items():
        print(f"{name:38}{apd.metrics.auroc(score, anomalous):8.3f}")
    return found, anomalous


def features(n: int, generator: torch.Generator, used: int = N_FEATURES) -> Float[Tensor, "n features"]:
    """Inputs with the first `used` features on with probability 0.05 each."""
    x = toys.tms_data(n, generator, n_features=N_FEATURES)
    x[:, used:] = 0
    return x


def unused_features(generator: torch.Generator, n_reference: int) -> Anomalies:
    """Features 35 to 39 are never on in the reference data. Tested are usual inputs with one more feature, a strong
    one: a known one, or one of these."""
    reference, normal, anomalous = (features(n, generator, 35) for n in (n_reference, N_TESTED, N_TESTED))
    for x, first, last in ((normal, 0, 35), (anomalous, 35, 40)):
        chosen = torch.randint(first, last, (N_TESTED, 1), generator=generator)
        x.scatter_(1, chosen, 0.5 + 0.5 * torch.rand(N_TESTED, 1, generator=generator))
    return Anomalies("features that are never on in the reference data", reference, normal, anomalous)


def unusual_pairs(generator: torch.Generator, n_reference: int) -> Anomalies:
    """Features 2i and 2i + 1 are never on together in the reference data. Tested are usual inputs with two more
    features, strong ones, of different pairs or of one."""

    def usual(n: int) -> Tensor:
        x = features(3 * n, generator)
        return x[~(x[:, 0::2] * x[:, 1::2]).any(1)][:n]

    reference, normal, anomalous = usual(n_reference), usual(N_TESTED), usual(N_TESTED)
    for x, together in ((normal, False), (anomalous, True)):
        first = torch.randint(N_FEATURES, (N_TESTED, 1), generator=generator)
        step = 2 * torch.randint(1, N_FEATURES // 2, (N_TESTED, 1), generator=generator)
        second = first ^ 1 if together else (first + step) % N_FEATURES
        sizes = 0.5 + 0.5 * torch.rand(N_TESTED, 2, generator=generator)
        chosen = torch.cat([first, second], 1)
        if not together:
            x.scatter_(1, chosen ^ 1, 0)  # their partners are off
        x.scatter_(1, chosen, sizes)
    return Anomalies("pairs of features that are never on together there", reference, normal, anomalous)


def decompose_tms(target: toys.TMSTarget, steps: int) -> apd.Decomposition:
    """With the settings of the paper's systems (examples/paper)."""
    return apd.decompose(
        target.model,
        target.batches(512, seed=1000),
        target.weights,
        n_components=50,
        rank=4,
        selection=apd.BatchTopK(apd.Ramp(2.0, 3.5)),
        losses=apd.Losses(faithfulness=1.0, simplicity=apd.HoldThenDecay(0.04)),
        moves=apd.moves.ClusterMoves(fewest=8),
        optimization=apd.Optimization(steps=steps, lr=1e-2, scaled=False, init_scale=0.5, start="random"),
    )


def main(steps: int | None, n_reference: int, out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    figure, panels = plt.subplots(2, 2, figsize=(17, 9), layout="constrained")

    target = toys.train_facts()
    decomposition = apd.decompose(target.model, [target.prompts], **toys.facts_settings(steps or 4000))
    one = edits(decomposition, target, range(0, 64, 4) if steps is None else range(1))
    plots.edit_effects(one.kind, one.on_target, one.other, ax=panels[0, 0])

    def activation(name: str) -> Callable[[Tensor], Tensor]:
        return lambda prompts: target.model.run_with_cache(prompts)[1][name][:, -1]

    known, unknown = target.prompts[:48], target.prompts[48:]
    # A fact has one prompt, so the normal data points are those of the reference: a baseline may know them by heart.
    withheld = Anomalies("facts that are not in the reference data", known, known, unknown)
    at = {"neurons": activation("blocks.0.mlp.hook_post"), "residual stream": activation("blocks.0.hook_resid_mid")}
    found, anomalous = areas(decomposition, withheld, at)
    plots.roc(found, anomalous, ax=panels[0, 1])
    panels[0, 1].set_title(withheld.name)

    tms = toys.train_tms(N_FEATURES, 10, steps=5000 if steps is None else steps)
    decomposition = decompose_tms(tms, steps or 2000)
    at = {"hidden layer": lambda x: x @ tms.model.W, "outputs": tms.model, "inputs": lambda x: x}
    for ax, make in zip(panels[1], (unused_features, unusual_pairs), strict=True):
        data = make(torch.Generator().manual_seed(0), n_reference)
        found, anomalous = areas(decomposition, data, at, k=K)
        plots.roc(found, anomalous, ax=ax)
        ax.set_title(data.name)
    figure.savefig(out / "edit_and_watch.png", dpi=110)
    print(f"\nwrote {out / 'edit_and_watch.png'}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--steps", type=int, help="training steps of all that is trained; default as in the other examples"
    )
    parser.add_argument("--reference", type=int, default=20_000, help="data points of reference for the toy model")
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder for the figure")
    arguments = parser.parse_args()
    main(arguments.steps, arguments.reference, arguments.out)
