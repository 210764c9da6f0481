"""Which change of a model's weights erases one fact with the fewest side effects?

Components of a decomposition that run.py left, and beside them what a sceptic asks for: random components, those of
other facts, singular directions, rank-one edits, low-rank unlearning, heads and neurons. Each is a function that makes
`Edits`: the number of a fact -> what some weights of the model become. `effects` measures all of them in the same way.
The numbers are kept in results/baselines-TASK.json; what is there already is skipped.

    python examples/language_model/baselines.py                      # the capitals: an hour on two cores
    python examples/language_model/baselines.py --run opposites-0
    python examples/language_model/baselines.py --stand-in           # a tiny model, for a look at the code
"""

import argparse
import copy
import json
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
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

N_TEXTS = 4  # of the held-out ones, on which each edit is tried
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
        neighbours: other questions about the same words, likewise.
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
    neighbours: Sequence[tuple[Int[Tensor, "n _"], Int[Tensor, " n"]]] = ()
    rank: int = 6
    _kept: dict[Any, Any] = field(default_factory=dict, repr=False)

    def run(
        self, tokens: Tensor, weights: Weights | None = None, *, rows: Any = slice(None), at: Tensor | int | None = -1
    ) -> Float[Tensor, "rows *pos vocabulary"]:
        """Log-probabilities of the next token behind some rows of tokens, with other weights in the model.

        What comes before the first matrix of the task is run once for the same tokens.

        Args:
            at: a position, or one for each row; None for all positions.
        """
        home = min(map(layer_of, self.weights))
        first = home if home <= min(map(layer_of, weights or self.weights)) else 0
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
    """What edits do, each of which should erase, or rewire, a fact of its own.

    KL is KL(model ‖ edited model) of the next token, in nats. An answer is the most likely next token.

    Attributes:
        success: whether the fact's answer changes; or becomes the one that was wanted, where one was.
        lost: nats of log p that the fact's answer loses.
        changed: whether edit i changes the answer to prompt j, `edit prompt`.
        kl: there.
        far: KL at each position of some held-out texts, which are others for each fact.
        unseen: success in other phrasings, and whether the answer about another fact changes, `edit phrasing 2`.
        kl_unseen: there.
        known: whether the model answers these rightly.
        neighbours: whether the answer to other questions about the same word changes.
        rank: of the change, summed over matrices.
        parameters: numbers that say the change: rank × (d_in + d_out), or the changed entries where they are fewer.
        seconds: for each edit, that of what is made once shared among them; CPU time of the process.
        measured: the numbers of the edits.
    """

    success: Bool[Tensor, " edits"]
    lost: Float[Tensor, " edits"]
    changed: Bool[Tensor, "edits n"]
    kl: Float[Tensor, "edits n"]
    far: Float[Tensor, "edits positions"]
    unseen: Bool[Tensor, "edits phrasings 2"]
    kl_unseen: Float[Tensor, "edits phrasings 2"]
    known: Bool[Tensor, "edits phrasings 2"]
    neighbours: Bool[Tensor, "edits neighbours"]
    rank: Float[Tensor, " edits"]
    parameters: Float[Tensor, " edits"]
    seconds: float
    measured: list[int]

    def numbers(self, which: Sequence[int] | None = None) -> dict[str, float]:
        """Means over all edits, or over those of some facts."""
        rows = [row for row, i in enumerate(self.measured) if which is None or i in which]
        own = F.one_hot(torch.tensor(self.measured), self.changed.shape[1]).bool()[rows]
        mine, strangers = self.known[rows].unbind(-1)
        changed, kl = self.unseen[rows], self.kl_unseen[rows]
        means = {
            "facts": torch.tensor(len(rows)),
            "success": self.success[rows],
            "nats lost": self.lost[rows],
            "others changed": self.changed[rows][~own],
            "KL there": self.kl[rows][~own],
            "texts: KL": self.far[rows],
            "99th": self.far[rows].flatten().quantile(0.99) if rows else self.far[rows],
            "unseen: success": changed[..., 0][mine],
            "strangers changed": changed[..., 1][strangers],
            "KL of strangers": kl[..., 1][strangers],
            "neighbours changed": self.neighbours[rows],
            "rank": self.rank[rows],
            "parameters": self.parameters[rows],
        }
        return {name: values.float().mean().item() for name, values in means.items()} | {"s": self.seconds}


