"""Trains, evaluates, examines and exports vision transformers with spatial priors.

    spvit-jax train --config=digits --workdir=runs/digits
    spvit-jax list models
    spvit-jax COMMAND --help

`spvit-jax COMMAND` is `python -m spvit_jax.COMMAND`; `--version` prints the version.
"""

from __future__ import annotations

import ast
import importlib
import importlib.util
import pathlib
import sys

import spvit_jax
from spvit_jax.errors import nearest

COMMANDS = {
    "train": "spvit_jax.train",
    "evaluate": "spvit_jax.evaluate",
    "predict": "spvit_jax.predict",
    "explain": "spvit_jax.explain",
    "convert": "spvit_jax.convert",
    "export": "spvit_jax.export.__main__",
    "preflight": "spvit_jax.preflight.__main__",
    "prepare": "spvit_jax.data.prepare",
    "token-labels": "spvit_jax.data.token_labels.__main__",
    "list": "spvit_jax.catalog",
}


def summary(module: str) -> str:
    """Returns the first line of a module's docstring, without importing the module."""
    spec = importlib.util.find_spec(module)
    assert spec is not None
    assert spec.origin is not None
    doc = ast.get_docstring(ast.parse(pathlib.Path(spec.origin).read_text())) or ""
    return doc.partition("\n")[0]


def usage() -> str:
    """Returns the help text, with a line for each command."""
    lines = [f"  {name:<14}{summary(module)}" for name, module in COMMANDS.items()]
    parts = ["usage: spvit-jax COMMAND [--FLAG=VALUE …]", (__doc__ or "").strip()]
    return "\n\n".join([*parts, "\n".join(["commands:", *lines])])


def main() -> None:
    """Runs the command that the first argument names, as `python -m` would run its module."""
    name = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if name.lstrip("-") in ("help", "h"):
        print(usage())
    elif name == "--version":
        print(f"spvit_jax {spvit_jax.__version__}")
    elif name not in COMMANDS:
        print(f"error: unknown command {name!r}{nearest(name, COMMANDS)}", file=sys.stderr)
        sys.exit(2)
    else:
        sys.argv[:2] = [f"spvit-jax {name}"]
        importlib.import_module(COMMANDS[name]).main()


if __name__ == "__main__":
    main()
