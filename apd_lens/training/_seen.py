"""What is kept of a batch for the time that it comes again: the target never changes, so nothing of it is run twice.

Which batches come again is known of lists (`State.returning`). Kept are the inputs with what comes before the first
decomposed matrix, x of every use, the gradients of the outputs if they are the same each time, and the target's output.
They are kept as long as the user keeps the batch's tensors, the model is what it was, and they fit into `KEPT` bytes;
the outputs go first, since they are the largest and cost one pass.
"""

import hashlib
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from apd_lens.data._batch import Batch, Kept, are_texts, arguments, check_same_batch, ids_of, mapped, tensors_within
from apd_lens.data._finite import LateChecks, Reading, raise_first
from apd_lens.data._inputs import Inputs, readings_of_inputs
from apd_lens.host._fingerprints import mark_of_model
from apd_lens.host._target import TargetModel
from apd_lens.host._unchanged import short_digest
from apd_lens.passes._watch import WatchedPass, as_it_is, reading_of_output, replaced_pass, watched_in_pieces
from apd_lens.training._streams import Stream

# Bytes that all batches together may take.
KEPT = 2**30


@dataclass(frozen=True, eq=False)
class Seen:
    """A batch as the user gave it, and the target's pass over it.

    Attributes:
        stream: the name of the stream that it is of.
        watched: the pass; None where its graph was needed and was freed.
        has_output: whether the pass still has the output, and not a stand-in for it.
        readings: of the batch and the target's output; looked at already where checks are not late.
        mark: of the model, which may be changed beside the decomposed matrices.
    """

    stream: str
    kept: Kept
    inputs: Inputs
    watched: WatchedPass | None
    has_output: bool
    readings: list[Reading]
    mark: tuple[Any, ...]

    @property
    def pass_(self) -> WatchedPass:
        """The pass, of a batch that was watched in this step."""
        assert self.watched is not None
        return self.watched

    @cached_property
    def n_bytes(self) -> int:
        """What it takes, without what the user keeps."""
        held = [*self.kept.copies, *(one for prefix in self.inputs.kept.values() for one in prefix.tensors())]
        if self.watched is not None:
            held += self.watched.tensors()
        return sum(tensor.untyped_storage().nbytes() for tensor in held)


def watch(
    seen: Sequence[Seen],
    stream: Stream,
    batch: Batch,
    target: TargetModel,
    names: Sequence[str],
    device: torch.device,
    late: LateChecks | None,
    where: str,
) -> Seen:
    """The target's pass over this process's part of the batch: that which was kept, if this is the same batch again.

    Raises:
        NonFinite: NaN or infinity in the batch or in the target's output, unless checks are late.
        InvalidBatches: other processes were given another batch, or there are more of them than examples.
    """
    check_same_batch(batch, where)
    found, mark, losses = _found(seen, stream.name, batch), mark_of_model(target.model), stream.losses
    if found is not None and found.mark != mark:
        found = None
    if found is not None and found.watched is not None:
        usable = found.watched.can_be_attributed or not stream.masking.needs_gradients
        if usable and found.has_output:
            return found
        if usable:
            with torch.no_grad():
                again, _ = replaced_pass(target, names, as_it_is, found.inputs, stream.output)
            return replace(found, watched=replace(found.watched, output=again), has_output=True)
    kept, inputs = _read(batch, target, device) if found is None else (found.kept, found.inputs)
    inputs = inputs if inputs.whole is not None else inputs.own()
    readings = readings_of_inputs(inputs, where)
    if late is None:
        raise_first(readings)
    watched = watched_in_pieces(target, names, inputs, stream.output, hidden=losses.hidden_at, compares=losses.compares)
    readings.append(reading_of_output(watched.output, where, watched))
    if late is None:
        raise_first(readings[-1:])
    return Seen(stream.name, kept, inputs, watched, True, readings, mark)


def before_training(stream: str, batch: Batch, target: TargetModel, device: torch.device, where: str) -> Seen:
    """A batch that is looked at before the first step; what is kept with its inputs serves the steps.

    Raises:
        NonFinite: NaN or infinity in it.
    """
    kept, inputs = _read(batch, target, device)
    raise_first(readings_of_inputs(inputs, where))
    return Seen(stream, kept, inputs, None, False, [], mark_of_model(target.model))


def digest_of(batch: Batch) -> str:
    """Equal for batches of the same numbers and texts, whatever the device. Of large tensors a part is looked at."""
    args, kwargs = arguments(batch)

    def told(value: Any) -> str:
        if value is None or isinstance(value, str | int | float) or are_texts(value):
            return repr(value)
        return f"{type(value).__name__} {' '.join(map(short_digest, tensors_within(value)))}"

    parts = [f"{key}={told(value)}" for key, value in [*enumerate(args), *sorted(kwargs.items())]]
    return hashlib.blake2b(" ".join(parts).encode(), digest_size=8).hexdigest()


def _found(seen: Sequence[Seen], stream: str, batch: Batch) -> Seen | None:
    ids = ids_of(batch)
    return next((one for one in seen if one.stream == stream and one.kept.ids == ids and one.kept.is_same(batch)), None)


def _read(batch: Batch, target: TargetModel, device: torch.device) -> tuple[Kept, Inputs]:
    """By aliases, so that what is kept does not keep the user's tensors alive."""
    aliased = mapped(batch, lambda _, value: value.detach() if isinstance(value, Tensor) else value)
    return Kept.of(batch), target.read(aliased, device)


def remembered(
    seen: Sequence[Seen],
    now: Sequence[Seen],
    streams: Sequence[Stream],
    late: LateChecks | None,
    returning: Collection[str],
) -> tuple[Seen, ...]:
    """What is kept after a step: the batches of now, and of streams whose batches come again those of before that the
    user still has. With late checks the passes of now stay whole until the next step, since they say where NaN first
    appeared."""
    of_name = {stream.name: stream for stream in streams}
    of_now = {id(one.kept) for one in now}
    before = [
        _lasting(one, of_name[one.stream])
        for one in seen
        if one.stream in returning and id(one.kept) not in of_now and one.kept.is_alive
    ]
    left = KEPT - sum(one.n_bytes for one in before)
    after = []
    for one in now:
        if not one.kept.copies:
            continue
        needs_graph = _needs_its_graph(one, of_name[one.stream])
        kept = one if late is not None or needs_graph else _without_graph(one)
        if needs_graph and late is None and one.pass_.graph_freed:  # the pass is of no use any more
            kept = replace(one, watched=None, has_output=False)
        elif kept.n_bytes > left and before:
            kept = replace(kept, watched=kept.pass_.without_output(), has_output=False)
        if kept.n_bytes > left and before:
            continue
        left -= kept.n_bytes
        after.append(kept)
    return (*before, *after)


def _lasting(seen: Seen, stream: Stream) -> Seen:
    """A batch of an earlier step. Its pass is given up where only the graph is of use."""
    if seen.watched is None or seen.watched.output.grad_fn is None:
        return seen
    return replace(seen, watched=None, has_output=False) if _needs_its_graph(seen, stream) else _without_graph(seen)


def _needs_its_graph(seen: Seen, stream: Stream) -> bool:
    return stream.masking.needs_gradients and not seen.pass_.has_jacobians


def _without_graph(seen: Seen) -> Seen:
    return replace(seen, watched=seen.pass_.without_graph())
