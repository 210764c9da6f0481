import gc

import pytest
from support.toy_models import decomposition_of
from torch import nn

import apd_lens as apd
from apd_lens.decomposition._edited import _EDITS, check_unedited, edits_of


def test_a_model_with_components_out_is_refused_until_they_are_back():
    model = nn.Linear(4, 3)
    decomposition = decomposition_of(model)
    with apd.apply_edit(model, decomposition, [1, 3]):
        assert [edit.ablated for edit in edits_of(model)] == [[1, 3]]
        with pytest.raises(apd.errors.AlreadyActive, match=r"Components \[1, 3\] are out of this Linear's own weights"):
            check_unedited(model)
    check_unedited(model)


def test_edits_keep_no_model_alive():
    gc.collect()
    n_before, model = len(_EDITS), nn.Linear(2, 2)
    edits_of(model)
    assert len(_EDITS) == n_before + 1
    del model
    gc.collect()
    assert len(_EDITS) == n_before
