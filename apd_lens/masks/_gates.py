"""Gates: a small network, trained with the components, that says which of them are needed on a data point."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from apd_lens._block import no_grad
from apd_lens._checks import check_fields
from apd_lens._codec import saved
from apd_lens._errors import InvalidSetting, ShapeMismatch
from apd_lens._processes import gathered, with_own
from apd_lens._schedules import Ramp, Schedule, value_at
from apd_lens.attribution._gradient import GradientAttribution
from apd_lens.components._components import ParameterComponents
from apd_lens.components._learned import Learned
from apd_lens.data._batch import Batch
from apd_lens.data._points import Granularity, Valid, padded, without_padding, zero_at_padding
from apd_lens.host._matrix import Use
from apd_lens.losses._losses import Losses
from apd_lens.masks._masking import Attributed, Masks
from apd_lens.masks._selection import BatchTopK, K, Needed
from apd_lens.passes._watch import Call, WatchedPass

# A gate that is closed, or wide open, still learns by this share.
_LEAK = 0.01
# Of all gates at the start.
_HALF = 0.5


class GateNetwork(Learned):
    """r = V₂ norm(gelu(Σ_l x̂_l V_l + v)) + v₂ for every component, before it is cut to [0, 1].

    x̂_l is what the l-th use of a matrix reads, over its root mean square; norm, too, divides by that. With `blocks` a
    transformer without order, in which every position attends to every other, stands before the norm.

    Source of the norm and of the start at one half: public notes on stochastic parameter decomposition.
    """

    def __init__(
        self,
        uses: Sequence[Use],
        widths: Sequence[int],
        n_components: int,
        hidden: int,
        blocks: int,
        lr: float,
        generator: torch.Generator | None,
    ):
        super().__init__()
        self.lr = lr
        self._uses = list(uses)
        total, like = sum(widths), {"dtype": torch.float32, "device": "meta" if generator is None else "cpu"}

        def drawn(width: int) -> nn.Parameter:
            return nn.Parameter(torch.randn(width, hidden, generator=generator, **like) / total**0.5)

        self.read = nn.ParameterList(map(drawn, widths))
        self.shift = nn.Parameter(torch.zeros(hidden, **like))
        self.blocks = None if not blocks else _blocks(hidden, blocks, generator)
        self.weight = nn.Parameter(torch.zeros(n_components, hidden, **like))
        self.bias = nn.Parameter(torch.full((n_components,), _HALF, **like))

    def forward(self, watched: WatchedPass, granularity: Granularity) -> Float[Tensor, "batch *pos C"]:
        """r of each position; of an example, its largest."""
        valid, hidden = watched.run.inputs.valid, None
        watched.check_padding_of_positions()  # x at an encoder's padding would count
        for call in watched.calls:
            read = self._read(call)
            if granularity == "example" and hidden is not None and read.shape != hidden.shape:
                read, hidden = (_pooled(some, valid) if some.ndim != 2 else some for some in (read, hidden))
            if hidden is not None and read.shape != hidden.shape:
                raise ShapeMismatch(
                    "Gates of positions need all decomposed matrices used at the same positions, but "
                    f"{call.use.matrix} was used on {tuple(read.shape[:-1])}, and others on "
                    f"{tuple(hidden.shape[:-1])}. Give "
                    'Gates(granularity="example").'
                )
            hidden = read if hidden is None else hidden + read
        assert hidden is not None
        hidden = F.gelu(hidden + self.shift)
        if self.blocks is not None and hidden.ndim == 3:
            is_data = padded(hidden, valid)
            is_padding = None if is_data is None else ~is_data.to(hidden.device)
            hidden = hidden + self.blocks(hidden, src_key_padding_mask=is_padding)
        hidden = F.rms_norm(hidden, hidden.shape[-1:])
        r = (hidden @ self.weight.mT + self.bias).to(watched.output.device)
        if granularity == "position" or r.ndim == 2:
            return r
        is_data = padded(r, valid)
        return (r if is_data is None else r.masked_fill(~is_data[..., None], -torch.inf)).flatten(1, -2).amax(1)

    def _read(self, call: Call) -> Float[Tensor, "batch *pos hidden"]:
        side = self.read[self._uses.index(call.use)]
        if not call.x.is_floating_point():  # a one-hot x
            return F.embedding(call.x.to(side.device), side) * len(side) ** 0.5
        x = F.rms_norm(call.x.to(side), call.x.shape[-1:], eps=1e-12)
        return x @ side

    @property
    def of_components(self) -> list[Tensor]:
        return [self.weight, self.bias]

    @no_grad()
    def reset(self, component: int) -> None:
        self.weight[component], self.bias[component] = 0.0, _HALF


def _blocks(hidden: int, n: int, generator: torch.Generator | None) -> nn.Module:
    seed = None if generator is None else int(torch.randint(2**31, (1,), generator=generator, device="cpu"))
    with torch.random.fork_rng(devices=[]), torch.device("meta" if seed is None else "cpu"):
        if seed is not None:
            torch.manual_seed(seed)
        layer = nn.TransformerEncoderLayer(
            hidden, max(1, hidden // 64), 2 * hidden, 0.0, "gelu", batch_first=True, norm_first=True
        )
        return nn.TransformerEncoder(layer, n, enable_nested_tensor=False)


def _pooled(values: Float[Tensor, "batch *pos hidden"], valid: Valid) -> Float[Tensor, "batch hidden"]:
    """The mean over positions, padding left out."""
    is_data = padded(values, valid)
    if is_data is None:
        return values.flatten(1, -2).mean(1)
    return zero_at_padding(values, valid).sum(1) / is_data.sum(1, keepdim=True).clamp_min(1)


class _Lower(torch.autograd.Function):
    """r cut to [0, 1]. At r ≤ 0 a share of the gradient passes, where the loss wants it larger."""

    @staticmethod
    def forward(r: Tensor) -> Tensor:
        return r.clamp(0, 1)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.save_for_backward(inputs[0])

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        (r,) = ctx.saved_tensors
        return torch.where(r <= 0, _LEAK * gradient.clamp_max(0), gradient.masked_fill(r > 1, 0))


def lower(r: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """How much is on at least: r cut to [0, 1], which still learns below 0."""
    return _Lower.apply(r)


def upper(r: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """What sparsity counts: r cut to [0, 1], and a little more above 1, so that it comes down from there."""
    return r.clamp(0, 1) + _LEAK * (r - 1).clamp_min(0)


def smooth_l0(u: Float[Tensor, "*shape"], gamma: float) -> Float[Tensor, "*shape"]:
    """(1 + γ²) u² / (u² + γ²): 0 and 1 where u is, and nearer to u ≠ 0 the smaller γ is."""
    return (1 + gamma**2) * u.square() / (u.square() + gamma**2)


@saved
@dataclass(frozen=True)
class Importance:
    """g_c(x) in [0, 1], which gates say, in the place of an attribution."""

    def __call__(
        self,
        watched: WatchedPass,
        components: ParameterComponents,
        granularity: Granularity,
        generator: torch.Generator | None = None,
    ) -> Float[Tensor, "batch *pos C"]:
        with torch.no_grad():
            return zero_at_padding(gates_of(components)(watched, granularity).clamp(0, 1), watched.valid)


def gates_of(components: ParameterComponents) -> GateNetwork:
    """Raises InvalidSetting where there are none."""
    if not isinstance(components.gates, GateNetwork):
        raise InvalidSetting(
            "These components have no gates to say which are active: they were picked or made from others. Give an "
            "attribution in the place of `Gates`, or a mask."
        )
    return components.gates


@saved
@dataclass(frozen=True)
class Open:
    """The components are active whose gate is open further than this.

    Attributes:
        threshold: between 0 and 1.
        granularity: whether a data point is an "example" or a "position".
    """

    threshold: float = 0.1
    granularity: Granularity = "example"

    def __call__(
        self, attributions: Float[Tensor, "batch *pos C"], valid: Valid = None
    ) -> Bool[Tensor, "batch *pos C"]:
        return zero_at_padding(attributions > self.threshold, valid)

    def at(self, progress: float, batch: Batch) -> "Open":
        return self

    def after(self, minimality: Tensor, progress: float, steps: int) -> "Open":
        return self

    def with_k(self, k: K) -> BatchTopK:
        return BatchTopK(k, self.granularity)

    def n_active(self, n_data_points: int) -> None:
        return None

    def check(self, n_components: int) -> None: ...


@saved
@dataclass(frozen=True)
class Gates:
    """A network learns how much each component is needed on a data point, g_c(x) in [0, 1], from what the decomposed
    matrices read there. No k is chosen.

    At first a teacher says what is active, and the gates learn it. Then they are on their own: the model must give the
    output back on Σ_c g_c P_c, and with a random part of what the gates close. `Losses.sparsity` is the coefficient of
    log(1 + Σ_c f_c), f_c being how often a component is needed: the mean over data points of (1 + γ²) g² / (g² + γ²).
    So to halve the number of active components is worth as much on any system. Give `Losses(completeness=1)` where
    mechanisms may have copies.

    `attributions` and `select` of such a decomposition give g, and where it is above the threshold; `select(k=...)`
    takes the largest. Gates stay with the components, and are saved with them.

    Attributes:
        granularity: whether a data point is an "example" or a "position". Of an example with positions, the gate is as
            open as at the position where it is most open.
        threshold: a component is active where its gate is open further than this.
        hidden: width of the network.
        blocks: of a transformer over positions in it; 0 for none, where each position is looked at alone.
        lr: the learning rate of the network, with the schedule of the components'.
        gamma: γ; the smaller, the nearer f is to a count.
        frequency: β in f_c (1 + β log₂(1 + n f_c)), of n data points, which asks more of what is often active.
        teacher: who says at first what is active, of the same granularity; by default the attributions, as where
            nothing is said. None for nobody: then gates mostly stay open or all close.
        taught: share of the steps that it does so.
        alone: whether the teacher is done.

    Source: public notes on the successors of the method (arXiv 2506.20790), where a gate is of a piece of one matrix.
    """

    granularity: Granularity = "example"
    threshold: float = 0.1
    hidden: int = 256
    blocks: int = 0
    lr: float = 2e-3
    gamma: Schedule = field(default_factory=lambda: Ramp(1.0, 0.1, hold=0.5, reach=0.9))
    frequency: float = 0.0
    teacher: Attributed | Literal["attributions"] | None = "attributions"
    taught: float = 0.5
    alone: bool = False

    def __post_init__(self) -> None:
        check_fields(self)
        if self.teacher == "attributions":
            selection = BatchTopK(k=Needed(), granularity=self.granularity, least=0.15)
            object.__setattr__(self, "teacher", Attributed(GradientAttribution(), selection))
        if isinstance(self.teacher, Attributed) and self.teacher.selection.granularity != self.granularity:
            raise InvalidSetting(
                f"Gates say it of each {self.granularity}, and their teacher of each "
                f"{self.teacher.selection.granularity}. Give both the same granularity."
            )
        if not 0 <= self.threshold < 1 or self.hidden < 1 or self.blocks < 0 or self.lr <= 0:
            raise InvalidSetting(
                f"Gates take 0 <= threshold < 1, hidden >= 1, blocks >= 0 and a positive lr, got {self}."
            )

    @property
    def attribution(self) -> Importance:
        return Importance()

    @property
    def selection(self) -> Open:
        return Open(self.threshold, self.granularity)

    @property
    def says_what_is_active(self) -> bool:
        return True

    @property
    def needs_gradients(self) -> bool:
        return self._teacher is not None

    @property
    def _teacher(self) -> Attributed | None:
        """Who says it now."""
        return self.teacher if isinstance(self.teacher, Attributed) and not self.alone else None

    @property
    def runs_sparse_passes(self) -> bool:
        return True

    def check(self, n_components: int, losses: Losses) -> None:
        if self._teacher is not None:
            self._teacher.check(n_components, losses)

    def after(self, minimality: Tensor, progress: float, steps: int) -> "Gates":
        if self._teacher is None:
            return self
        teacher = self._teacher.after(minimality, progress, steps)
        return replace(self, teacher=teacher, alone=progress + 1 / steps >= self.taught)

    def learned(
        self, components: ParameterComponents, uses: Sequence[Use], generator: torch.Generator | None
    ) -> GateNetwork:
        widths = [components.factors(use)[0].shape[1] for use in uses]
        return GateNetwork(uses, widths, components.n_components, self.hidden, self.blocks, self.lr, generator)

    def masks(
        self,
        watched: WatchedPass,
        components: ParameterComponents,
        progress: float,
        scale: Float[Tensor, ""] | float,
        generator: torch.Generator | None = None,
    ) -> Masks:
        whole = watched.run.inputs.of_all
        own = gates_of(components)(watched, self.granularity)
        of_all = gathered(own, whole.n_examples)
        r = zero_at_padding(of_all, whole.valid)
        if self._teacher is not None:
            taught = self._teacher.masks(watched, components, progress, scale, generator)
            errors = without_padding(r - taught.at_least.to(r.dtype), whole.valid).square()
            return replace(taught, sparsity=errors.sum(-1).mean())
        g = lower(zero_at_padding(with_own(of_all, own), whole.valid))  # of which each process runs its part
        counted = without_padding(upper(r), whole.valid).flatten(0, -2)
        f = smooth_l0(counted, value_at(self.gamma, progress)).mean(0)
        if self.frequency:
            f = f * (1 + self.frequency * (1 + len(counted) * f).log2())
        closed = g.detach()
        return Masks(
            attributions=closed,
            importance=closed,
            active=self.selection(closed, whole.valid),
            on=g,
            sparsity=(1 + f.sum()).log(),
        )
