"""The adapter for TransformerBridge: the contract in many forms, and composition with what users do with hooks."""

import copy
import importlib.metadata

import pytest
import torch
import torch.nn.functional as F
from support.adapter_contract import SAME, AdapterContract, CoreContract
from support.bridges import D_VOCAB, bridge, bridge_of, forget_patterns, hugging_face_model
from support.toy_models import Snapshot, decomposition_of, double, substituted, zero_head
from torch import Tensor, nn
from torch.testing import assert_close
from transformer_lens.config import TransformerBridgeConfig
from transformer_lens.model_bridge import TransformerBridge
from transformer_lens.model_bridge.sources._bridge_builder import build_bridge_from_module
from transformers import T5Config, T5ForConditionalGeneration

import apd_lens as apd
from apd_lens.data._batch import call

ATTN = tuple(f"attn.W_{letter}" for letter in "QKVO")
MLP = ("mlp.W_in", "mlp.W_out")
GATED = ("mlp.W_in", "mlp.W_gate", "mlp.W_out")
HOST = "TransformerBridge"
V3 = importlib.metadata.version("transformer-lens").startswith("3.")  # with HookedTransformer

# What users do with a bridge, against one whose weights were really replaced.

MASK = torch.tensor([True, True, False, True, False]).expand(3, -1)
MODELS = [("gpt2", "unprocessed"), ("llama", "raw"), ("llama", "processed")]

EDITS = [
    ("blocks.0.attn.hook_z", zero_head),
    ("blocks.0.attn.hook_q", double),
    ("blocks.0.attn.hook_v", double),
    ("blocks.0.mlp.hook_pre", double),
    ("blocks.0.mlp.hook_post", double),
    ("blocks.1.hook_resid_pre", double),
    ("hook_embed", double),
    ("blocks.1.mlp.out.hook_out", double),
    ("blocks.0.attn.q.hook_in", double),
]

SAME_MATRICES = {
    "gpt2": {
        "embed.W_E": "transformer.wte",
        "pos_embed.W_pos": "transformer.wpe",
        "blocks.0.attn.W_O": "transformer.h.0.attn.c_proj",
        "blocks.0.mlp.W_in": "transformer.h.0.mlp.c_fc",
        "blocks.0.mlp.W_out": "transformer.h.0.mlp.c_proj",
    },
    "llama-like": {
        "embed.W_E": "model.embed_tokens",
        **{f"blocks.0.attn.W_{letter.upper()}": f"model.layers.0.self_attn.{letter}_proj" for letter in "qkvo"},
        "blocks.0.mlp.W_in": "model.layers.0.mlp.up_proj",
        "blocks.0.mlp.W_gate": "model.layers.0.mlp.gate_proj",
        "blocks.0.mlp.W_out": "model.layers.0.mlp.down_proj",
    },
}


def names_of(*per_block: str, n_layers: int = 1, pos: bool = False, tied: bool = False) -> tuple[str, ...]:
    blocks = (f"blocks.{layer}.{name}" for layer in range(n_layers) for name in per_block)
    return ("embed.W_E", *(["pos_embed.W_pos"] if pos else []), *blocks, *([] if tied else ["unembed.W_U"]))


def tokens(n_examples: int, length: int = 4) -> Tensor:
    return torch.randint(2, D_VOCAB, (n_examples, length), generator=torch.Generator().manual_seed(1))


class BridgeContract(AdapterContract):
    host = HOST
    architecture = "gpt2"
    processing = "raw"
    options: dict = {}  # noqa: RUF012
    n_positions = 4

    def model(self):
        return bridge(self.architecture, self.processing, **self.options)

    def double_model(self):
        # Before the processing: 3.9 keeps tensors of its own, which `double()` does not reach.
        return bridge_of(hugging_face_model(self.architecture, **self.options).double(), self.processing)

    def batch(self, n_examples):
        return tokens(n_examples)

    @pytest.fixture
    def target(self, made):
        call(made.model, self.batch(1))  # a forward that another one follows leaves something of its own here and there
        forget_patterns(made.model)
        return made

    def _run(self, target, batch):
        output = super()._run(target, batch)
        forget_patterns(target.model)
        return output

    def test_a_copy_made_inside_a_context_is_a_plain_model(self, target):
        """Bridges cannot be pickled."""
        decomposition, batch = self._decomposition(target), self.batch(3)
        expected = self._run(target, batch)
        with decomposition.only([0]):
            copied = copy.deepcopy(target.model)
        assert torch.equal(call(copied, batch), expected)


