"""Hypotheses against loops over pairs and positions; programs that networks are known to run; subspaces built in."""

from __future__ import annotations

import dataclasses
import json
import math

import pytest
import torch
from families import random_model

import unweave
from unweave.data import from_tensor
from unweave.errors import EmptyDataError, InputError, ShapeError, UnknownNameError
from unweave.execution import run
from unweave.hypotheses import CausalModel, Location, find_alignment, interchange_accuracy, one_at_random
from unweave.hypotheses.alignment import Swap, locations_of, match_positions
from unweave.hypotheses.interchange import Tally
from unweave.hypotheses.pairs import Answers, draw_pairs
from unweave.hypotheses.search import redrawn, search_places
from unweave.zoo import ToyConfig, ToyTransformer
from unweave.zoo.tracr import tracr_examples

LAST = unweave.Scope(positions="last")
HEAD = "blocks.0.attn.head.0"


def padded(n=12, longest=6, vocabulary=5, seed=0):
    g = torch.Generator().manual_seed(seed)
    lengths = torch.randint(2, longest + 1, (n,), generator=g)
    lengths[0] = longest
    return from_tensor(torch.randint(vocabulary, (n, longest), generator=g), torch.arange(longest) < lengths[:, None])


def one_batch(data):
    return next(data.batches(len(data)))


# ---- causal models --------------------------------------------------------------------------------------

COUNTS = CausalModel(
    {
        "answer": lambda same, total: [
            None if t % 2 else s + t for s, t in zip(same, [total] * len(same), strict=True)
        ],
        "same": lambda tokens: [tokens.count(t) for t in tokens],
        "total": lambda tokens, mask: sum(tokens) + len(mask),
    },
    "answer",
    per_example=True,
)


def test_per_example_values_are_those_of_the_functions_and_padding_is_left_out():
    data = padded()
    values = COUNTS.run(data.tokens, data.mask)
    assert COUNTS.order[-1] == "answer"
    for i, n in enumerate(data.lengths.tolist()):
        tokens = data.tokens[i, :n].tolist()
        total = sum(tokens) + n
        assert values["same"][i, :n].tolist() == [tokens.count(t) for t in tokens]
        assert values["total"][i] == total
        assert values["answer"][i, :n].tolist() == [-1 if total % 2 else tokens.count(t) + total for t in tokens]


def test_interchange_is_the_program_with_a_variable_from_elsewhere():
    data = padded()
    base, source = data.select(slice(0, 6)), data.select(slice(6, 12))
    got = COUNTS.interchange(base.tokens, source.tokens, ["same", "total"], base.mask, source.mask)["answer"]
    for i, (n, m) in enumerate(zip(base.lengths.tolist(), source.lengths.tolist(), strict=True)):
        b, s = base.tokens[i, :n].tolist(), source.tokens[i, :m].tolist()
        total = sum(s) + m
        same = [s.count(s[t]) if t < m else b.count(b[t]) for t in range(n)]
        assert got[i, :n].tolist() == [-1 if total % 2 else x + total for x in same]


def test_whole_batches_and_single_examples_give_the_same():
    per_batch = CausalModel({"mean": lambda tokens: tokens.float().mean(1), "out": lambda mean: mean * 2}, "out")
    single = CausalModel(
        {"mean": lambda tokens: sum(tokens) / len(tokens), "out": lambda mean: mean * 2}, "out", per_example=True
    )
    tokens = torch.randint(9, (5, 4))
    assert torch.allclose(per_batch.run(tokens)["out"], single.run(tokens)["out"])
    assert single.run(tokens)["out"].is_floating_point()


def test_a_set_variable_reaches_only_what_depends_on_it():
    model = CausalModel({"a": lambda tokens: tokens[:, 0], "b": lambda a: a + 1, "c": lambda tokens: tokens[:, 1]}, "b")
    values = model.intervene(torch.tensor([[1, 2]]), {"a": lambda a: a + 10})
    assert {name: v.tolist() for name, v in values.items()} == {"a": [11], "b": [12], "c": [2]}


@pytest.mark.parametrize(
    ("variables", "output", "error", "match"),
    [
        ({"a": lambda b: b, "b": lambda a: a}, "a", InputError, "cycle: (a -> b -> a|b -> a -> b)"),
        ({"a": lambda tokns: tokns}, "a", UnknownNameError, "closest: tokens"),
        ({"a": lambda tokens: tokens}, "b", UnknownNameError, "'b'"),
        ({"tokens": lambda mask: mask}, "tokens", InputError, "another name"),
        ({"a": lambda *tokens: tokens}, "a", InputError, "name its parents"),
    ],
)
def test_programs_that_cannot_run_are_refused(variables, output, error, match):
    with pytest.raises(error, match=match):
        CausalModel(variables, output)


