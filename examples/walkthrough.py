"""From a HookedTransformer to its components, and to SAEs, circuits, an edit and a report, on one page.

    python examples/walkthrough.py

Needs the extras transformer-lens, sae-lens, compare and report. Five minutes on one core.
"""

import argparse
import itertools
from pathlib import Path

import sae_lens
import torch
from sae_lens.config import SAETrainerConfig
from sae_lens.training.sae_trainer import SAETrainer

import apd_lens as apd
from apd_lens import compare, toys

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--steps", type=int, default=4000, help="training steps of the decomposition")
parser.add_argument("--out", type=Path, default=Path("out"))
arguments = parser.parse_args()

# 1. A trained model with hooks: 64 facts, prompt (relation, subject) -> object, in an MLP of 48 neurons.
target = toys.train_facts()
model, prompts, answers = target.model, target.prompts, target.answers
print(apd.wrap(model))

# 2. W_in and W_out as a sum of 100 components.
decomposition = apd.decompose(model, [prompts], **toys.facts_settings(arguments.steps))
print(f"\nresidual {decomposition.residuals()['all']:.4f}")
print("\n".join(str(decomposition.summary(prompts)).splitlines()[:6]), "\n…")

# 3. Your hooks go on working on top. Each prompt on its own component alone, and the neurons that are then on:
with decomposition.sparse(decomposition.select(prompts)):
    logits, cache = model.run_with_cache(prompts)
right = (logits[:, -1].argmax(-1) == answers).float().mean()
n_on = (cache["blocks.0.mlp.hook_post"][:, -1] > 0).sum(-1).float().mean()
print(f"\nsparse: {right:.1%} of the answers right, {n_on:.1f} neurons on")

# 4. Beside an SAE that SAELens trained on the MLP's output: directions, and what a few units give back.
_, cache = model.run_with_cache(prompts)
written = cache["blocks.0.hook_mlp_out"][:, -1]
config = sae_lens.StandardTrainingSAEConfig(d_in=written.shape[-1], d_sae=100, l1_coefficient=0.5)
trained = sae_lens.StandardTrainingSAE(config)
training = SAETrainerConfig(
    arguments.steps * len(prompts), len(prompts), lr=3e-3, lr_end=3e-4, lr_decay_steps=arguments.steps // 5
)
SAETrainer(training, trained, itertools.repeat(written)).fit()
trained.save_inference_model(arguments.out / "sae")
sae = compare.Dictionary.from_sae_lens(sae_lens.SAE.load_from_disk(arguments.out / "sae"), site="blocks.0.hook_mlp_out")
match = compare.direction_match(decomposition, sae, "blocks.0.mlp.W_out", batches=[prompts])
print(f"\nwhat components write beside what the SAE's latents write\n{match}")
neurons = compare.Dictionary.neurons("blocks.0.mlp.hook_post", 48)
curves = compare.sparsity(decomposition, [prompts], (1, 4), {"SAE": sae, "neurons": neurons}, loss="kl")
print(f"\nloss with k units on\n{curves}")

# 5. As a circuit: where components lie, and how much of the right answers' logits they give back, beside neurons.
print(f"\nwhere components lie\n{compare.weight_map(decomposition).table('matrix').head(3).round(2).to_string()}")


def right_logit(output: torch.Tensor) -> torch.Tensor:
    return output[torch.arange(len(answers)), answers]


def activations(batch: torch.Tensor) -> torch.Tensor:
    return model.run_with_cache(batch)[1]["blocks.0.mlp.hook_post"]


print("\nshare of the logits recovered by the first of each prompt, others off, partly off, or set to do most harm")
for unit, scores in (("component", decomposition.attributions), ("neuron", activations)):
    print(
        compare.faithfulness_curve(decomposition, [prompts], right_logit, unit=unit, scores=scores, sizes=(0, 1, 4, 48))
    )

# 6. An edit: subject 7 is forgotten. Its effect beside other edits of the same rank; then for real, and undone.
component = decomposition.attributions(prompts)[7].argmax()
others = torch.cat([prompts[:7], prompts[8:]])
effects = compare.edit_effects(decomposition, component, [prompts[7:8]], [others], distance="kl")
print(f"\nKL from the model as it is, without component {component}\n{effects}")
with apd.apply_edit(model, decomposition, ablate=component):
    print(f"\nforgotten for good: {(~target.is_right()).nonzero()[:, 0].tolist()}; ", end="")
print(f"undone: {target.accuracy():.1%} right")

# 7. One page to look at, or to mail.
names = [f"subject {token}" for token in range(64)] + ["relation"] + [f"object {token}" for token in range(32)]
page = decomposition.report(
    [prompts], arguments.out / "walkthrough.html", decode=names.__getitem__, matches=match.table()
)
print(f"\nwrote {page} ({page.stat().st_size / 2**20:.1f} MiB)")
