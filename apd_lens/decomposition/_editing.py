"""Taking components out of a model's own parameters, in place, and putting them back."""

import io
import weakref
from typing import Any

import torch
from torch import Tensor

from apd_lens._block import Block, Part
from apd_lens._errors import AlreadyActive, ApdError, ArtifactError, InvalidSetting, UnsupportedModel
from apd_lens.decomposition._decomposition import (
    Chosen,
    Decomposition,
    about_matrices,
    decomposed_apart,
    edited_value,
    indices_of,
)
from apd_lens.decomposition._edited import Applied, edits_of
from apd_lens.decomposition._load import fitted
from apd_lens.host._matrix import WeightMatrix
from apd_lens.host._patch import is_patched
from apd_lens.host._target import TargetModel
from apd_lens.host._wrap import wrap


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
    chosen = indices_of(ablate, decomposition.components)
    matrices = about_matrices(decomposition)
    model = wrap(model).model
    earlier = [edit for edit in edits_of(model) if edit.components() is decomposition.components]
    if earlier:
        for name, digest in earlier[-1].fingerprints.items():
            matrices[name]["fingerprint"] = digest
    target, _, difference = fitted(model, matrices, other_names=False)
    if difference is not None:
        raise ArtifactError(
            f"Components can be taken out of the model that was decomposed, or of a copy with the same weights, but "
            f"{difference}."
        )
    _check_can_be_edited(target, [component for edit in earlier for component in edit.ablated], chosen, list(matrices))
    return Edit(_TakenOut(target, decomposition, chosen)).start()


def _check_can_be_edited(target: TargetModel, out: list[int], chosen: list[int], names: list[str]) -> None:
    if again := sorted(set(out) & set(chosen)):
        raise InvalidSetting(f"Components {again} are out of this model already; out are {out}.")
    for name in decomposed_apart(target, names):
        raise UnsupportedModel(
            f"{name} was decomposed apart from what it is tied to, but in this model they are the same numbers in "
            "memory, so an edit would change both. Load edited_state_dict(ablate=...) into a model in which they "
            "are separate parameters."
        )


class _TakenOut(Part):
    """Components are out of a model's own parameters.

    Attributes:
        originals: name -> what the places of a matrix held before; empty when all are put back.
        putting_back: whether some are put back already, so that the matrices are not what the edit made of them.
        record: in `edits_of` the model while the edit is in.
    """

    lasting = True

    def __init__(self, target: TargetModel, decomposition: Decomposition, chosen: list[int]):
        self.target, self.components, self.chosen = target, decomposition.components, chosen
        self.originals: dict[str, list[Tensor]] = {}
        self.record: Applied | None = None
        self.putting_back = False

    def do(self) -> None:
        target, names = self.target, self.components.names
        if is_patched(target.model):
            raise AlreadyActive(
                "This model is inside a sparse, ablate or only context (or a decompose run). Leave it before editing."
            )
        for name in names if self.chosen else ():
            value = edited_value(target, self.components, name, self.chosen)
            self.originals[name] = [place.clone() for place in _places(target, name)]
            _put(target, name, _stored(target, name, value))
        digests = {name: target.weights[name].fingerprint() for name in names}
        self.record = Applied(weakref.ref(self.components), self.chosen, digests)
        edits_of(target.model).append(self.record)

    @property
    def is_in(self) -> bool:
        return self.record in edits_of(self.target.model)

    def undo(self) -> None:
        try:
            if self.is_in and not self.putting_back:
                self._check_can_be_undone()
        except ApdError:
            raise
        except BaseException:
            self.put_back()
            raise
        self.put_back()

    def _check_can_be_undone(self) -> None:
        assert self.record is not None
        self.check_is_last()
        for name in self.originals:
            if self.target.weights[name].fingerprint() != self.record.fingerprints[name]:
                raise ArtifactError(
                    f"{name} was changed, or moved to another dtype, since components {self.chosen} were taken out "
                    "of it. undo(force=True) puts back what it was before, and that change is lost."
                )

    def check_is_last(self) -> None:
        last = edits_of(self.target.model)[-1]
        if last is not self.record:
            raise AlreadyActive(
                f"Components {last.ablated} were taken out after {self.chosen}. Undo that edit first: edits are "
                "undone in reverse order."
            )

    def put_back(self) -> None:
        self.putting_back = True
        for name, values in self.originals.items():
            _put(self.target, name, values)
        edits = edits_of(self.target.model)
        if self.record in edits:
            edits.remove(self.record)
        self.originals = {}


class Edit(Block):
    """Components that are out of a model's own parameters; made by `apply_edit`. A context that undoes itself.

    Attributes:
        model: the user's, edited.
        ablated: indices of the components that this edit took out.
    """

    def __init__(self, taken_out: _TakenOut):
        super().__init__(lambda: taken_out)
        self.model = taken_out.target.model
        self.ablated = taken_out.chosen
        self._taken_out = taken_out

    def start(self) -> "Edit":
        try:
            super().start()
            return self
        except BaseException:  # an interrupt between the two lines
            self.close()
            raise

    # In C: there is no line between `apply_edit` and the block at which an interrupt could come.
    __enter__ = io.IOBase.__enter__

    def __del__(self) -> None:
        """The edit stays when nobody holds this."""

    @property
    def undone(self) -> bool:
        """Whether the components are back."""
        return not self._taken_out.is_in

    def undo(self, *, force: bool = False) -> None:
        """Puts the matrices back, bit for bit; an interrupt is raised when that is done.

        Args:
            force: undo even if the edited matrices were changed since; those changes are lost.

        Raises:
            AlreadyActive: undone already, or a later edit of the model is not.
            ArtifactError: a matrix was changed since, by training perhaps, and no `force`.
        """
        if self.undone:
            raise AlreadyActive(f"{self} was undone already.")
        self._taken_out.check_is_last()
        undo = self._taken_out.put_back if force else self._taken_out.undo
        try:
            undo()
        except ApdError:
            raise
        except BaseException:
            self._taken_out.put_back()
            raise

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


def _put(target: TargetModel, name: str, values: list[Tensor]) -> None:
    # In inference mode also parameters that were made in it can be written to. This guard is left in C.
    with torch._C._InferenceMode(True):
        for place, value in zip(_places(target, name), values, strict=True):
            place.copy_(value)
