"""A network that does everything several times over."""

from dataclasses import dataclass
from itertools import product

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from apd_lens.errors import InvalidSetting, ShapeMismatch
from apd_lens.toys._shared import MLP, train_with_adamw

# Makes a prediction sure though the rows of E have norm 1. Without it each block learns to write ten times what it
# reads, logits have a standard deviation of 480 where the right one leads by 40, and a removal of anything changes
# everything.
SHARPNESS = 10.0


class Cipher(nn.Module):
    """r = E[token]; r = r + on_b · MLP_b(r) for each block b; y = 10 r Eᵀ. E has random rows of norm 1, and is
    frozen."""

    E: Tensor

    def __init__(self, n_tokens: int, width: int, n_neurons: int, n_blocks: int):
        super().__init__()
        self.register_buffer("E", F.normalize(torch.randn(n_tokens, width), dim=1))
        self.blocks = nn.ModuleList(MLP(width, n_neurons, bias=True) for _ in range(n_blocks))

    def forward(
        self, tokens: Int[Tensor, " batch"], on: Bool[Tensor, "batch n_blocks"] | None = None
    ) -> Float[Tensor, "batch n_tokens"]:
        """Logits of each token's partner.

        Args:
            on: the blocks that are on for each token; all of them without it. At least one has to be.

        Raises:
            ShapeMismatch: no such blocks.
        """
        if on is not None and on.shape != (len(tokens), len(self.blocks)):
            raise ShapeMismatch(f"Expected on of shape {(len(tokens), len(self.blocks))}, got {tuple(on.shape)}.")
        r = self.E[tokens]
        for index, block in enumerate(self.blocks):
            written = block(r)
            r = r + (written if on is None else written * on[:, index, None])
        return SHARPNESS * r @ self.E.mT


@dataclass(frozen=True, eq=False)
class CipherTarget:
    """A trained cipher. A mechanism is what one block does for one token, so a token has as many as there are blocks.

    Attributes:
        model: frozen.
        weights: the matrices to decompose, those of the blocks.
        partner: the token that is right for each token.
        loss: cross-entropy over all tokens and subsets of blocks.
    """

    model: Cipher
    weights: list[str]
    partner: Int[Tensor, " token"]
    loss: float

    @property
    def tokens(self) -> Int[Tensor, " token"]:
        """Every token once."""
        return torch.arange(len(self.partner))

    @property
    def subsets(self) -> Bool[Tensor, "subset block"]:
        """Every subset of blocks but the empty one, the single blocks first and all of them last."""
        return subsets_of(len(self.model.blocks))

    def data(self) -> tuple[Int[Tensor, " data"], Bool[Tensor, "data block"]]:
        """Every token with every subset of blocks, as the model is called with it; the subset changes fastest."""
        return _pairs(self.tokens, self.subsets)

    def is_right(self, on: Bool[Tensor, " block"] | None = None) -> Bool[Tensor, " token"]:
        """Which tokens the model, as it is at the moment, maps to their partners with these blocks on."""
        each = None if on is None else on.expand(len(self.partner), -1)
        return self.model(self.tokens, each).argmax(1) == self.partner


def subsets_of(n_blocks: int) -> Bool[Tensor, "subset block"]:
    """Every subset but the empty one, the smallest first.

    >>> subsets_of(2).int().tolist()
    [[1, 0], [0, 1], [1, 1]]
    """
    found = sorted(product((1, 0), repeat=n_blocks), key=sum)
    return torch.tensor(found[1:], dtype=torch.bool)


def _pairs(tokens: Tensor, subsets: Tensor) -> tuple[Tensor, Tensor]:
    return tokens.repeat_interleave(len(subsets)), subsets.repeat(len(tokens), 1)


def train_cipher(
    width: int = 64,
    n_neurons: int = 48,
    *,
    n_tokens: int = 32,
    n_blocks: int = 3,
    steps: int = 3000,
    lr: float = 3e-3,
    seed: int = 0,
) -> CipherTarget:
    """Trains residual MLP blocks so that every subset of them, but the empty one, maps each token to its partner.

    Partners are a random derangement, in one cycle. Every step sees each token with each subset, in cross-entropy, with
    AdamW and learning rate lr·cos(π/2 · progress).

    Args:
        n_neurons: of each block.

    Raises:
        InvalidSetting: fewer than two tokens, or no block.
    """
    if n_tokens < 2 or n_blocks < 1:
        raise InvalidSetting(f"A cipher needs two tokens and a block, got n_tokens={n_tokens}, n_blocks={n_blocks}.")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Cipher(n_tokens, width, n_neurons, n_blocks)
        cycle = torch.randperm(n_tokens)
    partner = torch.empty_like(cycle).scatter_(0, cycle, cycle.roll(1))
    tokens, on = _pairs(torch.arange(n_tokens), subsets_of(n_blocks))

    def loss_at(step: int) -> Tensor:
        return F.cross_entropy(model(tokens, on), partner[tokens])

    train_with_adamw(model.parameters(), loss_at, steps, lr, decay=True)
    model.requires_grad_(False)
    weights = [f"blocks.{block}.{side}.weight" for block in range(n_blocks) for side in ("mlp_in", "mlp_out")]
    return CipherTarget(model, weights, partner, loss_at(0).item())
