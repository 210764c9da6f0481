"""Taking components out of a model's own parameters, in place, and putting them back."""

import weakref
from typing import Any

import torch
from torch import Tensor

from apd_lens._decomposition import (
    Chosen,
    Decomposition,
    about_matrices,
    decomposed_apart,
    edited_value,
    fitted,
    numbers_of,
)
from apd_lens._edited import Applied, edits_of
from apd_lens._errors import AlreadyActive, ArtifactError, InvalidSetting, UnsupportedModel
from apd_lens._patch import is_patched
from apd_lens._target import TargetModel, WeightMatrix
from apd_lens._wrap import wrap


def apply_edit(model: Any, decomposition: Decomposition, ablate: Chosen) -> "Edit":
    """Takes components out of a model's own parameters, in place: every decomposed matrix becomes W − Σ P_c.

    The values are those of `decomposition.edited_state_dict(ablate)`. Parameters stay the same objects, of the same
    dtype, so optimizers, hooks and ties go on working. All or nothing: after an error or an interrupt the model is bit
    for bit what it was. For good, or until `undo()` of what is returned, which keeps a copy of the decomposed
    matrices for that; `with apply_edit(...):` undoes it at the end of the block.

    Edits of one decomposition can be stacked, and are undone in reverse order. While the decomposition's own model is
    edited, its contexts, attributions and `edited_state_dict` raise AlreadyActive.

    Args:
        model: the model that was decomposed, or a copy with the same weights.

    Raises:
        ArtifactError: a matrix of the model has other weights than the one that was decomposed, or is missing.
        InvalidSetting: no such component, or one that is out already.
        UnsupportedModel: a matrix is tied in the model but was decomposed apart from what it is tied to.
        AlreadyActive: inside a context of a decomposition.
    """
    chosen = numbers_of(ablate, decomposition.components)
    matrices = about_matrices(decomposition)
    model = wrap(model).model
    earlier = [edit for edit in edits_of(model) if edit.components() is decomposition.components]
    if earlier:
        for name, digest in earlier[-1].fingerprints.items():
            matrices[name]["fingerprint"] = digest
    target, difference = fitted(model, matrices)
    if difference is not None:
        raise ArtifactError(
            f"Components can be taken out of the model that was decomposed, or of a copy with the same weights, but "
            f"{difference}."
        )
    _check_can_be_edited(target, [component for edit in earlier for component in edit.ablated], chosen, list(matrices))
    return _applied(target, decomposition, chosen)


def _check_can_be_edited(target: TargetModel, out: list[int], chosen: list[int], names: list[str]) -> None:
    if is_patched(target.model):
        raise AlreadyActive(
            "This model is inside a sparse, ablate or only context (or a decompose run). Leave it before editing."
        )
    if again := sorted(set(out) & set(chosen)):
        raise InvalidSetting(f"Components {again} are out of this model already; out are {out}.")
    for name in decomposed_apart(target, names):
        raise UnsupportedModel(
            f"{name} was decomposed apart from what it is tied to, but in this model they are the same numbers in "
            "memory, so an edit would change both. Load edited_state_dict(ablate=...) into a model in which they "
            "are separate parameters."
        )


def _applied(target: TargetModel, decomposition: Decomposition, chosen: list[int]) -> "Edit":
    components = decomposition.components
    edits, kept, record = edits_of(target.model), {}, None
    try:
        for name in components.names if chosen else ():
            value = edited_value(target, components, name, chosen)
            kept[name] = [place.clone() for place in _places(target, name)]
            _put(target, name, _stored(target, name, value))
        digests = {name: target.weights[name].fingerprint() for name in components.names}
        record = Applied(weakref.ref(components), chosen, digests)
        edits.append(record)
        return Edit(target, record, kept)
    except BaseException:
        for name, values in kept.items():
            _put(target, name, values)
        if record in edits:
            edits.remove(record)
        raise


class Edit:
    """Components that are out of a model's own parameters; made by `apply_edit`. A context that undoes itself.

    Attributes:
        model: the user's, edited.
        ablated: the components that this edit took out.
    """

    def __init__(self, target: TargetModel, record: Applied, originals: dict[str, list[Tensor]]):
        self.model = target.model
        self.ablated = record.ablated
        self._target = target
        self._record = record
        self._originals = originals

    @property
    def undone(self) -> bool:
        """Whether the components are back."""
        return self._record not in edits_of(self.model)

    def undo(self, *, force: bool = False) -> None:
        """Puts the matrices back, bit for bit; an interrupt is raised when that is done.

        Args:
            force: also if the edited matrices were changed since, whose changes are lost.

        Raises:
            AlreadyActive: undone already, or a later edit of the model is not.
            ArtifactError: a matrix was changed since, by training perhaps, and no `force`.
        """
        edits = edits_of(self.model)
        if self._record not in edits:
            raise AlreadyActive(f"{self} was undone already.")
        if edits[-1] is not self._record:
            raise AlreadyActive(
                f"Components {edits[-1].ablated} were taken out after {self.ablated}. Undo that edit first: edits are "
                "undone in reverse order."
            )
        for name in self._originals if not force else ():
            if self._target.weights[name].fingerprint() != self._record.fingerprints[name]:
                raise ArtifactError(
                    f"{name} was changed, or moved to another dtype, since components {self.ablated} were taken out "
                    "of it. undo(force=True) puts back what it was before, and that change is lost."
                )
        try:
            self._restore()
        except BaseException:
            self._restore()
            raise

    def _restore(self) -> None:
        for name, values in self._originals.items():
            _put(self._target, name, values)
        edits = edits_of(self.model)
        if self._record in edits:
            edits.remove(self._record)

    def __enter__(self) -> "Edit":
        return self

    def __exit__(self, *error: object) -> None:
        if not self.undone:
            self.undo()

    def __repr__(self) -> str:
        state = "undone" if self.undone else "taken out"
        return f"Edit of {type(self.model).__name__}: components {self.ablated} {state}"


def _places(target: TargetModel, name: str) -> list[Tensor]:
    """The host's own tensors that hold a matrix, under all its names; several may be the same memory.

    Not all are in the state dict: where a TransformerBridge was copied, what it multiplies by is not.
    """
    matrix, live = target.weights[name], target.model.state_dict()
    keys = matrix.state(matrix.value())
    return [*(live[key] for key in keys), *(place for place, _ in _parameters(matrix, matrix.value()))]


def _stored(target: TargetModel, name: str, value: Tensor) -> list[Tensor]:
    """What `_places` hold if the matrix has this value."""
    matrix = target.weights[name]
    return [*matrix.state(value).values(), *(stored for _, stored in _parameters(matrix, value))]


def _parameters(matrix: WeightMatrix, value: Tensor) -> list[tuple[Tensor, Tensor]]:
    """The parameters of a matrix, its bias and what it is tied to, each with what it holds if the matrix has this
    value."""
    if matrix.bias is None:
        pairs = [(matrix.parameter, matrix.to_host(value))]
    else:
        bias = matrix.bias_parameter
        pairs = [(bias, value[-1].reshape(bias.shape)), (matrix.parameter, matrix.to_host(value[:-1]))]
    for other, transposed in matrix.tied:
        pairs += _parameters(other, value.mT if transposed else value)
    return pairs


@torch.inference_mode()  # in which parameters may be written to, also those that were made in inference mode
def _put(target: TargetModel, name: str, values: list[Tensor]) -> None:
    for place, value in zip(_places(target, name), values, strict=True):
        place.copy_(value)
