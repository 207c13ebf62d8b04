"""Handling of SIGTERM as the notice that a machine is about to be preempted."""

from __future__ import annotations

import signal
from types import FrameType
from typing import Self

from jax.experimental import multihost_utils

from spvit_jax.distributed.coordination import is_formed


class Interrupt:
    """Handler of SIGTERM that records it instead of ending the process; a context manager.

    In a cluster JAX receives it, on any process, and picks a call of `requested` that all of them
    have yet to reach.
    """

    def __init__(self) -> None:
        self._received = False
        self._calls = 0

    def __enter__(self) -> Self:
        if not is_formed():
            self._previous = signal.signal(signal.SIGTERM, self._receive)
        return self

    def __exit__(self, *_: object) -> None:
        if not is_formed():
            signal.signal(signal.SIGTERM, self._previous)

    def requested(self) -> bool:
        """Returns whether to stop, the same on all processes, which must call it equally often."""
        if is_formed() and not self._received:
            self._calls += 1
            self._received = multihost_utils.reached_preemption_sync_point(self._calls)
        return self._received

    def _receive(self, signum: int, frame: FrameType | None) -> None:
        del signum, frame
        self._received = True
