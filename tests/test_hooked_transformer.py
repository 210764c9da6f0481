"""The adapter for HookedTransformer: the contract in many forms, and composition with what users do with hooks."""

import pytest
import torch
from adapter_contract import SAME, AdapterContract
from torch import Tensor
from torch.testing import assert_close
from toy_models import Snapshot, decomposition_of, substituted
from transformer_lens import HookedTransformer, HookedTransformerConfig, patching

import apd_lens as apd
from apd_lens._passes import watched_pass

pytestmark = pytest.mark.filterwarnings("ignore:HookedTransformer is deprecated:DeprecationWarning")

ATTN = tuple(f"attn.W_{letter}" for letter in "QKVO")
MLP = ("mlp.W_in", "mlp.W_out")
GATED = ("mlp.W_in", "mlp.W_gate", "mlp.W_out")


def names_of(*per_block: str, n_layers: int = 1, pos: bool = True) -> tuple[str, ...]:
    blocks = (f"blocks.{layer}.{name}" for layer in range(n_layers) for name in per_block)
    return ("embed.W_E", *(["pos_embed.W_pos"] if pos else []), *blocks, "unembed.W_U")


def hooked_transformer(**changes) -> HookedTransformer:
    options = {
        "n_layers": 1,
        "d_model": 8,
        "n_ctx": 6,
        "d_head": 4,
        "n_heads": 2,
        "d_mlp": 10,
        "d_vocab": 12,
        "act_fn": "gelu",
        "normalization_type": "LN",
        "init_weights": True,
        "initializer_range": 0.5,
        "seed": 0,
        "device": "cpu",
    }
    model = HookedTransformer(HookedTransformerConfig(**{**options, **changes})).eval()
    with torch.no_grad():  # biases are 0 at first, which would hide a forgotten one
        for name, parameter in model.named_parameters():
            if name.rpartition(".")[2].startswith(("b_", "_b_")):
                parameter.normal_(std=0.1, generator=torch.Generator().manual_seed(0))
    return model


def tokens(n_examples: int, length: int = 4) -> Tensor:
    return torch.randint(12, (n_examples, length), generator=torch.Generator().manual_seed(1))


class HookedTransformerContract(AdapterContract):
    options: dict = {}  # noqa: RUF012
    n_positions = 4
    names = names_of(*ATTN, *MLP)

    def model(self):
        return hooked_transformer(**self.options)

    def double_model(self):
        self.options = {**self.options, "dtype": torch.float64}
        return self.model()

    def batch(self, n_examples):
        return tokens(n_examples)


class TestBase(HookedTransformerContract):
    pass


class TestTwoLayers(HookedTransformerContract):
    options = {"n_layers": 2, "act_fn": "relu"}  # noqa: RUF012
    names = names_of(*ATTN, *MLP, n_layers=2)


class TestPadded(HookedTransformerContract):
    """Left-padded batches: positions are counted from the first real token, and padding has none."""

    def batch(self, n_examples):
        mask = torch.ones(n_examples, 4, dtype=torch.long)
        mask[::2, 0] = 0
        return {"input": tokens(n_examples), "attention_mask": mask}

    def test_y_is_x_times_w(self, target):
        """But for padding, where y of W_pos is 0."""
        batch = self.batch(3)
        call = watched_pass(target, ["pos_embed.W_pos"], batch, self.output).calls[0]
        expected = target.model.W_pos[call.x] * batch["attention_mask"][..., None]
        assert torch.equal(call.y, expected)


class TestAttentionOnly(HookedTransformerContract):
    options = {"attn_only": True}  # noqa: RUF012
    names = names_of(*ATTN)


class TestGatedMLP(HookedTransformerContract):
    options = {"gated_mlp": True, "act_fn": "silu"}  # noqa: RUF012
    names = names_of(*ATTN, *GATED)


class TestSoLU(HookedTransformerContract):
    options = {"act_fn": "solu_ln"}  # noqa: RUF012


class TestGatedSoLU(HookedTransformerContract):
    """Its forward uses W_gate only."""

    options = {"act_fn": "solu_ln", "gated_mlp": True}  # noqa: RUF012
    names = names_of(*ATTN, "mlp.W_gate", "mlp.W_out")


class TestGroupedQueryAttention(HookedTransformerContract):
    options = {"n_key_value_heads": 1}  # noqa: RUF012


