"""The result: components of a model's weights, and what can be done with them on the model."""

import json
import math
import os
import warnings
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, SupportsIndex

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from apd_lens._block import Block, Part, no_grad, no_inference_mode
from apd_lens._codec import can_be_saved, encode_settings
from apd_lens._errors import ApdWarning, InvalidSetting, ShapeMismatch, WeightsChanged
from apd_lens._files import user_path
from apd_lens._processes import is_first
from apd_lens._settings import Settings
from apd_lens._table import Printed, example_of, short_names, table
from apd_lens.attribution._gradient import GradientAttribution
from apd_lens.attribution._metric import metric_effects
from apd_lens.components._components import ParameterComponents
from apd_lens.components._factors import Mask, sum_of_components
from apd_lens.components._measures import effective_rank, singular_values
from apd_lens.components._products import check_examples
from apd_lens.data._batch import Batch
from apd_lens.data._inputs import Inputs, check_finite
from apd_lens.decomposition._artifact import library_versions, write_artifact, write_tensors
from apd_lens.decomposition._card import Card, base_of, card_text
from apd_lens.decomposition._edited import check_unedited
from apd_lens.decomposition._observed import Observed, observed, selection_of
from apd_lens.decomposition._summary import Summary
from apd_lens.host._adapter import Intercept
from apd_lens.host._matrix import WeightMatrix
from apd_lens.host._target import TargetModel, evaluating
from apd_lens.host._unchanged import check_unchanged, digests_of_others
from apd_lens.masks._error import AttributionError, attribution_error
from apd_lens.masks._selection import K
from apd_lens.passes._output import OutputFn, default_output
from apd_lens.passes._replace import Mixture
from apd_lens.passes._watch import WatchedPass, check_finite_output, replaced_pass, watched_in_pieces, watched_pass

# Dtypes that the weights of a model may be rounded to.
_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)

# Components by their numbers, or a mask with a bool for each.
Chosen = SupportsIndex | Iterable[SupportsIndex] | Int[Tensor, "*n"] | Bool[Tensor, " C"]


