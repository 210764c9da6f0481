import torch
from torch import nn

import apd_lens as apd
from apd_lens.host._fingerprints import Fingerprints, mark


def test_a_digest_is_computed_anew_only_where_something_changed():
    linear, known = nn.Linear(4, 3), Fingerprints()
    matrix = apd.wrap(linear).weights["weight"]
    first, place = known.of(matrix), mark(matrix)
    assert known.of(matrix) == first == matrix.fingerprint()
    with torch.no_grad():
        linear.weight.mul_(2)
    assert mark(matrix) != place
    second = known.of(matrix, thorough=False)
    assert second == matrix.fingerprint() != first


def test_changes_that_torch_is_not_told_of_are_found_where_it_is_asked_to():
    linear, known = nn.Linear(4, 3), Fingerprints()
    matrix = apd.wrap(linear).weights["weight"]
    first, place = known.of(matrix), mark(matrix)
    linear.weight.detach().numpy()[0, 0] += 1
    assert mark(matrix) == place
    assert known.of(matrix, thorough=False) == first
    assert known.of(matrix) != first