class TestGPT2(BridgeContract):
    """GPT-2: queries, keys and values split from one matrix, positions that are looked up, tied unembedding"""

    options = {"tie_word_embeddings": True}  # noqa: RUF012
    names = names_of(*ATTN, *MLP, pos=True, tied=True)


class TestGPT2Processed(TestGPT2):
    """GPT-2 after enable_compatibility_mode(): layer norms folded, weights centred, and that has broken the tie"""

    processing = "processed"
    names = names_of(*ATTN, *MLP, pos=True)


class TestGPT2ByHead(TestGPT2):
    """GPT-2 with an input of its own for each head (set_use_split_qkv_input), and set_use_attn_result"""

    def model(self):
        model = super().model()
        model.set_use_split_qkv_input(True)
        model.set_use_attn_result(True)
        return model

    def test_a_copy_made_inside_a_context_is_a_plain_model(self, target):
        """But for rounding: the heads of a copy do not get the residual stream, normed anew, but what is normed."""
        decomposition, batch = self._decomposition(target), self.batch(3)
        expected = self._run(target, batch)
        with decomposition.only([0]):
            copied = copy.deepcopy(target.model)
        assert_close(copied(batch), expected, **SAME)


class TestLlama(BridgeContract):
    """Llama: rotary, grouped queries, gated MLP"""

    architecture = "llama"
    names = names_of(*ATTN, *GATED)


class TestLlamaProcessed(TestLlama):
    """Llama after enable_compatibility_mode(): the MLP goes round its leaves"""

    processing = "processed"

    def test_edited_state_dict_is_ablation_for_good(self, target):
        if not V3:
            return super().test_edited_state_dict_is_ablation_for_good(target)
        # What 3.9 multiplies by shares memory with the parameters, but not in a copy.
        decomposition, batch = self._decomposition(target), self.batch(3)
        with decomposition.ablate([1, 2]):
            expected = self._run(target, batch)
        model = self.model()
        model.load_state_dict(decomposition.edited_state_dict(ablate=[1, 2]))
        assert_close(model(batch), expected, **SAME)
        return None


class TestLlamaByHead(CoreContract, TestLlamaProcessed):
    """Llama after enable_compatibility_mode(), with set_use_attn_in and set_use_attn_result"""

    def model(self):
        model = super().model()
        model.set_use_attn_in(True)
        model.set_use_attn_result(True)
        return model


class TestNeoX(CoreContract, BridgeContract):
    """GPT-NeoX (Pythia) after enable_compatibility_mode(): split queries, keys and values, rotary, parallel MLP"""

    architecture = "neox"
    processing = "processed"
    names = names_of(*ATTN, *MLP)


class TestGemma2(BridgeContract):
    """Gemma-2: scaled embedding tied to the unscaled unembedding, norms before and after, softcaps, sliding window"""

    architecture = "gemma2"
    options = {"tie_word_embeddings": True}  # noqa: RUF012
    names = names_of(*ATTN, *GATED, tied=True)

    def test_shows_the_tie_and_the_scale(self, target):
        embed, unembed = target.weights["embed.W_E"].uses
        assert (embed.site, unembed.site) == ("embed", "unembed")
        assert (embed.scale, unembed.scale) == (pytest.approx(8**0.5), 1.0)


class TestQwen2(BridgeContract):
    """Qwen2: grouped queries, with biases"""

    architecture = "qwen2"
    names = names_of(*ATTN, *GATED)


class TestNative(BridgeContract):
    """boot_native(): transformer_lens's own modules, grouped queries"""

    names = names_of(*ATTN, *MLP, pos=True)
    config: dict = {"act_fn": "gelu", "normalization_type": "LN", "n_key_value_heads": 1}  # noqa: RUF012

    def model(self):
        sizes = {"d_model": 8, "d_head": 4, "n_heads": 2, "n_layers": 1, "n_ctx": 6, "d_vocab": D_VOCAB, "d_mlp": 10}
        return TransformerBridge.boot_native(TransformerBridgeConfig(**sizes, **self.config, seed=0)).eval()

    def double_model(self):
        return self.model().double()


