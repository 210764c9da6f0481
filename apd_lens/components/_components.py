"""Parameter components: vectors in parameter space that span all decomposed matrices, stored as low-rank factors."""

import copy
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from apd_lens._block import full_precision
from apd_lens._errors import ApdWarning, InvalidSetting
from apd_lens._shards import is_sharded, put, sharded, whole
from apd_lens.components._factors import sum_of_components
from apd_lens.components._learned import Learned
from apd_lens.host._matrix import Use, WeightMatrix


class ParameterComponents(nn.Module):
    """C components P_c = {A_c,l @ B_c,l}, with one pair of factors for each decomposed matrix l.

    A matrix that is tied has one pair of factors, and all its uses share it. Factors are float32, or float64 where
    the matrix is. The parameters are A_cᵀ and B_c: where a column of A_c is in one piece of memory, as a row of B_c is,
    those of all components are one matrix, `(C m) d`, without a copy.

    Sharded components are divided over processes. A and B of a matrix are gathered when they are asked for, which all
    processes must do together, and are copies.

    Attributes:
        gates: the network that says which are needed, where one was trained with them; its parameters are among theirs.
    """

    def __init__(
        self,
        A: Mapping[str, Float[Tensor, "..."]],
        B: Mapping[str, Float[Tensor, "..."]],
        gates: Learned | None = None,
    ):
        super().__init__()
        self.names: list[str] = list(A)
        # Lists, since the names of parameters must not hold a dot.
        self._A_transposed = nn.ParameterList(factor.mT.contiguous() for factor in A.values())
        self._B = nn.ParameterList(B[name].contiguous() for name in self.names)
        self.gates: Learned | None = gates  # behind the factors, in the order of parameters

    @property
    def A(self) -> Mapping[str, Tensor]:
        """Name -> `C d_in m`, the side that reads x."""
        return _Side(zip(self.names, self._A_transposed, strict=True), _transposed)

    @property
    def B(self) -> Mapping[str, Tensor]:
        """Name -> `C m d_out`, the side that writes y."""
        return _Side(zip(self.names, self._B, strict=True), whole)

    @property
    def sizes(self) -> dict[str, tuple[int, int, int]]:
        """Name -> d_in, m, d_out."""
        pairs = zip(self._A_transposed, self._B, strict=True)
        return {name: (A.shape[2], *B.shape[1:]) for name, (A, B) in zip(self.names, pairs, strict=True)}  # type: ignore[misc]

    @property
    def is_sharded(self) -> bool:
        """Whether they are divided over processes."""
        return is_sharded(self._B[0])

    def shard(self) -> None:
        """Divides them over the processes, one factor after the other."""
        for side in (self._A_transposed, self._B):
            for number, factor in enumerate(side):
                side[number] = nn.Parameter(sharded(factor.detach()), factor.requires_grad)

    def whole(self) -> "ParameterComponents":
        """Itself; of sharded components a copy that each process has whole."""
        return ParameterComponents(self.A, self.B, copy.deepcopy(self.gates)) if self.is_sharded else self

    def take(self, other: "ParameterComponents") -> None:
        """Takes over the numbers of whole components, in place."""
        for ours, theirs in zip(self.parameters(), other.parameters(), strict=True):
            put(theirs, ours)

    @property
    def factors_of_all(self) -> list[Tensor]:
        """The parameters that are factors, `C m d` each."""
        return [*self._A_transposed, *self._B]

    @property
    def n_components(self) -> int:
        return len(self._B[0])

    @full_precision()
    def component_weights(self, name: str) -> Float[Tensor, "C d_in d_out"]:
        """P_c of one matrix for every component, as full matrices."""
        return self.A[name] @ self.B[name]

    def picked(self, numbers: Sequence[int]) -> "ParameterComponents":
        """The chosen components, in the given order and without gradients. A component may be chosen several times."""
        # A range is a slice: a list of indices would have to be copied to the device.
        if isinstance(numbers, range) and numbers.step == 1 and numbers.start >= 0:
            chosen = slice(numbers.start, numbers.stop)
        else:
            chosen = list(numbers)
        A, B = ({name: side[chosen] for name, side in sides.items()} for sides in (self.A, self.B))
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
        """A and B as one use multiplies by them: transposed, narrowed to a part of the matrix, and scaled.

        (A B)ᵀ = Bᵀ Aᵀ for a transposed use.
        """
        number = self.names.index(use.matrix)
        A, B = _transposed(self._A_transposed[number]), whole(self._B[number])
        if use.transposed:
            A, B = B.mT, A.mT
        B = B[:, :, use.columns]
        return A[:, use.rows], B if use.scale == 1 else use.scale * B

    def state_of_gates(self) -> dict[str, Tensor]:
        """The numbers of the gates, by name; of none, none."""
        return {} if self.gates is None else {name: values.detach() for name, values in self.gates.named_parameters()}

    def extra_repr(self) -> str:
        return f"n_components={self.n_components}, matrices={self.names}"


