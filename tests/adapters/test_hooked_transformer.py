"""The adapter for HookedTransformer: the contract in every form that a matrix can have there."""

import pytest
import torch
from support.adapter_contract import ALONE, SAME, AdapterContract, CoreContract
from support.hooked import MIXTURE, check_effects, hooked_transformer, tokens
from support.toy_models import Snapshot, decomposition_of, keep_in_float64, substituted
from torch import Tensor, nn
from torch.testing import assert_close
from transformer_lens import HookedTransformer

import apd_lens as apd
from apd_lens.data._batch import call
from apd_lens.data._inputs import read_batch
from apd_lens.data._points import zero_at_padding
from apd_lens.passes._watch import watched_pass

HOST = "HookedTransformer"

ATTN = tuple(f"attn.W_{letter}" for letter in "QKVO")
MLP = ("mlp.W_in", "mlp.W_out")
GATED = ("mlp.W_in", "mlp.W_gate", "mlp.W_out")
EXPERTS = tuple(f"mlp.experts.{expert}.{name}" for expert in range(3) for name in ("W_in", "W_gate", "W_out"))

PADDED_MODELS = {
    "standard": {},
    "rotary": {"positional_embedding_type": "rotary", "n_key_value_heads": 1, "gated_mlp": True, "act_fn": "silu"},
    "alibi": {"positional_embedding_type": "alibi"},
    "experts": {**MIXTURE, "positional_embedding_type": "shortformer"},
}


def names_of(*per_block: str, n_layers: int = 1, pos: bool = True) -> tuple[str, ...]:
    blocks = (f"blocks.{layer}.{name}" for layer in range(n_layers) for name in per_block)
    return ("embed.W_E", *(["pos_embed.W_pos"] if pos else []), *blocks, "unembed.W_U")


class HookedTransformerContract(AdapterContract):
    host = HOST
    options: dict = {}  # noqa: RUF012
    switches: tuple[str, ...] = ()
    n_positions = 4
    names = names_of(*ATTN, *MLP)

    def model(self):
        model = hooked_transformer(**self.options)
        for switch in self.switches:
            getattr(model, f"set_use_{switch}")(True)
        return model

    def double_model(self):
        return self.model().to(torch.float64, print_details=False)

    def batch(self, n_examples):
        return tokens(n_examples)


class TestBase(CoreContract, HookedTransformerContract):
    """Attention and a plain MLP, layer norms, learned positions"""


class TestNoLayers(HookedTransformerContract):
    """Embeddings only"""

    options = {"n_layers": 0, "normalization_type": None, "attn_only": True}  # noqa: RUF012
    names = names_of()


class TestTwoLayersOfAttentionOnly(HookedTransformerContract):
    """Two layers of attention only"""

    options = {"n_layers": 2, "attn_only": True}  # noqa: RUF012
    names = names_of(*ATTN, n_layers=2)


class TestLikeGPTJ(HookedTransformerContract):
    """Parallel attention and MLP with LNPre; use_attn_in and use_hook_mlp_in"""

    options = {"parallel_attn_mlp": True, "normalization_type": "LNPre"}  # noqa: RUF012
    switches = ("attn_in", "hook_mlp_in")


class TestLikeBloom(HookedTransformerContract):
    """alibi, a layer norm behind the embedding, SoLU with a layer norm in the MLP"""

    options = {"positional_embedding_type": "alibi", "post_embedding_ln": True, "act_fn": "solu_ln"}  # noqa: RUF012
    names = names_of(*ATTN, *MLP, pos=False)


class TestLikeQwen(HookedTransformerContract):
    """Gated MLP, rotary, RMS, qk-norm, grouped queries (as stored)"""

    options = {  # noqa: RUF012
        "gated_mlp": True,
        "act_fn": "silu",
        "normalization_type": "RMS",
        "positional_embedding_type": "rotary",
        "n_key_value_heads": 1,
        "use_qk_norm": True,
    }
    names = names_of(*ATTN, *GATED, pos=False)


