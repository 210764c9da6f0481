"""Checkpoints: what was resumed ends bit for bit as it would have; what is saved is whole; what differs is refused."""

import errno
import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support import outside
from support.toy_models import ResidualMLP, Snapshot, TinyGPT, tiny_llama
from torch import nn

import apd_lens as apd
from apd_lens._settings import learning_rate
from apd_lens.decomposition import _decomposition
from apd_lens.training import _checkpoint, _seen, _state

N = 3
NEEDED = apd.BatchTopK(apd.masks.Needed(hold=0.0), least=0.1)


class Ended(Exception):
    """A training is to stop here."""


def mlp() -> nn.Module:
    torch.manual_seed(1)
    return ResidualMLP(4, 6, 5, 1)


def random(shape: tuple[int, ...], seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu")


def tokens(n: int, length: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(11, (n, length), generator=torch.Generator().manual_seed(seed))


def few(**options: Any) -> dict[str, Any]:
    """Arguments of a short training with moves before and after the middle."""
    usual = {
        "batches": [random((8, 4), seed) for seed in range(4)],
        "n_components": 6,
        "rank": 2,
        "moves": apd.moves.SplitMoves(every=2, until=1.0),
        "optimization": apd.Optimization(steps=2 * N, lr=1e-2),
        "progress": False,
    }
    return usual | options


def trained(model: Any, options: dict[str, Any], end_at: int | None = None) -> tuple[list[torch.Tensor], Any, list]:
    """Factors and settings at the end, and the loss of each step; ended by an error after a number of steps."""
    losses = []

    def on_step(step: int, info: apd.training.StepInfo) -> None:
        losses.append(info.loss)
        if step + 1 == end_at:
            raise Ended

    options = dict(options)
    decomposition = apd.decompose(model, options.pop("batches"), **options, on_step=on_step)
    return [*decomposition.components.parameters()], decomposition.settings, losses


def assert_resumed_is_whole(folder: Path, make: Callable[[], Any], options: Callable[[], dict[str, Any]]) -> None:
    """2n steps are n steps, an error, and n steps more in what a new process would have made anew."""
    expected, settings, losses = trained(make(), options())
    checkpoint = apd.Checkpoint(folder, every=100)
    with pytest.raises(Ended) as ended:
        trained(make(), options() | {"checkpoint": checkpoint}, end_at=N)
    assert f"goes on behind step {N - 1}" in str(ended.value.__notes__)
    assert os.listdir(folder) == [f"step-{N:06}.safetensors"]
    came, came_settings, came_losses = trained(make(), options() | {"resume": folder})
    assert [*map(torch.equal, came, expected)] == [True] * len(expected)
    assert came_settings == settings
    assert came_losses == losses[N:]


TARGETED = {"losses": apd.Losses(faithfulness=0.0), "others": [random((5, 4), 7), random((5, 4), 8)], "moves": None}
KINDS: dict[str, dict[str, Any]] = {
    "k of the batch": {"selection": apd.BatchTopK(lambda batch: 1.0 + (batch[0, 0] > 0).item())},
    "Lp and no threshold": {"selection": apd.Lp(), "moves": None, "losses": apd.Losses(path=0.0)},
    "gates without a teacher": {
        "masks": apd.Gates(hidden=8, teacher=None),
        "losses": apd.Losses(attack=0.5, completeness=1.0, parts="matrices"),
    },
    "noise for parts": {"losses": apd.Losses(parts="noise")},
    "fixed projections": {"attribution": apd.GradientAttribution(projections=2, fixed=True)},
    "others with active ones": TARGETED | {"elsewhere": apd.Elsewhere(selection=NEEDED, simplicity=0.1)},
    "start of data": {"optimization": apd.Optimization(steps=2 * N, start="data")},
    "start of data, others": TARGETED | {"optimization": apd.Optimization(steps=2 * N, start="data")},
    "start of matrices": {"optimization": apd.Optimization(steps=2 * N, start="matrices"), "moves": None},
    "unit norm": {"optimization": apd.Optimization(steps=2 * N, unit_norm=True)},
    "not scaled": {"optimization": apd.Optimization(steps=2 * N, scaled=False, lr=1e-2, schedule="linear")},
    "schedules": {"losses": apd.Losses(simplicity=apd.Ramp(1.0, 0.5), path=apd.HoldThenDecay(0.5))},
    "a function": {"batches": lambda step: random((8, 4), step)},
    "a long list": {"batches": [random((8, 4), seed) for seed in range(20)]},
}


@pytest.mark.parametrize("options", KINDS.values(), ids=KINDS)
def test_what_was_resumed_ends_bit_for_bit_as_it_would_have(tmp_path, options: dict[str, Any]):
    assert_resumed_is_whole(tmp_path, mlp, lambda: few(**options))


def gated(attribution: Any, losses: dict[str, float], **options: Any) -> dict[str, Any]:
    return {"masks": apd.Gates(hidden=8, teacher=apd.Attributed(attribution, NEEDED), **options), "losses": losses}


# An attribution -> arguments; losses as a dict, to which others add theirs.
MASKINGS: dict[str, Callable[[Any], dict[str, Any]]] = {
    "Lp": lambda attribution: {
        "attribution": attribution,
        "selection": apd.Lp(threshold=1.0),
        "losses": {"path": 0.0},
    },
    "TopK": lambda attribution: {"attribution": attribution, "selection": apd.TopK(1)},
    "gates, attacked": lambda attribution: gated(attribution, {"attack": 0.5, "completeness": 1.0}, blocks=1),
    "Needed": lambda attribution: {"masks": apd.Attributed(attribution, NEEDED)},
    "gates": lambda attribution: gated(attribution, {}),
    "BatchTopK": lambda attribution: {"attribution": attribution, "selection": apd.BatchTopK(1.5)},
}
ATTRIBUTIONS = {
    "gradient": apd.GradientAttribution(),
    "projections": apd.GradientAttribution(projections=2),
    "integrated": apd.IntegratedGradients(steps=2),
    "ablation": apd.AblationAttribution(),
    "activation": apd.ActivationAttribution(),
}
MOVES = {
    "split": apd.moves.SplitMoves(every=2, until=1.0),
    "cluster": apd.moves.ClusterMoves(every=1, until=1.0),
    "division": apd.moves.DivisionMoves(every=1, until=1.0),
    "none": None,
}
DTYPES = [torch.float32, torch.float64, torch.bfloat16]


def hooked() -> Any:
    return pytest.importorskip("support.hooked", exc_type=ImportError).hooked_transformer()


def bridge() -> Any:
    bridges = pytest.importorskip("support.bridges", exc_type=ImportError)
    torch.manual_seed(0)
    return bridges.bridge("gpt2")


def llama() -> nn.Module:
    torch.manual_seed(0)
    return tiny_llama(num_hidden_layers=3)


def gpt() -> nn.Module:
    torch.manual_seed(0)
    return TinyGPT()


def nnsight() -> Any:
    return pytest.importorskip("nnsight", exc_type=ImportError).NNsight(mlp())


# A model, and a batch of so many examples by a seed.
NUMBERS: Callable[[int, int], torch.Tensor] = lambda n, seed: random((n, 4), seed)  # noqa: E731
TOKENS: Callable[[int, int], torch.Tensor] = lambda n, seed: tokens(n, 5, seed)  # noqa: E731
HOSTS: dict[str, tuple[Callable[[], Any], Any, dict[str, Any]]] = {
    "module": (mlp, NUMBERS, {}),
    "Hugging Face": (llama, TOKENS, {"weights": "model.layers.2.mlp*"}),
    "HookedTransformer": (hooked, TOKENS, {"weights": "*mlp*"}),
    "TransformerBridge": (bridge, TOKENS, {"weights": "*mlp*"}),
    "nnsight": (nnsight, NUMBERS, {}),
    "lookups": (gpt, TOKENS, {"weights": ["wte*", "fc.*"]}),
}


def combined(host: str, masking: dict[str, Any], dtype: torch.dtype, others: bool, **options: Any) -> Any:
    """What makes the model, and arguments of a training; skips what is refused: `Lp` alone is, with some."""
    make, batch, more = HOSTS[host]
    floating = lambda batch: batch.to(dtype) if batch.is_floating_point() else batch  # noqa: E731
    losses = masking.get("losses", {}) | ({"faithfulness": 0.0} if others else {})
    arguments = few(batches=[floating(batch(8, seed)) for seed in range(4)], **more, **options)
    arguments |= masking | {"losses": apd.Losses(**losses)}
    if others:
        arguments["others"] = [floating(batch(5, seed)) for seed in (7, 8)]
    asked = {key: value for key, value in arguments.items() if key not in ("batches", "others", "progress")}
    try:
        apd.init(make().to(dtype), **asked, elsewhere=apd.Elsewhere() if others else None)
    except apd.errors.InvalidSetting as refused:
        assert isinstance(masking.get("selection"), apd.Lp)
        pytest.skip(str(refused))
    return lambda: make().to(dtype), lambda: arguments


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("others", [False, True], ids=["alone", "others"])
@pytest.mark.parametrize("moves", MOVES)
@pytest.mark.parametrize("attribution", ATTRIBUTIONS)
@pytest.mark.parametrize("masking", MASKINGS)
def test_every_masking_with_every_attribution_moves_stream_and_dtype(
    tmp_path, masking: str, attribution: str, moves: str, others: bool, dtype: torch.dtype
):
    masks = MASKINGS[masking](ATTRIBUTIONS[attribution])
    assert_resumed_is_whole(tmp_path, *combined("module", masks, dtype, others, moves=MOVES[moves]))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("others", [False, True], ids=["alone", "others"])
@pytest.mark.parametrize("masking", MASKINGS)
@pytest.mark.parametrize("host", HOSTS)
def test_every_host_with_every_masking_stream_and_dtype(
    tmp_path, host: str, masking: str, others: bool, dtype: torch.dtype
):
    masks = MASKINGS[masking](apd.GradientAttribution(projections=2))
    assert_resumed_is_whole(tmp_path, *combined(host, masks, dtype, others))


def test_whatever_the_default_dtype_and_device(tmp_path):
    model = mlp()
    expected, *_ = trained(model, few())
    try:
        torch.set_default_dtype(torch.float64)
        torch.set_default_device("meta")  # whatever is made without a device fails
        trained(model, few(checkpoint=apd.Checkpoint(tmp_path, every=N, keep=9)))
        came, *_ = trained(model, few(resume=tmp_path / f"step-{N:06}.safetensors"))
    finally:
        torch.set_default_device(None)
        torch.set_default_dtype(torch.float32)
    assert [*map(torch.equal, came, expected)] == [True] * len(expected)


def test_where_memory_is_short(tmp_path, monkeypatch):
    """What is kept of batches then depends on where the training began."""
    monkeypatch.setattr(_seen, "KEPT", 1500)
    assert_resumed_is_whole(tmp_path, mlp, few)


def test_where_checks_are_late(tmp_path, monkeypatch):
    """As on a GPU."""
    monkeypatch.setattr(_state, "on_gpu", lambda device: True)
    assert_resumed_is_whole(tmp_path, mlp, few)


class Loader:
    """Batches in an order of its own, which knows where it is."""

    def __init__(self, n: int = 4):
        self.n, self.at, self.generator = n, 0, torch.Generator().manual_seed(3)
        self.drawn = 0

    def __iter__(self):
        while self.at < self.n:
            self.at, self.drawn = self.at + 1, self.drawn + 1
            yield torch.randn((8, 4), generator=self.generator)
        self.at = 0

    def state_dict(self) -> dict[str, Any]:
        return {"at": self.at, "generator": self.generator.get_state(), 1: (None, [b"\x00", "x", 0.5, True])}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        assert state[1] == (None, [b"\x00", "x", 0.5, True])
        self.at = state["at"]
        self.generator.set_state(state["generator"])


@pytest.mark.filterwarnings("ignore:batches was put back by its load_state_dict")
@pytest.mark.parametrize("start", ["random", "data"])
@pytest.mark.parametrize("n", [N, N + 1])  # at the end of a pass, and in the middle of one
def test_a_loader_that_knows_where_it_is(tmp_path, n: int, start):
    optimization = apd.Optimization(steps=2 * N, start=start)
    assert_resumed_is_whole(tmp_path, mlp, lambda: few(batches=Loader(n), optimization=optimization))


@pytest.mark.filterwarnings("ignore:'set_vital' is deprecated")  # which torchdata takes from torch
@pytest.mark.filterwarnings("ignore:batches was put back by its load_state_dict")
@pytest.mark.parametrize("n", [8 * N, 8 * (N + 1)])  # at the end of a pass, and in the middle of one
def test_a_stateful_dataloader_of_torchdata(tmp_path, n: int):
    loader = pytest.importorskip("torchdata.stateful_dataloader", exc_type=ImportError).StatefulDataLoader
    assert_resumed_is_whole(tmp_path, mlp, lambda: few(batches=loader(random((n, 4)), batch_size=8)))


def test_a_loader_is_put_back_and_not_gone_through(tmp_path):
    trained(mlp(), few(batches=Loader(8), checkpoint=apd.Checkpoint(tmp_path, every=4)))
    loader = Loader(8)
    trained(mlp(), few(batches=loader, resume=tmp_path / "step-000004.safetensors"))  # the start is not fitted again
    assert loader.drawn == 2 * N - 4


@pytest.mark.parametrize("start", ["random", "data"])
def test_a_dataloader_that_shuffles_by_a_seed(tmp_path, start):
    def options() -> dict[str, Any]:
        loader = torch.utils.data.DataLoader(
            random((16, 4)), batch_size=8, shuffle=True, generator=torch.Generator().manual_seed(0)
        )
        return few(batches=loader, optimization=apd.Optimization(steps=2 * N, start=start))

    assert_resumed_is_whole(tmp_path, mlp, options)


def test_a_targeted_decomposition_of_a_hugging_face_model(tmp_path):
    """With what comes before the first decomposed matrix kept, by the fit at first."""
    assert_resumed_is_whole(
        tmp_path,
        llama,
        lambda: {
            "batches": [tokens(4, 5), tokens(3, 4, 2)],
            "others": [tokens(3, 6, 1)],
            "weights": "model.layers.2.self_attn.[vo]_proj*",
            "n_components": 6,
            "progress": False,
            **apd.language_model(2 * N),
        },
    )


def test_positions_as_data_points(tmp_path):
    selection = apd.BatchTopK(1.5, granularity="position")
    options = few(batches=[tokens(4, 5)], weights=["fc.*", "proj.*"], selection=selection)
    assert_resumed_is_whole(tmp_path, gpt, lambda: options)


# Where and when.


def test_it_is_saved_every_few_steps_and_at_the_end_and_the_newest_are_kept(tmp_path):
    seen = []

    def on_step(step: int, info: apd.training.StepInfo) -> None:
        seen.append(sorted(os.listdir(tmp_path)))

    options = few(optimization=apd.Optimization(steps=7))
    apd.decompose(mlp(), **options, checkpoint=apd.Checkpoint(tmp_path, every=2, keep=2), on_step=on_step)
    files = [f"step-{step:06}.safetensors" for step in (2, 4, 6, 7)]
    assert seen == [[], [], files[:1], files[:1], files[:2], files[:2], files[1:3]]
    assert sorted(os.listdir(tmp_path)) == files[2:]


def test_one_script_serves_every_time(tmp_path):
    """Begun, gone on with, and done."""
    options = few(checkpoint=apd.Checkpoint(tmp_path / "new", every=100), resume=tmp_path / "new")
    expected, *_ = trained(mlp(), few())
    for end_at in (2, 4):
        with pytest.raises(Ended):
            trained(mlp(), options, end_at)
    for n_losses in (2 * N - 4, 0):
        came, _, losses = trained(mlp(), options)
        assert len(losses) == n_losses
        assert [*map(torch.equal, came, expected)] == [True] * len(expected)


def test_more_steps_go_on_with_the_schedule_of_the_new_number(tmp_path):
    rates = []
    options = few(checkpoint=apd.Checkpoint(tmp_path))
    trained(mlp(), options)
    longer = apd.Optimization(steps=4 * N, lr=1e-2)
    options |= {"optimization": longer, "resume": tmp_path}
    apd.decompose(mlp(), **options, on_step=lambda step, info: rates.append(info.learning_rate))
    assert rates == [learning_rate(longer, step) for step in range(2 * N, 4 * N)]
    with pytest.raises(apd.errors.InvalidSetting, match=r"is of step 12, and Optimization\(steps=3\) ends before it"):
        trained(mlp(), options | {"optimization": apd.Optimization(steps=3, lr=1e-2)})


def test_a_folder_of_another_training_is_refused(tmp_path):
    trained(mlp(), few(checkpoint=apd.Checkpoint(tmp_path, every=2)))
    before = sorted(os.listdir(tmp_path))
    for options in ({}, {"resume": tmp_path / "step-000004.safetensors"}):
        with pytest.raises(
            apd.errors.InvalidSetting, match=r"holds step-000006.safetensors, and this training is at step"
        ):
            trained(mlp(), few(checkpoint=apd.Checkpoint(tmp_path)) | options)
    assert sorted(os.listdir(tmp_path)) == before
    (tmp_path / "file").touch()
    with pytest.raises(apd.ArtifactError, match="cannot be written"):
        trained(mlp(), few(checkpoint=apd.Checkpoint(tmp_path / "file")))


def test_what_is_no_checkpoint(tmp_path):
    with pytest.raises(apd.ArtifactError, match="There is no checkpoint at"):
        trained(mlp(), few(resume=tmp_path))
    with pytest.raises(apd.ArtifactError, match="There is no checkpoint at"):
        trained(mlp(), few(resume=tmp_path, checkpoint=apd.Checkpoint(tmp_path / "other")))
    (tmp_path / "text").write_text("hello")
    with pytest.raises(apd.ArtifactError, match="no valid safetensors"):
        trained(mlp(), few(resume=tmp_path / "text"))
    monitor = tmp_path / "monitor.safetensors"
    options = few()
    apd.monitor.fit(apd.decompose(mlp(), **options), options["batches"]).save(monitor)
    with pytest.raises(apd.ArtifactError, match="is no checkpoint that this apd_lens reads"):
        trained(mlp(), few(resume=monitor))
    with pytest.raises(apd.errors.InvalidSetting, match="needs every >= 1"):
        apd.Checkpoint(tmp_path, every=0)


def test_a_damaged_checkpoint_is_named_and_the_one_before_it_is_taken(tmp_path):
    expected, *_ = trained(mlp(), few(checkpoint=apd.Checkpoint(tmp_path, every=2, keep=5)))
    newest, before = tmp_path / "step-000006.safetensors", tmp_path / "step-000004.safetensors"
    (tmp_path / "step-000006.safetensors.0123456789abcdef.unfinished").touch()
    content = newest.read_bytes()
    for damaged, message in [(content[:-100], "no valid safetensors"), (content[:-1] + b"\x7f", "is damaged")]:
        newest.write_bytes(damaged)
        with pytest.raises(apd.ArtifactError, match=message):
            trained(mlp(), few(resume=newest))
        with pytest.warns(apd.errors.ApdWarning, match=message + ".*The one before it is gone on from"):
            came, _, losses = trained(mlp(), few(resume=tmp_path))
        assert len(losses) == 2
        assert [*map(torch.equal, came, expected)] == [True] * len(expected)
    with pytest.warns(apd.errors.ApdWarning, match=message):
        trained(mlp(), few(resume=tmp_path, checkpoint=apd.Checkpoint(tmp_path, every=2, keep=5)))
    assert sorted(os.listdir(tmp_path)) == ["step-000002.safetensors", before.name, newest.name]
    trained(mlp(), few(resume=newest))


# Ended.


def test_an_error_in_a_step_saves_the_step_before_it(tmp_path):
    random_start = apd.Optimization(steps=2 * N, start="random")  # another one has seen all batches
    bad = few(batches=[*few()["batches"][:2], torch.full((8, 4), torch.nan)], optimization=random_start)
    model = mlp()
    before = Snapshot.of(model)
    with pytest.raises(apd.NonFinite) as error:
        trained(model, bad | {"checkpoint": apd.Checkpoint(tmp_path)})
    before.assert_unchanged(model)
    assert os.listdir(tmp_path) == ["step-000002.safetensors"]
    assert "goes on behind step 1" in error.value.__notes__[0]
    assert error.value.decomposition.components.n_components == 6


def test_an_error_where_a_step_had_begun_to_change_the_components_saves_nothing(tmp_path, monkeypatch):
    def fail(self: Any, context: Any) -> int:
        raise Ended

    options = few(moves=apd.moves.SplitMoves(every=4, until=1.0))
    with monkeypatch.context() as patch:
        patch.setattr(apd.moves.SplitMoves, "__call__", fail)
        with pytest.raises(Ended) as error:
            trained(mlp(), options | {"checkpoint": apd.Checkpoint(tmp_path, every=2)})
    notes = str(error.value.__notes__)
    assert "Step 3 had begun to change the components, so the newest checkpoint is that of step 2" in notes
    expected, *_ = trained(mlp(), options)
    came, *_ = trained(mlp(), options | {"resume": tmp_path})
    assert [*map(torch.equal, came, expected)] == [True] * len(expected)


def test_a_full_disk_leaves_the_checkpoints_before(tmp_path, monkeypatch):
    model = mlp()
    before = Snapshot.of(model)

    def on_step(step: int, info: apd.training.StepInfo) -> None:
        if step == 3:
            monkeypatch.setattr(os, "fsync", full)

    def full(*arguments: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(apd.ArtifactError, match="no space is left on the disk") as error:
        apd.decompose(model, **few(), checkpoint=apd.Checkpoint(tmp_path, every=2), on_step=on_step)
    monkeypatch.undo()
    before.assert_unchanged(model)
    assert "could not be saved, so the newest checkpoint is that of step 2" in str(error.value.__notes__)
    assert os.listdir(tmp_path) == ["step-000002.safetensors"]
    expected, *_ = trained(mlp(), few())
    came, *_ = trained(mlp(), few(resume=tmp_path))
    assert [*map(torch.equal, came, expected)] == [True] * len(expected)


@pytest.fixture
def _ctrl_c():
    """Ctrl-C raises, as in a process that pytest has not started among several."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("_ctrl_c")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_waits_for_the_end_of_the_step(tmp_path, number):
    """It comes while moves change the components."""
    error = {signal.SIGINT: KeyboardInterrupt, signal.SIGTERM: SystemExit}[number]
    handlers = [signal.getsignal(one) for one in (signal.SIGINT, signal.SIGTERM)]
    called = []

    class Moves(apd.moves.SplitMoves):
        def __call__(self, context: Any) -> int:
            if not called:
                signal.raise_signal(number)
            called.append(1)
            return super().__call__(context)

    apd.saved(Moves)
    options = few(moves=Moves(every=2, until=1.0))
    with pytest.raises(error) as came:
        trained(mlp(), options | {"checkpoint": apd.Checkpoint(tmp_path)})
    assert number == signal.SIGINT or came.value.code == 143
    assert called == [1]
    assert os.listdir(tmp_path) == ["step-000002.safetensors"]
    assert [signal.getsignal(one) for one in (signal.SIGINT, signal.SIGTERM)] == handlers
    expected, *_ = trained(mlp(), options)
    resumed, *_ = trained(mlp(), options | {"resume": tmp_path})
    assert [*map(torch.equal, resumed, expected)] == [True] * len(expected)


@pytest.mark.usefixtures("_ctrl_c")
def test_a_second_signal_does_not_wait(tmp_path):
    def k(batch: torch.Tensor) -> float:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        raise AssertionError

    with pytest.raises(KeyboardInterrupt):
        trained(mlp(), few(selection=apd.BatchTopK(k), checkpoint=apd.Checkpoint(tmp_path)))
    assert os.listdir(tmp_path) == []


def test_a_handler_of_the_users_is_called_at_the_end_of_the_step(tmp_path):
    """One that only takes note lets the training go on."""
    noted, before = [], signal.getsignal(signal.SIGTERM)

    def note(number: int, frame: Any) -> None:
        noted.append(sorted(os.listdir(tmp_path)))

    def on_step(step: int, info: apd.training.StepInfo) -> None:
        if step == 3:
            signal.raise_signal(signal.SIGTERM)
            assert not noted

    signal.signal(signal.SIGTERM, note)
    try:
        apd.decompose(mlp(), **few(), checkpoint=apd.Checkpoint(tmp_path, every=2, keep=9), on_step=on_step)
        assert signal.getsignal(signal.SIGTERM) is note
    finally:
        signal.signal(signal.SIGTERM, before)
    assert noted == [["step-000002.safetensors", "step-000004.safetensors"]]
    assert len(os.listdir(tmp_path)) == N


def test_in_another_thread_no_handler_is_set(tmp_path):
    handlers = []
    options = few(checkpoint=apd.Checkpoint(tmp_path))
    run = lambda: apd.decompose(  # noqa: E731
        mlp(), **options, on_step=lambda step, info: handlers.append(signal.getsignal(signal.SIGTERM))
    )
    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert handlers == [signal.getsignal(signal.SIGTERM)] * 2 * N
    assert os.listdir(tmp_path) == ["step-000006.safetensors"]


def test_without_checkpoints_nothing_is_done(monkeypatch):
    for name in ("_asked", "start_of", "write_tensors", "read_tensors"):
        monkeypatch.delattr(_checkpoint, name)
    handler = signal.getsignal(signal.SIGTERM)
    seen = []
    apd.decompose(mlp(), **few(), on_step=lambda step, info: seen.append(signal.getsignal(signal.SIGTERM)))
    assert seen == [handler] * 2 * N


# Refused.


def test_a_generator_is_warned_of_and_refused_afterwards(tmp_path):
    def batches():
        return (random((8, 4), seed) for seed in range(20))

    with pytest.warns(
        apd.errors.ApdWarning, match="batches is a generator, .* saved but cannot be resumed. Give a list"
    ):
        trained(mlp(), few(batches=batches(), checkpoint=apd.Checkpoint(tmp_path, every=N)))
    with pytest.raises(apd.errors.InvalidBatches, match="is resumed at step 6, and batches is a generator"):
        trained(mlp(), few(batches=batches(), resume=tmp_path))


class Other(ResidualMLP):
    """The same model, of another class."""


def other_weights() -> nn.Module:
    model = mlp()
    with torch.no_grad():
        model.layers[0]["mlp_in"].weight[0, 0] += 1
    return model


def other_bias() -> nn.Module:
    model = mlp()
    with torch.no_grad():
        model.layers[0]["mlp_in"].bias[0] += 1
    return model


DIFFERENCES: dict[str, tuple[Any, dict[str, Any], str]] = {
    "seed": (mlp, {"seed": 5}, r"1: settings.seed: then 0, now 5\. .*Only Optimization\(steps=…\)"),
    "lr": (
        mlp,
        {"optimization": apd.Optimization(steps=2 * N, lr=0.5)},
        "settings.optimization.lr: then 0.01, now 0.5",
    ),
    "start": (mlp, {"optimization": apd.Optimization(steps=2 * N, lr=1e-2, start="random")}, "optimization.start"),
    "losses": (mlp, {"losses": apd.Losses(path=0.25)}, "settings.losses.path: then 2.0, now 0.25"),
    "schedule": (
        mlp,
        {"losses": apd.Losses(path=apd.Ramp(1.0, 0.5))},
        "settings.losses.path.type: then 'nothing', now",
    ),
    "granularity": (
        mlp,
        {"selection": apd.BatchTopK(apd.masks.Needed(), granularity="position", least=0.15)},
        "settings.selection.granularity",
    ),
    "moves": (mlp, {"moves": None}, "settings.moves"),
    "components": (mlp, {"n_components": 7}, "n_components: then 6, now 7"),
    "rank": (mlp, {"rank": 3}, r"matrices.layers.0.mlp_in.weight.rank: then 2, now 3"),
    "matrices": (mlp, {"weights": "layers.*"}, "matrices.W_E.weight.d_in: then 4, now 'nothing'"),
    "others": (mlp, TARGETED, "settings.elsewhere.type: then 'nothing', now 'Elsewhere'"),
    "output": (mlp, {"output": lambda y: y[:, :2]}, "output.name: then 'default_output', now"),
    "valid": (mlp, {"valid": lambda batch: None}, "valid.name: then 'nothing'"),
    "class": (lambda: Other(4, 6, 5, 1), {}, "model: then 'support.toy_models.ResidualMLP'"),
    "weights": (other_weights, {}, "matrices.layers.0.mlp_in.weight.fingerprint"),
    "dtype": (lambda: mlp().double(), {"batches": [random((8, 4)).double()]}, "fingerprint"),
    "a bias": (other_bias, {}, "1: others.layers.0.mlp_in.bias"),
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    with pytest.raises(Ended):
        trained(mlp(), few(checkpoint=apd.Checkpoint(folder)), end_at=N)
    return folder


@pytest.mark.parametrize(("make", "options", "message"), DIFFERENCES.values(), ids=DIFFERENCES)
def test_what_differs_is_refused(saved: Path, make, options: dict[str, Any], message: str):
    with pytest.raises(apd.ArtifactError, match=f"is of another training, which differs in .*{message}"):
        trained(make(), few(resume=saved) | options)


def test_functions_are_compared_by_their_code(tmp_path):
    made = [lambda y: y[:, :2], lambda y: y[:, :3]]
    with pytest.raises(Ended):
        trained(mlp(), few(output=made[0], checkpoint=apd.Checkpoint(tmp_path)), end_at=N)
    with pytest.raises(apd.ArtifactError, match=r"differs in 1: output.code: then"):
        trained(mlp(), few(output=made[1], resume=tmp_path))
    trained(mlp(), few(output=made[0], resume=tmp_path))


def test_another_version_of_a_package_is_refused_and_of_torch_warned_of(saved: Path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(_decomposition, "library_versions", lambda model: {"apd-lens": "9.9", "torch": "1"})
        with pytest.raises(apd.ArtifactError, match=r"differs in 1: versions.apd-lens: then '.*', now '9.9'"):
            trained(mlp(), few(resume=saved))
    monkeypatch.setattr(torch, "__version__", "1.0")
    n_threads = torch.get_num_threads()
    torch.set_num_threads(n_threads + 1)
    try:
        with pytest.warns(
            apd.errors.ApdWarning, match=f"may differ in the last bits.*torch.*now '1.0'; threads: then {n_threads}"
        ):
            trained(mlp(), few(resume=saved))
    finally:
        torch.set_num_threads(n_threads)


def test_settings_that_cannot_be_written_are_refused_before_the_first_step(tmp_path, monkeypatch):
    monkeypatch.setattr(_checkpoint, "about", lambda decomposition: {"versions": {"torch": ""}, "model": object()})
    with pytest.raises(apd.errors.InvalidSetting, match="cannot be written to a checkpoint: Object of type object"):
        trained(mlp(), few(checkpoint=apd.Checkpoint(tmp_path)))


def test_a_start_that_was_fitted_is_read_and_not_fitted_again(tmp_path, monkeypatch):
    options = few(optimization=apd.Optimization(steps=2 * N, start="data"))
    with pytest.raises(Ended):
        trained(mlp(), options | {"checkpoint": apd.Checkpoint(tmp_path)}, end_at=N)
    monkeypatch.delattr(_state, "fit_to_data")
    assert trained(mlp(), options | {"resume": tmp_path})[1].optimization.start == "data"


# In processes of their own.

SCRIPT = """
import sys, torch
import apd_lens as apd

folder, end = {folder!r}, {end!r}
torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.ReLU(), torch.nn.Linear(6, 3))

def on_step(step, info):
    if step == 5 and end:
        import os, signal
        os.kill(os.getpid(), getattr(signal, end))

decomposition = apd.decompose(
    model, lambda step: torch.randn(8, 4, generator=torch.Generator().manual_seed(step)), n_components=5, rank=2,
    moves=apd.moves.ClusterMoves(every=2), optimization=apd.Optimization(steps=10), progress=False, on_step=on_step,
    checkpoint=apd.Checkpoint(folder, every=4), resume=folder,
)
print([factor.double().sum().item().hex() for factor in decomposition.components.parameters()])
"""


@pytest.mark.parametrize(("end", "step"), [("SIGKILL", 4), ("SIGTERM", 6)])
def test_a_process_that_was_killed_is_gone_on_with_in_another(tmp_path, end: str, step: int):
    expected = outside.run(SCRIPT.format(folder=str(tmp_path / "whole"), end=""))
    with pytest.raises(AssertionError):
        outside.run(SCRIPT.format(folder=str(tmp_path / "killed"), end=end))
    assert max(os.listdir(tmp_path / "killed")) == f"step-{step:06}.safetensors"
    assert outside.run(SCRIPT.format(folder=str(tmp_path / "killed"), end="")) == expected
