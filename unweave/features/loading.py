"""Dictionaries from and to folders of other tools.

SAELens: ``cfg.json`` and ``sae_weights.safetensors`` (W_enc ``[d_in d_sae]``, b_enc, W_dec ``[d_sae d_in]``, b_dec,
threshold), architectures standard, topk, jumprelu, transcoder and jumprelu_transcoder, configurations of versions 3 to
6. dictionary_learning: ``config.json`` and the weights as ``ae.safetensors``, classes AutoEncoder, AutoEncoderNew,
AutoEncoderTopK, BatchTopKSAE, MatryoshkaBatchTopKSAE and JumpReluAutoEncoder. What they do at run time besides f =
act(E x + e), x^ = D f + d (centring by b_dec, rescaling by the length of decoder columns or by a constant) is folded
into the weights, so the function is the same; what cannot be folded (a normalisation of every token) is refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from unweave.errors import CorruptFileError, InputError, ShapeError, StorageError
from unweave.files import read_json, read_tensors, write_folder, write_json, write_tensors
from unweave.ops import Dictionary

__all__ = ["Loaded", "hook_of", "load_dictionary", "place_of", "save_dictionary"]

ARCHITECTURES = {
    "standard": "relu",
    "topk": "topk",
    "jumprelu": "jumprelu",
    "transcoder": "relu",
    "jumprelu_transcoder": "jumprelu",
}
TO_SAFETENSORS = (
    "torch.save can hold code, so ae.pt is not read; convert it once, where it is trusted:\n"
    "  import torch, safetensors.torch as st\n"
    "  w = torch.load('ae.pt', weights_only=True, map_location='cpu')\n"
    "  st.save_file({k: v.contiguous() for k, v in w.items()}, 'ae.safetensors')"
)
# (hook of TransformerLens behind "blocks.L.", our place); residual streams are where the layer's parts find them
HOOKS = {
    "hook_mlp_out": "blocks.{}.mlp",
    "mlp.hook_post": "blocks.{}.mlp.code",
    "hook_attn_out": "blocks.{}.attn",
    "attn.hook_z": "blocks.{}.attn.code",
    "hook_resid_mid": "before blocks.{}.mlp",
    "hook_resid_pre": "before blocks.{}.attn",
}


class Loaded(NamedTuple):
    """A dictionary from a folder.

    Attributes:
        dictionary: it, in float32.
        where: the place it was trained on, in our words; None where the folder does not say or names another kind.
        config: all that the folder says.
    """

    dictionary: Dictionary
    where: str | None
    config: Mapping[str, Any]


def load_dictionary(folder: str | Path, *, scale: float | None = None, n_layers: int | None = None) -> Loaded:
    """A dictionary from a folder of SAELens or dictionary_learning, see the module's text.

    Args:
        scale: what activations were multiplied with in training, where the configuration says that they were but not
            with what ("expected_average_only_in": the square root of d_in over the mean length of an activation).
        n_layers: of the model, to name the place of what its last layer leaves.

    Raises:
        StorageError: no such folder, or it holds neither.
        CorruptFileError: weights or configuration are missing, broken, or do not fit each other.
        InputError: an architecture or a normalisation that is not supported, weights in a pickle, or no scale.

    Exact?
        The function is, up to rounding where something is folded.
    """
    folder = Path(folder)
    if (folder / "cfg.json").is_file():
        config = _read_config(folder / "cfg.json")
        dictionary = _from_saelens(folder, config, scale)
        hooks = (_meta(config, name) for name in ("hook_name_out", "hook_name", "hook_point"))
        where = place_of(next((hook for hook in hooks if hook), None), n_layers)
    elif (folder / "config.json").is_file():
        config = _read_config(folder / "config.json")
        dictionary, where = _from_dictionary_learning(folder, config), None
        if scale is not None:
            raise InputError("scale= is for folders of SAELens; dictionary_learning folds it before it saves")
    else:
        raise StorageError(f"{folder} holds neither cfg.json (SAELens) nor config.json (dictionary_learning)")
    for name, t in vars(dictionary).items():
        if isinstance(t, Tensor) and not bool(torch.isfinite(t).all()):
            raise CorruptFileError(f"{folder}: {name} holds NaN or inf")
    return Loaded(dictionary, where, config)


def save_dictionary(
    dictionary: Dictionary, folder: str | Path, *, hook_name: str | None = None, model_name: str | None = None
) -> Path:
    """Write a dictionary as a folder that SAELens 6 and :func:`load_dictionary` read; bit for bit.

    Args:
        hook_name: of TransformerLens, where it belongs; :func:`hook_of` gives it for our places.

    Raises:
        InputError: a basis, or a "topk" transcoder: SAELens has neither.
        StorageError: it could not be written.
    """
    d = dictionary
    names = {(act, "transcoder" in name): name for name, act in ARCHITECTURES.items()}
    architecture = names.get((d.activation, d.is_transcoder))
    if architecture is None:
        what = "transcoder" if d.is_transcoder else "dictionary"
        raise InputError(f"SAELens has no {what} with the activation {d.activation!r}")
    config: dict[str, Any] = {"architecture": architecture, "d_in": d.d_in, "d_sae": d.n_latents}
    config |= {"dtype": str(d.encoder.dtype).removeprefix("torch."), "device": "cpu", "apply_b_dec_to_input": False}
    config |= {"normalize_activations": "none", "reshape_activations": "none"}
    config["metadata"] = {"model_name": model_name, "hook_name": hook_name}
    config |= {"k": d.k, "rescale_acts_by_decoder_norm": False} if d.k is not None else {}
    config |= {"d_out": d.d_out} if d.is_transcoder else {}
    weights = {"W_enc": d.encoder.T, "b_enc": d.encoder_bias, "W_dec": d.decoder.T, "b_dec": d.decoder_bias}
    weights |= {} if d.threshold is None else {"threshold": d.threshold}

    def write(temporary: Path) -> None:
        write_json(temporary / "cfg.json", config)
        write_tensors(temporary / "sae_weights.safetensors", weights)

    write_folder(folder, write)
    return Path(folder)


def place_of(hook: str | None, n_layers: int | None = None) -> str | None:
    """Our name of a TransformerLens hook; None where it has none.

    Args:
        n_layers: of the model; what the last layer leaves is "before unembed".

    Example:
        >>> place_of("blocks.3.hook_mlp_out"), place_of("blocks.3.hook_resid_post")
        ('blocks.3.mlp', 'before blocks.4.attn')
    """
    words = (hook or "").split(".", 2)
    if len(words) != 3 or words[0] != "blocks" or not words[1].isdigit():
        return None
    layer, name = int(words[1]), words[2]
    if name == "hook_resid_post":
        layer, name = layer + 1, "hook_resid_pre"
    if name == "hook_resid_pre" and layer == n_layers:
        return "before unembed"
    return HOOKS[name].format(layer) if name in HOOKS else None


def hook_of(where: str) -> str | None:
    """The TransformerLens hook of one of our places; None where there is none.

    Example:
        >>> hook_of("blocks.0.attn.code")
        'blocks.0.attn.hook_z'
    """
    for hook, pattern in HOOKS.items():
        start, end = pattern.split("{}")
        layer = where.removeprefix(start).removesuffix(end)
        if layer.isdigit() and where == pattern.format(layer):
            return f"blocks.{layer}.{hook}"
    return None


# ---- configurations -------------------------------------------------------------------------------------


def _read_config(path: Path) -> dict[str, Any]:
    config = read_json(path)
    if not isinstance(config, dict):
        raise CorruptFileError(f"{path} must hold an object")
    return config


def _meta(config: Mapping[str, Any], name: str) -> str | None:
    """What a configuration says of where its dictionary belongs: version 6 keeps it apart."""
    apart = config.get("metadata")
    value = (apart if isinstance(apart, dict) else {}).get(name) or config.get(name)
    return value if isinstance(value, str) else None


def _option(config: Mapping[str, Any], name: str, default: Any, kind: type) -> Any:
    value = config.get(name)
    value = default if value is None else value
    if not isinstance(value, kind):
        raise CorruptFileError(f"the configuration's {name} must be a {kind.__name__}, got {value!r}")
    return value


def _k(config: Mapping[str, Any], where: str) -> int:
    inner = config.get("activation_fn_kwargs")
    k = config.get("k", (inner if isinstance(inner, dict) else {}).get("k"))
    if type(k) is not int:
        raise CorruptFileError(f"{where}: a 'topk' dictionary needs an integer k, got {k!r}")
    return k


# ---- SAELens --------------------------------------------------------------------------------------------


def _from_saelens(folder: Path, config: dict[str, Any], scale: float | None) -> Dictionary:
    architecture = _option(config, "architecture", "standard", str)
    activation = ARCHITECTURES.get(architecture)
    if activation is None:
        raise InputError(f"{folder}: architecture {architecture!r} is not supported; known: {sorted(ARCHITECTURES)}")
    if config.get("activation_fn_str", config.get("activation_fn")) == "topk":
        activation = "topk"
    is_transcoder = "transcoder" in architecture
    w = _need(folder / "sae_weights.safetensors", ("W_enc", "b_enc", "W_dec", "b_dec"))
    if "log_threshold" in w:
        w["threshold"] = w["log_threshold"].exp()
    encoder, bias, decoder, constant = w["W_enc"].T, w["b_enc"], w["W_dec"].T, w["b_dec"]
    threshold = w.get("threshold") if activation == "jumprelu" else None
    _check_shapes(folder, encoder, bias, decoder, constant)
    if config.get("finetuning_scaling_factor"):
        if "finetuning_scaling_factor" not in w:
            raise CorruptFileError(f"{folder}: finetuning_scaling_factor is announced and not in the weights")
        decoder = decoder * w["finetuning_scaling_factor"]
    if _option(config, "apply_b_dec_to_input", True, bool) and not is_transcoder:
        bias = bias - encoder @ constant
    if _option(config, "rescale_acts_by_decoder_norm", False, bool):
        encoder, bias, decoder, _ = _unit_columns(encoder, bias, decoder, None)
    factor = _scale(folder, config, scale, is_transcoder)
    if factor is not None:
        encoder, decoder, constant = encoder * factor, decoder / factor, constant / factor
    k = _k(config, str(folder)) if activation == "topk" else None
    return _build(folder, encoder, bias, decoder, constant, activation, k, threshold, is_transcoder)


def _scale(folder: Path, config: Mapping[str, Any], scale: float | None, is_transcoder: bool) -> float | None:
    """What activations were multiplied with before they were encoded."""
    how = config.get("normalize_activations") or "none"
    how = "expected_average_only_in" if how is True else how  # before version 3
    if config.get("reshape_activations") not in (None, "none", "hook_z"):
        raise InputError(f"{folder}: reshaping {config['reshape_activations']!r} is not supported")
    if how == "none":
        if scale is not None:
            raise InputError(f"{folder}: its activations are not normalised; leave scale= out")
        return None
    if how != "expected_average_only_in" or is_transcoder:
        raise InputError(f"{folder}: normalisation {how!r} of every token cannot be folded into the weights")
    if scale is None or not scale > 0:
        raise InputError(f"{folder}: activations were scaled; say how: scale=sqrt(d_in) / their mean length")
    return scale


# ---- dictionary_learning --------------------------------------------------------------------------------


def _from_dictionary_learning(folder: Path, config: Mapping[str, Any]) -> Dictionary:
    trainer = config.get("trainer")
    name = (trainer if isinstance(trainer, dict) else {}).get("dict_class")
    if not (folder / "ae.safetensors").is_file() and (folder / "ae.pt").is_file():
        raise InputError(f"{folder}: {TO_SAFETENSORS}")
    if name in ("JumpReluAutoEncoder", "MatryoshkaBatchTopKSAE"):
        return _with_threshold(folder, is_batch=name != "JumpReluAutoEncoder")
    constants = {"AutoEncoder": "bias", "AutoEncoderNew": "decoder.bias", "AutoEncoderTopK": "b_dec"}
    constants["BatchTopKSAE"] = "b_dec"
    if name not in constants:
        known = [*sorted(constants), "JumpReluAutoEncoder", "MatryoshkaBatchTopKSAE"]
        raise InputError(f"{folder}: class {name!r} is not supported; known: {', '.join(known)}")
    needed = ("encoder.weight", "encoder.bias", "decoder.weight", constants[name])
    w = _need(folder / "ae.safetensors", needed + (("k",) if name == "AutoEncoderTopK" else ()))
    encoder, bias, decoder, constant = (w[n] for n in needed)
    _check_shapes(folder, encoder, bias, decoder, constant)
    if name != "AutoEncoderNew":
        bias = bias - encoder @ constant
    if name == "AutoEncoderTopK":
        return _build(folder, encoder, bias, decoder, constant, "topk", int(w["k"]))
    if name == "BatchTopKSAE":
        # at run time it keeps what exceeds one threshold for all latents, not the best of a batch
        threshold = _need(folder / "ae.safetensors", ("threshold",))["threshold"].clamp(min=0).expand_as(bias)
        return _build(folder, encoder, bias, decoder, constant, "jumprelu", None, threshold)
    return _build(folder, encoder, bias, decoder, constant, "relu", None)


def _with_threshold(folder: Path, is_batch: bool) -> Dictionary:
    """JumpReluAutoEncoder (a threshold each, columns of any length) or MatryoshkaBatchTopKSAE (one for all)."""
    w = _need(folder / "ae.safetensors", ("W_enc", "b_enc", "W_dec", "b_dec", "threshold"))
    encoder, bias, decoder, constant = w["W_enc"].T, w["b_enc"], w["W_dec"].T, w["b_dec"]
    _check_shapes(folder, encoder, bias, decoder, constant)
    threshold: Tensor | None = w["threshold"]
    if is_batch:
        bias, threshold = bias - encoder @ constant, w["threshold"].expand_as(bias)
    else:
        encoder, bias, decoder, threshold = _unit_columns(encoder, bias, decoder, threshold)
    return _build(folder, encoder, bias, decoder, constant, "jumprelu", None, threshold)


# ---- weights --------------------------------------------------------------------------------------------


def _need(path: Path, names: tuple[str, ...]) -> dict[str, Tensor]:
    weights, _ = read_tensors(path)
    missing = [name for name in names if name not in weights]
    if missing:
        raise CorruptFileError(f"{path} lacks {', '.join(missing)}")
    return {name: t.float() if t.is_floating_point() else t for name, t in weights.items()}


def _check_shapes(folder: Path, encoder: Tensor, bias: Tensor, decoder: Tensor, constant: Tensor) -> None:
    n, d_out = bias.shape[:1], constant.shape[:1]
    fits = encoder.ndim == 2 and bias.ndim == constant.ndim == 1
    if not fits or encoder.shape[:1] != n or decoder.shape != (*d_out, *n):
        shapes = [tuple(t.shape) for t in (encoder, bias, decoder, constant)]
        raise CorruptFileError(f"{folder}: encoder, its bias, decoder and its bias do not fit each other: {shapes}")


def _unit_columns(
    encoder: Tensor, bias: Tensor, decoder: Tensor, threshold: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """The same function with decoder columns of length one, latents scaled by what they were."""
    norm = decoder.norm(dim=0)
    scaled = None if threshold is None else threshold * norm
    return encoder * norm[:, None], bias * norm, decoder / norm.clamp(min=1e-12), scaled


def _build(
    folder: Path,
    encoder: Tensor,
    bias: Tensor,
    decoder: Tensor,
    constant: Tensor,
    activation: str,
    k: int | None,
    threshold: Tensor | None = None,
    is_transcoder: bool = False,
) -> Dictionary:
    encoder, bias, decoder, constant = (t.contiguous() for t in (encoder, bias, decoder, constant))
    if threshold is not None:
        # a threshold below zero would let negative latents pass, which no relu behind it lets
        threshold = threshold.clamp(min=0).contiguous()
    try:
        return Dictionary(encoder, bias, decoder, constant, activation, k, threshold, is_transcoder)
    except (InputError, ShapeError) as error:
        raise CorruptFileError(f"{folder}: {error}") from error
