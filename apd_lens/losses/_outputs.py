"""Distances between outputs, and between hidden activations."""

from collections.abc import Callable
from typing import Literal

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from apd_lens._errors import ShapeMismatch
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
    """KL(softmax(target) ‖ softmax(other)) of each data point, in nats."""
    target_log_probs, log_probs = target_logits.log_softmax(-1), logits.log_softmax(-1)
    return (target_log_probs.exp() * (target_log_probs - log_probs)).sum(-1)


def hidden_activation_loss(
    target: Float[Tensor, "batch *pos units"], sparse: Float[Tensor, "batch *pos units"]
) -> Float[Tensor, ""]:
    """Mean over data points of Σ_units (target − sparse)², for one place; the caller divides by the units."""
    return (target - sparse).square().sum(-1).mean()
