"""Do the components that matter for induction live in the heads that do induction?

A two-layer attention-only HookedTransformer learns random sequences that repeat with any period, so it has to look for
the token that came before. Two heads are trained, one in each layer; the six others stay random, as large as ever, and
write into the same residual stream. TransformerLens's head detector says which two they are. Then all heads of both
layers are decomposed together, with a mask for each position, and nothing tells which heads were trained.

    python examples/induction.py

A minute to train the target, eight on one core for each decomposition, of the target and of an untrained model. With
--all-tokens the target is trained on every next token, also those that cannot be known. Then not every seed learns the
circuit: of 0, 1 and 2 only 0 does.
"""

import argparse
import time
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pandas as pd
import torch
from jaxtyping import Bool, Float
from matplotlib import pyplot as plt
from torch import Tensor
from transformer_lens import HookedTransformer, head_detector

import apd_lens as apd
from apd_lens import compare, plots
from apd_lens.toys import Sequences, next_token_losses, sequences, train_induction

warnings.filterwarnings("ignore", message="HookedTransformer is deprecated")

N_LAYERS, N_HEADS = 2, 4


def detected_heads(model: HookedTransformer, n: int = 32) -> dict[str, Float[Tensor, "layer head"]]:
    """Scores of TransformerLens's detector, mean over sequences: how alike a head's attention and the pattern are."""
    tokens = sequences(n, seed=1).tokens
    cache = model.run_with_cache(tokens)[1]
    patterns = {
        "previous token": head_detector.get_previous_token_head_detection_pattern,
        "induction": head_detector.get_induction_head_detection_pattern,
    }

    def score(layer: int, head: int, pattern: Callable[[Tensor], Tensor]) -> float:
        return (
            sum(
                head_detector.compute_head_attention_similarity_score(
                    cache["pattern", layer][example, head],
                    pattern(tokens[example : example + 1]).float(),
                    exclude_bos=False,
                    exclude_current_token=False,
                    error_measure="abs",
                )
                for example in range(n)
            )
            / n
        )

    return {
        name: torch.tensor([[score(layer, head, pattern) for head in range(N_HEADS)] for layer in range(N_LAYERS)])
        for name, pattern in patterns.items()
    }


def centred(logits: Float[Tensor, "batch pos d_vocab"]) -> Float[Tensor, "batch pos d_vocab"]:
    return logits - logits.mean(-1, keepdim=True)


def decompose(model: HookedTransformer, steps: int, seed: int = 0) -> apd.Decomposition:
    """W_Q, W_K, W_V and W_O of all heads into 60 components of rank up to 4, about six active at a position."""
    return apd.decompose(
        model,
        lambda step: sequences(24, seed=step).tokens,
        weights=["blocks.*.attn.W_*"],
        n_components=60,
        rank=4,
        output=centred,
        selection=apd.BatchTopK(k=6, granularity="position"),
        optimization=apd.Optimization(steps=steps, lr=3e-3, scaled=False, init_scale=0.5, start="random"),
        moves=None,
        seed=seed,
    )


def known_loss_and_accuracy(
    model: HookedTransformer, batch: Sequences, zeroed: Bool[Tensor, "layer head"] | None = None
) -> tuple[float, float]:
    """Of next tokens that can be known, of the model as it is at the moment; with some heads' outputs set to zero."""

    def zero(z: Tensor, hook: object, heads: Bool[Tensor, " head"]) -> Tensor:
        return z.masked_fill(heads[:, None], 0)

    hooks = []
    for layer, heads in enumerate([] if zeroed is None else zeroed):
        hooks.append((f"blocks.{layer}.attn.hook_z", lambda z, hook, heads=heads: zero(z, hook, heads)))
    logits = model.run_with_hooks(batch.tokens, fwd_hooks=hooks)
    right = logits.argmax(-1) == batch.next
    losses = next_token_losses(logits, batch)
    return losses[batch.known].mean().item(), right[batch.known].float().mean().item()


def measure(decomposition: apd.Decomposition, batch: Sequences, circuit: Bool[Tensor, "layer head"]) -> pd.DataFrame:
    """Loss and accuracy where the next token can be known: of the target, of the sparse model, of parts of it."""
    model = decomposition.target.model
    mask = decomposition.select(batch.tokens)
    halves = mask | (torch.rand(mask.shape, generator=torch.Generator().manual_seed(0)) < 0.5)
    random = replace(decomposition, components=apd.components.random_components(decomposition.components))
    rows = {
        "target": known_loss_and_accuracy(model, batch),
        "    its two heads alone": known_loss_and_accuracy(model, batch, ~circuit),
        "    without these two": known_loss_and_accuracy(model, batch, circuit),
    }
    with decomposition.sparse(mask):
        rows["active components"] = known_loss_and_accuracy(model, batch)
        rows["    what of them lies in the two heads"] = known_loss_and_accuracy(model, batch, ~circuit)
        rows["    what lies in the six others"] = known_loss_and_accuracy(model, batch, circuit)
    with decomposition.sparse(halves):
        rows["    and a random half of the inactive"] = known_loss_and_accuracy(model, batch)
    with random.sparse(random.select(batch.tokens)):
        rows["random components, active ones"] = known_loss_and_accuracy(model, batch)
    return pd.DataFrame.from_dict(rows, orient="index", columns=["loss", "accuracy"])


