"""Can the network do a task at all? Before a circuit is searched for."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from unweave.ablation import batch_trace
from unweave.data import Batch
from unweave.errors import EmptyDataError, InputError
from unweave.graph import Graph
from unweave.scope import Scope, loss, metric, position_mask
from unweave.statistics import accumulate, check_finite
from unweave.tasks.task import Task

__all__ = ["TaskCheck", "binomial_tail", "check_task", "require_solved"]


@dataclass(frozen=True)
class TaskCheck:
    """How well a network does a task.

    Attributes:
        name: the task's.
        n: how many answers were looked at: prompts, or (without answers) positions.
        accuracy: the share of prompts whose mean correct logit is above the mean wrong one; without answers, the share
            of positions whose most likely next token is the one that follows.
        chance: the accuracy of guessing.
        p_value: the chance that a guesser does at least so well, P(X >= n accuracy) for X ~ Binomial(n, chance).
        logit_difference: mean correct minus mean wrong logit, mean over prompts; None without answers.
        corrupted_logit_difference: the same on the corrupted prompts, with the clean prompts' answers.
        told_apart: the share of pairs whose clean logit difference is above the corrupted one, which no preference
            that is there whatever the prompt says can bring about; None without pairs or answers.
        told_apart_p_value: the chance of so large a share if it were a matter of tossing coins.
    """

    name: str
    n: int
    accuracy: float
    chance: float
    p_value: float
    logit_difference: float | None = None
    corrupted_logit_difference: float | None = None
    told_apart: float | None = None
    told_apart_p_value: float | None = None


@torch.no_grad()
def check_task(graph: Graph, task: Task, *, batch_size: int = 32, progress: bool | None = None) -> TaskCheck:
    """Run a network on a task: accuracy, logit differences, and whether guessing could do as well.

    Args:
        graph: any graph; the original, before a circuit is searched for in it.

    Returns:
        :class:`TaskCheck`.

    Raises:
        InputError: a prompt at which the scope looks nowhere, answers outside the outputs, or prompts too long.
        EmptyDataError: without answers: no position has a next token.
        NonFiniteError: a node writes NaN or inf; names it.

    Cost:
        One forward pass over the clean prompts and, where there are answers, one over the corrupted ones.

    Exact?
        Yes. Without answers, positions of one text count as independent, which makes the p-value too small.

    Example:
        >>> import unweave
        >>> from unweave.tasks import check_task, make_task
        >>> graph = unweave.capture("zoo:induction")
        >>> task = make_task("induction", vocabulary=graph.info["d_vocab"], first=0, n=32)
        >>> check_task(graph, task).accuracy
        1.0
    """
    step = _answer_sums if task.has_answers else _next_token_sums
    sums = accumulate(
        task.data,
        lambda batch: step(graph, task, batch),
        batch_size=batch_size,
        description=f"checking the task {task.name}",
        progress=progress,
    )
    found = {name: float(value) for name, value in sums.items()}
    n = int(found["n"])
    if n == 0:
        raise EmptyDataError(f"the scope of the task {task.name!r} selects no position that has a next token")
    check = TaskCheck(task.name, n, found["right"] / n, task.chance, binomial_tail(int(found["right"]), n, task.chance))
    if task.has_answers:
        check = dataclasses.replace(check, logit_difference=found["clean"] / n)
    if "told_apart" in found:
        check = dataclasses.replace(
            check,
            corrupted_logit_difference=found["corrupted"] / n,
            told_apart=found["told_apart"] / n,
            told_apart_p_value=binomial_tail(int(found["told_apart"]), n, 0.5),
        )
    return check


def require_solved(check: TaskCheck, level: float = 0.01) -> None:
    """Refuse a task that the network cannot do: there would be no circuit to find, only noise to fit.

    It can if guessing does as well with a probability below ``level``, and clean prompts are told from corrupted ones
    beyond the same level. (The second refuses a network that always prefers large numbers, say, which gets every
    "greater than" right without reading the prompt.)

    Raises:
        InputError: it cannot; names accuracy, chance and n.

    Example:
        >>> require_solved(TaskCheck("coin", n=100, accuracy=0.9, chance=0.5, p_value=binomial_tail(90, 100, 0.5)))
    """
    if not 0 < level < 1:
        raise InputError(f"level is a probability between 0 and 1, got {level}")
    if check.p_value >= level:
        raise InputError(
            f"the model cannot do this task: {check.name!r} has accuracy {check.accuracy:.1%} where guessing has "
            f"{check.chance:.1%} (n = {check.n}, p = {check.p_value:.2g}); no circuit is searched. Use an easier task, "
            "a larger model, or more prompts"
        )
    if check.told_apart_p_value is not None and check.told_apart_p_value >= level:
        raise InputError(
            f"the model cannot do this task: {check.name!r} has accuracy {check.accuracy:.1%} where guessing has "
            f"{check.chance:.1%} (n = {check.n}), but it answers corrupted prompts alike: only {check.told_apart:.1%} "
            f"of the pairs are told apart (p = {check.told_apart_p_value:.2g}); no circuit is searched"
        )


def binomial_tail(k: int, n: int, chance: float) -> float:
    """P(X >= k) for X ~ Binomial(n, chance): sum over i = k..n of (n over i) chance^i (1 - chance)^(n - i).

    Exact?
        Yes, up to rounding (relative error about 1e-12 n log n).

    Example:
        >>> round(binomial_tail(3, 3, 0.5), 6)
        0.125
    """
    if k <= 0 or chance == 1:
        return 1.0
    if chance == 0:
        return 0.0
    i = torch.arange(k, n + 1, dtype=torch.float64)
    ways = math.lgamma(n + 1) - torch.lgamma(i + 1) - torch.lgamma(n - i + 1)
    terms = ways + i * math.log(chance) + (n - i) * math.log1p(-chance)
    return min(1.0, float(terms.logsumexp(0).exp()))


def _logits(graph: Graph, batch: Batch) -> Tensor:
    t = batch_trace(graph, batch)
    check_finite(t, batch)
    return t.output


def _answer_sums(graph: Graph, task: Task, batch: Batch) -> Mapping[str, Tensor]:
    marks = position_mask(task.scope, batch)
    marked = marks.any(1)
    if not bool(marked.all()):
        row = int(batch.index[~marked][0])
        raise InputError(
            f"the scope of the task {task.name!r} looks at no position of prompt {row}: mark one, or drop it"
        )
    # where the clean prompts are looked at, whatever a function would mark in the corrupted ones
    scope = Scope(positions=lambda _: marks, divergence="logit_difference")
    clean = metric(scope, _logits(graph, batch), batch).double()
    sums = {"n": torch.tensor(len(clean)), "right": (clean > 0).sum(), "clean": clean.sum()}
    if task.corrupted is not None:
        inputs = task.corrupted.tokens[batch.index, : batch.mask.shape[1]].long()
        twins = dataclasses.replace(batch, inputs=inputs)
        corrupted = metric(scope, _logits(graph, twins), twins).double()
        sums |= {"corrupted": corrupted.sum(), "told_apart": (clean > corrupted).sum()}
    return sums


def _next_token_sums(graph: Graph, task: Task, batch: Batch) -> Mapping[str, Tensor]:
    logits = _logits(graph, batch)
    _, real = loss(logits, batch)
    counted = position_mask(task.scope, batch).to(real.device) & real
    right = logits[:, :-1].argmax(-1) == batch.inputs[:, 1:].to(logits.device)
    return {"n": counted.sum(), "right": (right & counted[:, :-1]).sum()}
