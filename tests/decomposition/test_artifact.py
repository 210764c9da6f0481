"""Saving and loading: what comes back, and what is refused."""

import contextlib
import copy
import json
import os
import pickle

import pytest
import torch
from safetensors.torch import load_file, save_file
from support import outside
from support.golden import GOLDEN
from support.toy_models import ResidualMLP, Snapshot, decomposition_of
from torch import nn
from torch.testing import assert_close

import apd_lens as apd
from apd_lens.decomposition import _artifact


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
        moves=apd.moves.SplitMoves(every=3),
        optimization=apd.Optimization(steps=4),
        seed=7,
        progress=False,
    ).save(tmp_path / "nested" / "run")
    return tmp_path / "nested" / "run"


def change_json(folder, **changes) -> None:
    """Edits the JSON file, and makes its digest fit again."""
    file = folder / "config.json"
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
    assert settings.moves == apd.moves.SplitMoves(every=3)
    assert settings.optimization == apd.Optimization(steps=4, start="data")
    assert settings.seed == 7
    assert "<lambda>" in repr(settings.losses.distance)
    with pytest.raises(apd.ArtifactError, match="<lambda> was not saved"):
        settings.losses.distance(torch.ones(1), torch.ones(1))
    assert sorted(path.name for path in saved.iterdir()) == ["README.md", "components.safetensors", "config.json"]


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
    with pytest.raises(apd.errors.InvalidSetting, match=r"output function of your own, which is not saved.*output="):
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
    file = folder / "config.json"
    file.write_text(file.read_text().replace('"seed": 7', '"seed": 8'))


DAMAGE = {
    "truncated tensors": (truncate, r"components.safetensors \(\d+ bytes\) is truncated or was changed"),
    "tampered tensors": (flip_a_byte, "is truncated or was changed after it was saved"),
    "tampered JSON": (change_a_setting, "config.json was changed after it was saved"),
    "truncated JSON": (
        lambda folder: (folder / "config.json").write_text('{"format": "apd_l'),
        "config.json is damaged: no valid JSON",
    ),
    "foreign JSON": (
        lambda folder: (folder / "config.json").write_text('{"format": "something else"}'),
        "is not of apd_lens: expected the format 'apd_lens decomposition'",
    ),
    "newer": (
        lambda folder: change_json(folder, format_version=2),
        "has format version 2, and this apd_lens reads up to 1. Upgrade apd_lens",
    ),
    "no tensors": (lambda folder: (folder / "components.safetensors").unlink(), "components.safetensors is missing"),
    "no JSON": (lambda folder: (folder / "config.json").unlink(), "Expected a folder with config.json"),
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
    with pytest.raises(
        apd.ArtifactError, match=f"another model: .*{message}.*made from a support.toy_models.ResidualMLP"
    ):
        apd.load(saved, model)
    before.assert_unchanged(model)


OTHER_DTYPES = {
    "narrower": (torch.float32, torch.bfloat16),
    "half": (torch.float32, torch.float16),
    "wider": (torch.float32, torch.float64),
    "wider than bfloat16": (torch.bfloat16, torch.float32),
    "float64 to half": (torch.float64, torch.float16),
}


@pytest.mark.parametrize(("made", "here"), OTHER_DTYPES.values(), ids=OTHER_DTYPES)
def test_another_dtype_is_taken_on_request_if_the_weights_are_the_same(tmp_path, made, here):
    original = model_of().to(made)
    decomposition = decomposition_of(original, "layers.*")
    decomposition.save(tmp_path)
    model = model_of().to(made).to(here)
    with pytest.raises(apd.ArtifactError, match=r"another dtype.*other_dtype=True"):
        apd.load(tmp_path, model)
    loaded = apd.load(tmp_path, model, other_dtype=True)
    x = torch.randn(3, 4, dtype=here)
    expected = torch.promote_types(here, torch.float32)
    assert {factor.dtype for factor in loaded.components.parameters()} == {expected}
    with loaded.only([1, 2]):
        ours = model(x)
    with torch.no_grad():
        for name in loaded.components.names:
            module = model.get_submodule(name.removesuffix(".weight"))
            module.weight.copy_(decomposition.components.component_weights(name)[[1, 2]].sum(0).T)
    tolerance = 20 * torch.finfo(here).eps if here != torch.float64 else 1e-6
    torch.testing.assert_close(ours, model(x), rtol=tolerance, atol=tolerance)
    loaded.save(tmp_path)
    assert apd.load(tmp_path, model_of().to(made).to(here)).components.n_components == 5


@pytest.mark.parametrize("here", [torch.bfloat16, torch.float64, torch.float32])
def test_other_weights_are_refused_in_another_dtype_too(tmp_path, here):
    decomposition_of(model_of(), "layers.*").save(tmp_path)
    other = model_of()
    with torch.no_grad():
        other.layers[0]["mlp_in"].weight[0, 0] += 0.1
    with pytest.raises(apd.ArtifactError, match=r"mlp_in\.weight has other weights"):
        apd.load(tmp_path, other.to(here), other_dtype=True)


def test_an_artifact_of_the_first_release_loads(saved):
    """It has no digests of rounded weights."""
    about = json.loads((saved / "config.json").read_text())
    for matrix in about["matrices"].values():
        del matrix["rounded"]
    change_json(saved, matrices=about["matrices"])
    assert apd.load(saved, model_of()).components.n_components == 5
    assert apd.load(saved, model_of().double(), other_dtype=True).components.n_components == 5
    with pytest.raises(apd.ArtifactError, match="another dtype"):
        apd.load(saved, model_of().bfloat16(), other_dtype=True)


@pytest.mark.parametrize("version", ["0.1", "0.2"])
def test_what_an_earlier_release_saved_is_what_it_was(version: str):
    """The folders were written by those releases, on this model."""
    expected = load_file(GOLDEN / "saved_by.safetensors")
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))
    model.load_state_dict({name.removeprefix("model."): value for name, value in expected.items() if "model" in name})
    loaded = apd.from_pretrained(GOLDEN / f"saved_by_{version}", model)
    assert_close(loaded.attributions(expected["x"]), expected[f"attributions.{version}"])
    was = loaded.settings
    then = (was.optimization.scaled, was.optimization.init_scale, was.losses.simplicity_floor, was.attribution.metric)
    assert then == {"0.1": (False, 1.0, 0.0, "outputs"), "0.2": (True, 0.5, 0.5, "outputs")}[version]


