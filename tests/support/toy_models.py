"""Small models whose right answers can be worked out, or whose weights can be swapped and asked again."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import apd_lens as apd
from apd_lens.decomposition._decomposition import Decomposition

if TYPE_CHECKING:  # seconds of imports, so only where a test makes one
    from transformers import GPT2LMHeadModel, LlamaForCausalLM


def conv1d(d_out: int, d_in: int) -> nn.Module:
    """transformers' Conv1D; without transformers a stand-in that apd_lens takes for it, by its name."""
    try:
        from transformers.pytorch_utils import Conv1D
    except ModuleNotFoundError:
        Conv1D = _Conv1D
    return Conv1D(d_out, d_in)


class _Conv1D(nn.Module):
    __module__ = "transformers.pytorch_utils"

    def __init__(self, d_out: int, d_in: int):
        super().__init__()
        self.weight, self.bias = nn.Parameter(0.02 * torch.randn(d_in, d_out)), nn.Parameter(torch.zeros(d_out))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight + self.bias


_Conv1D.__name__ = "Conv1D"


class TMS(nn.Module):
    """Toy model of superposition: relu((x @ W) @ Wᵀ + b), with one W in two layers."""

    def __init__(self, n_features: int, d_hidden: int):
        super().__init__()
        self.linear1 = conv1d(d_hidden, n_features)
        self.linear2 = nn.Linear(d_hidden, n_features)
        self.linear2.weight = self.linear1.weight

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.linear2(self.linear1(x)))


