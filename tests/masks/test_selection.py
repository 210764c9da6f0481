import pytest
import torch
from torch import Tensor

import apd_lens as apd


def test_batch_topk_takes_the_largest_of_the_batch():
    attributions = torch.tensor([[9.0, 8.0, 7.0], [1.0, 2.0, 3.0]])
    assert torch.equal(apd.BatchTopK(1.5)(attributions), torch.tensor([[True, True, True], [False, False, False]]))
    assert torch.equal(apd.BatchTopK(1.0)(attributions), torch.tensor([[True, True, False], [False, False, False]]))


def test_topk_takes_the_largest_of_each_data_point():
    attributions = torch.tensor([[9.0, 8.0, 7.0], [1.0, 2.0, 3.0]])
    assert torch.equal(apd.TopK(1)(attributions), torch.tensor([[True, False, False], [False, False, True]]))
    assert torch.equal(apd.TopK(2)(attributions), torch.tensor([[True, True, False], [False, True, True]]))


@pytest.mark.parametrize("selection", [apd.BatchTopK(1.25), apd.TopK(2)])
def test_the_count_is_exact_even_with_ties(selection):
    mask = selection(torch.zeros(4, 3, 5))
    assert mask.shape == (4, 3, 5)
    assert mask.sum() == int(selection.k * 12)


@pytest.mark.parametrize("selection", [apd.BatchTopK(1.0), apd.TopK(2)])
def test_reordering_components_reorders_the_mask(selection):
    attributions, order = torch.rand(6, 5), torch.randperm(5)
    assert torch.equal(selection(attributions[:, order]), selection(attributions)[:, order])


@pytest.mark.parametrize(
    ("select", "message"),
    [
        (lambda a: apd.masks.batch_topk_mask(a, 0.0), "selects int(k·n) = 0 of the n·C = 4 · 3 = 12"),
        (lambda a: apd.masks.batch_topk_mask(a, 0.2), "Choose k between 0.25 and 3"),
        (lambda a: apd.masks.batch_topk_mask(a, 3.5), "selects int(k·n) = 14 of the n·C = 4 · 3 = 12"),
        (lambda a: apd.masks.topk_mask(a, 0), "TopK(k=0) needs k between 1 and the number of components, 3"),
        (lambda a: apd.masks.topk_mask(a, 4), "TopK(k=4) needs k between 1"),
    ],
)
def test_a_k_that_cannot_be_is_refused(select, message: str):
    with pytest.raises(apd.errors.InvalidSetting) as error:
        select(torch.rand(4, 3))
    assert message in str(error.value)


def test_least_takes_what_does_enough_beside_the_largest_of_its_data_point():
    attributions = torch.rand(6, 4, dtype=torch.float64) ** 3
    attributions[2] = 0.0
    largest = [max(row) ** 2 for row in attributions.tolist()]
    damping = 0.01 * sum(largest) / 6
    r = [[a / (most + damping) ** 0.5 for a in row] for row, most in zip(attributions.tolist(), largest, strict=True)]
    enough = torch.tensor([[value >= 0.3 for value in row] for row in r])
    assert 6 < enough.sum() < 18
    assert not enough[2].any()
    assert torch.equal(apd.BatchTopK(100.0, least=0.3)(attributions), enough)
    few = apd.BatchTopK(0.5, least=0.3)(attributions)
    assert few.sum() == 3
    assert torch.tensor(r)[few].min() >= torch.tensor(r)[~few].max()


def test_least_does_not_count_padding_and_may_take_nothing():
    selection = apd.BatchTopK(10.0, granularity="position", least=0.3)
    attributions, valid = torch.rand(2, 3, 4) ** 3, torch.tensor([[True, True, True], [True, False, True]])
    mask = selection(attributions, valid)
    assert torch.equal(mask[valid], selection(attributions[valid][None])[0])
    assert not mask[~valid].any()
    assert not selection(torch.zeros(2, 3, 4)).any()


def test_k_may_fall_below_one_component_for_all_of_a_small_batch():
    """6 data points and k = 0.1: else `Needed`, the default, could end the training of a small batch."""
    attributions = torch.rand(6, 4)
    mask = apd.BatchTopK(apd.masks.Needed(now=0.1), least=0.15)(attributions)
    assert mask.sum() == 1
    with pytest.raises(apd.errors.InvalidSetting, match="must select at least 1"):
        apd.BatchTopK(0.1)(attributions)


