"""Forward passes of the user's model: watched (x and y of every use are kept) and replaced (components for weights)."""

import weakref
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from apd_lens._errors import InvalidOutput, ShapeMismatch, SiteNotCalled, UnsupportedModel
from apd_lens._memory import at_once, slices
from apd_lens._processes import gathered
from apd_lens.components._components import ParameterComponents
from apd_lens.data._batch import Batch
from apd_lens.data._finite import Reading, count_not_finite, on_gpu, raise_first
from apd_lens.data._inputs import Inputs
from apd_lens.data._points import Valid, padded, zero_at_padding
from apd_lens.host._adapter import Intercept
from apd_lens.host._fingerprints import mark_of_model
from apd_lens.host._matrix import Use
from apd_lens.host._patch import outside_traces
from apd_lens.host._sites import activations_kept
from apd_lens.host._target import TargetModel
from apd_lens.passes._output import OutputFn, explained_call, no_batch_axis
from apd_lens.passes._prefix import Prefix, Recorder, Replay, is_worth_it
from apd_lens.passes._replace import Mixture

# How outputs are compared: as numbers, or as the distributions whose logits they are.
Compares = Literal["numbers", "distributions"]


# What a pass with a graph takes, in bytes of `WatchedPass.bytes_per_example`: between matrices there is as much again.
_GRAPH = 2


def fisher_coordinates(logits: Float[Tensor, "batch *pos n_outputs"]) -> Float[Tensor, "batch *pos n_outputs"]:
    """z_o = √(n p_o) (f_o − Σ_q p_q f_q), p = softmax(f) being constant: coordinates in which a small change is as long
    as it is in KL. The mean over outputs of δz² is the variance of δf under p, which is 2 KL(f ‖ f + δf) in nats.

    Source: the Fisher information of a softmax, diag(p) − p pᵀ.
    """
    p = logits.detach().softmax(-1)
    return (p * logits.shape[-1]).sqrt() * (logits - (p * logits).sum(-1, keepdim=True))


def reading_of_output(output: Tensor, where: str, watched: "WatchedPass | None" = None) -> Reading:
    """How many values of the target's output are NaN or infinite; of a watched pass also where they first appeared."""
    seen = None if watched is None else weakref.ref(watched)  # it may be read late, and is not to be kept for that

    def message(count: float) -> str:
        watched = None if seen is None else seen()
        first = "" if watched is None else f" They first appeared {watched.first_not_finite()}."
        return (
            f"{where}: the target output holds {count:.0f} values that are NaN or infinite; its input did not.{first} "
            "Nothing was computed from it."
        )

    return Reading(count_not_finite(output), message)


def check_finite_output(output: Tensor, where: str, watched: "WatchedPass | None" = None) -> None:
    """Raises NonFinite if the target's output holds NaN or infinity."""
    raise_first([reading_of_output(output, where, watched)])


@dataclass(frozen=True, eq=False)
class Call:
    """One call of a use in a watched forward: x `batch *pos d_in` (or rows `batch *pos`), y `batch *pos d_out`.

    x is without a graph, and a copy where the model writes to it, in this forward or before. x_in_graph is the model's
    own. y is in the graph of the output.
    """

    use: Use
    x: Tensor
    x_in_graph: Tensor
    y: Tensor


@dataclass(frozen=True, eq=False)
class Run:
    """What a pass is a pass of.

    Attributes:
        replaced: stands in the place of the named matrices; None for their own.
        compares: how outputs are compared: as numbers, or as the distributions whose logits they are (KL).
        in_fisher_metric: whether the pass ends with `fisher_coordinates` of the outputs.
    """

    target: TargetModel
    names: Sequence[str]
    inputs: Inputs
    output: OutputFn
    replaced: Intercept | None
    compares: Compares = "numbers"
    in_fisher_metric: bool = False

    @property
    def batch(self) -> Batch:
        """As the model was called with it."""
        return self.inputs.batch


