"""Training: determinism, what it reports, that it finds what is there, and that nothing is left behind or lost."""

import copy

import pytest
import torch
from support import outside
from support.known import nan_from
from support.toy_models import ResidualMLP, Snapshot, TinyGPT, interrupted_in_forward
from torch import nn
from torch.testing import assert_close

import apd_lens as apd
from apd_lens.training import _loop

FEW = {"n_components": 5, "rank": 2, "optimization": apd.Optimization(steps=8, lr=1e-2), "progress": False}


def batches(n: int = 3) -> list[torch.Tensor]:
    return list(torch.randn(n, 6, 4, generator=torch.Generator().manual_seed(0)))


# Bad input. Each leaves the model alone.


class Wrong(nn.Module):
    """Returns what it is told to."""

    def __init__(self, result):
        super().__init__()
        self.linear, self.result, self.pair = nn.Linear(4, 4), result, Pair()

    def forward(self, x):
        y, _ = self.pair(self.linear(x))
        return self.result(y)


BAD_INPUT = {
    "NaN in an input": (
        lambda: {"batches": [batches()[0], batches()[1] / 0.0 * 0.0]},
        apd.NonFinite,
        r"^step 1: input tensor 0 of the batch \(shape \(6, 4\)\) holds 24 values that are NaN or infinite",
    ),
    "NaN in a loss": (
        lambda: {"losses": apd.Losses(distance=nan_from(3), path=0.0)},
        apd.NonFinite,
        "^step 3: the minimality is nan; nothing before it was",
    ),
    "NaN in the output": (
        lambda: {"model": Wrong(lambda y: y.log()), "batches": [-torch.ones(2, 4)]},
        apd.NonFinite,
        "^before the first step: the target output holds . values that are NaN or infinite",
    ),
    "no batches": (lambda: {"batches": []}, apd.errors.InvalidBatches, "^The stream of batches is empty"),
    "an iterator": (
        lambda: {"batches": iter(batches())},
        apd.errors.InvalidBatches,
        "ended after 3 and cannot be gone through again: a generator",
    ),
    "a bare tensor": (
        lambda: {"batches": batches()[0]},
        apd.errors.InvalidBatches,
        r"got one tensor of shape \(6, 4\). .* give \[batch\]",
    ),
    "an output that is no tensor": (
        lambda: {"model": Wrong(lambda y: (y, y))},
        apd.errors.InvalidOutput,
        "floating-point tensor, got tuple. Give output=",
    ),
    "an output of integers": (
        lambda: {"model": Wrong(lambda y: y.argmax(-1, keepdim=True))},
        apd.errors.InvalidOutput,
        "got a tensor of torch.int64",
    ),
    "an output without outputs": (
        lambda: {"model": Wrong(lambda y: y.sum(-1))},
        apd.ShapeMismatch,
        r"\(batch, \*pos, n_outputs\) with 6 examples, got \(6,\)",
    ),
    "an output of another batch": (
        lambda: {"model": Wrong(lambda y: y[:2])},
        apd.ShapeMismatch,
        r"with 6 examples, got \(2, 4\)",
    ),
    "a batch that is not first": (
        lambda: {"model": Wrong(lambda y: y.T), "batches": lambda step: (torch.randn(6, 4),)},
        apd.ShapeMismatch,
        r"with 6 examples, got \(4, 6\)",
    ),
    "k of zero": (
        lambda: {"selection": apd.TopK(0)},
        apd.errors.InvalidSetting,
        r"TopK\(k=0.*needs 0 < k <= n_components.* the 5 components",
    ),
    "k above C": (
        lambda: {"selection": apd.BatchTopK(5.5)},
        apd.errors.InvalidSetting,
        r"BatchTopK\(k=5.5.*needs 0 < k",
    ),
    "k·n below one": (
        lambda: {"selection": apd.BatchTopK(0.1)},
        apd.errors.InvalidSetting,
        r"selects int\(k·n\) = 0 .* Choose k between 0.1667 and 5",
    ),
    "an unknown pattern": (lambda: {"weights": ["layers.9.*"]}, apd.UnknownWeight, r"No weight matches 'layers.9.\*'"),
    "no pattern": (lambda: {"weights": []}, apd.UnknownWeight, "No weights were asked for"),
    "a submodule that returns no tensor": (
        lambda: {
            "model": Wrong(lambda y: y),
            "losses": apd.Losses(hidden=1.0, hidden_at=("pair",)),
        },
        apd.errors.InvalidSetting,
        "The submodule 'pair' returns a tuple, not a tensor",
    ),
    "a submodule that is not called": (
        lambda: {"losses": apd.Losses(hidden=1.0, hidden_at=("layers.0",))},
        apd.errors.SiteNotCalled,
        "did not call 'layers.0'",
    ),
    "a submodule that is not there": (
        lambda: {"losses": apd.Losses(hidden=1.0, hidden_at=("layers.0.relu",))},
        apd.errors.InvalidSetting,
        "no submodule 'layers.0.relu'",
    ),
}


