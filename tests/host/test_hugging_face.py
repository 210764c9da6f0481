"""What a user does with a Hugging Face model goes on working inside sparse, ablate and only.

The right answers come from the model with its weight really replaced.
"""

import copy
from collections.abc import Callable

import pytest
import torch
from support.toy_models import decomposition_of, substituted, tiny_gpt2, tiny_llama
from torch import Tensor, nn
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

import apd_lens as apd

CHOSEN = [1, 3]


def gpt2() -> nn.Module:
    return tiny_gpt2(embd_pdrop=0.0, attn_pdrop=0.0, resid_pdrop=0.0)


HOSTS: dict[str, tuple[Callable[[], nn.Module], str, str]] = {
    "gpt2": (gpt2, "transformer.h.0.*", "transformer.h.0.mlp.c_proj"),
    "llama": (tiny_llama, "model.layers.0.*", "model.layers.0.mlp.down_proj"),
}
TOKENS = torch.randint(13, (2, 5), generator=torch.Generator().manual_seed(1))


@pytest.fixture(params=HOSTS)
def decomposition(request) -> apd.Decomposition:
    torch.manual_seed(0)
    model, weights, _ = HOSTS[request.param]
    return decomposition_of(model(), weights)


def leaf(decomposition: apd.Decomposition) -> nn.Module:
    """A module whose matrix is decomposed."""
    path = next(path for _, weights, path in HOSTS.values() if f"{path}.weight" in decomposition.target.weights)
    return decomposition.target.model.get_submodule(path)


def answers(decomposition: apd.Decomposition, ask: Callable[[], Tensor]) -> list[tuple[Tensor, Tensor]]:
    """What `ask()` gives in each context, and what it gives on the model whose weights were really replaced."""
    components, weights = decomposition.components, decomposition.target.weights
    mask = torch.zeros(components.n_components)
    mask[CHOSEN] = 1
    kept = {name: components.summed(name, mask) for name in components.names}
    without = {name: weights[name].value() - kept[name] for name in kept}
    contexts = [
        (lambda: decomposition.only(CHOSEN), kept),
        (lambda: decomposition.sparse(mask.expand(2, -1)), kept),
        (lambda: decomposition.ablate(CHOSEN), without),
    ]
    pairs = []
    for context, values in contexts:
        with context():
            came = ask()
        with substituted(decomposition.target, values):
            pairs.append((came, ask()))
    return pairs


