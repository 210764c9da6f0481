"""The adapter for nnsight: the contract on four kinds of modules, and composition with what users do in a trace.

Expected is always what the same nnsight code gives on the same module with other weights in its parameters.
"""

import copy
import inspect
import pickle
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from nnsight import Envoy, LanguageModel, NNsight, NNsightDeprecationWarning, TransformersModel
from nnsight.intervention.interleaver import OutOfOrderError
from support.adapter_contract import SAME, AdapterContract, CoreContract
from support.toy_models import Snapshot, decomposition_of, substituted, tiny_gpt2, tiny_llama
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from torch import Tensor, nn
from torch.testing import assert_close
from transformer_lens import HookedTransformer, HookedTransformerConfig
from transformers import PreTrainedTokenizerFast

import apd_lens as apd
from apd_lens.passes._output import default_output

D_VOCAB = 13


def tokens(n_examples: int, length: int = 5) -> Tensor:
    return torch.randint(2, D_VOCAB, (n_examples, length), generator=torch.Generator().manual_seed(1))


def vectors(n_examples: int) -> Tensor:
    return torch.randn(n_examples, 3, generator=torch.Generator().manual_seed(1))


def tokenizer() -> PreTrainedTokenizerFast:
    """Word w7 is token 7; 0 begins and 1 ends a text."""
    words = Tokenizer(WordLevel({f"w{i}": i for i in range(D_VOCAB)}, unk_token="w2"))
    words.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w2", eos_token="w1", pad_token="w1")


# As nnsight's language models use them.
OPTIONS = {
    "vocab_size": D_VOCAB,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 1,
    "attn_implementation": "eager",
}


def gpt2(n_layers: int = 2) -> nn.Module:
    torch.manual_seed(0)
    return tiny_gpt2(n_positions=16, n_layer=n_layers, **OPTIONS)


def llama(n_layers: int = 2) -> nn.Module:
    torch.manual_seed(0)
    return tiny_llama(intermediate_size=10, max_position_embeddings=16, num_hidden_layers=n_layers, **OPTIONS)


def sequential() -> nn.Sequential:
    torch.manual_seed(0)
    inner = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 4))
    return nn.Sequential(nn.Linear(3, 4), inner, nn.Linear(4, 2))


def hooked_transformer(**changes: Any) -> HookedTransformer:
    options = {
        "n_layers": 2,
        "d_model": 8,
        "n_ctx": 6,
        "d_head": 4,
        "n_heads": 2,
        "d_mlp": 10,
        "d_vocab": D_VOCAB,
        "act_fn": "gelu",
        "initializer_range": 0.3,
        "seed": 0,
        "device": "cpu",
    }
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "HookedTransformer is deprecated", DeprecationWarning)
        return HookedTransformer(HookedTransformerConfig(**{**options, **changes})).eval()


def transformers_model(module: nn.Module) -> TransformersModel:
    return TransformersModel(module, tokenizer=tokenizer())


def assert_only_nnsight(module: nn.Module) -> None:
    """The module carries what nnsight put there, as nnsight put it there, and nothing else."""
    for part in module.modules():
        controller, state = part.__dict__["forward"], part.__dict__["__nnsight__"]
        assert type(controller).__name__ == "Controller"
        assert controller.state is state
        assert state.original is type(part).forward
        assert state.sourced or state.body is state.original
        assert "apd_lens" not in inspect.getmodule(state.body).__name__


# The contract. Its models are nnsight models; `target.model` is the module inside, which it calls and looks into.


class NNsightContract(AdapterContract):
    host = "nnsight models"

    @pytest.fixture(scope="class")
    @classmethod
    def made(cls):
        torch.manual_seed(0)
        host = cls()
        model, batch = host.model(), host.batch(1)
        target = apd.wrap(model)
        assert target.model is model._module
        model(batch) if isinstance(batch, Tensor) else model(**batch)
        return target

    @pytest.fixture
    def target(self, made):
        yield made
        assert_only_nnsight(made.model)

    def double_model(self) -> Any:
        model = self.model()
        model._module.double()
        return model