@pytest.fixture(params=MODELS, ids="-".join)
def case(request) -> tuple[apd.Decomposition, dict[str, Tensor]]:
    """A decomposition of every matrix, and the weights that MASK stands for."""
    architecture, processing = request.param
    options = {"n_layer" if architecture == "gpt2" else "num_hidden_layers": 2}
    decomposition = decomposition_of(bridge(architecture, processing, **options), rank=4)
    components = decomposition.components
    return decomposition, {name: components.summed(name, MASK[0].float()) for name in components.names}


@pytest.mark.parametrize("added", ["before", "inside", "prepended", "hooks", "run_with_hooks", "permanent"])
def test_user_hooks_edit_what_replaced_weights_read_and_write(case, added: str):
    decomposition, summed = case
    model = decomposition.target.model
    with substituted(decomposition.target, summed):
        unedited = model(tokens(3))
    for name, edit in EDITS:
        with substituted(decomposition.target, summed):
            expected = model.run_with_hooks(tokens(3), fwd_hooks=[(name, edit)])
        assert (expected - unedited).abs().max() > 1e-2, name
        hooks = [(name, edit)]
        if added == "before":
            model.add_hook(name, edit)
        with decomposition.sparse(MASK):
            if added == "inside":
                model.add_hook(name, edit)
            if added == "permanent":
                model.add_perma_hook(name, edit)
            if added == "prepended":
                model.hook_dict[name].add_hook(edit, prepend=True)
            if added == "hooks":
                with model.hooks(fwd_hooks=hooks):
                    logits = model(tokens(3))
            elif added == "run_with_hooks":
                logits = model.run_with_hooks(tokens(3), fwd_hooks=hooks)
            else:
                logits = model(tokens(3))
        assert_close(logits, expected, rtol=1e-4, atol=1e-4, msg=lambda text, n=name: f"{n}: {text}")
        model.reset_hooks(including_permanent=True)


def test_hooks_of_options_edit_what_replaced_weights_read_and_write(case):
    decomposition, summed = case
    model = decomposition.target.model
    model.set_use_attn_result(True)
    model.set_use_split_qkv_input(True)
    for name in ("hook_result", "hook_q_input", "hook_k_input", "hook_v_input"):
        hooks = [(f"blocks.0.attn.{name}", zero_head)]
        with substituted(decomposition.target, summed):
            expected = model.run_with_hooks(tokens(3), fwd_hooks=hooks)
            assert (expected - model(tokens(3))).abs().max() > 1e-2, name
        with decomposition.sparse(MASK):
            assert_close(model.run_with_hooks(tokens(3), fwd_hooks=hooks), expected, **SAME)


def test_results_of_heads_are_replaced_where_the_residual_stream_takes_a_multiple_of_them():
    decomposition = decomposition_of(bridge("granite"), rank=4)
    model, components = decomposition.target.model, decomposition.components
    model.set_use_attn_result(True)
    for hooks in ([], [("blocks.0.attn.hook_result", zero_head)]):
        with substituted(decomposition.target, {n: components.summed(n, MASK[0].float()) for n in components.names}):
            expected = model.run_with_hooks(tokens(3), fwd_hooks=hooks)
        with decomposition.sparse(MASK):
            assert_close(model.run_with_hooks(tokens(3), fwd_hooks=hooks), expected, **SAME)


def test_run_with_cache_sees_the_replaced_model(case):
    decomposition, summed = case
    model = decomposition.target.model
    with substituted(decomposition.target, summed):
        _, expected = model.run_with_cache(tokens(3))
    with decomposition.sparse(MASK):
        _, cache = model.run_with_cache(tokens(3))
    assert cache.keys() == expected.keys()
    for name in expected:
        assert_close(cache[name], expected[name], rtol=1e-4, atol=1e-4)


