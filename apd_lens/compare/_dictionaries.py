"""Dictionaries of other methods: an encoder, a decoder, and the place in the model that they read and write."""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from safetensors.torch import load_file
from torch import Tensor

from apd_lens._block import no_grad
from apd_lens._errors import InvalidSetting, ShapeMismatch
from apd_lens._files import user_path

Activation = Literal["relu", "topk", "jumprelu", "identity"]

Latents = Float[Tensor, "batch *pos latents"]

# How other libraries call an activation.
_ACTIVATIONS: dict[str, Activation] = {
    "standard": "relu",
    "transcoder": "relu",
    "relu": "relu",
    "topk": "topk",
    "jumprelu": "jumprelu",
    "jumprelu_transcoder": "jumprelu",
    "identity": "identity",
}
_DICT_CLASSES: dict[str, Activation] = {
    "AutoEncoder": "relu",
    "AutoEncoderTopK": "topk",
    "JumpReluAutoEncoder": "jumprelu",
    "BatchTopKSAE": "jumprelu",
}
# Fields of a cfg.json that change what an SAE computes, and the values with which they do not.
_PLAIN: dict[str, tuple[Any, ...]] = {
    "normalize_activations": ("none", None, False),
    "finetuning_scaling_factor": (False, None),
    "reshape_activations": ("none", "hook_z", None),
    "hook_head_index": (None,),
    "skip_connection": (False, None),
}
# Names of tensors that only SAEs of other kinds have.
_OF_OTHER_KINDS = {"b_gate", "b_mag", "r_mag", "W_gate", "W_skip", "log_threshold", "scaling_factor"}


