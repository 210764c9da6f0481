"""Programs that are compiled into the weights of a transformer, and turned so that no basis gives them away."""

import importlib
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from itertools import permutations, product
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from apd_lens.errors import InvalidSetting, MissingExtra
from apd_lens.toys._shared import MLP, batch_of_step

# Name -> the program, from tracr's library and its `tokens`; its vocabulary; whether a token comes once at most.
PROGRAMS: dict[str, tuple[Callable[[Any, Any], Any], Sequence[Any], bool]] = {
    "reverse": (lambda lib, tokens: lib.make_reverse(tokens), "abc", False),
    "sort": (lambda lib, tokens: lib.make_sort_unique(tokens, tokens), (1, 2, 3, 4, 5, 6), True),
    "hist": (lambda lib, tokens: lib.make_hist(), "abc", False),
    "pair-balance": (lambda lib, tokens: lib.make_pair_balance(tokens, "(", ")"), "()a", False),
    "detect-pattern": (lambda lib, tokens: lib.detect_pattern(tokens, "ab"), "abc", False),
}
BOS = "bos"

# The compiler makes attention that is as good as hard: in float32 no gradient comes through it. With a tenth of its
# scores, what is not selected still has less than 1 % together.
SHARPNESS = 0.1


class Heads(nn.Module):
    """Σ over heads h of softmax(q_h k_hᵀ) v_h W_O,h, without a scale, a mask or biases."""

    def __init__(self, width: int, n_heads: int, d_head: int):
        super().__init__()
        self.n_heads = n_heads
        self.query, self.key, self.value = (nn.Linear(width, n_heads * d_head, bias=False) for _ in range(3))
        self.out = nn.Linear(n_heads * d_head, width, bias=False)

    def forward(self, r: Float[Tensor, "batch pos width"]) -> Float[Tensor, "batch pos width"]:
        q, k, v = (side(r).unflatten(-1, (self.n_heads, -1)) for side in (self.query, self.key, self.value))
        attention = torch.einsum("bqhd,bkhd->bhqk", q, k).softmax(-1)
        return self.out(torch.einsum("bhqk,bkhd->bqhd", attention, v).flatten(2))


class CompiledProgram(nn.Module):
    """r = E[token] + P[position]; r = r + block(r) for each block, heads or an MLP; y = r U, behind the first position.

    At the first position is a token that begins the sequence.
    """

    E: Tensor
    P: Tensor
    U: Tensor

    def __init__(self, E: Tensor, P: Tensor, U: Tensor, blocks: list[nn.Module]):
        super().__init__()
        self.register_buffer("E", E)
        self.register_buffer("P", P)
        self.register_buffer("U", U)
        self.blocks = nn.ModuleList(blocks)

    def forward(self, tokens: Int[Tensor, "batch pos"]) -> Float[Tensor, "batch pos-1 values"]:
        r = self.E[tokens] + self.P[: tokens.shape[1]]
        for block in self.blocks:
            r = r + block(r)
        return r[:, 1:] @ self.U


