import torch
from support.toy_models import decomposition_of
from torch import nn

import apd_lens as apd
from apd_lens.metrics import AblationPath


def test_errors_lie_between_those_of_some_and_of_the_worst_ablation():
    model, x = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3)), torch.randn(8, 4)
    decomposition = decomposition_of(model)
    path = apd.metrics.ablation_path_audit(decomposition, x, n_draws=4, ascent_steps=3)
    again = apd.metrics.ablation_path_audit(decomposition, x, n_draws=4, ascent_steps=3)
    assert str(path) == str(again)
    assert torch.as_tensor(path.worst).isfinite().all()


def test_a_path_is_printed_as_a_table():
    path = AblationPath(*(torch.linspace(0, 1, 101) for _ in range(4)))
    lines = str(path).splitlines()
    assert lines[0].split("  ")[0] == "inactive ablated by"
    assert len(lines) <= 25
    assert lines[-1].split() == ["1"] * 4
    assert repr(path) == str(path)
