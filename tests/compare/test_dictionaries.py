"""Dictionaries: what they encode and decode, read from SAELens and from files, and spliced into models."""

import textwrap
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from support import outside
from support.bridges import bridge, forget_patterns
from support.hooked import hooked_transformer
from support.hooked import tokens as hooked_tokens
from support.toy_models import Snapshot, interrupted_in_forward, tiny_gpt2
from torch import nn
from torch.testing import assert_close

import apd_lens as apd
from apd_lens import compare

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    sae_lens = pytest.importorskip("sae_lens", reason="needs sae-lens, which works with transformer-lens 3 only")

MLP_OUT = "blocks.0.hook_mlp_out"


def dictionary(site: str = "site", d: int = 3, n_latents: int = 5, **settings) -> compare.Dictionary:
    generator = torch.Generator().manual_seed(0)
    encoder, decoder = (torch.randn(*shape, generator=generator) for shape in ((d, n_latents), (n_latents, d)))
    return compare.Dictionary(site, encoder, decoder, **settings)


def sae_at(hook_name: str, d: int, kind: str = "Standard", **settings):
    config = getattr(sae_lens, f"{kind}SAEConfig")(
        d_in=d,
        d_sae=16,
        reshape_activations="hook_z" if hook_name.endswith("hook_z") else "none",
        metadata=sae_lens.saes.sae.SAEMetadata(hook_name=hook_name),
        **settings,
    )
    torch.manual_seed(0)
    sae = getattr(sae_lens, f"{kind}SAE")(config)
    with torch.no_grad():
        for name, parameter in sae.named_parameters():
            if name.startswith(("b_", "threshold")):
                parameter.normal_(std=0.1).abs_()
    return sae


def test_activations_known_by_hand():
    """Two activations, three latents: pre-activations are 1, −2 and 3."""
    x = torch.tensor([[1.0, -2.0]])
    E, D = torch.tensor([[1.0, 0.0, 1.0], [0.0, 1.0, -1.0]]), torch.tensor([[1.0, 0.0], [0.0, 1.0], [2.0, 2.0]])

    def latents(**settings) -> list[float]:
        return compare.Dictionary("site", E, D, **settings).encode(x)[0].tolist()

    assert latents() == [1, 0, 3]
    assert latents(activation="topk", k=1) == [0, 0, 3]
    assert latents(activation="jumprelu", threshold=torch.tensor([1.5, 0.0, 2.5])) == [0, 0, 3]
    assert latents(activation="identity") == [1, -2, 3]
    assert latents(encoder_bias=torch.tensor([-1.0, 3.0, 0.0])) == [0, 1, 3]
    bias = torch.tensor([1.0, 0.0])
    assert latents(decoder_bias=bias) == [1, 0, 3]
    assert latents(decoder_bias=bias, subtract_decoder_bias=True) == [0, 0, 2]
    decoded = compare.Dictionary("site", E, D, decoder_bias=bias).decode(torch.tensor([[1.0, 0.0, 3.0]]))
    assert decoded.tolist() == [[8, 6]]


def test_neurons_are_themselves():
    x = torch.randn(4, 2, 6)
    neurons = compare.Dictionary.neurons("site", 6)
    assert_close(neurons.encode(x), x)
    assert_close(neurons.decode(neurons.encode(x)), x)


def test_heads_are_flattened():
    x = torch.randn(2, 3, 4, 5)
    assert_close(compare.Dictionary.neurons("hook_z", 20).encode(x), x.flatten(-2))


@pytest.mark.parametrize("kind", ["Standard", "TopK", "JumpReLU", "Gated"])
def test_saes_of_sae_lens_encode_and_decode_as_they_do(kind: str):
    sae, x = sae_at(MLP_OUT, 8, kind, **({"k": 3} if kind == "TopK" else {})), torch.randn(4, 3, 8)
    found = compare.Dictionary.from_sae_lens(sae)
    assert found.site == MLP_OUT
    assert found.site_out is None
    assert_close(found.encode(x), sae.encode(x))
    assert_close(found.decode(found.encode(x)), sae(x))
    assert found.encoder.shape == found.decoder.mT.shape == (8, 16)


