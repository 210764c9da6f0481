"""Decompositions that are there already: saved ones, and factors of another method."""

import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from apd_lens._codec import decode_settings
from apd_lens._errors import ApdWarning, ArtifactError, InvalidSetting, ShapeMismatch, UnsupportedModel
from apd_lens._files import user_path
from apd_lens._settings import DEFAULTS, Settings
from apd_lens.components._components import ParameterComponents
from apd_lens.data._batch import Batch
from apd_lens.data._inputs import ValidFn
from apd_lens.decomposition._artifact import read_artifact
from apd_lens.decomposition._decomposition import _DTYPES, Decomposition, about_matrices
from apd_lens.host._matrix import WeightMatrix
from apd_lens.host._target import TargetModel
from apd_lens.host._unchanged import warn_of_others
from apd_lens.host._wrap import wrap
from apd_lens.passes._output import OfPositions, OutputFn, default_output


def load(
    path: str | os.PathLike[str],
    model: Any,
    *,
    output: OutputFn | None = None,
    valid: ValidFn | None = None,
    other_dtype: bool = False,
) -> Decomposition:
    """Reads a saved decomposition back onto the model that it was made from.

    The model may be in another host, such as a TransformerBridge of a Hugging Face model, as long as its matrices are
    the same. They are then found by their values, and have the names of that host. Other parameters are not compared.

    Args:
        model: with the same weights; a HookedTransformer, a torch.nn.Module, or `apd_lens.wrap(...)` of one.
        output: the output function, if the decomposition was made with one of your own (functions are not saved;
            `last_position()` and `positions(...)` are).
            Without it everything works that needs no attributions.
        valid: as in `decompose`; it is not saved either.
        other_dtype: whether the model may have the same weights in another dtype. "The same" means bit for bit: its
            weights, rounded to the dtype that was decomposed, are those that were decomposed; or those, rounded to the
            model's dtype, are the model's. Where neither dtype holds the other (float16 and bfloat16) that cannot be
            told, nor from an artifact without such digests, and it is refused. In a rounded model the components no
            longer sum to the weights exactly; `residuals()` says by how much. Factors become float32, or float64 where
            the model is.

    Warns where other parameters or buffers of the model differ from those that it had (`ApdWarning`).

    Raises:
        ArtifactError: nothing there; truncated, changed, not a decomposition, or of a newer format; or a matrix of the
            model is missing, or has another shape or other weights: says which.
    """
    path = user_path(path)
    factors, about = read_artifact(path)
    settings = _settings_of(about, path)
    if valid is None and about.get("valid", "default") != "default":
        valid = _valid_is_missing
    target, here, difference = fitted(model, about["matrices"], other_dtype)
    if difference is not None:
        raise ArtifactError(
            f"The decomposition in {path} is of another model: {difference}. It was made from a {about['model']}; "
            "load it onto that model, with the weights and the processing (folding, centring) that it had. If only the "
            "dtype is another, load(path, model, other_dtype=True) takes it, after a check."
        )
    others = about.get("others", {})
    if not isinstance(others, dict) or not all(isinstance(digest, str) for digest in others.values()):
        raise ArtifactError(f"{path}: expected digests by name, got {others!r:.80}. Save the decomposition again.")
    if "others" in about and not other_dtype and all(name == saved for saved, name in here.items()):
        warn_of_others(target, about["matrices"], others)

    def on_model(side: str, name: str) -> Tensor:
        parameter = target.weights[here[name]].parameter
        dtype = torch.promote_types(parameter.dtype, torch.float32)
        factor = factors[f"{side}.{name}"]
        if factor.dtype != dtype and not other_dtype:
            raise ArtifactError(
                f"{path}: {side}.{name} is {factor.dtype}, and components of this model are {dtype}. "
                "load(path, model, other_dtype=True) converts them."
            )
        return factor.to(parameter.device, dtype)

    components = ParameterComponents(
        A={name: on_model("A", saved) for saved, name in here.items()},
        B={name: on_model("B", saved) for saved, name in here.items()},
    )
    _give_gates(components, settings, target, {name: factors[f"gates.{name}"] for name in about.get("gates", {})})
    return Decomposition(
        target=target if valid is None else target.with_valid(valid),
        components=components.requires_grad_(False),
        settings=settings,
        output=_saved_output(about) if output is None else output,
        fingerprints={
            here[name]: target.weights[here[name]].fingerprint() if other_dtype else saved["fingerprint"]
            for name, saved in about["matrices"].items()
        },
    )


