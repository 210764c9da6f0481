"""What changes of y at every use do to all outputs at once: Jacobian-vector products J u.

Jᵀ v is linear in v, so J u is the gradient of <Jᵀ v, u> with respect to v: a backward pass through the backward pass,
for many u at once. The target runs once, whatever their number. (Forward-mode differentiation took 2.8 times as long on
a small GPT-2: it repeats the pass for every u. It also asks all operations of the host for one more derivative.)
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from apd_lens._memory import fitting, slices
from apd_lens.components._components import ParameterComponents
from apd_lens.components._products import component_outputs
from apd_lens.data._points import Granularity
from apd_lens.passes._watch import Call, WatchedPass


@dataclass(frozen=True, eq=False)
class Pushforward:
    """J of a pass: from changes of y of every call to the change of the output.

    Attributes:
        calls: those that the output depends on.
        v: like the output.
        pulled: Jᵀ v at y of each call, in a graph that leads to v.
    """

    calls: Sequence[Call]
    v: Tensor
    pulled: Sequence[Tensor]

    def __call__(self, tangents: Sequence[Tensor]) -> Float[Tensor, "u examples *pos n_outputs"]:
        """J u for several u, each given at y of every call: `u examples *pos d_out`."""
        (pushed,) = torch.autograd.grad(self.pulled, self.v, tangents, retain_graph=True, is_grads_batched=True)
        return pushed

    def is_whole(self) -> bool:
        """Whether <v, J u> = <Jᵀ v, u> for one u: an operation whose backward leaves no graph would be missing in J u.

        u is Jᵀ v / ‖Jᵀ v‖² at each call, so every call adds 1, give or take a rounding.
        """
        pulled = [at_y.detach() for at_y in self.pulled]
        squares = [at_y.float().square().sum() for at_y in pulled]
        u = [torch.where(square > 0, at_y / square, 0).to(at_y) for at_y, square in zip(pulled, squares, strict=True)]
        came = (self.v.detach() * self([at_y[None] for at_y in u])[0]).float().sum()
        expected = (torch.stack(squares) > 0).sum()
        return bool((came - expected).abs() <= torch.finfo(self.v.dtype).eps ** 0.25 * expected.sqrt())


def _has_functions_of_others(output: Tensor) -> bool:
    """Whether a torch.autograd.Function is behind the output: its backward may leave no graph without an error."""
    todo, seen = [output.grad_fn], set()
    while todo:
        node = todo.pop()
        if node is None or node in seen:
            continue
        if isinstance(node, torch.autograd.function.BackwardCFunction):
            return True
        seen.add(node)
        todo += [before for before, _ in node.next_functions]
    return False


def pushforward(watched: WatchedPass) -> Pushforward | None:
    """J of a pass, which is run again for it; None if an operation of the model cannot be differentiated twice."""
    with sdpa_kernel(SDPBackend.MATH):  # the fused kernels of attention cannot
        again = watched.again(None, slice(None))
    if _has_functions_of_others(again.output):
        return None
    n_examples, *rest = again.output.shape
    device = again.output.device
    drawn = torch.randn(rest, generator=torch.Generator(device).manual_seed(0), device=device, dtype=torch.float32).to(
        again.output
    )
    v = drawn.repeat(n_examples, *[1] * len(rest)).requires_grad_()
    ys = [call.y for call in again.calls]
    try:
        with torch.enable_grad():
            pulled = torch.autograd.grad(again.output, ys, v, create_graph=True, allow_unused=True)
        pairs = [(call, at_y) for call, at_y in zip(again.calls, pulled, strict=True) if at_y is not None]
        if not pairs:
            return None
        J = Pushforward([call for call, _ in pairs], v, [at_y for _, at_y in pairs])
        return J if J.is_whole() else None
    except torch.OutOfMemoryError:
        raise
    except RuntimeError:
        return None


def squared_effects(
    J: Pushforward, watched: WatchedPass, components: ParameterComponents, granularity: Granularity, memory: int
) -> Float[Tensor, "examples *data_pos C"]:
    """Σ_o ( Σ_l Σ_uses <∂f_o/∂y_l , x_l P_c,l> )², pushing x P_c forward for each component (and position)."""
    at_once = fitting(len(watched.output) * watched.bytes_per_example(), memory)
    positions = J.calls[0].y.shape[1:-1] if granularity == "position" else torch.Size()
    places_at_once = min(positions.numel(), at_once)
    like = next(components.parameters())
    shape = len(watched.output), positions.numel(), components.n_components
    squares = torch.empty(shape, dtype=like.dtype, device=watched.output.device)
    for places, chosen in product(
        slices(positions.numel(), places_at_once), slices(components.n_components, at_once // places_at_once)
    ):
        where = places if granularity == "position" else None
        tangents = [
            _written(call, A[chosen], B[chosen], where).to(call.y.dtype)
            for call in J.calls
            for A, B in [components.factors(call.use)]
        ]
        here = squares[:, places, chosen]
        effects = J(tangents).to(squares.dtype).square_().flatten(2).sum(-1)
        here.copy_(rearrange(effects, "(C place) example -> example place C", place=here.shape[1]))
    return squares.view(len(squares), *positions, -1)


def _written(
    call: Call, A: Float[Tensor, "C d_in m"], B: Float[Tensor, "C m d_out"], places: slice | None
) -> Float[Tensor, "jvps examples *pos d_out"]:
    """x P_c of every component; with places, of every component at each of them, and zero at all other positions."""
    if places is None:
        return component_outputs(call.x, A, B).movedim(-2, 0)
    n_examples, *positions, d_out = call.y.shape
    x = call.x.reshape(n_examples, -1, *call.x.shape[call.y.ndim - 1 :])[:, places]
    written = A.new_zeros(len(A), x.shape[1], n_examples, torch.Size(positions).numel(), d_out)
    at_places = written[:, :, :, places].diagonal(dim1=1, dim2=3)
    at_places.copy_(rearrange(component_outputs(x, A, B), "example place C d_out -> C example d_out place"))
    return written.reshape(-1, *call.y.shape)
