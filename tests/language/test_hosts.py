"""A targeted decomposition of one model is the same through every host."""

import pytest
import torch
from nnsight import NNsight
from support.bridges import bridge_of
from support.toy_models import tiny_llama
from torch.testing import assert_close

import apd_lens as apd

PATTERNS = {
    "Hugging Face": "model.layers.2.self_attn.[vo]_proj*",
    "nnsight": "model.layers.2.self_attn.[vo]_proj*",
    "TransformerBridge": "blocks.2.attn.W_[VO]",
}


def decomposed(host: str) -> apd.Decomposition:
    torch.manual_seed(0)
    model = tiny_llama(num_hidden_layers=3, num_attention_heads=2)
    hosts = {
        "Hugging Face": lambda: model,
        "nnsight": lambda: NNsight(model),
        "TransformerBridge": lambda: bridge_of(model),
    }
    generator = torch.Generator().manual_seed(1)
    prompts = torch.randint(13, (7, 5), generator=generator)
    texts = torch.randint(13, (8, 6), generator=generator)
    return apd.decompose(
        hosts[host](),
        list(prompts.split(4)),
        PATTERNS[host],
        n_components=9,
        others=list(texts.split(4)),
        progress=False,
        **apd.language_model(steps=6),
    )


@pytest.fixture(scope="module")
def of_hugging_face() -> apd.Decomposition:
    return decomposed("Hugging Face")


@pytest.mark.parametrize("host", ["nnsight", "TransformerBridge"])
def test_components_are_those_of_hugging_face(host: str, of_hugging_face: apd.Decomposition):
    other = decomposed(host)
    names = zip(of_hugging_face.components.names, other.components.names, strict=True)
    for one, same in names:
        assert_close(
            other.components.component_weights(same),
            of_hugging_face.components.component_weights(one),
            rtol=1e-3,
            atol=1e-5,
        )
