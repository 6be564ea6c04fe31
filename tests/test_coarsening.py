"""The order of questions against brute force over pairs of outputs, and what coarser ones need where that is known."""

from __future__ import annotations

import dataclasses
import math
from itertools import combinations, product

import pytest
import torch
from families import random_model
from oracles import naive_run

import unweave
from unweave.capture import capture
from unweave.circuits import distance
from unweave.coarsening import dimensions, join, lattice, meet, needs, refines, subset_by_quotient, what_it_needs
from unweave.compression import compress
from unweave.data import from_tensor
from unweave.errors import EmptyDataError, InputError, ShapeError, UnknownNameError
from unweave.scope import Quotient, Scope, position_mask
from unweave.zoo import ToyConfig, ToyTransformer

CLASS = Quotient(torch.tensor([0, 0, 1, 1]), ("low", "high"))
INNER = Quotient(torch.tensor([0, 1, 0, 1]), ("even", "odd"))
OF_CLASS = ("blocks.0.attn.head.0", "blocks.1.attn.head.0")
OF_INNER = ("blocks.0.attn.head.1", "blocks.1.attn.head.1")


@pytest.fixture(scope="module")
def halves():
    """Four heads, each with one bit of the tokens so far: two shift a class of outputs, two shift within classes.

    With d the shift of a class and e the shift within, the logits are (d + e, d - e, e - d, -d - e): the classes' log
    odds are 2 d whatever e is, and those of INNER are 2 e whatever d is.
    """
    model = ToyTransformer(ToyConfig(2, 2, 8, 1, 0, d_vocab=16, d_out=4, n_ctx=6))
    bits = torch.tensor([[1.0 if token >> k & 1 else -1.0 for k in range(4)] for token in range(16)])
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
        model.W_E[:, :4] = bits
        for layer, head in product(range(2), range(2)):
            bit = 2 * layer + head
            model.blocks[layer].W_V[head, bit, 0] = 1.0
            model.blocks[layer].W_O[head, 0, 4 + bit] = 1.5
            shift = [1.0, 1.0, -1.0, -1.0] if head == 0 else [1.0, -1.0, 1.0, -1.0]
            model.W_U[4 + bit] = torch.tensor(shift)
    return capture(model)


@pytest.fixture(scope="module")
def tokens():
    return from_tensor(torch.randint(16, (40, 6), generator=torch.Generator().manual_seed(0)))


# ---- partitions -----------------------------------------------------------------------------------------


def random_quotient(n, k, generator):
    classes = torch.randint(k, (n,), generator=generator)
    classes[:2] = torch.tensor([0, 1])
    return Quotient(classes, tuple(f"{k}.{i}" for i in range(k)))


def together(q):
    """Which outputs are one."""
    return q.classes[:, None] == q.classes[None]


def closure(relation):
    out = relation.clone()
    for k, i, j in product(range(len(out)), repeat=3):
        out[i, j] |= out[i, k] & out[k, j]
    return out


def test_join_and_meet_are_those_of_relations_between_outputs():
    generator, compared, refused = torch.Generator().manual_seed(0), 0, 0
    for n, k, m in product((4, 7), (2, 4, 6), (2, 5)):
        a, b = random_quotient(n, k, generator), random_quotient(n, m, generator)
        assert refines(a, b) == bool((together(b) | ~together(a)).all())
        both, chained = join(a, b), closure(together(a) | together(b))
        assert torch.equal(together(both), together(a) & together(b))
        assert refines(both, a)
        assert len(set(both.names)) == len(both.names) > int(both.classes.max())
        if bool(chained.all()):
            with pytest.raises(InputError, match="no question in common"):
                meet(a, b)
            refused += 1
            continue
        assert torch.equal(together(meet(a, b)), chained)
        assert refines(b, meet(a, b))
        compared += 1
    assert compared > 2
    assert refused > 2


def test_full_logits_are_the_top_and_coarsening_goes_down():
    four = Quotient(torch.arange(4), ("a", "b", "c", "d"))
    assert refines(None, CLASS)
    assert refines(four, None)
    assert not refines(CLASS, None)
    assert join(CLASS, INNER).is_identity
    assert join(four, CLASS) is four
    assert meet(four, CLASS) is CLASS
    assert join(CLASS, INNER).names == ("low & even", "low & odd", "high & even", "high & odd")
    with pytest.raises(InputError, match="no question in common"):
        meet(CLASS, INNER)
    for function in (refines, join, meet):
        with pytest.raises(ShapeError, match="4 and of 5"):
            function(CLASS, Quotient(torch.tensor([0, 1, 1, 1, 1]), ("a", "b")))


