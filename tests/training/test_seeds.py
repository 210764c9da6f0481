"""Several seeds at once: each gets what it would get alone, whatever the model, the attribution and the losses."""

import warnings

import pytest
import torch
from support.known import nan_from
from support.toy_models import TMS, ResidualMLP, Snapshot, TinyGPT, interrupted_in_forward, tiny_gpt2
from torch import Tensor, nn
from torch.testing import assert_close
from transformer_lens import HookedTransformer, HookedTransformerConfig

import apd_lens as apd

SEEDS = (4, 0)
ALL_LOSSES = apd.Losses(1, 1, apd.HoldThenDecay(0.5), 0.9, simplicity_floor=0.5, path=1.0, normalization="relative")
FEW = {"n_components": 5, "rank": 2, "progress": False, "optimization": apd.Optimization(steps=8, lr=1e-2)}
TOKENS = torch.randint(11, (3, 4, 5), generator=torch.Generator().manual_seed(0))


def vectors(n: int = 3, examples: int = 8) -> list[Tensor]:
    return list(torch.randn(n, examples, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64))


def residual_mlp() -> nn.Module:
    return ResidualMLP(4, 6, 5, 2).double()


def tms() -> nn.Module:
    return TMS(4, 3).double()


def squared(target: Tensor, sparse: Tensor) -> Tensor:
    """A distance that vmap could not map."""
    return (target - sparse).square().mean(-1) * (2.0 if target.sum() > 0 else 1.0)


CASES = {
    "a tied matrix": (tms, vectors, {}),
    "the paper's losses": (residual_mlp, vectors, {"losses": apd.paper()["losses"]}),
    "thirty steps with cluster moves": (
        residual_mlp,
        lambda: vectors(3, 64),
        {"moves": apd.ClusterMoves(every=4), "optimization": apd.Optimization(steps=30, lr=1e-2)},
    ),
    # Once and of many examples: in what has lost rank, rounding decides the signs of singular vectors, which the noise
    # that is added then does not follow.
    "split moves": (residual_mlp, lambda: vectors(1, 64), {"moves": apd.SplitMoves(every=4), "selection": apd.TopK(1)}),
    "hidden activations": (
        residual_mlp,
        vectors,
        {"losses": apd.Losses(hidden=1.0, hidden_at=("layers.0.act", "layers.1.act"), path=0.5)},
    ),
    "a distance of the user's": (residual_mlp, vectors, {"losses": apd.Losses(distance=squared, path=1.0)}),
    "random projections": (residual_mlp, vectors, {"attribution": apd.GradientAttribution(projections=2)}),
    "integrated gradients": (residual_mlp, vectors, {"attribution": apd.IntegratedGradients(steps=2)}),
    "ablations": (residual_mlp, vectors, {"attribution": apd.AblationAttribution()}),
    "activations": (residual_mlp, vectors, {"attribution": apd.ActivationAttribution()}),
    "one batch": (residual_mlp, lambda: vectors(1), {}),
    "unit-norm columns": (
        residual_mlp,
        vectors,
        {"optimization": apd.Optimization(steps=8, lr=1e-2, unit_norm=True), "moves": apd.ClusterMoves(every=4)},
    ),
    "division moves": (
        residual_mlp,
        lambda: vectors(3, 64),
        {"moves": apd.DivisionMoves(every=4, noise=0.3), "optimization": apd.Optimization(steps=8, lr=1e-3)},
    ),
    "k of a batch": (residual_mlp, vectors, {"selection": apd.BatchTopK(lambda x: 1.0 + (x > 1).double().mean())}),
    "decomposed biases": (
        lambda: apd.wrap(nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 4)).double(), biases=True),
        vectors,
        {},
    ),
    "positions, lookups and KL": (
        lambda: TinyGPT().double(),
        lambda: list(TOKENS),
        {
            "selection": apd.BatchTopK(1.5, granularity="position"),
            "losses": apd.Losses(path=1.0, distance="kl"),
            "moves": apd.SplitMoves(every=4),
        },
    ),
    "lookups for whole examples": (
        lambda: TinyGPT().double(),
        lambda: list(TOKENS),
        {"moves": apd.ClusterMoves(every=4)},
    ),
    "padding": (
        lambda: tiny_gpt2().double(),
        lambda: [
            {"input_ids": tokens, "attention_mask": (torch.arange(5) < torch.tensor([[5], [3], [4], [5]])).long()}
            for tokens in TOKENS
        ],
        {"weights": "transformer.h.*.mlp.*", "selection": apd.TopK(2, granularity="position")},
    ),
}


