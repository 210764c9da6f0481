"""On a GPU no training step waits for the device. The path for a GPU, forced on a CPU: what would wait is recorded, the
numbers are those of the other path, and NaN is reported all the same."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from support.hooked import hooked_transformer, tokens
from support.toy_models import ResidualMLP, tiny_llama
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import apd_lens as apd
from apd_lens.attribution import _effects, _gradient, _pullback, _sketch
from apd_lens.attribution._linearity import find_readout, readout_of_graph
from apd_lens.components import _pairs, _products
from apd_lens.data import _batch
from apd_lens.passes import _watch
from apd_lens.passes._watch import watched_pass
from apd_lens.training import _state

ROOT = Path(__file__).parents[2]
N_STEPS = 10


@contextmanager
def as_on_a_gpu() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        for module in (_batch, _state, _watch, _pullback, _effects, _sketch, _pairs):
            patch.setattr(module, "on_gpu", lambda device: True)
        yield


# What makes the host wait.

FETCHES = {
    "aten::_local_scalar_dense", "aten::is_nonzero", "aten::equal", "aten::nonzero", "aten::masked_select",
    "aten::_unique2", "aten::unique_dim", "aten::unique_consecutive", "aten::bincount", "aten::histc",
    "aten::repeat_interleave", "aten::_linalg_check_errors", "aten::linalg_qr", "aten::_linalg_svd",
    "aten::_linalg_eigh", "aten::linalg_lstsq",
}  # fmt: skip
TO_THE_HOST = {"tolist", "numpy", "cpu"}
FACTORIES = {"tensor", "as_tensor", "zeros", "ones", "empty", "full", "eye", "arange", "linspace", "rand", "randn",
             "randint", "randperm"}  # fmt: skip


class Waits:
    """Lines of ours that would wait for a GPU: that fetch numbers, count what is True, or make a tensor on the host (of
    a list of indices too), which must then be copied."""

    def __init__(self) -> None:
        self.places: set[str] = set()

    def __enter__(self) -> "Waits":
        self.modes = (_Operations(self), _Calls(self))
        for mode in self.modes:
            mode.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        for mode in reversed(self.modes):
            mode.__exit__(*error)

    def note(self, what: str) -> None:
        """The innermost line that is ours, if torch alone is in between: what the host's model does is its own."""
        frame = sys._getframe(2)
        while frame is not None:
            file = Path(frame.f_code.co_filename)
            if file.is_relative_to(ROOT / "apd_lens") or file.is_relative_to(ROOT / "adapters"):
                self.places.add(f"{file.stem}.{frame.f_code.co_name}: {what}")
                return
            if file != Path(__file__) and not {"torch", "einops", "jaxtyping"} & set(file.parts):
                return
            frame = frame.f_back


class _Operations(TorchDispatchMode):
    def __init__(self, waits: Waits):
        super().__init__()
        self.waits = waits

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name
        by_bool = name in ("aten::index", "aten::index_put", "aten::index_put_") and any(
            index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1]
        )
        if name in FETCHES or by_bool:
            self.waits.note(name)
        return func(*args, **(kwargs or {}))


class _Calls(TorchFunctionMode):
    def __init__(self, waits: Waits):
        super().__init__()
        self.waits = waits

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        indices = args[1] if name in ("__getitem__", "__setitem__") else ()
        listed = any(isinstance(index, list) for index in (indices if isinstance(indices, tuple) else (indices,)))
        made_on_host = name in FACTORIES and kwargs.get("device") is None
        fetched = name == "to" and "cpu" in args[1:] and not kwargs.get("non_blocking")
        if name in TO_THE_HOST or listed or made_on_host or fetched:
            self.waits.note(name)
        return func(*args, **kwargs)


def residual_mlp() -> ResidualMLP:
    return ResidualMLP(4, 6, 5, 1)


def batch(step: int) -> Tensor:
    return torch.randn(6, 4, generator=torch.Generator().manual_seed(step))


def token_batch(step: int) -> Tensor:
    return (tokens(3) + step) % 12


Case = tuple[Callable[[], nn.Module], Callable[[int], Tensor], dict[str, Any]]

