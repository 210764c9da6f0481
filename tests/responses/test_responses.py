"""What components respond to: answers known by hand, and the same as the slow, obviously right way."""

import pytest
import torch
import torch.nn.functional as F
from support import outside
from support.known import X, known_parts
from support.toy_models import TinyGPT, decomposition_of, tiny_gpt2
from torch import Tensor
from torch.testing import assert_close

import apd_lens as apd
from apd_lens.responses import CoActivation
from apd_lens.responses._ablation import ablation_effects


def test_the_answers_on_a_diagonal_matrix_are_those_worked_out_by_hand():
    """Attribution of c is scale_c |x_c| / 2 (root mean over four outputs); its effect is scale_c x_c on output c."""
    found = apd.responses(known_parts(8 / 6), X.split(2), examples=2, outputs=1)
    assert (found.n_examples, found.n_data_points) == (6, 6)
    assert_close(found.attribution, torch.tensor([1.0, 2.0, 3.0, 4.0]) * X.abs().mean(0) / 2)
    assert found.top.example[:3].tolist() == [[1, 4], [5, 2], [5, 3]]
    assert_close(found.top.attribution[:3], torch.tensor([[2.5, 1.5], [4.0, 3.0], [3.0, 1.5]]))
    # Of every batch of two the int(4/3 · 2) = 2 largest are active, which leaves x_0 = 3 out beside 4 and 3.
    assert found.active.tolist() == pytest.approx([2 / 6, 3 / 6, 1 / 6, 0])
    assert found.top.active[:3].tolist() == [[True, False], [True, True], [True, False]]
    effects = found.effects
    # Component 0 raises output 0 by 5 on its only top example that is active; component 1 by (−8 + 6) / 2.
    assert effects.n_examples.tolist() == [1, 2, 1, 2]
    assert (effects.promoted[0, 0], effects.promoted_by[0, 0]) == (0, 5)
    assert (effects.suppressed[1, 0], effects.suppressed_by[1, 0]) == (1, -1)
    assert (effects.promoted[2, 0], effects.promoted_by[2, 0]) == (2, 6)
    assert_close(effects.change, torch.tensor([5.0, (8 + 6) / 2, 6.0, 0.0]) / 2)
    assert_close(effects.distance, torch.tensor([25.0, (64 + 36) / 2, 36.0, 0.0]) / 4)
    assert effects.loss is None
    assert found.together.counts.tolist() == [[2, 0, 0, 0], [0, 3, 1, 0], [0, 1, 1, 0], [0, 0, 0, 0]]
    assert_close(found.together.lift[1, 2], torch.tensor(1 * 6 / (3 * 1)))
    assert_close(found.together.jaccard[1, 2], torch.tensor(1 / 3))
    assert found.together.strongest(2).tolist() == [[-1, -1], [2, -1], [1, -1], [-1, -1]]


def test_tables_have_a_row_for_each():
    found = apd.responses(known_parts(8 / 6), X.split(2), examples=2, outputs=1, loss=lambda batch, y: y.sum(1))
    table = found.table()
    assert table["fires with"].tolist() == [-1, 2, 1, -1]
    assert table["promotes"].tolist()[::2][:2] == [0, 2]
    assert table["loss"].tolist() == pytest.approx([-5.0, 1.0, -6.0, 0.0])
    assert len(found.top.table()) == 8
    assert found.effects.table().query("component == 0")["effect"].tolist() == [5.0, 0.0]
    assert found.together.table().values.tolist() == [[1, 2, 1, 2.0, pytest.approx(1 / 3)]]


def test_how_the_data_is_cut_into_batches_does_not_matter():
    """With a selection that looks at each data point alone."""
    decomposition = decomposition_of(TinyGPT(), selection=apd.TopK(2, granularity="position"), n_components=6)
    tokens = torch.randint(0, 11, (9, 5))
    whole, cut = (apd.responses(decomposition, tokens.split(n), examples=3, outputs=4) for n in (9, 2))
    for one, other in ((whole.top, cut.top), (whole.effects, cut.effects), (whole.together, cut.together)):
        for name, value in vars(one).items():
            if isinstance(value, Tensor):
                assert_close(getattr(other, name), value, rtol=1e-4, atol=1e-6, equal_nan=True)
    assert whole.top.inputs.keys() == cut.top.inputs.keys()
    for example, batch in cut.top.inputs.items():
        assert torch.equal(batch, tokens[example : example + 1])


