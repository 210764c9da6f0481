"""What is no longer answered without a prompt's own component, beside edited copies of the model."""

import copy

import pytest
import torch
from support.toy_models import tiny_llama
from torch.testing import assert_close

import apd_lens as apd
from apd_lens.language import forgetting
from apd_lens.losses._outputs import kl_divergence


@pytest.fixture(scope="module")
def decomposition() -> apd.Decomposition:
    torch.manual_seed(0)
    prompts = torch.randint(13, (6, 4))
    settings = apd.language_model(steps=0)
    return apd.decompose(
        tiny_llama(),
        [prompts],
        "model.layers.1.self_attn.[vo]_proj*",
        n_components=8,
        others=[torch.randint(13, (5, 7))],
        progress=False,
        **settings,
    )


def test_it_is_what_edited_copies_say(decomposition: apd.Decomposition):
    torch.manual_seed(0)
    prompts = torch.randint(13, (6, 4))
    texts = [torch.randint(13, (5, 7)), torch.randint(13, (2, 7))]
    found = forgetting(decomposition, prompts, texts, progress=False)
    model, active = decomposition.target.model, decomposition.select(prompts)
    attributions = decomposition.attributions(prompts)
    share = attributions / attributions.mean(0)
    assert found.own.tolist() == [
        max(row.nonzero()[:, 0].tolist(), key=lambda component: share[i, component]) for i, row in enumerate(active)
    ]

    def last(some: torch.nn.Module) -> torch.Tensor:
        with torch.no_grad():
            return some(prompts).logits[:, -1]

    def edited(chosen: list[int]) -> torch.nn.Module:
        other = copy.deepcopy(model)
        other.load_state_dict(decomposition.edited_state_dict(ablate=chosen))
        return other

    for i, component in enumerate(found.own.tolist()):
        logits = last(edited([component]))
        assert_close(found.kl_off[i], kl_divergence(last(model), logits), rtol=1e-3, atol=1e-6)
        assert torch.equal(found.changed[i], logits.argmax(-1) != last(model).argmax(-1))
    assert torch.equal(found.forgotten, found.changed.diagonal())
    other = found.own[:, None] != found.own
    assert found.table()["own component"].tolist() == found.own.tolist()
    assert found.table()["others changed"].mean() == pytest.approx(
        sum((found.changed[i] & other[i]).sum().item() / max(1, other[i].sum().item()) for i in range(6)) / 6
    )
    assert found.others_changed == pytest.approx(found.changed[other].float().mean().item())
    with decomposition.sparse(active):
        sparse = last(model)
    assert_close(found.kl_sparse, kl_divergence(last(model), sparse), rtol=1e-3, atol=1e-6)
    assert torch.equal(found.kept, sparse.argmax(-1) == last(model).argmax(-1))

    assert found.kl_elsewhere is not None
    assert found.kl_all_off is not None
    with torch.no_grad():
        without = [edited(list(range(8)))(text).logits for text in texts]
        whole = [model(text).logits for text in texts]
        in_turn = sorted(set(found.own.tolist())) * 2
        rows = torch.cat(texts).split(1)
        without_one = [edited([own])(row).logits for own, row in zip(in_turn, rows, strict=False)]
    expected = torch.cat([kl_divergence(*pair).flatten() for pair in zip(whole, without, strict=True)])
    assert_close(found.kl_all_off, expected, rtol=1e-3, atol=1e-6)
    expected = torch.cat([kl_divergence(*pair) for pair in zip(torch.cat(whole), torch.cat(without_one), strict=True)])
    assert_close(found.kl_elsewhere, expected.flatten(), rtol=1e-3, atol=1e-6)


def test_it_prints_a_table(decomposition: apd.Decomposition):
    prompts = torch.randint(13, (6, 4), generator=torch.Generator().manual_seed(3))
    text = str(forgetting(decomposition, prompts, progress=False))
    assert text.splitlines()[0].split() == ["6", "prompts"]
    assert "own component off: answer changed" in text
    assert "other texts" not in text


def test_prompts_with_several_outputs_are_refused(decomposition: apd.Decomposition):
    several = apd.decompose(
        tiny_llama(),
        [torch.randint(13, (6, 4))],
        "model.layers.1.self_attn.[vo]_proj*",
        n_components=4,
        optimization=apd.Optimization(steps=1),
        progress=False,
    )
    with pytest.raises(apd.ShapeMismatch, match="last_position"):
        forgetting(several, torch.randint(13, (6, 4)))
