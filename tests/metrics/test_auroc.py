import pytest
import torch

import apd_lens as apd
from apd_lens.metrics._auroc import auroc


def test_it_is_the_share_of_pairs_in_order_and_ties_count_half():
    scores, anomalous = torch.randint(5, (40,)).float(), torch.rand(40) < 0.4
    pairs = [(a > b) + 0.5 * (a == b) for a in scores[anomalous] for b in scores[~anomalous]]
    assert auroc(scores, anomalous) == pytest.approx(float(sum(pairs)) / len(pairs))


def test_what_has_none_is_refused():
    for anomalous in (torch.zeros(3, dtype=torch.bool), torch.ones(3, dtype=torch.bool)):
        with pytest.raises(apd.errors.InvalidSetting, match="anomalous and"):
            auroc(torch.ones(3), anomalous)
    with pytest.raises(apd.NonFinite, match="NaN"):
        auroc(torch.tensor([float("nan"), 1.0]), torch.tensor([True, False]))