@pytest.mark.parametrize(("model", "batches", "options"), CASES.values(), ids=CASES)
def test_every_seed_gets_what_it_gets_alone(model, batches, options):
    """In float64. The seeds differ from each other by a hundred million times as much."""
    model, options = model(), {**FEW, "losses": ALL_LOSSES, "selection": apd.BatchTopK(1.5), **options}
    before = Snapshot.of(model.model if isinstance(model, apd.TargetModel) else model)
    reported: list[list[apd.StepInfo]] = []
    together = apd.decompose_seeds(
        model, batches(), seeds=SEEDS, on_step=lambda step, infos: reported.append(infos), **options
    )
    before.assert_unchanged(model.model if isinstance(model, apd.TargetModel) else model)
    for index, seed in enumerate(SEEDS):
        infos: list[apd.StepInfo] = []

        def keep(step: int, info: apd.StepInfo, to: list[apd.StepInfo] = infos) -> None:
            to.append(info)

        alone = apd.decompose(model, batches(), seed=seed, on_step=keep, **options)
        assert together[index].settings == alone.settings
        for ours, expected in zip([infos[index] for infos in reported], infos, strict=True):
            assert (ours.step, ours.moves, ours.k, ours.alive) == (
                expected.step,
                expected.moves,
                expected.k,
                expected.alive,
            )
            assert_close([ours.loss, ours.terms], [expected.loss, expected.terms], rtol=1e-9, atol=1e-12)
        for ours, expected in zip(together[index].components.parameters(), alone.components.parameters(), strict=True):
            assert_close(ours, expected, rtol=0, atol=1e-9)
    assert any(info.moves > 0 for infos in reported for info in infos) == ("moves" in options)
    first, second = (next(decomposition.components.parameters()) for decomposition in together)
    assert (first - second).abs().max() > 0.1


def test_a_hooked_transformer():
    """transformer_lens rounds norms to float32 in a float64 model too, so the runs are compared in float32."""
    config = HookedTransformerConfig(
        n_layers=1, d_model=8, n_ctx=4, d_head=4, n_heads=2, d_mlp=12, d_vocab=11, act_fn="relu",
        normalization_type="LN", device="cpu", seed=0,
    )  # fmt: skip
    with warnings.catch_warnings(action="ignore"):  # that it is deprecated
        model = HookedTransformer(config).eval()
    before = Snapshot.of(model)
    options = {**FEW, "weights": "blocks.*", "losses": ALL_LOSSES, "attribution": apd.GradientAttribution("exact")}
    batches = [tokens[:, :3] for tokens in TOKENS]
    together = apd.decompose_seeds(model, batches, seeds=SEEDS, **options)
    before.assert_unchanged(model)
    for decomposition, seed in zip(together, SEEDS, strict=True):
        alone = apd.decompose(model, batches, seed=seed, **options)
        for ours, expected in zip(decomposition.components.parameters(), alone.components.parameters(), strict=True):
            assert_close(ours, expected, rtol=0, atol=1e-4)


def test_the_target_runs_once_for_all_seeds():
    """In a step on a new batch: once on the batch, and once replicated for all seeds and for both masks."""
    model, examples = residual_mlp(), []
    model.register_forward_pre_hook(lambda module, args: examples.append(len(args[0])))
    options = {**FEW, "losses": ALL_LOSSES, "optimization": apd.Optimization(steps=3)}
    apd.decompose_seeds(model, vectors(2), seeds=range(4), **options)
    replicated = 8 * 4 * 2
    assert examples == [8, replicated, replicated, 8, replicated, 8, replicated]  # the second is a check


