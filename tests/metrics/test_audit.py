import math
from dataclasses import replace

import pytest
import torch
from support.known import known_parts, one_component_a_feature, one_hot_batches
from support.toy_models import ResidualMLP, Snapshot, decomposition_of
from torch import Tensor, nn
from torch.testing import assert_close

import apd_lens as apd
from apd_lens import metrics
from apd_lens._draws import draws
from apd_lens.metrics._audit import WORST_FOR_ALL, WORST_OF_EACH

FEW = {"ladder": (2, 4), "unions": (1, 2), "n_draws": 1, "progress": False}
WORST = (WORST_OF_EACH, WORST_FOR_ALL)


def rows(audit: metrics.Audit) -> dict[str, list[list[float]]]:
    """Name -> loss, null and random of each row of that name."""
    found: dict[str, list[list[float]]] = {}
    for row, what in enumerate(audit.what):
        found.setdefault(what, []).append([column[row].item() for column in (audit.loss, audit.null, audit.random)])
    return found


def with_more(decomposition: apd.Decomposition, scales: list[float]) -> apd.Decomposition:
    """Further components, each so many times the first one."""
    sides = []
    for side, scale in ((decomposition.components.A, scales), (decomposition.components.B, [1.0] * len(scales))):
        more = torch.tensor(scale)[:, None, None]
        sides.append({name: torch.cat([factor, more * factor[:1]]) for name, factor in side.items()})
    return replace(decomposition, components=apd.ParameterComponents(*sides).requires_grad_(False))


def first_alone(n_components: int):
    """A mask function: data points are rows of the identity, and the first components are active on one each."""
    return lambda batch: torch.eye(len(batch), n_components)


def two_layers() -> tuple[apd.Decomposition, Tensor]:
    torch.manual_seed(0)
    return decomposition_of(nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))), torch.randn(6, 4)


def test_exact_components_pass_and_their_nulls_do_not():
    audit = metrics.audit(one_component_a_feature(), one_hot_batches(n_batches=2), **FEW)
    found = rows(audit)
    nothing = found.pop("nothing")[0][0]
    ((own, of_others, of_random),) = found.pop("all but the active ones")
    assert own == pytest.approx(nothing)  # without its component, nothing of a data point is left
    assert of_others == 0
    assert of_random < own / 2
    ((noise, noise_null, _),) = found.pop("noise for the others")
    assert noise < noise_null  # noise matters to all; exact components are on
    for what, of_name in found.items():
        for loss, null, random in of_name:
            assert abs(loss) < 1e-12, what
            if what not in ("everything", "all components", "all but those never active") and not math.isnan(null):
                assert null > 0.1 * nothing, what
            assert not random < 0.1 * nothing or what == "all but those never active", what
    assert (audit.n_data_points, audit.n_active, audit.n_never_active, audit.n_components) == (96, 1, 0, 6)
    assert audit.rest < 1e-6
    assert audit.never_active == 0
    assert audit.matched == 1


def test_the_attack_finds_a_copy_that_is_said_to_be_inactive():
    """W = diag(1, 2, 3, 4) is applied to its four inputs. There are four exact components, and the first once more. The
    worst is the copy on and the rest off, or the other way round; either changes the first output by 1."""
    decomposition = with_more(known_parts(), [1.0])
    audit = metrics.audit(decomposition, [torch.eye(4)], masks=first_alone(5), **FEW)
    found = rows(audit)
    worst = 1 / 4 / 4  # of 4 outputs, on one data point of 4
    assert found["active ones alone"][0][0] == 0
    assert found["active ones alone"][0][1] > worst
    assert found["all components"][0][0] == pytest.approx(worst)
    for what in WORST:
        assert [loss for loss, _, _ in found[what]] == pytest.approx([worst, worst])
    assert audit.n_never_active == 1
    assert (audit.never_active, audit.rest) == pytest.approx((1 / 30**0.5, 1 / 30**0.5))
    assert found["all but those never active"][0][0] == pytest.approx(worst)  # the rest, less the copy, is on


def test_random_masks_find_an_inactive_pair_that_cancels():
    """P and −P of size 2 beside exact components: E[(u − v)²] = 1/6."""
    decomposition = with_more(known_parts(), [2.0, -2.0])
    x = torch.eye(4).repeat(200, 1)
    audit = metrics.audit(decomposition, [x], masks=lambda batch: first_alone(6)(x[:4]).repeat(200, 1), **FEW)
    found, worst = rows(audit), 4 / 4 / 4
    for what in ("all components", "active ones alone", "active ones and the rest", "with active ones of others"):
        assert found[what][0][0] == 0
    assert found["a random part of the others"][0][0] == pytest.approx(worst / 6, rel=0.2)
    for what in WORST:
        assert found[what][-1][0] == pytest.approx(worst)