@torch.no_grad()
def effects(
    task: Task,
    make: Callable[[], Edits],
    *,
    wanted: Int[Tensor, " n"] | None = None,
    which: Sequence[int] | None = None,
    before: float = 0.0,
) -> Effects:
    """What edits do to their own facts, to the others, to other phrasings and to held-out text.

    Args:
        make: makes the edits; its time counts.
        wanted: the answers that the edits should bring; default any other one.
        which: the facts whose edits are tried; default all.
        before: seconds that each edit has cost already.
    """
    measured, n = list(range(len(task.prompts)) if which is None else which), len(task.prompts)
    began = time.process_time()
    edits = make()
    seconds, rows = time.process_time() - began, []
    p = task.before(task.prompts)
    for i in measured:
        began = time.process_time()
        with torch.enable_grad():
            weights = {name: value.detach() for name, value in edits(i).items()}
        seconds += time.process_time() - began
        q = task.run(task.prompts, weights)
        answer, texts = q[i].argmax(), torch.arange(N_TEXTS * i, N_TEXTS * (i + 1)) % len(task.held_out)
        original = task.once(("text", i), lambda texts=texts: task.run(task.held_out, rows=texts, at=None))
        pair = torch.tensor([i, (i + 7) % n])
        unseen = [torch.zeros(3, 0, 2)]
        for tokens, last in task.unseen:
            was, now = task.before(tokens, last)[pair], task.run(tokens, weights, rows=pair, at=last[pair])
            answers, new = was.argmax(-1), now.argmax(-1)
            differs = answers != new
            if wanted is not None:
                differs[0] = new[0] == wanted[i]
            unseen.append(torch.stack([differs, kl(was, now), answers == task.answers[pair]])[:, None])
        changed, divergence, known = torch.cat(unseen, 1)
        near = [
            task.before(tokens, last)[i].argmax() != task.run(tokens, weights, rows=[i], at=last[[i]])[0].argmax()
            for tokens, last in task.neighbours
        ]
        rows.append(
            (
                answer != task.answers[i] if wanted is None else answer == wanted[i],
                (p - q)[i, task.answers[i]],
                q.argmax(-1) != task.answers,
                kl(p, q),
                kl(original, task.run(task.held_out, weights, rows=texts, at=None)).flatten(),
                changed.bool(),
                divergence,
                known.bool(),
                torch.tensor(near).bool(),
                *_sizes([value - task.value(name) for name, value in weights.items()]),
            )
        )
    return Effects(*map(torch.stack, zip(*rows, strict=True)), before + seconds / len(measured), measured)


def kl(p: Float[Tensor, "*rows vocabulary"], q: Float[Tensor, "*rows vocabulary"]) -> Float[Tensor, "*rows"]:
    """KL(p ‖ q) of log-probabilities, in nats."""
    return (p.exp() * (p - q)).sum(-1)


