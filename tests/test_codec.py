import json
from dataclasses import dataclass

import pytest

import apd_lens as apd
from apd_lens._codec import UserFunction, decode_settings, encode_settings, saved, updated
from apd_lens.masks._selection import Needed


@pytest.mark.parametrize(
    "settings",
    [
        apd.Losses(simplicity=apd.HoldThenDecay(0.3), path=apd.Ramp(0.0, 1.0), hidden=1.0, hidden_at=("a", "b")),
        apd.BatchTopK(Needed(now=2.5), least=0.1),
        apd.Lp(0.7, threshold=0.2),
        apd.moves.ClusterMoves(every=7),
        apd.IntegratedGradients(3, "zero", "exact"),
    ],
    ids=lambda settings: type(settings).__name__,
)
def test_settings_come_back_from_json(settings):
    assert decode_settings(json.loads(json.dumps(encode_settings(settings)))) == settings


def test_what_an_earlier_apd_lens_did_not_save_means_what_it_did():
    """Attributions where the distance is KL were of outputs alike, before there was another metric."""
    saved_in_0_2 = {"type": "GradientAttribution", "projections": 8, "kind": "rademacher", "memory": 1000}
    assert decode_settings(saved_in_0_2) == apd.GradientAttribution(8, memory=1000, metric="outputs")


def test_functions_are_saved_by_name_alone():
    def twice(batch):
        return 2.0

    loaded = decode_settings(encode_settings(apd.BatchTopK(twice))).k
    assert isinstance(loaded, UserFunction)
    assert "twice" in repr(loaded)
    with pytest.raises(apd.ArtifactError, match="twice was not saved with the decomposition"):
        loaded(None)
    assert encode_settings(loaded) == encode_settings(twice)


def test_settings_are_updated_where_they_differ():
    """Functions, and classes that are not saved, stay what they are."""

    @dataclass(frozen=True)
    class Unsaved:
        selection: apd.BatchTopK
        function: object

    now, later = (apd.BatchTopK(apd.masks.Needed(k), least=0.1) for k in (1.0, 3.0))
    before = Unsaved(now, len)
    after = updated(before, encode_settings(Unsaved(later, len)))
    assert after == Unsaved(later, len)
    assert updated(before, encode_settings(before)) is before
    assert updated(now, encode_settings(apd.TopK(2))) == apd.TopK(2)
    assert updated(apd.BatchTopK(1.0), encode_settings(now)) == now
    assert updated(now, encode_settings(apd.BatchTopK(1.0))) == apd.BatchTopK(1.0)


def test_functions_can_be_encoded_otherwise():
    encoded = encode_settings((apd.BatchTopK(len),), lambda function: function.__name__)
    assert encoded[0]["k"] == "len"


@pytest.mark.parametrize("value", [{"type": "Nothing"}, {"k": 1}, {"type": "TopK", "k": 1, "more": 2}])
def test_what_is_no_setting_is_refused(value):
    with pytest.raises(apd.ArtifactError, match="none that this apd_lens knows"):
        decode_settings(value)


def test_a_name_that_is_taken_is_refused():
    @dataclass(frozen=True)
    class TopK:
        k: int

    with pytest.raises(TypeError, match=r"TopK is taken by apd_lens\.masks"):
        saved(TopK)
