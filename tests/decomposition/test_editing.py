"""Components out of a model's own parameters: on every host, in training, stacked, and put back bit for bit."""

import copy
import gc
import pickle
import re
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from nnsight import NNsight
from support.bridges import bridge, forget_patterns
from support.hooked import hooked_transformer
from support.toy_models import (
    ResidualMLP,
    Snapshot,
    TinyGPT,
    decomposition_of,
    interrupted_in_forward,
    linear_of_known_parts,
    tiny_gpt2,
    tiny_llama,
)
from torch import Tensor, nn
from torch.testing import assert_close

import apd_lens as apd
from apd_lens import toys
from apd_lens.data._batch import call
from apd_lens.host._matrix import WeightMatrix
from apd_lens.passes._output import default_output

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:transformer_lens")
SAME = {"rtol": 1e-5, "atol": 1e-5}
TOKENS = torch.randint(2, 11, (3, 5), generator=torch.Generator().manual_seed(1))
FEATURES = torch.rand(3, 4, generator=torch.Generator().manual_seed(1))

# Name -> a model (or what the user gives for one), and a batch.
HOSTS: dict[str, tuple[Callable[[], Any], Tensor]] = {
    "torch": (lambda: ResidualMLP(4, 6, 5, 1), FEATURES),
    "torch, transposed tie": (lambda: toys.TMS(4, 2), FEATURES),
    "torch, tied embedding": (TinyGPT, TOKENS),
    "convolution": (lambda: nn.Sequential(nn.Conv1d(3, 4, 2), nn.Tanh(), nn.Conv1d(4, 2, 2)), FEATURES.expand(3, 3, 4)),
    "Hugging Face GPT-2": (tiny_gpt2, TOKENS),
    "Hugging Face Llama": (tiny_llama, TOKENS),
    "biases": (lambda: apd.wrap(ResidualMLP(4, 6, 5, 1), biases=True), FEATURES),
    "HookedTransformer": (hooked_transformer, TOKENS),
    "HookedTransformer, grouped": (lambda: hooked_transformer(n_heads=4, n_key_value_heads=2), TOKENS),
    "TransformerBridge": (lambda: bridge("gpt2"), TOKENS),
    "TransformerBridge, tied": (lambda: bridge("gpt2", tie_word_embeddings=True), TOKENS),
    "TransformerBridge, processed": (lambda: bridge("llama", "processed"), TOKENS),
    "nnsight": (lambda: NNsight(TinyGPT()), TOKENS),
    "nnsight of a HookedTransformer": (lambda: NNsight(hooked_transformer()), TOKENS),
}


def module_of(model: Any) -> nn.Module:
    return apd.wrap(model).model


def outputs_of(model: nn.Module, batch: Any) -> Tensor:
    with torch.no_grad():
        return default_output(call(model, batch))


@pytest.fixture
def decomposition() -> apd.Decomposition:
    return decomposition_of(TinyGPT(), n_components=5)


@pytest.mark.parametrize("host", HOSTS)
def test_the_edited_model_is_the_ablated_one_and_undone_it_is_bit_for_bit_what_it_was(host: str):
    make, batch = HOSTS[host]
    model = make()
    module = module_of(model).eval()
    original = outputs_of(module, batch)  # hosts cache things in their first forward
    decomposition = decomposition_of(model)
    with decomposition.ablate([1, 2]):
        expected = outputs_of(module, batch)
    state = {key: value.clone() for key, value in decomposition.edited_state_dict([1, 2]).items()}
    assert not torch.allclose(expected, original, **SAME)

    if "Bridge" in host:
        forget_patterns(module)
    before = Snapshot.of(module)
    edit = apd.apply_edit(model, decomposition, ablate=[1, 2])
    assert_close(outputs_of(module, batch), expected, **SAME)
    for key, value in module.state_dict().items():
        assert torch.equal(value, state[key]), key
    module.train()
    edit.undo()
    module.eval()
    if "Bridge" in host:
        forget_patterns(module)
    before.assert_unchanged(module)
    assert torch.equal(outputs_of(module, batch), original)


