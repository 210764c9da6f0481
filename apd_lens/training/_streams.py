"""Streams: data, who says what is active on it, and what counts there."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from apd_lens._settings import Elsewhere, Settings
from apd_lens.components._factors import Mask
from apd_lens.losses._losses import Losses
from apd_lens.masks._masking import Attributed, Masking, NoneActive
from apd_lens.masks._sampling import path_mask
from apd_lens.passes._output import OutputFn, default_output


@dataclass(frozen=True, eq=False)
class Mix:
    """What the model runs on in one pass of a step: how much of each component is on, and of the rest W − Σ P.

    Attributes:
        n_active: number of True in `on`, if that is known.
    """

    on: Mask
    rest: Tensor | float = 0.0
    n_active: int | None = None


# The masks of active components, how many are active, the losses, draws -> name of a loss term -> its pass.
Mixes = Callable[[Tensor, int | None, Losses, torch.Generator], dict[str, Mix]]


def of_components(active: Tensor, n_active: int | None, losses: Losses, draws: torch.Generator) -> dict[str, Mix]:
    """The active components alone; and with a random part of each other one."""
    mixes = {"minimality": Mix(active, n_active=n_active)}
    return mixes | ({"path": Mix(path_mask(active, draws))} if losses.path else {})


def of_components_and_rest(
    active: Tensor, n_active: int | None, losses: Losses, draws: torch.Generator
) -> dict[str, Mix]:
    """The active components alone; and with a random part of each other one and of the rest."""
    mixes = of_components(active, n_active, losses, draws)
    if "path" in mixes:
        rest = torch.rand(len(active), generator=draws, device=active.device, dtype=torch.float32)
        mixes["path"] = replace(mixes["path"], rest=rest)
    return mixes


def of_the_rest(active: Tensor, n_active: int | None, losses: Losses, draws: torch.Generator) -> dict[str, Mix]:
    """The rest and the active components; in half of the examples a random part of each other one."""
    return {"minimality": Mix(path_mask(active, draws, bare=0.5), rest=1.0)}


@dataclass(frozen=True)
class Stream:
    """What is asked of the components on one kind of data.

    Attributes:
        masking: says which components are active.
        losses: what counts, and how much.
        name: stands in front of the names of its loss terms; "" for the first one.
        mixes: what the model runs on.
        output: picks the explained output from what the model returns.
    """

    masking: Masking
    losses: Losses
    name: str = ""
    mixes: Mixes = of_components
    output: OutputFn = default_output

    def named(self, term: str) -> str:
        """The name of a loss term of this stream."""
        return f"{self.name} {term}".lstrip()

    def after(self, minimality: Tensor, progress: float, steps: int) -> "Stream":
        """The stream of the next step, see `Masking.after`."""
        return self.with_masking(self.masking.after(minimality, progress, steps))

    def with_masking(self, masking: Masking) -> "Stream":
        """The same stream with a later form of its masking."""
        return replace(self, masking=masking)


def first_stream(settings: Settings, output: OutputFn) -> Stream:
    """The data that are taken apart. Where there are others, the rest is off on it."""
    mixes = of_components if settings.elsewhere is None else of_components_and_rest
    return Stream(settings.masking, settings.losses, mixes=mixes, output=output)


def stream_of_others(settings: Settings, elsewhere: Elsewhere, output: OutputFn) -> Stream:
    """The data on which the rest is on, and components must not matter. Where the output is picked at some positions,
    all positions count there."""
    losses = replace(
        settings.losses,
        faithfulness=0.0,
        minimality=elsewhere.weight,
        simplicity=elsewhere.simplicity,
        path=0.0,
        hidden=0.0,
        hidden_at=(),
    )
    attribution = elsewhere.attribution or settings.attribution
    if elsewhere.selection is None:
        masking: Masking = NoneActive(attribution, settings.selection)
    else:
        masking = Attributed(attribution, elsewhere.selection)
    output = elsewhere.output or getattr(output, "everywhere", output)
    return Stream(masking, losses, "others", of_the_rest, output)
