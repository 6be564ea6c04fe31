"""Universality: which node of one trained network is which of another, against baselines, noise and truth.

    python -m benchmarks.universality [--networks FOLDER] [ROOM ...]

Networks of several seeds are trained from nothing for each room (``--networks`` keeps them, so that a stopped run goes
on), and every two are matched in every way of ``match``. What is asked of a matching:

Each way assigns one to one and, as "nearest", every node of A to the node of B most like it: where not equally many
nodes share a role, one to one cannot get all of them right.

- right: where roles are known (heads of induction by where they look, neurons of modular addition by frequency, of S_4
  by representation), the share of A's nodes with a role that B has, too, whose match has it. Thresholds were fixed
  before: half of the attention, half of what a neuron reads.
- lost: each node of A replaced by its match through linear maps fitted on other data (stitching): nats lost on held-out
  data over nats lost with the node at its mean, sums over nodes. "random" is the mean over all nodes of B of the kind,
  "linear map alone" hears what A's node hears and uses no network B.
- edges: rank correlation of edges' nats, less the mean of matchings permuted within kinds.

Intervals are bootstraps over seeds: pairs share networks. With three or four seeds they are too narrow.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import combinations, pairwise, product
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from benchmarks.common import RESULTS, save
from unweave import zoo
from unweave.capture import capture
from unweave.data import TokenData, float_data, from_tensor
from unweave.graph import Graph
from unweave.modules import Replaced, replace_module, replacement_loss
from unweave.retrodiction import head_matching
from unweave.retrodiction.claims import pair_interval
from unweave.retrodiction.hidden import input_code
from unweave.scope import Scope
from unweave.scoring import EdgeScores, score_edges
from unweave.statistics import collect_means
from unweave.universality import NodePair, compare_edges, fit_stitch, similarities
from unweave.universality.matching import BY, assign
from unweave.universality.similarity import Signals
from unweave.zoo import brackets, gridworld, group_composition, induction, max_of_k, modular_addition
from unweave.zoo.mlp import linear_layers
from unweave.zoo.representations import irreps, isotypic_projectors
from unweave.zoo.toy import ToyConfig, ToyTransformer

BATCH = 512
ANSWERED = Scope(positions="answered")
# of what a neuron reads of its input, at one frequency or in one representation
NEURON_SHARE = 0.5
# a neuron worth a smaller share of the most valuable one's nats has no role
LEAST_NEURON = 0.01
# a node whose mean costs less has no work that could be stitched
LEAST_NATS = 1e-3
UNTRAINED = 3
FORMS = {"": True, ", nearest": False}
Labels = Mapping[str, str]
Train = Callable[[int], nn.Module]


class Room(NamedTuple):
    """Networks to compare: how they are trained, on what they are compared, what is known of their nodes.

    Attributes:
        kinds: name -> how one network is trained; with two, only networks of different kinds are compared.
        data: for matching and for fitting maps; ``held_out`` for what a stitch loses, None for no stitching.
        labels: the role of each node that has one.
        neurons: the layer that is split into single neurons.
    """

    kinds: Mapping[str, Train]
    seeds: int
    data: TokenData
    held_out: TokenData | None
    accuracy: Callable[[nn.Module], float]
    labels: Callable[[nn.Module], Labels] | None = None
    neurons: str | None = None

    def graph(self, model: nn.Module) -> Graph:
        graph = capture(model.eval())
        if self.neurons is None:
            return graph
        (width,) = graph.find(self.neurons)[0].code_widths
        return graph.refine({self.neurons: width})


# ---- rooms --------------------------------------------------------------------------------------------------


def last(steps: Iterator[tuple[int, float, nn.Module]]) -> nn.Module:
    *_, (_, _, model) = steps
    return model


def marked(module: Any, n: int, seed: int, **options: Any) -> TokenData:
    tokens, answered = module.data(n, seed=seed, **options)
    return from_tensor(tokens, labels={"answered": answered})


def induction_room(two: bool) -> Room:
    """Two layers of four heads; in two sizes, those against two heads a layer and twice their width."""
    config = head_matching.CONFIG
    wide = dataclasses.replace(config, n_heads=2, d_head=32, d_model=96)

    def train(size: ToyConfig) -> Train:
        options: dict[str, Any] = {"priced_between": head_matching.PRICED, "price": head_matching.PRICE}
        return lambda seed: last(induction.train(seed, head_matching.STEPS, size, **options))

    def labels(model: Any) -> Labels:
        return {head: role for role, heads in head_matching.roles(model).items() for head in heads}

    kinds = {"four heads": train(config)} | ({"two heads": train(wide)} if two else {})
    data, held_out = (marked(induction, 96, seed, config=config) for seed in (5, 6))
    return Room(kinds, 2 if two else 3, data, held_out, lambda m: float(induction.known(m)["accuracy"]), labels)


def toy_room(module: Any, steps: int, n: int, heads: int | None = None) -> Room:
    """A room without known roles."""
    size = module.CONFIG if heads is None else dataclasses.replace(module.CONFIG, n_heads=heads, d_head=32 // heads)
    data, held_out = marked(module, n, 5), marked(module, n, 6)
    accuracy = lambda m: float(module.accuracy(m, held_out.tokens.long()))  # noqa: E731
    return Room({"network": lambda seed: last(module.train(seed, steps, size))}, 3, data, held_out, accuracy)


def role_of_neurons(
    model: nn.Module, node: str, data: TokenData, values: Int[Tensor, " n"], projectors: Float[Tensor, "k v v"]
) -> Labels:
    """The part (frequency or representation) of which each neuron that is worth something reads half or more."""
    code = input_code(capture(model.eval()), data, node, values, ANSWERED)
    parts = (projectors @ code.table).square().sum(1)
    share = parts / parts.sum(0).clamp(min=1e-30)
    alone = code.table.square().sum(0) * code.felt.diagonal()
    named = (share.amax(0) >= NEURON_SHARE) & (alone >= LEAST_NEURON * alone.max())
    return {f"{node}.part.{i}": f"part {int(share[:, i].argmax())}" for i in named.nonzero().flatten().tolist()}


def addition_room() -> Room:
    config = modular_addition.SMALL
    tokens = modular_addition.all_pairs(config.d_out)[0]
    answered = torch.zeros(tokens.shape, dtype=torch.bool)
    answered[:, -1] = True
    data = from_tensor(tokens, labels={"answered": answered})
    phase = 2 * math.pi * torch.arange(config.d_out, dtype=torch.float64) / config.d_out
    off = phase[:, None] - phase
    waves = torch.stack([2 / config.d_out * torch.cos(f * off) for f in range(1, config.d_out // 2 + 1)])

    def train(seed: int) -> nn.Module:
        return last(modular_addition.train_until(seed, 2500, config, 0.5))

    return Room(
        {"network": train},
        3,
        data.select(torch.randperm(len(tokens), generator=torch.Generator().manual_seed(0))[:240]),
        None,
        lambda m: float(modular_addition.known(m)["accuracy"]),  # type: ignore[arg-type]
        lambda m: role_of_neurons(m, "blocks.0.mlp", data, tokens[:, 0], waves),
        "blocks.0.mlp",
    )


def group_room() -> Room:
    inputs, _ = group_composition.all_pairs()
    data = float_data(inputs, {"answered": torch.ones(len(inputs), 1, dtype=torch.bool)})
    table = group_composition.TABLE
    projectors = isotypic_projectors(table, irreps(table))
    a = inputs[:, : len(table)].argmax(1)
    return Room(
        {"network": lambda seed: last(group_composition.train(seed, 1000))},
        3,
        data.select(torch.randperm(len(inputs), generator=torch.Generator().manual_seed(0))[:144]),
        None,
        lambda m: float(group_composition.known(m)["accuracy"]),  # type: ignore[arg-type]
        lambda m: role_of_neurons(m, "layers.0", data, a, projectors),
        "layers.0",
    )


ROOMS: dict[str, Callable[[], Room]] = {
    "induction": lambda: induction_room(False),
    "induction, four heads in two": lambda: induction_room(True),
    "group_composition": group_room,
    "modular_addition": addition_room,
    "brackets": lambda: toy_room(brackets, 1000, 192),
    "max_of_k": lambda: toy_room(max_of_k, 1500, 256, 4),
    "gridworld": lambda: toy_room(gridworld, 1200, 192),
}


# ---- networks -----------------------------------------------------------------------------------------------


def trained(room: Room, name: str, kind: str, seed: int, folder: Path | None) -> nn.Module:
    place = None if folder is None else folder / f"{name.replace(' ', '_')}-{kind.replace(' ', '_')}-{seed}"
    if place is not None and (place / "config.json").is_file():
        return zoo.load_folder(place)
    model = room.kinds[kind](seed)
    if place is not None:
        zoo.save(model, place)
    return model


def fresh(model: nn.Module, seed: int) -> nn.Module:
    """An untrained network of the same sizes."""
    torch.manual_seed(seed)
    if isinstance(model, ToyTransformer):
        return ToyTransformer(model.config)
    layers = linear_layers(model)  # type: ignore[arg-type]
    return zoo.mlp.make_mlp(zoo.MlpConfig((layers[0].in_features, *(layer.out_features for layer in layers))))


@torch.no_grad()
def in_other_coordinates(model: nn.Module, generator: torch.Generator) -> tuple[nn.Module, dict[str, str]]:
    """The same function: stream rotated, heads and neurons in another order; (it, the new name of each node)."""
    names: dict[str, str] = {}
    out = fresh(model, 0)
    out.load_state_dict(model.state_dict())

    def reorder(node: str, n: int) -> Tensor:
        order = torch.randperm(n, generator=generator)
        names.update({f"{node}.{old}": f"{node}.{new}" for new, old in enumerate(order.tolist())})
        return order

    if not isinstance(out, ToyTransformer):
        layers = linear_layers(out)  # type: ignore[arg-type]
        for number, (layer, after) in enumerate(pairwise(layers)):
            order = reorder(f"layers.{number}.part", layer.out_features)
            layer.weight.copy_(layer.weight[order])
            layer.bias.copy_(layer.bias[order])
            after.weight.copy_(after.weight[:, order])
        return out, names
    c = out.config
    q = torch.linalg.qr(torch.randn(c.d_model, c.d_model, generator=generator)).Q
    for table in (out.W_E, out.W_pos):
        table.copy_(table @ q)
    out.W_U.copy_(q.T @ out.W_U)
    for number, block in enumerate(out.blocks):
        order = reorder(f"blocks.{number}.attn.head", c.n_heads)
        for name in ("W_Q", "W_K", "W_V"):
            getattr(block, name).copy_((q.T @ getattr(block, name))[order])
            getattr(block, f"b_{name[-1]}").copy_(getattr(block, f"b_{name[-1]}")[order])
        block.W_O.copy_((block.W_O @ q)[order])
        block.b_O.copy_(block.b_O @ q)
        if c.d_mlp:
            order = reorder(f"blocks.{number}.mlp.part", c.d_mlp)
            block.W_in.copy_((q.T @ block.W_in)[:, order])
            block.b_in.copy_(block.b_in[order])
            block.W_out.copy_((block.W_out @ q)[order])
            block.b_out.copy_(block.b_out @ q)
    return out, names


# ---- measuring ----------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, eq=False)
class Network:
    """One of the networks that are compared."""

    kind: str
    seed: int
    model: nn.Module
    graph: Graph
    labels: Labels
    scores: EdgeScores
    means: Mapping[str, Tensor]


def network(room: Room, kind: str, seed: int, model: nn.Module) -> Network:
    graph = room.graph(model)
    options: dict[str, Any] = {"batch_size": BATCH, "progress": False}
    labels = room.labels(model) if room.labels else {}
    scores = score_edges(graph, room.data, ANSWERED, **options)
    return Network(kind, seed, model, graph, labels, scores, collect_means(graph, room.data, **options))


def share_right(found: Mapping[str, str], a: Labels, b: Labels) -> float:
    """Of A's nodes with a role that B has, too, the share whose match has it."""
    asked = [node for node, label in a.items() if label in b.values()]
    return float(np.mean([b.get(found.get(node, "")) == a[node] for node in asked])) if asked else math.nan


