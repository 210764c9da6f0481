"""The adapter for plain torch modules: Linear, Conv1D and Embedding, tied or not, and what it refuses."""

import pytest
import torch
from support.adapter_contract import AdapterContract, CoreContract
from support.toy_models import TMS, ResidualMLP, TinyGPT, decomposition_of
from torch import Tensor, nn
from torch.testing import assert_close
from transformers import (
    BertConfig,
    BertForMaskedLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
)

import apd_lens as apd

TORCH = "torch modules"
HUGGING_FACE = "Hugging Face models"


def vectors(n_examples: int, width: int) -> Tensor:
    return torch.randn(n_examples, width, generator=torch.Generator().manual_seed(1))


def tokens(n_examples: int, length: int, d_vocab: int) -> Tensor:
    return torch.randint(d_vocab, (n_examples, length), generator=torch.Generator().manual_seed(1))


class TestLinear(AdapterContract):
    """nn.Linear"""

    host = TORCH
    names = tuple(f"layers.{i}.{side}.weight" for i in (0, 1) for side in ("mlp_in", "mlp_out"))
    names = ("W_E.weight", *names, "W_U.weight")

    def model(self):
        return ResidualMLP(n_features=4, d_resid=6, d_mlp=3, n_layers=2)

    def batch(self, n_examples):
        return vectors(n_examples, 4)


class TestTrainableInPositions(TestLinear):
    """nn.Linear on examples with positions; the parameters are frozen."""

    n_positions = 3

    def model(self):
        return super().model().requires_grad_(False)

    def batch(self, n_examples):
        return vectors(n_examples * 3, 4).unflatten(0, (n_examples, 3))


class TestBareLinear(CoreContract):
    """A model that is itself the leaf."""

    host = TORCH
    names = ("weight",)

    def model(self):
        return nn.Linear(4, 3)

    def batch(self, n_examples):
        return (vectors(n_examples, 4),)

    def test_leaves_nothing_behind_after_an_error_in_a_forward(self):
        pytest.skip("the hook that fails would run after the whole model")


class TestTiedToy(AdapterContract):
    """One parameter in a Conv1D and a Linear, which uses the transpose (toy model of superposition)."""

    host = TORCH
    names = ("linear1.weight",)

    def model(self):
        return TMS(5, 2)

    def batch(self, n_examples):
        return {"x": vectors(n_examples, 5)}


class TestTiedEmbeddings(CoreContract):
    """nn.Embedding tied to the head, positions looked up without a batch axis, Conv1D."""

    host = TORCH
    n_positions = 4

    names = ("wte.weight", "wpe.weight", "fc.weight", "proj.weight")

    def model(self):
        return TinyGPT()

    def batch(self, n_examples):
        return tokens(n_examples, 4, 11)


class TestUsedTwice(CoreContract):
    """One module that is called twice in a forward, with an activation that works in place."""

    host = TORCH
    names = ("shared.weight", "last.weight")

    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.shared, self.last = nn.Linear(3, 3), nn.Linear(3, 2)
            self.again = self.shared
            self.act = nn.LeakyReLU(inplace=True)

        def forward(self, x):
            return self.last(self.act(self.again(self.act(self.shared(x)))))

    def model(self):
        return self.Twice()

    def batch(self, n_examples):
        return vectors(n_examples, 3)


class TestGPT2(CoreContract):
    """GPT-2: Conv1D with fused QKV, wte tied to lm_head, positions looked up with a batch axis of 1."""

    host = HUGGING_FACE
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


class TestGemma(AdapterContract):
    """Gemma-2: embeddings that are scaled, and tied to the unscaled head; grouped queries, gated MLP, softcaps."""

    host = HUGGING_FACE
    n_positions = 4

    names = (
        "model.embed_tokens.weight",
        *(f"model.layers.0.self_attn.{side}_proj.weight" for side in "qkvo"),
        *(f"model.layers.0.mlp.{side}_proj.weight" for side in ("gate", "up", "down")),
    )

    def model(self):
        config = Gemma2Config(
            vocab_size=11,
            hidden_size=6,
            intermediate_size=8,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=4,
            pad_token_id=0,
            initializer_range=0.3,
            max_position_embeddings=8,
            attn_implementation="eager",
            use_cache=False,
        )
        return Gemma2ForCausalLM(config).eval()

    def batch(self, n_examples):
        return {"input_ids": 1 + tokens(n_examples, 4, 10)}  # 0 is padding: a row of zeros, divided by its norm

    def test_shows_the_tie_and_the_scale(self, target):
        embedding, head = target.weights["model.embed_tokens.weight"].uses
        assert (embedding.site, head.site) == ("model.embed_tokens", "lm_head")
        assert (embedding.scale, head.scale) == (pytest.approx(6**0.5), 1.0)


