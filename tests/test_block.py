"""tests/host/test_interrupts.py has the interrupts."""

import pytest

import apd_lens as apd
from apd_lens._block import Block, Part, Together


class Noted(Part):
    def __init__(self, name: str, seen: list[str], fails: bool = False):
        self.name, self.seen, self.fails = name, seen, fails

    def do(self) -> str:
        self.seen.append(f"do {self.name}")
        if self.fails:
            raise ValueError(self.name)
        return self.name

    def undo(self) -> None:
        self.seen.append(f"undo {self.name}")


def test_a_block_gives_what_its_part_does_and_undoes_it():
    seen: list[str] = []
    block = Block(lambda: Noted("a", seen))
    for _ in range(2):  # it can be entered again
        with block as entered:
            assert entered == "a"
            with pytest.raises(apd.errors.AlreadyActive, match="entered already"):
                block.start()
    assert seen == ["do a", "undo a"] * 2


def test_parts_are_undone_in_reverse_order_as_far_as_they_came():
    seen: list[str] = []
    parts = [Noted("a", seen), Noted("b", seen, fails=True), Noted("c", seen)]
    with pytest.raises(ValueError, match="b"), Block(lambda: Together(parts)):
        pass
    assert seen[:4] == ["do a", "do b", "undo b", "undo a"]
    assert not [note for note in seen if note.endswith("c")]


def test_an_error_inside_comes_out_and_the_part_is_undone():
    seen: list[str] = []
    with pytest.raises(KeyError), Block(lambda: Noted("a", seen)):
        raise KeyError
    assert seen == ["do a", "undo a"]