def _sizes(changes: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Rank and number of parameters of a change; singular values below a thousandth of the largest are rounding."""
    ranks, parameters = 0, 0
    for change in changes:
        values = torch.linalg.svdvals(change[:, (change != 0).any(0)])
        rank = int((values > 1e-3 * values[:1]).sum())
        ranks += rank
        parameters += min(rank * sum(change.shape), int((change != 0).sum()))
    return torch.tensor(float(ranks)), torch.tensor(float(parameters))


def table(found: Mapping[str, Mapping[str, float]]) -> str:
    """A Markdown table with a row for each kind of edit."""
    shown = dict.fromkeys(("others changed", "strangers changed"), "{:.2%}")
    shown |= dict.fromkeys(("success", "unseen: success", "neighbours changed"), "{:.0%}")
    shown |= dict.fromkeys(("nats lost", "s"), "{:.1f}") | dict.fromkeys(("facts", "rank", "parameters"), "{:.0f}")
    columns = list(max(found.values(), key=len, default=()))
    lines = [["", *columns], ["---"] * (len(columns) + 1)]
    lines += [
        [name, *(shown.get(c, "{:.1e}").format(row[c]) if c in row else "" for c in columns)]
        for name, row in found.items()
    ]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


# --- components


def of_components(decomposition: apd.Decomposition, own: Sequence[int], names: Sequence[str] | None = None) -> Edits:
    """W − P of each fact's own component, in some matrices or in all."""

    def edit(i: int) -> Weights:
        edited = decomposition.edited_state_dict(int(own[i]))
        return {name: edited[name] for name in names or decomposition.components.names}

    return edit


def of_random_components(decomposition: apd.Decomposition, own: Sequence[int], seed: int = 0) -> Edits:
    """The same of random components with the same singular values."""
    return of_components(
        replace(decomposition, components=apd.components.random_components(decomposition.components, seed)), own
    )


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
    task: Task, names: Sequence[str], place: int, how: Training, goal: Goal | None = None, prompts: float = 10.0
) -> Edits:
    """W + v kᵀ, as of Meng et al. 2022 ("Locating and editing factual associations in GPT"), in one matrix or several.

    k = C⁻¹ x / xᵀ C⁻¹ x of the fact's input x at one position, so that v is added there. C: second moments of general
    text, and so many times those of the other prompts. v is optimised, in units of the root mean square of W x.
    """
    old, seen = {name: task.value(name) for name in names}, watched(task, names)

    def key(name: str, i: int) -> Tensor:
        general, x = task.once(name, lambda: second_moments(task, name)), seen[name].x
        ridge = RIDGE * general.diagonal().mean() * torch.eye(len(general))
        others = (torch.einsum("ntd,nte->de", x, x) - x[i].T @ x[i]) / (len(x) - 1) / x.shape[1]
        k = torch.linalg.solve(general + ridge + prompts * others, x[i, place])
        return (old[name] @ x[i, place]).square().mean().sqrt() * k / (k @ x[i, place])

    def edit(i: int) -> Weights:
        keys = {name: key(name, i) for name in names}

        def weights_of(*values: Tensor) -> Weights:
            return {name: old[name] + torch.outer(v, keys[name]) for name, v in zip(names, values, strict=True)}

        start = [torch.zeros(len(W)) for W in old.values()]
        return trained(task, i, goal or forgotten(task), start, weights_of, task.others, how)

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
    """Every kind of edit that erases a fact. What is chosen was chosen on the capitals with even numbers."""
    values, outputs = ([name for name in task.weights if f".{kind}_proj." in name] for kind in "vo")
    layers, d = len(outputs), task.model.config.hidden_size
    n_neurons = round(sum(task.rank * sum(task.value(name).shape) for name in task.weights) / d)
    down = "model.layers.0.mlp.down_proj.weight"
    return {
        "components": lambda: of_components(trained, own),
        "components, W_V alone": lambda: of_components(trained, own, values),
        "components, W_O alone": lambda: of_components(trained, own, outputs),
        "fitted start alone": lambda: of_components(start, own_of_start),
        "random components": lambda: of_random_components(trained, own),
        "usage-matched components": lambda: of_other_components(task, trained, own),
        "singular directions": lambda: of_singular_directions(task),
        "rank one, W_V": lambda: of_rank_one(task, values, task.subject, RANK_ONE),
        "rank one, W_O": lambda: of_rank_one(task, outputs, -1, RANK_ONE),
        f"{n_neurons} neurons": lambda: of_units(task, "neurons", n_neurons),
        f"{layers} head{'s'[: layers > 1]}": lambda: of_units(task, "heads", layers),
        "low rank, 10 texts": lambda: of_low_rank(task, LOW_RANK, 10),
        f"low rank, {len(task.others)} texts": lambda: of_low_rank(task, LOW_RANK, len(task.others)),
        "rank one, MLP 0 (ROME's place)": lambda: of_rank_one(task, [down], task.subject, RANK_ONE),
    }


