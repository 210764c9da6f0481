"""Random small models and batches, and the slow, obviously right way to run a model on other weights."""

from collections import UserDict, namedtuple
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

LEAVES = (nn.Linear, Conv1D, nn.Embedding, nn.Conv1d, nn.Conv2d)
# Without kinks, at which finite differences would be wrong.
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda h: h,
    "tanh": torch.tanh,
    "tanh in place": lambda h: h.tanh_(),
    "gelu": F.gelu,
    "sigmoid": torch.sigmoid,
}
Weights = Mapping[str, Tensor]
FAR = -1e4  # what additive masks add where no attention is to be paid

# Whether a batch must be computed right, may be refused with an ApdError instead, or must be.
RIGHT, RIGHT_OR_REFUSED = "right", "right or refused"


@dataclass(frozen=True)
class Chain:
    """Layers on vectors, `batch *pos d`.

    Attributes:
        shared: what the two middle layers have in common.
        bare: how the forward reads the first middle layer's weight beside calling the layer.
        scaled: whether a batch has a number for each example as well.
        form: what a batch is.
    """

    layer: str = "Linear"
    bias: bool = True
    residual: bool = True
    shared: str = "nothing"
    activation: str = "tanh"
    ending: str = "none"
    bare: str = "no"
    scaled: bool = False
    n_examples: int = 3
    positions: tuple[int, ...] = ()
    form: str = "tensor"
    dtype: torch.dtype = torch.float64
    seed: int = 0

    outcome: str = RIGHT

    def model(self) -> nn.Module:
        return _drawn(ChainModel(self), self)

    def arguments(self) -> dict[str, Tensor]:
        x = _normal(self, self.n_examples, *self.positions, 3)
        return {"x": x} | ({"scale": _normal(self, self.n_examples) + 1} if self.scaled else {})

    def alone(self, example: int) -> dict[str, Tensor]:
        return {name: value[example : example + 1] for name, value in self.arguments().items()}

    def position_axes(self) -> tuple[int, ...]:
        """Of a mask of positions; none where positions cannot be data points, since matrices do not share them."""
        return self.positions

    def positions_of(self, example: int) -> Tensor:
        """Which of a batch's positions are the example's own, all position axes in one."""
        return torch.arange(torch.Size(self.positions).numel())

    def outputs_of(self, example: int) -> Tensor | None:
        """Which of the positions of a batch's outputs are the example's own; None for all."""
        return None


class ChainModel(nn.Module):
    def __init__(self, spec: Chain):
        super().__init__()
        self.spec = spec
        self.first, self.middle = _layer(spec, 3, 4), _layer(spec, 4, 4)
        self.again = self.middle if spec.shared == "module" else _layer(spec, 4, 4)
        if spec.shared == "parameter":
            self.again.weight = self.middle.weight
        elif spec.shared == "parameter, transposed":
            self.middle, self.again = nn.Linear(4, 4, bias=spec.bias), Conv1D(4, 4)
            self.again.weight = self.middle.weight
        self.last = _layer(spec, 4, 3)

    def forward(self, x: Tensor, scale: Tensor | None = None) -> Tensor:
        act, W = ACTIVATIONS[self.spec.activation], self.middle.weight
        h = act(self.first(x))
        if scale is not None:
            h = h * scale.reshape(-1, *[1] * (h.ndim - 1))
        for layer in (self.middle, self.again):
            change = act(layer(h))
            h = h + change if self.spec.residual else change
        bare = {"product": lambda: h @ W.T, "slice": lambda: h[..., :2] @ W[:2], "linear": lambda: F.linear(h, W)}
        if self.spec.bare != "no":
            h = h + bare[self.spec.bare]()
        return ACTIVATIONS[self.spec.ending](self.last(h))


