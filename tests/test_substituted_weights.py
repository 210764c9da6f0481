"""On random small models and batches: sparse, ablate, only, edits and attributions equal substituted weights."""

import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from copy import deepcopy
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from support.random_models import (
    RIGHT,
    RIGHT_OR_REFUSED,
    Chain,
    Images,
    Spec,
    Substituted,
    Texts,
    Translation,
    batch_of,
    call,
)
from support.toy_models import Snapshot
from torch import Tensor, nn
from torch.testing import assert_close

import apd_lens as apd

# How many times as many examples as usual; `make test-thorough` takes more, and a search over night many more.
TIMES = float(os.environ.get("HYPOTHESIS_TIMES", "1"))
pytestmark = pytest.mark.searched
EPSILON = 1e-5  # of finite differences


def examples(number: int) -> settings:
    return settings(
        max_examples=int(number * TIMES),
        derandomize=True,
        database=None,
        deadline=None,
        report_multiple_bugs=False,
        phases=[Phase.generate, Phase.shrink],
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.differing_executors],
    )


@dataclass(frozen=True)
class Parts:
    """How a model is decomposed, at random.

    Attributes:
        some: every second matrix only.
        method: of attribution.
        memory: of the attribution; None for its default.
    """

    n_components: int = 3
    rank: int = 2
    some: bool = False
    biases: bool = False
    granularity: str = "example"
    method: str = "gradient"
    memory: int | None = None
    mask: str = "bool"
    seed: int = 0

    def of(self, model: nn.Module) -> apd.Decomposition:
        target = apd.wrap(model)
        if self.biases:
            with suppress(apd.UnsupportedModel):  # it has none that can be decomposed
                target = target.with_biases()
        names = list(target.weights)
        memory = {} if self.memory is None else {"memory": self.memory}
        methods = {
            "gradient": apd.GradientAttribution("exact", **memory),
            "ablation": apd.AblationAttribution(**memory),
            "integrated, all": apd.IntegratedGradients(2, "all", "exact", **memory),
            "integrated, zero": apd.IntegratedGradients(2, "zero", "exact", **memory),
        }
        return apd.init(
            target,
            weights=names[:: 2 if self.some else 1],
            n_components=self.n_components,
            rank=self.rank,
            selection=apd.BatchTopK(1.0, granularity=self.granularity),
            attribution=methods[self.method],
            seed=self.seed,
        ).decomposition()

    def drawn_mask(self, *data_axes: int) -> Tensor:
        generator = torch.Generator().manual_seed(self.seed)
        mask = torch.rand(*data_axes, self.n_components, generator=generator, dtype=torch.float64)
        return mask > 0.5 if self.mask == "bool" else mask


PARTS = st.builds(
    Parts,
    n_components=st.sampled_from([2, 3, 4, 9]),  # with 9, effects are pulled back from outputs, with 2 pushed forward
    rank=st.sampled_from([1, 2, 3]),
    some=st.booleans(),
    biases=st.booleans(),
    granularity=st.sampled_from(["example", "position"]),
    method=st.sampled_from(["gradient", "ablation", "integrated, all", "integrated, zero"]),
    memory=st.sampled_from([None, 1, 2000]),
    mask=st.sampled_from(["bool", "float"]),
    seed=st.sampled_from(range(20)),
)

SEEDS = st.sampled_from(range(50))
DTYPES = st.sampled_from([torch.float64, torch.float64, torch.float32])
LENGTHS = st.sampled_from([(3,), (2, 2), (3, 3), (4, 4), (3, 3, 3), (2, 2, 2), (1, 1)])
SQUARES = st.sampled_from([(2, 2), (3, 3, 3), (3,), (3, 3)])  # as many examples as positions, or not
PADDED = st.sampled_from([(3, 2), (2, 1), (1, 3, 2), (3, 1, 3), (2, 3, 4), (1, 2), (3, 3)])