@pytest.mark.parametrize("kind", ["Standard", "TopK", "JumpReLU"])
@pytest.mark.parametrize("suffix", [".safetensors", ".npz", ".pt"])
@pytest.mark.parametrize("linear", [False, True], ids=["x @ W", "nn.Linear"])
def test_files_of_other_libraries_give_the_same_dictionary(tmp_path: Path, kind: str, suffix: str, linear: bool):
    """An SAE's tensors under names of another library, the encoder one way round and the decoder either."""
    sae, x = sae_at(MLP_OUT, 8, kind, **({"k": 3} if kind == "TopK" else {})), torch.randn(4, 8)
    tensors = {name: value.detach().contiguous() for name, value in sae.state_dict().items()}
    tensors["encoder.weight"] = tensors.pop("W_enc").mT.contiguous()
    if linear:
        tensors["W_dec"] = tensors["W_dec"].mT.contiguous()
    path = tmp_path / f"sae{suffix}"
    if suffix == ".safetensors":
        save_file(tensors, path)
    elif suffix == ".npz":
        np.savez(path, **{name: value.numpy() for name, value in tensors.items()})
    else:
        torch.save(tensors, path)
    settings = {"Standard": {}, "TopK": {"activation": "topk", "k": 3}, "JumpReLU": {"activation": "jumprelu"}}[kind]
    found = compare.Dictionary.from_file(
        path,
        MLP_OUT,
        encoder="encoder.weight",
        threshold="threshold" if kind == "JumpReLU" else None,
        subtract_decoder_bias=bool(sae.cfg.apply_b_dec_to_input),
        **settings,
    )
    expected = compare.Dictionary.from_sae_lens(sae)
    assert_close(found.encode(x), expected.encode(x))
    assert_close(found.decode(found.encode(x)), expected.decode(expected.encode(x)))


def test_files_that_do_not_fit_are_refused(tmp_path: Path):
    path = tmp_path / "sae.safetensors"
    save_file({"W_enc": torch.ones(3, 5), "W_dec": torch.ones(5, 3), "square": torch.ones(5, 5)}, path)
    options = {"encoder_bias": None, "decoder_bias": None}

    def refused(error: type[apd.ApdError], match: str, **changes) -> None:
        with pytest.raises(error, match=match):
            compare.Dictionary.from_file(path, "site", **{**options, **changes})

    refused(apd.errors.InvalidSetting, r"no tensor 'E' for the encoder. It holds .*W_enc \(3, 5\)", encoder="E")
    refused(apd.errors.InvalidSetting, r"no tensor 'b' for the encoder_bias.* or None", encoder_bias="b")
    refused(apd.ShapeMismatch, r"Which axis of the encoder \(3, 5\) is the latents'\? Known are unknown latents")
    refused(apd.ShapeMismatch, r"encoder is \(3, 5\), which does not fit 7 latents", n_latents=7)
    refused(apd.ShapeMismatch, r"Which axis of the encoder \(5, 5\)", encoder="square", n_latents=5)
    assert compare.Dictionary.from_file(path, "site", n_latents=5, **options).encoder.shape == (3, 5)
    with pytest.raises(apd.errors.InvalidSetting, match="There is no file"):
        compare.Dictionary.from_file(tmp_path / "none.npz", "site")
    (tmp_path / "sae.h5").touch()
    with pytest.raises(apd.errors.InvalidSetting, match=r"ends in .safetensors, .npz or .pt, got sae.h5"):
        compare.Dictionary.from_file(tmp_path / "sae.h5", "site")


def test_tensors_that_do_not_fit_are_refused():
    setup = """
    import torch, apd_lens as apd
    from apd_lens.compare._dictionaries import Dictionary
    E, D = torch.ones(3, 5), torch.ones(5, 3)
    """
    errors = {
        "Dictionary('site', D, D)": "ShapeMismatch: Expected an encoder (d, latents) and a decoder (latents",
        "Dictionary('site', E, torch.ones(5, 4))": "ShapeMismatch: The encoder reads 3 activations at site",
        "Dictionary('site', E, D, torch.ones(3))": "ShapeMismatch: Expected encoder_bias of shape (5,), got (3,)",
        "Dictionary('site', E, D, activation='topk')": 'InvalidSetting: activation="topk" needs k from 1',
        "Dictionary('site', E, D, activation='jumprelu')": 'InvalidSetting: activation="jumprelu" needs threshold=',
        "Dictionary('site', E, D).encode(torch.ones(2, 4))": "ShapeMismatch: The dictionary of site reads 3",
    }
    for expected, found in zip(errors.values(), outside.errors_of(textwrap.dedent(setup), errors), strict=True):
        assert found.startswith(expected)


