"""The adapter for `transformer_lens.model_bridge.TransformerBridge` (3.9 and 4).

A bridge puts its components into the tree of a Hugging Face model (or of its own). The innermost module of a component
is a leaf (nn.Linear, transformers' Conv1D, nn.Embedding) that holds a weight and multiplies by it, between the hook
points of the component. Each leaf's forward is patched. Where the bridge goes round the leaves, the forward of the
component above is patched too, and while it runs, what takes their place is shadowed:

- `set_use_split_qkv_input`, `set_use_attn_in` and `set_use_attn_result` multiply by each head on its own;
- a gated MLP whose weights were processed (`enable_compatibility_mode`) multiplies between the leaves' hook points.

These can be switched at any time, so they are looked up in each call.
"""

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformer_lens.model_bridge import TransformerBridge
from transformer_lens.model_bridge.generalized_components.attention import AttentionBridge

from apd_lens.host import Intercept, TorchAdapter, Units, Use, WeightMatrix
from apd_transformer_lens._shadow import Shadow, kept, shadowed

# Component of a block -> its leaves, in the order of the forward pass -> names, as in HookedTransformer.
_IN_BLOCK = {
    "attn": {"q": "W_Q", "k": "W_K", "v": "W_V", "o": "W_O"},
    "mlp": {"in": "W_in", "gate": "W_gate", "out": "W_out"},
}
_ELSEWHERE = "it is in none of the places that are understood (embed, pos_embed, attn, mlp outside of experts, unembed)"
_NO_BLOCKS = "a TransformerBridge without `blocks`, such as one of an encoder and a decoder, is not supported"
_FORWARD_SIGNATURE = inspect.signature(TransformerBridge.forward)
_Uses = dict[str, Use]


