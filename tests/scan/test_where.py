"""Which matrices carry a behaviour: effects are those of really replacing outputs, on every host."""

from dataclasses import replace
from typing import Any

import nnsight
import pytest
import torch
from support.bridges import bridge_of
from support.hooked import hooked_transformer
from support.hooked import tokens as hooked_tokens
from support.toy_models import Mixing, Snapshot, tiny_gpt2, tiny_llama
from torch import Tensor, nn
from torch.testing import assert_close

import apd_lens as apd
from apd_lens.scan._groups import donors, each_position, given_positions
from apd_lens.scan._result import Together

where: Any = apd.where


def prompts(n: int = 6, length: int = 4) -> Tensor:
    return torch.randint(13, (n, length), generator=torch.Generator().manual_seed(2))


def small_llama() -> Any:
    torch.manual_seed(0)
    return tiny_llama(num_hidden_layers=1)


def own_answers(logits: Tensor, top: Tensor) -> Tensor:
    return logits[:, -1].log_softmax(-1).gather(-1, top[:, None])[:, 0]


def by_hooks(model: nn.Module, batch: Tensor, module: str, position: int, donor: Tensor | None = None) -> Tensor:
    """What the own answer loses when a module's output at a position is replaced, of each prompt."""

    def other(module: nn.Module, args: Any, y: Tensor) -> Tensor:
        y = y.clone()
        y[:, position] = y[:, position].mean(0) if donor is None else y[donor, position]
        return y

    with torch.no_grad():
        clean = model(batch).logits
        handle = model.get_submodule(module).register_forward_hook(other)
        ablated = model(batch).logits
        handle.remove()
    top = clean[:, -1].argmax(-1)
    return own_answers(clean, top) - own_answers(ablated, top)


@pytest.mark.parametrize("make", [small_llama, tiny_gpt2])
def test_measured_effects_are_those_of_replacing_the_output_by_its_mean(make: Any):
    model, batch = make(), prompts()
    before = Snapshot.of(model)
    found = where(model, batch, measure="all", steps=1)
    before.assert_unchanged(model)
    assert not found.measured.isnan().any()
    for row, site in enumerate(found.sites):
        if site == "transformer.wpe":  # all prompts share it
            assert_close(found.measured[row], torch.zeros(4), atol=1e-5, rtol=0)
            continue
        for group in range(4):
            lost = by_hooks(model, batch, site, group)
            assert_close(found.measured[row, group], lost.mean(), atol=1e-5, rtol=1e-4)
    assert found.groups == ("0", "1", "2", "3")
    assert found.n_prompts.tolist() == [6] * 4


def test_resampled_effects_are_those_of_the_drawn_prompts_and_the_same_for_the_same_seed():
    model, batch = small_llama(), prompts()
    found, again, other = (
        where(model, batch, ablation="resample", measure="all", seed=seed, steps=2) for seed in (0, 0, 1)
    )
    assert torch.equal(found.measured, again.measured)
    assert torch.equal(found.estimated, again.estimated)
    assert not torch.equal(found.measured, other.measured)
    drawn = donors(each_position(torch.ones(6, 4, dtype=torch.bool), 4), 0, 0)
    assert all(sorted(each.tolist()) == list(range(6)) for each in drawn)
    assert not (drawn == torch.arange(6)).any()
    for row, site in enumerate(found.sites):
        lost = by_hooks(model, batch, site, 2, drawn[2])
        assert_close(found.measured[row, 2], lost.mean(), atol=1e-5, rtol=1e-4)


