"""What people's scripts do around our calls: gradients off, other defaults, autocast, several threads, their own ways
of giving batches and components."""

import copy
import json
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from support import outside
from support.toy_models import Snapshot
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import apd_lens as apd
from apd_lens import compare
from apd_lens._settings import learning_rate

FEW = {"n_components": 4, "rank": 3, "progress": False}
STEPS = apd.Optimization(steps=6, lr=1e-2)
LP = {"selection": apd.Lp(), "losses": apd.Losses(path=0.0), "moves": None}


def small_model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))


def data(n: int = 9) -> torch.Tensor:
    return torch.randn(n, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float32)


def trained(model: nn.Module | None = None, **options: object) -> apd.Decomposition:
    return apd.decompose(model or small_model(), [data()], **{**FEW, "optimization": STEPS, **options})  # type: ignore[arg-type]


def assert_equal_components(left: apd.Decomposition, right: apd.Decomposition) -> None:
    for ours, theirs in zip(left.components.parameters(), right.components.parameters(), strict=True):
        assert torch.equal(ours, theirs)


# --- several threads

THREADS = """
import hashlib, torch
from torch import nn
import apd_lens as apd

torch.set_num_threads(n_threads)
torch.manual_seed(0)
model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 16))
digests = []
for n_data, n_components, rank, options in [
    (2048, 64, 4, {"selection": apd.BatchTopK(2.0)}),
    (2048, 512, 1, {"selection": apd.BatchTopK(1.0)}),
    (512, 64, 4, {"selection": apd.TopK(2), "losses": apd.Losses(path=1.0)}),
    (512, 32, 16, {"selection": apd.BatchTopK(4.0), "moves": apd.moves.SplitMoves(every=2)}),
    (512, 32, 4, {"selection": apd.BatchTopK(1.0), "moves": apd.moves.ClusterMoves(every=2)}),
]:
    x = torch.randn(n_data, 64, generator=torch.Generator().manual_seed(1))
    for _ in range(2):
        decomposition = apd.decompose(
            model, [x], n_components=n_components, rank=rank, progress=False,
            attribution=apd.GradientAttribution(2), optimization=apd.Optimization(steps=3, lr=1e-2), **options,
        )
        factors = b"".join(factor.numpy().tobytes() for factor in decomposition.components.parameters())
        digests.append(hashlib.sha256(factors).hexdigest())
print([first == second for first, second in zip(digests[::2], digests[1::2])])
"""

GATHERED = """
import torch
from apd_lens.components._pairs import active_pairs, pairwise_product

torch.set_num_threads(n_threads)
x, A, B = torch.randn(2048, 32, requires_grad=True), torch.randn(64, 32, 4), torch.randn(64, 4, 8)
mask = torch.rand(2048, 64) < 0.1
active, upstream = active_pairs(mask), torch.randn(2048, 8)
gradients = [
    torch.autograd.grad(pairwise_product(x, A, B, mask, active, way), x, upstream)[0]
    for way in ("sparse", "grouped") for _ in range(6)
]
print(all(torch.equal(one, gradients[0]) for one in gradients[:6]))
print(all(torch.equal(one, gradients[6]) for one in gradients[6:]))
"""


@pytest.mark.thorough
@pytest.mark.parametrize("n_threads", [2, 8])
def test_the_same_seed_gives_the_same_factors_on_several_threads(n_threads: int):
    assert outside.fresh(f"n_threads = {n_threads}\n{textwrap.dedent(THREADS)}") == f"{[True] * 5}\n"


@pytest.mark.parametrize("n_threads", [2, pytest.param(8, marks=pytest.mark.thorough)])
def test_gradients_of_gathered_rows_are_added_in_one_order(n_threads: int):
    assert outside.fresh(f"n_threads = {n_threads}\n{textwrap.dedent(GATHERED)}") == "True\nTrue\n"


# --- steps beyond the last


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
def test_steps_beyond_the_last_go_on_as_at_the_end(schedule):
    optimization = apd.Optimization(steps=10, lr=1e-2, schedule=schedule)
    last = learning_rate(optimization, 9)
    assert last > 0
    assert [learning_rate(optimization, step) for step in (10, 25, 1000)] == [last] * 3
    losses = apd.Losses(simplicity=apd.Ramp(1.0, 0.5, hold=0.5, reach=2.0))
    state = apd.init(small_model(), n_components=4, rank=2, optimization=optimization, losses=losses)
    rates, coefficients = [], []
    for _ in range(14):
        state, info = apd.step(state, data())
        rest = info.loss - sum(
            getattr(losses, name) * term for name, term in info.terms.items() if name != "simplicity"
        )
        rates.append(info.learning_rate)
        coefficients.append((rest / info.terms["simplicity"]).item())
    assert min(rates) > 0
    assert rates[10:] == [last] * 4
    assert coefficients[10:] == pytest.approx([1 - 0.5 / 3] * 4, rel=1e-3)  # the value at the end of the steps


