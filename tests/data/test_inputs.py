"""What is data is never guessed wrong: which positions, which axis is the batch, and what a batch carries along.

What is right is computed with weights really substituted in a copy of the model, and with each example alone.
"""

import copy
from collections import namedtuple

import numpy as np
import pytest
import torch
from support.padding import alone, gpt2, padded
from torch import Tensor, nn
from torch.testing import assert_close
from transformers import BatchEncoding, LlamaConfig, LlamaForCausalLM, StaticCache, T5Config, T5ForConditionalGeneration

import apd_lens as apd
from apd_lens import compare

ABLATION = apd.AblationAttribution()


def decomposition_of(model: nn.Module, weights: str, **settings) -> apd.Decomposition:
    """Components that are not trained."""
    return apd.init(model, weights=weights, n_components=6, rank=2, **settings).decomposition()


def ablated_for_real(decomposition: apd.Decomposition, call, valid: Tensor | None = None) -> Tensor:
    """For each example and component, the root mean square change of the outputs that are data, `batch C`."""
    model, changes = decomposition.target.model, []
    with torch.no_grad():
        whole = call(copy.deepcopy(model))
        for component in range(decomposition.components.n_components):
            without = copy.deepcopy(model)
            without.load_state_dict(decomposition.edited_state_dict(ablate=component))
            squares = (whole - call(without)).square()
            if valid is None:
                changes.append(squares.flatten(1).mean(1).sqrt())
            else:
                changes.append(torch.stack([of[there].mean().sqrt() for of, there in zip(squares, valid, strict=True)]))
    return torch.stack(changes, 1)


def t5() -> T5ForConditionalGeneration:
    config = T5Config(
        vocab_size=20, d_model=8, d_kv=4, d_ff=16, num_layers=1, num_heads=2, decoder_start_token_id=0, pad_token_id=0
    )
    model = T5ForConditionalGeneration(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.3)
    return model


def translations(length: int = 6) -> dict[str, Tensor]:
    """Two examples, whose encoder's tokens are 2 and 5 of 6."""
    return {
        "input_ids": torch.randint(1, 20, (2, 6)),
        "attention_mask": (torch.arange(6) < torch.tensor([[2], [5]])).long(),
        "decoder_input_ids": torch.randint(1, 20, (2, length)),
    }


@pytest.mark.parametrize("weights", ["decoder.block.0.layer.2.*.wo.weight", "encoder.block.0.layer.1.*.wi.weight"])
@pytest.mark.parametrize("length", [5, 6])
def test_the_mask_of_an_encoder_says_nothing_of_the_decoder(weights: str, length: int):
    torch.manual_seed(0)
    model, batch = t5(), translations(length)
    decomposition = decomposition_of(model, weights, attribution=ABLATION)
    expected = ablated_for_real(decomposition, lambda model: model(**batch).logits)
    assert_close(decomposition.attributions(batch), expected, rtol=1e-4, atol=1e-6)


def test_the_mask_of_a_decoder_is_that_of_its_outputs():
    torch.manual_seed(0)
    model, batch = t5(), translations()
    batch["decoder_attention_mask"] = (torch.arange(6) < torch.tensor([[3], [6]])).long()
    decomposition = decomposition_of(model, "decoder.block.0.layer.2.*", attribution=ABLATION)
    valid = batch["decoder_attention_mask"].bool()
    expected = ablated_for_real(decomposition, lambda model: model(**batch).logits, valid)
    assert_close(decomposition.attributions(batch), expected, rtol=1e-4, atol=1e-6)
    of_labels = {name: batch[name] for name in ("input_ids", "attention_mask")} | {"labels": batch["decoder_input_ids"]}
    expected = ablated_for_real(decomposition, lambda model: model(**of_labels).logits)
    assert_close(decomposition.attributions(of_labels), expected, rtol=1e-4, atol=1e-6)


def test_positions_of_an_encoder_with_padding_are_refused():
    decomposition = decomposition_of(t5(), "encoder.block.0.*.wi.weight", selection=apd.TopK(1, "position"))
    with pytest.raises(apd.ShapeMismatch, match="may be the encoder's positions"):
        decomposition.attributions(translations())
    batch = translations()
    del batch["attention_mask"]
    assert decomposition.attributions(batch).shape == (2, 6, 6)


