"""SAEs and a transcoder of SmolLM2-135M-Instruct beside components of the same matrices.

SAELens trains them on texts that the model wrote, a third of which begin with a country: SAEs on what attention 23
writes, and a transcoder on MLP 29. They are small and trained for minutes: read first how much of the activations and
of the cross-entropy they give back. Then: are latents and components the same directions, are they active together, how
much of the answer do a few units of each give back, and which of the two takes out a capital with fewer side effects?

    python examples/beside/dictionaries.py               # an hour on one core
    python examples/beside/dictionaries.py --stand-in    # a tiny model, for a look at the code
"""

import argparse
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

import sae_lens
import setting
import torch
import torch.nn.functional as F
from matplotlib import pyplot as plt
from sae_lens.config import SAETrainerConfig
from sae_lens.saes.sae import TrainStepInput, TrainStepOutput
from sae_lens.training.sae_trainer import SAETrainer
from safetensors.torch import load_file, save_file
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
            of.model, n=n, length=length, starts=countries, seed=1,
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


def main() -> None:
    of, options = setting.opened(__doc__, lambda parser: parser.add_argument("--sae-steps", type=int, default=600))
    read = read_while_training(of)
    print("read", tuple(read.shape), flush=True)
    sizes = (16, 64) if options.stand_in else SIZES
    saes = {
        f"SAE {size}, seed {seed}": trained(of, size, seed, options.sae_steps, read, False)
        for size in sizes
        for seed in SEEDS
    }
    transcoders = {
        f"transcoder {size}, seed {seed}": trained(of, size, seed, options.sae_steps, read, True)
        for size in sizes[1:]
        for seed in SEEDS
    }


if __name__ == "__main__":
    main()
