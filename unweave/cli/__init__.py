"""The command line: one file per command. Heavy imports happen inside commands, so that --help is instant."""

# importing a command registers it, and --help lists commands in this order
# isort: off
from unweave.cli import decompile  # noqa: F401
from unweave.cli import circuit  # noqa: F401
from unweave.cli import modules  # noqa: F401
from unweave.cli import features  # noqa: F401
from unweave.cli import edit  # noqa: F401
from unweave.cli import show  # noqa: F401
from unweave.cli import score  # noqa: F401
from unweave.cli import types  # noqa: F401
from unweave.cli import validate  # noqa: F401
from unweave.cli import scrub  # noqa: F401
from unweave.cli import audit  # noqa: F401
from unweave.cli import certify  # noqa: F401
from unweave.cli import report  # noqa: F401
from unweave.cli import run  # noqa: F401
from unweave.cli import serve  # noqa: F401
from unweave.cli import track  # noqa: F401
from unweave.cli import match  # noqa: F401
from unweave.cli import probe  # noqa: F401
from unweave.cli import reproduce  # noqa: F401

# isort: on
from unweave.cli.application import app, main

__all__ = ["app", "main"]