@dataclass(eq=False)
class WatchedPass:
    """A forward pass in which every use of the chosen matrices was watched.

    Attributes:
        output: `batch *pos n_outputs`, with the graph from the calls' y to it; zero at padding.
        valid: False at padding.
        calls: in the order of the forward; a module that is used twice has two.
        others_after: the uses of other matrices after the first of these, and their x in the graph.
        hidden: activations of the named submodules, without a graph.
        run: what was run.
        jacobians: ∂output/∂y of every call (`Jacobians`), once computed and if few enough to keep.
        graph_freed: whether the graph was freed.
    """

    output: Tensor
    valid: Valid
    calls: list[Call]
    others_after: list[tuple[Use, Tensor]]
    hidden: dict[str, Tensor]
    run: Run
    jacobians: Any = None
    graph_freed: bool = False
    _in_fisher_metric: "WatchedPass | None" = None

    @property
    def has_jacobians(self) -> bool:
        """Whether gradients were pulled back through it, and kept."""
        return any(one.jacobians is not None for one in self._metrics)

    @property
    def can_be_attributed(self) -> bool:
        """Whether gradients can be pulled back through it, or were and have been kept."""
        return self.has_jacobians or not any(one.graph_freed for one in self._metrics)

    @property
    def _metrics(self) -> list["WatchedPass"]:
        return [self] if self._in_fisher_metric is None else [self, self._in_fisher_metric]

    def without_graph(self) -> "WatchedPass":
        """The same with the numbers alone."""
        calls = [Call(call.use, call.x, call.x, _stand_in(call.y)) for call in self.calls]
        fisher = self._in_fisher_metric
        if fisher is not None:
            fisher = replace(fisher, output=_stand_in(fisher.output), calls=calls, others_after=[], graph_freed=True)
        return replace(
            self,
            output=self.output.detach(),
            calls=calls,
            others_after=[],
            graph_freed=True,
            _in_fisher_metric=fisher,
        )

    def without_output(self) -> "WatchedPass":
        """The same with a stand-in for the output."""
        return replace(self, output=_stand_in(self.output))

    def tensors(self) -> list[Tensor]:
        """The ones that it holds."""
        jacobians = [part for one in self._metrics if one.jacobians is not None for part in one.jacobians.tensors()]
        return [self.output, *(call.x for call in self.calls), *self.hidden.values(), *jacobians]

    def free_graph(self) -> None:
        """Gives up the graph, and what is in it, of a pass whose gradients are no longer asked for."""
        for one in self._metrics:
            one.graph_freed = True
            one.others_after = []
            one.output = one.output.detach() if one is self else _stand_in(one.output)
            one.calls = [Call(call.use, call.x, call.x, _stand_in(call.y)) for call in one.calls]

    def of_all(self) -> "WatchedPass":
        """The pass over the batch of all processes, of which x alone is there. Its outputs are NaN: for them run it
        `again`."""
        whole = self.run.inputs.of_all
        if whole is self.run.inputs:
            return self
        calls = [
            Call(call.use, x, x, _nan(call.y, len(x)))
            for call in self.calls
            for x in [gathered(call.x, whole.n_examples)]
        ]
        run, output = replace(self.run, inputs=whole), _nan(self.output, whole.n_examples)
        return WatchedPass(output, whole.valid, calls, [], {}, run, graph_freed=True)

    def in_fisher_metric(self) -> "WatchedPass":
        """The same pass, on the same graph, that goes on to `fisher_coordinates` of its outputs."""
        if self._in_fisher_metric is None:
            with torch.enable_grad():
                z = zero_at_padding(fisher_coordinates(self.output), self.valid)
            self._in_fisher_metric = replace(self, output=z, run=replace(self.run, in_fisher_metric=True))
        return self._in_fisher_metric

    def check_padding_of_positions(self) -> None:
        """Raises ShapeMismatch where a matrix may have been used at an encoder's padding."""
        valid = self.run.inputs.encoder_valid
        for of_use in self.calls:
            if valid is not None and of_use.y.shape[:2] == valid.shape and not bool(valid.all()):
                raise ShapeMismatch(
                    f"{of_use.use.matrix} was used on {tuple(of_use.x.shape)}, which may be the encoder's positions, "
                    "and some are padding. Positions as data points, and ActivationAttribution, need the decoder's: "
                    'take granularity="example" and another attribution, or batches without padding in the encoder.'
                )

    def first_not_finite(self) -> str:
        """Where values are NaN or infinite first, in the order of the forward; not counted at padding."""
        for of_use in self.calls:
            for value, of in ((of_use.x, "input"), (of_use.y, "output")):
                if bool(count_not_finite(zero_at_padding(value, self.valid))):
                    return f"in the {of} of {of_use.use.matrix}, at {of_use.use.site}"
        return "behind the last decomposed matrix"

    def bytes_per_example(self) -> int:
        """About what a forward pass takes, without a graph: x and y of every use, and the output three times."""
        kept = [tensor for call in self.calls for tensor in (call.x, call.y)] + [x for _, x in self.others_after]
        numbers = sum(tensor[0].numel() for tensor in kept) + 3 * self.output[0].numel()
        return numbers * self.output.element_size()

    def pieces(self) -> list[slice]:
        """Examples whose pass with a graph fits into the `memory`."""
        n, kept = self.run.inputs.n_examples, sum(tensor.nbytes for tensor in self.tensors())
        return slices(n, at_once(n, _GRAPH * self.bytes_per_example(), kept))

    def again(self, components: ParameterComponents | None, examples: slice) -> "WatchedPass":
        """The same pass on some examples, with components in the place of the weights (None: as it was)."""
        return self.replacing(self.run.replaced if components is None else Mixture(components), examples)

    def replacing(self, replaced: Intercept | None, examples: slice) -> "WatchedPass":
        """The same pass on some examples, with this in the place of the weights."""
        run = self.run
        inputs = run.inputs.some(examples)
        watched = watched_pass(run.target, run.names, inputs, run.output, replaced=replaced, compares=run.compares)
        return watched.in_fisher_metric() if run.in_fisher_metric else watched

    def replicates(
        self, replaced: Intercept, examples: slice, n: int
    ) -> Float[Tensor, "replicated_examples *pos n_outputs"]:
        """The explained output on some examples, n times over, with this in the place of the weights. Not watched."""
        run = self.run
        inputs = run.inputs.some(examples).replicated(n)
        return replaced_pass(run.target, run.names, replaced, inputs, run.output)[0]

    def n_outputs(self, data_points: torch.Size) -> Float[Tensor, "batch *pos"]:
        """Number of outputs of each example, those at padding not counted. For positions of documents that a mask keeps
        apart in one row, that of the document: others cannot be changed from there."""
        valid = padded(self.output, self.valid)
        if valid is None:
            return self.output.new_full((len(self.output),), self.output[0].numel())
        lengths = self.run.inputs.document_lengths
        if lengths is None or lengths.shape != data_points:
            lengths = valid.sum(1)
        return (lengths.clamp_min(1) * self.output[0, 0].numel()).to(self.output)


