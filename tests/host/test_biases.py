"""Biases as one more row of their matrix: hand-made models, finite differences, edits, saving, training."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from support import outside
from support.hooked import hooked_transformer, tokens
from support.toy_models import TMS, ResidualMLP, Snapshot, TinyGPT, tiny_gpt2
from torch import Tensor, nn
from torch.testing import assert_close

import apd_lens as apd


def affine() -> tuple[nn.Linear, apd.Decomposition]:
    """y = (2 x_0 + 5, 3 x_1 + 7) and two components that are one output each, bias included."""
    model = nn.Linear(2, 2)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[2.0, 0.0], [0.0, 3.0]]))
        model.bias.copy_(torch.tensor([5.0, 7.0]))
    state = apd.init(apd.wrap(model, biases=True), n_components=2, rank=1, selection=apd.TopK(1))
    with torch.no_grad():
        state.components.A["weight"].copy_(torch.tensor([[2.0, 0.0, 5.0], [0.0, 3.0, 7.0]])[:, :, None])
        state.components.B["weight"].copy_(torch.eye(2)[:, None])
    return model, state.decomposition()


def test_the_bias_is_the_last_row():
    model, _ = affine()
    matrix = apd.wrap(model, biases=True).weights["weight"]
    assert (matrix.d_in, matrix.d_out) == (3, 2)
    assert matrix.value().tolist() == [[2.0, 0.0], [0.0, 3.0], [5.0, 7.0]]
    assert "2 + 1" in str(apd.wrap(model, biases=True))
    plain = apd.wrap(model)
    assert plain.weights["weight"].value().tolist() == [[2.0, 0.0], [0.0, 3.0]]
    assert apd.wrap(plain, biases=True).weights["weight"].d_in == 3


def test_what_a_component_does_includes_its_bias():
    model, decomposition = affine()
    x, output = torch.tensor([[1.0, 1.0], [-1.0, 2.0]]), model(torch.tensor([[1.0, 1.0], [-1.0, 2.0]]))
    assert output.tolist() == [[7.0, 10.0], [3.0, 13.0]]
    with decomposition.sparse(torch.tensor([[True, False], [False, True]])):
        assert model(x).tolist() == [[7.0, 0.0], [0.0, 13.0]]
    with decomposition.sparse(torch.zeros(2, 2, dtype=torch.bool)):
        assert model(x).tolist() == [[0.0, 0.0], [0.0, 0.0]]
    with decomposition.ablate(1):
        assert model(x).tolist() == [[7.0, 0.0], [3.0, 0.0]]
    with decomposition.only(1):
        assert model(x).tolist() == [[0.0, 10.0], [0.0, 13.0]]
    with decomposition.ablate([]):
        assert torch.equal(model(x), output)
    # One output is all that a component has; the other does not change.
    assert_close(decomposition.attributions(x), output.abs() / 2**0.5)
    assert decomposition.residuals()["all"] == 0


HOSTS: dict[str, tuple[Callable[[], Any], Any, list[str]]] = {
    "two layers": (lambda: ResidualMLP(4, 6, 5, 1), torch.randn(5, 4), ["layers.*"]),
    "positions and Conv1D": (TinyGPT, torch.randint(11, (3, 4)), ["fc.*", "proj.*"]),
    "Hugging Face": (tiny_gpt2, torch.randint(13, (3, 5)), ["*.mlp.*", "*.attn.*"]),
    "convolution": (
        lambda: nn.Sequential(nn.Conv2d(2, 3, 2, padding=1), nn.Tanh(), nn.Flatten(), nn.Linear(27, 4)),
        torch.randn(3, 2, 2, 2),
        ["*"],
    ),
    "HookedTransformer": (hooked_transformer, tokens(3, 4), ["blocks.*", "unembed.W_U"]),
    "grouped heads": (lambda: hooked_transformer(n_key_value_heads=1), tokens(3, 4), ["blocks.*.attn.*"]),
    "heads of their own": (lambda: hooked_transformer(use_split_qkv_input=True), tokens(3, 4), ["blocks.*.attn.*"]),
}


def with_random_biases(make: Callable[[], Any]) -> Any:
    """Hosts start with biases of zero, on which nothing can be seen."""
    model = make()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1 or parameter.std() == 0:
                parameter.normal_(std=0.5)
    return model


def of(model: Any, weights: list[str]) -> apd.Decomposition:
    """Random components, small beside the weights."""
    state = apd.init(apd.wrap(model, biases=True), weights=weights, n_components=4, rank=2, selection=apd.TopK(2))
    return state.decomposition()


def output_of(model: Any, x: Any) -> Tensor:
    result = model(x)
    return getattr(result, "logits", result)


def edited_copy(make: Callable[[], Any], state_dict: dict[str, Tensor]) -> Any:
    model = make()
    model.load_state_dict(state_dict)
    return model


@pytest.mark.filterwarnings("ignore:HookedTransformer is deprecated:DeprecationWarning")
@pytest.mark.parametrize("host", HOSTS)
def test_an_edited_state_dict_is_the_ablated_model(host: str):
    make, x, weights = HOSTS[host]
    model = with_random_biases(make)
    before, decomposition = Snapshot.of(model), of(model, weights)
    matrices = [decomposition.target.weights[name] for name in decomposition.components.names]
    assert all(matrix.bias is not None for matrix in matrices)
    target = output_of(model, x)
    with decomposition.ablate([1, 3]):
        ablated = output_of(model, x)
    edited = edited_copy(make, decomposition.edited_state_dict([1, 3]))
    assert_close(output_of(edited, x), ablated, rtol=1e-4, atol=1e-5)
    assert (ablated - target).abs().max() > 1e-2
    changed = [key for key, value in model.state_dict().items() if not torch.equal(value, edited.state_dict()[key])]
    assert len(changed) == 2 * len(matrices)  # each weight and its bias
    with decomposition.only(range(4)):
        alone = output_of(model, x)
    components = decomposition.components
    summed = {}
    for matrix in matrices:
        summed |= matrix.state(components.summed(matrix.name))
    assert_close(output_of(edited_copy(make, {**model.state_dict(), **summed}), x), alone, rtol=1e-4, atol=1e-5)
    before.assert_unchanged(model)


@pytest.mark.parametrize("host", ["two layers", "positions and Conv1D", "convolution"])
@pytest.mark.parametrize("seed", [0, 1])
def test_attributions_are_finite_differences(host: str, seed: int):
    """A_c by taking a ten-millionth of P_c, bias and all, out of the parameters of a copy."""
    torch.manual_seed(seed)
    make, x, weights = HOSTS[host]
    model = with_random_biases(make).double()
    x = x.double() if x.is_floating_point() else x
    decomposition, step = of(model, weights), 1e-7
    components = decomposition.components
    little = apd.ParameterComponents({name: step * A for name, A in components.A.items()}, components.B)
    parts = apd.Decomposition(decomposition.target, little, decomposition.settings, decomposition.output, {})
    expected = []
    for c in range(4):
        edited = edited_copy(lambda: make().double(), parts.edited_state_dict(c))
        effect = (output_of(model, x) - output_of(edited, x)).flatten(1) / step
        expected.append(effect.square().mean(1).sqrt())
    assert_close(decomposition.attributions(x), torch.stack(expected, 1), rtol=1e-5, atol=1e-7)


def test_saving_and_loading(tmp_path):
    model = with_random_biases(lambda: ResidualMLP(4, 6, 5, 1))
    x, decomposition = torch.randn(5, 4), of(model, ["layers.*"])
    decomposition.save(tmp_path)
    for onto in (model, apd.wrap(model), apd.wrap(model, biases=True)):
        loaded = apd.load(tmp_path, onto)
        assert torch.equal(loaded.attributions(x), decomposition.attributions(x))
    with torch.no_grad():
        model.layers[0]["mlp_in"].bias[0] += 1
    with pytest.raises(apd.ArtifactError, match=r"layers\.0\.mlp_in\.weight has other weights"):
        apd.load(tmp_path, model)
    without = nn.Sequential(nn.Linear(3, 3, bias=False))
    of(nn.Sequential(nn.Linear(3, 3)), ["*"]).save(tmp_path)
    with pytest.raises(apd.ArtifactError, match="is 3 × 3 here and was 4 × 3"):
        apd.load(tmp_path, without)
    plain = apd.init(model, n_components=3).decomposition()
    plain.save(tmp_path)
    assert apd.load(tmp_path, apd.wrap(model, biases=True)).attributions(x).shape == (5, 3)


def test_what_has_no_bias_of_its_own():
    """Tied matrices and shared biases: the bias stays always on. A model without any is refused."""
    with pytest.raises(apd.UnsupportedModel, match=r"no matrix of this Linear has a bias that can be.*Leave"):
        apd.wrap(nn.Linear(2, 2, bias=False), biases=True)
    with pytest.raises(apd.UnsupportedModel, match="no matrix of this TMS has a bias"):
        apd.wrap(TMS(4, 3), biases=True)
    tied = apd.wrap(TinyGPT(), biases=True)
    assert [name for name, matrix in tied.weights.items() if matrix.bias is not None] == ["fc.weight", "proj.weight"]
    shared = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 3))
    shared[1].bias = shared[0].bias
    assert [matrix.d_in for matrix in apd.wrap(shared, biases=True).weights.values()] == [3, 3, 4]


@pytest.mark.filterwarnings("ignore:HookedTransformer is deprecated:DeprecationWarning")
def test_a_bias_that_is_added_later_is_an_error_and_leaves_the_model_alone():
    model = hooked_transformer(use_attn_result=True)
    before, decomposition = Snapshot.of(model), of(model, ["*W_O"])
    with decomposition.ablate(0), pytest.raises(apd.UnsupportedModel, match=r"adds the bias later.*use_attn_result"):
        model(tokens(2, 3))
    before.assert_unchanged(model)


def test_inside_an_nnsight_model():
    nnsight = pytest.importorskip("nnsight")
    module = with_random_biases(lambda: ResidualMLP(4, 6, 5, 1))
    x = torch.randn(5, 4)
    on_module, on_envoy = of(module, ["layers.*"]), of(nnsight.NNsight(module), ["layers.*"])
    assert_close(on_envoy.attributions(x), on_module.attributions(x))


def test_training_with_moves_changes_nothing_on_the_model():
    model, x = with_random_biases(lambda: ResidualMLP(4, 6, 5, 1)), torch.randn(16, 4)
    before = Snapshot.of(model)
    for moves in (apd.moves.SplitMoves(every=2), apd.moves.ClusterMoves(every=2)):
        made: list[apd.training.StepInfo] = []
        decomposition = apd.decompose(
            apd.wrap(model, biases=True), [x], ["layers.*"], n_components=10, rank=2, selection=apd.TopK(1),
            moves=moves, losses=apd.Losses(path=1.0), optimization=apd.Optimization(10, lr=1e-2, unit_norm=True),
            on_step=lambda step, info, made=made: made.append(info), progress=False,
        )  # fmt: skip
        assert sum(info.moves for info in made) > 0
        assert decomposition.components.A["layers.0.mlp_in.weight"].shape == (10, 7, 2)
    before.assert_unchanged(model)


WHO_NEEDS_IT = """
import torch, apd_lens as apd
torch.set_num_threads(1)
model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.ReLU(), torch.nn.Linear(2, 2, bias=False))
with torch.no_grad():
    model[0].weight.copy_(torch.eye(2))
    model[0].bias.copy_(torch.tensor([-0.5, 0.0]))
    model[2].weight.copy_(torch.eye(2))

