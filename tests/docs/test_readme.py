"""The README's code runs, with few steps."""

import re
from pathlib import Path

from support import outside

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()


def test_the_ten_lines_run():
    (code,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert code.count("steps=4000") == 1
    assert len([line for line in code.splitlines() if line.strip()]) <= 12
    path = f"import sys; sys.path.insert(0, {str(ROOT / 'examples')!r})\n"
    printed = outside.run(path + code.replace("steps=4000", "steps=20"))
    assert re.fullmatch(r"\d+\.\d% right\n", printed)


def test_the_readme_is_short_and_says_early_how_to_install():
    lines = README.splitlines()
    assert len(lines) <= 125
    assert lines.index("## Install") < 25


def test_what_the_readme_points_to_is_there():
    for link in re.findall(r"\]\((?!http)(.*?)\)", README):
        assert (ROOT / link).is_file(), link
