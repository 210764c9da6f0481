"""Streams: data, who says what is active on it, and what counts there."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from apd_lens._processes import n_processes, own
from apd_lens._settings import Elsewhere, Settings
from apd_lens.components._components import ParameterComponents
from apd_lens.losses._losses import Losses
from apd_lens.masks._masking import Attributed, Masking, Masks, NoneActive
from apd_lens.masks._sampling import path_mask
from apd_lens.passes._output import OutputFn, default_output, everywhere
from apd_lens.passes._replace import Mixture

# The components, their masks on the whole batch, the losses, draws, the shares of an attack -> name of a loss term ->
# what the model runs on for it, on this process's part.
Mixtures = Callable[[ParameterComponents, Masks, Losses, torch.Generator, Tensor | None], dict[str, Mixture]]


def of_components(
    components: ParameterComponents, masks: Masks, losses: Losses, draws: torch.Generator, shares: Tensor | None
) -> dict[str, Mixture]:
    """The active components alone; and with a random part of each other one, or the part that does most harm."""
    on, n_active = masks.at_least, masks.n_active if n_processes() == 1 else None
    mixtures = {"minimality": Mixture(components, own(on), n_active=n_active)}
    if losses.path:
        mixtures["path"] = Mixture(components, own(path_mask(on, draws)))
    if losses.completeness:
        off = 1 - on.to(torch.float32)
        amounts = torch.rand(off.shape, generator=draws, dtype=off.dtype, device=off.device)
        mixtures["completeness"] = Mixture(components, own(off * amounts))
    if shares is not None:
        on = on.to(shares.dtype)
        mixtures["attack"] = Mixture(components, own(on + (1 - on) * shares[..., :-1]))
    return mixtures


def of_components_and_rest(
    components: ParameterComponents, masks: Masks, losses: Losses, draws: torch.Generator, shares: Tensor | None
) -> dict[str, Mixture]:
    """The active components alone; and with a random part of each other one and of the rest, or with the part that
    does most harm."""
    mixtures = of_components(components, masks, losses, draws, shares)
    if "path" in mixtures:
        on = masks.at_least
        rest = torch.rand(len(on), generator=draws, device=on.device, dtype=torch.float32)
        mixtures["path"] = replace(mixtures["path"], rest=own(rest))
    if shares is not None:
        mixtures["attack"] = replace(mixtures["attack"], rest=own(shares[..., -1]))
    return mixtures


def of_the_rest(
    components: ParameterComponents, masks: Masks, losses: Losses, draws: torch.Generator, shares: Tensor | None
) -> dict[str, Mixture]:
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
    mixtures = of_components if settings.elsewhere is None else of_components_and_rest
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
        masking = settings.masking
    elif elsewhere.selection is None:
        masking: Masking = NoneActive(attribution, settings.selection)
    else:
        masking = Attributed(attribution, elsewhere.selection)
    return Stream(masking, losses, "others", of_the_rest, elsewhere.output or everywhere(output))
