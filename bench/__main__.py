"""One entry for every benchmark: `python -m bench` lists them, `python -m bench NAME --help` explains one."""

from __future__ import annotations

import ast
import importlib
import os
import pkgutil
import sys
from pathlib import Path

import bench

_NOT_PROGRAMS = {"common", "plots", "recorded_swarm"}


def programs() -> dict[str, str]:
    """The first sentence of each program, by name. Nothing is imported for it."""
    found = {}
    for module in pkgutil.iter_modules(bench.__path__):
        if module.ispkg or module.name.startswith("_") or module.name in _NOT_PROGRAMS:
            continue
        source = (Path(bench.__path__[0]) / f"{module.name}.py").read_text(encoding="utf-8")
        text = ast.get_docstring(ast.parse(source)) or ""
        found[module.name] = text.split("\n")[0].split(": `python")[0].rstrip(".")
    return found


def main() -> None:
    """List, or hand over to a program."""
    known = programs()
    if len(sys.argv) < 2 or sys.argv[1] in ("-h", "--help"):
        print("usage: python -m bench NAME [--help] [--json] ...\n")
        for name, text in known.items():
            print(f"  {name:12} {text}")
        print("\nA running server: `token-swarm bench latency` and `token-swarm bench load`.")
        return
    # grpc's own log repeats, in its words, that a benchmark has ended.
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    name = sys.argv[1]
    if name not in known:
        print(f"error: {name!r}: no such benchmark; known: {', '.join(known)}", file=sys.stderr)
        raise SystemExit(2)
    sys.argv = [f"python -m bench {name}", *sys.argv[2:]]
    importlib.import_module(f"bench.{name}").main()


if __name__ == "__main__":
    main()