def test_saes_without_a_place_or_a_decoder_are_refused():
    with pytest.raises(apd.errors.InvalidSetting, match="Expected an SAE or transcoder with W_enc and W_dec"):
        compare.Dictionary.from_sae_lens(nn.Linear(2, 2))
    sae = sae_at(MLP_OUT, 8)
    sae.cfg.metadata.hook_name = None
    with pytest.raises(apd.errors.InvalidSetting, match="names no hook point"):
        compare.Dictionary.from_sae_lens(sae)


@pytest.mark.parametrize(
    ("hook_name", "d"), [(MLP_OUT, 8), ("blocks.0.mlp.hook_post", 10), ("blocks.0.attn.hook_z", 8)]
)
def test_spliced_is_what_sae_lens_splices(hook_name: str, d: int):
    model = hooked_transformer(sae_lens.HookedSAETransformer, n_layers=2)
    sae, x = sae_at(hook_name, d), hooked_tokens(3)
    expected, target = model.run_with_saes(x, saes=[sae]), model(x)
    before, sae_before = Snapshot.of(model), {name: value.clone() for name, value in sae.state_dict().items()}
    with compare.spliced(model, [compare.Dictionary.from_sae_lens(sae)]):
        assert_close(model(x), expected)
    assert (expected - target).abs().max() > 1e-2
    before.assert_unchanged(model)
    assert all(torch.equal(value, sae_before[name]) for name, value in sae.state_dict().items())


def test_a_transcoder_is_spliced_as_sae_lens_splices_it():
    metadata = sae_lens.saes.sae.SAEMetadata(hook_name="blocks.0.mlp.hook_in", hook_name_out=MLP_OUT)
    options = {"d_in": 8, "d_out": 8, "d_sae": 16, "apply_b_dec_to_input": False}
    transcoder = sae_lens.Transcoder(sae_lens.TranscoderConfig(**options, metadata=metadata))
    model, x = hooked_transformer(sae_lens.HookedSAETransformer), hooked_tokens(3)
    expected = model.run_with_saes(x, saes=[transcoder])
    found = compare.Dictionary.from_sae_lens(transcoder)
    assert found.site_out == MLP_OUT
    with compare.spliced(model, [found]):
        assert_close(model(x), expected)


def test_an_sae_on_a_bridge_under_an_alias_of_the_hook_point():
    model, sae = bridge("gpt2"), sae_at(MLP_OUT, 8)
    x = torch.randint(2, 12, (3, 4))
    target = model(x)
    forget_patterns(model)
    before = Snapshot.of(model)
    with compare.spliced(model, [compare.Dictionary.from_sae_lens(sae)]):
        found = model(x)
    forget_patterns(model)
    before.assert_unchanged(model)
    hooks = [("blocks.0.mlp.hook_out", lambda value, hook: sae(value))]
    assert_close(found, model.run_with_hooks(x, fwd_hooks=hooks))
    assert (found - target).abs().max() > 1e-2


@pytest.mark.parametrize("site", ["transformer.h.1.mlp", "transformer.h.0"])
def test_neurons_on_a_hugging_face_model_change_nothing_and_none_of_them_all(site: str):
    """A block of a Hugging Face model may return a tuple; its first entry is the activation."""
    model, x = tiny_gpt2(), torch.randint(13, (2, 5))
    target, neurons = model(x).logits, compare.Dictionary.neurons(site, 8)
    with compare.spliced(model, [neurons]):
        assert_close(model(x).logits, target)
    with compare.spliced(model, [neurons], [torch.zeros(2, 8)]):
        assert (model(x).logits - target).abs().max() > 1e-2
    assert_close(model(x).logits, target)


