"""The result: components of a model's weights, and what can be done with them on the model."""

import math
import os
import warnings
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, SupportsIndex

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from apd_lens._artifact import (
    UserFunction,
    decode_settings,
    encode_settings,
    library_versions,
    read_artifact,
    write_artifact,
)
from apd_lens._attribution import GradientAttribution, metric_effects
from apd_lens._batches import Batch
from apd_lens._block import Block, Part
from apd_lens._components import ParameterComponents, effective_rank, singular_values, sum_of_components
from apd_lens._edited import check_unedited
from apd_lens._errors import ApdWarning, ArtifactError, InvalidSetting, ShapeMismatch, UnsupportedModel
from apd_lens._files import user_path
from apd_lens._fingerprints import check_unchanged, digests_of_others, warn_of_others
from apd_lens._finite import raise_first, reading_of_attributions
from apd_lens._inputs import Inputs, ValidFn, check_finite
from apd_lens._padding import Real, without_padding
from apd_lens._passes import (
    OutputFn,
    WatchedPass,
    check_finite_output,
    default_output,
    keep_weights,
    replace_weights,
    subtract_weights,
    watched_pass,
)
from apd_lens._product import Mask, check_examples
from apd_lens._selection import AttributionError, BatchTopK, K, Lp, Selection, attribution_error, check_k, with_k
from apd_lens._settings import Settings
from apd_lens._table import table
from apd_lens._target import Intercept, TargetModel, WeightMatrix, evaluating
from apd_lens._wrap import wrap

# Dtypes that the weights of a model may be rounded to.
_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)

# Components by their numbers, or a mask with a bool for each.
Chosen = SupportsIndex | Iterable[SupportsIndex] | Int[Tensor, "*n"] | Bool[Tensor, " C"]


