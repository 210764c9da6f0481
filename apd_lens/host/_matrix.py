"""A weight matrix of a model, its uses, its bias and its units."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from apd_lens._errors import UnsupportedModel


@dataclass(frozen=True)
class Use:
    """One place where the forward pass multiplies by a matrix: y = scale · x @ W, or x @ Wᵀ for a transposed use.

    `rows` and `columns` narrow the matrix (after transposing) where the host multiplies by a part of it only, such as
    one head. `scale` is that of an embedding which multiplies its rows by a constant.
    """

    matrix: str
    site: str
    transposed: bool = False
    rows: slice = field(default_factory=lambda: slice(None))
    columns: slice = field(default_factory=lambda: slice(None))
    scale: float = 1.0


@dataclass(frozen=True)
class Bias:
    """What a host adds to x @ W. Its numbers, in the order of memory, are those of the matrix's columns.

    Attributes:
        attribute: of the matrix's module, where the host keeps it.
        state_keys: its keys in the state dict of the user's model.
    """

    attribute: str
    state_keys: tuple[str, ...]


@dataclass(frozen=True)
class Units:
    """Heads or neurons that one side of a matrix is made of: blocks of equal width, in their order.

    Attributes:
        kind: what they are.
        side: "in" where the rows belong to them (W_O, W_out), "out" where the columns do (W_Q, W_in).
        number: how many. Keys and values that several query heads share have fewer heads than queries.
        copies: how often all of them come, one row of blocks after another: 3 where queries, keys and values are
            fused as in GPT-2's `c_attn`, 2 where a gate is fused with what it gates.
    """

    kind: Literal["head", "neuron"]
    side: Literal["in", "out"]
    number: int
    copies: int = 1


@dataclass(frozen=True, eq=False)
class WeightMatrix:
    """One matrix of the target model, seen as `d_in d_out` (y = x @ W) however the host stores it.

    With a bias it is the matrix [W; b], one row more, that [x, 1] is multiplied by; `d_in` counts that row.

    Attributes:
        name: as the user types it.
        module, attribute: where the host keeps the parameter; looked up at every access, since hosts replace it.
        layout: einops pattern from the host's layout to `d_in d_out`, such as "head d_in d_head -> d_in (head d_head)".
        axes: sizes of the pattern's axes that a reshape back needs.
        uses: the places where the forward pass multiplies by it.
        state_keys: the parameter's keys in the state dict of the user's model.
        tied_to: other names of the same numbers in memory.
        tied: the matrices that have those names where they are parameters of their own, and whether each is the
            transpose.
        bias: the last row, None where the matrix has no such row. An adapter says which bias a matrix has;
            `TargetModel` keeps it where biases were asked for.
        units: the heads or neurons of one side, None where it has none or the adapter cannot know.
    """

    name: str
    module: nn.Module
    attribute: str
    layout: str
    uses: tuple[Use, ...]
    state_keys: tuple[str, ...]
    axes: Mapping[str, int] = field(default_factory=dict)
    tied_to: tuple[str, ...] = ()
    tied: tuple[tuple["WeightMatrix", bool], ...] = ()
    bias: Bias | None = None
    units: Units | None = None

    @property
    def parameter(self) -> Tensor:
        """The host's own tensor, in the host's layout."""
        return getattr(self.module, self.attribute)

    @property
    def d_in(self) -> int:
        return self._weight().shape[0] + (self.bias is not None)

    @property
    def d_out(self) -> int:
        return self._weight().shape[1]

    def value(self) -> Float[Tensor, "d_in d_out"]:
        """The matrix as it is now, detached; may share memory with the model, so do not write to it.

        Raises:
            UnsupportedModel: it has no numbers.
        """
        if self.parameter.is_meta:
            raise UnsupportedModel(
                f"{self.name} is on the meta device: it is not loaded, or offloaded between forwards. Load the model "
                "whole, without offloading; what accelerate offloaded comes back with "
                "accelerate.hooks.remove_hook_from_module(model, recurse=True)."
            )
        weight = self._weight()
        if self.bias is None:
            return weight
        return torch.cat([weight, self.bias_parameter.detach().reshape(1, -1).to(weight.dtype)])

    def _weight(self) -> Float[Tensor, "inputs d_out"]:
        return rearrange(self.parameter.detach(), self.layout, **self.axes)

    @property
    def bias_parameter(self) -> Tensor:
        """The host's own bias, in the host's layout; only where there is one."""
        assert self.bias is not None
        return getattr(self.module, self.bias.attribute)

    def place_in_memory(self) -> tuple[Any, ...] | None:
        """Equal for two matrices exactly if they are the same numbers in memory, the same way round.

        Not a parameter's identity: hosts make two parameters that are views of one storage, or one the transpose of
        the other. None where there is no memory to compare (a meta tensor).
        """
        parameter, value = self.parameter, self._weight()
        if not (storage := parameter.untyped_storage().data_ptr()):
            return None
        if value.untyped_storage().data_ptr() == storage:
            return storage, value.storage_offset(), value.shape, value.stride()
        return storage, parameter.storage_offset(), parameter.shape, parameter.stride(), self.layout

    def fingerprint(self, dtype: torch.dtype | None = None) -> str:
        """SHA-256 of the matrix as `d_in d_out`: dtype, shape and bytes; in another dtype, of its rounded values."""
        value = self.value().to(dtype)
        digest = hashlib.sha256(f"{value.dtype} {tuple(value.shape)} ".encode())
        digest.update(value.cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()

    def to_host(self, value: Float[Tensor, "inputs d_out"]) -> Tensor:
        """A matrix, without a bias, in the host's own layout and dtype."""
        host, ours = self.layout.split("->")
        return rearrange(value, f"{ours} -> {host}", **self.axes).to(self.parameter.dtype)

    def state(self, value: Float[Tensor, "d_in d_out"]) -> dict[str, Tensor]:
        """The entries of a state dict that hold this matrix, under all its names; one tensor for one parameter."""
        if self.bias is not None:
            stored = value[-1].reshape(self.bias_parameter.shape).to(self.bias_parameter.dtype)
            return dict.fromkeys(self.bias.state_keys, stored) | replace(self, bias=None).state(value[:-1])
        stored = self.to_host(value).contiguous()
        entries = dict.fromkeys(self.state_keys, stored)
        for other, transposed in self.tied:
            if other.parameter is self.parameter:
                entries |= dict.fromkeys(other.state_keys, stored)
            else:
                entries |= other.state(value.mT if transposed else value)
        return entries
