"""A causal trace as people do it in nnsight: at which layer, and at which token, does a model know the capital?

Each prompt runs with the country's embedding of another prompt, and layer by layer the residual stream of the clean run
is put back: at the country, and at the last token. Then the model goes on writing. See pipeline_nnsight_with_apd.py for
the same with APD.

python examples/language_model/pipeline_nnsight.py               # SmolLM2-135M-Instruct, a minute
python examples/language_model/pipeline_nnsight.py --stand-in    # a tiny model
"""

import argparse

import tasks
import torch
from nnsight import TransformersModel

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

with model.generate(tokens, max_new_tokens=3, do_sample=False) as tracer:
    written = tracer.result.save()
for row in written[:3]:
    print(repr(opened.tokenizer.decode(row.tolist())))
