"""The numbers of the paper's own implementation, in float64; `golden/README.md` says how each was defined."""

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.testing import assert_close
from toy_models import TMS, ResidualMLP

import apd_lens as apd

EXACT = {"rtol": 0, "atol": 1e-9}
GOLDEN = Path(__file__).parent / "golden"


@dataclass(frozen=True, eq=False)
class Case:
    settings: dict
    tensors: dict[str, Tensor]
    model: nn.Module
    names: dict[str, str]  # ours -> golden's
    hidden_at: tuple[str, ...]

    def state(self, k: float, selection: Callable[[float], object] = apd.BatchTopK) -> apd.State:
        coefficients, paper = self.settings["coefficients"], apd.paper()
        state = apd.init(
            self.model,
            weights=list(self.names),
            n_components=len(self.tensors["batch_topk_mask"][0]),
            rank=self.tensors[f"A.{next(iter(self.names.values()))}"].shape[-1],
            selection=selection(k),
            losses=replace(
                paper["losses"],
                faithfulness=coefficients["faithfulness"],
                minimality=coefficients["minimality"],
                simplicity=coefficients["simplicity"],
                schatten_p=self.settings["schatten_p"],
                hidden=coefficients["hidden_activation"],
                hidden_at=self.hidden_at,
            ),
            optimization=replace(
                paper["optimization"],
                steps=self.settings["train_steps"],
                lr=self.settings["lr"],
                schedule="constant",
                warmup=0.0,
            ),
            moves=paper["moves"],
        )
        with torch.no_grad():
            for name, golden in self.names.items():
                state.components.A[name].copy_(self.tensors[f"A.{golden}"])
                state.components.B[name].copy_(self.tensors[f"B.{golden}"])
        return state

    def simplicity_offset(self) -> float:
        """What the reference adds to the simplicity loss (below 1e-5): its 1e-16 under the root stands in masked-out
        components too, m times in each, of which there are C − k a data point."""
        n_masked_out = len(self.tensors["batch_topk_mask"][0]) - self.settings["k"]
        rank = self.tensors[f"A.{next(iter(self.names.values()))}"].shape[-1]
        each = n_masked_out * rank * 1e-16 ** (self.settings["schatten_p"] / 2)
        return each * len(self.names) / self.n_parameters()

    def n_parameters(self) -> int:
        weights = apd.wrap(self.model).weights
        return sum(weights[name].value().numel() for name in self.names)

    def decomposition(self, **changes) -> apd.Decomposition:
        return self.state(k=self.settings["k"], **changes).decomposition()


def tms() -> Case:
    tensors = load_file(GOLDEN / "tms.safetensors")
    model = TMS(6, 3).double()
    with torch.no_grad():
        model.linear1.weight.copy_(tensors["target.linear1"])
        model.linear1.bias.zero_()
        model.linear2.bias.copy_(tensors["b_final"])
    settings = json.loads((GOLDEN / "tms.json").read_text())
    return Case(settings, tensors, model, {"linear1.weight": "linear1"}, ())


class ReferenceResidualMLP(ResidualMLP):
    """With one more module per layer, only to be watched: the reference's hidden activations leave the bias out."""

    def __init__(self):
        super().__init__(n_features=6, d_resid=10, d_mlp=4, n_layers=2)
        for layer in self.layers:
            layer["unbiased_act"] = nn.ReLU()
            layer["mlp_in"].register_forward_hook(
                lambda mlp_in, args, pre, act=layer["unbiased_act"]: (act(pre - mlp_in.bias), pre)[1]
            )


def residual_mlp() -> Case:
    tensors = load_file(GOLDEN / "resid_mlp_2layer.safetensors")
    model = ReferenceResidualMLP().double()
    names = {f"layers.{i}.{side}.weight": f"layers.{i}.{side}" for i in (0, 1) for side in ("mlp_in", "mlp_out")}
    with torch.no_grad():
        for golden in names.values():
            model.get_submodule(golden).weight.copy_(tensors[f"target.{golden}"].T)
            model.get_submodule(golden).bias.copy_(tensors[f"bias.{golden}"])
        model.W_E.weight.copy_(tensors["W_E"].T)
        model.W_U.weight.copy_(tensors["W_U"].T)
    settings = json.loads((GOLDEN / "resid_mlp_2layer.json").read_text())
    return Case(settings, tensors, model, names, ("layers.0.unbiased_act", "layers.1.unbiased_act"))


