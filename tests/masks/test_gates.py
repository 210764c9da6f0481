"""Gates: what they read and say, what they are taught, and that they go with the components."""

import copy
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from support.padding import gpt2, padded
from support.toy_models import ResidualMLP
from torch import Tensor, nn
from torch.testing import assert_close

import apd_lens as apd
from apd_lens.masks._gates import Importance, Open, lower, smooth_l0, upper
from apd_lens.passes._output import default_output
from apd_lens.passes._watch import watched_pass

ALONE = apd.Gates(hidden=8, teacher=None)
TAUGHT = apd.Gates(hidden=8, teacher=apd.Attributed(selection=apd.TopK(1)))


def state_of(model: nn.Module, gates: apd.Gates = ALONE, **options) -> apd.training.State:
    """Gates that do not all say the same, as they do at the start."""
    state = apd.init(model, n_components=5, rank=2, masks=gates, moves=None, **options)
    with torch.no_grad():
        state.components.gates.weight.copy_(torch.randn_like(state.components.gates.weight))
    return state


def test_a_count_that_is_smooth():
    u = torch.tensor([0.0, 0.5, 1.0])
    assert_close(smooth_l0(u, 0.5), torch.tensor([0.0, 0.625, 1.0]))
    assert_close(smooth_l0(u, 1e-3), torch.tensor([0.0, 1.0, 1.0]), atol=1e-5, rtol=0)


def test_a_closed_gate_learns_where_it_should_open_and_an_open_one_where_it_should_close():
    r = torch.tensor([-1.0, -1.0, 0.5, 2.0, 2.0], requires_grad=True)
    lower(r).backward(torch.tensor([1.0, -1.0, 3.0, 1.0, -1.0]))
    assert_close(r.grad, torch.tensor([0.0, -0.01, 3.0, 0.0, 0.0]))
    assert_close(lower(r.detach()), torch.tensor([0.0, 0.0, 0.5, 1.0, 1.0]))
    assert_close(upper(r.detach()), torch.tensor([0.0, 0.0, 0.5, 1.01, 1.01]))


def test_what_gates_say_is_by_hand():
    model, x = ResidualMLP(4, 6, 5, 1), torch.randn(7, 4)
    state = state_of(model, weights=["layers.*"])
    gates, read = state.components.gates, {}
    for layer in (model.layers[0]["mlp_in"], model.layers[0]["mlp_out"]):
        layer.register_forward_hook(lambda module, inputs, output, layer=layer: read.update({layer: inputs[0]}))
    model(x)
    sides = [F.rms_norm(some, some.shape[-1:]) @ side for some, side in zip(read.values(), gates.read, strict=True)]
    hidden = F.gelu(sum(sides) + gates.shift)
    hidden = hidden / hidden.square().mean(-1, keepdim=True).sqrt()
    expected = hidden @ gates.weight.mT + gates.bias
    decomposition = state.decomposition()
    assert_close(decomposition.attributions(x), expected.clamp(0, 1).detach())
    assert torch.equal(decomposition.select(x), expected > 0.1)
    assert torch.equal(decomposition.select(x, k=1.0), apd.masks.batch_topk_mask(expected.clamp(0, 1), 1.0))


@pytest.mark.parametrize("blocks", [0, 1])
def test_padding_says_nothing(blocks: int):
    model, batch = gpt2(), padded((6, 3, 4))
    masks = replace(ALONE, blocks=blocks)
    for granularity in ("example", "position"):
        decomposition = state_of(model, replace(masks, granularity=granularity), weights=["*.mlp.*"]).decomposition()
        found = decomposition.attributions(batch)
        other = decomposition.attributions(padded((6, 3, 4), filler=7))
        assert_close(found, other)
        if granularity == "position":
            of_positions = found
            assert (found[batch["attention_mask"] == 0] == 0).all()
    # of an example the gate is as open as at the position where it is most open
    gates = decomposition.components.gates
    whole = state_of(model, replace(masks, granularity="example"), weights=["*.mlp.*"]).decomposition()
    whole.components.gates.load_state_dict(gates.state_dict())
    assert_close(whole.attributions(batch), of_positions.amax(1))


def test_blocks_let_positions_tell_each_other():
    model, batch = gpt2(), {"input_ids": torch.arange(6)[None] + 1}
    decomposition = state_of(model, replace(ALONE, blocks=1, granularity="position"), weights=["*.0.mlp.*"])
    decomposition = decomposition.decomposition()
    changed = {"input_ids": batch["input_ids"].clone()}
    changed["input_ids"][0, -1] = 9
    found, other = decomposition.attributions(batch), decomposition.attributions(changed)
    assert (found[0, 0] != other[0, 0]).any()  # the model itself is causal
    assert_close(found[0, 0], other[0, 0], atol=0.5, rtol=0)


def test_lookups_are_read():
    model = nn.Sequential(nn.Embedding(7, 4), nn.Linear(4, 3))
    decomposition = state_of(model).decomposition()
    found = decomposition.attributions(torch.arange(7)[:, None])
    assert found.shape == (7, 5)
    assert len(found.unique(dim=0)) == 7