@dataclass(frozen=True, eq=False)
class Dictionary:
    """A sparse autoencoder, a transcoder, or neurons: latents = activation(x E + b_E), x̂ = latents D + b_D.

    Attributes:
        site: name of the submodule whose output it reads, as `model.get_submodule` finds it: a hook point of
            TransformerLens, or any module of torch.
        encoder: E, the direction that each latent reads.
        decoder: D, the direction that each latent writes.
        encoder_bias, decoder_bias: b_E and b_D; None for 0.
        activation: "relu"; "topk", of which only the k largest of each position stay; "jumprelu", which is x where it
            is above `threshold`, else 0; or "identity".
        k: of "topk".
        threshold: of "jumprelu".
        subtract_decoder_bias: whether b_D is taken from x before it is encoded.
        site_out: of a transcoder, the submodule whose output it predicts; None where that is `site`.
        sae: an SAE whose own `encode` and `decode` are used in place of these fields.
        parameters: number of parameters of a latent. None for the d + d_out of its directions, and for a neuron the
            entries that belong to it in the decomposed matrices.

    Raises:
        ShapeMismatch: tensors that do not fit together.
        InvalidSetting: "topk" without k, or "jumprelu" without threshold.
    """

    site: str
    encoder: Float[Tensor, "d latents"]
    decoder: Float[Tensor, "latents d_out"]
    encoder_bias: Float[Tensor, " latents"] | None = None
    decoder_bias: Float[Tensor, " d_out"] | None = None
    activation: Activation = "relu"
    k: int | None = None
    threshold: Float[Tensor, " latents"] | Float[Tensor, ""] | None = None
    subtract_decoder_bias: bool = False
    site_out: str | None = None
    sae: Any = None
    parameters: int | None = None

    def __post_init__(self) -> None:
        _check_shapes(self)
        if self.sae is not None:
            return
        if self.activation == "topk" and (self.k is None or not 1 <= self.k <= self.n_latents):
            raise InvalidSetting(f'activation="topk" needs k from 1 to the {self.n_latents} latents, got k={self.k}.')
        if self.activation == "jumprelu" and self.threshold is None:
            raise InvalidSetting('activation="jumprelu" needs threshold=, one for each latent.')

    @staticmethod
    def from_sae_lens(sae: Any, site: str | None = None, site_out: str | None = None) -> "Dictionary":
        """Takes an SAE or transcoder of SAELens, trained or loaded, with its own `encode` and `decode`.

        Args:
            site, site_out: where it reads and writes; default the hook names of its metadata.

        Raises:
            InvalidSetting: it names no hook point, or is of a kind that encoder and decoder do not describe.
        """
        decoder = getattr(sae, "W_dec", None)
        if not isinstance(decoder, Tensor) or hasattr(sae, "W_skip"):
            raise InvalidSetting(
                f"Expected an SAE or transcoder with W_enc and W_dec, and no W_skip, got {type(sae).__name__}. "
                "Anything else can be given as tensors: Dictionary(site, encoder, decoder, ...)."
            )
        metadata = getattr(sae.cfg, "metadata", sae.cfg)
        if getattr(metadata, "hook_head_index", None) is not None:
            raise InvalidSetting(
                f"This SAE reads head {metadata.hook_head_index} of {metadata.hook_name} alone, which cannot be "
                "spliced in. Train it on a hook point of its own."
            )
        site = site or getattr(metadata, "hook_name", None)
        if not site:
            raise InvalidSetting("This SAE's metadata names no hook point. Say what it reads: site='...'.")
        return Dictionary(
            site=site,
            encoder=getattr(sae, "W_enc", decoder.mT).detach(),  # without one, it encodes with the decoder
            decoder=decoder.detach(),
            encoder_bias=_own(sae, "b_enc"),
            decoder_bias=_own(sae, "b_dec"),
            site_out=site_out or getattr(metadata, "hook_name_out", None),
            sae=sae,
        )

    @staticmethod
    def from_file(
        path: str | os.PathLike[str],
        site: str,
        *,
        encoder: str = "W_enc",
        decoder: str = "W_dec",
        encoder_bias: str | None = "b_enc",
        decoder_bias: str | None = "b_dec",
        threshold: str | None = None,
        n_latents: int | None = None,
        activation: Activation | None = None,
        k: int | None = None,
        subtract_decoder_bias: bool | None = None,
        site_out: str | None = None,
    ) -> "Dictionary":
        """Reads a dictionary from another library's file, without the library: .safetensors, .npz, or .pt with tensors
        only.

        Encoder and decoder may each be stored as x @ W or as in nn.Linear. The lengths of the biases, or `n_latents`,
        tell which.

        Args:
            encoder, decoder, encoder_bias, decoder_bias: names of the tensors in the file; None for none.
            threshold: the same; None for "threshold" where there is one and `activation` is not given.
            n_latents: where the lengths of the biases do not tell.
            activation, k, subtract_decoder_bias: None for what the file says of itself: in its tensors, or in the
                cfg.json (SAELens, sparsify) or config.json (dictionary_learning) beside it. Where nothing is said,
                "relu", and the bias stays.

        Raises:
            InvalidSetting: no such file, kind of file, or tensor in it: lists those there are; or the file says that it
                is of a kind that encoder and decoder do not describe.
            ShapeMismatch: shapes that do not fit together, or do not tell which axis is the latents'.
        """
        tensors = _tensors_in(user_path(path))
        said = _kind_beside(user_path(path))
        if activation is None:
            if other := sorted(_OF_OTHER_KINDS & tensors.keys()):
                raise _other_kind(path, f"it holds {', '.join(other)}")
            if threshold is None and "threshold" in tensors:
                threshold = "threshold"
            of_file: Activation = "jumprelu" if threshold is not None else said.get("activation", "relu")
            activation = of_file
        names = {"encoder": encoder, "decoder": decoder, "encoder_bias": encoder_bias}
        names |= {"decoder_bias": decoder_bias, "threshold": threshold}
        found = {field: _named(tensors, name, field, path) for field, name in names.items() if name is not None}
        for bias in ("encoder_bias", "threshold"):
            if n_latents is None and bias in found and found[bias].ndim == 1:
                n_latents = len(found[bias])
        width = len(found["decoder_bias"]) if "decoder_bias" in found else None
        found["encoder"] = _turned(found["encoder"], "encoder", 1, n_latents, width if site_out is None else None)
        found["decoder"] = _turned(found["decoder"], "decoder", 0, n_latents, width)
        if said.get("scaled_by_decoder"):
            norms = found["decoder"].norm(dim=1)
            found["encoder"], found["decoder"] = found["encoder"] * norms, found["decoder"] / norms[:, None]
            if "encoder_bias" in found:
                found["encoder_bias"] = found["encoder_bias"] * norms
        return Dictionary(
            site=site,
            encoder=found["encoder"],
            decoder=found["decoder"],
            encoder_bias=found.get("encoder_bias"),
            decoder_bias=found.get("decoder_bias"),
            activation=activation,
            k=said.get("k") if k is None and activation == "topk" else k,
            threshold=found.get("threshold"),
            subtract_decoder_bias=(
                said.get("subtract_decoder_bias", False) if subtract_decoder_bias is None else subtract_decoder_bias
            ),
            site_out=site_out,
        )

    @staticmethod
    def neurons(site: str, n: int, parameters: int | None = None) -> "Dictionary":
        """Takes the n activations at a site as latents: the baseline for every dictionary.

        Args:
            parameters: number of the model's parameters that belong to one neuron.
        """
        identity = torch.eye(n, dtype=torch.float32, device="cpu")
        return Dictionary(site, identity, identity, activation="identity", parameters=parameters)

    @property
    def n_latents(self) -> int:
        return self.decoder.shape[0]

    def encode(self, x: Float[Tensor, "batch *places"]) -> Latents:
        """Latents of activations at `site`. Activations may be `batch *pos head d_head` with d = head · d_head.

        Raises:
            ShapeMismatch: activations of another width.
        """
        d = self.encoder.shape[0]
        flat = x.flatten(-2) if x.shape[-1] != d and x.ndim > 2 and x.shape[-2:].numel() == d else x
        if flat.shape[-1] != d:
            raise ShapeMismatch(
                f"The dictionary of {self.site} reads {d} activations, but {self.site} has {tuple(x.shape)}. Give the "
                "site that it was trained on."
            )
        if self.sae is not None:
            return self.sae.encode(x if getattr(self.sae, "hook_z_reshaping_mode", False) else flat)
        flat = flat.to(self.encoder.dtype)
        if self.subtract_decoder_bias and self.decoder_bias is not None:
            flat = flat - self.decoder_bias
        pre = flat @ self.encoder
        return self._activated(pre if self.encoder_bias is None else pre + self.encoder_bias)

    def decode(self, latents: Latents) -> Float[Tensor, "batch *places"]:
        """Reconstructed activations. An SAE that normalises its inputs reconstructs them in the units of its last
        `encode`."""
        if self.sae is not None:
            return self.sae.decode(latents)
        written = latents @ self.decoder
        return written if self.decoder_bias is None else written + self.decoder_bias

    def _activated(self, pre: Latents) -> Latents:
        if self.activation == "identity":
            return pre
        if self.activation == "jumprelu":
            assert self.threshold is not None
            return pre * (pre > self.threshold)
        latents = F.relu(pre)
        if self.activation == "relu":
            return latents
        assert self.k is not None
        top = latents.topk(self.k, dim=-1, sorted=False)
        return torch.zeros_like(latents).scatter(-1, top.indices, top.values)

    def __str__(self) -> str:
        to = "" if self.site_out is None else f" → {self.site_out}"
        kind = type(self.sae).__name__ if self.sae is not None else self.activation
        return f"{self.n_latents} latents ({kind}) of {self.encoder.shape[0]} activations at {self.site}{to}"

    __repr__ = __str__


