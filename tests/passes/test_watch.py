import pytest
import torch
from support.toy_models import Snapshot, decomposition_of
from torch import nn
from torch.testing import assert_close

import apd_lens as apd
from apd_lens.passes._output import default_output
from apd_lens.passes._watch import sparse_pass, watched_pass


def model() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 2))


def watched(module: nn.Module, x: torch.Tensor, **options):
    return watched_pass(apd.wrap(module), ["0.weight", "2.weight"], x, default_output, **options)


def test_x_and_y_of_every_use_and_hidden_activations():
    module, x = model(), torch.randn(3, 4)
    before = Snapshot.of(module)
    seen = watched(module, x, hidden=["1"])
    hidden = module[1](module[0](x))
    assert [call.use.matrix for call in seen.calls] == ["0.weight", "2.weight"]
    assert_close(seen.calls[0].x, x)
    assert_close(seen.calls[1].x, hidden.detach())
    assert_close(seen.hidden["1"].detach(), hidden.detach())
    assert_close(seen.calls[1].y.detach(), module(x).detach())
    assert torch.equal(seen.output, module(x))
    before.assert_unchanged(module)


def test_a_first_axis_that_is_no_batch_is_refused():
    class Turned(nn.Sequential):
        def forward(self, x):
            return super().forward(x.T).T

    with pytest.raises(apd.ShapeMismatch, match=r"0\.weight was used at 0 on \(3, 4\), whose first axis is not"):
        watched(Turned(*model()), torch.randn(4, 3))


def test_an_output_without_a_graph_is_refused():
    class Detached(nn.Sequential):
        def forward(self, x):
            return super().forward(x).detach()

    with pytest.raises(apd.InvalidOutput, match="has no gradient to any decomposed matrix"):
        watched(Detached(*model()), torch.randn(3, 4))


def test_a_sparse_pass_is_the_sparse_context():
    module, x = model(), torch.randn(3, 4)
    decomposition, mask = decomposition_of(module), torch.rand(3, 5) < 0.5
    seen = watched(module, x)
    output, hidden = sparse_pass(
        decomposition.target, decomposition.components, seen.run.inputs, mask, default_output, ["1"]
    )
    with decomposition.sparse(mask):
        assert_close(output, module(x))
        assert_close(hidden["1"], module[:2](x))
