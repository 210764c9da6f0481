"""What every host must pass. A new host gets these tests by offering a small model: subclass, and override `model`,
`batch`, and whatever else differs.

The right answers come from the model itself, with other weights put into its parameters (`substituted`).
"""

import copy
import pickle
from collections.abc import Callable
from itertools import product
from typing import Any

import pytest
import torch
from support.toy_models import Snapshot, decomposition_of, keep_in_float64, substituted
from torch import Tensor, nn
from torch.testing import assert_close

import apd_lens as apd
from apd_lens.data._batch import call
from apd_lens.passes._output import default_output
from apd_lens.passes._replace import Mixture
from apd_lens.passes._watch import watched_pass

SAME = {"rtol": 1e-5, "atol": 1e-5}  # float32, the same sums in another order
EQUAL = {"rtol": 1e-10, "atol": 1e-10}  # float64
ALONE = [False, pytest.param(True, marks=pytest.mark.thorough)]  # each matrix by itself
FINITE_DIFFERENCES = {"rtol": 1e-5, "atol": 1e-7}  # float64, central differences of step 1e-5


class AdapterContract:
    """Subclass as `class TestMyHost(AdapterContract)`; its docstring says which variant of the host it is."""

    #: A heading of docs/coverage.md.
    host: str

    #: Positions of an example, if it has any.
    n_positions: int | None = None

    #: Names that `apd_lens.wrap(model).weights` must list, in order.
    names: tuple[str, ...]

    def model(self) -> Any:
        """A small model, seeded; in eval mode."""
        raise NotImplementedError

    def batch(self, n_examples: int) -> Any:
        """A batch of so many different examples, seeded."""
        raise NotImplementedError

    def example(self, batch: Any, index: int) -> Any:
        """One example of a batch, as a batch."""
        if isinstance(batch, Tensor):
            return batch[index : index + 1]
        if isinstance(batch, dict):
            return {key: value[index : index + 1] for key, value in batch.items()}
        return tuple(value[index : index + 1] for value in batch)

    def together(self, target: apd.TargetModel) -> list[str | list[str]]:
        """Matrices that are decomposed together: all, and every second one, between which some stay as they are."""
        return ["*", list(target.weights)[::2]]

    output: Callable[[Any], Tensor] = staticmethod(default_output)

    @pytest.fixture(scope="class")
    @classmethod
    def made(cls) -> apd.TargetModel:
        """One for all tests of a class; `test_leaves_nothing_behind` is one of them."""
        torch.manual_seed(0)
        host = cls()
        model = host.model()
        call(model, host.batch(1))  # hosts cache things in their first forward
        return apd.wrap(model)

    @pytest.fixture
    def target(self, made: apd.TargetModel) -> apd.TargetModel:
        return made

    def double_model(self) -> Any:
        """The model in float64."""
        return self.model().double()

    def _run(self, target: apd.TargetModel, batch: Any) -> Tensor:
        return self.output(call(target.model, batch)).detach()

    def _decomposition(self, target: apd.TargetModel, weights: str | list[str] = "*", **options) -> apd.Decomposition:
        return decomposition_of(target, weights, output=self.output, **options)

    def test_lists_its_matrices(self, target: apd.TargetModel):
        assert tuple(target.weights) == self.names
        for name, matrix in target.weights.items():
            assert matrix.value().shape == (matrix.d_in, matrix.d_out)
            assert name in str(target)

    def test_values_turn_back_into_the_hosts_own_layout(self, target: apd.TargetModel):
        for matrix in target.weights.values():
            assert torch.equal(matrix.to_host(matrix.value()), matrix.parameter)
            for key, stored in matrix.state(matrix.value()).items():
                assert torch.equal(target.model.state_dict()[key], stored)

    def test_nothing_ablated_is_bit_for_bit_the_target(self, target: apd.TargetModel):
        batch = self.batch(3)
        expected = self._run(target, batch)
        with self._decomposition(target).ablate([]):
            assert torch.equal(self._run(target, batch), expected)

    def test_watching_is_bit_for_bit_the_target(self, target: apd.TargetModel):
        batch = self.batch(3)
        watched = watched_pass(target, list(target.weights), batch, self.output)
        assert torch.equal(watched.output.detach(), self._run(target, batch))

    def test_y_of_every_matrix_is_in_the_graph(self, target: apd.TargetModel):
        watched = watched_pass(target, list(target.weights), self.batch(3), self.output)
        weights = torch.randn_like(watched.output)
        for call_ in watched.calls:
            (gradient,) = torch.autograd.grad((watched.output * weights).sum(), call_.y, retain_graph=True)
            assert gradient.abs().max() > 0, call_.use

    def test_y_is_x_times_w(self, target: apd.TargetModel):
        """With zero in the place of the matrix, y changes by x @ W: x, the orientation and the slices are right."""
        for name, matrix in target.weights.items():
            watched = watched_pass(target, [name], self.batch(3), self.output)
            call_ = watched.calls[0]
            W = matrix.value()
            W = (W.mT if call_.use.transposed else W)[call_.use.rows, call_.use.columns]
            product = call_.use.scale * (W[call_.x] if not call_.x.is_floating_point() else call_.x @ W)
            with substituted(target, {name: torch.zeros_like(matrix.value())}):
                without = watched_pass(target, [name], self.batch(3), self.output).calls[0]
            if matrix.uses[0].site == matrix.uses[-1].site:  # a tied matrix changes its own inputs
                assert_close(call_.y.detach() - without.y.detach(), product, **SAME)

    @pytest.mark.parametrize("alone", ALONE)
    def test_sparse_is_weight_substitution_for_each_data_point(self, alone: bool):
        """In float64: in float32 a layer norm of few dimensions can make either side's roundings large."""
        torch.manual_seed(0)
        target = apd.wrap(self.double_model())
        for weights, fractional in product(target.weights if alone else self.together(target), (False, True)):
            decomposition = self._decomposition(target, weights)
            batch, n_examples = self._double(self.batch(4)), 4
            mask = torch.rand(n_examples, 5)
            mask = mask if fractional else mask < 0.5
            with decomposition.sparse(mask):
                sparse = self._run(target, batch)
            for index in range(n_examples):
                components = decomposition.components
                summed = {name: components.summed(name, mask[index].double()) for name in components.names}
                with substituted(target, summed):
                    expected = self._run(target, self.example(batch, index))
                assert_close(sparse[index : index + 1], expected, **EQUAL, msg=lambda text, w=weights: f"{w}: {text}")

    def test_a_position_is_run_on_its_own_mask(self, target: apd.TargetModel):
        """y of the first use at every position is that under the position's mask for the whole example."""
        if self.n_positions is None:
            pytest.skip("no positions")
        for name in target.weights:
            decomposition, batch = self._decomposition(target, name), self.batch(3)
            mask = torch.rand(3, self.n_positions, 5) < 0.5

            def first_y(some_mask: Tensor, components=decomposition.components, batch=batch, name=name) -> Tensor:
                ys: list[Tensor] = []
                replace = Mixture(components, some_mask)

                def keep(*use) -> Tensor:
                    ys.append(replace(*use))
                    return ys[-1]

                with target.intercepted([name], keep):
                    call(target.model, batch)
                return ys[0].detach()

            y = first_y(mask)
            for position in range(self.n_positions):
                expected = first_y(mask[:, position])[:, position]
                assert_close(y[:, position], expected, **SAME, msg=lambda text, n=name: f"{n}: {text}")

    def test_only_and_ablate_are_weight_substitution(self, target: apd.TargetModel):
        decomposition, batch = self._decomposition(target), self.batch(3)
        components = decomposition.components
        chosen = torch.tensor([0.0, 1.0, 0.0, 1.0, 0.0])
        parts = {name: components.summed(name, chosen) for name in components.names}
        with substituted(target, parts):
            expected_only = self._run(target, batch)
        with substituted(target, {name: target.weights[name].value().clone() - parts[name] for name in parts}):
            expected_ablated = self._run(target, batch)
        with substituted(target, {name: torch.zeros_like(part) for name, part in parts.items()}):
            expected_nothing = self._run(target, batch)
        with decomposition.only([1, 3]):
            assert_close(self._run(target, batch), expected_only, **SAME)
        with decomposition.ablate([3, 1]):
            assert_close(self._run(target, batch), expected_ablated, **SAME)
        with decomposition.only([]):
            assert_close(self._run(target, batch), expected_nothing, **SAME)

    def test_all_components_of_a_faithful_decomposition_are_the_target(self, target: apd.TargetModel):
        """W itself as the one component of full rank: A = W, B = 1 or A = 1, B = W."""
        A, B = {}, {}
        for name, matrix in target.weights.items():
            eye = torch.eye(min(matrix.d_in, matrix.d_out))
            W = matrix.value().clone()
            A[name], B[name] = (eye, W) if matrix.d_in <= matrix.d_out else (W, eye)
        components = apd.ParameterComponents(
            {name: factor[None] for name, factor in A.items()}, {name: factor[None] for name, factor in B.items()}
        )
        start = self._decomposition(target)
        decomposition = apd.Decomposition(target, components, start.settings, start.output, start.fingerprints)
        batch = self.batch(3)
        expected = self._run(target, batch)
        with decomposition.sparse(torch.ones(3, 1, dtype=torch.bool)):
            assert_close(self._run(target, batch), expected, **SAME)
        assert max(decomposition.residuals().values()) < 1e-6

    @pytest.mark.parametrize("alone", ALONE)
    def test_attributions_equal_finite_differences(self, monkeypatch, alone: bool):
        """∂/∂ε of every output, with W + ε P_c in the place of W, is Σ_uses <∂f_o/∂y, x P_c>."""
        keep_in_float64(monkeypatch)
        torch.manual_seed(0)
        target = apd.wrap(self.double_model())
        batch = self._double(self.batch(2))
        for weights in target.weights if alone else self.together(target):
            decomposition = self._decomposition(target, weights, n_components=2)
            components = decomposition.components
            expected, signed, step = [], [], 1e-5
            projection = torch.randn(self._run(target, batch)[0].shape, dtype=torch.float64)
            for component in range(2):
                outputs = []
                for sign in (1, -1):
                    moved = {
                        name: target.weights[name].value().clone()
                        + sign * step * components.component_weights(name)[component].detach()
                        for name in components.names
                    }
                    with substituted(target, moved):
                        outputs.append(self._run(target, batch).clone())
                derivative = (outputs[0] - outputs[1]) / (2 * step)
                expected.append(derivative.flatten(1).square().mean(1).sqrt())
                signed.append((derivative * projection).flatten(1).sum(1))
            assert_close(decomposition.attributions(batch), torch.stack(expected, 1), **FINITE_DIFFERENCES)
            to_metric = decomposition.attributions(
                batch, metric=lambda output, v=projection: (output * v).flatten(1).sum(1)
            )
            assert_close(to_metric, torch.stack(signed, 1), **FINITE_DIFFERENCES)

    def test_edited_state_dict_is_ablation_for_good(self, target: apd.TargetModel):
        decomposition, batch = self._decomposition(target), self.batch(3)
        with decomposition.ablate([1, 2]):
            expected = self._run(target, batch)
        before = Snapshot.of(target.model)
        edited = decomposition.edited_state_dict(ablate=[1, 2])
        before.assert_unchanged(target.model)
        copied = copy.deepcopy(target.model)
        copied.load_state_dict(edited)
        assert_close(self._run(apd.wrap(copied), batch), expected, **SAME)

    def test_leaves_nothing_behind(self, target: apd.TargetModel):
        decomposition, batch = self._decomposition(target), self.batch(3)
        before, output = Snapshot.of(target.model), self._run(target, batch)
        decomposition.attributions(batch)
        with decomposition.sparse(decomposition.select(batch)):
            self._run(target, batch)
        with decomposition.ablate(0):
            self._run(target, batch)
        before.assert_unchanged(target.model)
        assert torch.equal(self._run(target, batch), output)

    def test_leaves_nothing_behind_after_an_error_in_a_forward(self, target: apd.TargetModel):
        decomposition, batch = self._decomposition(target), self.batch(3)
        before = Snapshot.of(target.model)
        last = target.model.get_submodule(list(target.weights.values())[-1].uses[-1].site.rpartition(".hook")[0])
        handle = last.register_forward_hook(_fail)
        with pytest.raises(RuntimeError, match="in the middle"):
            decomposition.attributions(batch)
        for context in (decomposition.sparse(torch.ones(3, 5)), decomposition.only(0), decomposition.ablate(0)):
            with pytest.raises(RuntimeError, match="in the middle"), context:
                self._run(target, batch)
        handle.remove()
        before.assert_unchanged(target.model)

    def test_a_copy_made_inside_a_context_is_a_plain_model(self, target: apd.TargetModel):
        decomposition, batch = self._decomposition(target), self.batch(3)
        expected = self._run(target, batch)
        with decomposition.only([0]):
            copied, pickled = copy.deepcopy(target.model), pickle.loads(pickle.dumps(target.model))
        for model in (copied, pickled):
            assert torch.equal(self.output(call(model, batch)), expected)

    @staticmethod
    def _double(batch: Any) -> Any:
        def convert(value: Tensor) -> Tensor:
            return value.double() if value.is_floating_point() else value

        if isinstance(batch, dict):
            return {key: convert(value) for key, value in batch.items()}
        return convert(batch) if isinstance(batch, Tensor) else tuple(map(convert, batch))