@no_grad()
def random_dictionary(dictionary: Dictionary, seed: int = 0) -> Dictionary:
    """A null control: random directions with the norms of the decoder's; each latent reads and writes the same one.

    This is like an SAE before training: encoder and decoder directions are equal, b_D is kept and subtracted from x,
    and there is no b_E. For neurons it is a random orthonormal basis. For a transcoder, encoder and decoder directions
    are drawn separately.
    """
    generator = torch.Generator().manual_seed(seed)

    def directions(like: Float[Tensor, "latents d"]) -> Float[Tensor, "latents d"]:
        drawn = torch.randn(like.shape, generator=generator, dtype=torch.float32, device="cpu").to(like)
        return torch.linalg.qr(drawn)[0] if dictionary.activation == "identity" else F.normalize(drawn, dim=1)

    decoder = directions(dictionary.decoder)
    transcodes = dictionary.site_out is not None
    norms = dictionary.decoder.norm(dim=1, keepdim=True)
    activation = dictionary.activation if dictionary.activation in ("identity", "topk") else "relu"
    return Dictionary(
        site=dictionary.site,
        encoder=directions(dictionary.encoder.mT).mT if transcodes else (decoder / norms.clamp_min(1e-12)).mT,
        decoder=decoder * norms,
        decoder_bias=dictionary.decoder_bias,
        activation=activation,
        k=dictionary.k if activation == "topk" else None,
        subtract_decoder_bias=not transcodes,
        site_out=dictionary.site_out,
        parameters=dictionary.parameters,
    )