def chance(choices: Mapping[str, Sequence[str]], a: Labels, b: Labels) -> tuple[float, float]:
    """What random assignments get right: to all nodes of the kind, and to those alone that have a role."""
    role = list(b.values())
    asked = [(role.count(label), len(choices[n])) for n, label in a.items() if label in role]
    if not asked:
        return math.nan, math.nan
    return float(np.mean([k / n for k, n in asked])), float(np.mean([k / len(role) for k, _ in asked]))


def most_right(a: Labels, b: Labels) -> float:
    """The largest share of A's nodes with a role of B's that a one-to-one matching gets right."""
    of_a, of_b = Counter(a.values()), Counter(b.values())
    asked = sum(of_a[label] for label in of_b)
    return sum(min(of_a[label], of_b[label]) for label in of_b) / asked if asked else math.nan


class Stitches:
    """Nats lost with nodes of B in A's place, measured once for every two nodes."""

    def __init__(self, room: Room, a: Network) -> None:
        self.room, self.a = room, a
        self.known: dict[tuple[int, str, str], float] = {}
        self.alone: dict[str, float] = {}
        self.ablated: dict[str, float] = {}
        if room.held_out is None:
            return
        for stage in a.graph.stages:
            for node in stage.nodes if stage.kind in ("attn", "mlp") else ():
                linear = replace_module(a.graph, node, "linear", room.data, batch_size=BATCH, progress=False)
                loss = replacement_loss(linear, room.held_out, ANSWERED, batch_size=BATCH, progress=False)
                if loss.ablated_nats.value >= LEAST_NATS:
                    self.ablated[node], self.alone[node] = loss.ablated_nats.value, loss.nats.value

    def nats(self, node: str, other: Graph, target: str) -> float:
        key = (id(other), node, target)
        if key not in self.known:
            assert self.room.held_out is not None
            made = fit_stitch(self.a.graph, node, other, target, self.room.data, batch_size=BATCH, progress=False)
            replaced = Replaced(self.a.graph, node, (node,), target, made, {node: self.a.means[node]}, made.n_numbers)
            loss = replacement_loss(replaced, self.room.held_out, ANSWERED, batch_size=BATCH, progress=False)
            self.known[key] = loss.nats.value
        return self.known[key]

    def lost(self, found: Mapping[str, str], other: Graph) -> float:
        """Nats lost over nats lost at the mean, sums over the nodes of A that are matched and do something."""
        nodes = [n for n in self.ablated if n in found]
        whole = sum(self.ablated[n] for n in nodes)
        return sum(self.nats(n, other, found[n]) for n in nodes) / whole if nodes else math.nan

    def at_random(self, other: Graph, choices: Mapping[str, Sequence[str]]) -> tuple[float, float]:
        """(the mean over all nodes of the kind, the best of them), for the nodes of A that do something."""
        every = {n: [self.nats(n, other, b) for b in choices[n]] for n in self.ablated if n in choices}
        whole = sum(self.ablated[n] for n in every)
        if not every:
            return math.nan, math.nan
        return sum(float(np.mean(v)) for v in every.values()) / whole, sum(map(min, every.values())) / whole