class TestSequential(NNsightContract):
    """NNsight of a torch module"""

    names = ("0.weight", "1.0.weight", "1.2.weight", "2.weight")

    def model(self):
        return NNsight(sequential())

    def batch(self, n_examples):
        return vectors(n_examples)


class TestGPT2(CoreContract, NNsightContract):
    """TransformersModel, GPT-2"""

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
        return transformers_model(gpt2(n_layers=1))

    def batch(self, n_examples):
        return {"input_ids": tokens(n_examples)}


class TestHookedTransformer(CoreContract, NNsightContract):
    """NNsight of a HookedTransformer"""

    n_positions = 5
    names = (
        "embed.W_E",
        "pos_embed.W_pos",
        *(f"blocks.0.{name}" for name in ("attn.W_Q", "attn.W_K", "attn.W_V", "attn.W_O", "mlp.W_in", "mlp.W_out")),
        "unembed.W_U",
    )

    def model(self):
        return NNsight(hooked_transformer(n_layers=1))

    def double_model(self):
        return NNsight(hooked_transformer(n_layers=1, dtype=torch.float64))

    def batch(self, n_examples):
        return tokens(n_examples)


# What users do with an nnsight model, against a module whose weights were really replaced.


@dataclass(frozen=True)
class Host:
    """A module, what to call it with, and a place in it: `leaf` is a decomposed matrix's own or beside it."""

    module: Callable[[], nn.Module]
    wrap: Callable[[nn.Module], Any]
    batch: Tensor
    parent: str
    leaf: str


HOSTS = {
    "gpt2": Host(gpt2, transformers_model, tokens(3), "transformer.h.0.mlp", "transformer.h.0.mlp.c_fc"),
    "llama": Host(llama, NNsight, tokens(3), "model.layers.0.mlp", "model.layers.0.mlp.up_proj"),
    "sequential": Host(sequential, NNsight, vectors(3), "1", "1.0"),
    "hooked": Host(hooked_transformer, NNsight, tokens(3), "blocks.0.mlp", "blocks.0.mlp.hook_post"),
}

KEPT = [0, 1, 3]  # of the five components
MASK = torch.tensor([True, True, False, True, False]).expand(3, -1)
Seen = dict[str, Tensor]


@dataclass(frozen=True)
class Case:
    host: Host
    model: Any
    decomposition: apd.Decomposition

    @property
    def module(self) -> nn.Module:
        return self.decomposition.target.model

    def expected(self, use: Callable[["Host", Any], Seen]) -> Seen:
        """What the nnsight code gives where MASK's weights are in the module's parameters."""
        components = self.decomposition.components
        summed = {name: components.summed(name, MASK[0].float()) for name in components.names}
        with substituted(self.decomposition.target, summed):
            return use(self.host, self.model)


@pytest.fixture(params=HOSTS)
def case(request):
    host = HOSTS[request.param]
    module = host.module()
    model = host.wrap(module)
    yield Case(host, model, decomposition_of(model, rank=2))
    assert_only_nnsight(module)


@pytest.fixture
def language_model():
    """(a TransformersModel, a decomposition of it)"""
    model = transformers_model(gpt2())
    yield model, decomposition_of(model, rank=2)
    assert_only_nnsight(model._module)


def assert_same(came: Seen, expected: Seen) -> None:
    assert came.keys() == expected.keys()
    for name in expected:
        assert_close(came[name], expected[name], rtol=1e-4, atol=1e-5, msg=lambda text, n=name: f"{n}: {text}")


def first(value: Any) -> Tensor:
    return value[0] if isinstance(value, tuple) else value


def reading(host: Host, model: Any) -> Seen:
    parent, leaf = model.get(host.parent), model.get(host.leaf)
    with model.trace(host.batch):
        into_parent = parent.input.save()
        into_leaf = leaf.input.save()
        out_of_leaf = leaf.output.save()
        out_of_parent = first(parent.output).save()
        output = default_output(model.output).save()
    return {"parent": into_parent, "leaf": into_leaf, "y": out_of_leaf, "parent y": out_of_parent, "output": output}


