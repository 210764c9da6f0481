"""Where components lie: on models whose components are put into one head, one neuron, one layer by hand."""

from dataclasses import replace
from functools import partial

import pandas as pd
import pytest
import torch
from support.bridges import bridge
from support.hooked import MIXTURE, tokens
from support.hooked import hooked_transformer as one_layer
from support.known import only_head
from support.padding import alone, gpt2, padded
from support.toy_models import decomposition_of, tiny_gpt2, tiny_llama
from torch import Tensor, nn
from torch.testing import assert_close

import apd_lens as apd
from apd_lens import compare

ATTENTION = "blocks.*.attn.*"
hooked_transformer = partial(one_layer, n_layers=2)


def test_a_component_of_one_head_lies_there_with_its_weight_and_its_attribution():
    decomposition = decomposition_of(hooked_transformer(), ATTENTION, n_components=3)
    only_head(decomposition, 1, layer=1, head=0)
    for found in (compare.weight_map(decomposition), compare.attribution_map(decomposition, [tokens(3)])):
        assert found.nodes("head") == ["a0.0", "a0.1", "a1.0", "a1.1"]
        assert_close(found.shares("head")[1], torch.tensor([0.0, 0.0, 1.0, 0.0]))
        assert_close(found.shares("layer")[1], torch.tensor([0.0, 1.0]))
        assert_close(found.spread("head")[1].item(), 1.0)
        assert (found.spread("head")[[0, 2]] > 2).all()
        assert_close(found.shares("head").sum(1), torch.ones(3))
        table = found.table("head")
        assert table.loc[1, "largest head"] == "a1.0"
        assert table.index.name == "component"


def test_random_components_spread_over_all_heads():
    decomposition = decomposition_of(hooked_transformer(), ATTENTION, n_components=3)
    only_head(decomposition, 1, layer=1, head=0)
    null = replace(decomposition, components=apd.components.random_components(decomposition.components))
    share = compare.weight_map(null).shares("head")[1]
    assert share[:2].max() < 1e-6  # it has the singular values of the component, and so nothing in the first layer
    assert share[3] > 0.2


@pytest.mark.parametrize("granularity", ["example", "position"])
def test_amounts_of_heads_are_those_of_the_blocks_of_the_matrices(granularity):
    """Against P_c and the attribution of components that are cut down to one block."""
    selection = apd.BatchTopK(2, granularity=granularity)
    model = hooked_transformer(n_key_value_heads=1)
    decomposition = decomposition_of(model, ATTENTION, n_components=3, selection=selection)
    P = decomposition.components.component_weights("blocks.1.attn.W_Q")
    amounts = compare.weight_map(decomposition)
    of_units = {matrix.name: matrix for matrix in amounts.matrices}
    assert_close(of_units["blocks.1.attn.W_Q"].of_units, P.unflatten(2, (2, 4)).square().sum((1, 3)))
    P = decomposition.components.component_weights("blocks.1.attn.W_O")
    assert_close(of_units["blocks.1.attn.W_O"].of_units, P.unflatten(1, (2, 4)).square().sum((2, 3)))
    assert of_units["blocks.1.attn.W_K"].of_units.shape == (3, 1)

    found = {m.name: m for m in compare.attribution_map(decomposition, [tokens(2), tokens(3)]).matrices}
    for name in ("blocks.0.attn.W_V", "blocks.1.attn.W_Q", "blocks.1.attn.W_O"):
        alone = [squared_attribution(decomposition, name, head) for head in range(len(found[name].of_units[0]))]
        assert_close(found[name].total, squared_attribution(decomposition, name, None))
        alone = torch.stack(alone, 1)
        assert_close(found[name].of_units, alone / alone.sum(1, keepdim=True) * found[name].total[:, None])


def squared_attribution(decomposition: apd.Decomposition, name: str, head: int | None) -> Tensor:
    """Of components with nothing but one head of one matrix: mean over the data points of the test's batches."""
    A = {n: a.clone() if n == name else 0 * a for n, a in decomposition.components.A.items()}
    B = {n: b.clone() for n, b in decomposition.components.B.items()}
    if head is not None:
        side = A[name] if name.endswith("W_O") else B[name].mT
        other = torch.ones(side.shape[1], dtype=torch.bool)
        other[4 * head : 4 * head + 4] = False
        side[:, other] = 0
    cut = replace(decomposition, components=apd.ParameterComponents(A, B))
    squares = [cut.attributions(tokens(n)).square().flatten(0, -2) for n in (2, 3)]
    return torch.cat(squares).mean(0)