def from_factors(
    model: Any,
    A: Mapping[str, Tensor],
    B: Mapping[str, Tensor],
    *,
    settings: Settings = DEFAULTS,
    output: OutputFn = default_output,
    valid: ValidFn | None = None,
) -> Decomposition:
    """A decomposition with given components P_c = A_c B_c, such as those of another method. The factors are copied.

    Where that method says itself which components are active, give its masks to what takes them, such as
    `decomposition.sparse` and `metrics.audit(decomposition, batches, masks=...)`.

    Args:
        A, B: name of a matrix -> `C d_in m` and `C m d_out`, with x @ A @ B. A component that has no part in a matrix
            is zero there.
        settings: the distance between outputs (`losses`), and how attributions say what is active.
        output, valid: as in `decompose`.

    Raises:
        UnknownWeight, UnsupportedModel: a name is not that of a matrix that can be decomposed.
        ShapeMismatch: factors of other matrices in A than in B, or of another shape.
    """
    target = wrap(model)
    target = target if valid is None else target.with_valid(valid)
    if A.keys() != B.keys():
        raise ShapeMismatch(f"Expected factors of the same matrices, got A of {sorted(A)} and B of {sorted(B)}.")
    given = {target.match(name)[0]: name for name in A}
    factors: list[dict[str, Tensor]] = [{}, {}]
    C = len(next(iter(A.values()), ()))
    for name in target.match(given):
        matrix, a, b = target.weights[name], A[given[name]], B[given[name]]
        m = a.shape[-1]
        if a.shape != (C, matrix.d_in, m) or b.shape != (C, m, matrix.d_out):
            raise ShapeMismatch(
                f"{name} is {matrix.d_in} × {matrix.d_out}. Expected A of shape ({C}, {matrix.d_in}, m) and B of shape "
                f"({C}, m, {matrix.d_out}), got {tuple(a.shape)} and {tuple(b.shape)}."
            )
        dtype = torch.promote_types(matrix.parameter.dtype, torch.float32)
        for side, factor in zip(factors, (a, b), strict=True):
            side[name] = factor.detach().to(matrix.parameter.device, dtype).clone()
    return Decomposition(
        target=target,
        components=ParameterComponents(factors[0], factors[1]).requires_grad_(False),
        settings=settings,
        output=output,
        fingerprints={name: target.fingerprints.of(target.weights[name]) for name in factors[0]},
    )


def _valid_is_missing(batch: Batch) -> None:
    raise InvalidSetting(
        "This decomposition was made with valid= of your own, which is not saved. Give it again: "
        "apd_lens.load(path, model, valid=...)."
    )


def _saved_output(about: dict[str, Any]) -> OutputFn | None:
    """None where it was a function of the user's."""
    if "output_settings" not in about:
        return default_output if about["output"] == "default" else None
    output = decode_settings(about["output_settings"])
    if not isinstance(output, OfPositions):
        raise ArtifactError(f"Expected an output of positions, got {output!r:.80}. Save the decomposition again.")
    return output


def _settings_of(about: dict[str, Any], path: Path) -> Settings:
    settings = decode_settings(about["settings"])
    if not isinstance(settings, Settings):
        raise ArtifactError(f"{path}: expected Settings, got {settings!r:.80}. Save the decomposition again.")
    try:
        settings.masking.check(about["n_components"], settings.losses)
    except InvalidSetting as error:
        raise ArtifactError(f"{path}: the saved settings cannot work: {error}") from error
    return settings


def on(decomposition: Decomposition, model: Any, *, output: OutputFn | None = None) -> Decomposition:
    """The same decomposition on another model with the same matrices, such as a TransformerBridge of a Hugging Face
    model, or the Hugging Face model itself. Matrices are found by their values, and have the names of that host; the
    factors are copies.

    Args:
        output: picks the explained tensor from what that model returns; default as it was.

    Raises:
        UnsupportedModel: the model lacks one of the matrices, or has other weights there; says which.
    """
    matrices = about_matrices(decomposition)
    target, here, difference = fitted(model, matrices)
    if difference is not None:
        raise UnsupportedModel(
            f"This decomposition cannot be taken to a {type(target.model).__name__}: {difference}. It needs the "
            "decomposed matrices with the same numbers: without folding, centring or rounding."
        )
    A, B = (
        {name: side[of].detach().clone().to(target.weights[name].parameter.device) for of, name in here.items()}
        for side in (decomposition.components.A, decomposition.components.B)
    )
    components = ParameterComponents(A, B)
    _give_gates(components, decomposition.settings, target, decomposition.components.state_of_gates())
    return Decomposition(
        target=target if decomposition.target.valid is None else target.with_valid(decomposition.target.valid),
        components=components.requires_grad_(False),
        settings=decomposition.settings,
        output=decomposition.output if output is None else output,
        fingerprints={name: decomposition.fingerprints[of] for of, name in here.items()},
    )


