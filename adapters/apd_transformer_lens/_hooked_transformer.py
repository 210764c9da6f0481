"""The adapter for `transformer_lens.HookedTransformer` (3.9).

HookedTransformer multiplies by bare parameters inside the forward of its components (embed, pos_embed, attn, mlp,
unembed), between hook points. Each component's forward is patched; while it runs, the hook points next to a matrix
are shadowed, so that

- a matrix's x is what the code after a hook point receives: the user's hooks and edits come before it;
- a matrix's y is what a hook point is given: the user's hooks and edits come after it.

Options that can be switched at any time (`set_use_split_qkv_input`, `set_use_attn_result`, ...) are looked up in each
call.
"""

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from apd_lens import Intercept, MissingExtra, UnsupportedModel, Use, WeightMatrix

try:
    from transformer_lens import HookedTransformer
    from transformer_lens.components import (
        AbstractAttention,
        Embed,
        GroupedQueryAttention,
        PosEmbed,
        Unembed,
    )
    from transformer_lens.components.mlps.gated_mlp import GatedMLP
    from transformer_lens.components.mlps.mlp import MLP
    from transformer_lens.utilities import get_offset_position_ids
except ImportError as error:
    raise MissingExtra(
        "apd_transformer_lens needs transformer-lens 3.9, the last release with HookedTransformer. Install it with "
        "pip install 'apd-lens[transformer-lens]'"
    ) from error

_PLAIN = "d_in d_out -> d_in d_out"
_HEADS_OUT = "head d_in d_head -> d_in (head d_head)"
_HEADS_IN = "head d_head d_out -> (head d_head) d_out"
_FORWARD_SIGNATURE = inspect.signature(HookedTransformer.forward)
_Uses = dict[str, Use]


