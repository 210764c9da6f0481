"""What can be measured of a decomposition. Pure functions; what they take from the truth, the caller gives.

Weights are `d_in d_out`, so what the paper calls columns are rows here. Source of all definitions unless another is
named: Braun et al. 2025, arXiv 2501.14926. Arguments of another type or shape raise ShapeMismatch.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from apd_lens._ascent import ascend, harder
from apd_lens._batches import Batch
from apd_lens._checks import checked
from apd_lens._components import ParameterComponents, full_precision, singular_values
from apd_lens._components import effective_rank as _effective_rank
from apd_lens._decomposition import Decomposition, ready
from apd_lens._errors import InvalidSetting, ShapeMismatch
from apd_lens._inputs import Inputs
from apd_lens._losses import distance_of_each, kl_divergence
from apd_lens._padding import Real, mean_over_positions
from apd_lens._passes import check_finite_output, sparse_pass, watched_pass
from apd_lens._product import Mask
from apd_lens._stability import Stability as Stability
from apd_lens._stability import stability as _stability
from apd_lens._target import evaluating

effective_rank = checked(_effective_rank)
stability = checked(_stability)


@checked
def best_components(
    rows: Float[Tensor, "n_features d"], components: Float[Tensor, "C n_features d"]
) -> Int[Tensor, " n_features"]:
    """For each feature, the component whose row for it has the largest cosine with the true row.

    Features that share a component were not separated: `len(set(best.tolist()))` features were.
    """
    return F.cosine_similarity(components, rows, dim=-1).argmax(0)


@checked
def mmcs(rows: Float[Tensor, "n_features d"], components: Float[Tensor, "C n_features d"]) -> Float[Tensor, ""]:
    """Mean max cosine similarity: mean over features i of max_c cos(W_i, P_c,i), between -1 and 1; 1 is perfect.

    Only directions count, and a component may be the best one of several features (see `best_components`). To compare
    whole mechanisms, flatten them: `mmcs(mechanisms.flatten(1), components.flatten(1)[:, None].expand(-1, n, -1))`.

    Args:
        rows: row i of the target's matrix, what it has of feature i.
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
    """Number of features whose best component is no other feature's, and has at least `share` of its squared norm in
    the feature's row. Arguments as of `mmcs`.

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

    Of the target, or of every component with a leading axis. One layer; join several along the neurons. For a relu
    neuron it is the slope of output i in input i through j where j is on.

    Source: section 3.2, neuron contributions.
    """
    return (W_E @ W_in) * (W_out @ W_U).mT


@checked
def scrubbed_mask(
    responsible: Bool[Tensor, "batch *pos C"], generator: torch.Generator | None = None
) -> Bool[Tensor, "batch *pos C"]:
    """The responsible components of each data point, and a random half of all others.

    Each other one is kept with probability 1/2 on its own. If only the responsible matter, the output under this mask
    is as good as under theirs: `with decomposition.sparse(mask): model(x)`.

    Args:
        responsible: which components should matter, from the selection or from the truth.
        generator: on the mask's device.

    Source: the paper's residual MLPs, after causal scrubbing.
    """
    return responsible | _half(responsible, generator)


@checked
def anti_scrubbed_mask(
    responsible: Bool[Tensor, "batch *pos C"], generator: torch.Generator | None = None
) -> Bool[Tensor, "batch *pos C"]:
    """A random half of the components that are not responsible, without those that are.

    With the same generator state it is `scrubbed_mask` less the responsible ones. The output should be as bad as with
    nothing on. Arguments and source as of `scrubbed_mask`.
    """
    return ~responsible & _half(responsible, generator)


@checked
def alive_count(mask: Bool[Tensor, "batch *pos C"]) -> int:
    """Components that are active on at least one data point.

    >>> alive_count(torch.tensor([[True, False, False], [True, False, True]]))
    2
    """
    return int(mask.flatten(0, -2).any(0).sum())


@checked
def layer_share(components: ParameterComponents) -> Float[Tensor, "C matrices"]:
    """‖P_c,l‖² / Σ_l ‖P_c,l‖²: which share of a component's squared norm lies in which matrix.

    Matrices in the order of `components.names`. Rows sum to 1; a component of norm 0 has zeros.
    """
    squares = torch.stack([singular_values(components, name).square().sum(1) for name in components.names], 1)
    return squares / squares.sum(1, keepdim=True).clamp_min(torch.finfo(squares.dtype).tiny)


