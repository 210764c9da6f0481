"""The result: components of a model's weights, and what can be done with them on the model."""

import math
import os
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

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
from apd_lens._components import ParameterComponents, effective_rank, singular_values, sum_of_components
from apd_lens._edited import check_unedited
from apd_lens._errors import ArtifactError, InvalidSetting, ShapeMismatch, UnsupportedModel
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
from apd_lens._selection import AttributionError, BatchTopK, K, Selection, attribution_error, with_k
from apd_lens._settings import Settings
from apd_lens._table import table
from apd_lens._target import Intercept, TargetModel, evaluating
from apd_lens._wrap import wrap

# Components by their numbers.
Chosen = int | Iterable[int] | Int[Tensor, "*n"]


@dataclass(frozen=True, eq=False)
class Decomposition:
    """A model's weight matrices as sums of parameter components.

    While components are out of the model's own parameters (`apd_lens.apply_edit`), all that runs or edits the model
    raises AlreadyActive: it is then not the model that was decomposed.

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

        Edited tensors are new; all others are the model's own, as in `state_dict()`.
        """
        chosen = numbers_of(ablate, self.components)
        check_unedited(self.target.model)
        edited = dict(self.target.model.state_dict())
        for name in self.components.names if chosen else ():
            edited.update(self.target.weights[name].state(edited_value(self.target, self.components, name, chosen)))
        return edited

    @torch.no_grad()
    def residuals(self) -> dict[str, float]:
        """Name -> ‖Δ‖ / ‖W‖ with Δ = W − Σ_c P_c, what the components leave unexplained; "all" for all together."""
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
        """Writes a folder: the factors as safetensors, and JSON with all settings, the versions of the libraries and a
        fingerprint of the decomposed weights. Functions of the user's are not saved. See `apd_lens.load`.

        Raises:
            ArtifactError: the path is a file, or a folder that holds something else.
        """
        A, B = self.components.A, self.components.B
        about = {
            "versions": library_versions(self.target.model),
            "model": f"{type(self.target.model).__module__}.{type(self.target.model).__qualname__}",
            "n_components": self.components.n_components,
            "matrices": about_matrices(self),
            "settings": encode_settings(self.settings),
            "output": "default" if self.output is default_output else "given by the user",
            "valid": "default" if self.target.valid is None else "given by the user",
        }
        factors = {f"A.{name}": factor for name, factor in A.items()} | {f"B.{name}": f for name, f in B.items()}
        write_artifact(Path(path), factors, about)

    def _context(
        self, intercept: Intercept, check: Callable[[int], None] | None = None
    ) -> AbstractContextManager[None]:
        check_unedited(self.target.model)
        return self.target.intercepted(self.components.names, intercept, check_examples=check)

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
        check_unedited(self.target.model)
        inputs, output = ready(self, batch, "attributions")
        watched = watched_pass(self.target, self.components.names, inputs, output)
        check_finite_output(watched.output, "attributions", watched)
        return watched


def ready(decomposition: Decomposition, batch: Batch | Inputs, where: str) -> tuple[Inputs, OutputFn]:
    """A batch as the model is called with it, on the model's device, and what picks the explained output.

    Raises:
        InvalidSetting: a loaded decomposition that lacks its output function.
        NonFinite: the batch holds NaN or infinity; the message says where.
    """
    if decomposition.output is None:
        raise InvalidSetting(
            "This decomposition was made with an output function of your own, which is not saved. Give it again: "
            "apd_lens.load(path, model, output=...)."
        )
    inputs = decomposition.read(batch)
    check_finite(inputs, where)
    return inputs, decomposition.output


def numbers_of(chosen: Chosen, components: ParameterComponents) -> list[int]:
    """The numbers of the components that a user has chosen.

    Raises:
        InvalidSetting: no such component, or one twice.
    """
    if isinstance(chosen, Tensor):
        chosen = chosen.flatten().tolist()
    numbers = [chosen] if isinstance(chosen, int) else [int(component) for component in chosen]
    wrong = [component for component in numbers if not 0 <= component < components.n_components]
    if wrong or len(set(numbers)) != len(numbers):
        raise InvalidSetting(
            f"Expected distinct component numbers from 0 to {components.n_components - 1}, got {wrong or numbers}."
        )
    return numbers


