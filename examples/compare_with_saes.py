"""Sparse autoencoders beside decompositions, on two models whose mechanisms are known.

SAEs are trained by SAELens's own SAETrainer on the hidden layer of TMS 40-10 (40 features in 10 dimensions) and on the
MLP of toys.train_facts (64 facts in 48 neurons), saved, loaded back, and compared with decompositions of the same
models: which directions match, which units are active together, and how much of the model a few units give back.

    python examples/compare_with_saes.py               # both models, tables and figures; five minutes on one core
    python examples/compare_with_saes.py --models tms  # one of them

Decompositions are kept in --out and read from there the next time.
"""

import argparse
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import sae_lens
import torch
import torch.nn.functional as F
from matplotlib import pyplot as plt
from sae_lens.config import SAETrainerConfig
from sae_lens.training.sae_trainer import SAETrainer
from torch import Tensor

import apd_lens as apd
from apd_lens import compare, plots, toys

warnings.filterwarnings("ignore", message="HookedTransformer is deprecated")

Saes = dict[str, compare.Dictionary]


def train_sae(
    config: sae_lens.TrainingSAEConfig, activations: Iterator[Tensor], batch_size: int, steps: int, site: str
) -> compare.Dictionary:
    """An SAE as SAELens trains, saves and loads it."""
    torch.manual_seed(0)
    kinds = {
        sae_lens.StandardTrainingSAEConfig: sae_lens.StandardTrainingSAE,
        sae_lens.TopKTrainingSAEConfig: sae_lens.TopKTrainingSAE,
    }
    sae = kinds[type(config)](config)
    training = SAETrainerConfig(
        total_training_samples=steps * batch_size,
        train_batch_size_samples=batch_size,
        lr=3e-3,
        lr_end=3e-4,
        lr_decay_steps=steps // 5,
    )
    SAETrainer(training, sae, activations).fit()
    with tempfile.TemporaryDirectory() as folder:
        sae.save_inference_model(folder)
        return compare.Dictionary.from_sae_lens(sae_lens.SAE.load_from_disk(folder), site=site)


def tms_settings(steps: int) -> dict[str, Any]:
    """Those of examples/paper, with which each feature gets a component of its own."""
    losses = apd.Losses(faithfulness=1.0, simplicity=apd.HoldThenDecay(0.04))
    return {
        "n_components": 50,
        "rank": 4,
        "selection": apd.BatchTopK(apd.Ramp(2.0, 3.5)),
        "losses": losses,
        "moves": apd.moves.ClusterMoves(fewest=8),
        "optimization": apd.Optimization(steps=steps, lr=1e-2, scaled=False, init_scale=0.5, start="random"),
    }


def tms(arguments: argparse.Namespace) -> None:
    target = toys.train_tms(40, 10, steps=arguments.target_steps)
    kept = arguments.out / "tms"
    if not kept.exists():
        batches = target.batches(512, seed=1000)
        apd.decompose(target.model, batches, target.weights, **tms_settings(arguments.steps or 2000)).save(kept)
    decomposition = apd.load(kept, target.model)

    def hidden() -> Iterator[Tensor]:
        batches, step = target.batches(2048, seed=5), 0
        while True:
            yield target.model.linear1(batches(step))
            step += 1

    l1 = sae_lens.StandardTrainingSAEConfig(d_in=10, d_sae=50, l1_coefficient=0.3)
    top4 = sae_lens.TopKTrainingSAEConfig(d_in=10, d_sae=50, k=4)
    saes = {
        "SAE, L1": train_sae(l1, hidden(), 2048, arguments.sae_steps, "linear1"),
        "SAE, top 4": train_sae(top4, hidden(), 2048, arguments.sae_steps, "linear1"),
    }
    batches = [target.batches(2048, seed=10**6)(step) for step in range(4)]
    show("TMS 40-10: which of the 40 features have a unit, one to one?", known_features(target, decomposition, saes))
    sae = saes["SAE, L1"]
    direction = compare.direction_match(decomposition, sae, "linear1.weight", "write", batches=batches)
    show("TMS 40-10: what components write to the hidden layer, and decoder directions of the SAE with L1", direction)
    activity = compare.activation_match(decomposition, batches, sae)
    show("TMS 40-10: components and latents that are active together", activity)
    print(activity.table().head(5).round(3).T.to_string(header=False))
    cross_check(direction, activity)
    dictionaries = {**saes, "neurons": compare.Dictionary.neurons("linear1", 10)}
    ks = (0, 1, 2, 3, 4, 6, 8)
    curves = compare.sparsity(decomposition, batches, ks, dictionaries, by="gradient")
    show("TMS 40-10: mean squared error of the output with a mean of k units a data point", curves)
    draw("TMS 40-10", direction, activity, curves, "squared error", arguments.figures / "compare_tms.png")


