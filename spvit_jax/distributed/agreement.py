"""Comparing what must be the same on all processes of a cluster: settings, code, file systems."""

from __future__ import annotations

import json
import pathlib
import time
import uuid
from collections.abc import Mapping
from typing import Any

from spvit_jax.distributed import versions
from spvit_jax.distributed.coordination import broadcast, gather, is_formed, is_primary
from spvit_jax.errors import InputError

_POLL = 1.0  # seconds between looks at the shared folder
_SEEN_WITHIN = 30  # seconds in which a network file system shows a file to all
# What each machine may have its own of.
_LOCAL = ("config.data.data_dir", "config.data.threads")


def agree(facts: Mapping[str, Any]) -> None:
    """Compares what must be the same on all processes, code and package versions included.

    Args:
      facts: by name; values are compared as JSON. Those in `_LOCAL` may differ.

    Raises:
      InputError: on all processes, if one differs from process 0; says which, and in what.
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


def check_shared(folder: pathlib.Path) -> None:
    """Checks that all processes see the same folder, in which they write a checkpoint together.

    Raises:
      InputError: on all processes, if one does not see what process 0 writes there.
    """
    if not is_formed():
        return
    name = broadcast(f".shared-{uuid.uuid4().hex}")
    if is_primary():
        (folder / name).touch()
    gather("")  # it is there now
    deadline = time.monotonic() + _SEEN_WITHIN
    while not (seen := (folder / name).exists()) and time.monotonic() < deadline:
        time.sleep(_POLL)
    problem = [f"another folder {folder} than process 0"] if not seen else []
    try:
        _raise_together(problem, "--workdir must be on a file system that all share")
    finally:
        if is_primary():
            (folder / name).unlink(missing_ok=True)


def _raise_together(problems: list[str], advice: str) -> None:
    """Raises one `InputError` on all processes that lists what each of them has to say."""
    said = [json.loads(text) for text in gather(json.dumps(problems))]
    lines = [f"process {rank} has {'; '.join(has)}" for rank, has in enumerate(said) if has]
    if lines:
        rest = f" and {len(lines) - 4} processes more" if len(lines) > 4 else ""
        raise InputError(f"the processes disagree: {'. '.join(lines[:4])}{rest}; {advice}")
