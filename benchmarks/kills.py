"""What becomes of saved work: processes that are killed, two that write at once, hostile files, flipped bits.

Prints for each kind how many were tried, and how many went wrong; each second number must be 0.

    kills     saves over an old decomposition or monitor that are ended by SIGKILL or SIGTERM, before each line of the
              save in turn and at random moments. Wrong: neither the old nor the new one loads, or something is left
              behind after the next save
    writers   loads of a folder that two processes save to, each its own decomposition. Wrong: any error, or a
              decomposition that is neither; the same for a file that two processes write
    hostile   artifacts with digests that fit, but with other JSON or other tensors than apd_lens writes. Wrong: any
              other error than ArtifactError, or one that loads and then does not work
    flips     one bit flipped in a saved decomposition, and in a saved monitor. Wrong: it loads with other content, or
              raises any other error than ArtifactError
"""

import argparse
import copy
import hashlib
import json
import os
import random
import signal
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Container, Iterator
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

import apd_lens as apd
from apd_lens import _files
from apd_lens import monitor as watch
from apd_lens.decomposition import _artifact

WRITERS = {_artifact.__file__, _files.__file__}
JSON, TENSORS, CARD = _artifact.JSON_FILE, _artifact.TENSOR_FILE, _artifact.CARD_FILE
X = torch.linspace(-1, 1, 24).reshape(6, 4)


def make_model() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))


def decomposition_of(model: nn.Module, seed: int, **options: Any) -> apd.Decomposition:
    options = {"selection": apd.TopK(2), "n_components": 5, "rank": 2, **options}
    return apd.init(model, seed=seed, **options).decomposition()


def same(one: apd.Decomposition, other: apd.Decomposition) -> bool:
    pairs = zip(one.components.parameters(), other.components.parameters(), strict=True)
    return one.settings == other.settings and all(torch.equal(a, b) for a, b in pairs)


class Kept:
    """Two decompositions and two monitors, and which of them is in a folder."""

    def __init__(self, folder: Path):
        self.model = make_model()
        self.decompositions = [decomposition_of(self.model, seed) for seed in (1, 2)]
        first = self.decompositions[0]
        self.monitors = [watch.fit(first, [X * scale]) for scale in (1.0, 3.0)]
        # In the parent once, so that the children do not each read what is installed.
        _artifact.library_versions(self.model)
        self.artifact, self.monitor = folder / "decomposition", folder / "monitor.safetensors"

    def save(self, number: int) -> None:
        self.decompositions[number].save(self.artifact)
        self.monitors[number].save(self.monitor)

    def is_whole(self) -> bool:
        """Whether one of the two loads, of both kinds."""
        try:
            loaded = apd.load(self.artifact, self.model)
            monitor = watch.load(self.monitor, self.decompositions[0])
        except apd.ArtifactError:
            return False
        return any(same(loaded, each) for each in self.decompositions) and any(
            torch.equal(monitor.coactivation, each.coactivation) and monitor.residual_mean == each.residual_mean
            for each in self.monitors
        )

    def is_clean(self) -> bool:
        names = sorted(os.listdir(self.artifact))
        return names == [CARD, TENSORS, JSON] and sorted(os.listdir(self.monitor.parent)) == [
            self.artifact.name,
            self.monitor.name,
        ]


def in_child(run: Callable[[], object]) -> int:
    """The child's process id. The child ends without any of the parent's handlers."""
    pid = os.fork()
    if pid == 0:
        try:
            run()
        finally:
            os._exit(0)
    return pid


def killed_at_line(
    number: int, run: Callable[[], object], how: signal.Signals, files: Container[str] = WRITERS
) -> Callable[[], None]:
    """Runs, and is killed before the given line of what writes files."""
    seen = 0

    def at_line(frame: FrameType, event: str, argument: object) -> Any:
        nonlocal seen
        if event == "line":
            seen += 1
            if seen == number:
                os.kill(os.getpid(), how)
        return at_line

    def traced() -> None:
        sys.settrace(lambda frame, event, argument: at_line if frame.f_code.co_filename in files else None)
        run()
        sys.settrace(None)

    return traced


