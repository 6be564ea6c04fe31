"""From models, folders and names to graphs: exact, or refused by name."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from families import GEMMA, LLAMA, random_model
from safetensors.torch import load_file, save_file
from torch import nn

from unweave import capture as capture_name
from unweave.capture import HUGGING_FACE, capture, load_model, load_tokenizer, model_logits
from unweave.errors import CorruptFileError, GraphError, NonFiniteError, StorageError, UnsupportedModelError
from unweave.execution import run
from unweave.graph import Graph
from unweave.ops import Attention


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """No test asks the hub."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


def tokens(*shape: int) -> torch.Tensor:
    return torch.randint(50, shape, generator=torch.Generator().manual_seed(1))


def from_config(config: Any, cls: Any = hf.AutoModelForCausalLM) -> nn.Module:
    """A model whose weights are all random."""
    torch.manual_seed(0)
    model = cls.from_config(config)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.2)
    return model.eval()


def assert_exact(graph: Graph, model: nn.Module, n_pos: int = 30, atol: float = 1e-5) -> None:
    x, mask = tokens(2, n_pos), torch.ones(2, n_pos, dtype=torch.long)
    mask[1, n_pos // 2 :] = 0
    with torch.no_grad():
        ours, truth = run(graph, x, mask).logits, model_logits(model, x, mask)
    assert torch.allclose(ours[mask.bool()], truth[mask.bool()], atol=atol)


# ---- Hugging Face models: options beyond tests/families.py -------------------------------------------------------

NEOX: dict[str, Any] = dict(
    vocab_size=50,
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    max_position_embeddings=64,
    intermediate_size=48,
)
GPT2: dict[str, Any] = dict(vocab_size=50, n_embd=32, n_layer=2, n_head=4, n_positions=64)
GLOBAL_LOCAL = ["sliding_attention", "full_attention"]
OPTIONS: dict[str, Callable[[], Any]] = {
    "neox, whole heads turned": lambda: hf.GPTNeoXConfig(
        **NEOX, rope_parameters=dict(rope_type="default", rope_theta=1e4, partial_rotary_factor=1.0)
    ),
    "neox, half heads turned": lambda: hf.GPTNeoXConfig(
        **NEOX,
        rope_parameters=dict(rope_type="linear", rope_theta=1e4, partial_rotary_factor=0.5, factor=2.0),
    ),
    "neox, no attention bias, tied": lambda: hf.GPTNeoXConfig(**NEOX, attention_bias=False, tie_word_embeddings=True),
    "gpt2, unscaled, exact gelu": lambda: hf.GPT2Config(**GPT2, scale_attn_weights=False, activation_function="gelu"),
    "gpt2, mixed precision of scores": lambda: hf.GPT2Config(**GPT2, reorder_and_upcast_attn=True),
    "gpt2, wide mlp, relu": lambda: hf.GPT2Config(**GPT2, n_inner=40, activation_function="relu"),
    "llama, wide heads": lambda: hf.LlamaConfig(**LLAMA, head_dim=12),
    "llama, one head": lambda: hf.LlamaConfig(**(LLAMA | dict(num_attention_heads=1, num_key_value_heads=1))),
    "llama, squared relu": lambda: hf.LlamaConfig(**LLAMA, hidden_act="relu2"),
    "llama, one layer": lambda: hf.LlamaConfig(**(LLAMA | dict(num_hidden_layers=1))),
    "qwen3, biased": lambda: hf.Qwen3Config(**LLAMA, head_dim=16, attention_bias=True),
    "qwen2, yarn": lambda: hf.Qwen2Config(
        **LLAMA,
        rope_parameters=dict(rope_type="yarn", rope_theta=1e4, factor=4.0, original_max_position_embeddings=16),
    ),
    "gemma3, both directions": lambda: hf.Gemma3TextConfig(
        **(GEMMA | dict(sliding_window=8)), use_bidirectional_attention=True, layer_types=GLOBAL_LOCAL
    ),
    "gemma3, scaled rope in global layers": lambda: hf.Gemma3TextConfig(
        **GEMMA,
        layer_types=GLOBAL_LOCAL,
        rope_parameters=dict(
            sliding_attention=dict(rope_type="default", rope_theta=1e4),
            full_attention=dict(rope_type="linear", rope_theta=1e6, factor=8.0),
        ),
    ),
    "gemma3, capped": lambda: hf.Gemma3TextConfig(
        **GEMMA, layer_types=GLOBAL_LOCAL, attn_logit_softcapping=2.0, final_logit_softcapping=3.0
    ),
    "gemma2, no caps": lambda: hf.Gemma2Config(**GEMMA, attn_logit_softcapping=None, final_logit_softcapping=None),
}


@pytest.mark.parametrize("option", sorted(OPTIONS))
def test_every_option_is_captured_exactly(option):
    model = from_config(OPTIONS[option]())
    assert_exact(capture(model), model)


def test_the_context_ends_where_frequencies_would_change():
    longrope, dynamic = random_model("llama-longrope"), random_model("llama-dynamic")
    assert capture(longrope).info["n_ctx"] == 32
    assert capture(dynamic).info["n_ctx"] == 64
    assert_exact(capture(longrope), longrope, 32)
    with torch.no_grad():  # a longer text, which the graph refuses, leaves the frequencies of the model changed
        longrope(tokens(1, 60))
    assert_exact(capture(longrope), random_model("llama-longrope"), 32)


def test_info_says_what_the_model_is():
    info = capture(random_model("qwen3", torch.bfloat16)).info
    expected = {
        "name": "qwen3",
        "family": "qwen3",
        "n_layers": 2,
        "n_heads": 4,
        "d_model": 32,
        "d_vocab": 50,
        "d_out": 50,
        "n_ctx": 64,
        "dtype": "bfloat16",
    }
    assert {key: info[key] for key in expected} == expected
    json.dumps(dict(info))


def test_a_family_is_refused_by_name():
    small = dict(vocab_size=50, hidden_size=32, num_hidden_layers=1, num_attention_heads=4)
    opt = hf.OPTConfig(**small, ffn_dim=32, word_embed_proj_dim=32, pad_token_id=0, bos_token_id=1, eos_token_id=2)
    with pytest.raises(UnsupportedModelError, match=r"the family 'opt' is not supported; supported: gemma2, .*CONTRIB"):
        capture(hf.AutoModelForCausalLM.from_config(opt))
    with pytest.raises(UnsupportedModelError, match="a Linear is not supported"):
        capture(nn.Linear(2, 2))
    with pytest.raises(UnsupportedModelError, match="a ModuleList is not supported"):
        capture(nn.ModuleList())


@pytest.mark.parametrize("cls", [hf.AutoModel, hf.AutoModelForSequenceClassification])
@pytest.mark.parametrize("config", [hf.LlamaConfig(**LLAMA), hf.GPT2Config(**GPT2), hf.GPTNeoXConfig(**NEOX)])
def test_a_model_without_a_head_is_refused(cls, config):
    config.pad_token_id = 0
    message = r"has no language-model head; load it with AutoModelForCausalLM"
    with pytest.raises(UnsupportedModelError, match=message):
        capture(cls.from_config(config))


def test_options_that_cannot_be_exact_are_refused_by_name():
    with pytest.raises(UnsupportedModelError, match=r"llama: activation 'mish' is not supported; supported: \['gelu'"):
        capture(from_config(hf.LlamaConfig(**LLAMA, hidden_act="mish")))
    with pytest.raises(UnsupportedModelError, match="gemma2 with attention_bias=True is not supported"):
        capture(from_config(hf.Gemma2Config(**GEMMA, attention_bias=True)))
    model = random_model("llama")
    model.config.rope_parameters = model.config.rope_parameters | {"rope_type": "proportional"}
    with pytest.raises(
        UnsupportedModelError, match="llama: rope_type 'proportional' is not supported; supported: default"
    ):
        capture(model)


# ---- the check, copies, modes ------------------------------------------------------------------------------------


def test_a_capture_that_is_wrong_is_caught(monkeypatch):
    def wrong(model: Any) -> Graph:
        graph = HUGGING_FACE["llama"](model)
        core = graph.stages[1].core
        assert isinstance(core, Attention)
        object.__setattr__(core, "scale", core.scale * 1.1)
        return graph

    model = random_model("llama")
    monkeypatch.setitem(HUGGING_FACE, "mistral", wrong)
    model.config.model_type = "mistral"
    with pytest.raises(GraphError, match=r"differs from the model by .* \(allowed .*\); please report"):
        capture(model)
    assert capture(model, verify=False).n_edges == 110


def test_a_capture_that_yields_nan_is_caught(monkeypatch):
    def wrong(model: Any) -> Graph:
        graph = HUGGING_FACE["llama"](model)
        object.__setattr__(graph.stages[1].core, "scale", float("nan"))
        return graph

    model = random_model("llama")
    monkeypatch.setitem(HUGGING_FACE, "mistral", wrong)
    model.config.model_type = "mistral"
    with pytest.raises(GraphError, match="differs from the model by nan"):
        capture(model)


def test_training_the_model_afterwards_changes_the_graph_only_where_it_shares_weights():
    model, x = random_model("gpt2"), tokens(1, 5)
    own, shared = capture(model), capture(model, copy=False)
    before = run(own, x).logits
    assert torch.equal(run(shared, x).logits, before)
    loss = model(x).logits.square().mean()
    loss.backward()
    with torch.no_grad():
        for p in model.parameters():
            p.sub_(p.grad, alpha=0.1)
    assert torch.equal(run(own, x).logits, before)
    assert_exact(shared, model)
    assert not torch.allclose(run(shared, x).logits, before, atol=1e-3)
    assert not any(t.requires_grad for t in (*own.tensors, *shared.tensors))


def test_capturing_leaves_the_model_as_it_was():
    model = random_model("gpt2").train()
    model.transformer.h[0].eval()
    modes = {name: m.training for name, m in model.named_modules()}
    weights = {name: p.clone() for name, p in model.named_parameters()}
    capture(model)  # dropout is off while the two are compared
    assert {name: m.training for name, m in model.named_modules()} == modes
    assert all(torch.equal(p, weights[name]) and p.grad is None for name, p in model.named_parameters())


# ---- broken weights ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_weight_that_is_not_finite_is_named(bad):
    model = random_model("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 4:6] = bad
    message = r"2 of 1536 weights of blocks.1.mlp \(ports.0.reads.1.map.weight, shape \(48, 32\)\) are NaN or infinite"
    with pytest.raises(NonFiniteError, match=message):
        capture(model)
    with pytest.raises(NonFiniteError, match=message):
        capture(model, verify=False)


# ---- folders -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder in hub format."""
    folder = tmp_path_factory.mktemp("models") / "tiny-llama-0.1"
    random_model("llama").save_pretrained(folder)
    return folder


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    """A copy of it, to break."""
    for path in saved.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    return tmp_path


@pytest.fixture
def weights(folder: Path) -> Iterator[dict[str, torch.Tensor]]:
    """The folder's weights, saved again when the test asks for it."""
    state = {name: t.clone() for name, t in load_file(folder / "model.safetensors").items()}
    yield state


def test_a_local_folder_is_the_model_it_holds(saved):
    for way in (saved, str(saved)):
        graph = capture(way)
        assert graph.info["name"] == "tiny-llama-0.1"
        assert_exact(graph, random_model("llama"))
    assert load_tokenizer(saved) is None


def test_a_folder_of_bfloat16_is_captured_in_bfloat16(tmp_path):
    model = random_model("gemma2", torch.bfloat16)
    model.save_pretrained(tmp_path)
    graph, loaded = capture(tmp_path), load_model(tmp_path)
    assert graph.info["dtype"] == "bfloat16"
    with torch.no_grad():
        ours, truth = run(graph, tokens(2, 30)).logits.float(), model_logits(loaded, tokens(2, 30)).float()
    assert float((ours - truth).abs().max()) <= 0.03 * float(truth.abs().max())


def test_loading_is_quiet_and_leaves_the_logging_as_it_was(saved, capfd):
    logger = logging.getLogger("transformers")
    before = logger.level
    capture(saved)
    out, err = capfd.readouterr()
    assert out + err == ""
    assert logger.level == before


def test_a_folder_without_a_config_is_refused(tmp_path):
    with pytest.raises(StorageError, match=r"there is no config.json; is it a model folder"):
        capture(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", "config.json: not valid JSON"),
        (b"", "config.json: not valid JSON"),
        (b"\xff\xfe", "config.json: not valid JSON"),
        (b"[1, 2]", "config.json: must hold an object"),
    ],
)
def test_a_broken_config_is_refused(folder, content, message):
    (folder / "config.json").write_bytes(content)
    with pytest.raises(CorruptFileError, match=message):
        capture(folder)


@pytest.mark.parametrize("family", ["opt", "made-up", None, 7, ["llama"]])
def test_a_folder_of_an_unknown_family_is_refused_by_name(folder, family):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": family}))
    with pytest.raises(UnsupportedModelError, match="the family .* is not supported; supported: gemma2"):
        capture(folder)


def test_a_config_of_the_wrong_sizes_is_refused(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"intermediate_size": 50}))
    with pytest.raises(StorageError, match="cannot load this model"):
        capture(folder)