@dataclass(frozen=True, eq=False)
class Decomposition:
    """A model's weight matrices as sums of parameter components.

    While components are out of the model's own parameters (`apd_lens.apply_edit`), all that runs or edits the model
    raises AlreadyActive: it is then not the model that was decomposed. Where decomposed matrices were changed in any
    other way since (training, `load_state_dict`, folding, `.half()`), it raises WeightsChanged.

    `copy.deepcopy` copies the components; the copy is of the same model, or of the model's copy where one and the same
    `deepcopy` has copied the model before. It cannot be pickled: `save` and `apd_lens.load` take its place.

    Attributes:
        target: the model that was taken apart, `target.model` being the user's.
        components: the factors.
        settings: what the decomposition was asked for.
        output: picks the explained tensor from what the model returns; None where a saved decomposition was made with
            a function of the user's that `load` was not given. (What the user said of padding is `target.valid`.)
        fingerprints: name -> digest of the matrix when it was decomposed.
    """

    target: TargetModel
    components: ParameterComponents
    settings: Settings
    output: OutputFn | None
    fingerprints: dict[str, str]

    @torch.inference_mode(False)
    def attributions(
        self, batch: Batch, metric: Callable[[Tensor], Tensor] | None = None
    ) -> Float[Tensor, "batch *pos C"]:
        """A_c(x): estimated effect on the output of removing component c; `batch C`, or `batch pos C` where data
        points are positions. Padding (where the batch's keyword argument `attention_mask` is 0, or lets none attend) is
        left out: outputs there do not count, and the attributions of positions there are 0.

        Args:
            metric: a function of the explained output that gives one scalar an example; then the attributions are
                signed and to that scalar: positive where a component raises it.

        Raises:
            NonFinite: the batch, or the output, holds NaN or infinity.
        """
        if metric is None:
            return self._attributed(batch)[0]
        with evaluating(self.target.model):
            watched = self._watch(batch)
            return metric_effects(watched, self.components, self.settings.selection.granularity, metric)

    @torch.inference_mode(False)
    def attribution_error(self, batch: Batch, k: K | None = None) -> AttributionError:
        """How far estimated attributions are off on a batch; all zero for exact ones. `k` as in `select`.

        Raises:
            InvalidSetting: no `GradientAttribution`, or a single projection, which has no spread.
        """
        attribution, selection = self.settings.attribution, self._selection(batch, k)
        if not isinstance(attribution, GradientAttribution):
            raise InvalidSetting(f"The error is known of GradientAttribution only, not of {attribution}.")
        with evaluating(self.target.model):
            watched = self._watch(batch)
            if attribution.is_exact(watched, self.components, selection.granularity):
                return AttributionError(0.0, 1.0)
            if attribution.projections == 1:
                raise InvalidSetting("The spread over projections needs at least 2 of them, got projections=1.")
            generator = torch.Generator(watched.output.device).manual_seed(0)
            samples = attribution.samples(watched, self.components, selection.granularity, generator)
        return attribution_error(samples, selection, watched.real)

    def select(self, batch: Batch, k: K | None = None) -> Bool[Tensor, "batch *pos C"]:
        """The mask of active components, by the selection of the training. None is active at padding.

        Args:
            k: overrides how many: the mean number a data point (`TopK`: the number of each), or a function batch -> k.

        Raises:
            InvalidSetting: trained with `Lp` without a threshold, and no k.
        """
        selection = self._selection(batch, k)
        return selection(*self._attributed(batch))

    def sparse(self, mask: Mask) -> AbstractContextManager[None]:
        """Inside, every forward of the user's model runs on Σ_c mask_c P_c in the place of its weights.

        Args:
            mask: `batch C` for whole examples, or `batch pos C`; bool, or floats that scale each component. To
                generate with a cache, whose forwards have the new tokens only, it takes `batch C`.

        Raises:
            ShapeMismatch: no such mask, or in a forward: of another batch.
            AlreadyActive: inside another context on the same model.
        """
        n_components = self.components.n_components
        if not isinstance(mask, Tensor) or mask.ndim < 2 or mask.shape[-1] != n_components:
            came = tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
            raise ShapeMismatch(
                f"Expected a mask of shape (batch, {n_components}) or (batch, pos, {n_components}), one entry for each "
                f"component, got {came}. decomposition.select(batch) makes one."
            )
        if mask.dtype != torch.bool and not mask.is_floating_point():
            raise ShapeMismatch(
                f"Expected a mask of bool, or of floats that scale components, got {mask.dtype}. Use mask.bool() "
                "if its entries are 0 and 1."
            )
        mask = mask.to(next(self.components.parameters()).device)
        return self._context(replace_weights(self.components, mask), partial(check_examples, mask))

    def ablate(self, components: Chosen) -> AbstractContextManager[None]:
        """Inside, the user's model runs on W − Σ P_c of the given components; with none, it is bit for bit the target.

        Raises:
            InvalidSetting: no such component.
            AlreadyActive: inside another context on the same model.
        """
        return self._context(subtract_weights(self.components, numbers_of(components, self.components)))

    def only(self, components: Chosen) -> AbstractContextManager[None]:
        """Inside, the user's model runs on Σ P_c of the given components alone. Raises as `ablate` does."""
        return self._context(keep_weights(self.components, numbers_of(components, self.components)))

    @torch.no_grad()
    def edited_state_dict(self, ablate: Chosen) -> dict[str, Tensor]:
        """A state dict of the user's model with W − Σ P_c of the given components, in the host's own layout.

        Edited tensors are new; all others are the model's own, as in `state_dict()`. Warns (`ApdWarning`) where names
        that are tied in the model hold different values, of matrices that were decomposed apart.
        """
        chosen = numbers_of(ablate, self.components)
        check_fits(self)
        edited = dict(self.target.model.state_dict())
        for name in self.components.names if chosen else ():
            edited.update(self.target.weights[name].state(edited_value(self.target, self.components, name, chosen)))
        if apart := decomposed_apart(self.target, self.components.names if chosen else ()):
            warnings.warn(
                f"{', '.join(apart)} was decomposed apart from what it is tied to, so this state dict holds different "
                "values under names that are tied in the model. Load it into a model in which they are separate "
                "parameters (tie_word_embeddings=False); a tied one would take one of the values for both.",
                ApdWarning,
                stacklevel=3,
            )
        return edited

    @torch.no_grad()
    def residuals(self) -> dict[str, float]:
        """Name -> ‖Δ‖ / ‖W‖ with Δ = W − Σ_c P_c, what the components leave unexplained; "all" for all together."""
        check_unchanged(self.target, self.fingerprints)
        errors, norms = {}, {}
        for name in self.components.names:
            summed = self.components.summed(name)
            weight = self.target.weights[name].value().to(summed)
            errors[name] = (weight - summed).norm().item()
            norms[name] = weight.norm().item()
        errors["all"], norms["all"] = math.hypot(*errors.values()), math.hypot(*norms.values())
        return {name: errors[name] / norms[name] if norms[name] else math.inf * errors[name] for name in errors}

    @torch.no_grad()
    def summary(self, batch: Batch, k: K | None = None) -> "Summary":
        """A printable table of the components: how often active on the batch, attribution, norms, effective ranks.

        `k` as in `select`.
        """
        selection = self._selection(batch, k)
        attributions, real = self._attributed(batch)
        mask = without_padding(selection(attributions, real), real)
        spectra = {name: singular_values(self.components, name) for name in self.components.names}
        never_active = ~mask.flatten(0, -2).any(0)
        dead_share = {}
        for name in self.components.names:
            dead = self.components.summed(name, never_active)
            dead_share[name] = (dead.norm() / self.target.weights[name].value().to(dead).norm()).item()
        return Summary(
            active=mask.flatten(0, -2).float().mean(0),
            attribution=without_padding(attributions, real).flatten(0, -2).mean(0),
            norm={name: spectrum.norm(dim=1) for name, spectrum in spectra.items()},
            effective_rank={name: effective_rank(spectrum) for name, spectrum in spectra.items()},
            dead_share=dead_share,
        )

    def report(self, batches: Iterable[Batch], path: str | os.PathLike[str], **options: Any) -> Path:
        """Writes one self-contained HTML page to look at, which opens from disk without network.

        It has settings, residuals and null controls, overview figures, and a list of components, each with its top
        examples, what it does to the output, where it is, what its ablation changes, and what it fires with.

        Goes through the batches once, twice with attributions (the second time those of random components), and once
        more over the examples that are shown. Nothing that is kept grows with the data. The file is moved into place
        when it is complete.

        Args:
            batches: as many as are to be seen; a list, a DataLoader.
            path: of the file; folders above it are made.
            **options: all may be left out.
                decode: token id -> what is shown for it; default: the model's own tokenizer's, else the number.
                output_names: one for each output unit, or a function of the unit; default: `decode` for a model with as
                    many outputs as tokens.
                input_names: one for each number of an input that has no tokens.
                matches: a pandas table of what components were matched with, such as latents of an SAE: a column
                    "component", any others are shown. A component may have several rows.
                examples, outputs, k, centred, loss, memory: as of `apd_lens.responses`.
                context: positions that are shown before the most attributed one of a long example; half as many behind.
                title: of the page.
                seed: of the random components.

        Returns:
            The path.

        Raises:
            MissingExtra: plotly, jinja2 or pandas is not installed.
            ArtifactError: the path is a folder.
            InvalidBatches: no batches.
            InvalidSetting: names that are not one for each, or no examples.
        """
        from apd_lens.report import write_report

        return write_report(self, batches, path, **options)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes a folder: the factors as safetensors, and JSON with all settings, the versions of the libraries and
        fingerprints of the decomposed weights and of all others. Functions of the user's are not saved. See
        `apd_lens.load`.

        A decomposition that is in the folder already is replaced all at once: whatever happens meanwhile, the old one
        or the new one can be loaded.

        Raises:
            ArtifactError: the path is a file, or a folder that holds something else; the factors hold NaN or infinity;
                or the system cannot write, of which the message says why.
        """
        A, B = self.components.A, self.components.B
        about = {
            "versions": library_versions(self.target.model),
            "model": f"{type(self.target.model).__module__}.{type(self.target.model).__qualname__}",
            "n_components": self.components.n_components,
            "matrices": {
                name: about | {"rounded": _rounded(self.target.weights[name], about["fingerprint"])}
                for name, about in about_matrices(self).items()
            },
            "settings": encode_settings(self.settings),
            "output": "default" if self.output is default_output else "given by the user",
            "others": digests_of_others(self.target, self.components.names),
            "valid": "default" if self.target.valid is None else "given by the user",
        }
        factors = {f"A.{name}": factor for name, factor in A.items()} | {f"B.{name}": f for name, f in B.items()}
        write_artifact(user_path(path), factors, about)

    def _context(
        self, intercept: Intercept, check: Callable[[int], None] | None = None
    ) -> AbstractContextManager[None]:
        check_fits(self)
        block = self.target.intercepted(self.components.names, intercept, check_examples=check)

        def make() -> Part:
            check_fits(self)  # it may have been edited since
            return block.make()

        return Block(make)

    def _selection(self, batch: Batch, k: K | None) -> Selection:
        selection = with_k(self.settings.selection, k)
        if isinstance(selection, BatchTopK) and isinstance(selection.k, UserFunction):
            raise ArtifactError(
                f"k was the function {selection.k.name} of the batch, which was not saved. Give it again, or a number: "
                "decomposition.select(batch, k=...)."
            )
        return selection.at(1.0, batch)

    @torch.inference_mode(False)
    def _attributed(self, batch: Batch | Inputs) -> tuple[Float[Tensor, "batch *pos C"], Real]:
        """Attributions, and which positions are no padding."""
        with evaluating(self.target.model):  # which an attribution may run again
            watched = self._watch(batch)
            generator = torch.Generator(watched.output.device).manual_seed(0)
            granularity = self.settings.selection.granularity
            attributions = self.settings.attribution(watched, self.components, granularity, generator)
        raise_first([reading_of_attributions(attributions, "attributions")])
        return attributions, watched.real

    def read(self, batch: Batch | Inputs) -> Inputs:
        """A batch as the model is called with it, on its device."""
        return self.target.read(batch, next(self.components.parameters()).device)

    def _watch(self, batch: Batch | Inputs) -> WatchedPass:
        """To be called with the model in eval mode."""
        inputs, output = ready(self, batch, "attributions")
        watched = watched_pass(self.target, self.components.names, inputs, output)
        check_finite_output(watched.output, "attributions", watched)
        return watched


def check_fits(decomposition: Decomposition) -> None:
    """Checks that a decomposition's model is what was decomposed.

    Raises:
        AlreadyActive: components are out of its own parameters.
        WeightsChanged: a matrix was changed in any other way.
    """
    check_unedited(decomposition.target.model)
    check_unchanged(decomposition.target, decomposition.fingerprints)


def ready(decomposition: Decomposition, batch: Batch | Inputs, where: str) -> tuple[Inputs, OutputFn]:
    """A batch as the model is called with it, on the model's device, and what picks the explained output.

    Raises:
        AlreadyActive, WeightsChanged: see `check_fits`.
        InvalidSetting: a loaded decomposition that lacks its output function.
        NonFinite: the batch holds NaN or infinity; the message says where.
    """
    check_fits(decomposition)
    if decomposition.output is None:
        raise InvalidSetting(
            "This decomposition was made with an output function of your own, which is not saved. Give it again: "
            "apd_lens.load(path, model, output=...)."
        )
    inputs = decomposition.read(batch)
    check_finite(inputs, where)
    return inputs, decomposition.output


def numbers_of(chosen: Chosen, components: ParameterComponents) -> list[int]:
    """The numbers of the components that a user has chosen; of a mask with a bool for each, those where it is True.

    Raises:
        InvalidSetting: no such component, or one twice; or what is neither whole numbers nor such a mask.
    """
    n = components.n_components
    if isinstance(chosen, Tensor) and chosen.dtype != torch.bool:
        chosen = chosen.flatten()
    given = as_python(chosen)
    several = isinstance(given, Iterable) and not isinstance(given, str | bytes)
    numbers: list[Any] = [as_python(item) for item in given] if several else [given]
    if several and len(numbers) == n and all(isinstance(item, bool) for item in numbers):
        numbers = [number for number, is_chosen in enumerate(numbers) if is_chosen]
    if not all(isinstance(item, int) and not isinstance(item, bool) for item in numbers):
        raise InvalidSetting(
            f"Expected whole numbers of components from 0 to {n - 1}, or a mask with a bool for each of the {n} "
            f"components, got {str(chosen)[:100]!r}."
        )
    wrong = [number for number in numbers if not 0 <= number < n]
    if wrong or len(set(numbers)) != len(numbers):
        raise InvalidSetting(f"Expected distinct component numbers from 0 to {n - 1}, got {wrong or numbers}.")
    return numbers


def as_python(value: Any) -> Any:
    """What an array, a tensor, or one of their numbers is in Python's own types; anything else as it is."""
    return value.tolist() if hasattr(value, "tolist") else value


