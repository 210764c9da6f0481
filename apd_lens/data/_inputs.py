"""A batch, read once: what the model is called with, how many examples there are, and which positions are data."""

import functools
import inspect
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor, nn

from apd_lens import _processes
from apd_lens._errors import InvalidBatches, ShapeMismatch
from apd_lens.data._batch import (
    Batch,
    Key,
    are_texts,
    arguments,
    changed_within,
    holds_tensors,
    joined,
    mapped,
    tensors,
)
from apd_lens.data._finite import Reading, count_not_finite, raise_first
from apd_lens.data._points import GIVE_VALID, Valid, attended, kept_positions, lengths_of_documents, zero_at_padding

# What a user gives as valid=: batch -> which positions of the explained output are data.
ValidFn = Callable[[Batch], Any]

# Names that hosts give to a mask of the tokens they read; in the second group True is padding.
_MASKS = ("attention_mask", "one_zero_attention_mask")
_INVERTED_MASKS = ("src_key_padding_mask", "key_padding_mask")


@dataclass(frozen=True, eq=False)
class Inputs:
    """A batch as the model is called with it.

    Attributes:
        batch: the arguments.
        n_examples: length of the batch axis.
        main_axes: number of axes of the tensor that it was read off.
        valid: False at padding; None where every position is data.
        encoder_valid: of a model with an encoder and a decoder, the same for the encoder's positions.
        attends: which query attends to which key, where a mask says that.
        sure: keys of arguments that have an entry for each example for certain.
        doubtful: keys of those that may have one, as far as shapes say.
        outputs: what the model returns on a batch.
        kept: names of matrices -> what passes over this batch need not run again in front of them (`Prefix`).
        whole: the batch of all processes, where these are the examples of one of several.
    """

    batch: Batch
    n_examples: int
    main_axes: int
    valid: Valid
    encoder_valid: Bool[Tensor, "batch encoder_pos"] | None
    attends: Bool[Tensor, "batch query key"] | None
    sure: frozenset[Key]
    doubtful: frozenset[Key]
    outputs: Callable[[Batch], Any] | None
    kept: dict[tuple[str, ...], Any] = field(default_factory=dict)
    whole: "Inputs | None" = None

    @property
    def of_all(self) -> "Inputs":
        """The batch of all processes."""
        return self.whole or self

    def own(self) -> "Inputs":
        """The examples of this process.

        Raises:
            InvalidBatches: there is not one for each process.
        """
        n = _processes.n_processes()
        if self.n_examples < n:
            raise InvalidBatches(
                f"The batch has {self.n_examples} examples, and each of the {n} processes takes a part of them. Give "
                "larger batches, or start fewer processes."
            )
        return self if n == 1 else replace(self.some(_processes.part(self.n_examples)), whole=self)

    def some(self, examples: slice) -> "Inputs":
        """Some of the examples."""
        if examples.start in (None, 0) and (examples.stop is None or examples.stop >= self.n_examples):
            return self
        return self._changed(len(range(*examples.indices(self.n_examples))), lambda value: value[examples])

    def replicated(self, n: int) -> "Inputs":
        """All examples, n times over."""
        if n == 1:
            return self
        return self._changed(
            n * self.n_examples,
            lambda value: value.repeat(n, *[1] * (value.ndim - 1)) if isinstance(value, Tensor) else value * n,
        )

    def picked(self, indices: Sequence[int]) -> "Inputs":
        """Copies of those examples, in that order; one may come several times."""
        return self._picked(list(indices), self.of_examples)

    def _picked(self, indices: list[int], of_examples: frozenset[Key]) -> "Inputs":
        return self._changed(
            len(indices),
            lambda value: value[indices] if isinstance(value, Tensor) else type(value)(value[i] for i in indices),
            of_examples,
        )

    def _changed(self, n: int, change: Callable[[Any], Any], of_examples: frozenset[Key] | None = None) -> "Inputs":
        """With change(value) in the place of what has an entry for each example, and n examples then."""
        of_examples = self.of_examples if of_examples is None else of_examples

        def of_argument(key: Key, value: Any) -> Any:
            if key not in of_examples:
                return value
            return changed_within(value, of_tensor) if holds_tensors(value) else change(value)

        def of_tensor(value: Tensor) -> Tensor:
            return change(value) if value.ndim > 1 and len(value) == self.n_examples else value.clone()

        def of_mask(value: Tensor | None) -> Tensor | None:
            return None if value is None else change(value)

        return replace(
            self,
            batch=mapped(self.batch, of_argument),
            n_examples=n,
            valid=of_mask(self.valid),
            encoder_valid=of_mask(self.encoder_valid),
            attends=of_mask(self.attends),
            sure=of_examples,
            doubtful=frozenset(),
            kept={names: prefix.changed(self.n_examples, n, change) for names, prefix in self.kept.items()},
        )

    @functools.cached_property
    def of_examples(self) -> frozenset[Key]:
        """Keys of the arguments that have an entry for each example.

        Where shapes do not tell (an `arange(pos)` beside as many examples as positions), the model does: on some of the
        examples it must return what it returns for them among all.

        Raises:
            InvalidBatches: in no reading it does.
        """
        if not self.doubtful or self.outputs is None:
            return self.sure | self.doubtful
        whole = self.outputs(self.batch)
        sizes = {size for value in tensors(self.batch) for size in value.shape}
        n = next(n for n in itertools.count(2) if n not in sizes)
        indices = [(-1 - place) % self.n_examples for place in range(n)]
        for shared in _subsets(sorted(self.doubtful, key=str)):
            of_examples = self.sure | self.doubtful - set(shared)
            try:
                some = self.outputs(self._picked(indices, of_examples).batch)
            except Exception:  # whatever a model raises for arguments that do not fit each other
                continue
            if _agree(some, whole, indices, self.n_examples):
                return of_examples
        raise InvalidBatches(
            f"It cannot be told which of the arguments {sorted(self.doubtful, key=str)} have an entry for each of the "
            f"{self.n_examples} examples: whether they do or not, the model does not return the same on some examples "
            "as among all. Give those that all examples share a batch axis, x.expand(batch, ...); examples must not "
            "influence each other."
        )

    @property
    def main(self) -> Tensor | None:
        """The tensor that the number of examples is read off."""
        args, kwargs = arguments(self.batch)
        return _main(dict(enumerate(args)) | kwargs)

    @property
    def n_positions(self) -> int:
        """Of an example, as far as the shape of the main tensor says it."""
        main = self.main
        if main is None:
            return 1
        return (main.shape[1:-1] if main.is_floating_point() else main.shape[1:]).numel()

    @functools.cached_property
    def document_lengths(self) -> Int[Tensor, "batch pos"] | None:
        """For each position, the number of data positions in its document; None without a mask of queries and keys."""
        return None if self.attends is None else lengths_of_documents(self.attends)


