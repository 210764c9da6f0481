"""Texts that a TransformerLens model makes tokens of itself: what it fills shorter ones up with is no data."""

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformer_lens import HookedTransformer, HookedTransformerConfig
from transformer_lens.model_bridge.sources._bridge_builder import build_bridge_from_module
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

import apd_lens as apd

pytestmark = pytest.mark.filterwarnings("ignore:HookedTransformer is deprecated:DeprecationWarning")

TEXTS = ["w1 w2", "w3 w4 w5 w6 w7 w8 w9", "w2 w2 w3 w1"]


@pytest.fixture
def tokenizer(tmp_path):
    words = ["<pad>", "<bos>", "<eos>", *(f"w{i}" for i in range(17))]
    model = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="<pad>"))
    model.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=model, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>"
    ).save_pretrained(tmp_path)
    return AutoTokenizer.from_pretrained(tmp_path)


def decomposition_of(model, weights: str, **settings) -> apd.Decomposition:
    settings = {"attribution": apd.AblationAttribution(), "selection": apd.BatchTopK(2.0), **settings}
    return apd.init(model, weights=weights, n_components=5, rank=2, **settings).decomposition()


def model_of(host: str, tokenizer, side: str, prepend_bos: bool):
    tokenizer.padding_side = side
    if host == "bridge":
        config = GPT2Config(n_layer=2, n_head=2, n_embd=16, n_positions=12, vocab_size=20, bos_token_id=1)
        model = GPT2LMHeadModel(config).eval()
        bridge = build_bridge_from_module(model, "GPT2LMHeadModel", hf_config=model.config, tokenizer=tokenizer)
        bridge.cfg.default_prepend_bos = prepend_bos
        return bridge
    config = HookedTransformerConfig(
        n_layers=2,
        d_model=16,
        n_ctx=12,
        d_head=8,
        n_heads=2,
        d_vocab=20,
        act_fn="gelu",
        seed=0,
        device="cpu",
        default_prepend_bos=prepend_bos,
    )
    model = HookedTransformer(config, tokenizer=tokenizer).eval()
    model.tokenizer.padding_side = side
    return model


@pytest.mark.parametrize("prepend_bos", [False, True])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("host", ["HookedTransformer", "bridge"])
def test_texts_in_one_batch_are_those_of_each_alone(host: str, side: str, prepend_bos: bool, tokenizer):
    torch.manual_seed(0)
    model = model_of(host, tokenizer, side, prepend_bos)
    decomposition = decomposition_of(model, "*mlp*")
    together = decomposition.attributions(TEXTS)
    for index, text in enumerate(TEXTS):
        for alone in (text, [text], model.to_tokens(text)):
            torch.testing.assert_close(together[index], decomposition.attributions(alone)[0], rtol=1e-4, atol=1e-6)
    of_positions = decomposition_of(model, "*mlp*", selection=apd.BatchTopK(2.0, granularity="position"))
    n_tokens = sum(model.to_tokens(text).numel() for text in TEXTS)
    assert of_positions.select(TEXTS).sum() == 2 * n_tokens
    assert apd.responses(of_positions, [TEXTS]).n_data_points == n_tokens


@pytest.mark.parametrize("prepend_bos", [False, True])
def test_tokens_that_a_hooked_transformer_masks_itself(prepend_bos: bool, tokenizer):
    """With a tokenizer that pads on the left."""
    model = model_of("HookedTransformer", tokenizer, "left", prepend_bos)
    decomposition = decomposition_of(model, "*mlp*")
    torch.testing.assert_close(decomposition.attributions(model.to_tokens(TEXTS)), decomposition.attributions(TEXTS))


def test_a_prompt_without_a_batch_axis(tokenizer):
    model = model_of("HookedTransformer", tokenizer, "right", False)
    decomposition = decomposition_of(model, "*")
    with pytest.raises(apd.ShapeMismatch, match=r"give it a batch axis: x\[None\]"):
        decomposition.attributions(torch.arange(5))
    mask = decomposition.select(torch.arange(5)[None])
    with decomposition.sparse(mask):
        assert model(torch.arange(5)).shape == (1, 5, 20)
    with decomposition.sparse(mask.expand(5, -1)), pytest.raises(apd.ShapeMismatch, match="called with 1"):
        model(torch.arange(5))


def test_a_model_without_a_tokenizer():
    config = HookedTransformerConfig(n_layers=1, d_model=8, n_ctx=8, d_head=4, d_vocab=9, act_fn="gelu", seed=0)
    with pytest.raises(apd.errors.InvalidBatches, match="has no tokenizer"):
        decomposition_of(HookedTransformer(config), "*mlp*").attributions(TEXTS)
