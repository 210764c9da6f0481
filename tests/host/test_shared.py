"""Uses of a matrix on what all examples share, also where its first axis is as long as the batch.

Expected values come from copies with substituted weights, which run each example alone.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass

import pytest
import torch
from support.random_models import Substituted
from torch import Tensor, nn
from torch.testing import assert_close
from transformers import DebertaV2Config, DebertaV2ForMaskedLM, T5Config, T5ForConditionalGeneration

import apd_lens as apd

C = 3
# Examples, positions.
SIZES = [(3, 3), *(pytest.param(sizes, marks=pytest.mark.thorough) for sizes in [(3, 2), (1, 3)])]


class Host(nn.Module):
    """Attention over tokens, and one way to use a matrix on what all examples share."""

    def __init__(self, way: Callable[["Host", Tensor, Tensor], Tensor]):
        super().__init__()
        self.way = way
        self.embed, self.relative, self.types = nn.Embedding(7, 4), nn.Embedding(11, 4), nn.Embedding(2, 4)
        self.learned, self.project, self.again = nn.Parameter(torch.empty(5, 4)), nn.Linear(4, 4), nn.Linear(4, 4)
        self.q, self.k, self.up, self.head = (nn.Linear(4, 4) for _ in range(4))
        generator = torch.Generator().manual_seed(0)
        for parameter in self.double().parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.6
        self.register_buffer("table", torch.randn(5, 4, generator=generator, dtype=torch.float64))
        self.plain = torch.randn(5, 4, generator=generator, dtype=torch.float64)

    def forward(self, ids: Tensor) -> Tensor:
        h = self.way(self, ids, self.embed(ids))
        return self.head(h + torch.tanh(self.up(h)))

    def attend(self, h: Tensor, added: Tensor) -> Tensor:
        """With what is added to scores `batch query key` or `batch head query key`."""
        scores = self.q(h) @ self.k(h).mT
        scores = (scores[:, None] if added.ndim > 2 and added.shape[-3] == 4 else scores) + added
        mixed = torch.softmax(scores, -1) @ (h[:, None] if scores.ndim == 4 else h)
        return h + (mixed.mean(1) if mixed.ndim == 4 else mixed)

    def distances(self, ids: Tensor) -> Tensor:
        at = torch.arange(ids.shape[1])
        return at[:, None] - at + 5


RIGHT: dict[str, Callable[[Host, Tensor, Tensor], Tensor]] = {
    "learned vectors": lambda m, ids, h: h + m.project(m.learned[: ids.shape[1]]),
    "added in place": lambda m, ids, h: h.add_(m.project(m.learned[: ids.shape[1]])),
    "a batch axis of one": lambda m, ids, h: h + m.project(m.learned[None, : ids.shape[1]]),
    "a batch axis": lambda m, ids, h: h + m.project(m.learned[: ids.shape[1]].expand(len(ids), -1, -1)),
    "repeated, then two layers": lambda m, ids, h: (
        h + m.again(torch.tanh(m.project(m.learned[: ids.shape[1]].repeat(len(ids), 1, 1))))
    ),
    "two layers": lambda m, ids, h: h + m.again(torch.tanh(m.project(m.learned[: ids.shape[1]]))),
    "one module twice": lambda m, ids, h: h + m.project(torch.tanh(m.project(m.learned[: ids.shape[1]]))),
    "a buffer": lambda m, ids, h: h * m.project(m.table[: ids.shape[1]]),
    "a tensor attribute": lambda m, ids, h: h + m.project(m.plain[: ids.shape[1]] * 2),
    "expanded behind": lambda m, ids, h: h + m.project(m.learned[: ids.shape[1]]).expand(len(ids), -1, -1),
    "token types": lambda m, ids, h: h + m.types(torch.zeros(ids.shape, dtype=torch.long)),
    "positions": lambda m, ids, h: h + m.relative(torch.arange(ids.shape[1])),
    "products": lambda m, ids, h: h + h @ m.project(m.learned[: ids.shape[1]]).mT @ h,
    "relative positions": lambda m, ids, h: m.attend(h, m.relative(m.distances(ids)).sum(-1)),
    "of the examples, from numbers": lambda m, ids, h: h + m.relative(torch.tensor(ids.tolist())),
}
# Right where all examples have the same y, and refused where each has its own.
ONE_FOR_ALL: dict[str, Callable[[Host, Tensor, Tensor], Tensor]] = {
    "the first row": lambda m, ids, h: h + m.project(m.learned[None, : ids.shape[1]])[0],
    "the first row, behind a layer": lambda m, ids, h: (
        h + m.again(torch.tanh(m.project(m.learned[None, : ids.shape[1]])))[0]
    ),
    "one position": lambda m, ids, h: h + m.project(m.learned[: ids.shape[1]])[0],
    "a vector": lambda m, ids, h: h + m.project(m.learned[0]),
    "one for each query": lambda m, ids, h: m.attend(h, m.project(m.learned[: ids.shape[1]])[:, :1]),
    "heads": lambda m, ids, h: m.attend(h, m.relative(m.distances(ids)).permute(2, 0, 1)),
    "mean": lambda m, ids, h: h + m.project(m.learned[: ids.shape[1]]).mean(0),
    "in front": lambda m, ids, h: h + m.project(m.learned[: ids.shape[1]]).unsqueeze(0),
}


@dataclass
class Alone:
    """Examples for `Substituted`."""

    batch: dict[str, Tensor]

    def alone(self, example: int) -> dict[str, Tensor]:
        return {name: value[example : example + 1] for name, value in self.batch.items()}


class Right:
    """What a model gives with substituted weights, each example alone."""

    def __init__(self, model: nn.Module, decomposition: apd.Decomposition, batch: dict[str, Tensor]):
        self.truth, self.n_examples = Substituted(Alone(batch), model), len(next(iter(batch.values())))
        names, components = decomposition.components.names, decomposition.components
        self.W = {name: decomposition.target.weights[name].value() for name in names}
        self.P = {name: components.component_weights(name).detach() for name in names}

    def weights(self, factors: Tensor, rest: float = 0.0) -> dict[str, Tensor]:
        """r W + Σ_c s_c P_c, where r is the rest."""
        return {name: rest * W + torch.einsum("c,cio->io", factors.to(W), self.P[name]) for name, W in self.W.items()}

    def outputs(self, factors: Tensor, rest: float = 0.0) -> Tensor:
        """With factors of each example."""
        return torch.stack(
            [self.truth.output(example, self.weights(factors[example], rest)) for example in range(self.n_examples)]
        )

    def attributions(self, method: str, epsilon: float = 1e-5) -> Tensor:
        """The effect of each component on the outputs, in the mean over them and over the method's path."""
        every = torch.ones(self.n_examples, C)
        path = {"zero": [(0.25 * every, 0.0), (0.75 * every, 0.0)]}.get(method, [(0 * every, 1.0)])
        effects = []
        for component in range(C):
            step = torch.eye(C, dtype=torch.float64)[component].expand(self.n_examples, C)
            small = epsilon * step
            ends = [(factors, factors - step) if method == "ablation" else (factors + small, factors - small)
                    for factors, _ in path]  # fmt: skip
            total = sum(
                self.outputs(first, rest) - self.outputs(second, rest)
                for (first, second), (_, rest) in zip(ends, path, strict=True)
            )
            effect = total / len(path) / (1 if method == "ablation" else 2 * epsilon)
            effects.append(effect.flatten(1).square().mean(1).sqrt())
        return torch.stack(effects, -1)


