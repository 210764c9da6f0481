import pytest
import torch
from support.toy_models import Snapshot, decomposition_of
from torch import nn
from torch.testing import assert_close

import apd_lens as apd
from apd_lens.passes._output import default_output
from apd_lens.passes._replace import Mixture
from apd_lens.passes._watch import replaced_pass, watched_pass


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

    with pytest.raises(apd.errors.InvalidOutput, match="has no gradient to any decomposed matrix"):
        watched(Detached(*model()), torch.randn(3, 4))


class Scratch(nn.Module):
    """Writes what the first layer reads to memory that it uses in each forward."""

    def __init__(self, again: bool) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 6), nn.Linear(6, 3)
        self.memory = {"x": torch.empty(8, 4)} if again else {}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.memory:
            with torch.no_grad():
                x = self.memory["x"].copy_(x)
        return self.last(torch.relu(self.first(x)))


def test_memory_that_the_next_forward_writes_to_is_copied():
    found = []
    for again in (False, True):
        torch.manual_seed(0)
        model, batches = Scratch(again), [torch.randn(8, 4) for _ in range(3)]
        options = {"n_components": 5, "rank": 2, "moves": apd.moves.SplitMoves(every=2), "progress": False}
        decomposition = apd.decompose(model, batches, **options, optimization=apd.Optimization(steps=8, lr=1e-2))
        found.append(list(decomposition.components.parameters()))
    for ours, theirs in zip(*found, strict=True):
        assert torch.equal(ours, theirs)


def test_a_gradient_through_memory_that_was_written_to_is_an_error_that_says_so():
    masks = apd.Gates(hidden=6, teacher=None)
    with pytest.raises(apd.UnsupportedModel, match="Scratch wrote to memory that an earlier one had used"):
        apd.decompose(Scratch(True), [torch.randn(8, 4)], n_components=5, rank=2, masks=masks, progress=False)


def test_a_sparse_pass_is_the_sparse_context():
    module, x = model(), torch.randn(3, 4)
    decomposition, mask = decomposition_of(module), torch.rand(3, 5) < 0.5
    seen = watched(module, x)
    replaced = Mixture(decomposition.components, mask)
    names = decomposition.components.names
    output, hidden = replaced_pass(decomposition.target, names, replaced, seen.run.inputs, default_output, ["1"])
    with decomposition.sparse(mask):
        assert_close(output, module(x))
        assert_close(hidden["1"], module[:2](x))
