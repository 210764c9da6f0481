"""Saving and loading: what comes back, and what is refused."""

import json

import outside
import pytest
import torch
from toy_models import ResidualMLP, Snapshot, decomposition_of

import apd_lens as apd
from apd_lens import _artifact


def model_of(seed: int = 0, **changes) -> ResidualMLP:
    torch.manual_seed(seed)
    return ResidualMLP(**{"n_features": 4, "d_resid": 6, "d_mlp": 5, "n_layers": 1, **changes})


@pytest.fixture
def saved(tmp_path):
    apd.decompose(
        model_of(),
        [torch.randn(6, 4)],
        ["layers.*"],
        n_components=5,
        rank=2,
        selection=apd.TopK(2),
        losses=apd.Losses(simplicity=apd.HoldThenDecay(0.3), distance=lambda a, b: (a - b).abs().mean(-1)),
        moves=apd.SplitMoves(every=3),
        optimization=apd.Optimization(steps=4),
        seed=7,
        progress=False,
    ).save(tmp_path / "nested" / "run")
    return tmp_path / "nested" / "run"


def change_json(folder, **changes) -> None:
    """Edits the JSON file, and makes its digest fit again."""
    file = folder / "decomposition.json"
    about = {**json.loads(file.read_text()), **changes}
    about["sha256"] = _artifact._digest(about)
    file.write_text(json.dumps(about))


def test_everything_comes_back(saved):
    model = model_of()
    before = Snapshot.of(model)
    loaded = apd.load(saved, model)
    before.assert_unchanged(model)
    again = saved.parent / "again"
    loaded.save(again)
    assert (again / "components.safetensors").read_bytes() == (saved / "components.safetensors").read_bytes()
    settings = loaded.settings
    assert settings.selection == apd.TopK(2)
    assert settings.attribution == apd.GradientAttribution()
    assert settings.losses.simplicity == apd.HoldThenDecay(0.3)
    assert settings.moves == apd.SplitMoves(every=3)
    assert settings.optimization == apd.Optimization(steps=4)
    assert settings.seed == 7
    assert "<lambda>" in repr(settings.losses.distance)
    with pytest.raises(apd.ArtifactError, match="<lambda> was not saved"):
        settings.losses.distance(torch.ones(1), torch.ones(1))
    assert sorted(path.name for path in saved.iterdir()) == ["components.safetensors", "decomposition.json"]


def test_a_loaded_decomposition_works_like_the_saved_one(tmp_path):
    model, x = model_of(), torch.randn(3, 4)
    decomposition = decomposition_of(model, "layers.*")
    decomposition.save(tmp_path)
    loaded = apd.load(tmp_path, model)
    assert torch.equal(loaded.select(x), decomposition.select(x))
    with decomposition.only([1, 2]):
        expected = model(x)
    with loaded.only([1, 2]):
        assert torch.equal(model(x), expected)


def test_an_output_function_must_be_given_again(tmp_path):
    model, x = model_of(), torch.randn(3, 4)

    def first_two(y):
        return y[:, :2]

    decomposition = decomposition_of(model, "layers.*", output=first_two)
    decomposition.save(tmp_path)
    without = apd.load(tmp_path, model)
    with without.ablate(0):
        model(x)
    with pytest.raises(apd.InvalidSetting, match=r"output function of your own, which is not saved.*output="):
        without.select(x)
    loaded = apd.load(tmp_path, model, output=first_two)
    assert torch.equal(loaded.attributions(x), decomposition.attributions(x))


def test_saving_twice_replaces(saved):
    decomposition_of(model_of(), "layers.*", n_components=3).save(saved)
    assert apd.load(saved, model_of()).components.n_components == 3


def test_saving_to_a_file_or_a_foreign_folder_is_refused(tmp_path):
    decomposition = decomposition_of(model_of(), "layers.*")
    file = tmp_path / "file"
    file.write_text("mine")
    with pytest.raises(apd.ArtifactError, match=r"Expected a folder to save to, but .*file is a file"):
        decomposition.save(file)
    with pytest.raises(apd.ArtifactError, match="is not empty and holds no decomposition"):
        decomposition.save(tmp_path)
    assert file.read_text() == "mine"


