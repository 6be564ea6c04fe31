"""What a page may ask of a served graph, read from JSON nobody vouches for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from unweave.errors import InputError

__all__ = ["LIMITS", "Question", "read_question"]

# largest request, in bytes and in its parts; a graph's own context and size may allow fewer tokens
LIMITS = {"body_bytes": 65_536, "characters": 8_000, "tokens": 256, "ablations": 64, "name_characters": 200}
FIELDS = ("text", "tokens", "ablate", "positions", "node", "measure", "counterfactual")


@dataclass(frozen=True)
class Question:
    """One text, and what to do with it.

    Attributes:
        text: a string, or token ids.
        ablate: nodes and edges that send their means.
        positions: whose outputs count; None for all.
        node: the node to look at closely: its edges, and where it looks if it is a head.
        measure: whether that node's use is to be measured at every token, too.
        counterfactual: what cut edges hear in a graph whose cut edges are resampled: as long as the text.
    """

    text: str | tuple[int, ...]
    ablate: tuple[str, ...] = ()
    positions: tuple[int, ...] | None = None
    node: str | None = None
    measure: bool = False
    counterfactual: str | tuple[int, ...] | None = None


def read_question(plain: Any) -> Question:
    """Check a request of the API and give it its types.

    Raises:
        InputError: an unknown field, a wrong type, neither or both of text and tokens, or more than the limits allow.

    Example:
        >>> read_question({"tokens": [0, 7], "ablate": ["embed"]}).ablate
        ('embed',)
    """
    if not isinstance(plain, dict):
        raise InputError(f"the request must be a JSON object, got {type(plain).__name__}")
    unknown = [str(name)[:40] for name in plain if name not in FIELDS]
    if unknown:
        raise InputError(f"the request has the unknown field {unknown[0]!r}; known: {', '.join(FIELDS)}")
    if ("text" in plain) == ("tokens" in plain):
        raise InputError("the request needs either 'text' or 'tokens'")
    measure = plain.get("measure", False)
    if type(measure) is not bool:
        raise InputError("measure must be true or false")
    positions, other = plain.get("positions"), plain.get("counterfactual")
    return Question(
        text=_string("text", plain["text"]) if "text" in plain else _numbers("tokens", plain["tokens"]),
        ablate=_names(plain.get("ablate", [])),
        positions=None if positions is None else _numbers("positions", positions),
        node=None if plain.get("node") is None else _string("node", plain["node"], LIMITS["name_characters"]),
        measure=measure,
        counterfactual=None if other is None else _text_or_ids("counterfactual", other),
    )


def _text_or_ids(what: str, value: Any) -> str | tuple[int, ...]:
    return _string(what, value) if isinstance(value, str) else _numbers(what, value)


def _string(what: str, value: Any, longest: int = LIMITS["characters"]) -> str:
    if not isinstance(value, str):
        raise InputError(f"{what} must be a string, got {type(value).__name__}")
    if len(value) > longest:
        raise InputError(f"{what} has {len(value)} characters, at most {longest} are allowed")
    if any("\ud800" <= c <= "\udfff" for c in value):
        raise InputError(f"{what} holds half a surrogate pair, which is no text")
    return value


def _numbers(what: str, value: Any) -> tuple[int, ...]:
    if not isinstance(value, list) or not value:
        raise InputError(f"{what} must be a list of whole numbers that is not empty, got {type(value).__name__}")
    if len(value) > LIMITS["tokens"]:
        raise InputError(f"{what} has {len(value)} entries, at most {LIMITS['tokens']} are allowed")
    if not all(type(item) is int and 0 <= item < 2**31 for item in value):
        raise InputError(f"{what} must hold whole numbers from 0 to 2147483647")
    return tuple(value)


def _names(value: Any) -> tuple[str, ...]:
    if not isinstance(value, list):
        raise InputError(f"ablate must be a list of nodes and edges, got {type(value).__name__}")
    if len(value) > LIMITS["ablations"]:
        raise InputError(f"ablate has {len(value)} entries, at most {LIMITS['ablations']} are allowed")
    return tuple(dict.fromkeys(_string("an entry of ablate", name, LIMITS["name_characters"]) for name in value))
