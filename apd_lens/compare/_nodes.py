"""Nodes of the architecture: layers, matrices, heads and neurons, by name."""

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from jaxtyping import Int
from torch import Tensor

from apd_lens._errors import InvalidSetting
from apd_lens.host._matrix import Units
from apd_lens.host._target import TargetModel

Level = Literal["matrix", "layer", "head", "mlp", "neuron"]


def layer_of(name: str) -> int | None:
    """The layer of a matrix: the first part of its name that is a number; None if there is none.

    >>> layer_of("blocks.3.attn.W_Q"), layer_of("transformer.h.11.mlp.c_fc.weight"), layer_of("embed.W_E")
    (3, 11, None)
    """
    return next((int(part) for part in name.split(".") if part.isdecimal()), None)


def node_name(level: Literal["head", "neuron"], layer: int | None, unit: int) -> str:
    """Of a head "a3.7", of a neuron "m3.12"; "a7" and "m12" in a model without layers."""
    return f"{'a' if level == 'head' else 'm'}{'' if layer is None else f'{layer}.'}{unit}"


def units_by_name(
    target: TargetModel, names: Sequence[str], units: Mapping[str, Units] | None
) -> dict[str, Units | None]:
    """For each of these matrices its heads or neurons, as the adapter or the user says.

    Raises as `weight_map` does.
    """
    known = {name: target.weights[name].units for name in names}
    for pattern, given in (units or {}).items():
        known |= {name: given for name in target.match(pattern) if name in known}
    for name, of_matrix in known.items():
        if of_matrix is None:
            continue
        matrix = target.weights[name]
        width = matrix.d_out if of_matrix.side == "out" else matrix.d_in - (matrix.bias is not None)
        if of_matrix.number < 1 or of_matrix.copies < 1 or width % (of_matrix.number * of_matrix.copies):
            raise InvalidSetting(
                f"{name} is {matrix.d_in} × {matrix.d_out} (d_in × d_out): its {of_matrix.side} side of {width} cannot "
                f"be cut into blocks of one width as {of_matrix} says."
            )
    return known


def unit_numbers(units: Units, width: int) -> Int[Tensor, " width"]:
    """The unit that each row or column of the side belongs to; `units.number` for the row of a bias."""
    per_block = width // (units.number * units.copies)
    numbers = torch.arange(units.number, device="cpu").repeat_interleave(per_block).repeat(units.copies)
    return torch.cat([numbers, torch.full((width - len(numbers),), units.number, device="cpu")])
