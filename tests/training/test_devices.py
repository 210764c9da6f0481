"""Other dtypes and devices: factors stay float32, results agree with the CPU in float32."""

import copy
from typing import Any

import pytest
import torch
from support.processes import Padded
from support.toy_models import ResidualMLP, Snapshot, TinyGPT, decomposition_of
from support.two_devices import FIRST, SECOND, TwoDevices, placed
from torch import nn
from torch.testing import assert_close

import apd_lens as apd

FEW = {"n_components": 4, "rank": 2, "optimization": apd.Optimization(steps=4, lr=1e-2), "progress": False}
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


def assert_nearly(actual: torch.Tensor, expected: torch.Tensor) -> None:
    """bfloat16 has eight bits, and a unit near zero may be on in one and off in the other."""
    assert (actual.float() - expected.float()).norm() < 0.05 * expected.float().norm()


def test_bfloat16_models():
    model, x = ResidualMLP(4, 6, 5, 1).bfloat16(), torch.randn(6, 4).bfloat16()
    before = Snapshot.of(model)
    decomposition = apd.decompose(model, [x], **FEW, losses=apd.Losses(path=1.0), moves=apd.moves.SplitMoves(every=2))
    before.assert_unchanged(model)
    assert all(factor.dtype == torch.float32 for factor in decomposition.components.parameters())
    assert decomposition.attributions(x).dtype == torch.float32
    with decomposition.sparse(decomposition.select(x)):
        assert model(x).dtype == torch.bfloat16
    precise = ResidualMLP(4, 6, 5, 1)
    precise.load_state_dict(model.state_dict())
    same = apd.Decomposition(
        apd.wrap(precise), decomposition.components, decomposition.settings, decomposition.output, {}
    )
    assert_nearly(decomposition.attributions(x), same.attributions(x.float()))
    edited = decomposition.edited_state_dict(ablate=[1])
    assert all(value.dtype == torch.bfloat16 for value in edited.values())


def test_bfloat16_lookups():
    model, tokens = TinyGPT().bfloat16(), torch.randint(11, (3, 4))
    decomposition = decomposition_of(model)
    with decomposition.sparse(decomposition.select(tokens)):
        assert model(tokens).dtype == torch.bfloat16