def residual_mlp() -> ResidualMLP:
    return ResidualMLP(4, 6, 5, 1)


def factors(decomposition: apd.Decomposition) -> list[torch.Tensor]:
    return list(decomposition.components.parameters())


def test_the_same_seed_gives_the_same_factors_bit_for_bit():
    model = residual_mlp()
    options = {**FEW, "losses": apd.Losses(path=1.0), "moves": apd.moves.SplitMoves(every=2), "selection": apd.TopK(1)}
    torch.manual_seed(1)
    first = apd.decompose(model, batches(), seed=3, **options)
    torch.manual_seed(2)
    second = apd.decompose(model, batches(), seed=3, **options)
    other = apd.decompose(model, batches(), seed=4, **options)
    for one, same, different in zip(*map(factors, (first, second, other)), strict=True):
        assert torch.equal(one, same)
        assert not torch.equal(one, different)


def test_the_global_random_state_is_left_alone():
    model = residual_mlp()
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    apd.decompose(model, batches(), **FEW, losses=apd.Losses(path=1.0))
    assert torch.equal(torch.rand(3), expected)


def test_decompose_is_init_and_steps():
    model = residual_mlp()
    seen: list[apd.training.StepInfo] = []
    decomposition = apd.decompose(model, batches(), on_step=lambda step, info: seen.append(info), **FEW)
    state = apd.init(model, n_components=5, rank=2, optimization=FEW["optimization"], batches=batches())
    infos = []
    for step in range(8):
        state, info = apd.step(state, batches()[step % 3])
        infos.append(info)
    for ours, theirs in zip(factors(decomposition), factors(state.decomposition()), strict=True):
        assert torch.equal(ours, theirs)
    assert [info.step for info in seen] == list(range(8))
    assert [info.loss for info in seen] == [info.loss for info in infos]
    assert state.step == 8


def test_the_same_batch_again_is_not_computed_again_but_a_changed_one_is():
    model, calls = residual_mlp(), []
    model.register_forward_pre_hook(lambda module, args: calls.append(torch.is_grad_enabled()))
    x = torch.randn(6, 4)
    state, fresh = (apd.init(model, n_components=5, rank=2, losses=apd.Losses(path=0.0)) for _ in range(2))

    def n_forwards() -> int:
        calls.clear()
        nonlocal state
        state, _ = apd.step(state, x)
        return len(calls)

    assert n_forwards() == 2  # target, sparse
    assert n_forwards() == 1  # sparse
    fresh, _ = apd.step(fresh, x.clone())
    fresh, _ = apd.step(fresh, x.clone())
    for ours, theirs in zip(factors(state.decomposition()), factors(fresh.decomposition()), strict=True):
        assert torch.equal(ours, theirs)
    x.mul_(2)
    assert n_forwards() == 2


