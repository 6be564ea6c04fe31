"""From a model to the graph that is exactly that model."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from unweave import tree, zoo
from unweave.architectures import HUGGING_FACE, capture_convolutional, capture_sequential, capture_toy, is_convolutional
from unweave.errors import CorruptFileError, GraphError, NonFiniteError, StorageError, UnsupportedModelError
from unweave.execution import run
from unweave.graph import Graph
from unweave.zoo.toy import ToyTransformer
from unweave.zoo.tracr import load_tracr

# a dot alone does not make a file: hub names have version numbers ("Qwen/Qwen2.5-0.5B")
FILE_SUFFIXES = (".bin", ".gguf", ".json", ".npz", ".pt", ".pth", ".safetensors")

__all__ = ["capture", "load_model", "load_tokenizer", "model_logits", "quiet_transformers"]

# largest |logit difference| accepted by the check of a capture, as a share of the largest logit; Hugging Face
# computes norms and some attention scores in float32 even in models of float64
TOLERANCE = {torch.float64: 1e-5, torch.float32: 1e-4, torch.bfloat16: 0.1, torch.float16: 0.02}


def capture(model: str | Path | nn.Module, *, verify: bool = True, copy: bool | None = None) -> Graph:
    """Segment a model into channels: a graph that computes exactly what the model computes.

    Every attention head, MLP and embedding becomes a node that reads from and adds to the residual stream;
    heads have ports q, k and v. Biases of writes reach every later port; norms belong to the ports.

    Args:
        model: a hub name, a folder in hub format, ``"zoo:NAME"``, a tracr folder, or a model: a Hugging Face
            causal language model, an ``nn.Sequential`` MLP or convolutional network, or a
            :class:`~unweave.zoo.toy.ToyTransformer`.
        verify: run both on a few random inputs and compare.
        copy: give the graph tensors of its own. By default a model object passed in is copied (training it
            further must not change the graph), a model loaded here is not.

    Returns:
        The graph, in the model's precision and on its device.

    Raises:
        UnsupportedModelError: the family or one of its options cannot be captured exactly.
        NonFiniteError: a weight is NaN or infinite; names it.
        GraphError: the check found a difference (a bug: please report it).
        StorageError: no such model, or its folder is broken.

    Cost:
        The weights once; with ``verify``, two forward passes over 2 x 16 tokens.

    Exact?
        Yes, up to floating-point summation order: logits agree to 1e-4 in float32.

    Example:
        >>> import unweave
        >>> graph = unweave.capture("zoo:induction")
        >>> graph.find("blocks.1.attn.head.0")[0].kind
        'attn'
    """
    given = isinstance(model, nn.Module)
    module = model if isinstance(model, nn.Module) else load_model(model)
    family = _family_of(module)
    graph = family(module)
    keep = copy if copy is not None else given
    stages = tree.map_tensors(graph.stages, lambda t: t.detach().clone() if keep else t.detach())
    info = dict(graph.info)
    if not given and info.get("family") != "toy":
        info["name"] = Path(str(model)).name
    graph = dataclasses.replace(graph, stages=stages, info=info)
    _check_finite(graph)
    if verify:
        _check_equal(graph, module)
    return graph


def _family_of(model: nn.Module) -> Any:
    if isinstance(model, ToyTransformer):
        return capture_toy
    if type(model) is nn.Sequential:
        return capture_convolutional if is_convolutional(model) else capture_sequential
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    if not isinstance(model_type, str) or model_type not in HUGGING_FACE:
        what = f"the family {model_type!r}" if model_type else f"a {type(model).__name__}"
        raise UnsupportedModelError(
            f"{what} is not supported; supported: {', '.join(sorted(HUGGING_FACE))}, nn.Sequential MLPs "
            "and convolutional networks, toy and tracr models. A family is one function of about 80 "
            "lines: see unweave/architectures/llama.py and "
            "CONTRIBUTING.md"
        )
    if not hasattr(model, "lm_head") and not callable(getattr(model, "get_output_embeddings", None)):
        raise UnsupportedModelError(
            f"{type(model).__name__} has no language-model head; load it with AutoModelForCausalLM"
        )
    if model.get_output_embeddings() is None:  # type: ignore[operator]
        raise UnsupportedModelError(
            f"{type(model).__name__} has no language-model head; load it with AutoModelForCausalLM"
        )
    return HUGGING_FACE[model_type]


def _check_finite(graph: Graph) -> None:
    for name, tensor in tree.tensors(graph.stages).items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            stage = graph.stages[int(name.split(".")[0])]
            bad = int((~torch.isfinite(tensor)).sum())
            raise NonFiniteError(
                f"{bad} of {tensor.numel()} weights of {stage.nodes[0]} ({name.partition('.')[2]}, shape "
                f"{tuple(tensor.shape)}) are NaN or infinite; the checkpoint is broken or was saved after it diverged"
            )


def model_logits(model: nn.Module, inputs: Tensor, mask: Tensor | None = None) -> Tensor:
    """The model's own logits ``[batch pos d_out]``: the oracle of every captured graph."""
    if type(model) is nn.Sequential:
        # one row per position, as the model expects where it begins with nn.Flatten
        out = model(inputs.flatten(0, 1))
        return (out if isinstance(out, Tensor) else out.logits).unflatten(0, inputs.shape[:2])
    out = model(inputs, attention_mask=mask) if mask is not None else model(inputs)
    return out if isinstance(out, Tensor) else out.logits


