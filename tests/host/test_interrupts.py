"""An interrupt at any line leaves the model as it was, and comes out as what it is. benchmarks/faults.py does the same
thousands of times, and at random moments too."""

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
import torch
from support.toy_models import Snapshot, decomposition_of
from torch import nn

import apd_lens as apd
from apd_lens._block import Block, Part, Together
from apd_lens.host._matrix import WeightMatrix
from apd_lens.host._sites import activations_kept as _activations
from apd_lens.host._target import evaluating

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import faults

BATCH = torch.linspace(-1, 1, 24).reshape(6, 4)


def dropout_mlp() -> nn.Sequential:
    """Some modules are in training mode, and one is not."""
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Dropout(0.1), nn.Linear(6, 3)).train()
    model[0].eval()
    return model


@pytest.mark.parametrize("use", [*faults.USES, faults.decompose], ids=lambda use: use.__name__)
@pytest.mark.parametrize("host", faults.hosts())
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # HookedTransformer is deprecated
def test_at_lines(host: str, use: Callable[[faults.Host], None]):
    lines = 8 if host == "torch MLP" else 2
    counts, found = faults.trials(faults.hosts()[host], use, lines, moments=0, seed=0)
    assert found == []
    assert counts["interrupted"] >= lines // 2  # the first run, which is counted, may have more lines than others


@pytest.mark.parametrize("every", [4, pytest.param(1, marks=pytest.mark.thorough)])
def test_at_lines_of_what_enters_and_leaves_a_context(every: int):
    model = dropout_mlp()
    decomposition = decomposition_of(model)
    before = Snapshot.of(model)

    def use(_: Any) -> None:
        with decomposition.ablate(0), evaluating(model):
            pass

    line, error = 0, None
    while line == 0 or error is not None:  # until it ends before the line
        error, _ = faults.at_line(use, None, line)
        assert error is None or type(error) is KeyboardInterrupt
        before.assert_unchanged(model)
        other = Thread(target=use, args=[None], daemon=True)
        other.start()
        other.join(timeout=60)
        assert not other.is_alive()  # no lock is left held
        line += every
    assert line > 100


@pytest.mark.parametrize("always", [False, True])
def test_while_modes_are_put_back(monkeypatch: pytest.MonkeyPatch, always: bool):
    model = dropout_mlp()
    decomposition = decomposition_of(model)
    before, train, n_calls = Snapshot.of(model), nn.Module.train, 0

    def stop(module: nn.Module, mode: bool = True) -> nn.Module:
        nonlocal n_calls
        n_calls += mode
        if mode and (n_calls == 3 or (always and n_calls > 3)):
            raise KeyboardInterrupt
        return train(module, mode)

    monkeypatch.setattr(nn.Module, "train", stop)
    with pytest.raises(KeyboardInterrupt):
        decomposition.attributions(BATCH)
    monkeypatch.undo()
    before.assert_unchanged(model)
    decomposition.attributions(BATCH)


def test_while_it_is_looked_whether_an_edit_can_be_undone(monkeypatch: pytest.MonkeyPatch):
    model = dropout_mlp()
    decomposition = decomposition_of(model)
    before = Snapshot.of(model)
    with pytest.raises(KeyboardInterrupt), apd.apply_edit(model, decomposition, 1):
        monkeypatch.setattr(WeightMatrix, "fingerprint", _interrupt)
    monkeypatch.undo()
    before.assert_unchanged(model)
    decomposition.attributions(BATCH)


def test_an_edit_that_nobody_holds_stays():
    model = dropout_mlp()
    decomposition = decomposition_of(model)
    edited = {name: value.clone() for name, value in decomposition.edited_state_dict(1).items()}
    apd.apply_edit(model, decomposition, 1)
    assert all(torch.equal(value, edited[name]) for name, value in model.state_dict().items())


def test_in_the_first_update(monkeypatch: pytest.MonkeyPatch):
    """Adam makes the state of a parameter first, and then fills it."""

    def stop(optimizer: torch.optim.Adam, group: dict[str, Any], *args: Any) -> bool:
        assert optimizer.state[group["params"][0]] == {}
        raise KeyboardInterrupt

    monkeypatch.setattr(torch.optim.Adam, "_init_group", stop)
    with pytest.raises(KeyboardInterrupt) as info:
        apd.decompose(dropout_mlp(), [BATCH], n_components=5, rank=2, progress=False)
    assert not hasattr(info.value, "decomposition")


def test_a_handler_of_sigterm_that_exits():
    """It comes in a forward, and with it all of `decompose` ends."""
    model = dropout_mlp()
    before = Snapshot.of(model)

    def terminate(step: int, info: apd.training.StepInfo) -> None:
        if step == 2:
            handle = model[3].register_forward_hook(lambda *_: os.kill(os.getpid(), signal.SIGTERM))
            handles.append(handle)

    def leave(number: int, frame: Any) -> None:
        raise SystemExit(143)

    handles: list[Any] = []
    handler = signal.signal(signal.SIGTERM, leave)
    try:
        with pytest.raises(SystemExit, match="143") as info:
            apd.decompose(model, [BATCH], n_components=5, rank=2, progress=False, on_step=terminate)
    finally:
        signal.signal(signal.SIGTERM, handler)
    handles[0].remove()
    before.assert_unchanged(model)
    assert isinstance(info.value.decomposition, apd.Decomposition)  # type: ignore[attr-defined]


def test_hooks_of_activations_are_removed():
    model = dropout_mlp()
    before = Snapshot.of(model)
    with pytest.raises(apd.errors.InvalidSetting, match="no submodule"), _activations(model, ["0", "nothing"]):
        pass
    before.assert_unchanged(model)


def test_grad_mode_is_put_back():
    with evaluating(dropout_mlp()):
        torch.set_grad_enabled(False)  # as where an interrupt keeps torch from putting it back
    assert torch.is_grad_enabled()


def test_all_parts_are_undone_although_one_fails():
    undone = []

    class Failing(Part):
        def undo(self) -> None:
            undone.append("failing")
            raise KeyboardInterrupt

    class Plain(Part):
        def undo(self) -> None:
            undone.append("plain")

    with pytest.raises(KeyboardInterrupt), Block(lambda: Together([Plain(), Failing(), Plain()])):
        pass
    assert undone == ["plain", "failing", "plain"] * 2


def _interrupt(*args: Any) -> Any:
    raise KeyboardInterrupt
