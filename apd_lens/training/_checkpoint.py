"""Checkpoints: a training is saved now and then, and where it is ended; and goes on from there, bit for bit.

A checkpoint is one safetensors file, written whole or not at all. It holds all that `State.tensors` gives, the states
of loaders, and as JSON what the training was asked for. Whoever resumes asks for the same; what differs is refused.
"""

import contextlib
import hashlib
import json
import os
import platform
import re
import signal
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import torch
from torch import Tensor

from apd_lens import _processes
from apd_lens._block import Part
from apd_lens._checks import check_fields
from apd_lens._codec import encode_function, encode_settings
from apd_lens._errors import ApdWarning, ArtifactError, InvalidSetting
from apd_lens._files import locked, make_folder, sweep, user_path, writing
from apd_lens.data._batch import Batch
from apd_lens.data._finite import on_gpu
from apd_lens.decomposition._artifact import read_tensors, write_tensors
from apd_lens.decomposition._decomposition import about
from apd_lens.training._place import Place, can_be_found_again, start_of, stream_from
from apd_lens.training._state import Batches, State

FORMAT = "apd_lens checkpoint 1"
_FILE = re.compile(r"step-(\d{6,})\.safetensors")
# Bytes that the states of loaders may have, beside what a state has.
_LARGEST_REST = 2**30
# So many differences are listed.
_LISTED = 8


@dataclass(frozen=True)
class Checkpoint:
    """Where and how often a training is saved, for `decompose(…, resume=path)`.

    It is saved every so many steps, at its end, and also where it is ended by an error, Ctrl-C or SIGTERM: then as the
    last whole step left it. Each checkpoint is one file of the folder, `step-000500.safetensors`.

    Attributes:
        path: a folder for the checkpoints of one training; it is made where there is none.
        every: steps from one checkpoint to the next.
        keep: so many of the newest are kept.
    """

    path: str | os.PathLike[str]
    every: int = 500
    keep: int = 2

    def __post_init__(self) -> None:
        check_fields(self)
        if self.every < 1 or self.keep < 1:
            raise InvalidSetting(f"Checkpoint needs every >= 1 and keep >= 1, got {self}.")


def checkpoints_at(path: str | os.PathLike[str], checkpoint: Checkpoint | None) -> list[Path]:
    """The file, or those in the folder, newest first. None may be there only if the training is to be saved there.

    Raises:
        ArtifactError: there is no checkpoint.
    """
    place = user_path(path).resolve()
    if place.is_file():
        return [place]
    found = _in_folder(place)
    if not found and (checkpoint is None or user_path(checkpoint.path).resolve() != place):
        raise ArtifactError(
            f"There is no checkpoint at {place}: expected a file step-….safetensors, or a folder of them, as "
            "decompose(…, checkpoint=Checkpoint(path)) writes them."
        )
    return [found[step] for step in sorted(found, reverse=True)]


def _in_folder(folder: Path) -> dict[int, Path]:
    """Step -> checkpoint."""
    names = os.listdir(folder) if folder.is_dir() else []
    return {int(match[1]): folder / name for name in names if (match := _FILE.fullmatch(name))}