# --- gradients switched off


@pytest.mark.parametrize("off", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("options", [{}, LP, {"moves": apd.moves.SplitMoves(every=2)}])
def test_training_with_gradients_switched_off_outside(off, options):
    expected, model, other = trained(**options), small_model(), small_model()
    with off():
        came = trained(model, **options)
        assert torch.is_grad_enabled() is False
        assert torch.is_inference_mode_enabled() is (off is torch.inference_mode)
        state = apd.init(other, n_components=4, rank=2, optimization=STEPS)
        state, info = apd.step(state, data())
        assert info.loss.isfinite()
        attributions = came.attributions(data(), lambda output: output[:, 0])
    assert torch.is_grad_enabled()
    assert_equal_components(came, expected)
    assert torch.equal(attributions, expected.attributions(data(), lambda output: output[:, 0]))


def test_gradients_switched_off_for_good():
    expected = trained()
    torch.set_grad_enabled(False)
    try:
        assert_equal_components(trained(), expected)
        assert not torch.is_grad_enabled()
    finally:
        torch.set_grad_enabled(True)


def test_a_model_made_in_inference_mode_is_refused_and_its_copy_is_not():
    with torch.inference_mode():
        model = small_model()
    with pytest.raises(apd.UnsupportedModel, match=r"made inside torch.inference_mode.*copy.deepcopy\(model\)"):
        trained(model)
    assert_equal_components(trained(copy.deepcopy(model)), trained())


# --- other defaults


def everything(decomposition: apd.Decomposition) -> dict[str, object]:
    """Numbers that our calls give, on a model that is there already."""
    x, metric, neurons = data(), lambda output: output[:, 0], compare.Dictionary.neurons("1", 8)
    found = apd.responses(decomposition, [x])
    sparsity = compare.sparsity(decomposition, [x], (1, 2), {"neurons": neurons})
    return {
        "change": found.effects.change,
        "attribution": found.attribution,
        "summary": decomposition.summary(x).attribution,
        "random": [*apd.components.random_components(decomposition.components).parameters()],
        "residuals": decomposition.residuals()["all"],
        "stability": str(apd.metrics.stability([decomposition, decomposition])),
        "sparsity": str(sparsity),
        "directions": str(compare.direction_match(decomposition, neurons, "0.weight")),
        "activations": str(compare.activation_match(decomposition, [x], neurons)),
        "watch": apd.monitor.fit(decomposition, [x]).score(x).surprise,
        "curve": str(compare.faithfulness_curve(decomposition, [x], metric)),
        "edits": str(compare.edit_effects(decomposition, [0], [x], [x])),
        "map": [matrix.total for matrix in compare.attribution_map(decomposition, [x], metric).matrices],
        "signed": compare.signed_attributions(decomposition, [x], metric).attribution,
        "audit": apd.metrics.audit(decomposition, [x], ladder=(2,), unions=(2,), progress=False).loss,
    }


def assert_alike(left: dict[str, object], right: dict[str, object]) -> None:
    for name, value in left.items():
        if isinstance(value, torch.Tensor | list | float):
            torch.testing.assert_close(value, right[name], msg=lambda text, name=name: f"{name}: {text}")
        else:
            assert value == right[name], name


@pytest.mark.parametrize(
    "moves", [None, apd.moves.SplitMoves(every=2), apd.moves.ClusterMoves(every=2), apd.moves.DivisionMoves(every=2)]
)
def test_training_whatever_the_default_dtype_and_device(moves):
    expected, model, x = trained(moves=moves), small_model(), data()
    try:
        torch.set_default_dtype(torch.float64)
        torch.set_default_device("meta")  # whatever is made without a device meets numbers on the CPU, and fails
        came = apd.decompose(model, [x], **FEW, optimization=STEPS, moves=moves)
    finally:
        torch.set_default_device(None)
        torch.set_default_dtype(torch.float32)
    assert_equal_components(came, expected)


def test_all_calls_whatever_the_default_dtype_is():
    decomposition = trained()
    expected = everything(decomposition)
    try:
        torch.set_default_dtype(torch.float64)
        came = everything(decomposition)
    finally:
        torch.set_default_dtype(torch.float32)
    assert_alike(came, expected)


def test_reports_whatever_the_defaults_are(tmp_path: Path):
    decomposition, x = trained(), data()
    plain = decomposition.report([x], tmp_path / "plain.html").read_text()
    try:
        torch.set_default_dtype(torch.float64)
        came = decomposition.report([x], tmp_path / "other.html").read_text()
    finally:
        torch.set_default_dtype(torch.float32)
    assert len(came) == pytest.approx(len(plain), rel=0.01)


def test_sums_of_weights_inside_autocast_are_exact():
    model, x = small_model(), data()
    decomposition = trained(model)
    before = Snapshot.of(model)
    edited, residuals = decomposition.edited_state_dict([0, 1]), decomposition.residuals()
    norms = decomposition.summary(x).norm
    weights = decomposition.components.component_weights("0.weight")
    together = apd.responses(decomposition, [x]).together.counts
    stable = str(apd.metrics.stability([decomposition, trained(model, seed=1)]))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for name, value in decomposition.edited_state_dict([0, 1]).items():
            assert torch.equal(value, edited[name])
        with apd.apply_edit(model, decomposition, [0, 1]):
            assert torch.equal(model[0].weight, edited["0.weight"])
        assert decomposition.residuals() == residuals
        assert torch.equal(decomposition.summary(x).norm["0.weight"], norms["0.weight"])
        assert torch.equal(decomposition.components.component_weights("0.weight"), weights)
        found = apd.responses(decomposition, [x])
        assert found.together.counts.sum() == together.sum()
        assert found.effects.change.dtype == torch.float32
        apd.metrics.stability([decomposition, decomposition])
        assert torch.is_autocast_enabled("cpu")
    assert str(apd.metrics.stability([decomposition, trained(model, seed=1)])) == stable
    before.assert_unchanged(model)


# --- global random numbers


def test_global_random_numbers_stay_where_they_were(tmp_path: Path):
    code = """
import random, numpy, torch
import apd_lens as apd
from apd_lens import compare
model, x = torch.nn.Sequential(torch.nn.Linear(6, 3)), torch.randn(9, 6)
before = random.getstate(), str(numpy.random.get_state()), torch.get_rng_state()
moves = apd.moves.SplitMoves(every=2)
d = apd.decompose(model, [x], ["0.weight"], n_components=4, rank=2, progress=False, moves=moves,
                  losses=apd.Losses(path=1.0), optimization=apd.Optimization(steps=6))
apd.responses(d, [x]); d.summary(x); apd.metrics.stability([d, d]); apd.monitor.fit(d, [x]); d.report([x], path)
compare.faithfulness_curve(d, [x], lambda y: y[:, 0]); compare.edit_effects(d, [0], [x], [x])
print(random.getstate() == before[0], str(numpy.random.get_state()) == before[1])
print(torch.equal(torch.get_rng_state(), before[2]))
"""
    assert outside.run(f"path = {str(tmp_path / 'report.html')!r}\n{code}") == "True True\nTrue\n"


# --- components as people give them


def test_components_by_numbers_of_numpy_and_by_masks():
    decomposition = trained(n_components=5)
    for given, numbers in [
        (np.int64(1), [1]),
        (np.array([0, 3]), [0, 3]),
        (torch.tensor(2), [2]),
        ([torch.tensor(2), np.int32(1)], [2, 1]),
        (range(2), [0, 1]),
        (torch.tensor([True, False, False, True, False]), [0, 3]),
        (np.array([False, True, False, False, False]), [1]),
        ([False, False, False, False, True], [4]),
        (torch.zeros(5, dtype=torch.bool), []),
    ]:
        taken_out = decomposition.components.component_weights("0.weight")[numbers].sum(0).mT
        weight = decomposition.target.model.state_dict()["0.weight"]
        edited = decomposition.edited_state_dict(given)["0.weight"]  # type: ignore[arg-type]
        torch.testing.assert_close(edited, weight - taken_out)


WRONG_COMPONENTS = [
    "d.ablate('12')",
    "d.ablate(1.7)",
    "d.ablate([1.9])",
    "d.ablate(torch.tensor([2.0]))",
    "d.ablate(True)",
    "d.ablate([False, True])",
    "d.ablate(torch.tensor([True, False]))",
    "d.ablate([0, True])",
    "d.ablate(None)",
    "d.only(['0'])",
    "d.edited_state_dict(ablate=b'1')",
    "apd.apply_edit(model, d, '1')",
]


def test_what_is_no_component_is_refused():
    setup = """
import torch, apd_lens as apd
model = torch.nn.Linear(3, 3)
d = apd.init(model, n_components=20, rank=2).decomposition()
"""
    for code, came in zip(WRONG_COMPONENTS, outside.errors_of(setup, WRONG_COMPONENTS), strict=True):
        assert came.startswith("InvalidSetting: Expected whole numbers of components from 0 to 19"), (code, came)


def test_nan_is_no_setting():
    for make in (lambda: apd.BatchTopK(float("nan")), lambda: apd.Optimization(lr=float("nan"))):
        with pytest.raises(apd.errors.InvalidSetting, match="takes a number, got NaN"):
            make()


# --- batches as people give them


@pytest.mark.parametrize("batches", [{"x": data()}, "text", data(), data().numpy()])
def test_one_batch_in_the_place_of_several(batches):
    for call in (
        lambda: outside_checks(apd.decompose)(small_model(), batches, **FEW),
        lambda: apd.monitor.fit.__wrapped__(trained(), batches),
    ):
        with pytest.raises(apd.errors.InvalidBatches, match=r"Of one batch give \[batch\]"):
            call()


def outside_checks(function):
    """The function without the check of its arguments, which would speak first."""
    return function.__wrapped__


def test_loaders_of_pairs():
    loader = DataLoader(TensorDataset(data(), torch.zeros(9)), batch_size=4)
    with pytest.raises(apd.errors.InvalidBatches, match=r"pick it: batches=\[x for x, _ in loader\]"):
        trained_on(loader)
    with pytest.raises(apd.errors.InvalidBatches, match="Sequential cannot be called with what the batch gives it"):
        trained().attributions({"inputs": data()})
    assert trained_on([x for x, _ in loader]).components.n_components == 4

    class Failing(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(6, 3)

        def forward(self, x):
            return self.linear(x) + "a"

    with pytest.raises(TypeError, match="unsupported operand"):  # the model's own error stays
        trained(Failing())


def trained_on(batches) -> apd.Decomposition:
    return apd.decompose(small_model(), batches, **FEW, optimization=STEPS)


def test_generators():
    with pytest.raises(apd.errors.InvalidBatches, match=r"gives each batch once.*list\(generator\)"):
        trained_on(data() for _ in range(2))
    used_up = (data() for _ in range(1))
    list(used_up)
    with pytest.raises(apd.errors.InvalidBatches, match=r"A generator can be gone through once only"):
        apd.responses(trained(), used_up)


def test_outputs_without_a_graph():
    with pytest.raises(apd.errors.InvalidOutput, match="detaches it"):
        trained(output=lambda y: y.detach())
    with pytest.raises(apd.errors.InvalidOutput, match="has no gradient to any decomposed matrix"):
        trained(output=lambda y: torch.ones_like(y))


# --- files of other tools


def test_sae_files_are_read_as_the_kind_that_they_say(tmp_path: Path):
    torch.manual_seed(0)
    tensors = {"W_enc": torch.randn(4, 6), "W_dec": torch.randn(6, 4), "b_enc": torch.randn(6), "b_dec": torch.randn(4)}
    x = torch.randn(20, 4)

    def read(cfg: dict | None, name: str = "cfg.json", **more: torch.Tensor) -> compare.Dictionary:
        for other in ("cfg.json", "config.json"):
            (tmp_path / other).unlink(missing_ok=True)
        if cfg is not None:
            (tmp_path / name).write_text(json.dumps(cfg))
        save_file(tensors | more, tmp_path / "sae.safetensors")
        return compare.Dictionary.from_file(tmp_path / "sae.safetensors", "0")

    pre = x @ tensors["W_enc"] + tensors["b_enc"]
    without = (x - tensors["b_dec"]) @ tensors["W_enc"] + tensors["b_enc"]
    top = pre.relu() * (pre >= pre.topk(2).values[:, -1:])
    assert torch.equal(read(None).encode(x), pre.relu())
    threshold = torch.full((6,), 0.7)
    assert torch.equal(read(None, threshold=threshold).encode(x), pre * (pre > 0.7))
    assert torch.equal(read({"architecture": "jumprelu"}, threshold=threshold).encode(x), pre * (pre > 0.7))
    assert torch.equal(read({"architecture": "topk", "k": 2}).encode(x), top)
    assert torch.equal(
        read({"activation_fn_str": "topk", "activation_fn_kwargs": {"k": 2}, "architecture": "standard"}).encode(x), top
    )
    biased = read({"architecture": "standard", "apply_b_dec_to_input": True, "normalize_activations": "none"})
    torch.testing.assert_close(biased.encode(x), without.relu())
    trainer = {"trainer": {"dict_class": "AutoEncoderTopK", "k": 2}}
    torch.testing.assert_close(
        read(trainer, "config.json").encode(x), without.relu() * (without >= without.topk(2).values[:, -1:])
    )
    assert torch.equal(read({"model_type": "gpt2"}, "config.json").encode(x), pre.relu())
    for cfg, message in [
        ({"architecture": "gated"}, "'gated'; known are"),
        ({"architecture": "standard", "normalize_activations": "layer_norm"}, "normalize_activations='layer_norm'"),
        ({"architecture": "topk", "k": 2, "finetuning_scaling_factor": True}, "finetuning_scaling_factor=True"),
    ]:
        with pytest.raises(apd.errors.InvalidSetting, match=message):
            read(cfg)
    with pytest.raises(apd.errors.InvalidSetting, match="it holds r_mag"):
        read(None, r_mag=torch.ones(6))
    path = tmp_path / "sae.safetensors"
    assert compare.Dictionary.from_file(path, "0", activation="relu").activation == "relu"  # who says it, is believed


@pytest.mark.parametrize(
    ("content", "nodes", "edges"),
    [
        (
            {"A0.1->MLP 1": 0.4, "Resid Start->A0.1.Q": 1.0, "MLP 1->Resid End": 0.1},
            {"a0.1": 1.0, "m1": 0.4},
            [("a0.1", "m1", ""), ("input", "a0.1", "q"), ("m1", "logits", "")],
        ),
        (
            {
                "blocks.0.attn.hook_result[:, :, 1]->blocks.1.attn.hook_q_input[:, :, 0]": 0.3,
                "hook_embed[:]->blocks.0.hook_mlp_in[:]": 0.2,
                "blocks.0.hook_mlp_out[:]->blocks.1.attn.hook_v[:, :, 1]": 0.1,
            },
            {"a0.1": 0.3, "a1.0": 0.3, "m0": 0.2, "a1.1": 0.1},
            [("a0.1", "a1.0", "q"), ("input", "m0", ""), ("m0", "a1.1", "v")],
        ),
        (
            {"edges": {"m0->a1.h1<k>": {"score": -2.0, "in_graph": True}}},
            {"m0": 2.0, "a1.1": 2.0},
            [("m0", "a1.1", "k")],
        ),
        ([{"node": [0, 1], "score": 0.2}, {"node": "(1, 3)", "score": 0.5}], {"a0.1": 0.2, "a1.3": 0.5}, []),
        ({"L1.H0": 0.2, "head 1.1": 0.5, "mlp 2": 1.0}, {"a1.0": 0.2, "a1.1": 0.5, "m2": 1.0}, []),
    ],
    ids=["AutoCircuit", "ACDC", "EAP-IG", "pairs", "words"],
)
def test_circuits_as_other_tools_name_them(tmp_path: Path, content, nodes, edges):
    path = tmp_path / "circuit.json"
    path.write_text(json.dumps(content), encoding="utf-8-sig")  # with a byte order mark, as Windows has it
    circuit = compare.read_circuit(path)
    assert dict(circuit.nodes) == nodes
    assert list(circuit.edges) == edges


def test_circuits_that_cannot_be_read(tmp_path: Path):
    table = tmp_path / "circuit.csv"
    table.write_text("source,target,score\na0.0,m1,0.5\n", encoding="utf-8-sig")
    assert dict(compare.read_circuit(table).nodes) == {"a0.0": 0.5, "m1": 0.5}
    table.write_text("node,score\na0.0,\na0.1,0.3\n")
    with pytest.raises(apd.ArtifactError, match="Entry 1 has no score"):
        compare.read_circuit(table)
    other = tmp_path / "circuit.json"
    other.write_text(json.dumps([{"node": [0, 1, 2], "score": 1.0}]))
    with pytest.raises(apd.errors.InvalidSetting, match=r"or \(layer, head\), got \[0, 1, 2\]"):
        compare.read_circuit(other)
    nodes = [{"node_id": "1_9_1", "layer": "1", "feature_type": "lorsa"}]
    other.write_text(json.dumps({"nodes": nodes, "links": []}))
    with pytest.raises(apd.ArtifactError, match="'lorsa'"):
        compare.read_circuit(other)