def editing_inputs(host: Host, model: Any) -> Seen:
    parent, leaf = model.get(host.parent), model.get(host.leaf)
    with model.trace(host.batch):
        parent.input = parent.input * 2
        leaf.input = leaf.input + 1
        out_of_leaf = leaf.output.save()
        output = default_output(model.output).save()
    return {"y": out_of_leaf, "output": output}


def editing_outputs(host: Host, model: Any) -> Seen:
    parent, leaf = model.get(host.parent), model.get(host.leaf)
    with model.trace(host.batch):
        leaf.output = leaf.output * 2
        parent.output[:, 0] = 0
        output = default_output(model.output).save()
    return {"output": output}


def gradients(host: Host, model: Any) -> Seen:
    leaf = model.get(host.leaf)
    with model.trace(host.batch):
        x = leaf.input
        y = leaf.output
        loss = default_output(model.output).square().mean()
        with loss.backward():
            gradient_of_y = y.grad.save()
            gradient_of_x = x.grad.save()
    model._module.zero_grad()
    return {"y": gradient_of_y, "x": gradient_of_x}


def edited_gradients(host: Host, model: Any) -> Seen:
    parent, leaf = model.get(host.parent), model.get(host.leaf)
    with model.trace(host.batch):
        x = parent.input
        y = leaf.output
        loss = default_output(model.output).square().mean()
        with loss.backward():
            y.grad = y.grad * 2
            gradient = x.grad.save()
    model._module.zero_grad()
    return {"x": gradient}


def skipping(host: Host, model: Any) -> Seen:
    parent = model.get(host.parent)
    with model.trace(host.batch):
        parent.skip(parent.input * 2)
        output = default_output(model.output).save()
    return {"output": output}


def skipping_a_leaf(host: Host, model: Any) -> Seen:
    leaf = model.get(host.leaf)
    with model.trace(host.batch):
        y = leaf.output.save()
    with model.trace(host.batch):
        leaf.skip(torch.ones_like(y))
        output = default_output(model.output).save()
    return {"output": output}


def stopping(host: Host, model: Any) -> Seen:
    leaf = model.get(host.leaf)
    with model.trace(host.batch) as tracer:
        y = leaf.output.save()
        tracer.stop()
    return {"y": y, "untraced": default_output(model._module(host.batch))}


def a_cache(host: Host, model: Any) -> Seen:
    parent, leaf = model.get(host.parent), model.get(host.leaf)
    with model.trace(host.batch) as tracer:
        cache = tracer.cache(modules=[parent, leaf], include_inputs=True)
    return {"y": cache[leaf.path].output, "x": cache[leaf.path].input, "parent y": first(cache[parent.path].output)}


def stored_edits(host: Host, model: Any) -> Seen:
    with model.edit() as (_, edited):
        edited.get(host.leaf).output = edited.get(host.leaf).output * 2
    with edited.trace(host.batch):
        output = default_output(edited.output).save()
    return {"edited": output, "unedited": default_output(model.trace(host.batch, trace=False))}


def a_session(host: Host, model: Any) -> Seen:
    leaf = model.get(host.leaf)
    with model.session():
        with model.trace(host.batch):
            y = leaf.output * 2
        with model.trace(host.batch):
            leaf.output = y
            output = default_output(model.output).save()
    return {"output": output}


def ad_hoc_calls(host: Host, model: Any) -> Seen:
    leaf = model.get(host.leaf)
    with model.trace(host.batch):
        called = leaf(leaf.input).save()
        whole = default_output(model(host.batch)).save()
        y = leaf.output.save()
    return {"called": called, "whole": whole, "y": y}


def without_gradients(host: Host, model: Any) -> Seen:
    leaf = model.get(host.leaf)
    with torch.inference_mode(), model.trace(host.batch):
        leaf.output = leaf.output * 2
        inference = default_output(model.output).save()
    with torch.no_grad(), model.trace(host.batch):
        leaf.output = leaf.output * 2
        no_grad = default_output(model.output).save()
    return {"inference": inference.clone(), "no_grad": no_grad}


def without_a_trace(host: Host, model: Any) -> Seen:
    return {"envoy": default_output(model(host.batch)), "module": default_output(model._module(host.batch))}


