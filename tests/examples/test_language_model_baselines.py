"""Edits of a tiny language model do what their formulas say, and all are measured in one way."""

import copy
import json

import baselines
import pytest
import tasks
import torch
from support.examples import run

import apd_lens as apd


@pytest.fixture(scope="module")
def task() -> baselines.Task:
    model, tokenizer = tasks.stand_in()
    known = tasks.known(tasks.STAND_IN, model, tokenizer, apd.language.sample_texts(model, n=96, length=8))
    return baselines.task_of(known, model, tokenizer, [f"model.layers.0.self_attn.{kind}_proj.weight" for kind in "vo"])


@pytest.fixture(scope="module")
def start(task):
    others = list(task.others.split(4))
    settings = apd.language_model(steps=0)
    return apd.decompose(
        task.model, [{"input_ids": task.prompts}], list(task.weights), n_components=20, others=others,
        progress=False, **settings,
    )  # fmt: skip


@pytest.fixture(scope="module")
def forgetting(task, start):
    return apd.language.forgetting(start, {"input_ids": task.prompts}, progress=False)


@pytest.fixture(autouse=True)
def _model_stays_as_it_is(task):
    before = copy.deepcopy(task.model.state_dict())
    yield
    assert all(torch.equal(value, before[name]) for name, value in task.model.state_dict().items())
    assert not any(module._forward_hooks for module in task.model.modules())


def loaded(task, weights):
    """A copy of the model with these weights in it."""
    model = copy.deepcopy(task.model)
    model.load_state_dict({**model.state_dict(), **weights})
    return model