@pytest.mark.parametrize(
    ("function", "per_example", "match"),
    [
        (lambda tokens: tokens[:, :1], False, r"\[batch\] or \[batch pos\]"),
        (lambda tokens: 3, False, "per_example=True"),
        (lambda tokens: tokens[:1], True, "one value per token: 3, got 1"),
        (lambda tokens: "word", True, "number its values"),
        (lambda tokens: tokens if tokens[0] else 1, True, "a list on some"),
    ],
)
def test_values_of_the_wrong_shape_are_refused(function, per_example, match):
    model = CausalModel({"a": function}, "a", per_example=per_example)
    with pytest.raises(ShapeError, match=match):
        model.run(torch.tensor([[1, 2, 3], [0, 1, 2]]))


def test_unknown_variables_are_refused():
    tokens = torch.ones(1, 2, dtype=torch.long)
    with pytest.raises(UnknownNameError, match="closest: same"):
        COUNTS.interchange(tokens, tokens, ["sam"])


# ---- positions and locations --------------------------------------------------------------------------------


@pytest.mark.parametrize("positions", ["all", "last", (0, -1), lambda b: b.inputs % 2 == 0])
def test_the_ith_marked_position_gets_the_ith_of_the_source(positions):
    data = padded(20)
    base, source = one_batch(data.select(slice(0, 10))), one_batch(data.select(slice(10, 20)))

    def marked(batch, row):
        n = int(batch.mask[row].sum())
        if callable(positions):
            return [t for t in range(n) if batch.inputs[row, t] % 2 == 0]
        named = {"all": range(n), "last": [n - 1]}.get(positions) if isinstance(positions, str) else None
        return list(named) if named is not None else sorted({t % n for t in positions})

    swap = match_positions(positions, base, source)
    values = {
        shape: (torch.randn(len(base.mask), *wide[0]), torch.randn(len(base.mask), *wide[1]))
        for shape, wide in {
            "sequence": ((), ()),
            "position": (base.mask.shape[1:], source.mask.shape[1:]),
            "vector": ((base.mask.shape[1], 3), (source.mask.shape[1], 3)),
        }.items()
    }
    for shape, (value, given) in values.items():
        expected = value.clone()
        for row in range(len(base.mask)):
            pairs = list(zip(marked(base, row), marked(source, row), strict=False))
            if shape == "sequence" and pairs:
                expected[row] = given[row]
            for to, from_ in pairs if shape != "sequence" else ():
                expected[row, to] = given[row, from_]
        assert torch.equal(swap.apply(value, given), expected)


def test_one_position_is_drawn_whatever_the_batch():
    data = padded(30)
    marks = one_at_random(seed=3)
    whole = one_batch(data)
    assert marks(whole).sum(1).tolist() == [1] * 30
    assert not bool((marks(whole) & ~whole.mask).any())
    parts = [marks(b).nonzero()[:, 1] for b in data.batches(7)]
    assert torch.equal(torch.cat(parts), marks(whole).nonzero()[:, 1])
    assert len(set(marks(whole).nonzero()[:, 1].tolist())) > 3
    assert not torch.equal(one_at_random(seed=4)(whole), marks(whole))


def test_a_subspace_is_swapped_and_the_rest_stays():
    basis = torch.linalg.qr(torch.randn(6, 2)).Q
    value, source = torch.randn(1, 3, 6), torch.randn(1, 3, 6)
    swap = Swap(torch.tensor([[True, False, True]]), torch.tensor([[0, 1, 2]]))
    got = Location("embed", basis).patch(swap, source)(value).double()
    rest = torch.eye(6).double() - basis.double() @ basis.double().T
    assert torch.allclose(got[:, [0, 2]] @ basis.double(), (source @ basis).double()[:, [0, 2]], atol=1e-6)
    assert torch.allclose(got @ rest, value.double() @ rest, atol=1e-6)
    assert torch.equal(got[:, 1], value[:, 1].double())


def test_unusable_sites_are_refused():
    with pytest.raises(InputError, match="not orthonormal"):
        Location("embed", torch.ones(4, 2))
    with pytest.raises(ShapeError, match="1 <= k <= d"):
        Location("embed", torch.eye(3)[:2])
    with pytest.raises(InputError, match=r"\.pattern"):
        Location(f"{HEAD}.pattern")
    with pytest.raises(InputError, match="at least one location"):
        locations_of([])
    with pytest.raises(InputError, match="same positions"):
        locations_of([Location("embed"), Location("pos_embed", positions="last")])