EDITING = (reading, editing_inputs, editing_outputs)
USES = (
    *EDITING,
    gradients,
    edited_gradients,
    skipping,
    skipping_a_leaf,
    stopping,
    a_cache,
    stored_edits,
    a_session,
    ad_hoc_calls,
    without_gradients,
    without_a_trace,
)


@pytest.mark.parametrize("use", USES, ids=lambda use: use.__name__)
def test_the_users_own_trace_runs_on_the_replaced_weights(case: Case, use: Callable[[Host, Any], Seen]):
    target, expected = use(case.host, case.model), case.expected(use)
    with case.decomposition.sparse(MASK):
        came = use(case.host, case.model)
    assert_same(came, expected)
    assert_same(use(case.host, case.model), target)  # outside, the weights are the target's again
    assert max((came[name] - target[name]).abs().max().item() for name in came) > 1e-3


@pytest.mark.parametrize("use", EDITING, ids=lambda use: use.__name__)
def test_only_and_ablate_in_a_trace(case: Case, use: Callable[[Host, Any], Seen]):
    target, decomposition = use(case.host, case.model), case.decomposition
    values = {name: matrix.value().clone() for name, matrix in decomposition.target.weights.items()}
    removed = {name: decomposition.components.summed(name, 1.0 - MASK[0].float()) for name in values}
    with substituted(decomposition.target, {name: values[name] - removed[name] for name in values}):
        expected = use(case.host, case.model)
    with decomposition.ablate([2, 4]):
        assert_same(use(case.host, case.model), expected)
    with decomposition.only(KEPT):
        assert_same(use(case.host, case.model), case.expected(use))
    with decomposition.ablate([]):
        came = use(case.host, case.model)
    for name in target:
        assert torch.equal(came[name], target[name])


@pytest.mark.parametrize("use", EDITING, ids=lambda use: use.__name__)
@pytest.mark.parametrize("host", HOSTS.values(), ids=HOSTS)
def test_a_module_may_be_wrapped_after_it_was_decomposed(host: Host, use: Callable[[Host, Any], Seen]):
    module = host.module()
    decomposition = decomposition_of(module, rank=2)
    model = host.wrap(module)
    expected = Case(host, model, decomposition).expected(use)
    with decomposition.sparse(MASK):
        assert_same(use(host, model), expected)
        assert_same(use(host, NNsight(module)), expected)
        assert_same(use(host, model), expected)
    assert_only_nnsight(module)


@pytest.mark.parametrize("use", EDITING, ids=lambda use: use.__name__)
@pytest.mark.parametrize("host", HOSTS.values(), ids=HOSTS)
def test_a_module_may_be_wrapped_inside_a_context(host: Host, use: Callable[[Host, Any], Seen]):
    module = host.module()
    decomposition = decomposition_of(module, rank=2)
    untouched = copy.deepcopy(module)
    with decomposition.sparse(MASK):
        model = host.wrap(module)
        with pytest.raises(apd.errors.AlreadyActive), decomposition.ablate(0):
            pass
        came = use(host, model)
        copied, pickled = copy.deepcopy(module), pickle.loads(pickle.dumps(module))
    assert_only_nnsight(module)
    assert_same(came, Case(host, model, decomposition).expected(use))
    for plain in (copied, pickled, copy.deepcopy(module)):
        assert torch.equal(default_output(plain(host.batch)), default_output(untouched(host.batch)))
        assert_same(use(host, NNsight(plain)), use(host, model))
    with decomposition.sparse(MASK):
        assert_same(use(host, model), came)


def test_a_module_that_is_wrapped_and_not_run_inside_a_context_is_as_if_wrapped_outside():
    module = sequential()
    with decomposition_of(module).ablate(0):
        NNsight(module)
    assert_only_nnsight(module)


class Doubled(nn.Sequential):
    def fast(self, x: Tensor) -> Tensor:
        return super().forward(x) * 2


