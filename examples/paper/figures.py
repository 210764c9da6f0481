"""The paper's figures and ours, drawn from the components that paper.py left in out/paper/.

Targets are trained again, on the same number of threads, since with another number they come out with other roundings.
"""

import argparse
import json
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import drawing
import paper
import torch
import torch.nn.functional as F
from matplotlib import pyplot as plt
from torch import Tensor

import apd_lens as apd
from apd_lens import metrics, plots, toys

Drawn = Iterator[tuple[str, plt.Figure]]


def of_tms(target: toys.TMSTarget, decomposition: apd.Decomposition) -> Drawn:
    yield "vectors", drawing.feature_vectors(target.rows, decomposition.components.component_weights("linear1.weight"))


def of_residual_mlp(target: toys.ResidualMLPTarget, decomposition: apd.Decomposition) -> Drawn:
    model, components = target.model, decomposition.components
    n_features = len(target.contributions)
    owner = paper.owners(target, decomposition)
    sparse = partial(paper.output_under, decomposition, target)

    W_E, W_U = model.W_E.weight.mT, model.W_U.weight.mT
    sides = [components.component_weights(name) for name in target.weights]
    contributions = torch.cat(
        [metrics.neuron_contributions(W_E, *layer, W_U) for layer in zip(sides[::2], sides[1::2], strict=True)], -1
    )
    yield "neuron_contributions", drawing.neuron_contributions(target.contributions, contributions, component_of=owner)

    x = torch.eye(n_features)
    alone = F.one_hot(owner, components.n_components).bool()
    yield (
        "single_feature_responses",
        drawing.single_feature_responses(model(x), sparse(x, alone), toys.residual_mlp_labels(x)),
    )

    x = target.batches(2**14, seed=10**6)(0)
    labels = toys.residual_mlp_labels(x)
    full = errors(model(x), labels)
    attributions = decomposition.attributions(x)
    masks = {"top-1": apd.masks.topk_mask(attributions, 1), "batch top-k": decomposition.select(x)}
    losses = {name: errors(sparse(x, mask), labels) for name, mask in masks.items()}
    on = (x != 0).float()
    yield (
        "feature_loss",
        drawing.feature_loss(
            mean_where(on, full),
            {name: mean_where(on, loss) for name, loss in losses.items()},
        ),
    )
    yield "loss_by_active", drawing.loss_by_active(on.sum(1).long(), full, losses)

    generator = torch.Generator().manual_seed(0)
    active = masks["batch top-k"]
    scrubbed, anti = (
        errors(sparse(x, draw(active, generator)), labels)
        for draw in (metrics.scrubbed_mask, metrics.anti_scrubbed_mask)
    )
    some = on.any(1)  # where nothing is on, there is nothing to do
    yield "scrubbed_losses", drawing.scrubbed_losses(full[some], scrubbed[some], anti[some])

    values = torch.linspace(-1, 1, 81)
    x = torch.zeros(len(values), n_features)
    x[:, 0] = values
    scrubbed, anti = (
        torch.stack([sparse(x, draw(alone[:1], generator).expand(len(x), -1))[:, 0] for _ in range(20)])
        for draw in (metrics.scrubbed_mask, metrics.anti_scrubbed_mask)
    )
    yield "scrubbed_outputs", drawing.scrubbed_outputs(values, model(x)[:, 0], scrubbed, anti, input_name="input 0")


def of_gated(target: toys.GatedTarget, decomposition: apd.Decomposition) -> Drawn:
    sides = [decomposition.components.component_weights(name) for name in target.weights]
    names = ["x", *(f"bit {i}" for i in range(len(target.values))), "y"]
    yield "component_graph", drawing.component_graph(sides[::2], sides[1::2], residual_names=names)


def of_any(target: paper.Target, decomposition: apd.Decomposition) -> Drawn:
    components = decomposition.components
    spectra = [apd.components.singular_values(components, name) for name in components.names]
    x = target.batches(256, seed=10**6)(0)
    order = plots.sorted_components(decomposition.attributions(x))
    yield (
        "rank_and_share",
        plots.rank_and_share(
            torch.stack([metrics.effective_rank(spectrum) for spectrum in spectra], 1),
            metrics.layer_share(components),
            names=components.names,
            order=order,
        ),
    )
    yield "audit", plots.audit(metrics.audit(decomposition, [x]))


def of_history(history: list[dict[str, float]]) -> plt.Figure:
    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4), layout="constrained")
    plots.loss_curves(history, ax=left)
    plots.alive_components(history, ax=right)
    return figure


def errors(output: Tensor, wanted: Tensor) -> Tensor:
    return (output - wanted).square().mean(1)


def mean_where(on: Tensor, loss: Tensor) -> Tensor:
    """For each feature the mean loss of the data points in which it is active."""
    return (on * loss[:, None]).sum(0) / on.sum(0).clamp_min(1)


OF: dict[str, Callable[..., Drawn]] = {"tms": of_tms, "residual": of_residual_mlp, "gated": of_gated}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--systems", nargs="+", choices=paper.SYSTEMS, default=list(paper.SYSTEMS))
    parser.add_argument("--results", type=Path, default=paper.HERE / "results")
    parser.add_argument("--out", type=Path, default=paper.OUT, help="where components are kept")
    parser.add_argument("--target-steps", type=int, help="as it was given to paper.py")
    parser.add_argument("--figures", type=Path, default=paper.HERE / "figures")
    arguments = parser.parse_args()
    arguments.figures.mkdir(parents=True, exist_ok=True)
    for name in arguments.systems:
        file, folder = arguments.results / f"{name}-0.json", arguments.out / f"{name}-0"
        if not file.exists() or not folder.exists():
            print(f"{name}: nothing in {folder} to draw")
            continue
        target = paper.make_target(name, 0, arguments.target_steps)
        decomposition = apd.load(folder, target.model)
        drawn = [("training", of_history(json.loads(file.read_text())["history"]))]
        drawn += [*OF[name.partition("-")[0]](target, decomposition), *of_any(target, decomposition)]
        for what, figure in drawn:
            path = arguments.figures / f"{name}-{what}.png"
            figure.savefig(path, dpi=80)
            plt.close(figure)
            print(path)


if __name__ == "__main__":
    main()
