"""A part of what a small model does, taken into components, while the rest of its weights stays in the model.

- A toy model of superposition with 40 features in 10 dimensions. The data have 5 of the features, the others the 35
  other ones. Exactly those 5 should be in components.
- 64 facts in an MLP of 48 neurons. The data are 8 of the facts, the others the 56 other ones.

    python examples/targeted.py              # seeds 0 to 4: five minutes
    python examples/targeted.py --seeds 1
"""

import argparse

import torch
import torch.nn.functional as F
from torch import Tensor

import apd_lens as apd
from apd_lens import metrics, toys

N_FEATURES, N_TARGET = 40, 5
N_FACTS, N_OBJECTS, D_MODEL, N_NEURONS, N_FORGET = 64, 32, 256, 48, 8


def superposition(seed: int, steps: int, target_steps: int) -> dict[str, float]:
    """How well 5 of 40 features come apart."""
    model = toys.train_tms(N_FEATURES, 10, seed=seed, steps=target_steps).model
    chosen = torch.randperm(N_FEATURES, generator=torch.Generator().manual_seed(seed))[:N_TARGET]

    def draws(step: int, of: int) -> torch.Generator:
        return torch.Generator().manual_seed(1_000_000 * seed + 2 * step + of)

    def data(step: int) -> Tensor:
        x = torch.zeros(2048, N_FEATURES)
        x[:, chosen] = toys.tms_data(2048, draws(step, 0), n_features=N_TARGET, probability=0.2)
        return x

    def others(step: int) -> Tensor:
        x = toys.tms_data(2048, draws(step, 1), n_features=N_FEATURES, probability=0.05)
        x[:, chosen] = 0
        return x

    decomposition = apd.decompose(
        model,
        data,
        others=others,
        n_components=8,
        # With the rest off, the hidden space could be turned as a whole; the hidden activations say how it lies.
        losses=apd.Losses(faithfulness=0, hidden=1, hidden_at=("linear1",)),
        optimization=apd.Optimization(steps=steps),
        seed=seed,
    )
    (name,) = decomposition.components.names
    P = decomposition.components.component_weights(name).detach()
    P, W = (P if P.shape[1] == N_FEATURES else P.mT), model.W.detach()
    best = metrics.best_components(W[chosen], P[:, chosen])
    squares = P[best].square().sum(-1)  # feature, row
    rest = torch.ones(N_FEATURES, dtype=torch.bool)
    rest[chosen] = False
    return {
        "features with a component of their own": float(len(best.unique())),
        "lowest cosine to the true row": F.cosine_similarity(P[best, chosen], W[chosen]).min().item(),
        "lowest share of a component in its own row": (squares.gather(1, chosen[:, None])[:, 0] / squares.sum(1))
        .min()
        .item(),
        "components in the 35 other rows, share of these": (P.sum(0)[rest].norm() / W[rest].norm()).item(),
    }


class Facts(torch.nn.Module):
    """Random embeddings of subjects, an MLP behind a norm, and a random unembedding of objects."""

    def __init__(self, seed: int, target_steps: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.embed = torch.nn.Embedding(N_FACTS, D_MODEL)
        self.norm = torch.nn.LayerNorm(D_MODEL)
        self.W_in = torch.nn.Linear(D_MODEL, N_NEURONS)
        self.W_out = torch.nn.Linear(N_NEURONS, D_MODEL)
        self.unembed = torch.nn.Linear(D_MODEL, N_OBJECTS, bias=False)
        torch.nn.init.normal_(self.unembed.weight, std=D_MODEL**-0.5)
        self.answers = torch.randint(0, N_OBJECTS, (N_FACTS,))
        mlp = [*self.W_in.parameters(), *self.W_out.parameters()]
        optimizer = torch.optim.AdamW(mlp, lr=3e-3, weight_decay=0.05)
        for _ in range(target_steps):
            loss = F.cross_entropy(self(torch.arange(N_FACTS)[:, None])[:, 0], self.answers)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        self.requires_grad_(False)

    def forward(self, subjects: Tensor) -> Tensor:
        stream = self.embed(subjects)
        return self.unembed(stream + self.mlp(stream))

    def mlp(self, stream: Tensor) -> Tensor:
        return self.W_out(torch.relu(self.W_in(self.norm(stream))))

    def is_guessed(self, subjects: Tensor) -> Tensor:
        """Whether a fact is answered rightly with the MLP's mean over all facts in the place of its output."""
        mean = self.mlp(self.embed.weight).mean(0)
        return self.unembed(self.embed(subjects) + mean).argmax(-1) == self.answers[subjects]


def facts(seed: int, steps: int, target_steps: int) -> dict[str, float]:
    """How well 8 of 64 facts come apart, and what is forgotten with them."""
    model = Facts(seed, target_steps)
    subjects = torch.randperm(N_FACTS, generator=torch.Generator().manual_seed(seed))[:, None]
    data, others = subjects[:N_FORGET], subjects[N_FORGET:]

    def centred(logits: Tensor) -> Tensor:
        return (logits - logits.mean(-1, keepdim=True))[:, 0]

    decomposition = apd.decompose(
        model,
        [data],
        ["W_*"],
        others=[others],
        n_components=N_FORGET + 2,
        selection=apd.TopK(2),
        moves=None,
        # What a fact's component leaves to the rest in front of the nonlinearity would be known without it.
        losses=apd.Losses(faithfulness=0, simplicity=apd.HoldThenDecay(0.02), hidden=3, hidden_at=("W_in",)),
        optimization=apd.Optimization(steps=steps, lr=3e-3, scaled=False, start="data"),
        output=centred,
        seed=seed,
    )
    found = apd.language.forgetting(decomposition, data, output=centred, progress=False)
    forgotten_far = []
    for component in found.own.tolist():
        with decomposition.ablate(component):
            forgotten_far.append((model(others)[:, 0].argmax(-1) != model.answers[others[:, 0]]).float().mean().item())
    return {
        "facts with a component of their own": float((found.own.bincount() == 1).sum()),
        "right on two components": found.kept.float().mean().item(),
        "own fact forgotten": found.forgotten.float().mean().item(),
        "  of those that the MLP's mean does not answer": found.forgotten[~model.is_guessed(data)[:, 0]]
        .float()
        .mean()
        .item(),
        "other facts of the data forgotten": found.others_changed,
        "facts of the others forgotten": sum(forgotten_far) / len(forgotten_far),
    }


def main(seeds: range, steps: int, target_steps: int) -> None:
    runs = [
        ("5 of 40 features in superposition", superposition, steps),
        ("8 of 64 facts in an MLP, the fitted start alone", facts, 0),
        ("8 of 64 facts in an MLP", facts, steps),
    ]
    for name, measure, n_steps in runs:
        of_seeds = [measure(seed, n_steps, target_steps) for seed in seeds]
        print(f"\n{name}, {n_steps} steps, seeds {seeds[0]} to {seeds[-1]}")
        for what in of_seeds[0]:
            print(f"  {what}: {', '.join(f'{one[what]:.4g}' for one in of_seeds)}", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--target-steps", type=int, default=5000)
    options = parser.parse_args()
    main(range(options.first, options.first + options.seeds), options.steps, options.target_steps)
