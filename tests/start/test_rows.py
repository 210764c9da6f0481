import pytest
import torch
from support.attribution_hosts import HOSTS, hooked_transformer, padded_tokens, with_split_qkv
from support.toy_models import Mixing, tiny_gpt2
from torch import Tensor, nn
from torch.testing import assert_close

import apd_lens as apd
from apd_lens.attribution._effects import effects_on_outputs
from apd_lens.passes._output import default_output
from apd_lens.passes._watch import watched_pass
from apd_lens.start._rows import _projections, other_inputs, rows_of


def gathered(target, names, batches, granularity="example", most=100, K=3):
    return rows_of(target, names, batches, default_output, granularity, K, 0, most)


def effects(target, rows) -> Tensor:
    """Σ_rows <g, x W> of each data point."""
    total = 0
    for (name, transposed), of_side in rows.of_sides.items():
        weight = target.weights[name].value()
        weight = weight.mT if transposed else weight
        written = of_side.x @ weight if of_side.x.is_floating_point() else weight[of_side.x]
        each = (of_side.gradients * written).sum(-1)
        total = total + torch.zeros(len(each), len(rows.shapes)).index_add(1, of_side.points, each)
    assert isinstance(total, Tensor)
    return total


@pytest.mark.parametrize("granularity", ["example", "position"])
@pytest.mark.parametrize("host", HOSTS)
def test_rows_have_the_effects_of_the_whole_matrices(host: str, granularity):
    if host == "tokens, positions that examples share" and granularity == "position":
        pytest.skip("lookups without a batch axis are of no position")
    make, batch_of, weights = HOSTS[host]
    target, batch = apd.wrap(make()), batch_of()
    names = target.match(weights)
    watched = watched_pass(target, names, batch, default_output)
    whole = {name: target.weights[name].value()[None] for name in names}
    eyes = {name: torch.eye(weight.shape[-1])[None] for name, weight in whole.items()}
    expected = effects_on_outputs(
        watched,
        _projections(watched.output, 3, 0, granularity),
        apd.ParameterComponents(whole, eyes),
        granularity,
        2**20,
    )
    found = effects(target, gathered(target, names, [batch], granularity))
    valid = target.read(batch).valid
    if granularity == "position" and valid is not None:
        expected = expected[:, valid]
    assert_close(found, expected.flatten(1), atol=1e-4, rtol=1e-3)


def test_batches_are_counted_on_and_no_more_looked_at_than_asked_for():
    target = apd.wrap(nn.Linear(4, 3, bias=False))
    batches = [torch.randn(3, 4), torch.randn(5, 4), torch.randn(2, 4)]
    rows = gathered(target, ["weight"], batches, most=6)
    assert_close(rows.of_sides["weight", False].x, torch.cat(batches)[:6])
    assert rows.of_sides["weight", False].points.tolist() == list(range(6)) == list(range(len(rows.shapes)))


def test_chunks_of_examples_and_projections_give_the_same():
    target, batch = apd.wrap(Mixing()), torch.randn(6, 4, 3)
    names = target.match("*")
    whole = rows_of(target, names, [batch], default_output, "example", 3, 0, 100)
    parts = rows_of(target, names, [batch], default_output, "example", 3, 0, 100, memory=1)
    for side, rows in whole.of_sides.items():
        assert_close(parts.of_sides[side].gradients, rows.gradients)
        assert parts.of_sides[side].places.equal(rows.places)


def test_places_are_positions_of_one_shape():
    target = apd.wrap(tiny_gpt2())
    rows = gathered(target, ["transformer.h.0.attn.c_attn.weight"], [padded_tokens(), padded_tokens()])
    of_side = rows.of_sides["transformer.h.0.attn.c_attn.weight", False]
    assert rows.shapes.tolist() == rows.shapes[:3].repeat(2).tolist()
    assert len(rows.shapes.unique()) == 3
    assert len(of_side.x) == 24
    assert of_side.places.bincount().tolist() == [2] * 12


def test_heads_stand_side_by_side():
    tokens = torch.randint(11, (3, 4))
    found = []
    for make in (hooked_transformer, with_split_qkv):
        target = apd.wrap(make())
        found.append(gathered(target, target.match("blocks.*.attn.*"), [tokens]))
    assert found[0].of_sides.keys() == found[1].of_sides.keys()
    for side, rows in found[0].of_sides.items():
        assert_close(found[1].of_sides[side].x, rows.x)
        assert_close(found[1].of_sides[side].gradients, rows.gradients)


def test_projections_of_the_last_position_do_not_depend_on_the_length():
    long, short = (_projections(torch.zeros(2, length, 5), 3, 7, "example").rows(0, 3) for length in (6, 4))
    assert long[:, -4:].equal(short)
    assert long.abs().eq(1).all()
    assert not long[:, 0].equal(long[:, 1])


def test_positions_that_are_data_points_have_the_same_projections():
    drawn = _projections(torch.zeros(2, 4, 5), 3, 7, "position").rows(0, 3)
    assert drawn.shape == (3, 4, 5)
    assert drawn.equal(drawn[:, :1].expand(-1, 4, -1))


def test_moments_of_others_are_of_all_positions_that_are_data():
    target, batch = apd.wrap(tiny_gpt2()), padded_tokens()
    name = "transformer.h.0.attn.c_attn.weight"
    rows = gathered(target, [name], [batch])
    moments = other_inputs(target, [name], [batch, batch], default_output, rows)[name, False].moments
    x = rows.of_sides[name, False].x.double()
    assert_close(moments, x.mT @ x / len(x), atol=1e-6, rtol=1e-5)


def test_moments_know_both_sides_of_a_matrix():
    model, batch = HOSTS["tied, one transposed"][0](), torch.rand(4, 7)
    target = apd.wrap(model)
    rows = gathered(target, target.match("*"), [batch])
    found = other_inputs(target, target.match("*"), [batch], default_output, rows)
    assert sorted((transposed, len(of.moments)) for (_, transposed), of in found.items()) == [(False, 7), (True, 3)]


def test_sums_of_others_are_of_examples_of_the_same_shape():
    target = apd.wrap(tiny_gpt2())
    name = "transformer.h.0.attn.c_attn.weight"
    torch.manual_seed(0)
    data, same, longer = torch.randint(13, (4, 5)), torch.randint(13, (3, 5)), torch.randint(13, (3, 6))
    rows = gathered(target, [name], [data])
    found = other_inputs(target, [name], [same, longer, same[:1]], default_output, rows)[name, False]
    x = gathered(target, [name], [same]).of_sides[name, False].x.unflatten(0, (3, 5))
    assert found.counts.tolist() == [4.0] * 5
    assert_close(found.sums, (x.sum(0) + x[0]).double(), atol=1e-5, rtol=1e-5)
