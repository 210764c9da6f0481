"""What edits do: distances in closed form on a linear model, edits of the same rank, and the nulls beside them."""

from dataclasses import replace

import pytest
import torch
from support.hooked import hooked_transformer, tokens
from support.toy_models import (
    Snapshot,
    TinyGPT,
    decomposition_of,
    interrupted_in_forward,
    linear_of_known_parts,
    tiny_gpt2,
)
from torch import Tensor, nn
from torch.testing import assert_close

import apd_lens as apd
from apd_lens import compare
from apd_lens.compare import _edits

ON = torch.eye(4)[1:2].repeat(3, 1)  # feature 1
OTHER = torch.eye(4)[[0, 2, 3]].repeat(100, 1)


@pytest.fixture
def decomposition() -> apd.Decomposition:
    """y = x diag(1, 2, 3, 4), a component each."""
    model, components = linear_of_known_parts()
    start = decomposition_of(model, rank=1)
    return apd.Decomposition(start.target, components, start.settings, start.output, start.fingerprints)


def row(effects: compare.EditEffects, kind: str) -> int:
    return effects.kind.index(kind)


def test_mse_in_closed_form(decomposition: apd.Decomposition):
    """Without component 1, of size 2, y changes by 2 in one of four outputs where feature 1 is on, and nowhere else."""
    before = Snapshot.of(decomposition.target.model)
    effects = compare.edit_effects(decomposition, 1, [ON], OTHER.split(64), n_random=3, n_other=3)
    before.assert_unchanged(decomposition.target.model)
    own = row(effects, "components")
    assert_close(effects.on_target[own], torch.full((3,), 1.0))
    assert_close(effects.other[own], torch.zeros(300))
    assert effects.norm[own].item() == pytest.approx(2 / 30**0.5)
    # One singular direction responds to feature 1, so both SVDs find the same edit here.
    for kind in ("singular directions", "whitened inputs"):
        assert_close(effects.on_target[row(effects, kind)], effects.on_target[own], rtol=1e-3, atol=1e-5)
        assert_close(effects.other[row(effects, kind)], effects.other[own], rtol=1e-3, atol=1e-5)
    for draw, kind in enumerate(effects.kind):
        if kind == "other components":
            other = int(effects.edit[draw])
            assert_close(effects.on_target[draw], torch.zeros(3))
            assert_close(effects.other[draw], OTHER[:, other] * (other + 1) ** 2 / 4)
        if kind == "random components":
            assert effects.norm[draw].item() == pytest.approx(2 / 30**0.5, rel=1e-4)
            assert effects.on_target[draw].mean() < 0.9
            assert effects.other[draw].mean() > 0.001


def test_kl_in_closed_form(decomposition: apd.Decomposition):
    """Logits (0, 2, 0, 0) become (0, 0, 0, 0): KL of the softmax from the uniform distribution."""
    effects = compare.edit_effects(
        decomposition, 1, [ON], [OTHER], distance="kl", metric=lambda y: y.softmax(-1)[:, 1], n_random=1, n_other=1
    )
    p = torch.tensor([0.0, 2.0, 0.0, 0.0]).softmax(-1)
    expected = (p * (p * 4).log()).sum()
    assert_close(effects.on_target[0], expected.expand(3))
    assert_close(effects.other[0], torch.zeros(300), rtol=0, atol=1e-6)
    assert effects.metric is not None
    assert effects.metric[0].item() == pytest.approx(0.25)
    assert effects.metric_before == pytest.approx(p[1].item())


def test_table_and_print(decomposition: apd.Decomposition):
    effects = compare.edit_effects(
        decomposition, [1, 2], [ON], OTHER.split(7), metric=lambda y: y[:, 1], n_random=2, n_other=1
    )
    table = effects.table()
    assert table["kind"].tolist() == [
        "components", "singular directions", "whitened inputs", "random components", "random components",
        "other components",
    ]  # fmt: skip
    assert table["edit"].tolist()[0] == "1, 2"
    assert set(table["edit"].tolist()[-1].split(", ")) == {"0", "3"}
    assert table["metric, before"].tolist() == [2.0] * 6
    assert table["metric"][0] == 0
    # Component 2, of size 3, is on for a third of the other data: 9 / 4 there.
    assert table["other, mean"][0] == pytest.approx(0.75)
    assert table["other, 99th percentile"][0] == table["other, largest"][0] == pytest.approx(2.25)
    lines = str(effects).splitlines()
    assert len(lines) == 2 + 5
    assert lines[2].split()[:2] == ["components", f"{13**0.5 / 30**0.5:.4g}"]


def test_99th_percentile_is_of_data_points_and_streaming_changes_nothing(decomposition: apd.Decomposition):
    x = torch.zeros(200, 4)
    x[:, 1] = torch.arange(200.0)
    one, many = (
        compare.edit_effects(decomposition, 1, [ON], batches, n_random=1, n_other=1) for batches in ([x], x.split(13))
    )
    assert one.table()["other, 99th percentile"][0] == pytest.approx(197**2)  # 198 of 200 are not above it
    assert_close(one.other, many.other)
    assert_close(one.on_target, many.on_target)


def test_whitened_inputs_leave_other_inputs_alone():
    """x = (1, 1) is on target and (1, 0) elsewhere: taking out what reads (0, 1) leaves nothing of x W but that of
    (1, 0), so the edit must read x along what the other data lacks."""
    weight = torch.tensor([[1.0, 2.0], [3.0, 5.0]])
    on, other = (torch.outer(x, x).double() for x in (torch.tensor([1.0, 1.0]), torch.tensor([1.0, 0.0])))
    A, B = _edits.whitened_inputs(weight, on, other, rank=1)
    delta = A @ B
    assert_close(torch.tensor([1.0, 1.0]) @ delta, torch.tensor([4.0, 7.0]), rtol=1e-3, atol=1e-3)
    assert_close(torch.tensor([1.0, 0.0]) @ delta, torch.zeros(2), rtol=0, atol=1e-2)
    A, B = _edits.singular_directions(weight, on, other, rank=1)
    assert (torch.tensor([1.0, 0.0]) @ A @ B).norm() > 0.5  # directions of the weights alone do not know that


