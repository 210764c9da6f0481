"""What can be done with a result; the adapter contract has the passes themselves."""

import copy
import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from support import outside
from support.toy_models import ResidualMLP, TinyGPT, decomposition_of
from torch.testing import assert_close

import apd_lens as apd


@pytest.fixture
def decomposition() -> apd.Decomposition:
    return decomposition_of(ResidualMLP(4, 6, 5, 1), ["layers.*"], n_components=5, rank=2)


def test_residuals(decomposition: apd.Decomposition):
    errors, norms = [], []
    residuals = decomposition.residuals()
    assert list(residuals) == ["layers.0.mlp_in.weight", "layers.0.mlp_out.weight", "all"]
    for name in decomposition.components.names:
        W = decomposition.target.weights[name].value()
        errors.append((W - decomposition.components.component_weights(name).sum(0)).norm())
        norms.append(W.norm())
        assert residuals[name] == pytest.approx((errors[-1] / norms[-1]).item(), rel=1e-5)
    assert residuals["all"] == pytest.approx((torch.stack(errors).norm() / torch.stack(norms).norm()).item(), rel=1e-5)


def test_it_prints_what_it_is_made_of(decomposition: apd.Decomposition):
    lines = str(decomposition).splitlines()
    assert lines[0] == "ResidualMLP: 5 components over 2 matrices"
    assert [line.split() for line in lines[3:5]] == [["L0", "mlp_in", "6", "5", "2"], ["L0", "mlp_out", "5", "6", "2"]]
    assert repr(decomposition) == str(decomposition)
    assert 'title="layers.0.mlp_in.weight"' in apd.Decomposition._repr_html_(decomposition)


def test_directions_are_plain_tensors(decomposition: apd.Decomposition, tmp_path: Path):
    x, name = torch.randn(3, 6), "layers.0.mlp_in.weight"
    decomposition.export_directions(tmp_path / "new" / "directions.safetensors")
    with safe_open(tmp_path / "new" / "directions.safetensors", "pt") as file:
        about, keys = file.metadata(), set(file.keys())
        read, write = file.get_tensor(f"{name}.read"), file.get_tensor(f"{name}.write")
    assert keys == {f"{of}.{side}" for of in decomposition.components.names for side in ("read", "write")}
    assert (read.shape, write.shape) == ((5, 2, 6), (5, 2, 5))
    for c in range(5):
        P = decomposition.components.component_weights(name)[c]
        assert_close(read[c].T @ write[c], P)
        assert_close((x @ read[c].T) @ write[c], x @ P)
    assert "(component, rank, d_in)" in about["orientation"]
    assert json.loads(about["layouts"]) == {
        of: decomposition.target.weights[of].layout for of in decomposition.components.names
    }
    with pytest.raises(apd.ArtifactError, match="cannot be written"):
        decomposition.export_directions(tmp_path)


def test_summary(decomposition: apd.Decomposition):
    x = torch.randn(8, 4)
    mask = decomposition.select(x, k=1.0)
    decomposition = apd.Decomposition(
        decomposition.target,
        decomposition.components,
        apd.decomposition.Settings(selection=apd.BatchTopK(1.0)),
        decomposition.output,
        decomposition.fingerprints,
    )
    summary = decomposition.summary(x)
    assert_close(summary.active, mask.float().mean(0))
    assert_close(summary.attribution, decomposition.attributions(x).mean(0))
    name = "layers.0.mlp_in.weight"
    weights = decomposition.components.component_weights(name)
    assert_close(summary.norm[name], weights.flatten(1).norm(dim=1))
    dead = ~mask.any(0)
    assert summary.n_dead == dead.sum()
    W = decomposition.target.weights[name].value()
    assert summary.dead_share[name] == pytest.approx((weights[dead].sum(0).norm() / W.norm()).item(), abs=1e-5)
    lines = str(summary).splitlines()
    columns = [f"‖L0 mlp_{side}‖ eff. rank" for side in ("in", "out")]
    assert lines[0].split() == f"component active attribution {' '.join(columns)}".split()
    footer = lines[2 + int((~dead).sum())]
    assert footer.startswith(f"{int((~dead).sum())} components active on this batch, {int(dead.sum())} dead")
    assert summary.rest == decomposition.residuals()
    assert f"the rest W − Σ P: {summary.rest['all']:.2g} of ‖W‖" in lines


