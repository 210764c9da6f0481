"""Loss against sparsity, measured in the same way for components, dictionaries and neurons.

The question is the same for all. With k units on at each data point, chosen by the decomposition's selection from the
units' own scores, how close is the model's output to the target's? Sparsity is counted in three ways: active units,
active parameters, and bits.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

import pandas as pd
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from apd_lens import metrics
from apd_lens._block import no_grad, no_inference_mode
from apd_lens._errors import InvalidSetting, ShapeMismatch
from apd_lens._memory import chunks
from apd_lens._table import Printed, as_table
from apd_lens.attribution._projections import AUTO_PROJECTIONS, are_exact
from apd_lens.compare._activations import Pool, pooled
from apd_lens.compare._dictionaries import Dictionary, Latents, moved, random_dictionary
from apd_lens.compare._splice import at_positions, rewritten_latents, spliced
from apd_lens.components._measures import random_components
from apd_lens.data._batch import Batch
from apd_lens.data._inputs import Inputs
from apd_lens.data._points import Valid, padded, without_padding, zero_at_padding
from apd_lens.data._stream import one_pass
from apd_lens.decomposition._decomposition import Decomposition, output_function
from apd_lens.decomposition._observed import Observed
from apd_lens.host._adapter import Intercept
from apd_lens.host._matrix import Use
from apd_lens.host._patch import outside_traces
from apd_lens.host._sites import reading
from apd_lens.host._target import evaluating
from apd_lens.losses._outputs import minimality_loss
from apd_lens.masks._selection import Selection, TopK, with_k
from apd_lens.passes._cotangents import one_hot_cotangents, random_cotangents
from apd_lens.passes._output import explained_call
from apd_lens.passes._replace import Mixture
from apd_lens.passes._watch import replaced_pass

# Between the target's output and another; or "ce", of labels.
Loss = Literal["mse", "kl", "ce"] | Callable[[Tensor, Tensor], Tensor]
Scores = Literal["activation", "gradient"]
# What a unit behind other units reads: what these give, or what it reads in the target.
Reads = Literal["propagated", "clean"]


@dataclass(frozen=True, eq=False, repr=False)
class Sparsity(Printed):
    """Curves of loss against sparsity, point by point. `print` shows them.

    Attributes:
        curve: name of the curve of each point.
        k: requested number of units, mean over data points. It is infinite for a dictionary's latents as they are.
        loss: mean over data points.
        active: number of active units, mean over data points. A latent that is 0 is not active.
        parameters: numbers in these: rank · (d_in + d_out) of a component, summed over matrices; encoder and decoder
            direction of a latent; of a neuron its rows and columns of the decomposed matrices that have as many as
            there are neurons, NaN where these cannot be told. The model's own matrices go on working behind latents,
            and are not counted there.
        bits: `metrics.description_length`: log2 of the number of units for each active one, and α for each of its
            rank-one parts; a latent and a neuron are one. How strongly a latent is active is not counted, nor what
            else a component reads of its input.
        target_loss: loss of the target itself.
    """

    curve: tuple[str, ...]
    k: Float[Tensor, " points"]
    loss: Float[Tensor, " points"]
    active: Float[Tensor, " points"]
    parameters: Float[Tensor, " points"]
    bits: Float[Tensor, " points"]
    target_loss: float

    def table(self) -> pd.DataFrame:
        """One row for each point."""
        names = {"active": "active units", "parameters": "active parameters"}
        columns = {names.get(name, name): getattr(self, name).numpy() for name in _COLUMNS}
        return pd.DataFrame({"curve": self.curve, **columns})

    def of(self, column: Literal["k", "loss", "active", "parameters", "bits"]) -> dict[str, Float[Tensor, " n"]]:
        """Name of a curve -> its values in one column."""
        values = getattr(self, column)
        return {
            name: values[[index for index, curve in enumerate(self.curve) if curve == name]]
            for name in dict.fromkeys(self.curve)
        }

    def _parts(self) -> list[str]:
        return [as_table(self.table()), f"loss of the target itself: {self.target_loss:.4g}"]


_COLUMNS = ("k", "loss", "active", "parameters", "bits")


@no_inference_mode()
@no_grad()
def sparsity(
    decomposition: Decomposition,
    batches: Iterable[Batch],
    ks: Sequence[float],
    dictionaries: Mapping[str, Dictionary | Sequence[Dictionary]],
    *,
    loss: Loss | None = None,
    labels: Callable[[Batch], Tensor] | None = None,
    by: Scores = "activation",
    inputs: Reads = "propagated",
    pool: Pool = "max",
    projections: int | Literal["auto", "exact"] = "auto",
    alpha: float = 1.0,
    nulls: bool = True,
    seed: int = 0,
) -> Sparsity:
    """Measures the loss with k active units on each data point, for components and for dictionaries that are spliced
    in.

    Units are selected as the decomposition selects components (`TopK`: k of each data point; `BatchTopK` and `Lp`: the
    k·n largest of a batch), with scores of their own, and data points are the decomposition's. Where these are
    examples, a latent stays at all positions of an example or at none.

    Args:
        batches: iterated once; each is run once for every point.
        ks: numbers of units on each data point; 0 for none. A number above that of all units means all.
        dictionaries: name of a curve -> a dictionary, or several that are spliced in together and keep k latents each.
            For neurons give `Dictionary.neurons(site, n)`. Each curve has one more point, with the latents as they are.
        loss: "mse" or "kl" between the target's output and the other; "ce", cross-entropy with `labels`; or a function
            (target output, output) -> one scalar a data point. Default the decomposition's own distance.
        labels: for "ce", a function batch -> classes `batch *pos`, −100 where none counts.
        by: what latents and neurons are selected by: "activation", |latent| times the norm of its decoder direction;
            or "gradient", sqrt(mean_o (latent · ∂f_o/∂latent)²), for examples with the sum over positions inside, as
            `GradientAttribution` estimates what a component does.
        inputs: what units behind others read, such as those of W_O behind those of W_V, or a second dictionary: what
            comes out of the others, with their errors ("propagated"), or what they read in the target ("clean").
        pool: over positions, of "activation" where data points are examples.
        projections: of "gradient", as of `GradientAttribution`.
        alpha: α, bits for each rank-one part; the paper leaves it open.
        nulls: also draw curves of random components with the same singular values, and of random dictionaries.
        seed: seed of nulls and projections.

    Raises:
        InvalidBatches: no batches, or one tensor in the place of batches.
        InvalidSetting: a k below 0, "ce" without labels, or a loaded decomposition that lacks its output function.
        ShapeMismatch: a dictionary of another width, or without the positions that data points are.
        NonFinite: a batch, or the target's output, holds NaN or infinity.
    """
    loss = decomposition.settings.losses.distance if loss is None else loss
    _check(decomposition, ks, dictionaries, loss, labels, by)
    if inputs not in ("propagated", "clean"):
        raise InvalidSetting(f'inputs is "propagated" or "clean", got {inputs!r}.')
    clean = inputs == "clean"
    device = next(decomposition.components.parameters()).device
    models: dict[str, _Components | _Spliced] = {"components": _Components.of(decomposition, clean)}
    if nulls:
        random = replace(decomposition, components=random_components(decomposition.components, seed))
        models["random components"] = _Components.of(random, clean, is_null=True)
    for name, given in dictionaries.items():
        some = [moved(each, device) for each in ([given] if isinstance(given, Dictionary) else given)]
        models[name] = _Spliced(decomposition, some, clean, by, pool, projections, seed)
        if nulls:
            random = [random_dictionary(each, seed + index) for index, each in enumerate(some)]
            models[f"{name}, random"] = replace(models[name], dictionaries=random)
    sites = [each.site for model in models.values() if isinstance(model, _Spliced) for each in model.dictionaries]
    sums: dict[tuple[str, float], Tensor] = {}
    of_target, weight = 0.0, 0.0
    for batch in one_pass(batches):
        with reading(decomposition.target.model, sites) as activations:
            some = decomposition.observe(batch)
        expected = None if labels is None else labels(some.inputs.batch).to(device)
        of_batch, n = _loss(some.output, some.output, loss, expected, some.valid)
        of_target, weight = of_target + n * of_batch, weight + n
        for name, model in models.items():
            for point in model.points(some, activations, ks, alpha):
                of_point, _ = _loss(some.output, point.output, loss, expected, some.valid)
                numbers = torch.tensor([of_point, *point.counted], dtype=torch.float64, device="cpu")
                sums[name, point.k] = sums.get((name, point.k), 0) + n * numbers
    points = torch.stack(list(sums.values())).float() / weight
    return Sparsity(
        tuple(name for name, _ in sums),
        torch.tensor([k for _, k in sums], device="cpu"),
        *points.unbind(1),
        target_loss=of_target / weight,
    )


# Mean over data points of active units, active parameters, and bits.
Counted = tuple[float, float, float]


@dataclass(frozen=True, eq=False)
class _Components:
    """The model on its active components.

    Attributes:
        clean: whether each matrix is given what it reads in the target.
        is_null: whether components are others than those that were observed.
        rank, parameters: of each component, over all matrices.
    """

    decomposition: Decomposition
    clean: bool
    is_null: bool
    rank: Float[Tensor, " C"]
    parameters: Float[Tensor, " C"]

    @staticmethod
    def of(decomposition: Decomposition, clean: bool, is_null: bool = False) -> "_Components":
        components = decomposition.components
        ranks = metrics.ranks(components)
        sizes = [components.A[name].shape[1] + components.B[name].shape[2] for name in components.names]
        return _Components(
            decomposition, clean, is_null, ranks.sum(1), ranks @ torch.tensor(sizes, device="cpu").to(ranks)
        )

    def points(
        self, some: Observed, activations: Mapping[str, Tensor], ks: Sequence[float], alpha: float
    ) -> Iterator["_Point"]:
        some = self.decomposition.observe(some.inputs) if self.is_null else some
        read = _inputs_of_uses(self.decomposition, some.inputs) if self.clean else None
        for k in ks:
            mask = _selected(self.decomposition.settings.selection, k, some.attributions, some.valid)
            mixture = Mixture(self.decomposition.components, mask)
            output = _with(self.decomposition, some.inputs, mixture if read is None else _given(mixture, read))
            yield _Point(k, _counted(mask, self.rank, self.parameters, alpha, some.valid), output)


@dataclass(frozen=True, eq=False)
class _Spliced:
    """The model with dictionaries at their places."""

    decomposition: Decomposition
    dictionaries: Sequence[Dictionary]
    clean: bool
    by: Scores
    pool: Pool
    projections: int | Literal["auto", "exact"]
    seed: int

    def points(
        self, some: Observed, activations: Mapping[str, Tensor], ks: Sequence[float], alpha: float
    ) -> Iterator["_Point"]:
        model, selection = self.decomposition.target.model, self.decomposition.settings.selection
        inputs, valid = some.inputs, some.valid
        latents = [dictionary.encode(activations[dictionary.site]) for dictionary in self.dictionaries]
        on = [self._pooled(each.ne(0).float(), valid) > 0 for each in latents]
        if self.by == "gradient":
            scores = self._effects(inputs, valid)
        else:
            sized = zip(latents, self.dictionaries, strict=True)
            scores = [self._pooled(each.abs() * dictionary.decoder.norm(dim=1), valid) for each, dictionary in sized]
        for k in (*ks, torch.inf):
            masks = on
            if k < torch.inf:
                chosen = (_selected(selection, k, each, valid) for each in scores)
                masks = [each & active for each, active in zip(chosen, on, strict=True)]
            if self.clean:
                kept = [partial(_instead, each * at_positions(m, each)) for m, each in zip(masks, latents, strict=True)]
                block = rewritten_latents(model, self.dictionaries, kept)
            else:
                block = spliced(model, self.dictionaries, masks if k < torch.inf else None)
            with block:
                output = _output(self.decomposition, inputs)
            counted = [
                _of_latents(self.decomposition, dictionary, mask, alpha, valid)
                for dictionary, mask in zip(self.dictionaries, masks, strict=True)
            ]
            active, parameters, bits = (sum(column) for column in zip(*counted, strict=True))
            yield _Point(k, (active, parameters, bits), output)

    def _pooled(self, values: Latents, valid: Valid) -> Float[Tensor, "batch *data_pos latents"]:
        return pooled(values, valid, self.pool) if self._of_examples else zero_at_padding(values, valid)

    @property
    def _of_examples(self) -> bool:
        return self.decomposition.settings.selection.granularity == "example"

    def _effects(self, inputs: Inputs, valid: Valid) -> list[Float[Tensor, "batch *data_pos latents"]]:
        """sqrt( mean_o (latent · ∂f_o/∂latent)² ), with the sum over positions inside where data points are examples.

        Gradients are those at the target's own activations: what a dictionary leaves unexplained is added to them.
        """
        leaves: list[Tensor] = []

        def leaf(latents: Latents) -> Latents:
            leaves.append(latents.detach().requires_grad_())
            return leaves[-1]

        model, changes = self.decomposition.target.model, [leaf] * len(self.dictionaries)
        with torch.enable_grad(), rewritten_latents(model, self.dictionaries, changes, keep_error=True):
            output = _output(self.decomposition, inputs)
        if are_exact(output, self.projections):
            cotangents = one_hot_cotangents(output)
        else:
            K = AUTO_PROJECTIONS if isinstance(self.projections, str) else self.projections
            generator = torch.Generator(output.device).manual_seed(self.seed)
            cotangents = random_cotangents(output, K, "rademacher", generator)
        bytes_each = 2 * sum(each.numel() * each.element_size() for each in leaves)
        squares = [torch.zeros((), dtype=torch.float32, device="cpu")] * len(leaves)
        for some in chunks(cotangents.count, bytes_each):
            rows = cotangents.rows(some.start, some.stop)
            gradients = torch.autograd.grad(
                output,
                leaves,
                rows[:, None].expand(-1, *output.shape),
                is_grads_batched=True,
                retain_graph=True,
                materialize_grads=True,
            )
            effects = [gradient * each.detach() for gradient, each in zip(gradients, leaves, strict=True)]
            if self._of_examples:
                effects = [each.flatten(2, -2).sum(2) if each.ndim > 3 else each for each in effects]
            squares = [total.to(each) + each.square().sum(0) for total, each in zip(squares, effects, strict=True)]
        n_outputs = _n_outputs(output, valid)
        return [(total / n_outputs.reshape(-1, *[1] * (total.ndim - 1))).sqrt() for total in squares]


def _instead(latents: Latents, given: Latents) -> Latents:
    return latents


def _inputs_of_uses(decomposition: Decomposition, inputs: Inputs) -> list[Tensor]:
    """What the matrices read in the target, call by call."""
    read: list[Tensor] = []

    def keep(use: Use, x: Tensor, original: Callable[[], Tensor], bias: Tensor | None) -> Tensor:
        read.append(x)
        return original()

    _with(decomposition, inputs, keep)
    return read


def _given(mixture: Mixture, read: Sequence[Tensor]) -> Intercept:
    """The mixture, of these inputs in the place of those that come."""
    left = iter(read)
    return lambda use, x, original, bias: mixture(use, next(left), original, bias)


def _with(decomposition: Decomposition, inputs: Inputs, replaced: Intercept) -> Tensor:
    """The explained output with `replaced` in the place of the decomposed weights."""
    target = decomposition.target
    with evaluating(target.model):
        return replaced_pass(target, decomposition.components.names, replaced, inputs, output_function(decomposition))[
            0
        ]


@dataclass(frozen=True, eq=False)
class _Point:
    """What a model gives with k units a data point."""

    k: float
    counted: Counted
    output: Tensor


def _selected(
    selection: Selection, k: float, scores: Float[Tensor, "batch *pos units"], valid: Valid
) -> Bool[Tensor, "batch *pos units"]:
    """The k largest a data point, as the selection finds them."""
    if k == 0:
        return torch.zeros_like(scores, dtype=torch.bool)
    k = min(k, scores.shape[-1])
    return with_k(selection, int(k) if isinstance(selection, TopK) else k)(scores, valid)


def _counted(
    mask: Bool[Tensor, "batch *pos units"],
    rank: Float[Tensor, " units"],
    parameters: Float[Tensor, " units"],
    alpha: float,
    valid: Valid,
) -> Counted:
    active = without_padding(mask, valid).flatten(0, -2)
    bits = metrics.description_length(active, rank, alpha).total
    per_data_point = active.to(parameters.dtype)
    return per_data_point.sum(1).mean().item(), (per_data_point @ parameters).mean().item(), bits


def _of_latents(
    decomposition: Decomposition,
    dictionary: Dictionary,
    mask: Bool[Tensor, "batch *pos latents"],
    alpha: float,
    valid: Valid,
) -> Counted:
    ones = torch.ones(dictionary.n_latents, device=mask.device, dtype=torch.float32)
    return _counted(mask, ones, _parameters(decomposition, dictionary) * ones, alpha, valid)


def _parameters(decomposition: Decomposition, dictionary: Dictionary) -> float:
    """Numbers that belong to one latent; of a neuron NaN where no matrix, or both sides of one, have its width."""
    d, d_out = dictionary.encoder.shape[0], dictionary.decoder.shape[1]
    if dictionary.parameters is not None:
        return dictionary.parameters
    if dictionary.activation != "identity":
        return d + d_out
    weights = [decomposition.target.weights[name] for name in decomposition.components.names]
    shapes = [(weight.d_in, weight.d_out) for weight in weights]
    touching = [shape for shape in shapes if d in shape]
    ambiguous = not touching or any(d_in == d_out for d_in, d_out in touching)
    return torch.nan if ambiguous else sum(d_in + d_out - d for d_in, d_out in touching)


def _output(decomposition: Decomposition, inputs: Inputs) -> Tensor:
    """The explained output of the user's model as it is at the moment; zero at padding."""
    model = decomposition.target.model
    assert decomposition.output is not None
    with evaluating(model), outside_traces(model):
        output = explained_call(decomposition.target, decomposition.components.names, decomposition.output, inputs)
    return zero_at_padding(output, inputs.valid)