# ---- scopes ---------------------------------------------------------------------------------------------


def test_the_order_of_scopes_is_that_of_classes_and_positions(tokens):
    odd = torch.arange(6).remainder(2).bool().expand(40, 6)
    data = dataclasses.replace(tokens, labels={"odd": odd})
    positions = ("all", "last", (1, 3), (0, 1, -1), "odd")
    quotients = {"full": None, "class": CLASS, "inner": INNER}
    scopes = {f"{q} {p}": Scope(p, quotients[q]) for q, p in product(quotients, positions)}
    scopes |= {"reals": Scope(divergence="gaussian")}
    batch = next(data.batches(40))
    marks = {name: position_mask(scope, batch) for name, scope in scopes.items()}
    order = {
        (a, b)
        for a, b in product(scopes, scopes)
        if a != b
        and scopes[a].divergence == scopes[b].divergence
        and refines(scopes[a].quotient, scopes[b].quotient)
        and not bool((marks[b] & ~marks[a]).any())
    }
    assert set(lattice(scopes, data).pairs) == order
    assert ("full odd", "class last") in order  # five is odd, which only data can tell
    with pytest.raises(InputError, match="one scope under two names"):
        lattice(scopes | {"numbers": Scope((1, 3, -1))}, data)


def test_lines_of_the_diagram_join_neighbours_only(tokens):
    pairs = Quotient(torch.tensor([0, 0, 1, 2]), ("low", "two", "three"))
    scopes = {
        "class": Scope(quotient=CLASS),
        "class at the end": Scope("last", CLASS),
        "three classes": Scope(quotient=pairs),
        "end": Scope("last"),
        "all": Scope(),
        "reals": Scope(divergence="gaussian"),
    }
    claims = [("all", "class at the end"), ("end", "class at the end")]
    for data in (None, tokens):
        found = lattice(scopes, data, claims)
        names = list(found.scopes)
        assert set(names) == set(scopes)
        assert all(names.index(a) < names.index(b) for a, b in found.pairs)
        assert set(found.pairs) == {
            ("all", "three classes"),
            ("all", "class"),
            ("all", "end"),
            ("all", "class at the end"),
            ("three classes", "class"),
            ("three classes", "class at the end"),
            ("class", "class at the end"),
            ("end", "class at the end"),
        }
        between = {(a, b) for a, b in found.pairs if any({(a, c), (c, b)} <= set(found.pairs) for c in names)}
        assert set(found.steps) == set(found.pairs) - between
        assert found.above("all", "class")
        assert not found.above("class", "all")
        assert {row["scope"]: row["coarser"] for row in found.table()}["reals"] == []


def test_claims_that_do_not_hold_are_refused_with_the_reason(tokens):
    scopes = {"class": Scope(quotient=CLASS), "inner": Scope(quotient=INNER), "all": Scope(), "end": Scope("last")}
    cases = {
        ("class", "inner"): r"outputs 0 and 1 are both 'low' there, but 'even' and 'odd' here",
        ("class", "all"): "every output counts",
        ("end", "all"): "only data can tell",
        ("all", "all"): "they are the same",
    }
    for claim, match in cases.items():
        with pytest.raises(InputError, match=match):
            lattice(scopes, claims=[claim])
    with pytest.raises(InputError, match="positions of the data"):
        lattice(scopes, tokens, [("end", "all")])
    with pytest.raises(InputError, match="'gaussian'"):
        lattice({"a": Scope(), "b": Scope(divergence="gaussian")}, claims=[("a", "b")])
    with pytest.raises(UnknownNameError, match="class"):
        lattice(scopes, claims=[("all", "clas")])
    with pytest.raises(InputError, match="one scope under two names"):
        lattice({"a": Scope(), "b": Scope(quotient=Quotient(torch.arange(3), ("x", "y", "z")))})
    with pytest.raises(InputError, match="at least one"):
        lattice({})


# ---- what a question needs: a network where that is known -----------------------------------------------

QUESTIONS = {"class": Scope(quotient=CLASS), "logits": Scope(), "inner": Scope(quotient=INNER)}


def edges_of(*heads):
    return {text for head in heads for text in (f"embed->{head}.v", f"{head}->unembed.in")}