@checked
def ranks(components: ParameterComponents, tolerance: float = 0.01) -> Float[Tensor, "C matrices"]:
    """rank P_c,l: number of singular values of a component in each matrix that are not as good as zero.

    Matrices in the order of `components.names`.

    Args:
        tolerance: a singular value counts if it is above this share of the largest that any component has in the
            matrix, so that noise in a component that does nothing there is not counted.
    """
    spectra = [singular_values(components, name) for name in components.names]
    return torch.stack([(spectrum > tolerance * spectrum.max()).sum(1) for spectrum in spectra], 1).to(spectra[0].dtype)


@checked
def total_rank(components: ParameterComponents, tolerance: float = 0.01) -> Float[Tensor, " C"]:
    """Σ_l rank P_c,l, with ranks as `ranks` counts them."""
    return ranks(components, tolerance).sum(1)


@dataclass(frozen=True)
class DescriptionLength:
    """Bits that tell which components are active on a data point, and what these are; mean over data points.

    Attributes:
        selection: Σ_c s_c log2 C.
        parameters: α Σ_c s_c Σ_l rank P_c,l.
        alpha: α, bits for each rank-one part.
    """

    selection: float
    parameters: float
    alpha: float

    @property
    def total(self) -> float:
        return self.selection + self.parameters

    def __str__(self) -> str:
        return (
            f"{self.total:.4g} bits a data point: {self.selection:.4g} for which components, {self.parameters:.4g} for "
            f"their ranks (α = {self.alpha:.4g} bits)"
        )


@checked
@full_precision()
def description_length(
    mask: Bool[Tensor, "batch *pos C"], rank: Float[Tensor, " C"], alpha: float
) -> DescriptionLength:
    """Σ_c s_c (log2 C + α Σ_l rank P_c,l) bits, mean over data points.

    Args:
        rank: of each component over all matrices, such as `total_rank(components)`, or the sum of effective ranks.
        alpha: α, bits for each rank-one part; the paper leaves it open, so both terms are given.

    Source: the minimal mechanistic description length that the paper starts from.

    >>> print(description_length(torch.eye(8).bool(), torch.full((8,), 2.0), alpha=1.5))
    6 bits a data point: 3 for which components, 3 for their ranks (α = 1.5 bits)
    """
    active = mask.flatten(0, -2).to(rank.dtype)
    n_active = active.sum(1).mean()
    return DescriptionLength(
        selection=(n_active * torch.tensor(float(active.shape[1]), dtype=torch.float32, device="cpu").log2()).item(),
        parameters=alpha * (active @ rank).mean().item(),
        alpha=alpha,
    )


@dataclass(frozen=True)
class Agreement:
    """How far two outputs agree.

    Attributes:
        mse: mean over data points and outputs of the squared difference.
        kl: mean over data points of KL(softmax(target) ‖ softmax(other)), in nats; means something for logits only.
        top1: share of data points on which both have the same largest output.
    """

    mse: float
    kl: float
    top1: float


@checked
def agreement(
    target_output: Float[Tensor, "*data_points n_outputs"], output: Float[Tensor, "*data_points n_outputs"]
) -> Agreement:
    """Mean squared error, KL divergence and top-1 agreement of an output with the target's."""
    return Agreement(
        mse=F.mse_loss(output, target_output).item(),
        kl=kl_divergence(target_output, output).mean().item(),
        top1=(output.argmax(-1) == target_output.argmax(-1)).float().mean().item(),
    )


@dataclass(frozen=True, eq=False)
class AblationPath:
    """Output error against how far the inactive components are ablated.

    Attributes:
        amount: t, from 0 (all components on) to 1 (inactive ones may be off).
        together: error with all inactive components at γ = 1 − t.
        random: with each at γ ~ U[1 − t, 1] on its own; mean over draws. At t = 1 this is the path loss.
        worst: with each where it does most harm in [1 − t, 1], found by projected gradient, so a lower bound of the
            worst; never below the other two.

    Errors are means over examples of the decomposition's own distance; "mse" is the mean over outputs.
    """

    amount: Float[Tensor, " amounts"]
    together: Float[Tensor, " amounts"]
    random: Float[Tensor, " amounts"]
    worst: Float[Tensor, " amounts"]