class ResidualMLP(nn.Module):
    """r = x @ W_E; r = r + mlp_out(relu(mlp_in(r))) for each layer; y = r @ W_U."""

    def __init__(self, n_features: int, d_resid: int, d_mlp: int, n_layers: int):
        super().__init__()
        self.W_E = nn.Linear(n_features, d_resid, bias=False)
        self.layers = nn.ModuleList(
            nn.ModuleDict({"mlp_in": nn.Linear(d_resid, d_mlp), "act": nn.ReLU(), "mlp_out": nn.Linear(d_mlp, d_resid)})
            for _ in range(n_layers)
        )
        self.W_U = nn.Linear(d_resid, n_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        r = self.W_E(x)
        for layer in self.layers:
            r = r + layer["mlp_out"](layer["act"](layer["mlp_in"](r)))
        return self.W_U(r)


class TinyGPT(nn.Module):
    """Token and position embeddings (looked up by arange, without a batch axis), causal averaging, a tied head."""

    def __init__(self, d_vocab: int = 11, d_model: int = 6, n_ctx: int = 7):
        super().__init__()
        self.wte = nn.Embedding(d_vocab, d_model)
        self.wpe = nn.Embedding(n_ctx, d_model)
        self.fc = nn.Linear(d_model, 2 * d_model)
        self.proj = conv1d(d_model, 2 * d_model)
        self.head = nn.Linear(d_model, d_vocab, bias=False)
        self.head.weight = self.wte.weight

    def forward(self, tokens: Tensor) -> Tensor:
        r = self.wte(tokens) + self.wpe(torch.arange(tokens.shape[1], device=tokens.device))
        averaged = r.cumsum(1) / torch.arange(1, tokens.shape[1] + 1, device=tokens.device)[:, None]
        return self.head(r + self.proj(torch.tanh(self.fc(averaged))))


def tiny_gpt2(**changes: Any) -> "GPT2LMHeadModel":
    """Hugging Face's GPT-2 with random weights: two layers, wte tied to lm_head."""
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes = {"vocab_size": 13, "n_positions": 12, "n_embd": 8, "n_layer": 2, "n_head": 2, "initializer_range": 0.3}
    return GPT2LMHeadModel(GPT2Config(**{**sizes, **changes})).eval()


def tiny_llama(**changes: Any) -> "LlamaForCausalLM":
    """Hugging Face's Llama with random weights: two layers, two query heads to one key and value head, a gated MLP."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {
        "vocab_size": 13,
        "hidden_size": 8,
        "intermediate_size": 12,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 12,
        "initializer_range": 0.3,
    }
    return LlamaForCausalLM(LlamaConfig(**{**sizes, **changes})).eval()


def zero_head(z: Tensor, hook: Any) -> Tensor:
    """A TransformerLens hook that takes the second head out."""
    z = z.clone()
    z[:, :, 1] = 0
    return z


def double(value: Tensor, hook: Any) -> Tensor:
    """A TransformerLens hook."""
    return value * 2


def linear_of_known_parts() -> tuple[nn.Linear, apd.ParameterComponents]:
    """y = x @ W with W = Σ_c scale_c e_c e_cᵀ, scale = 1, 2, 3, 4: four rank-one parts, and the four as components."""
    scale = torch.tensor([1.0, 2.0, 3.0, 4.0])
    model = nn.Linear(4, 4, bias=False)
    with torch.no_grad():
        model.weight.copy_(torch.diag(scale))
    e = torch.eye(4)
    return model, apd.ParameterComponents({"weight": e[:, :, None] * scale[:, None, None]}, {"weight": e[:, None, :]})


def decomposition_of(
    model: Any,
    weights: str | list[str] = "*",
    *,
    n_components: int = 5,
    rank: int | None = 2,
    selection: apd.BatchTopK | apd.TopK | None = None,
    output: Callable[[Any], Tensor] | None = None,
    seed: int = 0,
) -> apd.Decomposition:
    """Random components of a model, as `decompose` starts from."""
    options = {} if output is None else {"output": output}
    state = apd.init(
        model,
        weights=weights,
        n_components=n_components,
        rank=rank,
        selection=selection or apd.BatchTopK(2.0),
        optimization=apd.Optimization(scaled=False, init_scale=0.5),  # whatever the size of the weights
        seed=seed,
        **options,
    )
    return state.decomposition()


def with_fingerprints_renewed(decomposition: apd.Decomposition) -> apd.Decomposition:
    """The same components of the matrices as they are now: a test changed them, or their dtype, on purpose."""
    target = decomposition.target
    fingerprints = {name: target.fingerprints.of(target.weights[name]) for name in decomposition.fingerprints}
    return replace(decomposition, fingerprints=fingerprints)


def keep_in_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hosts round norms and softmax to float32 in a float64 model; finite differences cannot be taken of that."""
    to, softmax = Tensor.to, F.softmax

    def keep(x: Tensor, dtype: Any) -> Any:
        return x.dtype if x.dtype == torch.float64 and dtype == torch.float32 else dtype

    monkeypatch.setattr(Tensor, "float", lambda x: to(x, keep(x, torch.float32)))
    monkeypatch.setattr(Tensor, "to", lambda x, *args, **kwargs: to(x, *(keep(x, arg) for arg in args), **kwargs))
    monkeypatch.setattr(F, "softmax", lambda x, dim, dtype=None, **_: softmax(x, dim, dtype=keep(x, dtype)))


@contextmanager
def substituted(target: apd.TargetModel, values: dict[str, Tensor]) -> Iterator[None]:
    """Inside, the model's own parameters hold these matrices (`d_in d_out`); the slow, obviously right way."""
    stored = {name: target.weights[name].parameter.detach().clone() for name in values}
    try:
        for name, value in values.items():
            target.weights[name].parameter.data.copy_(target.weights[name].to_host(value))
        yield
    finally:
        for name, value in stored.items():
            target.weights[name].parameter.data.copy_(value)


@dataclass(frozen=True, eq=False)
class Snapshot:
    """All that must be as it was before: parameters, buffers, gradients, modes, and every module's attributes."""

    state: dict[str, Tensor]
    grads: dict[str, Tensor | None]
    attributes: dict[str, dict[str, Any]]

    @staticmethod
    def of(model: nn.Module) -> "Snapshot":
        return Snapshot(
            state={name: value.clone() for name, value in model.state_dict().items()},
            grads={name: p.grad for name, p in model.named_parameters()},
            attributes={
                name: {key: _shallow(value) for key, value in module.__dict__.items()}
                for name, module in model.named_modules()
            },
        )

    def assert_unchanged(self, model: nn.Module) -> None:
        now = Snapshot.of(model)
        assert now.state.keys() == self.state.keys()
        for name, value in self.state.items():
            assert torch.equal(now.state[name], value), name
        assert now.grads == self.grads
        assert now.attributes == self.attributes


@contextmanager
def interrupted_in_forward(module: nn.Module, forward: int) -> Iterator[None]:
    """Inside, the module's forward of that number, counted from 1, raises KeyboardInterrupt."""
    n_calls = 0

    def stop(module: nn.Module, args: Any) -> None:
        nonlocal n_calls
        n_calls += 1
        if n_calls == forward:
            raise KeyboardInterrupt

    handle = module.register_forward_pre_hook(stop)
    yield
    handle.remove()


def _shallow(value: Any) -> Any:
    """A copy of a module's dict (parameters, hooks, submodules) with its entries by identity; others as they are."""
    if isinstance(value, dict):
        return {key: id(entry) for key, entry in value.items()}
    return value if isinstance(value, bool | int | str | type(None)) else id(value)


def known() -> Decomposition:
    """y = x @ diag(1, 2, 3, 4), the four diagonal entries as components."""
    model, components = linear_of_known_parts()
    start = decomposition_of(model, n_components=4, rank=1, selection=apd.TopK(1))
    return Decomposition(start.target, components, start.settings, start.output, start.fingerprints)


class Mixing(torch.nn.Module):
    """Positions mix: each sees the sum of those up to it."""

    def __init__(self):
        super().__init__()
        self.read, self.write = torch.nn.Linear(3, 4), torch.nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.write(torch.tanh(self.read(x)).cumsum(1))