def main(task: Task, name: str, out: Path, results: Path, which: Sequence[int] | None, kinds: str) -> None:
    """Erases each fact by some kinds of edits, rewires it, learns it again; keeps the numbers and prints them."""
    file, cost = results / f"baselines-{name.rpartition('-')[0]}.json", {}
    found = json.loads(file.read_text()) if file.exists() else {"all": {}, "odd": {}, "rewired": {}, "back": {}}

    def keep(table: str, kind: str, numbers: Any) -> None:
        found[table][kind] = numbers
        file.write_text(json.dumps(found, indent=1))
        print(table, kind, json.dumps(numbers), flush=True)

    def loaded(stage: str, kind: str) -> tuple[apd.Decomposition, list[int]]:
        run = json.loads((results / f"{name}.json").read_text())
        cost[kind] = run[stage]["seconds"] / len(run["words"])
        decomposition = apd.load(out / f"{name}-{stage}", task.model)
        return decomposition, apd.language.forgetting(decomposition, {"input_ids": task.prompts}).own.tolist()

    (start, own_of_start), (made, own) = loaded("start", "fitted start alone"), loaded("trained", "components")
    edits, odd = all_edits(task, start, own_of_start, made, own), range(1, len(task.prompts), 2)
    to = [(i + 1) % len(task.prompts) for i in range(len(task.prompts))]
    wanted, outputs = task.answers[to], [name for name in task.weights if ".o_proj." in name]
    rewired = {
        "components": lambda: rewired_components(task, made, own, to),
        "rank one, W_O": lambda: of_rank_one(task, outputs, -1, REWIRED, answered(task, wanted)),
    }
    facts = list(which or range(len(task.prompts)))
    for kind, make in edits.items():
        if not re.search(kinds, kind):
            continue
        if kind not in found["all"]:
            done = effects(task, make, which=which, before=cost.get(kind, 0.0))
            keep("odd", kind, done.numbers(odd))
            keep("all", kind, done.numbers())
        if kind in ("components", "rank one, W_O", "low rank, 10 texts") and kind not in found["back"]:
            of, some = make(), facts[:: max(1, len(facts) // 5)]
            edited = {i: of(i) for i in some}
            margins = {on: [relearning(task, edited[i], i, on) for i in some] for on in ("others", "fact")}
            keep("back", kind, {on: list(map(steps_until_back, each)) for on, each in margins.items()})
        if kind in rewired and kind not in found["rewired"]:
            keep("rewired", kind, effects(task, rewired[kind], wanted=wanted, which=which).numbers())
    print(markdown(found))


def markdown(found: Mapping[str, Any]) -> str:
    """What `main` keeps."""
    back = "\n".join(
        f"| {kind} | {' | '.join(str(sorted(on)[len(on) // 2]) for on in steps.values())} |"
        for kind, steps in found["back"].items()
    )
    return f"""All facts

{table(found["all"])}

Every second fact. No setting was chosen on these capitals.

{table(found["odd"])}

Each fact answered with the next one's answer

{table(found["rewired"])}

Steps of fine-tuning until a fact is back (median; 21: not in 20)

| | on general text and other facts | on the fact itself |
| --- | --- | --- |
{back}"""


def task_of(known: tasks.Known, model: Any, tokenizer: Any, weights: Sequence[str]) -> Task:
    """Those of the prompts that the model answers that have the commonest length."""
    tokenizer.padding_side, lengths = "right", known.prompts.lengths
    which = (lengths == lengths.mode().values).nonzero()[:, 0].tolist()
    words = [known.words[i] for i in which]

    def asked(templates: Sequence[str]) -> list[tuple[Tensor, Tensor]]:
        made = [tasks.prompts_of(text, tokenizer, words) for text in templates]
        return [(of.input_ids, of.last) for of in made]

    prompts = known.prompts.some(which)
    return Task(
        model=model,
        prompts=prompts.input_ids,
        answers=known.answers[which],
        subject=int(prompts.last_of("first")[0]),
        weights=weights,
        others=torch.cat(known.others),
        held_out=torch.cat(known.held_out),
        unseen=asked(known.task.unseen),
        neighbours=asked(known.task.neighbours),
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", default="capitals-0", help="the run whose components are tried")
    parser.add_argument("--facts", type=int, nargs="*", help="the facts whose edits are tried; default all")
    parser.add_argument("--kinds", default="", help="a regular expression that finds the kinds of edits; default all")
    options = tasks.parsed(parser)
    opened = tasks.opened(options)
    name = "stand-in-0" if options.stand_in else options.run
    of_run = opened.results / f"{name}.json"
    if not of_run.exists():
        raise SystemExit(f"There is no {of_run}. Make it first: python examples/language_model/run.py --runs {name}")
    asked = getattr(tasks, name.partition("-")[0].upper()) if not options.stand_in else tasks.STAND_IN
    known = tasks.known(asked, opened.model, opened.tokenizer, opened.texts)
    weights = json.loads(of_run.read_text())["weights"]
    task = task_of(known, opened.model, opened.tokenizer, weights)
    main(task, name, opened.out, opened.results, options.facts, options.kinds)
