"""Data points are grouped by what they do to the output; nobody says which belong together."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from apd_lens._memory import chunks

# Data points that are less than this apart are the same.
_SAME = 1e-4
# Data points that do less than this share of the root mean square have no say in which groups there are.
_LITTLE = 1 / 3


def similarities_of_points(
    of_inputs: Float[Tensor, "rows rows"],
    gradients: Float[Tensor, "K rows d_out"],
    points: Int[Tensor, " rows"],
    n_points: int,
    memory: int | None = None,
) -> Float[Tensor, "points points"]:
    """<Φ_i, Φ_j> = Σ_t Σ_t' <x_t, x_t'> <g_t, g_t'>, for Φ_i = Σ_t x_t ⊗ g_t over the rows t of data point i.

    No Φ is built.

    Args:
        of_inputs: <x_t, x_t'>, in whatever metric.
    """
    of_points = of_inputs.new_zeros(n_points, n_points)
    side_by_side = gradients.movedim(0, 1).flatten(1)
    for some in chunks(len(points), 3 * len(points) * of_inputs.element_size(), memory):
        products = of_inputs[some] * (side_by_side[some] @ side_by_side.mT)
        by_point = products.new_zeros(len(products), n_points).index_add_(1, points, products)
        of_points.index_add_(0, points[some], by_point)
    return of_points


def less_means(values: Float[Tensor, "items d"], kinds: Int[Tensor, " items"]) -> Float[Tensor, "items d"]:
    """Items less the mean item of their kind. One that is alone of its kind stays as it is."""
    _, numbers, counts = kinds.unique(return_inverse=True, return_counts=True)
    sums = values.new_zeros(len(counts), values.shape[1]).index_add_(0, numbers, values)
    share = torch.where(counts > 1, 1 / counts, 0.0).to(values)
    return values - (share[:, None] * sums)[numbers]


def centred(gram: Float[Tensor, "items items"], kinds: Int[Tensor, " items"]) -> Float[Tensor, "items items"]:
    """<x_i, x_j> of items less the mean item of their kind."""
    return less_means(less_means(gram, kinds).mT, kinds)


def cosines(gram: Float[Tensor, "items items"]) -> Float[Tensor, "items items"]:
    """Cosines of items; one of no length is similar to none."""
    lengths = gram.diagonal().clamp_min(0).sqrt()
    inverse = torch.where(lengths > 1e-6 * lengths.max(), 1 / lengths, 0.0)
    return inverse[:, None] * gram * inverse


def grouped(
    similarities: Float[Tensor, "points points"], sizes: Float[Tensor, " points"], most: int
) -> Int[Tensor, " points"]:
    """The group of each data point, by average linkage of 1 − similarity. Groups are numbered by their first point.

    With as few different data points as there may be groups, each is one. Else the tree of merges is cut where its
    heights leave the largest gap, among the cuts that leave 2 to `most` groups. Data points that do little are given to
    the group that they are most similar to, on average, after the others are grouped.

    Args:
        sizes: how much each data point does. Little is less than a third of the root mean square.
    """
    device = similarities.device
    first = (similarities > 1 - _SAME).fill_diagonal_(True).byte().argmax(1)  # that is the same
    if len(first.unique()) <= most:
        return _in_order(first)
    similarities, sizes = similarities.double().cpu(), sizes.double().cpu()
    say = sizes >= _LITTLE * sizes.square().mean().sqrt()
    labels = _cut(1 - similarities[say][:, say], most)
    members = torch.nn.functional.one_hot(labels).double()
    of_groups = similarities[:, say] @ (members / members.sum(0))
    everyone = of_groups.argmax(1)
    everyone[say] = labels
    return _in_order(everyone).to(device)


def _cut(distances: Float[Tensor, "points points"], most: int) -> Int[Tensor, " points"]:
    n = len(distances)
    if n <= most:
        return torch.arange(n, device=distances.device)
    if most < 2 or n < 3:
        return torch.zeros(n, dtype=torch.long, device=distances.device)
    from scipy.cluster.hierarchy import fcluster, linkage  # they take long to import
    from scipy.spatial.distance import squareform

    distances = ((distances + distances.mT) / 2).clamp_min(0).fill_diagonal_(0)
    merges = linkage(squareform(distances.numpy(), checks=False), "average")
    heights = torch.from_numpy(merges[:, 2])
    first = n - 1 - most  # the cut between merges i and i + 1 leaves n − 1 − i groups
    cut = first + int(heights.diff()[first:].argmax())
    return torch.from_numpy(fcluster(merges, float(heights[cut : cut + 2].mean()), "distance")).long() - 1


def _in_order(labels: Int[Tensor, " points"]) -> Int[Tensor, " points"]:
    """Numbers from 0 in the order in which the labels first come."""
    _, numbers, counts = labels.unique(return_inverse=True, return_counts=True)
    places = torch.arange(len(labels), device=labels.device)
    firsts = torch.full_like(counts, len(labels)).scatter_reduce(0, numbers, places, "amin")
    return firsts.argsort().argsort()[numbers]