class TestLlama(AdapterContract):
    """Llama: grouped queries, gated MLP, untied head."""

    host = HUGGING_FACE
    n_positions = 4

    names = (
        "model.embed_tokens.weight",
        *(f"model.layers.0.self_attn.{side}_proj.weight" for side in "qkvo"),
        *(f"model.layers.0.mlp.{side}_proj.weight" for side in ("gate", "up", "down")),
        "lm_head.weight",
    )

    def model(self):
        config = LlamaConfig(
            vocab_size=11,
            hidden_size=6,
            intermediate_size=8,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=4,
            max_position_embeddings=8,
            initializer_range=0.3,
            attn_implementation="eager",
            use_cache=False,
        )
        return LlamaForCausalLM(config).eval()

    def batch(self, n_examples):
        return {"input_ids": tokens(n_examples, 4, 11)}


class TestBert(AdapterContract):
    """BERT: encoder with learned positions and token types, sdpa attention, tied head."""

    host = HUGGING_FACE
    n_positions = 4

    names = (
        "bert.embeddings.word_embeddings.weight",
        "bert.embeddings.position_embeddings.weight",
        "bert.embeddings.token_type_embeddings.weight",
        *(f"bert.encoder.layer.0.attention.self.{side}.weight" for side in ("query", "key", "value")),
        "bert.encoder.layer.0.attention.output.dense.weight",
        "bert.encoder.layer.0.intermediate.dense.weight",
        "bert.encoder.layer.0.output.dense.weight",
        "cls.predictions.transform.dense.weight",
    )

    def model(self):
        config = BertConfig(
            vocab_size=11,
            hidden_size=6,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=8,
            max_position_embeddings=4,
            initializer_range=0.3,
        )
        return BertForMaskedLM(config).eval()

    def batch(self, n_examples):
        return {"input_ids": tokens(n_examples, 4, 11)}


class TestConvolutions(CoreContract):
    """nn.Conv2d and nn.Conv1d with stride, padding, dilation, reflection; their positions are output pixels."""

    host = TORCH
    names = ("0.weight", "2.weight", "4.weight", "6.weight")

    def model(self):
        return nn.Sequential(
            nn.Conv2d(2, 3, (3, 2), stride=(2, 1), padding=1, dilation=(1, 2), padding_mode="reflect"),
            nn.Tanh(),
            nn.Conv2d(3, 2, 3, padding="same", bias=False),
            nn.Flatten(2),
            nn.Conv1d(2, 4, 3, stride=2),
            nn.Tanh(),
            nn.Linear(5, 2),
        )

    def batch(self, n_examples):
        return vectors(n_examples * 2, 5 * 4).reshape(n_examples, 2, 5, 4)


class TestViewsOfOneStorage(CoreContract):
    """Two parameters that share memory, one the transpose of the other (tied); two halves of a third (not tied)."""

    host = TORCH
    names = ("first.weight", "left.weight", "right.weight")

    def model(self):
        class Views(nn.Module):
            def __init__(self):
                super().__init__()
                self.first, self.last = nn.Linear(4, 3), nn.Linear(3, 4, bias=False)
                self.last.weight = nn.Parameter(self.first.weight.detach().T)
                halves = torch.randn(6, 4)
                self.left, self.right = nn.Linear(4, 3), nn.Linear(4, 3)
                self.left.weight, self.right.weight = nn.Parameter(halves[:3]), nn.Parameter(halves[3:])

            def forward(self, x):
                r = self.last(torch.tanh(self.first(x)))
                return self.left(r) * self.right(r)

        Views.__qualname__ = "TestViewsOfOneStorage.Views"
        TestViewsOfOneStorage.Views = Views  # so that pickle finds it
        return Views()

    def batch(self, n_examples):
        return vectors(n_examples, 4)

    def double_model(self):
        model = self.model().double()  # which makes new memory for each parameter
        model.last.weight = nn.Parameter(model.first.weight.detach().T)
        return model

    def test_a_copy_made_inside_a_context_is_a_plain_model(self, target):
        pytest.skip("torch's own copies of such parameters no longer share memory after pickling")


def test_tied_matrices_can_be_untied(tmp_path):
    model, x = TinyGPT(), tokens(2, 4, 11)
    target = apd.wrap(model).untied("head.weight")
    assert [name for name in target.weights if name in ("wte.weight", "head.weight")] == ["wte.weight", "head.weight"]
    assert target.weights["wte.weight"].tied_to == ()
    assert [use.site for use in target.weights["head.weight"].uses] == ["head"]
    decomposition = decomposition_of(target, "head.weight")
    untied = TinyGPT()
    untied.load_state_dict(model.state_dict())
    untied.head.weight = nn.Parameter(untied.wte.weight.detach().clone())
    with pytest.warns(
        apd.errors.ApdWarning, match=r"head\.weight was decomposed apart .* different values under names"
    ):
        edited = decomposition.edited_state_dict(ablate=[0, 2])
    untied.load_state_dict(edited)
    assert torch.equal(untied.wte.weight, model.wte.weight)
    with decomposition.ablate([0, 2]):
        assert_close(model(x), untied(x), rtol=1e-5, atol=1e-6)
    decomposition.save(tmp_path)
    assert torch.equal(apd.load(tmp_path, model).attributions(x), decomposition.attributions(x))
    with pytest.raises(apd.UnknownWeight, match=r"'fc.weight' is not tied to another matrix. Tied are: \['head"):
        apd.wrap(model).untied("fc.weight")


