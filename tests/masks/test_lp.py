"""The Lp form: its losses and gradients against brute force, what it refuses, and that it trains."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import pytest
import torch
from support import outside
from support.padding import gpt2, padded
from support.toy_models import TMS, ResidualMLP, Snapshot
from torch import Tensor, nn
from torch.func import functional_call, jacrev, vmap
from torch.testing import assert_close

import apd_lens as apd

PAPER = apd.paper()["losses"]
# The Lp form has no path loss, and no mask to make moves by.
init = partial(apd.init, losses=PAPER, moves=None)

MODELS: dict[str, Callable[[], nn.Module]] = {
    "tied": lambda: TMS(4, 3).double(),
    "two matrices": lambda: ResidualMLP(4, 6, 5, 1).double(),
}


def brute_force(state: apd.training.State, x: Tensor, p: float) -> dict[str, Tensor]:
    """The terms by autograd through autograd: the Jacobian of every output to every weight, times P_c."""
    target, components, losses = state.target, state.components, state.settings.losses
    parameters = {name: target.weights[name].parameter.detach() for name in components.names}

    def f(parameters: dict[str, Tensor], example: Tensor) -> Tensor:
        return functional_call(target.model, parameters, example[None])[0]

    jacobians = vmap(jacrev(f), in_dims=(None, 0))(parameters, x)
    effects = torch.zeros(())
    for name in components.names:
        P = components.component_weights(name)
        host = torch.stack([target.weights[name].to_host(part) for part in P])
        effects = effects + torch.einsum("boij,cij->boc", jacobians[name], host)
    sparsity = (effects.square().mean(1) + 1e-16).pow(p / 2)
    n = sum(parameter.numel() for parameter in parameters.values())
    faithfulness, simplicity = torch.zeros(()), torch.zeros(())
    for name in components.names:
        A, B, W = components.A[name], components.B[name], target.weights[name].value()
        faithfulness = faithfulness + (W - (A @ B).sum(0)).square().sum() / n
        schatten = (A.square().sum(1) * B.square().sum(2) + 1e-16).pow(losses.schatten_p / 2).sum(1)
        simplicity = simplicity + (sparsity * schatten).sum(1).mean() / n
    return {"faithfulness": faithfulness, "minimality": sparsity.sum(1).mean(), "simplicity": simplicity}


@pytest.mark.parametrize("p", [0.5, 0.9, 2.0])
@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
def test_terms_and_gradients_are_those_of_brute_force(make, p: float):
    model, x = make(), torch.rand(7, 4, dtype=torch.float64)
    names = ["linear1*"] if isinstance(model, TMS) else ["layers.*"]
    losses = replace(PAPER, faithfulness=2.0, minimality=0.7, simplicity=3.0, schatten_p=0.8)
    state = apd.init(model, weights=names, n_components=5, rank=2, selection=apd.Lp(p), losses=losses, moves=None)
    factors = list(state.components.parameters())
    expected = brute_force(state, x, p)
    wanted = 2.0 * expected["faithfulness"] + 0.7 * expected["minimality"] + 3.0 * expected["simplicity"]
    gradients = torch.autograd.grad(wanted, factors)
    state, info = apd.step(state, x)
    assert list(info.terms) == list(expected)
    for name, term in expected.items():
        assert_close(info.terms[name], term.detach(), rtol=1e-10, atol=0)
    for factor, gradient in zip(factors, gradients, strict=True):
        assert_close(factor.grad, gradient, rtol=1e-8, atol=1e-12)


def test_small_memory_changes_nothing():
    model, x = MODELS["two matrices"](), torch.rand(7, 4, dtype=torch.float64)
    grads = []
    for memory in (2**29, 2000):
        attribution = apd.GradientAttribution(memory=memory)
        state = init(model, n_components=5, rank=2, selection=apd.Lp(), attribution=attribution)
        apd.step(state, x)
        grads.append([factor.grad for factor in state.components.parameters()])
    for one, other in zip(*grads, strict=True):
        assert_close(one, other, rtol=1e-9, atol=1e-15)


def test_inputs_that_no_component_serves_have_finite_gradients():
    state = init(nn.Linear(3, 3), n_components=4, rank=2, selection=apd.Lp(0.5))
    _, info = apd.step(state, torch.zeros(6, 3))
    assert info.loss.isfinite()
    assert all(factor.grad.isfinite().all() for factor in state.components.parameters())


def test_p_can_be_annealed():
    model, x = nn.Linear(3, 2), torch.randn(5, 3)
    optimization = apd.Optimization(steps=10, lr=0.0)
    ramp = apd.Ramp(2.0, 1.0, hold=0.2, reach=0.8)
    state = init(model, n_components=4, rank=1, selection=apd.Lp(ramp), optimization=optimization)
    attributions = state.decomposition().attributions(x)
    for step in range(10):
        state, info = apd.step(state, x)
        p = 2.0 if step < 2 else 1.0 if step >= 8 else 2.0 - (step / 10 - 0.2) / 0.6
        assert_close(info.terms["minimality"], attributions.pow(p).sum(1).mean())


def test_positions_are_data_points_and_padding_is_none():
    """The mean over all positions that are no padding of Σ_c A_c^p; and gradients of positions one by one."""
    model, batch = gpt2(), padded()
    selection = apd.Lp(0.8, granularity="position")
    state = init(model, weights="*.mlp.*", n_components=5, rank=2, selection=selection)
    attributions = state.decomposition().attributions(batch)[batch["attention_mask"].bool()]
    _, info = apd.step(state, batch)
    assert_close(info.terms["minimality"], attributions.pow(0.8).sum(1).mean())
    factors = dict(state.components.named_parameters())
    assert all(bool(factor.grad.any()) for factor in factors.values())


def test_relative_terms_do_not_depend_on_the_scale_of_the_model():
    small, large = nn.Linear(4, 3, bias=False), nn.Linear(4, 3, bias=False)
    large.weight.data = 10 * small.weight.data
    x, terms = torch.randn(6, 4), []
    for model in (small, large):
        losses = replace(PAPER, normalization="relative", schatten_p=0.9)
        state = init(model, n_components=4, rank=2, losses=losses, selection=apd.Lp())
        _, info = apd.step(state, x)
        terms.append({name: term.item() for name, term in info.terms.items()})
    assert terms[0] == pytest.approx(terms[1], rel=1e-4)


# What is active.


def lp_decomposition(selection: apd.Lp) -> apd.Decomposition:
    torch.manual_seed(0)
    return init(nn.Linear(3, 3), n_components=4, rank=2, selection=selection).decomposition()


def test_without_a_threshold_the_user_says_how_many():
    x = torch.randn(6, 3)
    decomposition = lp_decomposition(apd.Lp())
    attributions = decomposition.attributions(x)
    assert torch.equal(decomposition.select(x, k=1.5), apd.masks.batch_topk_mask(attributions, 1.5))
    assert decomposition.summary(x, k=1.5).active.sum().item() == pytest.approx(1.5)
    for ask in (decomposition.select, decomposition.summary):
        with pytest.raises(apd.errors.InvalidSetting, match=r"trained without a mask.*select\(batch, k=1.5\)"):
            ask(x)


def test_with_a_threshold_it_says_it_itself():
    x = torch.randn(6, 3)
    attributions = lp_decomposition(apd.Lp()).attributions(x)
    threshold = attributions.median().item()
    decomposition = lp_decomposition(apd.Lp(threshold=threshold))
    mask = decomposition.select(x)
    assert torch.equal(mask, attributions > threshold)
    assert 0 < mask.sum() < mask.numel()
    assert torch.equal(decomposition.select(x, k=1), apd.masks.batch_topk_mask(attributions, 1))


def test_info_says_what_is_active_if_that_can_be_said():
    model, x = nn.Linear(3, 3), torch.randn(6, 3)
    options = {"n_components": 4, "rank": 2}
    threshold = apd.init(model, **options).decomposition().attributions(x).median().item()
    _, info = apd.step(init(model, selection=apd.Lp(), **options), x)
    assert (info.k, info.alive) == (None, None)
    _, info = apd.step(init(model, selection=apd.Lp(threshold=threshold), **options), x)
    assert info.k == 2.0
    assert 2 <= info.alive <= 4


REFUSED = {
    "path": ({"losses": replace(PAPER, path=1.0)}, r"no mask and no sparse pass.*path=1\.0"),
    "hidden": ({"losses": replace(PAPER, hidden=1.0, hidden_at=("",))}, "no mask and no sparse pass"),
    "distance": ({"losses": replace(PAPER, distance="kl")}, "distance='kl'"),
    "attributions without gradients": ({"attribution": apd.AblationAttribution()}, "take gradients of"),
    "cluster moves": ({"moves": apd.moves.ClusterMoves()}, r"Give Lp\(threshold=\.\.\.\), or use SplitMoves"),
}


@pytest.mark.parametrize(("options", "message"), REFUSED.values(), ids=REFUSED)
def test_what_needs_a_mask_is_refused(options, message: str):
    with pytest.raises(apd.errors.InvalidSetting, match=message):
        init(nn.Linear(3, 3), n_components=4, selection=apd.Lp(), **options)


def test_moves_save_and_load(tmp_path):
    model, x = ResidualMLP(4, 6, 5, 1), torch.randn(32, 4)
    before = Snapshot.of(model)
    for moves, selection in (
        (apd.moves.SplitMoves(every=2), apd.Lp()),
        (apd.moves.ClusterMoves(every=2), apd.Lp(threshold=1.0)),
    ):
        infos: list[apd.training.StepInfo] = []
        decomposition = apd.decompose(
            model, [x], n_components=40, rank=2, selection=selection, moves=moves, progress=False,
            losses=PAPER, optimization=apd.Optimization(10, lr=1e-2, scaled=False, init_scale=1.0),
            on_step=lambda step, info, infos=infos: infos.append(info),
        )  # fmt: skip
        assert sum(info.moves for info in infos) > 0
        decomposition.save(tmp_path)
        loaded = apd.load(tmp_path, model)
        assert loaded.settings == decomposition.settings
        assert torch.equal(loaded.select(x, k=1), decomposition.select(x, k=1))
    before.assert_unchanged(model)


TMS_5_2 = """
import torch, apd_lens as apd
from apd_lens import metrics, toys
torch.set_num_threads(1)
for seed in (0, 1, 2):
    target = toys.train_tms(5, 2, steps=1500, seed=seed)
    decomposition = apd.decompose(
        target.model, target.batches(512, seed=1000 + seed), "linear1*", n_components=8, rank=2,
        selection=apd.Lp(p=0.5, threshold=0.02), moves=apd.moves.ClusterMoves(),
        losses=apd.Losses(10, apd.HoldThenDecay(3), apd.HoldThenDecay(3), simplicity_floor=0.0, path=0.0),
        optimization=apd.Optimization(steps=1000, lr=1e-2, scaled=False), seed=seed, progress=False,
    )
    alone = [
        metrics.features_alone(target.rows, components.component_weights("linear1.weight"))
        for components in (decomposition.components, apd.components.random_components(decomposition.components))
    ]
    print(*alone, decomposition.residuals()["all"])
"""


@pytest.mark.thorough
def test_tms_5_2_comes_apart_and_random_components_do_not():
    """Of the 15 features of three models most have a component of their own, of random twins none."""
    results = [[float(value) for value in line.split()] for line in outside.run(TMS_5_2).splitlines()]
    alone, random, residuals = zip(*results, strict=True)
    assert sum(alone) >= 9
    assert sum(random) <= 1
    assert max(residuals) < 0.01