class Linear(nn.Module):
    """Two layers and nothing else, so that effects are linear."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 5), nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x)).cumsum(1)


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("ablation", ["mean", "resample"])
def test_the_estimate_is_exact_where_the_output_is_linear(steps: int, ablation: str):
    x = torch.randn(7, 3, 3)
    weight = torch.randn(7)  # else the mean over prompts is 0
    found = where(Linear(), x, lambda y: weight * y[:, -1, 0], ablation=ablation, steps=steps, measure="all")
    assert found.measured.abs().min() > 1e-3
    assert_close(found.estimated, found.measured, atol=1e-5, rtol=1e-4)
    assert found.unit == ""


def test_models_without_positions_have_one_group():
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)), torch.randn(9, 6)
    found = where(model, [x[:5], x[5:]], measure="all")
    assert found.groups == ("all",)
    hidden = model[0](x).mean(0).expand(9, -1)
    clean, ablated = (y.log_softmax(-1).detach() for y in (model(x), model[2](model[1](hidden))))
    top = clean.argmax(-1, keepdim=True)
    assert_close(found.measured[0, 0], (clean - ablated).gather(1, top).mean(), atol=1e-5, rtol=1e-4)
    assert found.best() == ["0.weight"]  # the last one gives the output, so it says nothing


def of_lengths(on_the_left: bool) -> tuple[dict[str, Tensor], list[Tensor]]:
    """Prompts of 3, 4 and 5 tokens, two of each, as a padded batch, and without padding."""
    apart = [prompts(2, length) for length in (3, 4, 5)]
    width, rows, masks = 5, [], []
    for some in apart:
        for row in some:
            padding = torch.zeros(width - len(row), dtype=torch.long)
            real = torch.ones(len(row), dtype=torch.long)
            rows.append(torch.cat([padding, row] if on_the_left else [row, padding]))
            masks.append(torch.cat([padding, real] if on_the_left else [real, padding]))
    mask = torch.stack(masks)
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    return {"input_ids": torch.stack(rows), "attention_mask": mask, "position_ids": positions}, apart


@pytest.mark.parametrize(("on_the_left", "positions"), [(False, None), (True, {"first": 0, "last": -1})])
def test_padding_enters_nothing(on_the_left: bool, positions: Any):
    model = small_llama()
    batch, apart = of_lengths(on_the_left)
    padded = where(model, batch, measure="all", positions=positions, steps=2)
    plain = where(model, apart, measure="all", positions=positions, steps=2)
    assert padded.groups == plain.groups
    assert padded.n_prompts.tolist() == plain.n_prompts.tolist()
    assert padded.at_answer.tolist() == plain.at_answer.tolist()
    assert_close(padded.measured, plain.measured, atol=1e-5, rtol=1e-4)
    assert_close(padded.estimated, plain.estimated, atol=1e-5, rtol=1e-4)
    assert_close(padded.kept, plain.kept)
    if positions is None:
        assert padded.groups == ("-5", "-4", "-3", "-2", "-1")
        assert padded.n_prompts.tolist() == [2, 4, 6, 6, 6]
        batch["input_ids"][batch["attention_mask"] == 0] = 7
        again = where(model, batch, measure=1, steps=2)
        assert_close(again.estimated, padded.estimated, atol=1e-5, rtol=1e-4)


def test_prompts_of_one_length_stand_in_for_each_other():
    model, apart = small_llama(), [prompts(3, 3), prompts(2, 4)]
    found = where(model, apart, measure="all", steps=1)
    row, site = next((row, site) for row, site in enumerate(found.sites) if site.endswith("mlp.down_proj"))
    lost = torch.cat([by_hooks(model, batch, site, -2) for batch in apart])
    assert_close(found.measured[row, 2], lost.mean(), atol=1e-5, rtol=1e-4)


def test_groups_of_several_positions():
    model, batch = small_llama(), prompts()
    as_index = where(model, batch, measure="all", steps=1, positions={"b": torch.full((6,), 1), "d": -1})
    each = where(model, batch, measure="all", steps=1)
    assert_close(as_index.measured, each.measured[:, [1, 3]], atol=1e-5, rtol=1e-4)
    assert as_index.at_answer.tolist() == [False, True]
    mask = torch.tensor([[True, True, False, False]]).repeat(6, 1)
    both = where(model, batch, measure="all", steps=1, positions={"ab": mask})
    assert_close(both.estimated[:, 0], each.estimated[:, :2].sum(1), atol=1e-5, rtol=1e-4)
    mask[0, 0] = False  # the last of one stands for the last of another; the first comes twice where there is one
    groups = given_positions({"ab": mask}, torch.ones(6, 4, dtype=torch.bool))
    assert groups.index[0, :2].tolist() == [[1, 1], [1, 0]]
    assert groups.own[0, :2].tolist() == [[True, False], [True, True]]


def test_all_hosts_give_the_same():
    batch = prompts()
    plain = where(small_llama(), batch, measure="all", steps=2)
    traced = where(nnsight.NNsight(small_llama()), batch, measure="all", steps=2)
    assert traced.names == plain.names
    assert torch.equal(traced.measured, plain.measured)
    assert torch.equal(traced.estimated, plain.estimated)
    bridged = where(bridge_of(small_llama()), batch, measure="all", steps=2)
    for ours, theirs in (("down_proj", "mlp.out"), ("o_proj", "attn.o"), ("v_proj", "attn.v")):
        for layer in range(1):
            one = next(r for r, s in enumerate(plain.sites) if ours in s and f"layers.{layer}." in s)
            other = next(r for r, s in enumerate(bridged.sites) if theirs in s and f"blocks.{layer}." in s)
            assert_close(bridged.measured[other], plain.measured[one], atol=1e-5, rtol=1e-4)
            assert_close(bridged.estimated[other], plain.estimated[one], atol=1e-5, rtol=1e-4)


def test_hooked_transformers_and_where_they_read_and_send():
    model, batch = hooked_transformer(n_layers=2), hooked_tokens(6)
    before = Snapshot.of(model)
    found = where(model, batch, measure="all", steps=2)
    before.assert_unchanged(model)
    clean = model(batch)
    top = clean[:, -1].argmax(-1)

    def mean(y: Tensor, hook: Any) -> Tensor:
        y[:, 1] = y[:, 1].mean(0)
        return y

    for name, hook in (("blocks.1.attn.W_V", "blocks.1.attn.hook_v"), ("blocks.0.mlp.W_in", "blocks.0.mlp.hook_pre")):
        ablated = model.run_with_hooks(batch, fwd_hooks=[(hook, mean)])
        lost = (own_answers(clean, top) - own_answers(ablated, top)).mean()
        assert_close(found.measured[found.names.index(name), 1], lost, atol=1e-5, rtol=1e-4)
    senders = {name.split(".")[-1] for name, moves in zip(found.names, found.moves, strict=True) if moves}
    readers = {name.split(".")[-1] for name, reads in zip(found.names, found.reads, strict=True) if reads}
    assert senders == {"W_K", "W_V"}
    assert readers == {"W_O"}
    assert found.at_answer.tolist() == [False, False, False, True]


def test_sides_follow_what_is_read_directly():
    llama = where(small_llama(), prompts(), measure=2, steps=1)
    for row, site in enumerate(llama.sites):
        assert bool(llama.moves[row]) == site.endswith(("k_proj", "v_proj"))
        assert bool(llama.reads[row]) == site.endswith("o_proj")
        sent = "sends" if site.endswith(("k_proj", "v_proj")) else "source"
        received = "receives" if site.endswith("o_proj") else "answer"
        assert [llama.side(row, group) for group in range(4)] == [sent] * 3 + [received]
    gpt2 = where(tiny_gpt2(n_layer=1), prompts(), measure=2, steps=1)
    assert {site.split(".")[-1] for site, moves in zip(gpt2.sites, gpt2.moves, strict=True) if moves} == {"c_attn"}
    x = torch.randn(6, 4, 3)
    mixing = where(Mixing(), x, lambda y: y[:, -1].square().sum(-1), measure="all")
    assert mixing.moves.tolist() == [True, False]
    assert mixing.reads.tolist() == [False, True]
    everywhere = where(Mixing(), x, lambda y: y.square().sum((1, 2)), measure="all")
    assert everywhere.at_answer.all()
    assert not everywhere.moves.any()


class Copying(nn.Module):
    """The last position's answer is read from position 1 by `carry` and `put`; `idle` and `noise` do little."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(13, 16)
        self.noise = nn.Linear(16, 16)
        self.idle, self.carry, self.put = (nn.Linear(16, 16, bias=False) for _ in range(3))
        self.head = nn.Linear(16, 13)
        with torch.no_grad():
            self.embed.weight.copy_(torch.linalg.qr(torch.randn(16, 16)).Q[:13])
            for layer, scale in ((self.noise, 0.01), (self.idle, 0.02), (self.carry, 1.0), (self.put, 1.0)):
                layer.weight.copy_(scale * torch.eye(16))
            self.head.weight.copy_(8 * self.embed.weight)
            self.head.bias.copy_(2.0 * (torch.arange(13) == 0))  # what it says where it knows nothing

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        x = x + 0.01 * torch.tanh(self.noise(x))
        sent = self.carry(x) + self.idle(x)
        moved = torch.cat([torch.zeros_like(sent[:, :-1]), sent[:, 1:2]], 1)
        return self.head(torch.cat([x[:, :-1], 0 * x[:, -1:]], 1) + self.put(moved))