class Run(Part):
    """A training with its data and its checkpoints.

    Where checkpoints are asked for, a signal that ends the process (Ctrl-C, SIGTERM) waits for the end of the step, so
    that what is saved is whole. A second one does not wait.

    Attributes:
        state: behind the last step that was done.
        batches: of each further step those of all streams.

    Args:
        fresh: the state before the first step.
        resumed: checkpoints, newest first. The training goes on from the first one that is whole, if there is one.
    """

    def __init__(
        self, fresh: State, streams: Sequence[Batches], checkpoint: Checkpoint | None, resumed: Sequence[Path]
    ):
        self._checkpoint, self._streams = checkpoint, dict(zip(("batches", "others"), streams, strict=False))
        self.state, self._places, damaged = fresh, [Place() for _ in streams], list[Path]()
        if checkpoint is not None or resumed:
            self._asked = _asked(fresh)
            self._places = list(map(start_of, streams, fresh.fitted or [0] * len(streams)))
        if resumed:
            self.state, self._places, damaged = _resumed(fresh, self._asked, streams, resumed)
        if checkpoint is not None:
            self._folder = _usable(user_path(checkpoint.path).resolve(), self.state.step, damaged)
            for name, some in self._streams.items():
                _warn_of_generators(name, some)
        self.batches = zip(*self._drawn(), strict=True)
        self._now: tuple[Batch, ...] = ()
        self._saved, self._waiting = self.state.step, 0
        self._handlers: dict[int, Any] = {}

    def _drawn(self) -> Iterator[Iterator[Batch]]:
        for place, (name, some) in zip(self._places, self._streams.items(), strict=True):
            yield stream_from(place, some, self.state.step, name)

    def do(self) -> None:
        if self._checkpoint is None or threading.current_thread() is not threading.main_thread():
            return
        for number in (signal.SIGINT, signal.SIGTERM):
            handler = signal.getsignal(number)
            if callable(handler) or handler is signal.SIG_DFL:
                self._handlers[number] = handler
                signal.signal(number, self._on_signal)

    def undo(self) -> None:
        for number, handler in self._handlers.items():
            if signal.getsignal(number) == self._on_signal:
                signal.signal(number, handler)
        waiting, self._waiting = self._waiting, 0
        if waiting:
            signal.raise_signal(waiting)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self._waiting:
            self._end(number, frame)
        self._waiting = number

    def _end(self, number: int, frame: FrameType | None) -> None:
        """Does what the signal would have done without us."""
        self._waiting, handler = 0, self._handlers[number]
        if not callable(handler):
            error = SystemExit(128 + number)
            error.add_note(f"The process was sent {signal.Signals(number).name}.")
            raise error
        handler(number, frame)

    def reached(self, state: State, batches: Sequence[Batch]) -> None:
        """A step was done, on these batches."""
        self.state, self._now = state, tuple(batches)
        if self._checkpoint is not None and state.step == 1:
            self._look_at_batches()

    def save_if_due(self) -> None:
        """Saves the training every so many steps and at its end; then what has waited ends it.

        Raises:
            ArtifactError: it cannot be written.
        """
        if self._checkpoint is None:
            return
        step = self.state.step
        if step % self._checkpoint.every == 0 or step == self.state.settings.optimization.steps:
            self._look_at_batches()
            self._save()
        if self._waiting:
            self._end(self._waiting, None)

    def save_at_error(self, error: BaseException) -> None:
        """Saves the last step that was done, and says so in a note of the error."""
        if self._checkpoint is None:
            return
        steps, newest = _in_folder(self._folder), "there is no checkpoint."
        if steps:
            there = f"decompose(…, resume={str(self._folder)!r}) goes on from there."
            newest = f"the newest checkpoint is that of step {max(steps)}. {there}"
        if self.state.step == self._saved:
            if steps:
                error.add_note(newest[0].upper() + newest[1:])
            return
        is_whole = self.state.is_whole()
        try:
            if self.state.components.is_sharded:  # saved by all, or by none
                different = ArtifactError("the processes were ended in different steps.")
                _processes.check_same((self.state.step, is_whole), different)
            file = self._save() if is_whole else None
        except Exception as problem:
            error.add_note(f"The last step could not be saved, so {newest} Why it could not: {problem}")
            return
        note = f"decompose(…, resume={str(file)!r}) goes on behind step {self.state.step - 1}."
        if file is None:
            note = f"Step {self.state.step} had begun to change the components, so {newest}"
        elif not _processes.is_first():  # which may have ended
            note = f"The first process saves step {self.state.step - 1}, if it can. Before, {newest}"
        error.add_note(note)

    def _look_at_batches(self) -> None:
        self._places = [
            place.after(some, self.state.step - 1, batch)
            for place, some, batch in zip(self._places, self._streams.values(), self._now, strict=True)
        ]

    def _save(self) -> Path:
        tensors = self.state.tensors()
        for number, place in enumerate(self._places):
            tensors |= {f"data.{number}.{of}": tensor for of, tensor in enumerate(place.tensors)}
        told = {
            "format": FORMAT,
            "asked": json.dumps(self._asked),
            "machine": json.dumps(_machine(self.state)),
            "data": json.dumps([{**vars(place), "tensors": len(place.tensors)} for place in self._places]),
        }
        file = self._folder / f"step-{self.state.step:06}.safetensors"
        if _processes.is_first():
            write_tensors(file, {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, told)
            self._remove_old()
        self._saved = self.state.step
        return file

    def _remove_old(self) -> None:
        assert self._checkpoint is not None
        old = {step: file for step, file in _in_folder(self._folder).items() if step <= self.state.step}
        for step in sorted(old)[: -self._checkpoint.keep]:
            with contextlib.suppress(OSError):
                old[step].unlink()


def _usable(folder: Path, step: int, damaged: Sequence[Path]) -> Path:
    """The folder, which is there and can take the checkpoints of a training from a step on.

    Raises:
        ArtifactError: it cannot be made.
        InvalidSetting: it holds checkpoints of later steps, which are of another training.
    """
    later = sorted(file.name for at, file in _in_folder(folder).items() if at > step and file not in damaged)
    if later:
        raise InvalidSetting(
            f"{folder} holds {later[-1]}, and this training is at step {step}. To go on from there give "
            f"resume={str(folder)!r}; for another training choose another folder."
        )
    with writing(folder):
        make_folder(folder)
        with locked(folder):
            sweep(folder, _FILE.pattern)
    return folder


def _warn_of_generators(name: str, batches: Batches) -> None:
    if not can_be_found_again(batches):
        warnings.warn(
            f"{name} is a {type(batches).__name__}, which gives each batch once, so this training is saved but cannot "
            "be resumed. Give a list, a DataLoader, a function step -> batch, or an iterable with state_dict and "
            "load_state_dict.",
            ApdWarning,
            stacklevel=2,
        )


def _resumed(
    fresh: State, asked: dict[str, Any], streams: Sequence[Batches], files: Sequence[Path]
) -> tuple[State, list[Place], list[Path]]:
    """The state and the places in the data of the first file that is whole, and the files before it, which are not.

    Raises:
        ArtifactError: none is whole, or that one is of another training; says in what they differ.
    """
    n_bytes = sum(factor.numel() * factor.element_size() for factor in fresh.components.parameters())
    file, tensors, about = _read(files, 3 * n_bytes + _LARGEST_REST)
    then = json.loads(about["asked"])
    steps = fresh.settings.optimization.steps
    if differences := _differences(then, asked):
        raise ArtifactError(
            f"{file} is of another training, which differs in {len(differences)}: "
            f"{'; '.join(differences[:_LISTED])}{'; …' if len(differences) > _LISTED else ''}. Give what it was made "
            "with, or start anew. Only Optimization(steps=…) may be another."
        )
    if differences := _differences(json.loads(about["machine"]), _machine(fresh)):
        warnings.warn(
            f"{file} was made elsewhere, so what follows may differ in the last bits from what it would have been: "
            f"{'; '.join(differences)}.",
            ApdWarning,
            stacklevel=2,
        )
    if (step := int(tensors["step"])) > steps:
        raise InvalidSetting(f"{file} is of step {step}, and Optimization(steps={steps}) ends before it.")
    places = [
        Place(**{**place, "tensors": [tensors[f"data.{number}.{of}"] for of in range(place["tensors"])]})
        for number, place in enumerate(json.loads(about["data"]))
    ]
    for place, some in zip(places, streams, strict=True):  # so that what follows is what followed then
        if place.fitted and place.loader is None and isinstance(some, Iterable) and not isinstance(some, Sequence):
            for _ in islice(some, place.fitted):
                pass
    return fresh.restored(tensors), places, list(files[: files.index(file)])


def _read(files: Sequence[Path], at_most: int) -> tuple[Path, dict[str, Tensor], dict[str, str]]:
    for file in files:
        try:
            tensors, about, is_whole = read_tensors(file, at_most)
        except ArtifactError as error:
            problem = str(error)
        else:
            if is_whole and about.get("format") == FORMAT:
                return file, tensors, about
            problem = f"{file} is damaged: its digest does not fit its content."
            if is_whole:
                problem = f"{file} is no checkpoint that this apd_lens reads: expected the format {FORMAT!r}."
        if file is files[-1]:
            raise ArtifactError(problem)
        warnings.warn(f"{problem} The one before it is gone on from.", ApdWarning, stacklevel=2)
    raise AssertionError


def _asked(state: State) -> dict[str, Any]:
    """What a training was asked for, but for the number of steps, as JSON holds it."""
    asked = about(state.decomposition()) | {
        "settings": encode_settings(state.settings, _function),
        "output": encode_settings(state.output, _function),
        "valid": encode_settings(state.target.valid, _function),
    }
    del asked["versions"]["torch"]
    del asked["settings"]["optimization"]["steps"]
    try:
        return json.loads(re.sub(" at 0x[0-9a-f]+", "", json.dumps(asked)))
    except TypeError as error:
        raise InvalidSetting(f"The settings of this training cannot be written to a checkpoint: {error}.") from error


def _function(function: Callable[..., Any]) -> dict[str, Any]:
    """A function by its name and a digest of its code; what it closes over is not looked at."""
    code = getattr(function, "__code__", None)
    told = encode_function(function)
    return told if code is None else told | {"code": hashlib.sha256(repr(_parts(code)).encode()).hexdigest()[:16]}


def _parts(code: CodeType) -> list[Any]:
    return [code.co_code, code.co_names, *(_parts(one) if isinstance(one, CodeType) else one for one in code.co_consts)]


def _machine(state: State) -> dict[str, Any]:
    """What the last bits of numbers may depend on."""
    device = state.last_active.device
    return {
        "torch": torch.__version__,
        "python": platform.python_version(),
        "threads": torch.get_num_threads(),
        "processes": _processes.n_processes(),
        "processor": f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}",
        "device": torch.cuda.get_device_name(device) if on_gpu(device) else device.type,
        "precision of matrix products": torch.get_float32_matmul_precision(),
    }


def _differences(then: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """In what two descriptions differ, as "place: then …, now …"."""
    before, after = dict(_flat(then)), dict(_flat(now))
    return [
        f"{place}: then {before.get(place, 'nothing')!r:.80}, now {after.get(place, 'nothing')!r:.80}"
        for place in before | after
        if before.get(place, _flat) != after.get(place, _flat)
    ]


def _flat(value: Any, place: str = "") -> Iterator[tuple[str, Any]]:
    if not isinstance(value, dict | list) or not value:
        yield place, value
        return
    for key, item in value.items() if isinstance(value, dict) else enumerate(value):
        yield from _flat(item, f"{place}.{key}".lstrip("."))
