"""Loss against sparsity, for components and dictionaries whose losses are known by hand."""

import pytest
import torch
import torch.nn.functional as F
from support.hooked import hooked_transformer, tokens
from support.known import one_component_a_feature, one_hot_batches, permuted_rows
from support.toy_models import Snapshot, decomposition_of, interrupted_in_forward, tiny_gpt2
from torch import Tensor
from torch.testing import assert_close

import apd_lens as apd
from apd_lens import compare


def two_hot_batches(n: int = 6, size: int = 40) -> list[Tensor]:
    """Two features of each data point, the first twice as large."""
    generator = torch.Generator().manual_seed(0)
    pairs = torch.rand(size, n, generator=generator).topk(2).indices
    return [2 * F.one_hot(pairs[:, 0], n).float() + F.one_hot(pairs[:, 1], n).float()]


def test_each_mechanism_alone_gives_the_whole_output():
    """Inputs with one feature: one component, or the latent that is its twin, is enough; none is the whole output."""
    decomposition, batches = one_component_a_feature(), one_hot_batches()
    model = decomposition.target.model
    before = Snapshot.of(model)
    whole = torch.cat([model(batch) for batch in batches]).square().mean()
    found = compare.sparsity(decomposition, batches, (0, 1, 2), {"twin": permuted_rows(decomposition)})
    before.assert_unchanged(model)
    losses = found.of("loss")
    assert_close(losses["components"], torch.stack([whole, torch.zeros(()), torch.zeros(())]), rtol=1e-5, atol=1e-9)
    assert_close(losses["twin"], torch.stack([whole, *[torch.zeros(())] * 3]), rtol=1e-5, atol=1e-9)
    assert (losses["random components"][1:] > 0.3 * whole).all()
    assert (losses["twin, random"][1:] > 0.3 * whole).all()
    assert found.target_loss == 0
    # A component has 6 + 6 numbers in the first matrix and 6 + 8 in the second, both of rank one.
    assert found.of("parameters")["components"].tolist() == [0, 26, 52]
    assert_close(found.of("bits")["components"], torch.tensor([0.0, 1.0, 2.0]) * (torch.tensor(6.0).log2() + 2))
    # A latent has 6 + 8; with k = 2 and as they are, only one is not 0.
    assert found.of("active")["twin"].tolist() == [0, 1, 1, 1]
    assert found.of("parameters")["twin"].tolist() == [0, 14, 14, 14]
    assert_close(found.of("bits")["twin"][1:], (torch.tensor(6.0).log2() + 1).expand(3))
    assert found.of("k")["twin"].tolist() == [0, 1, 2, torch.inf]


def test_neurons_of_the_hidden_layer_and_what_they_are_counted_as():
    """x = 2 e_i + e_j: one neuron is what is left of the larger feature, and has 6 + 8 numbers in the two matrices."""
    decomposition, batches = one_component_a_feature(), two_hot_batches()
    model = decomposition.target.model
    lost = [batch * (batch == 1) for batch in batches]
    expected = torch.cat([model(batch) for batch in lost]).square().mean()
    neurons = compare.Dictionary.neurons("act", 6, parameters=6 + 8)
    for by in ("activation", "gradient"):
        found = compare.sparsity(decomposition, batches, (1, 2), {"neurons": neurons}, by=by, nulls=False)
        assert found.of("parameters")["neurons"].tolist() == [14, 28, 28]
        assert_close(found.of("loss")["neurons"][1:], torch.zeros(2), rtol=0, atol=1e-10)
        if by == "activation":
            assert_close(found.of("loss")["neurons"][0], expected)
        # components are the same mechanisms, and selected by the same gradients
        assert by == "activation" or torch.allclose(found.of("loss")["components"], found.of("loss")["neurons"][:2])


