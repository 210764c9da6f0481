"""A pipeline as people have it: a Hugging Face model in nnsight, and which layer's MLP an answer comes from.

A small GPT-2 learns 24 facts (relation, subject) -> object. Then the MLP of a layer gets, at the last position, the
output that it has for another prompt: does the answer follow? See nnsight_pipeline_with_apd.py for the same with APD.
"""

import torch
import torch.nn.functional as F
from nnsight import NNsight
from transformers import GPT2Config, GPT2LMHeadModel

N_FACTS, N_OBJECTS = 24, 12
torch.manual_seed(0)
prompts = torch.stack([torch.full((N_FACTS,), N_FACTS), torch.arange(N_FACTS)], 1)  # the relation, then the subject
objects = N_FACTS + 1 + torch.arange(N_FACTS) % N_OBJECTS
config = GPT2Config(
    vocab_size=N_FACTS + 1 + N_OBJECTS, n_positions=2, n_embd=32, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0
)
gpt2 = GPT2LMHeadModel(config).eval()
optimizer = torch.optim.AdamW(gpt2.parameters(), lr=3e-3)
for _ in range(300):
    optimizer.zero_grad()
    F.cross_entropy(gpt2(prompts).logits[:, -1], objects).backward()
    optimizer.step()

model = NNsight(gpt2.requires_grad_(False))
others, other_objects = prompts.roll(1, 0), objects.roll(1)
with model.trace(prompts):
    logits = model.lm_head.output[:, -1].save()
print(f"answers right: {(logits.argmax(-1) == objects).float().mean():.1%}")
for layer in range(config.n_layer):
    with model.trace(others):
        given = model.transformer.h[layer].mlp.output[:, -1].save()
    with model.trace(prompts):
        model.transformer.h[layer].mlp.output[:, -1] = given
        logits = model.lm_head.output[:, -1].save()
    print(f"MLP {layer} of another prompt: {(logits.argmax(-1) == other_objects).float().mean():.1%} of answers follow")
