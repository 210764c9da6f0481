import pytest
import torch
from support.padding import padded
from support.toy_models import TinyGPT, tiny_llama
from support.words import tokenizer

import apd_lens as apd
from apd_lens.language import known


def test_the_answer_behind_the_last_position_that_is_data():
    model, batch = tiny_llama(), padded()
    found = known(model, batch)
    logits = model(**batch).logits[torch.arange(3), batch["attention_mask"].sum(1) - 1]
    probability, token = logits.detach().softmax(-1).max(-1)
    torch.testing.assert_close(found.probability, probability)
    assert torch.equal(found.token, token)
    assert torch.equal(found.is_known, probability >= 0.15)
    floor = float(probability.sort().values[1])
    above = known(model, batch, floor=floor)
    assert above.which == [i for i in range(3) if probability[i] >= floor]
    right = token.clone()
    right[0] += 1
    assert known(model, batch, right, floor=0.0).which == [1, 2]
    assert known(model, batch, right.tolist(), floor=0.0).which == [1, 2]
    assert found.table()["token"].tolist() == token.tolist()
    assert str(known(model, batch, right, floor=0.0)).startswith("2 of 3 prompts known (most likely token, probab")


def test_answers_in_words():
    words = tokenizer()
    model = TinyGPT(d_vocab=len(words))
    tokens = torch.randint(len(words), (2, 5))
    word = words.decode([int(known(model, tokens).token[0])])
    (italy,) = words(" Italy")["input_ids"]
    found = known(model, tokens, ["Italy", "Italy"], floor=0.0, tokenizer=words)
    assert found.is_known.tolist() == (found.token == italy).tolist()
    assert isinstance(word, str)
    with pytest.raises(apd.errors.InvalidSetting, match="need tokenizer="):
        known(model, tokens, ["Italy", "Italy"])
    with pytest.raises(apd.ShapeMismatch, match="one answer for each of the 2 prompts"):
        known(model, tokens, [1])