@pytest.mark.parametrize("bound", [True, False], ids=["method", "function"])
@pytest.mark.parametrize("wrapped", ["before", "after", "inside"])
def test_a_module_with_a_forward_of_its_own(wrapped: str, bound: bool):
    """As torch modules choose one in their __init__, and as people patch them."""
    module = Doubled(*sequential())
    fast = module.fast
    module.forward = fast if bound else lambda x: fast(x)
    expected = {"plain": module(vectors(3))}
    model = NNsight(module) if wrapped == "before" else None
    decomposition = decomposition_of(module)
    model = NNsight(module) if wrapped == "after" else model
    summed = {name: decomposition.components.summed(name, MASK[0].float()) for name in decomposition.components.names}
    with substituted(decomposition.target, summed):
        expected["replaced"] = module(vectors(3))
    for _ in range(2):
        with decomposition.sparse(MASK):
            model = model or NNsight(module)
            with model.trace(vectors(3)):
                came = model.output.save()
        with model.trace(vectors(3)):
            plain = model.output.save()
        assert_same({"plain": plain, "replaced": came}, expected)
    if bound:
        copied = copy.deepcopy(module)
        copied[0].weight.data.zero_()
        assert not torch.equal(copied(vectors(3)), expected["plain"])
        assert torch.equal(module(vectors(3)), expected["plain"])


def test_a_leaf_that_is_the_whole_model_is_patched_twice():
    module = nn.Linear(3, 2)
    decomposition = decomposition_of(module, rank=2)
    with substituted(decomposition.target, {"weight": decomposition.components.summed("weight", MASK[0].float())}):
        expected = module(vectors(3))
    with decomposition.sparse(MASK):
        model = NNsight(module)
        with model.trace(vectors(3)):
            inside = model.output.save()
    assert_only_nnsight(module)
    with decomposition.sparse(MASK), model.trace(vectors(3)):
        wrapped = model.output.save()
    assert_close(inside, expected, **SAME)
    assert_close(wrapped, expected, **SAME)
    assert_only_nnsight(module)


def test_a_context_may_be_inside_a_trace(case: Case):
    def output(context: Any) -> Seen:
        leaf = case.model.get(case.host.leaf)
        with case.model.trace(case.host.batch):  # noqa: SIM117, see the next test
            with context:
                leaf.output = leaf.output * 2
                out = default_output(case.model.output).save()
        return {"output": out}

    expected = case.expected(lambda host, model: output(nullcontext()))
    assert_same(output(case.decomposition.sparse(MASK)), expected)


def test_a_context_behind_a_trace_in_one_statement_is_refused(case: Case):
    """nnsight runs the block without it."""
    with (
        pytest.raises(apd.errors.InvalidSetting, match="Put it before the trace"),
        case.model.trace(case.host.batch),
        case.decomposition.sparse(MASK),
    ):
        case.model.output.save()
    assert_only_nnsight(case.module)


def test_each_example_has_its_own_mask(case: Case):
    mask = torch.rand(3, 5)
    with case.decomposition.sparse(mask), case.model.trace(case.host.batch):
        came = default_output(case.model.output).save()
    components = case.decomposition.components
    for index in range(3):
        summed = {name: components.summed(name, mask[index]) for name in components.names}
        with substituted(case.decomposition.target, summed):
            expected = default_output(case.module(case.host.batch[index : index + 1]))
        assert_close(came[index : index + 1], expected, rtol=1e-4, atol=1e-5)


def test_a_mask_of_another_batch_is_refused_in_a_trace(case: Case):
    with (
        pytest.raises(apd.ShapeMismatch, match=r"The mask is \(2, 5\).*Give the mask of the batch"),
        case.decomposition.sparse(MASK[:2]),
        case.model.trace(case.host.batch),
    ):
        case.model.output.save()
    assert_only_nnsight(case.module)


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_error_in_a_trace_leaves_nothing_behind(case: Case, error: type[BaseException]):
    leaf = case.model.get(case.host.leaf)
    before, expected = Snapshot.of(case.module), reading(case.host, case.model)
    for context in (case.decomposition.sparse(MASK), case.decomposition.only(0), case.decomposition.ablate(0)):
        with pytest.raises(error), context, case.model.trace(case.host.batch):  # noqa: PT012
            leaf.output.save()
            raise error
        before.assert_unchanged(case.module)
        assert_only_nnsight(case.module)
    assert_same(reading(case.host, case.model), expected)


