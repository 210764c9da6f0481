"""A tokenizer of a few merged bytes, fast and as one without offsets."""

import functools
from typing import Any

from tokenizers import ByteLevelBPETokenizer
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

_TEXTS = ["The capital of France is Paris.", "The capital of Italy is Rome.", "Old Burkina is not new."] * 3


@functools.cache
def tokenizer(bos: bool = False, eos: bool = False, side: str = "right") -> PreTrainedTokenizerFast:
    """Makes " France" one token, and several of a word that it does not know."""
    made = ByteLevelBPETokenizer()
    made.train_from_iterator(_TEXTS, vocab_size=340, min_frequency=2, special_tokens=["<s>", "</s>"])
    if bos or eos:
        single = " ".join([*["<s>"] * bos, "$A", *["</s>"] * eos])
        made._tokenizer.post_processor = TemplateProcessing(single=single, special_tokens=[("<s>", 0), ("</s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=made._tokenizer, bos_token="<s>", eos_token="</s>", padding_side=side
    )


class Slow:
    """A tokenizer that does not tell where its tokens are in the text."""

    is_fast = False

    def __init__(self, fast: PreTrainedTokenizerFast):
        self._fast = fast

    def __getattr__(self, name: str) -> Any:
        return getattr(self._fast, name)

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        return {"input_ids": self._fast(text, add_special_tokens=add_special_tokens)["input_ids"]}