def noise(task, name):
    value = task.value(name)
    return value + 0.1 * torch.randn(value.shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("layer", [0, 1, 2])
def test_a_run_with_other_weights_is_that_of_a_model_that_has_them(task, layer):
    name = f"model.layers.{layer}.mlp.down_proj.weight"
    weights = {name: noise(task, name)}
    with torch.no_grad():
        expected = loaded(task, weights)(task.held_out).logits.log_softmax(-1)
        torch.testing.assert_close(task.run(task.held_out, weights, at=None), expected)
        torch.testing.assert_close(task.run(task.held_out, weights, rows=[3, 1]), expected[[3, 1], -1])
        last = torch.arange(len(task.held_out)) % 4
        torch.testing.assert_close(task.run(task.held_out, weights, at=last), expected[range(len(last)), last])


def test_no_edit_has_no_effects(task):
    same = {name: task.value(name) for name in task.weights}
    found = baselines.effects(task, lambda: lambda i: same)
    numbers = found.numbers()
    assert numbers["success"] == numbers["others changed"] == numbers["nats lost"] == numbers["texts: KL"] == 0
    assert numbers["rank"] == numbers["parameters"] == 0


def test_components_are_measured_as_by_forgetting(task, start, forgetting):
    found = baselines.effects(task, lambda: baselines.of_components(start, forgetting.own))
    assert torch.equal(found.changed, forgetting.changed)
    torch.testing.assert_close(found.kl, forgetting.kl_off, atol=1e-5, rtol=1e-3)
    assert found.numbers()["success"] == forgetting.forgotten.float().mean()
    assert found.numbers([1])["success"] == forgetting.forgotten[1]


def test_other_phrasings(task, start, forgetting):
    """Padded on the right, the prompts themselves are phrasings in which the same answers change."""
    n = len(task.prompts)
    padded = torch.cat([task.prompts, torch.zeros(n, 2, dtype=torch.long)], 1)
    again = baselines.replace(task, unseen=[(padded, torch.full((n,), task.prompts.shape[1] - 1))])
    found = baselines.effects(again, lambda: baselines.of_components(start, forgetting.own))
    assert found.known.all()
    assert torch.equal(found.unseen[:, 0, 0], found.changed.diagonal())
    strangers = (torch.arange(n) + 7) % n
    assert torch.equal(found.unseen[:, 0, 1], found.changed[range(n), strangers])
    torch.testing.assert_close(found.kl_unseen[:, 0, 1], found.kl[range(n), strangers], atol=1e-6, rtol=1e-3)
    assert found.numbers()["unseen: success"] == found.numbers()["success"]


def test_components_of_others_and_random_ones_leave_the_fact(task, start, forgetting):
    own = forgetting.own.tolist()
    mine, other = baselines.of_components(start, own), baselines.of_other_components(task, start, own)
    others = [baselines.of_components(start, [number])(0) for number in set(own)]
    name = task.weights[0]
    for i in range(3):
        assert not torch.equal(other(i)[name], mine(i)[name])
        assert any(torch.equal(other(i)[name], edit[name]) for edit in others)
    for make in (lambda: other, lambda: baselines.of_random_components(start, own)):
        found = baselines.effects(task, make, which=[0, 1, 2, 3]).numbers()
        assert found["nats lost"] < 1


def test_singular_directions_are_those_whose_loss_costs_most(task):
    """The model is certain of its answers, so small steps away from each direction are taken in double precision."""
    task = baselines.replace(task, model=copy.deepcopy(task.model).double(), _kept={})
    name = task.weights[1]
    W = task.value(name)
    change = W - baselines.of_singular_directions(task, others=0.0, rank=1)(0)[name]
    U, S, Vh = torch.linalg.svd(W)
    parts = [s * torch.outer(u, v) for u, s, v in zip(U.mT, S, Vh, strict=True)]
    with torch.no_grad():
        left = [task.run(task.prompts, {name: W - 1e-2 * part})[0, task.answers[0]] for part in parts]
    torch.testing.assert_close(change, parts[int(torch.stack(left).argmin())])


@pytest.mark.parametrize(("kind", "count"), [("neurons", 5), ("heads", 1)])
def test_units_are_turned_off(task, kind, count):
    weights = baselines.of_units(task, kind, count, others=0.0)(0)
    off = torch.cat([(value == 0).all(0) for value in weights.values()])
    assert off.sum() == (5 if kind == "neurons" else task.model.config.head_dim)
    found = baselines.effects(task, lambda: lambda i: weights, which=[0])
    assert found.parameters.item() <= off.sum() * task.model.config.hidden_size
    assert found.lost.item() > 0


HOW = baselines.Training(steps=30, lr=1.0, n_prompts=4, n_texts=1)


@pytest.mark.parametrize("at", [0, 1])
def test_a_rank_one_edit_writes_one_value_at_one_key(task, at):
    name, place = task.weights[at], (task.subject, -1)[at]
    found = baselines.effects(task, lambda: baselines.of_rank_one(task, [name], place, HOW), which=[0, 5])
    assert found.rank.tolist() == [1, 1]
    assert (found.lost > 1).all()
    assert found.numbers()["others changed"] < 0.1
    x = baselines.watched(task, [name])[name].x
    change = baselines.of_rank_one(task, [name], place, HOW, prompts=1e3)(0)[name] - task.value(name)
    written = (x[:, place] @ change.T).norm(dim=1)
    assert (written[1:] < 0.2 * written[0]).all()


def test_training_ends_where_the_goal_is_near(task):
    def lost(close: float) -> float:
        how = baselines.replace(HOW, lr=0.1, steps=80, close=close)
        edits = baselines.of_rank_one(task, task.weights[1:], -1, how)
        return baselines.effects(task, lambda: edits, which=[0]).lost.item()

    assert 0.0 < lost(1e9) < lost(0.005)


def test_low_rank_unlearning(task):
    how = baselines.replace(HOW, lr=0.02, close=0.0)
    found = baselines.effects(task, lambda: baselines.of_low_rank(task, how, 10), which=[0, 5])
    assert (found.rank <= 2 * task.rank).all()
    assert (found.lost > 1).all()
    forgetful = baselines.replace(how, retain=0.0)
    other = baselines.effects(task, lambda: baselines.of_low_rank(task, forgetful, 10), which=[0, 5])
    assert found.numbers()["KL there"] < other.numbers()["KL there"]


def test_rewiring(task, start, forgetting):
    to = [(i + 1) % len(task.prompts) for i in range(len(task.prompts))]
    wanted, own = task.answers[to], forgetting.own.tolist()
    again = baselines.replace(task, unseen=[(task.prompts, torch.full((len(to),), task.prompts.shape[1] - 1))])
    goal = baselines.answered(task, wanted)
    for make in (
        lambda: baselines.rewired_components(task, start, own, to),
        lambda: baselines.of_rank_one(task, task.weights[1:], -1, HOW, goal),
    ):
        found = baselines.effects(again, make, wanted=wanted, which=[0, 3, 6])
        assert found.success.all()
        assert found.unseen[:, 0, 0].all()
        assert found.numbers()["others changed"] < 0.1


def test_relearning(task, start, forgetting):
    i = int(forgetting.forgotten.nonzero()[0])
    weights = baselines.of_components(start, forgetting.own)(i)
    margins = baselines.relearning(task, weights, i, "fact", steps=8, lr=1e-3)
    with torch.no_grad():
        p = loaded(task, weights)(task.prompts).logits[i, -1].log_softmax(-1)
    best_other = p.index_fill(0, task.answers[i], -torch.inf).max()
    torch.testing.assert_close(margins[0], p[task.answers[i]] - best_other)
    assert margins[0] < 0 < margins[-1]
    assert 0 < baselines.steps_until_back(margins) < 9
    slower = baselines.relearning(task, weights, i, "others", steps=2, lr=1e-6)
    assert baselines.steps_until_back(slower) == 3


@pytest.mark.parametrize(
    ("kinds", "number"), [("^components$|head", 2), pytest.param("", 14, marks=pytest.mark.thorough)]
)
def test_the_script_prints_every_kind(tmp_path, kinds: str, number: int):
    shared = ("--stand-in", "--out", str(tmp_path))
    run("language_model/run.py", *shared, "--steps", "2")
    printed = run("language_model/baselines.py", *shared, "--facts", "0", "1", "--kinds", kinds)
    for kind in ("components", "head", "Each fact answered", "fine-tuning"):
        assert kind in printed
    found = json.loads((tmp_path / "stand-in" / "results" / "baselines-stand-in.json").read_text())
    assert len(found["all"]) == len(found["odd"]) == number
    assert set(found["rewired"]) <= set(found["back"]) < set(found["all"])