def known_features(target: toys.TMSTarget, decomposition: apd.Decomposition, saes: Saes) -> str:
    """A row a method: features whose direction (row of W) has a partner of cosine above 0.9, the mean of these cosines,
    and how well the partner in activity tells when the feature is on, beside random directions and shuffled units."""
    x = target.batches(8192, seed=2 * 10**6)(0)
    hidden, features = target.model.linear1(x), F.normalize(target.rows, dim=1)
    truth = compare.Dictionary("linear1", features.mT, features)
    directions = {"components": compare.direction_match(decomposition, truth, "linear1.weight", batches=[x]).cosine}
    active = {"components": decomposition.select(x), "components, k = 2": decomposition.select(x, k=2)}
    directions["components, k = 2"] = directions["components"]
    for name, sae in saes.items():
        directions[name] = F.normalize(sae.decoder, dim=1) @ features.mT
        active[name] = sae.encode(hidden) > 0
    generator = torch.Generator().manual_seed(0)
    directions["random directions"] = F.normalize(torch.randn(50, 10, generator=generator), dim=1) @ features.mT
    active["random directions"] = active["components"][torch.randperm(len(x), generator=generator)]
    rows = [f"{'':18}features above 0.9  mean cosine  mean F1  units a data point"]
    for name, units in active.items():
        cosine = compare.matching(directions[name]).one_to_one
        sums = compare.activation_sums(units, units.float(), x > 0, x)
        f1 = compare.matching(compare.activation_measures(sums)["f1"]).one_to_one
        n_active = units.sum(1).float().mean()
        rows.append(f"{name:18}{(cosine > 0.9).sum():18}{cosine.nanmean():13.3f}{f1.nanmean():9.3f}{n_active:21.2f}")
    return "\n".join(rows) + "\n(F1 of random directions: that of components on other data points)"