def test_attributions_together_or_one_after_another_are_the_same(monkeypatch: pytest.MonkeyPatch):
    model, options = residual_mlp(), {**FEW, "seeds": range(3), "optimization": apd.Optimization(steps=2)}
    together = apd.decompose_seeds(model, vectors(), **options)
    monkeypatch.setattr("apd_lens._seeds._EFFECTS_TOGETHER", 2 * 8 * 4 * 5 * 8)  # two of them, then one
    parted = apd.decompose_seeds(model, vectors(), **options)
    for one, other in zip(together, parted, strict=True):
        for ours, expected in zip(one.components.parameters(), other.components.parameters(), strict=True):
            assert_close(ours, expected, rtol=0, atol=1e-12)


def test_an_interrupt_gives_what_there_is():
    model = residual_mlp()
    before = Snapshot.of(model)

    def stop(step: int, infos: list[apd.StepInfo]) -> None:
        if step == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt) as interrupt:
        apd.decompose_seeds(model, vectors(), seeds=SEEDS, on_step=stop, **FEW)
    before.assert_unchanged(model)
    unfinished = interrupt.value.decompositions
    assert [decomposition.settings.seed for decomposition in unfinished] == list(SEEDS)
    assert "after 3 steps" in interrupt.value.__notes__[0]


@pytest.mark.parametrize("forward", range(1, 6))
def test_an_interrupt_in_the_middle_of_a_forward(forward: int):
    """The target's, the check's and the sparse pass of the first step, and both of the second."""
    model = residual_mlp()
    with interrupted_in_forward(model.layers[0]["act"], forward):
        before = Snapshot.of(model)
        with pytest.raises(KeyboardInterrupt):
            apd.decompose_seeds(model, vectors(), seeds=SEEDS, **FEW)
        before.assert_unchanged(model)


class Fixed(nn.Module):
    """Made for eight examples only, or for one that sees the others."""

    def __init__(self, change):
        super().__init__()
        self.linear, self.change = nn.Linear(4, 4).double(), change

    def forward(self, x: Tensor) -> Tensor:
        return self.change(self.linear(x))


BAD_INPUT = {
    "no seeds": (lambda: {"seeds": []}, apd.InvalidSetting, "needs at least one seed, got none"),
    "the Lp form": (lambda: {"selection": apd.Lp()}, apd.InvalidSetting, "needs BatchTopK or TopK"),
    "a model for one size of batch": (
        lambda: {"model": Fixed(lambda y: y + torch.ones(8, 1))},
        apd.UnsupportedModel,
        r"at once on this Fixed: on the batch given 2 times over it fails .*Loop over seeds",
    ),
    "examples that influence each other": (
        lambda: {"model": Fixed(lambda y: y - y.sum(0))},
        apd.UnsupportedModel,
        r"on the batch given 2 times over its outputs differ by up to .* examples influence each other.*Loop",
    ),
    "hidden activations that all examples share": (
        lambda: {"model": TinyGPT(), "batches": list(TOKENS), "losses": apd.Losses(hidden=1.0, hidden_at=("wpe",)),
                 "weights": "fc.*"},
        apd.UnsupportedModel,
        r"the activations of 'wpe' have shape \(5, 6\) on 8 examples. Loop over seeds",
    ),
    "NaN in an input": (
        lambda: {"batches": [vectors()[0] * float("nan")]}, apd.NonFinite, "^step 0: input tensor 0 of the batch"
    ),
    "NaN in a loss": (
        lambda: {"losses": apd.Losses(distance=nan_from(5), path=0.0)},  # called once a seed and step
        apd.NonFinite,
        "^step 2, seed 0: the minimality is nan",
    ),
    "a setting of another type": (lambda: {"rank": "2"}, apd.InvalidSetting, "rank"),
}  # fmt: skip


@pytest.mark.parametrize(("changes", "error", "message"), BAD_INPUT.values(), ids=BAD_INPUT)
def test_bad_input(changes, error, message: str):
    options = {"model": residual_mlp(), "batches": vectors(), "seeds": SEEDS, **FEW, **changes()}
    before = Snapshot.of(options["model"])
    with pytest.raises(error, match=message):
        apd.decompose_seeds(**options)
    before.assert_unchanged(options["model"])