def chains(**changes: st.SearchStrategy[Any]) -> st.SearchStrategy[Chain]:
    """Vectors through layers that may share their weights."""
    fields = {
        "layer": st.sampled_from(["Linear", "Conv1D"]),
        "bias": st.booleans(),
        "residual": st.booleans(),
        "shared": st.sampled_from(["nothing", "module", "parameter", "parameter, transposed"]),
        "activation": st.sampled_from(["none", "tanh", "tanh in place", "gelu"]),
        "ending": st.sampled_from(["none", "sigmoid", "tanh"]),
        "n_examples": st.sampled_from([1, 2, 3, 4]),
        "positions": st.sampled_from([(), (1,), (2,), (3,), (4,), (2, 2)]),
        "form": st.sampled_from(["tensor", "tuple", "named tuple", "dict", "mapping"]),
        "dtype": DTYPES,
        "seed": SEEDS,
    }
    return st.builds(Chain, **(fields | changes))


def texts(**changes: st.SearchStrategy[Any]) -> st.SearchStrategy[Texts]:
    """Tokens or vectors at positions that attention mixes, without a mask."""
    fields = {
        "lengths": LENGTHS,
        "inputs": st.sampled_from(["tokens", "vectors"]),
        "places": st.sampled_from(["none", "arange"]),
        "attention": st.booleans(),
        "causal": st.booleans(),
        "tied_head": st.booleans(),
        "bias": st.booleans(),
        "form": st.sampled_from(["tensor", "tuple", "dict", "mapping"]),
        "dtype": DTYPES,
        "seed": SEEDS,
    }
    return st.builds(Texts, **(fields | changes)).filter(Texts.makes_sense)


def masked_texts(*masks: str, **changes: st.SearchStrategy[Any]) -> st.SearchStrategy[Texts]:
    """Texts with an attention_mask of one of these forms."""
    fields = {
        "lengths": PADDED,
        "side": st.sampled_from(["right", "left"]),
        "places": st.sampled_from(["none", "arange", "argument of each example"]),
        "mask": st.sampled_from(masks),
        "form": st.sampled_from(["dict", "mapping"]),
    }
    return texts(**(fields | changes))


def translations() -> st.SearchStrategy[Translation]:
    """Encoder and decoder; also where the two are of one length."""
    built = st.builds(
        Translation,
        lengths=st.sampled_from([(3, 3), (3, 2), (2, 3)]),
        decoder_lengths=st.sampled_from([(3, 3), (2, 2), (2, 3), (4, 2)]),
        masks=st.sampled_from(["both", "encoder", "decoder", "neither"]),
        bias=st.booleans(),
        dtype=DTYPES,
        seed=SEEDS,
    )
    return built.filter(Translation.makes_sense)


def images() -> st.SearchStrategy[Images]:
    built = st.builds(
        Images,
        n_axes=st.sampled_from([1, 2]),
        kernel=st.sampled_from([1, 2, 3]),
        stride=st.sampled_from([1, 2]),
        padding=st.sampled_from([0, 1]),
        dilation=st.sampled_from([1, 2]),
        padding_mode=st.sampled_from(["zeros", "circular", "reflect"]),
        bias=st.booleans(),
        n_layers=st.sampled_from([1, 2]),
        pooled=st.booleans(),
        n_examples=st.sampled_from([1, 2, 3]),
        form=st.sampled_from(["tensor", "tuple", "named tuple", "dict"]),
        dtype=DTYPES,
        seed=SEEDS,
    )
    return built.filter(Images.makes_sense)


BARE = st.sampled_from(["product", "slice", "linear"])
REFUSABLE = {"outcome": st.just(RIGHT_OR_REFUSED)}
KEEPS = ("bool", "int", "float")
ADDITIVE = ("additive", "additive, infinite")
QUERIES = ("queries and keys, bool", "heads, queries and keys, bool", "heads, queries and keys, additive")