METHODS = {
    "gradient": apd.GradientAttribution("exact"),
    "ablation": apd.AblationAttribution(memory=1),  # of one component at a time
    "zero": apd.IntegratedGradients(2, "zero", "exact"),
}


def decomposed(model: nn.Module, name: str | None = None, method: str = "gradient") -> apd.Decomposition:
    """One matrix, or all that a forward comes to."""
    called = []
    hooks = [module.register_forward_hook(lambda m, a, y: called.append(m)) for module in model.modules()]
    with suppress(TypeError):
        model(ids_of(1, 3))
    for hook in hooks:
        hook.remove()
    weights = apd.wrap(model).weights
    return apd.init(
        model,
        weights=[name] if name else [name for name, matrix in weights.items() if matrix.module in called],
        n_components=C,
        rank=2,
        selection=apd.BatchTopK(1.0, granularity="example"),
        attribution=METHODS[method],
    ).decomposition()


def ids_of(n_examples: int, n_positions: int) -> Tensor:
    return torch.randint(7, (n_examples, n_positions), generator=torch.Generator().manual_seed(2))


def rule_of(*data_axes: int) -> Tensor:
    return torch.rand(*data_axes, C, generator=torch.Generator().manual_seed(3)) > 0.5


def check_ablation(model: nn.Module, decomposition: apd.Decomposition, batch: dict[str, Tensor]) -> None:
    right = Right(model, decomposition, batch)
    off = torch.tensor([-1.0, 0, 0]).expand(right.n_examples, C)
    with torch.no_grad():
        with decomposition.ablate(0):
            assert_close(model(**batch), right.outputs(off, rest=1))
        with decomposition.only([1, 2]):
            assert_close(model(**batch), right.outputs(1 + off))


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("way", RIGHT)
def test_each_example_has_its_own(way: str, sizes: tuple[int, int]):
    model, ids = Host(RIGHT[way]), ids_of(*sizes)
    decomposition = decomposed(model)
    check_ablation(model, decomposition, {"ids": ids})
    right = Right(model, decomposition, {"ids": ids})
    mask = rule_of(len(ids))
    with torch.no_grad(), decomposition.sparse(mask):
        assert_close(model(ids), right.outputs(mask))
    for method in METHODS:
        came = decomposed(model, method=method).attributions(ids)
        expected = Right(model, decomposed(model, method=method), {"ids": ids}).attributions(method)
        assert_close(came, expected, rtol=1e-6, atol=1e-7)
    with torch.no_grad(), decomposition.sparse(mask):  # again, in a form that was looked at
        assert_close(model(ids), right.outputs(mask))


