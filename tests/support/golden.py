"""The systems behind the golden numbers."""

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors.torch import load_file
from support.toy_models import TMS, ResidualMLP
from torch import Tensor, nn

import apd_lens as apd

EXACT = {"rtol": 0, "atol": 1e-9}
GOLDEN = Path(__file__).parent.parent / "golden"


@dataclass(frozen=True, eq=False)
class Case:
    settings: dict
    tensors: dict[str, Tensor]
    model: nn.Module
    names: dict[str, str]  # ours -> golden's
    hidden_at: tuple[str, ...]

    def state(self, k: float, selection: Callable[[float], object] = apd.BatchTopK) -> apd.training.State:
        coefficients, paper = self.settings["coefficients"], apd.paper()
        state = apd.init(
            self.model,
            weights=list(self.names),
            n_components=len(self.tensors["batch_topk_mask"][0]),
            rank=self.tensors[f"A.{next(iter(self.names.values()))}"].shape[-1],
            selection=selection(k),
            losses=replace(
                paper["losses"],
                faithfulness=coefficients["faithfulness"],
                minimality=coefficients["minimality"],
                simplicity=coefficients["simplicity"],
                schatten_p=self.settings["schatten_p"],
                hidden=coefficients["hidden_activation"],
                hidden_at=self.hidden_at,
            ),
            optimization=replace(
                paper["optimization"],
                steps=self.settings["train_steps"],
                lr=self.settings["lr"],
                schedule="constant",
                warmup=0.0,
            ),
            moves=paper["moves"],
        )
        with torch.no_grad():
            for name, golden in self.names.items():
                state.components.A[name].copy_(self.tensors[f"A.{golden}"])
                state.components.B[name].copy_(self.tensors[f"B.{golden}"])
        return state

    def simplicity_offset(self) -> float:
        """What the reference adds to the simplicity loss (below 1e-5): its 1e-16 under the root stands in masked-out
        components too, m times in each, of which there are C − k a data point."""
        n_masked_out = len(self.tensors["batch_topk_mask"][0]) - self.settings["k"]
        rank = self.tensors[f"A.{next(iter(self.names.values()))}"].shape[-1]
        each = n_masked_out * rank * 1e-16 ** (self.settings["schatten_p"] / 2)
        return each * len(self.names) / self.n_parameters()

    def n_parameters(self) -> int:
        weights = apd.wrap(self.model).weights
        return sum(weights[name].value().numel() for name in self.names)

    def decomposition(self, **changes) -> apd.Decomposition:
        return self.state(k=self.settings["k"], **changes).decomposition()


def tms() -> Case:
    tensors = load_file(GOLDEN / "tms.safetensors")
    model = TMS(6, 3).double()
    with torch.no_grad():
        model.linear1.weight.copy_(tensors["target.linear1"])
        model.linear1.bias.zero_()
        model.linear2.bias.copy_(tensors["b_final"])
    settings = json.loads((GOLDEN / "tms.json").read_text())
    return Case(settings, tensors, model, {"linear1.weight": "linear1"}, ())


class ReferenceResidualMLP(ResidualMLP):
    """With one more module per layer, only to be watched: the reference's hidden activations leave the bias out."""

    def __init__(self):
        super().__init__(n_features=6, d_resid=10, d_mlp=4, n_layers=2)
        for layer in self.layers:
            layer["unbiased_act"] = nn.ReLU()
            layer["mlp_in"].register_forward_hook(
                lambda mlp_in, args, pre, act=layer["unbiased_act"]: (act(pre - mlp_in.bias), pre)[1]
            )


def residual_mlp() -> Case:
    tensors = load_file(GOLDEN / "resid_mlp_2layer.safetensors")
    model = ReferenceResidualMLP().double()
    names = {f"layers.{i}.{side}.weight": f"layers.{i}.{side}" for i in (0, 1) for side in ("mlp_in", "mlp_out")}
    with torch.no_grad():
        for golden in names.values():
            model.get_submodule(golden).weight.copy_(tensors[f"target.{golden}"].T)
            model.get_submodule(golden).bias.copy_(tensors[f"bias.{golden}"])
        model.W_E.weight.copy_(tensors["W_E"].T)
        model.W_U.weight.copy_(tensors["W_U"].T)
    settings = json.loads((GOLDEN / "resid_mlp_2layer.json").read_text())
    return Case(settings, tensors, model, names, ("layers.0.unbiased_act", "layers.1.unbiased_act"))
