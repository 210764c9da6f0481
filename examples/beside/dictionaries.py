"""SAEs and a transcoder of SmolLM2-135M-Instruct beside components of the same matrices.

SAELens trains them on texts that the model wrote, a third of which begin with a country: SAEs on what attention 23
writes, and a transcoder on MLP 29. They are small and trained for minutes: read first how much of the activations and
of the cross-entropy they give back. Then: are latents and components the same directions, are they active together, how
much of the answer do a few units of each give back, and which of the two takes out a capital with fewer side effects?

    python examples/beside/dictionaries.py               # an hour on one core
    python examples/beside/dictionaries.py --stand-in    # a tiny model, for a look at the code
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

import sae_lens
import setting
import torch
import torch.nn.functional as F
from matplotlib import pyplot as plt
from sae_lens.config import SAETrainerConfig
from sae_lens.saes.sae import TrainStepInput, TrainStepOutput
from sae_lens.training.sae_trainer import SAETrainer
from setting import Setting
from torch import Tensor

import apd_lens as apd
from apd_lens import compare, plots
from apd_lens.losses import kl_divergence

K, BATCH, SIZES, SEEDS = 16, 256, (256, 1024), (0, 1)
UNSEEN = "The capital city of {word} is"
Dictionaries = dict[str, compare.Dictionary]
Edit = Callable[[Tensor], AbstractContextManager[Any]]


class TopKTranscoder(sae_lens.TopKTrainingSAE):
    """SAELens trains SAEs only. This one is given x and y side by side, reads x, and is to write y."""

    def training_forward_pass(self, step_input: TrainStepInput) -> TrainStepOutput:
        x, y = step_input.sae_in.chunk(2, -1)
        latents, before = self.encode_with_hidden_pre(x)
        written = self.decode(latents)
        losses = {"mse_loss": (written - y).square().sum(-1).mean()}
        losses |= self.calculate_aux_loss(replace(step_input, sae_in=y), latents, before, written)
        return TrainStepOutput(y, written, latents, before, torch.stack(list(losses.values())).sum(), losses)


def sites(of: Setting) -> tuple[str, str, str]:
    """What attention writes, what the MLP reads, what it writes."""
    layer = f"model.layers.{of.mlp}"
    return of.attention("o"), f"{layer}.post_attention_layernorm", f"{layer}.mlp"


@torch.no_grad()
def activations(of: Setting, tokens: Tensor) -> Tensor:
    """At the three sites, `site n pos d`."""
    found: list[list[Tensor]] = [[] for _ in sites(of)]
    hooks = [
        of.model.get_submodule(site).register_forward_hook(lambda module, given, y, rows=rows: rows.append(y))
        for site, rows in zip(sites(of), found, strict=True)
    ]
    for some in tokens.split(32):
        of.model(some, logits_to_keep=1)
    for hook in hooks:
        hook.remove()
    return torch.stack([torch.cat(rows) for rows in found])


def read_while_training(of: Setting) -> Tensor:
    """Activations `site token d` of general text and of texts that begin with a country."""
    varies = (of.tokens != of.tokens[:1]).any(0)
    countries = of.tokens[:, varies][:, :1]
    n, length = (24, 8) if of.texts.shape[1] < 32 else (512, 24)
    about = setting.kept(
        of.out / "country-texts.pt",
        lambda: apd.language.sample_texts(
            of.model,
            n=n,
            length=length,
            starts=countries,
            seed=1,
            tokenizer=None if isinstance(of.tokenizer, setting.Words) else of.tokenizer,
        ),
    )
    return setting.kept(
        of.out / "activations.pt",
        lambda: torch.cat([activations(of, texts).flatten(1, 2) for texts in (of.texts, about)], 1),
    )


def trained(of: Setting, size: int, seed: int, steps: int, read: Tensor, transcodes: bool) -> compare.Dictionary:
    """A dictionary as SAELens trains and saves it, of activations that are scaled to a mean squared norm of d."""
    attention, mlp_in, mlp_out = sites(of)
    inputs, outputs = (read[1], read[2]) if transcodes else (read[0], read[0])
    scales = [each.square().mean().rsqrt().item() for each in (inputs, outputs)]
    d = inputs.shape[1]
    kind = "transcoder" if transcodes else "sae"
    folder = of.out / f"{kind}-{size}-{seed}{'' if steps else '-untrained'}"
    if not folder.exists():
        torch.manual_seed(seed)
        config = sae_lens.TopKTrainingSAEConfig(
            d_in=d, d_sae=size, k=min(K, size // 4), apply_b_dec_to_input=not transcodes
        )
        sae = (TopKTranscoder if transcodes else sae_lens.TopKTrainingSAE)(config)
        rows = inputs * scales[0]
        if transcodes:
            rows = torch.cat([rows, outputs * scales[1]], 1)
        how = SAETrainerConfig(
            total_training_samples=steps * BATCH, train_batch_size_samples=BATCH, lr=1e-3, lr_end=1e-4,
            lr_decay_steps=steps // 3, lr_warm_up_steps=steps // 20, dead_feature_window=100,
        )  # fmt: skip
        if steps:
            SAETrainer(how, sae, shuffled(rows, seed)).fit()
        sae.save_inference_model(folder)
    site, site_out = (mlp_in, mlp_out) if transcodes else (attention, None)
    found = compare.Dictionary.from_file(folder / "sae_weights.safetensors", site, n_latents=size, site_out=site_out)
    assert found.decoder_bias is not None
    return replace(
        found,
        encoder=found.encoder * scales[0],
        decoder=found.decoder / scales[1],
        decoder_bias=found.decoder_bias / scales[1],
    )


def shuffled(rows: Tensor, seed: int) -> Iterator[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    while True:
        for some in torch.randperm(len(rows), generator=generator).split(BATCH):
            if len(some) == min(BATCH, len(rows)):
                yield rows[some]


@torch.no_grad()
def quality(of: Setting, dictionaries: Dictionaries) -> dict[str, dict[str, float]]:
    """How much of the activations, and of what the model says, each dictionary gives back; on text held out.

    "CE recovered" is 0 where zeros stand in the place of the activations, and 1 for the model itself.
    """
    read, before, whole = activations(of, of.held_out), of.model(of.tokens).logits[:, -1], cross_entropy(of, [])
    blank: dict[str | None, float] = {}
    rows = {}
    for name, some in dictionaries.items():
        x, y = (read[1], read[2]) if some.site_out else (read[0], read[0])
        if some.site_out not in blank:
            zero = torch.zeros_like(some.decoder), torch.zeros(some.decoder.shape[1])
            blank[some.site_out] = cross_entropy(of, [replace(some, decoder=zero[0], decoder_bias=zero[1])])
        latents, spliced = some.encode(x), cross_entropy(of, [some])
        left = (some.decode(latents) - y).square().sum()
        with compare.spliced(of.model, [some]):
            after = of.model(of.tokens, logits_to_keep=1).logits[:, -1]
        rows[name] = {
            "variance explained": 1 - (left / (y - y.mean((0, 1))).square().sum()).item(),
            "latents never on": int((latents.flatten(0, 1) == 0).all(0).sum()),
            "CE": whole,
            "CE spliced": spliced,
            "CE zeroed": blank[some.site_out],
            "CE recovered": (blank[some.site_out] - spliced) / (blank[some.site_out] - whole),
            "KL of answers": kl_divergence(before, after).mean().item(),
            "answers kept": (after.argmax(1) == of.answers).float().mean().item(),
        }
    return rows


@torch.no_grad()
def cross_entropy(of: Setting, dictionaries: list[compare.Dictionary]) -> float:
    """Of 32 texts held out."""
    texts = of.held_out[:32]
    with compare.spliced(of.model, dictionaries):
        logits = of.model(texts).logits[:, :-1]
    return F.cross_entropy(logits.flatten(0, 1), texts[:, 1:].flatten()).item()


def directions(decomposition: apd.Decomposition, matrix: str, some: compare.Dictionary) -> dict[str, float]:
    """Best cosines of what components and latents write, means over components, beside nulls."""
    found = compare.direction_match(decomposition, some, matrix, "write")
    kinds = {"found": found.found, "random directions": found.random_directions}
    kinds["random components"] = found.random_components
    numbers = {name: match.best_of_component.nanmean().item() for name, match in kinds.items()}
    return numbers | {"latents above 0.7": (found.cosine > 0.7).sum(1).float().mean().item()}


def between(one: compare.Dictionary, other: compare.Dictionary) -> dict[str, float]:
    """Best cosines of one dictionary's decoder directions among another's."""
    cosine = F.normalize(one.decoder, dim=1) @ F.normalize(other.decoder, dim=1).mT
    drawn = torch.randn(other.decoder.shape, generator=torch.Generator().manual_seed(0))
    null = F.normalize(one.decoder, dim=1) @ F.normalize(drawn, dim=1).mT
    return {
        "found": cosine.max(1).values.mean().item(),
        "random directions": null.max(1).values.mean().item(),
        "latents above 0.7": (cosine > 0.7).sum(1).float().mean().item(),
    }


def lifts(scores: Tensor) -> Tensor:
    """How much larger each unit's score is on a prompt than in the mean over prompts, `prompt unit`."""
    return scores - scores.mean(0)


