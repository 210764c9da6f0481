"""What a target model offers: its weight matrices by name, and a forward pass in which each use can be intercepted.

The core knows no host. A host's adapter says where the matrices are and puts the interception in place; everything
else in apd_lens goes through `TargetModel`.
"""

import difflib
import fnmatch
import threading
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from apd_lens._block import Block, Part, Together, no_grad
from apd_lens._errors import AlreadyActive, ApdError, ArtifactError, SiteNotCalled, UnknownWeight, UnsupportedModel
from apd_lens._table import Printed, table
from apd_lens.data._batch import Batch, call, on_device
from apd_lens.data._inputs import Inputs, ValidFn, n_examples, read_batch
from apd_lens.host._adapter import Adapter, Intercept
from apd_lens.host._bypass import Bypasses
from apd_lens.host._fingerprints import Fingerprints
from apd_lens.host._matrix import Use, WeightMatrix
from apd_lens.host._owner import Owner
from apd_lens.host._patch import (
    NotBehindATrace,
    Patch,
    PatchedForward,
    Uncompiled,
    in_nnsight_trace,
    is_patched,
    outside_traces,
)
from apd_lens.host._shared import Place, SharedUses
from apd_lens.host._ties import merged_ties, with_decomposable_biases


@dataclass(frozen=True, eq=False)
class _Modes:
    """How a model was before it was evaluated, and by whom it is."""

    training: bool
    of_each: list[tuple[nn.Module, bool]]
    users: "set[_Evaluating]"


_MODES: dict[nn.Module, _Modes] = {}