class Prefix(nn.Module):
    """Two positions of its own in front of those of the tokens."""

    def __init__(self):
        super().__init__()
        self.embed, self.prefix = nn.Embedding(10, 8), nn.Parameter(torch.randn(1, 2, 8))
        self.linear, self.out = nn.Linear(8, 8), nn.Linear(8, 5)

    def forward(self, ids: Tensor, attention_mask: Tensor) -> Tensor:
        h = torch.cat([self.prefix.expand(len(ids), -1, -1), self.embed(ids)], 1)
        return self.out(torch.tanh(self.linear(h)))


def valid_behind_prefix(batch: dict[str, Tensor]) -> Tensor:
    mask = batch["attention_mask"].bool()
    return torch.cat([torch.ones(len(mask), 2, dtype=torch.bool), mask], 1)


def test_outputs_of_other_positions_than_the_mask(tmp_path):
    batch = {"ids": torch.randint(1, 10, (3, 6)), "attention_mask": torch.ones(3, 6, dtype=torch.long)}
    model = Prefix()
    whole = decomposition_of(model, "linear.weight", attribution=ABLATION).attributions(batch)  # nothing is padding
    assert whole.isfinite().all()
    batch["attention_mask"][0, 2:] = 0
    with pytest.raises(apd.ShapeMismatch, match="give valid="):
        decomposition_of(model, "linear.weight").attributions(batch)
    state = apd.init(
        model, weights="linear.weight", n_components=4, rank=2, attribution=ABLATION, valid=valid_behind_prefix
    )
    decomposition = state.decomposition()
    valid = valid_behind_prefix(batch)
    expected = ablated_for_real(decomposition, lambda model: model(**batch), valid)
    assert_close(decomposition.attributions(batch), expected, rtol=1e-4, atol=1e-6)
    assert apd.responses(decomposition, [batch]).n_data_points == 3
    apd.step(state, batch)
    decomposition.save(tmp_path / "saved")
    with pytest.raises(apd.errors.InvalidSetting, match="Give it again"):
        apd.load(tmp_path / "saved", model).attributions(batch)
    loaded = apd.load(tmp_path / "saved", model, valid=valid_behind_prefix)
    assert torch.equal(loaded.attributions(batch), decomposition.attributions(batch))


@pytest.mark.parametrize(
    "valid",
    [lambda batch: torch.ones(3, 8), lambda batch: torch.ones(2, 8, dtype=torch.bool), lambda batch: None],
)
def test_what_valid_must_return(valid):
    state = apd.init(Prefix(), weights="linear.weight", n_components=4, valid=valid)
    batch = {"ids": torch.ones(3, 6, dtype=torch.long), "attention_mask": torch.ones(3, 6, dtype=torch.long)}
    with pytest.raises(apd.ShapeMismatch, match=r"Expected valid= to return bool of shape \(3, pos\)"):
        state.decomposition().attributions(batch)


LAST = {"as positions": lambda out: out.logits[:, -1:], "as outputs": lambda out: out.logits[:, -1]}


@pytest.mark.parametrize("form", LAST)
def test_the_last_position_of_padded_texts(form: str):
    """Refused where it is padding of some; right where it is not."""
    state = apd.init(gpt2(), weights="*mlp*", n_components=4, attribution=ABLATION, output=LAST[form])
    decomposition, batch = state.decomposition(), padded()
    with pytest.raises(apd.ShapeMismatch, match=r"give output=apd_lens\.last_position"):
        decomposition.attributions(batch)
    left = {name: value.flip(1) for name, value in batch.items()}
    left["position_ids"] = (left["attention_mask"].cumsum(1) - 1).clamp_min(0)
    came = decomposition.attributions(left)
    for index, length in enumerate((3, 5, 4)):
        one = {"input_ids": left["input_ids"][index : index + 1, -length:]}
        assert_close(came[index], decomposition.attributions(one)[0], rtol=1e-4, atol=1e-6)


