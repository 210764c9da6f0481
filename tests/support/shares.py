"""Whether a share that was counted is as chance has it."""

import math

import torch

N_DRAWN = 20_000


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def within_four_sigma(share: float, probability: float, n: int) -> bool:
    return abs(share - probability) < 4 * math.sqrt(probability * (1 - probability) / n)
