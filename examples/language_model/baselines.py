"""Which change of a model's weights erases one fact with the fewest side effects?

Components of a decomposition, and beside them what a sceptic asks for: random components, those of other facts,
singular directions, rank-one edits, low-rank unlearning, heads and neurons. Each is a function that makes `Edits`: the
number of a fact -> what some weights of the model become. `effects` measures all of them in the same way.

    python examples/language_model/baselines.py              # an hour on two cores
    python examples/language_model/baselines.py --stand-in   # a tiny model, for a look at the code
"""

import argparse
import copy
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import tasks
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.func import functional_call

import apd_lens as apd

Weights = Mapping[str, Tensor]  # name in the model's state dict -> value
Edits = Callable[[int], Weights]
Goal = Callable[[int], Float[Tensor, " vocabulary"]]  # number of a fact -> what its prompt should be answered with

PHRASE = "The capital of {country} is"
UNSEEN = (
    "The capital city of {country} is",
    "{country}'s capital is",
    "Q: What is the capital of {again}?\nA: The capital of {country} is",
    "I visited the capital of {country}, which is called",
    "The government of {country} sits in its capital,",
)
RIDGE = 1e-3  # added to second moments, as a share of their mean diagonal


class _HandOn(nn.Module):
    """A layer that does nothing."""

    def forward(self, hidden_states: Tensor, *_: Any, **__: Any) -> Tensor:
        return hidden_states


def front(model: Any, first: int) -> Any:
    """What of a Llama comes before one of its layers; it shares the weights."""
    return _with(model.model, layers=model.model.layers[:first], norm=_HandOn())


def tail(model: Any, first: int) -> Any:
    """A Llama without the layers in front of one; it shares the weights of the others, and their names."""
    layers = nn.ModuleList([*(_HandOn() for _ in range(first)), *model.model.layers[first:]])
    return _with(model, model=_with(model.model, layers=layers))


def _with(module: nn.Module, **children: nn.Module) -> nn.Module:
    other = copy.copy(module)
    other._modules = {**module._modules, **children}
    return other


def layer_of(name: str) -> int:
    """The number of the layer that a weight is in; -1 of the embedding, the last norm and the unembedding."""
    found = re.search(r"layers\.(\d+)\.", name)
    return int(found[1]) if found else -1


@dataclass(frozen=True, eq=False)
class Task:
    """Facts that a Llama of Hugging Face knows, and texts on which nothing should change.

    Attributes:
        model: it is run in eval mode, and never changed.
        prompts: their tokens, one fact each, all of one length.
        answers: the token that the model finds most likely behind each.
        subject: the position of what the fact is about.
        weights: the matrices that edits of equal rank are made in, by their names in the state dict.
        others: general text to train on.
        held_out: general text to measure on.
        unseen: the same facts in other phrasings, on which nothing is trained: for each the tokens `n pos`, padded on
            the right, and the position of each prompt's last token.
        rank: of edits in each of the matrices.
    """

    model: Any
    prompts: Int[Tensor, "n pos"]
    answers: Int[Tensor, " n"]
    subject: int
    weights: Sequence[str]
    others: Int[Tensor, "texts length"]
    held_out: Int[Tensor, "some_texts length"]
    unseen: Sequence[tuple[Int[Tensor, "n _"], Int[Tensor, " n"]]] = ()
    rank: int = 6
    _kept: dict[Any, Any] = field(default_factory=dict, repr=False)

    def run(
        self, tokens: Tensor, weights: Weights | None = None, *, rows: Any = slice(None), at: Tensor | int | None = -1
    ) -> Float[Tensor, "rows *pos vocabulary"]:
        """Log-probabilities of the next token behind some rows of tokens, with other weights in the model.

        What comes before the first changed layer is run once for the same tokens.

        Args:
            at: a position, or one for each row; None for all positions.
        """
        first = max(0, min(layer_of(name) for name in weights or self.weights))
        after = self.once(("tail", first), lambda: tail(self.model, first))
        residual = self.once((id(tokens), first), lambda: self._before(tokens, first))
        places = torch.arange(tokens.shape[1])[torch.as_tensor(0 if at is None else at)]
        kept, place = places.unique(return_inverse=True)
        called = {"inputs_embeds": residual[rows], "use_cache": False, "logits_to_keep": 0 if at is None else kept}
        logits = functional_call(after, dict(weights or {}), kwargs=called).logits.log_softmax(-1)
        return logits if at is None else logits[torch.arange(len(logits)), place]

    def before(self, tokens: Tensor, at: Tensor | int = -1) -> Float[Tensor, "rows vocabulary"]:
        """The same of the model as it is."""
        with torch.no_grad():
            return self.once(("before", id(tokens)), lambda: self.run(tokens, at=at))

    def _before(self, tokens: Tensor, first: int) -> Tensor:
        with torch.no_grad():
            before = front(self.model, first)
            parts = [before(part, use_cache=False).last_hidden_state for part in tokens.split(64)]
        self._kept["tokens", id(tokens)] = tokens  # so that no others get its id
        return torch.cat(parts)

    def once(self, key: Any, make: Callable[[], Any]) -> Any:
        """What is made the first time."""
        if key not in self._kept:
            self._kept[key] = make()
        return self._kept[key]

    def value(self, name: str) -> Float[Tensor, "d_out d_in"]:
        """A weight as it is."""
        return self.model.get_parameter(name).detach()