class _Side(Mapping[str, Tensor]):
    """Name -> factor, which is made when it is asked for."""

    def __init__(self, factors: Iterable[tuple[str, Tensor]], made: Callable[[Tensor], Tensor]):
        self._factors, self._made = dict(factors), made

    def __getitem__(self, name: str) -> Tensor:
        return self._made(self._factors[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self._factors)

    def __len__(self) -> int:
        return len(self._factors)


def _transposed(factor: Float[Tensor, "C m d_in"]) -> Float[Tensor, "C d_in m"]:
    factor = whole(factor)
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


def initial_components(
    matrices: Sequence[WeightMatrix],
    n_components: int,
    rank: int | None,
    generator: torch.Generator,
    scale: float = 1.0,
    own: Callable[[Tensor], Tensor] = lambda factor: factor,
    units: Mapping[str, Float[Tensor, ""]] | None = None,
) -> ParameterComponents:
    """Random factors, Xavier-normal each: standard deviation sqrt(2 / (fan_in + fan_out)) of `d_in m` and `m d_out`.

    Args:
        scale: of the factors, over Xavier's.
        rank: the largest m; a matrix whose min(d_in, d_out) is less has that, and with None each has it.
        generator: on the CPU; factors are drawn there, so that every device gets the same.
        own: what this process keeps of a factor.
        units: name -> how much larger its factors are than Xavier's, see `unit_of`; None for 1.

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
        size = scale if units is None else scale * units[matrix.name].item()

        def xavier(fan_in: int, fan_out: int) -> Tensor:
            factor = torch.randn(n_components, fan_in, fan_out, generator=generator, dtype=dtype, device="cpu")  # noqa: B023
            return own((factor * size * xavier_std(fan_in, fan_out)).to(weight.device))  # noqa: B023

        A[matrix.name], B[matrix.name] = xavier(d_in, m), xavier(m, d_out)
    return ParameterComponents(A, B)


def unit_of(weight: Float[Tensor, "d_in d_out"]) -> Float[Tensor, ""]:
    """The root of what the matrix is over one of Xavier's start: so much larger are its factors than Xavier's.

    A model may be rescaled and do the same: of two linear layers, one times 100 and the other over 100. In these units
    it is decomposed in the same way. A matrix of zeros has 1.
    """
    size = weight.float().square().mean().sqrt().item() / xavier_std(*weight.shape)
    return torch.tensor(size**0.5 or 1.0, dtype=torch.float64, device="cpu")


def xavier_std(fan_in: int, fan_out: int) -> float:
    """Standard deviation of the entries of a factor at the start."""
    return (2 / (fan_in + fan_out)) ** 0.5


def warn_of_too_few(components: ParameterComponents) -> None:
    """Warns where so many components of so low a rank cannot sum to a matrix, whatever is in them."""
    C = components.n_components
    ranks = {name: m for name, (_, m, _) in components.sizes.items()}
    full = {name: min(d_in, d_out) for name, (d_in, _, d_out) in components.sizes.items()}
    missing = {name: full[name] - C * ranks[name] for name in full if full[name] > C * ranks[name]}
    if not missing:
        return
    name = max(missing, key=missing.__getitem__)
    others = f" ({len(missing)} matrices are like it)" if len(missing) > 1 else ""
    warnings.warn(
        f"{C} components of rank {ranks[name]} sum to a matrix of rank {C * ranks[name]} at most, but {name} may have "
        f"rank {full[name]}{others}. So faithfulness cannot become 0. Give n_components × rank of {full[name]} or "
        "more; or Losses(faithfulness=0), where components need not sum to the weights.",
        ApdWarning,
        stacklevel=4,
    )
