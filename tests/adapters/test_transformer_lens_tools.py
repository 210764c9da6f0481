"""What users do with a HookedTransformer, inside our contexts: as on a model whose weights were really replaced."""

import copy
import pickle
from functools import partial

import pytest
import torch
from support.adapter_contract import SAME
from support.hooked import check_effects, hooked_transformer, tokens
from support.tools import Case, case_of
from support.toy_models import decomposition_of, double, keep_in_float64, zero_head
from torch import Tensor
from torch.testing import assert_close
from transformer_lens import HookedTransformer, TransformerLensKeyValueCache, patching

# Hooks.


# Inputs and outputs of replaced matrices. The last: W_O reads what the user made of z.
EDITS = {
    "hook_embed": double,
    "hook_pos_embed": double,
    "blocks.0.attn.hook_q": double,
    "blocks.0.attn.hook_v": double,
    "blocks.0.mlp.hook_pre": double,
    "blocks.0.mlp.hook_post": double,
    "blocks.1.hook_resid_pre": double,
    "blocks.1.hook_mlp_out": double,
    "blocks.1.ln2.hook_normalized": double,
    "unembed.hook_in": double,
    "unembed.hook_out": double,
    "blocks.0.attn.hook_z": zero_head,
}

PATCHING = [name for name in dir(patching) if name.startswith("get_act_patch_")]


@pytest.fixture(params=["sparse", "ablate", "only"])
def case(request) -> Case:
    return case_of(hooked_transformer(n_layers=2, n_ctx=16), request.param)


@pytest.mark.parametrize("added", ["before", "inside", "prepended", "permanent", "run_with_hooks", "hooks"])
def test_hooks_edit_what_replaced_weights_read_and_write(case: Case, added: str):
    for name, edit in EDITS.items():
        model = case.model
        with case.replaced():
            expected = model.run_with_hooks(tokens(3), fwd_hooks=[(name, edit)])
        if added == "before":
            model.add_hook(name, edit)
        with case.enter():
            match added:
                case "inside":
                    model.add_hook(name, edit)
                case "prepended":
                    model.add_hook(name, double)
                    model.hook_dict[name].add_hook(lambda value, hook: value / 2, prepend=True)
                    model.add_hook(name, edit, prepend=True)
                case "permanent":
                    model.add_perma_hook(name, edit)
            if added == "hooks":
                with model.hooks(fwd_hooks=[(name, edit)]):
                    logits = model(tokens(3))
            else:
                hooks = [(name, edit)] if added == "run_with_hooks" else []
                logits = model.run_with_hooks(tokens(3), fwd_hooks=hooks, reset_hooks_end=False)
        assert_close(logits, expected, rtol=1e-4, atol=1e-4, msg=lambda text, n=name: f"{n}: {text}")
        model.reset_hooks(including_permanent=True)


@pytest.mark.parametrize("added", ["before", "inside", "run_with_hooks"])
def test_backward_hooks_see_the_gradients_of_the_replaced_model(case: Case, added: str):
    seen: dict[str, Tensor] = {}

    def keep(gradient: Tensor, hook) -> None:
        seen[hook.name] = gradient.clone()

    hooks = [(name, keep) for name in case.model.run_with_cache(tokens(3))[1]]

    def add(model: HookedTransformer) -> None:
        for name, hook in hooks:
            model.add_hook(name, hook, dir="bwd")

    def run(model: HookedTransformer) -> dict[str, Tensor]:
        if added == "inside":
            add(model)
        logits = model.run_with_hooks(
            tokens(3),
            fwd_hooks=[("blocks.0.attn.hook_z", zero_head)],
            bwd_hooks=hooks if added == "run_with_hooks" else [],
            reset_hooks_end=False,
        )
        logits.square().sum().backward()
        model.zero_grad()
        model.reset_hooks(direction="fwd" if added == "before" else "both")
        assert len(seen) == len(hooks)
        return dict(seen)

    if added == "before":
        add(case.model)
    case.check(run)


