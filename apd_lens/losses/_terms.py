"""The loss terms of a step."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from apd_lens._schedules import value_at
from apd_lens.components._factors import Mask
from apd_lens.data._points import without_padding
from apd_lens.losses._losses import Losses
from apd_lens.losses._outputs import hidden_activation_loss, minimality_loss
from apd_lens.losses._weights import weight_losses
from apd_lens.passes._watch import WatchedPass


@dataclass(frozen=True)
class Scales:
    """Divisors of faithfulness and simplicity, sums over all matrices."""

    faithfulness: float
    simplicity: float


def weighted_sum(losses: Losses, terms: Mapping[str, Tensor], progress: float) -> Tensor:
    """Loss terms times their coefficients, when `progress`, a share of the steps, is done."""
    return torch.stack([value_at(getattr(losses, name), progress) * term for name, term in terms.items()]).sum(0)


def loss_terms(
    losses: Losses,
    scales: Scales,
    weights: Mapping[str, Tensor],
    watched: WatchedPass,
    A: Mapping[str, Tensor],
    B: Mapping[str, Tensor],
    mask: Mask,
    outputs: Mapping[str, Tensor],
    hidden: Mapping[str, Tensor],
) -> dict[str, Tensor]:
    """Every loss term whose coefficient can be other than zero, by the name of its coefficient in `Losses`.

    Args:
        A, B: name -> the factors of a matrix.
        outputs: "minimality" and "path" (if it counts) -> the explained output on the components that are compared.
        hidden: activations of `losses.hidden_at` on the active components.
    """
    target_output, real = at_least_float32(watched.output.detach()), watched.real
    relative = losses.normalization == "relative"
    distance_scale = variance(without_padding(target_output, real)) if relative and losses.distance == "mse" else 1.0
    distances = {
        name: minimality_loss(target_output, at_least_float32(output), losses.distance, real) / distance_scale
        for name, output in outputs.items()
    }
    activity = without_padding(mask, real)
    mean_activity = activity.float().mean().clamp_min(1e-12) if relative else 1.0  # none may be active
    minimality = distances.pop("minimality")
    terms = {**method_terms(losses, scales, weights, A, B, minimality, activity, mean_activity), **distances}
    if losses.hidden:
        kept, kept_sparse = (
            {name: without_padding(activation, real) for name, activation in activations.items()}
            for activations in (watched.hidden, hidden)
        )
        terms["hidden"] = _hidden_term(kept, kept_sparse, relative)
    return terms


def method_terms(
    losses: Losses,
    scales: Scales,
    weights: Mapping[str, Tensor],
    A: Mapping[str, Tensor],
    B: Mapping[str, Tensor],
    minimality: Tensor,
    activity: Mask,
    mean_activity: Tensor | float = 1.0,
) -> dict[str, Tensor]:
    """The three losses of the method.

    Args:
        activity: the mask, or what has its place in simplicity, without padding.
        mean_activity: what simplicity is divided by besides its scale.
    """
    with torch.autocast(minimality.device.type, enabled=False):  # sums of weights, not a pass of the model
        faithfulness, simplicity = minimality.new_zeros(()), minimality.new_zeros(())
        for name in A:
            error, norms = weight_losses(
                weights[name], A[name], B[name], activity, losses.schatten_p, losses.simplicity_floor
            )
            faithfulness, simplicity = faithfulness + error, simplicity + norms
    return {
        "faithfulness": faithfulness / scales.faithfulness,
        "minimality": minimality,
        "simplicity": simplicity / (scales.simplicity * mean_activity),
    }


def variance(output: Tensor) -> Tensor:
    """1 where there is none."""
    variance = output.var()
    return torch.where(variance > 0, variance, 1.0)


def at_least_float32(output: Tensor) -> Tensor:
    return output.to(torch.promote_types(output.dtype, torch.float32))


def _hidden_term(target: dict[str, Tensor], sparse: dict[str, Tensor], relative: bool) -> Tensor:
    """Σ_places mean over data points Σ_units squared error, over the number of units (times the target's variance)."""
    errors = torch.stack([hidden_activation_loss(target[name], sparse[name]) for name in target]).sum()
    units = sum(activation.shape[-1] for activation in target.values())
    if not relative:
        return errors / units
    return errors / torch.stack([activation.var() * activation.shape[-1] for activation in target.values()]).sum()


def scales_of(losses: Losses, weights: Sequence[Tensor]) -> Scales:
    if losses.normalization == "paper":
        n_parameters = float(sum(weight.numel() for weight in weights))
        return Scales(n_parameters, n_parameters)
    return Scales(
        faithfulness=sum(weight.square().sum().item() for weight in weights),
        simplicity=sum(torch.linalg.svdvals(weight).pow(losses.schatten_p).sum().item() for weight in weights),
    )
