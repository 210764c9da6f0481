"""A circuit study as people do it in TransformerLens: where does a model look up the capital of a country?

How much more the right answer is raised than that of another prompt; how early the residual stream says it; and which
attention layers and heads, patched with what they have for that other prompt, bring its answer. See
pipeline_transformer_lens_with_apd.py for the same with APD.

python examples/language_model/pipeline_transformer_lens.py               # SmolLM2-135M-Instruct, a minute
python examples/language_model/pipeline_transformer_lens.py --stand-in    # a tiny model
"""

import argparse

import tasks
import torch
from transformer_lens.model_bridge.sources._bridge_builder import build_bridge_from_module

opened = tasks.opened(tasks.parsed(argparse.ArgumentParser()))
known = opened.capitals()
tokens, answers = known.of_one_length()
others, other_answers = tokens.roll(1, 0), answers.roll(1)
rows = torch.arange(len(tokens))
bridge = build_bridge_from_module(opened.model, type(opened.model).__name__, hf_config=opened.model.config)
bridge.enable_compatibility_mode(no_processing=True, disable_warnings=True)
torch.set_grad_enabled(False)


def difference(logits: torch.Tensor) -> float:
    """By how much the right answer is above that of the other prompt, mean over prompts."""
    last = logits[:, -1]
    return (last[rows, answers] - last[rows, other_answers]).mean().item()


logits, cache = bridge.run_with_cache(tokens)
_, of_others = bridge.run_with_cache(others)
clean, corrupted = difference(logits), difference(bridge(others))
print(f"difference of logits: {clean:.2f}, of the other prompts {corrupted:.2f}")


def moved(hook_name: str, head: int | None = None) -> float:
    """The share of the way to the other prompts that patching one activation goes, at the last position."""

    place = (slice(None), -1) if head is None else (slice(None), -1, head)

    def patch(value, hook):
        value[place] = of_others[hook_name][place]
        return value

    return (clean - difference(bridge.run_with_hooks(tokens, fwd_hooks=[(hook_name, patch)]))) / (clean - corrupted)


n_layers, n_heads = bridge.cfg.n_layers, bridge.cfg.n_heads
lens = [bridge.unembed(bridge.ln_final(cache[f"blocks.{layer}.hook_resid_post"])) for layer in range(n_layers)]
print("the residual stream says it behind layer:", [round(difference(some), 1) for some in lens])
by_layer = [moved(f"blocks.{layer}.hook_attn_out") for layer in range(n_layers)]
best = max(range(n_layers), key=by_layer.__getitem__)
print(f"attention layers patched: layer {best} moves the answer most, {by_layer[best]:.0%} of the way")
by_head = [moved(f"blocks.{best}.attn.hook_z", head) for head in range(n_heads)]
print(f"its heads patched: {', '.join(f'{share:.0%}' for share in by_head)}")
