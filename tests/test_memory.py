from apd_lens._memory import BUDGET, chunks, fitting, slices


def test_at_least_one_fits_and_no_more_than_the_memory_holds():
    assert [fitting(100, memory) for memory in (1, 199, 200, 1000)] == [1, 1, 2, 10]
    assert fitting(BUDGET / 4) == 4
    assert fitting(0, memory=7) == 7


def test_pieces_cover_everything_once():
    for length, at_once in ((0, 3), (1, 3), (3, 3), (7, 3), (8, 1)):
        pieces = slices(length, at_once)
        assert [i for piece in pieces for i in range(length)[piece]] == list(range(length))
        assert all(0 < piece.stop - piece.start <= at_once for piece in pieces)
    assert chunks(5, 10, memory=20) == slices(5, 2)
