"""Of a product of parameters a normal run takes some cases, and each value of each parameter."""

from itertools import product

from support.thinning import on_the_diagonal


def cases(*lengths: int) -> list[dict[str, int]]:
    return [dict(zip("abc", indices, strict=False)) for indices in product(*map(range, lengths))]


def test_one_parameter_keeps_all_its_values():
    assert on_the_diagonal([{"a": i, "with it": i} for i in range(5)]) == [True] * 5


def test_each_value_of_each_parameter_is_met():
    of_product = cases(4, 2, 3)
    taken = [case for case, is_taken in zip(of_product, on_the_diagonal(of_product), strict=True) if is_taken]
    assert len(taken) == 4 < len(of_product)
    for name, length in {"a": 4, "b": 2, "c": 3}.items():
        assert {case[name] for case in taken} == set(range(length))


def test_values_that_are_left_out_already_do_not_count():
    assert on_the_diagonal([case for case in cases(3, 2) if case["b"] == 1]) == [True] * 3
