"""How unusual inputs are: counts and scores known by hand, planted anomalies, and the same for random components."""

from dataclasses import replace

import pytest
import safetensors.torch
import torch
from support import outside
from support.toy_models import (
    Snapshot,
    TinyGPT,
    decomposition_of,
    interrupted_in_forward,
    linear_of_known_parts,
    tiny_gpt2,
)
from torch import Tensor
from torch.testing import assert_close

import apd_lens as apd
from apd_lens import monitor as watch
from apd_lens.decomposition import _artifact


def known_parts(selection: apd.BatchTopK | apd.TopK | apd.Lp, scale: float = 1.0) -> apd.Decomposition:
    """y = x diag(1, 2, 3, 4), a component each, times `scale`; A_c(x) = c |x_c| / 2 with c from 1."""
    model, components = linear_of_known_parts()
    components = apd.ParameterComponents({"weight": components.A["weight"] * scale}, components.B)
    start = decomposition_of(model, rank=1)
    return replace(start, components=components, settings=replace(start.settings, selection=selection))


def pairs(*features: tuple[int, ...]) -> Tensor:
    """A row for each set of features that are 1."""
    x = torch.zeros(len(features), 4)
    for row, some in enumerate(features):
        x[row, list(some)] = 1
    return x


# 0 with 1 or alone, 2 now and then alone, 3 never.
REFERENCE = pairs(*[(0, 1)] * 60, *[(0,)] * 30, *[(2,)] * 9, ())


def test_counts_are_those_of_the_active_components():
    monitor = watch.fit(known_parts(apd.Lp(threshold=0.1)), REFERENCE.split(7))
    assert_close(
        monitor.coactivation, torch.tensor([[90, 60, 0, 0], [60, 60, 0, 0], [0, 0, 9, 0], [0, 0, 0, 0]]).double()
    )
    assert (monitor.n_data_points, monitor.n_empty) == (100, 1)
    assert str(monitor) == (
        "Monitor of 4 components on 100 data points of reference: 1.59 are active on a data point, 1 never are"
    )


def test_surprise_by_hand():
    """p = 90.5, 60.5, 9.5 and 0.5 of 101. Of 0 and 2 together, never seen, chance would have brought 8.5."""
    monitor = watch.fit(known_parts(apd.Lp(threshold=0.1)), [REFERENCE])
    scores = monitor.score(pairs((0,), (0, 1), (2,), (3,), (0, 2), (1, 2, 3), ()))
    p0, p1, p2, p3 = (number / 101 for number in (90.5, 60.5, 9.5, 0.5))
    expected = [p0, p1, p2, p3, p2 / (90 * p2 + 1), p3 / (60 * p3 + 1), 1.5 / 101]
    # beside 1, 3 is rarer than beside 2: chance would have brought it more often
    assert_close(scores.surprise.double(), -torch.tensor(expected).double().log(), rtol=1e-5, atol=1e-5)
    assert scores.component.tolist() == [0, 1, 2, 3, 2, 3, -1]
    assert scores.given.tolist() == [-1, -1, -1, -1, 0, 1, -1]


def test_a_pair_as_frequent_as_by_chance_is_no_rarer_than_its_parts():
    on = torch.cartesian_prod(*[torch.arange(2)] * 4).float()  # every set once: all are independent
    monitor = watch.fit(known_parts(apd.Lp(threshold=0.1)), [on.repeat(20, 1)])
    assert_close(monitor.score(on[1:]).surprise, torch.full((15,), 2.0).log(), rtol=0.01, atol=0.01)


def test_residual_by_hand():
    """Components of half the size leave half of y: distances are mean (y / 2)², and log-normal ones stay so."""
    decomposition = known_parts(apd.Lp(threshold=0.0), scale=0.5)
    log_size = torch.randn(400)
    x = torch.zeros(400, 4)
    x[:, 0] = log_size.exp()
    monitor = watch.fit(decomposition, x.split(64))
    distances = (2 * log_size).exp() / 16
    assert_close(monitor.score(x).distance, distances, rtol=1e-4, atol=1e-6)
    floor = distances.mean() / 1000
    logarithms = (distances + floor).log()
    expected = (logarithms - logarithms.mean()) / logarithms.std()
    assert_close(monitor.score(x).residual, expected, rtol=1e-3, atol=1e-3)
    far = ((1e6 * distances[:5] + floor).log() - logarithms.mean()) / logarithms.std()
    assert_close(monitor.score(1e3 * x[:5]).residual, far, rtol=1e-3, atol=1e-3)
    assert (far > 5).all()


