"""The page itself: numbers, examples and figures as JSON in a template, with plotly.js inside, written at once."""

import base64
import dataclasses
import gzip
import json
import math
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import jinja2
import pandas as pd
import plotly
import torch
from markupsafe import Markup
from plotly.offline import get_plotlyjs
from plotly.utils import PlotlyJSONEncoder
from torch import Tensor

from apd_lens._codec import UserFunction, encode_settings
from apd_lens._errors import ArtifactError, InvalidSetting
from apd_lens._files import user_path, write_file
from apd_lens._memory import BUDGET
from apd_lens._table import short_names
from apd_lens.compare._architecture import weight_map
from apd_lens.components._measures import random_components
from apd_lens.data._batch import Batch
from apd_lens.data._stream import one_pass
from apd_lens.decomposition._artifact import library_versions
from apd_lens.decomposition._decomposition import Decomposition
from apd_lens.language._words import Decode, called, decode_with, own_decode, tokens_of
from apd_lens.masks._selection import K
from apd_lens.report._collect import Here, Numbers, alike_in_activity, alike_in_weights, collect
from apd_lens.report._examples import Shower, Shown, Words
from apd_lens.report._figures import figures
from apd_lens.responses._ablation import LossFn, known_distance
from apd_lens.responses._responses import TopExamples

# A list of names, one for each output unit, or a function of the unit.
Names = Sequence[str] | Callable[[int], str]

# Base 85 without "<" and "&".
_FOR_SCRIPTS = bytes.maketrans(b"<&", b",.")
_N_TOGETHER, _N_TWINS = 6, 4
_N_HEADS = 6


