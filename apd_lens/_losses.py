"""The losses, each a pure function of one matrix or one pair of outputs; sums and normalisations are the caller's.

Source of all formulas unless another is named: Braun et al. 2025, arXiv 2501.14926.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from apd_lens._checks import check_fields
from apd_lens._components import side_by_side, sum_of_components
from apd_lens._errors import InvalidSetting, ShapeMismatch
from apd_lens._padding import Real, without_padding
from apd_lens._schedules import HoldThenDecay, Schedule

# Added under a root so that its gradient is finite at zero; as in the paper's implementation.
_EPS = 1e-16

# A name, or a function (target output, sparse output) -> one scalar a data point.
Distance = Literal["mse", "kl"] | Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Losses:
    """Which losses are added up, and how much each counts: numbers, or a `HoldThenDecay` or `Ramp` of them.

    Attributes:
        faithfulness: the components sum to the weights.
        minimality: the model gives the same output with the active components only.
        simplicity: the active components have small Schatten norms, so low rank.
        schatten_p: p of that norm, p < 1 presses harder towards low rank.
        simplicity_floor: every component counts in simplicity as if it were active more often than it is, by this share
            of the mean over components. So those that are never active shrink too.
        path: like minimality, with every inactive component left on by a random amount between 0 and 1. Inactive
            components may then not matter in any partial combination (the paper's appendix on "inactive").
        hidden: like minimality, on the activations of `hidden_at`.
        hidden_at: names of submodules whose outputs are compared, such as "blocks.0.mlp.hook_post".
        distance: between outputs: "mse", "kl" (outputs are logits), or a function
            (target output, sparse output) -> one scalar a data point.
        normalization: "paper" divides faithfulness and simplicity by the number of decomposed parameters and leaves
            the distance as it is. "relative" makes every term a share: faithfulness of Σ‖W‖², simplicity of the
            target's own Σ of singular values to the p, mean squared errors of the variance of the target's values
            (KL is in nats as it is). Simplicity is also divided by the mean over components of how often one is active
            (not in the Lp form), k / C, so it is about 1 for components that are active equally often and as large
            together as the target. Coefficients then mean the same on models of any size and scale, and for any C
            and k.
    """

    faithfulness: Schedule = 1.0
    minimality: Schedule = 1.0
    simplicity: Schedule = field(default_factory=lambda: HoldThenDecay(0.08))
    schatten_p: float = 0.9
    simplicity_floor: float = 0.5
    path: Schedule = 2.0
    hidden: Schedule = 0.0
    hidden_at: tuple[str, ...] = ()
    distance: Distance = "mse"
    normalization: Literal["paper", "relative"] = "relative"

    def __post_init__(self) -> None:
        check_fields(self)
        if self.schatten_p <= 0:
            raise InvalidSetting(f"schatten_p must be positive, got {self.schatten_p}.")
        if bool(self.hidden) != bool(self.hidden_at):
            raise InvalidSetting(
                "hidden and hidden_at go together: a coefficient and the submodules whose outputs are compared; got "
                f"hidden={self.hidden}, hidden_at={self.hidden_at}."
            )


def faithfulness_loss(weight: Float[Tensor, "d_in d_out"], summed: Float[Tensor, "d_in d_out"]) -> Float[Tensor, ""]:
    """‖W − Σ_c P_c‖²: squared distance between one matrix and the sum of its components.

    Summed over entries, in squared units of the weights. The caller adds the matrices up and divides.

    >>> faithfulness_loss(torch.eye(2), torch.zeros(2, 2))
    tensor(2.)
    """
    return (weight - summed).square().sum()


def minimality_loss(
    target_output: Float[Tensor, "batch *pos n_outputs"],
    sparse_output: Float[Tensor, "batch *pos n_outputs"],
    distance: Distance = "mse",
    real: Real = None,
) -> Float[Tensor, ""]:
    """D(f(x, θ*), f(x, κ(x))): mean over data points of the distance between the target's and the sparse output.

    "mse" is the mean over outputs of the squared error; "kl" is KL(target ‖ sparse) of the distributions whose logits
    the outputs are, in nats; a function gives one scalar a data point.

    Args:
        real: False at padding, which is no data point. A function of the user's is given padded outputs as zeros.

    Raises:
        ShapeMismatch: the user's function gives something else than one scalar a data point.

    >>> minimality_loss(torch.zeros(1, 2), torch.tensor([[3.0, 1.0]]))
    tensor(5.)
    """
    if distance == "mse":
        return F.mse_loss(without_padding(sparse_output, real), without_padding(target_output, real))
    if distance == "kl":
        return kl_divergence(without_padding(target_output, real), without_padding(sparse_output, real)).mean()
    values = distance_of_each(target_output, sparse_output, distance)
    return (values[real] if real is not None and values.shape == real.shape else values).mean()


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


def simplicity_loss(
    A: Float[Tensor, "C d_in m"],
    B: Float[Tensor, "C m d_out"],
    mask: Float[Tensor, "batch *pos C"] | Bool[Tensor, "batch *pos C"],
    p: float,
    floor: float = 0.0,
) -> Float[Tensor, ""]:
    """mean over data points Σ_c s_c Σ_m (‖A_c[:, m]‖² ‖B_c[m, :]‖²)^(p/2), for one matrix.

    An upper bound of the active components' Schatten-p norms to the p, and equal to them where the m parts are
    orthogonal. A mask enters only by how often each component was active. The caller adds the matrices up and
    divides.

    Args:
        mask: s_c, or what has its place: A_c^p in the Lp form.
        floor: added to how often each component was active, as a share of the mean over components.
    """
    return _simplicity(_squared_norms(A.mT), _squared_norms(B), mask, p, floor)


def _simplicity(
    squares_A: Float[Tensor, "C m"], squares_B: Float[Tensor, "C m"], mask: Tensor, p: float, floor: float
) -> Float[Tensor, ""]:
    activity = mask.to(squares_A.dtype).flatten(0, -2).mean(0)
    activity = activity + floor * activity.mean()
    return (activity * (squares_A * squares_B + _EPS).pow(p / 2).sum(1)).sum()


def weight_losses(
    weight: Float[Tensor, "d_in d_out"],
    A: Float[Tensor, "C d_in m"],
    B: Float[Tensor, "C m d_out"],
    mask: Float[Tensor, "batch *pos C"] | Bool[Tensor, "batch *pos C"],
    p: float,
    floor: float = 0.0,
) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
    """`faithfulness_loss` of Σ_c A_c B_c and `simplicity_loss`, for one matrix, in one pass over the factors."""
    rest, squares_A, squares_B = _RestAndSquaredNorms.apply(weight, A, B)
    return rest.square().sum(), _simplicity(squares_A, squares_B, mask, p, floor)


def _squared_norms(vectors: Float[Tensor, "*seeds C m d"]) -> Float[Tensor, "*seeds C m"]:
    return torch.linalg.vector_norm(vectors, dim=-1).square()


class _RestAndSquaredNorms(torch.autograd.Function):
    """W − Σ_c A_c B_c, ‖A_c[:, m]‖² and ‖B_c[m, :]‖²; where seeds are mapped over, with an axis for them in front.

    Factors, and so their gradients, are often the largest tensors of a step: the backward pass makes one of each, where
    autograd would make one for each result, and add them up.
    """

    @staticmethod
    def forward(weight: Tensor, A: Tensor, B: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return weight - sum_of_components(A, B), _squared_norms(A.mT), _squared_norms(B)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *inputs: Tensor) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
        in_front = [
            tensor[None] if dim is None else tensor.movedim(dim, 0) for tensor, dim in zip(inputs, in_dims, strict=True)
        ]
        return _RestAndSquaredNorms.apply(*in_front), (0, 0, 0)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: tuple[Tensor, ...]) -> None:
        ctx.save_for_backward(*inputs[1:])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, Tensor, Tensor]:  # pyright: ignore[reportIncompatibleMethodOverride]
        A, B = ctx.saved_tensors
        of_sum, of_squares_A, of_squares_B = -gradients[0], 2 * gradients[1], 2 * gradients[2]
        columns, rows = side_by_side(A, B)
        # In the layout of the parameters; and detached, since to a view autograd adds nothing in place.
        for_A, for_B = (rows @ of_sum.mT).view_as(A.mT).mT.detach(), (columns.mT @ of_sum).view_as(B).detach()
        return None, for_A.addcmul_(of_squares_A[..., None, :], A), for_B.addcmul_(of_squares_B[..., None], B)


def lp_sparsity(attributions: Float[Tensor, "batch *pos C"], p: float) -> Float[Tensor, "batch *pos C"]:
    """A_c^p of every component and data point; its sum over components is the Lp form of minimality."""
    return lp_of_squares(attributions.square(), p)


def lp_of_squares(squares: Float[Tensor, "batch *pos C"], p: float) -> Float[Tensor, "batch *pos C"]:
    """A_c^p from A_c², whose gradient is finite where A_c is 0."""
    return (squares + _EPS).pow(p / 2)


def path_mask(
    mask: Float[Tensor, "batch *pos C"] | Bool[Tensor, "batch *pos C"], generator: torch.Generator | None = None
) -> Float[Tensor, "batch *pos C"]:
    """γ_c drawn between s_c and 1: active components stay on, every other is left on by a random amount.

    The model's output under it must equal the target's if inactive components are to be inactive in the strict
    sense, where no partial ablation of them in any combination matters.
    """
    dtype = mask.dtype if mask.is_floating_point() else torch.float32
    amounts = torch.rand(mask.shape, generator=generator, dtype=dtype, device=mask.device)
    return torch.maximum(mask.to(dtype), amounts)