@pytest.mark.parametrize("granularity", ["example", "position"])
def test_examples_and_effects_are_those_of_the_slow_way(granularity):
    """Examples of two lengths, ablated one at a time by `ablate`."""
    model = TinyGPT()
    selection = apd.TopK(2, granularity=granularity)
    decomposition = decomposition_of(model, n_components=6, selection=selection)
    batches = [torch.randint(0, 11, (4, 5)), torch.randint(0, 11, (3, 7))]
    found = apd.responses(decomposition, batches, examples=3, outputs=11, centred=True)
    examples = [example[None] for batch in batches for example in batch]
    attributions = [decomposition.attributions(example)[0] for example in examples]
    masks = [decomposition.select(example)[0] for example in examples]
    by_position = granularity == "position"
    strength = torch.stack([a.amax(0) if by_position else a for a in attributions])
    assert_close(found.top.attribution, strength.mT.topk(3).values)
    for c in range(6):
        top = found.top.of(c)
        assert top == strength[:, c].topk(3).indices.tolist()
        changes = []
        for rank, example in enumerate(top):
            length = examples[example].shape[1]
            shown = found.top.positions[c, rank]
            assert int((~shown.isnan()).sum()) == length
            on = masks[example][..., c]
            assert found.top.active[c, rank] == on.any()
            if by_position:
                assert_close(shown[:length], attributions[example][:, c])
                assert torch.equal(found.top.active_positions[c, rank, :length], on)
            with decomposition.ablate(c):
                without = model(examples[example])[0]
            change = (model(examples[example])[0] - without).detach()
            changes.append((change - change.mean(-1, keepdim=True), on))
        counted = [(change, on) for change, on in changes if on.any()] or changes
        rms = torch.stack([change.square().mean().sqrt() for change, _ in counted])
        assert_close(found.effects.change[c], rms.mean(), rtol=1e-4, atol=1e-6)
        rows = torch.cat([change[on] if by_position and bool(on.any()) else change for change, on in counted])
        expected = rows.mean(0)
        effect = torch.zeros(11).scatter(0, found.effects.promoted[c], found.effects.promoted_by[c])
        assert_close(effect, expected, rtol=1e-4, atol=1e-5)


def test_of_logits_what_a_component_raises_is_found_by_probability():
    """A component raises the logit of output 0, which stays unlikely, more than that of output 1, which does not."""
    model = torch.nn.Linear(2, 3, bias=False)
    model.weight.data = torch.tensor([[4.0, -20.0], [1.0, 0.0], [0.0, 0.0]])
    state = apd.init(model, n_components=2, rank=1, losses=apd.Losses(distance="kl"), selection=apd.TopK(2))
    decomposition = state.decomposition()
    A, B = decomposition.components.A["weight"], decomposition.components.B["weight"]
    with torch.no_grad():
        A[:] = torch.eye(2)[:, :, None]
        B[:] = model.weight.mT[:, None]
    effects = apd.responses(decomposition, [torch.ones(1, 2)], examples=1, outputs=3).effects
    logits, without = model(torch.ones(2)), model(torch.tensor([0.0, 1.0]))
    rises = (logits.softmax(-1) - without.softmax(-1)).detach()
    assert effects.promoted[0].tolist() == [1, 0, 2]
    assert effects.suppressed[0].tolist() == [2, 0, 1]
    assert effects.promoted_p is not None
    assert_close(effects.promoted_p[0], rises[[1, 0, 2]])
    change = (logits - without).detach()
    assert_close(effects.promoted_by[0], (change - change.mean())[[1, 0, 2]])
    assert "probability" in effects.table()
    plain = apd.responses(decomposition, [torch.ones(1, 2)], examples=1, outputs=3, centred=False).effects
    assert plain.promoted[0].tolist() == [0, 1, 2]
    assert plain.promoted_p is None
    assert "probability" not in plain.table()


def test_padding_changes_nothing():
    decomposition = decomposition_of(
        tiny_gpt2(use_cache=False), "transformer.h.0.mlp.*", selection=apd.TopK(1, granularity="position")
    )
    tokens = torch.randint(1, 13, (4, 5))
    mask = torch.ones_like(tokens)
    padded = {"input_ids": F.pad(tokens, (0, 3)), "attention_mask": F.pad(mask, (0, 3))}
    plain = {"input_ids": tokens, "attention_mask": mask}
    found, expected = (apd.responses(decomposition, [batch], examples=2, outputs=13) for batch in (padded, plain))
    assert found.n_data_points == expected.n_data_points == 20
    assert torch.equal(found.top.example, expected.top.example)
    assert torch.equal(found.together.counts, expected.together.counts)
    assert_close(found.effects.change, expected.effects.change, rtol=1e-4, atol=1e-6)
    assert_close(found.effects.promoted_by, expected.effects.promoted_by, rtol=1e-3, atol=1e-5)


