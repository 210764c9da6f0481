"""Directions of components and of a dictionary: cosines, pairs, what does not fit."""

import pytest
import torch
import torch.nn.functional as F
from support.known import ORDER, one_component_a_feature, one_hot_batches, permuted_rows
from support.toy_models import TinyGPT, decomposition_of
from torch.testing import assert_close

import apd_lens as apd
from apd_lens import compare


def test_cosines_of_rank_one_are_those_of_the_directions():
    A, B, directions = torch.randn(5, 4, 1), torch.randn(5, 1, 7), torch.randn(9, 7)
    expected = F.cosine_similarity(B, directions, dim=-1).abs()
    assert_close(compare.direction_cosines(A, B, directions), expected)
    assert_close(compare.direction_cosines(B.mT, A.mT, torch.eye(4)), F.normalize(A[:, :, 0], dim=1).abs())


def test_cosines_of_higher_rank_are_how_much_of_the_largest_output_lies_along_a_direction():
    """Singular values 2 and 1 along the first two axes, and nothing along the third."""
    A, B = torch.eye(3)[None, :, :2], torch.tensor([[[2.0, 0.0, 0.0], [0.0, 1.0, 0.0]]])
    directions = torch.cat([torch.eye(3), torch.tensor([[1.0, 1.0, 0.0]])])
    assert_close(compare.direction_cosines(A, B, directions), torch.tensor([[1.0, 0.5, 0.0, (5 / 8) ** 0.5]]))
    P = torch.randn(4, 6, 3) @ (B := torch.randn(4, 3, 5))
    unit = F.normalize(torch.randn(7, 5), dim=1)
    expected = (P @ unit.mT).norm(dim=1) / torch.linalg.matrix_norm(P, ord=2)[:, None]
    assert_close(compare.direction_cosines(P @ torch.linalg.pinv(B), B, 3 * unit), expected, rtol=0, atol=1e-5)
    assert compare.direction_cosines(torch.zeros(1, 2, 1), torch.ones(1, 1, 3), torch.ones(1, 3)).item() == 0


def test_cosines_of_many_are_those_of_a_few_at_a_time(monkeypatch: pytest.MonkeyPatch):
    A, B, directions = torch.randn(5, 4, 2), torch.randn(5, 2, 7), torch.randn(9, 7)
    expected = compare.direction_cosines(A, B, directions)
    monkeypatch.setattr("apd_lens._memory.BUDGET", 32 * 2 * 9 * 2)
    assert_close(compare.direction_cosines(A, B, directions), expected)


@pytest.mark.parametrize(("matrix", "side"), [("last.weight", "write"), ("last.weight", "read")])
def test_a_permuted_dictionary_of_the_components_directions_is_found(matrix: str, side):
    decomposition = one_component_a_feature()
    match = compare.direction_match(decomposition, permuted_rows(decomposition), matrix, side)
    assert_close(match.found.best_of_component, torch.ones(6))
    assert torch.equal(ORDER[match.found.partner], torch.arange(6))
    assert torch.equal(match.found.component, ORDER)
    assert match.random_directions.numbers["one to one"] < 0.8
    assert match.random_components.numbers["one to one"] < 0.8
    frame = match.table()
    assert frame["best latent"].tolist() == match.found.latent.tolist()
    assert list(frame) == [
        *("component", "best latent", "cosine", "one to one", "its cosine", "latents above"),
        *("null: random directions", "null: random components"),
    ]
    assert match.table(of="latent")["best component"].tolist() == ORDER.tolist()
    assert "best latent of a component         1.000" in str(match)


def test_data_tell_opposite_directions_apart():
    """Twice as many latents as components: what they write, and its opposite."""
    decomposition = one_component_a_feature()
    rows = decomposition.target.weights["last.weight"].value()
    dictionary = compare.Dictionary("last", torch.cat([-rows, rows]).mT, torch.cat([-rows, rows]))
    without = compare.direction_match(decomposition, dictionary, "last.weight").found
    assert (without.latents_above == 2).all()
    assert without.numbers["    with several (split)"] == 1
    found = compare.direction_match(decomposition, dictionary, "last.weight", batches=one_hot_batches()).found
    assert torch.equal(found.latent, torch.arange(6, 12))
    assert (found.latents_above == 1).all()
    read = compare.direction_match(
        decomposition,
        compare.Dictionary("act", torch.cat([-torch.eye(6), torch.eye(6)]).mT, torch.eye(6).repeat(2, 1)),
        "last.weight",
        "read",
        batches=one_hot_batches(),
    )
    assert torch.equal(read.found.latent, torch.arange(6, 12))
    assert_close(read.cosine[:, :6], -torch.eye(6))


def test_components_that_data_never_activate_do_not_count():
    decomposition = one_component_a_feature()
    batches = [batch[batch[:, 2] == 0] for batch in one_hot_batches()]
    match = compare.direction_match(decomposition, permuted_rows(decomposition), "last.weight", batches=batches)
    assert match.found.latent[2] == match.found.partner[2] == -1
    assert match.table()["component"].tolist() == [0, 1, 3, 4, 5]
    assert match.found.numbers["one to one"] == pytest.approx(1)


def test_a_tied_matrix_is_read_by_its_transposed_use():
    """wte.weight, 11 tokens × 6: rows are written to the residual stream, and read from it by the head."""
    decomposition = decomposition_of(TinyGPT(), "wte*", n_components=4, rank=1)
    B = decomposition.components.B["wte.weight"].detach()[:, 0]
    dictionary = compare.Dictionary("proj", B.mT, B)
    for side in ("write", "read"):
        assert_close(
            compare.direction_match(decomposition, dictionary, "wte.weight", side).cosine.diag(), torch.ones(4)
        )
    batches = [torch.randint(11, (4, 5), generator=torch.Generator().manual_seed(i)) for i in range(3)]
    signed = compare.direction_match(decomposition, dictionary, "wte.weight", batches=batches).cosine.diag()
    active = torch.cat([decomposition.select(batch) for batch in batches]).any(0)
    assert_close(signed.abs(), active.float())


def test_matrices_and_sides_that_do_not_fit_are_refused():
    decomposition = one_component_a_feature()
    dictionary = permuted_rows(decomposition)
    with pytest.raises(apd.UnknownWeight, match="'none' is none of the decomposed matrices"):
        compare.direction_match(decomposition, dictionary, "none")
    with pytest.raises(apd.ShapeMismatch, match=r"has 8 activations, but first.weight writes {'first': 6}"):
        compare.direction_match(decomposition, dictionary, "first.weight")
