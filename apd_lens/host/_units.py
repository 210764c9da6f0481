"""Heads and neurons of plain torch modules, where a Hugging Face model's config says them and the shapes agree.

A matrix is known by its name and those beside it: `q_proj`, `k_proj`, `v_proj` with `o_proj` or `out_proj`, GPT-2's
`c_attn` with `c_proj`, and an MLP's two or three. Where a size is not what the config says, nothing is said.
"""

from typing import Any

from torch import Tensor, nn

from apd_lens.host._matrix import Units

# What reads the residual stream in an attention -> how often all heads come in it; and what writes to it.
_QUERIES, _KEYS, _FUSED, _WRITES = ("q_proj",), ("k_proj", "v_proj"), ("c_attn",), ("o_proj", "out_proj", "c_proj")
# Of an MLP: what makes its neurons, and what reads them.
_MLPS = ((("gate_proj", "up_proj"), "down_proj"), (("c_fc",), "c_proj"), (("fc1",), "fc2"))


def units_of(model: nn.Module, path: str) -> Units | None:
    """The heads or neurons of the weight of the module at this path; None where nobody says."""
    above, _, name = path.rpartition(".")
    parent = model.get_submodule(above)
    config = getattr(parent, "config", None) or getattr(model, "config", None)
    if config is None or not above:
        return None
    return _heads(parent, name, config) or _neurons(parent, name)


def _heads(parent: nn.Module, name: str, config: Any) -> Units | None:
    n_heads = _number(config, "num_attention_heads")
    beside = parent._modules.keys()
    if n_heads is None or not {*_QUERIES, *_FUSED} & beside:
        return None
    n_keys = _number(config, "num_key_value_heads") or n_heads
    d_head = _number(config, "head_dim")
    if d_head is None:
        d_model = _number(config, "hidden_size")
        if d_model is None or d_model % n_heads:
            return None
        d_head = d_model // n_heads
    d_in, d_out = _sizes(parent, name)
    if name in _QUERIES:
        return Units("head", "out", n_heads) if d_out == n_heads * d_head else None
    if name in _KEYS:
        return Units("head", "out", n_keys) if d_out == n_keys * d_head else None
    if name in _FUSED:
        return Units("head", "out", n_heads, copies=3) if d_out == 3 * n_heads * d_head else None
    if name in _WRITES:
        return Units("head", "in", n_heads) if d_in == n_heads * d_head else None
    return None


def _neurons(parent: nn.Module, name: str) -> Units | None:
    beside = parent._modules.keys()
    for makes, reads in _MLPS:
        if not {*makes, reads} <= beside or name not in (*makes, reads):
            continue
        number = _sizes(parent, reads)[0]
        if number is None or any(_sizes(parent, of)[1] != number for of in makes):
            return None
        return Units("neuron", "in" if name == reads else "out", number)
    return None


def _sizes(parent: nn.Module, name: str) -> tuple[int | None, int | None]:
    """d_in and d_out of a child that is a linear map; of others None."""
    module = parent._modules[name]
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor) or weight.ndim != 2:
        return None, None
    if isinstance(module, nn.Linear):
        return weight.shape[1], weight.shape[0]
    return (weight.shape[0], weight.shape[1]) if type(module).__name__ == "Conv1D" else (None, None)


def _number(config: Any, name: str) -> int | None:
    value = getattr(config, name, None)
    return value if isinstance(value, int) and value > 0 else None
