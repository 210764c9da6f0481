"""40 bigrams in 12 dimensions: components that span both ends of a network.

A HookedTransformer without layers is trained to follow each of 40 tokens by another: logits = W_E[token] @ W_U + b_U.
With more facts than dimensions, embeddings overlap. W_E and W_U are decomposed together, with KL as the distance.

    python examples/facts/bigrams.py              # seed 0, with a table
    python examples/facts/bigrams.py --seeds 5    # only the measures, for seeds 0 to 4
"""

import argparse
import time
import warnings

import torch
import torch.nn.functional as F
from evidence import measure, print_components, print_measures
from torch import Tensor
from transformer_lens import HookedTransformer, HookedTransformerConfig

import apd_lens as apd
from apd_lens import toys

warnings.filterwarnings("ignore", message="HookedTransformer is deprecated")

N_TOKENS, D_MODEL = 40, 12


def train_target(seed: int) -> toys.FactsTarget:
    """A model that knows which token follows which; a prompt is one token."""
    torch.manual_seed(seed)
    prompts, answers = torch.arange(N_TOKENS)[:, None], torch.randperm(N_TOKENS)
    cfg = HookedTransformerConfig(
        n_layers=0,
        d_model=D_MODEL,
        n_ctx=1,
        d_head=D_MODEL,
        d_vocab=N_TOKENS,
        attn_only=True,
        normalization_type=None,
        seed=seed,
        device="cpu",
    )
    model = HookedTransformer(cfg).requires_grad_(False)
    model.W_pos.zero_()
    trained = [model.W_E.normal_(std=0.3).requires_grad_(), model.W_U.normal_(std=0.3).requires_grad_()]
    optimizer = torch.optim.AdamW(trained, lr=1e-2, weight_decay=0.1)
    for _ in range(3000):
        loss = F.cross_entropy(model(prompts)[:, -1], answers)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return toys.FactsTarget(model.requires_grad_(False), prompts, answers)


def decompose(model: HookedTransformer, prompts: Tensor, steps: int, seed: int) -> apd.Decomposition:
    """W_E and W_U into 60 components of rank up to 4, one active a prompt."""
    return apd.decompose(
        model,
        [prompts],  # all of them in every step
        weights=["embed.W_E", "unembed.W_U"],
        n_components=60,
        rank=4,
        output=lambda logits: logits[:, -1],
        selection=apd.TopK(k=1),
        losses=apd.Losses(
            faithfulness=30,
            minimality=1,
            simplicity=apd.HoldThenDecay(1.67, hold=0.6, zero=0.8),
            schatten_p=0.9,
            simplicity_floor=0,
            path=2,
            distance="kl",
            normalization="relative",
        ),
        moves=apd.moves.SplitMoves(every=100, until=0.6),
        optimization=apd.Optimization(steps=steps, lr=3e-3, scaled=False, init_scale=1, start="random"),
        seed=seed,
    )


def n_same_at_both_ends(decomposition: apd.Decomposition, target: toys.FactsTarget) -> int:
    """Bigrams whose row of W_E and whose column of W_U are most alike (by cosine) to those of the same component."""
    components, weights = decomposition.components, decomposition.target.weights
    rows = F.cosine_similarity(components.component_weights("embed.W_E"), weights["embed.W_E"].value(), dim=2)
    columns = F.cosine_similarity(components.component_weights("unembed.W_U"), weights["unembed.W_U"].value(), dim=1)
    return int((rows.argmax(0) == columns.argmax(0)[target.answers]).sum())


def main(seed: int, steps: int, show_components: bool) -> dict[str, float]:
    """The measures of one seed, and the table."""
    start = time.perf_counter()
    target = train_target(seed)
    print(f"seed {seed}: {target.accuracy():.1%} of {N_TOKENS} bigrams known, in {D_MODEL} dimensions")
    decomposition = decompose(target.model, target.prompts, steps, seed)
    measures, found, twin = measure(decomposition, target, seed)
    measures["same component at both ends"] = n_same_at_both_ends(decomposition, target)
    measures["seconds, training of the target included"] = time.perf_counter() - start
    if show_components:
        facts = [f"{token} → {following}" for token, following in enumerate(target.answers.tolist())]
        print_components(decomposition, found, twin, facts)
        print_measures([measures])
    return measures


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, help="run seeds 0 to SEEDS-1 and print mean and spread of the measures")
    parser.add_argument("--steps", type=int, default=6000, help="training steps of the decomposition")
    arguments = parser.parse_args()
    if arguments.seeds is None:
        main(0, arguments.steps, show_components=True)
    else:
        print_measures([main(seed, arguments.steps, show_components=False) for seed in range(arguments.seeds)])
