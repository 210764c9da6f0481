import pytest
import torch

import apd_lens as apd
from apd_lens.attribution._projections import (
    AUTO_PROJECTIONS,
    EXACT_UP_TO,
    are_exact,
    check_projections,
    cotangents_for,
)


@pytest.mark.parametrize(
    ("n_outputs", "projections", "count", "exact"),
    [
        (EXACT_UP_TO, "auto", EXACT_UP_TO, True),
        (EXACT_UP_TO + 1, "auto", AUTO_PROJECTIONS, False),
        (EXACT_UP_TO + 1, "exact", EXACT_UP_TO + 1, True),
        (4, 7, 7, False),
    ],
)
def test_how_many_directions_are_pulled_back(n_outputs, projections, count, exact):
    output = torch.zeros(2, n_outputs)
    cotangents = cotangents_for(output, projections, "rademacher", None)
    assert (cotangents.count, cotangents.exact) == (count, exact)
    assert are_exact(output, projections) is exact


def test_none_is_refused():
    check_projections(1)
    with pytest.raises(apd.errors.InvalidSetting, match="at least 1, got 0"):
        check_projections(0)