def test_info_says_what_happened():
    selection = apd.BatchTopK(1.5)
    losses = apd.Losses(faithfulness=2.0, minimality=3.0, simplicity=apd.HoldThenDecay(0.5), path=0.25)
    optimization = apd.Optimization(steps=20_000, lr=3e-2)
    state = apd.init(
        residual_mlp(), n_components=5, rank=2, selection=selection, losses=losses, optimization=optimization
    )
    state, info = apd.step(state, batches()[0])
    assert list(info.terms) == ["faithfulness", "minimality", "simplicity", "path"]
    expected = sum(c * info.terms[name] for c, name in zip((2.0, 3.0, 0.5, 0.25), info.terms, strict=True))
    assert_close(info.loss, expected)
    assert info.k == 1.5
    assert 2 <= info.alive <= 5
    assert info.learning_rate == pytest.approx(3e-2 / 1000)


def test_a_component_counts_as_alive_for_a_hundred_steps():
    state = apd.init(
        residual_mlp(), n_components=5, rank=2, selection=apd.TopK(1), optimization=apd.Optimization(lr=0.0), moves=None
    )
    first, second = (x[:1] for x in batches(2))
    top = [int(state.decomposition().select(x).nonzero()[0, 1]) for x in (first, second)]
    x = next(x for x in batches(20) if int(state.decomposition().select(x[:1]).nonzero()[0, 1]) != top[0])[:1]
    state, info = apd.step(state, first)
    assert info.alive == 1
    alive = []
    for _ in range(101):
        state, info = apd.step(state, x)
        alive.append(info.alive)
    assert alive == [2] * 99 + [1] * 2


def test_relative_losses_do_not_depend_on_the_scale_of_the_model():
    """y = x V W, with V ten times and W a tenth, or both ten times as large: the same shares, for many steps."""
    torch.manual_seed(0)
    model, found = nn.Sequential(nn.Linear(4, 6, bias=False), nn.Linear(6, 3, bias=False)), []
    for of_first, of_second in ((1.0, 1.0), (10.0, 0.1), (10.0, 10.0)):
        other = copy.deepcopy(model)
        other[0].weight.data *= of_first
        other[1].weight.data *= of_second
        options = {"n_components": 4, "rank": 2, "selection": apd.TopK(1), "moves": None}
        state = apd.init(other, **options, optimization=apd.Optimization(steps=20))
        for batch in 10 * batches():
            state, info = apd.step(state, batch)
        found.append([*(term.item() for term in info.terms.values()), *state.decomposition().residuals().values()])
    assert found[1][:-1] == pytest.approx(found[0][:-1], rel=1e-4)  # the last is of all matrices together
    assert found[2] == pytest.approx(found[0], rel=1e-4)


def test_the_residual_mlp_hidden_loss_in_relative_form_is_one_minus_r_squared():
    model = residual_mlp()
    losses = apd.Losses(hidden=1.0, hidden_at=("layers.0.act",), normalization="relative")
    state = apd.init(model, n_components=2, rank=2, losses=losses, selection=apd.TopK(1))
    with torch.no_grad():
        for factor in state.components.parameters():
            factor.zero_()
    x = batches()[0]
    _, info = apd.step(state, x)
    hidden = model.layers[0]["act"](model.layers[0]["mlp_in"](model.W_E(x))).detach()
    alone = torch.relu(model.layers[0]["mlp_in"].bias.detach())
    assert_close(info.terms["hidden"], (hidden - alone).square().sum(1).mean() / (5 * hidden.var()))


