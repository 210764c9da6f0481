"""Publishing and loading, on a Hub that the tests serve on loopback."""

import sys
from pathlib import Path

import pytest
import torch
from support.hub import TOKEN, FakeHub, served, use
from support.toy_models import ResidualMLP, Snapshot, decomposition_of

import apd_lens as apd

pytestmark = pytest.mark.filterwarnings(
    "ignore:Use 'content=<...>' to upload:DeprecationWarning"
)  # huggingface_hub does

FILES = {"README.md", "components.safetensors", "config.json"}
NOWHERE = "http://127.0.0.1:9"  # the port of a service that nobody runs


@pytest.fixture
def hub(monkeypatch):
    with served() as hub:
        use(hub.address, monkeypatch)
        yield hub


def model_of(seed: int = 0) -> ResidualMLP:
    torch.manual_seed(seed)
    return ResidualMLP(n_features=4, d_resid=6, d_mlp=5, n_layers=1)


def published(repo: str = "me/run", seed: int = 0, **options) -> tuple[apd.Decomposition, str]:
    decomposition = decomposition_of(model_of(), "layers.*", seed=seed)
    return decomposition, decomposition.push_to_hub(repo, token=TOKEN, **options).oid


def assert_same(one: apd.Decomposition, other: apd.Decomposition) -> None:
    assert one.settings == other.settings
    assert one.fingerprints == other.fingerprints
    for a, b in zip(one.components.parameters(), other.components.parameters(), strict=True):
        assert torch.equal(a, b)


def test_there_and_back_bit_for_bit(hub: FakeHub, tmp_path: Path):
    model = model_of()
    before = Snapshot.of(model)
    decomposition = decomposition_of(model, "layers.*")
    address = decomposition.push_to_hub("me/run", token=TOKEN, commit_message="The first")
    assert address.startswith(f"{hub.address}/me/run/commit/")
    repo = hub.repos["me/run"]
    assert repo.messages == ["initial commit", "The first"]  # one commit
    assert repo.commits[repo.branches["main"]].keys() == FILES | {".gitattributes"}
    assert not repo.private
    loaded = apd.from_pretrained("me/run", model, cache_dir=tmp_path)
    assert_same(loaded, decomposition)
    x = torch.randn(3, 4)
    assert torch.equal(loaded.attributions(x), decomposition.attributions(x))
    before.assert_unchanged(model)


def test_only_its_own_files_are_downloaded(hub: FakeHub, tmp_path: Path):
    published()
    repo = hub.repos["me/run"]
    repo.commit("main", repo.commits[repo.branches["main"]] | {"large.bin": b"x", "code.py": b"x"}, "other files")
    apd.from_pretrained("me/run", model_of(), cache_dir=tmp_path)
    assert {asked.rpartition("/")[2] for asked in hub.asked if asked.startswith("GET /me/run/resolve")} == FILES


def test_revisions(hub: FakeHub, tmp_path: Path):
    first, commit = published(seed=1)
    second, _ = published(seed=2)
    third, _ = published(seed=3, revision="other-rank")
    load = lambda **options: apd.from_pretrained("me/run", model_of(), cache_dir=tmp_path, **options)  # noqa: E731
    for decomposition, options in ((second, {}), (first, {"revision": commit}), (third, {"revision": "other-rank"})):
        assert_same(load(**options), decomposition)
    with pytest.raises(apd.ArtifactError, match=r"me/run has no revision 'v7'. Give a branch, a tag or a commit"):
        load(revision="v7")
    assert_same(published(seed=3, revision="other-rank")[0], load(revision="other-rank"))  # the branch is there already


def test_private(hub: FakeHub, tmp_path: Path):
    decomposition, _ = published(private=True)
    assert hub.repos["me/run"].private
    assert_same(apd.from_pretrained("me/run", model_of(), cache_dir=tmp_path, token=TOKEN), decomposition)
    with pytest.raises(
        apd.ArtifactError, match=r"no repository me/run that you may see.*`hf auth login`, or give token="
    ):
        apd.from_pretrained("me/run", model_of(), cache_dir=tmp_path / "of another")
    published(private=True)
    published("me/open")
    with pytest.raises(apd.ArtifactError, match=r"me/open is there already, and public; nothing was uploaded"):
        published("me/open", private=True)
    assert len(hub.repos["me/open"].commits) == 2