KINDS: dict[str, st.SearchStrategy[Spec]] = {
    "chains": chains(),
    "images": images(),
    "texts": texts(),
    "padded texts": masked_texts(*KEEPS),
    "masks of queries and keys": masked_texts(*QUERIES, attention=st.just(True)),
    "additive masks": masked_texts(*ADDITIVE),
    "square masks": masked_texts(
        "square bool", "square additive", lengths=LENGTHS, attention=st.just(True), outcome=st.just(RIGHT_OR_REFUSED)
    ),
    "numbers of each example": chains(
        scaled=st.just(True), form=st.sampled_from(["tuple", "named tuple", "dict", "mapping"]), **REFUSABLE
    ),
    "positions as an argument": texts(
        lengths=SQUARES,
        places=st.sampled_from(["shared argument", "argument with a batch axis of one", "argument of each example"]),
        form=st.sampled_from(["tuple", "named tuple", "dict", "mapping"]),
        **REFUSABLE,
    ),
    "learned vectors": texts(
        lengths=SQUARES, shared=st.sampled_from(["learned vectors", "learned vectors, with a batch axis"]), **REFUSABLE
    ),
    "relative positions": texts(
        lengths=SQUARES, shared=st.just("relative positions"), attention=st.just(True), **REFUSABLE
    ),
    "outputs without positions": texts(outputs=st.sampled_from(["mean", "last"])),
    "outputs without positions, of padded texts": masked_texts(
        *KEEPS, *ADDITIVE, outputs=st.sampled_from(["mean", "last"]), **REFUSABLE
    ),
    "longer outputs": texts(outputs=st.just("prefix")),
    "longer outputs, of padded texts": masked_texts(*KEEPS, outputs=st.just("prefix"), **REFUSABLE),
    "encoder and decoder": translations(),
    "bare reads of another matrix": chains(bare=BARE, shared=st.just("nothing")),
}
# Every second matrix is decomposed, and the one that is read is between them.
PARTS_OF = {"bare reads of another matrix": PARTS.map(lambda parts: replace(parts, some=True))}


@contextmanager
def right_or_refused(spec: Spec) -> Iterator[None]:
    """Inside, an ApdError is welcome where the spec says so."""
    try:
        yield
    except apd.ApdError:
        if spec.outcome == RIGHT:
            raise


def matrices(decomposition: apd.Decomposition) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """W `d_in d_out` and P `C d_in d_out` of every decomposed matrix, in float64."""
    names, components = decomposition.components.names, decomposition.components
    W = {name: decomposition.target.weights[name].value().double() for name in names}
    return W, {name: components.component_weights(name).detach().double() for name in names}


def added(W: dict[str, Tensor], P: dict[str, Tensor], factors: Tensor) -> dict[str, Tensor]:
    """W + Σ_c factors_c P_c."""
    return {name: W[name] + sum(factor * of_c for factor, of_c in zip(factors, P[name], strict=True)) for name in W}


def check_contexts(spec: Spec, parts: Parts) -> None:
    """The output in every context, and of a model with an edited state dict, on each example."""
    model, arguments = spec.model(), spec.arguments()
    before, truth, batch = Snapshot.of(model), Substituted(spec, model), batch_of(spec, arguments)
    n_examples = len(next(iter(arguments.values())))
    tolerance = {"rtol": 1e-9, "atol": 1e-9} if spec.dtype == torch.float64 else {"rtol": 1e-3, "atol": 1e-3}
    decomposition = parts.of(model)
    W, P = matrices(decomposition)
    nothing = {name: torch.zeros_like(value) for name, value in W.items()}
    chosen = torch.tensor([parts.seed >> component & 1 for component in range(parts.n_components)])
    numbers = chosen.nonzero()[:, 0].tolist()

    def compare(came: Tensor, expected: Callable[[int], Tensor]) -> None:
        assert len(came) == n_examples
        for example in range(n_examples):
            places = spec.outputs_of(example)
            assert_close(
                came[example] if places is None else came[example, places], expected(example).to(came), **tolerance
            )

    def compare_inside(context: AbstractContextManager[None], expected: Callable[[int], Tensor]) -> None:
        with right_or_refused(spec):
            with torch.no_grad(), context:
                came = call(model, batch)
            compare(came, expected)

    ablated, only = added(W, P, -chosen), added(nothing, P, chosen)
    compare_inside(decomposition.ablate(numbers), lambda example: truth.output(example, ablated))
    compare_inside(decomposition.only(numbers), lambda example: truth.output(example, only))
    mask = parts.drawn_mask(n_examples)
    compare_inside(
        decomposition.sparse(mask), lambda example: truth.output(example, added(nothing, P, mask[example].double()))
    )
    by_position = parts.drawn_mask(n_examples, *spec.position_axes())

    def with_own_weights(example: int) -> Tensor:
        of_positions = by_position[example].flatten(0, -2)[spec.positions_of(example)].double()
        return truth.output_by_position(example, [added(nothing, P, factors) for factors in of_positions])

    if spec.position_axes():
        compare_inside(decomposition.sparse(by_position), with_own_weights)
    edited = deepcopy(model)
    edited.load_state_dict(decomposition.edited_state_dict(numbers))
    with torch.no_grad():
        compare(call(edited, batch), lambda example: truth.output(example, ablated))
        with right_or_refused(spec):
            with decomposition.ablate([]):
                came = call(model, batch)
            assert torch.equal(came, call(model, batch))
    before.assert_unchanged(model)


