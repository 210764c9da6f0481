import pytest
import torch
from support.bridges import hugging_face_model
from support.toy_models import TinyGPT, tiny_gpt2, tiny_llama
from support.words import tokenizer

import apd_lens as apd
from apd_lens.language import sample_texts

STARTS = [3, 4, 5]


class Counted(torch.nn.Module):
    """Tells how many positions each forward had."""

    def __init__(self, model):
        super().__init__()
        self.model, self.seen = model, []

    def forward(self, tokens):
        self.seen.append(tokens.shape[1])
        return self.model(tokens).logits


@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2])
def test_with_keys_and_values_kept_texts_are_those_without(make):
    model = make()
    seen = []
    handle = model.get_input_embeddings().register_forward_hook(lambda m, args, out: seen.append(out.shape[1]))
    texts = sample_texts(model, n=70, length=8, starts=STARTS)
    handle.remove()
    assert set(seen) == {1}
    plain = Counted(model)
    plain.config = model.config
    assert torch.equal(texts, sample_texts(plain, n=70, length=8, starts=STARTS))
    assert set(plain.seen) == set(range(1, 8))
    assert texts.shape == (70, 8)
    assert texts[:4, 0].tolist() == [3, 4, 5, 3]


def test_a_seed_gives_the_same_texts_and_torchs_own_state_is_not_used():
    model = tiny_llama()
    before = torch.get_rng_state()
    texts = sample_texts(model, n=6, length=5, starts=STARTS, seed=1)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(texts, sample_texts(model, n=6, length=5, starts=STARTS, seed=1))
    assert not torch.equal(texts, sample_texts(model, n=6, length=5, starts=STARTS, seed=2))
    assert not model.training


def test_the_frequencies_are_the_models_probabilities():
    model, n = tiny_llama(bos_token_id=None, eos_token_id=None), 4000
    texts = sample_texts(model, n=n, length=2, starts=[3], temperature=2.0)
    expected = (model(torch.tensor([[3]])).logits[0, 0] / 2).softmax(-1)
    assert (texts[:, 1].bincount(minlength=13) / n - expected).abs().max() < 0.03  # four standard deviations
    coldest = sample_texts(model, n=3, length=2, starts=[3], temperature=1e-4)
    assert set(coldest[:, 1].tolist()) == {int(expected.argmax())}


def test_what_ends_texts_is_never_sampled():
    texts = sample_texts(tiny_llama(bos_token_id=1, eos_token_id=[2, 7]), n=100, length=12, starts=STARTS)
    assert not {1, 2, 7} & set(texts.unique().tolist())


def test_starts_of_the_models_own():
    model = tiny_llama(bos_token_id=1, eos_token_id=2)
    texts = sample_texts(model, n=20, length=3)
    probability = model(torch.tensor([[1]])).logits[0, -1].softmax(-1)
    likely = [token for token in probability.argsort(descending=True).tolist() if token not in (1, 2)]
    assert texts[:, 0].tolist() == (likely * 2)[:20]


def test_starts_are_words_where_a_tokenizer_tells_them():
    words = tokenizer(bos=True)
    model = hugging_face_model("llama", vocab_size=len(words))
    texts = sample_texts(model, n=20, length=4, tokenizer=words)
    assert set(texts[:, 0].tolist()) == {words.bos_token_id}  # as the tokenizer begins every text
    firsts = {words.decode([token]) for token in texts[:, 1].tolist()}
    assert firsts <= {word for word in (words.decode([i]) for i in range(len(words))) if word[:1].isupper()}
    assert "The" in firsts


def test_inside_other_hosts():
    pytest.importorskip("transformer_lens")
    from transformer_lens.model_bridge.sources._bridge_builder import build_bridge_from_module

    model = hugging_face_model("llama")
    expected = sample_texts(model, n=5, length=6, starts=STARTS)
    bridge = build_bridge_from_module(model, "LlamaForCausalLM", hf_config=model.config, tokenizer=None)
    assert torch.equal(sample_texts(bridge, n=5, length=6, starts=STARTS), expected)
    nnsight = pytest.importorskip("nnsight")
    model = hugging_face_model("llama")
    assert torch.equal(sample_texts(nnsight.NNsight(model), n=5, length=6, starts=STARTS), expected)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n": 0}, "above 0"),
        ({"temperature": 0.0}, "above 0"),
        ({"length": 2, "starts": torch.tensor([[1, 2, 3]])}, "texts longer than them"),
        ({"starts": []}, "one start or more"),
        ({}, "Give starts="),
    ],
)
def test_what_cannot_work_is_said(options, message):
    with pytest.raises(apd.errors.InvalidSetting, match=message):
        sample_texts(TinyGPT(), **{"n": 2, "length": 4, **options})
