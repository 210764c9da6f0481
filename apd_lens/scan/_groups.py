"""Groups of positions that are ablated together, and which position of one prompt corresponds to which of another."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Int, Shaped
from torch import Tensor

from apd_lens._draws import draws
from apd_lens._errors import InvalidSetting, ShapeMismatch
from apd_lens.data._batch import arguments
from apd_lens.data._inputs import Inputs

# name -> positions in one batch: an index for all prompts, one for each, or a mask.
Positions = Mapping[str, Any]


@dataclass(frozen=True, eq=False)
class Groups:
    """Of one batch: the positions of each group, from its last one back.

    Attributes:
        index: a prompt with fewer positions than slots has its first one in those that are left.
        own: whether a slot is a position of its own.
        alike: prompts of one number stand in for each other; the number is their length, or 0 for all.
        valid: False at padding.
    """

    index: Int[Tensor, "group batch slot"]
    own: Bool[Tensor, "group batch slot"]
    alike: Int[Tensor, " batch"]
    valid: Bool[Tensor, "batch pos"]

    @property
    def has(self) -> Bool[Tensor, "group batch"]:
        """Whether a prompt has a position of the group."""
        return self.own.any(-1)

    @property
    def last(self) -> Int[Tensor, " batch"]:
        """The last position of each prompt that is no padding."""
        places = torch.arange(self.valid.shape[1], device=self.valid.device)
        return torch.where(self.valid, places, 0).amax(1)

    def with_slots(self, n: int) -> "Groups":
        """The same with more slots, which are nobody's own."""
        more = n - self.index.shape[-1]
        index = torch.cat([self.index, self.index[..., -1:].expand(-1, -1, more)], -1)
        return replace(self, index=index, own=F.pad(self.own, (0, more)))

    def at(self, y: Shaped[Tensor, "batch pos d"]) -> Shaped[Tensor, "group batch slot d"]:
        """The rows at the positions."""
        return y[torch.arange(len(y), device=y.device)[:, None], self.index]


def each_position(valid: Bool[Tensor, "batch pos"], n_groups: int) -> Groups:
    """Every position is a group of its own; the last one is the last group. Prompts of one length are alike."""
    lengths, order = valid.sum(1), (~valid).long().argsort(dim=1, stable=True)
    from_start = torch.arange(n_groups, device=valid.device)[:, None] - n_groups + lengths
    own = from_start >= 0
    index = order.gather(1, from_start.clamp_min(0).T).T
    return Groups(index[..., None], own[..., None], lengths, valid)


def given_positions(positions: Positions, valid: Bool[Tensor, "batch pos"]) -> Groups:
    """The user's groups in one batch. All prompts are alike."""
    masks = torch.stack([_mask(name, given, valid) for name, given in positions.items()])
    counts, places = masks.sum(-1), torch.arange(valid.shape[1], device=valid.device)
    from_last = torch.where(masks, places, -1).sort(-1, descending=True).values
    slots = torch.arange(max(1, int(counts.max())), device=valid.device)
    index = from_last.gather(-1, slots.minimum(counts[..., None] - 1).clamp_min(0)).clamp_min(0)
    return Groups(index, slots < counts[..., None], torch.zeros_like(counts[0]), valid)


