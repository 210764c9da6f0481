"""Interrupts at chosen lines and at random moments: how many leave a model changed, which must be none.

    python benchmarks/faults.py                                       two minutes
    python benchmarks/faults.py --lines 900 --moments 1000 --decompose-lines 1400 --decompose-moments 4700

An interrupt at a line is raised by a trace function in front of a line of apd_lens, its adapters, contextlib, or
torch's own contexts (grad mode, inference mode, autocast, dispatch modes). One at a moment is raised by the handler of
a signal, KeyboardInterrupt or SystemExit by turns. Every third comes while the user's own code is in inference mode and
autocast. It prints a row for each host and use of the library:

    interrupted   runs that an interrupt came into; the others had ended
    changed       models of which anything was not as before: weights, modes, hooks, attributes of modules, or the
                  output; or modes of torch: gradients, inference, autocast, dispatch
    next fails    the next attributions or the next context raised, or gave other numbers
    other error   something else than the interrupt was raised, or nothing

The error is kept while the model is looked at, as IPython keeps it.
"""

import argparse
import contextlib
import random
import signal
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from nnsight import NNsight
from torch import Tensor, nn
from torch.utils import _python_dispatch
from transformers import GPT2Config, GPT2LMHeadModel

import apd_lens as apd
from apd_lens.host._sites import rewriting
from apd_lens.passes._output import default_output

ROOT = Path(apd.__file__).parent.parent
TORCH = Path(torch.__file__).parent
TRACED = (
    *(str(ROOT / folder) for folder in ("apd_lens", "adapters")),
    contextlib.__file__,
    *(str(TORCH / file) for file in ("utils/_contextlib.py", "utils/_python_dispatch.py", "autograd/grad_mode.py")),
    str(TORCH / "amp" / "autocast_mode.py"),
)
COLUMNS = ("interrupted", "changed", "next fails", "other error")
CHOSEN = [0, 1]


@dataclass(frozen=True)
class Host:
    """A small model, what it is called with, and its components."""

    module: nn.Module
    model: Any
    batch: Tensor
    decomposition: apd.Decomposition
    seen: dict[str, Any]

    @staticmethod
    def of(module: nn.Module, batch: Tensor, wrap: Callable[[nn.Module], Any] = lambda module: module) -> "Host":
        model = wrap(module)
        decomposition = apd.init(model, n_components=5, rank=2, selection=apd.TopK(2)).decomposition()
        host = Host(module, model, batch, decomposition, {})
        host.seen.update(host.look() | host.use_again())
        return host

    def output(self) -> Tensor:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)  # of dropout
            return default_output(self.module(self.batch))

    def look(self) -> dict[str, Any]:
        """All of a model that must be as before."""
        seen: dict[str, Any] = {}
        for name, module in self.module.named_modules():
            for key, value in module.__dict__.items():
                comparable = (bool, int, float, str, tuple)
                seen[f"{name}.{key}"] = (
                    value
                    if isinstance(value, comparable)
                    else (*value,)
                    if key.endswith("hooks") or key == "_modules"
                    else type(value)
                )
                if type(value).__name__ == "Controller":
                    seen[f"{name}.{key}.state"] = type(value.state)
        return seen | {name: value.detach().clone() for name, value in self.module.state_dict().items()}

    @contextlib.contextmanager
    def looked_at(self) -> Iterator[None]:
        """Inside, forwards in a context are looked at for bypasses, as the first one is."""
        forms = self.decomposition.target._looked_at
        before = dict(forms)
        forms.clear()
        yield
        forms.update(before)

    def use_again(self) -> dict[str, Tensor]:
        """What the model and the library make of the batch."""
        with torch.no_grad():
            seen = {"plain": self.output()}
            with self.decomposition.ablate(CHOSEN):
                seen["ablated"] = self.output()
        return seen | {"attributions": self.decomposition.attributions(self.batch)}


def modes_of_torch() -> dict[str, Any]:
    return {
        "gradients": torch.is_grad_enabled(),
        "inference mode": torch.is_inference_mode_enabled(),
        "autocast": torch.is_autocast_enabled("cpu"),
        "autocast cache": torch.is_autocast_cache_enabled(),
        "dispatch modes": len(_python_dispatch._get_current_dispatch_mode_stack()),
        **{name: flag for name, flag in vars(_python_dispatch).items() if name.startswith("_is_in_")},
    }


