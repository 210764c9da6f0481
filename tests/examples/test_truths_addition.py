import math

import pytest
import torch
from addition import AdditionTarget, frequency_power, train_addition
from torch.testing import assert_close

import apd_lens as apd


@pytest.fixture(scope="module")
def addition() -> AdditionTarget:
    return train_addition(7, 8, 16, share=0.8, steps=300)


def test_it_adds(addition: AdditionTarget):
    assert addition.is_right()[addition.trained].all()
    assert addition.trained.sum() == int(0.8 * 49)
    assert train_addition(7, 8, 16, steps=0).is_right().float().mean() < 0.5


def test_power_is_that_of_the_fourier_transform(addition: AdditionTarget):
    """Beside sums of cosines and sines by hand."""
    model, numbers = addition.model, torch.arange(7)
    total = torch.zeros(4)
    for matrix in (model.embed.weight, model.embed.weight @ model.mlp_in.weight.mT, model.mlp_out.weight):
        power = []
        for f in range(7):
            angle = 2 * math.pi * f * numbers / 7
            power.append((matrix.mT @ angle.cos()).square().sum() + (matrix.mT @ angle.sin()).square().sum())
        both = torch.stack([power[0], *(power[f] + power[7 - f] for f in (1, 2, 3))])
        total += both / both.sum() / 3
    assert_close(addition.power, total)
    assert_close(addition.power.sum(), torch.tensor(1.0))


def test_the_power_of_a_component_at_one_frequency_is_there(addition: AdditionTarget):
    model, wave = addition.model, (2 * math.pi * 2 * torch.arange(7) / 7).cos()[:, None]
    W_in = torch.zeros(8, 16)
    power = frequency_power(wave.expand(7, 8), W_in, wave.expand(7, 16).mT, model)
    assert power[2] > 0
    assert_close(power[2], power.sum())


def test_key_frequencies_have_more_than_an_even_share(addition: AdditionTarget):
    keys = addition.key_frequencies
    even = addition.power[1:].mean()
    assert (addition.power[keys] > even).all()
    assert (addition.power[1:] > even).sum() == len(keys) > 0
    assert addition.power[keys].tolist() == sorted(addition.power[keys].tolist(), reverse=True)


@pytest.mark.parametrize(("modulus", "share"), [(8, 0.5), (7, 1.0)])
def test_sizes_that_cannot_be_are_refused(modulus: int, share: float):
    with pytest.raises(apd.errors.InvalidSetting, match=f"modulus={modulus}, share={share}"):
        train_addition(modulus, share=share)
