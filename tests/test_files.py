"""What is saved is whole or not there: kills at chosen lines, two writers, full disks, hostile files, flipped bits."""

import errno
import os
import signal
import sys
from pathlib import Path

import pytest
import torch
from support.toy_models import decomposition_of
from torch import nn

import apd_lens as apd
from apd_lens import _files
from apd_lens import monitor as watch
from apd_lens.compare._circuit_files import read_circuit
from apd_lens.compare._dictionaries import Dictionary

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))

import kills

pytestmark = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded")


@pytest.fixture
def home(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


def test_kills_lose_nothing_and_leave_nothing_behind():
    tried, wrong = kills.kills(at_random=5, every=23)
    assert tried > 15
    assert wrong == 0


def test_a_reader_beside_two_writers_reads_what_one_of_them_wrote():
    assert kills.writers(60) == (60, 0)


def test_hostile_artifacts_are_refused_or_work():
    tried, wrong, outcomes = kills.hostile(90)
    assert (tried, wrong) == (90, 0), outcomes
    assert outcomes["ArtifactError"] > 60


def test_no_flipped_bit_is_loaded():
    assert kills.flips(60) == {"decomposition": (60, 0), "monitor": (60, 0)}


@pytest.mark.parametrize("renames", [0, 1, 2, 3, 4])
def test_a_save_that_ends_at_any_rename_leaves_the_old_or_the_new_one(tmp_path, monkeypatch, renames: int):
    model, folder = nn.Linear(4, 3), tmp_path / "run"
    old, new = (decomposition_of(model, seed=seed) for seed in (1, 2))
    old.save(folder)
    done, replace = 0, os.replace

    def replace_or_stop(source: object, target: object) -> None:
        nonlocal done
        if done == renames:
            raise KeyboardInterrupt
        done += 1
        replace(source, target)

    monkeypatch.setattr(os, "replace", replace_or_stop)
    if renames < 4:  # factors under their digest, JSON, card, factors under their own name
        with pytest.raises(KeyboardInterrupt):
            new.save(folder)
    else:
        new.save(folder)
    monkeypatch.undo()
    assert kills.same(apd.load(folder, model), old if renames < 2 else new)
    old.save(folder)
    assert kills.same(apd.load(folder, model), old)
    assert sorted(os.listdir(folder)) == ["README.md", "components.safetensors", "config.json"]


def test_a_first_save_that_was_killed_does_not_stand_in_the_way(tmp_path):
    model, folder = nn.Linear(4, 3), tmp_path / "run"
    decomposition, replace = decomposition_of(model), os.replace

    def save_and_die() -> None:
        def replace_factors_only(source: Path, target: Path) -> None:
            if target.name == "config.json":
                os.kill(os.getpid(), signal.SIGKILL)
            replace(source, target)

        os.replace = replace_factors_only
        decomposition.save(folder)

    os.waitpid(kills.in_child(save_and_die), 0)
    assert len(os.listdir(folder)) == 2  # the factors, and JSON that is not finished
    assert not (folder / "config.json").exists()
    decomposition.save(folder)
    assert kills.same(apd.load(folder, model), decomposition)
    assert sorted(os.listdir(folder)) == ["README.md", "components.safetensors", "config.json"]


@pytest.mark.parametrize("call", ["fsync", "replace"])
@pytest.mark.parametrize(
    ("number", "message"),
    [
        (errno.ENOSPC, "no space is left on the disk.*Free some space"),
        (errno.EACCES, "Permission denied.*another path"),
    ],
)
def test_a_full_disk_is_an_artifact_error_and_leaves_the_old_file(tmp_path, monkeypatch, call, number, message: str):
    model, folder = nn.Linear(4, 3), tmp_path / "run"
    old, new = (decomposition_of(model, seed=seed) for seed in (1, 2))
    monitor = watch.fit(old, [torch.randn(20, 4)])
    old.save(folder)
    monitor.save(tmp_path / "monitor")

    def fail(*arguments: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, call, fail)
    for save in (lambda: new.save(folder), lambda: monitor.save(tmp_path / "monitor")):
        with pytest.raises(apd.ArtifactError, match=rf"cannot be written: {message}.*save again"):
            save()
    monkeypatch.undo()
    assert kills.same(apd.load(folder, model), old)
    assert torch.equal(watch.load(tmp_path / "monitor", old).coactivation, monitor.coactivation)
    assert sorted(os.listdir(tmp_path)) == ["monitor", "run"]
    assert sorted(os.listdir(folder)) == ["README.md", "components.safetensors", "config.json"]


def test_a_write_replaces_a_file_and_removes_what_killed_writes_left(tmp_path):
    file = tmp_path / "new" / "page.html"
    _files.write_file(file, b"old")
    (file.parent / "page.html.0123456789abcdef.unfinished").write_bytes(b"o")
    (file.parent / "page.html.unfinished").write_bytes(b"o")
    (file.parent / "page.html.mine.unfinished").write_bytes(b"mine")
    (file.parent / "link").symlink_to(file)
    _files.write_file(file.parent / "link", b"new")
    assert file.read_bytes() == b"new"
    assert sorted(os.listdir(file.parent)) == ["link", "page.html", "page.html.mine.unfinished"]
    assert (file.parent / "link").is_symlink()


def test_a_lock_that_is_not_given_back_is_an_error_after_a_while(tmp_path, monkeypatch):
    monkeypatch.setattr(_files, "PATIENCE", 0.05)
    decomposition = decomposition_of(nn.Linear(4, 3))
    decomposition.save(tmp_path / "run")
    with (
        _files.locked(tmp_path / "run"),
        pytest.raises(apd.ArtifactError, match=r"Another process has been saving to .*run"),
    ):
        decomposition.save(tmp_path / "run")
    decomposition.save(tmp_path / "run")


def test_what_is_larger_than_it_can_be_is_not_read(tmp_path):
    file = tmp_path / "large"
    file.touch()
    os.truncate(file, 10**12)  # takes no space
    with pytest.raises(apd.ArtifactError, match="has 1000000000000 bytes, but at most 5 are possible"):
        _files.read_file(file, at_most=5)
    decomposition = decomposition_of(nn.Linear(4, 3))
    decomposition.save(tmp_path / "run")
    os.truncate(tmp_path / "run" / "components.safetensors", 10**12)
    with pytest.raises(apd.ArtifactError, match="has 1000000000000 bytes"):
        apd.load(tmp_path / "run", decomposition.target)


def test_two_processes_write_one_report(tmp_path):
    decomposition = decomposition_of(nn.Linear(4, 3))
    x, path = torch.randn(8, 4), tmp_path / "report.html"
    decomposition.report([x], path, examples=1, outputs=1)

    def write() -> None:
        for number in range(5):
            try:
                decomposition.report([x], path, examples=1, outputs=1)
            except BaseException as error:
                (tmp_path / f"error {os.getpid()} {number}").write_text(repr(error))

    for pid in [kills.in_child(write) for _ in range(2)]:
        os.waitpid(pid, 0)
    assert os.listdir(tmp_path) == ["report.html"]
    assert path.read_text().rstrip().endswith("</html>")


def test_the_home_folder_in_every_path(home):
    model = nn.Linear(4, 3)
    decomposition = decomposition_of(model)
    decomposition.save("~/a/run")
    assert kills.same(apd.load(Path("~/a/run"), model), decomposition)
    monitor = watch.fit(decomposition, [torch.randn(20, 4)])
    monitor.save("~/monitor")
    assert watch.load("~/monitor", decomposition).n_data_points == 20
    assert decomposition.report([torch.randn(8, 4)], "~/report.html", examples=1, outputs=1) == home / "report.html"
    (home / "circuit.json").write_text('{"a0.h0": 1.0}')
    assert read_circuit("~/circuit.json").nodes == read_circuit(home / "circuit.json").nodes
    torch.save({"W_enc": torch.ones(4, 6), "W_dec": torch.ones(6, 4), "b_enc": torch.ones(6)}, home / "sae.pt")
    assert Dictionary.from_file("~/sae.pt", "site", decoder_bias=None).n_latents == 6
    assert sorted(os.listdir(home)) == ["a", "circuit.json", "monitor", "report.html", "sae.pt"]


@pytest.mark.parametrize("path", ["a\0b", "x" * 300])
def test_an_impossible_path_is_an_artifact_error(path: str):
    decomposition = decomposition_of(nn.Linear(4, 3))
    for use in (decomposition.save, lambda path: apd.load(path, decomposition.target)):
        with pytest.raises(apd.ArtifactError):
            use(path)