def read_batch(
    batch: Batch | Inputs,
    model: nn.Module | None = None,
    valid: ValidFn | None = None,
    outputs: Callable[[Batch], Any] | None = None,
) -> Inputs:
    """Reads a batch, as the model is called with it.

    Args:
        model: says the names of positional arguments.
        valid: what the user says of padding; None for what masks in the batch say.
        outputs: what the model returns on a batch.

    Raises:
        InvalidBatches: nothing that the model could be called with, or no example.
        ShapeMismatch: it cannot be told which positions are padding.
    """
    if isinstance(batch, Inputs):
        return batch
    named = _named(*arguments(batch), model)
    for name, (_, value) in named.items():
        _check_argument(name, value, model)
    given = {name: value for name, (_, value) in named.items()}
    main = _main(given)
    n = _n_examples(given, main)
    masks = _of_masks(given, n, main, model) if valid is None else (_checked(valid(batch), n), None, None)
    sure, doubtful = set(), set()
    for key, value in named.values():
        kind = _has_examples(value, n, main)
        if kind is not None:
            (sure if kind else doubtful).add(key)
    return Inputs(batch, n, 2 if main is None else main.ndim, *masks, frozenset(sure), frozenset(doubtful), outputs)


def joined_inputs(some: Sequence[Inputs]) -> Inputs:
    """Several of one example each, as one; alike by `same_but_for_examples`."""

    def of_masks(masks: list[Tensor | None]) -> Tensor | None:
        given = [mask for mask in masks if mask is not None]
        return torch.cat(given) if given else None

    prefixes = {
        names: prefix.joined([inputs.kept[names] for inputs in some])
        for names, prefix in some[0].kept.items()
        if all(names in inputs.kept for inputs in some)
    }
    return replace(
        some[0],
        batch=joined([inputs.batch for inputs in some], some[0].of_examples),
        n_examples=len(some),
        valid=of_masks([inputs.valid for inputs in some]),
        encoder_valid=of_masks([inputs.encoder_valid for inputs in some]),
        attends=of_masks([inputs.attends for inputs in some]),
        kept={names: prefix for names, prefix in prefixes.items() if prefix is not None},
    )


