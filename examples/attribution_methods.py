"""Which attributions rank components as removing them does? Unsaturated and saturated attention, compared.

A HookedTransformer with one layer learns to look things up: each token of a prompt is a key with a value, the last
token asks for one key, and the answer is its value. The components are the singular parts of each head's W_Q, W_K, W_V
and W_O, which sum to the weights exactly. Then W_Q is scaled up, until softmax gives all its weight to one position and
has almost no gradient left.

For each data point the components are ranked by every method, and by what removing each of them does to the logits
(AblationAttribution); printed is the Spearman rank correlation of the two, the mean over data points, 1 being the same
order. The last row is the null: each component with the gradient attribution of another.

Measured for the components of W_Q and W_K, seeds 0 to 2: gradients and integrated gradients are as good with the
weights as trained (0.99), gradients fall to 0.13-0.26 with W_Q × 64, integrated gradients to 0.54-0.61. Half a minute.

    python examples/attribution_methods.py
"""

import argparse
import time
import warnings
from dataclasses import replace

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float, Int
from scipy.stats import rankdata
from torch import Tensor
from transformer_lens import HookedTransformer, HookedTransformerConfig

import apd_lens as apd

warnings.filterwarnings("ignore", message="HookedTransformer is deprecated")

N_KEYS, N_VALUES, N_PAIRS = 10, 6, 6
N_HEADS, D_HEAD = 4, 8
MATRICES = [f"blocks.0.attn.W_{letter}" for letter in "QKVO"]
SCALES = (0.5, 1.0, 4.0, 16.0, 64.0)

Method = apd.GradientAttribution | apd.IntegratedGradients | apd.ActivationAttribution | apd.AblationAttribution
METHODS: dict[str, Method] = {
    "gradient": apd.GradientAttribution("exact"),
    "integrated gradients, 8 points": apd.IntegratedGradients(8, projections="exact"),
    "integrated gradients, 32 points": apd.IntegratedGradients(32, projections="exact"),
    "activation norms": apd.ActivationAttribution(),
}


def prompts(n: int, generator: torch.Generator) -> tuple[Int[Tensor, "n pos"], Int[Tensor, " n"]]:
    """Tokens key · N_VALUES + value with different keys, and last the token that asks for one of the keys; answers."""
    keys = torch.rand(n, N_KEYS, generator=generator).argsort(1)[:, :N_PAIRS]
    values = torch.randint(N_VALUES, (n, N_PAIRS), generator=generator)
    asked = torch.randint(N_PAIRS, (n, 1), generator=generator)
    question = N_KEYS * N_VALUES + keys.gather(1, asked)
    return torch.cat([keys * N_VALUES + values, question], 1), values.gather(1, asked)[:, 0]


def train_target(steps: int, seed: int) -> HookedTransformer:
    """A model with attention only that answers at the last position."""
    generator = torch.Generator().manual_seed(seed)
    cfg = HookedTransformerConfig(
        n_layers=1,
        d_model=32,
        n_ctx=N_PAIRS + 1,
        d_head=D_HEAD,
        n_heads=N_HEADS,
        d_vocab=N_KEYS * (N_VALUES + 1),
        d_vocab_out=N_VALUES,
        attn_only=True,
        normalization_type=None,
        seed=seed,
        device="cpu",
    )
    model = HookedTransformer(cfg)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.1)
    for _ in range(steps):
        tokens, answers = prompts(256, generator)
        loss = F.cross_entropy(model(tokens)[:, -1], answers)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.requires_grad_(False).eval()


def centred_logits(logits: Float[Tensor, "batch pos values"]) -> Float[Tensor, "batch values"]:
    """At the last position, without what softmax does not see."""
    return logits[:, -1] - logits[:, -1].mean(-1, keepdim=True)