def test_missing_weights_are_refused(folder, weights):
    del weights["model.layers.0.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(
        CorruptFileError, match="lacks 1 weights of the model, such as model.layers.0.mlp.up_proj.weight"
    ):
        capture(folder)


def test_weights_of_the_wrong_shape_are_refused(folder, weights):
    weights["model.norm.weight"] = torch.ones(31)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(StorageError, match="cannot load this model"):
        capture(folder)


@pytest.mark.parametrize("keep", [0, 100, 2000])
def test_a_truncated_checkpoint_is_refused(folder, keep):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(StorageError, match="cannot load this model"):
        capture(folder)


def test_a_folder_without_weights_is_refused(folder):
    (folder / "model.safetensors").unlink()
    with pytest.raises(StorageError, match="cannot load this model"):
        capture(folder)


def test_a_folder_with_nan_weights_is_refused(folder, weights):
    weights["model.embed_tokens.weight"][4, 4] = torch.nan
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(NonFiniteError, match=r"1 of 1600 weights of embed \(core.table"):
        capture(folder)


def test_code_in_a_folder_is_never_run(folder):
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {"AutoModelForCausalLM": "evil.Model", "AutoConfig": "evil.Config"}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "evil.py").write_text(f"open({str(folder / 'pwned')!r}, 'w')\nraise SystemExit")
    assert_exact(capture(folder), random_model("llama"))
    assert not (folder / "pwned").exists()