# ---- the residual stream as a place ---------------------------------------------------------------------


def stream_by_hand(graph, tokens, node):
    """The sum of what all nodes before write, and the biases of their stages."""
    stage, _ = graph.find(node)
    before = graph.stages[slice(*stage.visible)]
    nodes = [n for s in before for n in s.nodes]
    values = run(graph, tokens, record=nodes).values
    total = sum(values[n].double() for n in nodes)
    return total + sum(s.bias.double() for s in before if s.bias is not None), nodes, values


@pytest.mark.parametrize("family", ["gpt2", "gpt_neox", "gemma2"])
@pytest.mark.parametrize(
    ("node", "cut"),
    [("blocks.0.mlp", True), ("blocks.1.attn.head.1", False), ("blocks.1.mlp", True), ("unembed", False)],
)
def test_the_stream_before_a_node_is_what_was_written(family, node, cut):
    graph = unweave.capture(random_model(family))
    tokens, other = torch.randint(0, 40, (2, 3, 7))
    if cut:
        keep = graph.edge_matrix & (torch.rand(graph.edge_matrix.shape) < 0.8)
        graph = graph.restrict(keep, ablation="zero")
    stream, _, _ = stream_by_hand(graph, tokens, node)
    name = f"before {node}"
    assert torch.allclose(run(graph, tokens, record=[name]).values[name].double(), stream, atol=1e-4)
    if cut:
        with pytest.raises(InputError, match="patch ports"):
            run(graph, tokens, patch={name: lambda v: v})


@pytest.mark.parametrize("node", ["blocks.0.mlp", "blocks.1.attn.head.1", "unembed"])
def test_patching_the_stream_is_patching_all_that_wrote_it(node):
    graph = unweave.capture(random_model("gpt2"))
    tokens, other = torch.randint(0, 40, (2, 3, 7))
    _, nodes, values = stream_by_hand(graph, other, node)
    name = f"before {node}"
    source = run(graph, other, record=[name]).values[name]
    got = run(graph, tokens, patch={name: source}).logits
    expected = run(graph, tokens, patch={n: values[n] for n in nodes}).logits
    assert torch.allclose(got, expected, atol=1e-4)
    assert not torch.allclose(got, run(graph, tokens).logits, atol=1e-2)


def test_there_is_no_stream_before_the_first_stage(induction):
    with pytest.raises(UnknownNameError, match="before embed"):
        run(induction, torch.tensor([[1, 2]]), record=["before embed"])


# ---- interchange-intervention accuracy ------------------------------------------------------------------

SMALL = ToyConfig(2, 2, 12, 4, 16, d_vocab=5, d_out=7, n_ctx=6)
STEPS = CausalModel(
    {
        "here": lambda tokens: tokens,
        "first": lambda tokens: tokens[:, 0],
        "sum": lambda here, first: (here + first[:, None]) % 7,
        "out": lambda sum, mask: torch.where(mask & (sum != 3), sum, -1),
    },
    "out",
)


def plain_counts(graph, data, pairs, variable, location, scope_positions):
    """Effective, right, nats, unchanged, right: pair after pair, position after position."""
    counts = [0, 0, 0.0, 0, 0]
    for i in range(len(pairs)):
        b, s = pairs.base, pairs.sources[variable]
        n, m = int(b.mask[i].sum()), int(s.mask[i].sum())
        base, source = b.tokens[i : i + 1, :n].long(), s.tokens[i : i + 1, :m].long()
        there = run(graph, source, record=[location.place]).values[location.place].double()
        both = min(n, m)

        def mixed(value, there=there, both=both):
            new = value.double().clone()
            basis = torch.eye(new.shape[-1]).double() if location.basis is None else location.basis.double()
            for t in range(both):
                new[0, t] += basis @ (basis.T @ (there[0, t] - new[0, t]))
            return new.float()

        log_probs = run(graph, base, patch={location.place: mixed}).logits[0].double().log_softmax(-1)
        x, y = base[0].tolist(), source[0].tolist()
        plain = [(t + x[0]) % 7 for t in x]
        here = [y[t] if t < both and variable == "here" else x[t] for t in range(n)]
        first = y[0] if variable == "first" else x[0]
        new = [(t + first) % 7 for t in here]
        for t in scope_positions(n):
            if plain[t] == 3 or new[t] == 3:
                continue
            right = int(log_probs[t].argmax()) == new[t]
            if plain[t] != new[t]:
                counts[0], counts[1], counts[2] = (
                    counts[0] + 1,
                    counts[1] + right,
                    counts[2] - float(log_probs[t][new[t]]),
                )
            else:
                counts[3], counts[4] = counts[3] + 1, counts[4] + right
    return counts


