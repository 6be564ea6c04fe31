"""Short descriptions of what drives a direction, each with a score on held-out text; without a score, no label.

A description predicts a number for every token. Its score is the share of the variance of the code that it explains on
text it has not seen, R^2 = 1 - E(v - p)^2 / Var(v). Two baselines stand beside it: random descriptions (those of other
directions, each with the best slope and offset for this one), and the same search on codes that were shifted against
the text. Only what scores above the 95th percentile of the latter gets a label. Random descriptions do not decide:
where many neurons fire at the first token, that is what each of them does.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from unweave.compression.moments import ChannelMoments
from unweave.data import TokenData
from unweave.drivers.descriptions import Descriptions
from unweave.drivers.directions import Directions, code_directions
from unweave.drivers.evidence import Describer, Evidence
from unweave.drivers.examples import collect_examples
from unweave.drivers.judging import FOLDS, Side, by_proposals, by_rules, check_tokens, judge
from unweave.drivers.rules import ready_rules
from unweave.errors import EmptyDataError, InputError, ShapeError
from unweave.execution import check_inputs, trace
from unweave.graph import Graph
from unweave.progress import track
from unweave.scope import Scope, position_mask
from unweave.statistics import check_finite

__all__ = ["describe", "describe_values"]


def describe(
    graph: Graph,
    data: TokenData,
    held_out: TokenData,
    nodes: Iterable[str] | Directions | None = None,
    *,
    basis: str = "code",
    moments: Mapping[int, ChannelMoments] | None = None,
    token_strings: Sequence[str] | None = None,
    describer: Describer | None = None,
    scope: Scope | None = None,
    draws: int = 8,
    shifts: int = 4,
    batch_size: int = 16,
    seed: int = 0,
    progress: bool | None = None,
) -> Descriptions:
    """What drives every direction of some nodes, in words, scored on held-out text.

    By rule: of the ready-made rules (:func:`unweave.drivers.rules.ready_rules`) the best one, and a second where it
    explains 1% more, chosen by cross-validation on ``data``; see :mod:`unweave.drivers.fitting`. With a describer:
    what it proposes, scored in the same way (a prediction gets the best slope and offset on ``data``).

    Args:
        data: the texts to fit on.
        held_out: the texts to score on; no document may be in both.
        nodes, basis, moments: see :func:`code_directions`.
        token_strings: the string of every token, for the rules that look at strings, and for people.
        describer: a user's own, called once for each direction.
        scope: only positions that it looks at.
        draws: how many random descriptions each is compared with.
        shifts: how often the search is repeated on shifted codes.

    Raises:
        UnknownNameError: an unknown node, or a describer names an unknown rule.
        InputError: the graph reads no tokens, held-out data that are the data, or numbers below 1.
        EmptyDataError: fewer than 100 tokens on one side, or fewer than 4 sequences of data.
        ShapeError: a prediction of a wrong shape.

    Cost:
        A forward pass over each data set; per rule and direction a few sums over tokens, 1 + ``shifts`` times. Memory:
        some times tokens x directions numbers of float32; name nodes where that is too much.

    Exact?
        Scores are, on these held-out tokens; the threshold is a quantile over directions and shifts. One in twenty
        directions that nothing drives gets a label, with a score as small as the threshold.

    Example:
        >>> import unweave
        >>> graph = unweave.capture("zoo:induction")
        >>> data, held_out = unweave.load_data("zoo:induction", limit=64).split(held_out=0.5)
        >>> found = describe(graph, data, held_out, ["blocks.0.attn.head.0"])
        >>> found.items[0].rules
        ('previous token', 'position')

    Source:
        Scoring an explanation by how well it predicts the code: Bills et al. 2023, "Language models can explain neurons
        in language models".
    """
    _check(graph, data, held_out, draws, shifts)
    scope = scope or Scope()
    directions = code_directions(graph, nodes, basis, moments)
    train = Side(_values(directions, data, scope, batch_size, progress), data, scope, batch_size)
    held = Side(_values(directions, held_out, scope, batch_size, progress), held_out, scope, batch_size)
    check_tokens(train, held)
    rules = ready_rules(data, token_strings)
    offsets = torch.Generator().manual_seed(seed)
    if describer is None:
        found = by_rules(train, held, rules, shifts, offsets)
    else:
        options = {"moments": moments, "scope": scope, "batch_size": batch_size, "progress": progress}
        examples = collect_examples(graph, data, directions, seed=seed, **options)  # type: ignore[arg-type]
        names = tuple(rule.name for rule in rules)
        proposals = [
            describer(Evidence(node, k, tuple(examples.table(node, k, token_strings)), names))
            for node, k in directions.names
        ]
        found = by_proposals(train, held, rules, proposals, shifts, offsets)
    return judge(directions.names, train, held, found, draws, offsets)


def describe_values(
    values: Mapping[str, Float[Tensor, "n pos"]],
    data: TokenData,
    held_values: Mapping[str, Float[Tensor, "n_held pos_held"]],
    held_out: TokenData,
    *,
    token_strings: Sequence[str] | None = None,
    draws: int = 8,
    shifts: int = 8,
    batch_size: int = 16,
    seed: int = 0,
) -> Descriptions:
    """:func:`describe` of any numbers per token, by rules: what they have to do with the text, scored on held-out text.

    Args:
        values: by name, on the texts to fit on.
        held_values: the same names on the texts to score on.
        draws, shifts: as in :func:`describe`.

    Returns:
        :class:`Descriptions`; each name is a "node" with one direction, 0.

    Raises:
        InputError: no tokens, other names held out, held-out data that are the data, or numbers below 1.
        EmptyDataError: fewer than 100 tokens on one side, or fewer than 4 sequences of data.
        ShapeError: values that do not fit the texts.

    Example:
        >>> import unweave
        >>> data, held_out = unweave.load_data("zoo:induction", limit=64).split(held_out=0.5)
        >>> first, also = ({"low": (d.tokens < 9).float()} for d in (data, held_out))
        >>> describe_values(first, data, also, held_out).items[0].rules
        ('token',)
    """
    if data.tokens.is_floating_point() or held_out.tokens.is_floating_point():
        raise InputError("descriptions speak of tokens, and these data have none")
    _check_sides(data, held_out, draws, shifts)
    if not values or list(values) != list(held_values):
        raise InputError(f"the same values must be given on both sides, got {list(values)} and {list(held_values)}")
    scope = Scope()
    train, held = (
        Side(_at_tokens(own, texts), texts, scope, batch_size)
        for own, texts in ((values, data), (held_values, held_out))
    )
    check_tokens(train, held)
    offsets = torch.Generator().manual_seed(seed)
    found = by_rules(train, held, ready_rules(data, token_strings), shifts, offsets)
    return judge([(name, 0) for name in values], train, held, found, draws, offsets)


def _at_tokens(values: Mapping[str, Tensor], data: TokenData) -> Float[Tensor, "token direction"]:
    for name, value in values.items():
        if value.shape != data.mask.shape:
            raise ShapeError(f"{name!r} has shape {tuple(value.shape)} for texts of shape {tuple(data.mask.shape)}")
    return torch.stack([value.float()[data.mask] for value in values.values()], dim=1)


def _check(graph: Graph, data: TokenData, held_out: TokenData, draws: int, shifts: int) -> None:
    if graph.info.get("d_vocab") is None or data.tokens.is_floating_point() or held_out.tokens.is_floating_point():
        raise InputError("descriptions speak of tokens, and this graph or these data have none; look at examples")
    if graph.resample:
        raise InputError("this graph's cut edges hear another input; look at the uncut graph or one cut to means")
    _check_sides(data, held_out, draws, shifts)


def _check_sides(data: TokenData, held_out: TokenData, draws: int, shifts: int) -> None:
    if len(data) < FOLDS:
        raise EmptyDataError(f"{len(data)} sequences cannot be told apart from each other; give at least {FOLDS}")
    if min(draws, shifts) < 1:
        raise InputError(f"draws and shifts must be at least 1, got {draws} and {shifts}")
    if held_out is data or held_out.tokens is data.tokens:
        raise InputError("the held-out data are the data themselves; split them: data.split(held_out=0.5)")


@torch.no_grad()
def _values(
    directions: Directions, data: TokenData, scope: Scope, batch_size: int, progress: bool | None
) -> Float[Tensor, "token direction"]:
    found = [torch.zeros(0, len(directions.names))]
    for batch in track(data.batches(batch_size), "codes", -(-len(data) // batch_size), show=progress):
        t = trace(directions.graph, check_inputs(directions.graph, batch.inputs, batch.mask), keep=True)
        check_finite(t, batch)
        mask = position_mask(scope, batch).to(t.graph.device)
        found.append(torch.cat([directions.values(t, s)[:, mask] for s in directions.stages]).T.cpu())
    return torch.cat(found)