def test_backward_hooks_see_the_gradients_of_the_replaced_model(case):
    decomposition, summed = case
    model = decomposition.target.model
    names = ["blocks.0.attn.hook_z", "blocks.0.attn.hook_q", "blocks.1.mlp.hook_post", "blocks.0.hook_resid_pre"]

    def gradients() -> dict[str, Tensor]:
        seen: dict[str, Tensor] = {}

        def keep(name: str):
            return lambda gradient, hook: seen.update({name: gradient.clone()})

        with model.hooks(bwd_hooks=[(name, keep(name)) for name in names]):
            model(tokens(3)).square().sum().backward()
        model.zero_grad()
        return seen

    with substituted(decomposition.target, summed):
        expected = gradients()
    with decomposition.sparse(MASK):
        seen = gradients()
    assert sorted(seen) == sorted(expected) == sorted(names)
    for name in names:
        assert_close(seen[name], expected[name], rtol=1e-4, atol=1e-4)


def test_layers_can_be_left_out(case):
    decomposition, summed = case
    model = decomposition.target.model
    with substituted(decomposition.target, summed):
        residual = model(tokens(3), stop_at_layer=1)
        logits = None if V3 else model(residual, start_at_layer=1)
    with decomposition.sparse(MASK):
        assert_close(model(tokens(3), stop_at_layer=1), residual, **SAME)
        assert model(tokens(3), return_type=None) is None
        if not V3:
            assert_close(model(residual, start_at_layer=1), logits, **SAME)


def test_generates_with_the_replaced_model(case):
    decomposition, summed = case
    model = decomposition.target.model
    options = {"max_new_tokens": 4, "do_sample": False, "stop_at_eos": False, "verbose": False}
    with substituted(decomposition.target, summed):
        expected = model.generate(tokens(3), **options)
    with decomposition.sparse(MASK):
        assert torch.equal(model.generate(tokens(3), **options), expected)
    assert not torch.equal(model.generate(tokens(3), **options), expected)


def test_options_can_be_switched_inside_a_context(case):
    decomposition, summed = case
    model = decomposition.target.model
    with substituted(decomposition.target, summed):
        expected = model(tokens(3))
    with decomposition.sparse(MASK):
        for switch in (model.set_use_attn_result, model.set_use_attn_in, model.set_use_hook_mlp_in):
            switch(True)
            assert_close(model(tokens(3)), expected, **SAME)
        model.set_use_attn_in(False)
        model.set_use_split_qkv_input(True)
        assert_close(model(tokens(3)), expected, **SAME)
        model.set_use_attn_result(False)
        model.set_use_split_qkv_input(False)
        assert_close(model(tokens(3)), expected, **SAME)


@pytest.mark.parametrize("option", ["set_use_attn_result", "set_use_attn_in", "set_use_split_qkv_input"])
def test_options_are_bit_for_bit_the_target_and_nothing_stays(case, option: str):
    decomposition, _ = case
    model = decomposition.target.model
    getattr(model, option)(True)
    expected = model(tokens(3)).detach()
    before = Snapshot.of(model)
    for names in ("*", "*.W_[QO]", "embed.*"):
        with decomposition_of(model, names).ablate([]):
            assert torch.equal(model(tokens(3)), expected)
        before.assert_unchanged(model)


def test_reset_hooks_does_not_take_ours_away(case):
    decomposition, summed = case
    model = decomposition.target.model
    with substituted(decomposition.target, summed):
        expected = model(tokens(3))
    with decomposition.sparse(MASK):
        model.reset_hooks()
        assert_close(model(tokens(3)), expected, **SAME)


def test_an_error_in_the_middle_of_a_component_leaves_nothing(case):
    decomposition, _ = case
    model = decomposition.target.model
    model.set_use_attn_result(True)
    model.set_use_split_qkv_input(True)
    names = ("blocks.0.attn.q.hook_out", "blocks.0.attn.hook_result", "blocks.0.mlp.in.hook_out")
    with torch.no_grad():
        model(tokens(3))
        for name in names:
            hook = model.hook_dict[name]
            handle = hook.register_forward_hook(_fail)
            with pytest.raises(RuntimeError, match="in the middle"):  # whatever the bridge itself leaves
                model(tokens(3))
            before = Snapshot.of(model)
            with pytest.raises(RuntimeError, match="in the middle"), decomposition.sparse(MASK):
                model(tokens(3))
            after = Snapshot.of(model)
            for path, attributes in before.attributes.items():
                assert after.attributes[path].keys() == attributes.keys(), path
            handle.remove()


