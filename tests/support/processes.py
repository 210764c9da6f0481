"""Several processes that train together, as a launcher starts them, and what they are asked to do."""

import multiprocessing
import os
import pickle
import shutil
import tempfile
import time
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from support.outside import METHOD, PRELOADED
from support.toy_models import ResidualMLP
from torch import Tensor, nn

import apd_lens as apd
from apd_lens._codec import encode_settings
from apd_lens._settings import Elsewhere
from apd_lens.masks._selection import Needed
from apd_lens.training import _state

FEW = {"n_components": 6, "rank": 2, "progress": False}
HIDDEN = "layers.0.act"


def together(n: int, work: Callable[[int], Any], patience: float = 500) -> list[Any]:
    """What work(rank) returns in each of n processes: the error, if it raises one; None of one that ended.

    Args:
        patience: seconds for which processes wait for each other, and we for them.
    """
    context = multiprocessing.get_context(METHOD)
    context.set_forkserver_preload(PRELOADED)
    with tempfile.TemporaryDirectory() as folder:
        started = [context.Process(target=_work, args=(rank, n, work, folder, patience)) for rank in range(n)]
        for process in started:
            process.start()
        for process in started:
            process.join(patience)
            process.kill()
            process.join()
        files = [Path(folder) / str(rank) for rank in range(n)]
        return [pickle.loads(file.read_bytes()) if file.exists() else None for file in files]


def _work(rank: int, n: int, work: Callable[[int], Any], folder: str, patience: float) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=n, timeout=timedelta(seconds=patience)
    )
    try:
        result = work(rank)
    except BaseException as error:
        result = error
    unfinished = Path(folder) / f"{rank}.unfinished"
    unfinished.write_bytes(pickle.dumps(result))
    unfinished.rename(Path(folder) / str(rank))


