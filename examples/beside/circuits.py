"""The circuit of the capitals in SmolLM2-135M-Instruct beside components: do both point at the same heads?

Two tools of circuits run on pairs of countries. `transformer_lens.patching` patches each head and each MLP of a
TransformerBridge. Edge attribution with integrated gradients (EAP-IG, inputs) scores every edge between the embedding,
heads, MLPs and the logits; it is written down here, as the tool is not in the package index, and its scores go through
a file in its own format. Then: do the two agree, do the components lie in the circuit's heads by weight and by effect,
and how much of the answer do the first few heads, or components, give back?

    python examples/beside/circuits.py               # a quarter of an hour on one core
    python examples/beside/circuits.py --stand-in    # a tiny model, for a look at the code
"""

import copy
import json
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import setting
import torch
from matplotlib import pyplot as plt
from setting import Setting
from torch import Tensor
from transformer_lens import patching
from transformer_lens.model_bridge.sources._bridge_builder import build_bridge_from_module
from transformers import LlamaForCausalLM

import apd_lens as apd
from apd_lens import compare, plots

STEPS, TOP = 5, 8


def pairs(of: Setting, aside: bool, n: int | None = None) -> tuple[Tensor, Tensor, setting.Metric]:
    """Clean and corrupted prompts, and the metric; of the countries kept aside, or of n of the others."""
    here = (of.aside if aside else ~of.aside).nonzero()[:n, 0]
    there = torch.tensor(of.other())[here]
    return of.tokens[here], of.tokens[there], setting.difference(of.answers[here], of.answers[there])


@torch.no_grad()
def patched(of: Setting) -> tuple[compare.Circuit, compare.Circuit]:
    """Heads and MLPs, scored by the share of the metric that comes back with the clean activation there."""
    bridge: Any = build_bridge_from_module(copy.deepcopy(of.model), "LlamaForCausalLM", hf_config=of.model.config)
    clean, corrupted, metric = pairs(of, False, n=8)  # each head, and each MLP at each token, is a pass of its own
    _, cache = bridge.run_with_cache(clean)
    start, end = (metric(bridge(tokens)[:, -1]).mean() for tokens in (corrupted, clean))

    def share(logits: Tensor) -> Tensor:
        return (metric(logits[:, -1]).mean() - start) / (end - start)

    heads = patching.get_act_patch_attn_head_out_all_pos(bridge, corrupted, cache, share)
    mlps = patching.get_act_patch_mlp_out(bridge, corrupted, cache, share)
    return compare.circuit_of_scores(heads), compare.circuit_of_scores(mlps, "mlp pos")


def ungrouped(model: Any) -> Any:
    """The same function with keys and values of their own for each head, so that edges into each can be told apart."""
    config = copy.deepcopy(model.config)
    group = config.num_attention_heads // config.num_key_value_heads
    config.num_key_value_heads = config.num_attention_heads
    state = dict(model.state_dict())
    for name, value in state.items():
        if name.endswith(("k_proj.weight", "v_proj.weight")):
            state[name] = value.unflatten(0, (-1, config.head_dim)).repeat_interleave(group, 0).flatten(0, 1)
    again = LlamaForCausalLM(config)
    again.load_state_dict(state)
    return again.eval().requires_grad_(False)


@contextmanager
def recorded(model: Any) -> Iterator[dict[str, Tensor]]:
    """Inside, a forward keeps what goes into and out of the parts of each layer."""
    found: dict[str, Tensor] = {}
    hooks = []

    def keep(name: str, of_input: bool, module: Any, given: Any, y: Tensor) -> None:
        found[name] = given[0] if of_input else y

    def add(module: Any, name: str, of_input: bool = False) -> None:
        hooks.append(module.register_forward_hook(partial(keep, name, of_input)))

    for number, layer in enumerate(model.model.layers):
        for norm in ("input_layernorm", "post_attention_layernorm"):
            add(getattr(layer, norm), f"{number} {norm}")
            add(getattr(layer, norm), f"{number} into {norm}", of_input=True)
        for kind in "qkv":
            add(getattr(layer.self_attn, f"{kind}_proj"), f"{number} {kind}")
        add(layer.self_attn.o_proj, f"{number} z", of_input=True)
        add(layer.mlp, f"{number} mlp")
    add(model.model.norm, "norm")
    add(model.model.norm, "into norm", of_input=True)
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


def sources(model: Any, found: dict[str, Tensor], embedded: Tensor) -> tuple[list[str], Tensor]:
    """What each part writes to the residual stream, `node batch pos d`."""
    names, written = ["input"], [embedded]
    for number, layer in enumerate(model.model.layers):
        z = found[f"{number} z"].unflatten(-1, (-1, model.config.head_dim))
        W = layer.self_attn.o_proj.weight.mT.unflatten(0, (-1, model.config.head_dim))
        written += [z[:, :, head] @ W[head] for head in range(z.shape[2])] + [found[f"{number} mlp"]]
        names += [f"a{number}.h{head}" for head in range(z.shape[2])] + [f"m{number}"]
    return names, torch.stack(written)