@dataclass(frozen=True, eq=False)
class ProgramTarget:
    """A compiled program. A mechanism is what one node of the program does in one block.

    Attributes:
        model: frozen; turned by random rotations of the residual stream, and inside each head.
        weights: the matrices to decompose, those of the blocks.
        loss: largest difference of the output from what the program says, over `examples`.
        nodes: names, of the node and the block.
        mechanisms: name -> `node d_in d_out`, which sum to the matrix.
        turns: name -> the rotations L and R; L W Rᵀ is the matrix as it was compiled, where each entry belongs to one
            node at most.
        examples: every sequence that the program takes, `example pos` for each length, as the model is called with it.
        answers: what the program says to each, `example pos-1 values`, one-hot where the output is categorical.
        categorical: whether it is; else the output is one number.
    """

    model: CompiledProgram
    weights: list[str]
    loss: float
    nodes: list[str]
    mechanisms: dict[str, Tensor]
    turns: dict[str, tuple[Tensor, Tensor]]
    examples: list[Tensor]
    answers: list[Tensor]
    categorical: bool

    def batches(self, batch_size: int = 256, seed: int = 0) -> Callable[[int], Tensor]:
        """A function step -> batch: sequences of one length, drawn with replacement."""

        def draw(n: int, generator: torch.Generator, of_length: Tensor) -> Tensor:
            return of_length[torch.randint(len(of_length), (n,), generator=generator)]

        def batch(step: int) -> Tensor:
            data = partial(draw, of_length=self.examples[step % len(self.examples)])
            return batch_of_step(data, batch_size, seed, step)

        return batch

    def is_right(self, length: int = -1) -> Bool[Tensor, "example token"]:
        """Where the model, as it is at the moment, says what the program does, on all sequences of this length (an
        index of `examples`): the same category, or a number that is less than 0.05 off."""
        return self.agrees(self.model(self.examples[length]), length)

    def agrees(self, outputs: Float[Tensor, "example token values"], length: int = -1) -> Bool[Tensor, "example token"]:
        """The same of outputs that are given."""
        answers = self.answers[length]
        if self.categorical:
            return ((outputs > 0.5) == (answers > 0.5)).all(-1)
        return (outputs - answers).abs()[..., 0] < 0.05

    def owned(self, name: str) -> Bool[Tensor, "node d_in d_out"]:
        """Which entries of the matrix as it was compiled belong to each node."""
        return self.turned_back(name, self.mechanisms[name]).abs() > 1e-4

    def turned_back(self, name: str, matrices: Float[Tensor, "n d_in d_out"]) -> Float[Tensor, "n d_in d_out"]:
        """Matrices in the basis in which the program was compiled."""
        left, right = self.turns[name]
        return left @ matrices @ right.mT