def _fail(module: nn.Module, args, output) -> None:
    raise RuntimeError("in the middle")


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_works_in_other_dtypes(dtype: torch.dtype):
    for architecture, processing in [("gpt2", "processed"), ("llama", "raw")]:
        model = bridge(architecture, processing).to(dtype)
        decomposition = decomposition_of(model)
        expected = model(tokens(3))
        with decomposition.ablate([]):
            assert torch.equal(model(tokens(3)), expected)
        with decomposition.sparse(MASK):
            assert model(tokens(3)).dtype == dtype
        assert decomposition.attributions(tokens(3)).isfinite().all()


def test_a_model_that_was_copied_has_components_of_its_own():
    for architecture, processing in MODELS:
        original = bridge(architecture, processing)
        copied = copy.deepcopy(original)
        expected = original(tokens(3))
        decomposition = decomposition_of(copied)
        with decomposition.only([0]):
            assert torch.equal(original(tokens(3)), expected)
            assert not torch.allclose(copied(tokens(3)), expected)
        assert torch.equal(copied(tokens(3)), expected)


@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
def test_padding_changes_nothing(architecture: str):
    model = bridge(architecture)
    decomposition = decomposition_of(model, rank=4)
    lengths = [3, 4, 2]
    padded = torch.stack([F.pad(tokens(1, length)[0], (4 - length, 0)) for length in lengths])
    attention_mask = torch.stack([F.pad(torch.ones(length), (4 - length, 0)) for length in lengths]).long()
    batch = {"input": padded, "attention_mask": attention_mask}
    attributions = decomposition.attributions(batch)
    with decomposition.sparse(MASK):
        logits = model(**batch)
    for index, length in enumerate(lengths):
        assert_close(attributions[index : index + 1], decomposition.attributions(tokens(1, length)), **SAME)
        with decomposition.sparse(MASK[:1]):
            assert_close(logits[index : index + 1, -length:], model(tokens(1, length)), **SAME)


# Names and values


@pytest.mark.filterwarnings("ignore:Phi3ArchitectureAdapter does not support fold_ln:UserWarning")
@pytest.mark.parametrize("architecture", ["gpt2", "llama", "neox", "gemma2", "qwen2", "phi3"])
@pytest.mark.parametrize("processing", ["raw", "unprocessed", "processed"])
def test_every_use_is_reached_and_replaced(architecture: str, processing: str):
    decomposition = decomposition_of(bridge(architecture, processing), rank=4)
    model, components = decomposition.target.model, decomposition.components
    assert not decomposition.target.refused
    assert decomposition.target.match("blocks.*.mlp.*") == [
        f"blocks.0.{name}" for name in (MLP if architecture in ("gpt2", "neox") else GATED)
    ]
    expected = model(tokens(3))
    with decomposition.ablate([]):
        assert torch.equal(model(tokens(3)), expected)
    with substituted(decomposition.target, {n: components.summed(n, MASK[0].float()) for n in components.names}):
        expected = model(tokens(3))
    with decomposition.sparse(MASK):
        assert_close(model(tokens(3)), expected, **SAME)


@pytest.mark.skipif(not V3, reason="HookedTransformer is gone")
@pytest.mark.filterwarnings("ignore:HookedTransformer is deprecated:DeprecationWarning")
@pytest.mark.parametrize("processed", [False, True], ids=["raw", "processed"])
@pytest.mark.parametrize("architecture", ["gpt2", "llama", "neox"])
def test_has_the_names_and_values_of_the_hooked_transformer(architecture: str, processed: bool):
    hooked = apd.wrap(hooked_transformer(architecture, processed))
    bridged = apd.wrap(bridge(architecture, "processed" if processed else "raw"))
    assert tuple(bridged.weights) == tuple(hooked.weights)
    for name, matrix in bridged.weights.items():
        assert_close(matrix.value(), hooked.weights[name].value(), **SAME, msg=lambda text, n=name: f"{n}: {text}")
    assert_close(bridged.model(tokens(3)).log_softmax(-1), hooked.model(tokens(3)).log_softmax(-1), **SAME)