def assert_all_close(pairs: list[tuple[Tensor, Tensor]]) -> None:
    assert not torch.allclose(pairs[0][1], pairs[2][1], rtol=1e-2, atol=1e-2)  # the contexts differ
    for came, expected in pairs:
        assert_close(came, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("prepend", [False, True])
@pytest.mark.parametrize("when", ["before", "inside"])
def test_hooks_of_the_users(decomposition: apd.Decomposition, when: str, prepend: bool):
    """An edit of the input is what we multiply, an edit of the output is what comes after us."""
    model, module = decomposition.target.model, leaf(decomposition)

    def add_hooks() -> list:
        return [
            module.register_forward_pre_hook(lambda m, args: (args[0] * 2 + 1,), prepend=prepend),
            module.register_forward_hook(lambda m, args, out: out * args[0].mean() + 1, prepend=prepend),
        ]

    def ask() -> Tensor:
        handles = add_hooks() if when == "inside" else []
        try:
            return model(TOKENS).logits.detach()
        finally:
            for handle in handles:
                handle.remove()

    handles = add_hooks() if when == "before" else []
    assert_all_close(answers(decomposition, ask))
    for handle in handles:
        handle.remove()


def test_backward_hooks_and_gradients(decomposition: apd.Decomposition):
    model, module = decomposition.target.model, leaf(decomposition)
    seen: list[Tensor] = []
    handle = module.register_full_backward_hook(lambda m, grad_in, grad_out: seen.extend((*grad_in, *grad_out)))

    def ask() -> Tensor:
        seen.clear()
        embedded = model.get_input_embeddings()(TOKENS).detach().requires_grad_()
        model(inputs_embeds=embedded).logits.square().sum().backward()
        return torch.cat([embedded.grad.flatten(), *(gradient.flatten() for gradient in seen)])

    assert_all_close(answers(decomposition, ask))
    handle.remove()


def test_generate_with_a_cache(decomposition: apd.Decomposition):
    model = decomposition.target.model

    def ask() -> Tensor:
        return model.generate(
            TOKENS, attention_mask=torch.ones_like(TOKENS), max_new_tokens=5, do_sample=False, pad_token_id=0,
            output_logits=True, return_dict_in_generate=True,
        ).logits[-1]  # fmt: skip

    assert_all_close(answers(decomposition, ask))


def test_generate_with_a_mask_of_positions(decomposition: apd.Decomposition):
    """With a cache new tokens come one by one, of which a mask of positions says nothing."""
    model, options = decomposition.target.model, {"max_new_tokens": 3, "do_sample": False, "pad_token_id": 0}
    options["attention_mask"] = torch.ones_like(TOKENS)
    mask = torch.rand(2, 5, decomposition.components.n_components) > 0.5
    message = r"The mask is \(2, 5, \d+\), but .* on \(2, 1, \d+\).* To generate with a cache, .* mask\.any\(1\)"
    with decomposition.sparse(mask), pytest.raises(apd.ShapeMismatch, match=message):
        model.generate(TOKENS, **options)
    with decomposition.sparse(mask.any(1)):
        assert model.generate(TOKENS, **options).shape == (2, 8)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_modes(decomposition: apd.Decomposition, mode):
    model = decomposition.target.model

    def ask() -> Tensor:
        with mode():
            return model(TOKENS).logits.clone()

    assert_all_close(answers(decomposition, ask))


@pytest.mark.parametrize("reentrant", [False, True])
def test_training_with_gradient_checkpointing(decomposition: apd.Decomposition, reentrant: bool):
    """A backward inside the context runs the forward of each block again, on the components again."""
    model = decomposition.target.model
    model.train()
    model.activation_checkpointing_enable({"use_reentrant": reentrant})

    def ask() -> Tensor:
        embedded = model.get_input_embeddings()(TOKENS).detach().requires_grad_()
        model(inputs_embeds=embedded, use_cache=False).logits.square().sum().backward()
        return embedded.grad

    assert_all_close(answers(decomposition, ask))


def test_attributions_of_a_model_that_always_checkpoints():
    class Checkpointed(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.last = nn.Linear(3, 4), nn.Linear(4, 2)

        def block(self, x: Tensor) -> Tensor:
            return self.last(torch.tanh(self.first(x)))

        def forward(self, x: Tensor) -> Tensor:
            return checkpoint(self.block, x, use_reentrant=False)

    model, x = Checkpointed(), torch.randn(4, 3)
    decomposition = decomposition_of(model)
    plain = copy.deepcopy(model)
    plain.forward = plain.block
    expected = apd.Decomposition(
        apd.wrap(plain), decomposition.components, decomposition.settings, decomposition.output, {}
    )
    assert_close(decomposition.attributions(x), expected.attributions(x))
    with pytest.raises(apd.UnsupportedModel, match=r"step 0: this Checkpointed uses torch.utils.checkpoint .* Switch"):
        apd.decompose(model, [x], n_components=3, progress=False)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_another_dtype(dtype):
    """The factors stay as they are, and the model gets what it computes in."""
    decomposition = decomposition_of(gpt2(), "transformer.h.0.mlp.*")
    model = decomposition.target.model
    with decomposition.only(CHOSEN):
        expected = model(TOKENS).logits
        model.to(dtype)
        logits = model(TOKENS).logits
    assert logits.dtype == dtype
    tolerance = 1e-4 if dtype == torch.float64 else 0.2
    assert_close(logits.float(), expected, rtol=tolerance, atol=tolerance)


def test_bf16_autocast(decomposition: apd.Decomposition):
    model = decomposition.target.model
    with decomposition.only(CHOSEN):
        expected = model(TOKENS).logits
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(TOKENS).logits
    assert logits.dtype == torch.bfloat16
    assert_close(logits.float(), expected, rtol=0.2, atol=0.2)


def test_a_state_dict_taken_inside_is_the_models_own(decomposition: apd.Decomposition):
    model = decomposition.target.model
    before = model.state_dict()
    with decomposition.only(CHOSEN):
        inside = model.state_dict()
    assert before.keys() == inside.keys()
    assert all(torch.equal(before[key], inside[key]) for key in before)
