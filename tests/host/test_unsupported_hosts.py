"""Models that cannot be taken apart: what is said instead, as a user reads it. In a process of their own."""

from support import outside


def test_other_models_of_transformer_lens():
    came = outside.errors_of(
        """
        import warnings
        warnings.filterwarnings("ignore")
        import apd_lens as apd
        from nnsight import NNsight
        from transformer_lens.hook_points import HookPoint
        part = HookPoint()  # there is one in transformer-lens 3 and 4
        """,
        ["apd.wrap(part)", "apd.wrap(NNsight(part))"],
    )
    for message in came:
        assert "UnsupportedModel: transformer_lens." in message
        assert "HookPoint cannot be decomposed. Of transformer_lens, could be: " in message
        assert "a HookedTransformer or a TransformerBridge. " in message


def test_parts_of_nnsight_models_and_what_is_not_loaded():
    came = outside.errors_of(
        """
        import torch
        import apd_lens as apd
        from nnsight import NNsight
        model = NNsight(torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Sequential(torch.nn.Linear(2, 2))))
        meta = NNsight(torch.nn.Linear(2, 2, device="meta"))
        """,
        ["apd.wrap(model)", "apd.wrap(model[1])", "apd.wrap(meta)"],
    )
    assert came == [
        "no error",
        "UnsupportedModel: Expected a whole nnsight model, got its part model.1. Give the whole, and choose its "
        "matrices by name: weights=['1.*'].",
        "UnsupportedModel: The weights of this NNsight are not loaded yet: they are on the meta device. Load them "
        "first; a TransformersModel does with dispatch=True.",
    ]
