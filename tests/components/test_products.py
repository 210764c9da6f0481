"""A masked product is the same number whichever way it is computed."""

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

import apd_lens as apd
from apd_lens.attribution._effects import FEW, in_few_dimensions, inner_activations_of_many
from apd_lens.components import _pairs, _products
from apd_lens.components._pairs import active_pairs, cheapest_way, pairwise_product
from apd_lens.components._products import inner_activations


@pytest.fixture(params=[False, True], ids=["groups in a loop", "grouped_mm"], autouse=True)
def _kernel(request, monkeypatch):
    """grouped_mm has a kernel for the CPU too, in float32 and bfloat16, with which it can be tested here."""
    monkeypatch.setattr(_pairs, "_has_grouped_kernel", lambda rows: request.param and rows.dtype != torch.float64)


WAYS = ["grouped", "sparse"]
TOLERANCE = {torch.float64: {"rtol": 0, "atol": 1e-12}, torch.float32: {"rtol": 1e-5, "atol": 1e-5}}


def case(rank: int, dtype: torch.dtype, places: tuple[int, ...] = (6,), d_in: int = 7, d_out: int = 5):
    x = torch.randn(*places, d_in, dtype=dtype)
    A, B = torch.randn(9, d_in, rank, dtype=dtype), torch.randn(9, rank, d_out, dtype=dtype)
    return [tensor.requires_grad_() for tensor in (x, A, B)]


def outcome(product: Tensor, factors: list[Tensor]) -> list[Tensor]:
    weights = torch.linspace(-1, 1, product.numel(), dtype=product.dtype).view_as(product)
    return [product, *torch.autograd.grad((product * weights).sum(), factors)]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(("rank", "way"), [(rank, way) for rank in (1, 3) for way in WAYS])
@pytest.mark.parametrize(
    ("places", "data_axes"), [((6,), 1), ((6, 4), 1), ((6, 4), 2), ((6, 4, 2), 2)], ids=str
)  # fmt: skip
def test_pair_by_pair_equals_dense_with_gradients(dtype, rank, way, places, data_axes):
    x, A, B = case(rank, dtype, places)
    mask = torch.rand(*places[:data_axes], 9) < 0.2
    mask[0] = False  # a data point on which nothing is active
    mask[..., 3] = False  # a component that is never active
    dense = outcome(apd.components.masked_product(x, A, B, mask), [x, A, B])
    pairwise = outcome(pairwise_product(x, A, B, mask, active_pairs(mask), way), [x, A, B])
    for ours, expected in zip(pairwise, dense, strict=True):
        assert_close(ours, expected, **TOLERANCE[dtype])


@pytest.mark.parametrize(("rank", "way"), [(rank, way) for rank in (1, 3) for way in WAYS])
@pytest.mark.parametrize("data_axes", [1, 2])
def test_lookups_pair_by_pair(rank, way, data_axes):
    _, A, B = case(rank, torch.float32)
    rows, mask = torch.randint(7, (6, 4)), torch.rand(*(6, 4)[:data_axes], 9) < 0.3
    dense = outcome(apd.components.masked_product(rows, A, B, mask), [A, B])
    pairwise = outcome(pairwise_product(rows, A, B, mask, active_pairs(mask), way), [A, B])
    for ours, expected in zip(pairwise, dense, strict=True):
        assert_close(ours, expected, **TOLERANCE[torch.float32])


@pytest.mark.parametrize(("rank", "way"), [(rank, way) for rank in (1, 3) for way in WAYS])
def test_x_that_all_examples_share(rank, way):
    x, A, B = case(rank, torch.float32, (1, 4))
    mask = torch.rand(6, 9) < 0.3
    dense = outcome(apd.components.masked_product(x, A, B, mask), [x, A, B])
    pairwise = outcome(pairwise_product(x, A, B, mask, active_pairs(mask), way), [x, A, B])
    for ours, expected in zip(pairwise, dense, strict=True):
        assert_close(ours, expected, **TOLERANCE[torch.float32])


@pytest.mark.parametrize(("rank", "way"), [(rank, way) for rank in (1, 3) for way in WAYS])
def test_autocast_pair_by_pair(rank, way):
    x, A, B = case(rank, torch.float32, (6, 4), d_in=32, d_out=16)
    mask = torch.rand(6, 4, 9) < 0.3
    precise = outcome(apd.components.masked_product(x, A, B, mask), [x, A, B])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        product = pairwise_product(x, A, B, mask, active_pairs(mask), way)
        assert product.dtype == apd.components.masked_product(x, A, B, mask).dtype == torch.bfloat16
        for ours, expected in zip(outcome(product, [x, A, B]), precise, strict=True):
            assert (ours.float() - expected).norm() < 0.02 * expected.norm()


def test_sparse_products_as_on_a_gpu_are_the_same(monkeypatch):
    x, A, B = case(3, torch.float64, (6, 4))
    mask = torch.rand(6, 4, 9) < 0.3
    outcomes = []
    for has_kernel in (True, False):
        monkeypatch.setattr(_pairs, "_has_sparse_kernel", lambda x, has_kernel=has_kernel: has_kernel)
        outcomes.append(outcome(pairwise_product(x, A, B, mask, active_pairs(mask), "sparse"), [x, A, B]))
    for ours, expected in zip(*outcomes, strict=True):
        assert_close(ours, expected, **TOLERANCE[torch.float64])


