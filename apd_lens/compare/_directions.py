"""Do components write, or read, the directions that the latents of a dictionary do?

A component is a matrix A_c B_c, a latent one direction. What a component has of a direction is how much of the largest
thing that it can write it can write along that direction: ‖A_c B_c d‖ / ‖A_c B_c‖, d of norm 1, both norms the largest
over inputs of norm 1. In singular vectors v_i and values σ_i it is sqrt(Σ_i σ_i² <v_i, d>²) / σ_1. Of a component of
rank one it is |cos| of the two directions; of one with r equal singular values it is the cosine of d with the space of
dimension r that it writes into; and a part that is as good as zero counts for as good as nothing, so that no rank has
to be chosen.

It has no sign, since (A, B) and (−A, −B) are the same component. Data give one: that of what the component writes, or
reads, on average over the data points on which it is active. Then two features in opposite directions are two.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Literal, cast

import pandas as pd
import torch
import torch.nn.functional as F
from einops import einsum, rearrange
from jaxtyping import Bool, Float
from torch import Tensor

from apd_lens._block import full_precision, no_grad, no_inference_mode
from apd_lens._errors import InvalidSetting, ShapeMismatch, UnknownWeight
from apd_lens._memory import fitting
from apd_lens._table import Printed
from apd_lens.compare._dictionaries import Dictionary
from apd_lens.compare._matching import Matching, matching, side_by_side, with_null
from apd_lens.components._factors import MatrixInput as Inputs
from apd_lens.components._measures import random_components
from apd_lens.data._batch import Batch
from apd_lens.data._points import Valid, zero_at_padding
from apd_lens.data._stream import check_again, one_pass
from apd_lens.decomposition._decomposition import Decomposition
from apd_lens.decomposition._observed import observed
from apd_lens.host._matrix import Use
from apd_lens.host._target import evaluating

Side = Literal["write", "read"]


@dataclass(frozen=True, eq=False, repr=False)
class DirectionMatch(Printed):
    """How similar the directions of components and latents are, beside two nulls. `print` shows the means.

    Attributes:
        cosine: cosine of every component with every latent, from 0 to 1, or from −1 where data give a sign; see
            `direction_cosines`.
        found: which component matches which latent.
        random_directions: the same for as many latents with random directions.
        random_components: the same for random components with the same singular values.
    """

    cosine: Float[Tensor, "C latents"]
    found: Matching
    random_directions: Matching
    random_components: Matching

    def table(self, of: Literal["component", "latent"] = "component") -> pd.DataFrame:
        """One row for each component, or latent, that counts; "similarity" is the cosine."""
        frame = self.found.table(of).rename(columns={"similarity": "cosine", "its similarity": "its cosine"})
        if of == "latent":
            return frame
        return with_null(frame, random_directions=self.random_directions, random_components=self.random_components)

    def _parts(self) -> list[str]:
        nulls = {"random directions": self.random_directions, "random components": self.random_components}
        return ["cosine of directions", side_by_side({"found": self.found, **nulls})]


@no_grad()
@full_precision()
def direction_cosines(
    A: Float[Tensor, "C d_in m"], B: Float[Tensor, "C m d_out"], directions: Float[Tensor, "n d_out"]
) -> Float[Tensor, "C n"]:
    """‖A_c B_c d‖ / ‖A_c B_c‖ for directions d, taken at norm 1: how much of its largest output a component can write
    along d; see the top of this file. 0 for a component, or direction, of norm 0.

    For what it reads: `direction_cosines(B.mT, A.mT, directions)`.

    >>> direction_cosines(torch.ones(1, 2, 1), torch.tensor([[[3.0, 4.0]]]), torch.eye(2))
    tensor([[0.6000, 0.8000]])
    """
    R = cast(Tensor, torch.linalg.qr(A, mode="r")[1])  # ‖A y‖ = ‖R y‖, and R is m × m
    small = R @ B
    largest = torch.linalg.matrix_norm(small, ord=2)
    units = F.normalize(directions.to(small), dim=1)
    at_once = fitting(32 * small.shape[1] * len(units))
    parts = [
        rearrange(rearrange(some, "C m d -> (C m) d") @ units.mT, "(C m) n -> C m n", C=len(some)).norm(dim=1)
        for some in small.split(at_once)
    ]
    return torch.cat(parts) / largest.clamp_min(torch.finfo(largest.dtype).tiny)[:, None]


@no_inference_mode()
@no_grad()
def direction_match(
    decomposition: Decomposition,
    dictionary: Dictionary,
    matrix: str,
    side: Side = "write",
    *,
    batches: Iterable[Batch] | None = None,
    threshold: float = 0.7,
    components: Bool[Tensor, " C"] | None = None,
    seed: int = 0,
) -> DirectionMatch:
    """Compares what components write through a matrix with what latents write, or what both read.

    Args:
        matrix: name of a decomposed matrix that writes to, or reads from, the place of the dictionary. For a tied
            matrix the use with the right width is taken.
        side: "write" compares with decoder directions, "read" with encoder directions.
        batches: data that give cosines their sign, iterated twice. Without them cosines have no sign. A component that
            is never active on them has cosine 0.
        threshold: cosine above which two count as a match, for the number of matches that each has.
        components: which count, such as `decomposition.select(batch).flatten(0, -2).any(0)`; default all, or with
            batches those that are active on them.

    Raises:
        UnknownWeight: the matrix is none of the decomposed ones.
        ShapeMismatch: no use of the matrix has the dictionary's width on that side.
        InvalidBatches: an iterator, which can be gone through once only, or one tensor in the place of batches.

    There are as many random directions as latents, uniform over all directions. Where activations lie in few
    dimensions, random components are the fairer null.
    """
    directions = dictionary.decoder if side == "write" else dictionary.encoder.mT
    use = _use(decomposition, matrix, side, directions.shape[1])
    if batches is not None:
        check_again(batches, times=2)
    generator = torch.Generator().manual_seed(seed)
    twins = random_components(decomposition.components, seed)
    random = torch.randn(directions.shape, generator=generator, dtype=torch.float32, device="cpu")
    kinds = {
        "found": (decomposition, directions),
        "random_directions": (decomposition, random),
        "random_components": (replace(decomposition, components=twins), directions),
    }
    signs = {}
    for some, _ in kinds.values():
        if id(some) not in signs:
            signs[id(some)] = None if batches is None else _signed_directions(some, batches, use, side)
    cosines, matches = {}, {}
    for kind, (some, of_latents) in kinds.items():
        factors, signed = _factors(some, some.components.factors(use), use, side), signs[id(some)]
        of_latents, counts = of_latents.to(factors[0]), components
        cosines[kind] = direction_cosines(*factors, of_latents)
        if signed is not None:
            cosines[kind] = cosines[kind] * (signed @ of_latents.mT).sign()
            counts = signed.any(1) if components is None else components
        matches[kind] = matching(cosines[kind], threshold, counts)
    return DirectionMatch(cosine=cosines["found"].cpu(), **matches)


def _signed_directions(
    decomposition: Decomposition, batches: Iterable[Batch], use: Use, side: Side
) -> Float[Tensor, "C d"]:
    """Σ x P_c over the data points on which each component is active, what it writes; or Σ x P_c P_cᵀ, what it reads.

    Of any length: only the sign of the products with other directions counts.
    """
    A, B = decomposition.components.factors(use)
    inputs = torch.zeros(A.shape[:2], dtype=torch.float32, device="cpu").to(A)
    for batch in one_pass(batches):
        with evaluating(decomposition.target.model):
            watched = decomposition.watch(batch)
            mask = observed(watched, decomposition.components, decomposition.settings).mask.to(A)
        for call in watched.calls:
            if call.use == use:
                inputs += _summed_inputs(call.x, mask, watched.valid, len(inputs[0]))
    written = einsum(inputs, A, B, "C d_in, C d_in m, C m d_out -> C d_out")
    if side == "write":
        return written
    read = einsum(written, B, A, "C d_out, C m d_out, C d_in m -> C d_in")
    return read[:, :-1] if _has_bias_row(decomposition, use) else read


def _summed_inputs(
    x: Inputs, mask: Float[Tensor, "batch *mask_pos C"], valid: Valid, d_in: int
) -> Float[Tensor, "C d_in"]:
    """Σ s_c(x) x over data points and positions; x that picks rows counts how often each is picked."""
    places = x.shape[:-1] if x.is_floating_point() else x.shape
    weights = mask.reshape(len(mask), *[1] * (len(places) - mask.ndim + 1), *mask.shape[1:]).expand(*places, -1)
    weights = zero_at_padding(weights, valid).flatten(0, -2)
    if x.is_floating_point():
        return weights.mT @ x.flatten(0, -2).to(weights)
    return weights.new_zeros(d_in, weights.shape[1]).index_add_(0, x.flatten(), weights).mT


def _use(decomposition: Decomposition, matrix: str, side: Side, width: int) -> Use:
    """The use of the matrix that writes, or reads, so many activations."""
    if side not in ("write", "read"):
        raise InvalidSetting(f'side is "write" or "read", got {side!r}.')
    if matrix not in decomposition.components.names:
        raise UnknownWeight(
            f"{matrix!r} is none of the decomposed matrices, which are {decomposition.components.names}."
        )
    uses = decomposition.target.weights[matrix].uses
    widths = {}
    for use in uses:
        widths[use.site] = _factors(decomposition, decomposition.components.factors(use), use, side)[1].shape[2]
        if widths[use.site] == width:
            return use
    raise ShapeMismatch(
        f"The dictionary has {width} activations, but {matrix} {side}s {widths} (use: how many). Choose a matrix that "
        f"{'writes to' if side == 'write' else 'reads from'} the dictionary's place, or the other side."
    )


def _factors(
    decomposition: Decomposition, factors: tuple[Tensor, Tensor], use: Use, side: Side
) -> tuple[Float[Tensor, "C d_other m"], Float[Tensor, "C m d"]]:
    """The two factors of a use, the one that lies at the dictionary's place last; without a bias's row."""
    A, B = factors
    if _has_bias_row(decomposition, use):
        A = A[:, :-1]
    return (A, B) if side == "write" else (B.mT, A.mT)


def _has_bias_row(decomposition: Decomposition, use: Use) -> bool:
    return decomposition.target.weights[use.matrix].bias is not None
