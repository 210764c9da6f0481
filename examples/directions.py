"""The directions that components read and write, as plain tensors: used with torch and safetensors alone.

Five sparse features pass through two dimensions. The first matrix is taken apart, its directions are written to a file,
and `use` knows nothing but that file and the model. It takes a component out of the weights by hand, and steers: what
the component writes for one input is added to the model's hidden state for another. Printed is how far the first is
from `decomposition.ablate`, and what the second does to the output. A few seconds.

    python examples/directions.py
"""

import argparse
import copy
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

import apd_lens as apd


@torch.no_grad()
def use(file: Path, model: nn.Sequential, c: int, source: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """Outputs for x: without component c, and with what it writes for `source` added."""
    directions = load_file(file)
    read, write = directions["0.weight.read"][c], directions["0.weight.write"][c]  # rank d_in, rank d_out
    without = copy.deepcopy(model)
    without[0].weight -= (read.T @ write).T  # torch keeps the transpose of W
    hidden = model[0](x) + (source @ read.T) @ write
    return without(x), model[1:](hidden)


def trained(steps: int) -> tuple[nn.Sequential, list[Tensor]]:
    """A model that gives its inputs back, and data: mostly one feature at a time."""
    torch.manual_seed(0)
    data = [torch.rand(512, 5) * (torch.rand(512, 5) < 0.1) for _ in range(20)]
    model = nn.Sequential(nn.Linear(5, 2, bias=False), nn.Linear(2, 5), nn.ReLU())
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for step in range(steps):
        optimizer.zero_grad()
        F.mse_loss(model(data[step % 20]), data[step % 20]).backward()
        optimizer.step()
    return model.requires_grad_(False), data


def main(file: Path, steps: int) -> None:
    model, data = trained(steps)
    settings = {"n_components": 5, "rank": 1, "progress": False}
    decomposition = apd.decompose(model, data, "0.weight", **settings, optimization=apd.Optimization(steps=steps))
    decomposition.export_directions(file)
    features = torch.eye(5)
    A = decomposition.attributions(features)
    source, c = divmod(int(A.argmax()), 5)
    without, steered = use(file, model, c, features[source], features)
    with decomposition.ablate(c):
        ablated = model(features)
    print(f"component {c} taken out by hand: {(ablated - without).abs().max():.1e} from decomposition.ablate({c}),")
    print(f"which moves outputs by up to {(ablated - model(features)).abs().max():.2f}")
    for feature in range(5):
        came = f"{model(features)[feature, source]:.2f} -> {steered[feature, source]:.2f}"
        print(f"input {feature}, with what component {c} writes for input {source}: output {source} {came}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=2000, help="training steps, of the model and of its components")
    parser.add_argument("--out", type=Path, default=Path("out/directions.safetensors"), help="file to write")
    arguments = parser.parse_args()
    main(arguments.out, arguments.steps)