@dataclass(frozen=True)
class Texts:
    """Tokens, or vectors, at positions that attention mixes.

    Attributes:
        side: where the padding is.
        places: where position embeddings are looked up.
        mask: the form of `attention_mask`.
        shared: what is computed once for all examples: a projection of "learned vectors", the same "with a batch axis"
            of one, or embeddings of "relative positions" `query key`, which are added to attention scores.
        outputs: "each position", their "mean", the "last" one, or each position behind a learned "prefix".
    """

    lengths: tuple[int, ...] = (3, 2)
    side: str = "right"
    inputs: str = "tokens"
    places: str = "arange"
    attention: bool = True
    causal: bool = True
    mask: str = "none"
    shared: str = "nothing"
    tied_head: bool = True
    outputs: str = "each position"
    bias: bool = True
    form: str = "dict"
    dtype: torch.dtype = torch.float64
    seed: int = 0
    outcome: str = RIGHT

    @property
    def width(self) -> int:
        return max(self.lengths)

    def makes_sense(self) -> bool:
        """Whether an example alone, without padding, is the same computation, and the batch can be written down."""
        padded = len(set(self.lengths)) > 1
        return not (
            (padded and (self.mask == "none" or "square" in self.mask))
            or (padded and self.side == "left" and self.places not in ("none", "argument of each example"))
            or (
                padded
                and self.outputs == "mean"
                and self.mask not in ("bool", "int", "float", "additive", "additive, infinite")
            )
            or (padded and self.outputs == "last" and self.side == "right")
            or (padded and self.side == "left" and self.shared not in ("nothing", "relative positions"))
            or (self.tied_head and self.inputs != "tokens")
            or (self.form == "tensor" and "argument" in self.places)
            or (self.form in ("tensor", "tuple", "named tuple") and self.mask != "none")
            or (self.mask != "none" and not self.attention and ("square" in self.mask or "queries" in self.mask))
            or self._may_be_of_queries_and_keys()
        )

    def _may_be_of_queries_and_keys(self) -> bool:
        """Whether a mask `batch pos` is one `query key` of causal attention just as well."""
        n, valid = len(self.lengths), self.valid()
        return (
            self.mask in ("bool", "int", "float", "additive", "additive, infinite")
            and n == self.width
            and not valid.all()
            and bool(valid.diagonal().all())
        )

    def model(self) -> nn.Module:
        return _drawn(TextsModel(self), self)

    def valid(self) -> Tensor:
        at, lengths = torch.arange(self.width), torch.tensor(self.lengths)[:, None]
        return at < lengths if self.side == "right" else at >= self.width - lengths

    def arguments(self) -> dict[str, Tensor]:
        n, width = len(self.lengths), self.width
        x = _normal(self, n, width, 3)
        arguments = {"x": x if self.inputs == "vectors" else x[..., 0].mul(10).long() % 5}
        places = {
            "shared argument": torch.arange(width),
            "argument with a batch axis of one": torch.arange(width)[None],
            "argument of each example": (self.valid().cumsum(1) - 1).clamp_min(0),
        }
        if self.places in places:
            arguments["places"] = places[self.places]
        attends = self.valid()[:, None] & self._before(width)
        masks = {
            "bool": self.valid(),
            "int": self.valid().long(),
            "float": self.valid().to(self.dtype),
            "additive": _additive(self.valid(), self.dtype),
            "additive, infinite": _additive(self.valid(), self.dtype, -torch.inf),
            "square bool": self._before(width),
            "square additive": _additive(self._before(width), self.dtype),
            "queries and keys, bool": attends,
            "heads, queries and keys, bool": attends[:, None],
            "heads, queries and keys, additive": _additive(attends[:, None], self.dtype),
        }
        if self.mask in masks:
            arguments["attention_mask"] = masks[self.mask]
        return arguments

    def alone(self, example: int) -> dict[str, Tensor]:
        length = self.lengths[example]
        mask = self.mask if self.mask == "none" or "square" in self.mask else "int"
        if "queries" in self.mask:
            mask = self.mask
        short = replace(self, lengths=(length,), mask=mask).arguments()
        return short | {"x": self.arguments()["x"][example, self.valid()[example]][None]}

    def _before(self, width: int) -> Tensor:
        attends = torch.ones(width, width, dtype=torch.bool)
        return attends.tril() if self.causal else attends

    def position_axes(self) -> tuple[int, ...]:
        return (self.width,) if self.outputs == "each position" and self.shared != "relative positions" else ()

    def positions_of(self, example: int) -> Tensor:
        return self.valid()[example].nonzero()[:, 0]

    def outputs_of(self, example: int) -> Tensor | None:
        if self.outputs in ("mean", "last"):
            return None
        n_prefix = 2 if self.outputs == "prefix" else 0
        return torch.cat([torch.arange(n_prefix), n_prefix + self.positions_of(example)])