def edited_value(
    target: TargetModel, components: ParameterComponents, name: str, chosen: list[int]
) -> Float[Tensor, "d_in d_out"]:
    """W − Σ P_c of the chosen components, W being what the target has under that name at the moment."""
    weight = target.weights[name].value()
    taken_out = sum_of_components(components.A[name][chosen], components.B[name][chosen]).detach()
    return weight.to(taken_out.dtype) - taken_out.to(weight.device)


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


def load(
    path: str | os.PathLike[str], model: Any, *, output: OutputFn | None = None, valid: ValidFn | None = None
) -> Decomposition:
    """Reads a saved decomposition back onto the model that it was made from.

    Args:
        model: with the same weights; a HookedTransformer, a torch.nn.Module, or `apd_lens.wrap(...)` of one.
        output: the output function, if the decomposition was made with one of your own (functions are not saved).
            Without it everything works that needs no attributions.
        valid: as in `decompose`; it is not saved either.

    Raises:
        ArtifactError: nothing there; truncated, changed, not a decomposition, or of a newer format; or a matrix of the
            model is missing, or has another shape or other weights: says which.
    """
    factors, about = read_artifact(Path(path))
    if valid is None and about.get("valid", "default") != "default":
        valid = _valid_is_missing
    target, difference = fitted(model, about["matrices"])
    if difference is not None:
        raise ArtifactError(
            f"The decomposition in {path} is of another model: {difference}. It was made from a {about['model']}; "
            "load it onto that model, with the weights and the processing (folding, centring) that it had."
        )
    device = next(iter(target.weights.values())).parameter.device
    components = ParameterComponents(
        A={name: factors[f"A.{name}"].to(device) for name in about["matrices"]},
        B={name: factors[f"B.{name}"].to(device) for name in about["matrices"]},
    )
    return Decomposition(
        target=target if valid is None else target.with_valid(valid),
        components=components.requires_grad_(False),
        settings=decode_settings(about["settings"]),
        output=default_output if output is None and about["output"] == "default" else output,
        fingerprints={name: saved["fingerprint"] for name, saved in about["matrices"].items()},
    )


def _valid_is_missing(batch: Batch) -> None:
    raise InvalidSetting(
        "This decomposition was made with valid= of your own, which is not saved. Give it again: "
        "apd_lens.load(path, model, valid=...)."
    )


def fitted(model: Any, matrices: dict[str, dict[str, Any]]) -> tuple[TargetModel, str | None]:
    """A model as the target of a decomposition with these matrices, and in what it differs from theirs, or None."""
    target = _with_uses(wrap(model), matrices)
    differences = (_difference(target, name, saved) for name, saved in matrices.items())
    return target, next((difference for difference in differences if difference is not None), None)


def _with_uses(target: TargetModel, matrices: dict[str, Any]) -> TargetModel:
    """The target with those matrices untied that were untied when the decomposition was made, and with biases if they
    were decomposed."""
    tied = {alias: matrix for matrix in target.weights.values() for alias in (matrix.name, *matrix.tied_to)}
    untied = [name for name, saved in matrices.items() if name in tied and len(saved["sites"]) < len(tied[name].uses)]
    if untied:
        target = target.untied(*untied)
    with_biases = any(saved.get("bias", False) for saved in matrices.values())
    try:
        return target if target.biases == with_biases else target.with_biases(with_biases)
    except UnsupportedModel:  # it has none: another model, as will be found
        return target


def _difference(target: TargetModel, name: str, saved: dict[str, Any]) -> str | None:
    """In what a model's matrix differs from the one that was decomposed, or None."""
    matrix = target.weights.get(name)
    if matrix is None:
        return f"this {type(target.model).__name__} has no matrix {name} that can be decomposed"
    if (matrix.d_in, matrix.d_out) != (saved["d_in"], saved["d_out"]):
        return f"{name} is {matrix.d_in} × {matrix.d_out} here and was {saved['d_in']} × {saved['d_out']}"
    if (sites := [use.site for use in matrix.uses]) != saved["sites"]:
        return f"{name} is used at {sites} here and was at {saved['sites']}"
    if matrix.fingerprint() != saved["fingerprint"]:
        return f"{name} has other weights, or another dtype (here {matrix.parameter.dtype})"
    return None


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
