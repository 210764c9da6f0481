"""Models that torch.compile has compiled, all or a part: decomposed as if they had not been."""

from collections.abc import Callable

import pytest
import torch
from support.toy_models import ResidualMLP, Snapshot
from torch import Tensor, nn

import apd_lens as apd

# Without generating code, which takes its time: what compiled code misses it misses with any backend.
BACKEND = "eager"


def in_place(model: ResidualMLP) -> nn.Module:
    model.compile(backend=BACKEND)
    return model


def in_part(model: ResidualMLP) -> nn.Module:
    model.layers[0]["mlp_in"].compile(backend=BACKEND)
    return model


WAYS = {
    "a wrapped model": lambda model: torch.compile(model, backend=BACKEND),
    "in place": in_place,
    "in part": in_part,
}


def decompose(model: nn.Module, x: Tensor) -> apd.Decomposition:
    return apd.decompose(
        model, [x], "*layers.*", n_components=5, rank=2, optimization=apd.Optimization(4, lr=1e-2), progress=False
    )


@pytest.mark.parametrize("way", WAYS)
def test_compiled_models(way: Callable):
    plain, x = ResidualMLP(4, 6, 5, 1), torch.randn(6, 4)
    other = ResidualMLP(4, 6, 5, 1)
    other.load_state_dict(plain.state_dict())
    compiled = WAYS[way](other)
    output = compiled(x)
    before = Snapshot.of(compiled)
    expected, found = decompose(plain, x), decompose(compiled, x)
    before.assert_unchanged(compiled)
    for ours, theirs in zip(found.components.parameters(), expected.components.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    mask = expected.select(x)
    with expected.sparse(mask):
        sparse = plain(x)
    with found.sparse(mask):
        assert torch.equal(compiled(x), sparse)
    assert not torch.equal(sparse, output)
    with found.ablate([]):
        assert torch.equal(compiled(x), output)
    assert torch.equal(compiled(x), output)
