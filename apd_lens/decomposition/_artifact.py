"""Decompositions on disk: a folder with the factors as safetensors, JSON about them, and a card. No pickle anywhere.

config.json holds the format's version, the versions of the libraries, all settings, for every matrix its shape and the
SHA-256 of the target's weight, a digest of the tensor file, and a digest of all that. README.md is for people alone;
nothing reads it back. The names are those that the Hugging Face Hub knows.

One rename of the JSON replaces the whole artifact. The new factors are put beside the old ones before it, under a name
with their digest, and get their plain name after it. Whoever reads in between, or after a kill in between, finds them
by the digest. Up to 0.2 the JSON was decomposition.json, which is read where it is; its removal is then what replaces.
"""

import contextlib
import functools
import hashlib
import importlib.metadata
import json
import math
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from apd_lens._errors import ArtifactError
from apd_lens._files import locked, make_folder, put, read_file, sync, write_file, writing

FORMAT = "apd_lens decomposition"
FORMAT_VERSION = 1
JSON_FILE = "config.json"
OLD_JSON_FILE = "decomposition.json"
TENSOR_FILE = "components.safetensors"
CARD_FILE = "README.md"
# What a killed save may leave in the folder.
_LEFTOVER = re.compile(
    r"components-[0-9a-f]{16}\.safetensors"
    r"|((config|decomposition)\.json|README\.md|components(-[0-9a-f]{16})?\.safetensors)\.([0-9a-f]{16}\.)?unfinished"
)
# Bytes that no real file goes beyond: JSON of 100,000 matrices, and what safetensors allows for a header.
_LARGEST_JSON = 2**27
_LARGEST_HEADER = 10**8
_NO_DIGEST = "0" * 64
_TYPES: dict[str, type] = {
    "model": str,
    "n_components": int,
    "matrices": dict,
    "settings": dict,
    "output": str,
    "tensors_sha256": str,
}
_TYPES_OF_MATRIX: dict[str, type] = {"d_in": int, "d_out": int, "rank": int, "fingerprint": str, "sites": list}


def write_artifact(folder: Path, factors: dict[str, Tensor], about: dict[str, Any], card: str) -> None:
    """Writes the folder, or replaces what is in it, all or nothing.

    Args:
        card: what README.md says.

    Raises:
        ArtifactError: the path is a file, or a folder that holds something else; factors that could not be loaded (NaN,
            infinity, other dtypes); or the system cannot write, of which the message says why.
    """
    _check_factors(factors, about, "The decomposition cannot be saved")
    if os.path.isfile(folder):
        raise ArtifactError(f"Expected a folder to save to, but {folder} is a file. Choose another path.")
    tensors = safetensors.torch.save({key: factor.detach().cpu().contiguous() for key, factor in factors.items()})
    about = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        **about,
        "tensors_sha256": hashlib.sha256(tensors).hexdigest(),
    }
    about["sha256"] = _digest(about)
    with writing(folder):
        make_folder(folder)
        with locked(folder):
            _check_ours(folder)
            _settle(folder)
            put(folder / _named_by_digest(about["tensors_sha256"]), tensors)
            put(folder / JSON_FILE, json.dumps(about, indent=2, ensure_ascii=False).encode())
            (folder / OLD_JSON_FILE).unlink(missing_ok=True)
            put(folder / CARD_FILE, card.encode())
            _settle(folder)


def _check_ours(folder: Path) -> None:
    """Another library's config.json is not replaced."""
    if os.path.isfile(folder / JSON_FILE):
        ours = FORMAT.encode() in read_file(folder / JSON_FILE, at_most=_LARGEST_JSON)
    else:
        ours = os.path.isfile(folder / OLD_JSON_FILE) or all(map(_LEFTOVER.fullmatch, os.listdir(folder)))
    if not ours:
        raise ArtifactError(f"{folder} is not empty and holds no decomposition. Choose a new or an empty folder.")


def _named_by_digest(digest: str) -> str:
    return f"components-{digest[:16]}.safetensors"