class TestUngrouped(HookedTransformerContract):
    options = {"n_key_value_heads": 1, "ungroup_grouped_query_attention": True}  # noqa: RUF012


class TestRotary(HookedTransformerContract):
    options = {"positional_embedding_type": "rotary", "rotary_dim": 4}  # noqa: RUF012
    names = names_of(*ATTN, *MLP, pos=False)


class TestAlibi(HookedTransformerContract):
    options = {"positional_embedding_type": "alibi"}  # noqa: RUF012
    names = names_of(*ATTN, *MLP, pos=False)


class TestShortformer(HookedTransformerContract):
    options = {"positional_embedding_type": "shortformer", "normalization_type": None}  # noqa: RUF012


class TestParallel(HookedTransformerContract):
    options = {"parallel_attn_mlp": True, "normalization_type": "LNPre"}  # noqa: RUF012


class TestPostEmbeddingNorm(HookedTransformerContract):
    options = {"post_embedding_ln": True}  # noqa: RUF012


class TestQKNormAndSoftcaps(HookedTransformerContract):
    options = {"use_qk_norm": True, "attn_scores_soft_cap": 5.0, "output_logits_soft_cap": 3.0}  # noqa: RUF012


class TestNoLayers(HookedTransformerContract):
    options = {"n_layers": 0, "normalization_type": None, "attn_only": True}  # noqa: RUF012
    names = names_of()


class TestAttnResult(HookedTransformerContract):
    def model(self):
        model = hooked_transformer(**self.options)
        model.set_use_attn_result(True)
        return model


class TestSplitQKVInput(HookedTransformerContract):
    def model(self):
        model = hooked_transformer(**self.options)
        model.set_use_split_qkv_input(True)
        return model


class TestSplitGroupedQueryAttention(HookedTransformerContract):
    def model(self):
        model = hooked_transformer(n_heads=4, d_head=2, n_key_value_heads=2, **self.options)
        model.set_use_split_qkv_input(True)
        return model


class TestAttnIn(HookedTransformerContract):
    def model(self):
        model = hooked_transformer(**self.options)
        model.set_use_attn_in(True)
        model.set_use_hook_mlp_in(True)
        return model


# What users do with a hooked model, against a model whose weights were really replaced.


@pytest.fixture
def case() -> tuple[apd.Decomposition, dict[str, Tensor]]:
    """A decomposition of every matrix, and the weights that MASK stands for."""
    decomposition = decomposition_of(hooked_transformer(n_layers=2), rank=4)
    components = decomposition.components
    return decomposition, {name: components.summed(name, MASK[0].float()) for name in components.names}


MASK = torch.tensor([True, True, False, True, False]).expand(3, -1)


def zero_head(z: Tensor, hook) -> Tensor:
    z = z.clone()
    z[:, :, 1] = 0
    return z


def double(value: Tensor, hook) -> Tensor:
    return value * 2


@pytest.mark.parametrize(
    ("hook_name", "edit"),
    [
        ("blocks.0.attn.hook_z", zero_head),
        ("blocks.0.attn.hook_q", double),
        ("blocks.0.attn.hook_v", double),
        ("blocks.0.mlp.hook_pre", double),
        ("blocks.0.mlp.hook_post", double),
        ("blocks.1.hook_resid_pre", double),
        ("hook_embed", double),
        ("blocks.1.hook_mlp_out", double),
    ],
)
@pytest.mark.parametrize("added", ["before", "inside", "prepended", "run_with_hooks", "permanent"])
def test_user_hooks_edit_what_replaced_weights_read_and_write(case, hook_name: str, edit, added: str):
    decomposition, summed = case
    model = decomposition.target.model
    with substituted(decomposition.target, summed):
        expected = model.run_with_hooks(tokens(3), fwd_hooks=[(hook_name, edit)])
    if added == "before":
        model.add_hook(hook_name, edit)
    with decomposition.sparse(MASK):
        if added == "inside":
            model.add_hook(hook_name, edit)
        if added == "permanent":
            model.add_perma_hook(hook_name, edit)
        if added == "prepended":
            model.hook_dict[hook_name].add_hook(edit, prepend=True)
        hooks = [(hook_name, edit)] if added == "run_with_hooks" else []
        logits = model.run_with_hooks(tokens(3), fwd_hooks=hooks, reset_hooks_end=False)
    assert_close(logits, expected, **SAME)
    assert (logits - model(tokens(3))).abs().max() > 1e-2  # outside, the weights are the target's again