def edited_value(
    target: TargetModel, components: ParameterComponents, name: str, chosen: list[int]
) -> Float[Tensor, "d_in d_out"]:
    """W − Σ P_c of the chosen components, W being what the target has under that name at the moment."""
    weight = target.weights[name].value()
    taken_out = sum_of_components(components.A[name][chosen], components.B[name][chosen]).detach()
    return weight.to(taken_out.dtype) - taken_out.to(weight.device)


def decomposed_apart(target: TargetModel, names: Iterable[str]) -> list[str]:
    """Those of the matrices that are tied in the model to others, apart from which they were decomposed."""
    whole = wrap(target.model).weights
    return [name for name in names if name not in whole or len(whole[name].uses) > len(target.weights[name].uses)]


def about_matrices(decomposition: Decomposition) -> dict[str, dict[str, Any]]:
    """Name -> what is known of the matrix and its components: shapes, uses, fingerprint."""
    A, B = decomposition.components.A, decomposition.components.B
    weights = decomposition.target.weights
    return {
        name: {
            "d_in": A[name].shape[1],
            "d_out": B[name].shape[2],
            "rank": A[name].shape[2],
            "bias": weights[name].bias is not None,
            "fingerprint": decomposition.fingerprints[name],
            "sites": [use.site for use in weights[name].uses],
        }
        for name in decomposition.components.names
    }