def kills(at_random: int, seed: int = 0, every: int = 1) -> tuple[int, int]:
    """Kills, and those after which something was lost or stayed behind."""
    draw, n_kills, n_wrong = random.Random(seed), 0, 0
    with tempfile.TemporaryDirectory() as folder:
        kept = Kept(Path(folder))
        kept.save(0)

        def look() -> None:
            nonlocal n_wrong
            whole = kept.is_whole()
            kept.save(0)
            n_wrong += not (whole and kept.is_clean() and kept.is_whole())

        line, ended = 1, False
        while not ended:
            how = draw.choice([signal.SIGKILL, signal.SIGKILL, signal.SIGTERM])
            pid = in_child(killed_at_line(line, lambda: kept.save(1), how))
            ended = not os.WIFSIGNALED(os.waitpid(pid, 0)[1])
            n_kills += not ended
            line += every
            look()
        for _ in range(at_random):

            def save_on() -> None:
                while True:
                    kept.save(1), kept.save(0)

            pid = in_child(save_on)
            time.sleep(draw.uniform(0, 0.06))
            os.kill(pid, draw.choice([signal.SIGKILL, signal.SIGKILL, signal.SIGTERM]))
            os.waitpid(pid, 0)
            n_kills += 1
            look()
    return n_kills, n_wrong


def writers(loads: int) -> tuple[int, int]:
    """Loads while two processes save, and those that failed; an error of a writer counts too."""
    n_wrong = 0
    with tempfile.TemporaryDirectory() as folder:
        kept = Kept(Path(folder))
        kept.save(0)

        def save_on(number: int) -> Callable[[], None]:
            def run() -> None:
                try:
                    while True:
                        kept.save(number)
                except BaseException as error:
                    print(f"a writer: {type(error).__name__}: {error}", flush=True)

            return run

        pids = [in_child(save_on(number)) for number in (0, 1)]
        for _ in range(loads):
            try:
                n_wrong += not kept.is_whole()
            except Exception as error:
                print(f"the reader: {type(error).__name__}: {error}")
                n_wrong += 1
        for pid in pids:
            n_wrong += os.waitpid(pid, os.WNOHANG) != (0, 0)
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
    return loads, n_wrong


def _deep(depth: int) -> Any:
    value: Any = 0
    for _ in range(depth):
        value = [value]
    return value


_ODD: list[Any] = [
    *(None, True, False, -1, 0, 1, 3, 1.5, 10**30, -(10**30), 1e308, float("nan"), float("inf")),
    *("", "x", "../../x", "\ud800", [], {}, [1], [[]], _deep(400)),
    *({"type": "function", "name": "f"}, {"type": "function"}, {"type": "Settings"}, {"type": "Gone"}, {"type": []}),
    *({"type": "TopK", "k": 2}, {"type": "TopK", "k": 99}, {"type": "Ramp", "start": 1, "end": 99}),
]
_RAW = [b"", b"{", b"[]", b"null", b"\xff" * 100, b"[" * 100_000, b'{"a":' * 50_000, b"1" * 5000, b"\x00" * 50]


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every container of JSON, and a key in it."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield value, key
        yield from _places(item)


def _other_json(about: dict[str, Any], draw: random.Random) -> None:
    """Changes one place of it."""
    container, key = draw.choice(list(_places(about)))
    match draw.randrange(4):
        case 0:
            del container[key]
        case 1 if isinstance(container, dict):
            container[f"{key}_of_a_newer_version"] = copy.deepcopy(container[key])
        case _:
            container[key] = copy.deepcopy(draw.choice(_ODD))


