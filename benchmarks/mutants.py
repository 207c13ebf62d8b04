"""Makes deliberate mistakes, one at a time, and runs the test named beside each: it must fail.

    python -m benchmarks.mutants [PATTERN]

A test that no mistake can fail proves nothing. Works in a copy of the tree, in which the tests must
pass before anything is changed; the checkout itself is never touched. PATTERN, a regular
expression, chooses by file and mistake; the list is `tests/helpers/mutants.py`. Exits with 1 if a
mistake survives, or if the text that it replaces is no longer there exactly once. Takes about a
quarter of an hour on two cores, and needs what the tests need (`requirements-test.txt`).
"""

from __future__ import annotations

import os
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence

from absl import app

from tests.helpers.mutants import MUTANTS, Mutant

REPOSITORY = pathlib.Path(__file__).parent.parent
_TREE = ("spvit_jax", "configs", "benchmarks", "docs", "tests", "pyproject.toml")


def copy_tree(root: pathlib.Path, copy: pathlib.Path) -> None:
    """Copies the files of a tree that tests need, without compiled ones."""
    for name in _TREE:
        if (root / name).is_dir():
            shutil.copytree(root / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
        elif (root / name).exists():
            shutil.copy2(root / name, copy / name)


def failed_test(root: pathlib.Path, tests: Sequence[str]) -> str | None:
    """Returns the first test of a tree that fails, or None if all pass.

    Raises:
      RuntimeError: pytest gave no result, for example as there is no such test.
    """
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-n", "0", "-p", "no:cacheprovider"]
    environment = {
        "JAX_COMPILATION_CACHE_DIR": str(root / "compiled"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.3",
        **os.environ,
        # Python knows compiled files by size and second, which two mutants may share.
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    result = subprocess.run(
        [*command, *(f"tests/{test}" for test in tests)],
        cwd=root,
        env=environment,
        capture_output=True,
        text=True,
    )
    failed = re.search(r"^FAILED (\S+)", result.stdout, re.MULTILINE)
    if result.returncode not in (0, 1) or bool(result.returncode) != bool(failed):
        raise RuntimeError(f"{' '.join(result.args)} failed:\n{result.stdout}{result.stderr}")
    return failed[1] if failed else None


def survivors(mutants: Sequence[Mutant], root: pathlib.Path = REPOSITORY) -> list[Mutant]:
    """Runs the test of each mutant in a copy of a tree; prints which were killed and which not.

    Args:
      mutants: mutants to make and test.
      root: root of the tree, which is not changed.

    Returns:
      The mutants whose test did not fail.

    Raises:
      ValueError: a mistake can no longer be made.
      RuntimeError: the tests fail without any mistake, or could not be run.
    """
    for mutant in mutants:
        mutant.source(root)
    surviving = []
    with tempfile.TemporaryDirectory(prefix="mutants-") as folder:
        copy = pathlib.Path(folder)
        copy_tree(root, copy)
        if failed := failed_test(copy, sorted({mutant.test for mutant in mutants})):
            raise RuntimeError(f"{failed} fails without any mistake")
        for mutant in mutants:
            path = copy / "spvit_jax" / mutant.file
            text, start = path.read_text(), time.monotonic()
            path.write_text(mutant.source(copy))
            killer = failed_test(copy, [mutant.test])
            path.write_text(text)
            surviving += [] if killer else [mutant]
            outcome = f"killed by {killer}" if killer else "SURVIVED"
            print(f"{time.monotonic() - start:4.0f} s  {mutant}: {outcome}", flush=True)
    return surviving


def main(argv: list[str]) -> None:
    """Runs `python -m benchmarks.mutants` for the mutants that the argument names, or all."""
    pattern = argv[1] if len(argv) > 1 else ""
    chosen = [mutant for mutant in MUTANTS if re.search(pattern, str(mutant))]
    if not chosen:
        sys.exit(f"no mutant matches {pattern!r}")
    try:
        surviving = survivors(chosen)
    except (ValueError, RuntimeError) as error:
        sys.exit(str(error))
    print(f"{len(chosen) - len(surviving)} of {len(chosen)} mutants killed")
    sys.exit(bool(surviving))


if __name__ == "__main__":
    app.run(main)