def watched_pass(
    target: TargetModel,
    names: Sequence[str],
    batch: Batch | Inputs,
    output: OutputFn,
    hidden: Iterable[str] = (),
    replaced: Intercept | None = None,
    compares: Compares = "numbers",
) -> WatchedPass:
    """Runs the target on a batch, with `replaced` in the place of the named weights, and keeps x and y of every use."""
    _check_differentiable(target.model)
    inputs = target.read(batch)
    examples = inputs.n_examples
    calls: list[Call] = []
    others_after: list[tuple[Use, Tensor]] = []
    versions: list[int] = []  # autograd counts in-place changes
    observed = [name for name in target.weights if name not in names]

    def watch(use: Use, x: Tensor, original: Callable[[], Tensor], bias: Tensor | None) -> Tensor:
        if use.matrix not in names:
            if calls:
                others_after.append((use, x))
            return original()
        y = original() if replaced is None else replaced(use, x, original, bias)
        if inputs.main_axes == 1 and (len(y) != examples or y.ndim < 2):
            raise no_batch_axis(examples, f"{use.matrix} was used at {use.site} on {tuple(x.shape)}")
        if len(y) == 1 and examples > 1:  # shared by all examples, such as position embeddings
            x, y = (tensor.expand(examples, *tensor.shape[1:]) for tensor in (x, y))
        if len(y) != examples:
            raise ShapeMismatch(
                f"{use.matrix} was used at {use.site} on {tuple(x.shape)}, whose first axis is not the batch of "
                f"{examples} examples. Attributions need it there; leave this matrix out of `weights`."
            )
        if not y.requires_grad:
            y = y.detach().requires_grad_()
        is_written_to = target.changes_inputs or x._version > 0  # perhaps in memory that the next forward writes to
        calls.append(Call(use, x.detach().clone() if is_written_to else x.detach(), x, y))
        versions.append(x._version)
        return y.clone()  # the model may change it in place

    def start() -> None:
        calls.clear()
        others_after.clear()
        versions.clear()

    with torch.enable_grad():
        picked, has_nan, kept = _run(
            target, names, watch, inputs, output, hidden, observed, start, keep=replaced is None
        )
    if [call.x_in_graph._version for call in calls] != versions and not target.changes_inputs:
        target.changes_inputs = True
        return watched_pass(target, names, inputs, output, hidden, replaced, compares)
    if has_nan:
        calls[:] = [replace(call, x=without_nan(call.x)) for call in calls]
    if not picked.requires_grad:
        raise InvalidOutput(
            f"The explained output of this {type(target.model).__name__} has no gradient to any decomposed matrix: "
            "output=, or the model, detaches it or makes it under torch.no_grad, or it does not depend on them. Give "
            "an output= that picks what the model computed as it is."
        )
    return WatchedPass(
        output=picked,
        valid=inputs.valid,
        calls=calls,
        others_after=others_after,
        hidden={name: activation.detach() for name, activation in kept.items()},
        run=Run(target, names, inputs, output, replaced, compares),
    )


