"""apd_lens for TransformerLens: every matrix of a HookedTransformer (3.9) or a TransformerBridge (3.9 and 4)."""

import inspect
from functools import partial
from typing import Any

import torch

from apd_lens._errors import InvalidBatches, MissingExtra, UnsupportedModel
from apd_lens.host import TargetModel, are_texts, arguments

try:
    from transformer_lens.model_bridge import TransformerBridge
except ImportError as error:
    raise MissingExtra(
        "apd_transformer_lens needs transformer-lens 3.9 or newer. Install it with "
        "pip install 'apd-lens[transformer-lens]'"
    ) from error
try:
    from transformer_lens import HookedTransformer
except ImportError:  # transformer-lens 4 has none
    HookedTransformer = None


def wrap(model: Any) -> TargetModel:
    """The weight matrices of a HookedTransformer or a TransformerBridge; the same names on both."""
    if isinstance(model, TransformerBridge):
        from apd_transformer_lens._bridge import BridgeAdapter

        return TargetModel(model, BridgeAdapter(), prepare=partial(_with_tokens, model))
    if HookedTransformer is not None and isinstance(model, HookedTransformer):
        from apd_transformer_lens._hooked_transformer import HookedTransformerAdapter

        return TargetModel(model, HookedTransformerAdapter(), prepare=partial(_with_masked_tokens, model))
    raise UnsupportedModel(
        f"{type(model).__module__}.{type(model).__name__} cannot be decomposed. Of transformer_lens, could be: a "
        "HookedTransformer or a TransformerBridge. Of anything else: a torch module with nn.Linear, Conv1D or "
        "nn.Embedding leaves, such as the Hugging Face model behind this one."
    )


def _with_tokens(model: Any, batch: Any) -> Any:
    """A batch with tokens in the place of texts, and a mask of what the tokenizer fills them up with."""
    given = _given(model, batch)
    texts = given.get("input")
    texts = [texts] if isinstance(texts, str) else texts
    if texts is None or not are_texts(texts):
        return batch
    if model.tokenizer is None:
        raise InvalidBatches(f"The batch is text, but this {type(model).__name__} has no tokenizer. Give tokens.")
    options = {name: given.pop(name) for name in ("prepend_bos", "padding_side") if name in given}
    tokens = model.to_tokens(list(texts), **options)
    lengths = torch.tensor([model.to_tokens(text, **options).shape[1] for text in texts])
    side = options.get("padding_side") or model.tokenizer.padding_side
    place = torch.arange(tokens.shape[1])
    place = place.flip(0) if side == "left" else place
    attention_mask = (place < lengths[:, None]).long().to(tokens.device)
    return {"attention_mask": attention_mask, **given, "input": tokens}


def _with_masked_tokens(model: Any, batch: Any) -> Any:
    """As `_with_tokens`; and of tokens with the mask that a HookedTransformer makes of them itself, where its tokenizer
    pads on the left."""
    batch = _with_tokens(model, batch)
    given = _given(model, batch)
    tokens, tokenizer = given.get("input"), model.tokenizer
    if (
        tokenizer is None
        or tokenizer.padding_side != "left"
        or not isinstance(tokens, torch.Tensor)
        or tokens.ndim != 2
        or tokens.is_floating_point()
    ):
        return batch
    if any(given.get(name) is not None for name in ("attention_mask", "past_kv_cache", "start_at_layer")):
        return batch
    from transformer_lens.utilities import get_attention_mask

    prepend_bos = given.get("prepend_bos", model.cfg.default_prepend_bos)
    return {**given, "attention_mask": get_attention_mask(tokenizer, tokens, prepend_bos)}


def _given(model: Any, batch: Any) -> dict[str, Any]:
    """What `model` is called with, by names."""
    args, kwargs = arguments(batch)
    bound = inspect.signature(type(model).forward).bind_partial(None, *args, **kwargs).arguments
    bound.pop("self", None)
    return bound | bound.pop("kwargs", {})