def readings_of_inputs(inputs: Inputs, where: str) -> list[Reading]:
    """How many values of each floating-point argument are NaN or infinite, those at padding not counted; −inf in a mask
    is none of them."""
    args, kwargs = arguments(inputs.batch)

    def reading(index: int, value: Tensor, is_mask: bool) -> Reading:
        counted = value.masked_fill(value == -torch.inf, 0) if is_mask else zero_at_padding(value, inputs.valid)
        return Reading(
            count_not_finite(counted),
            lambda count: (
                f"{where}: input tensor {index} of the batch (shape {tuple(value.shape)}) holds {count:.0f} values "
                "that are NaN or infinite. Nothing was computed from it."
            ),
        )

    found = [("", value) for value in args] + list(kwargs.items())
    return [
        reading(index, value, "mask" in name)
        for index, (name, value) in enumerate((name, value) for name, value in found if isinstance(value, Tensor))
        if value.is_floating_point()
    ]


def check_finite(inputs: Inputs, where: str) -> None:
    """Raises NonFinite if an argument holds NaN or infinity."""
    raise_first(readings_of_inputs(inputs, where))


def n_examples(args: tuple[Any, ...], kwargs: Mapping[str, Any], model: nn.Module) -> int:
    """Of a call of the model."""
    given = {name: value for name, (_, value) in _named(args, kwargs, model).items()}
    main = _main(given)
    return _length_of_texts(given) if main is None else len(main)


def _named(args: tuple[Any, ...], kwargs: Mapping[str, Any], model: nn.Module | None) -> dict[Key, tuple[Key, Any]]:
    """Name of the model's parameter, in the order of its parameters -> key in the batch, and value.

    Where the model does not tell the name of a positional argument, its place is its name.
    """
    places = list(range(len(args)))
    plain: dict[Key, tuple[Key, Any]] = {key: (key, value) for key, value in [*enumerate(args), *kwargs.items()]}
    if model is None:
        return plain
    try:  # the keys, in the place of the values
        bound = _signature(type(model).forward).bind_partial(None, *places, **{name: name for name in kwargs})
    except (TypeError, ValueError):
        return plain
    named: dict[Key, tuple[Key, Any]] = {}
    for name, key in list(bound.arguments.items())[1:]:
        keys = list(key) if isinstance(key, tuple | dict) else [key]
        names = keys if isinstance(key, tuple | dict) else [name]
        named |= {each_name: plain[each] for each_name, each in zip(names, keys, strict=True)}
    return named


_signature = functools.lru_cache(maxsize=64)(inspect.signature)  # of a forward; it is asked for in every pass


def _main(given: Mapping[Key, Any]) -> Tensor | None:
    """The tensor that the number of examples is read off: the first with more than one axis that is no mask, else the
    first."""
    found = [(str(key), value) for key, value in given.items() if isinstance(value, Tensor) and value.ndim]
    found.sort(key=lambda item: (item[1].ndim < 2, "mask" in item[0]))
    return found[0][1] if found else None


def _n_examples(given: Mapping[Key, Any], main: Tensor | None) -> int:
    if main is None:
        return _length_of_texts(given)
    if not main.numel():
        raise InvalidBatches(f"The batch has no examples: its input has the shape {tuple(main.shape)}.")
    return len(main)


def _length_of_texts(given: Mapping[Key, Any]) -> int:
    return next((len(value) for value in given.values() if are_texts(value)), 1)


def _has_examples(value: Any, n: int, main: Tensor | None) -> bool | None:
    """Whether an argument has an entry for each example: True for certain, False perhaps, None if not."""
    if value is main or holds_tensors(value) or (are_texts(value) and len(value) == n):
        return True
    if isinstance(value, Tensor) and value.ndim and len(value) == n:
        assert main is not None
        return value.ndim > 1 and value.shape[:2] == main.shape[:2] and n not in main.shape[1:]
    return False if isinstance(value, list | tuple) and len(value) == n else None


