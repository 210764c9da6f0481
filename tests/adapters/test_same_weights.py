"""The same weights in every host: Hugging Face, nnsight, TransformerBridge and HookedTransformer give one answer.

Components are made once and go to each host under its own names; outputs, attributions and masks must agree.
"""

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from nnsight import NNsight
from support.toy_models import decomposition_of, tiny_gpt2, tiny_llama
from torch import Tensor, nn
from torch.testing import assert_close
from transformer_lens import HookedTransformer, HookedTransformerConfig
from transformer_lens.model_bridge.sources._bridge_builder import build_bridge_from_module
from transformer_lens.pretrained.weight_conversions import convert_gpt2_weights, convert_llama_weights

import apd_lens as apd

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:transformer_lens")
SAME = {"rtol": 1e-5, "atol": 1e-5}
TOKENS = torch.randint(13, (3, 5), generator=torch.Generator().manual_seed(1))

# The names that Hugging Face has, and those of TransformerLens.
GPT2 = {
    "transformer.h.0.attn.c_proj.weight": "blocks.0.attn.W_O",
    "transformer.h.0.mlp.c_fc.weight": "blocks.0.mlp.W_in",
    "transformer.h.1.mlp.c_proj.weight": "blocks.1.mlp.W_out",
}
LLAMA = {
    "model.embed_tokens.weight": "embed.W_E",
    "model.layers.0.self_attn.q_proj.weight": "blocks.0.attn.W_Q",
    "model.layers.0.self_attn.k_proj.weight": "blocks.0.attn.W_K",
    "model.layers.1.self_attn.v_proj.weight": "blocks.1.attn.W_V",
    "model.layers.0.self_attn.o_proj.weight": "blocks.0.attn.W_O",
    "model.layers.1.mlp.gate_proj.weight": "blocks.1.mlp.W_gate",
    "model.layers.1.mlp.up_proj.weight": "blocks.1.mlp.W_in",
    "model.layers.1.mlp.down_proj.weight": "blocks.1.mlp.W_out",
    "lm_head.weight": "unembed.W_U",
}
SIZES = {"n_layers": 2, "d_model": 8, "n_ctx": 12, "d_head": 4, "n_heads": 2, "d_vocab": 13, "device": "cpu"}


def hooked_gpt2(model: nn.Module) -> HookedTransformer:
    config = HookedTransformerConfig(
        **SIZES, d_mlp=32, act_fn="gelu_new", normalization_type="LN", original_architecture="GPT2LMHeadModel"
    )
    return loaded(config, convert_gpt2_weights(model, config))


def hooked_llama(model: nn.Module) -> HookedTransformer:
    config = HookedTransformerConfig(
        **SIZES,
        d_mlp=12,
        act_fn="silu",
        normalization_type="RMS",
        eps=model.config.rms_norm_eps,
        gated_mlp=True,
        n_key_value_heads=1,
        positional_embedding_type="rotary",
        rotary_dim=4,
        rotary_adjacent_pairs=False,
        final_rms=True,
        original_architecture="LlamaForCausalLM",
    )
    return loaded(config, convert_llama_weights(model, config))


def loaded(config: HookedTransformerConfig, state: dict[str, Tensor]) -> HookedTransformer:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = HookedTransformer(config)
        model.load_and_process_state_dict(
            state, fold_ln=False, center_writing_weights=False, center_unembed=False, fold_value_biases=False
        )
    return model.eval()


def bridged(model: nn.Module) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return build_bridge_from_module(model, type(model).__name__, hf_config=model.config, tokenizer=None).eval()


MODELS: dict[str, tuple[Callable, Callable, dict[str, str]]] = {
    "gpt2": (tiny_gpt2, hooked_gpt2, GPT2),
    "llama": (tiny_llama, hooked_llama, LLAMA),
}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("granularity", ["example", "position"])
def test_one_answer(name: str, granularity):
    torch.manual_seed(0)
    make, hooked, names = MODELS[name]
    model = make()
    hosts = {
        "nnsight": (NNsight(copy.deepcopy(model)), None),
        "HookedTransformer": (hooked(model), names),
        "TransformerBridge": (bridged(copy.deepcopy(model)), names),
    }
    # Untied, since a HookedTransformer's W_E and W_U are two matrices.
    selection = apd.BatchTopK(2, granularity=granularity)
    expected = decomposition_of(model, list(names), selection=selection)
    attributions, mask = expected.attributions(TOKENS), expected.select(TOKENS)
    with expected.sparse(mask):
        sparse = model(TOKENS).logits
    for host, (other, renamed) in hosts.items():
        target = apd.wrap(other)
        there = renamed or {name: name for name in names}
        for old, new in there.items():
            assert_close(target.weights[new].value(), expected.target.weights[old].value(), **SAME, msg=f"{host} {new}")
        components = apd.ParameterComponents(
            {there[old]: factor.detach() for old, factor in expected.components.A.items()},
            {there[old]: factor.detach() for old, factor in expected.components.B.items()},
        )
        came = apd.Decomposition(target, components, expected.settings, expected.output, {})
        assert_close(came.attributions(TOKENS), attributions, **SAME, msg=lambda text, host=host: f"{host}: {text}")
        assert torch.equal(came.select(TOKENS), mask), host
        with came.sparse(mask):
            logits = expected.output(target.model(TOKENS))
        assert_close(logits, sparse, **SAME, msg=lambda text, host=host: f"{host}: {text}")