def test_reset_hooks_does_not_take_ours_away(case: Case):
    def run(model: HookedTransformer) -> Tensor:
        model.reset_hooks(including_permanent=True)
        return model(tokens(3))

    case.check(run)


def test_attributions_are_those_of_the_hooked_model(monkeypatch):
    keep_in_float64(monkeypatch)
    model = hooked_transformer(dtype=torch.float64)
    decomposition = decomposition_of(model)
    model.add_hook("blocks.0.attn.hook_z", zero_head)
    model.add_perma_hook("blocks.0.mlp.hook_pre", double)
    check_effects(decomposition, lambda: model(tokens(2)), tokens(2))


# Caches of activations.


def test_run_with_cache(case: Case):
    case.check(lambda model: dict(model.run_with_cache(tokens(3))[1].items()))
    case.check(lambda model: model.run_with_cache(tokens(3), names_filter="blocks.1.hook_mlp_out")[1].cache_dict)
    case.check(lambda model: model.run_with_cache(tokens(3), stop_at_layer=1, return_cache_object=False))
    with_gradients = case.model.run_with_cache(tokens(3), return_type="loss", incl_bwd=True)[1]
    assert "blocks.0.attn.hook_q_grad" in with_gradients
    case.check(lambda model: model.run_with_cache(tokens(3), return_type="loss", incl_bwd=True)[1].cache_dict)


def test_head_results_are_replaced_if_the_model_makes_them(case: Case):
    """Without `set_use_attn_result`, the cache would make them of the model's own W_O."""
    case.model.set_use_attn_result(True)
    case.check(lambda model: model.run_with_cache(tokens(3))[1].stack_head_results())


# Other ways to run it.


def test_layers_can_be_left_out(case: Case):
    residual = torch.randn(3, 4, 8)
    case.check(lambda model: model(tokens(3), stop_at_layer=1))
    case.check(lambda model: model(tokens(3), stop_at_layer=0))
    case.check(lambda model: model(residual, start_at_layer=1))
    case.check(lambda model: model(residual, start_at_layer=0, stop_at_layer=-1))
    case.check(lambda model: model(tokens(3), return_type="loss"))


def test_keys_and_values_can_be_kept(case: Case):
    def run(model: HookedTransformer, first: int = 1) -> Tensor:
        cache = TransformerLensKeyValueCache.init_cache(model.cfg, model.cfg.device, 3)
        attention_mask = torch.ones(3, 4, dtype=torch.long)
        attention_mask[0, :first] = 0  # left padding
        parts = [slice(0, 3), slice(3, 4)]
        logits = [model(tokens(3)[:, p], attention_mask=attention_mask[:, p], past_kv_cache=cache) for p in parts]
        return torch.cat(logits, 1)[:, first:]

    case.check(run)
    case.check(partial(run, first=0))
    with case.enter():
        assert_close(run(case.model, first=0), case.model(tokens(3)), **SAME)


@pytest.mark.parametrize("use_past_kv_cache", [False, True])
def test_generate(case: Case, use_past_kv_cache: bool):
    logits: list[Tensor] = []

    def run(model: HookedTransformer) -> Tensor:
        logits.clear()
        with model.hooks(fwd_hooks=[("unembed.hook_out", lambda value, hook: logits.append(value[:, -1]))]):
            options = {"do_sample": False, "stop_at_eos": False, "verbose": False, "max_new_tokens": 3}
            model.generate(tokens(3, 2), use_past_kv_cache=use_past_kv_cache, **options)
        return torch.stack(logits)

    case.check(run)


@pytest.mark.parametrize("context", ["sparse", "ablate", "only"])
def test_activation_patching(context: str):
    clean, corrupted = tokens(3, 2), tokens(3, 2).flip(1)

    def run(model: HookedTransformer) -> dict[str, Tensor]:
        _, cache = model.run_with_cache(clean)
        return {
            name: getattr(patching, name)(model, corrupted, cache, lambda logits: logits[:, -1, 0].mean())
            for name in PATCHING
        }

    assert len(PATCHING) == 18
    case_of(hooked_transformer(), context).check(run)