@pytest.mark.parametrize("name", ["/no/such/folder", "./nowhere", "~/nowhere", "a/b/c", "model.safetensors", "m.json"])
def test_a_folder_that_is_not_there_is_refused(name):
    with pytest.raises(StorageError, match=r"no such model folder; give a folder in Hugging Face format, a hub name"):
        capture(name)


def test_a_file_is_not_a_folder(saved):
    with pytest.raises(StorageError, match="no such model folder"):
        capture(saved / "model.safetensors")


@pytest.mark.parametrize("name", ["gpt2", "Qwen/Qwen2.5-0.5B", "meta-llama/Llama-3.2-1B", "EleutherAI/pythia-1.4b"])
def test_hub_names_go_to_the_hub_whatever_dots_they_have(name, monkeypatch):
    asked = []

    def from_the_hub(name: str) -> nn.Module:
        asked.append(name)
        return random_model("llama")

    monkeypatch.setattr(sys.modules["unweave.capture"], "_load_hugging_face", from_the_hub)
    assert capture(name).info["name"] == name.split("/")[-1]
    assert asked == [name]


def test_an_unknown_zoo_model_is_refused():
    with pytest.raises((StorageError, KeyError, ValueError), match="induction"):
        capture("zoo:inductoin")


@pytest.mark.parametrize("name", ["stories260K", "pylm"])
def test_the_shared_models_are_captured_exactly(shared, name):
    folder = shared / "models" / name
    model, graph = load_model(folder), capture(folder)
    assert graph.info["name"] == name
    assert graph.n_parameters == model.num_parameters()
    x = torch.randint(graph.info["d_vocab"], (2, graph.info["n_ctx"]))
    with torch.no_grad():
        assert torch.allclose(run(graph, x).logits, model_logits(model, x), atol=1e-4)
    assert_exact(graph, model, atol=1e-4)
    assert load_tokenizer(folder) is not None