def _rounded(matrix: WeightMatrix, fingerprint: str) -> dict[str, str]:
    """Digests of a matrix's values in dtypes of fewer bits; none if the matrix was changed since the fingerprint."""
    if matrix.fingerprint() != fingerprint:
        return {}
    bits = matrix.parameter.dtype.itemsize
    return {str(dtype): matrix.fingerprint(dtype) for dtype in _DTYPES if dtype.itemsize < bits}


def load(
    path: str | os.PathLike[str],
    model: Any,
    *,
    output: OutputFn | None = None,
    valid: ValidFn | None = None,
    other_dtype: bool = False,
) -> Decomposition:
    """Reads a saved decomposition back onto the model that it was made from.

    Args:
        model: with the same weights; a HookedTransformer, a torch.nn.Module, or `apd_lens.wrap(...)` of one.
        output: the output function, if the decomposition was made with one of your own (functions are not saved).
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
    target, difference = fitted(model, about["matrices"], other_dtype)
    if difference is not None:
        raise ArtifactError(
            f"The decomposition in {path} is of another model: {difference}. It was made from a {about['model']}; "
            "load it onto that model, with the weights and the processing (folding, centring) that it had. If only the "
            "dtype is another, load(path, model, other_dtype=True) takes it, after a check."
        )
    if "others" in about and not other_dtype:
        warn_of_others(target, about["matrices"], about["others"])
    device = next(iter(target.weights.values())).parameter.device

    def on_model(side: str, name: str) -> Tensor:
        dtype = torch.promote_types(target.weights[name].parameter.dtype, torch.float32)
        factor = factors[f"{side}.{name}"]
        if factor.dtype != dtype and not other_dtype:
            raise ArtifactError(
                f"{path}: {side}.{name} is {factor.dtype}, and components of this model are {dtype}. "
                "load(path, model, other_dtype=True) converts them."
            )
        return factor.to(device, dtype)

    names = list(about["matrices"])
    components = ParameterComponents(
        A={name: on_model("A", name) for name in names}, B={name: on_model("B", name) for name in names}
    )
    return Decomposition(
        target=target if valid is None else target.with_valid(valid),
        components=components.requires_grad_(False),
        settings=settings,
        output=default_output if output is None and about["output"] == "default" else output,
        fingerprints={
            name: target.weights[name].fingerprint() if other_dtype else saved["fingerprint"]
            for name, saved in about["matrices"].items()
        },
    )


def _valid_is_missing(batch: Batch) -> None:
    raise InvalidSetting(
        "This decomposition was made with valid= of your own, which is not saved. Give it again: "
        "apd_lens.load(path, model, valid=...)."
    )


def _settings_of(about: dict[str, Any], path: Path) -> Settings:
    settings = decode_settings(about["settings"])
    if not isinstance(settings, Settings):
        raise ArtifactError(f"{path}: expected Settings, got {settings!r:.80}. Save the decomposition again.")
    if not isinstance(settings.selection, Lp):
        try:
            check_k(settings.selection, about["n_components"])
        except InvalidSetting as error:
            raise ArtifactError(f"{path}: the saved settings cannot work: {error}") from error
    return settings


def fitted(
    model: Any, matrices: dict[str, dict[str, Any]], other_dtype: bool = False
) -> tuple[TargetModel, str | None]:
    """A model as the target of a decomposition with these matrices, and in what it differs from theirs, or None."""
    target = _with_uses(wrap(model), matrices)
    differences = (_difference(target, name, saved, other_dtype) for name, saved in matrices.items())
    return target, next((difference for difference in differences if difference is not None), None)


def _with_uses(target: TargetModel, matrices: dict[str, Any]) -> TargetModel:
    """The target with those matrices untied that were untied when the decomposition was made, and with biases if they
    were decomposed."""
    tied = {
        alias: matrix
        for matrix in target.weights.values()
        for alias in (matrix.name, *matrix.tied_to)
        if matrix.tied_to
    }
    untied = [name for name, saved in matrices.items() if name in tied and len(saved["sites"]) < len(tied[name].uses)]
    if untied:
        target = target.untied(*untied)
    with_biases = any(saved.get("bias", False) for saved in matrices.values())
    try:
        return target if target.biases == with_biases else target.with_biases(with_biases)
    except UnsupportedModel:  # it has none: another model, as will be found
        return target


def _difference(target: TargetModel, name: str, saved: dict[str, Any], other_dtype: bool) -> str | None:
    """In what a model's matrix differs from the one that was decomposed, or None."""
    matrix = target.weights.get(name)
    if matrix is None:
        return f"this {type(target.model).__name__} has no matrix {name} that can be decomposed"
    if (matrix.d_in, matrix.d_out) != (saved["d_in"], saved["d_out"]):
        return f"{name} is {matrix.d_in} × {matrix.d_out} here and was {saved['d_in']} × {saved['d_out']}"
    if (sites := [use.site for use in matrix.uses]) != saved["sites"]:
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