def hosts() -> dict[str, Callable[[], Host]]:
    return {"torch MLP": torch_mlp, "HookedTransformer": hooked_transformer, "GPT-2 in nnsight": gpt2}


def torch_mlp() -> Host:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Dropout(0.1), nn.Linear(6, 3)).train()
    model[0].eval()
    return Host.of(model, torch.randn(6, 4))


def hooked_transformer() -> Host:
    from transformer_lens import HookedTransformer, HookedTransformerConfig

    config = HookedTransformerConfig(
        n_layers=1, d_model=8, n_ctx=8, d_head=4, n_heads=2, d_mlp=12, d_vocab=13, act_fn="gelu", seed=0, device="cpu"
    )
    return Host.of(HookedTransformer(config).train(), torch.arange(20).reshape(4, 5) % 13)


def gpt2() -> Host:
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=13, n_positions=12, n_embd=8, n_layer=1, n_head=2, use_cache=False)
    return Host.of(GPT2LMHeadModel(config).train(), torch.arange(20).reshape(4, 5) % 13, NNsight)


def sparse(host: Host) -> None:
    mask = torch.ones(len(host.batch), 5, dtype=torch.bool)
    with host.decomposition.sparse(mask):
        host.module(host.batch)


def ablate(host: Host) -> None:
    with host.decomposition.ablate(CHOSEN):
        host.module(host.batch)


def only(host: Host) -> None:
    with host.decomposition.only(CHOSEN):
        host.module(host.batch)


def attributions(host: Host) -> None:
    host.decomposition.attributions(host.batch)


def apply_edit(host: Host) -> None:
    with apd.apply_edit(host.module, host.decomposition, CHOSEN):
        host.module(host.batch)


def others(host: Host) -> None:
    """Calls that make no context of their own for the user, and the hooks that compare/ reads and writes with."""
    host.decomposition.edited_state_dict(CHOSEN)
    host.decomposition.summary(host.batch)
    modules = dict(host.module.named_modules())
    site = next(name for name in ("0", "ln_final", "transformer.ln_f") if name in modules)
    with rewriting(host.module, {site: lambda x: x * 2.0}):
        host.module(host.batch)


def decompose(host: Host) -> None:
    apd.decompose(
        host.model,
        [host.batch],
        n_components=5,
        rank=2,
        selection=apd.BatchTopK(2.0),
        losses=apd.Losses(path=1.0),
        moves=apd.moves.SplitMoves(every=1),
        optimization=apd.Optimization(steps=2, lr=1e-2),
        progress=False,
    )


USES = (sparse, ablate, only, attributions, apply_edit, others)


def at_line(use: Callable[[Host], None], host: Host, line: int) -> tuple[BaseException | None, int]:
    """Runs it with an interrupt in front of a line, counted from 0; returns what came out and how many lines ran."""
    lines = 0

    def in_frame(frame: Any, event: str, arg: Any) -> Any:
        nonlocal lines
        if event == "line":
            lines += 1
            if lines == line + 1:
                raise KeyboardInterrupt
        return in_frame

    def trace(frame: Any, event: str, arg: Any) -> Any:
        return in_frame if frame.f_code.co_filename.startswith(TRACED) else None

    error = None
    sys.settrace(trace)
    try:
        use(host)
    except BaseException as came:
        error = came
    finally:
        sys.settrace(None)
    return error, lines


def at_moment(use: Callable[[Host], None], host: Host, seconds: float, kind: type[BaseException]) -> tuple[Any, bool]:
    """Runs it with an interrupt after some time; returns what came out and whether the interrupt came in time."""
    fired, inside = False, True

    def handler(number: int, frame: Any) -> None:
        nonlocal fired
        if frame.f_code.co_name == "__del__":  # Python drops what is raised in there, whoever raises it
            signal.setitimer(signal.ITIMER_REAL, 1e-4)
        elif inside:
            fired = True
            raise kind

    error = None
    before = signal.signal(signal.SIGALRM, handler)
    try:
        signal.setitimer(signal.ITIMER_REAL, max(seconds, 1e-6))
        use(host)
        inside = False
    except BaseException as came:
        error = came
    inside = False
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, before)
    return error, fired


