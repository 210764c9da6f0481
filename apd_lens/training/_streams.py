"""Streams: data, who says what is active on it, and what counts there."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from apd_lens._processes import n_processes, own
from apd_lens._settings import Elsewhere, Settings
from apd_lens.components._components import ParameterComponents
from apd_lens.host._adapter import Intercept
from apd_lens.losses._losses import Losses
from apd_lens.masks._masking import Attributed, Masking, Masks, NoneActive
from apd_lens.masks._sampling import path_mask
from apd_lens.passes._output import OutputFn, default_output, everywhere
from apd_lens.passes._replace import Mixture
from apd_lens.training._parts import PARTS, attacked, inactive

# The components, their masks on the whole batch, the losses, draws, the shares of an attack -> name of a loss term ->
# what the model runs on for it, on this process's part.
Mixtures = Callable[[ParameterComponents, Masks, Losses, torch.Generator, Tensor | None], dict[str, Intercept]]


def of_components(
    components: ParameterComponents,
    masks: Masks,
    losses: Losses,
    draws: torch.Generator,
    shares: Tensor | None,
    with_rest: bool = False,
) -> dict[str, Intercept]:
    """The active components alone; and with a part of each inactive one, and of the rest where there is one."""
    on, n_active = masks.at_least, masks.n_active if n_processes() == 1 else None
    mixtures: dict[str, Intercept] = {"minimality": Mixture(components, own(on), n_active=n_active)}
    if losses.path:
        mixtures["path"] = PARTS[losses.parts](components, on, draws, with_rest)
    if losses.completeness:
        mixtures["completeness"] = inactive(components, on, draws)
    if shares is not None:
        mixtures["attack"] = attacked(components, on, shares, with_rest)
    return mixtures


def of_the_rest(
    components: ParameterComponents, masks: Masks, losses: Losses, draws: torch.Generator, shares: Tensor | None
) -> dict[str, Intercept]:
    """The rest and the active components; in half of the examples a random part of each other one."""
    return {"minimality": Mixture(components, own(path_mask(masks.at_least, draws, bare=0.5)), rest=1.0)}


@dataclass(frozen=True)
class Stream:
    """What is asked of the components on one kind of data.

    Attributes:
        masking: says which components are active.
        losses: what counts, and how much.
        name: stands in front of the names of its loss terms; "" for the first one.
        mixtures: what the model runs on.
        output: picks the explained output from what the model returns.
    """

    masking: Masking
    losses: Losses
    name: str = ""
    mixtures: Mixtures = of_components
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
    mixtures = of_components if settings.elsewhere is None else partial(of_components, with_rest=True)
    return Stream(settings.masking, settings.losses, mixtures=mixtures, output=output)


def stream_of_others(settings: Settings, elsewhere: Elsewhere, output: OutputFn, gated: bool = False) -> Stream:
    """The data on which the rest is on, and components must not matter. Where the output is picked at some positions,
    all positions count there.

    Args:
        gated: whether gates say what is active there too, and learn from it.
    """
    losses = replace(
        settings.losses,
        faithfulness=0.0,
        minimality=elsewhere.weight,
        simplicity=elsewhere.simplicity,
        path=0.0,
        completeness=0.0,
        attack=0.0,
        hidden=0.0,
        hidden_at=(),
    )
    attribution = elsewhere.attribution or settings.attribution
    if gated and elsewhere.selection is None:
        masking: Masking = settings.masking.after(torch.zeros(()), 1.0, 1)  # as at the end: no teacher knows these data
    elif elsewhere.selection is None:
        masking = NoneActive(attribution, settings.selection)
    else:
        masking = Attributed(attribution, elsewhere.selection)
    return Stream(masking, losses, "others", of_the_rest, elsewhere.output or everywhere(output))