Matrices = dict[str, Float[Tensor, "a b"]]


def alike(room: Room, a: Graph, b: Graph, scope: Scope | None = ANSWERED) -> dict[str, Matrices]:
    """By way of matching and kind, how alike all nodes are; "behaviour" is the mean of its three, measured once."""
    has_heads = all(any(s.kind == "attn" for s in g.stages) for g in (a, b))
    singles = [by for by in BY if by != "behaviour" and (has_heads or by != "patterns")]
    options: dict[str, Any] = {"scope": scope, "batch_size": BATCH, "progress": False}
    found = {by: similarities(a, b, room.data, by=by, **options) for by in singles}
    parts = [found[by] for by in ("patterns", "effects", "cka") if by in found]
    mean = {k: torch.stack([part[k] for part in parts if k in part]).mean(0) for k in found["cka"]}
    return {"behaviour": mean} | found


def matched(a: Graph, b: Graph, similarity: Matrices, one_to_one: bool = True) -> list[NodePair]:
    """The assignment of each kind."""
    return [p for kind, s in similarity.items() for p in assign(s, nodes(a, kind), nodes(b, kind), None, one_to_one)]


def nodes(graph: Graph, kind: str) -> tuple[str, ...]:
    return Signals(graph, kind).nodes


def compare(room: Room, a: Network, b: Network, stitches: Stitches) -> Iterator[tuple[str, dict[str, float]]]:
    """(way of matching, figures) for one pair of networks."""
    found = alike(room, a.graph, b.graph)
    if room.neurons is None:
        found["behaviour, all positions"] = alike(room, a.graph, b.graph, None)["behaviour"]
    for (way, similarity), (form, one_to_one) in product(found.items(), FORMS.items()):
        of = {p.a: p.b for p in matched(a.graph, b.graph, similarity, one_to_one)}
        row = {"right": share_right(of, a.labels, b.labels)}
        if similarity.keys() == found["behaviour"].keys():
            edges = compare_edges(a.scores, b.scores, of)
            row |= {"edges": edges.correlation - edges.permuted, "edges_p": edges.p}
            row["lost"] = stitches.lost(of, b.graph)
        yield way + form, row
    choices = {n: nodes(b.graph, kind) for kind in found["behaviour"] for n in nodes(a.graph, kind)}
    mean, best = stitches.at_random(b.graph, choices)
    anywhere, among_roles = chance(choices, a.labels, b.labels)
    yield "random", {"right": anywhere, "lost": mean, "edges": 0.0}
    yield "random, among nodes with roles", {"right": among_roles}
    yield "the best there is", {"lost": best}
    if stitches.ablated:
        yield "linear map alone", {"lost": sum(stitches.alone.values()) / sum(stitches.ablated.values())}
    yield "the most one to one allows", {"right": most_right(a.labels, b.labels)}
    yield from untrained(room, a, b, stitches)


