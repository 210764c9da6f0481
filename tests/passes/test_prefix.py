"""What comes before the first decomposed matrix is run once for a batch, and gives bit for bit what it gave."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from nnsight import NNsight
from support.bridges import bridge_of
from support.hooked import hooked_transformer
from support.toy_models import tiny_gpt2, tiny_llama
from torch import nn
from transformers import GPT2LMHeadModel, LlamaForCausalLM

import apd_lens as apd
from apd_lens.data._inputs import joined_inputs
from apd_lens.host._fingerprints import mark_of_model
from apd_lens.passes import _prefix
from apd_lens.passes._output import default_output
from apd_lens.passes._replace import Mixture
from apd_lens.passes._watch import as_it_is, replaced_pass, watched_pass


def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return tiny_llama(num_hidden_layers=4)


def gpt2() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    return tiny_gpt2(n_layer=4)


HOSTS: dict[str, tuple[Callable[[], Any], str]] = {
    "Llama": (llama, "model.layers.2.self_attn.[vo]_proj*"),
    "GPT-2": (gpt2, "transformer.h.2.attn.c_proj*"),
    "nnsight": (lambda: NNsight(llama()), "model.layers.2.self_attn.[vo]_proj*"),
    "HookedTransformer": (lambda: hooked_transformer(n_layers=4), "blocks.2.attn.W_[VO]"),
    "TransformerBridge": (lambda: bridge_of(llama()), "blocks.2.attn.W_[VO]"),
}


def run_modules(model: nn.Module, run: Callable[[], Any]) -> tuple[Any, int]:
    """What `run` gives, and how many modules without submodules ran in it."""
    count = [0]

    def hook(*_: Any) -> None:
        count[0] += 1

    handles = [m.register_forward_hook(hook) for m in model.modules() if not list(m.children())]
    try:
        return run(), count[0]
    finally:
        for handle in handles:
            handle.remove()


@pytest.mark.parametrize("host", HOSTS)
def test_passes_with_what_was_kept_are_bit_for_bit_those_without(host: str, monkeypatch):
    make, pattern = HOSTS[host]
    monkeypatch.setattr(_prefix, "FEWEST_MATRICES", 1)
    target = apd.wrap(make())
    names = target.match(pattern)
    components = apd.init(target, weights=pattern, n_components=4, rank=2).components
    batch = torch.randint(12, (3, 5))
    mixture = Mixture(components, torch.rand(3, 4), 0.5)
    output, _ = replaced_pass(target, names, mixture, batch, default_output)
    plain, _ = replaced_pass(target, names, as_it_is, batch, default_output)
    inputs = target.read(batch)
    watched = watched_pass(target, names, inputs, default_output)
    assert torch.equal(watched.output, plain)
    assert list(target.prefixes.values()) == [True]
    (prefix,) = inputs.kept.values()
    assert prefix.kept

    again, n_modules = run_modules(target.model, lambda: replaced_pass(target, names, mixture, inputs, default_output))
    _, n_all = run_modules(target.model, lambda: replaced_pass(target, names, mixture, batch, default_output))
    assert torch.equal(again[0], output)
    assert n_modules < 0.7 * n_all
    gradients = [
        torch.autograd.grad(one.sum(), list(components.parameters()), allow_unused=True) for one in (again[0], output)
    ]
    assert all(torch.equal(one, other) for one, other in zip(*gradients, strict=True))
    watched_again = watched_pass(target, names, inputs, default_output)
    for one, other in zip(watched_again.calls, watched.calls, strict=True):
        assert torch.equal(one.x, other.x)


def test_few_tensors_are_stored():
    target = apd.wrap(llama())
    names = target.match("model.layers.3.self_attn.[vo]_proj*")
    inputs = target.read(torch.randint(12, (3, 5)))
    watched_pass(target, names, inputs, default_output)
    (prefix,) = inputs.kept.values()
    # the stream, its norm, q and k; cosines and sines of positions
    assert sum(tensor[0].numel() * len(tensor) for tensor in prefix.tensors()) <= 3 * 5 * (8 + 8 + 8 + 4) + 2 * 5 * 4


def test_a_pass_on_some_examples_is_that_on_all():
    target = apd.wrap(llama())
    names = target.match("model.layers.3.self_attn.[vo]_proj*")
    batch = torch.randint(12, (3, 5))
    inputs = target.read(batch)
    watched = watched_pass(target, names, inputs, default_output)
    assert inputs.kept
    assert inputs.some(slice(0, 2)).kept
    some = watched.again(None, slice(0, 2))
    torch.testing.assert_close(some.output, watched.output[:2])


def test_a_model_that_was_changed_in_front_is_run_whole():
    target = apd.wrap(llama())
    names = target.match("model.layers.3.self_attn.[vo]_proj*")
    inputs = target.read(torch.randint(12, (3, 5)))
    watched_pass(target, names, inputs, default_output)
    assert inputs.kept
    with torch.no_grad():
        target.weights["model.layers.0.mlp.up_proj.weight"].parameter.mul_(2)
    output, _ = replaced_pass(target, names, as_it_is, inputs, default_output)
    assert torch.equal(output, target.model(inputs.batch).logits)
    (prefix,) = inputs.kept.values()
    assert prefix.mark == mark_of_model(target.model)  # kept anew


class ReadsWhatAll(nn.Module):
    """Its end reads what each layer gave, in its own code: nothing of that may be left out."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(5, 5) for _ in range(10))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        given = []
        for layer in self.layers:
            x = layer(x)
            given.append(x)
        return torch.stack(given).sum(0)


