import torch
from support.toy_models import decomposition_of
from torch import nn
from torch.testing import assert_close

from apd_lens.attribution._activation import ActivationAttribution
from apd_lens.passes._output import default_output
from apd_lens.passes._watch import watched_pass


def test_it_is_the_square_of_what_a_component_writes():
    model, x = nn.Linear(4, 3), torch.randn(6, 2, 4)
    decomposition = decomposition_of(model)
    watched = watched_pass(decomposition.target, ["weight"], x, default_output)
    written = torch.einsum("npi,cio->npco", x, decomposition.components.component_weights("weight"))
    squares = written.square().sum(-1)
    attribution = ActivationAttribution()
    assert_close(attribution(watched, decomposition.components, "position"), squares)
    assert_close(attribution(watched, decomposition.components, "example"), squares.sum(1))
