"""What a masking trains with the components."""

from collections.abc import Mapping

from torch import Tensor, nn

from apd_lens._block import no_grad


class Learned(nn.Module):
    """A module that says which components are needed, and follows what moves do to them.

    Attributes:
        lr: its learning rate, with the schedule of the components'.
    """

    lr: float

    @property
    def of_components(self) -> list[Tensor]:
        """The parameters with a row for each component."""
        raise NotImplementedError

    def reset(self, component: int) -> None:
        """What is said of one component is as at the start."""
        raise NotImplementedError

    @no_grad()
    def place(self, like: Tensor, state: Mapping[str, Tensor] | None = None) -> None:
        """Gives it these numbers, by default its own, on the device and in the dtype of a factor."""
        numbers = dict(self.named_parameters()) if state is None else state
        self.load_state_dict({name: values.to(like, copy=True) for name, values in numbers.items()}, assign=True)

    @no_grad()
    def copy_to(self, new: int, old: int) -> None:
        """One component is needed where another is."""
        for parameter in self.of_components:
            parameter[new] = parameter[old]

    @no_grad()
    def join(self, larger: int, smaller: int) -> None:
        """One component is needed where either was, and the other as at the start."""
        for parameter in self.of_components:
            parameter[larger] += parameter[smaller]
        self.reset(smaller)