def test_edges_that_serve_distinctions_inside_a_class_drop_out(halves, tokens):
    graph = halves.quotient({"of the class": OF_CLASS, "inside": OF_INNER})
    found = what_it_needs(graph, tokens, QUESTIONS, 1e-3, claims=[("logits", "class")])
    assert list(found.needs) == ["logits", "class", "inner"]
    assert {str(e) for e in found.needs["logits"].edges} == edges_of(*OF_CLASS, *OF_INNER)
    assert {str(e) for e in found.needs["class"].edges} == edges_of(*OF_CLASS)
    assert {str(e) for e in found.needs["inner"].edges} == edges_of(*OF_INNER)
    down = {step.coarser: step for step in found.steps}
    assert set(down["class"].nodes) == set(OF_INNER)
    assert down["class"].modules == ("inside",)
    assert down["inner"].modules == ("of the class",)
    assert set(down["class"].edges) == edges_of(*OF_INNER)
    assert down["class"].new_edges == down["class"].new_nodes == ()
    assert down["class"].dimensions == {}
    assert found.violations == ()
    rows = {row["scope"]: row for row in found.table()}
    assert rows["class"]["size"] == 4
    assert set(rows["class"]["dropped_from"]["logits"]["nodes"]) == set(OF_INNER)
    assert all(need.nats <= 1e-3 for need in found.needs.values())


@pytest.fixture(scope="module")
def in_dimensions(halves, tokens):
    graph = halves.quotient({"of the class": OF_CLASS, "inside": OF_INNER})
    return what_it_needs(graph, tokens, QUESTIONS, 1e-3, "dimensions")


def test_dimensions_that_serve_distinctions_inside_a_class_drop_out(in_dimensions):
    found = in_dimensions
    by_scope = {name: [need.dimensions[h] for h in OF_CLASS + OF_INNER] for name, need in found.needs.items()}
    assert by_scope == {"logits": [1, 1, 1, 1], "class": [1, 1, 0, 0], "inner": [0, 0, 1, 1]}
    down = {step.coarser: step for step in found.steps}
    assert {
        name: change for name, change in down["class"].dimensions.items() if name in OF_CLASS + OF_INNER
    } == dict.fromkeys(OF_INNER, 1)
    assert down["class"].modules == ("inside",)
    assert set(down["inner"].nodes) == set(OF_CLASS)
    assert found.violations == ()
    # a layer's constant has 8 numbers, a head that reads and writes one direction of 8 has 8 + 8 - 1
    assert [found.needs[name].size for name in QUESTIONS] == [16 + 2 * 15, 16 + 4 * 15, 16 + 2 * 15]


def naive_nats(small, graph, batch, scope):
    """KL between classes, position by position, in float64."""
    a, b = (naive_run(g.to(dtype=torch.float64), batch.inputs)[0].softmax(-1) for g in (graph, small))
    mask, out = position_mask(scope, batch), torch.zeros(len(batch.inputs), dtype=torch.float64)
    classes = torch.arange(a.shape[-1]) if scope.quotient is None else scope.quotient.classes
    for n, t in mask.nonzero().tolist():
        for c in classes.unique():
            p, q = float(a[n, t, classes == c].sum()), float(b[n, t, classes == c].sum())
            out[n] += p * (math.log(p) - math.log(q))
    return float(out.sum() / mask.sum())


@pytest.mark.parametrize("by", ["edges", "dimensions"])
def test_errors_are_measured_on_held_out_data(halves, tokens, by):
    scope = Scope((1, -1), CLASS)
    train, held = tokens.split(0.5, seed=3)
    found = what_it_needs(halves, tokens, {"q": scope}, 0.02, by, seed=3, max_trials=30).needs["q"]
    for data, value in ((train, found.nats), (held, found.kl_nats.value)):
        truth = naive_nats(found.graph, halves, next(data.batches(64)), scope)
        assert math.isclose(value, truth, rel_tol=1e-3, abs_tol=1e-6)
    assert found.kl_nats.low <= found.kl_nats.value <= found.kl_nats.high
    assert (found.n_sequences, found.n_tokens) == (20, 40)
    assert found.nats <= 0.02
    again = what_it_needs(halves, train, {"q": scope}, 0.02, by, held_out=held, seed=3, max_trials=30).needs["q"]
    assert again.size == found.size
    assert math.isclose(again.kl_nats.value, found.kl_nats.value, rel_tol=1e-3, abs_tol=1e-6)