@pytest.mark.parametrize("use", ["ablate", "only", "edited_state_dict"])
@pytest.mark.parametrize("wrong", [5, [-1], [1, 1], [0, 7]])
def test_components_that_are_not_there_are_refused(decomposition: apd.Decomposition, use: str, wrong):
    with pytest.raises(apd.errors.InvalidSetting, match="distinct component numbers from 0 to 4, got"):
        getattr(decomposition, use)(wrong)


def test_components_may_come_as_a_tensor(decomposition: apd.Decomposition):
    x = torch.randn(2, 4)
    model = decomposition.target.model
    with decomposition.ablate(torch.tensor([1, 3])):
        expected = model(x)
    with decomposition.ablate([1, 3]):
        assert torch.equal(model(x), expected)
    with decomposition.only(torch.tensor(2)):
        expected = model(x)
    with decomposition.only(2):
        assert torch.equal(model(x), expected)


def test_what_is_no_mask_is_refused():
    came = outside.errors_of(
        """
        import torch
        import apd_lens as apd
        sparse = apd.init(torch.nn.Linear(2, 2), n_components=5).decomposition().sparse
        """,
        ["sparse(torch.ones(3, 4))", "sparse(torch.ones(5))", "sparse([1, 0])", "sparse(torch.ones(3, 5).long())"],
    )
    expected = (
        "ShapeMismatch: Expected a mask of shape (batch, 5) or (batch, pos, 5), one entry for each component, got "
    )
    for message, shape in zip(came, ("(3, 4)", "(5,)", "list"), strict=False):
        assert message.startswith(expected + shape)
    assert "Expected a mask of bool, or of floats that scale components, got torch.int64. Use mask.bool()" in came[3]


def test_a_mask_of_positions_needs_positions(decomposition: apd.Decomposition):
    message = r"The mask is \(3, 2, 5\), but a decomposed matrix was used on \(3, 5\)"
    with decomposition.sparse(torch.ones(3, 2, 5)), pytest.raises(apd.ShapeMismatch, match=message):
        decomposition.target.model(torch.randn(3, 4))


def test_edited_tied_matrices_stay_tied():
    model = TinyGPT()
    decomposition = decomposition_of(model, "wte.weight")
    edited = decomposition.edited_state_dict(ablate=[2])
    expected = model.wte.weight.detach() - decomposition.components.component_weights("wte.weight")[2]
    assert_close(edited["wte.weight"], expected)
    assert edited["wte.weight"] is edited["head.weight"]
    assert torch.equal(edited["fc.weight"], model.fc.weight)
    untouched = decomposition.edited_state_dict([])
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in untouched.items())


def test_gradients_flow_through_a_replaced_model(decomposition: apd.Decomposition):
    x = torch.randn(2, 4, requires_grad=True)
    with decomposition.sparse(torch.ones(2, 5)):
        decomposition.target.model(x).sum().backward()
    assert x.grad is not None
    assert x.grad.abs().sum() > 0
    assert all(factor.grad is None for factor in decomposition.components.parameters())


def test_nonfinite_batches_are_refused(decomposition: apd.Decomposition):
    with pytest.raises(apd.NonFinite, match="attributions: input tensor 0"):
        decomposition.attributions(torch.full((1, 4), float("nan")))
    decomposition.target.model.W_U.weight.data[0, 0] = float("inf")
    with pytest.raises(apd.NonFinite, match="attributions: the target output holds 2 values"):
        decomposition.attributions(torch.ones(2, 4))


def test_residuals_of_zero_matrices():
    model = torch.nn.Linear(3, 3)
    model.weight.data.zero_()
    decomposition = decomposition_of(model)
    assert decomposition.residuals() == {"weight": float("inf"), "all": float("inf")}


@pytest.mark.parametrize("rest", [0.0, 0.25, 1.0])
def test_the_rest_can_be_on_in_part(rest: float):
    """r W + Σ_c (s_c − r) P_c, really substituted for each example."""
    model, x = ResidualMLP(4, 6, 5, 1), torch.randn(3, 4)
    decomposition = decomposition_of(model, n_components=3)
    for mask in (torch.rand(3, 3) > 0.5, torch.rand(3, 3)):
        with torch.no_grad(), decomposition.sparse(mask, rest=rest):
            mixed = model(x)
        for example in range(3):
            copied = copy.deepcopy(model)
            with torch.no_grad():
                for name in decomposition.components.names:
                    parameter = copied.get_parameter(name)
                    P = decomposition.components.component_weights(name).mT
                    s = mask[example].float()[:, None, None]
                    parameter.copy_(rest * parameter + ((s - rest) * P).sum(0))
                assert_close(mixed[example], copied(x[example : example + 1])[0], rtol=1e-4, atol=1e-5)
