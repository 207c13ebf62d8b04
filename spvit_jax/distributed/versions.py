"""Versions of the code, Python and packages, which processes compare and logs contain."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import pathlib
import platform
import subprocess

import spvit_jax

# Packages whose version may change numbers or the content of checkpoints.
_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", "tensorflow-cpu")


def code_version(root: pathlib.Path = pathlib.Path(spvit_jax.__file__).parent.parent) -> str:
    """Returns the commit of the checkout, with `-dirty` if changed; without git, the VERSION file.

    Args:
      root: folder of the checkout.
    """
    if (root / ".git").exists():
        # Never a tag: the abbreviated commit, as `git rev-parse --short` has it.
        describe = ["git", "describe", "--always", "--dirty", "--exclude=*"]
        with contextlib.suppress(OSError):
            result = subprocess.run(describe, cwd=root, capture_output=True, text=True)
            if result.returncode == 0:
                return result.stdout.strip()
    version = root / "VERSION"
    return version.read_text().strip() if version.is_file() else spvit_jax.__version__


def of_process() -> dict[str, str]:
    """Returns the versions of this process's code, Python and packages, by name."""
    digest = hashlib.sha256()
    for path in sorted(pathlib.Path(spvit_jax.__file__).parent.rglob("*.py")):
        digest.update(path.read_bytes())
    found = {
        "code": f"{code_version()} ({digest.hexdigest()[:8]})",  # two dirty checkouts may differ
        "python": platform.python_version(),
    }
    for package in _PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found
