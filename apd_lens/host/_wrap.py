"""Finding the adapter that knows a model."""

import importlib.metadata
from typing import Any

from torch import nn

from apd_lens._errors import UnsupportedModel
from apd_lens.host._target import TargetModel
from apd_lens.host._torch_modules import TorchAdapter


def wrap(model: Any, *, biases: bool = False) -> TargetModel:
    """Lists the weight matrices of a model by name, ready to be decomposed. Changes nothing on the model.

    The packages in which the model's classes are defined choose the host's own `wrap` (entry-point group
    "apd_lens.adapters"), so no host is imported that is not in use. Any other torch module is taken apart by its
    leaves.

    Args:
        biases: decompose biases too, each as one more row of its matrix. Then P_c is `d_in + 1 d_out`, x stands for [x,
            1], and the sparse model computes Σ_c s_c (x P_c + b_c). Otherwise biases are always on.

    Raises:
        UnsupportedModel: not a model that any adapter knows, or one without a matrix, or a bias, that can be
            decomposed.
    """
    if biases:
        return wrap(model).with_biases()
    if isinstance(model, TargetModel):
        return model
    packages = {cls.__module__.partition(".")[0] for cls in type(model).__mro__}
    for entry_point in importlib.metadata.entry_points(group="apd_lens.adapters"):
        if entry_point.name in packages:
            return entry_point.load()(model)
    if isinstance(model, nn.Module):
        return TargetModel(model, TorchAdapter())
    raise UnsupportedModel(
        f"Expected a model, got {type(model).__module__}.{type(model).__qualname__}, which is not supported. Could be "
        "decomposed: a torch.nn.Module, a transformer_lens model or an nnsight model."
    )
