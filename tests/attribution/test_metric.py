import pytest
import torch
from support.toy_models import decomposition_of
from torch import nn
from torch.testing import assert_close

import apd_lens as apd
from apd_lens.attribution._metric import metric_on, metric_scalars


def test_to_one_output_of_a_linear_model_it_is_that_of_the_component():
    model, x = nn.Linear(4, 3), torch.randn(5, 4)
    decomposition = decomposition_of(model)
    P = decomposition.components.component_weights("weight")
    came = decomposition.attributions(x, metric=lambda output: 2 * output[:, 1])
    assert_close(came, 2 * torch.einsum("ni,ci->nc", x, P[:, :, 1]))


def test_a_metric_may_take_the_batch():
    batch = torch.tensor([1.0, 2.0])
    with_batch = metric_on(lambda output, batch: output * batch, batch)
    assert with_batch(torch.ones(2)).tolist() == [1, 2]

    def alone(output, scale=3.0):
        return output * scale

    assert metric_on(alone, batch) is alone


@pytest.mark.parametrize("metric", [lambda y: y, lambda y: y.sum(), lambda y: 1.0])
def test_what_is_no_scalar_an_example_is_refused(metric):
    with pytest.raises(apd.ShapeMismatch, match=r"one scalar an example, shape \(5,\)"):
        metric_scalars(metric, torch.ones(5, 2))
