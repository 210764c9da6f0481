"""Area under the ROC curve."""

from jaxtyping import Bool, Float
from torch import Tensor

from apd_lens._checks import checked
from apd_lens._errors import InvalidSetting, NonFinite


@checked
def auroc(scores: Float[Tensor, " data"], anomalous: Bool[Tensor, " data"]) -> float:
    """Probability that an anomalous data point has a higher score than a normal one; ties count half. 0.5 is chance.

    Raises:
        InvalidSetting: only anomalous data points, or none.

    >>> auroc(torch.tensor([1.0, 2.0, 3.0, 4.0]), torch.tensor([False, True, False, True]))
    0.75
    """
    n_anomalous, n_normal = int(anomalous.sum()), int((~anomalous).sum())
    if n_anomalous == 0 or n_normal == 0:
        raise InvalidSetting(
            f"AUROC compares anomalous with normal data points, got {n_anomalous} anomalous and {n_normal} normal."
        )
    if bool(scores.isnan().any()):
        raise NonFinite("auroc: the scores hold NaN.")
    return share_above(mean_ranks(scores), anomalous).item()


def mean_ranks(scores: Float[Tensor, " data"]) -> Float[Tensor, " data"]:
    """Of each score from 1 on, the smallest first; equal ones share theirs."""
    _, place, counts = scores.unique(return_inverse=True, return_counts=True)
    return (counts.cumsum(0) - (counts - 1) / 2).double()[place]


def share_above(ranks: Float[Tensor, " data"], chosen: Bool[Tensor, "*sets data"]) -> Float[Tensor, "*sets"]:
    """The share of pairs of a chosen one and another in which the chosen one has the larger rank (Mann and Whitney)."""
    n = chosen.sum(-1)
    return ((ranks * chosen).sum(-1) - n * (n + 1) / 2) / (n * (len(ranks) - n))
