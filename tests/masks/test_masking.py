import torch
from torch import nn

import apd_lens as apd
from apd_lens.masks import Masking
from apd_lens.masks._masking import Attributed, masking_of
from apd_lens.masks._selection import Needed
from apd_lens.passes._output import default_output
from apd_lens.passes._watch import watched_pass


def test_a_selection_and_an_attribution_are_a_shorthand():
    attribution = apd.GradientAttribution("exact")
    assert masking_of(apd.TopK(1), attribution) == Attributed(attribution, apd.TopK(1))
    assert masking_of(apd.Lp(0.5), attribution) == apd.Lp(0.5, attribution=attribution)
    assert isinstance(Attributed(), Masking)
    assert isinstance(apd.Lp(), Masking)


def test_masks_of_a_batch():
    model, x = nn.Linear(4, 3), torch.randn(6, 4)
    state = apd.init(model, n_components=5, rank=2)
    watched = watched_pass(state.target, ["weight"], x, default_output)
    masking = Attributed(apd.GradientAttribution("exact"), apd.BatchTopK(1.5))
    masks = masking.masks(watched, state.components, 0.0, 1.0)
    assert torch.equal(masks.active, apd.masks.batch_topk_mask(masks.attributions, 1.5))
    assert masks.importance is masks.active
    assert masks.n_active == int(masks.active.sum()) == 9
    assert masks.minimality is None


def test_only_a_selection_that_learns_changes_the_masking():
    fixed, found = Attributed(), Attributed(selection=apd.BatchTopK(Needed(now=2.0, hold=0.0), least=0.1))
    large = torch.tensor(1.0)
    assert fixed.after(large, 0.5, 100) is fixed
    assert found.after(large, 0.5, 10).selection.k.now == 2.6
