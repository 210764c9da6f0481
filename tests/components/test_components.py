import pytest
import torch
from support.toy_models import ResidualMLP, decomposition_of
from torch.testing import assert_close

import apd_lens as apd
from apd_lens.components._components import initial_components, warn_of_too_few
from apd_lens.components._factors import side_by_side


@pytest.fixture
def components() -> apd.ParameterComponents:
    return decomposition_of(ResidualMLP(4, 6, 3, 1), ["layers.*"], n_components=5, rank=2).components


NAMES = ["layers.0.mlp_in.weight", "layers.0.mlp_out.weight"]


def test_shapes(components: apd.ParameterComponents):
    assert components.names == NAMES
    assert components.n_components == 5
    assert components.A[NAMES[0]].shape == (5, 6, 2)
    assert components.B[NAMES[0]].shape == (5, 2, 3)
    assert components.component_weights(NAMES[1]).shape == (5, 3, 6)


@pytest.mark.parametrize(
    "mask", [None, torch.tensor([1.0, 0, 0, 0.5, 1]), torch.tensor([True, False, True, True, False])]
)
def test_summed_is_the_sum_of_component_weights(components: apd.ParameterComponents, mask):
    weights = components.component_weights(NAMES[0])
    scale = torch.ones(5) if mask is None else mask.float()
    assert_close(components.summed(NAMES[0], mask), torch.einsum("c,cio->io", scale, weights))


def test_factors_of_all_components_are_one_matrix_without_a_copy(components: apd.ParameterComponents):
    A, B = components.requires_grad_().A[NAMES[0]], components.B[NAMES[0]]
    columns, rows = side_by_side(A, B)
    assert (columns.data_ptr(), rows.data_ptr()) == (A.data_ptr(), B.data_ptr())
    assert_close(columns @ rows, components.component_weights(NAMES[0]).sum(0))


def test_gradients_of_several_uses_add_up(components: apd.ParameterComponents):
    """As if A were no view of the parameter, which holds its transpose."""
    plain = components.A[NAMES[0]].detach().clone().requires_grad_()
    weights = torch.randn(5, 6, 2)
    for A in (plain, components.requires_grad_().A[NAMES[0]]):
        ((A * weights).sum() + A.square().sum() + A[:, 1:3].pow(3).sum() + A.mT.exp().sum()).backward()
    assert plain.grad is not None
    for parameter in components.parameters():
        if parameter.grad is not None:
            assert parameter.grad.is_contiguous()
            assert_close(parameter.grad, plain.grad.mT)
    assert sum(parameter.grad is not None for parameter in components.parameters()) == 1


def test_rank_none_is_the_full_rank_of_each_matrix():
    components = decomposition_of(ResidualMLP(4, 6, 3, 1), rank=None).components
    assert {name: A.shape[2] for name, A in components.A.items()} == {
        "W_E.weight": 4,
        **dict.fromkeys(NAMES, 3),
        "W_U.weight": 4,
    }


def test_a_rank_beyond_that_of_a_matrix_is_that_of_the_matrix():
    components = apd.init(ResidualMLP(4, 6, 3, 1), weights=["W_E.weight", *NAMES], n_components=2, rank=4).components
    assert {name: B.shape[1] for name, B in components.B.items()} == {"W_E.weight": 4, **dict.fromkeys(NAMES, 3)}


def test_the_start_is_xavier_normal():
    matrices = list(apd.wrap(torch.nn.Linear(300, 40)).weights.values())
    components = initial_components(matrices, 20, 10, torch.Generator().manual_seed(0))
    assert components.A["weight"].std().item() == pytest.approx((2 / 310) ** 0.5, rel=0.02)
    assert components.B["weight"].std().item() == pytest.approx((2 / 50) ** 0.5, rel=0.02)


@pytest.mark.parametrize(("dtype", "expected"), [(torch.bfloat16, torch.float32), (torch.float64, torch.float64)])
def test_factors_are_float32_or_better(dtype, expected):
    components = decomposition_of(torch.nn.Linear(3, 3).to(dtype)).components
    assert components.A["weight"].dtype == expected


def test_singular_values_are_those_of_the_full_matrices(components: apd.ParameterComponents):
    for name in NAMES:
        full = torch.linalg.svdvals(components.component_weights(name))[:, :2]
        assert_close(apd.components.singular_values(components, name), full, rtol=1e-4, atol=1e-5)


