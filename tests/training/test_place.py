"""Where a training is in its data: the same place again, and other data refused."""

from typing import Any

import pytest
import torch

import apd_lens as apd
from apd_lens.training._place import Place, can_be_found_again, digest_of, start_of, stream_from


def some(n: int = 5) -> list[torch.Tensor]:
    return list(torch.arange(n * 6.0).reshape(n, 2, 3))


def place_after(batches: Any, n_steps: int, looked_at: int) -> Place:
    """After so many steps, of which so many were looked at, as in a training that ends between two checkpoints."""
    place = start_of(batches)
    drawn = stream_from(place, batches, 0, "batches")
    for step in range(n_steps):
        batch = next(drawn)
        if step in (0, looked_at - 1):
            place = place.after(batches, step, batch)
    return place


@pytest.mark.parametrize(
    "make", [some, lambda: torch.utils.data.DataLoader(torch.arange(30.0), 6), lambda: lambda step: some()[step % 5]]
)
@pytest.mark.parametrize("n_steps", [1, 4, 5, 12])
def test_the_batches_go_on(make, n_steps: int):
    place = place_after(make(), n_steps, n_steps)
    expected = stream_from(Place(), make(), 0, "batches")
    for _ in range(n_steps):
        next(expected)
    came = stream_from(place, make(), n_steps, "batches")
    for _ in range(7):
        assert torch.equal(next(came), next(expected))


def test_other_batches_are_refused():
    place = place_after(some(), 3, 3)
    changed = some()
    changed[4] = changed[4] + 1
    for other, message in [
        (some(4), "batches was a list of 5 batches when the checkpoint was made, and has 4 now"),
        (changed, r"1 of the 5 batches of batches that were compared .* the first of them batches\[4\]"),
        (lambda step: some()[0] + 5, "gives for step 0 is another one"),
        (lambda step: some()[0], "gives for step 2 is another one"),
        (torch.utils.data.DataLoader(torch.arange(30.0), 3), "gives for step 0 is another one"),
        (iter(some()), "is a list_iterator, which gives each batch once"),
    ]:
        with pytest.raises(apd.errors.InvalidBatches, match=message):
            stream_from(place, other, 3, "batches")


def test_of_a_long_list_some_are_compared():
    place = start_of(some(1000))
    assert place.listed is not None
    assert 50 <= len(place.listed) <= 70
    other = some(1000)
    other[16 * 7] = other[16 * 7] + 1
    with pytest.raises(apd.errors.InvalidBatches, match=r"the first of them batches\[112\]"):
        stream_from(place, other, 3, "batches")


def test_generators_have_no_place():
    assert not can_be_found_again(iter(some()))
    assert not can_be_found_again(batch for batch in some())
    assert can_be_found_again(some())
    assert next(stream_from(Place(), iter(some()), 0, "batches")).shape == (2, 3)  # from the beginning


def test_digests():
    x, ids = torch.randn(3, 2), torch.tensor([1, 2])
    alike = [
        ((x, ids), (x.clone(), ids.clone())),
        ({"x": x, "ids": ids}, {"ids": ids, "x": x}),
        (["a text", "another"], ["a text", "another"]),
        ((x, [x, {"inside": ids}]), (x, [x.clone(), {"inside": ids}])),
        ((x, object()), (x, object())),
    ]
    for one, same in alike:
        assert digest_of(one) == digest_of(same)
    different = [
        x,
        x.double(),
        x.T,
        x + 1e-3,
        (x, ids),
        {"x": x},
        {"y": x},
        "a",
        "b",
        ["a"],
        (x, 1),
        (x, 2),
        (x, [ids]),
    ]
    assert len({digest_of(one) for one in different}) == len(different)


class Loader:
    def __init__(self, state: Any):
        self.state = state

    def __iter__(self):
        yield from some()

    def state_dict(self):
        return self.state

    def load_state_dict(self, state_dict):
        self.loaded = state_dict


def test_the_state_of_a_loader_comes_back_as_it_was():
    state = {
        "a": [1, 2.5, None, True, "x"],
        3: (b"\xff\x00", (), {}),
        "tensors": {"t": torch.arange(3), "u": torch.ones(2).bool()},
    }
    loader = Loader(state)
    place = place_after(loader, 4, 3)
    state["tensors"]["t"].zero_()  # it is a copy
    new = Loader({})
    came = stream_from(place, new, 4, "batches")
    assert torch.equal(new.loaded["tensors"].pop("t"), torch.arange(3))
    assert torch.equal(new.loaded["tensors"].pop("u"), torch.tensor([True, True]))
    assert new.loaded == {"a": [1, 2.5, None, True, "x"], 3: (b"\xff\x00", (), {}), "tensors": {}}
    assert type(new.loaded[3]) is tuple
    assert torch.equal(next(came), some()[1])  # one was passed over
    for _ in range(3):
        next(came)
    with pytest.warns(apd.errors.ApdWarning, match="put back by its load_state_dict, and begins another pass now"):
        assert torch.equal(next(came), some()[0])


def test_a_state_that_cannot_be_written_is_named():
    with pytest.raises(
        apd.errors.InvalidBatches, match="state_dict of the batches holds a set, which cannot be written"
    ):
        place_after(Loader({"a": {1, 2}}), 1, 1)
