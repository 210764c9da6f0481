"""The adapter for plain torch modules: Linear, Conv1D and Embedding, tied or not, and what it refuses."""

import pytest
import torch
from adapter_contract import AdapterContract
from torch import Tensor, nn
from torch.testing import assert_close
from toy_models import TMS, ResidualMLP, TinyGPT, decomposition_of
from transformers import GPT2Config, GPT2LMHeadModel

import apd_lens as apd


def vectors(n_examples: int, width: int) -> Tensor:
    return torch.randn(n_examples, width, generator=torch.Generator().manual_seed(1))


def tokens(n_examples: int, length: int, d_vocab: int) -> Tensor:
    return torch.randint(d_vocab, (n_examples, length), generator=torch.Generator().manual_seed(1))


class TestLinear(AdapterContract):
    names = tuple(f"layers.{i}.{side}.weight" for i in (0, 1) for side in ("mlp_in", "mlp_out"))
    names = ("W_E.weight", *names, "W_U.weight")

    def model(self):
        return ResidualMLP(n_features=4, d_resid=6, d_mlp=3, n_layers=2)

    def batch(self, n_examples):
        return vectors(n_examples, 4)


class TestTrainableInPositions(TestLinear):
    """Examples with positions; the parameters are frozen."""

    n_positions = 3

    def model(self):
        return super().model().requires_grad_(False)

    def batch(self, n_examples):
        return vectors(n_examples * 3, 4).unflatten(0, (n_examples, 3))


class TestBareLinear(AdapterContract):
    """The model is itself the leaf."""

    names = ("weight",)

    def model(self):
        return nn.Linear(4, 3)

    def batch(self, n_examples):
        return (vectors(n_examples, 4),)

    def test_leaves_nothing_behind_after_an_error_in_a_forward(self):
        pytest.skip("the hook that fails would run after the whole model")


class TestTiedToy(AdapterContract):
    names = ("linear1.weight",)

    def model(self):
        return TMS(5, 2)

    def batch(self, n_examples):
        return {"x": vectors(n_examples, 5)}


class TestTiedEmbeddings(AdapterContract):
    """Positions looked up without a batch axis; the embedding is tied to the head; Conv1D."""

    n_positions = 4

    names = ("wte.weight", "wpe.weight", "fc.weight", "proj.weight")

    def model(self):
        return TinyGPT()

    def batch(self, n_examples):
        return tokens(n_examples, 4, 11)


class TestUsedTwice(AdapterContract):
    """One module that is called twice in a forward, with an activation that works in place."""

    names = ("shared.weight", "last.weight")

    def model(self):
        class Twice(nn.Module):
            def __init__(self):
                super().__init__()
                self.shared, self.last = nn.Linear(3, 3), nn.Linear(3, 2)
                self.again = self.shared
                self.act = nn.LeakyReLU(inplace=True)

            def forward(self, x):
                return self.last(self.act(self.again(self.act(self.shared(x)))))

        Twice.__qualname__ = "TestUsedTwice.Twice"
        TestUsedTwice.Twice = Twice  # so that pickle finds it
        return Twice()

    def batch(self, n_examples):
        return vectors(n_examples, 3)


class TestGPT2(AdapterContract):
    """Hugging Face: Conv1D everywhere, wte tied to lm_head, positions looked up with a batch axis of 1."""

    n_positions = 5

    names = (
        "transformer.wte.weight",
        "transformer.wpe.weight",
        "transformer.h.0.attn.c_attn.weight",
        "transformer.h.0.attn.c_proj.weight",
        "transformer.h.0.mlp.c_fc.weight",
        "transformer.h.0.mlp.c_proj.weight",
    )

    def model(self):
        config = GPT2Config(vocab_size=13, n_positions=8, n_embd=8, n_layer=1, n_head=2, use_cache=False)
        config._attn_implementation = "eager"
        return GPT2LMHeadModel(config).eval()

    def batch(self, n_examples):
        return {"input_ids": tokens(n_examples, 5, 13)}


def test_tied_matrices_stand_once_with_all_uses():
    target = apd.wrap(TinyGPT())
    matrix = target.weights["wte.weight"]
    assert matrix.tied_to == ("head.weight",)
    assert [(use.site, use.transposed) for use in matrix.uses] == [("wte", False), ("head", True)]
    assert target.match("head.*") == ["wte.weight"]
    assert "wte, head" in str(target)


