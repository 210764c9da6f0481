from collections import namedtuple

import pytest
import torch
from torch import nn

import apd_lens as apd
from apd_lens.data._batch import Kept, arguments, call, joined, mapped, on_device, same_but_for_examples, tensors

x, y = torch.arange(6.0).view(3, 2), torch.ones(3)
Pair = namedtuple("Pair", "x y")


@pytest.mark.parametrize(
    ("batch", "args", "kwargs"),
    [
        (x, (x,), {}),
        ((x, y), (x, y), {}),
        ([x, y], (x, y), {}),
        ({"x": x, "flag": True}, (), {"x": x, "flag": True}),
        (["a", "b"], (["a", "b"],), {}),
        (("a", "b"), (("a", "b"),), {}),
    ],
)
def test_what_a_model_is_called_with(batch, args, kwargs):
    came = arguments(batch)
    assert len(came[0]) == len(args)
    assert all(one is other or one == other for one, other in zip(came[0], args, strict=True))
    assert came[1] == kwargs


def test_mapping_keeps_the_kind_of_a_batch():
    for batch in (x, (x, y), [x, y], Pair(x, y), {"x": x}):
        changed = mapped(batch, lambda _, value: value + 1)
        assert type(changed) is type(batch)
        assert [torch.equal(one, other + 1) for one, other in zip(tensors(changed), tensors(batch), strict=True)]
    assert mapped((x, y), lambda place, value: place) == (0, 1)


def test_a_batch_that_a_model_cannot_take_is_named():
    with pytest.raises(apd.errors.InvalidBatches, match=r"Linear cannot be called with .*\(Tensor, Tensor\)"):
        call(nn.Linear(2, 1), (x, y))


def test_batches_of_one_example_are_joined():
    batches = [{"x": x[i : i + 1], "scale": 2.0} for i in range(3)]
    assert len({same_but_for_examples(batch, {"x"}) for batch in batches}) == 1
    assert torch.equal(joined(batches, {"x"})["x"], x)
    assert same_but_for_examples({"x": x[:1], "scale": 1.0}, {"x"}) != same_but_for_examples(batches[0], {"x"})


def test_a_kept_batch_knows_whether_it_is_the_same():
    batch = x.clone()
    kept = Kept.of(batch)
    assert kept.is_same(batch)
    assert not kept.is_same(batch.clone())
    batch.numpy()[0, 0] = 7.0  # which torch does not count
    assert not kept.is_same(batch)


def test_tensors_of_inference_mode_are_copied():
    with torch.inference_mode():
        made = torch.ones(2)
    assert not on_device(made, torch.device("cpu")).is_inference()
    assert on_device(x, torch.device("cpu")) is x
