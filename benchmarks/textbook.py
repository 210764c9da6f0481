"""One training step of the method as a textbook would write it: dense einsums, and a loop over the outputs.

The yardstick of the other benchmarks, not part of the package: what it computes is checked against the golden numbers
(tests/test_benchmarks.py), and it keeps what the formulas name: x P_c for every component and data point, one backward
pass an output, every P_c as a full matrix. For models whose decomposed matrices are called as leaf modules on
`batch d_in`.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, einsum, nn

import apd_lens as apd


@dataclass(frozen=True)
class Site:
    """A leaf module that multiplies by a decomposed matrix, or by its transpose."""

    module: str
    matrix: str
    transposed: bool = False


@dataclass(frozen=True)
class Textbook:
    """The settings of `apd_lens.Losses` and `apd_lens.BatchTopK`, and where the matrices are."""

    sites: Sequence[Site]
    weights: Mapping[str, Tensor]
    k: float
    losses: apd.Losses


def step(
    model: nn.Module,
    book: Textbook,
    A: Mapping[str, nn.Parameter],
    B: Mapping[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
    x: Tensor,
) -> Tensor:
    """The loss before the update; A and B are changed by `optimizer`."""
    with recorded(model, book.sites) as calls, kept(model, book.losses.hidden_at) as hidden:
        target_output = model(x)
    n_outputs = target_output.shape[1]

    # Attribution: sqrt of the mean over outputs of (Σ over sites of <∂f_o/∂y, x P_c>)².
    with torch.no_grad():
        component_acts = [component_outputs(calls[i][0], *factors(site, A, B)) for i, site in enumerate(book.sites)]
    total = torch.zeros(component_acts[0].shape[:2], dtype=x.dtype)
    for o in range(n_outputs):
        gradients = torch.autograd.grad(target_output[:, o].sum(), [y for _, y in calls], retain_graph=True)
        with torch.no_grad():
            effect = sum(einsum("bo,bco->bc", g, acts) for g, acts in zip(gradients, component_acts, strict=True))
            total += effect**2
    attributions = (total / n_outputs).sqrt()

    mask = torch.zeros_like(attributions)
    mask.view(-1)[attributions.flatten().topk(int(book.k * len(x))).indices] = 1

    with replaced(model, book.sites, A, B, mask), kept(model, book.losses.hidden_at) as sparse_hidden:
        sparse_output = model(x)

    n_parameters = sum(weight.numel() for weight in book.weights.values())
    loss = book.losses.minimality * ((sparse_output - target_output.detach()) ** 2).mean()
    for name, weight in book.weights.items():
        component_weights = einsum("cim,cmo->cio", A[name], B[name])
        loss = loss + book.losses.faithfulness * ((weight - component_weights.sum(0)) ** 2).sum() / n_parameters
        norms = (A[name] ** 2).sum(1) * (B[name] ** 2).sum(2)
        schatten = einsum("bc,cm->b", mask, (norms + 1e-16) ** (book.losses.schatten_p / 2)).mean()
        loss = loss + book.losses.simplicity * schatten / n_parameters
    if book.losses.hidden:
        errors = sum(((sparse_hidden[name] - hidden[name].detach()) ** 2).sum(1).mean() for name in hidden)
        units = sum(value.shape[1] for value in hidden.values())
        loss = loss + book.losses.hidden * errors / units
    optimizer.zero_grad()
    loss.backward(inputs=[*A.values(), *B.values()])
    optimizer.step()
    return loss.detach()


def factors(site: Site, A: Mapping[str, Tensor], B: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    if site.transposed:
        return B[site.matrix].mT, A[site.matrix].mT
    return A[site.matrix], B[site.matrix]


def component_outputs(x: Tensor, A: Tensor, B: Tensor) -> Tensor:
    return einsum("bcm,cmo->bco", einsum("bi,cim->bcm", x, A), B)


@contextmanager
def recorded(model: nn.Module, sites: Sequence[Site]) -> Iterator[list[tuple[Tensor, Tensor]]]:
    calls: list[tuple[Tensor, Tensor]] = []

    def record(module: nn.Module, args: tuple[Tensor], y: Tensor) -> Tensor:
        y = y if y.requires_grad else y.detach().requires_grad_()
        calls.append((args[0].detach(), y))
        return y

    handles = [model.get_submodule(site.module).register_forward_hook(record) for site in sites]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def replaced(
    model: nn.Module, sites: Sequence[Site], A: Mapping[str, Tensor], B: Mapping[str, Tensor], mask: Tensor
) -> Iterator[None]:
    def hook_for(site: Site):
        def replace(module: nn.Module, args: tuple[Tensor], y: Tensor) -> Tensor:
            acts = component_outputs(args[0], *factors(site, A, B)) * mask[:, :, None]
            bias = getattr(module, "bias", None)
            return acts.sum(1) if bias is None else acts.sum(1) + bias

        return replace

    handles = [model.get_submodule(site.module).register_forward_hook(hook_for(site), prepend=True) for site in sites]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def kept(model: nn.Module, names: Sequence[str]) -> Iterator[dict[str, Tensor]]:
    activations: dict[str, Tensor] = {}

    def hook_for(name: str):
        def keep(module: nn.Module, args: tuple[Tensor], activation: Tensor) -> None:
            activations[name] = activation

        return keep

    handles = [model.get_submodule(name).register_forward_hook(hook_for(name)) for name in names]
    try:
        yield activations
    finally:
        for handle in handles:
            handle.remove()
