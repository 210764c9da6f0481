from itertools import islice

import pytest

import apd_lens as apd
from apd_lens.data._stream import check_again, one_pass, stream


def test_an_iterable_is_gone_through_again_and_a_function_is_asked_for_each_step():
    assert list(islice(stream([1, 2, 3]), 7)) == [1, 2, 3, 1, 2, 3, 1]
    assert list(islice(stream(lambda step: step**2, first_step=2), 3)) == [4, 9, 16]


def test_one_pass_gives_every_batch_once():
    assert list(one_pass(iter([1, 2]))) == [1, 2]
    with pytest.raises(apd.errors.InvalidBatches, match="empty, or was used up"):
        list(one_pass([]))


def test_a_stream_that_ends_is_an_error():
    with pytest.raises(apd.errors.InvalidBatches, match="ended after 2 and cannot be gone through again"):
        list(stream(iter([1, 2])))
    with pytest.raises(apd.errors.InvalidBatches, match="is empty"):
        list(stream([]))


def test_a_generator_cannot_be_gone_through_twice():
    check_again([1], times=2)
    with pytest.raises(apd.errors.InvalidBatches, match="gone through 2 times"):
        check_again(iter([1]), times=2)