def _other_tensors(factors: dict[str, Tensor], draw: random.Random) -> bytes:
    """Other factors than those that the JSON speaks of, as a file."""
    key = draw.choice(list(factors))
    factor = factors[key]
    dtypes = [
        torch.float16,
        torch.bfloat16,
        torch.float64,
        torch.int64,
        torch.bool,
        torch.float8_e4m3fn,
        torch.complex64,
    ]
    changed: list[dict[str, Any]] = [
        {key: factor.to(draw.choice(dtypes))},
        {key: factor[:-1].clone()},
        {key: factor.mT.contiguous()},
        {key: factor[0].clone()},
        {key: factor[None]},
        {key: factor[:, :0].clone()},
        {key: torch.cat([factor, factor])},
        {key: torch.full_like(factor, float("nan"))},
        {key: torch.full_like(factor, float("-inf"))},
        {key: None},
        {key: None, f"{key}.other": factor.clone()},
        {"too much": factor.clone()},
        {name: value.double() for name, value in factors.items()},
    ]
    made = factors | draw.choice(changed)
    return safetensors.torch.save({name: value for name, value in made.items() if value is not None})


def _other_bytes(content: bytes, draw: random.Random) -> bytes:
    """No valid safetensors, or with a header that does not fit."""
    length = int.from_bytes(content[:8], "little")
    header, data = json.loads(content[8 : 8 + length]), content[8 + length :]

    def file(header: bytes, length: int | None = None) -> bytes:
        return (len(header) if length is None else length).to_bytes(8, "little") + header + data

    entry = header[draw.choice(list(header))]
    match draw.randrange(9):
        case 0:
            return draw.choice(_RAW)
        case 1:
            return content[: draw.randrange(len(content))]
        case 2:
            return content + bytes(draw.randrange(1, 100))
        case 3:
            return file(json.dumps(header).encode(), draw.choice([0, 1, 2**40, 2**64 - 1]))
        case 4:
            entry["shape"] = draw.choice([[2**40, 2**40], [-1, 2, 3], [], ["x"], None, [5, 4]])
        case 5:
            entry["data_offsets"] = draw.choice([[0, 2**60], [8, 4], [-8, 8], [0, 0], [], "x"])
        case 6:
            entry["dtype"] = draw.choice(["F4", "F8_E8M0", "X", 3, None, "I32"])
        case 7:
            return file(draw.choice(_RAW))
        case _:
            header["__metadata__"] = draw.choice([3, {"a": 1}, {"a": "b"}, [], None])
    return file(json.dumps(header).encode())


def hostile(tries: int, seed: int = 0) -> tuple[int, int, Counter[str]]:
    """Artifacts, those that went wrong, and what became of all."""
    draw, outcomes = random.Random(seed), Counter[str]()
    model = make_model()
    bases = [
        decomposition_of(model, 1),
        decomposition_of(
            model,
            2,
            selection=apd.BatchTopK(apd.Ramp(1.0, 2.0)),
            attribution=apd.IntegratedGradients(steps=2),
            losses=apd.Losses(simplicity=apd.HoldThenDecay(0.3), path=1.0),
            moves=apd.moves.SplitMoves(every=3),
        ),
    ]
    with tempfile.TemporaryDirectory() as name:
        folder, saved = Path(name) / "artifact", []
        for base in bases:
            base.save(folder)
            saved.append(((folder / JSON).read_bytes(), (folder / TENSORS).read_bytes()))
        for _ in range(tries):
            about, content = draw.choice(saved)
            about = json.loads(about)
            match draw.randrange(6):
                case 0 | 1 | 2:
                    _other_json(about, draw)
                case 3 | 4:
                    content = _other_tensors(safetensors.torch.load(content), draw)
                case _:
                    content = _other_bytes(content, draw)
            if "tensors_sha256" in about and draw.random() < 0.9:
                about["tensors_sha256"] = hashlib.sha256(content).hexdigest()
            about["sha256"] = _artifact._digest(about)
            text = draw.choice(_RAW) if draw.random() < 0.03 else json.dumps(about).encode()
            (folder / JSON).write_bytes(text), (folder / TENSORS).write_bytes(content)
            outcome = _outcome(folder, model)
            outcomes[outcome] += 1
            if outcome.startswith("WRONG"):
                (Path("out") / "hostile").mkdir(parents=True, exist_ok=True)
                (Path("out") / "hostile" / f"{outcomes.total()}.json").write_bytes(text)
    n_wrong = sum(number for outcome, number in outcomes.items() if outcome.startswith("WRONG"))
    return tries, n_wrong, outcomes