def test_success_leaves_nothing_behind(case: Case):
    before = Snapshot.of(case.module)
    case.decomposition.attributions(case.host.batch)
    with case.decomposition.sparse(MASK), case.model.trace(case.host.batch):
        case.model.output.save()
    before.assert_unchanged(case.module)


def test_a_copy_made_inside_a_context_is_wrapped_and_plain(case: Case):
    expected = reading(case.host, case.model)
    with case.decomposition.sparse(MASK):
        copies = copy.deepcopy(case.module), pickle.loads(pickle.dumps(case.module))
    for module in copies:
        assert_only_nnsight(module)
        assert_same(reading(case.host, NNsight(module)), expected)


def test_edits_stored_before_a_context(case: Case):
    leaf = case.model.get(case.host.leaf)
    with case.model.edit(inplace=True):
        leaf.output = leaf.output * 2

    def traced(host: Host, model: Any) -> Seen:
        with model.trace(host.batch):
            output = default_output(model.output).save()
        return {"output": output}

    expected = case.expected(traced)
    with case.decomposition.sparse(MASK):
        assert_same(traced(case.host, case.model), expected)
    case.model.clear_edits()


# The source of a module's forward, operation by operation.


@pytest.mark.parametrize("asked", ["before", "inside"])
def test_source_of_what_is_not_decomposed(language_model, asked: str):
    model, decomposition = language_model

    def operations() -> Seen:
        root = model.source  # which is patched too
        with model.trace(tokens(3)):
            fc = model.transformer.h[0].mlp.source.self_c_fc_0.output.save()
            model.transformer.h[0].mlp.source.self_act_0.output *= 2
            head = root.self_lm_head_0.output.save()
            output = model.output.logits.save()
        return {"fc": fc, "head": head, "output": output}

    components = decomposition.components
    summed = {name: components.summed(name, MASK[0].float()) for name in components.names}
    if asked == "before":
        operations()
    with decomposition.sparse(MASK):
        came = operations()
    assert_only_nnsight(model._module)
    with substituted(decomposition.target, summed):
        expected = operations()
    assert_same(came, expected)
    assert_same({"output": model(tokens(3)).logits}, {"output": gpt2()(tokens(3)).logits})


@pytest.mark.parametrize("asked", ["before", "inside"])
def test_source_of_what_is_decomposed(language_model, asked: str):
    """It lists the module's own operations. They run where the host's own product does, and never instead of ours."""
    model, decomposition = language_model
    c_fc = model.transformer.h[0].mlp.c_fc
    if asked == "before":
        before = str(c_fc.source)
    with decomposition.sparse(MASK):
        came = model(tokens(3)).logits
        inside = str(c_fc.source)
        assert torch.equal(model(tokens(3)).logits, came)
        with model.trace(tokens(3)):
            traced = model.output.logits.save()
        assert torch.equal(traced, came)
        with pytest.raises(OutOfOrderError), model.trace(tokens(3)):
            c_fc.source.torch_addmm_0.output.save()
    assert_only_nnsight(model._module)
    with decomposition.ablate([]), model.trace(tokens(3)):
        ablated = c_fc.source.torch_addmm_0.output.save()
    with model.trace(tokens(3)):
        after = c_fc.source.torch_addmm_0.output.save()
    assert torch.equal(ablated, after)
    assert str(c_fc.source) == inside
    assert "torch.addmm(self.bias" in inside
    if asked == "before":
        assert before == inside


# Language models: several prompts in a trace, generation, scans, text.