def facts(arguments: argparse.Namespace) -> None:
    target = toys.train_facts()
    kept = arguments.out / "facts"
    if not kept.exists():
        apd.decompose(target.model, [target.prompts], **toys.facts_settings(arguments.steps or 4000)).save(kept)
    decomposition = apd.load(kept, target.model, output=toys.centred_logits)
    _, cache = target.model.run_with_cache(target.prompts)
    post, mlp_out, w_out = "blocks.0.mlp.hook_post", "blocks.0.hook_mlp_out", "blocks.0.mlp.W_out"

    def last_position(site: str) -> Iterator[Tensor]:
        while True:
            yield cache[site][:, -1]  # of all 64 prompts: there are no others

    saes = {}
    for name, site in (("SAE of neurons", post), ("SAE of the MLP's output", mlp_out)):
        config = sae_lens.StandardTrainingSAEConfig(d_in=cache[site].shape[-1], d_sae=100, l1_coefficient=0.5)
        saes[name] = train_sae(config, last_position(site), len(target.prompts), arguments.sae_steps, site)

    prompts = [target.prompts]
    written = compare.direction_match(decomposition, saes["SAE of the MLP's output"], w_out, "write", batches=prompts)
    show("Facts: what components write to the MLP's output, and decoder directions of its SAE", written)
    print("Facts with the same object are written in the same direction, so most have several matches.")
    read = compare.direction_match(decomposition, saes["SAE of neurons"], w_out, "read", batches=prompts)
    show("Facts: what components read from the neurons, and encoder directions of their SAE", read)
    activity = compare.activation_match(decomposition, prompts, saes["SAE of the MLP's output"], pool="last")
    show("Facts: components and latents that are active together", activity)
    print("Every unit is active on one or two prompts, so latents of other prompts match just as well: by itself this")
    print("says only that there is a unit for each fact on both sides. Whether they are the same ones, directions say.")
    cross_check(written, activity)
    dictionaries = {**saes, "neurons": compare.Dictionary.neurons(post, 48)}
    curves = compare.sparsity(
        decomposition, prompts, (0, 1, 2, 4, 8, 16), dictionaries, loss="kl", by="gradient", pool="last"
    )
    show("Facts: KL divergence of the answer with k units a prompt", curves)
    draw("Facts in an MLP", written, activity, curves, "KL divergence, nats", arguments.figures / "compare_facts.png")


def cross_check(direction: compare.DirectionMatch, activity: compare.ActivationMatch) -> None:
    f1, exchanged = direction.found.of_pairs(activity.f1)
    print(f"pairs found by direction alone: F1 {f1:.3f}; with their latents exchanged {exchanged:.3f}")


def show(title: str, result: object) -> None:
    print(f"\n{title}\n{result}", flush=True)


def draw(
    title: str,
    direction: compare.DirectionMatch,
    activity: compare.ActivationMatch,
    curves: compare.Sparsity,
    loss_name: str,
    path: Path,
) -> None:
    """Who matches whom, best matches beside their nulls, and loss against sparsity counted in two ways."""
    figure, grid = plt.subplots(2, 3, figsize=(22, 10), layout="constrained")
    plots.match_matrix(direction.cosine, direction.found.partner, ax=grid[0, 0], label="cosine of directions")
    plots.match_matrix(activity.f1, direction.found.partner, ax=grid[1, 0], label="F1 of activity")
    grid[1, 0].set_title("The same pairs: are they active together?")
    best = {
        "SAE": direction.found.best_of_component,
        "random directions": direction.random_directions.best_of_component,
        "random components": direction.random_components.best_of_component,
    }
    plots.best_matches(best, nulls=["random directions", "random components"], ax=grid[0, 1])
    best = {"SAE": activity.found.best_of_component, "shuffled": activity.shuffled.best_of_component}
    plots.best_matches(best, nulls=["shuffled"], ax=grid[1, 1], label="F1")
    nulls = [name for name in curves.of("loss") if "random" in name]
    for ax, column, label in (
        (grid[0, 2], "active", "active units a data point"),
        (grid[1, 2], "bits", "bits a data point"),
    ):
        plots.loss_against_sparsity(
            curves.of(column), curves.of("loss"), nulls=nulls, ax=ax, label=label, loss_name=loss_name
        )
    figure.suptitle(title)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=90)
    plt.close(figure)
    print(f"\nwrote {path}", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=["tms", "facts"], default=["tms", "facts"])
    parser.add_argument("--steps", type=int, help="training steps of the decompositions, by default 2000 and 4000")
    parser.add_argument("--target-steps", type=int, default=5000, help="training steps of TMS")
    parser.add_argument("--sae-steps", type=int, default=1500, help="training steps of each SAE")
    parser.add_argument("--out", type=Path, default=Path("out/compare"), help="where decompositions are kept")
    parser.add_argument("--figures", type=Path, default=Path("out/compare"))
    given = parser.parse_args()
    for name in given.models:
        {"tms": tms, "facts": facts}[name](given)
