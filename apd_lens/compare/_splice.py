"""Dictionaries in the place of activations."""

from collections.abc import Callable, Sequence

from jaxtyping import Shaped
from torch import Tensor, nn

from apd_lens._block import Block
from apd_lens._errors import InvalidSetting, ShapeMismatch
from apd_lens.compare._dictionaries import Dictionary, Latents
from apd_lens.host._sites import rewriting


def spliced(
    model: nn.Module,
    dictionaries: Sequence[Dictionary],
    masks: Sequence[Shaped[Tensor, "..."] | None] | None = None,
    *,
    keep_error: bool = False,
) -> Block:
    """Inside, every forward pass of your model continues with the activations that the dictionaries reconstruct.

    What they do not reconstruct is lost. This holds for every call of a site in a forward pass.

    Args:
        masks: which latents of each dictionary stay, `batch latents` for all positions of an example, or `batch *pos
            latents`. None for all.
        keep_error: add what the dictionary does not reconstruct with all latents. Then only what the latents that do
            not stay write is taken out of the activations: an edit.

    Raises:
        InvalidSetting: no such site, two dictionaries for one, or not one mask for each dictionary.
        ShapeMismatch: in a forward, activations or a mask of another shape.
    """
    masks = [None] * len(dictionaries) if masks is None else masks
    if len(masks) != len(dictionaries):
        raise InvalidSetting(f"Expected one mask for each of {len(dictionaries)} dictionaries, got {len(masks)}.")

    def cut(mask: Tensor | None) -> Callable[[Latents], Latents]:
        return lambda latents: latents if mask is None else latents * at_positions(mask, latents)

    return rewritten_latents(model, dictionaries, [cut(mask) for mask in masks], keep_error)


def rewritten_latents(
    model: nn.Module,
    dictionaries: Sequence[Dictionary],
    changes: Sequence[Callable[[Latents], Latents]],
    keep_error: bool = False,
) -> Block:
    """Inside, the model goes on with what each dictionary decodes from its changed latents.

    Args:
        keep_error: add what the dictionary leaves unexplained of the activations, without its gradient.
    """
    functions: dict[str, Callable[[Tensor], Tensor]] = {}
    for dictionary, change in zip(dictionaries, changes, strict=True):
        site, site_out = dictionary.site, dictionary.site_out or dictionary.site
        read, write = _read_and_write(dictionary, change, keep_error)
        for place, function in [(site, read), (site_out, write)] if site != site_out else [(site, write)]:
            if place in functions:
                raise InvalidSetting(f"Two dictionaries stand at {place!r}. Splice them in one at a time.")
            functions[place] = function
    return rewriting(model, functions)


def _read_and_write(
    dictionary: Dictionary, change: Callable[[Latents], Latents], keep_error: bool
) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]:
    """What is done with the activations at `site`, which stay, and with those at `site_out`."""
    kept: list[tuple[Latents, Latents]] = []

    def read(x: Tensor) -> Tensor:
        latents = dictionary.encode(x)
        kept[:] = [(latents, change(latents))]
        return x

    def write(x: Tensor) -> Tensor:
        if dictionary.site_out in (None, dictionary.site):
            read(x)
        if not kept:
            raise InvalidSetting(
                f"The forward pass came to {dictionary.site_out!r} before {dictionary.site!r}: a transcoder reads what "
                "comes first."
            )
        latents, changed = kept.pop()
        decoded = dictionary.decode(changed)
        if keep_error:
            decoded = decoded - dictionary.decode(latents).detach()
        decoded = decoded.reshape(x.shape).to(x.dtype)
        return x + decoded if keep_error else decoded

    return read, write


def at_positions(mask: Shaped[Tensor, "examples *mask_pos n"], latents: Latents) -> Shaped[Tensor, "examples *p n"]:
    """The mask with an axis for each position: one of `batch latents` holds for all positions of an example."""
    if mask.ndim == 2 < latents.ndim:
        mask = mask.reshape(len(mask), *[1] * (latents.ndim - 2), mask.shape[-1])
    if len(mask) != len(latents) or mask.shape[-1] != latents.shape[-1]:
        raise ShapeMismatch(
            f"Expected a mask for latents of shape {tuple(latents.shape)}, or (batch, latents), got "
            f"{tuple(mask.shape)}."
        )
    return mask
