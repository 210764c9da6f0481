import pytest
import torch
from support.words import Slow, tokenizer

import apd_lens as apd
from apd_lens.language import Template

COUNTRIES = ["France", "Burkina Faso", "Österreich"]
TEXT = "The capital of {country} is"


def slot_texts(prompts, tokens_to_text, slot: str = "country") -> list[str]:
    return [
        tokens_to_text(ids[mask].tolist()).strip()
        for ids, mask in zip(prompts.input_ids, prompts.slots[slot], strict=True)
    ]


@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize("eos", [False, True])
@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("make", [lambda fast: fast, Slow], ids=["fast", "slow"])
def test_tokens_of_a_slot(bos, eos, side, make):
    fast = tokenizer(bos, eos, side)
    prompts = Template(TEXT).prompts(make(fast), country=COUNTRIES)
    assert prompts.texts == [TEXT.format(country=country) for country in COUNTRIES]
    for ids, mask, text in zip(prompts.input_ids, prompts.attention_mask, prompts.texts, strict=True):
        assert ids[mask.bool()].tolist() == fast(text)["input_ids"]
    assert slot_texts(prompts, fast.decode) == COUNTRIES
    last = prompts.last_of("country")
    assert all(mask[i] and not mask[i + 1 :].any() for mask, i in zip(prompts.slots["country"], last, strict=True))
    padding = prompts.attention_mask[0, 0 if side == "left" else -1]
    assert padding == 0
    rows = torch.arange(3)
    assert prompts.attention_mask[rows, prompts.last].all()


@pytest.mark.parametrize("make", [lambda fast: fast, Slow], ids=["fast", "slow"])
def test_several_slots_at_the_ends(make):
    fast = tokenizer(bos=True, eos=True)
    prompts = Template("{name} is not {other}").prompts(
        make(fast), name=["Rome", "Old Paris"], other=["new", "Burkina"]
    )
    assert prompts.texts == ["Rome is not new", "Old Paris is not Burkina"]
    assert slot_texts(prompts, fast.decode, "name") == ["Rome", "Old Paris"]
    assert slot_texts(prompts, fast.decode, "other") == ["new", "Burkina"]


def test_a_function_as_a_tokenizer():
    prompts = Template("ab{x}d").prompts(lambda text: [ord(letter) for letter in text], x=["c", "ccc"])
    assert prompts.input_ids.tolist() == [[97, 98, 99, 100, 0, 0], [97, 98, 99, 99, 99, 100]]
    assert prompts.slots["x"].long().tolist() == [[0, 0, 1, 0, 0, 0], [0, 0, 1, 1, 1, 0]]
    assert prompts.last.tolist() == [3, 5]
    assert len(prompts) == 2


def test_prompts_of_one_length():
    prompts = Template(TEXT).prompts(tokenizer(), country=["France", "Italy", "Burkina Faso", "Rome"])
    groups = prompts.by_length()
    assert sorted(text for group in groups for text in group.texts) == sorted(prompts.texts)
    assert all(group.attention_mask.all() for group in groups)
    assert [int(group.lengths[0]) for group in groups] == sorted({int(length) for length in prompts.lengths})
    by_hand = Template(TEXT).prompts(tokenizer(), country=["France", "Rome"])
    for some in (prompts.some([0, 3]), prompts.some(torch.tensor([True, False, False, True]))):
        assert some.texts == by_hand.texts
        assert torch.equal(some.input_ids, by_hand.input_ids)
        assert torch.equal(some.slots["country"], by_hand.slots["country"])


def test_without_special_tokens():
    with_bos = tokenizer(bos=True)
    prompts = Template(TEXT, special_tokens=False).prompts(with_bos, country=["France"])
    assert prompts.input_ids[0].tolist() == with_bos(prompts.texts[0], add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Template("{} is"), "a name of its own"),
        (lambda: Template("{a} and {a}"), "a name of its own"),
        (lambda: Template("{a"), "braces"),
        (lambda: Template(TEXT).prompts(tokenizer()), "a list of words for each of the slots"),
        (lambda: Template(TEXT).prompts(tokenizer(), city=["Rome"]), r"slots \['country'\]"),
        (lambda: Template(TEXT).prompts(tokenizer(), country="Rome"), "a list of words"),
        (lambda: Template("{a} {b}").prompts(tokenizer(), a=["x"], b=["y", "z"]), "all of one length"),
        (lambda: Template(TEXT).prompts(tokenizer(), country=[]), "one word or more"),
        (lambda: Template(TEXT).prompts(tokenizer(), country=[""]), "no token of its own"),
        (lambda: Template(TEXT).prompts(tokenizer(), country=["Rome"]).last_of("city"), "no slot 'city'"),
    ],
)
def test_what_cannot_work_is_said(make, message):
    with pytest.raises(apd.errors.InvalidSetting, match=message):
        make()


def test_prompts_in_batches():
    prompts = Template(TEXT).prompts(tokenizer(), country=[*COUNTRIES, "Italy"])
    batches = prompts.batches(3)
    assert [len(batch["input_ids"]) for batch in batches] == [3, 1]
    assert torch.equal(batches[1]["input_ids"], prompts.some([3]).input_ids)  # without the padding of the others
    assert batches[1]["attention_mask"].all()
