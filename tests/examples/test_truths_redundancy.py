import pytest
import torch
from redundancy import SHARPNESS, CipherTarget, train_cipher
from torch.testing import assert_close

import apd_lens as apd

SMALL = {"width": 12, "n_neurons": 10, "n_tokens": 6, "n_blocks": 2}


@pytest.fixture(scope="module")
def cipher() -> CipherTarget:
    return train_cipher(**SMALL, steps=120, lr=1e-2, seed=1)


def test_every_subset_of_blocks_knows_every_partner(cipher: CipherTarget):
    assert cipher.subsets.tolist() == [[True, False], [False, True], [True, True]]
    for on in [None, *cipher.subsets]:
        assert cipher.is_right(on).all()
    assert not cipher.is_right(torch.tensor([False, False])).any()
    assert cipher.loss < 0.1


def test_partners_are_one_cycle(cipher: CipherTarget):
    seen, token = [], 0
    for _ in cipher.partner:
        seen.append(token)
        token = int(cipher.partner[token])
    assert token == 0
    assert sorted(seen) == cipher.tokens.tolist()


def test_a_block_that_is_off_writes_nothing(cipher: CipherTarget):
    tokens, on = cipher.data()
    assert len(tokens) == 6 * 3
    outputs = cipher.model(tokens, on)
    E = cipher.model.E
    for token, blocks, output in zip(tokens, on, outputs, strict=True):
        r = E[token]
        for block, is_on in zip(cipher.model.blocks, blocks, strict=True):
            r = r + block(r) if is_on else r
        assert_close(output, SHARPNESS * r @ E.mT)


def test_the_seed_is_the_target():
    before = torch.get_rng_state()
    first, again, other = (train_cipher(**SMALL, steps=3, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(first.model.E, again.model.E)
    assert not torch.equal(first.model.E, other.model.E)
    assert not any(parameter.requires_grad for parameter in first.model.parameters())


def test_subsets_of_blocks_can_be_part_of_the_data(cipher: CipherTarget):
    few = apd.Optimization(steps=2)
    decomposition = apd.decompose(
        cipher.model, [cipher.data()], cipher.weights, n_components=4, optimization=few, progress=False
    )
    assert decomposition.attributions(cipher.data()).shape == (18, 4)


def test_what_cannot_be_is_refused(cipher: CipherTarget):
    with pytest.raises(apd.errors.InvalidSetting, match="n_tokens=1, n_blocks=3"):
        train_cipher(n_tokens=1)
    with pytest.raises(apd.ShapeMismatch, match=r"\(6, 2\), got \(6, 3\)"):
        cipher.model(cipher.tokens, torch.ones(6, 3, dtype=torch.bool))
