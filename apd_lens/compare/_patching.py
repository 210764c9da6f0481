"""Attribution patching onto components: what each carries of the difference between a clean and a corrupted prompt."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from apd_lens._block import no_inference_mode
from apd_lens._errors import InvalidSetting, ShapeMismatch
from apd_lens._memory import BUDGET
from apd_lens._table import Printed, as_table
from apd_lens.attribution._effects import effects_of_calls
from apd_lens.attribution._metric import Metric, metric_on, metric_scalars
from apd_lens.attribution._over_outputs import shared_positions
from apd_lens.attribution._pullback import Jacobians
from apd_lens.data._batch import Batch
from apd_lens.decomposition._decomposition import Decomposition, output_function
from apd_lens.host._target import evaluating
from apd_lens.passes._watch import WatchedPass, replaced_pass


@dataclass(frozen=True, eq=False, repr=False)
class PatchedComponents(Printed):
    """What each component carries of m(clean) − m(corrupted), matrix by matrix. `patching` makes it.

    Attributes:
        effects: name of a matrix -> effect of each component there; positive where it brings the metric towards clean.
        rest: name -> what W − Σ P_c carries.
        patched: name -> m(the corrupted run with the matrix's clean output) − m(corrupted), measured.
        clean, corrupted: the metric of each pair.
    """

    effects: Mapping[str, Float[Tensor, "batch pos C"]]
    rest: Mapping[str, Float[Tensor, "batch pos"]]
    patched: Mapping[str, Float[Tensor, " batch"]]
    clean: Float[Tensor, " batch"]
    corrupted: Float[Tensor, " batch"]

    def of_matrix(self, name: str) -> Float[Tensor, " batch"]:
        """Σ_c of the effects and the rest: the first-order effect of the matrix's output."""
        return self.effects[name].sum((1, 2)) + self.rest[name].sum(1)

    def by_position(self) -> Float[Tensor, "pos C"]:
        """Mean over pairs, sum over matrices; for `plots.signed_by_position`."""
        return torch.stack(list(self.effects.values())).sum(0).mean(0)

    def table(self) -> pd.DataFrame:
        """One row for each matrix; means over pairs."""
        rows = {
            name: {
                "components": effects.sum((1, 2)).mean().item(),
                "rest": self.rest[name].sum(1).mean().item(),
                "first order": self.of_matrix(name).mean().item(),
                "patched": self.patched[name].mean().item(),
            }
            for name, effects in self.effects.items()
        }
        return pd.DataFrame.from_dict(rows, orient="index").rename_axis("matrix")

    def _parts(self) -> list[str]:
        return [
            f"metric {self.clean.mean().item():.4g} clean, {self.corrupted.mean().item():.4g} corrupted",
            as_table(self.table()),
        ]


@no_inference_mode()
def patching(
    decomposition: Decomposition, clean: Batch, corrupted: Batch, metric: Metric, *, steps: int = 0
) -> PatchedComponents:
    """Attribution patching, split over components. The output y = x W of a matrix goes from that of the corrupted run
    to that of the clean run, and the effect of component c on the metric m is

        e_c = Σ_uses <∂m/∂y , (x_clean − x_corrupted) P_c>.

    With W − Σ P_c as one more component, Σ_c e_c = <∂m/∂y , y_clean − y_corrupted> for each matrix: the effect of
    patching its output, to first order. Effects of two matrices do not add up where one reads what the other writes.

    Args:
        clean, corrupted: two batches of one shape, the pairs in the same order.
        metric: the explained output -> one scalar an example, `batch`; or (output, batch) -> that, with the clean batch
            for both runs.
        steps: 0 takes ∂m/∂y in the corrupted run. Above, it is the mean over y_corrupted + t (y_clean − y_corrupted),
            t = (i + 1/2) / steps, and the sum is the whole effect of patching, up to the error of the midpoint rule.
            Each matrix costs so many forward and backward passes.

    Raises:
        ShapeMismatch: batches of different shape or padding; a metric that is not one scalar an example; matrices that
            are not all used on `batch pos`.
        InvalidSetting: steps below 0.
        NonFinite: a batch, or the output, holds NaN or infinity.

    Source: Syed et al. 2023, arXiv 2310.10348; along the path, Hanna et al. 2024, arXiv 2403.17806.
    """
    if steps < 0:
        raise InvalidSetting(f"patching needs steps of 0 or more, got {steps}.")
    target, output, components = decomposition.target, output_function(decomposition), decomposition.components
    with evaluating(target.model):
        from_clean, into = decomposition.watch(clean, "patching"), decomposition.watch(corrupted, "patching")
        _check_alike(from_clean, into)
        of_output = metric_on(metric, from_clean.run.batch)
        after, before = (metric_scalars(of_output, run.output).detach().cpu() for run in (from_clean, into))

        def run_with(name: str, ys: Sequence[Tensor]) -> Float[Tensor, " batch"]:
            left = iter(ys)
            given = lambda use, x, original, bias: next(left)  # noqa: E731
            return metric_scalars(of_output, replaced_pass(target, [name], given, into.run.inputs, output)[0])

        effects, rest, patched = {}, {}, {}
        for name in components.names:
            there, here = ([call for call in run.calls if call.use.matrix == name] for run in (from_clean, into))
            shared_positions([into.calls[0], *here])
            start = [call.y.detach() for call in here]
            away = [call.y.detach() - y for call, y in zip(there, start, strict=True)]
            gradients = _gradients(partial(run_with, name), start, away, steps)
            jacobians = Jacobians.whole([gradient[None] for gradient in gradients])
            with torch.no_grad():
                carried = [
                    torch.cat(list(effects_of_calls(jacobians, calls, components, "position", BUDGET)), 1)[0]
                    for calls in (there, here)
                ]
                effects[name] = (carried[0] - carried[1]).cpu()
                whole = torch.stack([(g * d).sum(-1) for g, d in zip(gradients, away, strict=True)]).sum(0)
                rest[name] = whole.cpu() - effects[name].sum(-1)
                patched[name] = run_with(name, [y + d for y, d in zip(start, away, strict=True)]).cpu() - before
    return PatchedComponents(effects, rest, patched, after, before)


def _gradients(
    run: Callable[[Sequence[Tensor]], Tensor], start: Sequence[Tensor], away: Sequence[Tensor], steps: int
) -> list[Float[Tensor, "batch pos d_out"]]:
    """∂metric/∂y of each call: at the start, or the mean over points between there and what is `away` from it."""
    at = [(i + 0.5) / steps for i in range(steps)] or [0.0]
    total = [torch.zeros_like(y) for y in start]
    for t in at:
        with torch.enable_grad():
            ys = [(y + t * d).requires_grad_() for y, d in zip(start, away, strict=True)]
            found = torch.autograd.grad(run(ys).sum(), ys, materialize_grads=True, allow_unused=True)
        total = [some + each / len(at) for some, each in zip(total, found, strict=True)]
    return total


def _check_alike(clean: WatchedPass, corrupted: WatchedPass) -> None:
    shapes = [[tuple(call.y.shape) for call in run.calls] for run in (clean, corrupted)]
    valid = clean.valid, corrupted.valid
    both = [mask if isinstance(mask, Tensor) else torch.ones(()) for mask in valid]
    padded_alike = torch.equal(*both)
    if shapes[0] != shapes[1] or not padded_alike:
        raise ShapeMismatch(
            "Expected clean and corrupted batches of one shape and padding, got matrices that write "
            f"{shapes[0][0]} and {shapes[1][0]}, or padding at other places. Pair prompts with as many tokens."
        )