def test_best_gives_what_moves_the_information_and_not_what_makes_it():
    tokens = torch.stack([torch.full((10,), 11), torch.arange(10), torch.full((10,), 12)], 1)
    found = where(Copying(), tokens, measure="all", decode=lambda token: f" t{token[0]}")
    assert found.groups == ("0 t11", "1 t0…", "2 t12")
    assert found.measured[found.names.index("embed.weight"), 1] > 1  # it matters, but is the source
    assert found.side(found.names.index("embed.weight"), 1) == "source"
    assert found.best() == ["carry.weight", "put.weight"]
    assert [found.groups[group] for _, group in found.carriers()] == ["1 t0…", "2 t12"]
    assert [each.side for each in found.together] == ["sends", "receives"]
    text = str(found)
    assert max(map(len, text.splitlines())) <= 120
    assert "15 of 18 places" not in text
    assert "18 of 18 places measured" in text
    assert "sends: carry at 1 t0… ablated lose" in text


def test_best_says_what_it_does_not_reach():
    one, none = torch.tensor([0.4]), torch.tensor([0.5])
    reached = Together("answer", ((0, 0),), one, none, total=1.0, total_kept=0.0, by_answers=True)
    found = replace(apd.scan.Where.from_effects(torch.ones(1, 1), ["a"]), together=(reached,))
    assert found.best(0.5) == ["a"]
    with pytest.warns(
        apd.errors.ApdWarning, match=r"the share 0.5 of what all.*Give where\(\.\.\., measure=\) more places"
    ):
        assert found.best(0.9) == ["a"]
    by_metric = replace(found, together=(replace(reached, by_answers=False),))
    assert by_metric.best(0.4) == ["a"]
    with pytest.warns(apd.errors.ApdWarning, match=r"the share 0.4"):
        by_metric.best(0.5)
    with pytest.raises(apd.errors.InvalidSetting, match="above 0 and at most 1"):
        found.best(0)