@pytest.mark.parametrize("name", ["frac_prevs", "hist", "pair_balance", "reverse", "sort_unique"])
def test_tracr_models_are_captured_exactly(shared, name):
    model = load_model(shared / "models" / "tracr" / name)
    graph = capture(shared / "models" / "tracr" / name)
    x = torch.randint(graph.info["d_vocab"], (4, graph.info["n_ctx"]))
    with torch.no_grad():
        truth = model(x)
    assert torch.allclose(run(graph, x).logits, truth, atol=1e-4 * max(1.0, float(truth.abs().max())))


# ---- nn.Sequential -------------------------------------------------------------------------------------------------

ACTIVATION_LAYERS: dict[str, Callable[[], nn.Module]] = {
    "gelu": nn.GELU,
    "gelu tanh": lambda: nn.GELU(approximate="tanh"),
    "leaky relu": nn.LeakyReLU,
    "relu": nn.ReLU,
    "sigmoid": nn.Sigmoid,
    "silu": nn.SiLU,
    "tanh": nn.Tanh,
    "none": nn.Identity,
}


@pytest.mark.parametrize("activation", sorted(ACTIVATION_LAYERS))
def test_sequential_mlps_are_captured_exactly(activation):
    act = ACTIVATION_LAYERS[activation]
    model = nn.Sequential(nn.Linear(4, 7), act(), nn.Dropout(0.5), nn.Linear(7, 5, bias=False), act(), nn.Linear(5, 2))
    graph = capture(model.train())
    assert model.training
    x = torch.randn(3, 2, 4) * 3
    assert torch.allclose(run(graph, x).logits, model.eval()(x), atol=1e-6)
    assert graph.nodes == ("input", "layers.0", "layers.1", "output")
    assert [str(e) for e in graph.edges] == [
        "input->layers.0.in",
        "layers.0->layers.1.in",
        "layers.1->output.in",
    ]
    assert graph.n_parameters == sum(p.numel() for p in model.parameters())


