"""Models of every kind that attributions must be right on."""

import warnings
from collections.abc import Callable
from typing import Any

import nnsight
import torch
from support.toy_models import TMS, Mixing, ResidualMLP, TinyGPT, decomposition_of, tiny_gpt2
from torch import Tensor, nn
from transformer_lens import HookedTransformer, HookedTransformerConfig

import apd_lens as apd


def hooked_transformer() -> HookedTransformer:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="HookedTransformer is deprecated")
        cfg = HookedTransformerConfig(
            n_layers=2, d_model=8, n_ctx=6, d_head=4, d_mlp=10, d_vocab=11, act_fn="gelu", seed=0, device="cpu"
        )
        return HookedTransformer(cfg)


def with_split_qkv() -> HookedTransformer:
    model = hooked_transformer()
    model.set_use_split_qkv_input(True)
    return model


class SmallConvolution(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Conv2d(2, 3, 2, padding=1), nn.Tanh(), nn.Conv2d(3, 2, 1))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).movedim(1, -1)


def padded_tokens(on_the_left: bool = False) -> dict[str, Tensor]:
    """Examples of 3, 5 and 4 tokens."""
    valid = torch.arange(5) < torch.tensor([3, 5, 4])[:, None]
    valid = valid.flip(1) if on_the_left else valid
    return {"input_ids": torch.randint(1, 11, (3, 5)), "attention_mask": valid.long()}


def hooked_batch() -> dict[str, Tensor]:
    batch = padded_tokens(on_the_left=True)
    return {"input": batch["input_ids"], "attention_mask": batch["attention_mask"]}


# Model, batch, weights; each a use of its own kind.
HOSTS: dict[str, tuple[Callable[[], Any], Callable[[], Any], str | list[str]]] = {
    "one matrix": (lambda: nn.Linear(5, 3), lambda: torch.randn(4, 5), "*"),
    "tied, one transposed": (lambda: TMS(7, 3), lambda: torch.rand(4, 7), "*"),
    "layers": (lambda: ResidualMLP(5, 6, 4, 2), lambda: (torch.randn(4, 5),), "layers.*"),
    "positions": (Mixing, lambda: torch.randn(3, 4, 3), "*"),
    "as many examples as positions": (Mixing, lambda: {"x": torch.randn(4, 4, 3)}, "*"),
    "tokens, positions that examples share": (TinyGPT, lambda: torch.randint(11, (3, 4)), "*"),
    "one example": (TinyGPT, lambda: torch.randint(11, (1, 4)), "*"),
    "pixels": (SmallConvolution, lambda: torch.randn(3, 2, 3, 4), "*"),
    "padding": (tiny_gpt2, padded_tokens, "*"),
    "HookedTransformer": (hooked_transformer, lambda: torch.randint(11, (3, 4)), "*"),
    "HookedTransformer, padding on the left": (hooked_transformer, hooked_batch, "*"),
    "HookedTransformer, split": (with_split_qkv, lambda: torch.randint(11, (3, 4)), "blocks.*.attn.*"),
    "nnsight": (lambda: nnsight.NNsight(TinyGPT()), lambda: torch.randint(11, (3, 4)), "*"),
}


def host(name: str, granularity: Any = "example", **options: Any) -> tuple[apd.Decomposition, Any]:
    """Random components of a model with random weights, and a batch."""
    make_model, make_batch, weights = HOSTS[name]
    model, batch = make_model(), make_batch()
    module = apd.wrap(model).model
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return decomposition_of(model, weights, selection=apd.TopK(1, granularity), n_components=3, **options), batch