@dataclass(frozen=True, eq=False, repr=False)
class Decomposition(Printed):
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

    def _parts(self) -> list[str]:
        names, short = self.components.names, short_names(self.components.names)
        sides = [(str(d_in), str(d_out), str(m)) for d_in, m, d_out in self.components.sizes.values()]
        rows = [(one, *of_one) for one, of_one in zip(short, sides, strict=True)]
        model = type(self.target.model).__name__
        head = f"{model}: {self.components.n_components} components over {len(names)} matrices"
        of_rows = table(("matrix", "d_in", "d_out", "rank, at most"), rows, dict(zip(short, names, strict=True)))
        return [head, of_rows, *example_of(short, names)]

    @no_inference_mode()
    def observe(self, batch: Batch | Inputs, k: K | None = None) -> Observed:
        """Output, attributions and mask of a batch, from one pass of the target. `k` as in `select`.

        Raises:
            AlreadyActive, WeightsChanged: the model is not what was decomposed.
            InvalidSetting: a loaded decomposition that lacks its output function.
            NonFinite: the batch, or the output, holds NaN or infinity.
        """
        with evaluating(self.target.model):  # which an attribution may run again
            return observed(self.watch(batch, make=watched_in_pieces), self.components, self.settings, k)

    def watch(
        self, batch: Batch | Inputs, where: str = "attributions", make: Callable[..., WatchedPass] = watched_pass
    ) -> WatchedPass:
        """A pass of the target that keeps what attributions need. To be called with the model in eval mode.

        Args:
            where: what asks for it, for messages.
            make: runs it.

        Raises as `observe` does.
        """
        inputs, output = ready(self, batch, where)
        compares = self.settings.losses.compares
        watched = make(self.target, self.components.names, inputs, output, compares=compares)
        check_finite_output(watched.output, where, watched)
        return watched

    def read(self, batch: Batch | Inputs) -> Inputs:
        """A batch as the model is called with it, on its device."""
        return self.target.read(batch, next(self.components.parameters()).device)

    @no_inference_mode()
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
            return self.observe(batch).attributions
        with evaluating(self.target.model):
            watched = self.watch(batch)
            return metric_effects(watched, self.components, self.settings.selection.granularity, metric)

    @no_inference_mode()
    def attribution_error(self, batch: Batch, k: K | None = None) -> AttributionError:
        """How far estimated attributions are off on a batch; all zero for exact ones. `k` as in `select`.

        Raises:
            InvalidSetting: no `GradientAttribution`, or a single projection, which has no spread.
        """
        attribution, granularity = self.settings.attribution, self.settings.selection.granularity
        if not isinstance(attribution, GradientAttribution):
            raise InvalidSetting(f"The error is known of GradientAttribution only, not of {attribution}.")
        with evaluating(self.target.model):
            watched = self.watch(batch)
            if attribution.is_exact(watched, self.components, granularity):
                return AttributionError(0.0, 1.0)
            if attribution.projections == 1:
                raise InvalidSetting("The spread over projections needs at least 2 of them, got projections=1.")
            generator = torch.Generator(watched.output.device).manual_seed(0)
            samples = attribution.samples(watched, self.components, granularity, generator)
        selection = selection_of(self.settings.selection, watched.run.batch, k)
        return attribution_error(samples, selection, watched.valid)

    def select(self, batch: Batch, k: K | None = None) -> Bool[Tensor, "batch *pos C"]:
        """The mask of active components, by the selection of the training. None is active at padding.

        Args:
            k: overrides how many: the mean number a data point (`TopK`: the number of each), or a function batch -> k.

        Raises:
            InvalidSetting: trained with `Lp` without a threshold, and no k.
        """
        return self.observe(batch, k).mask

    def sparse(self, mask: Mask, rest: float = 0.0) -> AbstractContextManager[None]:
        """Inside, every forward of the user's model runs on Σ_c mask_c P_c in the place of its weights; with a rest r
        on r W + Σ_c (mask_c − r) P_c.

        Args:
            mask: `batch C` for whole examples, or `batch pos C`; bool, or floats that scale each component. To
                generate with a cache, whose forwards have the new tokens only, it takes `batch C`.
            rest: how much of W − Σ_c P_c is on, which is what the components leave unexplained.

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
        return self._context(Mixture(self.components, mask, rest), partial(check_examples, mask))

    def ablate(self, components: Chosen) -> AbstractContextManager[None]:
        """Inside, the user's model runs on W − Σ P_c of the given components; with none, it is bit for bit the target.

        Raises:
            InvalidSetting: no such component.
            AlreadyActive: inside another context on the same model.
        """
        return self._context(Mixture(self._picked(components), on=0.0, rest=1.0))

    def only(self, components: Chosen) -> AbstractContextManager[None]:
        """Inside, the user's model runs on Σ P_c of the given components alone. Raises as `ablate` does."""
        return self._context(Mixture(self._picked(components)))

    @no_grad()
    def edited_state_dict(self, ablate: Chosen) -> dict[str, Tensor]:
        """A state dict of the user's model with W − Σ P_c of the given components, in the host's own layout.

        Edited tensors are new; all others are the model's own, as in `state_dict()`. Warns (`ApdWarning`) where names
        that are tied in the model hold different values, of matrices that were decomposed apart.
        """
        chosen = indices_of(ablate, self.components)
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

    @no_grad()
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

    @no_grad()
    def summary(self, batch: Batch, k: K | None = None) -> "Summary":
        """A printable table of the components: how often active on the batch, attribution, norms, effective ranks.

        `k` as in `select`.
        """
        with evaluating(self.target.model):
            some = observed(self.watch(batch), self.components, self.settings, k, with_error=True)
        mask = some.data(some.mask)
        spectra = {name: singular_values(self.components, name) for name in self.components.names}
        never_active = ~mask.any(0)
        dead_share = {}
        for name in self.components.names:
            dead = self.components.summed(name, never_active)
            dead_share[name] = (dead.norm() / self.target.weights[name].value().to(dead).norm()).item()
        return Summary(
            active=mask.float().mean(0),
            attribution=some.data(some.attributions).mean(0),
            norm={name: spectrum.norm(dim=1) for name, spectrum in spectra.items()},
            effective_rank={name: effective_rank(spectrum) for name, spectrum in spectra.items()},
            dead_share=dead_share,
            rest=self.residuals(),
            agreement=None if some.error is None else some.error.agreement,
        )

    on: ClassVar[Callable[..., "Decomposition"]]  # `apd_lens.decomposition._load.on`, as a method

    push_to_hub: ClassVar[Callable[..., str]]  # `apd_lens.decomposition._hub.push_to_hub`, as a method

    report: ClassVar[Callable[..., Path]]  # `apd_lens.report.write_report`, as a method

    def save(self, path: str | os.PathLike[str], *, card: Card | None = None, repo: str | None = None) -> None:
        """Writes a folder: the factors as safetensors, JSON with all settings, the versions of the libraries and
        fingerprints of the decomposed weights and of all others, and a card. Functions of the user's are not saved.
        See `apd_lens.load`.

        A decomposition that is in the folder already is replaced all at once: whatever happens meanwhile, the old one
        or the new one can be loaded.

        Args:
            card: what README.md says beside what is known.
            repo: the name that README.md loads it by, of a folder that you will publish.

        Raises:
            ArtifactError: the path is a file, or a folder that holds something else; the factors hold NaN or infinity;
                or the system cannot write, of which the message says why.
        """
        card, writes = card or Card(), not self.components.is_sharded or is_first()
        told = about(self) | {"base_model": base_of(self.target.model, card)}
        sides = {"A": self.components.A, "B": self.components.B}
        found = ((f"{side}.{name}", factor) for side, factors in sides.items() for name, factor in factors.items())
        factors = {name: factor.detach().cpu() for name, factor in found if writes}  # one at a time is gathered
        if writes:
            factors |= {f"gates.{name}": values for name, values in self.components.state_of_gates().items()}
        try:
            rest = self.residuals()
        except WeightsChanged:
            rest = {}
        if writes:
            write_artifact(user_path(path), factors, told, card_text(card, told, rest, repo))

    def export_directions(self, path: str | os.PathLike[str]) -> None:
        """Writes what each component reads and writes as one safetensors file, for use without this package.

        For each matrix NAME, with W as `d_in d_out` and y = x @ W, it holds NAME.read `C m d_in` and NAME.write
        `C m d_out`. P_c = read_cᵀ @ write_c, which turns x into (x @ read_cᵀ) @ write_c. A `torch.nn.Linear` keeps Wᵀ.
        The file's metadata says this, and of each matrix how its host stores it, as a pattern of einops.

        Raises:
            ArtifactError: it cannot be written: says why.
        """
        tensors, layouts = {}, {}
        for name in self.components.names:
            tensors[f"{name}.read"] = self.components.A[name].detach().mT.cpu().contiguous()
            tensors[f"{name}.write"] = self.components.B[name].detach().cpu().contiguous()
            layouts[name] = self.target.weights[name].layout
        orientation = (
            "W is d_in d_out and y = x @ W. NAME.read is (component, rank, d_in), NAME.write (component, rank, d_out). "
            "Component c of W is NAME.read[c].T @ NAME.write[c]; torch.nn.Linear keeps the transpose of W. Where the "
            "last row of W is the bias, x ends with a 1."
        )
        about = {"format": "apd_lens directions", "orientation": orientation, "layouts": json.dumps(layouts)}
        write_tensors(user_path(path), tensors, about)

    def _picked(self, chosen: Chosen) -> ParameterComponents:
        return self.components.picked(indices_of(chosen, self.components))

    def _context(
        self, intercept: Intercept, check: Callable[[int], None] | None = None
    ) -> AbstractContextManager[None]:
        check_fits(self)
        block = self.target.intercepted(self.components.names, intercept, check_examples=check)

        def make() -> Part:
            check_fits(self)  # it may have been edited since
            return block.make()

        return Block(make)


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
    output = output_function(decomposition)
    inputs = decomposition.read(batch)
    check_finite(inputs, where)
    return inputs, output