def test_key_and_value_heads_count_for_their_query_heads_in_equal_parts():
    decomposition = decomposition_of(hooked_transformer(n_key_value_heads=1), "blocks.0.attn.W_[KV]", n_components=2)
    shares = compare.weight_map(decomposition).shares("head")
    assert shares.shape == (2, 1)  # without the queries nobody says how many share them
    decomposition = decomposition_of(hooked_transformer(n_key_value_heads=1), "blocks.0.attn.W_[QKV]", n_components=2)
    found = compare.weight_map(decomposition)
    queries = next(m for m in found.matrices if m.name.endswith("W_Q")).of_units
    others = sum(m.total for m in found.matrices if not m.name.endswith("W_Q"))
    assert_close(found.amounts("head"), queries + others[:, None] / 2)


@pytest.mark.parametrize("option", ["use_split_qkv_input", "use_attn_result", "ungroup_grouped_query_attention"])
def test_options_that_multiply_by_each_head_alone_change_nothing(option):
    model = hooked_transformer(n_key_value_heads=1)
    decomposition = decomposition_of(model, ATTENTION, n_components=2)
    before = compare.attribution_map(decomposition, [tokens(2)]).shares("head")
    setattr(model.cfg, option, True)
    assert_close(compare.attribution_map(decomposition, [tokens(2)]).shares("head"), before)


def test_a_decomposed_bias_belongs_to_its_head_or_to_none():
    decomposition = decomposition_of(apd.wrap(hooked_transformer(), biases=True), "blocks.0.attn.*", n_components=2)
    found = compare.weight_map(decomposition)
    P = decomposition.components.component_weights("blocks.0.attn.W_O")
    W_O = next(m for m in found.matrices if m.name.endswith("W_O"))
    assert_close(W_O.total - W_O.of_units.sum(1), P[:, -1].square().sum(1))
    attributed = compare.attribution_map(decomposition, [tokens(2)])
    W_O = next(m for m in attributed.matrices if m.name.endswith("W_O"))
    assert (W_O.of_units.sum(1) < 0.999 * W_O.total).all()
    W_Q = next(m for m in attributed.matrices if m.name.endswith("W_Q"))
    assert_close(W_Q.of_units.sum(1), W_Q.total)


def test_neurons():
    decomposition = decomposition_of(hooked_transformer(), "blocks.*.mlp.*", n_components=2)
    for name in decomposition.components.names:
        A, B = decomposition.components.A[name].data, decomposition.components.B[name].data
        side = B.mT if name.endswith("W_in") else A
        kept = side[0, 3].clone()
        side[0] = 0
        if compare.layer_of(name) == 1:
            side[0, 3] = kept
    for found in (compare.weight_map(decomposition), compare.attribution_map(decomposition, [tokens(3)])):
        table = found.table("neuron")
        assert isinstance(table, pd.DataFrame)
        assert table.loc[0, "largest neuron"] == "m1.3"
        assert_close(table.loc[0, "its share"].item(), 1.0)
        assert table.loc[1, "neurons, effectively"] > 3


def test_a_torch_module_is_told_where_its_heads_are():
    """GPT-2 fuses queries, keys and values in one matrix. Without its config nobody knows how many heads they are."""
    model = tiny_gpt2()
    by_config = compare.weight_map(decomposition_of(model, "transformer.h.*.attn.c_*", n_components=2))
    assert by_config.nodes("head") == ["a0.0", "a0.1", "a1.0", "a1.1"]
    config = model.config
    holders = [module for module in model.modules() if hasattr(module, "config")]
    for module in holders:
        module.config = None
    decomposition = decomposition_of(model, "transformer.h.*.c_*", n_components=2)
    for module in holders:
        module.config = config
    with pytest.raises(apd.errors.InvalidSetting, match=r"None of the decomposed matrices has heads.*units="):
        compare.weight_map(decomposition).shares("head")
    units = {
        "*.attn.c_attn.weight": apd.host.Units("head", "out", 2, copies=3),
        "*.attn.c_proj.weight": apd.host.Units("head", "in", 2),
    }
    found = compare.weight_map(decomposition, units)
    assert found.nodes("head") == ["a0.0", "a0.1", "a1.0", "a1.1"]
    P = decomposition.components.component_weights("transformer.h.0.attn.c_attn.weight")
    of_units = next(m.of_units for m in found.matrices if m.name == "transformer.h.0.attn.c_attn.weight")
    assert_close(of_units, P.unflatten(2, (3, 2, 4)).square().sum((1, 2, 4)))
    attributed = compare.attribution_map(decomposition, [tokens(2)], units=units)
    assert_close(attributed.shares("matrix").sum(1), torch.ones(2))
    with pytest.raises(apd.UnknownWeight, match="c_atn"):
        compare.weight_map(decomposition, {"*.c_atn.weight": units["*.attn.c_attn.weight"]})
    with pytest.raises(apd.errors.InvalidSetting, match=r"of 24 cannot be cut.*number=5"):
        compare.weight_map(decomposition, {"*.c_attn.weight": apd.host.Units("head", "out", 5)})