class TestLikeGemma(HookedTransformerContract):
    """Gated MLP, norms before and after, both softcaps, local attention, grouped queries (ungrouped)"""

    options = {  # noqa: RUF012
        "gated_mlp": True,
        "act_fn": "gelu_new",
        "normalization_type": "RMS",
        "use_normalization_before_and_after": True,
        "attn_scores_soft_cap": 5.0,
        "output_logits_soft_cap": 3.0,
        "use_local_attn": True,
        "attn_types": ["local"],
        "window_size": 2,
        "n_key_value_heads": 1,
        "ungroup_grouped_query_attention": True,
    }
    names = names_of(*ATTN, *GATED)


class TestLikeOLMo2(HookedTransformerContract):
    """OLMo 2: post-norms, qk-norm over all heads, clipped q, k and v, rotary in part of a head"""

    options = {  # noqa: RUF012
        "original_architecture": "Olmo2ForCausalLM",
        "gated_mlp": True,
        "act_fn": "silu",
        "normalization_type": "RMS",
        "positional_embedding_type": "rotary",
        "rotary_dim": 2,
        "clip_qkv": 2.0,
    }
    names = names_of(*ATTN, *GATED, pos=False)


class TestShortformer(HookedTransformerContract):
    """Shortformer, use_split_qkv_input, no norms, gated SoLU"""

    options = {  # noqa: RUF012
        "positional_embedding_type": "shortformer",
        "normalization_type": None,
        "act_fn": "solu_ln",
        "gated_mlp": True,
    }
    switches = ("split_qkv_input",)
    names = names_of(*ATTN, "mlp.W_gate", "mlp.W_out")


class TestEveryHeadOnItsOwn(HookedTransformerContract):
    """use_split_qkv_input and use_attn_result with grouped queries"""

    options = {"n_heads": 4, "d_head": 2, "n_key_value_heads": 2, "attn_only": True}  # noqa: RUF012
    switches = ("split_qkv_input", "attn_result")
    names = names_of(*ATTN)


class TestMixtureOfExperts(CoreContract, HookedTransformerContract):
    """Mixtral: router and gated experts, rotary"""

    options = {**MIXTURE, "positional_embedding_type": "rotary", "norm_topk_prob": True}  # noqa: RUF012
    names = names_of(*ATTN, "mlp.W_gate", *EXPERTS, pos=False)


class TestLikeGptOss(HookedTransformerContract):
    """GPT-OSS: router and experts with biases, attention sinks"""

    options = {**MIXTURE, "original_architecture": "GptOssForCausalLM", "use_attention_sinks": True}  # noqa: RUF012
    names = names_of(*ATTN, "mlp.W_gate", *EXPERTS)

    @pytest.mark.parametrize("alone", ALONE)
    def test_attributions_equal_finite_differences(self, monkeypatch, alone: bool):
        zeros_like = torch.zeros_like  # of routing weights, in float32 even for a float64 model
        monkeypatch.setattr(torch, "zeros_like", lambda x, dtype=None: zeros_like(x))
        super().test_attributions_equal_finite_differences(monkeypatch, alone)


class TestTied(CoreContract, HookedTransformerContract):
    """W_U in the memory of W_E, transposed"""

    names = names_of(*ATTN, *MLP)[:-1]

    def model(self):
        model = super().model()
        model.unembed.W_U = nn.Parameter(model.embed.W_E.T)
        return model

    def test_is_one_matrix_with_two_uses(self, target):
        embedding = target.weights["embed.W_E"]
        assert embedding.tied_to == ("unembed.W_U",)
        assert [(use.site, use.transposed) for use in embedding.uses] == [("embed", False), ("unembed.hook_out", True)]


# Batches with padding.