@pytest.mark.parametrize("way", WAYS)
def test_what_memory_held_before_does_not_matter(way):
    x, A, B = case(3, torch.float32)
    mask = torch.rand(6, 9) < 0.3
    torch.use_deterministic_algorithms(True)  # torch then fills new memory with NaN
    try:
        assert torch.ones(1).new_empty(1).isnan()
        assert all(
            value.isfinite().all()
            for value in outcome(pairwise_product(x, A, B, mask, active_pairs(mask), way), [x, A, B])
        )
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("way", WAYS)
def test_nothing_active_at_all(way):
    x, A, B = case(3, torch.float32)
    mask = torch.zeros(6, 9, dtype=torch.bool)
    product = pairwise_product(x, A, B, mask, active_pairs(mask), way)
    assert torch.equal(product, torch.zeros(6, 5))


def test_pairs_of_a_known_number_are_the_same():
    mask = torch.rand(4, 3, 5) < 0.3
    counted, known = active_pairs(mask), active_pairs(mask, int(mask.sum()))
    assert torch.equal(counted.data_points, known.data_points)
    assert torch.equal(counted.components, known.components)
    assert counted.of_data.tolist() == mask.flatten(0, 1).sum(1).tolist()
    assert counted.of_components.tolist() == mask.flatten(0, 1).sum(0).tolist()


@pytest.mark.parametrize(
    ("n_rows", "C", "d_in", "m", "d_out", "k", "skew", "way"),
    [
        (256, 130, 1000, 50, 50, 1.28, 0, "sparse"),
        (2048, 130, 1000, 50, 50, 1.28, 1, "grouped"),
        (2048, 130, 1000, 50, 50, 130, 0, "dense"),  # everything is active
        (64, 20, 256, 4, 48, 1, 1, "dense"),  # so small that finding the active ones costs more than it saves
        (512, 512, 768, 1, 3072, 16, 0, "sparse"),
        (512, 4096, 768, 1, 768, 16, 0, "sparse"),
    ],
)
def test_the_cheapest_way(n_rows, C, d_in, m, d_out, k, skew, way):
    scores = torch.rand(n_rows, C) + skew * torch.rand(C)
    mask = torch.zeros(n_rows * C, dtype=torch.bool)
    mask[scores.flatten().topk(int(k * n_rows)).indices] = True
    mask = mask.view(n_rows, C)
    A, B = torch.empty(C, d_in, m), torch.empty(C, m, d_out)
    assert cheapest_way(n_rows, A, B, mask, active_pairs(mask)) == way


def test_a_context_takes_the_cheap_way_and_gives_the_same(monkeypatch):
    model = torch.nn.Linear(64, 48)
    decomposition = apd.init(model, n_components=40, rank=8).decomposition()
    x, mask = torch.randn(512, 64), torch.zeros(512, 40, dtype=torch.bool)
    mask[torch.arange(512), torch.randint(40, (512,))] = True
    ways = []
    monkeypatch.setattr(
        "apd_lens.components._products.cheapest_way", lambda *args: ways.append(cheapest_way(*args)) or ways[-1]
    )  # fmt: skip
    with decomposition.sparse(mask):
        sparse = model(x)
    with decomposition.sparse(mask.float()):
        assert_close(sparse, model(x))
    assert ways == ["sparse"]


@pytest.mark.parametrize("dimensions", [100, 200])
def test_inputs_in_few_dimensions_are_multiplied_as_if_not(dimensions):
    basis, A = torch.randn(dimensions, 1000), torch.randn(64, 1000, 32)
    x = torch.randn(2, 600, dimensions) @ basis
    found = in_few_dimensions(x)
    assert (found is not None) == (dimensions < FEW)
    exact = inner_activations(x.double(), A.double()).float()
    assert_close(inner_activations_of_many(x, A), exact, rtol=1e-4, atol=1e-3 * exact.std().item())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("rank", [1, 3])
@pytest.mark.parametrize(("places", "data_axes"), [((6,), 1), ((6, 4), 1), ((6, 4), 2), ((1, 4), 1)], ids=str)
def test_in_pieces_equals_dense_with_gradients(dtype, rank, places, data_axes, monkeypatch):
    x, A, B = case(rank, dtype, places)
    mask = torch.rand(6, *places[1:data_axes], 9, dtype=dtype).requires_grad_()
    dense = outcome(apd.components.masked_product(x, A, B, mask), [x, A, B, mask])
    monkeypatch.setattr(_products, "_KEPT", 0)
    for budget in (8, 8 * 500, 2**29):  # pieces of one component, of some, of all
        monkeypatch.setattr(_products, "BUDGET", budget)
        pieces = outcome(apd.components.masked_product(x, A, B, mask), [x, A, B, mask])
        for ours, expected in zip(pieces, dense, strict=True):
            assert_close(ours, expected, **TOLERANCE[dtype])
    only_B = torch.autograd.grad(apd.components.masked_product(x.detach(), A.detach(), B, mask.detach()).sum(), B)
    assert_close(only_B[0], torch.autograd.grad(apd.components.masked_product(x, A, B, mask).sum(), B)[0])


def test_autocast_in_pieces(monkeypatch):
    x, A, B = case(3, torch.float32, (6, 4), d_in=32, d_out=16)
    mask = torch.rand(6, 4, 9)
    precise = outcome(apd.components.masked_product(x, A, B, mask), [x, A, B])
    monkeypatch.setattr(_products, "_KEPT", 0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        product = apd.components.masked_product(x, A, B, mask)
    assert product.dtype == torch.bfloat16
    for ours, expected in zip(outcome(product, [x, A, B]), precise, strict=True):
        assert (ours.float() - expected).norm() < 0.02 * expected.norm()
