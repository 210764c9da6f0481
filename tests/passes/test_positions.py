import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from support.padding import alone, gpt2, padded
from support.toy_models import decomposition_of, tiny_llama
from torch import Tensor, nn
from torch.testing import assert_close

import apd_lens as apd
from apd_lens.passes._replace import Mixture
from apd_lens.passes._watch import replaced_pass, watched_pass

LEFT = {
    "input_ids": torch.tensor([[0, 3, 4, 5], [6, 7, 8, 9]]),
    "attention_mask": torch.tensor([[0, 1, 1, 1], [1] * 4]),
}
WITHOUT = {"input_ids": LEFT["input_ids"]}
BATCHES = {"right": padded(), "left": LEFT, "none": WITHOUT, "tensor": WITHOUT["input_ids"]}


@contextmanager
def positions_unembedded(model: Any) -> Iterator[list[int]]:
    """The numbers of positions at which the unembedding was used inside."""
    found: list[int] = []
    handle = model.get_output_embeddings().register_forward_hook(lambda m, args, out: found.append(out.shape[1]))
    yield found
    handle.remove()


def decomposed(model: nn.Module, output, weights: str = "*.mlp.*", **settings) -> apd.Decomposition:
    decomposition = decomposition_of(model, weights)
    return apd.Decomposition(
        decomposition.target, decomposition.components, decomposition.settings, output, decomposition.fingerprints
    )


def last_of_each(batch, logits: Tensor) -> Tensor:
    mask = batch.get("attention_mask") if isinstance(batch, dict) else None
    last = [-1] * len(logits) if mask is None else [int(row.nonzero()[-1]) for row in mask]
    return torch.stack([of_example[i] for of_example, i in zip(logits, last, strict=True)])


@pytest.mark.parametrize("make", [tiny_llama, gpt2])
@pytest.mark.parametrize("batch", BATCHES.values(), ids=BATCHES)
def test_the_last_position_that_is_data(make, batch):
    decomposition = decomposed(make(), apd.last_position())
    model = decomposition.target.model
    logits = (model(**batch) if isinstance(batch, dict) else model(batch)).logits
    assert_close(decomposition.observe(batch).output, last_of_each(batch, logits).detach())


def test_an_example_counts_as_it_does_alone():
    decomposition, batch = decomposed(tiny_llama(), apd.last_position()), padded()
    attributions = decomposition.attributions(batch)
    for i in range(3):
        assert_close(attributions[i : i + 1], decomposition.attributions(alone(batch, i)))


@pytest.mark.parametrize("output", [apd.last_position(), apd.positions(0, -1)])
@pytest.mark.parametrize("batch", BATCHES.values(), ids=BATCHES)
def test_logits_of_these_positions_alone_are_the_same(output, batch):
    """The right answer comes from the same model without `logits_to_keep`."""
    model = tiny_llama()

    class Whole(type(model)):
        def forward(self, *args, **kwargs):
            return super().forward(*args, **kwargs)

    whole = copy.deepcopy(model)
    whole.__class__ = Whole
    some, all_ = decomposed(model, output), decomposed(whole, output)
    all_ = apd.Decomposition(all_.target, some.components, all_.settings, output, all_.fingerprints)
    for ask in (
        lambda d: d.observe(batch).output,
        lambda d: d.attributions(batch),
        lambda d: replaced_pass(
            d.target, d.components.names, Mixture(d.components), d.read(batch), output, hidden=["model.norm"]
        )[0].detach(),
    ):
        assert_close(ask(some), ask(all_), rtol=1e-5, atol=1e-6)
    with positions_unembedded(model) as seen, positions_unembedded(whole) as of_whole:
        some.observe(batch)
        all_.observe(batch)
    n = (batch if isinstance(batch, Tensor) else batch["input_ids"]).shape[1]
    assert max(seen) < n
    assert set(of_whole) == {n}


def unembedded(model: nn.Module, batch, weights: str = "*.mlp.*", hidden: tuple[str, ...] = ()) -> set[int]:
    target = apd.wrap(model)
    with positions_unembedded(model) as seen:
        watched_pass(target, target.match(weights), batch, apd.last_position(), hidden=hidden)
    return set(seen)


def test_logits_are_made_at_all_positions_where_something_needs_them():
    model, ids = tiny_llama(), WITHOUT["input_ids"]
    assert unembedded(model, ids) == {1}
    assert unembedded(model, ids, "lm_head.weight") == {4}
    assert unembedded(model, ids, hidden=("lm_head",)) == {4}
    assert unembedded(model, {"input_ids": ids, "labels": ids}) == {4}
    assert unembedded(tiny_llama(tie_word_embeddings=True), ids, "*embed_tokens*") == {4}