def test_known_parts_are_found_again_at_their_size():
    """y = x @ W, inputs one feature at a time: the rows of W are the parts. Untrained components hold none of them;
    components trained with a constant simplicity coefficient are too small."""
    found = outside.run(
        """
        import torch
        import torch.nn.functional as F
        import apd_lens as apd

        torch.manual_seed(0)
        model = torch.nn.Linear(4, 3, bias=False)
        W = model.weight.detach().T
        wanted = torch.einsum("fi,io->fio", torch.eye(4), W)  # only row f

        def batch(step):
            generator = torch.Generator().manual_seed(step)
            feature = torch.randint(4, (64,), generator=generator)
            return F.one_hot(feature, 4) * torch.rand(64, 1, generator=generator)

        def decompose(simplicity, steps):
            return apd.decompose(
                model, batch, n_components=6, rank=2, selection=apd.TopK(1),
                losses=apd.Losses(simplicity=simplicity), progress=False, optimization=apd.Optimization(steps),
            )

        for decomposition in (decompose(apd.HoldThenDecay(0.08), 2000), decompose(0.08, 2000), decompose(0.08, 1)):
            parts = decomposition.components.component_weights("weight")
            cosine, best = F.cosine_similarity(parts[None].flatten(2), wanted[:, None].flatten(2), dim=2).max(1)
            sizes = parts[best].flatten(1).norm(dim=1) / wanted.flatten(1).norm(dim=1)
            print(int((cosine > 0.999).sum()), sizes.min().item(), sizes.max().item(), decomposition.residuals()["all"])
        """
    )
    ours, constant, untrained = ([float(value) for value in line.split()] for line in found.splitlines())
    assert ours[0] == 4
    assert ours[1] == pytest.approx(1, abs=0.01)
    assert ours[2] == pytest.approx(1, abs=0.01)
    assert ours[3] < 1e-3
    assert constant[2] < 0.985
    assert untrained[0] == 0


def test_positions_as_data_points():
    tokens = torch.randint(11, (4, 5), generator=torch.Generator().manual_seed(0))
    model = TinyGPT()
    before = Snapshot.of(model)
    decomposition = apd.decompose(
        model,
        [tokens],
        ["fc.*", "proj.*"],
        selection=apd.BatchTopK(1.5, granularity="position"),
        losses=apd.Losses(path=1.0, distance="kl"),
        moves=apd.moves.SplitMoves(every=3),
        **FEW,
    )
    before.assert_unchanged(model)
    mask = decomposition.select(tokens)
    assert mask.shape == (4, 5, 5)
    assert mask.sum() == 30


def test_batches_of_every_form():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(4, 3)

        def forward(self, x, scale):
            return self.linear(x) * scale

    x, scale = torch.randn(6, 4), torch.rand(6, 1)
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, scale), batch_size=6)
    forms = {
        "tuples": [(x, scale)],
        "lists, as a DataLoader gives them": loader,
        "dicts": [{"x": x, "scale": scale}],
        "function": lambda step: (x, scale),
    }
    model = Two()
    results = {name: factors(apd.decompose(model, form, **FEW)) for name, form in forms.items()}
    for result in results.values():
        for one, same in zip(result, results["tuples"], strict=True):
            assert torch.equal(one, same)


def test_the_bar_shows_losses_components_and_time(capsys):
    options = {**FEW, "progress": True, "optimization": apd.Optimization(steps=40)}
    slow = residual_mlp()
    slow.register_forward_pre_hook(lambda module, args: __import__("time").sleep(0.02))
    apd.decompose(slow, batches(), **options)
    bar = capsys.readouterr().err
    for shown in ("faithfulness", "minimality", "simplicity", "k ", "alive", "100%", "40/40", "<"):
        assert shown in bar
    apd.decompose(slow, batches(), **FEW)
    assert capsys.readouterr().err == ""


# Interrupted.


def test_an_interrupt_leaves_the_model_alone_and_gives_what_there_is():
    model = residual_mlp()
    before = Snapshot.of(model)
    output = model(batches()[0])

    def stop(step: int, info: apd.training.StepInfo) -> None:
        if step == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt) as interrupt:
        apd.decompose(model, batches(), on_step=stop, **FEW)
    before.assert_unchanged(model)
    assert torch.equal(model(batches()[0]), output)
    unfinished = interrupt.value.decomposition
    assert unfinished.attributions(batches()[0]).shape == (6, 5)
    assert "after 5 steps" in interrupt.value.__notes__[0]


