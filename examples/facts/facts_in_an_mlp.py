"""64 facts in an MLP of 48 neurons, taken apart into one component each.

A one-layer HookedTransformer is trained to answer prompts (relation, subject) with an object. Everything but the MLP
is random and frozen, so the MLP holds the facts, and with fewer neurons than facts no neuron can hold one alone.
W_in and W_out are decomposed together.

    python examples/facts/facts_in_an_mlp.py              # seed 0: table, figure, saved decomposition, an edit
    python examples/facts/facts_in_an_mlp.py --seeds 5    # only the measures, for seeds 0 to 4
"""

import argparse
import time
import warnings
from pathlib import Path

import torch
from evidence import measure, print_components, print_measures
from matplotlib import pyplot as plt
from torch import Tensor
from transformer_lens import HookedTransformer

import apd_lens as apd
from apd_lens import plots, toys

warnings.filterwarnings("ignore", message="HookedTransformer is deprecated")


def draw(decomposition: apd.Decomposition, prompts: Tensor, path: Path) -> None:
    """Facts × components, and neurons × components."""
    attributions, components = decomposition.attributions(prompts), decomposition.components
    read, written = (
        apd.components.output_share(components, "blocks.0.mlp.W_in"),
        apd.components.input_share(components, "blocks.0.mlp.W_out"),
    )
    figure, (left, right) = plt.subplots(1, 2, figsize=(13, 6), layout="constrained")
    plots.attribution_matrix(attributions, ax=left, data_name="fact")
    order = plots.sorted_components(attributions)
    plots.unit_share((read + written) / 2, order=order, ax=right, unit_name="neuron")
    figure.savefig(path, dpi=120)
    plt.close(figure)


def use_with_your_own_tools(decomposition: apd.Decomposition, target: toys.FactsTarget) -> None:
    """The user's model, hooks and cache inside a context, and a model that has forgotten one chosen fact."""
    model, prompts = target.model, target.prompts

    def zero_neurons(post: Tensor, hook: object) -> Tensor:
        return torch.zeros_like(post)

    _, cache = model.run_with_cache(prompts)
    with decomposition.sparse(decomposition.select(prompts)):
        _, sparse_cache = model.run_with_cache(prompts)
        logits = model.run_with_hooks(prompts, fwd_hooks=[("blocks.0.mlp.hook_post", zero_neurons)])
    n_on, n_on_sparse = ((c["blocks.0.mlp.hook_post"][:, -1] > 0).sum(-1).float().mean() for c in (cache, sparse_cache))
    still_right = (logits[:, -1].argmax(-1) == target.answers).float().mean().item()
    print(f"run_with_cache: {n_on:.1f} neurons are on for a prompt, and {n_on_sparse:.1f} with its component alone")
    print(f"a hook of your own inside sparse(...), which zeroes the neurons: {still_right:.1%} of the answers right")

    chosen = 7
    component = decomposition.attributions(prompts)[chosen].argmax().item()
    edited = HookedTransformer(model.cfg)
    edited.load_state_dict(decomposition.edited_state_dict(ablate=component))
    forgotten = (~toys.FactsTarget(edited, prompts, target.answers).is_right()).nonzero()[:, 0].tolist()
    print(f"edited_state_dict(ablate={component}), to forget subject {chosen}: forgotten subjects are {forgotten}")


def main(seed: int, steps: int, out: Path | None) -> dict[str, float]:
    """The measures of one seed; with `out`, also the tables, the figure, and what can be done with the result."""
    start = time.perf_counter()
    target = toys.train_facts(seed=seed)
    no_mlp = [("blocks.0.hook_mlp_out", lambda mlp_out, hook: torch.zeros_like(mlp_out))]
    with target.model.hooks(fwd_hooks=no_mlp):
        without_mlp = target.accuracy()
    print(
        f"seed {seed}: {target.accuracy():.1%} of {len(target.prompts)} facts known, {without_mlp:.1%} without the MLP"
    )
    # All prompts in every step; W_in and W_out into 100 components of rank up to 4, one active a prompt.
    decomposition = apd.decompose(target.model, [target.prompts], seed=seed, **toys.facts_settings(steps))
    measures, found, twin = measure(decomposition, target, seed)
    measures["seconds, training of the target included"] = time.perf_counter() - start
    if out is None:
        return measures

    objects = (target.answers - len(target.prompts) - 1).tolist()
    facts = [f"subject {subject} → object {answer}" for subject, answer in enumerate(objects)]
    print_components(decomposition, found, twin, facts)
    print_measures([measures])
    print("residuals:", ", ".join(f"{name} {residual:.4f}" for name, residual in decomposition.residuals().items()))

    out.mkdir(parents=True, exist_ok=True)
    draw(decomposition, target.prompts, out / "facts_in_an_mlp.png")
    decomposition.save(out / "facts_in_an_mlp")
    print(f"\nwrote {out / 'facts_in_an_mlp.png'} and {out / 'facts_in_an_mlp'}; loaded it back onto the model")
    use_with_your_own_tools(apd.load(out / "facts_in_an_mlp", target.model, output=toys.centred_logits), target)
    return measures


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, help="run seeds 0 to SEEDS-1 and print mean and spread of the measures")
    parser.add_argument("--steps", type=int, default=4000, help="training steps of the decomposition")
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder for the figure and the decomposition")
    arguments = parser.parse_args()
    if arguments.seeds is None:
        main(0, arguments.steps, arguments.out)
    else:
        print_measures([main(seed, arguments.steps, out=None) for seed in range(arguments.seeds)])
