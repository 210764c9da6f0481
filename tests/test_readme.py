"""The README's code runs, with few steps."""

import re
from pathlib import Path

import outside

ROOT = Path(__file__).parent.parent


def test_the_code_of_the_readme_runs():
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert code.count("steps=4000") == 1
    lines = [line for line in code.splitlines() if line.strip()]
    assert len(lines) == 15
    path = f"import sys; sys.path.insert(0, {str(ROOT / 'examples')!r})\n"
    printed = outside.run(path + code.replace("steps=4000", "steps=20"))
    assert "components active on this batch" in printed
    assert 0 <= float(printed.splitlines()[-1]) <= 1


def test_what_the_readme_points_to_is_there():
    for link in re.findall(r"\]\((?!http)(.*?)\)", (ROOT / "README.md").read_text()):
        assert (ROOT / link).is_file(), link