def test_the_table_has_every_place_and_the_largest_first():
    found = where(small_llama(), prompts(), measure=10, steps=1)
    table = found.table()
    assert len(table) == found.measured.numel()
    assert table["measured"].notna().sum() == 10
    measured = table["measured"][:10].tolist()
    assert measured == sorted(measured, reverse=True)
    assert list(table.columns[:4]) == ["matrix", "site", "position", "side"]
    text = str(found)
    assert max(map(len, text.splitlines())) <= 120
    assert f"10 of {found.measured.numel()} places measured" in text
    some = found.only([0, 3], ["1", "3"])
    assert_close(some.estimated, found.estimated[[0, 3]][:, [1, 3]])
    assert some.names == (found.names[0], found.names[3])
    assert some.side(1, 1) == found.side(3, 3)


def test_results_that_the_user_has():
    effects = torch.tensor([[0.0, 0.1], [3.0, 0.2], [-1.0, 2.0], [0.1, float("nan")]])
    found = apd.scan.Where.from_effects(effects, ["a.0.w", "a.1.w", "a.2.w", "a.3.w"], ["subject", "last"], unit="nats")
    assert found.best(0.5) == ["a.1.w"]
    assert found.best(0.9) == ["a.1.w", "a.2.w"]
    assert found.labels() == ["L0 w", "L1 w", "L2 w", "L3 w"]
    assert "7 of 8 places measured" in str(found)
    assert found.table()["matrix"][0] == "a.1.w"
    with pytest.raises(apd.errors.InvalidSetting, match="4 names and 2 positions"):
        apd.scan.Where.from_effects(effects, ["a"])
    with pytest.raises(apd.errors.InvalidSetting, match="No place has an effect above 0"):
        apd.scan.Where.from_effects(-effects[:1], ["a"]).best()


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"prompts": prompts(1)}, r"Only one prompt has position '0' and 4 tokens.*Give at least two prompts"),
    ({"prompts": [prompts(2, 3), prompts(1, 4)]}, "Only one prompt has position '-4' and 4 tokens"),
    ({"prompts": [prompts(1), prompts(3)], "ablation": "resample"}, "Only one prompt in its batch"),
    ({"prompts": prompts(1).repeat(4, 1)}, "do not differ"),
    ({"positions": {"s": 9}}, "only 4 positions"),
    ({"positions": {"s": torch.full((6,), 4)}}, "not in 0 to 3"),
    ({"positions": {"s": torch.zeros(5, dtype=torch.long)}}, r"integers of shape \(6,\)"),
    ({"positions": {"s": "last"}}, "an index, integers"),
    ({"positions": {}}, "no group"),
    ({"prompts": of_lengths(True)[0], "positions": {"s": torch.zeros(6, dtype=torch.long)}}, "holds padding"),
    ({"metric": lambda y: y[:, -1]}, "one scalar an example"),
    ({"measure": 0}, "at least 1, or 'all'"),
    ({"steps": 0}, "at least 1"),
    ({"ablation": "zero"}, "ablation"),
    ({"prompts": []}, "empty"),
    ({"weights": "nothing"}, "No weight matches"),
    ({"output": lambda y: y.logits[..., :1]}, "Give metric="),
]