@pytest.mark.parametrize(
    ("variable", "place", "subspace"),
    [
        ("here", "embed", False),
        ("first", "blocks.0.mlp", True),
        ("here", "blocks.1.attn.head.1.code", True),
        ("first", "blocks.1.attn.head.0.k", False),
        ("here", "before blocks.1.mlp", False),
        ("first", "before blocks.1.attn.head.0", True),
    ],
)
def test_accuracy_is_a_loop_over_pairs_and_positions(variable, place, subspace):
    graph, data = unweave.capture(ToyTransformer(SMALL).eval()), padded(14)
    width = 4 if place.endswith("code") else 12
    location = Location(place, torch.linalg.qr(torch.randn(width, 3)).Q if subspace else None)
    scope, plain_scope = (LAST, lambda n: [n - 1]) if subspace else (unweave.Scope(), range)
    found = interchange_accuracy(graph, STEPS, {variable: location}, data, scope, n_pairs=20, batch_size=8, seed=5)
    expected = plain_counts(graph, data, draw_pairs(data, [variable], 20, 5), variable, location, plain_scope)
    got = found.accuracy[variable]
    assert (got.n_effective, got.n_unchanged) == (expected[0], expected[3])
    assert expected[0] > 0
    assert got.effective.value == pytest.approx(expected[1] / expected[0])
    assert got.nats.value == pytest.approx(expected[2] / expected[0], rel=1e-4)
    if expected[3]:
        assert got.unchanged.value == pytest.approx(expected[4] / expected[3])


def test_pairs_are_of_different_sequences_and_use_bases_equally():
    data = padded(10)
    pairs = draw_pairs(data, ["a", "b"], 25, seed=1)
    assert sorted(pairs.rows.bincount().tolist()) == [2] * 5 + [3] * 5
    numbered = dataclasses.replace(data, labels={"row": torch.arange(10)})
    again = draw_pairs(numbered, ["a", "b"], 25, seed=1)
    for part in (again.sources, again.others):
        assert all(not bool((d.labels["row"] == again.rows).any()) for d in part.values())
    assert not torch.equal(again.sources["a"].labels["row"], again.sources["b"].labels["row"])


def test_pairs_that_share_a_base_are_resampled_together():
    data = padded(2)
    pairs = draw_pairs(data, ["a"], 40)
    tally = Tally()
    right = (pairs.rows == 0).double()
    tally.rows.append(torch.stack([torch.ones(40), right, right, torch.zeros(40), torch.zeros(40)], 1).double())
    got = tally.accuracy(pairs)
    assert got.effective == (0.5, 0.0, 1.0)
    assert (got.n_effective, got.n_unchanged) == (40, 0)
    assert math.isnan(got.unchanged.value)


SUM = CausalModel(
    {"a": lambda tokens: tokens[:, 0], "sum": lambda a, tokens: (a + tokens[:, 1]) % 113, "out": lambda sum: sum}, "out"
)
AT_END = Location("blocks.0.mlp", positions="last")


def addition(limit=128):
    return unweave.capture("zoo:modular_addition"), unweave.load_data("zoo:modular_addition", limit=limit)


def test_modular_addition_holds_the_sum_in_its_mlp_and_a_wrong_program_fails():
    graph, data = addition()
    alignment = {"sum": AT_END, "a": Location("embed", positions=(0,))}
    found = interchange_accuracy(graph, SUM, alignment, data, LAST, n_random=2)
    assert found.agreement.value > 0.99
    assert list(found.accuracy) == ["sum", "a", "sum + a"]
    assert found.accuracy["sum"].effective.value > 0.99
    assert found.accuracy["a"].effective.value > 0.99
    for row in found.table():
        assert row["mislabelled"] < 0.1
        assert row["elsewhere"] < 0.3
    difference = CausalModel({**SUM.variables, "sum": lambda a, tokens: (a - tokens[:, 1]) % 113}, "out")
    wrong = interchange_accuracy(graph, difference, {"sum": AT_END}, data, LAST, n_random=0)
    assert wrong.accuracy["sum"].effective.value < 0.1
    # a right program, but the variable is not there
    misplaced = interchange_accuracy(graph, SUM, {"sum": Location("embed", positions=(0,))}, data, LAST, n_random=0)
    assert misplaced.accuracy["sum"].effective.value < 0.1


