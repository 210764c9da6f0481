"""How well attributions agree with ablations, and paths of partial ablations."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from apd_lens._block import no_inference_mode
from apd_lens._checks import checked
from apd_lens._errors import InvalidSetting, ShapeMismatch
from apd_lens._table import table
from apd_lens.components._factors import Mask
from apd_lens.data._batch import Batch
from apd_lens.data._inputs import Inputs
from apd_lens.data._points import mean_over_positions
from apd_lens.decomposition._decomposition import Decomposition, output_with
from apd_lens.decomposition._observed import observed
from apd_lens.host._target import evaluating
from apd_lens.losses._outputs import distance_of_each, kl_divergence
from apd_lens.masks._adversary import ascend, harder
from apd_lens.passes._replace import Mixture


@dataclass(frozen=True)
class Agreement:
    """How well two outputs agree.

    Attributes:
        mse: mean over data points and outputs of the squared difference.
        kl: mean over data points of KL(softmax(target) ‖ softmax(other)), in nats; meaningful only if outputs are
            logits.
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
        worst: with each where it does most harm in [1 − t, 1]. It is found by projected gradient ascent, so the true
            worst may be larger; never below the other two.

    Errors are means over examples of the decomposition's own distance; "mse" is the mean over outputs.
    """

    amount: Float[Tensor, " amounts"]
    together: Float[Tensor, " amounts"]
    random: Float[Tensor, " amounts"]
    worst: Float[Tensor, " amounts"]

    def __str__(self) -> str:
        n, step = len(self.amount), -(-len(self.amount) // 20)
        shown = sorted({*range(0, n, step), n - 1})
        columns = (self.amount, self.together, self.random, self.worst)
        rows = [[f"{column[i]:.3g}" for column in columns] for i in shown]
        return table(["inactive ablated by", "all together", "at random", "worst found"], rows)

    __repr__ = __str__


@no_inference_mode()
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
    """Are inactive components inactive in the strict sense, so that no partial ablation of them changes the output?

    Component c is on by γ_c = 1 − t (1 − s_c) u_c, for a direction u. At t = 0 all components are on; at t = 1 inactive
    ones are down by u_c. Active ones are always on. The output on Σ_c γ_c P_c is compared with the target's, so the
    error at t = 0 is what the components leave unexplained.

    Args:
        batch: as for `decomposition.attributions`.
        mask: s, the active components, `batch C` or `batch pos C`; default `decomposition.select(batch)`.
        amounts: values of t, in rising order.
        n_draws: number of random directions.
        ascent_steps: steps of signed gradient ascent on γ for each t, of size 2.5 t / ascent_steps, clamped to [1 − t
            (1 − s), 1]. For each example the ascent starts where the error was largest so far.

    Raises:
        InvalidSetting: amounts that do not rise or leave [0, 1], no draws or steps; or a loaded decomposition that
            lacks its output function.
        ShapeMismatch: a mask of another number of components, or of another batch.
        NonFinite: the batch, or the output, holds NaN or infinity.

    Source: the paper's appendix on "inactive" asks for every partial ablation. The worst one is sought by projected
    gradient ascent, Madry et al. 2018.
    """
    _check_audit(amounts, n_draws, ascent_steps)
    with evaluating(decomposition.target.model):
        watched = decomposition.watch(batch, "ablation_path_audit")
        s = observed(watched, decomposition.components, decomposition.settings).mask if mask is None else mask
    expected = len(watched.output), decomposition.components.n_components
    if (len(s), s.shape[-1]) != expected:
        raise ShapeMismatch(
            f"Expected a mask of shape ({expected[0]}, {expected[1]}) or ({expected[0]}, pos, {expected[1]}) for this "
            f"batch, got {tuple(s.shape)}."
        )
    errors_under = partial(_errors_under, decomposition, watched.run.inputs, watched.output.detach())
    del watched
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


def _errors_under(
    decomposition: Decomposition,
    inputs: Inputs,
    target_output: Float[Tensor, "batch *pos n_outputs"],
    gamma: Float[Tensor, "batch *mask_pos C"],
) -> Float[Tensor, " batch"]:
    """The error of each example of the output on Σ_c γ_c P_c."""
    output = output_with(decomposition, inputs, Mixture(decomposition.components, gamma))
    output, target_output = output.to(gamma.dtype), target_output.to(gamma.dtype)  # float32 or better
    distance = distance_of_each(target_output, output, decomposition.settings.losses.distance)
    return mean_over_positions(distance, inputs.valid)


def _check_audit(amounts: Sequence[float], n_draws: int, ascent_steps: int) -> None:
    rising = all(low < high for low, high in pairwise(amounts))
    if not amounts or not rising or amounts[0] < 0 or amounts[-1] > 1:
        raise InvalidSetting(f"amounts must rise, from 0 at least to 1 at most, got {tuple(amounts)}.")
    if n_draws < 1 or ascent_steps < 1:
        raise InvalidSetting(f"Expected n_draws and ascent_steps of at least 1, got {n_draws} and {ascent_steps}.")
