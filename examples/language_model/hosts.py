"""The capitals taken apart through each library that a model may come from: the same numbers.

python examples/language_model/hosts.py               # a few steps in each, minutes on two cores
python examples/language_model/hosts.py --stand-in    # a tiny model, for a look at the code
"""

import argparse
import copy
from typing import Any

import tasks
from nnsight import NNsight
from transformer_lens import HookedTransformer, HookedTransformerConfig
from transformer_lens.model_bridge.sources._bridge_builder import build_bridge_from_module
from transformer_lens.pretrained.weight_conversions import convert_llama_weights

import apd_lens as apd


def hooked_transformer(model: Any) -> HookedTransformer:
    """A Llama of Hugging Face as a HookedTransformer. That knows no SmolLM2 by name, but every part of one."""
    of = model.config
    config = HookedTransformerConfig(
        n_layers=of.num_hidden_layers, d_model=of.hidden_size, d_head=of.head_dim, n_heads=of.num_attention_heads,
        n_key_value_heads=of.num_key_value_heads, d_mlp=of.intermediate_size, d_vocab=of.vocab_size,
        n_ctx=min(of.max_position_embeddings, 512), act_fn="silu", gated_mlp=True, normalization_type="RMS",
        final_rms=True, eps=of.rms_norm_eps, positional_embedding_type="rotary", rotary_dim=of.head_dim,
        rotary_base=int(of.rope_parameters["rope_theta"]), rotary_adjacent_pairs=False, device="cpu",
    )  # fmt: skip
    hooked = HookedTransformer(config)
    hooked.load_state_dict(convert_llama_weights(model, config), strict=False)
    return hooked.eval()


def hosts(model: Any) -> dict[str, Any]:
    """By name; the model itself first. What a bridge is made of becomes its own, so that is a copy."""
    return {
        "Hugging Face": model,
        "nnsight": NNsight(model),
        "TransformerBridge": build_bridge_from_module(copy.deepcopy(model), "LlamaForCausalLM", hf_config=model.config),
        "HookedTransformer": hooked_transformer(model),
    }


def main(opened: tasks.Opened, layer: int, steps: int) -> None:
    """Prints a row for each host."""
    known = opened.capitals()
    prompts, first = known.prompts.input_ids, None
    print("| | KL on two components | forgotten | KL on others | largest difference of a KL | of a factor |")
    print("| --- | --- | --- | --- | --- | --- |")
    for name, host in hosts(opened.model).items():
        names = [f"model.layers.{layer}.self_attn.{kind}_proj.weight" for kind in "vo"]
        if name in ("TransformerBridge", "HookedTransformer"):
            names = [f"blocks.{layer}.attn.W_{kind}" for kind in "VO"]
        made = apd.decompose(
            host, list(prompts.split(20)), names, n_components=len(prompts) + 8, others=known.others[:16],
            progress=False, **apd.language_model(steps),
        )  # fmt: skip
        found, factors = apd.language.forgetting(made, prompts, progress=False), list(made.components.parameters())
        if first is None:
            first = found, factors
        kl = (found.kl_off - first[0].kl_off).abs().max()
        apart = max(((a - b).abs().max() / a.abs().max()).item() for a, b in zip(first[1], factors, strict=True))
        print(
            f"| {name} | {found.kl_sparse.mean():.2e} | {int(found.forgotten.sum())} of {len(prompts)} "
            f"| {found.kl_others:.2e} | {kl:.0e} | {apart:.0e} |",
            flush=True,
        )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=3)
    options = tasks.parsed(parser)
    main(tasks.opened(options), 0 if options.stand_in else 23, options.steps)
