"""apd_lens for nnsight: the module behind an `NNsight` model, whatever host it is of.

Interception goes to the forward that nnsight's controller runs (see `apd_lens.host._patch`), so a decomposition works
the same on the module, on an envoy made of it before or after, and inside a trace of the user's.
"""

from functools import partial
from typing import Any

from apd_lens._errors import MissingExtra, UnsupportedModel
from apd_lens.host import TargetModel, are_texts
from apd_lens.host import wrap as wrap_module

try:
    from nnsight import Envoy
except ImportError as error:
    raise MissingExtra(
        "apd_nnsight needs nnsight 0.8 or newer. Install it with pip install 'apd-lens[nnsight]'"
    ) from error


def wrap(model: Any) -> TargetModel:
    """The weight matrices of the module that an nnsight model was made of, under the module's own names.

    Edits that are stored with `model.edit` belong to traces and are no part of the module.
    """
    if not isinstance(model, Envoy):
        raise UnsupportedModel(
            f"{type(model).__module__}.{type(model).__name__} cannot be decomposed. Of nnsight, could be: a whole "
            "model, such as NNsight(module) or a TransformersModel."
        )
    if model._parent is not None:
        raise UnsupportedModel(
            f"Expected a whole nnsight model, got its part {model.path}. Give the whole, and choose its matrices "
            f"by name: weights=['{model.path.partition('.')[2]}.*']."
        )
    if any(parameter.is_meta for parameter in model._module.parameters()):
        raise UnsupportedModel(
            f"The weights of this {type(model).__name__} are not loaded yet: they are on the meta device. Load them "
            "first; a TransformersModel does with dispatch=True."
        )
    target = wrap_module(model._module)
    return TargetModel(target.model, target.adapter, prepare=partial(_model_inputs, model))


def _model_inputs(model: Envoy, batch: Any) -> Any:
    """What a trace calls the module with: a TransformersModel takes text and makes tokens of it."""
    if not hasattr(type(model), "_call") or not (isinstance(batch, str) or are_texts(batch)):
        return batch
    batch = batch if isinstance(batch, str) else list(batch)
    _, inputs = model._batch([((batch,), {})], model._call)
    return inputs