@pytest.mark.parametrize("host", ["torch, transposed tie", "HookedTransformer", "TransformerBridge, processed"])
def test_a_copy_with_the_same_weights_can_be_edited(host: str):
    """Among them one whose copies multiply by something that is not in their state dict."""
    make, batch = HOSTS[host]
    model = make()
    outputs_of(model, batch)
    decomposition = decomposition_of(model, seed=1)
    copied = copy.deepcopy(model)
    if host == "torch, transposed tie":
        copied._tie()  # a copy has two matrices
    with decomposition.ablate(3):
        expected = outputs_of(model, batch)
    original, before = Snapshot.of(model), Snapshot.of(copied)
    with apd.apply_edit(copied, decomposition, ablate=3):
        assert_close(outputs_of(copied, batch), expected, **SAME)
        with decomposition.ablate(3):  # of the model that is not edited
            assert torch.equal(outputs_of(model, batch), expected)
    before.assert_unchanged(copied)
    original.assert_unchanged(model)


def test_known_parts_are_taken_out_exactly():
    model, components = linear_of_known_parts()
    start = decomposition_of(model, rank=1)
    decomposition = apd.Decomposition(start.target, components, start.settings, start.output, start.fingerprints)
    with apd.apply_edit(model, decomposition, [1, 3]) as edit:
        assert torch.equal(model.weight, torch.diag(torch.tensor([1.0, 0.0, 3.0, 0.0])))
        assert repr(edit) == "Edit of Linear: components [1, 3] taken out"
    assert torch.equal(model.weight, torch.diag(torch.tensor([1.0, 2.0, 3.0, 4.0])))
    assert repr(edit) == "Edit of Linear: components [1, 3] undone"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_the_dtype_stays(dtype: torch.dtype):
    model = ResidualMLP(4, 6, 5, 1).to(dtype)
    decomposition = decomposition_of(model)
    before = Snapshot.of(model)
    value = model.W_E.weight.mT.to(torch.promote_types(dtype, torch.float32))
    expected = (value - decomposition.components.component_weights("W_E.weight")[0]).to(dtype).mT
    with apd.apply_edit(model, decomposition, 0):
        assert model.W_E.weight.dtype == dtype
        assert_close(model.W_E.weight, expected, rtol=1e-3 if dtype != torch.float64 else 1e-12, atol=1e-6)
    before.assert_unchanged(model)


def test_parameters_optimizers_and_hooks_go_on(decomposition: apd.Decomposition):
    model = decomposition.target.model
    model.fc.weight.requires_grad_(False)
    parameters = dict(model.named_parameters())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    seen: list[Tensor] = []
    model.fc.register_forward_hook(lambda module, args, output: seen.append(output.detach()))
    outputs_of(model, TOKENS)
    edit = apd.apply_edit(model, decomposition, 2)
    assert {name: id(p) for name, p in model.named_parameters()} == {name: id(p) for name, p in parameters.items()}
    assert [p.requires_grad for p in parameters.values()].count(False) == 1
    assert all(p.is_leaf for p in parameters.values())
    model(TOKENS).square().mean().backward()
    assert len(seen) == 2
    assert not torch.equal(seen[0], seen[1])
    edited = model.proj.weight.detach().clone()
    optimizer.step()
    assert not torch.equal(model.proj.weight, edited)
    with pytest.raises(apd.ArtifactError, match=r"wte\.weight was changed.*undo\(force=True\)"):
        edit.undo()
    assert not edit.undone
    edit.undo(force=True)
    assert decomposition.residuals()["all"] > 0


