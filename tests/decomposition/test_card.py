"""What a card says."""

import json
import re

import torch
import yaml
from support.toy_models import ResidualMLP, decomposition_of, tiny_gpt2
from torch import nn

import apd_lens as apd


def card_of(decomposition: apd.Decomposition, folder, **options) -> tuple[dict, str]:
    """Front matter and text."""
    decomposition.save(folder, **options)
    _, front, text = (folder / "README.md").read_text().split("---\n", 2)
    return yaml.safe_load(front), text


def test_what_is_known_is_said(tmp_path):
    model = ResidualMLP(4, 6, 5, 1)
    decomposition = decomposition_of(model, "layers.*")
    front, text = card_of(decomposition, tmp_path)
    assert front == {
        "library_name": "apd_lens",
        "tags": ["apd_lens", "parameter-decomposition", "interpretability"],
    }
    residuals = decomposition.residuals()
    assert "# Parameter components of ResidualMLP\n" in text
    assert "a `ResidualMLP`, each taken apart into 5 components" in text
    assert f"| `layers.0.mlp_in.weight` | 6 × 5 | 2 | {residuals['layers.0.mlp_in.weight']:.2g} |" in text
    assert f"over all matrices {residuals['all']:.2g} of ‖W‖" in text
    assert 'apd.from_pretrained("path/to/this/folder", model)' in text
    assert "a function that is not saved" not in text
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["base_model"] == {}
    assert {name: matrix["fingerprint"] for name, matrix in config["matrices"].items()} == decomposition.fingerprints


def test_what_the_author_says(tmp_path):
    card = apd.decomposition.Card(
        title="Facts: “a” and 'b'",
        text="Made for a class.",
        base_model="me/model",
        base_revision="v1",
        datasets=("me/facts", "other/texts: all"),
        tags=("facts", "apd_lens"),
        license="mit",
        metrics={"kl": 0.01234567},
    )
    front, text = card_of(decomposition_of(nn.Linear(3, 2)), tmp_path, card=card, repo="me/run")
    assert front == {
        "library_name": "apd_lens",
        "tags": ["apd_lens", "parameter-decomposition", "interpretability", "facts"],
        "base_model": "me/model",
        "base_model_revision": "v1",
        "datasets": ["me/facts", "other/texts: all"],
        "license": "mit",
        "metrics": ["kl"],
    }
    assert "# Facts: “a” and 'b'\n" in text
    assert "Weight matrices of `me/model` (revision `v1`), a `Linear`" in text
    assert "\nMade for a class.\n" in text
    assert "| kl | 0.01235 |" in text
    assert 'apd.from_pretrained("me/run", model)' in text


def test_a_hugging_face_model_says_what_it_is(tmp_path, monkeypatch):
    model = tiny_gpt2()
    model.save_pretrained(tmp_path / "owner" / "tiny")
    model.config._name_or_path, model.config._commit_hash = "owner/tiny", "c0ffee"  # as from_pretrained leaves them
    decomposition = decomposition_of(model, "*.c_fc.*")
    front, text = card_of(decomposition, tmp_path / "run")
    assert (front["base_model"], front["base_model_revision"]) == ("owner/tiny", "c0ffee")
    saved = json.loads((tmp_path / "run" / "config.json").read_text())
    assert saved["base_model"] == {"name": "owner/tiny", "revision": "c0ffee"}
    code = re.findall(r"```python\n(.*?)```", text, re.DOTALL)[0]
    assert 'GPT2LMHeadModel.from_pretrained("owner/tiny", revision="c0ffee", dtype="float32")' in code
    monkeypatch.chdir(tmp_path)  # where both names are those of folders
    names = {}
    exec(code.replace("path/to/this/folder", "run"), names)
    assert torch.equal(
        next(names["decomposition"].components.parameters()), next(decomposition.components.parameters())
    )


def test_a_folder_is_no_name_of_a_model(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine").mkdir()
    model = tiny_gpt2()
    for name in (str(tmp_path), "./mine", "mine", "models/a/b", ""):
        model.config._name_or_path = name
        front, text = card_of(decomposition_of(model, "*.c_fc.*"), tmp_path / "run")
        assert "base_model" not in front
        assert "model = ...  # the GPT2LMHeadModel" in text


def test_what_is_not_known_is_not_made_up(tmp_path):
    model = nn.Linear(3, 2)
    decomposition = decomposition_of(model, output=lambda y: y[:, :1])
    model.weight.data.mul_(2)
    _, text = card_of(decomposition, tmp_path)
    assert "| `weight` | 3 × 2 | 2 | an unknown share |" in text
    assert "Attributions need `output=` again, a function that is not saved." in text
    _, text = card_of(decomposition_of(nn.Linear(3, 2), output=apd.last_position()), tmp_path)
    assert "a function that is not saved" not in text