def test_where_the_components_explain_everything_any_residual_is_unusual():
    decomposition = known_parts(apd.Lp(threshold=0.4))
    monitor = watch.fit(decomposition, [REFERENCE])
    assert monitor.score(REFERENCE).residual.tolist() == [0] * 100
    assert monitor.score(0.5 * pairs((0, 3))).residual.item() > 10  # of which 0 is below the threshold


def test_the_rest_of_the_batch_does_not_matter():
    """Batch top-k would select less of an input among inputs that are all unusual."""
    decomposition = known_parts(apd.BatchTopK(1.5), scale=0.9)
    monitor = watch.fit(decomposition, torch.rand(200, 4).split(50))
    x = torch.rand(30, 4)
    together, alone = monitor.score(x), [monitor.score(row[None]) for row in x]
    for name in ("surprise", "component", "given", "distance", "residual"):
        assert_close(getattr(together, name), torch.cat([getattr(one, name) for one in alone]))
    attributions = decomposition.attributions(x)
    assert isinstance(monitor.selection, apd.Lp)
    assert monitor.selection.threshold == pytest.approx(attributions.quantile(1 - 1.5 / 4).item(), rel=0.2)


def test_k_as_in_select():
    decomposition = known_parts(apd.TopK(1))
    assert watch.fit(decomposition, [REFERENCE + 0.01], k=2).selection == apd.TopK(2)
    assert watch.fit(decomposition, [REFERENCE + 0.01]).coactivation.diagonal().sum() == 100


def correlated(n: int, forbidden: bool, generator: torch.Generator) -> Tensor:
    """Two of four features at once, 0 and 1 never together, nor 2 and 3; or exactly those."""
    sets = torch.tensor([[0, 1], [2, 3]] if forbidden else [[0, 2], [0, 3], [1, 2], [1, 3]])
    chosen = sets[torch.randint(len(sets), (n,), generator=generator)]
    return torch.zeros(n, 4).scatter_(1, chosen, 0.5 + 0.5 * torch.rand(n, 2, generator=generator))


def test_combinations_never_seen_are_found_and_by_random_components_are_not():
    """A Mahalanobis distance finds them too, in a model without superposition: the covariance knows."""
    generator = torch.Generator().manual_seed(0)
    reference, normal, odd = (correlated(300, forbidden, generator) for forbidden in (False, False, True))
    x, anomalous = torch.cat([normal, odd]), torch.arange(600) >= 300
    decomposition = known_parts(apd.Lp(threshold=0.1), scale=0.9)
    scores = watch.fit(decomposition, [reference]).score(x)
    assert apd.metrics.auroc(scores.surprise, anomalous) == 1
    found = zip(scores.component[300:].tolist(), scores.given[300:].tolist(), strict=True)
    assert {frozenset(pair) for pair in found} == {frozenset((0, 1)), frozenset((2, 3))}
    assert abs(apd.metrics.auroc(scores.residual, anomalous) - 0.5) < 0.1
    shuffled = apd.metrics.auroc(scores.surprise, anomalous[torch.randperm(600, generator=generator)])
    assert abs(shuffled - 0.5) < 0.1
    null = replace(
        known_parts(apd.BatchTopK(2.0)), components=apd.components.random_components(decomposition.components, 1)
    )
    assert apd.metrics.auroc(watch.fit(null, [reference]).score(x).surprise, anomalous) < 0.8
    assert apd.metrics.auroc(watch.mahalanobis([reference]).score(x), anomalous) == 1


@pytest.mark.parametrize("granularity", ["example", "position"])
def test_positions_and_padding(granularity: str):
    model = tiny_gpt2()
    decomposition = decomposition_of(model, "*mlp*", selection=apd.BatchTopK(1.0, granularity=granularity))
    tokens = torch.randint(13, (6, 5))
    attention_mask = torch.ones(6, 5, dtype=torch.long)
    attention_mask[2, 3:] = 0
    batch = {"input_ids": tokens, "attention_mask": attention_mask}
    monitor = watch.fit(decomposition, [batch])
    scores = monitor.score(batch)
    if granularity == "example":
        assert scores.surprise.shape == scores.residual.shape == (6,)
        assert monitor.n_data_points == 6
    else:
        assert scores.surprise.shape == scores.residual.shape == (6, 5)
        assert monitor.n_data_points == 28
        assert scores.surprise[2, 3:].tolist() == scores.residual[2, 3:].tolist() == [0, 0]
        assert scores.component[2, 3:].tolist() == [-1, -1]
    short = {"input_ids": tokens[2:3, :3], "attention_mask": attention_mask[2:3, :3]}
    expected = monitor.score(short)
    for name in ("surprise", "residual"):
        ours, theirs = getattr(scores, name)[2:3], getattr(expected, name)
        assert_close(ours[:, :3] if granularity == "position" else ours, theirs, rtol=1e-3, atol=1e-3)