def test_the_fingerprint_is_of_the_weights_that_were_decomposed(tmp_path):
    model = model_of()
    decomposition = decomposition_of(model, "layers.*")
    with torch.no_grad():
        model.layers[0]["mlp_in"].weight.mul_(2)
    decomposition.save(tmp_path)
    apd.load(tmp_path, model_of())
    with pytest.raises(apd.ArtifactError, match=r"mlp_in\.weight has other weights"):
        apd.load(tmp_path, model)


def truncate(folder):
    file = folder / "components.safetensors"
    file.write_bytes(file.read_bytes()[:-8])


def flip_a_byte(folder):
    file = folder / "components.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(bytes(content))


def change_a_setting(folder):
    file = folder / "decomposition.json"
    file.write_text(file.read_text().replace('"seed": 7', '"seed": 8'))


DAMAGE = {
    "truncated tensors": (truncate, r"components.safetensors \(\d+ bytes\) is truncated or was changed"),
    "tampered tensors": (flip_a_byte, "is truncated or was changed after it was saved"),
    "tampered JSON": (change_a_setting, "decomposition.json was changed after it was saved"),
    "truncated JSON": (
        lambda folder: (folder / "decomposition.json").write_text('{"format": "apd_l'),
        "decomposition.json is damaged: no valid JSON",
    ),
    "foreign JSON": (
        lambda folder: (folder / "decomposition.json").write_text('{"format": "something else"}'),
        "is not of apd_lens: expected the format 'apd_lens decomposition'",
    ),
    "newer": (
        lambda folder: change_json(folder, format_version=2),
        "has format version 2, and this apd_lens reads up to 1. Upgrade apd_lens",
    ),
    "no tensors": (lambda folder: (folder / "components.safetensors").unlink(), "components.safetensors is missing"),
    "no JSON": (lambda folder: (folder / "decomposition.json").unlink(), "Expected a folder with decomposition.json"),
}


@pytest.mark.parametrize(("damage", "message"), DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_artifact_is_refused(saved, damage, message: str):
    damage(saved)
    with pytest.raises(apd.ArtifactError, match=message):
        apd.load(saved, model_of())


OTHER_MODELS = {
    "other weights": (lambda: model_of(seed=1), "layers.0.mlp_in.weight has other weights"),
    "another shape": (lambda: model_of(d_mlp=3), "layers.0.mlp_in.weight is 6 × 3 here and was 6 × 5"),
    "another dtype": (lambda: model_of().double(), r"layers.0.mlp_in.weight has other weights, or another dtype"),
    "another model": (lambda: torch.nn.Linear(6, 5), "Linear has no matrix layers.0.mlp_in.weight"),
}


@pytest.mark.parametrize(("make", "message"), OTHER_MODELS.values(), ids=OTHER_MODELS)
def test_another_model_is_refused_and_left_alone(saved, make, message: str):
    model = make()
    before = Snapshot.of(model)
    with pytest.raises(apd.ArtifactError, match=f"another model: .*{message}.*made from a toy_models.ResidualMLP"):
        apd.load(saved, model)
    before.assert_unchanged(model)


def test_bfloat16_weights_have_fingerprints(tmp_path):
    model = model_of().bfloat16()
    decomposition_of(model, "layers.*").save(tmp_path)
    assert apd.load(tmp_path, model).components.n_components == 5


def test_nothing_is_pickled(saved):
    """Loading runs no code of the artifact's: neither pickle nor torch.load is called."""
    outside.run(
        f"""
        import pickle, sys, torch
        sys.path.insert(0, "tests")
        import apd_lens as apd
        from toy_models import ResidualMLP
        def refuse(*args, **kwargs):
            raise AssertionError("pickle")
        pickle.load = pickle.loads = pickle.Unpickler = torch.load = refuse
        torch.manual_seed(0)
        apd.load({str(saved)!r}, ResidualMLP(4, 6, 5, 1))
        """
    )
