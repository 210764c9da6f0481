import pytest
import torch
from support.padding import padded
from support.toy_models import decomposition_of, tiny_llama

import apd_lens as apd
from apd_lens.language import component_tokens
from apd_lens.passes._positions import LastPosition


def decode(token: int) -> str:
    return f" t{token}"


def decomposition(granularity: str = "position", output=None) -> apd.Decomposition:
    made = decomposition_of(tiny_llama(), "*.mlp.*", selection=apd.TopK(1, granularity=granularity))  # pyright: ignore[reportArgumentType]
    output = made.output if output is None else output
    return apd.Decomposition(made.target, made.components, made.settings, output, made.fingerprints)


@pytest.mark.parametrize("granularity", ["position", "example"])
def test_places_and_probabilities(granularity: str):
    made, batch = decomposition(granularity, LastPosition()), padded()
    found = component_tokens(made, batch, decode, places=2, outputs=3)
    attributions = made.attributions(batch)
    model = made.target.model
    for c, places in enumerate(found.places):
        of_examples = attributions[..., c] if granularity == "example" else attributions[..., c].amax(1)
        assert [place.example for place in places] == of_examples.topk(2).indices.tolist()
        for place in places:
            assert place.token == decode(int(batch["input_ids"][place.example, place.position]))
            assert f"‹{place.token}›" in place.text
            assert "t0" not in place.text  # padding
            if granularity == "position":
                assert place.position == int(attributions[place.example, :, c].argmax())
        counted = [place for place in places if place.active] or places
        numbers = [place.example for place in counted]
        last = batch["attention_mask"].sum(1) - 1
        whole = model(**batch).logits[torch.arange(3), last].softmax(-1)
        with made.ablate(c):
            without = model(**batch).logits[torch.arange(3), last].softmax(-1)
        change = (whole - without)[numbers].mean(0)
        up = change.topk(3)
        assert [token for token, _ in found.raises[c]] == [decode(int(i)) for i in up.indices[up.values > 0]]
        assert [by for _, by in found.raises[c]] == pytest.approx(up.values[up.values > 0].tolist(), abs=1e-5)
        down = change.topk(3, largest=False)
        assert [token for token, _ in found.lowers[c]] == [decode(int(i)) for i in down.indices[down.values < 0]]


def test_it_is_readable():
    pytest.importorskip("pandas")
    batch = torch.randint(13, (4, 12))
    found = component_tokens(decomposition(), [batch], lambda token: f" a long word{token}\n", outputs=4)
    lines = str(found).splitlines()
    assert max(map(len, lines)) <= 120
    assert len(lines) < 60
    assert lines[0].startswith("component ")
    assert "‹ a long word" in lines[2] + lines[3]
    table = found.table()
    assert list(table.columns[:5]) == ["component", "active", "example", "position", "attribution"]
    assert len(table) == 3 * len(found.places)


def test_what_cannot_work_is_said():
    with pytest.raises(apd.errors.InvalidSetting, match=r"has no tokenizer of its own\. Give decode="):
        component_tokens(decomposition(), torch.randint(13, (2, 4)))
    with pytest.raises(apd.errors.InvalidSetting, match="to give a string"):
        component_tokens(decomposition(), torch.randint(13, (2, 4)), lambda token: token)