def through_norm(x: Tensor, norm: Any, gradient: Tensor) -> Tensor:
    """The gradient in front of y = w x / sqrt(mean x² + eps)."""
    inverse, scaled = (x.square().mean(-1, keepdim=True) + norm.variance_epsilon).rsqrt(), gradient * norm.weight
    return scaled * inverse - x * (scaled * x).mean(-1, keepdim=True) * inverse**3


def destinations(model: Any, found: dict[str, Tensor], metric: Tensor) -> Iterator[tuple[int, list[str], Tensor]]:
    """Parts that read the residual stream at one place: how many parts wrote before, their names, and ∂metric/∂(what
    each reads), `name batch pos d`."""
    kept = [name for name in found if name[-1] in "qkv" or name.endswith(("post_attention_layernorm", "norm"))]
    kept = [name for name in kept if "into" not in name]
    of = dict(zip(kept, torch.autograd.grad(metric, [found[name] for name in kept]), strict=True))
    n_heads = model.config.num_attention_heads
    for number, layer in enumerate(model.model.layers):
        n_before, x, names, read = 1 + number * (n_heads + 1), found[f"{number} into input_layernorm"], [], []
        for kind in "qkv":
            W = getattr(layer.self_attn, f"{kind}_proj").weight.unflatten(0, (n_heads, -1))
            gradients = of[f"{number} {kind}"].unflatten(-1, (n_heads, -1))
            names += [f"a{number}.h{head}<{kind}>" for head in range(n_heads)]
            read += [through_norm(x, layer.input_layernorm, gradients[:, :, h] @ W[h]) for h in range(n_heads)]
        yield n_before, names, torch.stack(read)
        x, norm = found[f"{number} into post_attention_layernorm"], layer.post_attention_layernorm
        yield n_before + n_heads, [f"m{number}"], through_norm(x, norm, of[f"{number} post_attention_layernorm"])[None]
    n_before = 1 + len(model.model.layers) * (n_heads + 1)
    yield n_before, ["logits"], through_norm(found["into norm"], model.model.norm, of["norm"])[None]


def edges(of: Setting, aside: bool) -> tuple[dict[str, float], float]:
    """EAP-IG: mean over points between the corrupted and the clean embedding of <clean − corrupted of the source, the
    gradient of the metric where the destination reads>; mean over pairs. And how far the gradients of all destinations
    are from that at the embedding, which they add up to."""
    model = ungrouped(of.model)
    clean, corrupted, metric = pairs(of, aside)
    ends, written, nodes = [model.model.embed_tokens(tokens) for tokens in (clean, corrupted)], [], []
    for embedded in ends:
        with recorded(model) as found:
            model(inputs_embeds=embedded, logits_to_keep=1)
        nodes, each = sources(model, found, embedded)
        written.append(each.flatten(1))
    away, error, totals = written[0] - written[1], 0.0, {}
    for step in range(STEPS):
        at = (ends[1] + (step + 0.5) / STEPS * (ends[0] - ends[1])).requires_grad_()
        with recorded(model) as found:
            value = metric(model(inputs_embeds=at, logits_to_keep=1).logits[:, -1]).mean()
        (whole,) = torch.autograd.grad(value, at, retain_graph=True)
        left = whole.clone()
        for n_before, names, gradients in destinations(model, found, value):
            left -= gradients.sum(0)
            some = away[:n_before] @ gradients.flatten(1).mT / STEPS
            totals[n_before] = names, totals[n_before][1] + some if step else some
        error = max(error, (left.norm() / whole.norm()).item())
    scores = {
        f"{source}->{name}": score
        for names, table in totals.values()
        for source, row in zip(nodes, table.tolist(), strict=False)
        for name, score in zip(names, row, strict=True)
    }
    return scores, error


def in_file(scores: dict[str, float], file: Path, n_edges: int = 200) -> compare.Circuit:
    """Written in EAP-IG's format, with the n edges of the largest scores in the graph, and read back."""
    first = set(sorted(scores, key=lambda name: -abs(scores[name]))[:n_edges])
    of_edges = {name: {"score": score, "in_graph": name in first} for name, score in scores.items()}
    file.write_text(json.dumps({"cfg": {}, "nodes": {}, "edges": of_edges}))
    return compare.read_circuit(file)


def overlaps(scored: dict[str, compare.Circuit]) -> dict[str, dict[str, Any]]:
    """Each circuit's scores against the first nodes of each other one, heads and MLPs on their own."""
    rows = {}
    for name, one in scored.items():
        for other, against in scored.items():
            if name == other:
                continue
            for kind in "am":
                nodes = {node: score for node, score in one.nodes.items() if node[0] == kind}
                known = [node for node in against.top(len(against.nodes)) if node in nodes][: TOP if kind == "a" else 4]
                if len(nodes) <= len(known):
                    continue
                found = compare.overlap(nodes, known)
                rows[f"{name} against {other}: {'heads' if kind == 'a' else 'MLPs'}"] = {
                    "precision": found.measures["precision"],
                    "AUROC": found.measures["AUROC"],
                    "AUROC, null 95 %": found.null["AUROC"].quantile(0.95).item(),
                }
    return rows