class TextsModel(nn.Module):
    def __init__(self, spec: Texts):
        super().__init__()
        self.spec = spec
        self.embed = nn.Embedding(5, 4) if spec.inputs == "tokens" else nn.Linear(3, 4, bias=spec.bias)
        if spec.places != "none":
            self.place = nn.Embedding(6, 4)
        if spec.shared == "relative positions":
            self.relative = nn.Embedding(11, 4)
        elif spec.shared != "nothing":
            self.learned, self.project = nn.Parameter(torch.empty(6, 3)), nn.Linear(3, 4, bias=spec.bias)
        if spec.attention:
            self.q, self.k, self.v = (nn.Linear(4, 4, bias=spec.bias) for _ in range(3))
        self.up, self.down = nn.Linear(4, 5, bias=spec.bias), Conv1D(4, 5)
        self.head = nn.Linear(4, 5, bias=False)
        if spec.tied_head:
            self.head.weight = self.embed.weight
        if spec.outputs == "prefix":
            self.prefix = nn.Parameter(torch.empty(1, 2, 4))

    def forward(self, x: Tensor, places: Tensor | None = None, attention_mask: Tensor | None = None) -> Tensor:
        spec, width = self.spec, x.shape[1]
        h = self.embed(x)
        if spec.places != "none":
            h = h + self.place(torch.arange(width) if places is None else places)
        if spec.shared == "learned vectors":
            h = h + self.project(self.learned[:width])
        elif spec.shared == "learned vectors, with a batch axis":
            h = h + self.project(self.learned[None, :width])
        if spec.attention:
            scores = self.q(h) @ self.k(h).mT / 2
            if spec.shared == "relative positions":
                at = torch.arange(width)
                scores = scores + self.relative(at[:, None] - at + 5).sum(-1)
            scores = scores.masked_fill(~spec._before(width), FAR)
            scores = scores + self._added(attention_mask)
            h = h + torch.softmax(scores, -1) @ self.v(h)
        if spec.outputs == "prefix":
            h = torch.cat([self.prefix.expand(len(h), -1, -1), h], 1)
        h = h + self.down(torch.tanh(self.up(h)))
        if spec.outputs == "last":
            h = h[:, -1]
        elif spec.outputs == "mean":
            keep = torch.ones(x.shape[:2]) if attention_mask is None else self._kept(attention_mask)
            h = (h * keep[..., None]).sum(1) / keep.sum(1, keepdim=True)
        return self.head(h)

    def _added(self, mask: Tensor | None) -> Tensor | float:
        """What the mask adds to the scores, `batch query key`."""
        if mask is None:
            return 0.0
        if self.spec.mask in ("bool", "int", "float", "additive", "additive, infinite"):
            return _additive(self._kept(mask).bool(), self.up.weight.dtype)[:, None]
        mask = mask[:, 0] if mask.ndim == 4 else mask
        return mask if mask.is_floating_point() else _additive(mask.bool(), self.up.weight.dtype)

    def _kept(self, mask: Tensor) -> Tensor:
        # The model's own convention, which a batch alone (an int mask of ones) keeps to as well.
        keep = mask == 0 if self.spec.mask.startswith("additive") and mask.is_floating_point() else mask.bool()
        return keep.to(self.up.weight.dtype)


@dataclass(frozen=True)
class Translation:
    """An encoder and a decoder that attends to all that the encoder gives.

    Attributes:
        lengths, decoder_lengths: of each example. Padding is on the right.
        masks: which of attention_mask (the encoder's) and decoder_attention_mask a batch has.
    """

    lengths: tuple[int, ...] = (3, 2)
    decoder_lengths: tuple[int, ...] = (2, 3)
    masks: str = "both"
    bias: bool = True
    dtype: torch.dtype = torch.float64
    seed: int = 0
    form: str = "dict"

    outcome = RIGHT_OR_REFUSED

    def makes_sense(self) -> bool:
        return (self.masks in ("both", "encoder") or len(set(self.lengths)) == 1) and (
            self.masks in ("both", "decoder") or len(set(self.decoder_lengths)) == 1
        )

    def model(self) -> nn.Module:
        return _drawn(TranslationModel(self), self)

    def arguments(self) -> dict[str, Tensor]:
        arguments = {}
        for name, lengths in (("", self.lengths), ("decoder_", self.decoder_lengths)):
            tokens = _normal(replace(self, seed=self.seed + len(name)), len(lengths), max(lengths)).mul(10).long() % 5
            arguments[f"{name}input_ids"] = tokens
            if self.masks in ("both", name.strip("_") or "encoder"):
                mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
                arguments[f"{name}attention_mask"] = mask.long()
        return arguments

    def alone(self, example: int) -> dict[str, Tensor]:
        ids = self.arguments()
        return {
            "input_ids": ids["input_ids"][example : example + 1, : self.lengths[example]],
            "decoder_input_ids": ids["decoder_input_ids"][example : example + 1, : self.decoder_lengths[example]],
        }

    def position_axes(self) -> tuple[int, ...]:
        return ()

    def positions_of(self, example: int) -> Tensor:
        return torch.arange(self.decoder_lengths[example])

    def outputs_of(self, example: int) -> Tensor | None:
        return self.positions_of(example)