def test_a_batch_that_asks_for_some_logits_itself():
    decomposition, ids = decomposed(tiny_llama(), apd.last_position()), WITHOUT["input_ids"]
    expected = decomposition.observe(ids).output
    assert_close(decomposition.observe({"input_ids": ids, "logits_to_keep": 2}).output, expected)
    with pytest.raises(apd.ShapeMismatch, match="Leave logits_to_keep out of the batch"):
        decomposition.observe({**padded(), "logits_to_keep": 2})


def test_positions():
    model, batch = tiny_llama(), padded()  # of lengths 3, 5, 4
    logits = model(**batch).logits.detach()
    rows = torch.arange(3)[:, None]
    for output, places in [
        (apd.positions(0, -2), [[0, 1], [0, 3], [0, 2]]),
        (apd.positions([1, 2]), [[1, 2]] * 3),
        (apd.positions(torch.tensor([1, 2])), [[1, 2]] * 3),
        (apd.positions(lambda batch: batch["attention_mask"].sum(1, keepdim=True) - 1 - torch.tensor([[0, 2]])), None),
    ]:
        places = torch.tensor(places or [[2, 0], [4, 2], [3, 1]])
        assert_close(decomposed(model, output).observe(batch).output, logits[rows, places])
    one = decomposed(model, apd.positions(-1)).observe(batch).output
    assert one.shape == (3, 13)
    assert_close(one, decomposed(model, apd.last_position()).observe(batch).output)


@pytest.mark.parametrize("where", [(), (1, 1), (0.5,), (True,), ("last",)])
def test_what_are_no_positions(where):
    with pytest.raises(apd.errors.InvalidSetting, match=r"distinct whole numbers, or one function of the batch"):
        apd.positions(*where)


@pytest.mark.parametrize(
    ("output", "message"),
    [
        (apd.positions(3), "needs 4 positions that are data in each example, and one has 3"),
        (apd.positions(-4), "needs 4 positions"),
        (apd.positions(2, -1), "one and the same"),
        (apd.positions(lambda batch: torch.tensor([3, 0, 0])), "that are padding"),
        (apd.positions(lambda batch: torch.tensor([9, 0, 0])), "not among the 6"),
        (apd.positions(lambda batch: torch.tensor([[0, 0]] * 3)), "twice"),
        (apd.positions(lambda batch: torch.tensor([0])), r"got torch\.int64 of \(1,\)"),
    ],
)
def test_positions_that_an_example_does_not_have(output, message):
    with pytest.raises(apd.ShapeMismatch, match=message):
        decomposed(tiny_llama(), output).observe(padded())


def test_an_example_without_data():
    batch = padded()
    batch["attention_mask"][1] = 0
    with pytest.raises(apd.ShapeMismatch, match="one has 0"):
        decomposed(tiny_llama(), apd.last_position()).observe(batch)


def test_an_output_without_positions():
    decomposition = decomposed(nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)), apd.last_position(), "*")
    with pytest.raises(apd.ShapeMismatch, match="needs logits of shape"):
        decomposition.observe(torch.ones(2, 3))


def test_all_that_is_asked_of_a_decomposition_goes_on_working(tmp_path):
    """Trained with it, saved and loaded without output=, and looked at."""
    model, batch = tiny_llama(), padded()
    kl = apd.Losses(distance="kl")
    optimization = apd.Optimization(steps=2)
    decomposition = apd.decompose(
        model, [batch, LEFT], "*.mlp.down_proj*", n_components=4, rank=2, losses=kl, optimization=optimization,
        output=apd.last_position(), progress=False,
    )  # fmt: skip
    decomposition.save(tmp_path)
    loaded = apd.load(tmp_path, model)
    assert loaded.output == apd.last_position()
    assert_close(loaded.attributions(batch), decomposition.attributions(batch))
    assert apd.responses(loaded, [batch, LEFT]).n_examples == 5
    assert apd.monitor.fit(loaded, [batch], k=1).score(batch).surprise.shape == (3,)
    audit = apd.metrics.audit(loaded, [batch, LEFT], ladder=(1,), n_draws=1, progress=False)
    assert audit.loss.isfinite().all()
    with loaded.sparse(loaded.select(batch, k=2)):
        model(**batch)


def test_a_function_of_positions_is_not_saved(tmp_path):
    decomposition = decomposed(tiny_llama(), apd.positions(lambda batch: batch["attention_mask"].sum(1) - 1))
    decomposition.save(tmp_path)
    with pytest.raises(apd.errors.InvalidSetting, match="output="):
        apd.load(tmp_path, decomposition.target.model).observe(padded())
    decomposed(decomposition.target.model, apd.positions(0, -1)).save(tmp_path)
    assert apd.load(tmp_path, decomposition.target.model).output == apd.positions(0, -1)