def moved(dictionary: Dictionary, device: torch.device) -> Dictionary:
    """The dictionary with its tensors on the device; an SAE stays where it is."""
    tensors = {name: value.to(device) for name, value in vars(dictionary).items() if isinstance(value, Tensor)}
    return replace(dictionary, **tensors)


def _own(sae: Any, name: str) -> Tensor | None:
    value = getattr(sae, name, None)
    return value.detach() if isinstance(value, Tensor) else None


def _tensors_in(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise InvalidSetting(f"There is no file {path}.")
    if path.suffix == ".safetensors":
        return load_file(path)
    if path.suffix == ".npz":
        with np.load(path, allow_pickle=False) as arrays:
            return {name: torch.from_numpy(arrays[name]) for name in arrays.files}
    if path.suffix in (".pt", ".pth"):
        return torch.load(path, map_location="cpu", weights_only=True)
    raise InvalidSetting(
        f"Expected a file that ends in .safetensors, .npz or .pt, got {path.name}. Read it yourself and give the "
        "tensors: Dictionary(site, encoder, decoder, ...)."
    )


def _other_kind(path: str | os.PathLike[str], reason: str) -> InvalidSetting:
    return InvalidSetting(
        f"{path} is of a kind that from_file does not know: {reason}. Load it with the library that made it "
        "(Dictionary.from_sae_lens takes an SAE of SAELens), or say what it is: activation=, k=, "
        "subtract_decoder_bias=."
    )


def _kind_beside(path: Path) -> dict[str, Any]:
    """What cfg.json or config.json beside a file says: "activation", "k" and "subtract_decoder_bias", if it does.

    Raises:
        InvalidSetting: it says something that a `Dictionary` is not.
    """
    for name, read in (("cfg.json", _of_cfg), ("config.json", _of_trainer)):
        beside = path.parent / name
        if not beside.is_file():
            continue
        try:
            cfg = json.loads(beside.read_text(encoding="utf-8"))
        except ValueError as error:
            raise InvalidSetting(f"{beside} is no JSON: {error}. Move it, or {path.name}, elsewhere.") from error
        if isinstance(cfg, dict):
            try:
                return read(cfg)
            except InvalidSetting as error:
                raise _other_kind(path, f"{name} says {error}") from None
    return {}


def _of_cfg(cfg: Mapping[str, Any]) -> dict[str, Any]:
    """SAELens and sparsify. "scaled_by_decoder": whether latents are multiplied by the norms of their decoder rows."""
    for field, plain in _PLAIN.items():
        if cfg.get(field, plain[0]) not in plain:
            raise InvalidSetting(f"{field}={cfg[field]!r}")
    activation = cfg.get("activation_fn_str", cfg.get("activation_fn", cfg.get("activation")))
    if cfg.get("architecture", "standard") not in ("standard", "transcoder") or activation is None:
        activation = cfg.get("architecture")
    elif cfg.get("architecture") == "transcoder":
        activation = "relu"
    said: dict[str, Any] = {"scaled_by_decoder": bool(cfg.get("rescale_acts_by_decoder_norm"))}
    if activation is not None:
        said["activation"] = _known(str(activation), _ACTIVATIONS)
    k = cfg.get("k", (cfg.get("activation_fn_kwargs") or {}).get("k"))
    if k is not None:
        said["k"] = int(k)
    if "apply_b_dec_to_input" in cfg:
        said["subtract_decoder_bias"] = bool(cfg["apply_b_dec_to_input"])
    elif "expansion_factor" in cfg and "num_latents" in cfg:  # sparsify
        said["subtract_decoder_bias"] = not cfg.get("transcode", False)
        said.setdefault("activation", "topk")
    return said


def _of_trainer(cfg: Mapping[str, Any]) -> dict[str, Any]:
    """dictionary_learning; any other config.json says nothing."""
    trainer = cfg.get("trainer")
    if not isinstance(trainer, Mapping) or "dict_class" not in trainer:
        return {}
    activation = _known(str(trainer["dict_class"]), _DICT_CLASSES)
    said = {"activation": activation, "subtract_decoder_bias": trainer["dict_class"] != "JumpReluAutoEncoder"}
    return said | ({"k": int(trainer["k"])} if "k" in trainer else {})


def _known(kind: str, kinds: Mapping[str, Activation]) -> Activation:
    if kind not in kinds:
        raise InvalidSetting(f"{kind!r}; known are {', '.join(kinds)}")
    return kinds[kind]


def _named(tensors: dict[str, Tensor], name: str, field: str, path: str | os.PathLike[str]) -> Tensor:
    if not isinstance(tensors.get(name), Tensor):
        there = ", ".join(f"{key} {tuple(getattr(value, 'shape', ()))}" for key, value in tensors.items())
        raise InvalidSetting(
            f"{path} holds no tensor {name!r} for the {field}. It holds {there or 'none'}. Give {field}= one of these"
            + ("." if field in ("encoder", "decoder") else ", or None.")
        )
    return tensors[name]


def _turned(matrix: Tensor, field: str, axis: int, n_latents: int | None, width: int | None) -> Tensor:
    """The matrix with its latents on the axis.

    Args:
        width: of the other axis, where that is known.
    """
    if matrix.ndim != 2:
        raise ShapeMismatch(f"Expected the {field} to be a matrix, got {tuple(matrix.shape)}.")

    def fits(candidate: Tensor) -> bool:
        return n_latents in (None, candidate.shape[axis]) and width in (None, candidate.shape[1 - axis])

    known = f"{n_latents or 'unknown'} latents" + (f" and {width} activations" if width else "")
    fitting = [candidate for candidate in (matrix, matrix.mT) if fits(candidate)]
    if not fitting:
        raise ShapeMismatch(f"The {field} is {tuple(matrix.shape)}, which does not fit {known}.")
    if len(fitting) == 2:
        raise ShapeMismatch(
            f"Which axis of the {field} {tuple(matrix.shape)} is the latents'? Known are {known}. Give n_latents=, or "
            "where it is square the tensors themselves: Dictionary(site, encoder, decoder, ...), encoder `d latents`."
        )
    return fitting[0].contiguous()


def _check_shapes(dictionary: Dictionary) -> None:
    E, D = dictionary.encoder, dictionary.decoder
    if E.ndim != 2 or D.ndim != 2 or E.shape[1] != D.shape[0]:
        raise ShapeMismatch(
            "Expected an encoder (d, latents) and a decoder (latents, d_out) with as many latents, got "
            f"{tuple(E.shape)} and {tuple(D.shape)}. Matrices of nn.Linear are the other way round: give weight.mT."
        )
    if dictionary.site_out in (None, dictionary.site) and E.shape[0] != D.shape[1]:
        raise ShapeMismatch(
            f"The encoder reads {E.shape[0]} activations at {dictionary.site}, the decoder writes {D.shape[1]}. Give "
            "site_out= if this is a transcoder."
        )
    for field, length in (("encoder_bias", E.shape[1]), ("decoder_bias", D.shape[1])):
        bias = getattr(dictionary, field)
        if bias is not None and bias.shape != (length,):
            raise ShapeMismatch(f"Expected {field} of shape ({length},), got {tuple(bias.shape)}.")
    threshold = dictionary.threshold
    if threshold is not None and threshold.shape not in ((), (E.shape[1],)):
        raise ShapeMismatch(f"Expected threshold of shape ({E.shape[1]},), got {tuple(threshold.shape)}.")
