"""Run benchmarks and write the README's tables: ``python -m benchmarks.run all`` (hours) or by name."""

from __future__ import annotations

import subprocess
import sys

COMMANDS = {
    "exactness": [["benchmarks.exactness"]],
    "edges": [["benchmarks.edges"]],
    "scope": [["benchmarks.scope"]],
    "regulariser": [["benchmarks.regulariser"]],
    "speed": [["benchmarks.speed"]],
    "subspaces": [["benchmarks.subspaces"]],
    "tracr": [["benchmarks.tracr"]],
    "circuits": [["benchmarks.circuits"]],
    "compression": [["benchmarks.compression", "pylm"], ["benchmarks.compression", "stories260K"]],
}


def main(names: list[str]) -> None:
    chosen = list(COMMANDS) if names in ([], ["all"]) else names
    for name in chosen:
        for command in COMMANDS[name]:
            subprocess.run([sys.executable, "-m", *command], check=True)
    subprocess.run([sys.executable, "-m", "benchmarks.table"], check=True)


if __name__ == "__main__":
    main(sys.argv[1:])
