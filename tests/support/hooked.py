"""HookedTransformers of many forms."""

import warnings

import torch
from support.toy_models import substituted
from torch import Tensor
from torch.testing import assert_close
from transformer_lens import HookedTransformer, HookedTransformerConfig

import apd_lens as apd

MIXTURE = {"num_experts": 3, "experts_per_token": 2, "act_fn": "silu", "normalization_type": "RMS"}


def hooked_transformer(cls: type[HookedTransformer] = HookedTransformer, **changes) -> HookedTransformer:
    options = {
        "n_layers": 1,
        "d_model": 8,
        "n_ctx": 6,
        "d_head": 4,
        "n_heads": 2,
        "d_mlp": 10,
        "d_vocab": 12,
        "act_fn": "gelu",
        "normalization_type": "LN",
        "init_weights": True,
        "initializer_range": 0.5,
        "seed": 0,
        "device": "cpu",
    }
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "HookedTransformer is deprecated", DeprecationWarning)
        model = cls(HookedTransformerConfig(**{**options, **changes})).eval()
    with torch.no_grad():  # biases are 0 at first, which would hide a forgotten one
        for name, parameter in model.named_parameters():
            if name.rpartition(".")[2].startswith(("b_", "_b_", "bias")):
                parameter.normal_(std=0.1, generator=torch.Generator().manual_seed(0))
    return model


def tokens(n_examples: int, length: int = 4) -> Tensor:
    return torch.randint(12, (n_examples, length), generator=torch.Generator().manual_seed(1))


def check_effects(decomposition: apd.Decomposition, run, batch) -> None:
    """Signed attributions to a random projection of the output are finite differences of `run` in float64."""
    target, components, step = decomposition.target, decomposition.components, 1e-5
    projection = torch.randn(run()[0].shape, dtype=torch.float64)

    def project(output: Tensor) -> Tensor:
        return (output * projection).flatten(1).sum(1)

    effects = []
    for component in range(components.n_components):
        ends = []
        for sign in (1, -1):
            moved = {
                name: target.weights[name].value().clone() + sign * step * components.component_weights(name)[component]
                for name in components.names
            }
            with substituted(target, moved):
                ends.append(project(run()).detach())
        effects.append((ends[0] - ends[1]) / (2 * step))
    assert_close(decomposition.attributions(batch, metric=project), torch.stack(effects, 1), rtol=1e-5, atol=1e-7)