def test_whoever_may_not_write_is_told_to_log_in(hub: FakeHub):
    decomposition, _ = published()
    for repo in ("me/run", "me/new"):
        with pytest.raises(apd.ArtifactError, match=rf"does not let you write to {repo}: log in with `hf auth login`"):
            decomposition.push_to_hub(repo, token="hf_of_somebody")


def test_what_is_not_there(hub: FakeHub, tmp_path: Path):
    with pytest.raises(apd.ArtifactError, match=r"no folder and, at http.*, no repository me/none .* Check the name"):
        apd.from_pretrained("me/none", model_of(), cache_dir=tmp_path)
    with pytest.raises(apd.ArtifactError, match=r"Expected a repository 'owner/name' of the Hub, or a folder that is"):
        apd.from_pretrained(tmp_path / "none", model_of())
    published()
    repo = hub.repos["me/run"]
    repo.commit("main", {"config.json": b'{"model_type": "gpt2"}', "model.safetensors": b""}, "a model")
    with pytest.raises(apd.ArtifactError, match=r"models--me--run.*config.json is not of apd_lens"):
        apd.from_pretrained("me/run", model_of(), cache_dir=tmp_path)
    with pytest.raises(apd.ArtifactError, match=r"me/run holds something else: config.json, model.safetensors. Choose"):
        published()
    assert repo.commits[repo.branches["main"]]["config.json"] == b'{"model_type": "gpt2"}'


def test_another_model_is_refused(hub: FakeHub, tmp_path: Path):
    published()
    with pytest.raises(apd.ArtifactError, match=r"another model: layers.0.mlp_in.weight has other weights"):
        apd.from_pretrained("me/run", model_of(seed=1), cache_dir=tmp_path)


def test_without_network(hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    decomposition, _ = published()
    with pytest.raises(apd.ArtifactError, match=r"me/run was not downloaded before, at revision main. Leave local_"):
        apd.from_pretrained("me/run", model_of(), cache_dir=tmp_path, local_files_only=True)
    apd.from_pretrained("me/run", model_of(), cache_dir=tmp_path)
    asked = len(hub.asked)
    loaded = apd.from_pretrained("me/run", model_of(), cache_dir=tmp_path, local_files_only=True)
    assert_same(loaded, decomposition)
    assert len(hub.asked) == asked
    use(NOWHERE, monkeypatch)
    assert_same(apd.from_pretrained("me/run", model_of(), cache_dir=tmp_path), decomposition)
    message = rf"{NOWHERE} cannot be reached, or .*: ConnectError. Try again with a network. A folder needs none"
    with pytest.raises(apd.ArtifactError, match=message):
        apd.from_pretrained("me/run", model_of(), cache_dir=tmp_path / "new")
    with pytest.raises(apd.ArtifactError, match=message):
        decomposition.push_to_hub("me/run", token=TOKEN)


def test_a_folder_needs_neither_network_nor_account(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    use(NOWHERE, monkeypatch)
    decomposition = decomposition_of(model_of(), "layers.*")
    decomposition.save(tmp_path / "run")
    assert_same(apd.from_pretrained(tmp_path / "run", model_of()), decomposition)
    assert_same(apd.from_pretrained(str(tmp_path / "run"), model_of()), decomposition)
    with pytest.raises(
        apd.errors.InvalidSetting, match=r"is a folder, which has no revisions. Leave revision='main' away"
    ):
        apd.from_pretrained(tmp_path / "run", model_of(), revision="main")


def test_an_artifact_of_an_earlier_release_is_loaded_and_replaced(hub: FakeHub, tmp_path: Path):
    first, _ = published(seed=1)
    repo = hub.repos["me/run"]
    files = repo.commits[repo.branches["main"]]
    old = {"decomposition.json": files["config.json"], "components.safetensors": files["components.safetensors"]}
    repo.commit("main", old, "as 0.2 saved it")
    assert_same(apd.from_pretrained("me/run", model_of(), cache_dir=tmp_path), first)
    second, _ = published(seed=2)
    assert repo.commits[repo.branches["main"]].keys() == FILES
    assert_same(apd.from_pretrained("me/run", model_of(), cache_dir=tmp_path), second)


def test_a_missing_huggingface_hub_is_named(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)  # as if it were not installed
    decomposition = decomposition_of(model_of(), "layers.*")
    for call in (lambda: apd.from_pretrained("me/run", model_of()), lambda: decomposition.push_to_hub("me/run")):
        with pytest.raises(apd.errors.MissingExtra, match=r"pip install 'apd-lens\[hub\]'"):
            call()