def untrained(room: Room, a: Network, b: Network, stitches: Stitches) -> Iterator[tuple[str, dict[str, float]]]:
    """A matched by behaviour with networks that were never trained, as if they had B's roles."""
    rows: dict[str, list[dict[str, float]]] = {form: [] for form in FORMS}
    for k in range(UNTRAINED if room.neurons is None else 1):
        noise = room.graph(fresh(b.model, 1000 * (k + 1) + b.seed))
        similarity = alike(room, a.graph, noise)["behaviour"]
        scores = score_edges(noise, room.data, ANSWERED, batch_size=BATCH, progress=False)
        for form, one_to_one in FORMS.items():
            of = {p.a: p.b for p in matched(a.graph, noise, similarity, one_to_one)}
            edges = compare_edges(a.scores, scores, of)
            row = {"right": share_right(of, a.labels, b.labels), "edges": edges.correlation - edges.permuted}
            rows[form].append(row | {"edges_p": edges.p, "lost": stitches.lost(of, noise) if k == 0 else math.nan})
    for form, found in rows.items():
        yield f"untrained{form}", {key: _mean([row[key] for row in found]) for key in found[0]}


def _mean(values: Sequence[float]) -> float:
    known = [v for v in values if not math.isnan(v)]
    return float(np.mean(known)) if known else math.nan


