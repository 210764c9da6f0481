"""What a language model no longer says when a prompt's own component is taken out."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor
from tqdm.auto import tqdm

from apd_lens._block import no_grad
from apd_lens._errors import ShapeMismatch
from apd_lens._table import Printed, frame, table
from apd_lens.components._components import ParameterComponents
from apd_lens.components._measures import random_components
from apd_lens.data._batch import Batch
from apd_lens.data._points import without_padding
from apd_lens.data._stream import one_pass
from apd_lens.decomposition._decomposition import Decomposition, output_with
from apd_lens.host._target import evaluating
from apd_lens.losses._outputs import kl_divergence
from apd_lens.passes._output import OutputFn, default_output, everywhere
from apd_lens.passes._replace import Mixture
from apd_lens.passes._watch import as_it_is, replaced_pass

if TYPE_CHECKING:
    from pandas import DataFrame


@dataclass(frozen=True, eq=False, repr=False)
class Forgetting(Printed):
    """What sparse passes and single ablations do to the answers of n prompts. `forgetting` makes it.

    KL is KL(target ‖ changed model) of the next token, in nats. An answer is the most likely next token.

    Attributes:
        own: the prompt's own component: of its active ones the one whose attribution is largest beside its mean over
            the prompts.
        kl_sparse: of the model on the active components alone.
        kept: whether the answer is the same there.
        kl_off: of the model without the own component of prompt i, on prompt j, `off_i prompt_j`.
        changed: whether the answer is another one there.
        changed_by_twin: whether the answer to each prompt changes without a random component of the same size and
            singular values in the place of its own, the null control.
        kl_elsewhere: at each position of other texts, of which each runs without the own component of one prompt, in
            turn; None without texts.
        kl_all_off: at each position of other texts, without all components.
    """

    own: Int[Tensor, " n"]
    kl_sparse: Float[Tensor, " n"]
    kept: Bool[Tensor, " n"]
    kl_off: Float[Tensor, "n n"]
    changed: Bool[Tensor, "n n"]
    changed_by_twin: Bool[Tensor, " n"]
    kl_elsewhere: Float[Tensor, " positions"] | None = None
    kl_all_off: Float[Tensor, " positions"] | None = None

    @property
    def forgotten(self) -> Bool[Tensor, " n"]:
        """Whether each prompt's answer changes without its own component."""
        return self.changed.diagonal()

    @property
    def others_changed(self) -> float:
        """Share of the answers to prompts with another own component that change."""
        return self.changed[self._others].float().mean().item()

    @property
    def kl_others(self) -> float:
        """Mean KL on prompts with another own component."""
        return self.kl_off[self._others].mean().item()

    @property
    def _others(self) -> Bool[Tensor, "n n"]:
        return self.own[:, None] != self.own

    def table(self) -> "DataFrame":
        """One row for each prompt; "others" is the share of the other prompts whose answers change with it."""
        others = (self.changed & self._others).sum(1) / self._others.sum(1).clamp_min(1)
        return frame(
            {
                "own component": self.own,
                "KL on active": self.kl_sparse,
                "same answer": self.kept,
                "KL without own": self.kl_off.diagonal(),
                "changed": self.forgotten,
                "changed by twin": self.changed_by_twin,
                "others changed": others,
            }
        )

    def _parts(self) -> list[str]:
        n = len(self.own)
        rows = [
            ("prompts with a component of their own", f"{int((self.own.bincount() == 1).sum())} of {n}"),
            (
                "on the active components alone: KL; same answer",
                f"{self.kl_sparse.mean():.1e}; {int(self.kept.sum())} of {n}",
            ),
            ("own component off: answer changed", f"{int(self.forgotten.sum())} of {n}"),
            ("  its random twin off: answer changed", f"{int(self.changed_by_twin.sum())} of {n}"),
            ("  answers to other prompts changed; KL there", f"{self.others_changed:.2%}; {self.kl_others:.1e}"),
        ]
        if self.kl_elsewhere is not None and self.kl_all_off is not None:
            far, most = self.kl_elsewhere.mean(), self.kl_elsewhere.quantile(0.99)
            rows += [
                ("  other texts: KL, mean; 99th percentile", f"{far:.1e}; {most:.1e}"),
                ("all components off, other texts: KL, mean", f"{self.kl_all_off.mean():.1e}"),
            ]
        return [table((f"{n} prompts", ""), rows)]