def batch(step):
    generator = torch.Generator().manual_seed(step)
    feature = torch.randint(2, (64,), generator=generator)
    return torch.eye(2)[feature] * (0.5 + torch.rand(64, 1, generator=generator))

decomposition = apd.decompose(
    apd.wrap(model, biases=True), batch, n_components=2, rank=1, selection=apd.TopK(1),
    losses=apd.Losses(10, 1, apd.HoldThenDecay(0.05), simplicity_floor=0.0, path=1),
    moves=apd.moves.SplitMoves(every=50), optimization=apd.Optimization(1000, lr=3e-2, scaled=False, init_scale=1.0),
    progress=False,
)
for components in (decomposition.components, apd.components.random_components(decomposition.components)):
    P = components.component_weights("0.weight")
    first = int(P[:, 0, 0].abs().argmax())
    print(*P[first][2].tolist(), *P[1 - first][2].tolist())
"""


@pytest.mark.thorough
def test_the_bias_goes_to_the_component_that_needs_it():
    """relu(x_0 − 0.5) and relu(x_1), one feature at a time: the bias serves the first feature alone. Random components
    of the same size hold it anywhere."""
    trained, random = ([float(value) for value in line.split()] for line in outside.run(WHO_NEEDS_IT).splitlines())
    wanted = [-0.5, 0.0, 0.0, 0.0]
    assert trained == pytest.approx(wanted, abs=0.03)
    assert random != pytest.approx(wanted, abs=0.2)