def test_numbers_of_a_neuron_are_counted_where_its_matrices_can_be_told():
    """hook_post has 10 neurons, W_in is 8 × 10 and W_out 10 × 8; at the output of the MLP every matrix has width 8."""
    decomposition = decomposition_of(hooked_transformer().requires_grad_(False), ["*.mlp.*", "*.W_Q"])
    for site, width, expected in (("mlp.hook_post", 10, 16.0), ("hook_mlp_out", 8, torch.nan)):
        neurons = {"neurons": compare.Dictionary.neurons(f"blocks.0.{site}", width)}
        found = compare.sparsity(decomposition, [tokens(3)], (1,), neurons, nulls=False)
        assert found.of("parameters")["neurons"][0].item() == pytest.approx(expected, nan_ok=True)


def test_gradients_find_what_the_output_needs_and_activations_what_is_large():
    """Neuron 0 is ten times larger than all others, and nothing reads it."""
    decomposition = one_component_a_feature()
    with torch.no_grad():
        decomposition.target.model.last.weight[:, 0] = 0
    x = torch.ones(4, 6) + 9 * F.one_hot(torch.zeros(4).long(), 6)
    losses = {}
    for by in ("activation", "gradient"):
        neurons = {"neurons": compare.Dictionary.neurons("act", 6)}
        losses[by] = compare.sparsity(decomposition, [x], (0, 5), neurons, by=by, nulls=False).of("loss")["neurons"]
    assert losses["gradient"][1] < 1e-10
    assert losses["activation"][1] > 1e-3
    estimated = compare.sparsity(decomposition, [x], (5,), neurons, by="gradient", projections=4, nulls=False)
    assert estimated.of("loss")["neurons"][0] < 1e-10


def test_several_dictionaries_at_once_keep_k_each():
    decomposition, batches = one_component_a_feature(), one_hot_batches()
    several = [compare.Dictionary.neurons("first", 6), compare.Dictionary.neurons("act", 6)]
    found = compare.sparsity(decomposition, batches, (1,), {"both": several}, nulls=False)
    assert found.of("active")["both"].tolist() == [2, 2]
    assert_close(found.of("loss")["both"], torch.zeros(2), rtol=0, atol=1e-10)


def test_cross_entropy_and_kl():
    """Cross-entropy with the target's own classes, and its KL to itself; a wrong class costs more."""
    decomposition, batches = one_component_a_feature(), one_hot_batches()
    model = decomposition.target.model
    neurons = {"neurons": compare.Dictionary.neurons("act", 6)}
    x = torch.cat(batches)
    expected = F.cross_entropy(model(x), model(x).argmax(1)).item()
    found = compare.sparsity(
        decomposition, batches, (1,), neurons, loss="ce", labels=lambda batch: model(batch).argmax(1), nulls=False
    )
    assert found.target_loss == pytest.approx(expected, rel=1e-5)
    assert_close(found.loss, torch.full((3,), expected))
    kl = compare.sparsity(decomposition, batches, (0, 1), neurons, loss="kl", nulls=False).of("loss")["components"]
    uniform = apd.losses.kl_divergence(model(x), torch.zeros(len(x), 8)).mean()
    assert_close(kl, torch.stack([uniform, torch.zeros(())]), rtol=1e-4, atol=1e-6)


def test_batches_of_different_size_count_by_their_data_points():
    decomposition, batches = one_component_a_feature(), one_hot_batches(n_batches=1)
    neurons = {"neurons": compare.Dictionary.neurons("act", 6)}
    at_once = compare.sparsity(decomposition, batches, (0, 1), neurons)
    parts = compare.sparsity(decomposition, [batches[0][:10], batches[0][10:]], (0, 1), neurons)
    assert parts.curve == at_once.curve
    for column in ("loss", "active", "parameters", "bits"):
        assert_close(getattr(parts, column), getattr(at_once, column), rtol=1e-4, atol=1e-8, equal_nan=True)


