"""Attributions on models whose answer is known by hand, or by brute force."""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from support.toy_models import TMS, Mixing, ResidualMLP, TinyGPT, decomposition_of, known, tiny_llama
from torch import Tensor
from torch.testing import assert_close

import apd_lens as apd
from apd_lens.attribution._effects import _OneMap as one_map
from apd_lens.attribution._effects import component_effects
from apd_lens.attribution._linearity import Readout, Stage, find_readout, in_front_of_nonlinearity, readout_of_graph
from apd_lens.attribution._pullback import jacobians_in_parts
from apd_lens.decomposition._decomposition import Decomposition
from apd_lens.masks._error import AttributionError
from apd_lens.passes._cotangents import one_hot_cotangents
from apd_lens.passes._watch import WatchedPass, watched_pass

# Of an example, so that vector-Jacobian products are the fewer.
MORE_THAN_OUTPUTS = 45


def test_known_parts_have_known_attributions():
    """∂y_o/∂y = 1, so A_c(x) = sqrt(mean_o (scale_c x_c [o = c])²) = scale_c |x_c| / 2 with four outputs."""
    x = torch.tensor([[1.0, -1.0, 0.0, 0.5], [0.0, 0.0, 2.0, 1.0]])
    expected = torch.tensor([[0.5, 1.0, 0.0, 1.0], [0.0, 0.0, 3.0, 2.0]])
    assert_close(known().attributions(x), expected)


def test_known_parts_have_the_right_top_component_and_are_faithful():
    decomposition = known()
    x = torch.eye(4)
    assert torch.equal(decomposition.select(x), torch.eye(4, dtype=torch.bool))
    assert decomposition.residuals() == {"weight": 0.0, "all": 0.0}
    weight = decomposition.target.weights["weight"].value()
    assert apd.faithfulness_loss(weight, decomposition.components.summed("weight")) == 0
    with decomposition.sparse(decomposition.select(x)):
        assert_close(decomposition.target.model(x), torch.diag(torch.tensor([1.0, 2.0, 3.0, 4.0])))
    assert torch.equal(decomposition.select(x[:1], k=3).sum(-1), torch.tensor([3]))


def test_signed_attributions_to_a_metric():
    """y_0 − y_3 = x_0 − 4 x_3."""
    x = torch.tensor([[1.0, 1.0, 1.0, 1.0], [2.0, 0.0, 0.0, -1.0]])
    signed = known().attributions(x, metric=lambda y: y[:, 0] - y[:, 3])
    assert_close(signed, torch.tensor([[1.0, 0.0, 0.0, -4.0], [2.0, 0.0, 0.0, 4.0]]))


def test_a_metric_that_is_no_scalar_an_example_is_refused():
    with pytest.raises(apd.ShapeMismatch, match=r"one scalar an example, shape \(2,\), got \(\)"):
        known().attributions(torch.ones(2, 4), metric=lambda y: y.sum())


@pytest.mark.parametrize("method", [apd.GradientAttribution(), apd.ActivationAttribution()])
def test_reordering_components_reorders_results(method):
    model, x, order = ResidualMLP(4, 6, 5, 1), torch.randn(3, 4), torch.tensor([3, 0, 4, 1, 2])
    state = apd.init(model, n_components=5, rank=2, attribution=method, selection=apd.BatchTopK(2.0))
    decomposition, components = state.decomposition(), state.components
    reordered = Decomposition(
        decomposition.target,
        apd.ParameterComponents(
            {name: A[order] for name, A in components.A.items()}, {name: B[order] for name, B in components.B.items()}
        ),
        decomposition.settings,
        decomposition.output,
        decomposition.fingerprints,
    )
    assert_close(reordered.attributions(x), decomposition.attributions(x)[:, order])
    assert torch.equal(reordered.select(x), decomposition.select(x)[:, order])
    with decomposition.sparse(decomposition.select(x)):
        expected = model(x)
    with reordered.sparse(reordered.select(x)):
        assert_close(model(x), expected)