def left_padded(*lengths: int) -> dict[str, Tensor]:
    """Examples of these lengths, with padding before them."""
    width = max(lengths)
    attention_mask = (torch.arange(width) >= width - torch.tensor(lengths)[:, None]).long()
    return {"input": tokens(len(lengths), width) * attention_mask, "attention_mask": attention_mask}


class TestPadded(CoreContract, HookedTransformerContract):
    """Left-padded batches: positions are counted from the first real token, and padding has none"""

    def batch(self, n_examples):
        return left_padded(*[3, 4, 2, 4][:n_examples])

    def test_watching_is_bit_for_bit_the_target(self, target):
        batch = self.batch(3)
        watched = watched_pass(target, list(target.weights), batch, self.output)
        assert torch.equal(watched.output, zero_at_padding(self._run(target, batch), read_batch(batch).valid))

    def test_y_is_x_times_w(self, target):
        """At padding too, where the host puts zeros behind it."""
        call_ = watched_pass(target, ["pos_embed.W_pos"], self.batch(3), self.output).calls[0]
        assert torch.equal(call_.y, target.model.W_pos[call_.x])

    def test_attributions_equal_finite_differences(self):
        """As they do without padding, if they are the same as without."""
        check_attributions_without_padding(self.model(), "example")


@pytest.mark.parametrize("granularity", ["example", "position"])
@pytest.mark.parametrize("form", PADDED_MODELS)
def test_padding_has_no_attribution_and_gives_none(form: str, granularity):
    check_attributions_without_padding(hooked_transformer(**PADDED_MODELS[form]), granularity)


def check_attributions_without_padding(model: HookedTransformer, granularity) -> None:
    decomposition = decomposition_of(model, selection=apd.BatchTopK(2, granularity=granularity))
    lengths = [3, 5, 4]
    batch = left_padded(*lengths)
    attributions, mask = decomposition.attributions(batch), decomposition.select(batch)
    for index, length in enumerate(lengths):
        (expected,) = decomposition.attributions(batch["input"][index : index + 1, -length:])
        came = attributions[index]
        assert_close(came[-length:] if granularity == "position" else came, expected, rtol=1e-5, atol=1e-5)
    if granularity == "position":
        padding = batch["attention_mask"] == 0
        assert attributions[padding].abs().max() == 0
        assert not mask[padding].any()
        assert mask.sum() == 2 * sum(lengths)
    with decomposition.sparse(mask):
        sparse = call(model, batch)
    for index, length in enumerate(lengths):
        its_own = mask[index : index + 1, -length:] if granularity == "position" else mask[index : index + 1]
        with decomposition.sparse(its_own):
            expected = model(batch["input"][index : index + 1, -length:])
        assert_close(sparse[index : index + 1, -length:], expected, **SAME)


@pytest.mark.parametrize("granularity", ["example", "position"])
def test_training_is_that_without_padding(granularity):
    batch = left_padded(5, 3, 3)
    batch = {name: value[1:] for name, value in batch.items()}  # two columns of padding
    infos = []
    for some_batch in (batch, batch["input"][:, 2:]):
        torch.manual_seed(0)
        state = apd.init(
            hooked_transformer(),
            n_components=4,
            rank=2,
            selection=apd.BatchTopK(1.5, granularity=granularity),
            losses=apd.Losses(hidden=1.0, hidden_at=("blocks.0.hook_resid_post",), path=0.0),
        )
        state, _ = apd.step(state, some_batch)
        infos.append(apd.step(state, some_batch)[1])
    assert infos[0].k == infos[1].k
    assert_close(infos[0].terms, infos[1].terms, rtol=1e-4, atol=1e-5)


# Mixtures of experts.