def test_needed_grows_while_too_little_is_given_back_and_shrinks_while_enough_is():
    """By the factor 2 in a tenth of the steps, not before `hold` and not below the lowest; at the end it only grows."""
    needed, found = apd.masks.Needed(now=2.0, lowest=1.0, minimality=0.1, growth=2.0, hold=0.2, release=0.7), []
    for step, minimality in enumerate([0.5] * 20 + [0.5] * 10 + [0.05] * 50):
        needed = needed.after(minimality, progress=step / 100, steps=100)
        found.append(needed.now)
    assert found[:20] == [2.0] * 20
    assert found[29] == pytest.approx(4.0)
    assert found[39] == pytest.approx(2.0)
    assert found[49:70] == pytest.approx([1.0] * 21)
    assert found[79] == pytest.approx(2.0)


def test_training_with_needed_keeps_the_k_that_it_found():
    """Two features are always on, and one component can't do the work of two."""
    model, x = torch.nn.Linear(2, 2, bias=False), torch.rand(64, 2) + 0.5
    torch.nn.init.eye_(model.weight)
    selection = apd.BatchTopK(apd.masks.Needed(minimality=1e-9, growth=2.0), least=1e-6)
    options = {"n_components": 4, "rank": 1, "selection": selection, "moves": None}
    state, ks = apd.init(model, optimization=apd.Optimization(steps=20), **options), []
    for _ in range(20):
        state, info = apd.step(state, x)
        ks.append(info.k)
    assert ks == pytest.approx([1.0] * 3 + [2.0 ** (n / 2) for n in range(1, 5)] + [4.0] * 13, abs=0.02)
    assert state.decomposition().settings.selection.k.now > 4
    assert state.decomposition().select(x).sum() == 4 * 64


def test_masks_need_no_gradient():
    attributions: Tensor = torch.rand(2, 3, requires_grad=True)
    assert not apd.TopK(1)(attributions).requires_grad


def n_nonzero(batch: Tensor) -> float:
    return (batch != 0).sum().item() / len(batch)


def sparse_inputs(*features: int) -> Tensor:
    x = torch.zeros(8, 4)
    x[torch.arange(len(features)), list(features)] = 1.0
    return x


def test_k_as_a_function_of_the_batch():
    """Identity weights: exactly the active features' components are selected, however many there are."""
    model = torch.nn.Linear(4, 4, bias=False)
    torch.nn.init.eye_(model.weight)
    state = apd.init(model, n_components=4, rank=1, selection=apd.BatchTopK(n_nonzero))
    with torch.no_grad():
        state.components.A["weight"].copy_(torch.eye(4)[:, :, None])
        state.components.B["weight"].copy_(torch.eye(4)[:, None, :])
    for x in (sparse_inputs(0, 1, 2), sparse_inputs(3, 3, 3, 3, 0), sparse_inputs()):
        assert torch.equal(state.decomposition().select(x), x.bool())
        assert torch.equal(state.decomposition().select(x, k=n_nonzero), x.bool())
        state, info = apd.step(state, x)
        assert info.k == n_nonzero(x)
    assert state.decomposition().select(sparse_inputs(0, 1), k=3).sum() == 24
    assert state.decomposition().summary(sparse_inputs(0, 1)).active.sum() == 0.25


def test_k_is_counted_exactly():
    """k = 1 / 49 on 49 data points is one component, though the product rounds below 1."""
    assert int(1 / 49 * 49) == 0
    for n in (49, 100, 2048, 98_304):
        for count in range(1, 300):
            assert apd.BatchTopK(count / n).n_active(n) == count


@pytest.mark.parametrize("wrong", [-1.0, float("nan"), float("inf"), "2", None, torch.ones(2)])
def test_a_function_that_gives_no_number_is_refused(wrong):
    state = apd.init(torch.nn.Linear(4, 4), n_components=4, selection=apd.BatchTopK(lambda batch: wrong))
    with pytest.raises(apd.errors.InvalidSetting, match=r"mean number of active components.*for this batch it gave"):
        apd.step(state, torch.ones(2, 4))


def test_a_function_that_asks_for_too_much_is_refused():
    state = apd.init(torch.nn.Linear(4, 4), n_components=3, selection=apd.BatchTopK(lambda batch: 3.5))
    with pytest.raises(apd.errors.InvalidSetting, match=r"selects int\(k·n\) = 7 of the n·C = 2 · 3"):
        apd.step(state, torch.ones(2, 4))


def test_a_function_is_not_saved_and_can_be_given_again(tmp_path):
    model, x = torch.nn.Linear(4, 4), sparse_inputs(0, 1, 2)
    decomposition = apd.init(model, n_components=4, selection=apd.BatchTopK(n_nonzero)).decomposition()
    decomposition.save(tmp_path)
    loaded = apd.load(tmp_path, model)
    with pytest.raises(apd.ArtifactError, match=r"function n_nonzero of the batch, which was not saved.*\(batch, k="):
        loaded.select(x)
    assert torch.equal(loaded.select(x, k=n_nonzero), decomposition.select(x))
    assert torch.equal(loaded.attributions(x), decomposition.attributions(x))