def check_attributions(spec: Spec, parts: Parts) -> None:
    """Attributions are those of each example alone: effects of weights that are really changed."""
    if not spec.position_axes():
        parts = replace(parts, granularity="example")
    if parts.granularity == "position":
        parts = replace(parts, n_components=min(parts.n_components, 3))  # each takes many passes
    model, arguments = spec.model(), spec.arguments()
    before, truth, batch = Snapshot.of(model), Substituted(spec, model), batch_of(spec, arguments)
    n_examples = len(next(iter(arguments.values())))
    tolerance = {"rtol": 1e-6, "atol": 1e-7} if spec.dtype == torch.float64 else {"rtol": 1e-2, "atol": 1e-3}
    decomposition = parts.of(model)
    W, P = matrices(decomposition)

    def effect(
        base: dict[str, Tensor], changes: list[dict[str, Tensor]], example: int, position: int | None
    ) -> list[Tensor]:
        """Outputs with the weights changed everywhere, or at one position."""
        if position is None:
            return [truth.output(example, changed) for changed in changes]
        n = len(spec.positions_of(example))
        return [
            truth.output_by_position(example, [changed if at == position else base for at in range(n)])
            for changed in changes
        ]

    lines, paths = {}, path_of(parts, W, P)
    for component in range(parts.n_components):
        step = torch.zeros(parts.n_components, dtype=torch.float64)
        step[component] = 1
        lines[component] = [
            (
                base,
                [base, added(base, P, -step)]
                if parts.method == "ablation"
                else [added(base, P, EPSILON * step), added(base, P, -EPSILON * step)],
            )
            for base in paths
        ]

    def expected(example: int, position: int | None, component: int) -> Tensor:
        total = 0
        for base, changes in lines[component]:
            first, second = effect(base, changes, example, position)
            total = total + (first - second) / (1 if parts.method == "ablation" else 2 * EPSILON)
        return (total / len(paths)).square().mean().sqrt()

    with right_or_refused(spec):
        came = decomposition.attributions(batch)
        by_position = parts.granularity == "position"
        axes = spec.position_axes() if by_position else ()
        assert came.shape == (n_examples, *axes, parts.n_components)
        for example in range(n_examples):
            places = spec.positions_of(example) if by_position else torch.tensor([0])
            of_example = came[example].reshape(-1, parts.n_components)
            right = torch.zeros_like(of_example)
            for (position, place), component in product(enumerate(places), range(parts.n_components)):
                right[place, component] = expected(example, position if by_position else None, component)
            assert_close(of_example, right, **tolerance)
    before.assert_unchanged(model)


def path_of(parts: Parts, W: dict[str, Tensor], P: dict[str, Tensor]) -> list[dict[str, Tensor]]:
    """The weights at which effects are taken."""
    every = torch.ones(parts.n_components, dtype=torch.float64)
    nothing = {name: torch.zeros_like(value) for name, value in W.items()}
    return {
        "integrated, all": [added(W, P, -t * every) for t in (0.25, 0.75)],
        "integrated, zero": [added(nothing, P, t * every) for t in (0.25, 0.75)],
    }.get(parts.method, [W])


@pytest.mark.parametrize("kind", KINDS)
def test_contexts_and_edits(kind: str):
    @examples(3)
    @given(spec=KINDS[kind], parts=PARTS_OF.get(kind, PARTS))
    def check(spec: Spec, parts: Parts) -> None:
        check_contexts(spec, parts)

    check()


