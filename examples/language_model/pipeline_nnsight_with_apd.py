"""pipeline_nnsight.py with nine lines changed: the same trace, and what the model writes without a component.

Values and outputs of the attention layer that brings the capital to the last token are taken apart into components.
Then each prompt goes on without the component that is active on it alone.

python examples/language_model/pipeline_nnsight_with_apd.py               # SmolLM2-135M-Instruct, minutes
python examples/language_model/pipeline_nnsight_with_apd.py --stand-in    # a tiny model
"""

import argparse

import tasks
import torch
from nnsight import TransformersModel

import apd_lens as apd

opened = tasks.opened(tasks.parsed(argparse.ArgumentParser()))
known = opened.capitals()
tokens, answers = known.of_one_length()
others, rows = tokens.roll(1, 0), torch.arange(len(tokens))
(places,) = (tokens != others).any(0).nonzero(as_tuple=True)  # of the country
country = int(places[-1])
model = TransformersModel(opened.model.requires_grad_(False), tokenizer=opened.tokenizer)
layers = model.model.layers


def probability(logits: torch.Tensor) -> float:
    """Of the right answers, mean over prompts."""
    return logits[:, -1].softmax(-1)[rows, answers].mean().item()


clean = []
with model.trace() as tracer:
    with tracer.invoke(tokens):
        for layer in layers:
            clean.append(layer.output.save())  # noqa: PERF401, a trace has no comprehensions
        whole = model.lm_head.output.save()
    with tracer.invoke(others):
        corrupted = model.lm_head.output.save()
print(f"the right answer: {probability(whole):.1%}, with another country {probability(corrupted):.1%}")

for name, place in (("the country", country), ("the last token", -1)):
    restored = []
    for number, layer in enumerate(layers):
        with model.trace(others):
            layer.output[:, place] = clean[number][:, place]
            logits = model.lm_head.output.save()
        restored.append(probability(logits))
    print(f"put back at {name}: {' '.join(f'{share:.0%}' for share in restored)}")

best = max(range(len(restored)), key=lambda number: restored[number] - [0.0, *restored][number])
weights = [f"model.layers.{best}.self_attn.{kind}_proj.weight" for kind in "vo"]
settings = {"n_components": len(tokens) + 8, "others": known.others[:16], **apd.language_model(0)}
decomposition = apd.decompose(model, [tokens], weights, **settings)
active = decomposition.select(tokens).float()
own = active * (active.sum(0) == 1)
with decomposition.sparse(1 - own, rest=1.0), model.generate(tokens, max_new_tokens=3, do_sample=False) as tracer:
    written = tracer.result.save()
for row in written[:3]:
    print(repr(opened.tokenizer.decode(row.tolist())))