class CoreContract(AdapterContract):
    """What holds of every variant of a host if it holds of one that passes the contract above."""

    def test_save_and_load(self, target: apd.TargetModel, tmp_path):
        decomposition, batch = self._decomposition(target), self.batch(3)
        decomposition.save(tmp_path)
        loaded = apd.load(tmp_path, target.model, output=self.output)
        assert torch.equal(loaded.attributions(batch), decomposition.attributions(batch))

    def test_contexts_do_not_nest(self, target: apd.TargetModel):
        decomposition = self._decomposition(target)
        with decomposition.ablate(0):
            with pytest.raises(apd.errors.AlreadyActive, match="leave the first"), decomposition.only(0):
                pass
            with pytest.raises(apd.errors.AlreadyActive):
                decomposition.attributions(self.batch(3))
        with decomposition.only(0):
            pass

    def test_a_mask_of_another_batch_is_refused(self, target: apd.TargetModel):
        decomposition = self._decomposition(target)
        with pytest.raises(apd.ShapeMismatch, match=r"The mask is \(2, 5\)"), decomposition.sparse(torch.ones(2, 5)):
            self._run(target, self.batch(3))

    def test_decompose_runs_and_leaves_the_model_alone(self, target: apd.TargetModel):
        before = Snapshot.of(target.model)
        decomposition = apd.decompose(
            target,
            [self.batch(4), self.batch(3)],
            n_components=3,
            rank=1,
            output=self.output,
            losses=apd.Losses(path=1.0),
            moves=apd.moves.SplitMoves(every=2),
            optimization=apd.Optimization(steps=6, lr=1e-2),
            progress=False,
        )
        before.assert_unchanged(target.model)
        assert decomposition.attributions(self.batch(3)).shape[-1] == 3


def _fail(module: nn.Module, args: Any, output: Any) -> None:
    raise RuntimeError("in the middle of a forward")