def compile_program(name: str, *, max_length: int = 5, turned: bool = True, seed: int = 0) -> ProgramTarget:
    """Compiles a program of `PROGRAMS` with tracr (Lindner et al. 2023, arXiv 2301.05062) into a `CompiledProgram`.

    The residual stream is turned by a random rotation, and so are, in each head, queries with keys, and values. Neurons
    cannot be turned. The function that the model computes stays.

    Args:
        max_length: sequences have 2 to so many tokens.
        turned: False leaves the basis as it was compiled.

    Raises:
        InvalidSetting: no such program.
        MissingExtra: tracr is not installed.
    """
    if name not in PROGRAMS:
        raise InvalidSetting(f"Expected a program of {', '.join(PROGRAMS)}, got {name!r}.")
    tracr = _tracr()
    make, vocabulary, once = PROGRAMS[name]
    program = make(tracr.lib, tracr.rasp.tokens)
    graph = tracr.rasp_to_graph.extract_rasp_graph(program)
    tracr.basis_inference.infer_bases(graph.graph, graph.sink, set(vocabulary), max_length)
    bos = tracr.bases.BasisDirection(tracr.rasp.tokens.label, BOS)
    tracr.expr_to_craft_graph.add_craft_components_to_rasp_graph(graph.graph, bos_dir=bos)
    places = tracr.craft_graph_to_model._allocate_modules_to_layers(graph.graph, graph.sources)
    compiled = tracr.craft_graph_to_model.craft_graph_to_model(graph.graph, graph.sources)

    directions = tracr.bases.VectorSpaceWithBasis
    tokens = directions.from_values(tracr.rasp.tokens.label, [*vocabulary, BOS])
    indices = directions.from_values(tracr.rasp.indices.label, range(max_length))
    sink = graph.sink[tracr.nodes.OUTPUT_BASIS]
    space = tracr.bases.join_vector_spaces(compiled.residual_space, tokens, indices, directions(sink))
    row = {direction: index for index, direction in enumerate(space.basis)}
    width = len(row)

    def rows(of: Any) -> Tensor:
        """One-hot rows that put directions into the residual stream."""
        return torch.eye(width)[[row[direction] for direction in of]]

    generator = torch.Generator().manual_seed(seed)

    def turn(n: int) -> Tensor:
        return torch.linalg.qr(torch.randn(n, n, generator=generator))[0] if turned else torch.eye(n)

    stream = turn(width)
    pieces: dict[int, list[tuple[str, Any]]] = {}
    for label, place in places.items():
        block = graph.graph.nodes[label][tracr.nodes.MODEL_BLOCK]
        for index, half in enumerate(getattr(block, "blocks", [block])):
            pieces.setdefault(place + index, []).append((f"{label.rpartition('_')[0]}, block {place + index}", half))
    nodes = [label for _, of_block in sorted(pieces.items()) for label, _ in of_block]
    blocks: list[nn.Module] = []
    mechanisms: dict[str, Tensor] = {}
    turns: dict[str, tuple[Tensor, Tensor]] = {}
    first = 0  # of the nodes of a block
    for place, (_, of_block) in enumerate(sorted(pieces.items())):
        build = _attention if hasattr(of_block[0][1], "w_qk") else _mlp
        module, matrices, inside = build([half for _, half in of_block], rows, turn)
        for side, of_halves in matrices.items():
            full = torch.zeros(len(nodes), *of_halves.shape[1:])
            full[first : first + len(of_block)] = of_halves
            left, right = (inside[side], stream) if side in ("out", "mlp_out") else (stream, inside[side])
            whole = f"blocks.{place}.{side}.weight"
            turns[whole], mechanisms[whole] = (left, right), left.mT @ full @ right
            getattr(module, side).weight.data = mechanisms[whole].sum(0).mT.contiguous()
        blocks.append(module)
        first += len(of_block)

    one = [direction for direction in row if direction.name == "one"]
    label = tracr.rasp.tokens.label
    E = (rows(tracr.bases.BasisDirection(label, value) for value in [*vocabulary, BOS]) + rows(one).sum(0)) @ stream
    P = torch.cat([torch.zeros(1, width), rows(indices.basis) @ stream])
    model = CompiledProgram(E, P, (rows(sink) @ stream).mT, blocks).requires_grad_(False)

    categorical = tracr.rasp.is_categorical(program)
    values = [direction.value for direction in sink] if categorical else None
    examples, answers = [], []
    for sequences in _sequences(vocabulary, max_length, once):
        examples.append(torch.tensor([[len(vocabulary), *map(vocabulary.index, one)] for one in sequences]))
        answers.append(_answers(program, sequences, values))
    target = ProgramTarget(model, list(mechanisms), 0.0, nodes, mechanisms, turns, examples, answers, categorical)
    of_all = zip(examples, answers, strict=True)
    loss = max((model(some) - said).abs().max().item() for some, said in of_all)
    return ProgramTarget(**{**vars(target), "loss": loss})


def _attention(
    heads: list[Any], rows: Callable[[Any], Tensor], turn: Callable[[int], Tensor]
) -> tuple[nn.Module, dict[str, Tensor], dict[str, Tensor]]:
    """Heads side by side; their matrices `head d_in d_out`, each head in columns of its own; what turns these."""
    d_head = max(max(head.w_qk.matrix.shape + head.w_ov.matrix.shape) for head in heads)
    width, n = rows([]).shape[1], len(heads)
    matrices = {side: torch.zeros(n, width, n * d_head) for side in ("query", "key", "value")}
    matrices["out"] = torch.zeros(n, n * d_head, width)
    for place, head in enumerate(heads):
        scores, values = (torch.tensor(part.matrix, dtype=torch.float32) for part in (head.w_qk, head.w_ov))
        read = slice(place * d_head, place * d_head + scores.shape[1])
        moved = slice(place * d_head, place * d_head + values.shape[1])
        matrices["query"][place, :, read] = SHARPNESS**0.5 * rows(head.w_qk.left_space.basis).mT @ scores
        matrices["key"][place, :, read] = SHARPNESS**0.5 * rows(head.w_qk.right_space.basis).mT
        matrices["value"][place, :, moved] = rows(head.w_ov.input_space.basis).mT @ values
        matrices["out"][place, moved] = rows(head.w_ov.output_space.basis)
    of_scores, of_values = (torch.block_diag(*(turn(d_head) for _ in heads)) for _ in range(2))
    inside = {"query": of_scores, "key": of_scores, "value": of_values, "out": of_values}
    return Heads(width, n, d_head), matrices, inside