def test_a_graph_through_the_old_weights_is_not_silently_wrong(decomposition: apd.Decomposition):
    model = decomposition.target.model
    loss = model(TOKENS).sum()
    with apd.apply_edit(model, decomposition, 0), pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_a_model_made_in_inference_mode():
    with torch.inference_mode():
        model = ResidualMLP(4, 6, 5, 1)
    decomposition = decomposition_of(model)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with apd.apply_edit(model, decomposition, 0):
        assert not torch.equal(model.W_E.weight, before["W_E.weight"])
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_edits_are_stacked_and_undone_in_reverse_order(decomposition: apd.Decomposition):
    model = decomposition.target.model
    with decomposition.ablate([0, 3]):
        expected = outputs_of(model, TOKENS)
    before = Snapshot.of(model)
    first = apd.apply_edit(model, decomposition, 0)
    between = Snapshot.of(model)
    second = apd.apply_edit(model, decomposition, [3])
    assert_close(outputs_of(model, TOKENS), expected, **SAME)
    with pytest.raises(
        apd.errors.InvalidSetting, match=r"Components \[0\] are out of this model already; out are \[0, 3\]"
    ):
        apd.apply_edit(model, decomposition, [0, 1])
    with pytest.raises(apd.errors.AlreadyActive, match=r"Components \[3\] were taken out after \[0\]"):
        first.undo()
    second.undo()
    between.assert_unchanged(model)
    first.undo()
    before.assert_unchanged(model)
    with pytest.raises(apd.errors.AlreadyActive, match="undone already"):
        first.undo()


def test_another_decomposition_is_stacked_where_it_has_other_matrices():
    model = TinyGPT()
    one, other, same = (decomposition_of(model, weights, seed=2) for weights in ("fc.*", "proj.*", "f*"))
    before = Snapshot.of(model)
    with (
        apd.apply_edit(model, one, 1),
        apd.apply_edit(model, other, 1),
        apd.apply_edit(model, one, 2),
        pytest.raises(apd.ArtifactError, match=r"fc\.weight has other weights"),
    ):
        apd.apply_edit(model, same, 1)
    before.assert_unchanged(model)


def test_no_decomposition_is_applied_to_an_edited_model(decomposition: apd.Decomposition):
    """Its components are of another model: an ablation would take a component out twice."""
    model = decomposition.target.model
    uses: list[Callable[[], Any]] = [
        lambda: decomposition.ablate(1),
        lambda: decomposition.only(1),
        lambda: decomposition.sparse(torch.ones(3, 5)),
        lambda: decomposition.attributions(TOKENS),
        lambda: decomposition.select(TOKENS),
        lambda: decomposition.summary(TOKENS),
        lambda: decomposition.edited_state_dict(1),
    ]
    with apd.apply_edit(model, decomposition, [1]):
        for use in uses:
            with pytest.raises(
                apd.errors.AlreadyActive, match=r"Components \[1\] are out of this TinyGPT's own weights"
            ):
                use()
        apd.decompose(model, [TOKENS], n_components=2, rank=1, optimization=apd.Optimization(steps=1), progress=False)
    for use in uses:
        use()


@pytest.mark.parametrize("changed", ["fc.weight", "wte.weight"])
def test_a_model_with_other_weights_is_refused_and_left_alone(decomposition: apd.Decomposition, changed: str):
    copied = copy.deepcopy(decomposition.target.model)
    copied.get_parameter(changed).data[0, 0] += 1
    before = Snapshot.of(copied)
    with pytest.raises(apd.ArtifactError, match=re.escape(f"{changed} has other weights")):
        apd.apply_edit(copied, decomposition, 0)
    before.assert_unchanged(copied)
    with pytest.raises(apd.ArtifactError, match=r"this Linear has no matrix wte\.weight"):
        apd.apply_edit(nn.Linear(2, 2), decomposition, 0)


def test_a_copy_of_an_edited_model_is_an_edited_model(decomposition: apd.Decomposition):
    with apd.apply_edit(decomposition.target.model, decomposition, 0):
        copied = pickle.loads(pickle.dumps(decomposition.target.model))
        with pytest.raises(apd.ArtifactError, match="has other weights"):
            apd.apply_edit(copied, decomposition, 1)


