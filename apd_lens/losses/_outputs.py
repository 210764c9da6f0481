"""Distances between outputs, and between hidden activations."""

from collections.abc import Callable
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from apd_lens._errors import ShapeMismatch
from apd_lens._memory import BUDGET, chunks
from apd_lens.data._points import Valid, without_padding

# A name, or a function (target output, sparse output) -> one scalar a data point.
Distance = Literal["mse", "kl"] | Callable[[Tensor, Tensor], Tensor]


def minimality_loss(
    target_output: Float[Tensor, "batch *pos n_outputs"],
    sparse_output: Float[Tensor, "batch *pos n_outputs"],
    distance: Distance = "mse",
    valid: Valid = None,
) -> Float[Tensor, ""]:
    """D(f(x, θ*), f(x, κ(x))): mean over data points of the distance between the target's and the sparse output.

    "mse" is the mean over outputs of the squared error; "kl" is KL(target ‖ sparse) of the distributions whose logits
    the outputs are, in nats; a function gives one scalar a data point.

    Args:
        valid: False at padding, which is not counted. A distance function of the user gets zeros for padded outputs.

    Raises:
        ShapeMismatch: the user's function gives something else than one scalar a data point.

    >>> minimality_loss(torch.zeros(1, 2), torch.tensor([[3.0, 1.0]]))
    tensor(5.)
    """
    return mean_distance(target_output, sparse_output, distance, valid)[0]


def mean_distance(
    target_output: Float[Tensor, "batch *pos n_outputs"],
    sparse_output: Float[Tensor, "batch *pos n_outputs"],
    distance: Distance,
    valid: Valid,
) -> tuple[Float[Tensor, ""], int]:
    """`minimality_loss`, and the number of values that it is the mean of."""
    if distance == "mse":
        sparse = without_padding(sparse_output, valid)
        return F.mse_loss(sparse, without_padding(target_output, valid)), sparse.numel()
    if distance == "kl":
        values = kl_divergence(without_padding(target_output, valid), without_padding(sparse_output, valid))
    else:
        values = distance_of_each(target_output, sparse_output, distance)
        values = values[valid] if valid is not None and values.shape == valid.shape else values
    return values.mean(), values.numel()


def distance_of_each(
    target_output: Float[Tensor, "batch *pos n_outputs"],
    other_output: Float[Tensor, "batch *pos n_outputs"],
    distance: Distance,
) -> Float[Tensor, "batch *data_points"]:
    """The distance between two outputs at each data point that has one; `minimality_loss` is its mean.

    Raises:
        ShapeMismatch: the user's function gives something else than one scalar a data point.
    """
    if distance == "mse":
        return (other_output - target_output).square().mean(-1)
    if distance == "kl":
        return kl_divergence(target_output, other_output)
    assert callable(distance)
    values = distance(target_output, other_output)
    if not 0 < values.ndim < target_output.ndim or values.shape != target_output.shape[: values.ndim]:
        raise ShapeMismatch(
            "Expected the distance function to give one scalar a data point, shape "
            f"{tuple(target_output.shape[:-1])} or ({len(target_output)},), got {tuple(values.shape)}."
        )
    return values


def kl_divergence(
    target_logits: Float[Tensor, "*data_points n_outputs"], logits: Float[Tensor, "*data_points n_outputs"]
) -> Float[Tensor, "*data_points"]:
    """KL(softmax(target) ‖ softmax(other)) of each data point, in nats. The target's logits are constants."""
    return _KLDivergence.apply(target_logits.detach(), logits)


class _KLDivergence(torch.autograd.Function):
    """Of some data points at a time. Nothing is kept but the logits, and no gradient but that of the logits is made:
    with a large vocabulary autograd's own would be the largest tensors of a step."""

    @staticmethod
    def forward(target_logits: Tensor, logits: Tensor) -> Tensor:
        values = []
        for target, other in _some_data_points(target_logits, logits):
            target_log_probs, log_probs = target.log_softmax(-1), other.log_softmax(-1)
            values.append((target_log_probs.exp() * (target_log_probs - log_probs)).sum(-1))
        return torch.cat(values).view(logits.shape[:-1])

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, Tensor]:  # pyright: ignore[reportIncompatibleMethodOverride]
        target_logits, logits = ctx.saved_tensors
        at_logits = torch.empty_like(logits, memory_format=torch.contiguous_format)
        into, at_values = at_logits.view(-1, logits.shape[-1]).split, gradient.reshape(-1, 1).split
        some = list(_some_data_points(target_logits, logits))
        sizes = [len(target) for target, _ in some]
        for (target, other), rows, at_value in zip(some, into(sizes), at_values(sizes), strict=True):
            dtype = torch.promote_types(other.dtype, torch.float32)
            change = other.softmax(-1, dtype=dtype).sub_(target.softmax(-1, dtype=dtype))
            rows.copy_(change.mul_(at_value))
        return None, at_logits


def _some_data_points(target_logits: Tensor, logits: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Both, `data n_outputs`, in pieces whose temporaries fit into a part of the budget."""
    n_outputs = logits.shape[-1]
    flat = [one.expand(logits.shape).reshape(-1, n_outputs) for one in (target_logits, logits)]
    pieces = chunks(len(flat[0]), 4 * n_outputs * 8, BUDGET // 8) or [slice(None)]
    return [(flat[0][some], flat[1][some]) for some in pieces]


def hidden_activation_loss(
    target: Float[Tensor, "batch *pos units"], sparse: Float[Tensor, "batch *pos units"]
) -> Float[Tensor, ""]:
    """Mean over data points of Σ_units (target − sparse)², for one place; the caller divides by the units."""
    return (target - sparse).square().sum(-1).mean()
