"""The README's code runs, with few steps."""

import re
from pathlib import Path

from support import outside

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()


def test_the_ten_lines_run():
    (code,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len([line for line in code.splitlines() if line.strip()]) <= 12
    # In the place of the language model a tiny one, which is trained on the spot.
    for there, here in {"smollm2": "stand_in", "n=288, length=32": "n=64, length=8", "steps=300": "steps=5"}.items():
        assert there in code
        code = code.replace(there, here)
    printed = outside.run(f"import sys; sys.path.insert(0, {str(ROOT / 'examples/language_model')!r})\n" + code)
    assert "12 of 12" in printed
    assert "own component off: answer changed" in printed


def test_the_readme_is_short_and_says_early_how_to_install():
    lines = README.splitlines()
    assert len(lines) <= 125
    assert lines.index("## Install") < 25


def test_what_the_readme_points_to_is_there():
    for link in re.findall(r"\]\((?!http)(.*?)\)", README):
        assert (ROOT / link).is_file(), link