@dataclass(frozen=True, eq=False)
class Summary:
    """A table of components over a batch; `print` shows it.

    Attributes:
        active: share of data points on which each was active, `C`.
        attribution: mean attribution, `C`.
        norm: name -> Frobenius norm in that matrix, `C`.
        effective_rank: name -> exp of the entropy of the normalised singular values, `C`.
        dead_share: name -> ‖Σ P_c of the components that are never active‖ / ‖W‖. No loss keeps them small: they hold
            what faithfulness needs and the data never used.
    """

    active: Float[Tensor, " C"]
    attribution: Float[Tensor, " C"]
    norm: dict[str, Tensor]
    effective_rank: dict[str, Tensor]
    dead_share: dict[str, float]

    @property
    def n_dead(self) -> int:
        """Components that were active on no data point."""
        return int((self.active == 0).sum())

    def __str__(self) -> str:
        header = ["component", "active", "attribution"]
        for name in self.norm:
            header += [f"‖{name}‖", "eff. rank"]
        order = sorted(range(len(self.active)), key=lambda c: (-self.active[c].item(), -self.attribution[c].item()))
        rows = [self._row(c) for c in order if self.active[c] > 0]
        dead = ", ".join(f"{share:.2f} of ‖{name}‖" for name, share in self.dead_share.items())
        footer = f"{len(rows)} components active on this batch, {self.n_dead} dead"
        return f"{table(header, rows)}\n{footer}" + (f" (together {dead})" if self.n_dead else "")

    def _row(self, component: int) -> list[str]:
        row = [str(component), f"{self.active[component]:.2%}", f"{self.attribution[component]:.4f}"]
        for name in self.norm:
            row += [f"{self.norm[name][component]:.3f}", f"{self.effective_rank[name][component]:.2f}"]
        return row

    __repr__ = __str__
