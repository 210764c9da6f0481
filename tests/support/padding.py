"""Models that take padded batches, and such batches."""

import torch
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

LENGTHS = (3, 5, 4)


def gpt2() -> GPT2LMHeadModel:
    config = GPT2Config(vocab_size=13, n_positions=8, n_embd=8, n_layer=1, n_head=2, use_cache=False)
    return GPT2LMHeadModel(config).eval()


def padded(lengths: tuple[int, ...] = LENGTHS, width: int = 6, filler: int = 0) -> dict[str, Tensor]:
    """Examples of these lengths, with `filler` tokens behind them."""
    tokens = torch.randint(1, 13, (len(lengths), width), generator=torch.Generator().manual_seed(1))
    attention_mask = (torch.arange(width) < torch.tensor(lengths)[:, None]).long()
    return {"input_ids": torch.where(attention_mask.bool(), tokens, filler), "attention_mask": attention_mask}


def alone(batch: dict[str, Tensor], index: int) -> dict[str, Tensor]:
    length = int(batch["attention_mask"][index].sum())
    return {"input_ids": batch["input_ids"][index : index + 1, :length]}