def located(of: Setting, decomposition: apd.Decomposition, circuits: dict[str, compare.Circuit]) -> dict[str, Any]:
    """Whether components lie in the heads of their layer that a circuit scores highest, by weight and by effect."""
    clean, _, metric = pairs(of, True)
    rows = {}
    for name, circuit in circuits.items():
        here = [node for node in circuit.top(len(circuit.nodes)) if node.startswith(f"a{of.layer}.")]
        found = compare.locate(decomposition, [clean], here[:2], metric, top=len(clean))
        weight, effect = found.shares()
        nulls = found.nulls()
        rows[name] = {
            "its two heads": ", ".join(here[:2]),
            "weight there": weight,
            "effect there": effect,
            **{f"{label}, null": nulls.loc["5 sets of random components, mean"].iloc[place]
               for place, label in enumerate(("weight", "effect"))},
            "of the model's weight": nulls.loc["the model's weights"].iloc[0],
        }  # fmt: skip
    return rows


def curves(of: Setting, decomposition: apd.Decomposition, circuits: dict[str, compare.Circuit]) -> Any:
    """Faithfulness of components, and of heads in each circuit's order, for the countries kept aside."""
    clean, _, metric = pairs(of, True)
    few: Any = {"n_draws": 2, "ascent_steps": 4}
    n = decomposition.components.n_components
    sizes = sorted({size for size in (0, 1, 2, 4, 8, n) if size <= n})

    def own(batch: Tensor) -> Tensor:
        return decomposition.observe(batch).attributions

    found = {"components": compare.faithfulness_curve(decomposition, [clean], metric, scores=own, sizes=sizes, **few)}
    n_heads = of.model.config.num_hidden_layers * of.model.config.num_attention_heads
    sizes = sorted({size for size in (0, 2, 8, 32, 128, n_heads) if size <= n_heads})
    for name, circuit in circuits.items():
        scores = torch.tensor([abs(circuit.nodes.get(node, 0.0)) for node in heads(of)])
        found[f"heads by {name}"] = compare.faithfulness_curve(
            decomposition, [clean], metric, unit="head", scores=scores, sizes=sizes, ablation="mean", **few
        )
    return found


def heads(of: Setting) -> list[str]:
    config = of.model.config
    return [
        f"a{layer}.{head}" for layer in range(config.num_hidden_layers) for head in range(config.num_attention_heads)
    ]


def draw(of: Setting, found: dict[str, compare.FaithfulnessCurve]) -> None:
    figure, grid = plt.subplots(1, len(found), figsize=(5.2 * len(found), 4), layout="constrained")
    for ax, (name, curve) in zip(grid, found.items(), strict=True):
        plots.faithfulness(curve.kept, curve.curves(), unit=curve.unit, ax=ax)
        ax.set_title(name)
        if ax is not grid[-1]:
            ax.get_legend().remove()
    figure.savefig(of.out / "circuits.png", dpi=110)
    plt.close(figure)


def main() -> None:
    of, _ = setting.opened(__doc__)
    decomposition = of.decomposition()
    scored, mlps = patched(of)
    patches = compare.Circuit({**scored.nodes, **mlps.nodes}, {})
    scores, error = edges(of, aside=False)
    print(f"gradients of all destinations add up to that at the embedding but for {error:.1e}", flush=True)
    by_edges = in_file(scores, of.out / "edges.json")
    circuits = {"patching": patches, "EAP-IG": by_edges}
    again = {"EAP-IG, other countries": in_file(edges(of, aside=True)[0], of.out / "edges-aside.json")}
    kept = curves(of, decomposition, circuits)
    found = {
        "first nodes": {
            name: {"heads": first(circuit, "a"), "MLPs": first(circuit, "m")} for name, circuit in circuits.items()
        },
        "overlap": overlaps({**circuits, **again}),
        "components in its heads": located(of, decomposition, circuits),
        "areas": {
            f"{name}, {masking}": row
            for name, curve in kept.items()
            for masking, row in curve.areas().to_dict(orient="index").items()
        },
        "curves": {
            f"{name}, {masking}": dict(zip(map(str, curve.kept.tolist()), values.tolist(), strict=True))
            for name, curve in kept.items()
            for masking, values in curve.curves().items()
        },
        "first edges": [
            {"edge": "->".join(edge[:2]) + (f" by {edge[2]}" if edge[2] else ""), "score": score}
            for edge, score in sorted(by_edges.edges.items(), key=lambda item: -abs(item[1]))[:15]
        ],
    }
    setting.written(of, "circuits", found)
    draw(of, kept)
    for name in ("first nodes", "overlap", "components in its heads", "areas", "curves"):
        print(f"\n{setting.table(found[name], name)}")


def first(circuit: compare.Circuit, kind: str) -> str:
    nodes = [node for node in circuit.top(len(circuit.nodes)) if node[0] == kind][:TOP]
    return ", ".join(f"{node} {circuit.nodes[node]:.2f}" for node in nodes)


if __name__ == "__main__":
    main()