# Changing the model inside a context.


def single_head(value: Tensor, hook) -> Tensor:
    value = value.clone()
    value[:, :, -1] *= 2
    return value


def test_options_can_be_switched_inside_a_context(case: Case):
    def run(model: HookedTransformer) -> list[Tensor]:
        outputs = []
        for switch in ("attn_result", "split_qkv_input", "hook_mlp_in", "attn_in"):
            getattr(model, f"set_use_{switch}")(True)
            outputs.append(model(tokens(3)))
            if switch == "attn_in":
                model.set_use_split_qkv_input(False)
                hooks = [("blocks.0.hook_attn_in", single_head)]
            else:
                names = ("attn.hook_result", "hook_q_input", "hook_k_input", "hook_v_input", "hook_mlp_in")
                hooks = [(f"blocks.0.{name}", single_head) for name in names]
            outputs.append(model.run_with_hooks(tokens(3), fwd_hooks=hooks))
        for switch in ("attn_result", "hook_mlp_in", "attn_in"):
            getattr(model, f"set_use_{switch}")(False)
        return [*outputs, model(tokens(3))]

    case.check(run)


@pytest.mark.parametrize("context", ["sparse", "ablate", "only"])
def test_shared_keys_and_values_can_be_ungrouped_inside_a_context(context: str):
    def run(model: HookedTransformer) -> list[Tensor]:
        outputs = []
        for options in range(8):
            model.set_ungroup_grouped_query_attention(bool(options & 1))
            model.set_use_split_qkv_input(bool(options & 2))
            model.set_use_attn_result(bool(options & 4))
            hooks = [(f"blocks.0.{name}", single_head) for name in ("hook_k_input", "attn.hook_k", "attn.hook_v")]
            outputs.append(model.run_with_hooks(tokens(3), fwd_hooks=hooks))
        return outputs

    case_of(hooked_transformer(n_heads=4, d_head=2, n_key_value_heads=2), context).check(run)


def test_dtype_and_device_can_be_changed_inside_a_context(case: Case):
    def run(dtype: torch.dtype, model: HookedTransformer) -> Tensor:
        logits = model.to(dtype, print_details=False).to("cpu", print_details=False).cpu()(tokens(3))
        assert logits.dtype == dtype
        model.to(torch.float32, print_details=False)
        return logits

    case.check(partial(run, torch.float64))
    case.check(partial(run, torch.bfloat16), tolerance=0.3)


def test_training_and_inference_mode(case: Case):
    def run(model: HookedTransformer) -> list[Tensor]:
        model.train()
        with torch.inference_mode():
            outputs = [model(tokens(3))]
        with torch.no_grad():
            outputs.append(model(tokens(3)))
        outputs.append(model(tokens(3)))
        outputs[-1].square().mean().backward()
        assert model.training
        gradient = model.blocks[0].ln1.w.grad.clone()
        model.eval().zero_grad()
        return [*outputs, gradient]

    case.check(run)


def test_copies_and_state_dicts_made_inside_a_context_are_of_the_plain_model(case: Case):
    model = case.model
    expected, state = model(tokens(3)), {key: value.clone() for key, value in model.state_dict().items()}
    loaded = hooked_transformer(n_layers=2, n_ctx=16, seed=1)
    with case.enter():
        assert model.state_dict().keys() == state.keys()
        for key, value in model.state_dict().items():
            assert torch.equal(value, state[key])
        loaded.load_state_dict(model.state_dict())
        copied, pickled = copy.deepcopy(model), pickle.loads(pickle.dumps(model))
        for plain in (loaded, copied, pickled):
            assert torch.equal(plain(tokens(3)), expected)
        with decomposition_of(copied).ablate([]):  # a context of its own does not disturb the other's
            assert torch.equal(copied(tokens(3)), expected)
    for plain in (loaded, copied, pickled, model):
        assert torch.equal(plain(tokens(3)), expected)