def by_brute_force(decomposition: Decomposition, x: Tensor) -> Tensor:
    """One backward pass an output, and x P_c of every component and example."""
    components, granularity = decomposition.components, decomposition.settings.selection.granularity
    watched = watched_pass(decomposition.target, components.names, x, decomposition.output)
    total = 0.0
    for index in torch.cartesian_prod(*(torch.arange(size) for size in watched.output.shape[1:])).view(
        -1, watched.output.ndim - 1
    ):
        output = watched.output[(slice(None), *index)].sum()
        effect = 0.0
        for call in watched.calls:
            (gradient,) = torch.autograd.grad(output, call.y, retain_graph=True, allow_unused=True)
            if gradient is not None:
                here = (
                    gradient[..., None, :] * apd.components.component_outputs(call.x, *components.factors(call.use))
                ).sum(-1)
                effect = effect + (
                    here.reshape(len(x), -1, here.shape[-1]).sum(1) if granularity == "example" else here
                )
        total = total + effect.square()
    return (total / watched.output[0].numel()).sqrt().detach()


class TwoMatrices(torch.nn.Module):
    """No residual stream, linear at the end: x of `write` is all through which `read` reaches the output."""

    def __init__(self):
        super().__init__()
        self.read, self.write = torch.nn.Linear(5, 4), torch.nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.write(torch.relu(self.read(x)))


class Branches(torch.nn.Module):
    """What `aside` writes reaches the output through 3 neurons, and by another way, which is not linear."""

    def __init__(self):
        super().__init__()
        self.aside, self.read, self.write = torch.nn.Linear(5, 6), torch.nn.Linear(6, 3), torch.nn.Linear(3, 6)

    def forward(self, x: Tensor) -> Tensor:
        r = self.aside(x)
        return self.write(torch.relu(self.read(r))) + torch.sin(r)


def of_shared(shared: list[int], others: Sequence[int] = (), start: int | None = None) -> Readout:
    """Calls whose gradient is the same for all examples, and the others, all of which come through one place."""
    return Readout({call: {} for call in shared}, (Stage(tuple(others), start),) if others else ())


def models() -> dict[str, tuple[torch.nn.Module, Tensor, str, Readout]]:
    """Model, batch, weights, and what its readout is."""
    tms = TMS(7, 3)
    torch.nn.init.normal_(tms.linear1.weight)
    return {
        "one matrix": (torch.nn.Linear(5, 3), torch.randn(6, 5), "*", of_shared([0])),
        "two matrices": (TwoMatrices(), torch.randn(6, 5), "*", of_shared([1], [0], 1)),
        "residual MLP": (ResidualMLP(7, 6, 5, 1), torch.randn(6, 7), "layers.*", of_shared([1], [0], 1)),
        "two layers": (
            ResidualMLP(7, 6, 5, 2),
            torch.randn(6, 7),
            "layers.*",
            of_shared([3], [0, 1, 2], 4),  # x of W_U
        ),
        "three layers": (
            ResidualMLP(7, 6, 5, 3),
            torch.randn(6, 7),
            "layers.*",
            of_shared([5], [0, 1, 2, 3, 4], 6),  # x of W_U
        ),
        "branches": (Branches(), torch.randn(8, 5), "*", of_shared([2], [0, 1])),
        "nothing linear": (tms, torch.randn(6, 7), "*", of_shared([], [0, 1])),
        "positions": (Mixing(), torch.randn(3, 4, 3), "*", of_shared([1], [0], 1)),
        "positions, then gelu": (
            torch.nn.Sequential(Mixing(), torch.nn.GELU()),
            torch.randn(3, 4, 3),
            "*",
            of_shared([], [0, 1]),
        ),
        "tokens": (TinyGPT(), torch.randint(11, (3, 4)), "*", of_shared([3, 4], [0, 1, 2], 4)),  # x of W_U
    }