@no_grad()
def forgetting(
    decomposition: Decomposition,
    prompts: Batch,
    others: Iterable[Batch] | None = None,
    *,
    output: OutputFn | None = None,
    progress: bool = True,
) -> Forgetting:
    """What the model answers on the active components alone, and without each prompt's own component.

    Args:
        prompts: one batch; the decomposition's output is that of their last position.
        others: texts on which components should not matter.
        output: what is compared there; default the decomposition's output at all positions.
        progress: whether to show a bar.

    Raises:
        ShapeMismatch: the output is not `prompts n_outputs`.
    """
    components = decomposition.components
    inputs = decomposition.read(prompts)
    seen = decomposition.observe(inputs)
    if seen.output.ndim != 2 or seen.mask.ndim != 2:
        raise ShapeMismatch(
            f"Expected one distribution a prompt, an output `prompts n_outputs`, got {tuple(seen.output.shape)}. "
            "Decompose with output=apd_lens.last_position()."
        )
    active, answers = seen.mask, seen.output.argmax(-1)
    beside_mean = seen.attributions / seen.attributions.mean(0).clamp_min(torch.finfo(seen.attributions.dtype).tiny)
    own = torch.where(active, beside_mean, -1.0).argmax(1)
    sparse = output_with(decomposition, inputs, Mixture(components, active))
    distinct, numbers = own.unique(return_inverse=True)
    at_all = output or everywhere(decomposition.output or default_output)
    texts = [] if others is None else list(one_pass(others))
    n_steps = 2 * (len(distinct) + len(texts))
    with tqdm(total=n_steps, desc="forgetting", disable=not progress, mininterval=0.5, dynamic_ncols=True) as bar:

        def off(of: ParameterComponents, component: int) -> tuple[Tensor, Tensor]:
            without = output_with(decomposition, inputs, Mixture(of.picked([component]), 0.0, 1.0))
            bar.update()
            return kl_divergence(seen.output, without), without.argmax(-1) != answers

        twins = random_components(components, seed=0)
        kl_off, changed = map(torch.stack, zip(*(off(components, c) for c in distinct.tolist()), strict=True))
        changed_by_twin = torch.stack([off(twins, c)[1] for c in distinct.tolist()])[numbers].diagonal()
        far, all_off = _elsewhere(decomposition, distinct, texts, at_all, bar.update) if texts else (None, None)
    return Forgetting(
        own=own.cpu(),
        kl_sparse=kl_divergence(seen.output, sparse).cpu(),
        kept=(sparse.argmax(-1) == answers).cpu(),
        kl_off=kl_off[numbers].cpu(),
        changed=changed[numbers].cpu(),
        changed_by_twin=changed_by_twin.cpu(),
        kl_elsewhere=far,
        kl_all_off=all_off,
    )


def _elsewhere(
    decomposition: Decomposition,
    own: Int[Tensor, " some"],
    others: Iterable[Batch],
    output: OutputFn,
    done: Callable[[], Any],
) -> tuple[Float[Tensor, " positions"], Float[Tensor, " positions"]]:
    """KL at each position of other texts, of each text without one of the components, in turn, and without all."""
    target, components, turn = decomposition.target, decomposition.components, 0
    found: tuple[list[Tensor], list[Tensor]] = ([], [])
    with evaluating(target.model):
        for batch in others:
            inputs = decomposition.read(batch)
            off = own[torch.arange(turn, turn := turn + inputs.n_examples, device=own.device) % len(own)]
            others_on = ~F.one_hot(off, components.n_components).bool()
            whole, _ = replaced_pass(target, components.names, as_it_is, inputs, output)
            for shares, kls in zip((others_on, 0.0), found, strict=True):
                mixture = Mixture(components, shares, 1.0)
                kl = kl_divergence(whole, replaced_pass(target, components.names, mixture, inputs, output)[0])
                kls.append(without_padding(kl[..., None], inputs.valid).flatten().cpu())
                done()
    return torch.cat(found[0]), torch.cat(found[1])