# --- what an edit does


@dataclass(frozen=True, eq=False)
class Effects:
    """What n edits do, each of which should erase, or rewire, a fact of its own.

    KL is KL(model ‖ edited model) of the next token, in nats. An answer is the most likely next token.

    Attributes:
        success: whether the fact's answer changes; or becomes the one that was wanted, where one was.
        lost: nats of log p that the fact's answer loses.
        changed: whether edit i changes the answer to prompt j, `edit prompt`.
        kl: there.
        far: KL at each position of held-out text, for some of the edits.
        unseen: whether some of the edits change the answer to prompt j in other phrasings, `edit phrasing prompt`.
        known: whether the model answers prompt j in other phrasings.
        rank: of the change, summed over matrices.
        parameters: numbers that say the change: rank × (d_in + d_out), or the changed entries where they are fewer.
        seconds: for each edit, that of what is made once shared among them; CPU time of the process.
        measured: the numbers of the edits.
        some: those of the edits that were tried on held-out text and other phrasings.
    """

    success: Bool[Tensor, " edits"]
    lost: Float[Tensor, " edits"]
    changed: Bool[Tensor, "edits n"]
    kl: Float[Tensor, "edits n"]
    far: Float[Tensor, "some positions"]
    unseen: Bool[Tensor, "some phrasings n"]
    known: Bool[Tensor, "phrasings n"]
    rank: Float[Tensor, " edits"]
    parameters: Float[Tensor, " edits"]
    seconds: float
    measured: list[int]
    some: list[int]

    def numbers(self, which: Sequence[int] | None = None) -> dict[str, float]:
        """Means over all edits, or over those of some facts."""

        def chosen(edits: list[int]) -> tuple[list[int], Tensor]:
            rows = [row for row, i in enumerate(edits) if which is None or i in which]
            return rows, F.one_hot(torch.tensor(edits), self.changed.shape[1]).bool()[rows]

        (rows, own), (tried, mine) = chosen(self.measured), chosen(self.some)
        unseen, far, known = self.unseen[tried], self.far[tried], self.known.expand(len(tried), -1, -1)
        mine = mine[:, None].expand_as(known)

        def mean(values: Tensor) -> float:
            return values.float().mean().item()

        return {
            "success": mean(self.success[rows]),
            "nats lost": mean(self.lost[rows]),
            "others changed": mean(self.changed[rows][~own]),
            "KL there": mean(self.kl[rows][~own]),
            "texts: KL": mean(far),
            "99th": far.flatten().quantile(0.99).item() if tried else float("nan"),
            "unseen: success": mean(unseen[mine & known]),
            "strangers changed": mean(unseen[~mine & known]),
            "rank": mean(self.rank[rows]),
            "parameters": mean(self.parameters[rows]),
            "s": self.seconds,
        }


