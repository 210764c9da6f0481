"""Several streams in one step: what each asks for is added up."""

from dataclasses import replace

import pytest
import torch
from support.toy_models import ResidualMLP
from torch.testing import assert_close

import apd_lens as apd
from apd_lens.masks._selection import Needed
from apd_lens.training._streams import Stream


def states() -> tuple[apd.State, apd.State]:
    """With the settings of a stream of its own each, and the same components."""
    torch.manual_seed(1)
    model = ResidualMLP(4, 6, 5, 1)
    first = apd.Losses(path=0.0, normalization="paper", simplicity=0.5)
    second = apd.Losses(faithfulness=0.0, simplicity=0.0, minimality=3.0, path=0.0, normalization="paper")
    options = {"n_components": 5, "rank": 2, "moves": None, "seed": 3}
    return (
        apd.init(model, losses=first, selection=apd.TopK(1), **options),
        apd.init(model, losses=second, selection=apd.TopK(3), **options),
    )


def test_the_losses_of_two_streams_are_added_up():
    first, second = states()
    x, y = torch.randn(8, 4), torch.randn(6, 4)
    both = replace(first, others=(Stream(second.settings.masking, second.settings.losses, "others"),))
    _, info = apd.step(both, x, y)
    _, info_first = apd.step(states()[0], x)
    _, info_second = apd.step(second, y)
    assert_close(info.loss, info_first.loss + info_second.loss)
    assert info.terms.keys() == {*info_first.terms, *(f"others {name}" for name in info_second.terms)}
    assert_close(info.terms["others minimality"], info_second.terms["minimality"])
    assert info.k == info_first.k == 1


def test_a_batch_that_comes_again_is_watched_once_in_each_stream():
    first, second = states()
    x, y = torch.randn(8, 4), torch.randn(6, 4)
    both = replace(first, others=(Stream(second.settings.masking, second.settings.losses, "others"),))
    once, _ = apd.step(both, x, y)
    again, _ = apd.step(once, x, y)
    assert [seen.watched for seen in again.seen] == [seen.watched for seen in once.seen]


def test_the_maskings_of_all_streams_go_on_and_are_restored():
    first, second = states()
    masking = apd.Attributed(selection=apd.BatchTopK(Needed(hold=0.0), least=0.1))
    both = replace(first, others=(Stream(masking, second.settings.losses, "others"),))
    on, _ = apd.step(both, torch.randn(8, 4), torch.randn(6, 4))
    assert on.others[0].masking.selection.k.now != masking.selection.k.now
    fresh = replace(states()[0], others=both.others)
    assert fresh.restored(on.tensors()).others == on.others


def test_every_stream_needs_a_batch():
    first, _ = states()
    with pytest.raises(apd.InvalidBatches, match="a batch for each of the 1 streams, got 2"):
        apd.step(first, torch.randn(8, 4), torch.randn(6, 4))