def test_bfloat16_autocast_with_float32_factors():
    model, x = ResidualMLP(4, 6, 5, 1), torch.randn(6, 4)
    decomposition = decomposition_of(model)
    precise = decomposition.attributions(x)
    with decomposition.sparse(torch.ones(6, 5)):
        expected = model(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_nearly(decomposition.attributions(x), precise)
        with decomposition.sparse(torch.ones(6, 5)):
            assert model(x).dtype == torch.bfloat16
            assert_nearly(model(x), expected)
        trained = apd.decompose(model, [x], **FEW, losses=apd.Losses(path=1.0))
    assert all(factor.dtype == torch.float32 for factor in trained.components.parameters())


def test_moving_the_model_inside_a_context():
    model, x = ResidualMLP(4, 6, 5, 1), torch.randn(3, 4)
    decomposition = decomposition_of(model, "layers.*")
    with decomposition.only([0, 1]):
        expected = model(x)
        model.double()
        assert_close(model(x.double()).float(), expected)


ON_TWO: dict[str, dict[str, Any]] = {
    "hidden activations": {"losses": apd.Losses(hidden=1.0, hidden_at=("1",))},
    "Lp": {"selection": apd.Lp(threshold=0.1), "losses": apd.Losses(path=0.0)},
    "others": {"losses": apd.Losses(faithfulness=0.0), "others": [torch.linspace(-1, 1, 20).view(5, 4)]},
    "gates": {"masks": apd.Gates(hidden=6, teacher=None), "losses": apd.Losses(attack=0.5, completeness=1.0)},
    "activations": {"attribution": apd.ActivationAttribution()},
}


@pytest.mark.parametrize("options", ON_TWO.values(), ids=ON_TWO)
def test_a_model_on_two_devices(options: dict[str, Any]):
    """Factors are where their matrix is, masks and losses where the output is, and no two devices meet."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3))
    x = torch.randn(8, 4)
    few = {**FEW, "optimization": apd.Optimization(steps=2, unit_norm=True), "moves": None, **options}
    expected = apd.decompose(copy.deepcopy(model), [x], **few)
    for number, device in ((0, FIRST), (2, SECOND), (4, FIRST)):
        placed(model[number], device)
    with TwoDevices():
        found = apd.decompose(model, [x], **few)
        for name, factor in found.components.B.items():
            assert factor.device == model.get_parameter(name).device
        attributions = found.attributions(x)
    for ours, theirs in zip(found.components.parameters(), expected.components.parameters(), strict=True):
        assert_close(ours.inner, theirs, rtol=1e-5, atol=1e-6)
    assert_close(attributions.inner, expected.attributions(x), rtol=1e-4, atol=1e-5)


def rows() -> tuple[nn.Module, list[torch.Tensor]]:
    """Two layers, and data that use about one row of each."""
    noise = torch.randn(46, 5, generator=torch.Generator().manual_seed(0)) / 10
    model = nn.Sequential(nn.Linear(5, 5, bias=False), nn.Linear(5, 5, bias=False))
    with torch.no_grad():
        for layer in model:
            layer.weight.copy_(torch.diag(torch.linspace(1, 2, 5)) + noise[:5] / 10)
    return model, [torch.eye(5)[torch.arange(41) % 5] * torch.linspace(0.5, 1, 41)[:, None] + noise[5:]]


def padded() -> tuple[nn.Module, list[dict[str, torch.Tensor]]]:
    """A lookup, a product, and positions of which some are padding."""
    torch.manual_seed(0)
    mask = torch.ones(6, 4).tril(1).long()
    return Padded(), [{"tokens": torch.arange(24).reshape(6, 4) % 9, "attention_mask": mask}]


FITTED = {"moves": None, "optimization": apd.Optimization(steps=2, start="data")}
POSITIONS = apd.BatchTopK(1.0, "position")
MOVED: dict[str, tuple[Any, dict[str, Any]]] = {
    "cluster moves": (rows, {"moves": apd.moves.ClusterMoves(every=2, merge_above=0.3)}),
    "split moves": (rows, {"moves": apd.moves.SplitMoves(every=2)}),
    "division moves": (rows, {"moves": apd.moves.DivisionMoves(every=4), "rank": 5}),
    "cluster moves at positions": (padded, {"moves": apd.moves.ClusterMoves(every=2), "selection": POSITIONS}),
    "start of data": (rows, FITTED),
    "start of data, in groups": (rows, FITTED | {"n_components": 42}),
    "start of data, others": (rows, FITTED | ON_TWO["others"] | {"others": [torch.linspace(-1, 1, 20).view(4, 5)]}),
    "start of data at positions": (padded, FITTED | {"selection": POSITIONS}),
    "start of matrices": (rows, {"moves": None, "optimization": apd.Optimization(steps=2, start="matrices")}),
}


@pytest.mark.parametrize(("make", "options"), MOVED.values(), ids=MOVED)
def test_moves_and_starts_on_two_devices(make: Any, options: dict[str, Any], tmp_path):
    """What follows too: the result is saved, loaded, gone on with, and audited."""
    expected_moves, moves = [], []
    few = {
        "n_components": 6,
        "rank": 2,
        "selection": apd.BatchTopK(1.0),
        "optimization": apd.Optimization(steps=20, lr=2e-2, start="random"),
        "progress": False,
    } | options
    model, batches = make()
    expected = apd.decompose(copy.deepcopy(model), batches, **few, on_step=lambda _, i: expected_moves.append(i.moves))
    assert few["moves"] is None or sum(expected_moves)
    for layer, device in zip(model.children(), (FIRST, SECOND), strict=True):
        placed(layer, device)
    with TwoDevices():
        durable = {"checkpoint": apd.Checkpoint(tmp_path / "run", every=1), "resume": tmp_path / "run"}
        found = apd.decompose(model, batches, **few, **durable, on_step=lambda _, i: moves.append(i.moves))
        max((tmp_path / "run").iterdir()).unlink()
        again = apd.decompose(model, batches, **few, **durable)
        found.save(tmp_path / "result")
        loaded = apd.load(tmp_path / "result", model)
        table = apd.metrics.audit(found, batches, ladder=(1,), unions=(), n_draws=1, progress=False)
    assert moves == expected_moves
    for one in (found, again, loaded):
        for ours, theirs in zip(one.components.parameters(), expected.components.parameters(), strict=True):
            assert_close(ours.inner, theirs, rtol=1e-4, atol=1e-5)
        assert {factor.device for factor in one.components.parameters()} == {FIRST, SECOND}
    assert table is not None


@needs_cuda
def test_cuda_gives_the_same_as_the_cpu():
    model, x = ResidualMLP(4, 6, 5, 1), torch.randn(6, 4)
    options = {**FEW, "losses": apd.Losses(faithfulness=1.0), "moves": None}
    on_cpu = apd.decompose(model, [x], **options)
    expected = on_cpu.attributions(x)
    on_cuda = apd.decompose(model.cuda(), [x], **options)  # the batch is moved
    for ours, theirs in zip(on_cuda.components.parameters(), on_cpu.components.parameters(), strict=True):
        assert_close(ours.cpu(), theirs, rtol=1e-3, atol=1e-4)
    assert_close(on_cuda.attributions(x).cpu(), expected, rtol=1e-3, atol=1e-4)
    with on_cuda.sparse(on_cuda.select(x).cpu()):
        assert model(x.cuda()).is_cuda


@needs_cuda
def test_cuda_path_loss_moves_and_autocast():
    model, x = ResidualMLP(4, 6, 5, 1).cuda(), torch.randn(6, 4)
    before = Snapshot.of(model)
    with torch.autocast("cuda", dtype=torch.bfloat16):
        apd.decompose(
            model, [x], **FEW, selection=apd.TopK(1), losses=apd.Losses(path=1.0), moves=apd.moves.SplitMoves(every=2)
        )
    before.assert_unchanged(model)