def test_several_variables_each_have_a_source_of_their_own():
    graph, data = addition(64)
    both = {"a": Location("embed", positions=(0,)), "b": Location("embed", positions=(1,))}
    model = CausalModel(
        {"a": lambda tokens: tokens[:, 0], "b": lambda tokens: tokens[:, 1], "out": lambda a, b: (a + b) % 113}, "out"
    )
    found = interchange_accuracy(graph, model, both, data, LAST, together=[("a", "b")], n_random=0)
    assert list(found.accuracy) == ["a + b"]
    assert found.accuracy["a + b"].effective.value > 0.99
    assert math.isnan(found.table()[0]["elsewhere"])


def test_answers_outside_the_scope_do_not_count():
    graph, data = addition(16)
    junk = CausalModel(
        {**SUM.variables, "out": lambda sum, tokens: torch.where(tokens == 113, sum[:, None], 9999)}, "out"
    )
    alignment = {"sum": AT_END}
    found, same = (interchange_accuracy(graph, m, alignment, data, LAST, n_random=0) for m in (junk, SUM))
    assert found.accuracy["sum"].nats == same.accuracy["sum"].nats
    assert found.accuracy["sum"].n_effective == same.accuracy["sum"].n_effective > 0


def test_answers_may_be_classes_of_a_quotient():
    graph, data = addition(64)
    parity = unweave.Scope(positions="last", quotient=unweave.Quotient(torch.arange(113) % 2, ("even", "odd")))
    model = CausalModel({"sum": SUM.variables["sum"], "a": SUM.variables["a"], "odd": lambda sum: sum % 2}, "odd")
    found = interchange_accuracy(graph, model, {"sum": AT_END}, data, parity).accuracy["sum"]
    assert found.effective.value > 0.99
    assert found.n_effective + found.n_unchanged == 64
    assert found.n_unchanged > 10


def previous_token(tokens):
    return torch.cat([torch.full_like(tokens[:, :1], -1), tokens[:, :-1]], dim=1)


def what_followed(tokens, previous):
    """The token that stands where the current one was the previous; -1 where several do, or none."""
    n = tokens.shape[1]
    match = (previous[:, None] == tokens[:, :, None]) & torch.ones(n, n, dtype=torch.bool).tril()
    said = (match.float() @ torch.nn.functional.one_hot(tokens, 48).float()) > 0
    return torch.where(said.sum(-1) == 1, said.int().argmax(-1), -1)


INDUCTION = CausalModel({"previous": previous_token, "next": what_followed}, "next")


def test_the_previous_token_head_writes_the_previous_token(induction):
    data = unweave.load_data("zoo:induction", limit=96)
    found = interchange_accuracy(induction, INDUCTION, {"previous": HEAD}, data, n_random=0).table()[0]
    assert found["n_effective"] > 300
    assert found["iia"] > 0.95
    assert found["mislabelled"] < 0.1
    for place in ("blocks.0.attn.head.1", "blocks.1.attn.head.0", "embed"):
        other = interchange_accuracy(induction, INDUCTION, {"previous": place}, data, n_random=0)
        assert other.accuracy["previous"].effective.value < 0.15, place
    chance = interchange_accuracy(redrawn(induction), INDUCTION, {"previous": HEAD}, data, n_random=0)
    assert chance.accuracy["previous"].effective.value < 0.15
    current = CausalModel({"previous": lambda tokens: tokens, "next": what_followed}, "next")
    wrong = interchange_accuracy(induction, current, {"previous": HEAD}, data, n_random=0)
    assert wrong.accuracy["previous"].effective.value < 0.15


def test_reduced_precision_swaps_the_same():
    graph = unweave.capture(random_model("llama", torch.bfloat16))
    tokens = torch.randint(0, 40, (8, 6))
    model = CausalModel({"here": lambda tokens: tokens}, "here")
    whole, rotated = (
        interchange_accuracy(graph, model, {"here": Location("embed", basis)}, from_tensor(tokens), n_random=0)
        for basis in (None, torch.linalg.qr(torch.randn(graph.stages[0].write.d_out, graph.stages[0].write.d_out)).Q)
    )
    assert rotated.accuracy["here"].nats.value == pytest.approx(whole.accuracy["here"].nats.value, rel=0.02)