def test_matrices_at_other_positions_are_refused_where_positions_are_data():
    class Pools(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.before, self.behind = nn.Linear(4, 4), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.behind(self.before(x).mean(1))

    x = torch.randn(5, 6, 4)
    assert state_of(Pools()).decomposition().attributions(x).shape == (5, 5)
    with pytest.raises(apd.ShapeMismatch, match=r'behind.weight was used on \(5,\).*granularity="example"'):
        state_of(Pools(), replace(ALONE, granularity="position")).decomposition().attributions(x)


def test_sparsity_is_by_hand():
    model, x = nn.Linear(4, 3), torch.randn(8, 4)
    state = state_of(model, replace(ALONE, gamma=0.3, frequency=0.5))
    watched = watched_pass(state.target, ["weight"], x, default_output)
    masks = state.settings.masking.masks(watched, state.components, 0.5, 1.0)
    counted = upper(state.components.gates(watched, "example"))
    f = (1.09 * counted.square() / (counted.square() + 0.09)).mean(0)
    assert_close(masks.sparsity, (1 + (f * (1 + 0.5 * (1 + 8 * f).log2())).sum()).log())
    assert torch.equal(masks.on, lower(state.components.gates(watched, "example")))
    assert torch.equal(masks.active, masks.on > 0.1)
    assert not masks.attributions.requires_grad


def test_the_teacher_says_what_is_active_until_it_is_done():
    model, x = ResidualMLP(4, 6, 5, 1), torch.eye(4)
    state = apd.init(model, n_components=5, rank=2, masks=TAUGHT, optimization=apd.Optimization(steps=10, lr=1e-2))
    of_topk = apd.init(
        model, n_components=5, rank=2, selection=apd.TopK(1), optimization=apd.Optimization(steps=10, lr=1e-2)
    )
    for step in range(7):
        assert state.settings.masks.alone == (step >= 5)
        state, info = apd.step(state, x)
        of_topk, of_teacher = apd.step(of_topk, x)
        if step < 5:
            assert_close(info.terms["minimality"], of_teacher.terms["minimality"])
            assert "sparsity" in info.terms
    assert info.terms["minimality"] != of_teacher.terms["minimality"]


def test_the_teacher_looks_at_what_the_gates_look_at():
    positions = apd.Gates(granularity="position")
    assert positions.teacher.selection.granularity == "position"
    with pytest.raises(apd.errors.InvalidSetting, match="of each position, and their teacher of each example"):
        apd.Gates(granularity="position", teacher=apd.Attributed(selection=apd.TopK(1)))
    model, batch = gpt2(), padded((4, 3, 2, 4), width=4)  # as many examples as positions
    state = apd.init(model, weights=["*.mlp.*"], n_components=5, rank=2, masks=replace(positions, hidden=8), moves=None)
    _, info = apd.step(state, batch)
    assert info.terms["sparsity"] > 0


def test_elsewhere_no_teacher_says_what_is_active():
    model, x = ResidualMLP(4, 6, 5, 1), torch.eye(4)
    options = {"n_components": 5, "rank": 2, "moves": None, "losses": apd.Losses(faithfulness=0.0)}
    state = apd.init(model, masks=TAUGHT, elsewhere=apd.Elsewhere(), **options)
    masking = state.others[0].masking
    assert masking.alone
    assert not state.settings.masks.alone
    watched = watched_pass(state.target, state.components.names, torch.randn(6, 4), default_output)
    masks = masking.masks(watched, state.components, 0.0, 1.0)
    assert_close(masks.on, torch.full((6, 5), 0.5))
    state, info = apd.step(state, x, torch.randn(6, 4))
    assert info.terms["others sparsity"] > 0


def test_a_learning_rate_of_zero():
    state = apd.init(nn.Linear(4, 3), n_components=5, rank=2, masks=ALONE, optimization=apd.Optimization(lr=0.0))
    before = state.components.gates.bias.detach().clone()
    state, _ = apd.step(state, torch.randn(6, 4))
    assert torch.equal(state.components.gates.bias, before)


def test_they_go_with_the_components(tmp_path):
    model, x = ResidualMLP(4, 6, 5, 1), torch.randn(8, 4)
    options = {"n_components": 5, "rank": 2, "progress": False, "optimization": apd.Optimization(steps=8, lr=1e-2)}
    decomposition = apd.decompose(model, [x], masks=TAUGHT, losses=apd.Losses(attack=0.5, completeness=1.0), **options)
    decomposition.save(tmp_path / "saved")
    loaded = apd.load(tmp_path / "saved", model)
    assert loaded.settings == decomposition.settings
    assert torch.equal(loaded.attributions(x), decomposition.attributions(x))
    assert torch.equal(decomposition.on(copy.deepcopy(model)).attributions(x), decomposition.attributions(x))
    assert "gates" not in str(apd.from_factors(model, loaded.components.A, loaded.components.B).components)
    with pytest.raises(apd.errors.InvalidSetting, match="have no gates"):
        replace(decomposition, components=decomposition.components.picked(range(5))).select(x)


def test_those_of_random_components_are_random_with_the_same_singular_values():
    """What is claimed of components whose gates name them must fail for their random twins."""
    state, x = state_of(ResidualMLP(4, 6, 5, 1)), torch.randn(7, 4)
    decomposition = state.decomposition()
    random = replace(decomposition, components=apd.components.random_components(decomposition.components))
    own, twin = (each.components.gates for each in (decomposition, random))
    assert_close(torch.linalg.svdvals(twin.weight), torch.linalg.svdvals(own.weight))
    assert torch.equal(twin.bias, own.bias)
    assert (random.attributions(x) - decomposition.attributions(x)).abs().mean() > 0.1


def test_another_host_that_reads_otherwise_is_warned_of(tmp_path):
    model = nn.Linear(4, 3)
    decomposition = state_of(model).decomposition()
    decomposition.save(tmp_path / "saved")
    wider = replace(decomposition.settings, masks=replace(ALONE, hidden=10**7, blocks=1))  # nothing so large is made
    with pytest.warns(apd.errors.ApdWarning, match="read the matrices as another host uses them"):
        assert replace(decomposition, settings=wider).on(copy.deepcopy(model)).components.gates is None
    impossible = replace(decomposition.settings, masks=replace(ALONE, hidden=10**12, blocks=1))
    with pytest.raises(apd.ArtifactError, match="gates that cannot be"):
        replace(decomposition, settings=impossible).on(copy.deepcopy(model))


def test_a_division_takes_the_gates_along():
    torch.manual_seed(0)
    layer = nn.Linear(4, 4, bias=False)
    layer.weight.data = torch.eye(4)
    x = torch.eye(4).repeat(8, 1) * torch.linspace(0.5, 1, 32)[:, None]
    moves = apd.moves.DivisionMoves(every=1, until=1.0)
    state = apd.init(layer, n_components=4, rank=4, masks=TAUGHT, moves=moves)
    with torch.no_grad():
        state.components.gates.bias.copy_(torch.tensor([0.9, 0.1, 0.2, 0.3]))
    _, info = apd.step(state, x)
    assert info.moves > 0
    assert (state.components.gates.bias > 0.8).sum() == 1 + info.moves


def test_moves_take_the_gates_along():
    state = state_of(nn.Linear(4, 3))
    gates = state.components.gates
    weight = gates.weight.detach().clone()
    gates.copy_to(4, 0)
    assert torch.equal(gates.weight[4], weight[0])
    gates.join(0, 1)
    assert_close(gates.weight[0], weight[0] + weight[1])
    assert (gates.weight[1] == 0).all()
    assert gates.bias[1] == 0.5


@pytest.mark.parametrize("wrong", [{"threshold": 1.0}, {"hidden": 0}, {"blocks": -1}, {"lr": 0.0}])
def test_settings_that_cannot_work(wrong: dict[str, float]):
    with pytest.raises(apd.errors.InvalidSetting, match="Gates take"):
        apd.Gates(**wrong)


def test_the_selection_is_by_the_threshold():
    g = torch.tensor([[0.2, 0.6], [0.9, 0.4]])
    assert torch.equal(Open(0.5)(g), g > 0.5)
    assert ALONE.attribution == Importance()
    assert ALONE.selection.with_k(1.0) == apd.BatchTopK(1.0)


class Twice(nn.Module):
    """Every feature is computed twice, and either would do: y = min(1, 2 x + 2 x)."""

    def __init__(self, n: int) -> None:
        super().__init__()
        self.one, self.other = nn.Linear(n, n, bias=False), nn.Linear(n, n, bias=False)
        for layer in (self.one, self.other):
            layer.weight.data = 2 * torch.eye(n)

    def forward(self, x: Tensor) -> Tensor:
        return (self.one(x) + self.other(x)).clamp(0, 1)


@pytest.mark.thorough
def test_with_completeness_a_copy_belongs_to_the_component():
    """Gates alone leave the copy of an active mechanism in components that are called inactive, so that the model
    still knows a feature whose active components are out."""
    left = {}
    for completeness in (0.0, 1.0):
        model, x = Twice(4).requires_grad_(False), torch.eye(4)
        decomposition = apd.decompose(
            model,
            [x],
            n_components=8,
            rank=2,
            masks=apd.Gates(hidden=32),
            losses=apd.Losses(completeness=completeness),
            optimization=apd.Optimization(steps=600),
            progress=False,
        )
        mask = decomposition.select(x)
        with decomposition.sparse(mask):
            assert_close(model(x), x, atol=0.05, rtol=0)
        with decomposition.sparse(~mask, rest=1.0):
            left[completeness] = model(x).diagonal()
    assert (left[0.0] > 0.9).all()
    assert (left[1.0] < 0.25).all()