def test_the_model_is_left_alone():
    model = TinyGPT()
    decomposition = decomposition_of(model)
    tokens = torch.randint(11, (4, 5))
    before = Snapshot.of(model)
    monitor = watch.fit(decomposition, [tokens, tokens])
    monitor.score(tokens)
    before.assert_unchanged(model)
    for forward in (1, 2, 3):
        with interrupted_in_forward(model.proj, forward), pytest.raises(KeyboardInterrupt):
            monitor.score(tokens)
        before.assert_unchanged(model)


def test_save_and_load(tmp_path):
    for selection in (apd.BatchTopK(1.0), apd.TopK(2)):
        decomposition = known_parts(selection, scale=0.9)
        monitor = watch.fit(decomposition, [torch.rand(50, 4)])
        monitor.save(tmp_path / "monitor.safetensors")
        loaded = watch.load(tmp_path / "monitor.safetensors", decomposition)
        x = torch.rand(20, 4)
        for name, value in vars(monitor.score(x)).items():
            assert torch.equal(getattr(loaded.score(x), name), value)
    with pytest.raises(apd.ArtifactError, match="fitted to other components"):
        watch.load(tmp_path / "monitor.safetensors", known_parts(apd.TopK(2), scale=0.8))
    with pytest.raises(apd.ArtifactError, match="Expected a file"):
        watch.load(tmp_path / "nothing", decomposition)
    safetensors.torch.save_file({"x": torch.ones(1)}, tmp_path / "other.safetensors")
    with pytest.raises(apd.ArtifactError, match="no monitor"):
        watch.load(tmp_path / "other.safetensors", decomposition)
    (tmp_path / "damaged").write_bytes(b"nonsense that is no file")
    with pytest.raises(apd.ArtifactError, match="Expected a file"):
        watch.load(tmp_path / "damaged", decomposition)


def test_a_monitor_with_a_digest_that_fits_must_work_too(tmp_path):
    decomposition = known_parts(apd.TopK(2))
    watch.fit(decomposition, [torch.rand(50, 4)]).save(tmp_path / "monitor")
    tensors, about, unchanged = _artifact.read_tensors(tmp_path / "monitor", at_most=10**4)
    assert unchanged
    together, numbers = tensors["together"], tensors["numbers"]
    other_tensors = [
        {},
        {"together": together},
        {"together": together[:-1].clone(), "numbers": numbers},
        {"together": together.half(), "numbers": numbers},
        {"together": together.to(torch.float8_e4m3fn), "numbers": numbers},
        {"together": together.long(), "numbers": numbers},
        {"together": together * torch.nan, "numbers": numbers},
        {"together": -together, "numbers": numbers},
        {"together": together, "numbers": numbers[:4].clone()},
        {"together": together, "numbers": -numbers},
        {"together": together, "numbers": numbers * torch.inf},
    ]
    other_selections = ["", "[", "[" * 100_000, "3", "{}", '{"type": "Settings"}', '{"type": "TopK", "k": 99}']
    other_selections += ['{"type": "TopK", "k": 2, "granularity": "position"}', '{"type": "Lp"}', '{"type": "TopK"}']
    cases = [(changed, about) for changed in other_tensors]
    cases += [(tensors, about | {"selection": selection}) for selection in other_selections]
    cases += [
        (tensors, {}),
        (tensors, {"format": about["format"]}),
        (tensors, about | {"format": "apd_lens monitor 3"}),
    ]
    cases += [(tensors, {key: value for key, value in about.items() if key != "selection"})]
    for changed, known in cases:
        _artifact.write_tensors(tmp_path / "monitor", changed, known)
        with pytest.raises(apd.ArtifactError):
            watch.load(tmp_path / "monitor", decomposition)