def roles(decomposition: apd.Decomposition, batch: Sequences) -> pd.DataFrame:
    """One row a component that is ever active, the most active first: where it lies, what removing it does to the loss,
    and how far its positions have one token in common (as the present, the previous, or the next one)."""
    mask = decomposition.select(batch.tokens)
    often = mask.float().mean((0, 1))
    heads, matrices = compare.weight_map(decomposition), compare.weight_map(decomposition).table("matrix")
    shares, names = heads.shares("head"), heads.nodes("head")
    model = decomposition.target.model
    whole = next_token_losses(model(batch.tokens), batch)
    tokens = {"present": batch.tokens[:, 1:], "previous": batch.tokens[:, :-1], "next": batch.next[:, 1:]}
    rows = {}
    for component in often.argsort(descending=True).tolist():
        if often[component] < 0.005:
            break
        with decomposition.ablate(component):
            rise = next_token_losses(model(batch.tokens), batch) - whole
        on = mask[:, 1:, component]
        commonest = {name: of[on].bincount().max().item() / max(1, int(on.sum())) for name, of in tokens.items()}
        largest = matrices.iloc[component][decomposition.components.names].astype(float).nlargest(2)
        rows[component] = {
            "active": often[component].item(),
            "mostly in": " ".join(f"{name[len('blocks.') :].replace('attn.', '')}" for name in largest.index),
            "head": names[int(shares[component].argmax())],
            "share": shares[component].max().item(),
            "loss, known": rise[batch.known].mean().item(),
            "loss, others": rise[~batch.known].mean().item(),
            **{f"{name} token": share for name, share in commonest.items()},
        }
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("component")


def right_logit(batch: Sequences) -> Callable[[Float[Tensor, "batch pos d_vocab"]], Float[Tensor, " batch"]]:
    """Mean logit of the next token, where it can be known."""
    weights = batch.known.float() / batch.known.sum(1, keepdim=True)
    return lambda logits: (logits.gather(2, batch.next[..., None])[..., 0] * weights).sum(1)


def located(decomposition: apd.Decomposition, batch: Sequences, circuit: list[str]) -> compare.Location:
    """Where the components are that matter for the next token, where it can be known."""
    return compare.locate(decomposition, [batch.tokens], circuit, right_logit(batch))


def kept_curves(decomposition: apd.Decomposition, batch: Sequences) -> dict[str, compare.FaithfulnessCurve]:
    """How much of the right logit comes back with so many components on at each position; and so many heads."""
    metric = right_logit(batch)
    few = (0, 1, 2, 4, 6, 8, 12, 60)
    return {
        "component": compare.faithfulness_curve(
            decomposition, [batch.tokens], metric, scores=decomposition.attributions, sizes=few
        ),
        "head": compare.faithfulness_curve(decomposition, [batch.tokens], metric, unit="head"),
    }


def draw(
    decomposition: apd.Decomposition,
    often: list[int],
    curve: compare.FaithfulnessCurve,
    circuit: list[str],
    path: Path,
) -> None:
    """In which heads the active components lie, beside how many of them are needed."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(13, 4.5), layout="constrained", width_ratios=(3, 2))
    where = compare.weight_map(decomposition)
    plots.component_nodes(where.shares("head"), where.nodes("head"), known=circuit, order=often, ax=left)
    plots.faithfulness(curve.kept, curve.curves(), ax=right, unit=curve.unit)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=2000, help="training steps of a decomposition")
    parser.add_argument("--target-steps", type=int, default=1500)
    parser.add_argument("--all-tokens", action="store_true", help="train the target on every next token")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder for the decomposition and the figure")
    arguments = parser.parse_args()
    start = time.perf_counter()
    model = train_induction(steps=arguments.target_steps, all_tokens=arguments.all_tokens, seed=arguments.seed).model
    batch = sequences(64, seed=2)
    loss, accuracy = known_loss_and_accuracy(model, batch)
    print(f"target: {accuracy:.1%} right where the next token can be known, loss {loss:.3f}; ", end="")
    print(f"trained in {time.perf_counter() - start:.0f} s\n\nTransformerLens's head detector:")
    scores = detected_heads(model)
    circuit = torch.zeros(N_LAYERS, N_HEADS, dtype=torch.bool)
    for name, of_heads in scores.items():
        layer, head = divmod(int(of_heads.argmax()), N_HEADS)
        circuit[layer, head] = True
        print(f"  {name:14}  a{layer}.{head}   scores", *(f"{score:.2f}" for score in of_heads.flatten().tolist()))
    nodes = [f"a{layer}.{head}" for layer, head in circuit.nonzero().tolist()]

    start = time.perf_counter()
    decomposition = decompose(model, arguments.steps, arguments.seed)
    print(f"\ndecomposed in {time.perf_counter() - start:.0f} s, residual {decomposition.residuals()['all']:.3f}\n")
    decomposition.save(arguments.out / "induction")
    print(located(decomposition, batch, nodes))
    print(f"\n{measure(decomposition, batch, circuit).round(3)}")
    of_each = roles(decomposition, batch)
    print(f"\n{of_each.round(2).to_string()}")
    curves = kept_curves(decomposition, sequences(16, seed=3))
    for unit, curve in curves.items():
        print(f"\nshare of the right logit that comes back with so many {unit}s\n{curve}")
    draw(decomposition, of_each.index.tolist(), curves["component"], nodes, arguments.out / "induction.png")

    null = decompose(train_induction(steps=0, seed=arguments.seed).model, arguments.steps, arguments.seed)
    print("\nThe same of an untrained model, whose heads do nothing in particular:\n")
    print(located(null, batch, nodes).nulls().round(3))
    print(f"\nwrote {arguments.out / 'induction'} and {arguments.out / 'induction.png'}")


if __name__ == "__main__":
    main()