class BridgeAdapter:
    """W_E, W_pos, W_Q, W_K, W_V, W_O, W_in, W_gate, W_out and W_U, with the heads flattened into one side."""

    def matrices(self, model: TransformerBridge) -> Iterator[WeightMatrix]:
        for place in _places(model):
            if (matrix := place.matrix()) is not None:
                yield replace(matrix, units=_units(model, place, matrix))

    def refused(self, model: TransformerBridge) -> dict[str, str]:
        places = list(_places(model))
        refused = {place.name: place.reason_against() for place in places if place.matrix() is None}
        known = {model, *(place.leaf for place in places), *_split_at_boot(model)}
        for path, module in (*model.named_modules(), *model.original_model.named_modules()):
            if module in known:
                continue
            known.add(module)
            path = path.replace("_original_component.", "").removesuffix("._original_component")
            for attribute, parameter in module.named_parameters(recurse=False):
                if parameter.ndim >= 2:
                    reason = TorchAdapter().refused(module).get(attribute, _ELSEWHERE) if places else _NO_BLOCKS
                    refused[f"{path}.{attribute}".lstrip(".")] = reason
        return refused

    def patches(
        self, model: TransformerBridge, matrices: Iterable[WeightMatrix], intercept: Intercept
    ) -> Iterator[tuple[nn.Module, Callable[..., Any]]]:
        wanted = {use.site: use for matrix in matrices for use in matrix.uses}
        in_component: dict[nn.Module, _Uses] = {}
        for place in _places(model):
            if place.path in wanted:
                use = wanted[place.path]
                in_component.setdefault(place.above, {})[place.leaf_name] = use
                yield from TorchAdapter().patches(place.leaf, _of_leaf(place.leaf), partial(_as_use, use, intercept))
        for block in _blocks(model):
            attn, mlp = _child(block, "attn"), _child(block, "mlp")
            if isinstance(attn, AttentionBridge):
                yield attn, partial(_attention, uses=in_component.get(attn, {}), intercept=intercept)
            if mlp in in_component and _child(mlp, "gate") is not None:
                yield mlp, partial(_gated_mlp, uses=in_component[mlp], intercept=intercept)

    def runs_every_use(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
        given = _FORWARD_SIGNATURE.bind(None, *args, **kwargs).arguments
        whole = given.get("start_at_layer") is None and given.get("stop_at_layer") is None
        return whole and given.get("return_type", "logits") is not None


@dataclass(frozen=True)
class _Place:
    """Where the bridge has a weight matrix.

    Attributes:
        name: the matrix's.
        path: that of the bridge component around the leaf, such as "blocks.0.attn.q".
        leaf: holds the weight.
        above: the component in which the leaf's component is, such as the attention.
    """

    name: str
    path: str
    leaf: nn.Module
    above: nn.Module

    @property
    def leaf_name(self) -> str:
        return self.path.rpartition(".")[2]

    def matrix(self) -> WeightMatrix | None:
        """None where it cannot be decomposed."""
        for matrix in _of_leaf(self.leaf):
            module, attribute = self._stored()
            return replace(
                matrix,
                name=self.name,
                module=module,
                attribute=attribute,
                uses=(replace(matrix.uses[0], matrix=self.name, site=self.path),),
                state_keys=(f"{self.path}.weight",),
                bias=None,  # a bridge may keep a processed one elsewhere
            )
        return None

    def reason_against(self) -> str:
        return TorchAdapter().refused(self.leaf).get("weight", f"{type(self.leaf).__name__} does not hold it by itself")

    def _stored(self) -> tuple[nn.Module, str]:
        """Module and attribute of the tensor that the forward multiplies by."""
        of_its_own = f"_processed_W_{self.leaf_name}"  # in 3.9; it shares the leaf's memory, but not in a copy
        if _is_processed(self.above) and of_its_own in {*vars(self.above), *self.above._parameters}:
            return self.above, of_its_own
        return self.leaf, "weight"


def _units(model: TransformerBridge, place: _Place, matrix: WeightMatrix) -> Units | None:
    """The heads of an attention matrix whose heads all have the model's d_head, the neurons of an MLP's."""
    leaf, cfg = place.leaf_name, model.cfg
    if leaf in _IN_BLOCK["mlp"]:
        return Units("neuron", "in", matrix.d_in) if leaf == "out" else Units("neuron", "out", matrix.d_out)
    if leaf not in _IN_BLOCK["attn"]:
        return None
    number = (getattr(cfg, "n_key_value_heads", None) if leaf in ("k", "v") else None) or cfg.n_heads
    units = Units("head", "in" if leaf == "o" else "out", number)
    return units if (matrix.d_in if leaf == "o" else matrix.d_out) == number * cfg.d_head else None


def _of_leaf(leaf: nn.Module) -> list[WeightMatrix]:
    """What the core's adapter for torch modules makes of a leaf: its one matrix, or none."""
    return [matrix for matrix in TorchAdapter().matrices(leaf) if matrix.name == "weight"]


def _as_use(
    use: Use, intercept: Intercept, _: Use, x: Tensor, original: Callable[[], Tensor], bias: Tensor | None
) -> Tensor:
    return intercept(use, x, original, bias)


def _places(model: TransformerBridge) -> Iterator[_Place]:
    """In the order of the forward pass."""
    if _child(model, "blocks") is None:
        return
    yield from _places_in(model, "", {"embed": "embed.W_E", "pos_embed": "pos_embed.W_pos"})
    for layer, block in enumerate(_blocks(model)):
        for name, leaves in _IN_BLOCK.items():
            component = _child(block, name)
            if component is not None and (name == "attn" or {"in", "out"} <= component._modules.keys()):
                path = f"blocks.{layer}.{name}."
                yield from _places_in(component, path, {leaf: path + matrix for leaf, matrix in leaves.items()})
    yield from _places_in(model, "", {"unembed": "unembed.W_U"})


def _places_in(above: nn.Module, path: str, names: dict[str, str]) -> Iterator[_Place]:
    for component, name in names.items():
        if (leaf := _wrapped(_child(above, component))) is not None:
            yield _Place(name, path + component, leaf, above)


def _blocks(model: TransformerBridge) -> Iterable[Any]:
    return _child(model, "blocks") or ()


def _child(module: nn.Module, name: str) -> Any:
    """Not by attribute: what a component lacks is looked up in the module that it wraps."""
    return module._modules.get(name)


def _wrapped(component: nn.Module | None) -> Any:
    """The module that a component wraps; that of a projection or an embedding is its leaf."""
    return None if component is None else _child(component, "_original_component")


def _is_processed(component: nn.Module) -> bool:
    return vars(component).get("_use_processed_weights", False)


def _split_at_boot(model: TransformerBridge) -> Iterator[nn.Module | None]:
    """Modules whose weight the bridge has split into several leaves and uses no more."""
    for block in _blocks(model):
        for component in (_child(block, "attn"), _child(block, "mlp")):
            if component is not None and _child(component, "qkv") is not None:
                yield _wrapped(_child(component, "qkv"))
            if component is not None and "fused_attr" in vars(component):
                yield getattr(_wrapped(component), component.fused_attr, None)


# The forwards of components, called as forward(component, original, *args, uses=, intercept=, **kwargs) with the uses
# of the matrices that are decomposed, by the name of the leaf's component.


def _attention(
    attn: Any, original: Callable[..., Any], *args: Any, uses: _Uses, intercept: Intercept, **kwargs: Any
) -> Any:
    with (
        shadowed(
            attn,
            _project_per_head_qkv=partial(_to_heads, attn, uses, intercept),
            _compute_per_head_result=partial(_from_heads, attn, uses, intercept),
        ),
        kept(attn, "_pattern"),  # the bridge's last pattern, and with it all that the pattern was made from
    ):
        return original(*args, **kwargs)


def _to_heads(
    attn: nn.Module,
    uses: _Uses,
    intercept: Intercept,
    original: Callable[..., Tensor],
    linear: nn.Module,
    x: Tensor,
    n_heads: int,
    d_head: int,
) -> Tensor:
    """Intercepts W_Q, W_K or W_V where each head has an input of its own: x is `batch pos head d_model`."""
    use = next((use for name, use in uses.items() if _child(attn, name) is linear), None)
    if use is None:
        return original(linear, x, n_heads, d_head)
    bias = _wrapped(linear).bias

    def replaced(y: Tensor) -> Tensor:
        heads = []
        for head in range(n_heads):
            columns = slice(head * d_head, (head + 1) * d_head)
            part = replace(use, columns=columns)
            bias_of_head = None if bias is None else bias[columns]
            heads.append(intercept(part, x[:, :, head], partial(y.__getitem__, (..., columns)), bias_of_head))
        return torch.cat(heads, -1)

    with shadowed(linear, hook_out=Shadow(before=replaced)):
        return original(linear, x, n_heads, d_head)


def _from_heads(
    attn: nn.Module,
    uses: _Uses,
    intercept: Intercept,
    original: Callable[..., Tensor],
    z: Tensor,
    n_heads: int,
    d_head: int,
) -> Tensor:
    """Intercepts W_O where each head's result is made on its own: z is `batch pos head d_head`."""
    if "o" not in uses:
        return original(z, n_heads, d_head)

    def replaced(y: Tensor) -> Tensor:
        heads = []
        for head in range(n_heads):
            part = replace(uses["o"], rows=slice(head * d_head, (head + 1) * d_head))
            heads.append(intercept(part, z[:, :, head], partial(y.select, 2, head), None))
        return torch.stack(heads, 2)

    # Where the residual stream takes a multiple of the result, transformer-lens 4 shows hook_result that multiple.
    scaled = getattr(attn, "_result_contribution_scale", 1.0) != 1.0
    with shadowed(attn, **{"_hook_scaled_output" if scaled else "hook_result": Shadow(before=replaced)}):
        return original(z, n_heads, d_head)


def _gated_mlp(
    mlp: Any, original: Callable[..., Any], *args: Any, uses: _Uses, intercept: Intercept, **kwargs: Any
) -> Any:
    if not _is_processed(mlp):
        return original(*args, **kwargs)
    x: dict[str, Tensor] = {}

    def keep(*names: str) -> Shadow:
        return Shadow(after=lambda value: x.update(dict.fromkeys(names, value)))

    def replaced(name: str, y: Tensor) -> Tensor:
        bias = getattr(mlp, f"_processed_b_{name}", _wrapped(_child(mlp, name)).bias)
        return intercept(uses[name], x[name], lambda: y, bias)

    with ExitStack() as stack:
        stack.enter_context(shadowed(mlp, hook_in=keep("in", "gate")))
        stack.enter_context(shadowed(_child(mlp, "out"), hook_in=keep("out")))
        for name in uses:
            stack.enter_context(shadowed(_child(mlp, name), hook_out=Shadow(before=partial(replaced, name))))
        return original(*args, **kwargs)
