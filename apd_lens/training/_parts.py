"""What the model runs on where inactive components, and the rest, are on in part."""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from apd_lens._processes import own
from apd_lens.components._components import ParameterComponents, xavier_std
from apd_lens.components._factors import Mask
from apd_lens.host._adapter import Intercept
from apd_lens.masks._sampling import path_mask, random_subsets
from apd_lens.passes._replace import Mixture, added, by_matrix

# The components, how much of each is on at least, draws, whether a part of the rest is on too.
Part = Callable[[ParameterComponents, Mask, torch.Generator, bool], Intercept]


def uniform(components: ParameterComponents, on: Mask, draws: torch.Generator, with_rest: bool) -> Intercept:
    """γ_c drawn between s_c and 1, and that of the rest between 0 and 1."""
    mask = path_mask(on, draws)
    return Mixture(components, own(mask), own(_amounts(mask, (len(mask),), draws)) if with_rest else 0.0)


def in_some_matrices(components: ParameterComponents, on: Mask, draws: torch.Generator, with_rest: bool) -> Intercept:
    """The same in a random subset of the matrices, of random size, for each example; the others are the model's own."""
    mask, M, n = path_mask(on, draws), len(components.names), len(on)
    chosen = random_subsets(_amounts(mask, (n, 1), draws), _amounts(mask, (n, M), draws))
    rest = _amounts(mask, (n,), draws) if with_rest else mask.new_zeros(n)

    def of_matrix(place: int) -> Mixture:
        here = chosen[:, place]
        shares = torch.where(here.reshape(-1, *[1] * (mask.ndim - 1)), mask, 1.0)
        return Mixture(components, own(shares), own(torch.where(here, rest, 1.0)))

    return by_matrix({name: of_matrix(place) for place, name in enumerate(components.names)})


def noise(components: ParameterComponents, on: Mask, draws: torch.Generator, with_rest: bool) -> Intercept:
    """(1 − s_c) R_c in the place of what is left of P_c, R_c being factors of Xavier's size. The rest is off."""

    def drawn(like: Tensor) -> Tensor:
        values = torch.randn(like.shape, generator=draws, dtype=like.dtype, device=like.device)
        return values * xavier_std(like.shape[-2], like.shape[-1])

    A, B = ({name: drawn(side) for name, side in sides.items()} for sides in (components.A, components.B))
    random = ParameterComponents(A, B).requires_grad_(False)
    return added(Mixture(components, own(on)), Mixture(random, own(1 - on.to(torch.float32))))


PARTS: dict[str, Part] = {"uniform": uniform, "matrices": in_some_matrices, "noise": noise}


def inactive(components: ParameterComponents, on: Mask, draws: torch.Generator) -> Intercept:
    """The inactive components and the rest without the active ones; in half of the examples a random part of each."""
    off, n = 1 - on.to(torch.float32), len(on)
    whole = _amounts(off, (n,), draws) < 0.5
    parts = _amounts(off, off.shape, draws).masked_fill(whole.reshape(-1, *[1] * (off.ndim - 1)), 1.0)
    return Mixture(components, own(off * parts), own(_amounts(off, (n,), draws).masked_fill(whole, 1.0)))


def attacked(
    components: ParameterComponents, on: Mask, shares: Float[Tensor, "batch *pos units"], with_rest: bool
) -> Intercept:
    """The share of each inactive component, and the last one of the rest, that an attack has found."""
    on = on.to(shares.dtype)
    rest = own(shares[..., -1]) if with_rest else 0.0
    return Mixture(components, own(on + (1 - on) * shares[..., :-1]), rest)


def _amounts(like: Tensor, shape: tuple[int, ...], draws: torch.Generator) -> Tensor:
    return torch.rand(shape, generator=draws, device=like.device, dtype=torch.float32)
