"""The adapter for `transformer_lens.HookedTransformer` (3.9).

HookedTransformer multiplies by bare parameters inside the forward of its components (embed, pos_embed, attn, mlp,
unembed), between hook points. Each component's forward is patched; while it runs, the hook points next to a matrix
are shadowed, so that

- a matrix's x is what the code after a hook point receives: the user's hooks and edits come before it;
- a matrix's y is what a hook point is given: the user's hooks and edits come after it.

Options that can be switched at any time (`set_use_split_qkv_input`, `set_use_attn_result`, ...) are looked up in each
call.

In a mixture of experts the matrices are nn.Linear leaves, which see rows of the positions that were routed to them;
these are put back to their examples and positions.
"""

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformer_lens import HookedTransformer
from transformer_lens.components import (
    AbstractAttention,
    Attention,
    Embed,
    GroupedQueryAttention,
    PosEmbed,
    Unembed,
)
from transformer_lens.components.mlps.gated_mlp import GatedMLP
from transformer_lens.components.mlps.gpt_oss_moe import GptOssMoE
from transformer_lens.components.mlps.mlp import MLP
from transformer_lens.components.mlps.moe import MoE
from transformer_lens.utilities import get_offset_position_ids

from apd_lens.host import Bias, Intercept, Units, Use, WeightMatrix
from apd_transformer_lens._shadow import Shadow, shadowed

_PLAIN = "d_in d_out -> d_in d_out"
_LINEAR = "d_out d_in -> d_in d_out"
_HEADS_OUT = "head d_in d_head -> d_in (head d_head)"
_HEADS_IN = "head d_head d_out -> (head d_head) d_out"
_OF_AN_EXPERT = ("W_in", "W_gate", "W_out")
_FORWARD_SIGNATURE = inspect.signature(HookedTransformer.forward)
_Uses = dict[str, Use]


