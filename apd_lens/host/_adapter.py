"""What a host must offer."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Protocol, runtime_checkable

from torch import Tensor, nn

from apd_lens.host._matrix import Use, WeightMatrix
from apd_lens.host._patch import PatchedForward

# What an adapter calls at each use: intercept(use, x, original, bias) -> y.
#   x         `batch *pos d_in`, or integer rows `batch *pos` for a lookup; heads are flattened into d_in
#   original  computes the host's own y `batch *pos d_out`, bias included
#   bias      what the host adds to x @ W, or None
Intercept = Callable[[Use, Tensor, Callable[[], Tensor], Tensor | None], Tensor]


@runtime_checkable
class Adapter(Protocol):
    """What a host must offer; one instance serves any number of models of that host.

    Register a function `wrap(model) -> TargetModel` with one line in your own pyproject, under the host's top-level
    package name:

        [project.entry-points."apd_lens.adapters"]
        my_host = "my_package:wrap"
    """

    def matrices(self, model: Any) -> Iterable[WeightMatrix]:
        """The matrices that can be decomposed, in the order of the forward pass; tied ones each on its own."""
        ...

    def refused(self, model: Any) -> Mapping[str, str]:
        """Matrices that cannot be decomposed: name -> reason."""
        ...

    def patches(
        self, model: Any, matrices: Iterable[WeightMatrix], intercept: Intercept
    ) -> Iterable[tuple[nn.Module, PatchedForward]]:
        """Which modules' forwards must be patched, and by what, so that each use of `matrices` calls `intercept`.

        Must not change anything by itself. Where `intercept` returns `original()`, the output must be bit for bit
        what it was.
        """
        ...

    def runs_every_use(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
        """Whether a forward with these arguments reaches every use; false where the user asked to stop early."""
        ...
