"""A decomposition is carried from one host to another with the same matrices, and back."""

import pytest
import torch
from support.bridges import hugging_face_model
from support.toy_models import linear_of_known_parts
from torch.testing import assert_close
from transformer_lens.model_bridge import TransformerBridge
from transformer_lens.model_bridge.sources._bridge_builder import build_bridge_from_module

import apd_lens as apd

WEIGHTS = ["*.q_proj*", "*.v_proj*", "*.o_proj*", "*.down_proj*"]
TOKENS = torch.randint(12, (3, 5), generator=torch.Generator().manual_seed(1))


def bridge_of(model) -> TransformerBridge:
    return build_bridge_from_module(model, "LlamaForCausalLM", hf_config=model.config, tokenizer=None)


def decomposition_of(model, **options) -> apd.Decomposition:
    return apd.init(model, weights=WEIGHTS, n_components=5, rank=2, **options).decomposition()


def assert_same(one: apd.Decomposition, other: apd.Decomposition) -> None:
    assert_close(one.attributions(TOKENS), other.attributions(TOKENS))
    assert one.residuals()["all"] == pytest.approx(other.residuals()["all"])
    outputs = []
    for decomposition in (one, other):
        with decomposition.only([0, 2]):
            value = decomposition.target.model(TOKENS)
            outputs.append(getattr(value, "logits", value).detach())
    assert_close(*outputs)


@pytest.mark.parametrize("output", [None, apd.last_position()])
def test_from_hugging_face_to_a_bridge_and_back(output, tmp_path):
    options = {} if output is None else {"output": output}
    original = decomposition_of(hugging_face_model("llama"), **options)
    bridge = bridge_of(hugging_face_model("llama"))
    carried = original.on(bridge)
    names = ("attn.W_Q", "attn.W_V", "attn.W_O", "mlp.W_out")
    assert carried.components.names == [f"blocks.0.{name}" for name in names]
    assert_same(original, carried)
    original.save(tmp_path / "original")
    assert_same(original, apd.load(tmp_path / "original", bridge))
    carried.save(tmp_path / "carried")
    back = apd.load(tmp_path / "carried", hugging_face_model("llama"))
    assert back.components.names == original.components.names
    assert_same(original, back)
    assert all(torch.equal(back.components.A[name], A) for name, A in original.components.A.items())


def test_to_a_copy_of_the_same_host():
    original = decomposition_of(hugging_face_model("llama"))
    carried = original.on(hugging_face_model("llama"))
    assert carried.components.names == original.components.names
    assert_same(original, carried)
    carried.components.A[carried.components.names[0]].zero_()  # its own factors
    assert original.components.A[carried.components.names[0]].any()


def test_a_tied_matrix():
    model = hugging_face_model("llama", tie_word_embeddings=True)
    original = apd.init(model, weights="*embed_tokens*", n_components=5, rank=2).decomposition()
    carried = original.on(bridge_of(hugging_face_model("llama", tie_word_embeddings=True)))
    assert carried.components.names == ["embed.W_E"]
    assert_same(original, carried)


def test_in_another_dtype(tmp_path):
    original = decomposition_of(hugging_face_model("llama"))
    original.save(tmp_path)
    bridge = bridge_of(hugging_face_model("llama").double())
    with pytest.raises(apd.ArtifactError, match=r"no matrix model.layers.0.self_attn.q_proj.weight"):
        apd.load(tmp_path, bridge)
    assert_close(
        apd.load(tmp_path, bridge, other_dtype=True).attributions(TOKENS).float(), original.attributions(TOKENS)
    )


def test_a_matrix_that_is_not_there_is_named():
    original = decomposition_of(hugging_face_model("llama"))

    def other() -> torch.nn.Module:
        model = hugging_face_model("llama")
        model.get_submodule("model.layers.0.mlp.down_proj").weight.data[0, 0] += 1
        return model

    message = r"no matrix model\.layers\.0\.mlp\.down_proj\.weight .* among its \d matrices of 10 × 8"
    with pytest.raises(apd.UnsupportedModel, match=message):
        original.on(bridge_of(other()))
    with pytest.raises(apd.UnsupportedModel, match="has other weights"):
        original.on(other())
    with pytest.raises(apd.UnsupportedModel, match="cannot be taken to a Linear"):
        original.on(torch.nn.Linear(8, 8))


def test_given_factors_are_a_decomposition():
    model, components = linear_of_known_parts()
    given = apd.from_factors(
        model, components.A, components.B, settings=apd.decomposition.Settings(selection=apd.TopK(1))
    )
    assert given.residuals()["all"] == 0
    assert given.select(torch.eye(4)).equal(torch.eye(4).bool())
    components.A["weight"].data.zero_()  # it has factors of its own
    assert given.residuals()["all"] == 0
    with torch.no_grad():
        model.weight += 1
    with pytest.raises(apd.errors.WeightsChanged):
        given.select(torch.eye(4))


@pytest.mark.parametrize(
    ("A", "B", "error", "message"),
    [
        (
            {"weight": (3, 4, 1)},
            {"weight": (3, 1, 5)},
            apd.ShapeMismatch,
            r"weight is 4 × 4.*got \(3, 4, 1\) and \(3, 1, 5",
        ),
        ({"weight": (3, 4, 1)}, {"weight": (2, 1, 4)}, apd.ShapeMismatch, r"B of shape \(3, m, 4\)"),
        ({"weight": (4, 3)}, {"weight": (3, 4)}, apd.ShapeMismatch, r"got \(4, 3\)"),
        ({"weight": (3, 4, 1)}, {}, apd.ShapeMismatch, "the same matrices"),
        ({"bias": (3, 4, 1)}, {"bias": (3, 1, 4)}, apd.UnknownWeight, "No weight matches 'bias'"),
        ({}, {}, apd.UnknownWeight, "got none"),
    ],
)
def test_factors_that_do_not_fit_are_refused(A, B, error, message):
    model, _ = linear_of_known_parts()
    with pytest.raises(error, match=message):
        apd.from_factors(model, *({name: torch.ones(shape) for name, shape in side.items()} for side in (A, B)))