def test_several_prompts_in_one_trace_are_one_batch(language_model):
    model, decomposition = language_model
    mask = torch.rand(3, 5)
    alone = []
    for index, text in enumerate(("w3 w4 w5 w6", "w7", "w8 w9")):
        components = decomposition.components
        summed = {name: components.summed(name, mask[index]) for name in components.names}
        with substituted(decomposition.target, summed), model.trace(text):
            model.transformer.h[0].mlp.c_fc.output *= index
            alone.append(model.output.logits[:, -1].save())
    with decomposition.sparse(mask), model.trace() as tracer:
        with tracer.invoke("w3 w4 w5 w6"):
            model.transformer.h[0].mlp.c_fc.output *= 0
            first_prompt = model.output.logits[:, -1].save()
        with tracer.invoke(["w7", "w8 w9"]):
            model.transformer.h[0].mlp.c_fc.output[0] *= 1
            model.transformer.h[0].mlp.c_fc.output[1] *= 2
            others = model.output.logits[:, -1].save()
    assert_close(torch.cat([first_prompt, others]), torch.cat(alone), rtol=1e-4, atol=1e-5)
    with (  # noqa: PT012
        pytest.raises(apd.ShapeMismatch, match=r"The mask is \(2, 5\), of 2 examples, but the model was called with 3"),
        decomposition.sparse(mask[:2]),
        model.trace() as tracer,
    ):
        with tracer.invoke("w3 w4 w5 w6"):
            model.output.save()
        with tracer.invoke(["w7", "w8 w9"]):
            model.output.save()


@pytest.mark.parametrize("module", [gpt2, llama])
def test_generation_is_that_of_the_replaced_model(module: Callable[[], nn.Module]):
    model = transformers_model(module())
    decomposition = decomposition_of(model, rank=2)
    options = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}

    def generated() -> Seen:
        texts = ["w3 w4 w5", "w7", "w8 w9"]
        hidden = []
        with model.generate(texts, **options) as tracer:
            for _ in tracer.iter[:5]:
                hidden.append(model.lm_head.output[:, -1])  # noqa: PERF401, a trace has no comprehensions
            ids = tracer.result.save()
            stacked = torch.stack(hidden).save()
        untraced = model.generate(texts, **options)
        encoded = model.tokenizer(texts, return_tensors="pt", padding=True)
        by_hand = decomposition.target.model.generate(**encoded, **options)
        return {"ids": ids, "hidden": stacked, "untraced": untraced, "by hand": by_hand}

    components = decomposition.components
    summed = {name: components.summed(name, MASK[0].float()) for name in components.names}
    with substituted(decomposition.target, summed):
        expected = generated()
    with decomposition.sparse(MASK):
        came = generated()
    assert_same(came, expected)
    assert not torch.equal(came["ids"], generated()["ids"])
    assert torch.equal(came["ids"], came["untraced"])


def test_shapes_can_be_scanned(language_model):
    model, decomposition = language_model
    with decomposition.sparse(MASK), model.scan(tokens(3)):
        shape = model.transformer.h[0].mlp.c_fc.output.shape.save()
        logits = model.output.logits.shape.save()
    assert shape == (3, 5, 32)
    assert logits == (3, 5, D_VOCAB)


def test_the_tokenizers_output_is_a_batch(language_model):
    model, _ = language_model
    batches = [model.tokenizer(["w3 w4 w5", "w7 w8 w9"], return_tensors="pt")]
    decomposition = apd.decompose(
        model, batches, n_components=2, rank=1, optimization=apd.Optimization(steps=2), progress=False
    )
    assert decomposition.attributions(batches[0]).shape == (2, 2)


def test_the_deprecated_name_works():
    with pytest.warns(NNsightDeprecationWarning, match="LanguageModel is deprecated"):
        model = LanguageModel(gpt2(), tokenizer=tokenizer())
    decomposition = decomposition_of(model)
    with decomposition.ablate(0), model.trace(tokens(3)):
        ablated = model.output.logits.save()
    with decomposition.ablate(0):
        assert torch.equal(ablated, model(tokens(3)).logits)