class HookedTransformerAdapter:
    """W_E, W_pos, W_Q, W_K, W_V, W_O, W_in, W_gate, W_out and W_U, with the heads flattened into one side."""

    def matrices(self, model: nn.Module) -> Iterator[WeightMatrix]:
        for component in _components(model):
            for name, stored in component.stored.items():
                yield WeightMatrix(
                    name=f"{component.path}.{name}",
                    module=component.module,
                    attribute=stored.attribute,
                    layout=stored.layout,
                    axes={"head": len(getattr(component.module, stored.attribute))} if "head" in stored.layout else {},
                    uses=(Use(f"{component.path}.{name}", site=f"{component.path}.{stored.site}".rstrip(".")),),
                    state_keys=(f"{component.path}.{stored.attribute}",),
                )

    def refused(self, model: nn.Module) -> dict[str, str]:
        return {
            f"{component.path}.{name}": reason
            for component in _components(model)
            for name, reason in component.refused.items()
        }

    def patches(
        self, model: nn.Module, matrices: Iterable[WeightMatrix], intercept: Intercept
    ) -> Iterator[tuple[nn.Module, Callable[..., Any]]]:
        wanted = {matrix.name: matrix.uses[0] for matrix in matrices}
        for component in _components(model):
            names = (name for name in component.stored if f"{component.path}.{name}" in wanted)
            uses = {name: wanted[f"{component.path}.{name}"] for name in names}
            if uses:
                yield component.module, partial(component.forward, uses=uses, intercept=intercept)

    def runs_every_use(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
        given = _FORWARD_SIGNATURE.bind(None, *args, **kwargs).arguments
        whole = given.get("start_at_layer") is None and given.get("stop_at_layer") is None
        return whole and given.get("return_type", "logits") is not None


@dataclass(frozen=True)
class _Stored:
    """How a component stores one matrix, and the hook point (or "" for the component itself) where y is made."""

    attribute: str
    layout: str
    site: str = ""


@dataclass(frozen=True)
class _Component:
    """One component of the model: the matrices that it stores, and its forward while they are intercepted."""

    path: str
    module: nn.Module
    stored: dict[str, _Stored]
    forward: Callable[..., Any]
    refused: dict[str, str] = field(default_factory=dict)


def _components(model: nn.Module) -> Iterator[_Component]:
    """In the order of the forward pass."""
    if not isinstance(model, HookedTransformer):
        raise UnsupportedModel(
            f"{type(model).__module__}.{type(model).__name__} cannot be decomposed. Of transformer_lens, could be: a "
            "HookedTransformer. Of anything else: a torch module with nn.Linear, Conv1D or nn.Embedding leaves, such "
            "as the Hugging Face model behind this one."
        )
    cfg = model.cfg
    yield _Component("embed", model.embed, {"W_E": _Stored("W_E", _PLAIN)}, _embed)
    if cfg.positional_embedding_type == "alibi":
        reason = "alibi models do not use it"
        yield _Component("pos_embed", model.pos_embed, {}, _pos_embed, {"W_pos": reason})
    elif cfg.positional_embedding_type != "rotary":
        yield _Component("pos_embed", model.pos_embed, {"W_pos": _Stored("W_pos", _PLAIN)}, _pos_embed)
    for layer, block in enumerate(model.blocks):
        yield _attention_component(f"blocks.{layer}.attn", block.attn)
        if not cfg.attn_only:
            yield _mlp_component(f"blocks.{layer}.mlp", block.mlp)
    yield _Component("unembed", model.unembed, {"W_U": _Stored("W_U", _PLAIN, "hook_out")}, _unembed)


def _attention_component(path: str, attn: AbstractAttention) -> _Component:
    if attn.cfg.load_in_4bit:
        return _refused(path, attn, "4-bit weights cannot be decomposed")
    grouped = "_" if isinstance(attn, GroupedQueryAttention) else ""  # W_K is then a repeated view of _W_K
    stored = {
        "W_Q": _Stored("W_Q", _HEADS_OUT, "hook_q"),
        "W_K": _Stored(f"{grouped}W_K", _HEADS_OUT, "hook_k"),
        "W_V": _Stored(f"{grouped}W_V", _HEADS_OUT, "hook_v"),
        "W_O": _Stored("W_O", _HEADS_IN, "hook_z"),
    }
    return _Component(path, attn, stored, _attention)


def _mlp_component(path: str, mlp: nn.Module) -> _Component:
    W_out = _Stored("W_out", _PLAIN, "hook_post")
    if type(mlp) is MLP:
        return _Component(path, mlp, {"W_in": _Stored("W_in", _PLAIN, "hook_pre"), "W_out": W_out}, _mlp)
    if type(mlp) is GatedMLP:
        W_gate = _Stored("W_gate", _PLAIN, "hook_pre")
        if mlp.cfg.is_layer_norm_activation():
            reason = "a gated MLP with a layer-norm activation does not use it"
            return _Component(path, mlp, {"W_gate": W_gate, "W_out": W_out}, _gated_mlp, {"W_in": reason})
        W_in = _Stored("W_in", _PLAIN, "hook_pre_linear")
        return _Component(path, mlp, {"W_in": W_in, "W_gate": W_gate, "W_out": W_out}, _gated_mlp)
    return _refused(path, mlp, f"the forward of {type(mlp).__name__} is not understood")


def _refused(path: str, module: nn.Module, reason: str) -> _Component:
    names = [name for name, parameter in module.named_parameters() if parameter.ndim > 1]
    return _Component(path, module, {}, lambda: None, dict.fromkeys(names, reason))


# The forwards of the components. Each is called as forward(module, original, *args, uses=, intercept=, **kwargs) with
# the uses of the matrices that are decomposed, by the matrix's name.


def _embed(
    embed: Embed, original: Callable[..., Tensor], tokens: Tensor, *, uses: _Uses, intercept: Intercept
) -> Tensor:
    if not embed.cfg.post_embedding_ln:
        return intercept(uses["W_E"], tokens, lambda: original(tokens), None)
    # The looked-up rows are what the layer norm at the end is given.
    with _shadowed(embed, ln=_Shadow(before=lambda rows: intercept(uses["W_E"], tokens, lambda: rows, None))):
        return original(tokens)


def _pos_embed(
    pos_embed: PosEmbed,
    original: Callable[..., Tensor],
    tokens: Tensor,
    past_kv_pos_offset: int = 0,
    attention_mask: Tensor | None = None,
    *,
    uses: _Uses,
    intercept: Intercept,
) -> Tensor:
    use, length = uses["W_pos"], tokens.shape[-1]

    def looked_up() -> Tensor:
        return original(tokens, past_kv_pos_offset, attention_mask)

    if attention_mask is None:
        # A slice, as in the host: shorter than `length` where it would run over the end of W_pos.
        rows = torch.arange(len(pos_embed.W_pos), device=tokens.device)[past_kv_pos_offset:][:length]
        return intercept(use, rows.expand(len(tokens), -1), looked_up, None)
    rows = get_offset_position_ids(past_kv_pos_offset, attention_mask)
    padding = ~attention_mask.bool()[:, past_kv_pos_offset : past_kv_pos_offset + length, None]
    return torch.where(padding, 0.0, intercept(use, rows, looked_up, None))


def _attention(
    attn: AbstractAttention, original: Callable[..., Tensor], *, uses: _Uses, intercept: Intercept, **inputs: Any
) -> Tensor:
    z: Tensor | None = None
    shadows = {}
    for letter, x_name in (("Q", "query_input"), ("K", "key_input"), ("V", "value_input")):
        if f"W_{letter}" in uses:
            shadows[f"hook_{letter.lower()}"] = _Shadow(
                before=partial(_to_heads, attn, letter, inputs[x_name], uses[f"W_{letter}"], intercept)
            )
    if "W_O" in uses:

        def keep(value: Tensor) -> None:
            nonlocal z
            z = value

        shadows["hook_z"] = _Shadow(after=keep)
        if attn.cfg.use_attn_result:
            shadows["hook_result"] = _Shadow(before=lambda y: _from_each_head(z, y, uses["W_O"], intercept))
    with _shadowed(attn, **shadows):
        out = original(**inputs)
    if "W_O" in uses and not attn.cfg.use_attn_result:
        assert z is not None
        return intercept(uses["W_O"], z.flatten(2), lambda: out, attn.b_O)
    return out


def _to_heads(attn: AbstractAttention, letter: str, x: Tensor, use: Use, intercept: Intercept, y: Tensor) -> Tensor:
    """Intercepts W_Q, W_K or W_V, where y is `batch pos head d_head`."""
    prefix = "_" if isinstance(attn, GroupedQueryAttention) and letter != "Q" else ""
    bias: Tensor = getattr(attn, f"{prefix}b_{letter}")
    n_stored, d_head = bias.shape
    n_heads = y.shape[2]
    if x.ndim == 3 and n_heads == n_stored:
        return intercept(use, x, lambda: y.flatten(2), bias.flatten()).unflatten(2, (n_heads, d_head))
    # Each head has an input of its own (split_qkv_input, attn_in), or several share a stored head (ungrouped).
    heads = []
    for head in range(n_heads):
        stored = head * n_stored // n_heads
        part = replace(use, columns=slice(stored * d_head, (stored + 1) * d_head))
        x_head = x if x.ndim == 3 else x[:, :, head]
        heads.append(intercept(part, x_head, partial(y.select, 2, head), bias[stored]))
    return torch.stack(heads, 2)


def _from_each_head(z: Tensor | None, y: Tensor, use: Use, intercept: Intercept) -> Tensor:
    """Intercepts W_O where each head's result is made on its own: y is `batch pos head d_model`, without bias."""
    assert z is not None
    d_head = z.shape[3]
    heads = []
    for head in range(z.shape[2]):
        part = replace(use, rows=slice(head * d_head, (head + 1) * d_head))
        heads.append(intercept(part, z[:, :, head], partial(y.select, 2, head), None))
    return torch.stack(heads, 2)


def _mlp(mlp: MLP, original: Callable[..., Tensor], x: Tensor, *, uses: _Uses, intercept: Intercept) -> Tensor:
    return _mlp_with(mlp, original, x, {"hook_pre": ("W_in", mlp.b_in)}, uses, intercept)


def _gated_mlp(
    mlp: GatedMLP, original: Callable[..., Tensor], x: Tensor, *, uses: _Uses, intercept: Intercept
) -> Tensor:
    # b_in is added after the gating, so neither product has a bias.
    return _mlp_with(
        mlp, original, x, {"hook_pre": ("W_gate", None), "hook_pre_linear": ("W_in", None)}, uses, intercept
    )


def _mlp_with(
    mlp: MLP | GatedMLP,
    original: Callable[..., Tensor],
    x: Tensor,
    made_before: dict[str, tuple[str, Tensor | None]],
    uses: _Uses,
    intercept: Intercept,
) -> Tensor:
    """Intercepts the matrices that read the MLP's input, by the hook point that is given their y, and W_out."""
    post: Tensor | None = None

    def keep(value: Tensor) -> None:
        nonlocal post
        post = value

    def replaced(use: Use, bias: Tensor | None, y: Tensor) -> Tensor:
        return intercept(use, x, lambda: y, bias)

    shadows = {
        hook: _Shadow(before=partial(replaced, uses[name], bias))
        for hook, (name, bias) in made_before.items()
        if name in uses
    }
    with _shadowed(mlp, **shadows, hook_post=_Shadow(after=keep)):
        out = original(x)
    if "W_out" not in uses:
        return out
    assert post is not None
    return intercept(uses["W_out"], post, lambda: out, mlp.b_out)


def _unembed(
    unembed: Unembed, original: Callable[..., Tensor], residual: Tensor, *, uses: _Uses, intercept: Intercept
) -> Tensor:
    x: Tensor | None = None

    def keep(value: Tensor) -> None:
        nonlocal x
        x = value

    def replaced(y: Tensor) -> Tensor:
        assert x is not None
        return intercept(uses["W_U"], x, lambda: y, unembed.b_U)

    with _shadowed(unembed, hook_in=_Shadow(after=keep), hook_out=_Shadow(before=replaced)):
        return original(residual)


class _Shadow:
    """Stands in for a submodule while its parent's forward runs.

    Calls the submodule that the parent has at that moment, with whatever the user has hooked to it or spliced in
    there. `before` may replace what it is given (a y that no hook of the user's has seen yet); `after` is shown what
    the code behind it receives (an x with all of the user's edits).
    """

    def __init__(self, before: Callable[[Tensor], Tensor] | None = None, after: Callable[[Tensor], None] | None = None):
        self.before, self.after = before, after
        self.real: Any = None

    def __call__(self, value: Tensor) -> Any:
        out = self.real(value if self.before is None else self.before(value))
        if self.after is not None:
            self.after(out)
        return out

    def __getattr__(self, name: str) -> Any:
        return getattr(self.real, name)


@contextmanager
def _shadowed(parent: nn.Module, **shadows: _Shadow) -> Iterator[None]:
    """Instance attributes are found before submodules, so shadows go into the parent's `__dict__`."""
    try:
        for name, shadow in shadows.items():
            shadow.real = getattr(parent, name)
            parent.__dict__[name] = shadow
        yield
    finally:
        for name in shadows:
            parent.__dict__.pop(name, None)