@pytest.mark.parametrize("way", ["learned vectors", "two layers", "positions", "a batch axis"])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_each_position_has_its_own(way: str, sizes: tuple[int, int]):
    model, ids = Host(RIGHT[way]), ids_of(*sizes)
    decomposition = decomposed(model)
    right, mask = Right(model, decomposition, {"ids": ids}), rule_of(*ids.shape)
    expected = [
        right.truth.output_by_position(example, [right.weights(at) for at in mask[example]])
        for example in range(len(ids))
    ]
    with torch.no_grad(), decomposition.sparse(mask):
        assert_close(model(ids), torch.stack(expected))


@pytest.mark.parametrize("sizes", [*SIZES, pytest.param((3, 1), marks=pytest.mark.thorough)], ids=str)
@pytest.mark.parametrize("way", ONE_FOR_ALL)
def test_one_for_all_examples(way: str, sizes: tuple[int, int]):
    model, ids = Host(ONE_FOR_ALL[way]), ids_of(*sizes)
    name = "relative.weight" if way == "heads" else "project.weight"
    decomposition = decomposed(model, name)
    mask = rule_of(len(ids))

    def refused() -> AbstractContextManager[object]:
        message = f"uses {name} at .* one example at a time"
        return pytest.raises(apd.UnsupportedModel, match=message) if len(ids) > 1 else nullcontext()

    for again in (False, True):  # behind another context, which looks at a forward of this form
        right = Right(model, decomposition, {"ids": ids})
        if again:
            check_ablation(model, decomposition, {"ids": ids})
        with torch.no_grad(), refused(), decomposition.sparse(mask):
            assert_close(model(ids), right.outputs(mask))
        decomposition = decomposed(model, name)
    for method in METHODS:
        with refused():
            came = decomposed(model, name, method).attributions(ids)
            assert_close(came, right.attributions(method), rtol=1e-6, atol=1e-7)