def test_a_decomposition_of_both_uses_is_not_loaded_onto_one(tmp_path):
    model = TinyGPT()
    decomposition_of(model, "wte.weight").save(tmp_path)
    with pytest.raises(apd.ArtifactError, match=r"wte.weight is used at \['wte'\] here and was at \['wte', 'head'\]"):
        apd.load(tmp_path, apd.wrap(model).untied("head.weight"))


def test_a_fused_matrix_is_one_matrix():
    """Hugging Face's query_key_value: d_out is three times as wide, and a component may span all three."""
    config = GPTNeoXConfig(
        vocab_size=9,
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=8,
        max_position_embeddings=8,
    )
    matrix = apd.wrap(GPTNeoXForCausalLM(config)).weights["gpt_neox.layers.0.attention.query_key_value.weight"]
    assert (matrix.d_in, matrix.d_out) == (8, 24)


def test_pixels_as_data_points():
    """A mask for each output pixel: the pixel is what it would be if the whole image were run on that mask."""
    model = nn.Sequential(nn.Conv2d(2, 3, 2))
    decomposition = decomposition_of(model, selection=apd.TopK(2, granularity="position"))
    images = vectors(2 * 2, 12).reshape(2, 2, 3, 4)
    mask = decomposition.select(images)
    assert mask.shape == (2, 2, 3, 5)
    with decomposition.sparse(mask):
        together = model(images)
    for row in range(2):
        for column in range(3):
            with decomposition.sparse(mask[:, row, column]):
                alone = model(images)[:, :, row, column]
            assert_close(together[:, :, row, column], alone, rtol=1e-5, atol=1e-6)


def test_an_image_without_a_batch_axis():
    convolution = nn.Conv1d(2, 3, 2)
    decomposition = decomposition_of(convolution)
    x = vectors(2, 5)
    with decomposition.only([1, 2]):
        assert_close(convolution(x), convolution(x[None])[0], rtol=1e-5, atol=1e-6)


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
        (nn.ConvTranspose2d(2, 3, 3), "part.weight", "ConvTranspose2d is not among the layers"),
        (nn.Conv2d(2, 4, 3, groups=2), "part.weight", "a convolution in groups is several matrices"),
        (nn.LSTM(4, 4), "part.weight_ih_l0", "LSTM is not among the layers"),
        (nn.Bilinear(2, 3, 4), "part.weight", "Bilinear is not among the layers"),
        (nn.Embedding(4, 2, max_norm=1.0), "part.weight", "max_norm"),
        (OwnLinear(4, 2), "part.weight", "OwnLinear overrides the forward of Linear"),
        (nn.utils.parametrizations.orthogonal(nn.Linear(4, 4)), "part.parametrizations.weight.original", "layers that"),
    ],
)
def test_refuses_with_the_reason(module: nn.Module, name: str, reason: str, record_property):
    target = apd.wrap(nn.ModuleDict({"part": module, "linear": nn.Linear(2, 2)}))
    assert reason in target.refused[name]
    assert name not in target.weights
    assert reason in str(target)
    record_property("refused", (TORCH, type(module).__name__, target.refused[name]))
    with pytest.raises(apd.UnsupportedModel, match=f"{name.replace('.', '[.]')}.* cannot be decomposed: .*{reason}"):
        target.match(name)


def test_a_model_without_matrices_is_refused():
    with pytest.raises(apd.UnsupportedModel, match=r"weight: Conv3d is not among .* Could be decomposed: nn\.Linear"):
        apd.wrap(nn.Sequential(nn.Conv3d(1, 1, 1)))


def test_what_is_no_model_is_refused():
    with pytest.raises(apd.UnsupportedModel, match=r"Expected a model, got builtins\.dict.*transformer_lens"):
        apd.wrap({"weight": torch.eye(2)})


def test_a_path_around_a_matrix_is_reported(record_property):
    """The fused fast path of TransformerEncoderLayer (eval, no grad) calls none of its linear layers."""
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
    decomposition = decomposition_of(layer, ["linear1.weight"])
    x = vectors(2 * 3, 8).unflatten(0, (2, 3))
    with (
        torch.no_grad(),
        pytest.raises(apd.errors.SiteNotCalled, match=r"went past linear1\. .* Leave it out"),
        decomposition.only(0),
    ):
        layer(x)
    reason = "an error in the forward, until torch.backends.mha.set_fastpath_enabled(False)"
    record_property("refused", (TORCH, "The fast path of TransformerEncoder (in eval mode, without gradients)", reason))
    decomposition.attributions(x)  # with gradients, the layers are called
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with torch.no_grad(), decomposition.only(0):
            layer(x)
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


def test_a_layer_that_is_skipped_is_reported():
    class Skips(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.unused = nn.Linear(2, 2), nn.Linear(2, 2)

        def forward(self, x):
            return self.used(x)

    model = Skips()
    with pytest.raises(apd.errors.SiteNotCalled, match="went past unused"):
        decomposition_of(model).attributions(vectors(2, 2))
    decomposition_of(model, "used.weight").attributions(vectors(2, 2))
