"""A two-layer transformer that has to look for the token that came before, with one head of each layer."""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from apd_lens._errors import MissingExtra

N_TOKENS, N_CTX, N_LAYERS, N_HEADS = 24, 24, 2, 4
TRAINED = (1, 2)  # the head of each layer


@dataclass(frozen=True, eq=False)
class Sequences:
    """Random sequences that repeat from place `period` on, behind a token that begins them.

    Attributes:
        tokens: what the model reads.
        next: what comes after each.
        known: where the next token can be known, since the present one came before.
    """

    tokens: Int[Tensor, "batch pos"]
    next: Int[Tensor, "batch pos"]
    known: Bool[Tensor, "batch pos"]


def sequences(n: int, seed: int) -> Sequences:
    """n sequences of 24 tokens, each with a period of 6 to 12."""
    generator = torch.Generator().manual_seed(seed)
    period = torch.randint(6, 13, (n, 1), generator=generator)
    places = torch.arange(N_CTX)[None]
    repeating = torch.randint(N_TOKENS, (n, N_CTX), generator=generator).gather(1, places % period)
    start = torch.full((n, 1), N_TOKENS)
    return Sequences(torch.cat([start, repeating[:, :-1]], 1), repeating, places > period)


def next_token_losses(logits: Float[Tensor, "batch pos d_vocab"], batch: Sequences) -> Float[Tensor, "batch pos"]:
    """Cross-entropy of each next token."""
    return F.cross_entropy(logits.mT, batch.next, reduction="none")


@dataclass(frozen=True, eq=False)
class InductionTarget:
    """A transformer that does induction.

    Attributes:
        model: an attention-only HookedTransformer, frozen.
        weights: the matrices to decompose, those of all heads.
        heads: the head of each layer that was trained; the six others stay random, as large as ever.
        loss: cross-entropy on fresh sequences, where the next token can be known.
    """

    model: Any
    weights: list[str]
    heads: list[str]
    loss: float

    def is_right(self, batch: Sequences) -> Bool[Tensor, " known"]:
        """Which next tokens, of those that can be known, the model as it is at the moment says."""
        return (self.model(batch.tokens).argmax(-1) == batch.next)[batch.known]


def train_induction(*, steps: int = 1500, all_tokens: bool = False, seed: int = 0) -> InductionTarget:
    """Trains one head of each layer, and all that is not a head, to tell the next token where it can be known.

    Adam, learning rate 3e-3 with a warm-up, falling to 0. The other heads stay as they were, to the bit.

    Args:
        all_tokens: train on every next token. Half of them cannot be known, and what they ask for is noise. Under it
            two of three seeds do not find the circuit.

    Raises:
        MissingExtra: TransformerLens is not installed.
    """
    model = _untrained(seed).requires_grad_(True)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1, (step + 1) / 100) * max(0.01, 1 - step / max(1, steps))
    )
    for step in range(steps):
        batch = sequences(64, seed=10**6 * (seed + 1) + step)
        losses = next_token_losses(model(batch.tokens), batch)
        optimizer.zero_grad()
        (losses if all_tokens else losses[batch.known]).mean().backward()
        for block, head in zip(model.blocks, TRAINED, strict=True):
            others = torch.arange(N_HEADS) != head
            for parameter in block.attn.parameters():
                if len(parameter) == N_HEADS:
                    parameter.grad[others] = 0  # Adam then leaves them where they are
        optimizer.step()
        schedule.step()
    model.requires_grad_(False)
    batch = sequences(256, seed=10**6 * (seed + 1) - 1)
    loss = next_token_losses(model(batch.tokens), batch)[batch.known].mean().item()
    heads = [f"a{layer}.{head}" for layer, head in enumerate(TRAINED)]
    return InductionTarget(model, ["blocks.*.attn.W_*"], heads, loss)


def _untrained(seed: int) -> Any:
    try:
        from transformer_lens import HookedTransformer, HookedTransformerConfig
    except ImportError:
        raise MissingExtra(
            "Induction needs TransformerLens. Install it with pip install 'apd-lens[transformer-lens]'"
        ) from None
    cfg = HookedTransformerConfig(
        n_layers=N_LAYERS,
        d_model=64,
        n_ctx=N_CTX,
        d_head=32,
        n_heads=N_HEADS,
        d_vocab=N_TOKENS + 1,
        attn_only=True,
        normalization_type=None,
        positional_embedding_type="shortformer",  # queries and keys see positions, values do not
        seed=seed,
        device="cpu",
    )
    return HookedTransformer(cfg).requires_grad_(False)
