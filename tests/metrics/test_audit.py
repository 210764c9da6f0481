import torch
from support.toy_models import decomposition_of
from torch import nn

import apd_lens as apd


def test_errors_lie_between_those_of_some_and_of_the_worst_ablation():
    model, x = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3)), torch.randn(8, 4)
    decomposition = decomposition_of(model)
    path = apd.metrics.ablation_path_audit(decomposition, x, n_draws=4, ascent_steps=3)
    again = apd.metrics.ablation_path_audit(decomposition, x, n_draws=4, ascent_steps=3)
    assert str(path) == str(again)
    assert torch.as_tensor(path.worst).isfinite().all()
