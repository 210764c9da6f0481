"""The README's code runs, with few steps."""

import re
import warnings
from pathlib import Path

import pytest
from support import outside
from support.hooked import hooked_transformer, tokens
from support.toy_models import decomposition_of

ROOT = Path(__file__).parents[2]


def code_of_the_readme() -> list[str]:
    return re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)


def test_the_fifteen_lines_run():
    code = code_of_the_readme()[0]
    assert code.count("steps=4000") == 1
    lines = [line for line in code.splitlines() if line.strip()]
    assert len(lines) == 15
    path = f"import sys; sys.path.insert(0, {str(ROOT / 'examples')!r})\n"
    printed = outside.run(path + code.replace("steps=4000", "steps=20"))
    assert "components active on this batch" in printed
    assert 0 <= float(printed.splitlines()[-1]) <= 1


def test_the_comparisons_run():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        sae_lens = pytest.importorskip("sae_lens", reason="needs sae-lens, which works with transformer-lens 3 only")
    metadata = sae_lens.saes.sae.SAEMetadata(hook_name="blocks.0.hook_mlp_out")
    names = {
        "decomposition": decomposition_of(hooked_transformer(n_layers=2, n_heads=4), ["blocks.*"], n_components=4),
        "batches": [tokens(3)],
        "sae": sae_lens.StandardSAE(sae_lens.StandardSAEConfig(d_in=8, d_sae=16, metadata=metadata)),
        "metric": lambda logits: logits[:, -1, 0],
    }
    code = code_of_the_readme()[1]
    assert code.count("compare.") == 6
    exec(code, names)
    assert "16 latents" in str(names["sae"])


def test_what_the_readme_points_to_is_there():
    for link in re.findall(r"\]\((?!http)(.*?)\)", (ROOT / "README.md").read_text()):
        assert (ROOT / link).is_file(), link