def test_bad_alignments_and_answers_are_refused(induction, induction_data):
    def accuracy(model=INDUCTION, alignment=None, **options):
        return interchange_accuracy(induction, model, alignment or {"previous": HEAD}, induction_data, **options)

    with pytest.raises(InputError, match="alignment is empty"):
        interchange_accuracy(induction, INDUCTION, {}, induction_data)
    with pytest.raises(UnknownNameError, match="previous"):
        accuracy(alignment={"previos": HEAD})
    with pytest.raises(UnknownNameError, match="blocks.0.attn.head.0"):
        accuracy(alignment={"previous": "blocks.0.attn.heda.0"})
    with pytest.raises(ShapeError, match="64 coordinates and its basis 5"):
        accuracy(alignment={"previous": Location(HEAD, torch.eye(5))})
    with pytest.raises(UnknownNameError, match="aligned variable"):
        accuracy(together=[("next",)])
    with pytest.raises(InputError, match="empty one"):
        accuracy(together=[()])
    with pytest.raises(InputError, match="n_pairs at least 1"):
        accuracy(n_pairs=0)
    with pytest.raises(InputError, match="answers with reals"):
        accuracy(CausalModel({"previous": previous_token, "next": lambda previous: previous.float()}, "next"))
    with pytest.raises(InputError, match="outside the 48 outputs"):
        accuracy(CausalModel({"previous": previous_token, "next": lambda previous: previous + 48}, "next"))
    with pytest.raises(EmptyDataError, match="no position"):
        accuracy(CausalModel({"previous": previous_token, "next": lambda previous: previous * 0 - 1}, "next"))
    with pytest.raises(InputError, match="hear another input"):
        cut = induction.restrict(induction.edge_matrix & False, ablation="resample")
        interchange_accuracy(cut, INDUCTION, {"previous": HEAD}, induction_data)


def test_reals_are_compared_within_a_tolerance():
    answers = Answers(unweave.Scope(), 0.1)
    logits = torch.tensor([[[1.0], [2.0], [3.0]]])
    right, nats = answers.compare(logits, torch.tensor([[1.05, 2.5, math.nan]]))
    assert right[0, :2].tolist() == [True, False]
    assert nats[0, :2].tolist() == pytest.approx([0.05**2 / 2, 0.125], rel=1e-4)
    assert answers.given(torch.tensor([[1.05, 2.5, math.nan]]))[0].tolist() == [True, True, False]


# ---- programs compiled by tracr -------------------------------------------------------------------------


def compiled(shared, name):
    folder = shared / "models" / "tracr" / name
    tokens, mask, _ = tracr_examples(folder)
    config = json.loads((folder / "config.json").read_text())
    return unweave.capture(folder), from_tensor(tokens, mask), config


def running_mean(x):
    return [None] + [sum(x[1 : i + 1]) / i for i in range(1, len(x))]


def fraction(letter):
    return CausalModel(
        {"is_a": lambda tokens: [int(t == letter) for t in tokens], "fraction": lambda is_a: running_mean(is_a)},
        "fraction",
        per_example=True,
    )


def test_frac_prevs_runs_its_own_program(shared):
    graph, data, config = compiled(shared, "frac_prevs")
    alignment = {"is_a": "blocks.0.mlp", "fraction": "blocks.1.attn.head.0"}
    right = interchange_accuracy(graph, fraction(config["tokens"].index("a")), alignment, data)
    assert right.agreement.value == 1.0
    for accuracy in right.accuracy.values():
        assert accuracy.effective == (1.0, 1.0, 1.0)
        assert accuracy.unchanged.value == 1.0
        assert accuracy.n_effective > 300
    wrong = interchange_accuracy(graph, fraction(config["tokens"].index("b")), alignment, data, n_random=0)
    assert all(accuracy.effective.value < 0.5 for accuracy in wrong.accuracy.values())
    # the value means the same at every position
    moved = {"is_a": Location("blocks.0.mlp", positions=one_at_random())}
    one = interchange_accuracy(graph, fraction(config["tokens"].index("a")), moved, data, n_random=0)
    assert one.accuracy["is_a"].effective.value == 1.0
    assert one.accuracy["is_a"].n_effective > 50


def backwards(tokens, place, ids):
    n = len(tokens) - 1
    return [None] + [ids[tokens[1 + p]] if 0 <= p < n else None for p in place[1:]]


