"""A step of a targeted decomposition on SmolLM2-135M's shapes with random weights, beside the passes that it makes.

W_V and W_O of layer 23, 47 components of rank 6, 39 prompts of 5 tokens explained at their last position, 4 texts of 32
tokens explained everywhere. The batches come again, as in a training on lists. Medians of rounds in one run:

    step      of what the bare layers 23 to 29 take for its three forward and backward passes (two on the prompts, one
              on the texts), and of what the bare model takes
    memory    what steps take at most beside the model, of what the bare model's forward and backward takes (on Linux)
"""

import argparse
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from timing import save, seconds
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

import apd_lens as apd

LAYER = 23


def smollm2_shapes() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
        num_key_value_heads=3, tie_word_embeddings=True, rope_theta=100_000.0, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval().requires_grad_(False)


def batches() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(49152, (39, 5), generator=generator), torch.randint(49152, (4, 32), generator=generator)


class Suffix(torch.nn.Module):
    """The layers from the decomposed one on, with the model's own norm and unembedding."""

    def __init__(self, model: LlamaForCausalLM) -> None:
        super().__init__()
        self.model = model

    def forward(self, residual: Tensor, at_last: bool) -> Tensor:
        positions = torch.arange(residual.shape[1])[None]
        rotary = self.model.model.rotary_emb(residual, positions)
        for layer in self.model.model.layers[LAYER:]:
            residual = layer(residual, position_embeddings=rotary, position_ids=positions)
        normed = self.model.model.norm(residual)
        return self.model.lm_head(normed[:, -1].contiguous() if at_last else normed)


def forward_and_backward(run: Callable[[], Tensor]) -> None:
    logits = run()
    (-logits.log_softmax(-1)[..., 0]).mean().backward()


def training(model: LlamaForCausalLM) -> Callable[[], None]:
    """A function that takes a step on batches that were seen before."""
    prompts, texts = batches()
    settings = apd.language_model()
    settings["optimization"] = apd.Optimization(steps=1000, lr=1e-3, scaled=False)
    weights = [f"model.layers.{LAYER}.self_attn.{name}_proj*" for name in "vo"]
    state = apd.init(model, weights=weights, n_components=47, **settings)
    state, _ = apd.step(state, prompts, texts)

    def step() -> None:
        nonlocal state
        state, _ = apd.step(state, prompts, texts)

    return step


def bare(model: LlamaForCausalLM) -> Callable[[], None]:
    """A function that runs the whole model forward and backward, with gradients of the embeddings."""
    prompts, texts = batches()
    embeddings = model.get_input_embeddings()

    def run() -> None:
        for batch in (prompts, texts):
            forward_and_backward(lambda batch=batch: model(inputs_embeds=embeddings(batch).requires_grad_()).logits)

    return run


def peak_of(what: str) -> float:
    """What three runs of something take at most beside what was there before them, in GB; in a process of its own."""
    out = subprocess.run([sys.executable, __file__, "--peak-of", what], capture_output=True, text=True, check=True)
    return float(out.stdout.split()[-1])


def resident(name: str) -> float:
    """A number of /proc/self/status, in GB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(float(line.split()[1]) / 1e6 for line in lines if line.startswith(name))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--peak-of", choices=("step", "bare"))
    arguments = parser.parse_args()
    if arguments.peak_of:
        model = smollm2_shapes()
        before = resident("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # forgets the peak so far
        run = training(model) if arguments.peak_of == "step" else bare(model)
        for _ in range(3):
            run()
        print(resident("VmHWM") - before)
        return
    model, (prompts, texts) = smollm2_shapes(), batches()
    step, whole = training(model), bare(model)
    suffix = Suffix(model)
    streams = [torch.randn(*batch.shape, 576).requires_grad_() for batch in (prompts, texts)]

    def passes() -> None:
        for stream, at_last in ((streams[0], True), (streams[0], True), (streams[1], False)):
            forward_and_backward(lambda stream=stream, at_last=at_last: suffix(stream, at_last))

    times: dict[str, list[float]] = {"step": [], "passes": [], "whole": []}
    for run in (step, passes, whole):
        run()
    for _ in range(arguments.rounds):
        for name, run in (("step", step), ("passes", passes), ("whole", whole)):
            times[name].append(seconds(run))
    row = {name: statistics.median(values) for name, values in times.items()}
    for name in ("passes", "whole"):
        row[f"step of {name}"] = statistics.median(a / b for a, b in zip(times["step"], times[name], strict=True))
    print(f"{torch.get_num_threads()} CPU threads, torch {torch.__version__}")
    print(f"step {1000 * row['step']:.0f} ms: {row['step of passes']:.2f} times its three passes of the bare layers")
    print(f"     {row['step of whole']:.2f} times one pass of the bare model over each batch")
    peaks = {what: peak_of(what) for what in ("step", "bare")}
    print(f"memory {peaks['step']:.2f} GB, bare {peaks['bare']:.2f} GB: {peaks['step'] / peaks['bare']:.2f} times")
    save("targeted", {**row, **{f"GB of {what}": peak for what, peak in peaks.items()}})


if __name__ == "__main__":
    main()