@torch.inference_mode(False)
@checked
def ablation_path_audit(
    decomposition: Decomposition,
    batch: Batch,
    mask: Mask | None = None,
    *,
    amounts: Sequence[float] = (0.0, 0.25, 0.5, 0.75, 1.0),
    n_draws: int = 8,
    ascent_steps: int = 20,
    seed: int = 0,
) -> AblationPath:
    """Are inactive components inactive in the strict sense: does no partial ablation of them change the output?

    γ_c, how far component c is on, is 1 − t (1 − s_c) u_c: all on at t = 0, and at t = 1 as far down as direction u
    says, active ones always on. The output on Σ_c γ_c P_c is compared with the target's; at t = 0 this is what the
    components leave unexplained.

    Args:
        batch: as for `decomposition.attributions`.
        mask: s, the active components, `batch C` or `batch pos C`; default `decomposition.select(batch)`.
        amounts: values of t, in rising order.
        n_draws: number of random directions.
        ascent_steps: steps of signed gradient ascent on γ for each t, of size 2.5 t / ascent_steps and clamped to
            [1 − t (1 − s), 1]. It starts where the error was largest so far, for each example on its own.

    Raises:
        InvalidSetting: amounts that do not rise or leave [0, 1], no draws or steps; or a loaded decomposition that
            lacks its output function.
        ShapeMismatch: a mask of another number of components, or of another batch.
        NonFinite: the batch, or the output, holds NaN or infinity.

    Source: the appendix on "inactive" asks for every partial ablation; the search for the worst is projected gradient
    ascent, Madry et al. 2018.
    """
    _check_audit(amounts, n_draws, ascent_steps)
    s = decomposition.select(batch) if mask is None else mask
    errors_under = _errors_of(decomposition, batch, s)
    off = 1 - s.to(next(decomposition.components.parameters()))

    generator = torch.Generator().manual_seed(seed)
    directions = [
        torch.rand(off.shape, generator=generator, dtype=torch.float32, device="cpu").to(off) for _ in range(n_draws)
    ]
    together, random, worst = [], [], []
    hardest = torch.ones_like(off)
    with torch.no_grad():
        largest = errors_under(hardest)
    for t in amounts:
        gammas = [1 - t * off, *(1 - t * off * u for u in directions)]
        with torch.no_grad():
            errors = [errors_under(gamma) for gamma in gammas]
        for gamma, error in zip(gammas, errors, strict=True):
            hardest, largest = harder(hardest, largest, gamma, error)
        hardest, largest = ascend(errors_under, hardest, largest, 1 - t * off, 2.5 * t / ascent_steps, ascent_steps)
        together.append(errors[0].mean())
        random.append(torch.stack(errors[1:]).mean())
        worst.append(largest.mean())
    return AblationPath(
        torch.tensor(amounts, dtype=torch.float32, device="cpu"),
        *(torch.stack(curve).cpu() for curve in (together, random, worst)),
    )


def _errors_of(decomposition: Decomposition, batch: Batch, mask: Mask) -> Callable[[Tensor], Tensor]:
    """A function γ -> the error of each example, `batch`, of the output on Σ_c γ_c P_c."""
    target, components = decomposition.target, decomposition.components
    inputs, output = ready(decomposition, batch, "ablation_path_audit")
    with evaluating(target.model):
        watched = watched_pass(target, components.names, inputs, output)
    check_finite_output(watched.output, "ablation_path_audit", watched)
    examples, n_components = len(watched.output), components.n_components
    if len(mask) != examples or mask.shape[-1] != n_components:
        raise ShapeMismatch(
            f"Expected a mask of shape ({examples}, {n_components}) or ({examples}, pos, {n_components}) for this "
            f"batch, got {tuple(mask.shape)}."
        )
    return partial(_errors_under, decomposition, inputs, watched.output.detach(), watched.real)


def _errors_under(
    decomposition: Decomposition,
    inputs: Inputs,
    target_output: Float[Tensor, "batch *pos n_outputs"],
    real: Real,
    gamma: Float[Tensor, "batch *mask_pos C"],
) -> Float[Tensor, " batch"]:
    target, distance = decomposition.target, decomposition.settings.losses.distance
    assert decomposition.output is not None
    with evaluating(target.model):
        output, _ = sparse_pass(target, decomposition.components, inputs, gamma, decomposition.output)
    output, target_output = output.to(gamma.dtype), target_output.to(gamma.dtype)  # float32 or better
    return mean_over_positions(distance_of_each(target_output, output, distance), real)


def _half(like: Bool[Tensor, "batch *pos C"], generator: torch.Generator | None) -> Bool[Tensor, "batch *pos C"]:
    return torch.rand(like.shape, generator=generator, device=like.device, dtype=torch.float32) < 0.5


def _check_audit(amounts: Sequence[float], n_draws: int, ascent_steps: int) -> None:
    rising = all(low < high for low, high in pairwise(amounts))
    if not amounts or not rising or amounts[0] < 0 or amounts[-1] > 1:
        raise InvalidSetting(f"amounts must rise, from 0 at least to 1 at most, got {tuple(amounts)}.")
    if n_draws < 1 or ascent_steps < 1:
        raise InvalidSetting(f"Expected n_draws and ascent_steps of at least 1, got {n_draws} and {ascent_steps}.")
