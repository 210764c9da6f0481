"""The page itself: numbers, examples and figures as JSON in a template, with plotly.js inside, written at once."""

import base64
import dataclasses
import gzip
import json
import math
import os
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import jinja2
import pandas as pd
import plotly
from markupsafe import Markup
from plotly.offline import get_plotlyjs
from plotly.utils import PlotlyJSONEncoder
from torch import Tensor

from apd_lens._codec import UserFunction, encode_settings
from apd_lens._errors import ArtifactError, InvalidSetting
from apd_lens._files import user_path, write_file
from apd_lens._memory import BUDGET
from apd_lens.compare._architecture import weight_map
from apd_lens.data._batch import Batch
from apd_lens.decomposition._artifact import library_versions
from apd_lens.decomposition._decomposition import Decomposition
from apd_lens.language._words import Decode, called, own_decode, tokens_of
from apd_lens.masks._selection import K
from apd_lens.report._collect import Numbers, collect
from apd_lens.report._examples import Shower
from apd_lens.report._figures import figures
from apd_lens.responses._ablation import LossFn, known_distance

# A list of names, one for each output unit, or a function of the unit.
Names = Sequence[str] | Callable[[int], str]

# What JSON may hold and a <script> may not, or not everywhere: the end of the script, and line ends of JavaScript. (All
# beyond ASCII, U+2028 and U+2029 among it, json.dumps escapes.)
_ESCAPES = str.maketrans({"<": "\\u003c", ">": "\\u003e", "&": "\\u0026"})
# Base 85 without "<" and "&".
_FOR_SCRIPTS = bytes.maketrans(b"<&", b",.")
_N_TOGETHER = 6
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
    """`Decomposition.report`, whose arguments these are."""
    path = user_path(path)
    if os.path.isdir(path):
        raise ArtifactError(f"Expected a file to write the report to, but {path} is a folder. Try {path}/report.html.")
    if examples < 1 or outputs < 1 or context < 0:
        raise InvalidSetting(
            f"Expected at least one example and one output, and a context from 0 on, got {examples=}, {outputs=}, "
            f"{context=}."
        )
    n_components = decomposition.components.n_components
    of_components = _matches_of_components(matches, n_components)
    numbers = collect(
        decomposition,
        batches,
        examples=examples,
        k=k,
        seed=seed,
        outputs=outputs,
        centred=centred,
        loss=loss,
        memory=memory,
    )
    decode = own_decode(decomposition.target.model) if decode is None else decode
    shower = Shower(decomposition.target, decode, input_names, before=context, after=context // 2)
    data = _data(decomposition, numbers, shower, decode, output_names, of_components)
    title = (
        f"{type(decomposition.target.model).__name__} in {n_components} component{'s' * (n_components > 1)}"
        if title is None
        else title
    )
    page = _template().render(
        title=title,
        rows=_rows(decomposition, numbers),
        n_examples=numbers.responses.n_examples,
        n_data_points=numbers.responses.n_data_points,
        of_positions=decomposition.settings.selection.granularity == "position",
        n_components=n_components,
        n_alive=numbers.found.n_alive(numbers.responses.n_data_points),
        matrices=_matrices(decomposition),
        settings=_settings(decomposition),
        versions=library_versions(decomposition.target.model) | {"plotly": plotly.__version__},
        data=Markup(script_json(data)),
        plotly=Markup(_packed_plotly()),
    )
    write_file(path, page.encode())
    return path


def script_json(value: Any) -> str:
    """JSON that can stand in a <script>, whatever strings it holds.

    >>> script_json("</script>")
    '"\\\\u003c/script\\\\u003e"'
    """
    return json.dumps(value, cls=PlotlyJSONEncoder, separators=(",", ":")).translate(_ESCAPES)


@cache
def _packed_plotly() -> str:
    """plotly.js, gzip in base 85."""
    packed = base64.b85encode(gzip.compress(get_plotlyjs().encode(), 9, mtime=0))
    return packed.translate(_FOR_SCRIPTS).decode()


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


def _rows(decomposition: Decomposition, numbers: Numbers) -> list[tuple[str, str, float | None, float | None]]:
    """What is stated at the top: what, explanation, of the components, of random ones."""
    found, null, responses = numbers.found, numbers.null, numbers.responses
    n, alive = responses.n_data_points, responses.active > 0
    residuals = [
        (f"residual of {'all matrices' if name == 'all' else name}", "‖W − Σ P‖ / ‖W‖", value, null.residuals[name])
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
    if found.effects.loss is not None:
        rows.append(("as rise of the loss", "the same change", mean(found.effects.loss), mean(null.effects.loss)))
    return rows


def distance_name(decomposition: Decomposition) -> str:
    """What the distance is called."""
    distance = known_distance(decomposition)
    if distance == "mse":
        return "mean squared error"
    return "KL divergence in nats" if distance == "kl" else getattr(distance, "__name__", "distance")


def _matrices(decomposition: Decomposition) -> list[tuple[str, int, int, int]]:
    """Name, d_in, d_out, rank of the components."""
    A, B = decomposition.components.A, decomposition.components.B
    return [(name, A[name].shape[1], B[name].shape[2], A[name].shape[2]) for name in A]


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
    shower: Shower,
    decode: Decode | None,
    output_names: Names | None,
    matches: _Matches,
) -> dict[str, Any]:
    """What the page's script reads; columns with an entry for each component, strings by their numbers in `words`."""
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

    def inputs(c: int) -> list[list[Any]]:
        return [
            [
                shown.number,
                _short(top.attribution[c, rank].item()),
                int(top.active[c, rank]),
                list(shown.words),
                "".join(map(str, shown.shades)),
                "".join("1" if on else "0" for on in shown.active),
                shown.first,
                int(shown.cut),
            ]
            for rank, shown in enumerate(shower.shown(top, c))
        ]

    components = [
        {
            "promoted": units(effects.promoted[c], of_component(effects.promoted_p, c), effects.promoted_by[c]),
            "suppressed": units(effects.suppressed[c], of_component(effects.suppressed_p, c), effects.suppressed_by[c]),
            "inputs": inputs(c),
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
        "shares": [_shorts(row) for row in numbers.shares],
        "ranks": [_shorts(row) for row in numbers.ranks],
        "norms": [_shorts(row) for row in numbers.norms],
        "heads": _heads(decomposition),
        "nDataPoints": responses.n_data_points,
        "components": components,
        "matches": matches.rows,
        "matchColumns": matches.columns,
        "hasTokens": any(tokens is not None for tokens in shower._tokens.values()),
        "figures": figures(numbers, order, names, distance_name(decomposition)),
        "words": shower.words.strings,
    }


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
