import torch

from apd_lens._draws import draws


def numbers(*what: str | int) -> list[float]:
    return torch.rand(3, generator=draws(*what)).tolist()


def test_numbers_depend_on_the_seed_and_on_every_purpose():
    named = [(0, "path", 1), (1, "path", 1), (0, "path", 2), (0, "moves", 1), (0, "path"), (0, "path1")]
    assert len({tuple(numbers(*what)) for what in named}) == len(named)


def test_numbers_do_not_depend_on_what_was_drawn_before():
    expected = numbers(3, "path", 7)
    torch.rand(5)
    numbers(3, "path", 6)
    assert numbers(3, "path", 7) == expected
