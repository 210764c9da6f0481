"""Forward passes of the user's model: watched (x and y of every use are kept) and replaced (components for weights)."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from apd_lens._batches import Batch, call, n_examples, some_examples
from apd_lens._components import ParameterComponents
from apd_lens._errors import InvalidOutput, InvalidSetting, NonFinite, ShapeMismatch, SiteNotCalled
from apd_lens._padding import Real, padded, real_positions, zero_at_padding
from apd_lens._patch import outside_traces
from apd_lens._product import Mask, active_pairs, masked_product
from apd_lens._target import Intercept, TargetModel, Use

# Picks the tensor `batch *pos n_outputs` that is explained from the model's return value.
OutputFn = Callable[[Any], Any]


def default_output(value: Any) -> Any:
    """A tensor as it is, `.logits` of a Hugging Face output."""
    return getattr(value, "logits", value)


def explained_output(output: OutputFn, value: Any, examples: int) -> Tensor:
    """What `output` picks from the model's return value, checked.

    Raises:
        InvalidOutput: no floating-point tensor.
        ShapeMismatch: not `batch *pos n_outputs` with the batch's number of examples.
    """
    picked = output(value)
    if not isinstance(picked, Tensor) or not picked.is_floating_point():
        came = f"a tensor of {picked.dtype}" if isinstance(picked, Tensor) else type(picked).__name__
        raise InvalidOutput(
            f"Expected the model's output to be a floating-point tensor, got {came}. Give output=, a function that "
            "picks the tensor to explain from what the model returns, such as output=lambda out: out[0]."
        )
    if picked.ndim < 2 or len(picked) != examples:
        raise ShapeMismatch(
            f"Expected an output of shape (batch, *pos, n_outputs) with {examples} examples, got "
            f"{tuple(picked.shape)}. Give output=, a function that picks such a tensor from what the model returns."
        )
    return picked


def check_finite_output(output: Tensor, where: str) -> None:
    """Raises NonFinite if the target's output holds NaN or infinity."""
    if not bool(output.isfinite().all()):
        raise NonFinite(
            f"{where}: the target output holds {int((~output.isfinite()).sum())} values that are NaN or infinite; its "
            "input did not. Nothing was computed from it."
        )


@dataclass(frozen=True, eq=False)
class Call:
    """One call of a use in a watched forward: x `batch *pos d_in` (or rows `batch *pos`), y `batch *pos d_out`.

    x is a copy without a graph, x_in_graph the model's own; y is in the graph of the output.
    """

    use: Use
    x: Tensor
    x_in_graph: Tensor
    y: Tensor


@dataclass(eq=False)
class WatchedPass:
    """A forward pass in which every use of the chosen matrices was watched.

    Attributes:
        output: `batch *pos n_outputs`, with the graph from the calls' y to it; zero at padding.
        real: False at padding.
        calls: in the order of the forward; a module that is used twice has two.
        before_others: x of the uses of all other matrices, in the graph.
        hidden: activations of the named submodules, without a graph.
        again: the same pass with components in the place of the weights (None: the target's own), on some examples.
        jacobians: ∂output/∂y of every call, once they were computed and if they were few enough to keep.
        spent: whether the graph was freed.
    """

    output: Tensor
    real: Real
    calls: list[Call]
    before_others: list[Tensor]
    hidden: dict[str, Tensor]
    again: Callable[[ParameterComponents | None, slice], "WatchedPass"]
    jacobians: list[Tensor | None] | None = None
    spent: bool = False

    def n_outputs(self) -> Float[Tensor, " batch"]:
        """Number of outputs of each example, those at padding not counted."""
        real = padded(self.output, self.real)
        if real is None:
            return torch.full((len(self.output),), self.output[0].numel()).to(self.output)
        return (real.sum(1).clamp_min(1) * self.output[0, 0].numel()).to(self.output)