def test_reverse_runs_its_own_program(shared):
    graph, data, config = compiled(shared, "reverse")
    ids = {i: config["outputs"].index(t) if t in config["outputs"] else None for i, t in enumerate(config["tokens"])}
    variables = {
        "length": lambda tokens: [len(tokens) - 1] * len(tokens),
        "opposite": lambda length: [0] + [n - i for i, n in enumerate(length[1:])],
        "place": lambda opposite: [p - 1 for p in opposite],
        "reverse": lambda tokens, place: backwards(tokens, place, ids),
    }
    model = CausalModel(variables, "reverse", per_example=True)
    alignment = {
        "length": "blocks.0.mlp",
        "opposite": "blocks.1.mlp",
        "place": "blocks.2.mlp",
        "reverse": "blocks.3.attn.head.0",
    }
    right = interchange_accuracy(graph, model, alignment, data, n_random=0)
    assert right.agreement.value == 1.0
    assert all(a.effective.value == 1.0 and a.n_effective > 200 for a in right.accuracy.values())
    # it answers alike, but its second step does not use the first: nothing changes when the length does
    loose = CausalModel({**variables, "opposite": lambda tokens: list(range(len(tokens), 0, -1))}, "reverse", True)
    wrong = interchange_accuracy(graph, loose, {"length": "blocks.0.mlp"}, data, n_random=0)
    assert wrong.accuracy["length"].unchanged.value < 0.9
    # carried to another position, the length stays right and the opposite place does not
    one = one_at_random(among=tuple(range(1, 7)))
    for place, right in (("blocks.0.mlp", True), ("blocks.1.mlp", False)):
        moved = interchange_accuracy(graph, model, {"length": Location(place, positions=one)}, data, n_random=0)
        assert (moved.accuracy["length"].effective.value == 1.0) is right
        assert moved.accuracy["length"].n_effective > 20


BALANCE = {
    "open": lambda tokens: [int(t == 0) for t in tokens],
    "close": lambda tokens: [int(t == 1) for t in tokens],
    "opens": lambda open: running_mean(open),
    "closes": lambda close: running_mean(close),
    "balance": lambda opens, closes: [None if a is None else a - b for a, b in zip(opens, closes, strict=True)],
}


def test_pair_balance_keeps_two_variables_in_one_mlp_and_the_search_finds_each(shared):
    graph, data, config = compiled(shared, "pair_balance")
    labels = config["residual_labels"]
    assert config["tokens"][:2] == ["(", ")"]
    axes = {n: torch.eye(len(labels))[:, [labels.index(f"bools_{n}")]] for n in ("open_33", "close_35")}
    model = CausalModel(BALANCE, "balance", per_example=True)
    alignment = {"open": Location("blocks.0.mlp", axes["open_33"]), "close": Location("blocks.0.mlp", axes["close_35"])}
    data = data.select(slice(0, 128))
    found = interchange_accuracy(graph, model, alignment, data, n_random=2)
    assert found.agreement.value == 1.0
    assert all(a.effective.value == 1.0 for a in found.accuracy.values())
    assert all(row["elsewhere"] < 0.2 for row in found.table())
    swapped = {"open": alignment["close"], "close": alignment["open"]}
    assert interchange_accuracy(graph, model, swapped, data, n_random=0).accuracy["open"].effective.value < 0.5
    options = {"k": 1, "n_pairs": 64, "batch_size": 64, "steps": 80, "places": ["blocks.0.mlp"]}
    search = find_alignment(graph, model, "open", data, **options)
    assert search.best.location.place == "blocks.0.mlp"
    assert search.best.accuracy.effective.value > 0.99
    assert abs(float(search.best.location.basis[:, 0] @ axes["open_33"][:, 0])) > 0.999
    assert search.mislabelled[0].accuracy.effective.value < 0.2
    assert search.random_network[0].accuracy.effective.value < 0.5


# ---- the search -----------------------------------------------------------------------------------------

