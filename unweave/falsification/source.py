"""The pieces of PyTorch source that a rebuilt graph is written in; nothing of them is run here."""

from __future__ import annotations

from collections.abc import Sequence

__all__ = [
    "ACTIVATION",
    "ATTENTION",
    "CIRCUIT",
    "IMPORTS",
    "LAYERS",
    "LINEAR",
    "LOAD",
    "MLP",
    "NORMS",
    "PORT",
    "ROTARY",
    "assemble",
    "literal",
]

LINE = 88  # as wide as ruff and black make lines unless told otherwise

IMPORTS = """\
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn
"""

LINEAR = '''\
def factors(w, name):
    """The matrices stored under a name, in the order in which they are applied."""
    if f"{name}.weight" in w:
        return [w[f"{name}.weight"]]
    if f"{name}.values" in w:  # the numbers kept and where they stand; zeros elsewhere
        kept, values = w[f"{name}.kept"], w[f"{name}.values"]
        return [values.new_zeros(kept.shape).masked_scatter(kept, values)]
    if f"{name}.rest" in w:  # the columns at "pivots" are the identity
        rest, pivots = w[f"{name}.rest"], w[f"{name}.pivots"]
        whole = torch.cat([torch.eye(len(rest), dtype=rest.dtype), rest], dim=1)
        order = torch.cat([pivots, w[f"{name}.others"]]).argsort()
        return [whole[:, order]]
    if f"{name}.parts" in w:  # several matrices, one below the other
        parts = (factors(w, f"{name}.{i}") for i in range(int(w[f"{name}.parts"])))
        return [torch.cat([part[0] for part in parts])]
    return [*factors(w, f"{name}.right"), w[f"{name}.left"]]


class Linear(nn.Module):
    """x -> x W^T + b, where W is one matrix or the product of a few narrow ones."""

    def __init__(self, w, name):
        super().__init__()
        self.factors = nn.ParameterList(factors(w, name))
        bias = w.get(f"{name}.bias")
        self.bias = None if bias is None else nn.Parameter(bias)

    def forward(self, x):
        for factor in self.factors:
            x = F.linear(x, factor)
        return x if self.bias is None else x + self.bias
'''

NORMS = {
    "RMSNorm": '''\
class Norm(nn.Module):
    """gain * x / root mean square of x"""

    def __init__(self, w, name):
        super().__init__()
        self.gain = nn.Parameter(w[f"{name}.gain"])

    def forward(self, x):
        wide = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
        scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + EPSILON)
        return self.gain * (wide * scale).to(x.dtype)
''',
    "LayerNorm": '''\
class Norm(nn.Module):
    """gain * (x - mean) / standard deviation + bias"""

    def __init__(self, w, name):
        super().__init__()
        self.gain = nn.Parameter(w[f"{name}.gain"])
        bias = w.get(f"{name}.bias")
        self.bias = None if bias is None else nn.Parameter(bias)

    def forward(self, x):
        return F.layer_norm(x, self.gain.shape, self.gain, self.bias, EPSILON)
''',
    "": "",
}

PORT = '''\
def layer_of(name):
    """blocks.3.attn for blocks.3.attn.head.5: the heads of a layer share a norm."""
    return ".".join(name.split(".")[:3])


class Port(nn.Module):
    """One way in which a node reads: what it hears, normalised, through matrices."""

    def __init__(self, w, node, port, reads=("read",)):
        super().__init__()
        name = f"{node}.{port}"
        constant = w.get(f"{name}.constant")  # what is left of edges that were cut
        self.constant = None if constant is None else nn.Parameter(constant)
@       self.norm = Norm(w, f"{layer_of(node)}.norm")
        self.reads = nn.ModuleList(Linear(w, f"{name}.{read}") for read in reads)

    def forward(self, x):
        if self.constant is not None:
            x = x + self.constant[: x.shape[1]]
@       x = self.norm(x)
        return [read(x) for read in self.reads]
'''

ROTARY = '''\
def turn(x, frequencies):
    """Turn coordinates (i, planes + i) of each head by position * frequency i."""
    angles = torch.arange(x.shape[2], device=x.device)[:, None] * frequencies
    cos, sin = ((t * ROTARY_SCALING).to(x.dtype) for t in (angles.cos(), angles.sin()))
    planes = len(frequencies)
    a, b, rest = x.split([planes, planes, x.shape[-1] - 2 * planes], dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin, rest], dim=-1)
'''

ATTENTION = '''\
def blocks(x, widths):
    """[batch pos sum of widths] -> [batch block pos widest], padded with zeros."""
    parts = x.split(widths, dim=-1)
    return torch.stack([F.pad(p, (0, max(widths) - p.shape[-1])) for p in parts], 1)


class Attention(nn.Module):
    """Heads: softmax(scale * q k^T) v, written to the stream."""

    def __init__(self, w, name, setting):
        super().__init__()
        self.setting = setting
        self.q, self.k, self.v = (Port(w, name, port) for port in "qkv")
        self.out = Linear(w, f"{name}.out")
#       self.q_norm = Norm(w, f"{layer_of(name)}.q_norm")
#       self.k_norm = Norm(w, f"{layer_of(name)}.k_norm")
%       self.register_buffer("frequencies", w[f"{layer_of(name)}.rotary"].float())

    def forward(self, heard, mask):
        s, ports = self.setting, (self.q, self.k, self.v)
        reads = (port(x)[0] for port, x in zip(ports, heard))
        q, k, v = (blocks(x, s[port]) for x, port in zip(reads, "qkv"))
#       q, k = self.q_norm(q), self.k_norm(k)
%       q, k = turn(q, self.frequencies), turn(k, self.frequencies)
        q, k, v = (x.repeat_interleave(s["heads"] // x.shape[1], 1) for x in (q, k, v))
        scores = q @ k.mT * s["scale"]
        scores = scores.masked_fill(~self.seen(mask), -torch.inf)
        codes = (scores.softmax(-1) @ v).unbind(1)
        shared = s["heads"] // len(s["v"])  # heads that read the same values
        codes = [c[..., : s["v"][i // shared]] for i, c in enumerate(codes)]
        return self.out(torch.cat(codes, dim=-1))

    def seen(self, mask):
        """Which keys each query may look at; padding sees only itself."""
        pos = torch.arange(mask.shape[1], device=mask.device)
        distance = pos[:, None] - pos
        seen = distance >= (0 if CAUSAL else -len(pos))
        if self.setting["window"] is not None:
            seen = seen & (distance.abs() < self.setting["window"])
        return ((seen & mask[:, None]) | (distance == 0))[:, None]
'''

