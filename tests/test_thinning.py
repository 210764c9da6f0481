"""Of a product of parameters a normal run takes some cases, and each value of each parameter."""

from itertools import product

from support.thinning import on_the_diagonal


def test_one_parameter_keeps_all_its_values():
    assert on_the_diagonal([["a"], ["b"], ["c"]]) == [True] * 3


def test_each_value_of_each_parameter_is_met():
    parameters = ["abcd", "ef", "ghi"]
    cases = list(product(*parameters))
    taken = [case for case, is_taken in zip(cases, on_the_diagonal(cases), strict=True) if is_taken]
    assert len(taken) == 4 < len(cases)
    assert [set(names) for names in zip(*taken, strict=True)] == [set(values) for values in parameters]


def test_values_that_are_left_out_already_do_not_count():
    assert on_the_diagonal(list(product("abc", "d"))) == [True] * 3
