import torch
from support.toy_models import decomposition_of
from torch import nn
from torch.testing import assert_close

import apd_lens as apd
from apd_lens.passes._output import default_output
from apd_lens.passes._watch import watched_pass


def test_it_is_the_change_of_the_output_without_the_component():
    model, x = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3)), torch.randn(6, 4)
    decomposition = decomposition_of(model)
    watched = watched_pass(decomposition.target, decomposition.components.names, x, default_output)
    whole = model(x)
    expected = []
    for component in range(5):
        with decomposition.ablate(component):
            expected.append((model(x) - whole).square().mean(1).sqrt())
    for memory in (1, 2**20):
        came = apd.AblationAttribution(memory)(watched, decomposition.components, "example")
        assert_close(came, torch.stack(expected, 1).detach(), rtol=1e-4, atol=1e-6)
