"""What others add without touching the package: an attribution, a selection, a masking, moves and a host."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import pytest
import torch
from support.toy_models import ResidualMLP
from torch import Tensor, nn
from torch.testing import assert_close

import apd_lens as apd
from apd_lens.components import component_outputs
from apd_lens.host import Adapter, Intercept, TargetModel, Use, WeightMatrix
from apd_lens.masks import Masks
from apd_lens.moves import MoveContext

OPTIONS = {"n_components": 5, "rank": 2, "progress": False, "optimization": apd.Optimization(steps=6, lr=1e-2)}


@apd.saved
@dataclass(frozen=True)
class WriteNorm:
    """Σ_l ‖x_l P_c,l‖: how much a component writes, whatever comes of it."""

    def __call__(self, watched, components, granularity, generator=None) -> Tensor:
        norms = [component_outputs(call.x, *components.factors(call.use)).norm(dim=-1) for call in watched.calls]
        return torch.stack(norms).sum(0).detach()


@apd.saved
@dataclass(frozen=True)
class AboveHalf:
    """Active is what has more than half of the data point's largest attribution."""

    granularity: str = "example"

    def __call__(self, attributions: Tensor, valid: Tensor | None = None) -> Tensor:
        return attributions > 0.5 * attributions.amax(-1, keepdim=True)

    def at(self, progress: float, batch: Any) -> "AboveHalf":
        return self

    def after(self, minimality: Tensor, progress: float, steps: int) -> "AboveHalf":
        return self

    def with_k(self, k: Any) -> apd.BatchTopK:
        return apd.BatchTopK(k)

    def check(self, n_components: int) -> None: ...

    def n_active(self, n_data_points: int) -> None: ...


@apd.saved
@dataclass(frozen=True)
class FirstHalf:
    """A masking that looks at nothing: the first half of the components is active."""

    attribution: WriteNorm = WriteNorm()
    selection: AboveHalf = AboveHalf()
    says_what_is_active: ClassVar[bool] = True
    needs_gradients: ClassVar[bool] = True
    runs_sparse_passes: ClassVar[bool] = True

    def check(self, n_components: int, losses: apd.Losses) -> None: ...

    def learned(self, components, uses, generator) -> None: ...

    def after(self, minimality: Tensor, progress: float, steps: int) -> "FirstHalf":
        return self

    def masks(self, watched, components, progress, scale, generator=None) -> Masks:
        attributions = self.attribution(watched, components, "example")
        active = torch.zeros_like(attributions, dtype=torch.bool)
        active[:, : components.n_components // 2] = True
        return Masks(attributions, active, active)


@apd.saved
@dataclass(frozen=True)
class Shrink:
    """Moves that halve the component with the smallest attributions."""

    every: int = 2
    until: float = 1.0

    needs_active: ClassVar[bool] = False
    has_start: ClassVar[bool] = True

    def start(self, components: apd.ParameterComponents, weights: Mapping[str, Tensor]) -> None:
        with torch.no_grad():
            for name in components.names:
                components.A[name][0] = 0.0

    def __call__(self, context: MoveContext) -> int:
        smallest = int(context.attributions.sum(0).argmin())
        with torch.no_grad():
            for name in context.components.names:
                context.components.A[name][smallest] *= 0.5
        return 1


@pytest.mark.parametrize(
    "own",
    [
        {"attribution": WriteNorm()},
        {"selection": AboveHalf()},
        {"masks": FirstHalf()},
        {"moves": Shrink(), "selection": apd.TopK(2)},
    ],
    ids=["attribution", "selection", "masking", "moves"],
)
def test_own_settings_train_select_save_and_load(own: dict[str, Any], tmp_path):
    model, x = ResidualMLP(4, 6, 5, 1), torch.randn(8, 4)
    made = []
    decomposition = apd.decompose(model, [x], **own, **OPTIONS, on_step=lambda step, info: made.append(info.moves))
    assert sum(made) == (2 if "moves" in own else 0)  # after steps 2 and 4 of 6
    decomposition.save(tmp_path / "saved")
    loaded = apd.load(tmp_path / "saved", model)
    assert loaded.settings == decomposition.settings
    assert torch.equal(loaded.select(x), decomposition.select(x))
    if "attribution" in own:
        with torch.no_grad():
            written = sum(
                component_outputs(inputs, decomposition.components.A[name], decomposition.components.B[name]).norm(
                    dim=-1
                )
                for name, inputs in inputs_of(model, x).items()
            )
        assert_close(decomposition.attributions(x), written)


def inputs_of(model: ResidualMLP, x: Tensor) -> dict[str, Tensor]:
    """What each matrix of a one-layer residual MLP reads, by hand."""
    r = model.W_E(x)
    hidden = torch.relu(model.layers[0]["mlp_in"](r))
    return {
        "W_E.weight": x,
        "layers.0.mlp_in.weight": r,
        "layers.0.mlp_out.weight": hidden,
        "W_U.weight": r + model.layers[0]["mlp_out"](hidden),
    }


def test_a_start_of_moves_is_made():
    state = apd.init(nn.Linear(4, 3), n_components=5, rank=2, moves=Shrink(), selection=apd.TopK(1))
    assert (state.components.A["weight"][0] == 0).all()


class Outer(nn.Module):
    """A host that no adapter of ours knows: it multiplies by a bare parameter, of which it keeps the transpose."""

    def __init__(self):
        super().__init__()
        self.kernel = nn.Parameter(torch.randn(3, 4))

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x @ self.kernel.T)


class OuterAdapter:
    def matrices(self, model: nn.Module) -> Iterator[WeightMatrix]:
        yield WeightMatrix("kernel", model, "kernel", "d_out d_in -> d_in d_out", (Use("kernel", ""),), ("kernel",))

    def refused(self, model: nn.Module) -> dict[str, str]:
        return {}

    def patches(
        self, model: nn.Module, matrices, intercept: Intercept
    ) -> Iterator[tuple[nn.Module, Callable[..., Any]]]:
        for matrix in matrices:
            yield model, partial(self._forward, matrix.uses[0], intercept)

    def runs_every_use(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
        return True

    @staticmethod
    def _forward(use: Use, intercept: Intercept, model: Outer, original: Callable[..., Tensor], x: Tensor) -> Tensor:
        return torch.tanh(intercept(use, x, lambda: x @ model.kernel.T, None))


def test_a_host_of_ones_own():
    """Ablating equals substituted weights; the model is as it was."""
    assert isinstance(OuterAdapter(), Adapter)
    model, x = Outer(), torch.randn(5, 4)
    before = model(x)
    decomposition = apd.decompose(TargetModel(model, OuterAdapter()), [x], selection=apd.TopK(2), **OPTIONS)
    with torch.no_grad(), decomposition.ablate([1]):
        ablated = model(x)
    weight = model.kernel.T - decomposition.components.component_weights("kernel")[1]
    assert_close(ablated, torch.tanh(x @ weight))
    assert torch.equal(model(x), before)