def as_earlier(folder) -> None:
    """Makes of an artifact what 0.1 and 0.2 saved."""
    (folder / "config.json").rename(folder / "decomposition.json")
    (folder / "README.md").unlink()


def test_an_artifact_of_earlier_releases_loads_and_is_replaced(saved):
    as_earlier(saved)
    assert apd.load(saved, model_of()).components.n_components == 5
    decomposition_of(model_of(), "layers.*", n_components=3).save(saved)
    assert sorted(path.name for path in saved.iterdir()) == ["README.md", "components.safetensors", "config.json"]
    assert apd.load(saved, model_of()).components.n_components == 3


@pytest.mark.parametrize("call", ["replace", "unlink"])
@pytest.mark.parametrize("done", range(4))
def test_a_save_over_an_earlier_one_that_ends_anywhere_leaves_one_of_the_two(saved, monkeypatch, call, done: int):
    as_earlier(saved)
    decomposition = decomposition_of(model_of(), "layers.*", n_components=3)
    calls, original = [], getattr(os, call)

    def stop(*arguments) -> None:
        calls.append(arguments)
        if len(calls) > done:
            raise KeyboardInterrupt
        original(*arguments)

    monkeypatch.setattr(os, call, stop)
    with contextlib.suppress(KeyboardInterrupt):
        decomposition.save(saved)
    monkeypatch.undo()
    has_old = (saved / "decomposition.json").exists()
    assert apd.load(saved, model_of()).components.n_components == (5 if has_old else 3)
    decomposition.save(saved)
    assert sorted(path.name for path in saved.iterdir()) == ["README.md", "components.safetensors", "config.json"]
    assert apd.load(saved, model_of()).components.n_components == 3


def test_another_librarys_config_is_not_replaced(saved):
    """Beside an artifact of an earlier release too, which still loads."""
    as_earlier(saved)
    for content in ('{"model_type": "gpt2"}', ""):
        (saved / "config.json").write_text(content)
        assert apd.load(saved, model_of()).components.n_components == 5
        with pytest.raises(apd.ArtifactError, match="is not empty and holds no decomposition"):
            apd.load(saved, model_of()).save(saved)
        assert (saved / "config.json").read_text() == content