def write_report(
    decomposition: Decomposition,
    batches: Iterable[Batch],
    path: str | os.PathLike[str],
    *,
    decode: Decode | None = None,
    output_names: Names | None = None,
    input_names: Sequence[str] | None = None,
    matches: pd.DataFrame | None = None,
    others: Iterable[Batch] | None = None,
    beside: Decomposition | None = None,
    names: tuple[str, str] = ("this", "the other"),
    examples: int = 8,
    outputs: int = 8,
    context: int = 16,
    k: K | None = None,
    centred: bool | None = None,
    loss: LossFn | None = None,
    title: str | None = None,
    memory: int = BUDGET,
    seed: int = 0,
) -> Path:
    """Writes one self-contained HTML page to look at, which `Decomposition.report` does too.

    Args:
        batches: all batches to look at; iterated once.
        path: the file to write.
        decode: a tokenizer, or a function of a token; default the model's own.
        output_names: names of the output units, or a function of the unit; default tokens, or their numbers.
        input_names: names of the numbers of an input without tokens.
        matches: a table with a column "component", of what components were matched with, such as
            `apd_lens.compare.direction_match(...).table()`.
        others: other data, such as general text. Of every component it is shown how often it is on there, and where.
        beside: another decomposition of this model. Each component is shown side by side with its closest one there.
        names: what the two are called.
        examples, outputs, k, centred, loss, memory: as of `apd_lens.responses`.
        context: tokens that are shown in front of the one at which a component matters most, and half as many behind.
        title: default the model's class and the number of components.
        seed: of random components.

    Returns:
        The path.

    Raises:
        ArtifactError: the path is a folder.
        InvalidSetting: names of another number than there are units, a table without the column, or another
            decomposition that cannot be compared with this one.
        InvalidBatches: an empty stream.
    """
    path = user_path(path)
    if os.path.isdir(path):
        raise ArtifactError(f"Expected a file to write the report to, but {path} is a folder. Try {path}/report.html.")
    if examples < 1 or outputs < 1 or context < 0:
        raise InvalidSetting(
            f"Expected at least one example and one output, and a context from 0 on, got {examples=}, {outputs=}, "
            f"{context=}."
        )
    if beside is not None and not _are_comparable(decomposition, beside):
        raise InvalidSetting(
            "The other decomposition has no matrix in common with this one, and other data points, so nothing says "
            "which components are alike. Give one of the same matrices, or of the same granularity."
        )
    n_components = decomposition.components.n_components
    tables = [_matches_of_components(matches, n_components), _Matches([], {})]
    both = [decomposition] if beside is None else [decomposition, beside]
    if beside is not None:  # each goes through all data
        batches, others = list(one_pass(batches)), None if others is None else list(one_pass(others))
    measured = {"outputs": outputs, "centred": centred, "loss": loss, "memory": memory}
    found = [collect(one, batches, others, examples=examples, k=k, seed=seed, **measured) for one in both]
    model = decomposition.target.model
    decode = own_decode(model) if decode is None else decode_with(decode)
    words = Words()
    sides, rows = [], []
    for one, numbers, table in zip(both, found, tables, strict=False):
        showers = [Shower(one.target, decode, input_names, context, context // 2, words) for _ in range(2)]
        sides.append(_data(one, numbers, showers, decode, output_names, table))
        rows.append(_rows(one, numbers))
    if beside is not None:
        rows[0].append(_put_peers(decomposition, beside, batches, k, seed, names, sides))
    numbers = found[0]
    of_matrices = decomposition.components.names, distance_name(decomposition)
    sides[0]["figures"] = figures(numbers, sides[0]["order"], *of_matrices)  # those of the first are drawn
    page = _template().render(
        title=f"{type(model).__name__} in {n_components} component{'s' * (n_components > 1)}"
        if title is None
        else title,
        columns=["components", "random components"] if beside is None else [names[0], "random", names[1], "random"],
        rows=_side_by_side(rows),
        n_examples=numbers.responses.n_examples,
        n_data_points=numbers.responses.n_data_points,
        of_positions=decomposition.settings.selection.granularity == "position",
        n_components=n_components,
        n_alive=numbers.found.n_alive(numbers.responses.n_data_points),
        matrices=_matrices(decomposition),
        settings=_settings(decomposition),
        versions=library_versions(model) | {"plotly": plotly.__version__},
        data=_packed(
            json.dumps({"sides": sides, "names": names[: len(both)], "words": words.strings}, cls=PlotlyJSONEncoder)
        ),
        plotly=_packed_plotly(),
    )
    write_file(path, page.encode())
    return path


Row = tuple[str, str, float | None, float | None]


def _side_by_side(rows: list[list[Row]]) -> list[tuple[str, str, list[float | None]]]:
    """What and explanation, with the numbers of each decomposition beside those of random components."""
    about = {name: text for side in reversed(rows) for name, text, *_ in side}
    of_each = [{name: values for name, _, *values in side} for side in rows]
    return [(n, about[n], [value for side in of_each for value in side.get(n, [None, None])]) for n in about]


def _are_comparable(one: Decomposition, other: Decomposition) -> bool:
    same_points = one.settings.selection.granularity == other.settings.selection.granularity
    return same_points or not set(one.components.names).isdisjoint(other.components.names)


def _put_peers(
    one: Decomposition,
    other: Decomposition,
    batches: Iterable[Batch],
    k: K | None,
    seed: int,
    names: Sequence[str],
    sides: list[dict[str, Any]],
) -> Row:
    """Gives each component of each its closest one in the other, by cosine, or if they have no matrix in common by when
    they are active. Returns the mean of the first's, and of the same with random components in the other's place."""
    alike, active = alike_in_weights(one, other), alike_in_activity(one, other, batches, k)
    random = replace(other, components=random_components(other.components, seed))
    by_activity = bool(alike.isnan().all())
    score = active if by_activity else alike
    null = alike_in_activity(one, random, batches, k) if by_activity else alike_in_weights(one, random)
    for side, scores, numbers in ((sides[0], score, (alike, active)), (sides[1], score.T, (alike.T, active.T))):
        closest = scores.nan_to_num(-1).argmax(1).tolist()
        side["peers"] = [[d, *(_plain(values[c, d]) for values in numbers)] for c, d in enumerate(closest)]
    alive = torch.tensor(sides[0]["activity"], device="cpu") > 0
    found, of_random = (values[alive].amax(1).mean().item() if bool(alive.any()) else None for values in (score, null))
    what = "Jaccard index" if by_activity else "cosine"
    return (f"{what} with the closest component of {names[1]}", "mean over components alive", found, of_random)


@cache
def _packed_plotly() -> Markup:
    return _packed(get_plotlyjs())


def _packed(text: str) -> Markup:
    """Gzip in base 85, which holds nothing that ends a script."""
    packed = base64.b85encode(gzip.compress(text.encode(), 9, mtime=0))
    return Markup(packed.translate(_FOR_SCRIPTS).decode())


@cache
def _template() -> jinja2.Template:
    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    environment = jinja2.Environment(loader=loader, autoescape=True, undefined=jinja2.StrictUndefined)
    environment.filters["number"] = _number
    return environment.get_template("page.html")


def _number(value: float | None) -> str:
    """Four digits, as people write them."""
    if value is None:
        return "–"
    if float(value).is_integer() and abs(value) < 1e9:
        return f"{int(value):,}"
    return f"{value:.4g}" if 1e-4 <= abs(value) < 1e6 else f"{value:.3e}"


def _rows(decomposition: Decomposition, numbers: Numbers) -> list[Row]:
    """What is stated at the top: what, explanation, of the components, of random ones."""
    found, null, responses = numbers.found, numbers.null, numbers.responses
    n, alive = responses.n_data_points, responses.active > 0
    names = decomposition.components.names
    called = dict(zip(names, short_names(names), strict=True)) | {"all": "all matrices"}
    residuals = [
        (f"residual of {called[name]}", "‖W − Σ P‖ / ‖W‖", value, null.residuals[name])
        for name, value in found.residuals.items()
    ]
    if len(residuals) == 2:  # one matrix, which is all
        residuals = residuals[:1]
    unit = distance_name(decomposition)

    def mean(values: Tensor | None) -> float | None:
        return values[alive].mean().item() if values is not None and bool(alive.any()) else None

    rows = [
        *residuals,
        ("components alive", "active on at least one data point", found.n_alive(n), null.n_alive(n)),
        ("active components", "of a data point, mean", found.n_active, null.n_active),
        ("selected components alone", f"{unit} to the target's output; with none on {_number(numbers.nothing)}",
         found.sparse, null.sparse),
        ("one component taken out", "change of the output, root mean square, on the component's top examples",
         mean(found.effects.change), mean(null.effects.change)),
        (f"as {unit}", "the same change", mean(found.effects.distance), mean(null.effects.distance)),
    ]  # fmt: skip
    if len(alive) > 1:
        twins = mean(numbers.alike.amax(1)), mean(numbers.alike_null)
        rows.append(("cosine with the closest other", "of weights, mean over components alive", *twins))
    if found.effects.loss is not None:
        rows.append(("as rise of the loss", "the same change", mean(found.effects.loss), mean(null.effects.loss)))
    return rows


def distance_name(decomposition: Decomposition) -> str:
    """What the distance is called."""
    distance = known_distance(decomposition)
    if distance == "mse":
        return "mean squared error"
    return "KL divergence in nats" if distance == "kl" else getattr(distance, "__name__", "distance")


def _matrices(decomposition: Decomposition) -> list[tuple[str, str, int, int, int]]:
    """Short name, name, d_in, d_out, rank of the components."""
    sizes = decomposition.components.sizes
    return [
        (short, name, d_in, d_out, m)
        for short, (name, (d_in, m, d_out)) in zip(short_names(list(sizes)), sizes.items(), strict=True)
    ]


def _settings(decomposition: Decomposition) -> list[tuple[str, str]]:
    """Every setting in words; functions by name."""
    settings = decomposition.settings
    return [(field.name, _words(getattr(settings, field.name))) for field in dataclasses.fields(settings)]


def _words(value: Any) -> str:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = (f"{field.name}={_words(getattr(value, field.name))}" for field in dataclasses.fields(value))
        return f"{type(value).__name__}({', '.join(fields)})"
    if isinstance(value, UserFunction):
        return value.name
    return encode_settings(value)["name"] if callable(value) else repr(value)


@dataclasses.dataclass(frozen=True)
class _Matches:
    """Rows of a table for each component, without the column "component"."""

    columns: list[str]
    rows: dict[int, list[list[Any]]]


def _matches_of_components(matches: pd.DataFrame | None, n_components: int) -> _Matches:
    if matches is None:
        return _Matches([], {})
    if "component" not in matches.columns:
        raise InvalidSetting(
            f"Expected matches to have a column 'component', got {list(matches.columns)}. If it is the index, give "
            "matches.reset_index()."
        )
    unknown = sorted(set(matches["component"]) - set(range(n_components)))
    if unknown:
        raise InvalidSetting(f"matches has components {unknown[:5]}, expected numbers from 0 to {n_components - 1}.")
    rest = matches.drop(columns="component")
    rows: dict[int, list[list[Any]]] = {}
    for component, *values in zip(matches["component"], *(rest[name] for name in rest), strict=True):
        rows.setdefault(int(component), []).append([_plain(value) for value in values])
    return _Matches([str(name) for name in rest.columns], rows)


def _plain(value: Any) -> float | str | bool | None:
    """A table's entry as JSON has it."""
    value = value.item() if hasattr(value, "item") else value
    if isinstance(value, float):
        return _short(value) if math.isfinite(value) else None
    return value if isinstance(value, int | str | bool) or value is None else str(value)


def _data(
    decomposition: Decomposition,
    numbers: Numbers,
    showers: Sequence[Shower],
    decode: Decode | None,
    output_names: Names | None,
    matches: _Matches,
) -> dict[str, Any]:
    """What the page's script reads; columns with an entry for each component, strings by their numbers in `words`.

    Args:
        showers: of the data, and of the other data.
    """
    shower, elsewhere = showers[0], numbers.others
    responses, top, effects = numbers.responses, numbers.responses.top, numbers.found.effects
    C, names = len(responses.active), decomposition.components.names
    name_of = _output_namer(decomposition, numbers, shower, decode, output_names)
    others = responses.together.strongest(_N_TOGETHER)
    counts, lift, jaccard = responses.together.counts, responses.together.lift, responses.together.jaccard
    activity, attribution = responses.active.tolist(), responses.attribution.tolist()
    order = sorted(range(C), key=lambda c: (-activity[c], -attribution[c]))

    def together(c: int) -> list[list[float]]:
        found = [other for other in others[c].tolist() if other >= 0]
        return [[o, int(counts[c, o]), _short(lift[c, o].item()), _short(jaccard[c, o].item())] for o in found]

    def units(indices: Tensor, *values: Tensor | None) -> list[list[float]]:
        """Of each output its name, and the values that are known."""
        known = [_shorts(some) for some in values if some is not None]
        return [[name_of(int(index)), *of_one] for index, *of_one in zip(indices, *known, strict=True)]

    def of_component(values: Tensor | None, c: int) -> Tensor | None:
        return None if values is None else values[c]

    def without(c: int, rank: int) -> list[Any]:
        """How far the output of an example goes without the component, its place, and the outputs that change most."""
        each = effects.on_each
        if each.distance[c, rank].isnan():
            return []
        changed = zip(
            each.outputs[c, rank].tolist(), _shorts(each.whole[c, rank]), _shorts(each.without[c, rank]), strict=True
        )
        named = [[name_of(unit), before, after] for unit, before, after in changed]
        return [_short(each.distance[c, rank].item()), int(each.position[c, rank]), named]

    def on_others(c: int) -> list[list[Any]]:
        if elsewhere is None:
            return []
        largest = 0.0 if top.positions is None else top.positions[c].nan_to_num(0).max().item()
        return [
            _written(elsewhere.top, c, *ranked) for ranked in enumerate(showers[1].shown(elsewhere.top, c, largest))
        ]

    cosine, which = numbers.alike.topk(min(_N_TWINS, C - 1))
    twins = [list(map(list, zip(*row, strict=True))) for row in zip(which.tolist(), map(_shorts, cosine), strict=True)]
    components = [
        {
            "promoted": units(effects.promoted[c], of_component(effects.promoted_p, c), effects.promoted_by[c]),
            "suppressed": units(effects.suppressed[c], of_component(effects.suppressed_p, c), effects.suppressed_by[c]),
            "inputs": [[*_written(top, c, r, shown), without(c, r)] for r, shown in enumerate(shower.shown(top, c))],
            "others": on_others(c),
            "twins": twins[c],
            "together": together(c),
        }
        for c in range(C)
    ]
    ablation = {
        "change": (effects.change, numbers.null.effects.change),
        "distance": (effects.distance, numbers.null.effects.distance),
    }
    if effects.loss is not None and numbers.null.effects.loss is not None:
        ablation["loss"] = (effects.loss, numbers.null.effects.loss)
    return {
        "order": order,
        "activity": [_short(share) for share in activity],
        "attribution": [_short(value) for value in attribution],
        "nExamples": effects.n_examples.tolist(),
        "ablation": {name: [_shorts(found), _shorts(null)] for name, (found, null) in ablation.items()},
        "distance": distance_name(decomposition),
        "centred": effects.centred,
        "matrices": names,
        "short": short_names(names),
        "shares": [_shorts(row) for row in numbers.shares],
        "ranks": [_shorts(row) for row in numbers.ranks],
        "norms": [_shorts(row) for row in numbers.norms],
        "heads": _heads(decomposition),
        "nDataPoints": responses.n_data_points,
        "components": components,
        "matches": matches.rows,
        "matchColumns": matches.columns,
        "hasTokens": shower.has_tokens,
        "here": [
            _here(numbers.here, top, shower),
            _here(elsewhere.here, elsewhere.top, showers[1]) if elsewhere else {},
        ],
        "othersActive": None if elsewhere is None else _shorts(elsewhere.active),
        "nOthers": None if elsewhere is None else elsewhere.n_data_points,
        "peers": None,
    }


def _written(top: TopExamples, c: int, rank: int, shown: Shown) -> list[Any]:
    """A top example as the page's script reads it."""
    return [
        shown.number,
        _short(top.attribution[c, rank].item()),
        int(top.active[c, rank]),
        list(shown.words),
        "".join(map(str, shown.shades)),
        "".join("1" if on else "0" for on in shown.active),
        shown.first,
        int(shown.cut),
    ]


def _here(here: Here, top: TopExamples, shower: Shower) -> dict[int, list[list[float]]]:
    """Of each example, for each token components and attributions in turn; those below a tenth of the largest are left
    out."""

    def of_token(which: Tensor, values: Tensor) -> list[float]:
        pairs = zip(which.tolist(), _shorts(values), strict=True)
        return [entry for c, value in pairs if value > 0 and value >= 0.1 * float(values[0]) for entry in (c, value)]

    rows = {number: [of_token(*row) for row in zip(*both, strict=True)] for number, both in here.items()}
    return {number: shower.at_tokens(top.read[number], number, row) for number, row in rows.items()}


def _heads(decomposition: Decomposition) -> list[list[tuple[str, float]]]:
    """For each component the attention heads with the largest shares of its squared norm, of those that have any."""
    where = weight_map(decomposition)
    names = where.nodes("head")
    if not names:
        return []
    top = where.shares("head").topk(min(_N_HEADS, len(names)), dim=1)
    return [
        [(names[head], _short(share)) for head, share in zip(heads, shares, strict=True) if share > 0]
        for heads, shares in zip(top.indices.tolist(), top.values.tolist(), strict=True)
    ]


def _output_namer(
    decomposition: Decomposition, numbers: Numbers, shower: Shower, decode: Decode | None, output_names: Names | None
) -> Callable[[int], int]:
    """Output unit -> the number of its name among the words."""
    top, target, n_outputs = numbers.responses.top, decomposition.target, numbers.responses.effects.n_outputs
    if output_names is None:
        seen = [tokens_of(batch, target.model) for batch in top.inputs.values()]
        largest = max((max(tokens, default=0) for tokens in seen if tokens is not None), default=None)
        # As many outputs as there are tokens: a language model.
        if decode is not None and largest is not None and largest < n_outputs:
            return shower.word
        return lambda unit: shower.words.number(f"output {unit}")
    if callable(output_names):
        return lambda unit: shower.words.number(called(output_names, unit, "output_names"))
    if len(output_names) != n_outputs:
        raise InvalidSetting(f"Expected {n_outputs} output_names, one for each output unit, got {len(output_names)}.")
    return lambda unit: shower.words.number(output_names[unit])


def _short(value: float) -> float:
    """Four significant digits."""
    return float(f"{value:.4g}")


def _shorts(values: Tensor) -> list[float]:
    return [_short(value) for value in values.tolist()]
