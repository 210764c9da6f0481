import pytest
import torch
from support.words import tokenizer
from torch import nn

import apd_lens as apd
from apd_lens.language._words import called, decode_with, own_decode, tokens_of


def test_a_tokenizer_or_a_function():
    words = tokenizer()
    (italy,) = words(" Italy")["input_ids"]
    assert decode_with(words)(italy) == " Italy"
    assert decode_with(str)(3) == "3"
    model = nn.Linear(2, 2)
    assert own_decode(model) is None
    model.tokenizer = words
    decode = own_decode(model)
    assert decode is not None
    assert decode(italy) == " Italy"
    assert called(None, 3, "decode") == "3"
    with pytest.raises(apd.errors.InvalidSetting, match="Expected decode to give a string, got 3"):
        called(lambda token: token, 3, "decode")  # pyright: ignore[reportArgumentType]


def test_the_tokens_of_a_batch():
    model, tokens = nn.Linear(2, 2), torch.tensor([[1, 2]])
    assert tokens_of(tokens, model) == [1, 2]
    assert tokens_of({"attention_mask": torch.ones(1, 2, dtype=torch.long), "input_ids": tokens}, model) == [1, 2]
    assert tokens_of(torch.ones(1, 2), model) is None
    assert tokens_of(torch.ones(1, 2, dtype=torch.bool), model) is None
    model.to_tokens = lambda text: tokens
    assert tokens_of(["a text"], model) == [1, 2]
