"""Who runs on components: the code inside a context and what it starts. Everybody else gets the plain model's bits, or
an error."""

import asyncio
import contextlib
import contextvars
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from nnsight import NNsight
from support.toy_models import Snapshot, TinyGPT, decomposition_of, tiny_gpt2
from torch import Tensor, nn

import apd_lens as apd
from apd_lens.data._batch import call
from apd_lens.host._owner import Owner
from apd_lens.host._target import evaluating
from apd_lens.passes._output import default_output

TOKENS = torch.arange(15).reshape(3, 5) % 11


@dataclass(frozen=True)
class Case:
    """A host, and what it gives plainly and with components 0 and 1 taken out."""

    model: Any
    decomposition: apd.Decomposition
    plain: Tensor
    ablated: Tensor

    @staticmethod
    def of(model: Any) -> "Case":
        decomposition = decomposition_of(model)
        case = Case(decomposition.target.model, decomposition, torch.empty(0), torch.empty(0))
        plain = case.output()
        with decomposition.ablate([0, 1]):
            ablated = case.output()
        assert not torch.equal(plain, ablated)
        return Case(case.model, decomposition, plain, ablated)

    @torch.no_grad()
    def output(self) -> Tensor:
        return default_output(call(self.model, TOKENS))

    def assert_plain(self) -> None:
        assert torch.equal(self.output(), self.plain)

    def assert_ablated(self) -> None:
        assert torch.equal(self.output(), self.ablated)


def hooked_transformer(**changes: Any) -> Any:
    transformer_lens = pytest.importorskip("transformer_lens")
    sizes = {"n_layers": 1, "d_model": 8, "n_ctx": 8, "d_head": 4, "n_heads": 2, "d_mlp": 12, "d_vocab": 13}
    config = transformer_lens.HookedTransformerConfig(**sizes, act_fn="gelu", seed=0, device="cpu", **changes)
    with pytest.warns(DeprecationWarning, match="HookedTransformer is deprecated"):
        return transformer_lens.HookedTransformer(config).eval()


HOSTS: dict[str, Callable[[], Any]] = {
    "torch": TinyGPT,
    "nnsight": lambda: NNsight(tiny_gpt2()),
    "HookedTransformer": hooked_transformer,
    "mixture of experts": lambda: hooked_transformer(
        num_experts=3, experts_per_token=2, gated_mlp=True, dtype=torch.float32
    ),
    "split heads": lambda: hooked_transformer(use_split_qkv_input=True, use_attn_result=True),
}


@pytest.fixture(params=HOSTS)
def case(request: pytest.FixtureRequest) -> Case:
    torch.manual_seed(0)
    return Case.of(HOSTS[request.param]())


@pytest.fixture
def tiny() -> Case:
    return Case.of(TinyGPT())


def in_thread(function: Callable[[], Any]) -> Any:
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(function).result()


@pytest.fixture
def often_switching() -> Iterator[None]:
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


@pytest.mark.usefixtures("often_switching")
def test_other_threads_get_the_plain_models_bits_and_leave_nothing(case: Case):
    before, end, wrong = Snapshot.of(case.model), threading.Event(), []

    def serve() -> None:
        while not end.is_set():
            if not torch.equal(case.output(), case.plain):
                wrong.append("plain")

    servers = [threading.Thread(target=serve) for _ in range(2)]
    for server in servers:
        server.start()
    for _ in range(10):
        with case.decomposition.ablate([0, 1]):
            for _ in range(2):
                case.assert_ablated()
    end.set()
    for server in servers:
        server.join()
    assert not wrong
    before.assert_unchanged(case.model)
    case.assert_plain()


@pytest.mark.usefixtures("often_switching")
def test_threads_that_the_block_starts_with_its_context_variables_run_on_components(case: Case):
    before = Snapshot.of(case.model)
    with case.decomposition.ablate([0, 1]), ThreadPoolExecutor(3) as pool:
        runs = [pool.submit(contextvars.copy_context().run, case.output) for _ in range(30)]
        assert all(torch.equal(run.result(), case.ablated) for run in runs)
    before.assert_unchanged(case.model)


