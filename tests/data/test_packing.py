"""Several documents in one row, kept apart by the attention mask, are what they are one by one."""

from typing import Any

import pytest
import torch
from support.bridges import bridge
from support.toy_models import decomposition_of, tiny_gpt2, tiny_llama
from torch import Tensor
from torch.testing import assert_close

import apd_lens as apd
from apd_lens._settings import Attribution
from apd_lens.data._inputs import read_batch

# The documents of two rows of 8, the first without padding.
LENGTHS = ((5, 3), (2, 1, 4))
WIDTH = 8
HOSTS = {
    "gpt2": (tiny_gpt2, "transformer.h.*"),
    "gpt2, eager": (lambda: tiny_gpt2(attn_implementation="eager"), "transformer.h.*"),
    "llama": (tiny_llama, "model.layers.*"),
    "bridge of llama": (lambda: bridge("llama"), "blocks.*"),
}
GRADIENT, ABLATION = apd.GradientAttribution("exact"), apd.AblationAttribution()


def documents() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(2, 11, (n,), generator=generator) for row in LENGTHS for n in row]


def packed(apart: bool = True, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Tokens, their places in the documents, and who attends to whom."""
    tokens, places = torch.zeros(2, WIDTH, dtype=torch.long), torch.zeros(2, WIDTH, dtype=torch.long)
    attends = torch.zeros(2, 1, WIDTH, WIDTH, dtype=torch.bool)
    left = documents()
    for row, lengths in enumerate(LENGTHS):
        start = 0
        for n in lengths:
            here = slice(start, start + n)
            tokens[row, here], places[row, here] = left.pop(0), torch.arange(n)
            attends[row, 0, here, here if apart else slice(0, start + n)] = True
            start += n
    attends = attends.tril()
    mask = attends if dtype == torch.bool else torch.where(attends, 0.0, torch.finfo(dtype).min).to(dtype)
    return {"input_ids": tokens, "attention_mask": mask, "position_ids": places}


def one_by_one() -> dict[str, Tensor]:
    """The documents in rows of their own, padded."""
    rows = torch.nn.utils.rnn.pad_sequence(documents(), batch_first=True)
    lengths = torch.tensor([n for row in LENGTHS for n in row])
    return {"input_ids": rows, "attention_mask": (torch.arange(rows.shape[1]) < lengths[:, None]).long()}


def of_documents(values: Tensor, batch: dict[str, Tensor]) -> Tensor:
    """Of all real positions, document after document."""
    valid = read_batch(batch).valid
    assert valid is not None and int(valid.sum()) == sum(map(sum, LENGTHS))  # noqa: PT018
    return values[valid]


def both(host: str, attribution: Attribution, selection: Any, **options: Any) -> list[tuple[apd.training.State, dict]]:
    make_model, weights = HOSTS[host]
    states = []
    for batch in (packed(), one_by_one()):
        if host.startswith("bridge"):
            batch["input"] = batch.pop("input_ids")
        torch.manual_seed(0)
        state = apd.init(make_model(), weights=weights, n_components=4, rank=2, attribution=attribution,
                         selection=selection, **options)  # fmt: skip
        states.append((state, batch))
    return states


@pytest.mark.parametrize("attribution", [GRADIENT, ABLATION], ids=["gradient", "ablation"])
@pytest.mark.parametrize("host", HOSTS)
def test_attributions_masks_and_sparse_outputs_are_those_of_each_document(host: str, attribution):
    attributions, masks, outputs = [], [], []
    for state, batch in both(host, attribution, apd.BatchTopK(1.5, "position")):
        decomposition = state.decomposition()
        attributions.append(of_documents(decomposition.attributions(batch), batch))
        mask = decomposition.select(batch)
        masks.append(of_documents(mask, batch))
        with decomposition.sparse(mask), torch.no_grad():
            value = decomposition.target.model(**batch)
        outputs.append(of_documents(getattr(value, "logits", value), batch))
    assert_close(attributions[0], attributions[1], rtol=1e-4, atol=1e-5)
    assert torch.equal(masks[0], masks[1])
    assert masks[0].sum() == int(1.5 * 15)
    assert_close(outputs[0], outputs[1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("host", HOSTS)
def test_a_training_step_is_that_on_the_documents_one_by_one(host: str):
    losses = apd.Losses(distance="kl", path=0.0)
    infos = []
    for state, batch in both(host, GRADIENT, apd.BatchTopK(1.5, "position"), losses=losses):
        for _ in range(2):
            state, info = apd.step(state, batch)
        infos.append(info)
    assert infos[0].k == pytest.approx(infos[1].k)
    for name, term in infos[0].terms.items():
        assert_close(term, infos[1].terms[name], rtol=1e-5, atol=1e-5)


def test_documents_that_see_each_other_are_not_apart():
    """The null control of the tests above."""
    decomposition = decomposition_of(tiny_gpt2(), "transformer.h.*", selection=apd.TopK(2, "position"))
    came = decomposition.attributions(packed(apart=False))
    expected = decomposition.attributions(packed())
    assert ((came - expected).abs() / expected.clamp_min(1e-6)).max() > 0.1


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32, torch.bfloat16])
def test_lengths_of_documents_and_padding_are_read_off_the_mask(dtype: torch.dtype):
    batch = packed(dtype=dtype)
    expected = torch.tensor([[5, 5, 5, 5, 5, 3, 3, 3], [2, 2, 1, 4, 4, 4, 4, 0]])
    assert torch.equal(read_batch(batch).document_lengths, expected)
    assert torch.equal(read_batch(batch).valid, expected > 0)
    assert torch.equal(
        read_batch(packed(apart=False, dtype=dtype)).document_lengths, torch.tensor([[8] * 8, [7] * 7 + [0]])
    )
    shared = {**batch, "attention_mask": batch["attention_mask"][:1]}
    assert torch.equal(read_batch(shared).document_lengths, expected[:1].expand(2, -1))
    window = batch["attention_mask"][:, 0].clone()  # each attends to itself and the one before
    window[:, torch.ones(WIDTH, WIDTH).tril(-2).bool()] = False if dtype == torch.bool else torch.finfo(dtype).min
    assert torch.equal(read_batch({**batch, "attention_mask": window}).document_lengths, expected)


def test_padding_may_attend_to_others_and_stand_anywhere():
    """As a mask `batch pos` is made into one of queries and keys; the first, third and last position are padding."""
    attention_mask = torch.tensor([[0, 1, 0, 1, 1, 0]])
    expanded = (attention_mask.bool()[:, None, None] & torch.ones(6, 6, dtype=torch.bool).tril()).expand(1, 1, 6, 6)
    batch = {"input_ids": torch.zeros(1, 6, dtype=torch.long), "attention_mask": expanded}
    assert torch.equal(read_batch(batch).valid, attention_mask.bool())
    assert read_batch(batch).document_lengths.tolist() == [[0, 3, 3, 3, 3, 0]]
    assert read_batch({**batch, "attention_mask": attention_mask}).document_lengths is None


def test_minus_infinity_in_a_mask_is_no_error():
    """The row without padding: where all scores are minus infinity, the host itself makes NaN of them."""
    gpt2 = tiny_gpt2(attn_implementation="eager")
    decomposition = decomposition_of(gpt2, "transformer.h.*", selection=apd.TopK(2, "position"))
    finite = {name: value[:1] for name, value in packed().items()}
    infinite = finite | {"attention_mask": torch.where(finite["attention_mask"] == 0, 0.0, -torch.inf)}
    assert_close(decomposition.attributions(infinite), decomposition.attributions(finite), rtol=1e-4, atol=1e-5)
    nan = finite | {"attention_mask": torch.full_like(finite["attention_mask"], torch.nan)}
    with pytest.raises(apd.NonFinite, match="input tensor 1 of the batch"):
        decomposition.attributions(nan)