def test_run_with_cache_sees_the_replaced_model(case):
    decomposition, summed = case
    model = decomposition.target.model
    with substituted(decomposition.target, summed):
        _, expected = model.run_with_cache(tokens(3))
    with decomposition.sparse(MASK):
        _, cache = model.run_with_cache(tokens(3))
    assert cache.keys() == expected.keys()
    for name in expected:
        assert_close(cache[name], expected[name], **SAME)


def test_backward_hooks_see_the_gradients_of_the_replaced_model(case):
    decomposition, summed = case
    model = decomposition.target.model

    def gradients() -> dict[str, Tensor]:
        seen: dict[str, Tensor] = {}
        names = ["blocks.0.attn.hook_z", "blocks.0.attn.hook_q", "blocks.1.mlp.hook_post", "blocks.0.hook_resid_pre"]

        def keep(gradient: Tensor, hook) -> None:
            seen[hook.name] = gradient.clone()

        with model.hooks(bwd_hooks=[(name, keep) for name in names]):
            model(tokens(3)).square().sum().backward()
        assert sorted(seen) == sorted(names)
        model.zero_grad()
        return seen

    with substituted(decomposition.target, summed):
        expected = gradients()
    with decomposition.sparse(MASK):
        seen = gradients()
    for name in expected:
        assert_close(seen[name], expected[name], rtol=1e-4, atol=1e-4)


def test_layers_can_be_left_out(case):
    decomposition, summed = case
    model = decomposition.target.model
    with substituted(decomposition.target, summed):
        residual = model(tokens(3), stop_at_layer=1)
        expected = model(residual, start_at_layer=1)
    with decomposition.sparse(MASK):
        assert_close(model(tokens(3), stop_at_layer=1), residual, **SAME)
        assert_close(model(residual, start_at_layer=1), expected, **SAME)


def test_activation_patching_runs_on_the_replaced_model(case):
    decomposition, summed = case
    model = decomposition.target.model
    clean, corrupted = tokens(3), tokens(3).flip(1)

    def patch_heads() -> Tensor:
        _, cache = model.run_with_cache(clean)
        return patching.get_act_patch_attn_head_out_all_pos(
            model, corrupted, cache, lambda logits: logits[:, -1, 0].sum()
        )

    with substituted(decomposition.target, summed):
        expected = patch_heads()
    with decomposition.sparse(MASK):
        assert_close(patch_heads(), expected, rtol=1e-4, atol=1e-4)


def test_options_can_be_switched_inside_a_context(case):
    decomposition, summed = case
    model = decomposition.target.model
    with substituted(decomposition.target, summed):
        expected = model(tokens(3))
    with decomposition.sparse(MASK):
        for switch in (model.set_use_attn_result, model.set_use_split_qkv_input, model.set_use_hook_mlp_in):
            switch(True)
            assert_close(model(tokens(3)), expected, **SAME)


def test_reset_hooks_does_not_take_ours_away(case):
    decomposition, summed = case
    model = decomposition.target.model
    with substituted(decomposition.target, summed):
        expected = model(tokens(3))
    with decomposition.sparse(MASK):
        model.reset_hooks()
        assert_close(model(tokens(3)), expected, **SAME)


def test_refuses_with_the_reason():
    target = apd.wrap(hooked_transformer(positional_embedding_type="alibi", gated_mlp=True, act_fn="solu_ln"))
    assert target.refused == {
        "pos_embed.W_pos": "alibi models do not use it",
        "blocks.0.mlp.W_in": "a gated MLP with a layer-norm activation does not use it",
    }
    with pytest.raises(apd.UnsupportedModel, match="alibi models do not use it"):
        target.match("pos_embed.*")


def test_mixture_of_experts_is_refused_and_the_rest_is_not():
    model = hooked_transformer(num_experts=2, experts_per_token=1, gated_mlp=True, act_fn="silu")
    target = apd.wrap(model)
    assert target.match("blocks.0.*") == [f"blocks.0.{name}" for name in ATTN]
    assert "the forward of MoE is not understood" in target.refused["blocks.0.mlp.experts.0.W_in.weight"]
    before = Snapshot.of(model)
    apd.decompose(model, [tokens(3)], n_components=2, rank=1, optimization=apd.Optimization(steps=2), progress=False)
    before.assert_unchanged(model)


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
