"""Parameter components: vectors in parameter space that span all decomposed matrices, stored as low-rank factors."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from einops import einsum, rearrange
from jaxtyping import Bool, Float
from torch import Tensor, nn

from apd_lens._errors import InvalidSetting
from apd_lens._target import Use, WeightMatrix

# Numbers in a temporary of `inner_products`.
_AT_ONCE = 2**24


@contextmanager
def full_precision() -> Iterator[None]:
    """Inside, autocast is off: sums and products of weights are no pass of a model. Also a decorator."""
    devices = [device for device in ("cpu", "cuda", "mps", "xpu") if torch.is_autocast_enabled(device)]
    try:
        for device in devices:
            torch.set_autocast_enabled(device, False)
        yield
    finally:
        for device in devices:
            torch.set_autocast_enabled(device, True)


class ParameterComponents(nn.Module):
    """C components P_c = {A_c,l @ B_c,l}, one pair of factors for each decomposed matrix l.

    A matrix that is tied has one pair of factors, and all its uses share it. Factors are float32, or float64 where
    the matrix is. The parameters are A_cᵀ and B_c: where a column of A_c is in one piece of memory, as a row of B_c is,
    those of all components are one matrix, `(C m) d`, without a copy.
    """

    def __init__(self, A: Mapping[str, Float[Tensor, "..."]], B: Mapping[str, Float[Tensor, "..."]]):
        super().__init__()
        self.names: list[str] = list(A)
        # Lists, since the names of parameters must not hold a dot.
        self._A_transposed = nn.ParameterList(factor.mT.contiguous() for factor in A.values())
        self._B = nn.ParameterList(B[name].contiguous() for name in self.names)

    @property
    def A(self) -> dict[str, Tensor]:
        """Name -> `C d_in m`, the side that reads x."""
        return {name: _transposed(factor) for name, factor in zip(self.names, self._A_transposed, strict=True)}

    @property
    def B(self) -> dict[str, Tensor]:
        """Name -> `C m d_out`, the side that writes y."""
        return dict(zip(self.names, self._B, strict=True))

    @property
    def n_components(self) -> int:
        return len(self._B[0])

    @full_precision()
    def component_weights(self, name: str) -> Float[Tensor, "C d_in d_out"]:
        """P_c of one matrix for every component, as full matrices."""
        return self.A[name] @ self.B[name]

    def picked(self, numbers: Sequence[int]) -> "ParameterComponents":
        """These components alone, in that order, without gradients; one may come several times."""
        numbers = list(numbers)
        A, B = ({name: side[numbers] for name, side in sides.items()} for sides in (self.A, self.B))
        return ParameterComponents(A, B).requires_grad_(False)

    def summed(
        self, name: str, mask: Float[Tensor, " C"] | Bool[Tensor, " C"] | None = None
    ) -> Float[Tensor, "d_in d_out"]:
        """Σ_c mask_c P_c of one matrix, without building the components one by one."""
        A, B = self.A[name], self.B[name]
        if mask is not None:
            A = A * mask.to(A)[:, None, None]
        return sum_of_components(A, B)

    def factors(self, use: Use) -> tuple[Float[Tensor, "C d_in m"], Float[Tensor, "C m d_out"]]:
        """A and B the way round, of the part of the matrix, and at the scale that one use multiplies by.

        (A B)ᵀ = Bᵀ Aᵀ for a transposed use.
        """
        number = self.names.index(use.matrix)
        A, B = _transposed(self._A_transposed[number]), self._B[number]
        if use.transposed:
            A, B = B.mT, A.mT
        B = B[:, :, use.columns]
        return A[:, use.rows], B if use.scale == 1 else use.scale * B

    def extra_repr(self) -> str:
        return f"n_components={self.n_components}, matrices={self.names}"


def _transposed(factor: Float[Tensor, "C m d_in"]) -> Float[Tensor, "C d_in m"]:
    return _Transposed.apply(factor) if factor.requires_grad and torch.is_grad_enabled() else factor.mT


class _Transposed(torch.autograd.Function):
    """A_cᵀ -> A_c. Its gradient is no view, since to a view autograd adds nothing in place."""

    @staticmethod
    def forward(factor: Tensor) -> Tensor:
        return factor.mT

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None: ...

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return gradient.mT.detach()


@full_precision()
def sum_of_components(
    A: Float[Tensor, "*seeds C d_in m"], B: Float[Tensor, "*seeds C m d_out"]
) -> Float[Tensor, "*seeds d_in d_out"]:
    """Σ_c A_c B_c, without building the components one by one."""
    columns, rows = side_by_side(A, B)
    return columns @ rows


def side_by_side(
    A: Float[Tensor, "*seeds C d_in m"], B: Float[Tensor, "*seeds C m d_out"]
) -> tuple[Float[Tensor, "*seeds d_in C_m"], Float[Tensor, "*seeds C_m d_out"]]:
    """The columns of all A_c, and the rows of all B_c, each as one matrix."""
    return rearrange(A, "... C d_in m -> ... d_in (C m)"), rearrange(B, "... C m d_out -> ... (C m) d_out")


@full_precision()
def inner_products(
    A: Float[Tensor, "C d_in m"],
    B: Float[Tensor, "C m d_out"],
    other_A: Float[Tensor, "D d_in n"],
    other_B: Float[Tensor, "D n d_out"],
) -> Float[Tensor, "C D"]:
    """<A_c B_c , A'_e B'_e> = Σ (A_cᵀ A'_e) ∘ (B_c B'_eᵀ), without building a component."""
    left, right = rearrange(other_A, "D d_in n -> d_in (D n)"), rearrange(other_B, "D n d_out -> d_out (D n)")
    at_once = max(1, _AT_ONCE // max(1, A.shape[2] * left.shape[1]))
    parts = [
        ((a.mT @ left) * (b @ right)).sum(1).unflatten(1, (len(other_A), -1)).sum(2)
        for a, b in zip(A.split(at_once), B.split(at_once), strict=True)
    ]
    return torch.cat(parts)


def initial_components(
    matrices: Sequence[WeightMatrix],
    n_components: int,
    rank: int | None,
    generator: torch.Generator,
    scale: float = 1.0,
) -> ParameterComponents:
    """Random factors, Xavier-normal each: standard deviation sqrt(2 / (fan_in + fan_out)) of `d_in m` and `m d_out`.

    Args:
        scale: of the factors, over Xavier's.
        rank: the largest m; a matrix whose min(d_in, d_out) is less has that, and with None each has it.
        generator: on the CPU; factors are drawn there, so that every device gets the same.

    Raises:
        InvalidSetting: n_components < 1 or rank < 1.
    """
    if n_components < 1:
        raise InvalidSetting(f"n_components must be at least 1, got {n_components}.")
    if rank is not None and rank < 1:
        raise InvalidSetting(f"rank must be at least 1, or None for the full rank of each matrix; got {rank}.")
    A, B = {}, {}
    for matrix in matrices:
        d_in, d_out = matrix.d_in, matrix.d_out
        m = min(d_in, d_out) if rank is None else min(rank, d_in, d_out)
        weight = matrix.value()
        dtype = torch.promote_types(weight.dtype, torch.float32)

        def xavier(fan_in: int, fan_out: int) -> Tensor:
            factor = torch.randn(n_components, fan_in, fan_out, generator=generator, dtype=dtype, device="cpu")  # noqa: B023
            return (factor * scale * xavier_std(fan_in, fan_out)).to(weight.device)  # noqa: B023

        A[matrix.name], B[matrix.name] = xavier(d_in, m), xavier(m, d_out)
    return ParameterComponents(A, B)


def xavier_std(fan_in: int, fan_out: int) -> float:
    """Standard deviation of the entries of a factor at the start."""
    return (2 / (fan_in + fan_out)) ** 0.5


@torch.no_grad()
def normalize_columns(
    components: ParameterComponents, keep_products: bool = True, unless: Float[Tensor, ""] | None = None
) -> None:
    """Divides every column A_c[:, i] by its norm, in place; columns of zeros stay.

    Args:
        keep_products: multiply the row B_c[i, :] by it, so that P_c stays as it was.
        unless: leave all as it is if this is not 0.
    """
    for A, B in zip(components.A.values(), components.B.values(), strict=True):
        norms = A.norm(dim=1, keepdim=True)
        if unless is not None:
            norms.masked_fill_(unless != 0, 1)
        A.div_(norms.masked_fill(norms == 0, 1))
        if keep_products:
            B.mul_(norms.mT)


@torch.no_grad()
def remove_parallel_gradients(components: ParameterComponents) -> None:
    """Takes out of the gradient of every column a = A_c[:, i] what points along it: g − a <a, g> / ‖a‖²."""
    for columns in components._A_transposed:
        assert columns.grad is not None
        along = (columns * columns.grad).sum(2, keepdim=True)
        squares = columns.square().sum(2, keepdim=True)
        columns.grad.sub_(columns * (along / squares.masked_fill(squares == 0, 1)))


@torch.no_grad()
@full_precision()
def random_components(components: ParameterComponents, seed: int = 0) -> ParameterComponents:
    """A null control: random components, each with the singular values of its model in every matrix.

    Norm and (effective) rank are the same, only the directions are random. Whatever is claimed of the components
    should fail for these.
    """
    generator = torch.Generator().manual_seed(seed)

    def random_orthonormal(like: Tensor) -> Tensor:
        noise = torch.randn(like.shape, generator=generator, dtype=like.dtype, device="cpu").to(like.device)
        return torch.linalg.qr(noise)[0]

    A, B = {}, {}
    for name in components.names:
        A[name] = random_orthonormal(components.A[name]) * singular_values(components, name)[:, None, :]
        B[name] = random_orthonormal(components.B[name].mT).mT
    return ParameterComponents(A, B).requires_grad_(False)


@torch.no_grad()
@full_precision()
def singular_values(components: ParameterComponents, name: str) -> Float[Tensor, "C m"]:
    """Singular values of every component in one matrix, largest first.

    From the small matrix R_A R_Bᵀ of the factors' QR decompositions: A B = Q_A (R_A R_Bᵀ) Q_Bᵀ.
    """
    R_A = cast(Tensor, torch.linalg.qr(components.A[name], mode="r")[1])
    R_B = cast(Tensor, torch.linalg.qr(components.B[name].mT, mode="r")[1])
    return torch.linalg.svdvals(R_A @ R_B.mT)


@torch.no_grad()
def output_share(components: ParameterComponents, name: str) -> Float[Tensor, "C d_out"]:
    """Share of every output unit's squared weight that each component holds, of the sum over components.

    ‖P_c[:, j]‖² / Σ_c ‖P_c[:, j]‖², in one matrix. Columns sum to 1.
    """
    return _share(components.A[name], components.B[name])


@torch.no_grad()
def input_share(components: ParameterComponents, name: str) -> Float[Tensor, "C d_in"]:
    """Share of every input unit's squared weight that each component holds: `output_share` for the rows P_c[i, :]."""
    return _share(components.B[name].mT, components.A[name].mT)


def _share(A: Float[Tensor, "C d_in m"], B: Float[Tensor, "C m d_out"]) -> Float[Tensor, "C d_out"]:
    squares = column_squares(A, B)
    return squares / squares.sum(0).clamp_min(torch.finfo(squares.dtype).tiny)


@full_precision()
def column_squares(A: Float[Tensor, "C d_in m"], B: Float[Tensor, "C m d_out"]) -> Float[Tensor, "C d_out"]:
    """‖P_c[:, j]‖² = bᵀ (Aᵀ A) b for every column b of B, without building A @ B."""
    return einsum(B, A.mT @ A, B, "C m d_out, C m n, C n d_out -> C d_out")


def effective_rank(singular_values: Float[Tensor, "C m"]) -> Float[Tensor, " C"]:
    """exp of the entropy of σ / Σσ: 1 for a rank-one matrix, r for r equal singular values, 0 for the zero matrix.

    Source: Roy and Vetterli 2007, "The effective rank: a measure of effective dimensionality".
    """
    total = singular_values.sum(-1, keepdim=True)
    share = singular_values / total.clamp_min(torch.finfo(singular_values.dtype).tiny)
    return torch.special.entr(share).sum(-1).exp() * (total[:, 0] > 0)