def test_a_thread_before_and_inside_and_after(case: Case):
    in_thread(case.assert_plain)
    with case.decomposition.ablate([0, 1]):
        in_thread(case.assert_plain)
        case.assert_ablated()
    in_thread(case.assert_plain)


@pytest.mark.usefixtures("often_switching")
def test_of_two_threads_that_enter_at_once_one_is_refused(tiny: Case):
    before = Snapshot.of(tiny.model)
    for _ in range(20):
        start, entered = threading.Barrier(2), threading.Barrier(2)

        def enter(start=start, entered=entered) -> str:
            start.wait()
            try:
                with tiny.decomposition.ablate([0, 1]):
                    entered.wait()
                    tiny.assert_ablated()
                    return "ran"
            except apd.errors.AlreadyActive:
                entered.wait()
                return "refused"

        with ThreadPoolExecutor(2) as pool:
            runs = [pool.submit(enter) for _ in range(2)]
        assert sorted(run.result() for run in runs) == ["ran", "refused"]
        before.assert_unchanged(tiny.model)


def test_the_last_thread_that_evaluates_puts_the_modes_back():
    model = nn.Sequential(nn.Linear(3, 3), nn.Dropout()).train()
    first, second = evaluating(model), evaluating(model)
    first.__enter__()
    in_thread(second.__enter__)
    first.__exit__(None, None, None)
    assert not model[1].training
    in_thread(lambda: second.__exit__(None, None, None))
    assert all(module.training for module in model.modules())


def test_tasks_and_threads_of_the_block_run_on_components_and_other_tasks_are_refused(case: Case):
    async def main() -> None:
        inside, end = asyncio.Event(), asyncio.Event()

        async def owner() -> None:
            with case.decomposition.ablate([0, 1]):
                inside.set()
                case.assert_ablated()
                await asyncio.to_thread(case.assert_ablated)
                await asyncio.create_task(child())
                await end.wait()
                case.assert_ablated()

        async def child() -> None:
            case.assert_ablated()

        async def other() -> None:
            await inside.wait()
            with pytest.raises(apd.errors.AlreadyActive, match="in another asyncio task, callback or notebook cell"):
                case.output()
            await asyncio.to_thread(case.assert_plain)
            end.set()

        await asyncio.gather(other(), owner())

    asyncio.run(main())
    case.assert_plain()


def test_a_context_that_is_left_open_in_another_notebook_cell_is_named(tiny: Case):
    context = tiny.decomposition.ablate([0, 1])
    contextvars.copy_context().run(context.__enter__)
    with pytest.raises(apd.errors.AlreadyActive, match="notebook cell"):
        tiny.output()
    context.__exit__(None, None, None)
    tiny.assert_plain()


def test_a_thread_that_python_did_not_start_is_refused(tiny: Case):
    """As those of a backward pass on a GPU, which run checkpointed forwards again."""
    import _thread

    came, done = [], threading.Event()

    def run() -> None:
        try:
            came.append(tiny.output())
        except Exception as error:
            came.append(error)
        done.set()

    with tiny.decomposition.ablate([0, 1]):
        _thread.start_new_thread(run, ())
        assert done.wait(30)
    assert isinstance(came[0], apd.errors.AlreadyActive)
    assert "did not start" in str(came[0])


def test_a_paused_generator_is_named(case: Case):
    def outputs() -> Iterator[Tensor]:
        with case.decomposition.ablate([0, 1]):
            for _ in range(2):
                yield case.output()

    generator = outputs()
    for _ in range(2):
        assert torch.equal(next(generator), case.ablated)
        with pytest.raises(apd.errors.AlreadyActive, match=r"The generator .*outputs \(.*test_owner.py:\d+\)"):
            case.output()
        in_thread(case.assert_plain)
        with pytest.raises(apd.errors.AlreadyActive, match="is paused"):
            in_thread(with_this_context(case.output))
    generator.close()
    case.assert_plain()