class TranslationModel(nn.Module):
    def __init__(self, spec: Translation):
        super().__init__()
        self.embed = nn.Embedding(5, 4)
        self.encode, self.query, self.mlp = (nn.Linear(4, 4, bias=spec.bias) for _ in range(3))
        self.head = nn.Linear(4, 5, bias=False)

    def forward(
        self,
        input_ids: Tensor,
        decoder_input_ids: Tensor,
        attention_mask: Tensor | None = None,
        decoder_attention_mask: Tensor | None = None,
    ) -> Tensor:
        encoded = torch.tanh(self.encode(self.embed(input_ids)))
        h = self.embed(decoder_input_ids)
        scores = self.query(h) @ encoded.mT
        if attention_mask is not None:
            scores = scores.masked_fill(~attention_mask.bool()[:, None], FAR)
        h = h + torch.softmax(scores, -1) @ encoded
        return self.head(h + torch.tanh(self.mlp(h)))


@dataclass(frozen=True)
class Images:
    """Convolutions in one or two dimensions, and a linear layer on the mean over pixels, or none."""

    n_axes: int = 1
    kernel: int = 2
    stride: int = 1
    padding: int = 0
    dilation: int = 1
    padding_mode: str = "zeros"
    bias: bool = True
    n_layers: int = 1
    pooled: bool = False
    n_examples: int = 2
    form: str = "tensor"
    dtype: torch.dtype = torch.float64
    seed: int = 0

    outcome = RIGHT

    def makes_sense(self) -> bool:
        return min(self.pixels) > 0

    @property
    def pixels(self) -> tuple[int, ...]:
        size = 4
        for _ in range(self.n_layers):
            size = (size + 2 * self.padding - self.dilation * (self.kernel - 1) - 1) // self.stride + 1
        return (size,) * self.n_axes

    def model(self) -> nn.Module:
        return _drawn(ImagesModel(self), self)

    def arguments(self) -> dict[str, Tensor]:
        return {"x": _normal(self, self.n_examples, 3, *[4] * self.n_axes)}

    def alone(self, example: int) -> dict[str, Tensor]:
        return {"x": self.arguments()["x"][example : example + 1]}

    def position_axes(self) -> tuple[int, ...]:
        return self.pixels if self.n_layers == 1 and not self.pooled else ()

    def positions_of(self, example: int) -> Tensor:
        return torch.arange(torch.Size(self.position_axes()).numel())

    def outputs_of(self, example: int) -> Tensor | None:
        return None


class ImagesModel(nn.Module):
    def __init__(self, spec: Images):
        super().__init__()
        self.spec = spec
        convolution = nn.Conv1d if spec.n_axes == 1 else nn.Conv2d
        self.layers = nn.ModuleList(
            convolution(
                3,
                3,
                spec.kernel,
                spec.stride,
                spec.padding,
                spec.dilation,
                bias=spec.bias,
                padding_mode=spec.padding_mode,
            )
            for _ in range(spec.n_layers)
        )
        if spec.pooled:
            self.head = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.tanh(layer(x))
        x = x.movedim(1, -1)
        return self.head(x.flatten(1, -2).mean(1)) if self.spec.pooled else x


Spec = Chain | Texts | Translation | Images


def batch_of(spec: Spec, arguments: dict[str, Tensor]) -> Any:
    """What the model is called with, in the form of the spec; a mapping of arguments where it leaves some out."""
    if spec.form == "dict":
        return arguments
    if spec.form == "mapping":
        return UserDict(arguments)
    if spec.form == "tensor":
        return next(iter(arguments.values()))
    if spec.form == "named tuple":
        return namedtuple("Arguments", arguments)(*arguments.values())
    return tuple(arguments.values())


