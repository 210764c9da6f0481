"""What stands in the place of x W: a mixture of components and of the rest."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from apd_lens._shards import freed_after
from apd_lens.components._components import ParameterComponents
from apd_lens.components._factors import Mask, MatrixInput
from apd_lens.components._pairs import ActivePairs, active_pairs
from apd_lens.components._products import masked_product
from apd_lens.host._adapter import Intercept
from apd_lens.host._matrix import Use


@dataclass(frozen=True, eq=False)
class Mixture:
    """y = r · x W + Σ_c (s_c − r) · x P_c + bias, in the place of x W + bias.

    s_c is how much of component c is on, r how much of the rest W − Σ_c P_c. With r = 0 the model runs on components
    alone; with r = 1 on its own weights, but for components with s_c < 1. No dense rest is ever built. With r = 1 and
    no components y is bit for bit the host's.

    Attributes:
        components: those whose share is not that of the rest.
        on: s, for each data point or for all.
        rest: r, for each example or data point, or for all.
        n_active: number of True in `on`, if that is known.
    """

    components: ParameterComponents
    on: Mask | float = 1.0
    rest: Float[Tensor, "examples *rest_pos"] | float = 0.0
    n_active: int | None = None

    def __post_init__(self) -> None:
        _ = self._pairs  # here, and not in a forward, whose tensors may be fake

    def __call__(self, use: Use, x: MatrixInput, original: Callable[[], Tensor], bias: Tensor | None) -> Tensor:
        r = self.rest
        if not isinstance(r, Tensor) and r == 0:
            y = self._product(use, x)
            return _in_host_dtype(y if bias is None else y + bias, x, original)
        y = original()
        if not isinstance(r, Tensor) and r == 1:
            return (y + self._product(use, x)).to(y.dtype) if self.components.n_components else y
        r = _for_each(r, y)
        scaled = r * (y if bias is None else y - bias) + (0 if bias is None else bias)
        return (scaled + self._product(use, x)).to(y.dtype)

    def some(self, examples: slice) -> "Mixture":
        """For some of the examples."""
        on, rest = (share[examples] if isinstance(share, Tensor) else share for share in (self.on, self.rest))
        return Mixture(self.components, on, rest)

    @property
    def requires_grad(self) -> bool:
        """Whether what is on is learned itself."""
        return any(isinstance(share, Tensor) and share.requires_grad for share in (self.on, self.rest))

    def _product(self, use: Use, x: MatrixInput) -> Float[Tensor, "examples *pos d_out"]:
        """Σ_c (s_c − r) · x P_c."""
        return freed_after(lambda: self._product_now(use, x))

    def _product_now(self, use: Use, x: MatrixInput) -> Float[Tensor, "examples *pos d_out"]:
        A, B = self.components.factors(use)
        if not isinstance(self.on, Tensor) and not isinstance(self.rest, Tensor):
            return (self.on - self.rest) * masked_product(x, A, B)
        if self._pairs is None:
            return masked_product(x, A, B, self._difference(A))
        mask, pairs = self._pairs
        product = masked_product(x, A, B, mask.to(A.device), pairs.to(A.device))
        return -product if self.rest else product

    def _difference(self, A: Tensor) -> Mask:
        """s − r."""
        if isinstance(self.on, Tensor):
            return (self.on.to(A.dtype) - _for_each(self.rest, self.on)).to(A.device)
        assert isinstance(self.rest, Tensor)
        return (self.on - self.rest.to(A))[..., None].expand(*self.rest.shape, len(A))

    @cached_property
    def _pairs(self) -> tuple[Bool[Tensor, "examples *mask_pos C"], ActivePairs] | None:
        """Where s_c − r is 1, or −1, and elsewhere 0: that mask and its pairs. Otherwise None."""
        if not isinstance(self.on, Tensor) or self.on.dtype != torch.bool or not self.on.numel():
            return None
        if isinstance(self.rest, Tensor) or self.rest not in (0, 1):
            return None
        mask = ~self.on if self.rest else self.on
        n_active = self.on.numel() - self.n_active if self.rest and self.n_active is not None else self.n_active
        return mask, active_pairs(mask, n_active)


def by_matrix(mixtures: Mapping[str, Mixture]) -> Intercept:
    """A mixture of its own in the place of each matrix."""
    return lambda use, x, original, bias: mixtures[use.matrix](use, x, original, bias)


def added(one: Intercept, other: Intercept) -> Intercept:
    """The sum of what two give, with the bias once."""
    return lambda use, x, original, bias: one(use, x, original, bias) + other(use, x, original, None)


def all_but_one(
    n_components: int,
    n_examples: int,
    device: torch.device,
    positions: Sequence[int] = (),
    places: slice = slice(None),
) -> Bool[Tensor, "replicates *pos C"]:
    """For a batch replicated for each component, and for each of some places: all are on but that one, there.

    Args:
        positions: the position axes; without them a component is off everywhere.
        places: of all positions in one row.
    """
    this = torch.eye(n_components, dtype=torch.bool, device=device)
    if not positions:
        return ~this.repeat_interleave(n_examples, 0)
    here = torch.eye(math.prod(positions), dtype=torch.bool, device=device)[places]
    off = this[:, None, None, :] & here[None, :, :, None]  # C place pos C
    return ~off.flatten(0, 1).repeat_interleave(n_examples, 0).unflatten(1, positions)


def _for_each(rest: Tensor | float, values: Tensor) -> Tensor | float:
    """r of each example or data point, to be multiplied with values `examples *rest`."""
    if not isinstance(rest, Tensor):
        return rest
    return rest.to(values.device).reshape(*rest.shape, *[1] * (values.ndim - rest.ndim))


def _in_host_dtype(y: Tensor, x: Tensor, original: Callable[[], Tensor]) -> Tensor:
    """y in the dtype that the host would have returned: a product has that of x, or of autocast, which has been at
    work on y too; a lookup has that of the host's rows, and looking them up costs little."""
    if not x.is_floating_point():
        return y.to(original().dtype)
    return y if torch.is_autocast_enabled(y.device.type) else y.to(x.dtype)
