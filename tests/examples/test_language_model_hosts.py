"""A decomposition says the same through each library that the model may come from."""

from support.examples import run


def test_every_host_gives_the_same_numbers(tmp_path):
    printed = run("language_model/hosts.py", "--stand-in", "--steps", "1", "--out", str(tmp_path))
    rows = [line.strip("| ").split(" | ") for line in printed.splitlines() if line.startswith("| ")][2:]
    assert [row[0] for row in rows] == ["Hugging Face", "nnsight", "TransformerBridge", "HookedTransformer"]
    assert len({row[2] for row in rows}) == 1
    assert all(float(kl) < 1e-5 and float(factor) < 1e-4 for *_, kl, factor in rows)