def test_a_generator_that_runs_may_start_threads(tiny: Case):
    def outputs() -> Iterator[Tensor]:
        with tiny.decomposition.ablate([0, 1]):
            yield in_thread(with_this_context(tiny.output))

    assert torch.equal(next(outputs()), tiny.ablated)


def with_this_context(function: Callable[[], Any]) -> Callable[[], Any]:
    context = contextvars.copy_context()
    return lambda: context.run(function)


def test_a_paused_asynchronous_generator_is_named(tiny: Case):
    async def outputs():
        with tiny.decomposition.ablate([0, 1]):
            yield tiny.output()
            await asyncio.sleep(0)
            yield tiny.output()

    async def main() -> None:
        async for output in outputs():
            assert torch.equal(output, tiny.ablated)
            with pytest.raises(apd.errors.AlreadyActive, match="outputs"):
                tiny.output()

    asyncio.run(main())
    tiny.assert_plain()


@contextlib.contextmanager
def without(case: Case) -> Iterator[None]:
    with case.decomposition.ablate([0, 1]):
        yield


def test_a_context_manager_of_the_users_own_may_be_around_it(case: Case):
    with without(case):
        case.assert_ablated()
    with contextlib.ExitStack() as stack:
        stack.enter_context(without(case))
        case.assert_ablated()
    case.assert_plain()

    @contextlib.asynccontextmanager
    async def asynchronous():
        with case.decomposition.ablate([0, 1]):
            yield

    async def main() -> None:
        async with asynchronous():
            case.assert_ablated()

    asyncio.run(main())
    case.assert_plain()


def test_a_paused_generator_around_such_a_context_manager_is_named(tiny: Case):
    def outputs() -> Iterator[Tensor]:
        with without(tiny):
            yield tiny.output()

    generator = outputs()
    assert torch.equal(next(generator), tiny.ablated)
    with pytest.raises(apd.errors.AlreadyActive, match="outputs"):
        tiny.output()
    generator.close()
    tiny.assert_plain()


@pytest.fixture
def inside(tiny: Case) -> Iterator[Case]:
    with tiny.decomposition.ablate([0, 1]):
        yield tiny


def test_a_fixture_may_enter_a_context(inside: Case):
    inside.assert_ablated()


def test_a_context_can_be_entered_again_but_not_twice_at_once(case: Case):
    before, context = Snapshot.of(case.model), case.decomposition.ablate([0, 1])
    for _ in range(2):
        with context:
            case.assert_ablated()
            with pytest.raises(apd.errors.AlreadyActive, match="Leave it before"), context:
                pass
            case.assert_ablated()
        case.assert_plain()
    context(case.assert_ablated)()  # a decorator too, as contexts of contextlib are
    before.assert_unchanged(case.model)


def test_a_context_that_is_dropped_without_being_left_is_undone(tiny: Case):
    before = Snapshot.of(tiny.model)
    tiny.decomposition.ablate([0, 1]).__enter__()
    before.assert_unchanged(tiny.model)
    tiny.assert_plain()


def test_a_context_is_not_entered_on_a_model_that_was_edited_since(tiny: Case):
    context = tiny.decomposition.ablate(0)
    with apd.apply_edit(tiny.model, tiny.decomposition, 0), pytest.raises(apd.errors.AlreadyActive), context:
        pass


def test_an_owner_that_is_over_is_forgotten():
    def number() -> int:
        owner = Owner("model")
        owner.do()
        assert owner.runs()
        owner.undo()
        assert not owner.runs()
        return len(contextvars.copy_context())

    context = contextvars.Context()
    assert context.run(number) == context.run(number)