@torch.no_grad()
def effects(
    task: Task,
    make: Callable[[], Edits],
    *,
    wanted: Int[Tensor, " n"] | None = None,
    which: Sequence[int] | None = None,
    most: int = 10,
    before: float = 0.0,
) -> Effects:
    """What edits do to their own facts, to the others, to other phrasings and to held-out text.

    Args:
        make: makes the edits; its time counts.
        wanted: the answers that the edits should bring; default any other one.
        which: the facts whose edits are tried; default all.
        most: so many of them are tried on the held-out text and on the other phrasings.
        before: seconds that each edit has cost already.
    """
    measured = list(range(len(task.prompts))) if which is None else list(which)
    began = time.process_time()
    edits = make()
    seconds, rows, far, unseen = time.process_time() - began, [], [], []
    some = [measured[at] for at in torch.linspace(0, len(measured) - 1, min(most, len(measured))).long().tolist()]
    p, original = task.before(task.prompts), task.run(task.held_out, at=None)
    answers = [task.before(tokens, last).argmax(-1) for tokens, last in task.unseen]
    for i in measured:
        began = time.process_time()
        with torch.enable_grad():
            weights = {name: value.detach() for name, value in edits(i).items()}
        seconds += time.process_time() - began
        q = task.run(task.prompts, weights)
        answer = q[i].argmax()
        rows.append(
            (
                answer != task.answers[i] if wanted is None else answer == wanted[i],
                (p - q)[i, task.answers[i]],
                q.argmax(-1) != task.answers,
                kl(p, q),
                *_sizes([(value - task.value(name)) for name, value in weights.items()]),
            )
        )
        if i in some:
            far.append(kl(original, task.run(task.held_out, weights, at=None)).flatten())
            now = [task.run(tokens, weights, at=last).argmax(-1) for tokens, last in task.unseen]
            unseen.append(_differ(now, answers, len(q)))
    success, lost, changed, divergence, rank, parameters = map(torch.stack, zip(*rows, strict=True))
    known = ~_differ(answers, [task.answers] * len(answers), len(p))
    return Effects(
        success, lost, changed, divergence, torch.stack(far), torch.stack(unseen), known, rank, parameters,
        before + seconds / len(measured), measured, some,
    )  # fmt: skip


def kl(p: Float[Tensor, "*rows vocabulary"], q: Float[Tensor, "*rows vocabulary"]) -> Float[Tensor, "*rows"]:
    """KL(p ‖ q) of log-probabilities, in nats."""
    return (p.exp() * (p - q)).sum(-1)


def _differ(tokens: list[Tensor], others: list[Tensor], n: int) -> Bool[Tensor, "phrasings n"]:
    return torch.stack([t != o for t, o in zip(tokens, others, strict=True)]) if tokens else torch.zeros(0, n).bool()