def test_the_ladder_rises_and_never_lies_below_draws():
    model = ResidualMLP(6, 8, 4, 1)
    before = Snapshot.of(model)
    decomposition = decomposition_of(model, ["layers.*"], n_components=5, rank=2)
    batches = [torch.randn(12, 6)]
    audit = metrics.audit(decomposition, batches, ladder=(2, 4, 8), unions=(), n_draws=1, progress=False)
    before.assert_unchanged(model)
    found = rows(audit)
    drawn = found["a random part of the others"][0][0]
    for what in WORST:
        steps, losses, null = audit.ladder(what)
        assert steps == [2, 4, 8]
        assert (losses.diff() >= 0).all()
        assert losses[0] > found["active ones alone"][0][0]
        assert null == found[what][0][1] > 0
    assert found[WORST_OF_EACH][-1][0] > found[WORST_OF_EACH][0][0] > 1.2 * max(drawn, found[WORST_FOR_ALL][0][0])


def test_rows_are_what_the_contexts_give():
    decomposition, x = two_layers()
    model, mask = decomposition.target.model, decomposition.select(x)
    parts = {4: mask[:4], 2: mask[4:]}
    found = rows(metrics.audit(decomposition, [x[:4], x[4:]], masks=lambda batch: parts[len(batch)], **FEW))
    never = ~mask.any(0)
    for what, shares, rest in (
        ("everything", torch.ones_like(mask), 1.0),
        ("all components", torch.ones_like(mask), 0.0),
        ("active ones and the rest", mask, 1.0),
        ("active ones alone", mask, 0.0),
        ("nothing", torch.zeros_like(mask), 0.0),
        ("all but those never active", (~never).expand(6, -1), 1.0),
    ):
        with decomposition.sparse(shares, rest):
            other = model(x)
        assert found[what][0][0] == pytest.approx(metrics.agreement(model(x), other).mse, rel=1e-4, abs=1e-12), what


def test_unions_by_brute_force():
    decomposition, x = two_layers()
    model, mask = decomposition.target.model, decomposition.select(x)
    found = rows(metrics.audit(decomposition, [x], ladder=(1,), unions=(1, 3), n_draws=1, seed=7, progress=False))
    order = torch.randperm(6, generator=draws(7, "audit", "order")).tolist()
    for k, of_k in zip((1, 3), found["with active ones of others"], strict=True):
        for first, came in ((0, of_k[0]), (1, of_k[1])):
            losses = []
            for place in range(6):
                chosen = [order[(place + step) % 6] for step in range(first, first + k + 1)]
                union = torch.stack([mask[other] for other in chosen]).any(0)
                one = x[order[place]][None]
                with decomposition.sparse(union[None]):
                    sparse = model(one)
                losses.append(metrics.agreement(model(one), sparse).mse)
            assert came == pytest.approx(sum(losses) / 6, rel=1e-4)


def test_twins_by_brute_force():
    """Components 0 and 1 are active on two data points each, 2 and 3 on one. A twin takes the place of each."""
    decomposition = known_parts()
    x = torch.tensor([[1.0, 1, 1, 1]]).repeat(6, 1)
    mask = torch.eye(4)[[0, 0, 1, 1, 2, 3]]
    found = rows(metrics.audit(decomposition, [x], masks=lambda batch: mask, **FEW))
    own, twins, random = found["all but the active ones"][0]
    assert own == pytest.approx((2 * 1 + 2 * 4 + 9 + 16) / 4 / 6)
    assert twins == pytest.approx((2 * 4 + 2 * 1 + 16 + 9) / 4 / 6)
    assert random > 0


def test_a_seed_says_all():
    decomposition, x = two_layers()
    torch.manual_seed(1)
    one = metrics.audit(decomposition, [x], **FEW)
    torch.manual_seed(2)
    assert str(metrics.audit(decomposition, [x], **FEW)) == str(one)
    assert str(metrics.audit(decomposition, [x], seed=1, **FEW)) != str(one)


def test_the_bar_counts_every_pass(monkeypatch):
    bars = []

    class Bar:
        def __init__(self, total, disable, **_):
            self.total, self.n, self.disable = total, 0, disable
            bars.append(self)

        def update(self):
            self.n += 1

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

    monkeypatch.setattr("apd_lens.metrics._audit.tqdm", Bar)
    decomposition, x = two_layers()
    metrics.audit(decomposition, [x, x], **(FEW | {"progress": True}))
    metrics.audit(known_parts(), [torch.eye(4)], **FEW)
    assert [bar.disable for bar in bars] == [False, True]
    assert all(bar.n == bar.total for bar in bars)


class Padded(nn.Module):
    """Each position is mixed with those before it; called as a language model is."""

    def __init__(self):
        super().__init__()
        self.read, self.write = nn.Linear(4, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor, attention_mask: Tensor) -> Tensor:
        return self.write(torch.tanh(self.read(x) * attention_mask[..., None]).cumsum(1))