def watched_in_pieces(
    target: TargetModel,
    names: Sequence[str],
    batch: Batch | Inputs,
    output: OutputFn,
    hidden: Iterable[str] = (),
    compares: Compares = "numbers",
) -> WatchedPass:
    """`watched_pass`; where its graph does not fit into the `memory`, of some examples at a time, and without it."""
    inputs, hidden = target.read(batch), list(hidden)
    n, some = inputs.n_examples, examples_at_once(target, names, inputs)
    if some >= n:
        return watched_pass(target, names, inputs, output, hidden, compares=compares)
    parts, picked = list[WatchedPass](), list[Tensor]()
    for examples in slices(n, some):
        part = watched_pass(target, names, inputs.some(examples), output, hidden, compares=compares).without_graph()
        picked = picked or [part.output.new_empty(n, *part.output.shape[1:])]
        picked[0][examples] = part.output
        parts.append(part.without_output())
    calls = [
        Call(of_use[0].use, x, x, _nan(of_use[0].y, n))
        for of_use in zip(*(part.calls for part in parts), strict=True)
        for x in [torch.cat([call.x for call in of_use])]
    ]
    return WatchedPass(
        output=picked[0],
        valid=inputs.valid,
        calls=calls,
        others_after=[],
        hidden={name: torch.cat([part.hidden[name] for part in parts]) for name in hidden},
        run=Run(target, names, inputs, output, None, compares),
        graph_freed=True,
    )


def examples_at_once(target: TargetModel, names: Sequence[str], inputs: Inputs) -> int:
    """How many examples can be watched at once: all, unless `memory` limits it to fewer."""
    n, (graph, kept) = inputs.n_examples, _bytes_per_example(target, names, inputs)
    return at_once(n, graph, n * kept)


def _bytes_per_example(target: TargetModel, names: Sequence[str], inputs: Inputs) -> tuple[int, int]:
    """What a pass with a graph takes for an example, and what is kept of it, as far as shapes of matrices say it."""
    weights = list(target.weights.values())
    first = next(place for place, matrix in enumerate(weights) if matrix.name in names)
    bytes_each = inputs.n_positions * weights[first].parameter.element_size()
    n_outputs = max(max(matrix.d_in, matrix.d_out) for matrix in weights)  # a language model's, which are the most
    numbers = sum(len(matrix.uses) * (matrix.d_in + matrix.d_out) for matrix in weights[first:])
    kept = sum(len(matrix.uses) * matrix.d_in for matrix in weights if matrix.name in names)
    return _GRAPH * bytes_each * (numbers + 3 * n_outputs), bytes_each * (kept + n_outputs)


def _stand_in(tensor: Tensor) -> Tensor:
    """A tensor of the same shape that takes no memory."""
    return tensor.detach().new_zeros(()).expand(tensor.shape)


def _nan(tensor: Tensor, examples: int) -> Tensor:
    """NaN in the shape of a tensor of so many examples, which takes no memory."""
    return tensor.detach().new_full((), torch.nan).expand(examples, *tensor.shape[1:])


def as_it_is(use: Use, x: Tensor, original: Callable[[], Tensor], bias: Tensor | None) -> Tensor:
    """The host's own y."""
    return original()


def _check_differentiable(model: nn.Module) -> None:
    """Raises UnsupportedModel for a model made in inference mode, whose parameters can be in no graph."""
    if any(parameter.is_inference() for parameter in model.parameters()):
        raise UnsupportedModel(
            f"This {type(model).__name__} was made inside torch.inference_mode, so no gradient can go through it. Make "
            "or load it outside, or take a copy there: copy.deepcopy(model)."
        )


def _without_padding(run: Callable[[], Tensor], inputs: Inputs) -> tuple[Tensor, bool]:
    """The output of a pass with zeros at padding, and whether it was NaN there.

    A host may make NaN of padding that attends to nothing. It is no data; but its gradient, which is zero, would come
    out of a product with it as NaN for all positions. So the pass runs again, and keeps zeros for its gradient there.
    On a GPU this is not looked at, since it would have to be waited for.
    """
    picked = run()
    valid = padded(picked, inputs.valid)
    if valid is None:
        return picked, False
    has_nan = picked.requires_grad and not on_gpu(picked.device) and bool(picked.detach().isnan().any())
    if has_nan:
        with torch.autograd.graph.saved_tensors_hooks(without_nan, lambda saved: saved):
            picked = run()
    return zero_at_padding(picked, valid), has_nan


