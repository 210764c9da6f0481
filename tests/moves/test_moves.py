import pytest
from torch import nn

import apd_lens as apd
from apd_lens.moves import Moves
from apd_lens.moves._moves import are_due, check_every


def test_moves_are_due_after_every_so_many_steps_until_a_share_of_them():
    moves = apd.moves.SplitMoves(every=3, until=0.5)
    assert [step for step in range(20) if are_due(moves, step, 20)] == [2, 5, 8]  # after the third, sixth and ninth
    assert not any(are_due(None, step, 20) for step in range(20))


@pytest.mark.parametrize("kind", [apd.moves.SplitMoves, apd.moves.ClusterMoves, apd.moves.DivisionMoves])
def test_all_kinds_keep_to_the_protocol(kind):
    assert isinstance(kind(), Moves)
    check_every(kind(every=1))
    with pytest.raises(apd.errors.InvalidSetting, match=rf"{kind.__name__} needs every >= 1"):
        apd.init(nn.Linear(2, 2), n_components=2, moves=kind(every=0))
