"""apd_lens for TransformerLens: every matrix of a HookedTransformer."""

from apd_transformer_lens._hooked_transformer import HookedTransformerAdapter as HookedTransformerAdapter