def test_a_single_layer_and_a_flattened_input_are_captured():
    linear = nn.Sequential(nn.Linear(4, 3))
    x = torch.randn(2, 3, 4)
    assert torch.allclose(run(capture(linear), x).logits, linear(x), atol=1e-6)
    flat = nn.Sequential(nn.Flatten(), nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
    assert torch.allclose(run(capture(flat), x[:, :1]).logits[:, 0], flat(x[:, :1]), atol=1e-6)


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ([], "holds no Linear layer; there is nothing to capture"),
        ([nn.Dropout()], "holds no Linear layer"),
        ([nn.Linear(2, 2), nn.ReLU()], "ends with relu; end it with a Linear layer"),
        ([nn.ReLU(), nn.Linear(2, 2)], "holds a ReLU that cannot be captured there"),
        (
            [nn.Linear(2, 2), nn.ReLU(), nn.Tanh(), nn.Linear(2, 2)],
            "holds a Tanh that cannot be captured there",
        ),
        (
            [nn.Linear(2, 2), nn.BatchNorm1d(2), nn.Linear(2, 2)],
            "holds a BatchNorm1d that cannot be captured there",
        ),
        (
            [nn.Conv1d(1, 1, 1)],
            "holds a Conv1d that cannot be captured there; supported: Linear, GELU, LeakyReLU",
        ),
        (
            [nn.Linear(2, 2), nn.LeakyReLU(0.2), nn.Linear(2, 2)],
            "LeakyReLU with slope 0.2 is not supported; only 0.01",
        ),
    ],
)
def test_sequential_models_that_cannot_be_captured_are_refused(layers, message):
    with pytest.raises(UnsupportedModelError, match=message):
        capture(nn.Sequential(*layers))


def test_a_sequential_model_in_float64_is_captured_in_float64():
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    x = torch.randn(2, 1, 3, dtype=torch.float64)
    assert torch.allclose(run(capture(model), x).logits, model(x), atol=1e-12)


def test_capture_is_the_public_name():
    assert capture_name is capture