@pytest.mark.parametrize("granularity", ["example", "position"])
@pytest.mark.parametrize("by", ["activation", "gradient"])
def test_what_padding_holds_does_not_matter(granularity, by):
    model = tiny_gpt2().requires_grad_(False)
    decomposition = decomposition_of(model, "*.mlp.*", selection=apd.TopK(2, granularity))
    attention_mask = (torch.arange(5) < torch.tensor([3, 5, 4])[:, None]).long()
    found = []
    for filler in (3, 7):
        ids = torch.randint(13, (3, 5), generator=torch.Generator().manual_seed(0))
        batch = {"input_ids": torch.where(attention_mask.bool(), ids, filler), "attention_mask": attention_mask}
        neurons = {"neurons": compare.Dictionary.neurons("transformer.h.0.mlp.act", 32)}
        found.append(compare.sparsity(decomposition, [batch], (2, 8), neurons, loss="kl", by=by, nulls=False))
    for column in ("loss", "active", "bits"):
        assert_close(found[0].of(column)["neurons"], found[1].of(column)["neurons"])
    active = found[0].of("active")["neurons"]
    assert active.tolist()[:2] == [2, 8]
    assert found[0].of("loss")["neurons"][2] < 1e-6 < found[0].of("loss")["neurons"][0]


def test_a_hooked_transformer_with_positions():
    """All neurons are the model, none are the model without its MLP but for what its bias writes."""
    model = hooked_transformer().requires_grad_(False)
    decomposition = decomposition_of(model, "*.mlp.*", selection=apd.BatchTopK(2.0, "position"))
    before, x = Snapshot.of(model), tokens(4)
    neurons = {"neurons": compare.Dictionary.neurons("blocks.0.mlp.hook_post", 10)}
    found = compare.sparsity(decomposition, [x], (0, 2.5, 10), neurons, loss="kl", nulls=False)
    before.assert_unchanged(model)
    zero = [("blocks.0.mlp.hook_post", lambda value, hook: torch.zeros_like(value))]
    expected = apd.losses.kl_divergence(model(x), model.run_with_hooks(x, fwd_hooks=zero)).mean()
    losses = found.of("loss")["neurons"]
    assert_close(losses[0], expected)
    assert losses[0] > losses[1] > losses[2]
    assert losses[2] == pytest.approx(0, abs=1e-6)
    assert found.of("active")["neurons"][1] == 2.5


def test_the_table_and_what_is_printed():
    decomposition = one_component_a_feature()
    found = compare.sparsity(
        decomposition, one_hot_batches(), (1,), {"twin": permuted_rows(decomposition)}, nulls=False
    )
    frame = found.table()
    assert list(frame) == ["curve", "k", "loss", "active units", "active parameters", "bits"]
    assert frame["curve"].tolist() == ["components", "twin", "twin"]
    assert "loss of the target itself: 0" in str(found)


def test_bad_settings_are_refused_and_leave_the_model():
    decomposition, batches = one_component_a_feature(), one_hot_batches()
    model, twin = decomposition.target.model, permuted_rows(decomposition)
    before = Snapshot.of(model)
    for error, match, ks, data, options in [
        (apd.errors.InvalidSetting, "from 0 on", (-1,), batches, {}),
        (apd.errors.InvalidSetting, "go together", (1,), batches, {"loss": "ce"}),
        (apd.errors.InvalidBatches, "no batches", (1,), [], {}),
        (apd.NonFinite, "NaN or infinite", (1,), [torch.full((2, 6), torch.nan)], {}),
    ]:
        with pytest.raises(error, match=match):
            compare.sparsity(decomposition, data, ks, {"twin": twin}, **options)
        before.assert_unchanged(model)
    for forward in (1, 4, 8):
        with interrupted_in_forward(model.act, forward), pytest.raises(KeyboardInterrupt):
            compare.sparsity(decomposition, batches, (1, 2), {"twin": twin})
        before.assert_unchanged(model)
