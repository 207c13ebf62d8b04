"""Files that are appended to, and that survive the machine: logs and records of a run."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable

from etils import epath

from spvit_jax import paths

_INTERVAL = 60.0  # seconds between uploads of a file that grows


class AppendOnlyFile:
    """File that is written at its end alone.

    A file on this machine is closed after each write: on a mount of gcsfuse an object appears only
    when it is closed. A bucket cannot append: there the content is kept in memory and put whole, at
    `flush` and otherwise at most once a minute, whatever the number of writes.
    """

    def __init__(self, path: epath.Path, clock: Callable[[], float] = time.monotonic):
        """Opens a file, which goes on from what it holds; folders above it must exist.

        Args:
          path: the file.
          clock: returns seconds.

        Raises:
          OSError: the file cannot be read, or written.
        """
        self.path = path
        self._clock = clock
        self._remote = paths.is_remote(path)
        self._content = bytearray()
        self._flushed = 0  # bytes of the content that are in the bucket
        self._flush_time = clock()
        if self._remote:
            with paths.reached(), contextlib.suppress(FileNotFoundError):
                self._content += path.read_bytes()
            self._flushed = len(self._content)
        else:
            with open(path, "ab"):
                pass

    def write(self, data: bytes) -> None:
        """Appends bytes; those of a local file are on its disk when this returns.

        Raises:
          OSError: the file cannot be written.
        """
        if not self._remote:
            with open(self.path, "ab", buffering=0) as file:
                file.write(data)
                os.fsync(file.fileno())
            return
        self._content += data
        if self._clock() - self._flush_time >= _INTERVAL:
            with contextlib.suppress(OSError):  # nothing is lost yet; the next one tries again
                self.flush()

    def flush(self) -> None:
        """Puts what has been written where it survives this machine.

        Raises:
          OSError: the file cannot be written; the next call tries again.
        """
        if self._flushed == len(self._content):
            return
        self._flush_time = self._clock()
        paths.put_bytes(bytes(self._content), self.path)
        self._flushed = len(self._content)