CASES: dict[str, Case] = {
    "examples": (residual_mlp, batch, {}),
    "all losses": (
        residual_mlp,
        batch,
        {
            "losses": apd.Losses(
                path=1.0, hidden=1.0, hidden_at=("layers.0.act",), normalization="relative", simplicity_floor=0.1
            ),
            "optimization": apd.Optimization(N_STEPS, lr=1e-2, start="random", unit_norm=True),
            "selection": apd.TopK(2),
        },
    ),
    "Lp": (residual_mlp, batch, {"selection": apd.Lp(0.9, threshold=0.01), "losses": apd.Losses(path=0.0)}),
    "the same batch": (residual_mlp, lambda step: BATCH, {}),
    "integrated gradients": (residual_mlp, batch, {"attribution": apd.IntegratedGradients(steps=2, start="zero")}),
    "ablations": (residual_mlp, batch, {"attribution": apd.AblationAttribution()}),
    "a transformer, positions and KL": (
        lambda: hooked_transformer(act_fn="relu"),
        token_batch,
        {
            "weights": "blocks.*",
            "selection": apd.BatchTopK(1.5, granularity="position"),
            "attribution": apd.GradientAttribution(projections=4),
            "losses": apd.Losses(distance="kl", path=1.0),
        },
    ),
}
BATCH = batch(0)


def options(case: Case) -> dict[str, Any]:
    # How many are active is known without asking the device.
    selection = apd.BatchTopK(1.0)
    few = {"n_components": 5, "rank": 2, "selection": selection, "optimization": apd.Optimization(N_STEPS, lr=1e-2)}
    return {**few, **case[2]}


def waits_of_steps(case: Case, n_steps: int = 3) -> list[set[str]]:
    state = apd.init(case[0](), **options(case))
    found = []
    for step in range(n_steps):
        given = case[1](step)
        with Waits() as waits:
            state, _ = apd.step(state, given)
        found.append(waits.places)
    return found


READ_LATE = {"_finite.read: tolist"}  # of numbers that were sent to the host a step before
# The first forward of a form is looked at: whether it goes around a matrix, and whether y = x W + bias.
LOOK = {
    "_bypass.__torch_dispatch__: aten::_local_scalar_dense",
    "_bypass.__torch_dispatch__: aten::equal",
    "_bypass.__torch_dispatch__: aten::index",
    "_fingerprints.of: aten::equal",
    "_fingerprints.sums_of: cpu",
}


def check_none_waits(found: list[set[str]]) -> None:
    first, *later = found
    assert first <= LOOK
    assert later == [READ_LATE] * len(later)


@pytest.mark.parametrize("name", CASES)
def test_no_step_waits_on_a_gpu(name):
    with as_on_a_gpu():
        check_none_waits(waits_of_steps(CASES[name]))


def test_no_projection_that_skips_the_unembedding_waits_on_a_gpu(monkeypatch):
    for name, value in (("LIKELIEST", 2), ("DRAWN", 3), ("FEWEST_OUTPUTS", 0)):
        monkeypatch.setattr(_sketch, name, value)
    monkeypatch.setattr(_products, "_KEPT", 0)
    counts, original = [], _sketch.sketched
    monkeypatch.setattr(_gradient, "sketched", lambda *given: counts.append(1) or original(*given))
    settings = CASES["a transformer, positions and KL"][2] | {"weights": "model.layers.0.*"}
    with as_on_a_gpu():
        check_none_waits(waits_of_steps((tiny_llama, token_batch, settings)))
    assert len(counts) == 3


@pytest.mark.parametrize("way", ["grouped", "sparse"])
def test_no_pairwise_product_waits_on_a_gpu(way: str, monkeypatch):
    monkeypatch.setattr("apd_lens.components._products.cheapest_way", lambda *arguments: way)
    case = (residual_mlp, batch, {"weights": "layers.*", "rank": 1})
    at_once = waits_of_steps(case)
    assert all(("_pairs._groups: tolist" in places) == (way == "grouped") for places in at_once)
    with as_on_a_gpu():
        check_none_waits(waits_of_steps(case))


def test_what_waits_is_found():
    """The path for a CPU, where nothing needs to be waited for."""
    places = set.union(*waits_of_steps(CASES["a transformer, positions and KL"]))
    assert {
        "_finite.raise_first: aten::_local_scalar_dense",
        "_linearity._are_equal: aten::_local_scalar_dense",
    } <= places


def test_moves_wait_when_they_are_due_and_only_then():
    case = (residual_mlp, batch, {"moves": apd.moves.SplitMoves(every=3)})
    with as_on_a_gpu():
        *before, due, after = waits_of_steps(case, 4)
    check_none_waits(before)
    assert any(place.startswith(("_surgery.", "_split.")) for place in due)
    assert after <= READ_LATE


# Nothing else is different.


def factors(decomposition: apd.Decomposition) -> list[Tensor]:
    return list(decomposition.components.parameters())