@pytest.mark.parametrize("granularity", ["example", "position"])
@pytest.mark.parametrize("name", models())
def test_readouts_are_found_and_change_nothing(name, granularity):
    model, x, weights, expected = models()[name]
    decomposition = decomposition_of(
        model, weights, n_components=MORE_THAN_OUTPUTS, selection=apd.TopK(1, granularity=granularity)
    )
    watched = watched_pass(decomposition.target, decomposition.components.names, x, decomposition.output)
    assert readout_of_graph(watched, watched.output) == find_readout(watched, watched.output) == expected
    assert_close(decomposition.attributions(x), by_brute_force(decomposition, x), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("per_inner", [-math.inf, math.inf], ids=["one by one", "as one map"])
@pytest.mark.parametrize("name", ["two matrices", "residual MLP", "two layers", "nothing linear", "positions"])
def test_gradients_that_all_examples_share_are_multiplied_either_way(name, per_inner, monkeypatch):
    monkeypatch.setattr("apd_lens.attribution._effects._PER_INNER", per_inner)
    model, x, weights, _ = models()[name]
    decomposition = decomposition_of(model, weights, n_components=MORE_THAN_OUTPUTS, selection=apd.TopK(1))
    made = []
    monkeypatch.setattr("apd_lens.attribution._effects._OneMap", lambda *args: made.append(args) or one_map(*args))
    assert_close(decomposition.attributions(x), by_brute_force(decomposition, x), rtol=1e-4, atol=1e-6)
    assert bool(made) == (per_inner > 0 and name != "positions")


def watched_of(model: torch.nn.Module, x: Tensor, weights: str = "*") -> WatchedPass:
    target = apd.wrap(model)
    return watched_pass(target, target.match(weights), x, lambda output: output)


def test_what_is_read_through_few_neurons_is_pulled_back_from_there():
    """r of the first layer goes to the readout, and to the 5 neurons of the second."""
    model = ResidualMLP(7, 12, 5, 2)
    watched = watched_of(model, torch.randn(10, 7), "layers.*")
    found = find_readout(watched, watched.output)
    assert [(stage.calls, stage.start, set(stage.maps)) for stage in found.stages] == [((2,), 3, set()), ((0,), 1, {2})]
    assert {call: set(maps) for call, maps in found.affine.items()} == {1: {2}, 3: set()}
    assert_close(found.affine[1][2], model.layers[1]["mlp_in"].weight)
    first_out, second_in = model.layers[0]["mlp_out"].weight, model.layers[1]["mlp_in"].weight
    assert_close(found.stages[1].maps[2], second_in @ first_out)


@pytest.mark.parametrize(("d_embed", "n_examples"), [(9, 10), (12, 9)])
def test_what_is_not_much_narrower_than_the_stream_or_the_batch_is_not_gone_through(d_embed: int, n_examples: int):
    watched = watched_of(ResidualMLP(7, d_embed, 5, 2), torch.randn(n_examples, 7), "layers.*")
    assert find_readout(watched, watched.output) == of_shared([3], [0, 1, 2], 4)


def test_of_three_layers_each_is_pulled_back_from_the_neurons_that_read_it():
    model = ResidualMLP(7, 12, 5, 3)
    watched = watched_of(model, torch.randn(10, 7), "layers.*")
    found = find_readout(watched, watched.output)
    assert {call: set(maps) for call, maps in found.affine.items()} == {1: {2, 4}, 3: {4}, 5: set()}
    assert [(stage.calls, stage.start, set(stage.maps)) for stage in found.stages] == [
        ((4,), 5, set()), ((2,), 3, {4}), ((0,), 1, {2, 4}),
    ]  # fmt: skip
    # Straight from one layer to the last, and not through the one between.
    assert_close(found.affine[1][4], model.layers[2]["mlp_in"].weight)


def test_where_not_all_comes_through_known_places_all_comes_from_the_output():
    watched = watched_of(Branches(), torch.randn(8, 5))
    assert find_readout(watched, watched.output) == of_shared([2], [0, 1])


def by_autograd(watched: WatchedPass) -> list[Tensor]:
    """∂f_o/∂y of every call, an output at a time."""
    rows = [torch.autograd.grad(column.sum(), [call.y for call in watched.calls], retain_graph=True, allow_unused=True)
            for column in watched.output.flatten(1).mT]  # fmt: skip
    return [torch.stack(gradients) for gradients in zip(*rows, strict=True)]


@pytest.mark.parametrize("memory", [1, 5000, 2**29])
@pytest.mark.parametrize("n_layers", [2, 4])
def test_gradients_through_few_neurons_add_up(n_layers: int, memory: int):
    watched = watched_of(ResidualMLP(7, 12, 5, n_layers), torch.randn(10, 7), "layers.*")
    assert len(find_readout(watched, watched.output).stages) == n_layers
    assert_same_gradients(watched, memory)


@pytest.mark.parametrize("memory", [1, 5000, 2**29])
@pytest.mark.parametrize("name", ["two layers", "three layers", "branches", "nothing linear", "positions, then gelu"])
def test_gradients_in_parts_add_up(name: str, memory: int):
    model, x, weights, _ = models()[name]
    assert_same_gradients(watched_of(model, x, weights), memory)


def assert_same_gradients(watched: WatchedPass, memory: int):
    expected, calls = by_autograd(watched), range(len(watched.calls))
    found: list[list[Tensor]] = [[] for _ in calls]
    for part, chunks in jacobians_in_parts(watched, one_hot_cotangents(watched.output), memory):
        whole = [jacobians.as_whole() for jacobians in chunks]
        for call in calls:
            of_part = torch.cat([gradients[call] for gradients in whole])
            found[call].append(of_part.expand(-1, len(part.output), *of_part.shape[2:]))
    for call in calls:
        assert_close(torch.cat(found[call], 1), expected[call], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    "nonlinearity",
    [torch.relu, torch.tanh, torch.sigmoid, torch.exp, F.gelu, F.silu, F.softplus, F.elu, F.leaky_relu, F.hardtanh],
)
def test_slopes_of_the_last_nonlinearity(nonlinearity: Callable[[Tensor], Tensor]):
    z = torch.randn(5, 2, 3, requires_grad=True)
    found = in_front_of_nonlinearity(nonlinearity(z.clone()))
    assert found is not None
    expected = torch.autograd.functional.jacobian(nonlinearity, z.flatten()).diagonal()
    assert_close(found[1], expected.view(5, 6).mT)


@pytest.mark.parametrize(
    "last", [lambda z: z.softmax(-1), lambda z: z.cumsum(-1), lambda z: z @ z.mT, lambda z: z * z, lambda z: z.detach()]
)
def test_what_is_not_elementwise_in_one_tensor_has_no_slopes(last: Callable[[Tensor], Tensor]):
    assert in_front_of_nonlinearity(last(torch.randn(5, 3, requires_grad=True).clone())) is None


def attributing(decomposition: Decomposition, **changes) -> Decomposition:
    """The same, with other gradient attributions."""
    attribution = replace(decomposition.settings.attribution, **changes)
    return replace(decomposition, settings=replace(decomposition.settings, attribution=attribution))


@pytest.mark.parametrize("granularity", ["example", "position"])
@pytest.mark.parametrize("memory", [1, 500, 5000])
@pytest.mark.parametrize("projections", ["exact", 4])
@pytest.mark.parametrize("name", models())
def test_chunks_change_nothing(name, projections, memory, granularity):
    model, x, weights, _ = models()[name]
    decomposition = attributing(
        decomposition_of(
            model, weights, n_components=MORE_THAN_OUTPUTS, selection=apd.TopK(1, granularity=granularity)
        ),
        projections=projections,
    )
    chunked = attributing(decomposition, memory=memory)
    assert_close(chunked.attributions(x), decomposition.attributions(x), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", ["rademacher", pytest.param("normal", marks=pytest.mark.thorough)])
def test_estimates_are_unbiased_and_better_with_more_projections(kind):
    """Squares, averaged over 150 independent estimates: within 4 standard errors; the spread falls as 1 / √K."""
    decomposition, x = decomposition_of(TMS(7, 3)), torch.rand(6, 7)
    exact = attributing(decomposition, projections="exact").attributions(x)
    watched = watched_pass(decomposition.target, decomposition.components.names, x, decomposition.output)
    generator, spread = torch.Generator().manual_seed(0), {}
    for K in (2, 32):
        estimate = apd.GradientAttribution(K, kind, memory=2**20)
        squares = torch.stack(
            [
                estimate(watched.again(None, slice(None)), decomposition.components, "example", generator).square()
                for _ in range(150)
            ]
        )
        standard_error = squares.std(0) / 150**0.5
        assert ((squares.mean(0) - exact.square()).abs() <= 4 * standard_error + 1e-9).all()
        spread[K] = squares.std(0).mean()
    assert_close(spread[2] / spread[32], torch.tensor(4.0), rtol=0.2, atol=0)


def test_many_outputs_are_estimated_and_few_are_exact():
    few, many = (torch.zeros(2, 8, n_outputs) for n_outputs in (16, 17))
    assert apd.GradientAttribution().cotangents(few).count == 8 * 16
    assert apd.GradientAttribution().cotangents(many).count == 8
    assert apd.GradientAttribution("exact").cotangents(many).count == 8 * 17
    assert apd.GradientAttribution(3).cotangents(few).count == 3


def test_the_error_of_estimates_is_reported():
    decomposition, x = decomposition_of(TMS(40, 10), n_components=20), torch.rand(64, 40)
    errors = {K: attributing(decomposition, projections=K).attribution_error(x) for K in (4, 64)}
    exact = attributing(decomposition, projections="exact")
    true = {}
    for K in errors:
        estimate, mask = attributing(decomposition, projections=K).attributions(x), exact.select(x)
        true[K] = (estimate / exact.attributions(x) - 1).abs()[mask].median().item()
        assert 0.3 * errors[K].relative < true[K] < 1.5 * errors[K].relative  # the median error is 0.67 standard errors
    assert errors[64].relative < errors[4].relative / 3
    assert 2 / 20 < errors[4].agreement < errors[64].agreement < 1
    assert exact.attribution_error(x) == AttributionError(0.0, 1.0)
    with pytest.raises(apd.errors.InvalidSetting, match="at least 2"):
        attributing(decomposition, projections=1).attribution_error(x)


@pytest.mark.parametrize("attribution", [apd.GradientAttribution(3), apd.GradientAttribution(memory=1)])
def test_the_same_batch_again_after_its_graph_was_used_up(attribution):
    state, x = apd.init(TMS(7, 3), n_components=5, attribution=attribution), torch.rand(6, 7)
    for _ in range(3):
        state, info = apd.step(state, x)
    assert info.loss.isfinite()


def test_parts_of_a_batch_are_attributed_in_eval_mode():
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Dropout(0.5), torch.nn.Linear(4, 4)).train()
    decomposition, x = attributing(decomposition_of(model), memory=1), torch.randn(3, 4)
    assert torch.equal(decomposition.attributions(x), decomposition.attributions(x))
    assert model.training


@pytest.mark.parametrize("granularity", ["example", "position"])
def test_both_orders_of_multiplication_agree(granularity):
    """One output or rank one takes another path than several outputs with a higher rank."""
    jacobian, inner, B = torch.randn(3, 2, 4, 5), torch.randn(2, 4, 7, 2), torch.randn(7, 2, 5)
    together = component_effects(jacobian, inner, B, granularity)
    for out in range(3):
        alone = component_effects(jacobian[out : out + 1], inner, B, granularity)
        assert_close(together[out : out + 1], alone, rtol=1e-4, atol=1e-5)
    parts = sum(component_effects(jacobian, inner[..., [m]], B[:, [m]], granularity) for m in range(2))
    assert_close(together, parts, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("component", [0, 1])
def test_attributions_of_positions_equal_finite_differences(component: int):
    """∂f/∂ε where component c is scaled by 1 + ε at one position, with components that sum to the weights."""
    model = Mixing().double()
    read, write = model.read.weight.detach().T, model.write.weight.detach().T
    part = torch.rand(3, 4, dtype=torch.float64)
    A = {"read.weight": torch.eye(3).double().expand(2, 3, 3), "write.weight": write[None].repeat(2, 1, 1) / 2}
    B = {"read.weight": torch.stack([part, read - part]), "write.weight": torch.eye(2).double().expand(2, 2, 2)}
    start = decomposition_of(model, n_components=2, selection=apd.TopK(1, granularity="position"))
    decomposition = Decomposition(
        start.target, apd.ParameterComponents(A, B), start.settings, start.output, start.fingerprints
    )
    x, step = torch.randn(2, 5, 3, dtype=torch.float64), 1e-5
    attributions = decomposition.attributions(x)
    assert attributions.shape == (2, 5, 2)
    for position in range(5):
        outputs = []
        for sign in (1, -1):
            mask = torch.ones(2, 5, 2, dtype=torch.float64)
            mask[:, position, component] += sign * step
            with decomposition.sparse(mask):
                outputs.append(model(x).detach())
        derivative = ((outputs[0] - outputs[1]) / (2 * step)).flatten(1)
        expected = derivative.square().mean(1).sqrt()
        assert_close(attributions[:, position, component], expected, rtol=1e-6, atol=1e-8)


def test_matrices_on_different_positions_cannot_share_position_attributions():
    class Pooling(Mixing):
        def forward(self, x: Tensor) -> Tensor:
            return self.write(torch.tanh(self.read(x)).sum(1))

    decomposition = decomposition_of(Pooling(), selection=apd.TopK(1, granularity="position"))
    with pytest.raises(apd.ShapeMismatch, match=r"write\.weight was used on \(2,\)|\(2, 5\)"):
        decomposition.attributions(torch.randn(2, 5, 3))


def test_an_output_that_no_matrix_reaches_is_reported():
    model = torch.nn.ModuleDict({"linear": torch.nn.Linear(2, 2)})
    model.forward = lambda x: (model["linear"](x), x * model["linear"].bias)
    decomposition = decomposition_of(model, output=lambda pair: pair[1])
    with pytest.raises(apd.ShapeMismatch, match="does not depend on any of the decomposed matrices"):
        decomposition.attributions(torch.ones(1, 2))


def test_attributions_leave_no_graph_and_work_without_gradients():
    decomposition, x = known(), torch.randn(2, 4)
    expected = decomposition.attributions(x)
    assert not expected.requires_grad
    with torch.no_grad():
        assert torch.equal(decomposition.attributions(x), expected)
    with torch.inference_mode():
        assert torch.equal(decomposition.attributions(x), expected)
        assert torch.equal(decomposition.attributions(x + 0), expected)  # a tensor of inference mode


def test_dropout_is_off_during_attributions_and_back_after():
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Dropout(0.5), torch.nn.BatchNorm1d(4)).train()
    model[2].eval()
    decomposition, x = decomposition_of(model), torch.randn(3, 4)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    assert torch.equal(decomposition.attributions(x), decomposition.attributions(x))
    assert [module.training for module in model] == [True, True, False]
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("distance", ["mse", "kl"])
@pytest.mark.parametrize("vocabulary", [13, 2048])  # of so many outputs the unembedding is sketched
def test_weights_of_the_model_that_have_gradients_change_nothing_in_parts(distance: str, vocabulary: int):
    """What comes before the decomposed matrices is kept for later passes, and has no gradient there."""
    x, found = torch.randint(vocabulary, (6, 5)), []
    for with_gradients, memory in ((False, 2**29), (True, 2**29), (True, 2000)):
        torch.manual_seed(0)
        model = tiny_llama(vocab_size=vocabulary, num_hidden_layers=3).requires_grad_(with_gradients)
        options = {"losses": apd.Losses(distance=distance), "attribution": apd.GradientAttribution(8, memory=memory)}
        decomposition = apd.init(model, weights="model.layers.2.*_proj*", n_components=10, rank=2, **options)
        found.append(decomposition.decomposition().attributions(x))
    for came in found[1:]:
        assert_close(came, found[0], rtol=1e-4, atol=1e-6)