def test_the_null_of_co_activation_is_a_lift_of_one():
    """Components that fire independently, and two that fire together always."""
    mask = torch.rand(20_000, 6) < 0.1
    mask[:, 5] = mask[:, 4]
    counts = (mask.float().mT @ mask.float()).long()
    together = CoActivation(counts, len(mask))
    independent = together.lift[:4, :4][~torch.eye(4, dtype=torch.bool)]
    assert (independent - 1).abs().max() < 0.25  # counts of 200, standard deviation 7 % of them
    assert together.lift[4, 5] == pytest.approx(10, rel=0.1)
    assert together.jaccard[4, 5] == 1


def test_random_components_move_other_outputs_on_the_examples_of_the_real_ones():
    """The null: component c of the known parts moves output c, its random twin one of four."""
    decomposition = known_parts()
    top = apd.responses(decomposition, X.abs().split(2), examples=2, outputs=1).top

    def hits(components: apd.ParameterComponents) -> int:
        promoted = ablation_effects(decomposition, top, components=components, outputs=1).promoted[:3, 0]
        return int((promoted == torch.arange(3)).sum())

    assert hits(decomposition.components) == 3
    random = [hits(apd.components.random_components(decomposition.components, seed)) for seed in range(20)]
    assert sum(random) < 30  # of 60, where chance is 15


def test_the_model_is_as_it_was_and_nothing_is_left_on_it():
    decomposition = decomposition_of(TinyGPT(), selection=apd.TopK(1, granularity="position"))
    model = decomposition.target.model.train()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    apd.responses(decomposition, [torch.randint(0, 11, (4, 5))])
    assert model.training
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert all("forward" not in vars(module) for module in model.modules())


def test_what_cannot_work_is_said():
    came = outside.errors_of(
        """
        import torch
        import apd_lens as apd
        decomposition = apd.init(torch.nn.Linear(2, 2), n_components=3).decomposition()
        x = torch.ones(4, 2)
        """,
        [
            "apd.responses(decomposition, x)",
            "apd.responses(decomposition, [])",
            "apd.responses(decomposition, [x], examples=0)",
            "apd.responses(decomposition, [x], loss=lambda batch, y: y)",
        ],
    )
    assert came[0].startswith(
        "InvalidBatches: Expected batches, an iterable that ends (a list, a DataLoader), got one tensor"
    )
    assert came[1].startswith("InvalidBatches: The stream of batches is empty")
    assert came[2].startswith("InvalidSetting: Expected at least one example and one output")
    assert came[3].startswith("ShapeMismatch: Expected loss to give one scalar an example")


def test_effects_on_each_example_are_those_of_ablating_there():
    """The outputs that change most, at the position where most changes, with the component and without it."""
    model = TinyGPT()
    decomposition = decomposition_of(model, n_components=5, selection=apd.TopK(2, granularity="position"))
    tokens = torch.randint(0, 11, (6, 5))
    found = apd.responses(decomposition, [tokens], examples=3, centred=True)
    each, top, mask = found.effects.on_each, found.top, decomposition.select(tokens)
    for c in range(5):
        with torch.no_grad(), decomposition.ablate(c):
            without = model(tokens)
        with torch.no_grad():
            whole = model(tokens)
        for rank, example in enumerate(top.of(c)):
            counts = bool(top.active[c, rank]) or not bool(top.active[c].any())
            assert bool(each.distance[c, rank].isnan()) != counts
            if not counts:
                continue
            assert_close(each.distance[c, rank], (whole - without)[example].square().mean(), rtol=1e-3, atol=1e-6)
            change = whole[example] - without[example]
            size = (change - change.mean(-1, keepdim=True)).square().mean(-1)
            on = mask[example, :, c]
            position = int((size * on if bool(on.any()) else size).argmax())
            assert int(each.position[c, rank]) == position
            one, other = (logits[example, position].softmax(-1) for logits in (whole, without))
            units = (one - other).abs().topk(4).indices
            assert_close(each.whole[c, rank], one[units], rtol=1e-3, atol=1e-5)
            assert_close(each.without[c, rank], other[units], rtol=1e-3, atol=1e-5)
    assert len(each.table()) == 4 * int((~each.distance.isnan()).sum())
