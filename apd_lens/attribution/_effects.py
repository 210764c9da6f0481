"""First-order effects of components on outputs: Σ_l <∂f/∂y_l, x_l P_c,l>."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from einops import einsum, rearrange
from jaxtyping import Float
from torch import Tensor

from apd_lens._errors import ShapeMismatch
from apd_lens._memory import fitting, slices
from apd_lens.attribution._over_outputs import shared_positions
from apd_lens.attribution._pullback import Jacobians, Part, jacobians_in_parts
from apd_lens.components._components import ParameterComponents
from apd_lens.components._factors import MatrixInput
from apd_lens.components._products import inner_activations
from apd_lens.data._finite import on_gpu
from apd_lens.data._points import Granularity
from apd_lens.passes._cotangents import Cotangents
from apd_lens.passes._watch import Call, WatchedPass

# On a CPU, what is summed over outputs at once stays in the cache, unless it would be of too few examples.
_CACHE = 2**22
_FEWEST_EXAMPLES = 128

# What it costs to write and read an inner activation, in multiply-adds.
_PER_INNER = 60

# The factors of a call, with the parts of its gradient.
_Used = tuple[Sequence[Part], Call, Tensor, Tensor]

# Vectors that lie in so few dimensions are looked for.
FEW = 128


def effects_on_outputs(
    watched: WatchedPass,
    cotangents: Cotangents,
    components: ParameterComponents,
    granularity: Granularity,
    memory: int,
) -> Float[Tensor, "v batch *data_pos C"]:
    """Σ_l Σ_uses <∂(v · f)/∂y_l , x_l P_c,l> for every v, signed. Uses up the pass's graph."""
    parts = []
    with torch.no_grad():
        for part, chunks in jacobians_in_parts(watched, cotangents, memory):
            effects = [
                torch.cat(list(effects_of_calls(jacobians, part.calls, components, granularity, memory)), 1)
                for jacobians in chunks
            ]
            parts.append(torch.cat(effects))
    return torch.cat(parts, 1)


def effects_of_calls(
    jacobians: Jacobians,
    calls: Sequence[Call],
    components: ParameterComponents,
    granularity: Granularity,
    memory: int,
) -> Iterator[Float[Tensor, "v data *pos C"]]:
    """Σ_l Σ_uses <∂(v · f)/∂y_l , x_l P_c,l> for every v, in chunks of examples whose temporaries fit into `memory`."""
    used = [(parts, call) for parts, call in zip(jacobians.of_calls, calls, strict=True) if parts]
    if not used:
        raise ShapeMismatch(
            "The output does not depend on any of the decomposed matrices, so there is nothing to attribute. Check "
            "output= and weights=."
        )
    if granularity == "position":
        shared_positions([call for _, call in used])
    terms = _terms([(parts, call, *components.factors(call.use)) for parts, call in used])
    inner_of = {
        number: _inner_activations_of_some(used[number][1], components, memory)
        for number in sorted({number for term in terms for number in term.calls})
    }
    factor = next(components.parameters())
    itemsize = torch.finfo(factor.dtype).bits // 8
    numbers = max(term.numbers_per_example() for term in terms)
    chunk = fitting(numbers * itemsize, memory)
    if not on_gpu(factor.device):
        chunk = min(chunk, max(_FEWEST_EXAMPLES, fitting(numbers * itemsize, _CACHE)))
    slopes = None if jacobians.slopes is None else jacobians.slopes.to(factor.dtype)
    n_examples = len(used[0][1].x)
    for examples in slices(n_examples, chunk):
        total = None
        inner = {number: of_call(examples) for number, of_call in inner_of.items()}
        for term in terms:
            effects = term([inner[number] for number in term.calls], examples, granularity)
            total = effects if total is None else total.add_(effects)
        assert total is not None
        if slopes is not None:
            total.mul_(slopes[:, examples].reshape(len(total), -1, *[1] * (total.ndim - 2)))
        yield total


def _inner_activations_of_some(
    call: Call, components: ParameterComponents, memory: int
) -> Callable[[slice], Float[Tensor, "examples *pos C m"]]:
    """Examples -> their x A; computed at once for all if it fits into `memory`."""
    A, x = components.factors(call.use)[0], call.x
    positions = x.numel() // (A.shape[1] if x.is_floating_point() else 1)
    if 8 * positions * A.shape[0] * A.shape[2] > memory:
        return lambda examples: inner_activations(x[examples], A)
    whole = inner_activations_of_many(x, A)
    return lambda examples: whole[examples]