@pytest.mark.parametrize(("granularity", "distance"), [("example", "mse"), ("position", "kl")])
def test_padding_changes_nothing(granularity: str, distance: str):
    selection = apd.TopK(2, granularity)
    decomposition = decomposition_of(Padded(), n_components=5, rank=2, selection=selection)
    settings = replace(decomposition.settings, losses=apd.Losses(distance=distance))
    decomposition = replace(decomposition, settings=settings)
    few, x, lengths = FEW | {"ladder": (2,), "unions": (1,)}, torch.randn(3, 4, 4), (4, 2, 3)
    attention_mask = (torch.arange(4) < torch.tensor(lengths)[:, None]).long()
    alone = [{"x": x[[i], :length], "attention_mask": attention_mask[[i], :length]} for i, length in enumerate(lengths)]
    padded = metrics.audit(decomposition, [{"x": x, "attention_mask": attention_mask}], **few)
    expected = metrics.audit(decomposition, alone, **few)
    assert padded.n_data_points == expected.n_data_points == (3 if granularity == "example" else 9)
    for column in ("loss", "null", "random"):
        assert_close(getattr(padded, column), getattr(expected, column), rtol=1e-3, atol=1e-6, equal_nan=True)


def test_masks_of_others_may_be_fractions():
    decomposition, x = two_layers()
    assert str(metrics.audit(decomposition, [x], masks=decomposition.select, **FEW)) == str(
        metrics.audit(decomposition, [x], **FEW)
    )
    part = torch.rand(6, 5)
    found = rows(metrics.audit(decomposition, [x], masks=lambda batch: part, **FEW))
    with decomposition.sparse(part):
        sparse = decomposition.target.model(x)
    expected = metrics.agreement(decomposition.target.model(x), sparse).mse
    assert found["active ones alone"][0][0] == pytest.approx(expected, rel=1e-4)


def test_what_is_not_a_number_counts_as_infinite():
    """Its logarithm has no value where too little of the weights is on."""

    class Log(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 4, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            return (self.layer(x) - 0.5).log()

    model = Log()
    with torch.no_grad():
        model.layer.weight.copy_(torch.eye(4) + 0.01)
    e = torch.eye(4)
    decomposition = replace(
        decomposition_of(model, n_components=4),
        components=apd.ParameterComponents({"layer.weight": e[:, :, None]}, {"layer.weight": e[:, None]}),
    )
    audit = metrics.audit(decomposition, [torch.ones(3, 4)], masks=lambda batch: torch.ones(3, 4), **FEW)
    found = rows(audit)
    assert found["nothing"][0][0] == math.inf
    assert found["active ones alone"][0][0] < 0.1
    assert "inf" in str(audit)


def test_an_audit_is_printed_and_is_a_table():
    decomposition, x = two_layers()
    audit = metrics.audit(decomposition, [x], **FEW)
    lines = str(audit).splitlines()
    assert lines[0].split() == ["the", "model", "runs", "on", "n", "loss", "null", "random"]
    assert len(lines) == len(audit.what) + 5
    assert max(map(len, lines)) <= 120
    assert lines[-3].startswith("6 data points with 2 of 5 components active")
    assert list(audit.table().columns) == ["what", "n", "loss", "null", "random"]
    assert audit.table()["what"].tolist() == audit.what


def test_with_one_matrix_there_is_no_subset_of_matrices():
    found = rows(metrics.audit(known_parts(), [torch.eye(4)], **FEW))
    assert "active ones alone, in some matrices" not in found


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"ladder": ()}, apd.errors.InvalidSetting, "ladder must be whole numbers that rise from 1"),
        ({"ladder": (4, 2)}, apd.errors.InvalidSetting, r"got \(4, 2\)"),
        ({"unions": (0, 2)}, apd.errors.InvalidSetting, "unions must be"),
        ({"n_draws": 0}, apd.errors.InvalidSetting, "at least 1, got 0"),
        ({"batches": [torch.eye(4)[:1]]}, apd.errors.InvalidSetting, "at least two; got one"),
        ({"batches": []}, apd.errors.InvalidBatches, "empty"),
        ({"batches": [torch.full((2, 4), math.nan)]}, apd.NonFinite, "input tensor 0"),
        ({"masks": lambda batch: torch.ones(4, 3)}, apd.ShapeMismatch, r"shape \(4, 4\) or .* got \(4, 3\)"),
        ({"masks": lambda batch: None}, apd.ShapeMismatch, "got NoneType"),
        ({"masks": lambda batch: 2 * torch.eye(4)}, apd.ShapeMismatch, "between 0 and 1"),
        (
            {"masks": lambda batch: torch.eye(4), "batches": [torch.full((4, 4), math.inf)]},
            apd.NonFinite,
            "audit: input tensor 0",
        ),
    ],
)
def test_what_cannot_be_audited_is_refused(options: dict, error: type, message: str):
    batches = options.pop("batches", [torch.eye(4)])
    with pytest.raises(error, match=message):
        metrics.audit(known_parts(), batches, **(FEW | options))


@pytest.mark.parametrize("masks", [None, lambda batch: torch.eye(4)])
def test_an_audit_needs_the_output_function(masks):
    with pytest.raises(apd.errors.InvalidSetting, match=r"load\(path, model, output=...\)"):
        metrics.audit(replace(known_parts(), output=None), [torch.eye(4)], masks=masks, **FEW)
