"""A small language model that stores facts in its MLP, and nowhere else."""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from apd_lens._errors import MissingExtra
from apd_lens._schedules import HoldThenDecay
from apd_lens._settings import Optimization
from apd_lens.losses._losses import Losses
from apd_lens.masks._selection import TopK
from apd_lens.moves._split import SplitMoves


@dataclass(frozen=True, eq=False)
class FactsTarget:
    """A model that stores facts.

    Attributes:
        model: a HookedTransformer, frozen.
        prompts: one for each fact.
        answers: the token that is right behind the last position.
    """

    model: Any
    prompts: Int[Tensor, "fact pos"]
    answers: Int[Tensor, " fact"]

    def is_right(self) -> Bool[Tensor, " fact"]:
        """Which prompts the model answers rightly as it is at the moment."""
        return self.model(self.prompts)[:, -1].argmax(-1) == self.answers

    def accuracy(self) -> float:
        """Share of prompts that the model answers rightly as it is at the moment."""
        return self.is_right().float().mean().item()


def train_facts(
    n_subjects: int = 64,
    n_objects: int = 32,
    *,
    d_model: int = 256,
    n_neurons: int = 48,
    steps: int = 3000,
    seed: int = 0,
) -> FactsTarget:
    """Trains the MLP of a one-layer HookedTransformer to answer prompts (relation, subject) with a random object for
    each subject. All else in it is random and frozen, and its attention gives zero, so the MLP alone holds the facts.

    Tokens are the subjects, the relation, and the objects.

    Raises:
        MissingExtra: TransformerLens is not installed.
    """
    try:
        from transformer_lens import HookedTransformer, HookedTransformerConfig
    except ImportError:
        raise MissingExtra(
            "Facts need TransformerLens. Install it with pip install 'apd-lens[transformer-lens]'"
        ) from None
    config = HookedTransformerConfig(
        n_layers=1,
        d_model=d_model,
        n_ctx=2,
        d_head=16,
        n_heads=2,
        d_mlp=n_neurons,
        d_vocab=n_subjects + 1 + n_objects,
        act_fn="relu",
        normalization_type="LN",
        device="cpu",
    )
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        prompts = torch.tensor([[n_subjects, subject] for subject in range(n_subjects)])
        answers = n_subjects + 1 + torch.randint(0, n_objects, (n_subjects,))
        torch.manual_seed(seed)
        model = HookedTransformer(config)
        model.W_E.normal_()
        model.W_U.normal_(std=d_model**-0.5)
        model.blocks[0].attn.W_O.zero_()
    mlp = model.requires_grad_(False).blocks[0].mlp.requires_grad_(True)
    optimizer = torch.optim.AdamW(mlp.parameters(), lr=3e-3, weight_decay=0.05)
    for _ in range(steps):
        loss = F.cross_entropy(model(prompts)[:, -1], answers)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return FactsTarget(model.requires_grad_(False), prompts, answers)


def centred_logits(logits: Float[Tensor, "batch pos vocabulary"]) -> Float[Tensor, "batch vocabulary"]:
    """The last position's logits less their mean, which softmax does not see. Unlike log-probabilities, which hardly
    move in a confident model, they have gradients."""
    last = logits[:, -1]
    return last - last.mean(-1, keepdim=True)


def facts_settings(steps: int = 4000) -> dict[str, Any]:
    """Settings that give each of the 64 facts a component of its own, as keyword arguments:
    `decompose(target.model, [target.prompts], **facts_settings())`."""
    return {
        "weights": ["blocks.*.mlp.*"],
        "n_components": 100,
        "rank": 4,
        "output": centred_logits,
        "selection": TopK(k=1),
        "losses": Losses(
            faithfulness=30,
            minimality=1,
            simplicity=HoldThenDecay(0.06, hold=0.6, zero=0.8),
            schatten_p=0.9,
            simplicity_floor=0,
            path=2,
            normalization="relative",
        ),
        "moves": SplitMoves(every=100, until=0.6),
        "optimization": Optimization(steps=steps, lr=3e-3, scaled=False, init_scale=1, start="random"),
    }