def singular_parts(target: apd.TargetModel) -> apd.ParameterComponents:
    """One component for each head, matrix and singular value: σ u vᵀ in that matrix, zero in all others."""
    n_components = len(MATRICES) * N_HEADS * D_HEAD
    A, B = {}, {}
    for index, name in enumerate(MATRICES):
        weight = target.weights[name].value()
        writes = name.endswith("W_O")  # whose heads are rows, those of the others columns
        by_head = rearrange(
            weight.mT if writes else weight, "d_model (head d_head) -> head d_model d_head", head=N_HEADS
        )
        U, S, Vh = torch.linalg.svd(by_head, full_matrices=False)
        in_d_model = torch.zeros(n_components, weight.shape[1 if writes else 0])
        in_heads = torch.zeros(n_components, N_HEADS, D_HEAD)
        for head in range(N_HEADS):
            first = (index * N_HEADS + head) * D_HEAD
            in_d_model[first : first + D_HEAD] = (U[head] * S[head]).mT
            in_heads[first : first + D_HEAD, head] = Vh[head]
        factors = (in_d_model[:, :, None], in_heads.flatten(1)[:, None])
        A[name], B[name] = (factors[1].mT, factors[0].mT) if writes else factors
    return apd.ParameterComponents(A, B).requires_grad_(False)


def rank_correlation(some: Float[Tensor, "batch C"], others: Float[Tensor, "batch C"]) -> float:
    """Spearman's, of the components of each data point; the mean over data points."""
    ranks = [torch.from_numpy(rankdata(values.numpy(), axis=1)) for values in (some, others)]
    ranks = [F.normalize(rank - rank.mean(1, keepdim=True), dim=1) for rank in ranks]
    return (ranks[0] * ranks[1]).sum(1).mean().item()


def largest_attention(model: HookedTransformer, tokens: Int[Tensor, "n pos"]) -> float:
    """Mean over heads and data points of the largest weight that the last position gives."""
    _, cache = model.run_with_cache(tokens)
    return cache["blocks.0.attn.hook_pattern"][:, :, -1].amax(-1).mean().item()


def compare(model: HookedTransformer, tokens: Tensor, answers: Tensor) -> tuple[dict[str, tuple[float, ...]], str]:
    """Method -> correlation with ablation over all components, over those of W_Q and W_K, and seconds; a heading."""
    start = apd.init(model, weights=MATRICES, n_components=1, output=centred_logits).decomposition()
    decomposition = replace(start, components=singular_parts(start.target))
    assert decomposition.residuals()["all"] < 1e-5
    n_reading = decomposition.components.n_components // 2  # W_Q and W_K come first

    def attributions(method: Method) -> tuple[Tensor, float]:
        began = time.perf_counter()
        some = replace(decomposition, settings=replace(decomposition.settings, attribution=method))
        return some.attributions(tokens), time.perf_counter() - began

    true, seconds = attributions(apd.AblationAttribution())
    found = {name: attributions(method) for name, method in METHODS.items()}
    shuffled = torch.rand(true.shape, generator=torch.Generator().manual_seed(0)).argsort(1)
    found["null: gradient, shuffled"] = (found["gradient"][0].gather(1, shuffled), 0.0)
    rows = {
        name: (rank_correlation(came, true), rank_correlation(came[:, :n_reading], true[:, :n_reading]), took)
        for name, (came, took) in found.items()
    }
    accuracy = (centred_logits(model(tokens)).argmax(-1) == answers).float().mean().item()
    heading = (
        f"largest attention {largest_attention(model, tokens):.3f}, {accuracy:.0%} right, "
        f"true ablation took {seconds:.1f} s, mean effect of W_Q and W_K {true[:, :n_reading].mean():.4f}, "
        f"of W_V and W_O {true[:, n_reading:].mean():.4f}"
    )
    return rows, heading


def main(steps: int, n_prompts: int, seed: int) -> None:
    start = time.perf_counter()
    model = train_target(steps, seed)
    tokens, answers = prompts(n_prompts, torch.Generator().manual_seed(1))
    attn = model.blocks[0].attn
    trained = attn.W_Q.clone()
    for scale in SCALES:
        attn.W_Q.copy_(scale * trained)
        rows, heading = compare(model, tokens, answers)
        print(f"\nW_Q × {scale:g}: {heading}")
        print(f"{'rank correlation with ablation':34}{'all':>8}{'W_Q, W_K':>12}{'seconds':>10}")
        for name, (everywhere, reading, seconds) in rows.items():
            print(f"{name:34}{everywhere:8.3f}{reading:12.3f}{seconds:10.2f}")
    print(f"\n{time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=1000, help="training steps of the model")
    parser.add_argument("--prompts", type=int, default=64, help="number of data points")
    parser.add_argument("--seed", type=int, default=0, help="of the model and its training")
    arguments = parser.parse_args()
    main(arguments.steps, arguments.prompts, arguments.seed)