class ChangesInPlace(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(5, 5) for _ in range(10))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            y = layer(x)
            y += x
            x = y
        return x


@pytest.mark.parametrize("make", [ReadsWhatAll, ChangesInPlace])
def test_where_it_cannot_be_kept_it_is_run(make: Callable[[], nn.Module]):
    torch.manual_seed(0)
    target = apd.wrap(make())
    names = target.match("layers.9*")
    x = torch.randn(4, 5)
    inputs = target.read(x)
    watched = watched_pass(target, names, inputs, default_output)
    for _ in range(2):
        again, _ = replaced_pass(target, names, as_it_is, inputs, default_output)
        assert torch.equal(again, watched.output)
        assert torch.equal(again, target.model(x))


class GoesAnotherWay(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(5, 5) for _ in range(10))
        self.skips = False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers[3:] if self.skips else self.layers:
            x = layer(x)
        return x


def test_a_model_that_goes_another_way_is_run_again_whole():
    torch.manual_seed(0)
    model = GoesAnotherWay()
    target = apd.wrap(model)
    names = target.match("layers.9*")
    inputs = target.read(torch.randn(4, 5))
    watched_pass(target, names, inputs, default_output)
    assert inputs.kept
    model.skips = True
    output, _ = replaced_pass(target, names, as_it_is, inputs, default_output)
    assert torch.equal(output, model(inputs.batch))
    assert not inputs.kept


@pytest.mark.parametrize("host", HOSTS)
@pytest.mark.parametrize("change", ["some", "replicated", "picked", "joined"])
def test_parts_and_copies_of_a_batch_start_from_what_was_kept_of_it(host: str, change: str, monkeypatch):
    make, pattern = HOSTS[host]
    monkeypatch.setattr(_prefix, "FEWEST_MATRICES", 1)
    target = apd.wrap(make())
    names = target.match(pattern)
    components = apd.init(target, weights=pattern, n_components=4, rank=2).components
    batch = torch.randint(12, (5, 5))  # as many examples as positions
    changes: dict[str, tuple[Callable[[Any], Any], Any]] = {
        "some": (lambda inputs: inputs.some(slice(1, 3)), batch[1:3]),
        "replicated": (lambda inputs: inputs.replicated(2), batch.repeat(2, 1)),
        "picked": (lambda inputs: inputs.picked([3, 0, 3]), batch[[3, 0, 3]]),
        "joined": (lambda inputs: joined_inputs([inputs.picked([i]) for i in (3, 1)]), batch[[3, 1]]),
    }
    derive, same = changes[change]
    mixture = Mixture(components, torch.rand(len(same), 4), 0.5)
    expected, n_all = run_modules(target.model, lambda: replaced_pass(target, names, mixture, same, default_output)[0])
    inputs = target.read(batch)
    watched_pass(target, names, inputs, default_output)
    replaced_pass(target, names, as_it_is, derive(inputs), default_output)  # the first one is looked at
    found, n_modules = run_modules(
        target.model, lambda: replaced_pass(target, names, mixture, derive(inputs), default_output)[0]
    )
    assert n_modules < 0.7 * n_all
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_what_is_of_no_example_is_not_cut_and_where_it_might_be_nothing_is_kept(monkeypatch):
    """A module in front gives as many rows as there are examples, which are of positions."""

    class Positions(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rows = nn.Parameter(torch.randn(4, 6))

        def forward(self, tokens: Any) -> Any:
            return self.rows * 1

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.positions = nn.Embedding(7, 6), Positions()
            self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 3)

        def forward(self, tokens: Any) -> Any:
            return self.second(self.first(self.embed(tokens)) + self.positions(tokens))

    monkeypatch.setattr(_prefix, "FEWEST_MATRICES", 1)
    torch.manual_seed(0)
    target = apd.wrap(Model())
    batch = torch.randint(7, (4, 4))
    inputs = target.read(batch)
    watched_pass(target, ["second.weight"], inputs, default_output)
    assert inputs.kept
    found, _ = replaced_pass(target, ["second.weight"], as_it_is, inputs.some(slice(1, 2)), default_output)
    torch.testing.assert_close(found, target.model(batch[1:2]))
    found, _ = replaced_pass(target, ["second.weight"], as_it_is, inputs.some(slice(1, 3)), default_output)
    torch.testing.assert_close(found, target.model(batch[1:3]))