def copied(room: Room, a: Network) -> dict[str, Any]:
    """A and itself in other coordinates: which nodes are found again, of those that write anything."""
    model, names = in_other_coordinates(a.model, torch.Generator().manual_seed(a.seed))
    graph = room.graph(model)
    options: dict[str, Any] = {"by": "cka", "batch_size": BATCH, "progress": False}
    itself = similarities(a.graph, a.graph, room.data, **options)
    alive = {n for k, s in itself.items() for i, n in enumerate(nodes(a.graph, k)) if float(s[i, i]) > 0.5}
    out: dict[str, Any] = {}
    for way, similarity in alike(room, a.graph, graph).items():
        pairs = [p for p in matched(a.graph, graph, similarity) if p.a in alive]
        wrong = [p for p in pairs if names.get(p.a, p.a) != p.b]
        # where another node is as alike to within rounding, either is right
        ties = sum(p.margin < 1e-3 for p in wrong)
        out[way] = {"of": len(pairs), "wrong": len(wrong) - ties, "ties": ties}
        out[way]["least"] = min(p.similarity for p in pairs)
    return out


# ---- the run ------------------------------------------------------------------------------------------------


def measure(name: str, folder: Path | None) -> dict[str, Any]:
    """All pairs of one room."""
    room = ROOMS[name]()
    networks = []
    for kind in room.kinds:
        for seed in range(room.seeds):
            networks.append(network(room, kind, seed, trained(room, name, kind, seed, folder)))
    n = len(networks)
    values: dict[str, dict[str, Float[np.ndarray, "n n"]]] = {}
    for i, j in combinations(range(n), 2):
        a, b = networks[i], networks[j]
        if len(room.kinds) > 1 and a.kind == b.kind:
            continue
        for way, row in compare(room, a, b, Stitches(room, a)):
            for figure, value in row.items():
                grid = values.setdefault(way, {}).setdefault(figure, np.full((n, n), np.nan))
                grid[i, j] = value
    return {
        "networks": [
            {"kind": x.kind, "seed": x.seed, "accuracy": room.accuracy(x.model), "roles": _counted(x.labels)}
            for x in networks
        ],
        "rows": {way: {figure: _summary(grid) for figure, grid in row.items()} for way, row in values.items()},
        "in_other_coordinates": copied(room, networks[0]),
    }