def watched_pass(
    target: TargetModel,
    names: Sequence[str],
    batch: Batch,
    output: OutputFn,
    hidden: Iterable[str] = (),
    components: ParameterComponents | None = None,
) -> WatchedPass:
    """Runs the target on a batch and keeps x and y of every use; with `components`, on their sum instead."""
    examples = n_examples(batch)
    calls: list[Call] = []
    before_others: list[Tensor] = []
    observed = [name for name in target.weights if name not in names]
    replaced = None if components is None else replace_weights(components)

    def watch(use: Use, x: Tensor, original: Callable[[], Tensor], bias: Tensor | None) -> Tensor:
        if use.matrix not in names:
            before_others.append(x)
            return original()
        y = original() if replaced is None else replaced(use, x, original, bias)
        if len(y) == 1 and examples > 1:  # shared by all examples, such as position embeddings
            x, y = (tensor.expand(examples, *tensor.shape[1:]) for tensor in (x, y))
        if len(y) != examples:
            raise ShapeMismatch(
                f"{use.matrix} was used at {use.site} on {tuple(x.shape)}, whose first axis is not the batch of "
                f"{examples} examples. Attributions need it there; leave this matrix out of `weights`."
            )
        if not y.requires_grad:
            y = y.detach().requires_grad_()
        calls.append(Call(use, x.detach().clone(), x, y))
        return y.clone()  # the model may change it in place

    with (
        torch.enable_grad(),
        outside_traces(target.model),
        target.intercepted(names, watch, observed),
        _activations(target.model, hidden) as kept,
    ):
        picked = explained_output(output, call(target.model, batch), examples)
        real = real_positions(batch)
        picked = zero_at_padding(picked, real)
    return WatchedPass(
        output=picked,
        real=real,
        calls=calls,
        before_others=before_others,
        hidden={name: activation.detach() for name, activation in kept.items()},
        again=lambda other, examples: watched_pass(
            target, names, some_examples(batch, examples), output, components=other
        ),
    )


def sparse_pass(
    target: TargetModel,
    components: ParameterComponents,
    batch: Batch,
    mask: Mask,
    output: OutputFn,
    hidden: Iterable[str] = (),
    n_active: int | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The explained output, and named hidden activations, of the model run on Σ_c mask_c P_c for each data point."""
    replaced = replace_weights(components, mask, n_active)
    with (
        outside_traces(target.model),
        target.intercepted(components.names, replaced),
        _activations(target.model, hidden) as kept,
    ):
        picked = explained_output(output, call(target.model, batch), n_examples(batch))
        return zero_at_padding(picked, real_positions(batch)), kept


def replace_weights(
    components: ParameterComponents, mask: Mask | None = None, n_active: int | None = None
) -> Intercept:
    """y = x κ + bias with κ = Σ_c mask_c P_c, in the place of x W + bias.

    Args:
        n_active: number of True in the mask, if that is known.
    """
    active = active_pairs(mask, n_active) if mask is not None and mask.dtype == torch.bool else None

    def replace(use: Use, x: Tensor, original: Callable[[], Tensor], bias: Tensor | None) -> Tensor:
        y = masked_product(x, *components.factors(use), mask, active)
        return _in_host_dtype(y if bias is None else y + bias, x, original)

    return replace


def subtract_weights(components: ParameterComponents, chosen: Sequence[int]) -> Intercept:
    """y = x W + bias − Σ_{c chosen} x P_c; with nothing chosen, the host's own y."""

    def subtract(use: Use, x: Tensor, original: Callable[[], Tensor], bias: Tensor | None) -> Tensor:
        y = original()
        if not chosen:
            return y
        A, B = components.factors(use)
        return (y - masked_product(x, A[list(chosen)], B[list(chosen)])).to(y.dtype)

    return subtract


def keep_weights(components: ParameterComponents, chosen: Sequence[int]) -> Intercept:
    """y = Σ_{c chosen} x P_c + bias."""

    def keep(use: Use, x: Tensor, original: Callable[[], Tensor], bias: Tensor | None) -> Tensor:
        A, B = components.factors(use)
        y = masked_product(x, A[list(chosen)], B[list(chosen)])
        return _in_host_dtype(y if bias is None else y + bias, x, original)

    return keep


def _in_host_dtype(y: Tensor, x: Tensor, original: Callable[[], Tensor]) -> Tensor:
    """y in the dtype that the host would have returned: a product has that of x, or of autocast, which has been at
    work on y too; a lookup has that of the host's rows, and looking them up costs little."""
    if not x.is_floating_point():
        return y.to(original().dtype)
    return y if torch.is_autocast_enabled(y.device.type) else y.to(x.dtype)


@contextmanager
def _activations(model: nn.Module, names: Iterable[str]) -> Iterator[dict[str, Tensor]]:
    """Inside, the outputs of the named submodules (a TransformerLens hook point is one) are kept by name."""
    kept: dict[str, Tensor] = {}

    names = list(names)

    def keep(name: str, module: nn.Module, args: Any, activation: Any) -> None:
        if not isinstance(activation, Tensor):
            raise InvalidSetting(
                f"The submodule {name!r} returns a {type(activation).__name__}, not a tensor to compare."
            )
        kept[name] = activation

    with ExitStack() as stack:
        for name in names:
            try:
                module = model.get_submodule(name)
            except AttributeError:
                raise InvalidSetting(
                    f"The model has no submodule {name!r} whose activations could be compared."
                ) from None
            handle = module.register_forward_hook(partial(keep, name))
            stack.callback(handle.remove)
        yield kept
        for name in names:
            if name not in kept:
                raise SiteNotCalled(f"The forward pass did not call {name!r}, whose activations were to be compared.")
