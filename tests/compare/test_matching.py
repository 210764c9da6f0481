"""Matches of directions and of activity, on components and dictionaries whose similarity is known."""

import pytest
import torch
import torch.nn.functional as F
from support.hooked import hooked_transformer, tokens
from support.known import ORDER, one_component_a_feature, one_hot_batches, permuted_rows
from support.toy_models import Snapshot, TinyGPT, decomposition_of, interrupted_in_forward, tiny_gpt2
from torch.testing import assert_close

import apd_lens as apd
from apd_lens import compare
from apd_lens.host._sites import reading


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


def test_matching_known_by_hand():
    """Both components like latent 0 best; together they like 1 and 0 best."""
    found = compare.matching(torch.tensor([[0.9, 0.8, 0.0], [1.0, 0.1, 0.0]]), threshold=0.5)
    assert found.latent.tolist() == [0, 0]
    assert found.component.tolist() == [1, 0, 0]
    assert found.partner.tolist() == [1, 0]
    assert_close(found.one_to_one, torch.tensor([0.8, 1.0]))
    assert found.latents_above.tolist() == [2, 1]
    assert found.components_above.tolist() == [2, 1, 0]
    numbers = found.numbers
    assert numbers["components with a match above 0.5"] == 1
    assert numbers["    with several (split)"] == 0.5
    assert numbers["latents with a match above 0.5"] == pytest.approx(2 / 3)
    one = compare.matching(torch.tensor([[0.9, 0.8], [1.0, 0.1]]), latents=torch.tensor([False, True]))
    assert one.latent.tolist() == [1, 1]
    assert one.partner.tolist() == [1, -1]
    assert one.component.tolist() == [-1, 0]
    assert one.table(of="latent").shape == (1, 4)
    with pytest.raises(apd.InvalidSetting, match="None of the 2 latents counts"):
        compare.matching(torch.eye(2), latents=torch.zeros(2).bool())
    with pytest.raises(apd.ShapeMismatch, match="each of the 2 components"):
        compare.matching(torch.eye(2), components=torch.ones(3).bool())


def test_pairs_of_one_likeness_checked_by_another():
    found = compare.matching(torch.eye(6)[ORDER])
    own, exchanged = found.of_pairs(torch.eye(6)[ORDER] * 0.7)
    assert own == pytest.approx(0.7)
    assert exchanged == 0
    with pytest.raises(apd.ShapeMismatch, match=r"similarity of shape \(6, 6\)"):
        found.of_pairs(torch.eye(4))


def test_measures_known_by_hand():
    """Ten data points: the component on 4, the latent on 5, both on 3."""
    component = torch.tensor([1, 1, 1, 1, 0, 0, 0, 0, 0, 0])[:, None].bool()
    latent = torch.tensor([1, 1, 1, 0, 1, 1, 0, 0, 0, 0])[:, None].bool()
    values = torch.rand(2, 10, 1)
    parts = [
        compare.activation_sums(component[part], values[0, part], latent[part], values[1, part])
        for part in (slice(4), slice(4, 10))
    ]
    found = {name: value.item() for name, value in compare.activation_measures(parts[0] + parts[1]).items()}
    assert found["precision"] == pytest.approx(3 / 5)
    assert found["recall"] == pytest.approx(3 / 4)
    assert found["f1"] == pytest.approx(6 / 9)
    assert found["jaccard"] == pytest.approx(3 / 6)
    assert found["correlation"] == pytest.approx(torch.corrcoef(values[:, :, 0])[0, 1].item(), abs=1e-6)


def test_what_is_never_active_or_never_varies_has_likeness_0():
    off = torch.zeros(8, 1).bool()
    sums = compare.activation_sums(off, torch.full((8, 1), 0.1), ~off, torch.rand(8, 1))
    assert {name: value.item() for name, value in compare.activation_measures(sums).items()} == {
        **dict.fromkeys(("precision", "recall", "f1", "jaccard", "correlation"), 0.0)
    }


def test_latents_that_are_on_where_their_component_is_have_f1_of_one():
    decomposition = one_component_a_feature()
    before = Snapshot.of(decomposition.target.model)
    match = compare.activation_match(decomposition, one_hot_batches(), permuted_rows(decomposition))
    assert_close(match.found.best_of_component, torch.ones(6))
    assert torch.equal(ORDER[match.found.partner], torch.arange(6))
    assert match.n == 4 * 48
    assert match.shuffled.numbers["best latent of a component"] < 0.5
    assert_close(match.component_active.sum(), torch.tensor(1.0))
    assert_close(match.component_active, match.latent_active[match.found.partner])
    frame = match.table()
    assert_close(torch.tensor(frame["precision"].to_numpy()), torch.ones(6))
    assert (frame["correlation"] > 0.99).all()  # attributions are linear in x here
    assert len(match.table(of="latent")) == 6
    assert "f1 of activity, 192 data points" in str(match)
    before.assert_unchanged(decomposition.target.model)