@pytest.mark.parametrize("name", CASES)
def test_the_numbers_are_those_of_a_cpu(name):
    model, batches, _ = CASES[name]
    losses, results = ([], []), []
    for seen in losses:
        with as_on_a_gpu() if results else pytest.MonkeyPatch.context():
            torch.manual_seed(0)
            made = {**options(CASES[name])}
            made["optimization"] = apd.Optimization(8, lr=1e-2, unit_norm=made["optimization"].unit_norm)
            results.append(
                apd.decompose(
                    model(),
                    batches,
                    **made,
                    on_step=lambda step, info, seen=seen: seen.append(info.loss),
                    progress=False,
                )
            )
    assert all(torch.equal(one, same) for one, same in zip(*losses, strict=True))
    assert all(torch.equal(one, same) for one, same in zip(*map(factors, results), strict=True))


# NaN, a step late.


class Exponential(nn.Module):
    """exp(x W): infinite where x is large."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 3)
        nn.init.constant_(self.linear.weight, 0.1)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x).exp()


def run(wrong: str, at: int, **changes: Any) -> tuple[BaseException, list[int]]:
    """The error of a training with one wrong thing at a step, and the steps that `on_step` was called with."""
    seen: list[int] = []
    n_batches = -1

    def batches(step: int) -> Tensor:
        nonlocal n_batches
        n_batches = step
        wrong_batch = {"batch": torch.full((6, 4), float("nan")), "output": torch.full((6, 4), 1e4)}
        return wrong_batch[wrong] if step == at and wrong in wrong_batch else batch(step)

    def distance(target: Tensor, sparse: Tensor) -> Tensor:
        return (target - sparse).square().mean(-1) * (float("nan") if n_batches == at and wrong == "term" else 1.0)

    def on_step(step: int, info: apd.training.StepInfo) -> None:
        seen.append(step)

    few = {
        "n_components": 5,
        "rank": 2,
        "optimization": apd.Optimization(N_STEPS, lr=1e-2, start="random", unit_norm=True),
    }
    settings = {**few, "losses": apd.Losses(distance=distance, path=0.0), "on_step": on_step, **changes}
    torch.manual_seed(0)
    with pytest.raises((apd.NonFinite, KeyboardInterrupt)) as error:
        apd.decompose(Exponential(), batches, progress=False, **settings)
    return error.value, seen


MESSAGES = {
    "batch": "step {}: input tensor 0 of the batch (shape (6, 4)) holds 24 values that are NaN or infinite",
    "output": "step {}: the target output holds 18 values that are NaN or infinite; its input did not",
    "term": "step {}: the minimality is nan; nothing before it was. The components are as they were before this step",
}


@pytest.mark.parametrize("at", [0, 7, N_STEPS - 1])
@pytest.mark.parametrize("wrong", MESSAGES)
def test_nan_is_reported_as_on_a_cpu(wrong: str, at: int):
    at_once, seen_at_once = run(wrong, at)
    with as_on_a_gpu():
        late, seen = run(wrong, at)
    assert seen_at_once == list(range(at))
    assert seen == list(range(at + 1))  # the step after it had begun
    assert str(late) == str(at_once)
    assert str(late).startswith(MESSAGES[wrong].format(at))
    assert getattr(late, "__notes__", []) == getattr(at_once, "__notes__", [])
    assert hasattr(late, "decomposition") == (at > 0)
    if at > 0:
        assert f"after {at} steps" in late.__notes__[0]
        for ours, theirs in zip(factors(late.decomposition), factors(at_once.decomposition), strict=True):
            assert torch.equal(ours, theirs)


def test_an_interrupt_before_nan_was_looked_at():
    def interrupt(step: int, info: apd.training.StepInfo) -> None:
        if step == 7:
            raise KeyboardInterrupt

    at_once, _ = run("term", 7)
    with as_on_a_gpu():
        error, _ = run("term", 7, on_step=interrupt)
        undisturbed, _ = run("nothing", 7, on_step=interrupt)
    assert isinstance(error, KeyboardInterrupt)
    assert error.__notes__[0].startswith("Before that: step 7: the minimality is nan")
    assert "after 7 steps" in error.__notes__[1]
    for ours, theirs in zip(factors(error.decomposition), factors(at_once.decomposition), strict=True):
        assert torch.equal(ours, theirs)
    (note,) = undisturbed.__notes__
    assert "after 8 steps" in note


def test_moves_are_not_made_on_nan():
    every = {"moves": apd.moves.SplitMoves(every=4)}  # after steps 3 and 7, counted from 0
    optimization = apd.Optimization(2 * N_STEPS, lr=1e-2, start="random", unit_norm=True)
    at_once, _ = run("output", 7, optimization=optimization, **every)
    with as_on_a_gpu():
        late, seen = run("output", 7, optimization=optimization, **every)
    assert seen == list(range(7))
    assert str(late) == str(at_once)
    for ours, theirs in zip(factors(late.decomposition), factors(at_once.decomposition), strict=True):
        assert torch.equal(ours, theirs)


def test_training_can_go_on_after_nan():
    """Steps 2 (NaN) and 3 (begun before that was known) change nothing; step 4 does."""
    with as_on_a_gpu():
        state = apd.init(residual_mlp(), n_components=5, rank=2)
        state, _ = apd.step(state, batch(0))
        state, _ = apd.step(state, batch(1))
        before = factors(state.decomposition())
        state, _ = apd.step(state, torch.full((6, 4), float("nan")))
        with pytest.raises(apd.NonFinite, match=r"^step 2: input"):
            apd.step(state, batch(3))
        assert all(torch.equal(one, same) for one, same in zip(factors(state.decomposition()), before, strict=True))
        assert state.updates() == 2
        state, _ = apd.step(state, batch(4))
        assert state.updates() == 3
        assert not torch.equal(factors(state.decomposition())[0], before[0])


def test_a_decomposition_taken_right_after_nan_is_refused_once():
    with as_on_a_gpu():
        state = apd.init(residual_mlp(), n_components=5, rank=2)
        before = factors(state.decomposition())
        state, _ = apd.step(state, torch.full((6, 4), float("inf")))
        with pytest.raises(apd.NonFinite, match=r"^step 0: input"):
            state.decomposition()
        assert all(torch.equal(one, same) for one, same in zip(factors(state.decomposition()), before, strict=True))


# The readout, without a look at numbers. tests/test_attribution.py compares it where both ways find the same.


class AllOpen(nn.Module):
    """relu(x W + b) V, with b so large that the relu is open on every ordinary batch: nothing shared but V's output,
    which only the graph can tell."""

    def __init__(self):
        super().__init__()
        self.read, self.write = nn.Linear(4, 5), nn.Linear(5, 3)
        nn.init.constant_(self.read.bias, 100.0)

    def forward(self, x: Tensor) -> Tensor:
        return self.write(torch.relu(self.read(x)))


def shared_of(
    model: nn.Module, given: Tensor, find: Callable, weights: str = "*"
) -> tuple[list[int], list[int | None]]:
    """Calls whose gradient is the same for all examples, and where those of others come through."""
    target = apd.wrap(model)
    watched = watched_pass(target, target.match(weights), given, lambda output: output)
    found = find(watched, watched.output)
    shared = [call for call, maps in found.affine.items() if not maps]
    return shared, [stage.start for stage in found.stages]


def test_what_is_shared_on_one_batch_only_is_not_shared_in_the_graph():
    assert shared_of(AllOpen(), batch(0), find_readout) == ([0, 1], [])
    assert shared_of(AllOpen(), batch(0), readout_of_graph) == ([1], [1])


class Bilinear(nn.Module):
    """Products of two things that both depend on the input, and a matrix that is another for each example."""

    def __init__(self, way: str):
        super().__init__()
        self.read, self.write, self.way = nn.Linear(4, 5), nn.Linear(5, 5), way

    def forward(self, x: Tensor) -> Tensor:
        y = self.write(self.read(x))
        ways = {
            "square": lambda: y * y,
            "mixed": lambda: (y.mT @ y) @ y.mT,
            "scaled": lambda: y * x[:, :1],
            "of each": lambda: (y[:, None] @ x[:, None, :1].expand(-1, 5, 5))[:, 0],
            "softmax": lambda: y.softmax(-1),
        }
        return ways[self.way]() if self.way != "mixed" else ways["mixed"]().mT


@pytest.mark.parametrize("way", ["square", "mixed", "scaled", "of each", "softmax"])
def test_what_is_not_linear_is_not_shared(way: str):
    assert shared_of(Bilinear(way), batch(0), readout_of_graph)[0] == []


@pytest.mark.parametrize("weights", ["blocks.*", "*", "blocks.*.mlp.W_out"])
def test_the_readout_of_a_transformer(weights: str):
    model = hooked_transformer(act_fn="relu", n_layers=2)
    assert shared_of(model, tokens(3), readout_of_graph, weights) == shared_of(model, tokens(3), find_readout, weights)