@pytest.mark.parametrize("architecture", ["MixtralForCausalLM", "GptOssForCausalLM"])
def test_experts_that_no_token_was_routed_to_have_no_effect(architecture: str):
    model = hooked_transformer(**MIXTURE, original_architecture=architecture)
    decomposition = decomposition_of(model, "*.experts.*")
    target, batch = decomposition.target, tokens(1, 1)
    chosen: list[int] = []
    model.add_perma_hook("blocks.0.mlp.hook_expert_indices", lambda indices, hook: chosen.extend(indices[0].tolist()))
    model(batch)
    (unused,) = {0, 1, 2} - set(chosen)
    for expert in range(3):
        attributions = decomposition_of(model, f"*.experts.{expert}.*").attributions(batch)
        assert (attributions > 0).all() if expert != unused else (attributions == 0).all()
    mask = torch.rand(1, 5)
    with substituted(target, {name: decomposition.components.summed(name, mask[0]) for name in target.match("*.exp*")}):
        expected = model(batch)
    with decomposition.sparse(mask):
        assert_close(model(batch), expected, **SAME)
    before = Snapshot.of(model)
    apd.decompose(model, [batch], n_components=2, rank=1, optimization=apd.Optimization(steps=2), progress=False)
    before.assert_unchanged(model)


def test_routing_that_the_user_edits_is_that_of_the_components_too(monkeypatch):
    """Here every token goes to one expert twice, and the third has none."""
    keep_in_float64(monkeypatch)
    model = hooked_transformer(**MIXTURE).to(torch.float64, print_details=False)
    model.add_perma_hook("blocks.0.mlp.hook_expert_indices", lambda indices, hook: torch.ones_like(indices))
    decomposition = decomposition_of(model, ["*.experts.1.*", "*.attn.W_V"])
    check_effects(decomposition, lambda: model(tokens(2)), tokens(2))
    assert decomposition_of(model, "*.experts.2.*").attributions(tokens(2)).abs().max() == 0


# Names and refusals.


def test_refuses_with_the_reason():
    target = apd.wrap(hooked_transformer(positional_embedding_type="alibi", gated_mlp=True, act_fn="solu_ln"))
    assert target.refused == {
        "pos_embed.W_pos": "alibi models do not use it",
        "blocks.0.mlp.W_in": "a gated MLP with a layer-norm activation does not use it",
    }
    with pytest.raises(apd.UnsupportedModel, match="alibi models do not use it"):
        target.match("pos_embed.*")


def test_components_of_the_users_own_are_refused_and_the_rest_is_not(record_property):
    model = hooked_transformer(n_layers=2)

    class OwnMLP(type(model.blocks[0].mlp)):
        pass

    class OwnAttention(type(model.blocks[0].attn)):
        pass

    model.blocks[0].mlp = OwnMLP(model.cfg)
    model.blocks[1].attn = OwnAttention(model.cfg)
    target = apd.wrap(model)
    assert tuple(target.match("blocks.*")) == names_of(*ATTN, *MLP, n_layers=2, pos=False)[1:5] + tuple(
        f"blocks.1.{name}" for name in MLP
    )
    assert target.refused["blocks.0.mlp.W_in"] == "the forward of OwnMLP is not understood"
    assert target.refused["blocks.1.attn.W_Q"] == "the forward of OwnAttention is not understood"
    reason = target.refused["blocks.1.attn.W_Q"]
    record_property("refused", (HOST, "An attention or MLP class of the user's own", reason))


def test_unknown_names_are_met_with_the_closest():
    target = apd.wrap(hooked_transformer())
    with pytest.raises(apd.UnknownWeight) as error:
        target.match(["blocks.*.mlp.W_inn"])
    assert str(error.value) == (
        "No weight matches 'blocks.*.mlp.W_inn'. This model has 9 that can be decomposed; the closest are "
        "'blocks.0.mlp.W_in', 'blocks.0.mlp.W_out', 'blocks.0.attn.W_V'. print(apd_lens.wrap(model)) lists them all."
    )


def test_patterns_come_in_the_models_order_and_once():
    target = apd.wrap(hooked_transformer())
    assert target.match(["*.W_out", "blocks.0.mlp.*", "embed.W_E"]) == [
        "embed.W_E",
        "blocks.0.mlp.W_in",
        "blocks.0.mlp.W_out",
    ]