def test_attributions_to_a_metric():
    """y = x W: a metric of output 0 alone has nothing to do with the other columns."""
    model = nn.Linear(3, 2, bias=False)
    decomposition = decomposition_of(model, n_components=2)
    found = compare.attribution_map(
        decomposition, [torch.eye(3)], lambda y: y[:, 0], {"weight": apd.host.Units("neuron", "out", 2)}
    )
    P = decomposition.components.component_weights("weight")
    assert_close(found.amounts("matrix")[:, 0], P[:, :, 0].square().mean(1))
    assert_close(found.shares("neuron"), torch.tensor([[1.0, 0.0], [1.0, 0.0]]))


def test_what_is_no_list_of_batches():
    decomposition = decomposition_of(nn.Linear(3, 2), n_components=2)
    with pytest.raises(apd.errors.InvalidBatches, match="one tensor"):
        compare.attribution_map(decomposition, torch.eye(3))
    with pytest.raises(apd.errors.InvalidBatches, match="empty"):
        compare.attribution_map(decomposition, [])


def test_adapters_know_heads_and_neurons():
    """Of a TransformerBridge as of a HookedTransformer; and of a Hugging Face model by its config."""
    hooked = apd.wrap(hooked_transformer(n_heads=4, n_key_value_heads=2)).weights
    bridged = apd.wrap(bridge("llama")).weights
    for weights in (hooked, bridged):
        assert weights["blocks.0.attn.W_Q"].units == apd.host.Units("head", "out", 4)
        assert weights["blocks.0.attn.W_K"].units == apd.host.Units("head", "out", 2)
        assert weights["blocks.0.attn.W_O"].units == apd.host.Units("head", "in", 4)
        assert weights["blocks.0.mlp.W_in"].units == apd.host.Units("neuron", "out", 10)
        assert weights["blocks.0.mlp.W_out"].units == apd.host.Units("neuron", "in", 10)
        assert weights["unembed.W_U"].units is None
    mixture = apd.wrap(hooked_transformer(**MIXTURE)).weights
    assert mixture["blocks.0.mlp.W_gate"].units is None  # the router
    assert apd.wrap(tiny_gpt2()).weights["transformer.h.0.attn.c_proj.weight"].units == apd.host.Units("head", "in", 2)


def test_a_map_of_many_matrices_is_printed_in_few_lines():
    decomposition = decomposition_of(tiny_llama(num_hidden_layers=12), n_components=30)
    lines = str(compare.weight_map(decomposition)).splitlines()
    assert len(lines) <= 25
    assert max(map(len, lines)) <= 120
    assert lines[0].startswith("30 components over 86 matrices, by weight")
    assert lines[1].startswith("of all together: L")
    assert lines[1].endswith(" and 82 others")
    assert lines[-1] == "and 14 smaller components; .table() has all"
    assert repr(compare.weight_map(decomposition)) == "\n".join(lines)


@pytest.mark.parametrize("granularity", ["example", "position"])
def test_padding_counts_for_nothing(granularity):
    """A padded batch gives what its examples give on their own."""
    batch, model = padded(), gpt2()
    each = [alone(batch, index) for index in range(3)]
    selection = apd.BatchTopK(2, granularity=granularity)
    decomposition = decomposition_of(model, "transformer.h.0.mlp.*", n_components=3, selection=selection)
    units = {"*.mlp.c_proj.weight": apd.host.Units("neuron", "in", 32)}
    for level in ("matrix", "neuron"):
        together, apart = (compare.attribution_map(decomposition, some, units=units) for some in ([batch], each))
        assert_close(together.amounts(level), apart.amounts(level), rtol=1e-4, atol=1e-8)
    options = {"unit": "neuron", "ablation": "mean", "sizes": [3], "units": units, "n_draws": 1, "ascent_steps": 1}
    together, apart = (
        compare.faithfulness_curve(decomposition, some, lambda logits: logits[:, 1, 4], **options)
        for some in ([batch], each)
    )
    assert together.none == pytest.approx(apart.none, abs=1e-6)
    assert_close(together.own, apart.own, rtol=1e-3, atol=1e-3)