def test_as_many_heads_as_examples():
    """Scores `batch head query key`: what has an example's y would be taken for that of a head."""
    model, ids = (
        Host(lambda m, ids, h: m.attend(h, m.relative(m.distances(ids)).sum(-1) + torch.zeros(4, 1, 1))),
        ids_of(4, 3),
    )
    decomposition = decomposed(model, "relative.weight")
    check_ablation(model, decomposition, {"ids": ids})
    with pytest.raises(apd.UnsupportedModel, match=r"relative\.weight"), decomposition.sparse(rule_of(4)):
        model(ids)
    with pytest.raises(apd.UnsupportedModel, match=r"relative\.weight"):
        decomposition.attributions(ids)


def test_calls_that_cannot_be_told_apart():
    model = Host(lambda m, ids, h: h + m.project(m.learned[:3]) + m.project(h.mean(1))[:, None])
    decomposition = decomposed(model, "project.weight")
    with pytest.raises(apd.UnsupportedModel, match=r"project is called on \(3, 4\) both"), decomposition.ablate(0):
        model(ids_of(3, 3))
    check_ablation(model, decomposition, {"ids": ids_of(2, 3)})


def test_an_activation_of_a_hook_has_a_batch_axis():
    """As where activations of another batch are patched in."""
    model, ids = Host(lambda m, ids, h: h + m.project(m.embed(ids))), ids_of(3, 3)
    patched = torch.randn(3, 3, 4, dtype=torch.float64)
    model.project.register_forward_pre_hook(lambda module, args: (patched,))
    decomposition, mask = decomposed(model, "project.weight"), rule_of(3)
    expected = []
    for example in range(3):
        alone = Host(lambda m, ids, h, at=example: h + m.project(patched[at : at + 1]))
        alone.project.weight.data = decomposition.components.summed("project.weight", mask[example].double()).mT
        expected.append(alone(ids[example : example + 1])[0])
    with torch.no_grad(), decomposition.sparse(mask):
        assert_close(model(ids), torch.stack(expected))


class Logits(nn.Module):
    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model.double().eval()

    def forward(self, **batch: Tensor) -> Tensor:
        return self.model(**batch).logits


def deberta() -> Logits:
    torch.manual_seed(0)
    config = DebertaV2Config(
        vocab_size=20, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=10, relative_attention=True, position_buckets=4, pos_att_type=["p2c", "c2p"],
        share_att_key=True,
    )  # fmt: skip
    return Logits(DebertaV2ForMaskedLM(config))


def t5() -> Logits:
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=20, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=3, relative_attention_num_buckets=8,
        decoder_start_token_id=0,
    )  # fmt: skip
    return Logits(T5ForConditionalGeneration(config))


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("host", [deberta, t5])
def test_hugging_face(host: Callable[[], Logits], sizes: tuple[int, int]):
    model, ids = host(), ids_of(*sizes)
    batch = {"input_ids": ids, **({"decoder_input_ids": ids.flip(1)} if host is t5 else {})}
    names = [name for name in apd.wrap(model).weights if "query_proj" in name or "relative_attention_bias" in name]
    assert names
    for name in names:
        decomposition = decomposed(model, name)
        check_ablation(model, decomposition, batch)
        right, mask = Right(model, decomposition, batch), rule_of(len(ids))
        refused = pytest.raises(apd.UnsupportedModel, match=name) if len(ids) > 1 else nullcontext()
        with torch.no_grad(), refused, decomposition.sparse(mask):
            assert_close(model(**batch), right.outputs(mask))
        for method in METHODS:
            with pytest.raises(apd.UnsupportedModel, match=name) if len(ids) > 1 else nullcontext():
                came = decomposed(model, name, method).attributions(batch)
                # T5 takes softmax in float32, so differences are of larger steps.
                assert_close(came, right.attributions(method, epsilon=1e-2), rtol=1e-3, atol=1e-5)