class HookedTransformerAdapter:
    """W_E, W_pos, W_Q, W_K, W_V, W_O, W_in, W_gate, W_out and W_U, with the heads flattened into one side.

    Of a mixture of experts: `mlp.W_gate`, the router, and `mlp.experts.3.W_in` and so on.
    """

    def matrices(self, model: nn.Module) -> Iterator[WeightMatrix]:
        for component in _components(model):
            for name, stored in component.stored.items():
                path, _, attribute = stored.attribute.rpartition(".")
                module = component.module.get_submodule(path)
                stored_shape = getattr(module, attribute).shape
                yield WeightMatrix(
                    name=f"{component.path}.{name}",
                    module=module,
                    attribute=attribute,
                    layout=stored.layout,
                    axes={"head": stored_shape[0]} if "head" in stored.layout else {},
                    uses=(Use(f"{component.path}.{name}", site=component.site(stored)),),
                    state_keys=(f"{component.path}.{stored.attribute}",),
                    bias=None if stored.bias is None else Bias(stored.bias, (f"{component.path}.{stored.bias}",)),
                    units=_units(name, stored, stored_shape),
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
        wanted = {use.site: use for matrix in matrices for use in matrix.uses}
        for component in _components(model):
            sites = {name: component.site(stored) for name, stored in component.stored.items()}
            uses = {name: wanted[site] for name, site in sites.items() if site in wanted}
            if uses:
                yield component.module, partial(component.forward, uses=uses, intercept=intercept)
            for name, use in uses.items() if component.forward is _mixture_of_experts else ():
                leaf = component.module.get_submodule(name)
                yield leaf, partial(_routed_leaf, name=name, use=use, intercept=intercept)

    def runs_every_use(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
        given = _FORWARD_SIGNATURE.bind(None, *args, **kwargs).arguments
        whole = given.get("start_at_layer") is None and given.get("stop_at_layer") is None
        return whole and given.get("return_type", "logits") is not None


@dataclass(frozen=True)
class _Stored:
    """How a component stores one matrix, the submodule (or "" for the component itself) where y is made, and the bias
    that is added to that y alone."""

    attribute: str
    layout: str
    site: str = ""
    bias: str | None = None


def _units(name: str, stored: _Stored, shape: torch.Size) -> Units | None:
    """The heads of an attention matrix, the neurons of an MLP's."""
    if stored.layout in (_HEADS_OUT, _HEADS_IN):
        return Units("head", "out" if stored.layout == _HEADS_OUT else "in", shape[0])
    if stored.layout == _PLAIN and name in ("W_in", "W_gate"):
        return Units("neuron", "out", shape[1])
    return Units("neuron", "in", shape[0]) if stored.layout == _PLAIN and name == "W_out" else None


@dataclass(frozen=True)
class _Component:
    """One component of the model: the matrices that it stores, and its forward while they are intercepted."""

    path: str
    module: nn.Module
    stored: dict[str, _Stored]
    forward: Callable[..., Any]
    refused: dict[str, str] = field(default_factory=dict)

    def site(self, stored: _Stored) -> str:
        return f"{self.path}.{stored.site}".rstrip(".")


def _components(model: nn.Module) -> Iterator[_Component]:
    """In the order of the forward pass."""
    assert isinstance(model, HookedTransformer)
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
    yield _Component("unembed", model.unembed, {"W_U": _Stored("W_U", _PLAIN, "hook_out", "b_U")}, _unembed)


def _attention_component(path: str, attn: AbstractAttention) -> _Component:
    if type(attn) not in (Attention, GroupedQueryAttention):
        return _refused(path, attn, f"the forward of {type(attn).__name__} is not understood")
    if attn.cfg.load_in_4bit:
        return _refused(path, attn, "4-bit weights cannot be decomposed")
    grouped = "_" if isinstance(attn, GroupedQueryAttention) else ""  # W_K is then a repeated view of _W_K
    stored = {
        "W_Q": _Stored("W_Q", _HEADS_OUT, "hook_q", "b_Q"),
        "W_K": _Stored(f"{grouped}W_K", _HEADS_OUT, "hook_k", f"{grouped}b_K"),
        "W_V": _Stored(f"{grouped}W_V", _HEADS_OUT, "hook_v", f"{grouped}b_V"),
        "W_O": _Stored("W_O", _HEADS_IN, "hook_z", "b_O"),
    }
    return _Component(path, attn, stored, _attention)


def _mlp_component(path: str, mlp: nn.Module) -> _Component:
    W_out = _Stored("W_out", _PLAIN, "hook_post", "b_out")
    if type(mlp) is MLP:
        return _Component(path, mlp, {"W_in": _Stored("W_in", _PLAIN, "hook_pre", "b_in"), "W_out": W_out}, _mlp)
    if type(mlp) is GatedMLP:
        W_gate = _Stored("W_gate", _PLAIN, "hook_pre")
        if mlp.cfg.is_layer_norm_activation():
            reason = "a gated MLP with a layer-norm activation does not use it"
            return _Component(path, mlp, {"W_gate": W_gate, "W_out": W_out}, _gated_mlp, {"W_in": reason})
        W_in = _Stored("W_in", _PLAIN, "hook_pre_linear")
        return _Component(path, mlp, {"W_in": W_in, "W_gate": W_gate, "W_out": W_out}, _gated_mlp)
    if type(mlp) is MoE or type(mlp) is GptOssMoE:
        experts = [f"experts.{expert}.{name}" for expert in range(mlp.num_experts) for name in _OF_AN_EXPERT]
        stored = {name: _Stored(f"{name}.weight", _LINEAR, name) for name in ("W_gate", *experts)}
        return _Component(path, mlp, stored, _mixture_of_experts)
    return _refused(path, mlp, f"the forward of {type(mlp).__name__} is not understood")


def _refused(path: str, module: nn.Module, reason: str) -> _Component:
    names = [name for name, parameter in module.named_parameters() if parameter.ndim > 1]
    return _Component(path, module, {}, lambda: None, dict.fromkeys(names, reason))


# The forwards of the components. Each is called as forward(module, original, *args, uses=, intercept=, **kwargs) with
# the uses of the matrices that are decomposed, by the matrix's name.


def _keep(read: dict[str, Tensor], name: str) -> Shadow:
    """Puts what the code behind the submodule of that name receives into `read`."""
    return Shadow(after=partial(read.__setitem__, name))


def _embed(
    embed: Embed, original: Callable[..., Tensor], tokens: Tensor, *, uses: _Uses, intercept: Intercept
) -> Tensor:
    if not embed.cfg.post_embedding_ln:
        return intercept(uses["W_E"], tokens, lambda: original(tokens), None)
    # The looked-up rows are what the layer norm at the end is given.
    with shadowed(embed, ln=Shadow(before=lambda rows: intercept(uses["W_E"], tokens, lambda: rows, None))):
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
    looked_up = partial(original, tokens, past_kv_pos_offset, attention_mask)
    if attention_mask is None:
        # A slice, as in the host: shorter than `length` where it would run over the end of W_pos.
        rows = torch.arange(len(pos_embed.W_pos), device=tokens.device)[past_kv_pos_offset:][:length]
        return intercept(use, rows.expand(len(tokens), -1), looked_up, None)
    rows = get_offset_position_ids(past_kv_pos_offset, attention_mask)
    padding = ~attention_mask.bool()[:, past_kv_pos_offset : past_kv_pos_offset + length, None]

    def y() -> Tensor:  # with what would be at padding, too
        return torch.where(padding, pos_embed.W_pos[rows], looked_up())

    return torch.where(padding, 0.0, intercept(use, rows, y, None))


def _attention(
    attn: AbstractAttention, original: Callable[..., Tensor], *, uses: _Uses, intercept: Intercept, **inputs: Any
) -> Tensor:
    read: dict[str, Tensor] = {}
    shadows = {"hook_z": _keep(read, "hook_z")}
    for letter, x_name in (("Q", "query_input"), ("K", "key_input"), ("V", "value_input")):
        if f"W_{letter}" in uses:
            shadows[f"hook_{letter.lower()}"] = Shadow(
                before=partial(_to_heads, attn, letter, inputs[x_name], uses[f"W_{letter}"], intercept)
            )
    if "W_O" in uses and attn.cfg.use_attn_result:
        shadows["hook_result"] = Shadow(before=lambda y: _from_each_head(read["hook_z"], y, uses["W_O"], intercept))
    with shadowed(attn, **shadows):
        out = original(**inputs)
    if "W_O" in uses and "hook_z" in read and not attn.cfg.use_attn_result:
        return intercept(uses["W_O"], read["hook_z"].flatten(2), lambda: out, attn.b_O)
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


def _from_each_head(z: Tensor, y: Tensor, use: Use, intercept: Intercept) -> Tensor:
    """Intercepts W_O where each head's result is made on its own: y is `batch pos head d_model`, without bias."""
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
    read = {"hook_in": x}
    shadows = {"hook_post": _keep(read, "hook_post")}
    if "hook_in" in mlp._modules:  # SAELens adds it
        shadows["hook_in"] = _keep(read, "hook_in")
    for hook, (name, bias) in made_before.items():
        if name in uses:
            shadows[hook] = Shadow(before=partial(_reader_of_the_input, read, uses[name], bias, intercept))
    with shadowed(mlp, **shadows):
        out = original(x)
    if "W_out" in uses and "hook_post" in read:
        return intercept(uses["W_out"], read["hook_post"], lambda: out, mlp.b_out)
    return out


def _reader_of_the_input(
    read: dict[str, Tensor], use: Use, bias: Tensor | None, intercept: Intercept, y: Tensor
) -> Tensor:
    return intercept(use, read["hook_in"], lambda: y, bias)


@dataclass(frozen=True)
class _Routing:
    """Which tokens of a batch, numbered `(batch pos)`, the leaves of a mixture of experts see.

    Attributes:
        shape: batch and pos.
        read: under "hook_expert_indices" the experts of each token, `(batch pos) slot`, once they are known.
        called: the names of the leaves that were called.
    """

    shape: torch.Size
    read: dict[str, Tensor] = field(default_factory=dict)
    called: set[str] = field(default_factory=set)

    def tokens(self, name: str) -> Tensor:
        if name == "W_gate":
            return torch.arange(self.shape.numel(), device="cpu")
        expert = int(name.split(".")[1])
        return torch.where(self.read["hook_expert_indices"].mT == expert)[1]


# Of the mixture of experts whose forward runs now.
_ROUTING: ContextVar[_Routing] = ContextVar("apd_transformer_lens routing")


def _mixture_of_experts(
    mlp: MoE | GptOssMoE, original: Callable[..., Tensor], x: Tensor, *, uses: _Uses, intercept: Intercept
) -> Tensor:
    """Intercepts the router and the experts, each on `batch pos`: x is 0 where a token was not routed there."""
    routing = _Routing(x.shape[:2])
    _ROUTING.set(routing)
    with shadowed(mlp, hook_expert_indices=_keep(routing.read, "hook_expert_indices")):
        out = original(x)
    for name, use in uses.items():
        # GptOssMoE does not call an expert that no token was routed to.
        if name not in routing.called and routing.read and len(routing.tokens(name)) == 0:
            linear = mlp.get_submodule(name)
            assert isinstance(linear, nn.Linear)
            product = partial(F.linear, weight=linear.weight, bias=linear.bias)
            no_rows = x.new_zeros(0, linear.in_features)
            no_rows = _routed_leaf(linear, product, no_rows, name=name, use=use, intercept=intercept)
            out = torch.cat([out.flatten(), no_rows.flatten()]).view_as(out)  # the same, with y in its graph
    return out


def _routed_leaf(
    leaf: nn.Linear,
    original: Callable[[Tensor], Tensor],
    rows: Tensor,
    *,
    name: str,
    use: Use,
    intercept: Intercept,
) -> Tensor:
    routing = _ROUTING.get()
    routing.called.add(name)
    tokens = routing.tokens(name).to(rows.device)
    row_of = torch.full((routing.shape.numel(),), len(rows), device=rows.device)
    row_of[tokens] = torch.arange(len(rows), device=rows.device)
    row_of = row_of.view(routing.shape)
    x = _at_positions(row_of, rows)
    return intercept(use, x, lambda: _at_positions(row_of, original(rows), leaf.bias), leaf.bias).flatten(0, 1)[tokens]


def _at_positions(
    row_of: Int[Tensor, "batch pos"], rows: Float[Tensor, "row d"], otherwise: Float[Tensor, " d"] | None = None
) -> Float[Tensor, "batch pos d"]:
    """The row of every token; `otherwise`, or 0, where it has none: its number is that of the row behind the last."""
    otherwise = rows.new_zeros(rows.shape[1]) if otherwise is None else otherwise.to(rows.dtype)
    return torch.cat([rows, otherwise[None]])[row_of]


def _unembed(
    unembed: Unembed, original: Callable[..., Tensor], residual: Tensor, *, uses: _Uses, intercept: Intercept
) -> Tensor:
    read: dict[str, Tensor] = {}
    replaced = Shadow(before=lambda y: intercept(uses["W_U"], read["hook_in"], lambda: y, unembed.b_U))
    with shadowed(unembed, hook_in=_keep(read, "hook_in"), hook_out=replaced):
        return original(residual)
