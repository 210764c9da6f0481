"""One page to look at: the decomposition that `facts/facts_in_an_mlp.py` left in out/, as HTML that opens from disk.

python examples/facts/facts_in_an_mlp.py && python examples/report.py    # writes out/report.html
python examples/report.py --steps 300                              # trains one shortly, if there is none
"""

import argparse
from pathlib import Path

import torch.nn.functional as F
from torch import Tensor

import apd_lens as apd
from apd_lens import toys

N_SUBJECTS = 64


def word(token: int) -> str:
    """What a token of the facts is called."""
    if token == N_SUBJECTS:
        return "the object of"
    return f" subject {token}" if token < N_SUBJECTS else f" object {token - N_SUBJECTS - 1}"


def main(saved: Path, path: Path, steps: int) -> None:
    target = toys.train_facts(N_SUBJECTS)
    if saved.is_dir():
        decomposition = apd.load(saved, target.model, output=toys.centred_logits)
    else:
        print(f"there is no {saved}; decomposing in {steps} steps")
        decomposition = apd.decompose(target.model, [target.prompts], **toys.facts_settings(steps))

    def loss(prompts: Tensor, logits: Tensor) -> Tensor:
        return F.cross_entropy(logits, target.answers[prompts[:, 1]], reduction="none")

    found = apd.responses(decomposition, target.prompts.split(16), loss=loss)
    print(found.table().sort_values("attribution", ascending=False).head(8).to_string(index=False))
    decomposition.report(
        target.prompts.split(16), path, decode=word, loss=loss, title="64 facts in an MLP of 48 neurons"
    )
    print(f"wrote {path}, {path.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--saved", type=Path, default=Path("out/facts_in_an_mlp"), help="folder of the decomposition")
    parser.add_argument("--out", type=Path, default=Path("out/report.html"), help="file to write")
    parser.add_argument("--steps", type=int, default=1500, help="training steps, if nothing was saved")
    arguments = parser.parse_args()
    main(arguments.saved, arguments.out, arguments.steps)