def test_matrices_that_are_tied_in_the_model_cannot_be_edited_apart():
    model = TinyGPT()
    decomposition = decomposition_of(apd.wrap(model).untied("head.weight"), ["head.weight"])
    before = Snapshot.of(model)
    with pytest.raises(apd.UnsupportedModel, match=r"head\.weight was decomposed apart from what it is tied to"):
        apd.apply_edit(model, decomposition, 0)
    before.assert_unchanged(model)
    model.head.weight = nn.Parameter(model.head.weight.detach().clone())
    before = Snapshot.of(model)
    with decomposition.ablate(0):
        expected = outputs_of(model, TOKENS)
    with apd.apply_edit(model, decomposition, 0):
        assert_close(outputs_of(model, TOKENS), expected, **SAME)
        assert torch.equal(model.wte.weight, before.state["wte.weight"])
    before.assert_unchanged(model)


def test_not_inside_a_context(decomposition: apd.Decomposition):
    model = decomposition.target.model
    with decomposition.ablate([]), pytest.raises(apd.errors.AlreadyActive, match="Leave it before editing"):
        apd.apply_edit(model, decomposition, 0)
    with pytest.raises(apd.errors.InvalidSetting, match="distinct component numbers from 0 to 4"):
        apd.apply_edit(model, decomposition, 5)


def stop_at(monkeypatch: pytest.MonkeyPatch, where: int, error: type[BaseException]) -> None:
    """The error comes at that use of a matrix's values."""
    state, n_calls = WeightMatrix.state, 0

    def stopped(self: WeightMatrix, value: Tensor) -> dict[str, Tensor]:
        nonlocal n_calls
        n_calls += 1
        if n_calls == where:
            raise error
        return state(self, value)

    monkeypatch.setattr(WeightMatrix, "state", stopped)


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
@pytest.mark.parametrize("where", range(1, 12))
def test_all_or_nothing(decomposition: apd.Decomposition, monkeypatch, error: type[BaseException], where: int):
    """Stopped at every use of a matrix's values on the way."""
    model = decomposition.target.model
    before = Snapshot.of(model)
    stop_at(monkeypatch, where, error)
    with pytest.raises(error):
        apd.apply_edit(model, decomposition, [1, 2])
    monkeypatch.undo()
    before.assert_unchanged(model)
    decomposition.attributions(TOKENS)  # and it does not count as edited


@pytest.mark.parametrize("where", range(1, 5))
def test_an_interrupted_undo_is_finished(decomposition: apd.Decomposition, monkeypatch, where: int):
    model = decomposition.target.model
    before = Snapshot.of(model)
    edit = apd.apply_edit(model, decomposition, [1, 2])
    stop_at(monkeypatch, where, KeyboardInterrupt)
    with pytest.raises(KeyboardInterrupt):
        edit.undo()
    assert edit.undone
    monkeypatch.undo()
    before.assert_unchanged(model)


def test_as_a_context_it_is_undone_after_an_error_and_an_interrupt(decomposition: apd.Decomposition):
    model = decomposition.target.model
    before = Snapshot.of(model)
    with (
        interrupted_in_forward(model.proj, 1),
        pytest.raises(KeyboardInterrupt),
        apd.apply_edit(model, decomposition, 0),
    ):
        model(TOKENS)
    before.assert_unchanged(model)
    with apd.apply_edit(model, decomposition, 0) as edit:
        assert not edit.undone
        edit.undo()  # one's own undo inside is fine
    with pytest.raises(ZeroDivisionError), apd.apply_edit(model, decomposition, 0):
        1 / 0  # noqa: B018
    before.assert_unchanged(model)


def test_nothing_taken_out(decomposition: apd.Decomposition):
    before = Snapshot.of(decomposition.target.model)
    with apd.apply_edit(decomposition.target.model, decomposition, []):
        before.assert_unchanged(decomposition.target.model)
        decomposition.attributions(TOKENS)


def test_a_dropped_edit_keeps_no_memory_and_no_model_alive():
    model = TinyGPT()
    decomposition = decomposition_of(model)
    apd.apply_edit(model, decomposition, 0)
    with pytest.raises(apd.errors.AlreadyActive):
        decomposition.ablate(1)
    alive = weakref.ref(model)
    del model, decomposition
    gc.collect()
    assert alive() is None
