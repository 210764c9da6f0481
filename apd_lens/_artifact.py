"""Decompositions on disk: a folder with the factors as safetensors, and JSON about them. No pickle anywhere.

decomposition.json holds the format's version, the versions of the libraries, all settings, for every matrix its shape
and a fingerprint of the target's weight, a digest of the tensor file, and a digest of all that.
"""

import dataclasses
import hashlib
import importlib.metadata
import json
import os
from pathlib import Path
from typing import Any, NoReturn

import safetensors.torch
from torch import Tensor

from apd_lens._attribution import AblationAttribution, ActivationAttribution, GradientAttribution, IntegratedGradients
from apd_lens._cluster_moves import ClusterMoves
from apd_lens._division_moves import DivisionMoves
from apd_lens._errors import ArtifactError
from apd_lens._losses import Losses
from apd_lens._moves import SplitMoves
from apd_lens._schedules import HoldThenDecay, Ramp
from apd_lens._selection import BatchTopK, Lp, Needed, TopK
from apd_lens._settings import Optimization, Settings

FORMAT = "apd_lens decomposition"
FORMAT_VERSION = 1
JSON_FILE = "decomposition.json"
TENSOR_FILE = "components.safetensors"
_SETTINGS = {
    cls.__name__: cls
    for cls in (
        AblationAttribution,
        ActivationAttribution,
        BatchTopK,
        GradientAttribution,
        HoldThenDecay,
        IntegratedGradients,
        Losses,
        Lp,
        Optimization,
        Settings,
        ClusterMoves,
        DivisionMoves,
        Ramp,
        Needed,
        SplitMoves,
        TopK,
    )
}


def write_artifact(folder: Path, factors: dict[str, Tensor], about: dict[str, Any]) -> None:
    """Writes the folder, or writes it anew.

    Each file is complete before it is moved into place, so an interrupted save leaves no half file.

    Raises:
        ArtifactError: the path is a file, or a folder that holds something else.
    """
    if folder.is_file():
        raise ArtifactError(f"Expected a folder to save to, but {folder} is a file. Choose another path.")
    if folder.is_dir() and any(folder.iterdir()) and not (folder / JSON_FILE).is_file():
        raise ArtifactError(f"{folder} is not empty and holds no decomposition. Choose a new or an empty folder.")
    tensors = safetensors.torch.save({key: factor.detach().cpu().contiguous() for key, factor in factors.items()})
    about = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        **about,
        "tensors_sha256": hashlib.sha256(tensors).hexdigest(),
    }
    about["sha256"] = _digest(about)
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in (
        (TENSOR_FILE, tensors),
        (JSON_FILE, json.dumps(about, indent=2, ensure_ascii=False).encode()),
    ):
        unfinished = folder / f"{name}.unfinished"
        unfinished.write_bytes(content)
        os.replace(unfinished, folder / name)


def read_artifact(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The factors and what is known about them, as `write_artifact` was given them.

    Raises:
        ArtifactError: nothing there; truncated, changed, not a decomposition, or of a newer format.
    """
    about = _read_json(folder / JSON_FILE)
    file = folder / TENSOR_FILE
    if not file.is_file():
        raise ArtifactError(f"{file} is missing. Save the decomposition again.")
    content = file.read_bytes()
    if hashlib.sha256(content).hexdigest() != about["tensors_sha256"]:
        raise ArtifactError(
            f"{file} ({len(content)} bytes) is truncated or was changed after it was saved: its digest is not the one "
            f"that {JSON_FILE} gives."
        )
    return safetensors.torch.load(content), about


def _read_json(file: Path) -> dict[str, Any]:
    if not file.is_file():
        raise ArtifactError(
            f"Expected a folder with {JSON_FILE} at {file.parent}, as decomposition.save(path) writes it."
        )
    try:
        about = json.loads(file.read_bytes())
    except ValueError as error:
        raise ArtifactError(f"{file} is damaged: no valid JSON ({error}). Save the decomposition again.") from error
    if not isinstance(about, dict) or about.get("format") != FORMAT:
        raise ArtifactError(f"{file} is not of apd_lens: expected the format {FORMAT!r}.")
    version = about.get("format_version")
    if not isinstance(version, int) or version > FORMAT_VERSION:
        raise ArtifactError(
            f"{file} has format version {version}, and this apd_lens reads up to {FORMAT_VERSION}. Upgrade apd_lens."
        )
    if about.get("sha256") != _digest(about):
        raise ArtifactError(f"{file} was changed after it was saved: its digest does not fit its content.")
    return about


def _digest(about: dict[str, Any]) -> str:
    content = {key: value for key, value in about.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def library_versions(model: object) -> dict[str, str]:
    """Versions of apd_lens, torch and the package that the model's class is from."""
    host = type(model).__module__.partition(".")[0]
    distributions = {"apd-lens", "torch", *importlib.metadata.packages_distributions().get(host, [])}
    return {name: importlib.metadata.version(name) for name in sorted(distributions)}


class UserFunction:
    """What stands in loaded settings where a function of the user's was; functions are not saved."""

    def __init__(self, name: str):
        self.name = name

    def __call__(self, *args: Any) -> NoReturn:
        raise ArtifactError(f"The function {self.name} was not saved with the decomposition.")

    def __repr__(self) -> str:
        return f"<function {self.name}, not saved>"


def encode_settings(value: Any) -> Any:
    """Settings as what JSON can hold: dataclasses as mappings with their type, functions by name."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {field.name: encode_settings(getattr(value, field.name)) for field in dataclasses.fields(value)}
        return {"type": type(value).__name__, **fields}
    if isinstance(value, tuple):
        return [encode_settings(item) for item in value]
    if callable(value):
        return {"type": "function", "name": getattr(value, "__qualname__", getattr(value, "name", repr(value)))}
    return value


def decode_settings(value: Any) -> Any:
    """The inverse of `encode_settings`, with a `UserFunction` in the place of a function."""
    if isinstance(value, list):
        return tuple(decode_settings(item) for item in value)
    if not isinstance(value, dict):
        return value
    fields = {name: decode_settings(item) for name, item in value.items() if name != "type"}
    if value["type"] == "function":
        return UserFunction(fields["name"])
    return _SETTINGS[value["type"]](**fields)
