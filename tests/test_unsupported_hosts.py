"""Models that cannot be taken apart yet: what is said instead. In processes of their own: nnsight changes torch."""

import outside


def test_other_models_of_transformer_lens():
    came = outside.errors_of(
        """
        import warnings
        warnings.filterwarnings("ignore")
        import apd_lens as apd
        from transformer_lens import HookedEncoder, HookedTransformerConfig
        from transformer_lens.config import TransformerBridgeConfig
        from transformer_lens.model_bridge import TransformerBridge
        sizes = dict(n_layers=1, d_model=8, n_ctx=4, d_head=4, n_heads=2, d_mlp=8, d_vocab=9, act_fn="gelu")
        encoder = HookedEncoder(HookedTransformerConfig(**sizes, device="cpu"))
        bridge = TransformerBridge.boot_native(TransformerBridgeConfig(**sizes, normalization_type="LN", seed=0))
        """,
        ["apd.wrap(encoder)", "apd.wrap(bridge)"],
    )
    for message, name in zip(came, ("HookedEncoder", "TransformerBridge"), strict=True):
        assert "UnsupportedModel: transformer_lens." in message
        assert f"{name} cannot be decomposed. Of transformer_lens, could be: a HookedTransformer." in message


def test_nnsight_models_and_what_is_inside_them():
    came = outside.errors_of(
        """
        import warnings
        warnings.filterwarnings("ignore")
        import torch
        import apd_lens as apd
        from nnsight import NNsight
        module = torch.nn.Sequential(torch.nn.Linear(2, 2))
        apd.wrap(module)
        wrapped = NNsight(module)
        """,
        ["apd.wrap(wrapped)", "apd.wrap(module)"],
    )
    assert "is not supported" in came[0]
    assert came[0].startswith("UnsupportedModel: ")
    assert "This Sequential is inside an nnsight model, which is not supported yet." in came[1]
