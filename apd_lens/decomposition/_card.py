"""The card of a saved decomposition: README.md, which the Hugging Face Hub shows."""

import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from apd_lens._checks import check_fields


@dataclass(frozen=True)
class Card:
    """What a decomposition's card says beside what is known of it: matrices, components, rest, how to load it.

    Attributes:
        title: the heading; None for one with the base model's name.
        text: what you have to say about it, in Markdown.
        base_model: the model's name on the Hub; None for what a Hugging Face model's config says.
        base_revision: the commit that it was loaded at; None for that in the config, if the name is from there.
        datasets: names of the data, as on the Hub.
        tags: beside "apd_lens".
        license: as the Hub spells it, such as "mit".
        metrics: name -> what you measured.
    """

    title: str | None = None
    text: str = ""
    base_model: str | None = None
    base_revision: str | None = None
    datasets: tuple[str, ...] = ()
    tags: tuple[str, ...] = ()
    license: str | None = None
    metrics: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_fields(self)


def base_of(model: nn.Module, card: Card) -> dict[str, str]:
    """Name and revision of the model on the Hub, as far as the card or a Hugging Face config in the model says them.
    A folder on this machine is no such name."""
    configs = (getattr(module, "config", None) for module in model.modules())
    config = next((config for config in configs if isinstance(getattr(config, "_name_or_path", None), str)), None)
    name, revision = card.base_model, card.base_revision
    known = getattr(config, "_name_or_path", "")
    if name is None and re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", known) and not os.path.exists(known):
        name, revision = known, revision or getattr(config, "_commit_hash", None)
    return {key: value for key, value in (("name", name), ("revision", revision)) if value}


def card_text(card: Card, about: Mapping[str, Any], rest: Mapping[str, float], repo: str | None) -> str:
    """The content of README.md.

    Args:
        about: what the artifact's JSON says.
        rest: as `Decomposition.residuals` gives it; empty where it is not known.
        repo: where the decomposition is published, if it is.
    """
    base, kind = about["base_model"], about["model"].rpartition(".")[2]
    name = base.get("name")
    front = {
        "library_name": "apd_lens",
        "tags": list(dict.fromkeys(["apd_lens", "parameter-decomposition", "interpretability", *card.tags])),
        "base_model": name,
        "base_model_revision": base.get("revision"),
        "datasets": list(card.datasets),
        "license": card.license,
        "metrics": list(card.metrics),
    }
    rows = [
        f"| `{of}` | {matrix['d_in']} × {matrix['d_out']} | {matrix['rank']} | {_share(rest, of)} |"
        for of, matrix in about["matrices"].items()
    ]
    at = f" (revision `{base['revision']}`)" if "revision" in base else ""
    lines = [
        "---",
        *(f"{key}: {json.dumps(value, ensure_ascii=False)}" for key, value in front.items() if value),  # JSON is YAML
        "---",
        "",
        f"# {card.title or f'Parameter components of {name or kind}'}",
        "",
        f"Weight matrices of {f'`{name}`{at}, ' if name else ''}a `{kind}`, each taken apart into "
        f"{about['n_components']} components: W = Σ_c P_c + rest. A component is a part of the weights that the model "
        "uses, or leaves out, as a whole; on each input few of them matter. They were found by attribution-based "
        "parameter decomposition ([Braun et al. 2025](https://arxiv.org/abs/2501.14926)) with apd_lens "
        f"{about['versions']['apd-lens']}.",
        *(["", card.text] if card.text else []),
        "",
        "| matrix W | d_in × d_out | rank of a P_c | rest, ‖W − Σ P_c‖ / ‖W‖ |",
        "| --- | --- | --- | --- |",
        *rows,
        "",
        f"The rest is what no component holds, over all matrices {_share(rest, 'all')} of ‖W‖.",
        *(["", "| measured | |", "| --- | --- |"] if card.metrics else []),
        *(f"| {measured} | {value:.4g} |" for measured, value in card.metrics.items()),
        "",
        "## How to load it",
        "",
        "```python",
        "import apd_lens as apd",
        *_model_lines(about, kind),
        f"decomposition = apd.from_pretrained({json.dumps(repo or 'path/to/this/folder')}, model)",
        "print(decomposition.residuals())",
        "with decomposition.ablate([0]):  # inside, the model runs without component 0",
        "    ...",
        "```",
        "",
        "The components fit these weights alone: `config.json` has the SHA-256 of every matrix, and a model with "
        "others is refused. It also has all settings.",
        *_needs(about),
    ]
    return "\n".join(lines) + "\n"


def _share(rest: Mapping[str, float], name: str) -> str:
    return f"{rest[name]:.2g}" if name in rest else "an unknown share"


def _model_lines(about: Mapping[str, Any], kind: str) -> list[str]:
    """How the model is made, where that is known."""
    base = about["base_model"]
    if "name" not in base or not about["model"].startswith("transformers."):
        return [f"model = ...  # the {kind} with the weights that were decomposed, in {about['dtype']}"]
    options = {key: base[key] for key in ("revision",) if key in base} | {"dtype": about["dtype"]}
    given = "".join(f", {key}={json.dumps(value)}" for key, value in options.items())
    return [f"from transformers import {kind}", f"model = {kind}.from_pretrained({json.dumps(base['name'])}{given})"]


def _needs(about: Mapping[str, Any]) -> list[str]:
    """What a user has to give again."""
    missing = [
        f"`{argument}=`"
        for argument, key in (("output", "output"), ("valid", "valid"))
        if about[key] != "default" and f"{key}_settings" not in about
    ]
    return ["", f"Attributions need {' and '.join(missing)} again, a function that is not saved."] if missing else []
