"""Make the docstrings' own conventions readable to mkdocstrings: roles, grouped arguments, the Exact? section."""

from __future__ import annotations

import re
from typing import Any

from griffe import Extension, Object

ROLE = re.compile(r":(?:func|class|meth|mod|attr|data):`~?([^`]+)`")
EXACT = re.compile(r"^Exact\?$", flags=re.MULTILINE)
EXAMPLE = re.compile(r"^Example:$", flags=re.MULTILINE)
# "steps, samples: how many": two arguments described together
GROUP = re.compile(r"^( +)((?:\w+, )+)(\w+):", flags=re.MULTILINE)


def _apart(found: re.Match[str]) -> str:
    indent, first, last = found.groups()
    return "".join(f"{indent}{name}: with the next.\n" for name in first.split(", ") if name) + f"{indent}{last}:"


class Conventions(Extension):
    """Rewrites every docstring once, when it is loaded."""

    def on_object(self, *, obj: Object, **_: Any) -> None:
        if obj.docstring is not None:
            text = ROLE.sub(r"`\1`", obj.docstring.value)
            text = EXAMPLE.sub("Examples:", EXACT.sub("Exact:", text))
            obj.docstring.value = GROUP.sub(_apart, text)
