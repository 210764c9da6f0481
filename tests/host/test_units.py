"""Heads and neurons of Hugging Face models, as their config and the shapes say."""

import pytest
import torch
from support.bridges import hugging_face_model
from support.toy_models import tiny_gpt2, tiny_llama
from torch import nn

import apd_lens as apd
from apd_lens.host import Units


def units(model: nn.Module) -> dict[str, Units | None]:
    return {name: matrix.units for name, matrix in apd.wrap(model).weights.items()}


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "gemma2"])
def test_heads_keys_and_neurons(architecture: str):
    found = units(hugging_face_model(architecture))
    attn, mlp = "model.layers.0.self_attn", "model.layers.0.mlp"
    assert found[f"{attn}.q_proj.weight"] == Units("head", "out", 4)
    assert found[f"{attn}.k_proj.weight"] == found[f"{attn}.v_proj.weight"] == Units("head", "out", 2)
    assert found[f"{attn}.o_proj.weight"] == Units("head", "in", 4)
    assert found[f"{mlp}.gate_proj.weight"] == found[f"{mlp}.up_proj.weight"] == Units("neuron", "out", 10)
    assert found[f"{mlp}.down_proj.weight"] == Units("neuron", "in", 10)
    assert found["model.embed_tokens.weight"] is None


def test_fused_and_other_names():
    found = units(tiny_gpt2())
    assert found["transformer.h.1.attn.c_attn.weight"] == Units("head", "out", 2, copies=3)
    assert found["transformer.h.1.attn.c_proj.weight"] == Units("head", "in", 2)
    assert found["transformer.h.1.mlp.c_fc.weight"] == Units("neuron", "out", 32)
    assert found["transformer.h.1.mlp.c_proj.weight"] == Units("neuron", "in", 32)
    assert found["transformer.wte.weight"] is None
    found = units(hugging_face_model("opt"))
    attn = "model.decoder.layers.0.self_attn"
    assert [found[f"{attn}.{name}.weight"] for name in ("q_proj", "k_proj", "out_proj")] == [
        Units("head", "out", 2), Units("head", "out", 2), Units("head", "in", 2)
    ]  # fmt: skip
    assert found["model.decoder.layers.0.fc2.weight"] is not None
    fused = [of for name, of in units(hugging_face_model("neox")).items() if "query_key_value" in name]
    assert fused == [None]  # there each head has its own query, key and value side by side


def test_nothing_is_said_where_the_shapes_disagree():
    model = tiny_llama()
    attn = model.model.layers[0].self_attn
    attn.q_proj, attn.o_proj = nn.Linear(8, 6, bias=False), nn.Linear(6, 8, bias=False)
    model.model.layers[0].mlp.up_proj = nn.Linear(8, 11, bias=False)
    found = units(model)
    layer = "model.layers.0"
    names = ("self_attn.q_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.gate_proj", "mlp.down_proj")
    assert [found[f"{layer}.{name}.weight"] for name in names] == [None] * 5
    assert found[f"{layer}.self_attn.k_proj.weight"] == Units("head", "out", 1)
    model = tiny_llama()
    for module in model.modules():
        if hasattr(module, "config"):
            module.config = None
    assert not any(units(model).values())


def test_modules_of_ones_own():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.q_proj, self.o_proj = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.o_proj(self.q_proj(x))

    assert not any(units(Block()).values())


def test_the_heads_are_those_of_the_bridge():
    """By weight, the same components lie in the same heads."""
    compare = pytest.importorskip("apd_lens.compare")
    from transformer_lens.model_bridge.sources._bridge_builder import build_bridge_from_module

    model = hugging_face_model("llama")
    decomposition = apd.init(model, weights=["*_proj*"], n_components=5, rank=2).decomposition()
    other = hugging_face_model("llama")
    bridge = build_bridge_from_module(other, "LlamaForCausalLM", hf_config=other.config, tokenizer=None)
    carried = decomposition.on(bridge)
    for level in ("head", "neuron", "mlp"):
        one, same = (compare.weight_map(some) for some in (decomposition, carried))
        assert one.nodes(level) == same.nodes(level)
        torch.testing.assert_close(one.shares(level), same.shares(level))