def _mask(name: str, given: Any, valid: Bool[Tensor, "batch pos"]) -> Bool[Tensor, "batch pos"]:
    """The positions of a group, as a mask; checked."""
    n, n_positions = valid.shape
    if isinstance(given, int) and not isinstance(given, bool):
        lengths, order = valid.sum(1), (~valid).long().argsort(dim=1, stable=True)
        there = (lengths + given if given < 0 else torch.full_like(lengths, given)).clamp(-1, n_positions)
        if bool(((there < 0) | (there >= lengths)).any()):
            raise InvalidSetting(
                f"positions={{{name!r}: {given}}}: one prompt has only {int(lengths.min())} positions that are no "
                "padding."
            )
        given = order.gather(1, there[:, None])[:, 0]
    if not isinstance(given, Tensor):
        raise InvalidSetting(
            f"Expected positions={{{name!r}: ...}} to be an index, integers of shape ({n},) or bool of shape "
            f"({n}, {n_positions}), got {type(given).__name__}. Of several batches give a list with one for each."
        )
    given = given.to(valid.device)
    if given.dtype == torch.bool and given.shape == valid.shape:
        mask = given
    elif not given.is_floating_point() and given.dtype != torch.bool and given.shape == (n,):
        if bool(((given < 0) | (given >= n_positions)).any()):
            raise InvalidSetting(f"positions={{{name!r}: ...}} holds an index that is not in 0 to {n_positions - 1}.")
        mask = torch.zeros_like(valid).scatter_(1, given.long()[:, None], True)
    else:
        raise ShapeMismatch(
            f"Expected positions={{{name!r}: ...}} to be integers of shape ({n},) or bool of shape ({n}, "
            f"{n_positions}), got {given.dtype} of shape {tuple(given.shape)}."
        )
    if bool((mask & ~valid).any()):
        raise InvalidSetting(f"positions={{{name!r}: ...}} holds padding: choose positions of the prompts' own tokens.")
    return mask


def check_enough(groups: Sequence[Groups], names: Sequence[str], within_batch: bool) -> None:
    """Raises InvalidSetting where a prompt has no other that could stand in for it."""
    of_batches = [[each] for each in groups] if within_batch else [list(groups)]
    for some in of_batches:
        alike, has = torch.cat([each.alike for each in some]), torch.cat([each.has for each in some], 1)
        for group, name in enumerate(names):
            lengths, counts = alike[has[group]].unique(return_counts=True)
            if bool((counts == 1).any()):
                length = int(lengths[counts == 1][0])
                among = " in its batch" if within_batch else ""
                raise InvalidSetting(
                    f"Only one prompt{among} has position {name!r}{f' and {length} tokens' if length else ''}, so its "
                    "output would be replaced by itself and every effect be 0. Give at least two prompts that differ "
                    "in what the behaviour is about (for one, also a changed one), leave this one out, or say with "
                    "positions= which positions of prompts of different lengths correspond."
                )


def donors(groups: Groups, seed: int, batch_number: int) -> Int[Tensor, "group batch"]:
    """For each prompt the one whose output it gets: another one that is alike and has the group, at random."""
    found = torch.arange(groups.own.shape[1], device=groups.own.device).repeat(len(groups.own), 1)
    for group, has in enumerate(groups.has):
        for number in groups.alike[has].unique().tolist():
            members = (has & (groups.alike == number)).nonzero()[:, 0]
            order = torch.randperm(
                len(members), generator=draws(seed, "where", batch_number, group, number), device="cpu"
            )
            members = members[order.to(members.device)]
            found[group, members] = members.roll(1)
    return found


def names_of_positions(
    groups: Sequence[Groups], batches: Sequence[Inputs], decode: Callable[[Any], str] | None
) -> list[str]:
    """Index and token where all prompts have one length; otherwise what is left to the last position."""
    n_groups = len(groups[0].own)
    if not all(bool(each.own.all()) for each in groups):
        return [str(place - n_groups) for place in range(n_groups)]
    tokens = [_tokens(inputs, each) for inputs, each in zip(batches, groups, strict=True)]
    if decode is None or any(each is None for each in tokens):
        return [str(place) for place in range(n_groups)]
    found = torch.cat([each.T for each in tokens if each is not None])
    return [f"{place} {_word(found[:, place].tolist(), decode)}" for place in range(n_groups)]


def _word(tokens: list[int], decode: Callable[[Any], str]) -> str:
    first = decode([tokens[0]]).strip() or "␣"
    return first if len(set(tokens)) == 1 else f"{first}…"


def _tokens(inputs: Inputs, groups: Groups) -> Int[Tensor, "group batch"] | None:
    """The tokens at the positions."""
    args, kwargs = arguments(inputs.batch)
    for name, value in [*(("", value) for value in args), *kwargs.items()]:
        is_tokens = isinstance(value, Tensor) and not value.is_floating_point() and value.dtype != torch.bool
        if is_tokens and value.shape == groups.valid.shape and "mask" not in name and "position" not in name:
            rows = torch.arange(len(value), device=value.device)
            return value[rows, groups.index[..., 0]]
    return None