@pytest.fixture(params=[tms, residual_mlp], ids=["tms", "resid_mlp_2layer"])
def case(request) -> Case:
    return request.param()


def test_target_output(case: Case):
    assert_close(case.model(case.tensors["inputs"]), case.tensors["target_output"], **EXACT)


def test_summed_components_output(case: Case):
    decomposition = case.decomposition()
    with decomposition.only(range(decomposition.components.n_components)):
        assert_close(case.model(case.tensors["inputs"]), case.tensors["summed_components_output"], **EXACT)


def test_gradient_attribution(case: Case):
    sum_of_squares = case.tensors["gradient_attribution_sum_of_squares"]
    expected = (sum_of_squares / case.tensors["target_output"].shape[-1]).sqrt()
    assert_close(case.decomposition().attributions(case.tensors["inputs"]), expected, **EXACT)


def test_activation_attribution(case: Case):
    state = case.state(k=1.5)
    decomposition = apd.init(
        case.model,
        weights=list(case.names),
        n_components=state.components.n_components,
        attribution=apd.ActivationAttribution(),
    ).decomposition()
    decomposition = type(decomposition)(
        decomposition.target, state.components, decomposition.settings, decomposition.output, {}
    )
    attributions = decomposition.attributions(case.tensors["inputs"])
    assert_close(attributions, case.tensors["activation_attribution"], **EXACT)


def test_masks(case: Case):
    inputs = case.tensors["inputs"]
    decomposition = case.decomposition()
    assert torch.equal(decomposition.select(inputs), case.tensors["batch_topk_mask"])
    top1 = case.state(k=1, selection=apd.TopK).decomposition()
    assert torch.equal(top1.select(inputs), case.tensors["top1_mask_per_example"])


def test_sparse_output(case: Case):
    with case.decomposition().sparse(case.tensors["batch_topk_mask"]):
        assert_close(case.model(case.tensors["inputs"]), case.tensors["sparse_output"], **EXACT)


def test_losses(case: Case):
    tensors, settings = case.tensors, case.settings
    components, target = case.decomposition().components, apd.wrap(case.model)
    n_parameters = case.n_parameters()
    faithfulness = sum(
        apd.faithfulness_loss(target.weights[name].value(), components.summed(name)) for name in case.names
    )
    assert_close(faithfulness / n_parameters, tensors["faithfulness_loss"][0], **EXACT)
    minimality = apd.minimality_loss(tensors["target_output"], tensors["sparse_output"])
    assert_close(minimality, tensors["minimality_loss"][0], **EXACT)
    simplicity = sum(
        apd.simplicity_loss(
            components.A[name], components.B[name], tensors["batch_topk_mask"], p=settings["schatten_p"]
        )
        for name in case.names
    )
    assert_close(simplicity / n_parameters + case.simplicity_offset(), tensors["simplicity_loss"][0], **EXACT)


def test_lp_sparsity(case: Case):
    attributions = case.decomposition().attributions(case.tensors["inputs"])
    expected = case.tensors["lp_minimality_per_component"]
    assert_close(apd.lp_sparsity(attributions, case.settings["lp_p"]), expected, **EXACT)


def test_one_step_reports_the_losses(case: Case):
    tensors = case.tensors
    _, info = apd.step(case.state(k=case.settings["k"]), tensors["inputs"])
    assert_close(info.terms["faithfulness"], tensors["faithfulness_loss"][0], **EXACT)
    assert_close(info.terms["minimality"], tensors["minimality_loss"][0], **EXACT)
    assert_close(info.terms["simplicity"] + case.simplicity_offset(), tensors["simplicity_loss"][0], **EXACT)
    if case.hidden_at:
        assert_close(info.terms["hidden"], tensors["hidden_activation_loss"][0], **EXACT)


def test_ten_training_steps(case: Case):
    state = case.state(k=case.settings["k"])
    losses = []
    for batch in case.tensors["train.batches"]:
        state, info = apd.step(state, batch)
        losses.append(info.loss)
    offset = case.settings["coefficients"]["simplicity"] * case.simplicity_offset()
    assert_close(torch.stack(losses) + offset, case.tensors["train.loss_per_step"], **EXACT)
    for name, golden in case.names.items():
        assert_close(state.components.A[name].detach(), case.tensors[f"train.final_A.{golden}"], **EXACT)
        assert_close(state.components.B[name].detach(), case.tensors[f"train.final_B.{golden}"], **EXACT)