def test_streaming_gives_what_all_data_at_once_give():
    decomposition = one_component_a_feature()
    batches, dictionary = one_hot_batches(), permuted_rows(decomposition)
    options = {"by": "correlation", "value": "mask"}
    streamed = compare.activation_match(decomposition, batches, dictionary, **options)
    at_once = compare.activation_match(decomposition, [torch.cat(batches)], dictionary, **options)
    for name in ("precision", "recall", "f1", "jaccard", "correlation"):
        assert_close(getattr(streamed, name), getattr(at_once, name))
    mask, latents = decomposition.select(torch.cat(batches)).float(), dictionary.encode(torch.cat(batches))
    expected = torch.corrcoef(torch.cat([mask, latents], 1).mT)[:6, 6:]
    assert_close(streamed.correlation, expected, rtol=0, atol=1e-5)


def test_where_each_unit_has_one_data_point_the_null_is_as_good():
    decomposition = one_component_a_feature()
    match = compare.activation_match(decomposition, [torch.eye(6)], permuted_rows(decomposition))
    assert match.found.numbers["one to one"] == match.shuffled.numbers["one to one"] == 1
    found, exchanged = compare.direction_match(
        decomposition, permuted_rows(decomposition), "last.weight"
    ).found.of_pairs(match.f1)
    assert (found, exchanged) == (1, 0)


@pytest.mark.parametrize("granularity", ["example", "position"])
def test_activity_on_positions_leaves_padding_out(granularity):
    """A batch with padding, and its examples one by one without."""
    model = tiny_gpt2().requires_grad_(False)
    decomposition = decomposition_of(model, "*.mlp.*", selection=apd.BatchTopK(2.0, granularity))
    lengths = [3, 5, 4, 5]
    attention_mask = (torch.arange(5) < torch.tensor(lengths)[:, None]).long()
    ids = torch.randint(13, (4, 5), generator=torch.Generator().manual_seed(0))
    batch = {"input_ids": ids, "attention_mask": attention_mask}
    dictionary = compare.Dictionary.neurons("transformer.h.0.mlp.act", 32)
    match = compare.activation_match(decomposition, [batch], dictionary, pool="max")
    assert match.n == (4 if granularity == "example" else sum(lengths))
    with reading(model, [dictionary.site]) as kept:
        model(**batch)
    active = kept[dictionary.site] > 0
    valid = attention_mask.bool()
    expected = (active & valid[..., None]).any(1) if granularity == "example" else active[valid]
    mask = decomposition.select(batch)
    mask = mask if granularity == "example" else mask[valid]
    both = mask.float().mT @ expected.float()
    assert_close(match.recall, both / mask.sum(0)[:, None].clamp_min(1))


def test_pooling_over_positions():
    latents = torch.tensor([[[1.0], [3.0], [2.0]], [[4.0], [0.0], [9.0]]])
    valid = torch.tensor([[True, True, True], [True, True, False]])
    pooled = compare._activations.pooled
    assert pooled(latents, None, "max").tolist() == [[3], [9]]
    assert pooled(latents, valid, "max").tolist() == [[3], [4]]
    assert pooled(latents, valid, "mean").tolist() == [[2], [2]]
    assert pooled(latents, None, "last").tolist() == [[2], [9]]
    assert pooled(latents, valid, "last").tolist() == [[2], [0]]


def test_bad_data_and_settings_are_refused():
    decomposition = one_component_a_feature()
    dictionary, batches, model = permuted_rows(decomposition), one_hot_batches(), decomposition.target.model
    before = Snapshot.of(model)

    def refused(error: type[apd.ApdError], match: str, data=batches, some=dictionary, **options) -> None:
        with pytest.raises(error, match=match):
            compare.activation_match(decomposition, data, some, **options)
        before.assert_unchanged(model)

    refused(apd.InvalidBatches, "There are no batches", data=[])
    refused(apd.InvalidBatches, "cannot be shuffled", data=[torch.eye(6)[:1]])
    refused(apd.InvalidSetting, "No latent of 6 latents .* is above 99", least=99.0)
    refused(apd.InvalidSetting, "no submodule 'acts'.*'act'", some=compare.Dictionary.neurons("acts", 6))
    refused(apd.NonFinite, "NaN or infinite", data=[torch.full((4, 6), torch.nan)])
    with pytest.raises(apd.InvalidBatches, match="can be only once"):
        compare.direction_match(decomposition, dictionary, "last.weight", batches=iter(batches))
    with interrupted_in_forward(model.act, 1), pytest.raises(KeyboardInterrupt):
        compare.activation_match(decomposition, batches, dictionary)
    before.assert_unchanged(model)


def test_a_hooked_transformer():
    model = hooked_transformer().requires_grad_(False)
    decomposition = decomposition_of(model, "*.mlp.*", selection=apd.BatchTopK(2.0, "position"))
    before, batches = Snapshot.of(model), [tokens(4), tokens(3)]
    neurons = compare.Dictionary.neurons("blocks.0.mlp.hook_post", 10)
    match = compare.activation_match(decomposition, batches, neurons, by="jaccard")
    assert match.n == 7 * 4
    directions = compare.direction_match(decomposition, neurons, "blocks.0.mlp.W_out", "read", batches=batches)
    A, B = decomposition.components.A["blocks.0.mlp.W_out"], decomposition.components.B["blocks.0.mlp.W_out"]
    assert_close(directions.cosine.abs(), compare.direction_cosines(B.mT, A.mT, torch.eye(10)))
    before.assert_unchanged(model)