class Padded(nn.Module):
    """Each position reads the mean of the tokens before it that are no padding."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.out = nn.Embedding(9, 6), nn.Linear(6, 4)

    def forward(self, tokens: Tensor, attention_mask: Tensor) -> Tensor:
        r = self.embed(tokens) * attention_mask[..., None]
        return self.out(torch.tanh(r + r.cumsum(1) / attention_mask.cumsum(1).clamp_min(1)[..., None]))


def mlp(seed: int = 0) -> ResidualMLP:
    torch.manual_seed(seed)
    return ResidualMLP(5, 6, 8, 1).double()


def data(n: int = 10, seed: int = 1) -> Tensor:
    x = torch.rand(n, 5, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return x * (torch.rand(n, 5, generator=torch.Generator().manual_seed(seed + 1)) < 0.4)


def active_features(batch: Tensor) -> float:
    return max(0.5, (batch != 0).double().sum(1).mean().item())


def largest_error(ours: Tensor, theirs: Tensor) -> Tensor:
    return (ours - theirs).abs().amax(-1)


def trained(
    model: nn.Module | None = None, batches: Any = None, steps: int = 8, end_at: int | None = None, **options: Any
) -> dict[str, Any]:
    """Factors and reports of a training; it may be ended behind a step."""
    infos = []

    def on_step(step: int, info: apd.training.StepInfo) -> None:
        infos.append(info)
        if step + 1 == end_at:
            raise Ended

    optimization = {"lr": 2e-2, "steps": steps, "start": "random"} | options.pop("optimization", {})
    decomposition = apd.decompose(
        model or mlp(),
        batches or (lambda step: data(10, step)),
        **{**FEW, "moves": None, **options},
        optimization=apd.Optimization(**optimization),
        on_step=on_step,
    )
    return {
        "factors": [factor.detach() for factor in decomposition.components.whole().parameters()],
        "k": [info.k for info in infos],
        "terms": [{name: term.item() for name, term in info.terms.items()} for info in infos],
        "moves": sum(info.moves for info in infos),
        "selection": encode_settings(decomposition.settings.selection),
    }


def padded() -> dict[str, Any]:
    """Of some parts all is padding."""
    torch.manual_seed(0)
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [1, 1, 1, 0], [0, 0, 0, 0], [0, 0, 0, 0], [1, 0, 0, 0]])
    batches = [{"tokens": torch.randint(9, (6, 4)), "attention_mask": mask} for _ in range(3)]
    selection = apd.BatchTopK(Needed(hold=0.0), "position", 0.1)
    return trained(Padded().double(), batches, selection=selection)


def moved(moves: Any) -> dict[str, Any]:
    """On a linear layer, and data that use about one row of it each."""
    torch.manual_seed(0)
    model = nn.Linear(5, 5, bias=False).double()
    noise = torch.randn(46, 5, dtype=torch.float64) / 10
    with torch.no_grad():
        model.weight.copy_(torch.diag(torch.linspace(1, 2, 5)) + noise[:5])
    batch = torch.eye(5, dtype=torch.float64)[torch.arange(41) % 5] * torch.linspace(0.5, 1, 41)[:, None] + noise[5:]
    options = {"selection": apd.BatchTopK(1.0), "moves": moves, "optimization": {"scaled": False}}
    return trained(model, [batch], **options)


CASES: dict[str, Callable[[], dict[str, Any]]] = {
    "the defaults, k found": trained,
    "top-k, the paper's losses": lambda: trained(
        selection=apd.TopK(2), losses=apd.Losses(normalization="paper", simplicity=0.1)
    ),
    "k of each batch, batches that come again": lambda: trained(
        batches=[data(9, 1), data(9, 3)], selection=apd.BatchTopK(active_features)
    ),
    "Lp": lambda: trained(selection=apd.Lp(0.9, threshold=0.1), losses=apd.Losses(path=0.0)),
    "Lp at positions": lambda: trained(
        Padded().double(),
        [{"tokens": torch.arange(24).reshape(6, 4) % 9, "attention_mask": torch.ones(6, 4).tril(1)}],
        selection=apd.Lp(1.0, "position"),
        losses=apd.Losses(path=0.0),
    ),
    "gates, taught and then alone": lambda: trained(
        masks=apd.Gates(hidden=6, teacher=apd.Attributed(selection=apd.BatchTopK(1.5)))
    ),
    "gates, attacked": lambda: trained(
        masks=apd.Gates(hidden=6, teacher=None, gamma=0.5), losses=apd.Losses(attack=0.5, completeness=1.0)
    ),
    "other data": lambda: trained(
        others=lambda step: data(7, 100 + step), elsewhere=Elsewhere(selection=apd.TopK(1), simplicity=0.1)
    ),
    "other data, none active": lambda: trained(others=[data(8, 50)]),
    "KL from projections, hidden activations": lambda: trained(
        losses=apd.Losses(distance="kl", hidden=1.0, hidden_at=(HIDDEN,)), attribution=apd.GradientAttribution(2)
    ),
    "a distance of the user's, ablations": lambda: trained(
        losses=apd.Losses(distance=largest_error), attribution=apd.AblationAttribution()
    ),
    "padding at positions": padded,
    "cluster moves": lambda: moved(apd.moves.ClusterMoves(every=2, merge_above=0.3)),
    "split moves": lambda: moved(apd.moves.SplitMoves(every=2, until=1.0)),
    "division moves": lambda: moved(apd.moves.DivisionMoves(every=2)),
    "a start fitted to data": lambda: trained(
        batches=[data(9, 1), data(9, 3)], optimization={"start": "data", "unit_norm": True}
    ),
}


# With components, gradients and moments divided over the processes.
SHARDED = {
    f"{name}, sharded": name
    for name in ("Lp", "other data", "cluster moves", "gates, attacked", "a start fitted to data")
}


def result(case: str, rank: int) -> dict[str, Any]:
    torch.manual_seed(0)
    if case in CASES:
        return CASES[case]()
    with patch.object(apd, "decompose", partial(apd.decompose, sharded=True)):
        return CASES[SHARDED[case]]()


# --- what is gone on with


class Ended(Exception):
    """A training is to stop here."""


def saved_training(folder: Path, end_at: int | None = None, sharded: bool = False) -> dict[str, Any] | None:
    """One with moves before and after its half, from its newest checkpoint on; or ended by an error behind a step."""
    durable = {"checkpoint": apd.Checkpoint(folder, every=99), "resume": folder}
    try:
        return trained(moves=apd.moves.SplitMoves(every=3, until=1.0), end_at=end_at, sharded=sharded, **durable)
    except Ended:
        return None


def begin(folder: Path, rank: int) -> None:
    saved_training(folder / "whole", end_at=4)
    saved_training(folder / "sharded", end_at=4, sharded=True)


def go_on(folder: Path, rank: int) -> list[Any]:
    """Goes on with copies of trainings, begins others, and saves a result."""
    found = []
    for of, sharded in [
        ("of one/whole", False),
        ("of one/whole", True),
        ("of four/whole", False),
        ("of four/sharded", True),
    ]:
        copy = folder / f"{of.replace('/', ' ')}, {sharded}, {rank}"
        shutil.copytree(folder / of, copy)
        found.append(saved_training(copy, sharded=sharded))
    begin(folder / "of two", rank)
    decomposition = apd.decompose(mlp(), [data()], **FEW, moves=None, optimization=apd.Optimization(2), sharded=True)
    decomposition.save(folder / "result")
    return [found, list(decomposition.components.whole().parameters()), str(decomposition)]


def finish(folder: Path, rank: int) -> list[Any]:
    """One that nothing has ended, and those that two have begun."""
    with pytest.warns(apd.errors.ApdWarning, match="processes: then 2, now 1"):
        return [saved_training(folder / name) for name in ("uninterrupted", "of two/whole", "of two/sharded")]


# --- what goes wrong


def stops(rank: int) -> None:
    raise ValueError("no more")


def in_the_second(action: Callable[[int], Any]) -> Callable[..., None]:
    def on_step(step: int, info: apd.training.StepInfo) -> None:
        if step == 2 and torch.distributed.get_rank() == 1:
            action(step)

    return on_step


def late(batches: Any) -> dict[str, Any]:
    """Looks at numbers a step late, as on a GPU."""
    with patch.object(_state, "on_gpu", lambda device: True):
        return trained(batches=batches)


def failing(rank: int) -> dict[str, Any]:
    """The error of each training, its notes, and then the result of one that nothing is wrong with."""
    with_nan = data(10)
    with_nan[-1] = torch.nan  # in the part of the last one
    trainings: dict[str, Callable[[], Any]] = {
        "NaN": lambda: trained(batches=lambda step: with_nan if step == 3 else data(10)),
        "NaN, looked at late": lambda: late(lambda step: with_nan if step == 3 else data(10)),
        "different batches": lambda: trained(batches=[data(10, seed=rank)]),
        "another order": lambda: trained(batches=[data(10).roll(rank, 0)]),
        "different sizes": lambda: trained(batches=[data(10 + rank)]),
        "different settings": lambda: trained(selection=apd.TopK(1 + rank)),
        "different models": lambda: trained(mlp(seed=rank)),
        "few examples": lambda: trained(batches=[data(1)]),
        "an error in one": lambda: apd.decompose(
            mlp(), [data()], **FEW, moves=None, on_step=in_the_second(stops), optimization=apd.Optimization(steps=3)
        ),
        "a wrong call in one": lambda: trained(selection=apd.TopK(100 if rank else 1)),
    }
    errors = {}
    for name, training in trainings.items():
        try:
            training()
        except Exception as error:
            notes = getattr(error, "__notes__", [])
            errors[name] = (type(error), str(error), hasattr(error, "decomposition"), notes)
    return errors | {"after": trained()}


def dying(folder: Path, sharded: bool, rank: int) -> tuple[float, str, list[str]]:
    """Seconds until another one hears of it, the message, and its notes."""
    ended = 0.0

    def on_step(step: int, info: apd.training.StepInfo) -> None:
        nonlocal ended
        ended = time.monotonic()
        in_the_second(lambda _: os._exit(3))(step, info)

    try:
        options = {"sharded": sharded, "checkpoint": apd.Checkpoint(folder, every=2)}
        apd.decompose(mlp(), [data()], **FEW, moves=None, on_step=on_step, **options)
    except apd.ApdError as error:
        return time.monotonic() - ended, str(error), error.__notes__
    raise AssertionError("heard nothing")
