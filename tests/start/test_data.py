import pytest
import torch
from support.toy_models import TMS, TinyGPT
from torch import Tensor, nn
from torch.testing import assert_close

import apd_lens as apd
from apd_lens.components._components import initial_components
from apd_lens.passes._output import default_output
from apd_lens.passes._replace import Mixture
from apd_lens.passes._watch import replaced_pass
from apd_lens.start import fit_to_data


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def start(model, batches, others=None, *, n_components=8, rank=3, biases=False, **options):
    """Target, fitted components, and the component of each data point."""
    target = apd.wrap(model, biases=biases)
    names = target.match("*")
    components = initial_components([target.weights[name] for name in names], n_components, rank, seeded(), 0.5)
    weights = {name: target.weights[name].value() for name in names}
    output = options.pop("output", default_output)
    found = fit_to_data(target, components, weights, batches, others, output, generator=seeded(), **options)
    return target, components.requires_grad_(False), found


def run(target, components, batch, on, rest=0.0) -> Tensor:
    on = torch.as_tensor(on, dtype=torch.float32)
    return replaced_pass(target, components.names, Mixture(components, on, rest), batch, default_output)[0]


def with_own(found: Tensor, n_components: int) -> Tensor:
    """Component 0 and that of each data point."""
    on = torch.zeros(len(found), n_components)
    on[:, 0], on[torch.arange(len(found)), found] = 1, 1
    return on


class Facts(nn.Module):
    """Inputs in 16 dimensions, through 24 neurons, to 10 logits; with `biases` those of the first layer."""

    def __init__(self, biases: bool = False):
        super().__init__()
        self.up, self.down = nn.Linear(16, 24, bias=biases), nn.Linear(24, 10, bias=False)
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=0.5, generator=seeded(3))

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.relu(self.up(x)))


def data(n: int = 5) -> tuple[Tensor, Tensor]:
    """Target data, and other data in some of the same dimensions."""
    x = torch.randn(40 + n, 16, generator=seeded(1))
    x[n:] *= torch.linspace(0.05, 1.5, 16)
    return x[:n], x[n:]


@pytest.mark.parametrize("biases", [False, True])
def test_one_component_a_data_point_and_one_for_what_they_share(biases: bool):
    x, others = data()
    target, components, found = start(Facts(biases), [x], [others], biases=biases)
    assert found.tolist() == [1, 2, 3, 4, 5]
    expected = target.model(x)
    with_its_own = run(target, components, x, with_own(found, 8))
    assert (with_its_own - expected).norm() < 0.03 * expected.norm()
    for point, component in enumerate(found.tolist()):
        off = torch.ones(5, 8)
        off[:, component] = 0
        change = (run(target, components, x, off, rest=1.0) - expected).norm(dim=1)
        assert change[point] > 30 * change[torch.arange(5) != point].max()


def test_the_metric_of_others_spares_them():
    x, others = data()
    change = []
    for metric in ([others], None):
        target, components, _ = start(Facts(), [x], metric)
        off = torch.zeros(40, 8)
        change.append((run(target, components, others, off, rest=1.0) - target.model(others)).norm().item())
    assert change[0] < 0.7 * change[1]


def test_without_others_changes_of_low_rank_are_found():
    """W = Σ a_k b_k, each a_k for one data point, with a part that none of them sees: no other metric can say it."""
    x, _ = data()
    a = torch.linalg.pinv(x).mT + 0.3 * torch.linalg.svd(x)[2][5:10]
    b = torch.randn(5, 10, generator=seeded(4))
    model = nn.Linear(16, 10, bias=False).requires_grad_(False)
    model.weight.copy_(b.mT @ a)
    cosines = []
    for others in (None, [torch.eye(16)]):
        target, components, found = start(model, [x], others, n_components=6, rank=1)
        ((name, W),) = ((name, target.weights[name].value()) for name in components.names)
        parts = components.component_weights(name)
        changes = torch.einsum("ki,ko->kio", a, b)
        cosines.append(torch.cosine_similarity(parts[found].flatten(1), changes.flatten(1)).mean().item())
        if others is None:
            assert (parts.sum(0) - W).norm() < 0.1 * W.norm()
    assert cosines[0] > 0.95
    assert cosines[1] < 0.9


def test_spare_components_and_ranks_are_tiny_but_can_grow():
    _, components, _ = start(Facts(), [data()[0]])
    for name in components.names:
        A, B = components.A[name], components.B[name]
        for sizes in (A.norm(dim=1), B.norm(dim=2)):  # C m
            assert sizes.min() > 0
            assert sizes[6:].max() < 0.1 * sizes[:6, 0].min()
            assert sizes[1:6, 1:].max() < 0.1 * sizes[:6, 0].min()


@pytest.mark.parametrize("granularity", ["example", "position"])
def test_more_data_points_than_components_are_grouped(granularity):
    kinds, _ = data(4)
    x = (kinds[:, None] + 0.1 * torch.randn(4, 6, 16, generator=seeded(2))).flatten(0, 1)
    batches = [x[:10], x[10:]] if granularity == "example" else [x.reshape(4, 6, 16)]
    _, _, found = start(Facts(), batches, n_components=20, granularity=granularity)
    assert found.equal(1 + torch.arange(4).repeat_interleave(6))


