import torch
from torch import nn
from torch.testing import assert_close

import apd_lens as apd
from apd_lens.moves._start import start_as_a_whole, start_with_matrices


def parts_of(start) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    model = nn.Sequential(nn.Linear(4, 3, bias=False), nn.Linear(3, 2, bias=False))
    state = apd.init(model, n_components=4, rank=3, moves=None)
    start(state.components, state.weights)
    return {name: state.components.component_weights(name).detach() for name in state.weights}, state.weights


def test_one_component_is_the_whole():
    parts, weights = parts_of(start_as_a_whole)
    for name, weight in weights.items():
        assert_close(parts[name][0], weight)
        assert parts[name][1:].norm() < 1e-2 * weight.norm()
        assert parts[name][1:].flatten(1).norm(dim=1).min() > 0


def test_one_component_a_matrix():
    parts, weights = parts_of(start_with_matrices)
    for number, (name, weight) in enumerate(weights.items()):
        assert_close(parts[name][number], weight)
        assert not parts[name][1 - number].any()