def _give_gates(
    components: ParameterComponents, settings: Settings, target: TargetModel, state: Mapping[str, Tensor]
) -> None:
    """Gives components the gates that were trained with them; with none, warns where there were some, of a host that
    uses the matrices in another way."""
    uses = [use for name in components.names for use in target.weights[name].uses]
    try:
        gates = settings.masking.learned(components, uses, None) if state else None
    except RuntimeError as error:  # larger than any memory
        raise ArtifactError(f"The settings ask for gates that cannot be: {error}. Save again.") from error
    if gates is None:
        return
    if {name: values.shape for name, values in gates.named_parameters()} != {n: v.shape for n, v in state.items()}:
        warnings.warn(
            "The gates of these components read the matrices as another host uses them, and not as this "
            f"{type(target.model).__name__} does, so they cannot say here which are active. What takes a mask works.",
            ApdWarning,
            stacklevel=3,
        )
        return
    gates.place(next(components.parameters()), state)
    components.gates = gates


Decomposition.on = on  # here, since it stands on what knows other models


def fitted(
    model: Any, matrices: dict[str, dict[str, Any]], other_dtype: bool = False, other_names: bool = True
) -> tuple[TargetModel, dict[str, str], str | None]:
    """A model as the target of a decomposition with these matrices; what each is called there; and in what it differs
    from theirs, or None."""
    target = _with_biases(wrap(model), matrices)
    here = _names_in(target, matrices, other_dtype) if other_names else {name: name for name in matrices}
    target = _with_uses(target, {here[name]: saved for name, saved in matrices.items()})
    differences = (_difference(target, name, here[name], saved, other_dtype) for name, saved in matrices.items())
    return target, here, next((difference for difference in differences if difference is not None), None)


def _names_in(target: TargetModel, matrices: dict[str, dict[str, Any]], other_dtype: bool) -> dict[str, str]:
    """Name of a matrix -> its name in this model: its own where the model has all of these names, else that of the
    matrix with its values; its own again where there is none."""
    known = {alias for matrix in target.weights.values() for alias in (matrix.name, *matrix.tied_to)}
    here = {name: name for name in matrices}
    if known.issuperset(matrices):
        return here
    free = [matrix for matrix in target.weights.values() if not matrix.parameter.is_meta]
    for name, saved in matrices.items():
        for matrix in free:
            shape, is_tied = (matrix.d_in, matrix.d_out), len(matrix.uses) > 1
            if shape != (saved["d_in"], saved["d_out"]) or (len(saved["sites"]) > 1) > is_tied:
                continue
            if target.fingerprints.of(matrix) == saved["fingerprint"] or (other_dtype and _same_rounded(matrix, saved)):
                here[name] = matrix.name
                free = [other for other in free if other is not matrix]
                break
    return here


def _with_biases(target: TargetModel, matrices: dict[str, Any]) -> TargetModel:
    """The target with biases if they were decomposed."""
    with_biases = any(saved.get("bias", False) for saved in matrices.values())
    try:
        return target if target.biases == with_biases else target.with_biases(with_biases)
    except UnsupportedModel:  # it has none: another model, as will be found
        return target


def _with_uses(target: TargetModel, matrices: dict[str, Any]) -> TargetModel:
    """The target with those matrices untied that were untied when the decomposition was made."""
    tied = {
        alias: matrix
        for matrix in target.weights.values()
        for alias in (matrix.name, *matrix.tied_to)
        if matrix.tied_to
    }
    untied = [name for name, saved in matrices.items() if name in tied and len(saved["sites"]) < len(tied[name].uses)]
    return target.untied(*untied) if untied else target


def _difference(target: TargetModel, name: str, here: str, saved: dict[str, Any], other_dtype: bool) -> str | None:
    """In what a model's matrix differs from the one that was decomposed, or None.

    Args:
        name: of the matrix that was decomposed.
        here: its name in this model.
    """
    matrix = target.weights.get(here)
    kind = type(target.model).__name__
    if matrix is None:
        alike = [m for m in target.weights.values() if (m.d_in, m.d_out) == (saved["d_in"], saved["d_out"])]
        return (
            f"this {kind} has no matrix {name} that can be decomposed, and none of the weights of {name} among its "
            f"{len(alike)} matrices of {saved['d_in']} × {saved['d_out']}"
        )
    if (matrix.d_in, matrix.d_out) != (saved["d_in"], saved["d_out"]):
        return f"{name} is {matrix.d_in} × {matrix.d_out} here and was {saved['d_in']} × {saved['d_out']}"
    sites = [use.site for use in matrix.uses]
    if sites != saved["sites"] if name == here else len(sites) != len(saved["sites"]):
        return f"{name} is used at {sites} here and was at {saved['sites']}"
    if target.fingerprints.of(matrix) != saved["fingerprint"] and not (other_dtype and _same_rounded(matrix, saved)):
        return f"{name} has other weights, or another dtype (here {matrix.parameter.dtype})"
    return None


def _same_rounded(matrix: WeightMatrix, saved: dict[str, Any]) -> bool:
    """Whether a matrix has the weights that were decomposed, one of the two rounded to the dtype of the other."""
    if any(matrix.fingerprint(dtype) == saved["fingerprint"] for dtype in _DTYPES):
        return True
    rounded = saved.get("rounded")
    return isinstance(rounded, dict) and rounded.get(str(matrix.parameter.dtype)) == matrix.fingerprint()