def test_positions_as_data_points():
    x, others = data(6)
    _, _, of_examples = start(Facts(), [x], [others])
    target, components, of_positions = start(
        Facts(), [x.unflatten(0, (2, 3))], [others.unflatten(0, (8, 5))], granularity="position"
    )
    assert of_positions.tolist() == of_examples.tolist() == [1, 2, 3, 4, 5, 6]
    expected = target.model(x)
    with_its_own = run(target, components, x.unflatten(0, (2, 3)), with_own(of_positions, 8).unflatten(0, (2, 3)))
    assert (with_its_own.flatten(0, 1) - expected).norm() < 0.05 * expected.norm()


def test_rows_that_only_one_looks_up_are_its_own():
    model = nn.Sequential(nn.Embedding(9, 5), nn.Flatten(), nn.Linear(15, 4)).requires_grad_(False)
    tokens = torch.tensor([[0, 3, 1], [0, 4, 1], [0, 5, 6]])
    target, components, _ = start(model, [tokens], n_components=5, rank=5)
    W, parts = model[0].weight, components.component_weights("0.weight")
    for component, looked_up in enumerate([[0, 1], [3], [4], [5, 6]]):
        expected = torch.zeros(9, 5)
        expected[looked_up] = W[looked_up]
        assert_close(parts[component], expected, atol=1e-2, rtol=0)
    assert target.weights.keys() == set(components.names)


def test_a_matrix_used_from_both_sides_is_fitted_from_the_longer_one():
    model = TMS(8, 3).requires_grad_(False)
    (name,) = apd.wrap(model).match("*")
    _, components, found = start(model, [torch.eye(8)[:4]], [torch.eye(8)[4:]], n_components=6, rank=1)
    W, parts = apd.wrap(model).weights[name].value(), components.component_weights(name)
    assert (parts[:, 4:].norm() / W.norm()).item() < 1e-3
    for feature, component in enumerate(found.tolist()):
        less_shared = torch.where(torch.arange(4) == feature, 0.75, -0.25)[:, None] * W[:4]
        assert torch.cosine_similarity(parts[component, :4].flatten(), (less_shared).flatten(), 0) > 0.4


def test_a_matrix_that_is_only_transposed():
    x, others = data()
    plain, turned = Facts(), Facts()

    class Turned(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = turned

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x)

    first = start(plain, [x], [others])[1].component_weights("up.weight")
    again = start(Turned(), [x], [others])[1].component_weights("inner.up.weight")
    assert_close(first, again)


def test_tokens_of_several_lengths():
    tokens = [torch.randint(11, (3, length), generator=seeded(length)) for length in (4, 6)]
    _, components, found = start(TinyGPT(), tokens, [torch.randint(11, (8, 5), generator=seeded())])
    assert found.tolist() == [1, 2, 3, 4, 5, 6]
    assert all(factor.isfinite().all() for factor in components.parameters())


def test_with_kl_an_output_that_has_no_probability_does_not_count():
    x, others = data()

    def output(y: Tensor) -> Tensor:
        return torch.cat([y[:, :5], y[:, 5:] - 50], 1)

    model, blind = Facts(), Facts()
    with torch.no_grad():
        blind.down.weight[5:] = 0
    first, again = (start(m, [x], [others], output=output, distance="kl")[1] for m in (model, blind))
    assert_close(first.component_weights("up.weight"), again.component_weights("up.weight"), atol=1e-4, rtol=1e-3)


def test_the_same_generator_gives_the_same_start():
    first, again = (start(Facts(), [data()[0]], distance="kl")[1] for _ in range(2))
    assert all(a.equal(b) for a, b in zip(first.parameters(), again.parameters(), strict=True))


def test_one_component_is_too_few():
    with pytest.raises(apd.errors.InvalidSetting, match="n_components=1"):
        start(Facts(), [data()[0]], n_components=1)


def test_batches_that_are_none():
    with pytest.raises(apd.errors.InvalidBatches, match="empty"):
        start(Facts(), [])
    with pytest.raises(apd.errors.InvalidBatches, match="empty"):
        start(Facts(), [data()[0]], [])


def test_where_no_gradient_tells_what_matters_the_size_of_what_is_written_does():
    """Of a model that is saturated on all the data."""
    x, model = torch.eye(4), nn.Sequential(nn.Linear(4, 4, bias=False), nn.Hardtanh(0, 1)).requires_grad_(False)
    model[0].weight.data = 4 * torch.eye(4) - 0.1 - torch.rand(4, 4, generator=seeded())
    optimization = apd.Optimization(steps=0)
    with pytest.warns(apd.errors.ApdWarning, match="the gradient of the output is zero at every decomposed matrix"):
        decomposition = apd.decompose(model, [x], n_components=6, optimization=optimization, progress=False)
    assert decomposition.settings.optimization.start == "data"
    written = x @ decomposition.components.component_weights("0.weight")[1:5]
    own = model[0](x) - model[0](x).mean(0)  # component 0 has the mean
    for point in range(4):
        assert_close(written[point], torch.diag(x[point]) @ own, rtol=0.02, atol=0.02)


def test_gradients_that_are_nan():
    with pytest.raises(apd.NonFinite, match=r"down\.weight|up\.weight"):
        start(Facts(), [data()[0]], output=lambda y: (y - y.detach()).sqrt())