def _mlp(
    mlps: list[Any], rows: Callable[[Any], Tensor], turn: Callable[[int], Tensor]
) -> tuple[nn.Module, dict[str, Tensor], dict[str, Tensor]]:
    """MLPs side by side; their matrices `mlp d_in d_out`, each with neurons of its own, which nothing turns."""
    ends = torch.tensor([mlp.fst.output_space.num_dims for mlp in mlps]).cumsum(0).tolist()
    width, n, n_neurons = rows([]).shape[1], len(mlps), ends[-1]
    read, written = torch.zeros(n, width, n_neurons), torch.zeros(n, n_neurons, width)
    for place, (mlp, start, end) in enumerate(zip(mlps, [0, *ends], ends, strict=False)):
        fst, snd = (torch.tensor(part.matrix, dtype=torch.float32) for part in (mlp.fst, mlp.snd))
        read[place, :, start:end] = rows(mlp.fst.input_space.basis).mT @ fst
        written[place, start:end] = snd @ rows(mlp.snd.output_space.basis)
    inside = torch.eye(n_neurons)
    return (
        MLP(width, n_neurons, bias=False),
        {"mlp_in": read, "mlp_out": written},
        {"mlp_in": inside, "mlp_out": inside},
    )


def _sequences(vocabulary: Sequence[Any], max_length: int, once: bool) -> Iterator[list[tuple[Any, ...]]]:
    """All sequences of each length."""
    for length in range(2, max_length + 1):
        yield list(permutations(vocabulary, length) if once else product(vocabulary, repeat=length))


def _answers(program: Any, sequences: list[tuple[Any, ...]], values: list[Any] | None) -> Tensor:
    """What a program says to sequences, as one-hot rows or as numbers; nothing is 0 in both."""
    said = [program(list(one)) for one in sequences]
    if values is None:
        return torch.tensor([[[0.0 if value is None else float(value)] for value in one] for one in said])
    return torch.tensor([[[float(value == each) for each in values] for value in one] for one in said])


def _tracr() -> SimpleNamespace:
    """The parts of tracr that compile. Its package `tracr.compiler` would import jax and haiku, which they do without.

    Raises:
        MissingExtra: tracr, or absl of which it takes its log, is not installed.
    """
    name, found = "tracr.compiler", find_spec("tracr")
    parts = ("basis_inference", "craft_graph_to_model", "expr_to_craft_graph", "lib", "nodes", "rasp_to_graph")
    if found is None or find_spec("absl") is None:
        raise MissingExtra(
            "Programs are compiled by tracr. Install it with pip install --no-deps tracr-pypi==1.0.0 absl-py."
        )
    before = sys.modules.get(name)
    if before is None:
        sys.modules[name] = ModuleType(name)
        sys.modules[name].__path__ = [f"{folder}/compiler" for folder in found.submodule_search_locations or ()]
    try:
        modules = {part: importlib.import_module(f"{name}.{part}") for part in parts}
    finally:
        if before is None:
            del sys.modules[name]
    for part in ("rasp.rasp", "craft.bases"):
        modules[part.rpartition(".")[2]] = importlib.import_module(f"tracr.{part}")
    return SimpleNamespace(**modules)
