"""nnsight_pipeline.py with ten lines changed: the same patching, on one parameter component a prompt.

MLP 0 is taken apart into components that span both its matrices. Then every prompt runs on its own component alone, and
the pipeline's traces and patches go on as they were, on top of that.
"""

import torch
import torch.nn.functional as F
from nnsight import NNsight
from transformers import GPT2Config, GPT2LMHeadModel

import apd_lens as apd

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
losses = apd.Losses(30, 1, apd.HoldThenDecay(0.06), simplicity_floor=0, path=2)
settings = {"n_components": 40, "rank": 4, "selection": apd.TopK(1), "moves": apd.moves.SplitMoves(), "losses": losses}
optimization = apd.Optimization(steps=2000, lr=3e-3, scaled=False, init_scale=1)
decomposition = apd.decompose(model, [prompts], ["transformer.h.0.mlp.*"], optimization=optimization, **settings)
mask = decomposition.select(prompts)
print(f"components, one alone a prompt: {len(set(mask.float().argmax(1).tolist()))} for {N_FACTS} facts")
others, other_objects = prompts.roll(1, 0), objects.roll(1)
with decomposition.sparse(mask), model.trace(prompts):
    logits = model.lm_head.output[:, -1].save()
print(f"answers right: {(logits.argmax(-1) == objects).float().mean():.1%}")
for layer in range(config.n_layer):
    with model.trace(others):
        given = model.transformer.h[layer].mlp.output[:, -1].save()
    with decomposition.sparse(mask), model.trace(prompts):
        model.transformer.h[layer].mlp.output[:, -1] = given
        logits = model.lm_head.output[:, -1].save()
    print(f"MLP {layer} of another prompt: {(logits.argmax(-1) == other_objects).float().mean():.1%} of answers follow")
