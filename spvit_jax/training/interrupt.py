"""Noticing SIGTERM, the notice that a machine is about to be taken away."""

from __future__ import annotations

import signal
from types import FrameType
from typing import Self


class Interrupt:
    """A context manager that notes SIGTERM instead of dying of it.

    Attributes:
      requested: whether the signal has come; asked between steps.
    """

    def __init__(self) -> None:
        self.requested = False

    def __enter__(self) -> Self:
        self._previous = signal.signal(signal.SIGTERM, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        signal.signal(signal.SIGTERM, self._previous)

    def _note(self, signum: int, frame: FrameType | None) -> None:
        del signum, frame
        self.requested = True
