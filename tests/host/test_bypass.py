"""What goes round interception: bare reads of a matrix, a matrix that is not what is multiplied by, changed weights."""

import copy
import re
import warnings
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from nnsight import NNsight
from support.toy_models import decomposition_of, tiny_gpt2
from torch import Tensor, nn
from torch.testing import assert_close
from transformers import DebertaV2Config, DebertaV2ForMaskedLM

import apd_lens as apd

IDS = torch.randint(11, (5, 4), generator=torch.Generator().manual_seed(0))
RULE = torch.rand(5, 5, generator=torch.Generator().manual_seed(1)) < 0.5


class Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx, h: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(weight)
        return h @ weight.T

    @staticmethod
    def backward(ctx, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0] @ ctx.saved_tensors[0], None


def product(h: Tensor, weight: Tensor) -> Tensor:
    return torch.mm(h.flatten(0, 1), weight.t()).view(h.shape[0], h.shape[1], -1)


with warnings.catch_warnings(action="ignore"):  # that it is deprecated
    scripted = torch.jit.script(product)


class Bare(nn.Module):
    """Calls its embedding, and reads the embedding's weight once more."""

    def __init__(self, read: Callable[["Bare", Tensor], Tensor]):
        super().__init__()
        torch.manual_seed(0)
        self.emb, self.mlp, self.back = nn.Embedding(11, 8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.alias = self.emb.weight
        self.view = nn.Parameter(self.emb.weight.detach()[:6])
        self.kept = [self.emb.weight]
        self.read = read

    def forward(self, ids: Tensor) -> Tensor:
        h = self.emb(ids)
        return self.read(self, h + torch.tanh(self.mlp(h)))


READS: dict[str, Callable[[Bare, Tensor], Tensor]] = {
    "linear": lambda self, h: F.linear(h, self.emb.weight),
    "transpose": lambda self, h: h @ self.emb.weight.T,
    "slice": lambda self, h: h @ self.emb.weight[3:].T,
    "column": lambda self, h: h * self.emb.weight[:, 2].sum(),
    "data": lambda self, h: h @ self.emb.weight.data.mT,
    "detached": lambda self, h: h @ self.emb.weight.detach().T,
    "einsum": lambda self, h: torch.einsum("bpd,vd->bpv", h, self.emb.weight),
    "lookup": lambda self, h: h + F.embedding(IDS[: len(h)], self.emb.weight),
    "index": lambda self, h: h + self.emb.weight[IDS[: len(h)]],
    "another attribute": lambda self, h: h @ self.alias.T,
    "another parameter": lambda self, h: h @ self.view.T,
    "in a list": lambda self, h: h @ self.kept[0].T,
    "autograd function": lambda self, h: Product.apply(h, self.emb.weight),
    "scripted": lambda self, h: scripted(h, self.emb.weight),
    "operator": lambda self, h: torch.ops.aten.matmul(h, self.emb.weight.t()),
    "through another module": lambda self, h: h @ self.back(self.emb.weight).T,
    "norm": lambda self, h: h / self.emb.weight.norm(),
    "dtype": lambda self, h: (h.double() @ self.emb.weight.double().T).float(),
}


@pytest.mark.parametrize("read", READS)
@pytest.mark.parametrize("gradients", [False, True], ids=["without gradients", "with gradients"])
def test_a_weight_that_is_also_read_bare_is_refused(read: str, gradients: bool):
    model = Bare(READS[read]).eval()
    decomposition = decomposition_of(model, "emb.weight")
    expected = r"emb\.weight is read in .*test_bypass\.py:\d+: .* by aten\..*, not by a call of emb"
    before, output = copy.deepcopy(model.state_dict()), model(IDS)
    with pytest.raises(apd.UnsupportedModel, match=expected):
        decomposition.attributions(IDS)
    for context in (decomposition.sparse(RULE), decomposition.ablate(0), decomposition.only(0)):
        with torch.set_grad_enabled(gradients), pytest.raises(apd.UnsupportedModel, match=expected), context:
            model(IDS)
    with torch.inference_mode(), pytest.raises(apd.UnsupportedModel, match=expected), decomposition.ablate(0):
        model(IDS)
    assert torch.equal(model(IDS), output)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert decomposition_of(model, "mlp.weight").attributions(IDS).shape == (5, 5)  # what the message says to do


def test_a_bare_read_in_autocast_is_refused():
    """The copy of a weight that autocast keeps has other memory."""

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return F.linear(self.fc(x), self.fc.weight)

    model = Model()
    with torch.autocast("cpu", dtype=torch.bfloat16), pytest.raises(apd.UnsupportedModel, match=r"fc\.weight is read"):
        decomposition_of(model, "fc.weight").attributions(torch.randn(3, 8))
    assert torch.is_autocast_cache_enabled()


def test_a_host_that_swallows_errors_is_refused():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            try:
                return F.linear(self.fc(x), self.fc.weight)
            except TypeError:
                return self.fc(x)

    with pytest.raises(apd.UnsupportedModel, match=r"fc\.weight is read"):
        decomposition_of(Model(), "fc.weight").attributions(torch.randn(3, 8))


def test_a_matrix_that_is_only_read_bare_was_gone_past():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc, self.rows = nn.Linear(8, 8), nn.Embedding(4, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(x) @ self.rows.weight.T

    with pytest.raises(apd.errors.SiteNotCalled, match=r"went past rows. rows\.weight is read in .*Model\.forward"):
        decomposition_of(Model(), "*").attributions(torch.randn(3, 8))


def test_a_bare_read_on_a_path_that_comes_later_is_refused():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(8, 8)

        def forward(self, x: Tensor, again: bool = False) -> Tensor:
            return F.linear(self.fc(x), self.fc.weight) if again or x.shape[0] == 1 else self.fc(x)

    model, x = Model(), torch.randn(3, 8)
    decomposition = decomposition_of(model, "fc.weight")
    decomposition.attributions(x)
    with decomposition.ablate(0):
        model(x)
        for arguments in ((x[:1],), (x, True)):
            with pytest.raises(apd.UnsupportedModel, match=r"fc\.weight is read"):
                model(*arguments)


def test_reads_that_are_no_use_are_let_through():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc, self.whole = nn.Linear(8, 4, bias=False), nn.Parameter(torch.randn(8, 8))
            self.fc.weight = nn.Parameter(self.whole.detach()[:4])  # the rest of its memory is of something else

        def forward(self, x: Tensor) -> Tensor:
            weight = self.fc.weight
            y = self.fc(x.to(weight.dtype, copy=True)) + self.whole[4:, 0].sum()
            assert weight.T.shape == (8, 4)
            assert weight.detach().requires_grad is False
            return y * weight.shape[0]

    torch.manual_seed(0)
    model, x = Model(), torch.randn(3, 8)
    decomposition = decomposition_of(model, "fc.weight")
    P = decomposition.components.component_weights("fc.weight")
    expected = copy.deepcopy(model)
    with torch.no_grad():
        expected.fc.weight.sub_(P[1].mT)
        with decomposition.ablate(1):
            assert_close(model(x), expected(x))


def test_matrices_that_were_untied_are_read_where_they_are_used():
    model = tiny_gpt2()
    target = apd.wrap(model).untied("lm_head.weight")
    assert decomposition_of(target, "lm_head.weight").attributions(IDS).shape == (5, 5)
    assert decomposition_of(target, "transformer.wte.weight").attributions(IDS).shape == (5, 5)


def test_a_bare_read_in_a_hook_and_in_nnsight():
    model = tiny_gpt2()
    decomposition = decomposition_of(NNsight(model), "*c_fc*")
    weight = model.transformer.h[0].mlp.c_fc.weight
    handle = model.transformer.h[0].register_forward_hook(lambda module, args, out: (out[0] + weight.sum(), *out[1:]))
    with pytest.raises(apd.UnsupportedModel, match=r"c_fc\.weight is read in .*lambda"), decomposition.ablate(0):
        model(IDS)
    handle.remove()
    with decomposition.ablate(0):
        model(IDS)


def masked(model: nn.Linear) -> None:
    mask = torch.ones(8, 8)
    mask[2] = 0
    model.register_forward_pre_hook(lambda module, args: setattr(module.weight, "data", module.weight.data * mask))


def put_over(model: nn.Linear, forward: Callable[[Tensor], Tensor]) -> None:
    model.__dict__["forward"] = forward


CHANGES: dict[str, Callable[[nn.Linear], None]] = {
    "masked in a hook": masked,
    "scaled in a hook": lambda fc: (
        fc.register_forward_pre_hook(lambda m, a: (m.weight.data.mul_(0.5), None)[1]) and None
    ),
    "swapped in a hook": lambda fc: (
        fc.register_forward_pre_hook(lambda m, a: setattr(m, "weight", nn.Parameter(m.weight * 2))) and None
    ),
    "scaled": lambda fc: put_over(fc, lambda x: F.linear(x, fc.weight * 0.9, fc.bias)),
    "sliced": lambda fc: put_over(fc, lambda x: F.pad(F.linear(x, fc.weight[:7], fc.bias[:7]), (0, 1))),
    "quantised": lambda fc: put_over(fc, lambda x: F.linear(x, (fc.weight * 20).round() / 20, fc.bias)),
    "low rank beside": lambda fc: put_over(fc, lambda x: F.linear(x, fc.weight, fc.bias) + x.sum(-1, keepdim=True)),
    "input scaled": lambda fc: put_over(fc, lambda x: F.linear(x * 1.1, fc.weight, fc.bias)),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_weight_that_is_changed_on_the_way_is_refused(change: str):
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3)), torch.randn(6, 8)
    decomposition = decomposition_of(model, "0.weight")
    CHANGES[change](model[0])
    with pytest.raises(apd.UnsupportedModel, match=r"does not multiply by 0\.weight|0\.weight is (changed|read) in"):
        decomposition.attributions(x)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("autocast", [False, True], ids=["plain", "autocast"])
def test_roundings_are_no_change(dtype: torch.dtype, autocast: bool):
    """Also where sums cancel out, in wide layers, and with NaN in some rows."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2000, 30), nn.Linear(30, 4)).to(dtype)
    with torch.no_grad():
        model[0].weight[:, :1000] = -model[0].weight[:, 1000:]
    x = (torch.ones(5, 2000) + 1e-3 * torch.randn(5, 2000)).to(dtype)
    x[3, 7] = torch.nan
    with torch.autocast("cpu", enabled=autocast), decomposition_of(model, "*").ablate(0):
        model(x)


def trained(model: nn.Module) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(torch.randn(2, 8)).square().sum().backward()
    optimizer.step()


def in_numpy(model: nn.Module) -> None:
    model[0].weight.detach().numpy()[1, 2] += 1


WRITES: dict[str, Callable[[nn.Module], object]] = {
    "trained": trained,
    "numpy": in_numpy,
    "data": lambda model: model[0].weight.data.mul_(1.01),
    "one number through data": lambda model: model[0].weight.data[7, 7].add_(0.01),
    "rows change places": lambda model: model[0].weight.data.copy_(model[0].weight.data.flip(0)),
    "load_state_dict": lambda model: model.load_state_dict(nn.Sequential(*map(copy.deepcopy, other())).state_dict()),
    "half": lambda model: model.half(),
    "double": lambda model: model.double(),
    "another parameter": lambda model: setattr(model[0], "weight", nn.Parameter(torch.randn(8, 8))),
}


def other() -> nn.Sequential:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))


@pytest.mark.parametrize("write", WRITES)
def test_weights_that_changed_since_are_an_error_everywhere(write: str, tmp_path):
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3)), torch.randn(6, 8)
    decomposition = decomposition_of(model, "0.weight")
    decomposition.attributions(x)
    same = copy.deepcopy(model.state_dict())
    WRITES[write](model)
    mask = torch.ones(6, 5)
    asks: list[Callable[[], object]] = [
        lambda: decomposition.attributions(x),
        lambda: decomposition.select(x),
        lambda: decomposition.summary(x),
        lambda: decomposition.residuals(),
        lambda: decomposition.edited_state_dict(0),
        lambda: decomposition.sparse(mask).__enter__(),
        lambda: decomposition.ablate(0).__enter__(),
        lambda: decomposition.only(0).__enter__(),
        lambda: apd.responses(decomposition, [x]),
        lambda: decomposition.report([x], tmp_path / "report.html"),
        lambda: apd.metrics.audit(decomposition, [x], masks=lambda _: mask),
        lambda: apd.monitor.fit(decomposition, [x]),
    ]
    for ask in asks:
        with pytest.raises(
            apd.errors.WeightsChanged, match=r"0\.weight has other weights, or another dtype \(here torch"
        ):
            ask()
    with pytest.raises(apd.ArtifactError, match=r"0\.weight has other weights"):
        apd.apply_edit(model, decomposition, 0)
    model.float().load_state_dict(same)
    assert decomposition.attributions(x).shape == (6, 5)


def test_the_same_weights_in_another_place_are_the_same():
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3)), torch.randn(6, 8)
    decomposition = decomposition_of(model, "*")
    expected = decomposition.attributions(x)
    model.load_state_dict(copy.deepcopy(model.state_dict()))
    model[0].weight = nn.Parameter(model[0].weight.detach().clone())
    assert torch.equal(decomposition.attributions(x), expected)


def test_a_model_that_is_trained_while_it_is_decomposed_is_noticed():
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3)), torch.randn(6, 8)
    with pytest.raises(apd.errors.WeightsChanged, match=r"0\.weight has other weights"):
        apd.decompose(
            model, [x], "0.weight", n_components=3, rank=1, progress=False, on_step=lambda step, info: trained(model)
        )


def test_loading_warns_of_other_parameters_that_differ(tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Linear(8, 3)).eval()
    decomposition_of(model, "0.weight").save(tmp_path)
    apd.load(tmp_path, model)
    for change, named in (
        (lambda m: m[2].weight.mul_(2), r"1 of its other 8 .* saved: 2\.weight\. Outputs"),
        (lambda m: m[0].bias.add_(2), r"saved: 0\.bias\. Outputs"),
        (lambda m: m[1].running_mean.add_(1), r"saved: 1\.running_mean\. Outputs"),
        (lambda m: m.register_buffer("scale", torch.ones(2)), r"saved: scale\. Outputs"),
    ):
        changed = copy.deepcopy(model)
        with torch.no_grad():
            change(changed)
        with pytest.warns(apd.errors.ApdWarning, match=named):
            apd.load(tmp_path, changed)


def test_exact_names_come_before_patterns():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.d = nn.ModuleDict({"block[0]": nn.Linear(6, 3), "block0": nn.Linear(6, 3), "b*": nn.Linear(6, 3)})

    target = apd.wrap(Model())
    assert target.match(["d.block[0].weight"]) == ["d.block[0].weight"]
    assert target.match("d.b*.weight") == ["d.b*.weight"]
    assert target.match("d.block?.weight") == ["d.block0.weight"]
    assert target.match("d.b*0*.weight") == ["d.block[0].weight", "d.block0.weight"]


def test_weights_that_are_not_loaded():
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(4, 4))
    assert len(apd.wrap(model).weights) == 1
    with pytest.raises(apd.UnsupportedModel, match=r"0\.weight is on the meta device: .* Load the model whole"):
        apd.init(model, n_components=2)


@pytest.mark.parametrize("where", ["cpu", "disk"])
def test_weights_that_accelerate_offloads(where: str, tmp_path):
    accelerate = pytest.importorskip("accelerate")
    model, x = tiny_gpt2(), IDS
    saved = decomposition_of(model, "*mlp*")
    saved.save(tmp_path / "saved")
    offloaded = copy.deepcopy(model)
    if where == "cpu":
        accelerate.cpu_offload(offloaded, execution_device="cpu")
    else:
        accelerate.disk_offload(offloaded, str(tmp_path / "offload"), execution_device="cpu")
    for ask in (lambda: decomposition_of(offloaded, "*mlp*"), lambda: apd.load(tmp_path / "saved", offloaded)):
        with pytest.raises(apd.UnsupportedModel, match=re.escape("remove_hook_from_module(model, recurse=True)")):
            ask()
    accelerate.cpu_offload(model, execution_device="cpu")  # after decomposing
    with pytest.raises(apd.UnsupportedModel, match="is on the meta device"):
        saved.attributions(x)


def test_hooks_of_accelerate_are_gone_through():
    accelerate = pytest.importorskip("accelerate")
    model = tiny_gpt2()
    with warnings.catch_warnings(action="ignore"):
        dispatched = accelerate.dispatch_model(copy.deepcopy(model), device_map={"": "cpu"}, force_hooks=True)
    decomposition = decomposition_of(dispatched, "*mlp*")
    expected = copy.deepcopy(model)
    with torch.no_grad():
        for name in decomposition.components.names:
            expected.get_parameter(name).sub_(decomposition.components.component_weights(name)[0])
        with decomposition.ablate(0):
            assert_close(dispatched(IDS).logits, expected(IDS).logits, rtol=1e-5, atol=1e-5)


def test_a_projection_that_all_examples_share():
    """DeBERTa projects relative positions, `1 pos d`, and repeats them by itself."""
    torch.manual_seed(0)
    config = DebertaV2Config(
        vocab_size=20, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=10, relative_attention=True, position_buckets=4, pos_att_type=["p2c", "c2p"],
        share_att_key=True,
    )  # fmt: skip
    model = DebertaV2ForMaskedLM(config).eval()
    decomposition = decomposition_of(model, "*query_proj*")
    (name,) = decomposition.components.names
    expected = copy.deepcopy(model)
    with torch.no_grad():
        expected.get_parameter(name).sub_(decomposition.components.component_weights(name)[0].mT)
        with decomposition.ablate(0):
            assert_close(model(IDS).logits, expected(IDS).logits, rtol=1e-5, atol=1e-5)
    with pytest.raises(apd.UnsupportedModel, match=r"query_proj\.weight at .* on \(1, .* one example at a time"):
        decomposition.attributions(IDS)
    with decomposition.sparse(RULE), pytest.raises(apd.UnsupportedModel, match="one example at a time"):
        model(IDS)
    one = decomposition.attributions(IDS[:1])
    assert one.shape == (1, 5)
    with torch.no_grad():
        expected.get_parameter(name).copy_(decomposition.components.summed(name, RULE[0].float()).mT)
        with decomposition.sparse(RULE[:1]):
            assert_close(model(IDS[:1]).logits, expected(IDS[:1]).logits, rtol=1e-5, atol=1e-5)
