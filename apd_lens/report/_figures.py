"""The overview figures, without colours of text and ground: the page gives them those of its light or dark scheme."""

from typing import Any

import numpy as np
import torch
from plotly import graph_objects as go
from torch import Tensor

from apd_lens._table import short_names
from apd_lens.report._collect import Numbers, Run

# Okabe and Ito 2008; on light and on dark ground.
FOUND, NULL, NOTHING = "#3388c8", "#999999", "#d55e00"
_FADE = [[0, "rgba(51,136,200,0)"], [1, "rgb(51,136,200)"]]
# Components in figures that have a column for each.
_COLUMNS = 500


def figures(numbers: Numbers, order: list[int], names: list[str], distance: str) -> list[dict[str, Any]]:
    """Figures with a title and a sentence about each; `order` is that of the components in the list."""
    alive = [c for c in order if numbers.responses.active[c] > 0]
    made = [
        ("How often components are active", *_activity(numbers)),
        ("Components seen active", *_alive(numbers)),
        ("Output on k components alone", *_by_k(numbers, distance)),
        ("Attribution of each component", *_attributions(numbers)),
        ("Effective rank", *_ranks(numbers, alive)),
    ]
    if len(names) > 1:
        made.append(("Where components are", *_layers(numbers, alive, names)))
    return [{"title": title, "about": about, "figure": figure.to_plotly_json()} for title, about, figure in made]


def _figure(x: str, y: str, **layout: Any) -> go.Figure:
    legend = {"orientation": "h", "x": 0, "y": 1.02, "yanchor": "bottom"}
    margin = {"l": 60, "r": 12, "t": 12, "b": 48}
    figure = go.Figure(layout={"template": None, "margin": margin, "legend": legend, **layout})
    figure.update_layout(xaxis_title_text=x, yaxis_title_text=y)
    return figure


def _activity(numbers: Numbers) -> tuple[str, go.Figure]:
    n = numbers.responses.n_data_points
    shares = numbers.responses.active
    figure = _figure("active, share of data points", "components", bargap=0.06)
    edges = np.linspace(min(-1, np.floor(np.log10(1 / n))), 0, 25)
    counts, _ = np.histogram(shares[shares > 0].log10().clamp_max(-1e-9).numpy(), edges)
    middle = 10 ** ((edges[1:] + edges[:-1]) / 2)
    figure.add_bar(
        x=middle.round(7),
        y=counts,
        width=(10 ** edges[1:] - 10 ** edges[:-1]).round(7),
        marker_color=FOUND,
        hovertemplate="%{y} components, about %{x:.2%}<extra></extra>",
    )
    figure.update_xaxes(type="log", tickformat="~%", dtick=1)
    n_dead = int((shares == 0).sum())
    never = f"The {n_dead} that are never active are not drawn." if n_dead else "None is never active."
    return never, figure


def _alive(numbers: Numbers) -> tuple[str, go.Figure]:
    figure = _figure("data points seen", "components active so far")
    n = numbers.responses.n_data_points

    def add(run: Run, name: str, colour: str, dash: str) -> None:
        first = run.first_active[run.first_active < n].sort().values + 1
        x = torch.cat([torch.tensor([0], device="cpu"), first, torch.tensor([n], device="cpu")])
        y = torch.cat([torch.arange(len(first) + 1, device="cpu"), torch.tensor([len(first)], device="cpu")])
        kept = torch.linspace(0, len(x) - 1, min(len(x), 300), dtype=torch.float32, device="cpu").round().long()
        figure.add_scatter(
            x=x[kept].numpy(),
            y=y[kept].numpy(),
            name=name,
            mode="lines",
            line={"color": colour, "dash": dash, "shape": "hv"},
        )

    add(numbers.found, "components", FOUND, "solid")
    add(numbers.null, "random", NULL, "dot")
    figure.update_yaxes(rangemode="tozero")
    return "Where the line is flat, more data would not bring more of them to life.", figure