BITS = CausalModel({"x": lambda tokens: tokens // 2, "out": lambda x, tokens: 2 * x + tokens % 2}, "out")


def two_bits(d_model=8, seed=0):
    """A network that copies tokens 0..3, whose high bit is written along a direction known to us."""
    model = ToyTransformer(ToyConfig(1, 1, d_model, 2, 0, d_vocab=4, d_out=4, n_ctx=3)).eval()
    directions = torch.linalg.qr(torch.randn(d_model, d_model, generator=torch.Generator().manual_seed(seed))).Q[:, :2]
    signs = torch.tensor([[-1.0, -1.0], [-1.0, 1.0], [1.0, -1.0], [1.0, 1.0]])
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
        model.W_E.copy_(signs @ directions.T)
        model.W_U.copy_(4 * directions @ signs.T)
    return unweave.capture(model), from_tensor(torch.cartesian_prod(*[torch.arange(4)] * 3)), directions


def test_the_search_finds_the_direction_that_was_built_in():
    graph, data, directions = two_bits()
    options = {"k": 1, "n_pairs": 64, "steps": 60}
    found = find_alignment(graph, BITS, "x", data, places=[HEAD, "embed"], **options)
    stream = find_alignment(graph, BITS, "x", data, places=["before unembed"], controls=False, **options)
    assert [c.location.place for c in found.found] == ["embed", HEAD]
    for candidate in (found.best, stream.best):
        assert candidate.accuracy.effective.value == 1.0
        assert candidate.accuracy.unchanged.value == 1.0
        assert abs(float(candidate.location.basis[:, 0] @ directions[:, 0])) > 0.99
    assert found.found[1].accuracy.effective.value == 0.0
    assert found.random_network[0].accuracy.effective.value < 0.7
    assert found.mislabelled[0].accuracy.effective.value < 0.7
    rows = found.table()
    assert [row["place"] for row in rows] == [c.location.place for c in found.found]
    assert rows[0]["mislabelled"] < rows[0]["iia"]
    # and it stands on its own
    again = interchange_accuracy(graph, BITS, {"x": found.best.location}, data, n_random=2)
    assert again.accuracy["x"].effective.value == 1.0
    assert again.table()[0]["elsewhere"] < 0.9


def test_two_variables_of_one_place_are_swapped_together():
    graph, data, directions = two_bits()
    model = CausalModel(
        {"x": lambda tokens: tokens // 2, "y": lambda tokens: tokens % 2, "out": lambda x, y: 2 * x + y}, "out"
    )
    locations = {"x": Location("embed", directions[:, :1]), "y": Location("embed", directions[:, 1:])}
    found = interchange_accuracy(graph, model, locations, data, n_random=0)
    assert [a.effective.value for a in found.accuracy.values()] == [1.0, 1.0, 1.0]
    assert found.accuracy["x + y"].n_effective > found.accuracy["x"].n_effective
    wrong = interchange_accuracy(graph, model, {"x": locations["y"], "y": locations["x"]}, data, n_random=0)
    assert wrong.accuracy["x + y"].effective.value < 0.7


def test_a_place_with_few_directions_is_swapped_whole_and_starts_are_compared():
    graph, data, _ = two_bits()
    whole = find_alignment(graph, BITS, "x", data, k=2, places=["embed"], n_pairs=32, controls=False)
    assert whole.best.location.basis is None
    assert whole.best.accuracy.effective.value < 1.0  # the low bit comes along
    assert whole.random_network == whole.mislabelled == ()
    options = {"k": 1, "places": ["embed"], "n_pairs": 32, "controls": False, "steps": 3}
    losses = [find_alignment(graph, BITS, "x", data, n_starts=n, **options).best.train_nats for n in (1, 4)]
    assert losses[1] <= losses[0]


def test_the_search_ranks_the_previous_token_head_first(induction):
    data = unweave.load_data("zoo:induction", limit=96)
    places = ["blocks.1.attn.head.1", HEAD]
    options = {"k": 16, "steps": 50, "n_pairs": 48, "batch_size": 16, "places": places, "controls": False}
    found = find_alignment(induction, INDUCTION, "previous", data, **options)
    assert found.best.location.place == HEAD
    assert found.best.location.dimension == 16
    assert found.best.accuracy.effective.value > 0.85
    assert all(c.accuracy.effective.value < 0.3 for c in found.found[1:])


def test_a_redrawn_network_has_the_same_numbers_in_another_order(induction):
    other = redrawn(induction, seed=1)
    assert other.nodes == induction.nodes
    for old, new in zip(induction.tensors, other.tensors, strict=True):
        assert torch.equal(old.flatten().sort().values, new.flatten().sort().values)
    tokens = torch.tensor([[1, 2, 3]])
    assert not torch.allclose(run(other, tokens).logits, run(induction, tokens).logits)
    assert torch.equal(run(redrawn(induction, seed=1), tokens).logits, run(other, tokens).logits)


def test_everywhere_is_every_writer_and_every_stream(induction):
    places = search_places(induction)
    streams = [place for place in places if place.startswith("before ")]
    assert set(places) - set(streams) == set(induction.writers)
    assert streams == ["before blocks.0.attn.head.0", "before blocks.1.attn.head.0", "before unembed"]


def test_searches_that_cannot_work_are_refused():
    graph, data, _ = two_bits()
    for options in ({"k": 0}, {"k": 1, "steps": 0}, {"k": 1, "n_starts": 0}):
        with pytest.raises(InputError, match="at least 1"):
            find_alignment(graph, BITS, "x", data, **options)
    with pytest.raises(InputError, match="places= is empty"):
        find_alignment(graph, BITS, "x", data, k=1, places=[])
    with pytest.raises(UnknownNameError, match="closest: x"):
        find_alignment(graph, BITS, "y", data, k=1)
    with pytest.raises(UnknownNameError, match="embed"):
        find_alignment(graph, BITS, "x", data, k=1, places=["embde"])
    inert = CausalModel({"x": lambda tokens: tokens, "out": lambda tokens: tokens}, "out")
    with pytest.raises(EmptyDataError, match="never changes"):
        find_alignment(graph, inert, "x", data, k=1)