@dataclass(frozen=True, eq=False)
class _Term:
    """A sum of effects over calls whose gradients are a common factor, or are all the same for all examples.

    The calls' A and B stand side by side, as if they were components of a higher rank; `inner` is x A of each.

    Attributes:
        calls: which.
        B: of all of them; times what the common factor goes through.
        values: the common factor; None where there is J Bᵀ in the place of B, which is the same for all examples.
    """

    calls: Sequence[int]
    B: Float[Tensor, "C m d"] | Float[Tensor, "gradients *places C m"]  # not v: the first may be taken for the second
    values: Float[Tensor, "v examples *pos d"] | None

    def __call__(
        self, inner: Sequence[Tensor], examples: slice, granularity: Granularity
    ) -> Float[Tensor, "v examples *data_pos C"]:
        side_by_side = inner[0] if len(inner) == 1 else torch.cat(list(inner), -1)
        if self.values is None:
            return shared_effects(self.B, side_by_side, granularity)
        return component_effects(self.values[:, examples], side_by_side, self.B, granularity)

    def numbers_per_example(self) -> int:
        """How many numbers the temporaries of one example hold, about."""
        if self.values is None:
            n_cotangents, *positions, n_components, m = self.B.shape
            return torch.Size(positions).numel() * 2 * n_components * (m + n_cotangents)
        (n_cotangents, _, *positions, d), (n_components, m, _) = self.values.shape, self.B.shape
        per_position = 2 * n_components * (m + n_cotangents)
        if _pulls_back(n_cotangents, m):
            per_position += 2 * n_cotangents * n_components * m
        else:
            per_position += 2 * n_components * d + n_cotangents * d
        return torch.Size(positions).numel() * per_position


@dataclass(frozen=True, eq=False)
class _OneMap:
    """A sum of effects over calls whose gradients are the same for all examples, as one linear map: x (A B Jᵀ).

    Attributes:
        x: of all calls, side by side.
        calls: whose x A are needed: none.
    """

    x: Float[Tensor, "examples d"]
    map: Float[Tensor, "d v C"]
    calls: Sequence[int] = ()

    def __call__(
        self, inner: Sequence[Tensor], examples: slice, granularity: Granularity
    ) -> Float[Tensor, "v examples C"]:
        effects = self.x[examples].to(self.map.dtype) @ self.map.flatten(1)
        return effects.unflatten(1, self.map.shape[1:]).movedim(1, 0)

    def numbers_per_example(self) -> int:
        """How many numbers the temporaries of one example hold, about."""
        return 2 * self.map[0].numel()


def _terms(used: Sequence[_Used]) -> list[_Term | _OneMap]:
    """The parts of the gradients of several calls, taken together where they have much in common."""
    together: dict[Any, list[tuple[int, Tensor]]] = {}
    common: dict[Any, Tensor] = {}
    for number, (parts, call, _, B) in enumerate(used):
        for values, through in parts:
            if values.shape[1] < len(call.y):
                pulled = einsum(values[:, 0].to(B.dtype), B, "v ... d_out, C m d_out -> v ... C m")
                together.setdefault(call.y.shape[1:-1], []).append((number, pulled))
            else:
                common[id(values)] = values.to(B.dtype)
                B_through = B if through is None else B @ through.to(B.dtype).mT
                together.setdefault(id(values), []).append((number, B_through))
    terms = []
    for key, items in together.items():
        numbers, of_calls = [number for number, _ in items], [B for _, B in items]
        values = common.get(key)
        if values is None and _is_cheaper_as_one_map([used[number] for number in numbers], len(of_calls[0])):
            maps = [
                einsum(used[number][2], pulled, "C d_in m, v C m -> d_in v C")
                for number, pulled in zip(numbers, of_calls, strict=True)
            ]
            terms.append(_OneMap(torch.cat([used[number][1].x for number in numbers], 1), torch.cat(maps)))
        else:
            stacked = of_calls[0] if len(items) == 1 else torch.cat(of_calls, -1 if values is None else 1)
            terms.append(_Term(numbers, stacked, values))
    return terms


