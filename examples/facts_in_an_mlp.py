"""64 facts in an MLP of 48 neurons, taken apart into one component each.

A one-layer HookedTransformer is trained to answer prompts (relation, subject) with an object. Everything but the MLP
is random and frozen, so the MLP holds the facts, and with fewer neurons than facts no neuron can hold one alone.
W_in and W_out are decomposed together.

    python examples/facts_in_an_mlp.py              # seed 0: table, figure, saved decomposition, an edit
    python examples/facts_in_an_mlp.py --seeds 5    # only the measures, for seeds 0 to 4
"""

import argparse
import time
import warnings
from pathlib import Path

import torch
import torch.nn.functional as F
from evidence import Target, measure, print_components, print_measures
from matplotlib import pyplot as plt
from torch import Tensor
from transformer_lens import HookedTransformer, HookedTransformerConfig

import apd_lens as apd
from apd_lens import plots

warnings.filterwarnings("ignore", message="HookedTransformer is deprecated")

N_SUBJECTS, N_OBJECTS, D_MODEL, N_NEURONS = 64, 32, 256, 48


def train_target(seed: int, n_subjects: int = N_SUBJECTS, d_model: int = D_MODEL, n_neurons: int = N_NEURONS) -> Target:
    """A model that knows a random object for each subject."""
    torch.manual_seed(seed)
    relation = n_subjects  # tokens: the subjects, the relation, the objects
    prompts = torch.tensor([[relation, subject] for subject in range(n_subjects)])
    answers = n_subjects + 1 + torch.randint(0, N_OBJECTS, (n_subjects,))
    cfg = HookedTransformerConfig(
        n_layers=1,
        d_model=d_model,
        n_ctx=2,
        d_head=16,
        n_heads=2,
        d_mlp=n_neurons,
        d_vocab=n_subjects + 1 + N_OBJECTS,
        act_fn="relu",
        normalization_type="LN",
        seed=seed,
        device="cpu",
    )
    model = HookedTransformer(cfg)
    with torch.no_grad():
        model.W_E.normal_()
        model.W_U.normal_(std=d_model**-0.5)
        model.blocks[0].attn.W_O.zero_()
    mlp = model.requires_grad_(False).blocks[0].mlp.requires_grad_(True)
    optimizer = torch.optim.AdamW(mlp.parameters(), lr=3e-3, weight_decay=0.05)
    for _ in range(3000):
        loss = F.cross_entropy(model(prompts)[:, -1], answers)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return Target(model.requires_grad_(False), prompts, answers)


def centred_logits(logits: Tensor) -> Tensor:
    """The answer's logits less their mean, which softmax does not see. Unlike log-probabilities, which hardly move in a
    confident model, they have gradients."""
    last = logits[:, -1]
    return last - last.mean(-1, keepdim=True)


def decompose(model: HookedTransformer, prompts: Tensor, steps: int, seed: int) -> apd.Decomposition:
    """W_in and W_out into 100 components of rank up to 4, one active a prompt."""
    return apd.decompose(
        model,
        [prompts],  # all of them in every step
        weights=["blocks.*.mlp.*"],
        n_components=100,
        rank=4,
        output=centred_logits,
        selection=apd.TopK(k=1),
        losses=apd.Losses(
            faithfulness=30,
            minimality=1,
            simplicity=apd.HoldThenDecay(0.06, hold=0.6, zero=0.8),
            schatten_p=0.9,
            simplicity_floor=0,
            path=2,
            normalization="relative",
        ),
        moves=apd.SplitMoves(every=100, until=0.6),
        optimization=apd.Optimization(steps=steps, lr=3e-3, scaled=False, init_scale=1),
        seed=seed,
    )


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


def use_with_your_own_tools(decomposition: apd.Decomposition, target: Target) -> None:
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
    forgotten = (~Target(edited, prompts, target.answers).is_right()).nonzero()[:, 0].tolist()
    print(f"edited_state_dict(ablate={component}), to forget subject {chosen}: forgotten subjects are {forgotten}")


def main(seed: int, steps: int, out: Path | None) -> dict[str, float]:
    """The measures of one seed; with `out`, also the tables, the figure, and what can be done with the result."""
    start = time.perf_counter()
    target = train_target(seed)
    no_mlp = [("blocks.0.hook_mlp_out", lambda mlp_out, hook: torch.zeros_like(mlp_out))]
    with target.model.hooks(fwd_hooks=no_mlp):
        without_mlp = target.accuracy()
    print(f"seed {seed}: {target.accuracy():.1%} of {N_SUBJECTS} facts known, {without_mlp:.1%} without the MLP")
    decomposition = decompose(target.model, target.prompts, steps, seed)
    measures, found, twin = measure(decomposition, target, seed)
    measures["seconds, training of the target included"] = time.perf_counter() - start
    if out is None:
        return measures

    objects = (target.answers - N_SUBJECTS - 1).tolist()
    facts = [f"subject {subject} → object {answer}" for subject, answer in enumerate(objects)]
    print_components(decomposition, found, twin, facts)
    print_measures([measures])
    print("residuals:", ", ".join(f"{name} {residual:.4f}" for name, residual in decomposition.residuals().items()))

    out.mkdir(parents=True, exist_ok=True)
    draw(decomposition, target.prompts, out / "facts_in_an_mlp.png")
    decomposition.save(out / "facts_in_an_mlp")
    print(f"\nwrote {out / 'facts_in_an_mlp.png'} and {out / 'facts_in_an_mlp'}; loaded it back onto the model")
    use_with_your_own_tools(apd.load(out / "facts_in_an_mlp", target.model, output=centred_logits), target)
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
