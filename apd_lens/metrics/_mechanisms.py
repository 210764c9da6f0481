"""Known mechanisms found in components."""

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from apd_lens._block import full_precision
from apd_lens._checks import checked


@checked
def best_components(
    rows: Float[Tensor, "n_features d"], components: Float[Tensor, "C n_features d"]
) -> Int[Tensor, " n_features"]:
    """For each feature, the component whose row for it has the largest cosine with the true row.

    Features with the same best component were not separated; `len(set(best.tolist()))` counts the distinct ones.
    """
    return F.cosine_similarity(components, rows, dim=-1).argmax(0)


@checked
def mmcs(rows: Float[Tensor, "n_features d"], components: Float[Tensor, "C n_features d"]) -> Float[Tensor, ""]:
    """Mean max cosine similarity: mean over features i of max_c cos(W_i, P_c,i), between -1 and 1; 1 is perfect.

    It compares directions only, and one component may be the best of several features (see `best_components`). To
    compare whole mechanisms, flatten them: `mmcs(mechanisms.flatten(1), components.flatten(1)[:, None].expand(-1, n,
    -1))`.

    Args:
        rows: the target's matrix; row i belongs to feature i.
        components: the components' weights in that matrix, as of `ParameterComponents.component_weights`.

    Source: Sharkey, Braun and Millidge 2022; for components, Braun et al. 2025.

    >>> mmcs(torch.eye(2), torch.tensor([[[3.0, 0.0], [0.0, 0.0]], [[0.0, 0.0], [4.0, 3.0]]]))
    tensor(0.8000)
    """
    return F.cosine_similarity(components, rows, dim=-1).max(0).values.mean()


@checked
def ml2r(rows: Float[Tensor, "n_features d"], components: Float[Tensor, "C n_features d"]) -> Float[Tensor, ""]:
    """Mean L2 ratio: mean over features i of ‖P_c,i‖ / ‖W_i‖, c the component of the largest cosine; 1 is perfect.

    Below 1 the components have shrunk. Arguments as of `mmcs`. A true row of norm 0 makes it infinite or NaN.

    >>> ml2r(torch.eye(2), torch.tensor([[[0.5, 0.0], [0.0, 0.0]], [[0.0, 0.0], [0.0, 1.0]]]))
    tensor(0.7500)
    """
    best = best_components(rows, components)
    return (components[best, torch.arange(len(rows), device=best.device)].norm(dim=-1) / rows.norm(dim=-1)).mean()


@checked
def features_alone(
    rows: Float[Tensor, "n_features d"], components: Float[Tensor, "C n_features d"], share: float = 0.9
) -> int:
    """Number of features with a component of their own. The component is the best one of that feature alone, and has at
    least `share` of its squared norm in the feature's row. Arguments as of `mmcs`.

    >>> features_alone(torch.eye(2), torch.tensor([[[3.0, 0.0], [0.0, 0.0]], [[0.0, 2.0], [0.0, 4.0]]]))
    1
    """
    best = best_components(rows, components)
    owned = components[best].square().sum(2)  # feature, row
    alone = best.bincount(minlength=len(components))[best] == 1
    return int((alone & (owned.diagonal() >= share * owned.sum(1))).sum())


@checked
@full_precision()
def neuron_contributions(
    W_E: Float[Tensor, "n_features d_resid"],
    W_in: Float[Tensor, "*C d_resid neurons"],
    W_out: Float[Tensor, "*C neurons d_resid"],
    W_U: Float[Tensor, "d_resid n_features"],
) -> Float[Tensor, "*C n_features neurons"]:
    """(W_E W_in)[i, j] · (W_out W_U)[j, i]: how much neuron j does for feature i, from its input to its own output.

    The matrices are the target's, or those of every component with a leading axis, in one layer. Join several layers
    along the neurons. For a relu neuron that is on, this is the slope of output i in input i through neuron j.

    Source: section 3.2, neuron contributions.
    """
    return (W_E @ W_in) * (W_out @ W_U).mT
