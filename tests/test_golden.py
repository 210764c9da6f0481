"""The numbers of the paper's own implementation, in float64; `golden/README.md` says how each was defined."""

import pytest
import torch
from support.golden import EXACT, Case, residual_mlp, tms
from torch.testing import assert_close

import apd_lens as apd


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
    assert_close(apd.losses.lp_sparsity(attributions, case.settings["lp_p"]), expected, **EXACT)


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