def _is_cheaper_as_one_map(used: Sequence[_Used], n_cotangents: int) -> bool:
    """Whether it is cheaper to multiply x by A B Jᵀ than by A and then B Jᵀ, for an example and a component."""
    if any(len(parts) > 1 or call.y.ndim > 2 or not call.x.is_floating_point() for parts, call, _, _ in used):
        return False
    at_once = sum(A.shape[1] * n_cotangents for _, _, A, _ in used)
    one_by_one = sum(A.shape[2] * (A.shape[1] + n_cotangents + _PER_INNER) for _, _, A, _ in used)
    return at_once <= one_by_one


def component_effects(
    jacobian: Float[Tensor, "v examples *pos d_out"],
    inner: Float[Tensor, "examples *pos C m"],
    B: Float[Tensor, "C m d_out"],
    granularity: Granularity,
) -> Float[Tensor, "v examples *data_pos C"]:
    """<∂(v · f)/∂y , x P_c> of one use, from x A, for every v and component; summed over positions for examples."""
    if _pulls_back(len(jacobian), inner.shape[-1]):
        # (J Bᵀ) · (x A): no tensor of size batch × C × d_out.
        pulled = einsum(jacobian, B, "v ... d_out, C m d_out -> v ... C m")
        effects = (pulled * inner).sum(-1)
        positions = tuple(range(2, effects.ndim - 1))
        return effects.sum(positions) if granularity == "example" and positions else effects
    # With several v and rank > 1 it pays to build x P_c once: m + v instead of m · v multiplications.
    written = einsum(inner, B, "... C m, C m d_out -> ... C d_out")
    if granularity == "example":
        return einsum(
            rearrange(jacobian, "v examples ... d_out -> examples v (... d_out)"),
            rearrange(written, "examples ... C d_out -> examples C (... d_out)"),
            "examples v p, examples C p -> v examples C",
        )
    return einsum(jacobian, written, "v ... d_out, ... C d_out -> v ... C")


def shared_effects(
    pulled: Float[Tensor, "v *pos C m"], inner: Float[Tensor, "examples *pos C m"], granularity: Granularity
) -> Float[Tensor, "v examples *data_pos C"]:
    """The same where J, and so `pulled` = J Bᵀ, is the same for all examples."""
    if granularity == "example":
        return einsum(
            rearrange(inner, "examples ... C m -> C examples (... m)"),
            rearrange(pulled, "v ... C m -> C (... m) v"),
            "C examples p, C p v -> v examples C",
        )
    return einsum(inner, pulled, "examples ... C m, v ... C m -> v examples ... C")


def _pulls_back(n_cotangents: int, rank: int) -> bool:
    return n_cotangents == 1 or rank == 1


def inner_activations_of_many(x: MatrixInput, A: Float[Tensor, "C d_in m"]) -> Float[Tensor, "batch *pos C m"]:
    """x A_c for every component; cheaper if x lies in few dimensions: x = z Q, and z (Q A)."""
    n_components, d_in, m = A.shape
    n_rows = x.numel() // d_in
    plain, reduced = n_rows * d_in, FEW * (n_rows + d_in)
    if x.dtype == A.dtype and n_components * m >= 8 * FEW and plain >= 1.5 * reduced:
        found = in_few_dimensions(x)
        if found is not None:
            z, Q = found
            of_basis = inner_activations(Q, A)
            return (z @ of_basis.flatten(1)).unflatten(-1, of_basis.shape[1:])
    return inner_activations(x, A)


def in_few_dimensions(
    vectors: Float[Tensor, "*vectors d"],
) -> tuple[Float[Tensor, "*vectors few"], Float[Tensor, "few d"]] | None:
    """z and Q with vectors = z Q and Q Qᵀ = 1, if `FEW` dimensions hold them all; else None.

    So it is where a residual stream is wider than all that is written into it and read from it, as in the paper's
    residual MLP. Q is an orthonormal basis of random mixtures of the vectors; whether it spans all is checked. Not on a
    GPU, which would have to be waited for.
    """
    if on_gpu(vectors.device):
        return None
    flat = vectors.reshape(-1, vectors.shape[-1])
    mixtures = (
        torch.randn(FEW, len(flat), generator=torch.Generator().manual_seed(0), dtype=flat.dtype, device="cpu") @ flat
    )
    Q = torch.linalg.qr(mixtures.mT)[0].mT
    z = flat @ Q.mT
    rest = (flat - z @ Q).abs().max()
    if bool(rest > 16 * torch.finfo(flat.dtype).eps * flat.abs().max()):
        return None
    return z.unflatten(0, vectors.shape[:-1]), Q