def test_a_monitor_of_the_first_release_loads(tmp_path):
    """It has no digest."""
    decomposition = known_parts(apd.TopK(2))
    monitor = watch.fit(decomposition, [torch.rand(50, 4)])
    monitor.save(tmp_path / "new")
    tensors, about, _ = _artifact.read_tensors(tmp_path / "new", at_most=10**4)
    safetensors.torch.save_file(tensors, tmp_path / "old", about | {"format": "apd_lens monitor 1"})
    assert torch.equal(watch.load(tmp_path / "old", decomposition).coactivation, monitor.coactivation)


def test_what_cannot_be_a_reference_is_refused():
    decomposition = known_parts(apd.TopK(1))
    with pytest.raises(apd.errors.InvalidBatches, match=r"Of one batch give \[batch\]"):
        watch.fit(decomposition, torch.rand(5, 4))
    with pytest.raises(apd.errors.InvalidBatches, match="The stream of batches is empty"):
        watch.fit(decomposition, [])
    with pytest.raises(apd.errors.InvalidBatches, match="at least 2 data points"):
        watch.fit(decomposition, [torch.rand(1, 4)])
    with pytest.raises(apd.NonFinite):
        watch.fit(decomposition, [torch.full((5, 4), torch.nan)])


def test_an_edited_model_is_not_watched():
    decomposition = known_parts(apd.TopK(1))
    monitor = watch.fit(decomposition, [torch.rand(5, 4)])
    with apd.apply_edit(decomposition.target.model, decomposition, 0), pytest.raises(apd.errors.AlreadyActive):
        monitor.score(torch.rand(5, 4))


def test_mahalanobis_by_hand():
    """Variances 4 and 1 and no covariance: (2, 0) and (0, 1) are both one standard deviation away."""
    rows = torch.tensor([[2.0, 1.0], [-2.0, 1.0], [2.0, -1.0], [-2.0, -1.0]]) + 5
    monitor = watch.mahalanobis(rows.split(3), ridge=0.0)
    assert_close(monitor.mean, torch.tensor([5.0, 5.0]).double())
    scores = monitor.score(torch.tensor([[5.0, 5.0], [7.0, 5.0], [5.0, 6.0], [9.0, 5.0]]))
    assert_close(scores, torch.tensor([0.0, 1.0, 1.0, 4.0]).double())


@pytest.mark.parametrize(
    ("scores", "anomalous", "expected"),
    [
        ([0, 1, 2, 3], [0, 0, 1, 1], 1.0),
        ([3, 2, 1, 0], [0, 0, 1, 1], 0.0),
        ([1, 1, 1, 1], [0, 1, 0, 1], 0.5),
        ([0, 1, 1, 2, torch.inf], [0, 0, 1, 0, 1], (1.5 + 3) / 6),
    ],
)
def test_auroc(scores: list[float], anomalous: list[int], expected: float):
    assert apd.metrics.auroc(torch.tensor(scores).float(), torch.tensor(anomalous).bool()) == pytest.approx(expected)


def test_what_has_no_auroc():
    came = outside.errors_of(
        "import torch\nimport apd_lens as apd\nones = torch.ones(3)",
        [
            "apd.metrics.auroc(ones, ones.bool())",
            "apd.metrics.auroc(ones / 0 * 0, torch.tensor([True, False, False]))",
            "apd.metrics.auroc(ones, torch.ones(4).bool())",
        ],
    )
    assert came[0].startswith("InvalidSetting: AUROC compares anomalous with normal data points, got 3 anomalous and 0")
    assert came[1].startswith("NonFinite: auroc: the scores hold NaN")
    assert came[2].startswith("ShapeMismatch")


def test_scores_are_printed_as_the_largest_surprises():
    surprise = torch.arange(60.0).view(6, 10)
    whole = torch.arange(60).view(6, 10)
    lines = str(apd.monitor.Scores(surprise, whole, whole - 50, surprise / 7, -surprise)).splitlines()
    assert len(lines) <= 25
    assert lines[0] == "surprise of 60 data points: median 29.00 nats. The largest:"
    assert lines[3].split() == ["5", "9", "59.00", "59", "9", "8.43", "-59.00"]
    table = apd.monitor.Scores(surprise, whole, whole - 50, surprise / 7, -surprise).table()
    assert table.loc[59, ["example", "position", "surprise", "given"]].tolist() == [5, 9, 59, 9]
    examples = str(apd.monitor.Scores(surprise[:, 0], whole[:, 0], whole[:, 0] - 50, surprise[:, 0], -surprise[:, 0]))
    assert examples.splitlines()[3].split() == ["5", "-", "50.00", "50", "0", "50", "-50.00"]
