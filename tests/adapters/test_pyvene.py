"""pyvene edits with torch hooks on the modules: interchange interventions run on the replaced weights.

pyvene needs plotnine, ipywidgets and more for what is not used here, so it is no dependency of the tests:
pip install --no-deps pyvene
"""

import pytest
import torch
from support.toy_models import Snapshot, decomposition_of, substituted, tiny_gpt2
from torch import Tensor, nn
from torch.testing import assert_close

pyvene = pytest.importorskip("pyvene", reason="pip install --no-deps pyvene")

MASK = torch.tensor([True, True, False, True, False]).expand(3, -1)


def gpt2() -> nn.Module:
    return tiny_gpt2(n_positions=8, attn_implementation="eager")


def tokens(seed: int) -> dict[str, Tensor]:
    return {"input_ids": torch.randint(13, (3, 5), generator=torch.Generator().manual_seed(seed))}


@pytest.mark.parametrize("entered", ["before", "inside"])
@pytest.mark.parametrize(
    "component",
    ["block_input", "block_output", "mlp_input", "mlp_activation", "mlp_output", "attention_input", "attention_output"],
)
def test_interchange_interventions_run_on_the_replaced_weights(component: str, entered: str):
    decomposition = decomposition_of(gpt2(), rank=4)
    model, components = decomposition.target.model, decomposition.components
    before = Snapshot.of(model)

    def intervenable() -> pyvene.IntervenableModel:
        return pyvene.IntervenableModel({"layer": 0, "component": component}, model=model)

    def interchanged(intervened: pyvene.IntervenableModel) -> Tensor:
        _, output = intervened(tokens(1), [tokens(2)], {"sources->base": 2})
        return output.logits

    intervened, target = intervenable(), model(**tokens(1)).logits
    with substituted(
        decomposition.target, {name: components.summed(name, MASK[0].float()) for name in components.names}
    ):
        expected, plain = interchanged(intervened), model(**tokens(1)).logits
    with decomposition.sparse(MASK):
        came = interchanged(intervened if entered == "before" else intervenable())
    assert_close(came, expected, rtol=1e-4, atol=1e-5)
    assert (came - plain).abs().max() > 1e-3  # the intervention does something
    assert (came - interchanged(intervened)).abs().max() > 1e-3  # and so do the components
    assert torch.equal(model(**tokens(1)).logits, target)
    before.assert_unchanged(model)


@pytest.mark.parametrize("kind", ["AdditionIntervention", "ZeroIntervention", "CollectIntervention"])
def test_other_interventions(kind: str):
    decomposition = decomposition_of(gpt2(), rank=4)
    model, components = decomposition.target.model, decomposition.components
    options = {} if kind != "AdditionIntervention" else {"source_representation": torch.ones(8)}
    place = {"layer": 1, "component": "mlp_input", "intervention_type": getattr(pyvene, kind), **options}
    intervened = pyvene.IntervenableModel(place, model=model)

    def run() -> Tensor:
        (_, collected), output = intervened(tokens(1), unit_locations={"base": 2}, output_original_output=True)
        return torch.cat(collected) if kind == "CollectIntervention" else output.logits

    with substituted(
        decomposition.target, {name: components.summed(name, MASK[0].float()) for name in components.names}
    ):
        expected = run()
    with decomposition.sparse(MASK):
        assert_close(run(), expected, rtol=1e-4, atol=1e-5)