def hooked_transformer(architecture: str, processed: bool):
    from transformer_lens import HookedTransformer, HookedTransformerConfig
    from transformer_lens.pretrained.weight_conversions import (
        convert_gpt2_weights,
        convert_llama_weights,
        convert_neox_weights,
    )

    model = hugging_face_model(architecture)
    common = {"n_layers": 1, "d_model": 8, "n_ctx": 16, "d_mlp": 10, "d_vocab": D_VOCAB, "d_head": 4}
    rotary = {"positional_embedding_type": "rotary", "rotary_base": 10000}
    convert, options = {
        "gpt2": (convert_gpt2_weights, {"n_heads": 2, "act_fn": "gelu_new", "normalization_type": "LN"}),
        "llama": (
            convert_llama_weights,
            rotary
            | {"n_heads": 4, "n_key_value_heads": 2, "act_fn": "silu", "normalization_type": "RMS", "gated_mlp": True}
            | {"final_rms": True, "eps": 1e-6, "rotary_dim": 4},
        ),
        "neox": (
            convert_neox_weights,
            rotary
            | {"n_heads": 2, "act_fn": "gelu", "normalization_type": "LN", "parallel_attn_mlp": True}
            | {"rotary_dim": 4},
        ),
    }[architecture]
    cfg = HookedTransformerConfig(**common | options | {"device": "cpu"})
    hooked = HookedTransformer(cfg)
    hooked.load_and_process_state_dict(
        convert(model, cfg),
        fold_ln=processed,
        center_writing_weights=processed,
        center_unembed=processed,
        fold_value_biases=processed,
    )
    return hooked


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("architecture", ["gpt2", "llama", "gemma2", "qwen2"])
def test_attributions_are_those_of_the_plain_hugging_face_model(architecture: str, tied: bool):
    model = hugging_face_model(architecture, tie_word_embeddings=tied)
    same = SAME_MATRICES["gpt2" if architecture == "gpt2" else "llama-like"] | (
        {} if tied else {"unembed.W_U": "lm_head"}
    )
    plain = decomposition_of(copy.deepcopy(model), [f"{path}.weight" for path in same.values()])
    assert len(plain.components.names) == len(same)
    bridged = on_bridge(plain, bridge_of(model), {name: f"{path}.weight" for name, path in same.items()})
    expected = plain.attributions({"input_ids": tokens(3)})
    assert_close(bridged.attributions(tokens(3)), expected, **SAME)


def test_q_k_and_v_together_are_the_fused_matrix():
    model = hugging_face_model("gpt2")
    plain = decomposition_of(copy.deepcopy(model), "*.c_attn.weight")
    A, B = (side["transformer.h.0.attn.c_attn.weight"] for side in (plain.components.A, plain.components.B))
    names = [f"blocks.0.attn.W_{letter}" for letter in "QKV"]
    components = apd.ParameterComponents(dict.fromkeys(names, A), dict(zip(names, B.chunk(3, dim=2), strict=True)))
    bridged = apd.Decomposition(apd.wrap(bridge_of(model)), components, plain.settings, plain.output, {})
    assert_close(bridged.attributions(tokens(3)), plain.attributions({"input_ids": tokens(3)}), **SAME)


def on_bridge(plain: apd.Decomposition, model: TransformerBridge, names: dict[str, str]) -> apd.Decomposition:
    """The same components on a bridge, given its names for those of the plain model."""
    A, B = plain.components.A, plain.components.B
    components = apd.ParameterComponents(
        {name: A[path] for name, path in names.items()}, {name: B[path] for name, path in names.items()}
    )
    return apd.Decomposition(apd.wrap(model), components, plain.settings, plain.output, {})


@pytest.mark.parametrize("architecture", ["gpt2", "gemma2"])
def test_a_tie_is_one_matrix_until_the_processing_breaks_it(architecture: str):
    for processing in ("raw", "unprocessed"):
        target = apd.wrap(bridge(architecture, processing, tie_word_embeddings=True))
        matrix = target.weights["embed.W_E"]
        assert [(use.site, use.transposed) for use in matrix.uses] == [("embed", False), ("unembed", True)]
        assert matrix.tied_to == ("unembed.W_U",)
        assert target.match("unembed.*") == ["embed.W_E"]
    target = apd.wrap(bridge(architecture, "processed", tie_word_embeddings=True))
    assert target.match(["embed.*", "unembed.*"]) == ["embed.W_E", "unembed.W_U"]
    assert not target.weights["embed.W_E"].tied_to


