"""What validation, scrubbing, edits and audits found, as the plain data that a graph's folder and its page hold."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from unweave.audit import AnomalyScore, Audit, Triggers
from unweave.data import TokenData
from unweave.falsification import Edit, EditTable, Hypothesis, Scrubbed, Several, Validation
from unweave.falsification.validation import CANDIDATE
from unweave.intervals import Estimate
from unweave.report.checks import (
    AlarmFacts,
    AuditFacts,
    EditsFacts,
    ScrubbingRow,
    TriggersFacts,
    ValidationFacts,
    ValueInRange,
)

__all__ = [
    "alarm_facts",
    "audit_facts",
    "edits_facts",
    "scrubbing_row",
    "spell_edit",
    "triggers_facts",
    "validation_facts",
]


def _range(estimate: Estimate) -> ValueInRange:
    return {"value": estimate.value, "low": estimate.low, "high": estimate.high}


def validation_facts(found: Validation, tokens: Sequence[str], size: float) -> ValidationFacts:
    """A validation as rows, with the worst tokens of every data set as text.

    Args:
        tokens: the text of every token id and output.
        size: the graph's share of the network's numbers in channels.

    Example:
        >>> import unweave
        >>> from unweave.falsification import validate
        >>> graph, data = unweave.capture("zoo:induction"), unweave.load_data("zoo:induction", limit=8)
        >>> facts = validation_facts(validate(graph, graph, data), [str(i) for i in range(48)], 1.0)
        >>> {row["graph"]: row["kl_nats"]["value"] for row in facts["rows"]}["candidate"]
        0.0
    """

    def spell(ids: list[int]) -> str:
        return "".join(tokens[i] for i in ids)

    return {
        "candidate": CANDIDATE,
        "size": size,
        "rows": [
            {
                "data": data,
                "type": part,
                "graph": graph,
                "kl_nats": _range(row.kl_nats),
                "agreement": _range(row.top1_agreement),
                "loss_recovered": _range(row.loss_recovered),
                "kl_p99": row.kl_p99,
                "kl_p999": row.kl_p999,
                "kl_max": row.kl_max,
                "n_sequences": row.n_sequences,
                "n_tokens": row.n_tokens,
            }
            for data, parts in found.rows.items()
            for part, graphs in parts.items()
            for graph, row in graphs.items()
        ],
        "worst": found.worst(spell),  # type: ignore[typeddict-item]
        "left_out": dict(found.left_out),
    }


def scrubbing_row(name: str, hypothesis: Hypothesis, found: Scrubbed, graph: str) -> ScrubbingRow:
    """One hypothesis and what it recovered.

    Args:
        graph: what was scrubbed, in words.

    Example:
        >>> import unweave
        >>> from unweave.falsification import scrub
        >>> graph, data = unweave.capture("zoo:induction"), unweave.load_data("zoo:induction", limit=8)
        >>> nothing = Hypothesis({}, "nothing matters")
        >>> scrubbing_row("nothing", nothing, scrub(graph, data, nothing), "the model")["recovered"]["value"]
        0.0
    """
    return {
        "name": name,
        "description": hypothesis.description,
        "keys": list(hypothesis.keys),
        "graph": graph,
        "form": found.form,
        "loss_recovered": _range(found.loss_recovered),
        "recovered": _range(found.recovered),
        "alone": dict(found.alone),
        "n_samples": found.n_samples,
        "n_sequences": found.n_sequences,
        "n_tokens": found.n_tokens,
    }


def edits_facts(table: EditTable, edits: Mapping[str, Sequence[Edit]]) -> EditsFacts:
    """Predicted and true changes of the loss, edit by edit, and the rows over them.

    Args:
        edits: those of the table, by size.
    """
    points: list[Any] = []
    for size, chosen in edits.items():
        for i, edit in enumerate(chosen):
            called = {"true": table.true[size][i], "graph": table.graph[size][i], "gradient": table.gradient[size][i]}
            if table.second_order:
                called["second_order"] = table.second_order[size][i]
            points.append({"size": size, "edit": spell_edit(edit), **{k: float(v) for k, v in called.items()}})
    estimates = ("correlation", "r2", "slope", "top_token", "sign")
    rows: list[Any] = [
        {"size": row.size, "predictor": row.predictor, "mean_change": row.mean_change, "n": row.n}
        | {name: _range(getattr(row, name)) for name in estimates}
        for row in table.rows
    ]
    return {"rows": rows, "points": points}


def spell_edit(edit: Edit) -> str:
    """The kind of an edit and where it is made.

    Example:
        >>> from unweave.falsification import ScaleHead
        >>> spell_edit(ScaleHead("blocks.1.attn.head.0", 0.5))
        'ScaleHead blocks.1.attn.head.0'
    """
    if isinstance(edit, Several):
        return ", ".join(spell_edit(each) for each in edit.edits)
    fields = vars(edit)
    where = fields.get("node") or fields.get("after") or f"tokens {fields.get('a')} and {fields.get('b')}"
    return f"{type(edit).__name__} {where}"


def audit_facts(found: Audit, tokens: Sequence[str]) -> AuditFacts:
    """An audit's tables, with the text of every token in them.

    Args:
        tokens: the text of every token id and output.

    Example:
        >>> import unweave
        >>> from unweave.audit import audit
        >>> graph, data = unweave.capture("zoo:induction"), unweave.load_data("zoo:induction", limit=4)
        >>> small = unweave.compress(graph, data, size=0.5)
        >>> facts = audit_facts(audit(small, graph, data, n_tokens=1), [f"[{i}]" for i in range(48)])
        >>> facts["words"][str(facts["tokens"][0]["model_says"])] == f"[{facts['tokens'][0]['model_says']}]"
        True
    """
    plain: Any = found.tables()
    used = {i for row in found.tokens for i in (*row.context, row.model_says, row.graph_says)}
    for cluster in found.clusters:
        used |= {i for i, _ in (*cluster.raised, *cluster.lowered)} | {i for _, i, _ in cluster.shared}
    plain["words"] = {str(i): tokens[i] for i in sorted(used)}
    return plain  # type: ignore[no-any-return]


def alarm_facts(scorer: AnomalyScore, data: TokenData) -> AlarmFacts:
    """A calibrated alarm, and how many texts of a data set raise it.

    Cost:
        One pass of both graphs over the data.
    """
    scores = scorer.score_data(data)
    return {
        "threshold": scorer.threshold,
        "false_alarms": scorer.false_alarms,
        "n_clean": len(scorer.clean),
        "n_texts": len(scores),
        "alarms": int((scores > scorer.threshold).sum()),
    }


def triggers_facts(found: Triggers, at: str) -> TriggersFacts:
    """What a search for triggers found; the audit that holds it has to spell their tokens in its ``words``.

    Args:
        at: where runs were put.
    """
    runs: list[Any] = [row | {"tokens": list(row["tokens"])} for row in found.table()]
    return {
        "at": at,
        "n_runs": found.n_runs,
        "n_screened": len(found.ranked),
        "evaluations": found.evaluations,
        "runs": runs,
    }