@pytest.mark.parametrize("forward", range(1, 5))
def test_an_interrupt_in_the_middle_of_a_forward(forward: int):
    """The target's, the sparse and the path pass of the first step, and the first of the second step."""
    model = residual_mlp()
    with interrupted_in_forward(model.layers[0]["act"], forward):
        before = Snapshot.of(model)
        with pytest.raises(KeyboardInterrupt):
            apd.decompose(model, batches(), **FEW, losses=apd.Losses(path=1.0))
        before.assert_unchanged(model)


def test_training_does_not_touch_the_users_gradients():
    model = residual_mlp()
    model(batches()[0]).sum().backward()
    grads = [parameter.grad.clone() for parameter in model.parameters()]
    apd.decompose(model, batches(), **FEW)
    for parameter, grad in zip(model.parameters(), grads, strict=True):
        assert torch.equal(parameter.grad, grad)


class Pair(nn.Module):
    def forward(self, y):
        return y, y


@pytest.mark.parametrize(("changes", "error", "message"), BAD_INPUT.values(), ids=BAD_INPUT)
def test_bad_input(changes, error, message: str):
    options = {"model": residual_mlp(), "batches": batches(), **FEW, **changes()}
    before = Snapshot.of(options["model"])
    with pytest.raises(error, match=message):
        apd.decompose(**options)
    before.assert_unchanged(options["model"])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_named(value: float):
    model = residual_mlp()
    model.layers[0]["mlp_out"].weight.data[0, 0] = value
    with pytest.raises(apd.NonFinite, match=r"layers\.0\.mlp_out\.weight holds 1 values that are NaN or infinite"):
        apd.init(model, n_components=3)
    apd.init(model, weights="layers.0.mlp_in.weight", n_components=3)


def test_a_training_that_diverges_is_warned_of():
    model, steps = ResidualMLP(4, 6, 5, 1), apd.Optimization(steps=20, lr=30.0, scaled=False)
    with pytest.warns(apd.errors.ApdWarning, match="diverged.* times the norm of the weights"):
        apd.decompose(model, batches(), **{**FEW, "optimization": steps})


def test_a_function_is_asked_for_batches_of_steps_that_there_are():
    model, batch = residual_mlp(), batches(8)
    decomposition = apd.decompose(model, lambda step: batch[step], **FEW)
    of_a_list = apd.decompose(model, batch, **FEW)
    assert decomposition.settings.optimization.start == "data"
    for one, other in zip(factors(decomposition), factors(of_a_list), strict=True):
        assert torch.equal(one, other)


def test_data_that_can_be_gone_through_once_only_are_left_to_the_training():
    x = batches(8)
    for some, others in ((iter(x), None), (iter(x), x), (x, iter(x))):
        targeted = {} if others is None else {"others": others, "losses": apd.Losses(faithfulness=0.0), "moves": None}
        decomposition = apd.decompose(residual_mlp(), some, **FEW, **targeted)
        assert decomposition.settings.optimization.start == "random"


def test_an_output_that_is_not_given_back_is_warned_of_unless_it_was_a_trial(monkeypatch):
    few = FEW | {"optimization": apd.Optimization(steps=8, lr=1e-6, start="random")}
    apd.decompose(ResidualMLP(4, 6, 5, 1), batches(), **few)
    monkeypatch.setattr(_loop, "TRIAL", 8)
    with pytest.warns(apd.errors.ApdWarning, match="do not give the output back: on the last batch .* is missing"):
        apd.decompose(ResidualMLP(4, 6, 5, 1), batches(), **few)


def test_a_step_that_fails_leaves_the_components_alone():
    state = apd.init(residual_mlp(), n_components=5, rank=2)
    before = [factor.detach().clone() for factor in state.components.parameters()]
    with pytest.raises(apd.NonFinite):
        apd.step(state, torch.full((2, 4), float("inf")))
    for factor, kept in zip(state.components.parameters(), before, strict=True):
        assert torch.equal(factor, kept)