def _equal(a: Any, b: Any) -> bool:
    return torch.equal(a, b) if isinstance(a, Tensor) and isinstance(b, Tensor) else a == b


def verdict(
    host: Host, error: BaseException | None, kind: type[BaseException], modes: list[dict[str, Any]]
) -> Iterator[tuple[str, str]]:
    """Faults after an interrupt, and what they are, given the modes of torch before and after."""
    if modes[0] != modes[1]:
        yield "changed", str([name for name, mode in modes[0].items() if modes[1][name] != mode])
    if type(error) is not kind:
        yield "other error", repr(error)
    now = host.look()
    changed = [name for name, value in host.seen.items() if name in now and not _equal(value, now[name])]
    changed += now.keys() - host.seen.keys()
    changed += [name for name in host.seen.keys() - now.keys() if name not in ("plain", "ablated", "attributions")]
    if changed:
        yield "changed", ", ".join(changed[:5])
    try:
        again = host.use_again()
    except BaseException as failed:
        yield "next fails", repr(failed)
    else:
        if not _equal(again["plain"], host.seen["plain"]) and not changed:
            yield "changed", "output"
        if other := [name for name in ("ablated", "attributions") if not _equal(again[name], host.seen[name])]:
            yield "next fails", ", ".join(other)


def trials(
    make: Callable[[], Host], use: Callable[[Host], None], lines: int, moments: int, seed: int
) -> tuple[Counter[str], list[str]]:
    """So many interrupts at lines spread over all that run, and at moments; a fault is counted and described."""
    chance = random.Random(seed)
    host, counts, faults = make(), Counter(), []
    use(host)
    with host.looked_at():
        _, n_lines = at_line(use, host, -1)
    with host.looked_at():
        start = time.perf_counter()
        use(host)
        duration = time.perf_counter() - start
    at = [("line", chance.randrange(n_lines)) for _ in range(lines)]
    at += [("moment", chance.uniform(0, duration)) for _ in range(moments)]
    for number, (how, where) in enumerate(at):
        kind = SystemExit if how == "moment" and number % 2 else KeyboardInterrupt
        with contextlib.ExitStack() as of_user:
            of_user.enter_context(host.looked_at())
            if number % 3 == 0:
                of_user.enter_context(torch.inference_mode())
                of_user.enter_context(torch.autocast("cpu", torch.bfloat16))
            modes = [modes_of_torch()]
            if how == "line":
                error, ran = at_line(use, host, int(where))
                came = ran > where
            else:
                error, came = at_moment(use, host, where, kind)
            modes.append(modes_of_torch())
        torch.set_grad_enabled(True)
        if not came:
            continue
        counts["interrupted"] += 1
        found = list(verdict(host, error, kind, modes))
        if found:
            counts.update({fault for fault, _ in found})
            faults.append(f"{how} {where:.4g}: " + "; ".join(f"{fault} ({what})" for fault, what in found))
            host = make()
    return counts, faults


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lines", type=int, default=300, help="interrupts at lines, over all hosts and uses")
    parser.add_argument("--moments", type=int, default=300, help="interrupts at random moments, likewise")
    parser.add_argument("--decompose-lines", type=int, default=150, help="of decompose, over all hosts")
    parser.add_argument("--decompose-moments", type=int, default=150, help="of decompose, over all hosts")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)

    print(f"{'host':<20}{'use':<14}" + "".join(f"{column:>13}" for column in COLUMNS))
    total: Counter[str] = Counter()
    for name, make in hosts().items():
        for use in (*USES, decompose):
            cells = 3 if use is decompose else 3 * len(USES)
            lines = options.decompose_lines if use is decompose else options.lines
            moments = options.decompose_moments if use is decompose else options.moments
            counts, faults = trials(make, use, -(-lines // cells), -(-moments // cells), options.seed)
            total += counts
            print(f"{name:<20}{use.__name__:<14}" + "".join(f"{counts[column]:>13}" for column in COLUMNS), flush=True)
            for fault in faults:
                print("   ", fault)
    print(f"{'all':<34}" + "".join(f"{total[column]:>13}" for column in COLUMNS))


if __name__ == "__main__":
    main()