def _settle(folder: Path) -> None:
    """Gives the factors that the JSON speaks of their plain name, and removes what killed saves have left."""
    ours = None
    with contextlib.suppress(ArtifactError):
        ours = _named_by_digest(str(_read_json(_json_file(folder)).get("tensors_sha256")))
    for name in os.listdir(folder):
        if name == ours:
            os.replace(folder / name, folder / TENSOR_FILE)
            sync(folder)
        elif _LEFTOVER.fullmatch(name):
            (folder / name).unlink()


def read_artifact(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The factors and what is known about them, as `write_artifact` was given them, of one and the same save.

    Raises:
        ArtifactError: nothing there; truncated, changed, not a decomposition, or of a newer format.
    """
    with contextlib.suppress(ArtifactError):
        return _read(folder)
    with locked(folder, shared=True):  # it may have been replaced meanwhile
        return _read(folder)


def _read(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    file = _json_file(folder)
    about = _read_json(file)
    _check_about(about, file)
    numbers = sum(
        about["n_components"] * matrix["rank"] * (matrix["d_in"] + matrix["d_out"])
        for matrix in about["matrices"].values()
    ) + sum(map(math.prod, about.get("gates", {}).values()))
    problem = f"{folder / TENSOR_FILE} is missing"
    for place in (folder / TENSOR_FILE, folder / _named_by_digest(about["tensors_sha256"])):
        if not os.path.isfile(place):
            continue
        content = read_file(place, at_most=8 * numbers + _LARGEST_HEADER)
        if hashlib.sha256(content).hexdigest() == about["tensors_sha256"]:
            factors = _tensors(content, place)
            _check_factors(factors, about, f"{place} does not fit {file.name}")
            return factors, about
        problem = (
            f"{place} ({len(content)} bytes) is truncated or was changed after it was saved: its digest is not the one "
            f"that {file.name} gives"
        )
    raise ArtifactError(f"{problem}. Save the decomposition again.")


def _json_file(folder: Path) -> Path:
    old = folder / OLD_JSON_FILE
    return old if os.path.isfile(old) else folder / JSON_FILE


def _read_json(file: Path) -> dict[str, Any]:
    if not os.path.isfile(file):
        raise ArtifactError(
            f"Expected a folder with {JSON_FILE} at {file.parent}, as decomposition.save(path) writes it."
        )
    content = read_file(file, at_most=_LARGEST_JSON)
    try:
        about = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise ArtifactError(f"{file} is damaged: no valid JSON ({error}). Save the decomposition again.") from error
    if not isinstance(about, dict) or about.get("format") != FORMAT:
        raise ArtifactError(f"{file} is not of apd_lens: expected the format {FORMAT!r}.")
    version = about.get("format_version")
    if type(version) is not int or not 1 <= version <= FORMAT_VERSION:
        raise ArtifactError(
            f"{file} has format version {version!r:.80}, and this apd_lens reads up to {FORMAT_VERSION}. Upgrade "
            "apd_lens."
        )
    if about.get("sha256") != _digest(about):
        raise ArtifactError(
            f"{file} was changed after it was saved: its digest does not fit its content. Save the decomposition again."
        )
    return about


def _digest(about: dict[str, Any]) -> str:
    content = {key: value for key, value in about.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _check_about(about: dict[str, Any], file: Path) -> None:
    """Raises ArtifactError where a key is missing or of another type than it must have."""
    _check_types(about, _TYPES, str(file))
    for name, matrix in about["matrices"].items():
        if type(matrix) is not dict:
            raise ArtifactError(f"{file}: expected what is known of {name!r} as a mapping, got {matrix!r:.80}.")
        _check_types(matrix, _TYPES_OF_MATRIX, f"{file}, matrix {name!r}")
    gates = about.get("gates", {})
    if type(gates) is not dict or not all(
        type(shape) is list and all(type(n) is int and n > 0 for n in shape) for shape in gates.values()
    ):
        raise ArtifactError(f"{file}: expected the shapes of gates by name, got {gates!r:.80}. Save again.")
    if not about["matrices"] or about["output"] not in ("default", "given by the user"):
        raise ArtifactError(
            f"{file}: expected at least one matrix, and an output that is the default or given by the user; got "
            f"{len(about['matrices'])} and {about['output']!r:.80}."
        )


def _check_types(about: dict[str, Any], types: dict[str, type], where: str) -> None:
    for key, kind in types.items():
        value = about.get(key)
        if type(value) is not kind or (isinstance(value, int) and value < 1):
            expected = "a whole number from 1 on" if kind is int else f"a {kind.__name__}"
            raise ArtifactError(
                f"{where}: expected {expected} for {key!r}, got {value!r:.80}. It was not written by this apd_lens: "
                "upgrade, or save the decomposition again."
            )


def _check_factors(factors: dict[str, Tensor], about: dict[str, Any], problem: str) -> None:
    """Raises ArtifactError where factors are not those of the matrices: other names, shapes, dtypes, or not finite."""
    n_components = about["n_components"]
    shapes = {f"gates.{name}": tuple(shape) for name, shape in about.get("gates", {}).items()}
    for name, matrix in about["matrices"].items():
        shapes[f"A.{name}"] = (n_components, matrix["d_in"], matrix["rank"])
        shapes[f"B.{name}"] = (n_components, matrix["rank"], matrix["d_out"])
    if factors.keys() != shapes.keys():
        missing, extra = sorted(shapes.keys() - factors.keys()), sorted(factors.keys() - shapes.keys())
        raise ArtifactError(f"{problem}: missing are the factors {missing[:5]}, and too many {extra[:5]}.")
    for name, shape in shapes.items():
        of_partner = {"A": "B", "B": "A"}.get(name[0], name[0]) + name[1:]
        factor, partner = factors[name], factors[of_partner]
        if tuple(factor.shape) != shape:
            raise ArtifactError(f"{problem}: expected {name} of shape {shape}, got {tuple(factor.shape)}.")
        if factor.dtype not in (torch.float32, torch.float64) or factor.dtype != partner.dtype:
            raise ArtifactError(
                f"{problem}: expected {name} in float32 or float64, as its partner {partner.dtype}; got {factor.dtype}."
            )
        if not bool(factor.isfinite().all()):
            raise ArtifactError(f"{problem}: {name} holds NaN or infinity.")


def _tensors(content: bytes, file: Path) -> dict[str, Tensor]:
    try:
        return safetensors.torch.load(content)
    except Exception as error:  # of whatever kind the library raises for a header that no library writes
        raise ArtifactError(f"{file} is damaged: no valid safetensors ({error}). Save again.") from error


def write_tensors(path: Path, tensors: dict[str, Tensor], about: dict[str, str]) -> None:
    """Writes one safetensors file with what is known about the tensors, and a digest of all its bytes, in its metadata.

    The digest is that of the file with zeros in the digest's place.
    """
    content = safetensors.torch.save(tensors, {**about, "sha256": _NO_DIGEST})
    digest = hashlib.sha256(content).hexdigest()
    write_file(path, content.replace(_NO_DIGEST.encode(), digest.encode(), 1))


def read_tensors(path: Path, at_most: int) -> tuple[dict[str, Tensor], dict[str, str], bool]:
    """The tensors of a file, what is known about them, and whether the digest is right.

    Args:
        at_most: bytes that the tensors may have.

    Raises:
        ArtifactError: no safetensors file, or a larger one.
    """
    content = read_file(path, at_most + _LARGEST_HEADER)
    tensors = _tensors(content, path)
    length = int.from_bytes(content[:8], "little")
    about = json.loads(content[8 : 8 + length]).get("__metadata__", {})
    digest = about.pop("sha256", _NO_DIGEST)
    restored = content.replace(digest.encode(), _NO_DIGEST.encode(), 1)
    return tensors, about, hashlib.sha256(restored).hexdigest() == digest


def library_versions(model: object) -> dict[str, str]:
    """Versions of apd_lens, torch and the package that the model's class is from."""
    host = type(model).__module__.partition(".")[0]
    distributions = {"apd-lens", "torch", *_distributions().get(host, [])}
    return {name: importlib.metadata.version(name) for name in sorted(distributions)}


@functools.cache  # it reads all that is installed, for a second or two
def _distributions() -> Mapping[str, list[str]]:
    return importlib.metadata.packages_distributions()
