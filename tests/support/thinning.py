"""Which cases of a test a normal run takes: of several parameters each value once, and not each with each."""

from collections.abc import Mapping, Sequence


def on_the_diagonal(cases: Sequence[Mapping[str, int]]) -> list[bool]:
    """Whether each case, given the index of the value of each parameter, is one that is taken: the i-th value of each
    parameter meets the i-th of the others, and shorter ones begin again."""
    values = {name: sorted({case[name] for case in cases}) for name in cases[0]}
    longest = max(map(len, values.values()))
    taken = [{name: of_name[i % len(of_name)] for name, of_name in values.items()} for i in range(longest)]
    return [dict(case) in taken for case in cases]