def test_tied_attributions_add_up_over_the_uses():
    """x P_c and (x W) P_cᵀ of a linear tied model, by hand: f = x W Wᵀ, so ∂f/∂ε = x P Wᵀ + x W Pᵀ."""
    model = TMS(4, 2)
    with torch.no_grad():
        model.linear1.bias.zero_()
        model.linear2.bias.fill_(100.0)  # the relu is open
    decomposition = decomposition_of(model, n_components=3)
    x, W, P = vectors(5, 4), model.linear1.weight.detach(), decomposition.components.component_weights("linear1.weight")
    effect = torch.einsum("bi,cih,oh->bco", x, P, W) + torch.einsum("bi,ih,coh->bco", x, W, P)
    assert_close(decomposition.attributions(x), effect.square().mean(-1).sqrt(), rtol=1e-5, atol=1e-6)


def test_positions_of_their_own_masks():
    """A mask for each position: y of every matrix, position by position, is that of the position alone."""
    model = ResidualMLP(n_features=4, d_resid=6, d_mlp=3, n_layers=1)
    decomposition = decomposition_of(model, selection=apd.TopK(2, granularity="position"))
    x = vectors(6, 4).unflatten(0, (2, 3))
    mask = decomposition.select(x)
    assert mask.shape == (2, 3, 5)
    assert torch.equal(mask.sum(-1), torch.full((2, 3), 2))
    with decomposition.sparse(mask):
        together = model(x)
    with decomposition.sparse(mask.flatten(0, 1)):
        alone = model(x.flatten(0, 1))
    assert_close(together.flatten(0, 1), alone, rtol=1e-5, atol=1e-6)
    # A position moves its own outputs only, a third of all that the mean runs over.
    by_position, by_example = decomposition.attributions(x), decomposition_of(model).attributions(x.flatten(0, 1))
    assert_close(by_position.flatten(0, 1) * 3**0.5, by_example, rtol=1e-5, atol=1e-6)


class OwnLinear(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * 2


@pytest.mark.parametrize(
    ("module", "name", "reason"),
    [
        (nn.MultiheadAttention(4, 2), "part.in_proj_weight", "without calling a submodule"),
        (nn.MultiheadAttention(4, 2), "part.out_proj.weight", "without calling a submodule"),
        (nn.Conv2d(2, 3, 3), "part.weight", "Conv2d is not among the layers"),
        (nn.LSTM(4, 4), "part.weight_ih_l0", "LSTM is not among the layers"),
        (nn.Bilinear(2, 3, 4), "part.weight", "Bilinear is not among the layers"),
        (nn.Embedding(4, 2, max_norm=1.0), "part.weight", "max_norm"),
        (OwnLinear(4, 2), "part.weight", "OwnLinear overrides the forward of Linear"),
        (nn.utils.parametrizations.orthogonal(nn.Linear(4, 4)), "part.parametrizations.weight.original", "layers that"),
    ],
)
def test_refuses_with_the_reason(module: nn.Module, name: str, reason: str):
    target = apd.wrap(nn.ModuleDict({"part": module, "linear": nn.Linear(2, 2)}))
    assert reason in target.refused[name]
    assert name not in target.weights
    assert reason in str(target)
    with pytest.raises(apd.UnsupportedModel, match=f"{name.replace('.', '[.]')}.* cannot be decomposed: .*{reason}"):
        target.match(name)


def test_a_model_without_matrices_is_refused():
    with pytest.raises(apd.UnsupportedModel, match=r"weight: Conv2d is not among .* Could be decomposed: nn\.Linear"):
        apd.wrap(nn.Sequential(nn.Conv2d(1, 1, 1)))


def test_what_is_no_model_is_refused():
    with pytest.raises(apd.UnsupportedModel, match=r"Expected a model, got builtins\.dict.*HookedTransformer"):
        apd.wrap({"weight": torch.eye(2)})


def test_a_path_around_a_matrix_is_reported():
    """The fused fast path of TransformerEncoderLayer (eval, no grad) calls none of its linear layers."""
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
    decomposition = decomposition_of(layer, ["linear1.weight"])
    x = vectors(2 * 3, 8).unflatten(0, (2, 3))
    with (
        torch.no_grad(),
        pytest.raises(apd.SiteNotCalled, match=r"went past linear1: .* Leave it out"),
        decomposition.only(0),
    ):
        layer(x)
    decomposition.attributions(x)  # with gradients, the layers are called


def test_a_layer_that_is_skipped_is_reported():
    class Skips(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.unused = nn.Linear(2, 2), nn.Linear(2, 2)

        def forward(self, x):
            return self.used(x)

    model = Skips()
    with pytest.raises(apd.SiteNotCalled, match="went past unused"):
        decomposition_of(model).attributions(vectors(2, 2))
    decomposition_of(model, "used.weight").attributions(vectors(2, 2))