def without_nan(values: Tensor) -> Tensor:
    """The values with zeros for NaN."""
    return values.detach().nan_to_num(0, torch.inf, -torch.inf) if values.is_floating_point() else values


def replaced_pass(
    target: TargetModel,
    names: Sequence[str],
    replaced: Intercept,
    batch: Batch | Inputs,
    output: OutputFn,
    hidden: Iterable[str] = (),
) -> tuple[Tensor, dict[str, Tensor]]:
    """The explained output, and named hidden activations, with `replaced` in the place of the named weights.

    With inputs that were read before, what need not be run again in other passes over them is kept.
    """
    keep = isinstance(batch, Inputs)
    picked, _, kept = _run(target, names, replaced, target.read(batch), output, hidden, keep=keep)
    return picked, kept


def _run(
    target: TargetModel,
    names: Sequence[str],
    intercept: Intercept,
    inputs: Inputs,
    output: OutputFn,
    hidden: Iterable[str] = (),
    observed: Sequence[str] = (),
    start: Callable[[], None] = lambda: None,
    keep: bool = False,
) -> tuple[Tensor, bool, dict[str, Tensor]]:
    """One pass: the explained output, whether it was NaN at padding, and named hidden activations.

    What comes before the named matrices is not run where it was kept with the inputs, see `Prefix`.

    Args:
        start: called before each forward.
        keep: keeps it, if that is worth it.
    """
    hidden, key = list(hidden), tuple(names)
    prefix = None if hidden else _kept(target, names, inputs, output)
    keep = keep and not hidden and prefix is None and is_worth_it(names, target.weights)
    recorder, replay = Recorder(target.model), Replay(prefix)
    beside: Recorder | Replay = recorder if keep else replay

    def of_use(use: Use, x: Tensor, original: Callable[[], Tensor], bias: Tensor | None) -> Tensor:
        recorder.is_over = recorder.is_over or use.matrix in names
        return intercept(use, x, original, bias)

    def run() -> Tensor:
        start()
        beside.start()
        return explained_call(target, names, output, inputs, hidden)

    with (
        outside_traces(target.model),
        target.intercepted(names, of_use, observed, beside=beside.patches()),
        activations_kept(target.model, hidden) as kept,
    ):
        picked, has_nan = _without_padding(run, inputs)
        _check_kept(hidden, kept)
    if not replay.is_whole:  # the model went another way than when it was kept
        del inputs.kept[key]
        return _run(target, names, intercept, inputs, output, hidden, observed, start)
    if keep:
        _keep(target, names, inputs, output, recorder.prefix())
    return picked, has_nan, kept


def _kept(target: TargetModel, names: Sequence[str], inputs: Inputs, output: OutputFn) -> Prefix | None:
    """What is kept in front of these matrices, if the model is still what it was."""
    key = tuple(names)
    prefix = inputs.kept.get(key)
    if prefix is None:
        return None
    if prefix.mark != mark_of_model(target.model):
        del inputs.kept[key]
        return None
    if prefix.derived_of:
        del inputs.kept[key]
        _keep(target, names, inputs, output, prefix)
    return inputs.kept.get(key)


def _keep(target: TargetModel, names: Sequence[str], inputs: Inputs, output: OutputFn, prefix: Prefix) -> None:
    """Keeps a prefix with the inputs, if passes with such a one are as those without; the first one is looked at."""
    key, shape = tuple(names), prefix.shape
    if not prefix.kept:
        return
    if (key, shape) not in target.prefixes:
        try:
            with torch.no_grad():
                without = _run(target, names, as_it_is, inputs, output)[0]
                inputs.kept[key] = replace(prefix, derived_of=())
                again = _run(target, names, as_it_is, inputs, output)[0]
            is_right = key in inputs.kept and torch.equal(again, without)
            if prefix.derived_of:  # a product of fewer rows may be rounded otherwise
                apart = torch.finfo(again.dtype).eps ** 0.75 * without.norm()
                is_right = key in inputs.kept and bool((again - without).norm() <= apart)
            target.prefixes[key, shape] = is_right
        except Exception:  # whatever a host raises that reads what was not kept
            target.prefixes[key, shape] = False
    if target.prefixes[key, shape]:
        inputs.kept[key] = replace(prefix, derived_of=())
    else:
        inputs.kept.pop(key, None)


def _check_kept(names: Iterable[str], kept: dict[str, Tensor]) -> None:
    for name in names:
        if name not in kept:
            raise SiteNotCalled(f"The forward pass did not call {name!r}, whose activations were to be compared.")