def test_subsets_and_quotients_compose(halves, tokens, tmp_path):
    """Where a bit never changes, its head writes a constant: it drops out besides what the question leaves out."""
    fixed = from_tensor(tokens.tokens.long() | 1)
    subsets = {"all": "all", "first bit is one": fixed}
    quotients = {"logits": None, "class": CLASS}
    rows = subset_by_quotient(halves, tokens, subsets, quotients, 1e-3, checkpoint=tmp_path / "kept")
    sizes = {(row["subset"], row["quotient"]): (row["edges"], row["parameters"]) for row in rows}
    assert sizes == {
        ("all", "logits"): (8, 16 + 4 * 15),
        ("all", "class"): (4, 16 + 2 * 15),
        ("first bit is one", "logits"): (6, 16 + 3 * 15),
        ("first bit is one", "class"): (2, 16 + 15),
    }
    assert [row["edges_share"] * halves.n_edges for row in rows] == [8, 4, 6, 2]
    assert all(row["edges_nats"]["value"] < 5e-3 and row["n_sequences"] == 20 for row in rows)
    assert list((tmp_path / "kept").iterdir()) == []
    again = subset_by_quotient(halves, tokens, {"all": "all"}, {"class": CLASS}, 1e-3, by=("edges",))
    assert again == [{k: v for k, v in rows[1].items() if not k.startswith("parameters")}]


def test_subsets_are_positions_filters_or_data(halves, tokens):
    ones = lambda batch: batch.inputs[:, 0] > 7  # noqa: E731
    ends = lambda batch: torch.arange(batch.inputs.shape[1]).expand_as(batch.inputs) > 3  # noqa: E731
    subsets = {"begins high": ones, "late": ends, "fourth": (3,)}
    rows = subset_by_quotient(halves, tokens, subsets, {"class": CLASS}, 1e-2, by=("dimensions",), seed=1)
    _, held = tokens.split(0.5, 1)
    counts = {row["subset"]: (row["n_sequences"], row["n_tokens"]) for row in rows}
    high = int((held.tokens[:, 0] > 7).sum())
    assert counts == {"begins high": (high, 6 * high), "late": (20, 40), "fourth": (20, 20)}
    assert not any("edges" in row for row in rows)


def test_a_killed_table_resumes(halves, tokens, tmp_path, monkeypatch):
    monkeypatch.setattr(distance, "SECONDS_BETWEEN_CHECKPOINTS", -1.0)
    measure, measured = distance.Distance.of_graph, []

    def counted(self, keep, limit=None):
        measured.append(keep)
        if limit is not None and len(measured) > limit:
            raise KeyboardInterrupt
        return measure(self, keep)

    options = {"kl_nats": 1e-3, "by": ("edges",)}
    monkeypatch.setattr(distance.Distance, "of_graph", counted)
    whole = subset_by_quotient(halves, tokens, {"all": "all"}, {"logits": None}, **options)
    needed, measured[:] = len(measured), []
    monkeypatch.setattr(distance.Distance, "of_graph", lambda self, keep: counted(self, keep, 6))
    with pytest.raises(KeyboardInterrupt):
        subset_by_quotient(halves, tokens, {"all": "all"}, {"logits": None}, checkpoint=tmp_path, **options)
    assert len(list(tmp_path.iterdir())) == 1
    measured[:] = []
    monkeypatch.setattr(distance.Distance, "of_graph", counted)
    again = subset_by_quotient(halves, tokens, {"all": "all"}, {"logits": None}, checkpoint=tmp_path, **options)
    assert again == whole
    assert len(measured) == needed - 6
    assert list(tmp_path.iterdir()) == []


# ---- other networks -------------------------------------------------------------------------------------