def test_of_a_lookup_rows_are_taken_out():
    weight, on, other = torch.randn(5, 3), torch.tensor([0, 0, 1, 0, 0.5]), torch.tensor([1.0, 1, 0, 1, 0.5])
    A, B = _edits.whitened_inputs(weight, on.double(), other.double(), rank=1)
    expected = torch.zeros(5, 3)
    expected[2] = weight[2]
    assert_close(A @ B, expected)


@pytest.mark.parametrize("chosen", [[1], [0, 3]])
def test_the_other_edits_have_the_same_rank(chosen: list[int]):
    model = hooked_transformer()
    decomposition = decomposition_of(model, ["*mlp*", "*W_O", "embed*"], rank=2)
    for edit in _edits._edits_by_svd(decomposition, chosen, [tokens(3)], [tokens(5)]):
        for name in edit.components.names:
            ours = decomposition.components.component_weights(name)[chosen].sum(0)
            theirs = edit.components.component_weights(name)[0]
            assert torch.linalg.matrix_rank(theirs, rtol=1e-4) == torch.linalg.matrix_rank(ours, rtol=1e-4), name


@pytest.mark.parametrize("model", [TinyGPT, tiny_gpt2], ids=["TinyGPT", "GPT-2"])
def test_with_positions_padding_and_ties(model):
    """Distances of real positions only, those of the edited model run by itself."""
    model = model().eval()
    decomposition = decomposition_of(model)
    batch: dict[str, Tensor] = {"tokens" if isinstance(model, TinyGPT) else "input_ids": torch.randint(11, (4, 5))}
    n_positions = 20
    if not isinstance(model, TinyGPT):
        batch["attention_mask"] = torch.ones(4, 5, dtype=torch.long)
        batch["attention_mask"][1, 2:] = 0
        n_positions = 17
    effects = compare.edit_effects(decomposition, 2, [batch], [batch], n_random=1, n_other=1)
    assert effects.on_target.shape == (len(effects.kind), n_positions)

    def logits() -> Tensor:
        output = model(**batch)
        return getattr(output, "logits", output).detach()

    full = logits()
    with apd.apply_edit(model, decomposition, 2):
        expected = (logits() - full).square().mean(-1)
    valid = batch.get("attention_mask", torch.ones(4, 5)).bool()
    assert_close(effects.on_target[0], expected[valid], rtol=1e-3, atol=1e-5)


def test_the_model_is_left_alone_after_an_interrupt():
    model = TinyGPT()
    decomposition = decomposition_of(model)
    batch = torch.randint(11, (4, 5))
    before = Snapshot.of(model)
    for forward in (1, 2, 3, 6):
        with interrupted_in_forward(model.proj, forward), pytest.raises(KeyboardInterrupt):
            compare.edit_effects(decomposition, 0, [batch], [batch])
        before.assert_unchanged(model)


def test_what_cannot_be_measured_is_refused(decomposition: apd.Decomposition):
    with pytest.raises(apd.errors.InvalidSetting, match="needs components to take out"):
        compare.edit_effects(decomposition, [], [ON], [OTHER])
    with pytest.raises(apd.errors.InvalidSetting, match=r"3 components are taken out, and there are 1 others"):
        compare.edit_effects(decomposition, [0, 1, 2], [ON], [OTHER])
    with pytest.raises(apd.errors.InvalidSetting, match=r"distinct component numbers from 0 to 3, got \[9\]"):
        compare.edit_effects(decomposition, 1, [ON], [OTHER], others=[2, 9])
    with pytest.raises(apd.errors.InvalidBatches, match="got one tensor of shape"):
        compare.edit_effects(decomposition, 1, ON, [OTHER])
    with pytest.raises(apd.errors.InvalidBatches, match="used up before"):
        compare.edit_effects(decomposition, 1, iter([ON]), [OTHER])
    with pytest.raises(apd.ShapeMismatch, match=r"one scalar an example, shape \(3,\), got \(3, 4\)"):
        compare.edit_effects(decomposition, 1, [ON], [OTHER], metric=lambda y: y)
    with pytest.raises(apd.NonFinite, match="edit_effects: input tensor 0"):
        compare.edit_effects(decomposition, 1, [ON / 0], [OTHER])
    with pytest.raises(apd.errors.InvalidSetting, match="not saved"):
        compare.edit_effects(replace(decomposition, output=None), 1, [ON], [OTHER])
    with apd.apply_edit(decomposition.target.model, decomposition, 0), pytest.raises(apd.errors.AlreadyActive):
        compare.edit_effects(decomposition, 1, [ON], [OTHER])


def test_a_component_that_is_not_in_a_matrix():
    """Rank 0 there, so the other edits leave that matrix alone too."""
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    decomposition = decomposition_of(model, n_components=3)
    decomposition.components.B["1.weight"].data[0] = 0
    x = torch.randn(10, 3)
    effects = compare.edit_effects(decomposition, 0, [x[:2]], [x], n_random=1, n_other=1)
    assert effects.on_target[row(effects, "whitened inputs in 1.weight")].abs().max() == 0
    assert effects.on_target[row(effects, "whitened inputs in 0.weight")].min() > 0
