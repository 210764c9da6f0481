"""pipeline_sae_lens.py with ten lines changed: the same study of the SAE, on components of the layer that it is behind.

Values and outputs of the layer's attention are taken apart into components. The study is made again while the layer
runs on the active components only, and without the component that is active on one prompt alone.

python examples/language_model/pipeline_sae_lens_with_apd.py               # SmolLM2-135M-Instruct, minutes
python examples/language_model/pipeline_sae_lens_with_apd.py --stand-in    # a tiny model
"""

import argparse

import sae_lens
import tasks
import torch
from sae_lens.analysis.sae_transformer_bridge import SAETransformerBridge
from sae_lens.config import SAETrainerConfig
from sae_lens.saes.sae import SAEMetadata
from sae_lens.training.sae_trainer import SAETrainer

import apd_lens as apd

opened = tasks.opened(tasks.parsed(argparse.ArgumentParser()))
known = opened.capitals()
tokens, answers = known.of_one_length()
rows = torch.arange(len(tokens))
bridge = SAETransformerBridge.boot_transformers(
    "HuggingFaceTB/SmolLM2-135M-Instruct", hf_model=opened.model, tokenizer=opened.tokenizer
)
bridge.enable_compatibility_mode(no_processing=True, disable_warnings=True)
layer = 0 if opened.is_stand_in else 23
hook_name = f"blocks.{layer}.attn.hook_out"


def written(batch: torch.Tensor) -> torch.Tensor:
    """What the layer writes, at all positions."""
    with torch.no_grad():
        return bridge.run_with_cache(batch, names_filter=hook_name)[1][hook_name].flatten(0, 1)


def batches(size: int = 256):
    """Activations in random order, again and again."""
    found = torch.cat([*map(written, opened.texts[:128].split(16)), *[written(tokens)] * 4])
    generator = torch.Generator().manual_seed(0)
    while True:
        yield found[torch.randint(len(found), (size,), generator=generator)]


torch.manual_seed(0)
width = bridge.cfg.d_model
metadata = SAEMetadata(hook_name=hook_name)
training = sae_lens.TopKTrainingSAE(sae_lens.TopKTrainingSAEConfig(width, 4 * width, k=8, metadata=metadata))
settings = SAETrainerConfig(total_training_samples=300 * 256, train_batch_size_samples=256, lr=3e-3, lr_end=3e-4)
SAETrainer(settings, training, batches()).fit()
sae = sae_lens.TopKSAE(sae_lens.TopKSAEConfig(width, 4 * width, k=8, metadata=metadata))
sae.load_state_dict(training.state_dict(), strict=False)
latents = bridge.get_sae_hook_name(sae)


def study() -> None:
    with torch.no_grad():
        x = written(tokens)
        lost = (sae(x) - x).square().sum() / (x - x.mean(0)).square().sum()
        logits, cache = bridge.run_with_cache_with_saes(tokens, saes=[sae], use_error_term=True)
        at_end = cache[latents][:, -1]
        top = at_end.argmax(-1)

        def off(value, hook):
            value[rows, -1, top] = 0
            return value

        without = bridge.run_with_hooks_with_saes(tokens, saes=[sae], use_error_term=True, fwd_hooks=[(latents, off)])
    right, right_without = ((some[:, -1].argmax(-1) == answers).float().mean() for some in (logits, without))
    print(f"variance lost {lost:.1%}; latents on at the end {(at_end > 0).sum(-1).float().mean():.1f}")
    print(f"top latents: {len(set(top.tolist()))} for {len(tokens)} prompts")
    print(f"right {right:.0%}, without the top latent {right_without:.0%}")


study()
weights = [f"blocks.{layer}.attn.W_V", f"blocks.{layer}.attn.W_O"]
settings = {"n_components": len(tokens) + 8, "others": known.others[:16], **apd.language_model(0)}
decomposition = apd.decompose(bridge, [tokens], weights, **settings)
active = decomposition.select(tokens).float()
own = active * (active.sum(0) == 1)
for name, mask, rest in (("on active components", active, 0.0), ("without each prompt's own", 1 - own, 1.0)):
    print(f"{name}:")
    with decomposition.sparse(mask, rest):
        study()