def test_coarser_questions_need_fewer_dimensions_of_the_induction_model(induction):
    data = unweave.load_data("zoo:induction", limit=32)
    eight = Quotient(torch.arange(48) // 6, tuple(f"of {i}" for i in range(8)))
    half = eight.coarsen(lambda name: "low" if int(name[-1]) < 4 else "high")
    scopes = {"half": Scope("answered", half), "eighth": Scope("answered", eight), "token": Scope("answered")}
    found = what_it_needs(induction, data, scopes, 0.05, "dimensions", claims=[("token", "eighth"), ("eighth", "half")])
    sizes = [found.needs[name].size for name in ("token", "eighth", "half")]
    assert sizes[2] < min(sizes[:2])
    assert found.lattice.steps == (("token", "eighth"), ("eighth", "half"))
    against = {(a, b) for a, b in found.lattice.pairs if found.needs[b].size > found.needs[a].size}
    assert {(v.finer, v.coarser) for v in found.violations if v.proven} == against
    for step in found.steps:
        finer, coarser = (found.needs[name].dimensions for name in (step.finer, step.coarser))
        assert step.dimensions == {n: finer[n] - coarser[n] for n in finer if finer[n] != coarser[n]}
    held = data.split(0.5, 0)[1]
    for name, need in found.needs.items():
        row = unweave.evaluate({"small": need.graph}, induction, held, scopes[name])["small"]
        assert math.isclose(row.kl_nats.value, need.kl_nats.value, rel_tol=1e-4)


def test_dimensions_are_the_ranks_of_what_is_stored(induction, induction_data):
    llama = capture(random_model("llama"), verify=False)
    data = from_tensor(torch.randint(50, (16, 8), generator=torch.Generator().manual_seed(0)))
    for graph in (induction, compress(induction, induction_data, size=0.4), llama, compress(llama, data, size=0.5)):
        found = dimensions(graph)
        for s in graph.channels:
            stage = graph.stages[s]
            write = stage.write.dense().split(list(stage.code_widths), 1)
            for i, node in enumerate(stage.nodes):
                assert found[node] == (int(torch.linalg.matrix_rank(write[i])) if write[i].numel() else 0)
                for port in stage.ports:
                    blocks = [
                        r.map.dense().split(list(r.widths))[i * len(r.widths) // len(stage.nodes)] for r in port.reads
                    ]
                    whole = torch.cat(blocks)
                    assert found[f"{node}.{port.name}"] == (
                        int(torch.linalg.matrix_rank(whole)) if whole.numel() else 0
                    )


def test_sizes_against_the_order_are_reported(in_dimensions, tokens):
    order = lattice(QUESTIONS | {"end": Scope("last", CLASS)}, tokens)
    kinds = {**in_dimensions.needs, "end": in_dimensions.needs["class"]}
    assert needs._violations(order, tokens, kinds) == ()
    sizes = {"logits": 5, "class": 6, "inner": 5, "end": 7}
    found = {name: dataclasses.replace(need, size=sizes[name]) for name, need in kinds.items()}
    seen = {(v.finer, v.coarser): (v.sizes, v.proven) for v in needs._violations(order, tokens, found)}
    assert seen == {
        ("logits", "class"): ((5, 6), True),
        ("logits", "end"): ((5, 7), False),
        ("class", "end"): ((6, 7), False),
    }


def test_nonsense_is_refused(halves, tokens):
    with pytest.raises(InputError, match="edges, dimensions"):
        what_it_needs(halves, tokens, QUESTIONS, by="neurons")
    with pytest.raises(InputError, match="kl_nats must be a positive number"):
        what_it_needs(halves, tokens, QUESTIONS, 0.0)
    with pytest.raises(InputError, match="is not coarser"):
        what_it_needs(halves, tokens, QUESTIONS, claims=[("class", "inner")])
    with pytest.raises(EmptyDataError, match="select nothing"):
        what_it_needs(halves, tokens, {"none": Scope(lambda b: torch.zeros_like(b.mask))})
    for subsets, quotients in (({}, {"all": None}), ({"all": "all"}, {})):
        with pytest.raises(InputError, match="at least one subset"):
            subset_by_quotient(halves, tokens, subsets, quotients)
    with pytest.raises(InputError, match="by must be some of"):
        subset_by_quotient(halves, tokens, {"all": "all"}, {"all": None}, by=("size",))
    with pytest.raises(EmptyDataError, match="'nobody' holds no sequence of the calibration data"):
        subset_by_quotient(halves, tokens, {"nobody": lambda b: b.inputs[:, 0] > 99}, {"all": None})
    with pytest.raises(ShapeError, match="must mark sequences"):
        subset_by_quotient(halves, tokens, {"odd": lambda b: torch.ones(())}, {"all": None})
    with pytest.raises(ShapeError, match="of this model"):
        what_it_needs(halves, tokens, {"five": Scope(quotient=Quotient(torch.arange(5) % 2, ("a", "b")))})


def test_the_order_of_pairs_does_not_depend_on_the_order_given():
    scopes = {"class": Scope(quotient=CLASS), "inner": Scope(quotient=INNER), "all": Scope()}
    pairs = {
        frozenset(lattice(dict(order)).pairs)
        for order in combinations([*scopes.items()] * 2, 3)
        if len(dict(order)) == 3
    }
    assert pairs == {frozenset({("all", "class"), ("all", "inner")})}
