from types import SimpleNamespace

import pytest
import torch

import apd_lens as apd
from apd_lens.data._inputs import read_batch
from apd_lens.passes._output import default_output, explained_output


def explained(value, batch=None, output=default_output):
    return explained_output(output, value, read_batch(torch.ones(3, 4) if batch is None else batch))


def test_a_tensor_or_its_logits():
    y = torch.ones(3, 2)
    assert default_output(y) is y
    assert explained(SimpleNamespace(logits=y)) is y
    assert explained((y, 1), output=lambda value: value[0]) is y


@pytest.mark.parametrize(
    ("value", "error", "message"),
    [
        ((1, 2), apd.errors.InvalidOutput, "got tuple"),
        (torch.ones(3, 2, dtype=torch.long), apd.errors.InvalidOutput, r"a tensor of torch\.int64"),
        (torch.ones(2, 2), apd.ShapeMismatch, r"with 3 examples, got \(2, 2\)"),
        (torch.ones(3), apd.ShapeMismatch, r"got \(3,\)"),
    ],
)
def test_what_cannot_be_explained_is_refused(value, error, message):
    with pytest.raises(error, match=message):
        explained(value)


def test_an_output_of_some_positions_of_a_padded_batch():
    batch = {"input_ids": torch.ones(2, 3, dtype=torch.long), "attention_mask": torch.tensor([[1, 1, 1], [0, 1, 1]])}
    logits = torch.ones(2, 3, 4, requires_grad=True) * 1
    assert explained(logits, batch, lambda y: y[:, -1]).shape == (2, 4)
    with pytest.raises(apd.ShapeMismatch, match="some of them are padding"):
        explained(logits, batch, lambda y: y[:, 0])