def test_masks_of_examples_and_of_positions():
    """Two positions, the mask of one example keeps a latent, that of the other's second position too."""
    model, x = nn.Identity(), torch.tensor([[[1.0, 2.0], [3.0, 4.0]], [[5.0, 6.0], [7.0, 8.0]]])
    wrapped = nn.Sequential(model)
    neurons = compare.Dictionary.neurons("0", 2)
    with compare.spliced(wrapped, [neurons], [torch.tensor([[1, 0], [0, 1]])]):
        assert wrapped(x).tolist() == [[[1, 0], [3, 0]], [[0, 6], [0, 8]]]
    with compare.spliced(wrapped, [neurons], [torch.tensor([[[1, 0], [0, 0]], [[0, 0], [1, 1]]]).bool()]):
        assert wrapped(x).tolist() == [[[1, 0], [0, 0]], [[0, 0], [7, 8]]]
    with (
        pytest.raises(apd.ShapeMismatch, match=r"latents of shape \(2, 2, 2\)"),
        compare.spliced(wrapped, [neurons], [torch.ones(3, 2)]),
    ):
        wrapped(x)


def test_the_model_is_as_it_was_after_errors_and_interrupts():
    model = nn.Sequential(nn.Linear(3, 3), nn.ReLU())
    before, x = Snapshot.of(model), torch.randn(2, 3)
    wrong = dictionary("0", d=4)
    for error, match, arguments in [
        (apd.errors.InvalidSetting, r"no submodule '2' .*closest are", ([dictionary("0"), dictionary("2")],)),
        (apd.errors.InvalidSetting, "Two dictionaries stand at '0'", ([dictionary("0"), dictionary("0")],)),
        (apd.errors.InvalidSetting, "one mask for each of 1", ([dictionary("0")], [])),
        (apd.ShapeMismatch, "reads 4 activations", ([wrong],)),
    ]:
        with pytest.raises(error, match=match), compare.spliced(model, *arguments):
            model(x)
        before.assert_unchanged(model)
    with (
        interrupted_in_forward(model[1], 1),
        pytest.raises(KeyboardInterrupt),
        compare.spliced(model, [dictionary("0")]),
    ):
        model(x)
    before.assert_unchanged(model)


def test_two_dictionaries_and_gradients_through_them():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    first, second, x = dictionary("0"), dictionary("1"), torch.randn(2, 3, requires_grad=True)
    with compare.spliced(model, [first, second]):
        found = model(x)
    hidden = first.decode(first.encode(model[0](x)))
    assert_close(found, second.decode(second.encode(model[1](hidden))))
    (gradient,) = torch.autograd.grad(found.sum(), x)
    assert gradient.abs().max() > 0


def test_a_random_dictionary_has_the_norms_and_none_of_the_directions():
    trained = dictionary(d=50, n_latents=200, decoder_bias=torch.ones(50))
    random = compare.random_dictionary(trained)
    assert_close(random.decoder.norm(dim=1), trained.decoder.norm(dim=1))
    cosines = torch.cosine_similarity(random.decoder, trained.decoder)
    assert cosines.abs().mean() < 2 * 50**-0.5
    assert_close((random.encoder * random.decoder.mT).sum(0), torch.ones(200))
    assert torch.equal(random.encode(torch.ones(1, 50)), torch.zeros(1, 200))  # b_D is taken from x
    assert not torch.equal(random.decoder, compare.random_dictionary(trained, seed=1).decoder)
    basis, x = compare.random_dictionary(compare.Dictionary.neurons("site", 6)), torch.randn(4, 6)
    assert_close(basis.decode(basis.encode(x)), x)
    assert (basis.encode(x) - x).abs().max() > 0.1


def test_no_sae_lens_is_needed():
    code = "import sys, apd_lens.compare; print([n for n in ('sae_lens', 'transformer_lens') if n in sys.modules])"
    assert outside.fresh(code) == "[]\n"


def test_what_is_printed():
    assert str(dictionary()) == "5 latents (relu) of 3 activations at site"
    sae = compare.Dictionary.from_sae_lens(sae_at(MLP_OUT, 8))
    assert str(sae) == "16 latents (StandardSAE) of 8 activations at blocks.0.hook_mlp_out"
