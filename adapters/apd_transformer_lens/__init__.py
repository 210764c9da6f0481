"""apd_lens for TransformerLens: every matrix of a HookedTransformer (3.9) or a TransformerBridge (3.9 and 4)."""

from typing import Any

from apd_lens import MissingExtra, TargetModel, UnsupportedModel

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

        return TargetModel(model, BridgeAdapter())
    if HookedTransformer is not None and isinstance(model, HookedTransformer):
        from apd_transformer_lens._hooked_transformer import HookedTransformerAdapter

        return TargetModel(model, HookedTransformerAdapter())
    raise UnsupportedModel(
        f"{type(model).__module__}.{type(model).__name__} cannot be decomposed. Of transformer_lens, could be: a "
        "HookedTransformer or a TransformerBridge. Of anything else: a torch module with nn.Linear, Conv1D or "
        "nn.Embedding leaves, such as the Hugging Face model behind this one."
    )
