"""The passes of a scan: a clean one, one for estimates, those in which places are ablated, and two that see what moves.

A row is one use of a matrix. A place is a row at a group of positions. A plan is a set of places ablated together.
"""

from collections import Counter
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from apd_lens._errors import UnsupportedModel
from apd_lens._memory import fitting, slices
from apd_lens.attribution._metric import metric_scalars
from apd_lens.data._inputs import Inputs
from apd_lens.data._points import padded
from apd_lens.host._matrix import Use
from apd_lens.host._target import TargetModel
from apd_lens.passes._output import OutputFn
from apd_lens.passes._watch import Call, WatchedPass, check_finite_output, replaced_pass, watched_pass
from apd_lens.scan._groups import Groups

# Matrix and site.
Row = tuple[str, str]
# Number of a row, number of a group.
Place = tuple[int, int]
# What one gradient must be of the largest to count as one.
_NOTHING = 1e-6


@dataclass(eq=False)
class Part:
    """One batch and what is known of it.

    Attributes:
        donor: of each group, whose output a prompt gets; None where it gets a mean.
        metric: the explained output -> one scalar a prompt.
        before: that of the model as it is.
        top: the largest output at the explained position.
    """

    inputs: Inputs
    groups: Groups
    donor: Int[Tensor, "group batch"] | None
    metric: Callable[[Tensor], Tensor]
    before: Float[Tensor, " batch"]
    top: Int[Tensor, " batch"]


@dataclass(frozen=True, eq=False)
class Layout:
    """What a forward uses, in its order.

    Attributes:
        has_positions: whether y is `batch pos d_out`, otherwise it is `batch d_out`.
        skipped: matrix -> why it has no rows.
        lookups: rows that look up tokens or positions.
    """

    rows: tuple[Row, ...]
    has_positions: bool
    n_positions: tuple[int, ...]
    skipped: dict[str, str]
    lookups: frozenset[int]


def layout(target: TargetModel, names: Sequence[str], batches: Sequence[Inputs], output: OutputFn) -> Layout:
    """Runs two examples of each batch to see which uses there are, and on how many positions.

    Raises:
        UnsupportedModel: no use gives `batch d_out` or `batch pos d_out`.
    """
    rows: dict[Row, None] = {}
    lookups: set[Row] = set()
    skipped: dict[str, str] = {}
    n_positions: list[int] = []
    for inputs in batches:
        seen: list[tuple[Use, torch.Size]] = []

        def see(use: Use, x: Tensor, original: Callable[[], Tensor], bias: Tensor | None, seen: Any = seen) -> Tensor:
            y = original()
            seen.append((use, y.shape))
            if not x.is_floating_point():
                lookups.add((use.matrix, use.site))
            return y

        some = inputs.some(slice(0, 2))
        replaced_pass(target, names, see, some, output)
        lengths = Counter(shape[1] for _, shape in seen if len(shape) == 3)
        n = lengths.most_common(1)[0][0] if lengths else 0
        n = some.valid.shape[1] if some.valid is not None and lengths else n
        n_positions.append(n)
        for use, shape in seen:
            rows[use.matrix, use.site] = None
            if len(shape) != (3 if n else 2) or shape[0] not in (1, some.n_examples) or (n and shape[1] != n):
                skipped[use.matrix] = f"its output at {use.site} is {tuple(shape)}"
    kept = tuple(row for row in rows if row[0] not in skipped)
    if not kept:
        raise UnsupportedModel(f"No matrix could be scanned: {'; '.join(f'{k}: {v}' for k, v in skipped.items())}.")
    if len({n > 0 for n in n_positions}) > 1:
        raise UnsupportedModel("Some batches have positions and others have none. Scan them one by one.")
    of_lookups = frozenset(number for number, row in enumerate(kept) if row in lookups)
    return Layout(kept, n_positions[0] > 0, tuple(n_positions), skipped, of_lookups)


def explained_rows(output: Float[Tensor, "batch *pos n_outputs"], groups: Groups) -> Float[Tensor, "batch n_outputs"]:
    """The explained output of each prompt at its last position that is no padding."""
    if padded(output, groups.valid) is not None:
        return output[torch.arange(len(output), device=output.device), groups.last]
    while output.ndim > 2:
        output = output[:, -1]
    return output