def test_factors_that_could_not_be_loaded_are_not_saved(tmp_path):
    decomposition = decomposition_of(model_of(), "layers.*")
    decomposition.save(tmp_path)
    next(decomposition.components.parameters()).data[0, 0, 0] = torch.nan
    with pytest.raises(apd.ArtifactError, match=r"cannot be saved: A\..* holds NaN or infinity"):
        decomposition.save(tmp_path)
    assert apd.load(tmp_path, model_of()).components.n_components == 5


def test_a_deep_copy_has_components_of_its_own_on_the_same_model():
    model, x = model_of(), torch.randn(3, 4)
    decomposition = decomposition_of(model, "layers.*")
    copied = copy.deepcopy(decomposition)
    assert copied.target.model is model
    expected = decomposition.attributions(x)
    for factor in decomposition.components.parameters():
        factor.data.zero_()
    assert torch.equal(copied.attributions(x), expected)
    with copied.ablate([0, 1, 2, 3, 4]):
        assert not torch.equal(model(x), model_of()(x))
    assert copy.copy(decomposition).components is decomposition.components


def test_a_model_that_is_copied_with_a_decomposition_is_that_of_the_copy():
    model, x = model_of(), torch.randn(3, 4)
    decomposition = decomposition_of(model, "layers.*")
    with decomposition.ablate(0):
        expected = model(x)
    for other, copied in (
        copy.deepcopy((model, decomposition)),
        reversed(copy.deepcopy((decomposition, model))),
    ):
        assert copied.target.model is other
        with copied.ablate(0):
            assert torch.equal(other(x), expected)


def test_a_deep_copy_of_a_state_goes_on_alike():
    x = torch.randn(6, 4)
    state = apd.init(model_of(), n_components=5, rank=2, selection=apd.TopK(2), optimization=apd.Optimization(steps=4))
    state, _ = apd.step(state, x)
    other = copy.deepcopy(state)
    for _ in range(2):
        state, _ = apd.step(state, x)
    assert not torch.equal(other.components.B["W_U.weight"], state.components.B["W_U.weight"])
    for _ in range(2):
        other, _ = apd.step(other, x)
    for ours, theirs in zip(other.components.parameters(), state.components.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_pickling_says_what_to_use_instead():
    decomposition = decomposition_of(model_of(), "layers.*")
    state = apd.init(model_of(), n_components=5, rank=2, selection=apd.TopK(2))
    for thing in (decomposition, decomposition.target, state, apd.monitor.fit(decomposition, [torch.randn(9, 4)])):
        with pytest.raises(apd.ArtifactError, match=r"decomposition.save\(path\) and apd_lens.load"):
            pickle.dumps(thing)
    components = pickle.loads(pickle.dumps(decomposition.components))
    assert components.names == decomposition.components.names


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
        from support.toy_models import ResidualMLP
        def refuse(*args, **kwargs):
            raise AssertionError("pickle")
        pickle.load = pickle.loads = pickle.Unpickler = torch.load = refuse
        torch.manual_seed(0)
        apd.load({str(saved)!r}, ResidualMLP(4, 6, 5, 1))
        """
    )


def test_directions_are_of_use_where_there_is_no_apd_lens(tmp_path):
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3)), torch.randn(5, 4)
    decomposition = decomposition_of(model)
    decomposition.export_directions(tmp_path / "directions")
    with torch.no_grad(), decomposition.ablate(3):
        expected = model(x)
    save_file(model.state_dict() | {"x": x, "expected": expected}, tmp_path / "given")
    printed = outside.fresh(f"""
        import sys
        sys.modules["apd_lens"] = None
        import torch
        from safetensors.torch import load_file
        directions, given = load_file({str(tmp_path / "directions")!r}), load_file({str(tmp_path / "given")!r})
        x, expected = given.pop("x"), given.pop("expected")
        for name in ("0.weight", "2.weight"):
            read, write = directions[name + ".read"][3], directions[name + ".write"][3]
            given[name] -= (read.T @ write).T
        without = torch.relu(x @ given["0.weight"].T + given["0.bias"]) @ given["2.weight"].T + given["2.bias"]
        print((without - expected).abs().max().item())
    """)
    with torch.no_grad():
        assert float(printed) < 1e-6 < 1e-2 < (model(x) - expected).abs().max()