def _by_k(numbers: Numbers, distance: str) -> tuple[str, go.Figure]:
    figure = _figure("k, active components", distance)
    for run, name, colour, dash in (
        (numbers.found, "components", FOUND, "solid"),
        (numbers.null, "random", NULL, "dot"),
    ):
        figure.add_scatter(
            x=numbers.ks, y=run.by_k, name=name, mode="lines+markers", line={"color": colour, "dash": dash}
        )
    figure.add_scatter(
        x=[numbers.ks[0], numbers.ks[-1]],
        y=[numbers.nothing] * 2,
        name="none on",
        mode="lines",
        line={"color": NOTHING, "dash": "dash", "width": 1},
    )
    figure.update_xaxes(type="log", dtick=1)
    figure.update_yaxes(type="log", exponentformat="power", dtick=1)
    about = f"Distance from the target's output, of the first {numbers.n_in_curve:,} data points"
    return f"{about}; “none on” is of all.", figure


def _attributions(numbers: Numbers) -> tuple[str, go.Figure]:
    sample = numbers.sample
    top = sample.argmax(1)
    held = {int(c): i for i, c in reversed(list(enumerate(top)))}
    peak = sample.max(0).values.tolist()
    columns = sorted(range(sample.shape[1]), key=lambda c: (held.get(c, len(sample)), -peak[c]))[:_COLUMNS]
    place = {c: i for i, c in enumerate(columns)}
    rows = sorted(range(len(sample)), key=lambda i: (not sample[i].any(), place[int(top[i])], i))
    shown = sample / sample.max(1, keepdim=True).values.clamp_min(torch.finfo(sample.dtype).tiny)
    figure = _heatmap(shown[rows][:, columns], "components, sorted", "data point", columns)
    some = f" {_COLUMNS} of {sample.shape[1]} components." if len(columns) < sample.shape[1] else ""
    return f"{len(sample)} data points drawn at random; each row divided by its largest entry.{some}", figure


def _heatmap(values: Tensor, x: str, y: str, components: list[int], names: list[str] | None = None) -> go.Figure:
    figure = _figure(x, y)
    figure.add_heatmap(
        z=(values * 255).round().to(torch.uint8).numpy(),
        x=[str(c) for c in components],
        y=names,
        zmin=0,
        zmax=255,
        colorscale=_FADE,
        showscale=False,
        hovertemplate=f"component %{{x}}, {'' if names else 'row '}%{{y}}<extra></extra>",
    )
    figure.update_xaxes(type="category", showticklabels=False, ticks="", showgrid=False)
    figure.update_yaxes(autorange="reversed", showgrid=False, zeroline=False)
    return figure


def _ranks(numbers: Numbers, alive: list[int]) -> tuple[str, go.Figure]:
    figure = _figure("effective rank, summed over matrices", "components", bargap=0.06)
    total = numbers.ranks.sum(1)[alive]
    figure.add_histogram(x=total.numpy().round(4), nbinsx=30, marker_color=FOUND)
    figure.update_traces(hovertemplate="%{y} components, rank %{x}<extra></extra>")
    return f"Of the {len(alive)} components that are ever active.", figure


def _layers(numbers: Numbers, alive: list[int], names: list[str]) -> tuple[str, go.Figure]:
    main = numbers.shares.argmax(1)
    order = sorted(alive, key=lambda c: (int(main[c]), -numbers.shares[c, main[c]].item()))[:_COLUMNS]
    shown = numbers.shares[order].T if order else torch.zeros(len(names), 1, dtype=torch.float32, device="cpu")
    figure = _heatmap(shown, "components, sorted", "", order, short_names(names))
    figure.update_yaxes(automargin=True)
    some = f" {_COLUMNS} of {len(alive)} of them." if len(order) < len(alive) else ""
    return f"Share of squared norm in each matrix, of those ever active, sorted by main matrix.{some}", figure