def _sizes(changes: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Rank and number of parameters of a change; singular values below a thousandth of the largest are rounding."""
    ranks, parameters = 0, 0
    for change in changes:
        values = torch.linalg.svdvals(change)
        rank = int((values > 1e-3 * values[0]).sum())
        ranks += rank
        parameters += min(rank * sum(change.shape), int((change != 0).sum()))
    return torch.tensor(float(ranks)), torch.tensor(float(parameters))


def table(rows: Mapping[str, Effects], which: Sequence[int] | None = None) -> str:
    """A Markdown table with a row for each kind of edit, over all facts or some of them."""
    found = {name: row.numbers(which) for name, row in rows.items()}
    shown = {"success": "{:.0%}", "nats lost": "{:.1f}", "others changed": "{:.2%}", "unseen: success": "{:.0%}"}
    shown |= {"strangers changed": "{:.2%}", "rank": "{:.0f}", "parameters": "{:.0f}", "s": "{:.1f}"}
    columns = list(next(iter(found.values())))
    lines = [["", *columns], ["---"] * (len(columns) + 1)]
    lines += [[name, *(shown.get(c, "{:.1e}").format(row[c]) for c in columns)] for name, row in found.items()]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


# --- components


def of_components(decomposition: apd.Decomposition, own: Sequence[int]) -> Edits:
    """W − P of each fact's own component."""

    def edit(i: int) -> Weights:
        edited = decomposition.edited_state_dict(int(own[i]))
        return {name: edited[name] for name in decomposition.components.names}

    return edit


def of_random_components(decomposition: apd.Decomposition, own: Sequence[int], seed: int = 0) -> Edits:
    """The same of random components with the same singular values."""
    return of_components(replace(decomposition, components=apd.random_components(decomposition.components, seed)), own)


def of_other_components(task: Task, decomposition: apd.Decomposition, own: Sequence[int]) -> Edits:
    """The same of another fact's component, the one that is as often active on prompts and on general text."""
    texts, mine = task.others[:64], torch.as_tensor(own)
    masks = [decomposition.select({"input_ids": batch}).flatten(0, -2) for batch in (task.prompts, *texts.split(16))]
    usage = torch.cat(masks).float().sum(0)[mine]
    difference = (usage[:, None] - usage).abs()
    difference[mine[:, None] == mine] = torch.inf
    return of_components(decomposition, mine[difference.argmin(1)].tolist())


def rewired_components(task: Task, decomposition: apd.Decomposition, own: Sequence[int], to: Sequence[int]) -> Edits:
    """W − P_i + A_i M B_j: where the component of fact i reads, that of fact j = to[i] is written.

    M = a_iᵀ a_j / ‖a_i‖² carries the inner activations a_i = x_i A_i to a_j = x_j A_j, each at the position where its
    component does most. So what is written does not depend on how a component is factored.
    """
    components, target = decomposition.components, decomposition.target
    reads = {name: seen.x for name, seen in watched(task, components.names).items()}

    def inner(name: str, i: int) -> Tensor:
        activations = reads[name][i] @ components.A[name][own[i]]
        return activations[(activations @ components.B[name][own[i]]).norm(dim=-1).argmax()]

    @torch.no_grad()
    def edit(i: int) -> Weights:
        weights, j = {}, to[i]
        for name in components.names:
            mine, other = inner(name, i), inner(name, j)
            A, B = components.A[name][own[i]], components.B[name]
            written = torch.outer(mine / mine.square().sum(), other) @ B[own[j]]
            weights |= target.weights[name].state(target.weights[name].value() + A @ (written - B[own[i]]))
        return weights

    return edit


# --- what the model reads, and how the answers depend on it


@dataclass(frozen=True, eq=False)
class Watched:
    """Of y = x Wᵀ at the prompts: x, and the gradient of log p(answer) with respect to y."""

    x: Float[Tensor, "n pos d_in"]
    gradient: Float[Tensor, "n pos d_out"]


def watched(task: Task, names: Sequence[str]) -> dict[str, Watched]:
    """Of each of these matrices."""
    with _kept_calls(task.model, names) as calls, torch.enable_grad():
        logits = task.model(task.prompts, use_cache=False, logits_to_keep=1).logits[:, -1]
        answer = logits.log_softmax(-1).gather(1, task.answers[:, None]).sum()
        gradients = torch.autograd.grad(answer, [y for _, y in calls.values()])
    return {
        name: Watched(x.detach(), gradient) for (name, (x, _)), gradient in zip(calls.items(), gradients, strict=True)
    }


@torch.no_grad()
def second_moments(task: Task, name: str, n_texts: int = 96) -> Float[Tensor, "d_in d_in"]:
    """Mean of x xᵀ over the positions of general text."""
    with _kept_calls(task.model, [name]) as calls:
        task.model(task.others[:n_texts], use_cache=False, logits_to_keep=1)
    x = calls[name][0].flatten(0, 1)
    return x.T @ x / len(x)


@contextmanager
def _kept_calls(model: Any, names: Sequence[str]) -> Iterator[dict[str, tuple[Tensor, Tensor]]]:
    """Inside, what modules read and write is kept, by the names of their weights."""
    kept: dict[str, tuple[Tensor, Tensor]] = {}

    def keep(name: str) -> Any:
        def hook(module: nn.Module, read: tuple[Tensor, ...], written: Tensor) -> Tensor:
            if torch.is_grad_enabled() and not written.requires_grad:
                written.requires_grad_()
            kept[name] = read[0], written
            return written

        return model.get_submodule(name.removesuffix(".weight")).register_forward_hook(hook)

    handles = [keep(name) for name in names]
    try:
        yield kept
    finally:
        for handle in handles:
            handle.remove()


# --- parts of the weights as they are


def _beside_others(scores: Float[Tensor, "n *parts"], others: float) -> Float[Tensor, "n *parts"]:
    """What a part does for a fact's answer, less so many times the root mean square of what it does for the others'."""
    squares = scores.square()
    return scores - others * ((squares.sum(0) - squares) / max(len(scores) - 1, 1)).clamp_min(0).sqrt()


def of_singular_directions(task: Task, others: float = 1.0, rank: int | None = None) -> Edits:
    """W without the singular directions that the answer depends on most, as many as a component's rank in each matrix.

    By the first-order effect Σ_t (x_t · v_k) σ_k (u_k · g_t), g being the gradient of log p(answer), beside those on
    the others.
    """
    seen, best, parts = watched(task, task.weights), {}, {}
    for name in task.weights:
        U, S, Vh = torch.linalg.svd(task.value(name), full_matrices=False)
        effect = ((seen[name].x @ Vh.T) * S * (seen[name].gradient @ U)).sum(1)
        best[name] = _beside_others(effect, others).topk(rank or task.rank).indices
        parts[name] = U * S, Vh

    def edit(i: int) -> Weights:
        return {name: task.value(name) - US[:, best[name][i]] @ Vh[best[name][i]] for name, (US, Vh) in parts.items()}

    return edit


def of_units(task: Task, kind: Literal["neurons", "heads"], count: int, others: float = 1.0) -> Edits:
    """W_down or W_O of all layers without the neurons or heads that the answer depends on most.

    By the first-order effect Σ_t x_t · ∂ log p(answer) / ∂x_t of turning off what a unit writes, beside those on the
    others. A neuron has as many numbers here as the residual stream, a head d_head times so many.
    """
    end = {"neurons": "mlp.down_proj.weight", "heads": "self_attn.o_proj.weight"}[kind]
    names = [name for name, _ in task.model.named_parameters() if name.endswith(end)]
    width = 1 if kind == "neurons" else task.model.config.head_dim
    seen = watched(task, names)
    by_layer = [(seen[name].x * (seen[name].gradient @ task.value(name))).sum(1) for name in names]
    effect = torch.stack(by_layer, 1).unflatten(-1, (-1, width)).sum(-1)
    best = _beside_others(effect, others).flatten(1).topk(count).indices

    def edit(i: int) -> Weights:
        weights: dict[str, Tensor] = {}
        for unit in best[i].tolist():
            layer, place = divmod(unit, effect.shape[2])
            value = weights.setdefault(names[layer], task.value(names[layer]).clone())
            value[:, place * width : (place + 1) * width] = 0
        return weights

    return edit


# --- trained edits


@dataclass(frozen=True)
class Training:
    """How an edit is trained.

    Attributes:
        steps, lr: of Adam.
        retain: coefficient of the KL on other prompts and on general text.
        n_prompts, n_texts: so many of these in a step.
        close: the training ends when it is so near to its goal, KL(goal ‖ edited model) in nats, and the most likely
            answer is one that the goal allows. An edit that does more than it must has more side effects.
    """

    steps: int = 30
    lr: float = 0.1
    retain: float = 1.0
    n_prompts: int = 8
    n_texts: int = 1
    close: float = 0.05


RANK_ONE = Training(steps=60, lr=0.1, n_texts=0)
LOW_RANK = Training(steps=60, lr=3e-3)
REWIRED = replace(RANK_ONE, close=0.5)


def forgotten(task: Task) -> Goal:
    """The model's own distribution without the answer."""

    def goal(i: int) -> Tensor:
        p = task.before(task.prompts)[i].exp()
        p[task.answers[i]] = 0
        return p / p.sum()

    return goal


def answered(task: Task, wanted: Int[Tensor, " n"]) -> Goal:
    """Another answer for certain."""
    return lambda i: F.one_hot(wanted[i], task.before(task.prompts).shape[1]).float()


def trained(
    task: Task, i: int, goal: Goal, start: Sequence[Tensor], weights_of: Callable[..., Weights],
    texts: Tensor, how: Training,
) -> Weights:  # fmt: skip
    """The weights, a function of some parameters, that are trained towards the goal on the prompt of fact i.

    Loss: KL(goal ‖ edited model) + retain × (KL on other prompts + KL on general text).
    """
    parameters = [value.detach().clone().requires_grad_() for value in start]
    optimizer = torch.optim.Adam(parameters, lr=how.lr)
    generator, before, wanted = torch.Generator().manual_seed(i), task.before(task.prompts), goal(i)
    rest = torch.tensor([j for j in range(len(task.prompts)) if j != i])
    for _ in range(how.steps):
        weights = weights_of(*parameters)
        drawn = rest[torch.randperm(len(rest), generator=generator)[: how.n_prompts]]
        rows = torch.cat([torch.tensor([i]), drawn])
        after = task.run(task.prompts, weights, rows=rows)
        far = (torch.special.xlogy(wanted, wanted) - wanted * after[0]).sum()
        if far < how.close and wanted[after[0].argmax()] > 0:
            break
        side = kl(before[drawn], after[1:]).mean()
        if how.n_texts:
            some = torch.randint(len(texts), (how.n_texts,), generator=generator)
            with torch.no_grad():
                general = task.run(texts, {name: task.value(name) for name in weights}, rows=some, at=None)
            side = side + kl(general, task.run(texts, weights, rows=some, at=None)).mean()
        gradients = torch.autograd.grad(far + how.retain * side, parameters)
        for value, gradient in zip(parameters, gradients, strict=True):
            value.grad = gradient
        optimizer.step()
    return weights_of(*(value.detach() for value in parameters))


def of_rank_one(
    task: Task, name: str, place: int, how: Training, goal: Goal | None = None, prompts: float = 10.0
) -> Edits:
    """W + v kᵀ, as of Meng et al. 2022 ("Locating and editing factual associations in GPT"): one matrix, one key.

    k = C⁻¹ x / xᵀ C⁻¹ x of the fact's input x at one position, so that v is added there. C: second moments of general
    text, and so many times those of the other prompts. v is optimised, in units of the root mean square of W x.
    """
    general, x, W = task.once(name, lambda: second_moments(task, name)), watched(task, [name])[name].x, task.value(name)
    ridge = RIDGE * general.diagonal().mean() * torch.eye(len(general))
    each = torch.einsum("ntd,nte->de", x, x)

    def edit(i: int) -> Weights:
        others = (each - x[i].T @ x[i]) / (len(x) - 1) / x.shape[1]
        key = torch.linalg.solve(general + ridge + prompts * others, x[i, place])
        key = (W @ x[i, place]).square().mean().sqrt() * key / (key @ x[i, place])
        return trained(
            task, i, goal or forgotten(task), [torch.zeros(len(W))], lambda v: {name: W + torch.outer(v, key)},
            task.others, how,
        )  # fmt: skip

    return edit


def of_low_rank(task: Task, how: Training, n_texts: int, goal: Goal | None = None, seed: int = 0) -> Edits:
    """W + B A in each matrix, of a component's rank, trained to forget with a retain loss on so many texts."""
    generator, texts = torch.Generator().manual_seed(seed), task.others[:n_texts]
    old = {name: task.value(name) for name in task.weights}
    start = []
    for W in old.values():
        start += [torch.randn(task.rank, W.shape[1], generator=generator) / W.shape[1] ** 0.5]
        start += [torch.zeros(len(W), task.rank)]

    def weights_of(*factors: Tensor) -> Weights:
        pairs = zip(old.items(), factors[::2], factors[1::2], strict=True)
        return {name: W + B @ A for (name, W), A, B in pairs}

    return lambda i: trained(task, i, goal or forgotten(task), start, weights_of, texts, how)


# --- how soon a fact is back


def relearning(
    task: Task, weights: Weights, i: int, on: Literal["fact", "others"], steps: int = 20, lr: float = 1e-5
) -> Float[Tensor, " steps_and_one"]:
    """log p(answer) − log p(best other answer) of an edited model, before and after each step of fine-tuning.

    The fact is back where it is positive. All weights of the layers from the task's first matrix on are trained by
    Adam, on the fact itself, or on eight other facts and two general texts a step.
    """
    first, names = min(map(layer_of, task.weights)), [name for name, _ in task.model.named_parameters()]
    values = {name: weights.get(name, task.value(name)) for name in names if layer_of(name) >= first}
    tuned = {name: value.clone().requires_grad_() for name, value in values.items()}
    optimizer, generator = torch.optim.Adam(tuned.values(), lr=lr), torch.Generator().manual_seed(i)
    rest, margins = torch.tensor([j for j in range(len(task.prompts)) if j != i]), []
    for step in range(steps + 1):
        now = {**weights, **tuned}
        with torch.no_grad():
            p = task.run(task.prompts, now, rows=[i])[0]
            others = p.index_fill(0, task.answers[i], -torch.inf)
            margins.append(p[task.answers[i]] - others.max())
        if step == steps:
            break
        rows = torch.tensor([i]) if on == "fact" else rest[torch.randperm(len(rest), generator=generator)[:8]]
        loss = F.nll_loss(task.run(task.prompts, now, rows=rows), task.answers[rows])
        if on == "others":
            some = torch.randint(len(task.others), (2,), generator=generator)
            p = task.run(task.others, now, rows=some, at=None)[:, :-1]
            loss = loss + F.nll_loss(p.flatten(0, 1), task.others[some, 1:].flatten())
        for value, gradient in zip(tuned.values(), torch.autograd.grad(loss, list(tuned.values())), strict=True):
            value.grad = gradient
        optimizer.step()
    return torch.stack(margins)


def steps_until_back(margins: Float[Tensor, " steps_and_one"]) -> int:
    """The first step after which the fact is back; as many as there are entries where it never is."""
    back = (margins > 0).nonzero()
    return int(back[0]) if len(back) else len(margins)


# --- all of them


def all_edits(
    task: Task, start: apd.Decomposition, own_of_start: Sequence[int], trained: apd.Decomposition, own: Sequence[int]
) -> dict[str, Callable[[], Edits]]:
    """Every kind of edit that erases a fact. What is chosen was chosen on the facts with even numbers."""
    values, outputs = task.weights
    d = task.model.config.hidden_size
    n_neurons = round(sum(task.rank * sum(task.value(name).shape) for name in task.weights) / d)
    down = "model.layers.0.mlp.down_proj.weight"
    return {
        "components": lambda: of_components(trained, own),
        "fitted start alone": lambda: of_components(start, own_of_start),
        "random components": lambda: of_random_components(trained, own),
        "usage-matched components": lambda: of_other_components(task, trained, own),
        "singular directions": lambda: of_singular_directions(task),
        "rank one, W_V": lambda: of_rank_one(task, values, task.subject, RANK_ONE),
        "rank one, W_O": lambda: of_rank_one(task, outputs, -1, RANK_ONE),
        "rank one, MLP 0 (ROME's place)": lambda: of_rank_one(task, down, task.subject, RANK_ONE),
        "low rank, 10 texts": lambda: of_low_rank(task, LOW_RANK, 10),
        f"low rank, {len(task.others)} texts": lambda: of_low_rank(task, LOW_RANK, len(task.others)),
        f"{n_neurons} neurons": lambda: of_units(task, "neurons", n_neurons),
        "1 head": lambda: of_units(task, "heads", 1),
    }


def main(task: Task, steps: int, which: Sequence[int] | None, most: int) -> dict[str, Effects]:
    """Prints the tables: all edits on all facts and on those with odd numbers, relearning, rewiring."""
    batches, others = [{"input_ids": part} for part in task.prompts.split(20)], list(task.others[:256].split(4))

    def decomposed(steps: int) -> tuple[apd.Decomposition, list[int], float]:
        began = time.process_time()
        made = apd.decompose(
            task.model, batches, list(task.weights), n_components=len(task.prompts) + 8, others=others,
            **apd.language_model(steps),
        )  # fmt: skip
        seconds = (time.process_time() - began) / len(task.prompts)
        return made, apd.language.forgetting(made, {"input_ids": task.prompts}).own.tolist(), seconds

    (start, own_of_start, cost_of_start), (made, own, cost) = decomposed(0), decomposed(steps)
    before = {"components": cost, "fitted start alone": cost_of_start}
    edits, found = all_edits(task, start, own_of_start, made, own), {}
    for name, make in edits.items():
        found[name] = effects(task, make, which=which, most=most, before=before.get(name, 0.0))
        print(table({name: found[name]}), flush=True)
    odd = range(1, len(task.prompts), 2)
    print(f"\nAll facts\n{table(found)}\n\nFacts on which nothing was chosen\n{table(found, odd)}", flush=True)

    print("\nSteps of fine-tuning until a fact is back (medians), on general text and other facts; on the fact itself")
    facts = list(which or range(len(task.prompts)))
    facts = facts[:: max(1, len(facts) // 5)]
    for name in ("components", "rank one, W_O", "low rank, 10 texts"):
        made_edits = edits[name]()
        weights = [made_edits(i) for i in facts]
        steps_back = [
            torch.tensor([steps_until_back(relearning(task, of, i, on)) for i, of in zip(facts, weights, strict=True)])
            for on in ("others", "fact")
        ]
        print(f"{name}: {'; '.join(str(int(steps.median())) for steps in steps_back)}", flush=True)

    to = [(i + 1) % len(task.prompts) for i in range(len(task.prompts))]
    wanted = task.answers[to]
    rewired = {
        "components": lambda: rewired_components(task, made, own, to),
        "rank one, W_O": lambda: of_rank_one(task, task.weights[1], -1, REWIRED, answered(task, wanted)),
    }
    of_rewired = {name: effects(task, make, wanted=wanted, which=which, most=most) for name, make in rewired.items()}
    print(f"\nEach fact answered with the next one's answer\n{table(of_rewired)}", flush=True)
    return found


def capitals_task(stand_in: bool) -> Task:
    """The capitals that the model knows."""
    model, tokenizer = tasks.stand_in() if stand_in else tasks.smollm2()
    n_known, phrases = (12, []) if stand_in else (len(tasks.CAPITALS.answers), UNSEEN)
    countries = list(tasks.CAPITALS.answers)[:n_known]
    tokenizer.padding_side = "right"
    templates = [apd.language.Template(text) for text in (PHRASE, *phrases)]
    prompts, *unseen = (of.prompts(tokenizer, **dict.fromkeys(of.slots, countries)) for of in templates)
    n, length = (64, 8) if stand_in else (1032, 32)
    texts = apd.language.sample_texts(model, n=n, length=length, tokenizer=tokenizer)
    layer = "model.layers.0" if stand_in else "model.layers.23"
    return Task(
        model=model,
        prompts=prompts.input_ids,
        answers=apd.language.known(model, prompts.batch).token,
        subject=int(prompts.last_of("country")[0]),
        weights=tuple(f"{layer}.self_attn.{kind}_proj.weight" for kind in "vo"),
        others=texts[:-32],
        held_out=texts[-32:],
        unseen=[(of.input_ids, of.last) for of in unseen],
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=300, help="of the decomposition")
    parser.add_argument("--facts", type=int, nargs="*", help="the facts whose edits are tried; default all")
    parser.add_argument("--most", type=int, default=10, help="so many on held-out text and other phrasings")
    parser.add_argument("--stand-in", action="store_true")
    options = parser.parse_args()
    main(capitals_task(options.stand_in), options.steps, options.facts, options.most)
