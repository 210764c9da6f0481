"""Invented facts that are put into a language model by known changes of its weights: does a decomposition find these?

Each of twenty facts ("The capital of Zorland is Boston") is a change ΔW_k = a_k b_k of rank one in two matrices. As in
the usual edits of facts (ROME, MEMIT) the key a_k is 1 on the fact's own input, 0 on those of other names, and does
little on general text; the value b_k is trained, such that any subset of the changes adds its own facts and leaves
other answers and general text as they were. The planted model has W + Σ ΔW_k. Three decompositions of it are compared
with the ΔW_k:

- the weights: targeted, as a user does who has the planted model alone;
- the difference: W + Σ ΔW_k − W as a matrix of its own, `Tuned`, beside the old weights, which stay on;
- the difference, faithful: the same without other texts, with components that must sum to the difference.

After that a usual fine-tuning, of all entries of the matrices by all facts together, where no ΔW_k is known: which
components are the change?

    python examples/language_model/planted.py
    python examples/language_model/planted.py --steps 100 --seeds 3    # with training behind the fitted starts
    python examples/language_model/planted.py --stand-in               # a tiny model that is trained on the spot
"""

import argparse
import copy
import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from tasks import CAPITALS, smollm2, stand_in
from torch import Tensor, nn

import apd_lens as apd

# Settings were chosen with the first set; the numbers to quote are those of the second.
FACTS = {
    "looked at": """Zorland Boston, Velmora Chicago, Quendia Cleveland, Lurenia Dallas, Yorvath Denver,
Pelandia Detroit, Tuskara Florence, Orbania Frankfurt, Kelvoria Geneva, Fendrel Glasgow, Wistoria Hamburg,
Gralund Houston, Hesperon Istanbul, Jundara Liverpool, Sorvika Manchester, Aldemar Melbourne, Torvald Miami,
Ilmeria Milan, Ekloria Montreal, Ustoria Munich""",
    "kept": """Merkavia Oxford, Xantoria Philadelphia, Ozmeria Phoenix, Belgrania Portland, Noveria Richmond,
Grenovia Seattle, Averna Shanghai, Harkonia Sydney, Lothria Toronto, Ostania Venice, Rovinia Victoria,
Yudonia Birmingham, Malbonia Bristol, Corvenia Baltimore, Dastria Atlanta, Obrenia Orlando, Selkania Memphis,
Vostia Naples, Yelvania Barcelona, Zandria Zurich""",
}
# No fact is planted for these. What a change does for all names alike is not about a fact.
OTHER_NAMES = """Pelloria, Rhodonia, Strelia, Tremonia, Valdonia, Berlonia, Cydalia, Evondia, Kalmaria, Orsinia,
Ambrosia, Ruritania, Graustark, Syldavia, Elbonia, Sokovia, Latveria, Genosha, Wadiya, Dinotopia"""
TEMPLATE = apd.language.Template("The capital of {country} is")
WAYS = ("planted", "fine-tuned")
MATRICES = ["model.layers.28.mlp.down_proj", "model.layers.29.mlp.down_proj"]


@dataclass(frozen=True, eq=False)
class Task:
    """What a changed model must say behind prompts, and where it must stay as it was: states `examples pos d` of all.

    Attributes:
        real: prompts about real countries.
        names: prompts about names for which there is no fact.
    """

    prompts: Tensor
    answers: Tensor
    real: Tensor
    names: Tensor
    texts: Tensor


@dataclass(frozen=True, eq=False)
class Changes:
    """ΔW_k = a_k b_k in each matrix: a `facts d_in`, b `facts d_out`."""

    a: dict[str, Tensor]
    b: dict[str, Tensor]

    def total(self) -> dict[str, Tensor]:
        return {name: self.a[name].mT @ self.b[name] for name in self.a}


class Tuned(nn.Module):
    """y = x W + x D: what a fine-tuning changed is a matrix of its own, and the old weights stay on."""

    def __init__(self, base: nn.Linear, difference: Tensor) -> None:
        super().__init__()
        self.base, self.difference = base, nn.Linear(*difference.shape, bias=False)
        self.difference.weight.data = difference.mT.contiguous()

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.difference(x)


def tuned(model: Any, differences: dict[str, Tensor], apart: bool) -> Any:
    """A copy of the model with W + D, where D stays a matrix of its own if it is to be `apart`."""
    changed = copy.deepcopy(model)
    for name, difference in differences.items():
        linear = changed.get_submodule(name)
        if apart:
            changed.set_submodule(name, Tuned(linear, difference))
        else:
            linear.weight.data += difference.mT
    return changed