def naming(here: Tensor, there: Tensor) -> dict[str, float]:
    """Units that are a country's: the one with the largest lift on its prompt, and whether the same one has it when the
    same is asked in other words. Chance is one in as many as there are countries."""
    own, again = lifts(here).argmax(1), lifts(there).argmax(1)
    return {
        "countries with a unit of their own": float((own.bincount() == 1).sum()),
        "units": float(len(own.unique())),
        "the same in other words": (own == again).float().mean().item(),
        "the same unit's, another country": (own == again.roll(len(again) // 2)).float().mean().item(),
    }


@torch.no_grad()
def strengths(of: Setting, some: compare.Dictionary, tokens: Tensor) -> Tensor:
    """Latents at the last token, times the length of what they write."""
    place = 1 if some.site_out else 0
    return some.encode(activations(of, tokens)[place, :, -1]) * some.decoder.norm(dim=1)


def gradients(of: Setting, some: compare.Dictionary) -> Tensor:
    """Σ over positions of latent · ∂log p(answer)/∂latent, `prompt latent`: what to take out to lose the answer."""
    kept: list[Tensor] = []

    def keep(module: Any, given: Any, y: Tensor) -> None:
        kept.append(y)

    hook = of.model.get_submodule(some.site_out or some.site).register_forward_hook(keep)
    p = of.model(of.tokens, logits_to_keep=1).logits[:, -1].log_softmax(-1)
    hook.remove()
    (gradient,) = torch.autograd.grad(p[torch.arange(len(p)), of.answers].sum(), kept)
    with torch.no_grad():
        latents = some.encode(activations(of, of.tokens)[1 if some.site_out else 0])
        return (latents * (gradient @ some.decoder.mT)).sum(1)


@torch.no_grad()
def effects(of: Setting, edit: Edit) -> dict[str, float]:
    """What each edit does to its own answer, to those of the others, and to general text; of countries kept aside.

    Args:
        edit: numbers of countries -> a context in which row i of a batch runs with the edit of country i.
    """
    here = of.aside.nonzero()[:, 0]
    tokens, answers, n = of.tokens[here], of.answers[here], len(here)
    texts = of.held_out[: 2 * n]
    before, whole = of.model(tokens, logits_to_keep=1).logits[:, -1].log_softmax(-1), of.model(texts).logits
    changed, apart = torch.zeros(n, n, dtype=torch.bool), torch.zeros(n, n)
    nats = torch.zeros(n)
    for i in range(n):
        with edit(here[i].expand(n)):
            after = of.model(tokens, logits_to_keep=1).logits[:, -1].log_softmax(-1)
        changed[i], apart[i] = after.argmax(1) != answers, kl_divergence(before, after)
        nats[i] = (before - after)[i, answers[i]]
    with edit(here.repeat(2)[: len(texts)]):
        after = of.model(texts).logits
    others = ~torch.eye(n, dtype=torch.bool)
    return {
        "forgotten": changed.diagonal().float().mean().item(),
        "nats lost": nats.mean().item(),
        "other answers changed": changed[others].float().mean().item(),
        "KL on others": apart[others].mean().item(),
        "KL on texts": kl_divergence(whole.flatten(0, 1), after.flatten(0, 1)).mean().item(),
    }


def of_latents(of: Setting, some: compare.Dictionary, count: int) -> Edit:
    """The latents with the largest lift of what they bring to the answer are taken out; what the dictionary leaves
    unexplained stays."""
    scores = lifts(gradients(of, some))
    off = torch.zeros_like(scores, dtype=torch.bool).scatter_(1, scores.topk(count, dim=1).indices, True)
    return lambda which: compare.spliced(of.model, [some], [~off[which]], keep_error=True)


def of_components(decomposition: apd.Decomposition, own: Tensor) -> Edit:
    n = decomposition.components.n_components
    return lambda which: decomposition.sparse(~F.one_hot(own[which], n).bool(), rest=1.0)


def by_token(of: Setting, decomposition: apd.Decomposition, own: Tensor, saes: Dictionaries) -> dict[str, Any]:
    """Where in the prompt a country's units are on, mean over countries kept aside: the share of the unit's activity at
    each token."""
    here = of.aside.nonzero()[:, 0]
    read = activations(of, of.tokens)[0]
    rows = {}
    for name, some in saes.items():
        latents = some.encode(read)
        unit = lifts(latents[:, -1] * some.decoder.norm(dim=1)).argmax(1)
        rows[name] = latents[here, :, unit[here]]
    with torch.no_grad():
        inputs = decomposition.watch(of.tokens)
    for call in inputs.calls:
        A, B = (
            decomposition.components.A[call.use.matrix][own[here]],
            decomposition.components.B[call.use.matrix][own[here]],
        )
        written = torch.einsum("npd,ndm,nmo->npo", call.x[here], A, B).norm(dim=-1)
        rows[f"components, {call.use.matrix.split('.')[-2]}"] = written
    tokens = [of.tokenizer.decode([token]).strip() for token in of.tokens[0].tolist()]
    tokens = ["country" if token == of.words[0] else token for token in tokens]
    shares = {name: (row / row.sum(1, keepdim=True).clamp_min(1e-9)).mean(0).tolist() for name, row in rows.items()}
    return {name: dict(zip(tokens, share, strict=True)) for name, share in shares.items()}


def yardstick(
    of: Setting, decomposition: apd.Decomposition, dictionaries: dict[str, Any], inputs: Any = "propagated"
) -> compare.Sparsity:
    """KL of the answer with k units a prompt, for the countries kept aside."""
    ks = (0, 1, 2, 4, 16)
    return compare.sparsity(
        decomposition, [of.tokens[of.aside]], ks, dictionaries, loss="kl", inputs=inputs, pool="last"
    )


def part(decomposition: apd.Decomposition, word: str) -> apd.Decomposition:
    """The matrices with this word in their names; the others stay the model's own."""
    A, B = decomposition.components.A, decomposition.components.B
    names = [name for name in decomposition.components.names if word in name]
    return replace(
        decomposition, components=apd.ParameterComponents({n: A[n] for n in names}, {n: B[n] for n in names})
    )


def main() -> None:
    of, options = setting.opened(__doc__, lambda parser: parser.add_argument("--sae-steps", type=int, default=600))
    read, sizes = read_while_training(of), (16, 64) if options.stand_in else SIZES

    def dictionary(
        size: int, seed: int, transcodes: bool = False, steps: int = options.sae_steps
    ) -> compare.Dictionary:
        return trained(of, size, seed, steps, read, transcodes)

    saes = {f"SAE {size}, seed {seed}": dictionary(size, seed) for size in sizes for seed in SEEDS}
    transcoders = {f"transcoder {sizes[1]}, seed {seed}": dictionary(sizes[1], seed, True) for seed in SEEDS}
    untrained = {f"SAE {sizes[1]}, untrained": dictionary(sizes[1], 0, steps=0)}
    untrained_transcoder = {f"transcoder {sizes[1]}, untrained": dictionary(sizes[1], 0, True, steps=0)}
    found: dict[str, Any] = {}

    def say(name: str, rows: dict[str, Any]) -> None:
        found[name] = rows
        setting.written(of, "dictionaries", found)
        print(f"\n{setting.table(rows, name)}", flush=True)

    say("quality", quality(of, {**saes, **untrained, **transcoders, **untrained_transcoder}))
    decomposition, again = of.decomposition(0), of.decomposition(1)
    observed = decomposition.observe(of.tokens)
    own = torch.where(observed.mask, observed.attributions / observed.attributions.mean(0), -1).argmax(1)
    o = f"{of.attention('o')}.weight"
    rows = {
        f"components and {name}": directions(decomposition, o, some) for name, some in {**saes, **untrained}.items()
    }
    rows |= {f"components, seed 1, and {list(saes)[-2]}": directions(again, o, list(saes.values())[-2])}
    names = list(saes)
    rows |= {f"{names[i]} and {names[j]}": between(saes[names[i]], saes[names[j]]) for i, j in ((0, 1), (2, 3), (0, 2))}
    say("directions written", rows)
    unseen = (
        apd.language.Template(UNSEEN).prompts(of.tokenizer, word=of.words).input_ids
        if not options.stand_in
        else of.tokens
    )
    rows = {
        "components": naming(observed.attributions, decomposition.attributions(unseen)),
        "random components": random_naming(decomposition, of.tokens, unseen),
    }
    rows |= {
        name: naming(strengths(of, some, of.tokens), strengths(of, some, unseen))
        for name, some in {**saes, **untrained, **transcoders, **untrained_transcoder}.items()
    }
    say("whose unit", rows)
    rows = {}
    for name, some in {**saes, **untrained}.items():
        match = compare.activation_match(decomposition, [of.tokens], some, pool="last")
        rows[name] = {
            "F1, best latent of a component": match.found.best_of_component.nanmean().item(),
            "shuffled": match.shuffled.best_of_component.nanmean().item(),
            "F1 of countries' own pairs": match.f1[own, lifts(strengths(of, some, of.tokens)).argmax(1)]
            .nanmean()
            .item(),
        }
    say("active together", rows)
    say("by token", by_token(of, decomposition, own, {name: saes[name] for name in names[::2]}))

    edits: dict[str, Edit] = {"own component": of_components(decomposition, own)}
    random = replace(decomposition, components=apd.components.random_components(decomposition.components))
    edits["random component of its size"] = of_components(random, own)
    edits["another country's component"] = of_components(decomposition, own.roll(len(own) // 2))
    counts = {names[2]: (1, 4, 16), names[3]: (1, 4, 16), names[0]: (4,), next(iter(untrained)): (4,)}
    for name, some in {**saes, **untrained}.items():
        for count in counts.get(name, ()):
            edits[f"{name}: {count} latents"] = of_latents(of, some, count)
    say("edits", {name: effects(of, edit) for name, edit in edits.items()})

    width = of.model.config.hidden_size
    sae, transcoder = {names[2]: saes[names[2]]}, dict(list(transcoders.items())[:1])
    coordinates = {"coordinates": compare.Dictionary.neurons(of.attention("o"), width, parameters=2 * width)}
    act = f"model.layers.{of.mlp}.mlp.act_fn"
    neurons = {"neurons": compare.Dictionary.neurons(act, of.model.config.intermediate_size, parameters=3 * width)}
    pair = {"SAE and transcoder": [*sae.values(), *transcoder.values()]}
    measured: dict[str, compare.Sparsity] = {}

    def measure(where: str, curves: compare.Sparsity) -> None:
        measured[where] = curves
        rows = {
            f"{where}: {row.pop('curve')}, k = {row.pop('k'):g}": row
            for row in curves.table().to_dict(orient="records")
        }
        say("yardstick", found.get("yardstick", {}) | rows)
        draw(of, measured)

    measure("attention alone", yardstick(of, decomposition, {**sae, **coordinates}))
    both = of.decomposition(0, mlp=True)
    measure("MLP alone", yardstick(of, part(both, ".mlp."), {**transcoder, **neurons}))
    measure("both, errors propagated", yardstick(of, both, pair))
    measure("both, clean inputs", yardstick(of, both, pair, "clean"))


def random_naming(decomposition: apd.Decomposition, here: Tensor, there: Tensor) -> dict[str, float]:
    random = replace(decomposition, components=apd.components.random_components(decomposition.components))
    return naming(random.attributions(here), random.attributions(there))


def draw(of: Setting, measured: dict[str, compare.Sparsity]) -> None:
    figure, grid = plt.subplots(
        1, len(measured), figsize=(5.4 * len(measured), 4.4), layout="constrained", squeeze=False
    )
    for ax, (where, curves) in zip(grid[0], measured.items(), strict=True):
        nulls = [name for name in curves.of("loss") if "random" in name or "untrained" in name]
        plots.loss_against_sparsity(
            curves.of("active"), curves.of("loss"), nulls=nulls, ax=ax, label="active units a prompt",
            loss_name="KL of the answer, nats",
        )  # fmt: skip
        ax.set_title(where)
    figure.savefig(of.out / "dictionaries.png", dpi=100)
    plt.close(figure)


if __name__ == "__main__":
    main()
