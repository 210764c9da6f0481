"""Every error that apd_lens raises on purpose.

Each message says what was expected, what came, where, and what to do. All are subclasses of `ApdError`, and of the
built-in error that a caller would otherwise expect, so `except ValueError` goes on working.
"""


class ApdError(Exception):
    """Base of all errors raised by apd_lens."""


class UnknownWeight(ApdError, LookupError):
    """A pattern or a name matches no weight matrix of the model."""


class UnsupportedModel(ApdError, TypeError):
    """A model, or one of its matrices, cannot be taken apart."""


class MissingExtra(ApdError, ImportError):
    """An optional dependency is not installed."""


class InvalidSetting(ApdError, ValueError):
    """A setting has an invalid value."""


class ShapeMismatch(ApdError, ValueError):
    """A tensor has the wrong shape or dtype."""


class InvalidOutput(ApdError, TypeError):
    """The model's output is not a tensor that can be explained."""


class InvalidBatches(ApdError, ValueError):
    """The batches are empty, end too early, or cannot be iterated."""


class NonFinite(ApdError, ArithmeticError):
    """A value is NaN or infinite; the message says where it first appeared."""


class SiteNotCalled(ApdError, RuntimeError):
    """A forward pass did not use a matrix that was to be replaced or observed."""


class AlreadyActive(ApdError, RuntimeError):
    """A second context was entered on a model, or the model is being edited."""


class WeightsChanged(ApdError, RuntimeError):
    """A matrix of the model is not what it was when it was decomposed."""


class ArtifactError(ApdError, ValueError):
    """A saved decomposition cannot be written, read, or fitted to the model."""


class ApdWarning(UserWarning):
    """What is allowed and yet not what it seems."""