def output_function(decomposition: Decomposition) -> OutputFn:
    """What picks the explained output, of a model that is what was decomposed. Raises as `ready` does."""
    check_fits(decomposition)
    if decomposition.output is None:
        raise InvalidSetting(
            "This decomposition was made with an output function of your own, which is not saved. Give it again: "
            "apd_lens.load(path, model, output=...)."
        )
    return decomposition.output


def output_with(decomposition: Decomposition, inputs: Inputs, mixture: Mixture) -> Tensor:
    """The explained output with a mixture in the place of the weights, of inputs that were observed or are `ready`."""
    assert decomposition.output is not None
    target = decomposition.target
    with evaluating(target.model):
        return replaced_pass(target, mixture.components.names, mixture, inputs, decomposition.output)[0]


def indices_of(chosen: Chosen, components: ParameterComponents) -> list[int]:
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
    whole = TargetModel(target.model, target.adapter, biases=target.biases).weights
    return [name for name in names if name not in whole or len(whole[name].uses) > len(target.weights[name].uses)]


def about(decomposition: Decomposition) -> dict[str, Any]:
    """What is known of a decomposition beside its factors, as JSON can hold it."""
    target, components = decomposition.target, decomposition.components
    return {
        "versions": library_versions(target.model),
        "model": f"{type(target.model).__module__}.{type(target.model).__qualname__}",
        "dtype": str(target.weights[components.names[0]].parameter.dtype).removeprefix("torch."),
        "n_components": components.n_components,
        "matrices": {
            name: matrix | {"rounded": _rounded(target.weights[name], matrix["fingerprint"])}
            for name, matrix in about_matrices(decomposition).items()
        },
        "gates": {name: list(values.shape) for name, values in components.state_of_gates().items()},
        "settings": encode_settings(decomposition.settings),
        **_about_output(decomposition.output),
        "others": digests_of_others(target, components.names),
        "valid": "default" if target.valid is None else "given by the user",
    }


def about_matrices(decomposition: Decomposition) -> dict[str, dict[str, Any]]:
    """Name -> what is known of the matrix and its components: shapes, uses, fingerprint."""
    weights = decomposition.target.weights
    return {
        name: {
            "d_in": d_in,
            "d_out": d_out,
            "rank": m,
            "bias": weights[name].bias is not None,
            "fingerprint": decomposition.fingerprints[name],
            "sites": [use.site for use in weights[name].uses],
        }
        for name, (d_in, m, d_out) in decomposition.components.sizes.items()
    }


def _about_output(output: OutputFn | None) -> dict[str, Any]:
    """An output of positions is saved as settings are; a function of the user's is not."""
    about = {"output": "default" if output is default_output else "given by the user"}
    return about | ({"output_settings": encode_settings(output)} if can_be_saved(output) else {})


def _rounded(matrix: WeightMatrix, fingerprint: str) -> dict[str, str]:
    """Digests of a matrix's values in dtypes of fewer bits; none if the matrix was changed since the fingerprint."""
    if matrix.fingerprint() != fingerprint:
        return {}
    bits = matrix.parameter.dtype.itemsize
    return {str(dtype): matrix.fingerprint(dtype) for dtype in _DTYPES if dtype.itemsize < bits}
