"""Adam on the factors."""

from collections.abc import Iterable, Mapping

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointError

from apd_lens._errors import UnsupportedModel
from apd_lens._processes import average_gradients
from apd_lens._settings import Optimization, learning_rate
from apd_lens._shards import is_sharded
from apd_lens.components._components import ParameterComponents, xavier_std
from apd_lens.training._attack import Attack
from apd_lens.training._unit_norm import normalize_columns, remove_parallel_gradients


def adam(
    components: ParameterComponents, optimization: Optimization, units: Mapping[str, Float[Tensor, ""]]
) -> torch.optim.Optimizer:
    """Adam for the factors; those of one scale are one group, and gates, with a learning rate of their own, another.

    Args:
        units: of each matrix, see `unit_of`; the same in all processes.
    """
    groups: dict[float, list[Tensor]] = {}
    for name, factor in zip(2 * components.names, components.factors_of_all, strict=True):
        scale = units[name].item() * xavier_std(*factor.shape[-2:]) if optimization.scaled else 1.0
        groups.setdefault(scale, []).append(factor)
    of_all = [{"params": factors, "scale": scale} for scale, factors in groups.items()]
    if components.gates is not None:
        scale = components.gates.lr / (optimization.lr or 1.0)
        of_all.append({"params": list(components.gates.parameters()), "scale": scale})
    return torch.optim.Adam(of_all, lr=optimization.lr, fused=True)


def moments(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """The tensors that the optimizer keeps, in the same order in every process."""
    return [kept[key] for kept in optimizer.state.values() for key in sorted(kept) if isinstance(kept[key], Tensor)]


def update(
    optimizer: torch.optim.Optimizer,
    components: ParameterComponents,
    loss: Tensor,
    optimization: Optimization,
    step: int,
    model: nn.Module,
    attack: Attack | None = None,
) -> float:
    """One step of the optimizer down the gradient of the loss, added to what was pulled back before; returns its
    learning rate."""
    rate = learning_rate(optimization, step)
    for group in optimizer.param_groups:
        group["lr"] = rate * group["scale"]
    attacked = [] if attack is None else [attack.shares]
    for shares in attacked:
        shares.grad = None
    if loss.requires_grad:
        pull_back(loss, [*components.parameters(), *attacked], step, model)
    whole = [parameter for parameter in components.parameters() if not is_sharded(parameter)]
    average_gradients([*whole, *attacked])  # the others' are averaged as they come
    if optimization.unit_norm:
        remove_parallel_gradients(components)
    optimizer.step()
    if attack is not None:
        attack.ascend()
    if optimization.unit_norm:
        normalize_columns(components, keep_products=False, unless=getattr(optimizer, "found_inf", None))
    return rate


def pull_back(loss: Tensor, parameters: Iterable[Tensor], step: int, model: nn.Module) -> None:
    """Adds the gradient of a loss, which came through passes of the model, to those of the parameters."""
    try:
        loss.backward(inputs=list(parameters))
    except CheckpointError as error:
        raise UnsupportedModel(
            f"step {step}: this {type(model).__name__} uses torch.utils.checkpoint in eval mode too, and parts of "
            "it would be run again without the components. Switch it off while decomposing."
        ) from error
    except RuntimeError as error:
        if "modified by an inplace operation" not in str(error):
            raise
        raise UnsupportedModel(
            f"step {step}: a forward of this {type(model).__name__} wrote to memory that an earlier one had used, so "
            "that no gradient can go through that. Let it make its activations anew in each forward."
        ) from error
