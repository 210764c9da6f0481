import pytest
import torch
from torch import nn
from torch.testing import assert_close
from torch.utils.checkpoint import CheckpointError

import apd_lens as apd
from apd_lens.components._components import unit_of, xavier_std
from apd_lens.training._optimizer import adam, update


def state_of(**options):
    torch.manual_seed(0)
    return apd.init(nn.Linear(4, 2, bias=False), n_components=3, rank=2, optimization=apd.Optimization(**options))


def test_factors_of_one_scale_are_one_group():
    state = state_of(lr=0.1)
    scales = {id(p): group["scale"] for group in state.optimizer.param_groups for p in group["params"]}
    A, B = state.components.A["weight"], state.components.B["weight"]
    of_all = [scales[id(factor)] for factor in state.components.parameters()]
    unit = unit_of(state.weights["weight"]).item()
    assert 0.5 < unit < 1.5  # close to Xavier's, but not it
    assert sorted(of_all) == sorted([unit * xavier_std(*A.shape[1:]), unit * xavier_std(*B.shape[1:])])
    unscaled = adam(state.components, apd.Optimization(scaled=False), {})
    assert [group["scale"] for group in unscaled.param_groups] == [1.0]


def test_the_first_step_of_adam_is_the_learning_rate_times_the_sign():
    optimization = apd.Optimization(steps=10, lr=0.1, scaled=False)
    state = state_of(steps=10, lr=0.1, scaled=False)
    before = [factor.detach().clone() for factor in state.components.parameters()]
    loss = sum(factor.sum() for factor in state.components.parameters())
    rate = update(state.optimizer, state.components, loss, optimization, 0, nn.Linear(1, 1))
    for factor, old in zip(state.components.parameters(), before, strict=True):
        assert_close(factor.detach(), old - rate, rtol=1e-4, atol=1e-6)


def test_a_model_that_runs_parts_again_is_refused():
    class Failing(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, gradient):
            raise CheckpointError("other tensors")

    state = state_of()
    loss = Failing.apply(state.components.A["weight"].sum())
    with pytest.raises(apd.UnsupportedModel, match=r"step 3: this Linear uses torch\.utils\.checkpoint"):
        update(state.optimizer, state.components, loss, apd.Optimization(), 3, nn.Linear(1, 1))
