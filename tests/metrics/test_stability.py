"""Stability on components whose similarity is known."""

import pytest
import torch
from support.toy_models import decomposition_of, linear_of_known_parts
from torch import Tensor
from torch.testing import assert_close

import apd_lens as apd
from apd_lens import metrics
from apd_lens.components._factors import inner_products


def rows(*parts: Tensor) -> apd.ParameterComponents:
    """One component for each vector of 4, as the first row of a 4 × 4 matrix."""
    A = torch.zeros(len(parts), 4, 1)
    A[:, 0] = 1.0
    return apd.ParameterComponents({"weight": A}, {"weight": torch.stack(parts)[:, None]})


def random_sets(n: int, n_components: int, d: int) -> list[apd.ParameterComponents]:
    return [
        apd.ParameterComponents(
            {"first": torch.randn(n_components, d, 2), "second": torch.randn(n_components, d, 2)},
            {"first": torch.randn(n_components, 2, d), "second": torch.randn(n_components, 2, d)},
        )
        for _ in range(n)
    ]


def test_inner_products_are_those_of_the_full_matrices(monkeypatch: pytest.MonkeyPatch):
    one, other = torch.randn(5, 4, 2), torch.randn(5, 2, 3)
    A, B = torch.randn(6, 4, 3), torch.randn(6, 3, 3)
    expected = (one @ other).flatten(1) @ (A @ B).flatten(1).mT
    assert_close(inner_products(one, other, A, B), expected, rtol=0, atol=1e-4)
    monkeypatch.setattr("apd_lens._memory.BUDGET", 32 * 80)  # two components at a time
    assert_close(inner_products(one, other, A, B), expected, rtol=0, atol=1e-4)


def test_permuted_components_of_any_size_are_the_same():
    (first,) = random_sets(1, 6, 20)
    order = torch.randperm(6)
    second = apd.ParameterComponents(
        {name: 3 * A.detach()[order] for name, A in first.A.items()},
        {name: B.detach()[order] for name, B in first.B.items()},
    )
    found = metrics.stability([first, second])
    assert_close(found.whole, torch.ones(2, 2), rtol=0, atol=1e-5)
    for name in ("first", "second"):
        assert_close(found.matrix[name], torch.ones(2, 2), rtol=0, atol=1e-5)
    # The largest of 6 cosines in 800 dimensions is about 1.27 / sqrt(800).
    assert found.null == pytest.approx(1.27 / 800**0.5, abs=0.02)


def test_random_components_are_at_the_level_of_the_null_control():
    found = metrics.stability(random_sets(4, 20, 10))
    # 1.87 standard deviations, the mean of the largest of 20, over the root of 200 dimensions.
    assert found.mean == pytest.approx(1.87 / 200**0.5, abs=0.02)
    assert found.null == pytest.approx(found.mean, abs=0.02)


def test_one_other_component_of_four_takes_a_fourth():
    e = torch.eye(4)
    found = metrics.stability([rows(e[0], e[1], e[2], e[3]), rows(e[0], e[1], e[2], e[0])])
    assert_close(found.whole, torch.tensor([[1.0, 0.75], [1.0, 1.0]]))


def test_components_count_by_their_norm_and_only_if_alive():
    e = torch.eye(4)
    first, second = rows(3 * e[0], e[1], 0 * e[2]), rows(e[0], e[2], e[3])
    found = metrics.stability([first, second])
    assert_close(found.whole[0, 1], torch.tensor(0.75))
    assert_close(found.whole[1, 0], torch.tensor(1 / 3))
    alive = [torch.tensor([True, False, True]), torch.tensor([True, True, False])]
    assert_close(metrics.stability([first, second], alive=alive).whole, torch.tensor([[1.0, 1.0], [0.5, 1.0]]))


def test_matrices_are_in_units_of_the_target():
    """cos = Σ_l <P, Q> / ‖W_l‖² over norms: equal in one matrix, orthogonal in another a hundred times as large."""
    e, one = torch.eye(2), torch.ones(1, 2, 1)
    pairs = [
        apd.ParameterComponents({"small": one, "large": 100 * one}, {"small": e[None, :1], "large": e[None, i : i + 1]})
        for i in (0, 1)
    ]
    found = metrics.stability(pairs)
    assert_close(found.whole[0, 1], torch.tensor(0.5))
    assert_close(found.matrix["small"][0, 1], torch.tensor(1.0))
    assert_close(found.matrix["large"][0, 1], torch.tensor(0.0))


def test_decompositions_and_the_table():
    model, parts = linear_of_known_parts()
    decompositions = [decomposition_of(model, n_components=4, rank=1, seed=seed) for seed in (0, 1)]
    with torch.no_grad():
        for decomposition in decompositions:
            for ours, known in zip(decomposition.components.parameters(), parts.parameters(), strict=True):
                ours.copy_(known)
    found = metrics.stability(decompositions)
    assert found.mean == pytest.approx(1)
    assert found.table()["matrix"].tolist() == ["all", "weight"]
    assert found.table()["best cosine"].tolist() == pytest.approx([1, 1])
    assert str(found).splitlines()[0].split("  ")[0] == "matrix"
    assert [line.split()[:3] for line in str(found).splitlines()[2:4]] == [
        ["all", "1.0000", "1.0000"],
        ["weight", "1.0000", "1.0000"],
    ]


BAD_INPUT = {
    "one only": (lambda: metrics.stability(random_sets(1, 2, 3)), apd.errors.InvalidSetting, "at least two.*got 1"),
    "other matrices": (
        lambda: metrics.stability([*random_sets(1, 2, 3), rows(torch.ones(4))]),
        apd.ShapeMismatch,
        r"number 1 of \{'weight': \(4, 4\)\}",
    ),
    "alive of one": (
        lambda: metrics.stability(random_sets(2, 2, 3), alive=[torch.ones(2, dtype=torch.bool)]),
        apd.errors.InvalidSetting,
        "each of the 2 decompositions, got 1",
    ),
    "alive of another length": (
        lambda: metrics.stability(random_sets(2, 2, 3), alive=[torch.ones(3, dtype=torch.bool)] * 2),
        apd.ShapeMismatch,
        r"each of 2 components, got \(3,\)",
    ),
}


@pytest.mark.parametrize(("call", "error", "message"), BAD_INPUT.values(), ids=BAD_INPUT)
def test_bad_input(call, error, message: str):
    with pytest.raises(error, match=message):
        call()