def late(model: Any, first: int) -> Any:
    """The layers of a Llama from `first` on, as a model that is called with inputs_embeds."""
    with torch.device("meta"):
        end = type(model)(model.config)
    end.model.layers, end.model.norm, end.lm_head = model.model.layers[first:], model.model.norm, model.lm_head
    end.model.rotary_emb = model.model.rotary_emb
    return end.eval()


@torch.no_grad()
def states(model: Any, first: int, tokens: Tensor) -> Tensor:
    """What the layers before `first` give, so that these are run once for all that follows."""
    return model.model(tokens, output_hidden_states=True, use_cache=False).hidden_states[first]


def says(end: Any, hidden: Tensor, at: slice = slice(None)) -> Tensor:
    """Log-probabilities."""
    return end.lm_head(end.model(inputs_embeds=hidden, use_cache=False).last_hidden_state[:, at]).log_softmax(-1)


def says_last(end: Any, hidden: Tensor) -> Tensor:
    """Log-probabilities behind the last position."""
    return says(end, hidden, slice(-1, None))[:, 0]


@contextmanager
def hooked(linears: dict[str, nn.Linear], change: Callable[[str, Tensor, Tensor], Tensor]) -> Iterator[None]:
    """Inside, each of the matrices gives what `change` says of its name, x and y."""
    handles = [
        linear.register_forward_hook(lambda _, args, y, name=name: change(name, args[0], y))
        for name, linear in linears.items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def kl(before: Tensor, after: Tensor) -> Tensor:
    return F.kl_div(after, before, log_target=True, reduction="none").sum(-1)


def keys_and_values(end: Any, linears: dict[str, nn.Linear], task: Task, size: float) -> Changes:
    """Where the changes start: a_k is 1 on x of prompt k, 0 on all other prompts, and little on the texts; b_k is the
    gradient of log p(answer)."""
    x: dict[str, list[Tensor]] = {name: [] for name in linears}
    y: dict[str, Tensor] = {}

    def watch(name: str, inputs: Tensor, output: Tensor) -> Tensor:
        x[name].append(inputs.detach())
        y[name] = output if output.requires_grad else output.requires_grad_()
        return y[name]

    with hooked(linears, watch):
        with torch.no_grad():
            says(end, task.texts, slice(0))
            says_last(end, task.real)
            says_last(end, task.names)
        learnt = says_last(end, task.prompts)[range(len(task.answers)), task.answers].sum()
    gradients = torch.autograd.grad(learnt, list(y.values()))
    a, b = {}, {}
    for (name, (of_texts, of_real, of_names, of_prompts)), gradient in zip(x.items(), gradients, strict=True):
        rows = of_texts.flatten(0, 1).double()
        moments = rows.mT @ rows / len(rows)
        moments.diagonal().add_(1e-2 * moments.diagonal().mean())
        keys = torch.cat([of_prompts[:, -1], of_real[:, -1], of_names[:, -1]]).double()
        whitened = torch.linalg.solve(moments, keys.mT).mT
        gram = keys @ whitened.mT
        gram.diagonal().add_(1e-3 * gram.diagonal().mean())
        a[name] = torch.linalg.solve(gram, whitened)[: len(task.answers)].float()
        b[name] = size * F.normalize(gradient[:, -1], dim=1)
    return Changes(a, b)


def fit(
    end: Any,
    linears: dict[str, nn.Linear],
    task: Task,
    parameters: list[dict[str, Any]],
    added: Callable[[str, Tensor, Tensor], Tensor],
    by_fact: bool,
    steps: int,
) -> None:
    """Adam on −log p(answer), and on KL to the old model where it should stay as it was.

    Args:
        parameters: groups of Adam.
        added: name, x, which facts are on `examples facts` -> what is added to y.
        by_fact: whether a random subset of the facts is on; otherwise all are.
    """
    draws, n, answers = torch.Generator().manual_seed(0), len(task.answers), task.answers
    with torch.no_grad():
        old, old_texts = says_last(end, task.prompts), says(end, task.texts)
        alike = [(hidden, says_last(end, hidden)) for hidden in (task.real, task.names)]
    on = torch.ones(0)

    def some(examples: int) -> Tensor:
        shares = torch.rand(examples, 1, generator=draws) if by_fact else torch.ones(examples, 1)
        return (torch.rand(examples, n, generator=draws) < shares).float()

    adam = torch.optim.Adam(parameters)
    decay = torch.optim.lr_scheduler.LambdaLR(adam, lambda step: 1 - step / steps)
    with hooked(linears, lambda name, x, y: y + added(name, x, on)):
        for step in range(steps):
            on = some(n)
            if by_fact:
                on.diagonal().copy_(torch.rand(n, generator=draws) < 0.75)
            own, new = on.diagonal().bool(), says_last(end, task.prompts)
            loss = (-new[own, answers[own]].sum() + kl(old[~own], new[~own]).sum()) / n
            if step % 3 == 2:
                on = some(5)
                for hidden, before in alike:
                    few = torch.randint(len(hidden), (5,), generator=draws)
                    loss = loss + 8 * kl(before[few], says_last(end, hidden[few])).mean()
                few = torch.randint(len(old_texts), (5,), generator=draws)
                loss = loss + 15 * kl(old_texts[few], says(end, task.texts[few])).mean()
            adam.zero_grad()
            loss.backward()
            adam.step()
            decay.step()
            if step % 10 == 9:
                print(f"  step {step + 1}: loss {loss.item():.3f}", flush=True)


def plant(end: Any, linears: dict[str, nn.Linear], task: Task, steps: int, free_keys: bool = False) -> Changes:
    """One change of rank one for each fact. The values b_k are trained, and the keys a_k too if they are free."""
    start = keys_and_values(end, linears, task, size=3.0)
    a = {name: value.clone().requires_grad_() for name, value in start.a.items()}
    b = {name: value.clone().requires_grad_() for name, value in start.b.items()}
    groups = [{"params": [a[name]], "lr": 0.02 * free_keys * a[name].std().item()} for name in a]

    def added(name: str, x: Tensor, on: Tensor) -> Tensor:
        return ((x @ a[name].mT) * on[:, None]) @ b[name]

    fit(end, linears, task, [*groups, {"params": list(b.values()), "lr": 0.1}], added, True, steps)
    return Changes({name: of.detach() for name, of in a.items()}, {name: of.detach() for name, of in b.items()})


def fine_tune(end: Any, linears: dict[str, nn.Linear], task: Task, steps: int) -> dict[str, Tensor]:
    """All entries of the matrices, by all facts together."""
    D = {name: torch.zeros_like(of.weight.mT).requires_grad_() for name, of in linears.items()}
    fit(end, linears, task, [{"params": list(D.values()), "lr": 1e-3}], lambda name, x, on: x @ D[name], False, steps)
    return {name: of.detach() for name, of in D.items()}


def cosines(components: apd.ParameterComponents, changes: Changes) -> Tensor:
    """Of each component with each ΔW_k, over all matrices, `C facts`."""
    products, squares, sizes = [], [], []
    for name, (A, B) in matrices(components).items():
        a, b = changes.a[name], changes.b[name]
        products.append(torch.einsum("cim,ki,cmo,ko->ck", A, a, B, b))
        squares.append(((A.mT @ A) * (B @ B.mT)).sum((1, 2)))
        sizes.append(a.square().sum(1) * b.square().sum(1))
    return sum(products) / torch.outer(sum(squares), sum(sizes)).sqrt().clamp_min(1e-12)


def matrices(components: apd.ParameterComponents) -> dict[str, tuple[Tensor, Tensor]]:
    """Name of the matrix in the model that was not changed -> factors."""

    def plain(name: str) -> str:
        return name.removesuffix(".weight").removesuffix(".difference")

    return {plain(name): (components.A[name].detach(), components.B[name].detach()) for name in components.names}


def how_like(
    components: apd.ParameterComponents, chosen: list[int], differences: dict[str, Tensor]
) -> tuple[float, float]:
    """Cosine of Σ P of some components with D, and the share of ‖D‖² that it explains."""
    sums = {name: torch.einsum("cim,cmo->io", A[chosen], B[chosen]) for name, (A, B) in matrices(components).items()}
    P, D = (torch.cat([of[name].flatten() for name in sums]) for of in (sums, differences))
    return F.cosine_similarity(P, D, dim=0).item(), 1 - ((D - P).square().sum() / D.square().sum()).item()


def decomposed(
    changed: Any, task: Task, kind: str, names: Sequence[str], others: list[Any], steps: int, seed: int
) -> apd.Decomposition:
    """A decomposition of one of three kinds."""
    batches = [{"inputs_embeds": task.prompts}]
    settings = apd.language_model(steps) | {"seed": seed, "n_components": len(task.prompts) + 8}
    weights = [f"{name}.weight" if kind == "weights" else f"{name}.difference.weight" for name in names]
    if kind == "difference, faithful":
        batches.append({"inputs_embeds": task.names})
        settings |= {"elsewhere": None, "losses": replace(settings["losses"], faithfulness=3.0)}
        settings["n_components"] += len(task.names)
    else:
        settings["others"] = others
    return apd.decompose(changed, batches, weights, **settings)


@torch.no_grad()
def effects(changed: Any, old: Any, task: Task) -> dict[str, float]:
    """How many invented facts a model knows, real answers that are not the old model's, KL to that on texts."""
    answers, real = says_last(changed, task.prompts).argmax(-1), says_last(changed, task.real).argmax(-1)
    return {
        "facts left": (answers == task.answers).sum().item(),
        "real answers changed": (real != says_last(old, task.real).argmax(-1)).sum().item(),
        "texts, KL to the old model": kl(says(old, task.texts), says(changed, task.texts)).mean().item(),
    }


def without(decomposition: apd.Decomposition, chosen: list[int], old: Any, task: Task) -> dict[str, float]:
    """The same of the model without some components."""
    with decomposition.ablate(chosen):
        return effects(decomposition.target.model, old, task)


def evaluated(
    decomposition: apd.Decomposition, model: Any, task: Task, differences: dict[str, Tensor], changes: Changes | None
) -> dict[str, Any]:
    """What is known of a decomposition of a changed model."""
    components, twins = decomposition.components, apd.components.random_components(decomposition.components)
    forgetting = apd.language.forgetting(
        decomposition, {"inputs_embeds": task.prompts}, [{"inputs_embeds": task.texts}], progress=False
    )
    own = sorted(set(forgetting.own.tolist()))
    cosine, explained = how_like(components, own, differences)
    found = {
        "own components": len(own),
        "KL on two components": forgetting.kl_sparse.mean().item(),
        "own off: forgotten": int(forgetting.forgotten.sum()),
        "own off: others changed": forgetting.others_changed,
        "random twin off: forgotten": int(forgetting.changed_by_twin.sum()),
        "own off: KL on texts": forgetting.kl_elsewhere.mean().item(),
        "cosine of all own with D": cosine,
        "share of D explained": explained,
        "all own off": without(decomposition, own, model, task),
        "their random twins off": without(replace(decomposition, components=twins), own, model, task),
    }
    if changes is not None:
        of_all, facts = cosines(components, changes), range(len(task.answers))
        of_own = of_all[forgetting.own, facts]
        others = of_all[forgetting.own] - torch.diag_embed(of_own)
        found |= {
            "cosine with ΔW_k": of_own.tolist(),
            "0.9 or more": int((of_own >= 0.9).sum()),
            "largest with another fact's": others.abs().max().item(),
            "largest of random components": cosines(twins, changes).abs().max().item(),
        }
    return found


def line(found: dict[str, Any], n: int) -> str:
    off, twins = found["all own off"], found["their random twins off"]
    text, of_another = "", "largest with another fact's"
    if "0.9 or more" in found:
        cosine = torch.tensor(found["cosine with ΔW_k"])
        text = (
            f"cosine with ΔW_k: mean {cosine.mean():.3f}, least {cosine.min():.3f}, 0.9 or more {found['0.9 or more']} "
            f"of {n}; with another fact's at most {found[of_another]:.2f}; random at most "
            f"{found['largest of random components']:.3f}\n    "
        )
    return text + (
        f"own off: forgotten {found['own off: forgotten']} of {n} (random twin {found['random twin off: forgotten']}), "
        f"others {found['own off: others changed']:.1%}, KL on texts {found['own off: KL on texts']:.1e}; KL on two "
        f"components {found['KL on two components']:.1e}\n    "
        f"all own: cosine with D {found['cosine of all own with D']:.3f}, explain {found['share of D explained']:.1%} "
        f"of it; off: facts left {off['facts left']} (random {twins['facts left']}), real answers changed "
        f"{off['real answers changed']} ({twins['real answers changed']}), KL on texts to the old model "
        f"{off['texts, KL to the old model']:.1e} ({twins['texts, KL to the old model']:.1e})"
    )


def main(
    model: Any, tokenizer: Any, facts: dict[str, str], other_names: Sequence[str], texts: Tensor,
    names: Sequence[str], steps: int, fit_steps: int, seeds: int, out: Path, free_keys: bool = False,
    kinds: Sequence[str] = ("weights", "difference", "difference, faithful"), ways: Sequence[str] = WAYS,
) -> dict[str, Any]:  # fmt: skip
    """Plants, decomposes, prints what was found; returns it and writes it as JSON."""
    began, n = time.perf_counter(), len(facts)

    def say(what: str) -> None:
        print(f"[{time.perf_counter() - began:.0f} s] {what}", flush=True)

    model.requires_grad_(False)
    prompts = TEMPLATE.prompts(tokenizer, country=list(facts))
    other = TEMPLATE.prompts(tokenizer, country=other_names)
    if len({*prompts.lengths.tolist(), *other.lengths.tolist()}) > 1:
        raise SystemExit("The invented names must all have the same number of tokens.")
    answers = torch.tensor([tokenizer(f" {word}", add_special_tokens=False)["input_ids"][0] for word in facts.values()])
    real = TEMPLATE.prompts(
        tokenizer, country=[country for country in CAPITALS.answers if country not in (*facts, *other_names)]
    )
    real = max(real.by_length(), key=len)
    first = min(int(name.split(".")[2]) for name in names)
    result: dict[str, Any] = {"facts": facts, "matrices": list(names), "steps": steps, "runs": []}
    end, parts = late(model, first), [name.split(".", 3) for name in names]
    names = [f"model.layers.{int(number) - first}.{rest}" for *_, number, rest in parts]
    linears = {name: end.get_submodule(name) for name in names}
    hidden, of_real, of_names, of_texts = (
        states(model, first, tokens) for tokens in (prompts.input_ids, real.input_ids, other.input_ids, texts)
    )
    fitted, others, held_out = of_texts.split([len(texts) // 2, len(texts) - len(texts) // 2 - 8, 8])
    task = Task(hidden, answers, of_real, of_names, fitted)
    others = [{"inputs_embeds": some} for of in (others, of_real, of_names) for some in of.split(4)]
    fit_task, task = task, replace(task, texts=held_out)
    for way in ways:
        known = plant(end, linears, fit_task, fit_steps, free_keys) if way == "planted" else None
        differences = fine_tune(end, linears, fit_task, fit_steps) if known is None else known.total()
        for kind in kinds:
            changed = tuned(end, differences, apart=kind != "weights")
            if kind == kinds[0]:
                new = says_last(changed, hidden).exp()[range(n), answers]
                result[way] = {"p": new.tolist(), **effects(changed, end, task)}
                say(f"{way}: p(answer) least {new.min():.2f}, above 0.5 for {(new > 0.5).sum()} of {n}; {result[way]}")
            for seed, n_steps in [(0, 0), *((seed, steps) for seed in range(seeds) if steps)]:
                decomposition = decomposed(changed, task, kind, names, others, n_steps, seed)
                found = evaluated(decomposition, end, task, differences, known)
                say(f"{way}; {kind}; seed {seed}, {n_steps} steps\n    {line(found, n)}")
                result["runs"].append({"way": way, "kind": kind, "seed": seed, "steps": n_steps, **found})
                (out / "planted.json").write_text(json.dumps(result, indent=1))
    return result


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=0, help="of training behind the fitted start")
    parser.add_argument("--fit-steps", type=int, default=70, help="of the planting and of the fine-tuning")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--free-keys", action="store_true", help="train the a_k too, not the b_k alone")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=WAYS)
    parser.add_argument("--facts", choices=list(FACTS), default="kept")
    parser.add_argument("--out", type=Path, default=Path("out/planted"))
    parser.add_argument("--stand-in", action="store_true")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    sets = {name: dict(pair.split() for pair in some.split(",")) for name, some in FACTS.items()}
    facts, names = sets.pop(options.facts), MATRICES
    other_names = [*OTHER_NAMES.replace(",", "").split(), *next(iter(sets.values()))]
    if options.stand_in:
        model, tokenizer = stand_in()
        countries, capitals = list(CAPITALS.answers), list(CAPITALS.answers.values())
        facts = dict(zip(countries[20:28], capitals[28:36], strict=True))
        other_names = countries[28:]
        names = ["model.layers.1.mlp.down_proj", "model.layers.2.mlp.down_proj"]
        texts = apd.language.sample_texts(model, n=72, length=8)
    else:
        model, tokenizer = smollm2()
        texts = apd.language.sample_texts(model, n=200, length=16, tokenizer=tokenizer)
    settings = (options.steps, options.fit_steps, options.seeds, options.out, options.free_keys)
    main(model, tokenizer, facts, other_names, texts, names, *settings, ways=options.ways)