def call(model: nn.Module, batch: Any) -> Tensor:
    if isinstance(batch, Mapping):
        return model(**batch)
    return model(*batch) if isinstance(batch, tuple) else model(batch)


class Substituted:
    """A model in float64 with weights really substituted in copies; runs one example at a time, without padding.

    Weights are named matrices `d_in d_out`, or `d_in + 1 d_out` with a bias; all others are the model's own.
    """

    def __init__(self, spec: Spec, model: nn.Module):
        self.spec = spec
        self.model = deepcopy(model).double()
        self._copies: dict[int, tuple[Weights, nn.Module]] = {}

    @torch.no_grad()
    def output(self, example: int, weights: Weights) -> Tensor:
        """The output of an example, without a batch axis."""
        return self._run(self._copy_with(weights), example)

    @torch.no_grad()
    def output_by_position(self, example: int, weights: Sequence[Weights]) -> Tensor:
        """The output with other weights at each position: every leaf is run with the weights of each position, and
        the row of that position is taken from what comes."""
        copies = [self._copy_with(of_position) for of_position in weights]

        def mix(path: str, leaf: nn.Module, args: tuple[Tensor, ...], y: Tensor) -> Tensor:
            axis = 1 if isinstance(leaf, nn.Conv1d | nn.Conv2d) else -1
            rows = [copy.get_submodule(path)(*args).movedim(axis, -1).flatten(0, -2) for copy in copies]
            assert len(rows) == len(rows[0]), f"{len(rows)} weights for the {len(rows[0])} positions of {path}"
            mixed = torch.stack([of_position[position] for position, of_position in enumerate(rows)])
            return mixed.reshape(y.movedim(axis, -1).shape).movedim(-1, axis)

        leaves = [(path, leaf) for path, leaf in self.model.named_modules() if isinstance(leaf, LEAVES)]
        changed = [
            (path, leaf)
            for path, leaf in leaves
            if any(not _are_equal(leaf, copy.get_submodule(path)) for copy in copies)
        ]
        hooks = [leaf.register_forward_hook(partial(mix, path)) for path, leaf in changed]
        try:
            return self._run(self.model, example)
        finally:
            for hook in hooks:
                hook.remove()

    def _run(self, model: nn.Module, example: int) -> Tensor:
        arguments = {
            name: value.double() if value.is_floating_point() else value
            for name, value in self.spec.alone(example).items()
        }
        return model(**arguments)[0]

    def _copy_with(self, weights: Weights) -> nn.Module:
        if id(weights) not in self._copies:
            copy = deepcopy(self.model)
            for name, matrix in weights.items():
                _put(copy.get_submodule(name.removesuffix("weight").removesuffix(".")), matrix)
            self._copies[id(weights)] = weights, copy  # the weights are kept, and so no others have their id
        return self._copies[id(weights)][1]


def _are_equal(leaf: nn.Module, other: nn.Module) -> bool:
    return all(torch.equal(value, other.state_dict()[name]) for name, value in leaf.state_dict().items())


def _put(leaf: Any, matrix: Tensor) -> None:
    n_inputs = leaf.weight.numel() // matrix.shape[1]
    kernel = matrix[:n_inputs]
    if isinstance(leaf, nn.Conv1d | nn.Conv2d):
        kernel = kernel.unflatten(0, leaf.weight.shape[1:]).movedim(-1, 0)
    leaf.weight.data.copy_(kernel.T if isinstance(leaf, nn.Linear) else kernel)
    if len(matrix) > n_inputs:
        leaf.bias.data.copy_(matrix[n_inputs])


def _layer(spec: Chain, d_in: int, d_out: int) -> nn.Module:
    return Conv1D(d_out, d_in) if spec.layer == "Conv1D" else nn.Linear(d_in, d_out, bias=spec.bias)


def _drawn(model: nn.Module, spec: Spec) -> nn.Module:
    generator = torch.Generator().manual_seed(spec.seed)
    for parameter in model.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator, dtype=torch.float64).mul(0.7).to(spec.dtype)
    return model.eval()


def _normal(spec: Spec, *shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(spec.seed + 1)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(spec.dtype)


def _additive(keep: Tensor, dtype: torch.dtype, far: float = FAR) -> Tensor:
    return torch.zeros(keep.shape, dtype=dtype).masked_fill(~keep, far)