def _n_outputs(output: Float[Tensor, "batch *pos n_outputs"], valid: Valid) -> Float[Tensor, " batch"]:
    """Number of outputs of each example, those at padding not counted."""
    valid = padded(output, valid)
    if valid is None:
        return torch.full((len(output),), float(output[0].numel()), device=output.device)
    return valid.sum(1).clamp_min(1) * float(output[0, 0].numel())


def _loss(
    target_output: Float[Tensor, "batch *pos n_outputs"],
    output: Float[Tensor, "batch *pos n_outputs"],
    loss: Loss,
    labels: Int[Tensor, "batch *pos"] | None,
    valid: Valid,
) -> tuple[float, int]:
    """Mean over data points, and how many these are."""
    valid = padded(output, valid)
    if loss == "ce":
        assert labels is not None
        if labels.shape != output.shape[:-1]:
            raise ShapeMismatch(f"Expected labels of shape {tuple(output.shape[:-1])}, got {tuple(labels.shape)}.")
        labels = labels if valid is None else labels.masked_fill(~valid, -100)
        n = int((labels != -100).sum())
        return (F.cross_entropy(output.flatten(0, -2), labels.flatten(), reduction="sum").item() / max(n, 1), n)
    n = output[..., 0].numel() if valid is None else int(valid.sum())
    return minimality_loss(target_output, output, loss, valid).item(), n


def _check(
    decomposition: Decomposition,
    ks: Sequence[float],
    dictionaries: Mapping[str, Dictionary | Sequence[Dictionary]],
    loss: Loss,
    labels: Callable[[Batch], Tensor] | None,
    by: Scores,
) -> None:
    output_function(decomposition)
    if not isinstance(ks, Sequence) or not ks or min(ks) < 0:
        raise InvalidSetting(f"ks are numbers of units a data point, from 0 on, such as (1, 2, 4); got {ks}.")
    if not isinstance(dictionaries, Mapping):
        raise InvalidSetting(f"Give each dictionary a name: {{'SAE': dictionary}}, got {dictionaries}.")
    if (loss == "ce") != (labels is not None):
        raise InvalidSetting('loss="ce" and labels= go together: a function batch -> classes.')
    if not callable(loss) and loss not in ("mse", "kl", "ce"):
        raise InvalidSetting(f'loss is "mse", "kl", "ce" or a function, got {loss!r}.')
    if by not in ("activation", "gradient"):
        raise InvalidSetting(f'by is "activation" or "gradient", got {by!r}.')