def _outcome(folder: Path, model: nn.Module) -> str:
    try:
        with warnings.catch_warnings(
            action="ignore", category=apd.errors.ApdWarning
        ):  # that other parameters may differ
            loaded = apd.load(folder, model)
    except apd.ArtifactError:
        return "ArtifactError"
    except Exception as error:
        return f"WRONG: load raises {type(error).__name__}: {error!s:.100}"
    try:
        loaded.summary(X)
        loaded.select(X)
        with loaded.ablate(0):
            model(X)
        return "loads and works"
    except apd.ApdError as error:
        if "not saved" in str(error):  # the artifact says that the user had given a function
            return "loads and asks for a function"
        return f"WRONG: loads, then {type(error).__name__}: {error!s:.100}"
    except Exception as error:
        return f"WRONG: loads, then {type(error).__name__}: {error!s:.100}"


def flips(tries: int, seed: int = 0) -> dict[str, tuple[int, int]]:
    """For a decomposition and for a monitor: bits flipped, and those that loaded as something else."""
    draw, wrong = random.Random(seed), Counter[str]()
    with tempfile.TemporaryDirectory() as name:
        kept = Kept(Path(name))
        kept.save(0)
        files = {"decomposition": [kept.artifact / JSON, kept.artifact / TENSORS], "monitor": [kept.monitor]}
        for kind, places in files.items():
            for _ in range(tries):
                place = draw.choices(places, [place.stat().st_size for place in places])[0]
                content = place.read_bytes()
                flipped = bytearray(content)
                flipped[draw.randrange(len(flipped))] ^= 1 << draw.randrange(8)
                place.write_bytes(flipped)
                try:
                    wrong[kind] += not _loads_as_it_was(kept, kind)
                except apd.ArtifactError:
                    pass
                except Exception as error:
                    print(f"{kind}: {type(error).__name__}: {error}")
                    wrong[kind] += 1
                place.write_bytes(content)
    return {kind: (tries, wrong[kind]) for kind in files}


def _loads_as_it_was(kept: Kept, kind: str) -> bool:
    if kind == "decomposition":
        return same(apd.load(kept.artifact, kept.model), kept.decompositions[0])
    scores = watch.load(kept.monitor, kept.decompositions[0]).score(X)
    expected = kept.monitors[0].score(X)
    return all(torch.equal(getattr(scores, field), value) for field, value in vars(expected).items())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=700, help="at random moments, beside one before each line")
    parser.add_argument("--loads", type=int, default=1000)
    parser.add_argument("--hostile", type=int, default=450)
    parser.add_argument("--flips", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # a process with threads of its own cannot be forked
    tried, wrong = kills(arguments.kills, arguments.seed)
    print(f"kills: {tried}, lost or left behind: {wrong}", flush=True)
    tried, wrong = writers(arguments.loads)
    print(f"loads beside two writers: {tried}, wrong: {wrong}", flush=True)
    tried, wrong, outcomes = hostile(arguments.hostile, arguments.seed)
    print(f"hostile artifacts: {tried}, wrong: {wrong}", flush=True)
    for outcome, number in outcomes.most_common():
        print(f"    {number:4} {outcome}")
    for kind, (tried, wrong) in flips(arguments.flips, arguments.seed).items():
        print(f"bits flipped in a {kind}: {tried}, wrong: {wrong}")


if __name__ == "__main__":
    main()
