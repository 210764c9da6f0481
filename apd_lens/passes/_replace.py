"""What stands in the place of x W: components under a mask, the weights without components, components alone."""

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from apd_lens.components._components import ParameterComponents
from apd_lens.components._factors import Mask
from apd_lens.components._pairs import active_pairs
from apd_lens.components._products import masked_product
from apd_lens.host._adapter import Intercept
from apd_lens.host._matrix import Use


def replace_weights(
    components: ParameterComponents, mask: Mask | None = None, n_active: int | None = None
) -> Intercept:
    """y = x κ + bias with κ = Σ_c mask_c P_c, in the place of x W + bias.

    Args:
        n_active: number of True in the mask, if that is known.
    """
    active = active_pairs(mask, n_active) if mask is not None and mask.dtype == torch.bool else None

    def replace(use: Use, x: Tensor, original: Callable[[], Tensor], bias: Tensor | None) -> Tensor:
        y = masked_product(x, *components.factors(use), mask, active)
        return _in_host_dtype(y if bias is None else y + bias, x, original)

    return replace


def subtract_weights(components: ParameterComponents, chosen: Sequence[int]) -> Intercept:
    """y = x W + bias − Σ_{c chosen} x P_c; with nothing chosen, the host's own y."""

    def subtract(use: Use, x: Tensor, original: Callable[[], Tensor], bias: Tensor | None) -> Tensor:
        y = original()
        if not chosen:
            return y
        A, B = components.factors(use)
        return (y - masked_product(x, A[list(chosen)], B[list(chosen)])).to(y.dtype)

    return subtract


def subtract_weights_of_each(
    components: ParameterComponents, chosen: slice, places: slice | None, n_examples: int
) -> Intercept:
    """For a batch replicated for each of the chosen components: y = x W + bias − x P_c, each replicate its own c.

    Args:
        places: positions (all position axes in one). Then there is a replicate for each component and each of these,
            and the component is taken out at that position only; None for everywhere.
        n_examples: in one replicate.
    """

    def subtract(use: Use, x: Tensor, original: Callable[[], Tensor], bias: Tensor | None) -> Tensor:
        A, B = (factor[chosen] for factor in components.factors(use))
        n_places = 1 if places is None else places.stop - places.start
        replicates, y = (len(A), n_places, n_examples), original()
        if len(y) == 1:  # shared by all examples, such as position embeddings
            x, y = (tensor.expand(len(A) * n_places * n_examples, *tensor.shape[1:]) for tensor in (x, y))
        last = x.shape[-1:] if x.is_floating_point() else ()
        if places is None:
            taken_out = _product_of_each(x.reshape(len(A), -1, *last), A, B).reshape(y.shape)
            return (y - taken_out).to(y.dtype)
        at_places = x.reshape(*replicates, -1, *last)[:, :, :, places].diagonal(dim1=1, dim2=3)
        at_places = at_places.mT if x.is_floating_point() else at_places  # C example place *d_in
        taken_out = _product_of_each(at_places.flatten(1, 2), A, B).unflatten(1, at_places.shape[1:3])
        left = y.clone(memory_format=torch.contiguous_format)
        left.view(*replicates, -1, y.shape[-1])[:, :, :, places].diagonal(dim1=1, dim2=3).sub_(taken_out.mT)
        return left

    return subtract


def _product_of_each(
    x: Float[Tensor, "C rows d_in"] | Int[Tensor, "C rows"],
    A: Float[Tensor, "C d_in m"],
    B: Float[Tensor, "C m d_out"],
) -> Float[Tensor, "C rows d_out"]:
    """x_c A_c B_c, each component with rows of its own."""
    if x.is_floating_point():
        return x.to(A.dtype) @ A @ B
    return A[torch.arange(len(A), device=x.device)[:, None], x] @ B


def keep_weights(components: ParameterComponents, chosen: Sequence[int]) -> Intercept:
    """y = Σ_{c chosen} x P_c + bias."""

    def keep(use: Use, x: Tensor, original: Callable[[], Tensor], bias: Tensor | None) -> Tensor:
        A, B = components.factors(use)
        y = masked_product(x, A[list(chosen)], B[list(chosen)])
        return _in_host_dtype(y if bias is None else y + bias, x, original)

    return keep


def _in_host_dtype(y: Tensor, x: Tensor, original: Callable[[], Tensor]) -> Tensor:
    """y in the dtype that the host would have returned: a product has that of x, or of autocast, which has been at
    work on y too; a lookup has that of the host's rows, and looking them up costs little."""
    if not x.is_floating_point():
        return y.to(original().dtype)
    return y if torch.is_autocast_enabled(y.device.type) else y.to(x.dtype)