def _counted(labels: Labels) -> dict[str, int]:
    return {label: list(labels.values()).count(label) for label in sorted(set(labels.values()))}


def _summary(grid: Float[np.ndarray, "n n"]) -> dict[str, Any] | None:
    value, low, high = pair_interval(grid)
    if math.isnan(value):
        return None
    pairs = {f"{i}-{j}": float(grid[i, j]) for i, j in np.argwhere(~np.isnan(grid)).tolist()}
    return {"value": value, "low": low, "high": high, "pairs": pairs}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--networks", type=Path, help="keep trained networks there")
    parser.add_argument("--train-only", action="store_true", help="train what is not there yet, measure nothing")
    parser.add_argument("rooms", nargs="*", default=list(ROOMS))
    chosen = parser.parse_args()
    started = time.time()
    path = RESULTS / "universality.json"
    result = json.loads(path.read_text()) if path.exists() else {"rooms": {}}
    for name in chosen.rooms:
        if chosen.train_only:
            room = ROOMS[name]()
            for kind in room.kinds:
                for seed in range(room.seeds):
                    trained(room, name, kind, seed, chosen.networks)
            continue
        result["rooms"][name] = measure(name, chosen.networks)
        save("universality", result, started, "python -m benchmarks.universality")


if __name__ == "__main__":
    main()
