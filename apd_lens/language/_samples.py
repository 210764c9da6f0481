"""General text that needs no data set: texts sampled from the model itself."""

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from apd_lens._block import no_grad
from apd_lens._errors import InvalidSetting
from apd_lens.host._patch import outside_traces
from apd_lens.host._target import evaluating
from apd_lens.host._wrap import wrap
from apd_lens.language._template import ids_of
from apd_lens.passes._output import default_output

# How many first tokens there are where the user gives none.
_N_STARTS = 64
# Texts that are sampled at once.
_AT_ONCE = 64


@no_grad()
def sample_texts(
    model: Any,
    n: int = 384,
    length: int = 48,
    *,
    starts: Int[Tensor, "starts *pos"] | Sequence[int] | None = None,
    temperature: float = 1.0,
    seed: int = 0,
    tokenizer: Any = None,
) -> Int[Tensor, "n length"]:
    """Texts that the model itself writes: general text for `others=`, without a data set.

    The same seed gives the same texts, and torch's random state stays as it is. A Hugging Face model, also inside
    nnsight or a TransformerBridge, keeps keys and values; any other model reads each text anew for every token. Tokens
    that end a text, or are special in another way, are never sampled, so each text has `length` tokens.

    Args:
        model: a HookedTransformer, TransformerBridge, nnsight model, or torch.nn.Module with logits `batch pos vocab`.
        n: number of texts.
        length: number of tokens in each.
        starts: the first token, or tokens, of each text; the texts take them in turn. None: the 64 tokens that the
            model finds most likely at the beginning of a text (behind the token that begins texts, or ends them), each
            as often as the others. With a tokenizer only words that begin with a capital letter are among them. A
            sample of first tokens would mostly be punctuation, since a model knows little there; in turn they spread
            over subjects.
        temperature: above 0; below 1 texts are more alike.
        seed: of the sampling.
        tokenizer: default the model's own, if it has one. Where it puts a token in front of every text, each sampled
            text begins with that too.

    Raises:
        InvalidSetting: sizes or a temperature that are not above 0; starts that are longer than the texts; or no starts
            where neither model nor tokenizer know a token that begins or ends texts.
    """
    if n < 1 or length < 1 or temperature <= 0:
        raise InvalidSetting(f"Expected n, length and temperature above 0, got {n}, {length} and {temperature}.")
    tokenizer = getattr(model, "tokenizer", None) if tokenizer is None else tokenizer
    whole = wrap(model).model
    host = getattr(whole, "original_model", whole)  # of a TransformerBridge
    device = next(host.parameters()).device
    with evaluating(whole), outside_traces(whole):
        beginning = _beginning(whole, tokenizer)
        never = _never(whole, tokenizer)
        if starts is None:
            first = _likely_starts(host, whole, tokenizer, beginning, never, device)
        else:
            first = torch.as_tensor(starts)
            first = first[:, None] if first.ndim == 1 else first
        first = torch.cat([torch.tensor(beginning, dtype=torch.long).expand(len(first), -1), first.long().cpu()], 1)
        if first.shape[1] > length or not len(first):
            raise InvalidSetting(
                f"Expected one start or more, and texts longer than them; got {len(first)} starts of "
                f"{first.shape[1]} tokens (with what begins every text) for texts of {length}."
            )
        first = first[torch.arange(n) % len(first)]
        generator = torch.Generator().manual_seed(seed)
        drawn = torch.rand(n, length, generator=generator, dtype=torch.float64)
        parts = [
            _continued(host, ids.to(device), numbers.to(device), length, temperature, never)
            for ids, numbers in zip(first.split(_AT_ONCE), drawn.split(_AT_ONCE), strict=True)
        ]
    return torch.cat(parts)


def _continued(
    host: nn.Module,
    ids: Int[Tensor, "texts pos"],
    drawn: Float[Tensor, "texts length"],
    length: int,
    temperature: float,
    never: list[int],
) -> Int[Tensor, "texts length"]:
    """The texts, written to their full length; number i of those drawn decides on token i."""
    keeps, cache = _keeps_keys_and_values(host), None
    new = ids
    while ids.shape[1] < length:
        if keeps:
            value = host(input_ids=new, past_key_values=cache, use_cache=True)
            cache = value.past_key_values
        else:
            value = host(ids)
        logits = default_output(value)[:, -1].float() / temperature
        logits[:, [token for token in never if token < logits.shape[1]]] = -torch.inf
        rising = logits.double().softmax(-1).cumsum(-1)
        wanted = drawn[:, ids.shape[1], None] * rising[:, -1:]
        new = torch.searchsorted(rising, wanted, right=True).clamp_max(rising.shape[1] - 1)
        ids = torch.cat([ids, new], 1)
    return ids


def _keeps_keys_and_values(host: nn.Module) -> bool:
    """Whether it is a Hugging Face model that gives its cache back."""
    parameters = inspect.signature(type(host).forward).parameters
    is_decoder = not getattr(getattr(host, "config", None), "is_encoder_decoder", False)
    return hasattr(host, "main_input_name") and {"past_key_values", "use_cache"} <= set(parameters) and is_decoder


def _likely_starts(
    host: nn.Module, model: nn.Module, tokenizer: Any, beginning: list[int], never: list[int], device: torch.device
) -> Int[Tensor, "starts one"]:
    """The tokens that are most likely at the beginning of a text."""
    before = beginning or _some_token(model, tokenizer, ("bos_token_id", "eos_token_id"))[:1]
    if not before:
        raise InvalidSetting(
            "Neither the model nor a tokenizer knows a token that begins or ends texts, so first tokens cannot be "
            "chosen. Give starts=, a tensor of first tokens."
        )
    logits = default_output(host(torch.tensor([before], device=device)))[0, -1].float()
    likely = torch.tensor([token for token in logits.argsort(descending=True).tolist() if token not in never])
    if hasattr(tokenizer, "decode"):
        words = [token for token in likely[: 64 * _N_STARTS].tolist() if _begins_a_sentence(tokenizer.decode([token]))]
        likely = torch.tensor(words or likely.tolist())
    return likely[:_N_STARTS, None]


def _begins_a_sentence(word: str) -> bool:
    return word in ("A", "I") or (word.isalpha() and len(word) > 1 and word[0].isupper() and word[1:].islower())


def _beginning(model: nn.Module, tokenizer: Any) -> list[int]:
    """What stands in front of every text that the model reads; nothing, or one token."""
    bos = getattr(tokenizer, "bos_token_id", None)
    if bos is None or not hasattr(tokenizer, "decode"):
        return []
    prepends = getattr(getattr(model, "cfg", None), "default_prepend_bos", None)
    if prepends is None:
        prepends = ids_of(tokenizer, "a")[:1] == [bos]
    return [bos] if prepends else []


def _never(model: nn.Module, tokenizer: Any) -> list[int]:
    """Tokens that are no text."""
    found = _some_token(model, tokenizer, ("bos_token_id", "eos_token_id", "pad_token_id"))
    return sorted({*found, *getattr(tokenizer, "all_special_ids", ())})


def _some_token(model: nn.Module, tokenizer: Any, names: tuple[str, ...]) -> list[int]:
    found: list[int] = []
    for of in (tokenizer, getattr(model, "config", None), getattr(model, "generation_config", None)):
        for name in names:
            value = getattr(of, name, None)
            found += value if isinstance(value, list) else [value] if isinstance(value, int) else []
    return found