def test_parameters_are_looked_up_when_they_are_used():
    """The processing replaces them."""
    model = bridge("gpt2")
    target = apd.wrap(model)
    before = {name: matrix.value().clone() for name, matrix in target.weights.items()}
    model.enable_compatibility_mode(disable_warnings=True)
    for name in ("blocks.0.attn.W_Q", "blocks.0.mlp.W_in", "unembed.W_U"):
        assert not torch.allclose(target.weights[name].value(), before[name])
        assert torch.equal(target.weights[name].value(), apd.wrap(model).weights[name].value())


# What cannot be decomposed


def test_refuses_experts_and_the_router(record_property):
    target = apd.wrap(bridge("mixtral"))
    assert tuple(target.weights) == names_of(*ATTN)
    assert sorted(target.refused) == [
        "blocks.0.mlp.experts.down_proj",
        "blocks.0.mlp.experts.gate_up_proj",
        "blocks.0.mlp.gate.weight",
    ]
    assert "MixtralExperts is not among the layers" in target.refused["blocks.0.mlp.experts.down_proj"]
    for name in ("gate.weight", "experts.down_proj"):
        reason = target.refused[f"blocks.0.mlp.{name}"]
        record_property("refused", (HOST, f"Mixtral: `blocks.*.mlp.{name}`", reason))
    with pytest.raises(apd.UnsupportedModel, match="MixtralExperts is not among the layers"):
        target.match("blocks.*.mlp.experts.*")


def test_refuses_leaves_with_a_forward_of_their_own(record_property):
    target = apd.wrap(bridge("opt", pad_token_id=1))
    assert list(target.refused) == ["pos_embed.W_pos"]
    assert "OPTLearnedPositionalEmbedding overrides the forward of Embedding" in target.refused["pos_embed.W_pos"]
    record_property("refused", (HOST, "OPT: `pos_embed.W_pos`", target.refused["pos_embed.W_pos"]))


def test_refuses_quantized_weights():
    class Linear4bit(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            raise NotImplementedError

    model = bridge("llama")
    model.blocks[0].mlp.gate._modules["_original_component"] = Linear4bit(8, 10)
    target = apd.wrap(model)
    assert list(target.refused) == ["blocks.0.mlp.W_gate"]
    assert "Linear4bit overrides the forward of Linear" in target.refused["blocks.0.mlp.W_gate"]


def test_refuses_an_encoder_and_a_decoder(record_property):
    config = T5Config(
        d_model=8, d_kv=4, d_ff=10, num_layers=1, num_heads=2, vocab_size=D_VOCAB, decoder_start_token_id=0
    )
    model = build_bridge_from_module(
        T5ForConditionalGeneration(config), "T5ForConditionalGeneration", hf_config=config, tokenizer=None
    )
    reason = "a TransformerBridge without `blocks`, such as one of an encoder and a decoder, is not supported"
    with pytest.raises(apd.UnsupportedModel, match=reason):
        apd.wrap(model)
    record_property("refused", (HOST, "T5", reason))


def test_a_leaf_that_is_not_called_is_an_error():
    model = bridge("gpt2")
    decomposition = decomposition_of(model, "blocks.0.mlp.*")
    vars(model.blocks[0].mlp)["forward"] = lambda x: x
    with decomposition.sparse(MASK), pytest.raises(apd.errors.SiteNotCalled, match=r"blocks\.0\.mlp\.in"):
        model(tokens(3))


def test_decompose_runs_on_a_processed_bridge():
    model = bridge("llama", "processed")
    with torch.no_grad():
        model(tokens(3))
    before = Snapshot.of(model)
    decomposition = apd.decompose(
        model,
        [tokens(4)],
        weights="blocks.*.mlp.*",
        n_components=3,
        rank=2,
        optimization=apd.Optimization(steps=3),
        progress=False,
    )
    before.assert_unchanged(model)
    assert decomposition.components.names == [f"blocks.0.{name}" for name in GATED]


def test_training_mode_is_left_as_it_was():
    """Also of modules that the bridge switches but does not list."""
    model = bridge("gpt2").train()
    modules = {*model.modules(), *model.original_model.modules()}
    assert all(module.training for module in modules)
    decomposition_of(model, "blocks.0.mlp.*").attributions(tokens(2))
    assert all(module.training for module in modules)
