"""Which cases of a test a normal run takes: of several parameters each value once, and not each with each."""

from collections.abc import Sequence


def on_the_diagonal(cases: Sequence[Sequence[str]]) -> list[bool]:
    """Whether each case, given the names of its values, is taken: the i-th value of each parameter meets the i-th of
    the others, and shorter ones begin again."""
    values = [list(dict.fromkeys(names)) for names in zip(*cases, strict=True)]
    longest = max(map(len, values))
    taken = {tuple(of_parameter[i % len(of_parameter)] for of_parameter in values) for i in range(longest)}
    return [tuple(case) in taken for case in cases]
