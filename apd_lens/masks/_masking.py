"""Who says what is active: the protocol of maskings, and the one by attributions."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from apd_lens._checks import check_fields
from apd_lens._codec import saved
from apd_lens._processes import gathered
from apd_lens.attribution._attribution import Attribution
from apd_lens.attribution._gradient import GradientAttribution
from apd_lens.components._components import ParameterComponents
from apd_lens.components._factors import Mask
from apd_lens.components._learned import Learned
from apd_lens.data._points import padded
from apd_lens.host._matrix import Use
from apd_lens.losses._losses import Losses
from apd_lens.masks._selection import BatchTopK, Selection
from apd_lens.passes._watch import WatchedPass


@dataclass(frozen=True, eq=False)
class Masks:
    """What a masking says of a batch in a training step; of several processes, each says it of the whole batch.

    Attributes:
        attributions: without a graph; what moves look at.
        importance: has the place of the mask s_c in simplicity; in a graph where the masking learns through it.
        active: which components a sparse pass runs on; None where nothing says it.
        n_active: number of True in `active`, where it is known without asking the device.
        on: how much of each component a sparse pass runs on at least, in a graph, where that is no matter of yes or no.
        sparsity: what `Losses.sparsity` is the coefficient of; None where the masking has no such loss.
        minimality: the masking's own minimality loss, in the place of that of a sparse pass; None for a sparse pass.
    """

    attributions: Float[Tensor, "batch *pos C"]
    importance: Mask
    active: Bool[Tensor, "batch *pos C"] | None
    n_active: int | None = None
    minimality: Float[Tensor, ""] | None = None
    on: Float[Tensor, "batch *pos C"] | None = None
    sparsity: Float[Tensor, ""] | None = None

    @property
    def at_least(self) -> Mask:
        """How much of each component a sparse pass runs on; of the others, any part may be on."""
        on = self.active if self.on is None else self.on
        assert on is not None
        return on


@runtime_checkable
class Masking(Protocol):
    """Says which components are active on a batch.

    Attributes:
        attribution: how much each component matters.
        selection: which components are active, after the training.
        says_what_is_active: whether a step has a mask of active components, which some moves need.
        needs_gradients: whether the masks of a batch need the graph of the target's pass.
        runs_sparse_passes: whether minimality is of a sparse pass, and not `Masks.minimality`.
    """

    @property
    def attribution(self) -> Attribution: ...

    @property
    def selection(self) -> Selection: ...

    @property
    def says_what_is_active(self) -> bool: ...

    @property
    def needs_gradients(self) -> bool: ...

    @property
    def runs_sparse_passes(self) -> bool: ...

    def check(self, n_components: int, losses: Losses) -> None:
        """Raises InvalidSetting for what cannot work with so many components, or with these losses."""
        ...

    def learned(
        self, components: ParameterComponents, uses: Sequence[Use], generator: torch.Generator | None
    ) -> Learned | None:
        """What is trained with the components, `ParameterComponents.gates`; None where nothing is.

        Args:
            uses: of the decomposed matrices.
            generator: on the CPU; None for the shapes alone, with tensors on the device "meta".
        """
        ...

    def after(self, minimality: Tensor, progress: float, steps: int) -> "Masking":
        """The masking of the next step out of so many, when `progress`, a share of them, is done."""
        ...

    def masks(
        self,
        watched: WatchedPass,
        components: ParameterComponents,
        progress: float,
        scale: Float[Tensor, ""] | float,
        generator: torch.Generator | None = None,
    ) -> Masks:
        """The masks of a training step.

        Of several processes each has a pass over its part, `watched`; the whole batch is `watched.run.inputs.of_all`.
        `apd_lens.masks.gathered(values, n_examples)` brings the parts together.

        Args:
            progress: the share of the steps that is done.
            scale: what squared differences of outputs are divided by.
        """
        ...


@saved
@dataclass(frozen=True)
class Attributed:
    """The components with the largest attributions are active.

    Attributes:
        attribution: how much each component matters.
        selection: from attributions to the mask.
    """

    attribution: Attribution = field(default_factory=GradientAttribution)
    selection: Selection = field(default_factory=lambda: BatchTopK(k=1.0))

    def __post_init__(self) -> None:
        check_fields(self)

    @property
    def says_what_is_active(self) -> bool:
        return True

    @property
    def needs_gradients(self) -> bool:
        return True

    @property
    def runs_sparse_passes(self) -> bool:
        return True

    def check(self, n_components: int, losses: Losses) -> None:
        self.selection.check(n_components)

    def learned(self, components: ParameterComponents, uses: Sequence[Use], generator: torch.Generator | None) -> None:
        return None

    def after(self, minimality: Tensor, progress: float, steps: int) -> "Attributed":
        selection = self.selection.after(minimality, progress, steps)
        return self if selection is self.selection else replace(self, selection=selection)

    def masks(
        self,
        watched: WatchedPass,
        components: ParameterComponents,
        progress: float,
        scale: Float[Tensor, ""] | float,
        generator: torch.Generator | None = None,
    ) -> Masks:
        inputs = watched.run.inputs.of_all
        selection = self.selection.at(progress, inputs.batch)
        attributions = self.attribution(watched, components, selection.granularity, generator)
        attributions = gathered(attributions, inputs.n_examples)
        active = selection(attributions, inputs.valid)
        # Known without asking the device, but for padding.
        n_active = selection.n_active(active[..., 0].numel()) if padded(active, inputs.valid) is None else None
        return Masks(attributions, active, active, n_active)


@dataclass(frozen=True)
class NoneActive:
    """No component is active on any data point."""

    attribution: Attribution
    selection: Selection

    @property
    def says_what_is_active(self) -> bool:
        return True

    @property
    def needs_gradients(self) -> bool:
        return False

    @property
    def runs_sparse_passes(self) -> bool:
        return True

    def check(self, n_components: int, losses: Losses) -> None: ...

    def learned(self, components: ParameterComponents, uses: Sequence[Use], generator: torch.Generator | None) -> None:
        return None

    def after(self, minimality: Tensor, progress: float, steps: int) -> "NoneActive":
        return self

    def masks(
        self,
        watched: WatchedPass,
        components: ParameterComponents,
        progress: float,
        scale: Float[Tensor, ""] | float,
        generator: torch.Generator | None = None,
    ) -> Masks:
        shape = watched.run.inputs.of_all.n_examples, components.n_components
        nothing = torch.zeros(shape, dtype=next(components.parameters()).dtype, device=watched.output.device)
        return Masks(nothing, nothing.bool(), nothing.bool(), 0)


def masking_of(selection: Selection, attribution: Attribution) -> Masking:
    """The masking that a selection and an attribution are a shorthand for; `Lp` is one itself."""
    if isinstance(selection, Masking):
        return replace(selection, attribution=attribution)  # type: ignore[type-var]
    return Attributed(attribution, selection)
