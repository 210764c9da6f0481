"""Settings as JSON can hold them, and back. A class of settings registers itself with `@saved`."""

import dataclasses
from collections.abc import Callable
from typing import Any, NoReturn, TypeVar

from apd_lens._errors import ArtifactError

_C = TypeVar("_C", bound=type)
_CLASSES: dict[str, type] = {}


def saved(cls: _C) -> _C:
    """Lets a frozen dataclass of settings be saved with a decomposition, under its name.

    Where an earlier form of the class had no such field and did something else than the default, its class attribute
    `UNSAVED` says what: field -> value.
    """
    known = _CLASSES.setdefault(cls.__name__, cls)
    if known.__module__ != cls.__module__:
        raise TypeError(f"Settings are saved by name, and {cls.__name__} is taken by {known.__module__}.")
    _CLASSES[cls.__name__] = cls
    return cls


def can_be_saved(value: Any) -> bool:
    """Whether a value is of a class that is saved, and holds no function of the user's."""
    return _CLASSES.get(type(value).__name__) is type(value) and _holds_no_function(encode_settings(value))


def _holds_no_function(encoded: Any) -> bool:
    if isinstance(encoded, dict):
        return encoded.get("type") != "function" and all(map(_holds_no_function, encoded.values()))
    return not isinstance(encoded, list) or all(map(_holds_no_function, encoded))


class UserFunction:
    """What stands in loaded settings where a function of the user's was; functions are not saved."""

    def __init__(self, name: str):
        self.name = name

    def __call__(self, *args: Any) -> NoReturn:
        raise ArtifactError(f"The function {self.name} was not saved with the decomposition.")

    def __repr__(self) -> str:
        return f"<function {self.name}, not saved>"


def encode_function(function: Callable[..., Any]) -> dict[str, Any]:
    """A function by its name."""
    name = getattr(function, "__qualname__", getattr(function, "name", repr(function)))
    return {"type": "function", "name": name}


def encode_settings(value: Any, of_function: Callable[[Callable[..., Any]], Any] = encode_function) -> Any:
    """Settings as what JSON can hold: dataclasses as mappings with their type, functions by name."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        items = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
        return {"type": type(value).__name__} | {key: encode_settings(item, of_function) for key, item in items.items()}
    if isinstance(value, tuple):
        return [encode_settings(item, of_function) for item in value]
    return of_function(value) if callable(value) else value


def updated(value: Any, encoded: Any) -> Any:
    """The value, with whatever was encoded otherwise as it was; functions and classes that are not saved stay."""
    if encode_settings(value) == encoded:
        return value
    kind = encoded.get("type") if isinstance(encoded, dict) else None
    if dataclasses.is_dataclass(value) and not isinstance(value, type) and type(value).__name__ == kind:
        names = [field.name for field in dataclasses.fields(value)]
        return dataclasses.replace(value, **{name: updated(getattr(value, name), encoded[name]) for name in names})
    return decode_settings(encoded)


def decode_settings(value: Any) -> Any:
    """The inverse of `encode_settings`, with a `UserFunction` in the place of a function.

    Raises:
        ArtifactError: not what `encode_settings` of this apd_lens gives.
    """
    try:
        return _decoded(value)
    except Exception as error:  # any: the classes are called with whatever the file holds
        raise ArtifactError(
            f"The saved settings are none that this apd_lens knows: {type(error).__name__}: {error}. They may be of "
            "a newer apd_lens: upgrade, or save again."
        ) from error


def _decoded(value: Any) -> Any:
    if isinstance(value, list):
        return tuple(_decoded(item) for item in value)
    if not isinstance(value, dict):
        return value
    fields = {name: _decoded(item) for name, item in value.items() if name != "type"}
    if value["type"] == "function":
        return UserFunction(str(fields["name"]))
    cls = _CLASSES[value["type"]]
    return cls(**getattr(cls, "UNSAVED", {}) | fields)