MLP = {
    True: '''\
class MLP(nn.Module):
    """act(gate) * up, written to the stream."""

    def __init__(self, w, name, setting):
        super().__init__()
        self.port = Port(w, name, "in", ("gate", "up"))
        self.out = Linear(w, f"{name}.out")

    def forward(self, heard, mask):
        gate, up = self.port(heard[0])
        return self.out(<ACTIVATION> * up)
''',
    False: '''\
class MLP(nn.Module):
    """act(read), written to the stream."""

    def __init__(self, w, name, setting):
        super().__init__()
        self.port = Port(w, name, "in")
        self.out = Linear(w, f"{name}.out")

    def forward(self, heard, mask):
        (gate,) = self.port(heard[0])
        return self.out(<ACTIVATION>)
''',
}

ACTIVATION = {
    "gelu": "F.gelu(gate)",
    "gelu_tanh": 'F.gelu(gate, approximate="tanh")',
    "identity": "gate",
    "leaky_relu": "F.leaky_relu(gate)",
    "quick_gelu": "(gate * torch.sigmoid(1.702 * gate))",
    "relu": "F.relu(gate)",
    "relu2": "F.relu(gate).square()",
    "sigmoid": "torch.sigmoid(gate)",
    "silu": "F.silu(gate)",
    "tanh": "torch.tanh(gate)",
}

_START = '''\
class Model(nn.Module):
    """<SUMMARY>"""

    def __init__(self, w):
        super().__init__()
        self.embeddings = nn.ParameterList(w[f"{name}.table"] for name in EMBEDDINGS)
        kinds = {<KINDS>}
        self.nodes = nn.ModuleList(
            kinds[name.split(".")[2]](w, name, setting)
            for name, setting in NODES.items()
        )
        self.unembed = Port(w, "unembed", "in")

    def embed(self, tokens):
        """What each embedding writes: rows of its table by token, or by position."""
        rows = {"embed": tokens, "pos_embed": torch.arange(tokens.shape[1])}
        return {
            name: table[rows[name].to(table.device)].expand(*tokens.shape, -1)
            for name, table in zip(EMBEDDINGS, self.embeddings)
        }
'''

LAYERS = (
    _START
    + '''
    def forward(self, tokens, mask=None):
        """[batch pos] token ids -> [batch pos outputs]; mask: True where real."""
        mask = torch.ones_like(tokens, dtype=torch.bool) if mask is None else mask
        x = sum(self.embed(tokens).values())
        for node in self.nodes:
            x = x + node([x, x, x], mask)
        return self.unembed(x)[0]
'''
)

CIRCUIT = (
    _START
    + '''
    def forward(self, tokens, mask=None):
        """[batch pos] token ids -> [batch pos outputs]; mask: True where real."""
        mask = torch.ones_like(tokens, dtype=torch.bool) if mask is None else mask
        written = self.embed(tokens)
        nothing = torch.zeros(*tokens.shape, D_MODEL, device=mask.device, dtype=DTYPE)

        def heard(port):
            return sum((written[writer] for writer in EDGES[port]), nothing)

        for name, node in zip(NODES, self.nodes):
            ports = "qkv" if ".attn." in name else ("in",)
            written[name] = node([heard(f"{name}.{port}") for port in ports], mask)
        return self.unembed(heard("unembed.in"))[0]
'''
)

LOAD = '''\
def load(path=None):
    """The model, with the weights stored beside this file unless told otherwise."""
    w = load_file(path or Path(__file__).with_name("weights.safetensors"))
@   w["unembed.in.read.weight"] = w["embed.table"]  # tied to the embedding
    return Model(w).eval()


if __name__ == "__main__":
    ids = torch.arange(min(4, len(load().embeddings[0])))[None]
    print(load()(ids).shape)
'''


def assemble(piece: str, **marked: bool) -> str:
    """A piece with its marked lines kept or left out: ``at``, ``hash`` and ``percent`` say whether each mark stays."""
    kept = {"@": marked.get("at", False), "#": marked.get("hash", False), "%": marked.get("percent", False)}
    lines = []
    for line in piece.splitlines():
        mark = line[:1]
        if mark in kept:
            if kept[mark]:
                lines.append(" " + line[1:])
        else:
            lines.append(line)
    return "\n".join(lines) + "\n" if lines else ""


def literal(name: str, items: Sequence[tuple[str, Sequence[str]]]) -> str:
    """A dictionary of lists of names as formatted source."""
    lines = [f"{name} = {{"]
    for key, values in items:
        quoted = [f'"{value}"' for value in values]
        row = f'    "{key}": [{", ".join(quoted)}],'
        if len(row) <= LINE:
            lines.append(row)
        else:
            lines += [f'    "{key}": [', *(f"        {value}," for value in quoted), "    ],"]
    return "\n".join([*lines, "}"]) + "\n"