def test_attributions_are_those_of_the_plain_model(tmp_path):
    plain, wrapped = gpt2(), transformers_model(gpt2())
    decomposition = decomposition_of(plain)
    decomposition.save(tmp_path)
    expected = decomposition.attributions(tokens(3))
    on_wrapped = apd.load(tmp_path, wrapped)
    assert_close(on_wrapped.attributions(tokens(3)), expected, **SAME)
    with wrapped.trace(tokens(3)):
        in_a_trace = on_wrapped.attributions(tokens(3)).save()
        logits = wrapped.output.logits.save()
    assert_close(in_a_trace, expected, **SAME)
    assert torch.equal(logits, plain(tokens(3)).logits)
    model = NNsight(plain)
    assert_close(decomposition.attributions(tokens(3)), expected, **SAME)
    assert_close(decomposition_of(model).attributions(tokens(3)), expected, **SAME)


def test_decompose_takes_the_nnsight_model(tmp_path, case: Case):
    before = Snapshot.of(case.module)
    decomposition = apd.decompose(
        case.model,
        [case.host.batch],
        n_components=3,
        rank=1,
        optimization=apd.Optimization(steps=3),
        progress=False,
    )
    before.assert_unchanged(case.module)
    decomposition.save(tmp_path)
    attributions = apd.load(tmp_path, case.model).attributions(case.host.batch)
    assert torch.equal(attributions, decomposition.attributions(case.host.batch))


# What is refused.


def test_a_part_of_a_model_is_refused():
    model = NNsight(gpt2())
    with pytest.raises(apd.UnsupportedModel, match=r"its part model\.transformer\.h\.0\. Give the whole"):
        apd.wrap(model.transformer.h[0])
    assert apd.wrap(Envoy(sequential())).match("1.*") == ["1.0.weight", "1.2.weight"]


def test_weights_that_are_not_loaded_are_refused(tmp_path):
    gpt2(n_layers=1).save_pretrained(tmp_path)
    with pytest.raises(apd.UnsupportedModel, match=r"this TransformersModel are not loaded yet.*dispatch=True"):
        apd.wrap(TransformersModel(str(tmp_path), task="text-generation", tokenizer=tokenizer()))
    model = TransformersModel(str(tmp_path), task="text-generation", tokenizer=tokenizer(), dispatch=True)
    with decomposition_of(model).only([0]):
        only = model(tokens(3)).logits
        with model.trace(tokens(3)):
            traced = model.output.logits.save()
    assert torch.equal(traced, only)


def test_what_is_no_model_is_refused():
    tracer = NNsight(sequential()).trace(vectors(1))
    with pytest.raises(apd.UnsupportedModel, match=r"InterleavingTracer cannot be decomposed\. Of nnsight, could be:"):
        apd.wrap(tracer)


def test_a_path_around_a_matrix_is_reported_outside_traces():
    """The fused fast path of TransformerEncoderLayer (eval, no grad) calls none of its linear layers."""
    model = NNsight(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval())
    decomposition = decomposition_of(model, ["linear1.weight"])
    with (
        torch.no_grad(),
        pytest.raises(apd.errors.SiteNotCalled, match="went past linear1"),
        decomposition.only(0),
    ):
        model(torch.randn(2, 3, 8))


def test_text_is_a_batch_of_a_language_model(language_model):
    """Tokenised and padded as in a trace, with each text at its own positions."""
    model, _ = language_model
    texts, batches = ["w3 w4 w5", "w7"], [["w3 w4 w5", "w7"], "w8 w9"]
    options = {"n_components": 3, "rank": 1, "optimization": apd.Optimization(steps=2), "progress": False}
    decomposition = apd.decompose(model, batches, **options)
    together, alone = decomposition.attributions(texts), [decomposition.attributions(text) for text in texts]
    assert_close(together, torch.cat(alone), **SAME)
    with decomposition.sparse(decomposition.select(texts)), model.trace(texts):
        assert model.output.logits.shape == (2, 3, D_VOCAB)


def test_attributions_in_the_middle_of_a_trace(case: Case):
    parent, leaf = case.model.get(case.host.parent), case.model.get(case.host.leaf)
    expected = case.decomposition.select(case.host.batch)
    with case.model.trace(case.host.batch):
        y = leaf.output.save()
    with case.model.trace(case.host.batch):
        parent.input.save()
        mask = case.decomposition.select(case.host.batch).save()
        again = leaf.output.save()
    assert torch.equal(mask, expected)
    assert torch.equal(y, again)