@dataclass(eq=False)
class Passes:
    """Runs the model.

    Attributes:
        sources: rows that depend on no other.
        means: of each row, and call of it in a forward, by number of alike prompts; empty for resample ablation.
        last_row: the one that gives the explained output, if it is as wide; otherwise −1.
        n_forward, n_backward: passes done, counted in batches: one in which a batch is replicated is as many.
    """

    target: TargetModel
    layout: Layout
    output: OutputFn
    memory: int | None
    parts: list[Part] = field(default_factory=list)
    means: dict[tuple[int, int], Float[Tensor, "alike group slot d"]] = field(default_factory=dict)
    sources: frozenset[int] = frozenset()
    bytes_each: float = 0.0
    n_forward: int = 0
    n_backward: int = 0
    last_row: int = -1

    def __post_init__(self) -> None:
        self.number = {row: number for number, row in enumerate(self.layout.rows)}

    def counted(self) -> Callable[[Use], tuple[int, int]]:
        """For each use of a forward in turn: its row, and which call of the row it is."""
        calls: Counter[int] = Counter()

        def key(use: Use) -> tuple[int, int]:
            row = self.number[use.matrix, use.site]
            calls[row] += 1
            return row, calls[row] - 1

        return key

    def names(self) -> list[str]:
        """All scanned matrices. Every pass takes all of them: a forward is looked at anew for other ones, which takes
        longer than to go through them."""
        return list(dict.fromkeys(name for name, _ in self.layout.rows))

    @property
    def at_once(self) -> int:
        """How many plans run in one forward. On a CPU a large forward is no faster than several."""
        on_cpu = next(iter(self.target.weights.values())).parameter.device.type == "cpu"
        return fitting(self.bytes_each, 2**26 if on_cpu and self.memory is None else self.memory)

    def clean(
        self, inputs: Inputs, groups: Groups, sums: dict[tuple[int, int], Tensor] | None, n_alike: int
    ) -> Float[Tensor, "batch *pos n_outputs"]:
        """The output of the model as it is; what places give is added to the sums."""
        key_of, has = self.counted(), groups.has
        size, width = 0, 0

        def add(use: Use, x: Tensor, original: Callable[[], Tensor], bias: Tensor | None) -> Tensor:
            nonlocal size, width
            y = original()
            size, width = max(size, y.numel() * y.element_size()), y.shape[-1]
            key = key_of(use)
            self.last_row = key[0]
            if sums is not None:
                here = groups.at(self._whole(y, inputs.n_examples)) * has[..., None, None]
                total = here.new_zeros(n_alike, *here.shape[:1], *here.shape[2:], dtype=torch.float32)
                total.index_add_(0, groups.alike, here.movedim(1, 0).float())
                sums[key] = sums[key] + total if key in sums else total
            return y

        output, _ = replaced_pass(self.target, self.names(), add, inputs, self.output)
        check_finite_output(output, "where")
        self.last_row = self.last_row if width == output.shape[-1] else -1
        self.bytes_each = max(self.bytes_each, 4.0 * size)
        self.n_forward += 1
        return output.detach()

    def _whole(self, y: Tensor, n: int) -> Float[Tensor, "batch pos d"]:
        """y with an entry for each prompt and an axis of positions."""
        y = y if self.layout.has_positions else y[:, None]
        return y.expand(n, *y.shape[1:])

    def estimates(self, steps: int) -> Float[Tensor, "row group"]:
        """Mean over prompts of Σ (y − ȳ) · mean over α of ∂metric/∂y, by one forward and one backward pass for each α.

        The gradient is that of the model whose sources give ȳ + α (y − ȳ), α = 1 / steps to 1. Sources are the rows
        that depend on no other, such as embeddings.
        """
        total = torch.zeros(len(self.layout.rows), len(self.parts[0].groups.own), dtype=torch.float64, device="cpu")
        for part in self.parts:
            watched, gradients = self._gradients(part, 1.0)
            summed = list(gradients)
            for step in range(1, steps):
                pairs = zip(summed, self._gradients(part, step / steps)[1], strict=True)
                summed = [one if other is None else other if one is None else one + other for one, other in pairs]
            key_of = self.counted()
            for call, gradient in zip(watched.calls, summed, strict=True):
                key = key_of(call.use)
                if gradient is None:
                    continue
                y = self._whole(call.y.detach(), part.inputs.n_examples)
                change = part.groups.at(y).float() - self._instead(key, part, y)
                effect = change * part.groups.at(self._whole(gradient, len(y))).float() / steps
                effect = effect.nan_to_num() * part.groups.own[..., None]
                total[key[0]] += effect.sum((1, 2, 3)).double().cpu()
        return (total / self.n_prompts()).float()

    def _gradients(self, part: Part, alpha: float) -> tuple[WatchedPass, Sequence[Tensor | None]]:
        """∂metric/∂y of every call, with the sources at this place between what replaces them and what they give."""
        n, groups, key_of = part.inputs.n_examples, part.groups, self.counted()

        def between(use: Use, x: Tensor, original: Callable[[], Tensor], bias: Tensor | None) -> Tensor:
            y, key = original(), key_of(use)
            if key[0] not in self.sources:
                return y
            clean = self._whole(y, n)
            whole, instead = clean.clone(), self._instead(key, part, clean)
            for group in range(len(groups.own)):
                _put(whole, groups, group, groups.at(clean) * alpha + (1 - alpha) * instead)
            return whole if self.layout.has_positions else whole[:, 0]

        watched = watched_pass(
            self.target, self.names(), part.inputs, self.output, replaced=between if alpha < 1 else None
        )
        with torch.enable_grad():
            scalars = metric_scalars(part.metric, watched.output)
        ys = [call.y for call in watched.calls]
        self.n_forward += 1
        self.n_backward += 1
        return watched, torch.autograd.grad(scalars, ys, torch.ones_like(scalars), allow_unused=True)

    def _instead(
        self, key: tuple[int, int], part: Part, clean: Float[Tensor, "batch pos d"]
    ) -> Float[Tensor, "group batch slot d"]:
        """What stands in the place of y."""
        groups = part.groups
        if part.donor is None:
            return self.means[key][groups.alike].movedim(0, 1)
        rows = torch.arange(len(groups.own), device=clean.device)[:, None]
        index = groups.index[rows, part.donor]
        return clean[part.donor[..., None], index].float()

    def n_prompts(self) -> Int[Tensor, " group"]:
        """How many prompts have each group."""
        return torch.stack([part.groups.has.sum(1) for part in self.parts]).sum(0).cpu()

    @torch.no_grad()
    def ablated(self, plans: Sequence[Collection[Place]]) -> tuple[Float[Tensor, " plan"], Float[Tensor, " plan"]]:
        """Of each plan: how much of the metric is lost, and which share of the largest outputs stay the largest; means
        over the prompts that have one of its groups."""
        lost = torch.zeros(len(plans), dtype=torch.float64, device="cpu")
        kept, n = lost.clone(), lost.clone()
        for part in self.parts:
            for some in slices(len(plans), self.at_once):
                output = self._replicates(part, plans[some])
                for number, (plan, one) in enumerate(zip(plans[some], output, strict=True), some.start):
                    has = part.groups.has[[group for _, group in plan]].any(0)
                    scalars = metric_scalars(part.metric, one)
                    lost[number] += (part.before - scalars)[has].double().sum().cpu()
                    same = explained_rows(one, part.groups).argmax(-1) == part.top
                    kept[number] += same[has].sum().cpu()
                    n[number] += has.sum().cpu()
        return (lost / n).float(), (kept / n).float()

    def _replicates(self, part: Part, plans: Sequence[Collection[Place]]) -> Float[Tensor, "plan batch *pos n_outputs"]:
        """The output of a batch with each plan's places ablated, all in one forward."""
        plans = plans if part.donor is None else [(), *plans]  # donors give what they do in a clean replicate
        n, groups, key_of = part.inputs.n_examples, part.groups, self.counted()

        def ablate(use: Use, x: Tensor, original: Callable[[], Tensor], bias: Tensor | None) -> Tensor:
            y, key = original(), key_of(use)
            places = [(at, group) for at, plan in enumerate(plans) for row, group in plan if row == key[0]]
            if not places:
                return y
            whole = self._whole(y, n * len(plans)).clone().unflatten(0, (len(plans), n))
            instead = self._instead(key, part, whole[0])
            for at, group in places:
                _put(whole[at], groups, group, instead)
            return whole.flatten(0, 1) if self.layout.has_positions else whole.flatten(0, 1)[:, 0]

        output, _ = replaced_pass(self.target, self.names(), ablate, part.inputs.replicated(len(plans)), self.output)
        self.n_forward += len(plans)
        output = output.unflatten(0, (len(plans), n))
        return output if part.donor is None else output[1:]

    def structure(self) -> tuple[Bool[Tensor, " row"], Bool[Tensor, " row"], Bool[Tensor, " group"]]:
        """What can be seen without any behaviour: which rows other positions read from, which rows read from other
        positions, and which groups the metric reads directly. In the first batch.

        Directly means: with the output of every matrix held at what it is.
        """
        part = self.parts[0]
        n, valid = part.inputs.n_examples, part.groups.valid
        watched = watched_pass(
            self.target,
            self.names(),
            part.inputs,
            self.output,
            replaced=lambda use, x, original, bias: original().detach(),
        )
        ys = [call.y for call in watched.calls]
        sizes = [self._whole(y, n).shape for y in ys]
        rows = [self.number[call.use.matrix, call.use.site] for call in watched.calls]
        fed = {row for row, call in zip(rows, watched.calls, strict=True) if call.x_in_graph.requires_grad}
        self.sources = frozenset(rows) - fed
        with torch.enable_grad():
            scalars = metric_scalars(part.metric, watched.output)
        gradients = torch.autograd.grad(scalars, ys, torch.ones_like(scalars), retain_graph=True, allow_unused=True)
        answers = torch.zeros_like(valid)
        for gradient, size in zip(gradients, sizes, strict=True):
            answers |= _is_something(gradient, size, valid.device)
        answers &= valid
        moves = torch.zeros(len(self.layout.rows), dtype=torch.bool, device="cpu")
        reads = moves.clone()
        of_answer = self._of_answer(part.groups, answers)
        if not self.layout.has_positions or bool((answers | ~valid).all()):
            return moves, reads, of_answer
        with torch.enable_grad():
            read = [
                _projected(x[answers])
                for x in (call.x_in_graph for call in watched.calls)
                if x.requires_grad and x.shape[:2] == valid.shape
            ]
        if read:
            gradients = torch.autograd.grad(read, ys, allow_unused=True)
            for row, gradient, size in zip(rows, gradients, sizes, strict=True):
                moves[row] |= bool(_is_something(gradient, size, valid.device)[~answers & valid].any())
        self.n_forward += 1
        self.n_backward += 2
        return moves, self._readers(part, watched.calls, answers), of_answer

    @staticmethod
    def _of_answer(groups: Groups, answers: Bool[Tensor, "batch pos"]) -> Bool[Tensor, " group"]:
        """Whether all positions of a group are answers."""
        rows = torch.arange(len(answers), device=answers.device)[:, None]
        there = answers[rows, groups.index] | ~groups.own
        return (there.all(-1).all(-1) & groups.own.any(-1).any(-1)).cpu()

    @torch.no_grad()
    def _readers(self, part: Part, calls: Sequence[Call], answers: Bool[Tensor, "batch pos"]) -> Bool[Tensor, " row"]:
        """Rows whose x at the answer changes where outputs of matrices at other positions do, and no others.

        Args:
            calls: of a clean pass.
        """
        n, found = part.inputs.n_examples, torch.zeros(len(self.layout.rows), dtype=torch.bool, device="cpu")
        clean = iter(calls)

        def disturb(use: Use, x: Tensor, original: Callable[[], Tensor], bias: Tensor | None) -> Tensor:
            call = next(clean)
            if x.is_floating_point() and x.shape[:2] == answers.shape:
                before = call.x[answers].float()
                changed = (x[answers].float() - before).norm() > 1e-4 * before.norm()
                found[self.number[use.matrix, use.site]] |= bool(changed)
            y = original()
            if len(y) != n:
                return y
            before = call.y.detach()
            noise = torch.linspace(-99, 99, y.numel(), dtype=y.dtype, device=y.device).view(y.shape).sin()
            size = before.float().std().clamp_min(1e-3).to(y.dtype)
            return torch.where(answers[..., None], before, before + noise * size)

        replaced_pass(self.target, self.names(), disturb, part.inputs, self.output)
        self.n_forward += 1
        return found


def _put(
    y: Float[Tensor, "batch pos d"], groups: Groups, group: int, values: Float[Tensor, "group batch slot d"]
) -> None:
    """Writes a group's values to its positions."""
    prompt, slot = groups.own[group].nonzero(as_tuple=True)
    y[prompt, groups.index[group, prompt, slot]] = values[group, prompt, slot].to(y.dtype)


def _is_something(gradient: Tensor | None, size: torch.Size, device: torch.device) -> Bool[Tensor, "batch pos"]:
    """Where a gradient is not 0."""
    if gradient is None:
        return torch.zeros(size[:2], dtype=torch.bool, device=device)
    largest = gradient.reshape(size).nan_to_num().abs().amax(-1)
    return largest > _NOTHING * largest.max()


def _projected(x: Tensor) -> Tensor:
    """Σ x times numbers that are all different."""
    return (x * torch.linspace(1, 2, x.numel(), dtype=x.dtype, device=x.device).view(x.shape)).sum()
