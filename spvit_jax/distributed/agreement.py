"""Checks that all processes of a cluster have the same settings, code and file system."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Mapping
from typing import Any

from etils import epath

from spvit_jax.distributed import versions
from spvit_jax.distributed.coordination import broadcast, gather, is_formed, is_primary
from spvit_jax.errors import InputError

_POLL = 1.0  # seconds between looks at the shared folder
_VISIBLE_TIMEOUT = 30  # seconds in which a network file system shows a file to all processes
# Settings that may differ between machines.
_LOCAL = ("config.data.data_dir", "config.data.threads")


def agree(facts: Mapping[str, Any]) -> None:
    """Checks that facts, the code and package versions are the same on all processes.

    Args:
      facts: values by name, compared as JSON. Those in `_LOCAL` may differ.

    Raises:
      InputError: on all processes, if any differs from process 0; lists processes and values.
    """
    if not is_formed():
        return
    compared = {**versions.of_process(), **facts}
    ours = json.loads(json.dumps({k: v for k, v in compared.items() if k not in _LOCAL}))
    theirs = json.loads(broadcast(json.dumps(ours)))
    different = [
        f"{name}={ours.get(name)}, process 0 has {theirs.get(name)}"
        for name in sorted(ours.keys() | theirs.keys())
        if ours.get(name) != theirs.get(name)
    ]
    _raise_together(different, "start the same command with the same code on all of them")


def check_shared(folder: epath.Path) -> None:
    """Checks that a folder is the same on all processes, as writing checkpoints needs.

    Args:
      folder: the workdir.

    Raises:
      InputError: on all processes, if any does not see a file that process 0 writes there.
    """
    if not is_formed():
        return
    name = broadcast(f".shared-{uuid.uuid4().hex}")
    if is_primary():
        (folder / name).touch()
    gather("")  # from here on the file exists
    deadline = time.monotonic() + _VISIBLE_TIMEOUT
    while not (seen := (folder / name).exists()) and time.monotonic() < deadline:
        time.sleep(_POLL)
    problem = [f"another folder {folder} than process 0"] if not seen else []
    try:
        _raise_together(problem, "--workdir must be on a file system that all share")
    finally:
        if is_primary():
            (folder / name).unlink(missing_ok=True)


def _raise_together(problems: list[str], advice: str) -> None:
    """Raises the same `InputError` on all processes if any has problems, listing those of each."""
    by_rank = [json.loads(text) for text in gather(json.dumps(problems))]
    lines = [f"process {rank} has {'; '.join(has)}" for rank, has in enumerate(by_rank) if has]
    if lines:
        rest = f" and {len(lines) - 4} processes more" if len(lines) > 4 else ""
        raise InputError(f"the processes disagree: {'. '.join(lines[:4])}{rest}; {advice}")