@pytest.mark.parametrize("kind", KINDS)
def test_attributions(kind: str):
    @examples(3)
    @given(spec=KINDS[kind], parts=PARTS_OF.get(kind, PARTS))
    def check(spec: Spec, parts: Parts) -> None:
        check_attributions(spec, parts)

    check()


@examples(5)
@given(spec=texts(outputs=st.sampled_from(["mean", "last", "prefix"])), parts=PARTS)
def test_positions_that_matrices_do_not_share_are_refused(spec: Texts, parts: Parts):
    model, arguments = spec.model(), spec.arguments()
    decomposition = replace(parts, some=False, granularity="position").of(model)
    batch = batch_of(spec, arguments)
    with pytest.raises(apd.ShapeMismatch):
        decomposition.attributions(batch)
    with pytest.raises(apd.ShapeMismatch), decomposition.sparse(parts.drawn_mask(*arguments["x"].shape[:2])):
        call(model, batch)


@examples(5)
@given(spec=chains(bare=BARE), parts=PARTS)
def test_bare_reads_of_a_decomposed_matrix_are_refused(spec: Chain, parts: Parts):
    """The error names the matrix, and the model is as it was."""
    model = spec.model()
    before, batch = Snapshot.of(model), batch_of(spec, spec.arguments())
    decomposition = replace(parts, some=False).of(model)
    mask = parts.drawn_mask(spec.n_examples)
    for context in (decomposition.ablate([0]), decomposition.only([0]), decomposition.sparse(mask)):
        with pytest.raises(apd.UnsupportedModel, match=r"middle\.weight"), torch.no_grad(), context:
            call(model, batch)
    with pytest.raises(apd.UnsupportedModel, match=r"middle\.weight"):
        decomposition.attributions(batch)
    before.assert_unchanged(model)


@examples(5)
@given(
    spec=st.one_of(chains(), texts(outputs=st.just("each position"))),
    parts=PARTS,
    change=st.sampled_from(["one example", "an example more", "one position", "a position more"]),
)
def test_masks_of_another_batch_are_refused(spec: Chain | Texts, parts: Parts, change: str):
    model, arguments = spec.model(), spec.arguments()
    n_examples, axes = len(arguments["x"]), list(spec.position_axes())
    if change == "one example" and n_examples > 1:
        n_examples = 1
    elif change == "one position" and axes and axes[0] > 1:
        axes[0] = 1
    elif change == "a position more" and axes:
        axes[0] += 1
    else:
        n_examples += 1
    decomposition = parts.of(model)
    for mask in (parts.drawn_mask(n_examples, *axes), parts.drawn_mask(n_examples)):
        if mask.shape[:-1] == (len(arguments["x"]),):  # without positions it is one of this batch
            continue
        with pytest.raises(apd.ShapeMismatch), torch.no_grad(), decomposition.sparse(mask):
            call(model, batch_of(spec, arguments))


@examples(4)
@given(spec=texts(inputs=st.just("tokens"), lengths=st.sampled_from([(3,), (4,)]), form=st.just("tensor")), parts=PARTS)
def test_a_prompt_without_a_batch_axis_is_refused(spec: Texts, parts: Parts):
    class OneOrMany(nn.Module):
        """Adds the batch axis where a prompt has none, as hosts do."""

        def __init__(self) -> None:
            super().__init__()
            self.model = spec.model()

        def forward(self, x: Tensor) -> Tensor:
            return self.model(x[None] if x.ndim == 1 else x)

    decomposition = parts.of(OneOrMany())
    with pytest.raises(apd.ApdError):
        decomposition.attributions(spec.arguments()["x"][0])


def test_the_checks_above_can_fail():
    """Components that change between what is computed and what it is compared with are noticed."""
    for check in (check_contexts, check_attributions):
        for spec in (Chain(positions=(2,)), Texts(mask="int"), Images()):
            check(spec, Parts(granularity="position"))
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(Substituted, "_copy_with", lambda self, weights: self.model)
                with pytest.raises(AssertionError):
                    check(spec, Parts(granularity="position", seed=1))
