"""Which models have components taken out of their own parameters, so that no decomposition of what they were is
applied to what they are."""

import weakref
from dataclasses import dataclass
from weakref import WeakKeyDictionary

from torch import nn

from apd_lens._errors import AlreadyActive
from apd_lens.components._components import ParameterComponents


@dataclass(frozen=True, eq=False)
class Applied:
    """One edit that is in a model.

    Attributes:
        components: the decomposition's, which may be gone.
        ablated: which of them were taken out.
        fingerprints: name -> digest of each decomposed matrix after the edit.
    """

    components: weakref.ref[ParameterComponents]
    ablated: list[int]
    fingerprints: dict[str, str]


# By the model; nothing in here keeps it alive.
_EDITS: WeakKeyDictionary[nn.Module, list[Applied]] = WeakKeyDictionary()


def edits_of(model: nn.Module) -> list[Applied]:
    """The edits that are in a model, the first one first; the list itself, for `apply_edit` to change."""
    return _EDITS.setdefault(model, [])


def check_unedited(model: nn.Module) -> None:
    """Raises AlreadyActive where components are out of the model's own parameters."""
    ablated = [component for edit in _EDITS.get(model, []) for component in edit.ablated]
    if ablated:
        raise AlreadyActive(
            f"Components {ablated} are out of this {type(model).__name__}'s own weights (apply_edit), so it is not the "
            "model that was decomposed: another ablation of them would take them out twice. Undo the edit first, or "
            "edit a copy: apply_edit(copy.deepcopy(model), decomposition, ablate=...)."
        )