class Attends(nn.Module):
    """Adds a mask to its scores, or fills in what is False."""

    def __init__(self, never: float = -1e9):
        super().__init__()
        self.embed, self.q, self.out = nn.Embedding(10, 8), nn.Linear(8, 8), nn.Linear(8, 5)
        self.never = never

    def forward(self, ids: Tensor, attention_mask: Tensor) -> Tensor:
        h = self.embed(ids)
        scores = self.q(h) @ h.mT
        mask = attention_mask if attention_mask.shape[-2:] == scores.shape[-2:] else attention_mask[:, None]
        scores = scores + mask if mask.is_floating_point() else scores.masked_fill(~mask.bool(), self.never)
        return self.out(torch.softmax(scores, -1) @ h)


@pytest.mark.parametrize("n", [4, 5, 6])
@pytest.mark.parametrize("kind", ["bool", "added"])
def test_a_causal_mask_for_all_examples_is_no_padding(n: int, kind: str):
    """Six positions: as many as examples, it may be either, and is refused."""
    causal = torch.ones(6, 6, dtype=torch.bool).tril()
    mask = causal if kind == "bool" else torch.zeros(6, 6).masked_fill(~causal, -torch.inf)
    batch = {"ids": torch.randint(0, 10, (n, 6)), "attention_mask": mask}
    decomposition = decomposition_of(Attends(), "q.weight", attribution=ABLATION)
    expected = ablated_for_real(decomposition, lambda model: model(**batch))
    if n == 6:
        with pytest.raises(apd.ShapeMismatch, match="as many examples as positions"):
            decomposition.attributions(batch)
        batch["attention_mask"] = mask[None]
    assert_close(decomposition.attributions(batch), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("n", [4, 6])
@pytest.mark.parametrize("dtype", [torch.long, torch.bool, torch.float32])
def test_padding_of_as_many_examples_as_positions(n: int, dtype: torch.dtype):
    lengths = torch.tensor([4, 6, 5, 3, 3, 2])[:n]
    batch = padded(tuple(lengths.tolist()), width=6)
    decomposition = decomposition_of(gpt2(), "*mlp*", attribution=ABLATION)
    came = decomposition.attributions({**batch, "attention_mask": batch["attention_mask"].to(dtype)})
    for index in range(n):
        assert_close(came[index], decomposition.attributions(alone(batch, index))[0], rtol=1e-4, atol=1e-6)


def test_a_mask_of_padding_that_is_added():
    class Added(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.q = nn.Embedding(10, 8), nn.Linear(8, 5)

        def forward(self, ids: Tensor, attention_mask: Tensor) -> Tensor:
            return self.q(self.embed(ids)) + 0 * attention_mask.exp()[..., None]

    added = torch.zeros(4, 6)
    added[:, 4:] = -1e4
    batch = {"ids": torch.randint(0, 10, (4, 6)), "attention_mask": added}
    decomposition = decomposition_of(Added(), "q.weight", attribution=ABLATION)
    expected = ablated_for_real(decomposition, lambda model: model(**batch)[:, :4])
    assert_close(decomposition.attributions(batch), expected, rtol=1e-4, atol=1e-6)


def test_a_mask_given_by_its_place_is_a_mask():
    batch = padded()
    decomposition = decomposition_of(gpt2(), "*mlp*")
    by_place = (batch["input_ids"], None, batch["attention_mask"])  # input_ids, past_key_values, attention_mask
    assert_close(decomposition.attributions(by_place), decomposition.attributions(batch))


class Placed(nn.Module):
    """Tokens and, in any order, what all examples share and what each has of its own."""

    def __init__(self):
        super().__init__()
        self.embed, self.places = nn.Embedding(10, 8), nn.Embedding(7, 8)
        self.mix, self.out = nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, positions: Tensor, ids: Tensor, scale: Tensor | None = None, mix: Tensor | None = None) -> Tensor:
        h = torch.tanh(self.mix(self.embed(ids) + self.places(positions)))
        h = h if scale is None else h * scale[:, None, None]
        return self.out(h if mix is None else mix @ h)


@pytest.mark.parametrize("n", [1, 5, 7, 8])
def test_whose_axis_is_the_batch(n: int):
    """Also where there are as many examples as positions (7) or channels (8)."""
    torch.manual_seed(0)
    batch = {
        "positions": torch.arange(7),
        "ids": torch.randint(0, 10, (n, 7)),
        "scale": torch.rand(n) + 0.5,
        "mix": torch.randn(7, 7),
    }
    expected = None
    for memory in (2000, 2**29):
        decomposition = decomposition_of(Placed(), "mix.weight", attribution=apd.AblationAttribution(memory=memory))
        expected = ablated_for_real(decomposition, lambda model: model(**batch))
        assert_close(decomposition.attributions(batch), expected, rtol=1e-4, atol=1e-6)
    effects = apd.responses(decomposition, [batch], examples=n, k=6).effects
    assert_close(effects.change, expected.mean(0), rtol=1e-4, atol=1e-6)


def test_what_cannot_be_told_is_refused():
    class OfAll(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(3, 3)

        def forward(self, x: Tensor, scale: Tensor) -> Tensor:
            return self.linear(x - x.mean(0)) * scale

    decomposition = decomposition_of(OfAll(), "*", attribution=ABLATION)
    with pytest.raises(apd.errors.InvalidBatches, match="cannot be told which of the arguments"):
        decomposition.attributions((torch.randn(3, 3), torch.rand(3)))


FILLED = {
    "copy_": lambda buffer, data: buffer.copy_(data),
    "numpy": lambda buffer, data: np.copyto(buffer.numpy(), data.numpy()),
    "data": lambda buffer, data: buffer.data.copy_(data),
    "inference": lambda buffer, data: torch.inference_mode()(buffer.copy_)(data),
}


@pytest.mark.parametrize("way", FILLED)
def test_a_buffer_that_is_filled_anew(way: str):
    data = torch.randn(4, 16, 6)
    with torch.inference_mode(way == "inference"):
        buffer = torch.zeros(16, 6)

    def filled(step: int) -> Tensor:
        FILLED[way](buffer, data[step % 4])
        return buffer

    def factors(batches) -> list[Tensor]:
        torch.manual_seed(0)
        made = apd.decompose(
            nn.Linear(6, 3).requires_grad_(False),
            batches,
            n_components=3,
            optimization=apd.Optimization(steps=6, lr=1e-2),
            progress=False,
        )
        return list(made.components.parameters())

    fresh = factors(lambda step: data[step % 4].clone())
    assert all(torch.equal(*pair) for pair in zip(factors(filled), fresh, strict=True))


def llama() -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=20,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
    )
    return LlamaForCausalLM(config).eval()


@pytest.mark.parametrize("memory", [2000, 2**29])
@pytest.mark.parametrize("kind", ["dynamic", "static", "with a graph"])
def test_a_cache_is_read_and_stays_as_it_was(kind: str, memory: int):
    torch.manual_seed(0)
    model, prefix, ids = llama(), torch.randint(0, 20, (3, 4)), torch.randint(0, 20, (3, 5))
    cache = StaticCache(config=model.config, max_cache_len=12) if kind == "static" else None
    with torch.set_grad_enabled(kind == "with a graph"):
        cache = model(prefix, use_cache=True, past_key_values=cache).past_key_values

    def fresh() -> dict:
        with torch.no_grad():
            new = StaticCache(config=model.config, max_cache_len=12) if kind == "static" else None
            new = model(prefix, use_cache=True, past_key_values=new).past_key_values
        return {"input_ids": ids, "past_key_values": new}

    batch = {"input_ids": ids, "past_key_values": cache}
    decomposition = decomposition_of(model, "*mlp*", attribution=apd.AblationAttribution(memory=memory))
    given = [fresh() for _ in range(1 + decomposition.components.n_components)]
    expected = ablated_for_real(decomposition, lambda model: model(**given.pop()).logits)
    for _ in range(2):
        assert_close(decomposition.attributions(batch), expected, rtol=1e-3, atol=1e-6)
    change = apd.responses(decomposition, [batch], examples=3, k=6).effects.change
    assert_close(change, expected.mean(0), rtol=1e-3, atol=1e-6)
    gradients = decomposition_of(model, "*mlp*")
    assert_close(gradients.attributions(batch), gradients.attributions(fresh()), rtol=1e-3, atol=1e-6)
    assert cache.get_seq_length() == 4


def test_padding_in_front_of_a_cache():
    torch.manual_seed(0)
    model, prefix, ids = llama(), torch.randint(0, 20, (2, 4)), torch.randint(0, 20, (2, 5))
    mask = torch.ones(2, 9, dtype=torch.long)
    mask[0, :2] = 0
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    with torch.no_grad():
        cache = model(prefix, attention_mask=mask[:, :4], position_ids=positions[:, :4], use_cache=True).past_key_values
    batch = {
        "input_ids": ids, "attention_mask": mask, "position_ids": positions[:, 4:], "past_key_values": cache,
    }  # fmt: skip
    decomposition = decomposition_of(model, "*mlp*", attribution=ABLATION)
    expected = ablated_for_real(
        decomposition, lambda model: model(**{**batch, "past_key_values": copy.deepcopy(cache)}).logits
    )
    assert_close(decomposition.attributions(batch), expected, rtol=1e-3, atol=1e-6)


class AttendsToNothing(nn.Module):
    """Causal; what is masked gets no attention at all, so padding in front is NaN."""

    def __init__(self):
        super().__init__()
        self.e, self.q, self.k = nn.Embedding(10, 8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.v, self.o = nn.Linear(8, 8), nn.Linear(8, 5)

    def forward(self, ids: Tensor, attention_mask: Tensor) -> Tensor:
        h = self.e(ids)
        allowed = torch.ones(ids.shape[1], ids.shape[1], dtype=torch.bool).tril() & attention_mask[:, None].bool()
        scores = (self.q(h) @ self.k(h).mT).masked_fill(~allowed, -torch.inf)
        return self.o(h + scores.softmax(-1) @ self.v(h))


@pytest.mark.parametrize("granularity", ["example", "position"])
@pytest.mark.parametrize(
    "attribution",
    [apd.GradientAttribution(), ABLATION, apd.IntegratedGradients(steps=2), apd.ActivationAttribution()],
    ids=lambda attribution: type(attribution).__name__,
)
def test_nan_at_padding_is_no_data(attribution, granularity):
    torch.manual_seed(0)
    model, ids, lengths = AttendsToNothing(), torch.randint(0, 10, (3, 6)), (3, 6, 5)
    mask = (torch.arange(6).flip(0) < torch.tensor(lengths)[:, None]).long()
    batch = {"ids": ids, "attention_mask": mask}
    assert model(**batch)[mask == 0].isnan().all()
    decomposition = decomposition_of(
        model, "*", attribution=attribution, selection=apd.TopK(2, granularity=granularity)
    )
    came = decomposition.attributions(batch)
    for index, length in enumerate(lengths):
        one = decomposition.attributions({name: value[index : index + 1, -length:] for name, value in batch.items()})
        of_one = came[index : index + 1, -length:] if granularity == "position" else came[index : index + 1]
        assert_close(of_one, one, rtol=1e-4, atol=1e-6)


def test_nan_at_padding_is_not_learnt_from():
    torch.manual_seed(0)
    mask = torch.ones(3, 6, dtype=torch.long)
    mask[0, :3] = 0
    batch = {"ids": torch.randint(0, 10, (3, 6)), "attention_mask": mask}
    state = apd.init(AttendsToNothing(), n_components=4, rank=2)
    for _ in range(2):
        state, _ = apd.step(state, batch)
    assert all(factor.isfinite().all() for factor in state.components.parameters())


def test_nan_elsewhere_is_reported_where_it_first_appeared():
    class Broken(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            return self[1](self[0](x).log())

    decomposition = decomposition_of(Broken(nn.Linear(4, 4), nn.Linear(4, 3)), "*")
    with pytest.raises(apd.NonFinite, match=r"They first appeared in the input of 1\.weight"):
        decomposition.attributions(-torch.ones(2, 4))


@pytest.mark.parametrize("side", ["left", "right"])
def test_signed_attributions_by_position_are_those_of_each_text_alone(side: str):
    batch = padded()
    if side == "left":
        batch = {name: value.flip(1) for name, value in batch.items()}
        batch["position_ids"] = (batch["attention_mask"].cumsum(1) - 1).clamp_min(0)
    decomposition = decomposition_of(gpt2(), "*mlp*")
    cut = slice(None, None) if side == "right" else slice(None)
    each = []
    for index in range(3):
        there = batch["attention_mask"][index].bool()
        each.append({"input_ids": batch["input_ids"][index : index + 1, there][:, cut]})

    def metric(output: Tensor) -> Tensor:
        return output[..., 3].sum(1)

    together = compare.signed_attributions(decomposition, [batch], metric, steps=2).by_position
    apart = compare.signed_attributions(decomposition, each, metric, steps=2).by_position
    assert_close(together, apart, rtol=1e-3, atol=1e-6)


def test_a_mask_of_another_batch_is_refused():
    model, ids = gpt2(), torch.randint(0, 13, (5, 6))
    decomposition = decomposition_of(model, "*", selection=apd.TopK(2, granularity="position"))
    mask = decomposition.select(ids)
    for other in (ids[:1], ids[:3], ids[:, :1], ids[:, :4]):
        with decomposition.sparse(mask), pytest.raises(apd.ShapeMismatch):
            model(other)
    for wrong in (mask[:1], mask[:, 0][:1]):
        with decomposition.sparse(wrong), pytest.raises(apd.ShapeMismatch, match="1 examples"):
            model(ids)
    with decomposition.sparse(mask), pytest.raises(apd.ShapeMismatch, match="give `batch C`"):
        model.generate(ids[:, :6], max_new_tokens=2, do_sample=False, pad_token_id=0, use_cache=True)
    with decomposition.sparse(mask.any(1)):
        assert model.generate(ids, max_new_tokens=2, do_sample=False, pad_token_id=0, use_cache=True).shape == (5, 8)


def test_one_example_without_a_batch_axis():
    mlp = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
    for model, x in ((mlp, torch.randn(6)), (gpt2(), torch.randint(0, 13, (5,)))):
        with pytest.raises(apd.ShapeMismatch, match=r"give it a batch axis: x\[None\]"):
            decomposition_of(model, "*").attributions(x)
    ids = torch.arange(4)
    assert decomposition_of(nn.Embedding(4, 3), "*").attributions(ids).shape == (4, 6)  # each is an example


@pytest.mark.parametrize(
    "x", [np.ones((2, 6), dtype=np.float32), [[1.0] * 6] * 2, [1, 2, 3]], ids=["array", "rows", "ids"]
)
def test_what_is_no_tensor_is_refused(x):
    decomposition = decomposition_of(nn.Linear(6, 3), "*")
    with pytest.raises(apd.errors.InvalidBatches, match=r"torch\.(as_)?tensor\("):
        decomposition.attributions(x)


def test_texts_for_a_model_of_tokens_are_refused():
    with pytest.raises(apd.errors.InvalidBatches, match="return_tensors"):
        decomposition_of(gpt2(), "*mlp*").attributions(["some text"])


Pair = namedtuple("Pair", "left right")


def test_batches_of_other_classes():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.left, self.right = nn.Linear(6, 3), nn.Linear(6, 3)

        def forward(self, left: Tensor, right: Tensor) -> Tensor:
            return torch.relu(self.left(left) + self.right(right))

    pair = Pair(torch.randn(9, 6), torch.randn(9, 6))
    decomposition = decomposition_of(Two(), "*", attribution=apd.AblationAttribution(memory=500))
    assert torch.equal(decomposition.attributions(pair), decomposition.attributions(tuple(pair)))
    change = apd.responses(decomposition, [pair]).effects.change
    assert torch.equal(change, apd.responses(decomposition, [tuple(pair)]).effects.change)
    of_tokens = decomposition_of(gpt2(), "*mlp*", attribution=apd.AblationAttribution(memory=2000))
    assert torch.equal(of_tokens.attributions(BatchEncoding(padded())), of_tokens.attributions(padded()))