class TargetModel(Printed):
    """A trained model, seen as named weight matrices. Never trained, never changed; make one with `apd_lens.wrap`.

    Matrices that share memory are tied: they are one matrix with several uses, under the name of the first.

    Attributes:
        model: the user's model.
        weights: name -> `WeightMatrix`, in the order of the forward pass; a tied matrix stands here once.
        refused: name -> reason, the matrices that cannot be decomposed.
        fingerprints: digests of the matrices as they are.
        prepare: makes what `model` is called with of what the user gives for a batch (tokens of text).
        biases: whether biases are decomposed, each as the last row of its matrix. Always on all the same are those of
            tied matrices, where each use has a bias of its own, and those that two matrices share.
        valid: batch, as `model` is called with it -> which positions of the explained output are data, bool `batch
            pos`; None for what the batch's masks of attention say.
    """

    def __init__(
        self,
        model: nn.Module,
        adapter: Adapter,
        untied: Iterable[str] = (),
        prepare: Callable[[Any], Any] = lambda batch: batch,
        biases: bool = False,
        valid: ValidFn | None = None,
    ):
        self.model = model
        self.adapter = adapter
        self.prepare = prepare
        self.biases = biases
        self.fingerprints = Fingerprints()
        self.valid = valid
        self._untied = tuple(untied)
        self._looked_at: dict[Any, SharedUses] = {}
        self.prefixes: dict[Any, bool] = {}  # shape of a `Prefix` -> whether passes with it are as those without
        self.changes_inputs = False  # what a matrix multiplies, in place, as far as a pass has shown
        matrices = list(adapter.matrices(model))
        if not biases:
            matrices = [replace(matrix, bias=None) for matrix in matrices]
        weights = with_decomposable_biases(merged_ties(matrices, untied=set(untied)))
        self.weights: Mapping[str, WeightMatrix] = MappingProxyType({matrix.name: matrix for matrix in weights})
        self.refused: Mapping[str, str] = MappingProxyType(dict(adapter.refused(model)))
        if not self.weights:
            reasons = "; ".join(f"{name}: {reason}" for name, reason in self.refused.items())
            raise UnsupportedModel(
                f"{type(model).__name__} has no weight matrix that can be decomposed. "
                f"{reasons or 'It has no matrices.'} Could be decomposed: nn.Linear, transformers' Conv1D, "
                "nn.Embedding and convolutions in any torch module, and every matrix of a transformer_lens model."
            )
        if biases and all(matrix.bias is None for matrix in self.weights.values()):
            raise UnsupportedModel(
                f"biases=True, but no matrix of this {type(model).__name__} has a bias that can be decomposed. Could "
                "be: those of nn.Linear, transformers' Conv1D and convolutions in any torch module, and of attention, "
                "MLPs and unembedding of a HookedTransformer; not where matrices are tied. Leave out biases=True: "
                "biases are then always on."
            )

    def match(self, patterns: str | Iterable[str]) -> list[str]:
        """Names of the matrices that match any of the names or shell patterns, in the model's order, each once.

        A name that is tied to another stands for the whole tied matrix.

        Raises:
            UnknownWeight: a pattern matches nothing; names the closest matches.
            UnsupportedModel: a pattern matches only matrices that cannot be decomposed; gives the reason.
        """
        patterns = [patterns] if isinstance(patterns, str) else list(patterns)
        if not patterns:
            raise UnknownWeight("No weights were asked for: expected names or shell patterns, such as ['*'], got none.")
        chosen: set[str] = set()
        for pattern in patterns:
            found = self._named(pattern, str.__eq__)  # a name may be a pattern, too
            if not found and pattern not in self.refused:
                found = self._named(pattern, fnmatch.fnmatchcase)
            if not found:
                raise self._no_match(pattern)
            chosen |= found
        return [name for name in self.weights if name in chosen]

    def _named(self, pattern: str, matches: Callable[[str, str], bool]) -> set[str]:
        return {
            name
            for name, matrix in self.weights.items()
            if any(matches(alias, pattern) for alias in (name, *matrix.tied_to))
        }

    def _no_match(self, pattern: str) -> ApdError:
        for name, reason in self.refused.items():
            if name == pattern or (pattern not in self.refused and fnmatch.fnmatchcase(name, pattern)):
                return UnsupportedModel(f"{name} (from {pattern!r}) cannot be decomposed: {reason}.")
        names = [alias for name, matrix in self.weights.items() for alias in (name, *matrix.tied_to)]
        closest = difflib.get_close_matches(pattern, names, n=3, cutoff=0.0)
        return UnknownWeight(
            f"No weight matches {pattern!r}. This model has {len(self.weights)} that can be decomposed; the closest "
            f"{'is' if len(closest) == 1 else 'are'} {', '.join(map(repr, closest))}. "
            "print(apd_lens.wrap(model)) lists them all."
        )

    def untied(self, *names: str) -> "TargetModel":
        """The same model with these tied matrices standing for themselves, each with components of its own.

        The model stays as it is, so an edited state dict then holds different values under names that are tied in the
        model; load it into a model in which they are separate parameters.

        Raises:
            UnknownWeight: one of the names is not tied to another.
        """
        tied = {alias for matrix in self.weights.values() if matrix.tied_to for alias in (matrix.name, *matrix.tied_to)}
        for name in names:
            if name not in tied:
                raise UnknownWeight(f"{name!r} is not tied to another matrix. Tied are: {sorted(tied) or 'none'}.")
        return TargetModel(self.model, self.adapter, names, self.prepare, self.biases, self.valid)

    def with_biases(self, biases: bool = True) -> "TargetModel":
        """The same model with biases decomposed, as `apd_lens.wrap(model, biases=True)` gives it, or without.

        Raises:
            UnsupportedModel: there are none that can be.
        """
        return TargetModel(self.model, self.adapter, self._untied, self.prepare, biases, self.valid)

    def with_valid(self, valid: ValidFn) -> "TargetModel":
        """The same model with a function that says which positions of the explained output are data."""
        return TargetModel(self.model, self.adapter, self._untied, self.prepare, self.biases, valid)

    def read(self, batch: Batch | Inputs, device: torch.device | None = None) -> Inputs:
        """A batch as the model is called with it, on a device, and what is to be known of it."""
        if isinstance(batch, Inputs):
            return batch
        batch = self.prepare(batch)
        batch = batch if device is None else on_device(batch, device)
        return read_batch(batch, self.model, self.valid, self._outputs)

    @no_grad()
    def _outputs(self, batch: Batch) -> Any:
        with evaluating(self.model), outside_traces(self.model):
            return call(self.model, batch)

    def intercepted(
        self,
        names: Iterable[str],
        intercept: Intercept,
        observed: Iterable[str] = (),
        check_examples: Callable[[int], None] | None = None,
        beside: Iterable[tuple[nn.Module, PatchedForward]] = (),
    ) -> Block:
        """Inside, every use of the named matrices in a forward of the user's model goes through `intercept`.

        Other threads run the plain model meanwhile, see `Owner`. What torch.compile has compiled of the model runs
        inside as it was written, which rounds otherwise.

        Args:
            observed: further matrices whose uses do, but which a forward may go past.
            check_examples: called at each use with the number of examples in the forward that is running.
            beside: further modules of the model, and what stands in for their forwards.

        Raises:
            AlreadyActive: the model is intercepted already; in a forward: see `Owner.runs`.
            SiteNotCalled: a forward of the whole model ended without reaching one of the uses.
            UnsupportedModel: in a forward, a matrix is used elsewhere too, or is not what it is multiplied by (see
                `Bypasses`), or must stay the same for all examples; or a decomposed bias is added elsewhere than behind
                its matrix.
        """
        matrices = [self.weights[name] for name in names]
        with_bias = {matrix.name for matrix in matrices if matrix.bias is not None}
        expected = {use.site for matrix in matrices for use in matrix.uses}
        bypasses = Bypasses(
            self.model, self.adapter, self.weights, [matrix.name for matrix in matrices], self._looked_at
        )
        matrices += [self.weights[name] for name in observed]
        forward = _Forward()

        def at_use(use: Use, x: Tensor, original: Callable[[], Tensor], bias: Tensor | None) -> Tensor:
            with bypasses.aside():
                return of_use(use, x, original, bias)

        def of_use(use: Use, x: Tensor, original: Callable[[], Tensor], bias: Tensor | None) -> Tensor:
            forward.called.add(use.site)
            if check_examples is not None and forward.examples is not None:
                # A host may add the batch axis.
                check_examples(1 if forward.input_axes == 1 and len(x) == 1 else forward.examples)
            bypasses.compare(use, x, original, bias)
            place, whole = (use.site, x.shape), x
            bypasses.find_shared(place, x, forward.examples or 1)
            if not x.is_floating_point() and x.ndim == 1 and forward.input_axes > 1:  # such as wpe(arange(pos))
                forward.uses.without_batch_axis.add(place)
            if use.matrix in with_bias:
                if bias is None:
                    raise UnsupportedModel(
                        f"The bias of {use.matrix} is decomposed, but at {use.site} the host multiplies by a part of "
                        "the matrix and adds the bias later. Switch off the option that does so (use_attn_result), or "
                        "leave out biases=True."
                    )
                x, bias = torch.cat([x, x.new_ones(*x.shape[:-1], 1)], -1), None
            without_batch_axis = place in forward.uses.without_batch_axis
            if without_batch_axis:
                y = intercept(use, x[None], lambda: original()[None], bias)
            else:
                y = intercept(use, x, original, bias)
            is_shared = without_batch_axis or len(x) == 1
            if is_shared and len(y) > 1:
                forward.expanded[place] = f"{use.matrix} at {use.site} on {tuple(whole.shape)}"
            given = y[0] if without_batch_axis and len(y) == 1 else y
            if torch.is_grad_enabled() and not y.requires_grad and self.weights[use.matrix].parameter.requires_grad:
                # The host's own y would have a gradient, and the user's backward hooks behind it count on that.
                given = given.requires_grad_().clone()
            bypasses.follow(place, whole, y, given, is_shared, forward.examples or 1)
            return given

        def start(uses: SharedUses) -> None:
            forward.uses = uses

        def at_root(model: nn.Module, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            forward.called.clear()
            forward.expanded.clear()
            forward.examples = n_examples(args, kwargs, model)
            forward.input_axes = max(
                (value.ndim for value in (*args, *kwargs.values()) if isinstance(value, Tensor)), default=0
            )
            error = None
            try:
                output = bypasses.run(original, args, kwargs, start)
            except RuntimeError as raised:
                if isinstance(raised, ApdError):
                    raise
                error, output = raised, None
            inseparable = [text for place, text in forward.expanded.items() if place in forward.uses.inseparable]
            if inseparable:
                raise UnsupportedModel(
                    f"This {type(model).__name__} uses {inseparable[0]}, which all examples share, and cannot go on "
                    "with one of each. Give one example at a time, or leave this matrix out of `weights`."
                ) from error
            if error is not None:
                raise error
            missing = sorted(expected - forward.called)
            # In a trace the user may skip modules or stop.
            if missing and self.adapter.runs_every_use(args, kwargs) and not in_nnsight_trace(model):
                raise SiteNotCalled(
                    f"The forward pass of {type(model).__name__} went past {', '.join(missing)}: the decomposed matrix "
                    "was not used there, so masks and ablations would have no effect on it. Leave it out of `weights`, "
                    "or switch off the option that goes round it (a layer that is skipped, a fused path; for "
                    "nn.TransformerEncoder: torch.backends.mha.set_fastpath_enabled(False))."
                )
            return output

        def parts() -> Together:
            if is_patched(self.model):
                raise AlreadyActive(
                    f"This {type(self.model).__name__} is already inside a sparse, ablate or only context (or a "
                    "decompose run). Contexts do not nest on one model: leave the first before entering the second."
                )
            owner = bypasses.owner = Owner(type(self.model).__name__)
            of_uses = self.adapter.patches(self.model, matrices, at_use)
            patches = [*((module, bypasses.around(module, patch)) for module, patch in of_uses), (self.model, at_root)]
            patched = [Patch(module, patch, owner) for module, patch in [*patches, *beside]]
            return Together([NotBehindATrace(), Uncompiled(self.model), *patched, owner])

        return Block(parts)

    def __copy__(self) -> "TargetModel":
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> "TargetModel":
        """The same: the model is the user's, and is not copied with it. In a `copy.deepcopy` that has copied the model
        already, a target on that copy."""
        model = memo.setdefault(id(self.model), self.model)
        if model is self.model:
            return self
        return TargetModel(model, self.adapter, self._untied, self.prepare, self.biases, self.valid)

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        raise ArtifactError(
            f"What belongs to a model of the user's (here a {type(self.model).__name__}) cannot be pickled. To keep a "
            "decomposition, or to take it to another process, use decomposition.save(path) and apd_lens.load(path, "
            "model); of a State, state.decomposition().save(path)."
        )

    def _parts(self) -> list[str]:
        rows = [
            (name, _d_in(matrix), str(matrix.d_out), ", ".join(use.site for use in matrix.uses))
            for name, matrix in self.weights.items()
        ]
        head = f"{type(self.model).__name__}: {len(rows)} weight matrices that can be decomposed"
        parts = [head, table(("name", "d_in", "d_out", "used at"), rows)]
        if self.refused:
            parts += ["cannot be decomposed:", table(("name", "reason"), list(self.refused.items()))]
        return parts


def _d_in(matrix: WeightMatrix) -> str:
    return str(matrix.d_in) if matrix.bias is None else f"{matrix.d_in - 1} + 1"


class _Forward(threading.local):
    """What is known of the forward of the whole model that runs in this thread.

    Attributes:
        called: sites that it has come to.
        uses: those whose x all examples share.
        expanded: of these, where the host got a y of each example, and in words.
        input_axes: the most axes that one of its inputs has.
        examples: how many it has; None where that cannot be told.
    """

    def __init__(self) -> None:
        self.called: set[str] = set()
        self.uses = SharedUses()
        self.expanded: dict[Place, str] = {}
        self.input_axes = 0
        self.examples: int | None = None


def evaluating(model: nn.Module) -> Block:
    """Inside, the model is in eval mode, so that dropout is off and running statistics stay; after it, as it was.

    Of several threads, or blocks in blocks, the last one puts the modes back. So is grad mode of this thread.
    """
    return Block(lambda: _Evaluating(model))


class _Evaluating(Part):
    def __init__(self, model: nn.Module):
        self._model = model
        self._grad_enabled = torch.is_grad_enabled()

    def do(self) -> None:
        model = self._model
        if model in _MODES:
            _MODES[model].users.add(self)
        else:
            _MODES[model] = _Modes(model.training, [(module, module.training) for module in model.modules()], {self})
        model.eval()

    def undo(self) -> None:
        torch.set_grad_enabled(self._grad_enabled)
        before = _MODES.get(self._model)
        if before is None or self not in before.users:
            return
        if len(before.users) == 1:
            try:
                self._model.train(before.training)  # a TransformerBridge switches modules that are not among its own
            finally:
                for module, training in before.of_each:
                    module.training = training
            del _MODES[self._model]
        before.users.discard(self)
