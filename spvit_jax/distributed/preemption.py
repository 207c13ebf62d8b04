"""Noticing SIGTERM, the notice that a machine is about to be taken away."""

from __future__ import annotations

import signal
from types import FrameType
from typing import Self

from jax.experimental import multihost_utils

from spvit_jax.distributed.coordination import is_formed


class Interrupt:
    """A context manager that notes SIGTERM instead of dying of it.

    In a cluster JAX notes it, on whichever process it comes, and picks a step that all of them
    have yet to reach.
    """

    def __init__(self) -> None:
        self._noted = False

    def __enter__(self) -> Self:
        if not is_formed():
            self._previous = signal.signal(signal.SIGTERM, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        if not is_formed():
            signal.signal(signal.SIGTERM, self._previous)

    def requested(self, step: int) -> bool:
        """Returns whether to stop after a step, the same on all processes; asked at each step."""
        if is_formed():
            return multihost_utils.reached_preemption_sync_point(step)
        return self._noted

    def _note(self, signum: int, frame: FrameType | None) -> None:
        del signum, frame
        self._noted = True