def test_random_components_are_twins_in_singular_values_only(components: apd.ParameterComponents):
    null = apd.components.random_components(components, seed=3)
    for name in NAMES:
        assert_close(
            apd.components.singular_values(null, name),
            apd.components.singular_values(components, name),
            rtol=1e-4,
            atol=1e-5,
        )
        cosine = torch.nn.functional.cosine_similarity(
            null.component_weights(name).flatten(1), components.component_weights(name).flatten(1)
        )
        assert cosine.abs().max() < 0.9
    assert not torch.equal(apd.components.random_components(components, seed=4).A[NAMES[0]], null.A[NAMES[0]])
    assert torch.equal(apd.components.random_components(components, seed=3).A[NAMES[0]], null.A[NAMES[0]])


@pytest.mark.parametrize(
    ("values", "expected"),
    [([3.0, 0.0, 0.0], 1.0), ([2.0, 2.0, 0.0], 2.0), ([1.0, 1.0, 1.0], 3.0), ([0.0, 0.0, 0.0], 0.0)],
)
def test_effective_rank(values: list[float], expected: float):
    assert apd.components.effective_rank(torch.tensor([values])).item() == pytest.approx(expected)


def test_shares_are_of_columns_and_rows(components: apd.ParameterComponents):
    weights = components.component_weights(NAMES[0])
    columns, rows = weights.square().sum(1), weights.square().sum(2)
    assert_close(apd.components.output_share(components, NAMES[0]), columns / columns.sum(0))
    assert_close(apd.components.input_share(components, NAMES[0]), rows / rows.sum(0))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n_components": 0}, "n_components must be at least 1, got 0"),
        ({"rank": 0}, "rank must be at least 1, or None for the full rank of each matrix; got 0"),
    ],
)
def test_sizes_that_cannot_be_are_refused(options: dict, message: str):
    with pytest.raises(apd.errors.InvalidSetting) as error:
        apd.init(torch.nn.Linear(5, 3), **{"n_components": 2, **options})
    assert message in str(error.value)


@pytest.mark.parametrize("rank", [None, 2])
def test_matrices_can_start_whole_in_components_of_their_own(rank: int | None):
    model = torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.ReLU(), torch.nn.Linear(6, 3))
    options = {"n_components": 5, "rank": rank, "seed": 1}
    random, state = (
        apd.init(model, **options, optimization=apd.Optimization(start=start)) for start in ("random", "matrices")
    )
    for number, (name, weight) in enumerate(state.weights.items()):
        parts = state.components.component_weights(name).detach()
        U, singular_values, Vh = torch.linalg.svd(weight)
        m = rank or len(singular_values)
        assert_close(parts[number], (U[:, :m] * singular_values[:m]) @ Vh[:m])
        assert not parts[1 - number].any()
        assert_close(parts[2:], random.components.component_weights(name)[2:])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n_components": 1}, "takes a component for each of the 1 matrices and needs others beside them"),
        (
            {"n_components": 4, "moves": apd.moves.DivisionMoves()},
            "DivisionMoves have a start of their own, and Optimization",
        ),
    ],
)
def test_starts_that_cannot_be_are_refused(options: dict, message: str):
    with pytest.raises(apd.errors.InvalidSetting, match=message):
        apd.init(torch.nn.Linear(5, 3), optimization=apd.Optimization(start="matrices"), **options)


def test_too_few_components_to_sum_to_a_matrix_are_warned_of():
    def components(C: int) -> apd.ParameterComponents:
        return apd.ParameterComponents(
            {"a": torch.ones(C, 5, 2), "b": torch.ones(C, 9, 2)}, {"a": torch.ones(C, 2, 4), "b": torch.ones(C, 2, 8)}
        )

    warn_of_too_few(components(4))
    with pytest.warns(apd.errors.ApdWarning, match=r"b may have rank 8 \(2 matrices are like it\)") as seen:
        warn_of_too_few(components(1))
    assert len(seen) == 1
    model = ResidualMLP(5, 4, 3, 1)
    with pytest.warns(apd.errors.ApdWarning, match=r"rank 2 at most.* Losses\(faithfulness=0\)"):
        apd.init(model, n_components=2, rank=1)
    apd.init(model, n_components=2, rank=1, losses=apd.Losses(faithfulness=0.0))