def _check_argument(name: Key, value: Any, model: nn.Module | None) -> None:
    """Raises InvalidBatches for what could have been a tensor, and for texts that nobody makes tokens of."""
    if type(value).__module__.partition(".")[0] in ("numpy", "pandas") and hasattr(value, "shape"):
        raise InvalidBatches(
            f"Argument {name!r} of the batch is a {type(value).__name__}, not a tensor. Give torch.as_tensor(x), or "
            "torch.as_tensor(x.to_numpy()) of a pandas object; of texts a list of strings, x.tolist()."
        )
    inner = value
    while isinstance(inner, list) and inner:
        inner = inner[0]
    if isinstance(value, list) and isinstance(inner, bool | int | float):
        raise InvalidBatches(
            f"Argument {name!r} of the batch is a list of numbers, not a tensor. Give torch.tensor(x), with the batch "
            "axis first: torch.tensor([ids]) for one prompt."
        )
    if (isinstance(value, str) or are_texts(value)) and hasattr(model, "main_input_name"):
        raise InvalidBatches(
            f"{type(model).__name__} takes tokens, but argument {name!r} of the batch is text. Give "
            'tokenizer(texts, return_tensors="pt", padding=True), which has the attention_mask too.'
        )


def _checked(valid: Any, n: int) -> Bool[Tensor, "batch pos"]:
    if not isinstance(valid, Tensor) or valid.dtype != torch.bool or valid.ndim != 2 or len(valid) != n:
        came = f"{valid.dtype} of shape {tuple(valid.shape)}" if isinstance(valid, Tensor) else type(valid).__name__
        raise ShapeMismatch(f"Expected valid= to return bool of shape ({n}, pos), got {came}.")
    return valid


def _of_masks(
    given: Mapping[Key, Any], n: int, main: Tensor | None, model: nn.Module | None
) -> tuple[Valid, Bool[Tensor, "batch encoder_pos"] | None, Bool[Tensor, "batch query key"] | None]:
    """What masks say: `valid`, `encoder_valid` and `attends` of `Inputs`."""
    mask = _first(given, _MASKS)
    inverted = _first(given, ("tgt_key_padding_mask",) if "tgt" in given else _INVERTED_MASKS)
    if mask is None and inverted is not None:
        mask = inverted if inverted.is_floating_point() else ~inverted.bool()
    # Transformers takes a mask of two axes for `batch pos`, whatever is in it.
    about = None if hasattr(model, "main_input_name") else main
    with_decoder = getattr(getattr(model, "config", None), "is_encoder_decoder", False) is True
    of_decoder = [value for name, value in given.items() if str(name).startswith("decoder_") and value is not None]
    if of_decoder or (with_decoder and given.get("labels") is not None):
        decoder_mask = _first(given, ("decoder_attention_mask",))
        return _read(decoder_mask, n, None)[0], _read(mask, n, None)[0], None
    valid, attends = _read(mask, n, about)
    if valid is not None and main is not None and main.ndim > 1 and any(map(holds_tensors, given.values())):
        valid = valid[:, -main.shape[1] :]  # the others are those of a cache
    if valid is not None and with_decoder and hasattr(model, "get_decoder") and not bool(valid.all()):
        raise ShapeMismatch(
            f"The attention_mask is that of the encoder of {type(model).__name__}, and says nothing of the decoder's "
            f"positions. Give decoder_input_ids and decoder_attention_mask. Or: {GIVE_VALID}."
        )
    return valid, None, attends


def _read(mask: Tensor | None, n: int, main: Tensor | None) -> tuple[Valid, Bool[Tensor, "batch query key"] | None]:
    if mask is None or mask.ndim < 2:
        return None, None
    attends = attended(mask, n, main)
    return (kept_positions(mask, n), None) if attends is None else (attends.any(1), attends)


def _first(given: Mapping[Key, Any], names: Sequence[str]) -> Tensor | None:
    return next((given[name] for name in names if isinstance(given.get(name), Tensor)), None)


def _subsets(keys: Sequence[Key]) -> Iterator[tuple[Key, ...]]:
    """The smallest first."""
    return itertools.chain.from_iterable(itertools.combinations(keys, size) for size in range(len(keys) + 1))


def _agree(some: Any, whole: Any, indices: list[int], n: int) -> bool:
    """Whether outputs on some examples are those of the same examples among all."""
    pairs = [
        (of_some.double().nan_to_num(), of_all[indices].double().nan_to_num())
        for of_some, of_all in zip(_outputs(some), _outputs(whole), strict=False)
        if of_all.ndim and len(of_all) == n
    ]
    return bool(pairs) and all(
        one.shape == other.shape and bool((one - other).norm() <= 1e-3 * other.norm()) for one, other in pairs
    )


def _outputs(value: Any) -> list[Tensor]:
    values = value.values() if isinstance(value, Mapping) else value if isinstance(value, list | tuple) else [value]
    return [one for one in values if isinstance(one, Tensor) and one.is_floating_point()]