def _check_equal(graph: Graph, model: nn.Module) -> None:
    generator = torch.Generator().manual_seed(0)
    if "d_input" in graph.info:
        inputs = torch.randn(2, 1, graph.info["d_input"], generator=generator).to(graph.tensors[0])
    else:
        length = min(16, graph.info["n_ctx"])
        inputs = torch.randint(graph.info["d_vocab"], (2, length), generator=generator).to(graph.device)
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    with torch.no_grad():
        truth, ours = model_logits(model, inputs), run(graph, inputs).logits
    for module, training in modes:
        module.training = training
    difference = float((truth.float() - ours.float()).abs().max())
    allowed = TOLERANCE.get(truth.dtype, 1e-4) * max(1.0, float(truth.float().abs().max()))
    if not difference <= allowed:
        raise GraphError(
            f"the captured graph of {graph.info.get('name')} differs from the model by {difference:.2e} in a logit "
            f"(allowed {allowed:.1e}); please report the model's config. verify=False captures it all the same"
        )


def load_model(name: str | Path) -> nn.Module:
    """Load a model by hub name, folder, or ``zoo:NAME``, in evaluation mode.

    Raises:
        StorageError: it does not exist or cannot be read.
        UnsupportedModelError: its config names an unknown family.
    """
    text = str(name)
    if text.startswith("zoo:"):
        return zoo.load(text.removeprefix("zoo:")).eval()
    folder = Path(name)
    if not folder.is_dir() and (
        folder.exists() or folder.suffix in FILE_SUFFIXES or text.startswith((".", "/", "~")) or text.count("/") > 1
    ):
        raise StorageError(
            f"{text}: no such model folder; give a folder in Hugging Face format, a hub name or zoo:NAME"
        )
    if folder.is_dir():
        config = _read_config(folder)
        if "true_edges" in config or "residual_labels" in config:
            return load_tracr(folder).eval()
        model_type = config.get("model_type")
        if model_type in zoo.MODEL_TYPES:
            return zoo.load_folder(folder).eval()
        if not isinstance(model_type, str) or model_type not in HUGGING_FACE:
            raise UnsupportedModelError(
                f"{text}: the family {model_type!r} is not supported; supported: {', '.join(sorted(HUGGING_FACE))}. "
                "To add it, see CONTRIBUTING.md"
            )
    return _load_hugging_face(text)


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    if not path.is_file():
        raise StorageError(f"{folder}: there is no config.json; is it a model folder in Hugging Face format?")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise CorruptFileError(f"{path}: not valid JSON: {error}") from error
    if not isinstance(config, dict):
        raise CorruptFileError(f"{path}: must hold an object")
    return config


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Within it, transformers draws no bars and warns of nothing: what matters is checked and said by us."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def _load_hugging_face(name: str) -> nn.Module:
    from transformers import AutoModelForCausalLM

    try:
        with quiet_transformers():
            # trust_remote_code stays off: a model folder must not be able to run code
            loaded: Any = AutoModelForCausalLM.from_pretrained(name, dtype="auto", output_loading_info=True)
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise StorageError(f"{name}: cannot load this model: {str(error).splitlines()[0]}") from error
    model, report = loaded
    missing = sorted(report.get("missing_keys", []))
    if missing:
        raise CorruptFileError(
            f"{name}: the checkpoint lacks {len(missing)} weights of the model, such as {missing[0]}"
        )
    return model.eval()


def load_tokenizer(name: str | Path) -> Any:
    """The tokenizer of a model folder or hub name, or None where there is none (zoo and tracr models).

    Raises:
        StorageError: there is one and it cannot be read.
    """
    if str(name).startswith("zoo:"):
        return None
    folder = Path(name)
    if folder.is_dir() and not any(folder.glob("tokenizer*")) and not any(folder.glob("*.model")):
        return None
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(str(name))
    except (OSError, ValueError, KeyError) as error:
        raise StorageError(f"{name}: cannot load its tokenizer: {str(error).splitlines()[0]}") from error
