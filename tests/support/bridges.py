"""TransformerBridges of several architectures."""

import torch
from torch import nn
from transformer_lens.model_bridge import TransformerBridge
from transformer_lens.model_bridge.sources._bridge_builder import build_bridge_from_module
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    GPT2Config,
    GPTNeoXConfig,
    GraniteConfig,
    LlamaConfig,
    MixtralConfig,
    OPTConfig,
    Phi3Config,
    PretrainedConfig,
    Qwen2Config,
)

D_VOCAB = 12


def config_of(architecture: str, **changes) -> PretrainedConfig:
    llama_like = {
        "hidden_size": 8,
        "intermediate_size": 10,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 4,
        "max_position_embeddings": 16,
    }
    neox = {key: llama_like[key] for key in llama_like if key not in ("num_key_value_heads", "head_dim")}
    granite = {key: llama_like[key] for key in llama_like if key != "head_dim"}
    dropout = {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0}
    cls, options = {
        "gpt2": (GPT2Config, {"n_embd": 8, "n_head": 2, "n_layer": 1, "n_inner": 10, "n_positions": 16, **dropout}),
        "llama": (LlamaConfig, llama_like),
        "neox": (GPTNeoXConfig, neox | {"num_attention_heads": 2, "rotary_pct": 1.0}),
        "gemma2": (Gemma2Config, llama_like | {"sliding_window": 3, "query_pre_attn_scalar": 4}),
        "qwen2": (Qwen2Config, llama_like),
        "granite": (GraniteConfig, granite | {"residual_multiplier": 0.5, "embedding_multiplier": 2.0}),
        "phi3": (Phi3Config, llama_like | {"original_max_position_embeddings": 16}),
        "mixtral": (MixtralConfig, llama_like | {"intermediate_size": 12, "num_local_experts": 2}),
        "opt": (OPTConfig, {"hidden_size": 8, "ffn_dim": 10, "num_hidden_layers": 1, "num_attention_heads": 2}),
    }[architecture]
    common = {"vocab_size": D_VOCAB, "tie_word_embeddings": False, "bos_token_id": 0, "eos_token_id": 1}
    return cls(**common | {"pad_token_id": None} | options | changes)


def hugging_face_model(architecture: str, **changes) -> nn.Module:
    model = AutoModelForCausalLM.from_config(config_of(architecture, **changes), attn_implementation="eager").eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.4, generator=generator)
            else:  # biases are 0 and norms 1 (or 0) at first, which would hide a forgotten one
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


def bridge_of(model: nn.Module, processing: str = "raw") -> TransformerBridge:
    """The model becomes part of the bridge."""
    bridge = build_bridge_from_module(model, type(model).__name__, hf_config=model.config, tokenizer=None)
    if processing != "raw":
        bridge.enable_compatibility_mode(disable_warnings=True, no_processing=processing == "unprocessed")
    return bridge


def bridge(architecture: str, processing: str = "raw", **changes) -> TransformerBridge:
    return bridge_of(hugging_face_model(architecture, **changes), processing)


def forget_patterns(model: TransformerBridge) -> None:
    """Some attentions keep the pattern of their last forward, with its graph; no such bridge can be copied."""
    for block in model.blocks:
        vars(block.attn)["_pattern"] = None