def test_how_many_run_in_one_forward_changes_no_number():
    model, batch = tiny_gpt2(n_layer=1), prompts()
    whole, single = (where(model, batch, measure=3, steps=1, memory=memory) for memory in (None, 1))
    assert_close(whole.measured, single.measured, equal_nan=True, atol=1e-5, rtol=1e-4)
    assert whole.n_forward == single.n_forward


@pytest.mark.parametrize("ablation", ["mean", "resample"])
def test_whatever_the_default_dtype_and_device(ablation: str):
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)), torch.randn(9, 5, 6)
    expected = where(model, x, ablation=ablation, measure=5)
    try:
        torch.set_default_dtype(torch.float64)
        torch.set_default_device("meta")
        came = where(model, x, ablation=ablation, measure=5)
        text = str(came)
    finally:
        torch.set_default_device(None)
        torch.set_default_dtype(torch.float32)
    assert torch.equal(came.measured.nan_to_num(), expected.measured.nan_to_num())
    assert torch.equal(came.estimated, expected.estimated)
    assert text == str(expected)
    assert came.best() == expected.best()


@pytest.mark.parametrize(("options", "message"), WRONG, ids=[message[:30] for _, message in WRONG])
def test_errors(options: dict[str, Any], message: str):
    model = small_llama()
    before = Snapshot.of(model)
    given = options.get("prompts", prompts())
    with pytest.raises(apd.ApdError, match=message):
        where(model, given, **{name: value for name, value in options.items() if name != "prompts"})
    before.assert_unchanged(model)
