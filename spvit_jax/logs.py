"""Logging to the standard error and to the `train.log` of a run.

All commands begin with `start`, so that no warning is lost; training calls `start_run` when it has
a workdir. Log lines of libraries are not shown: their errors are exceptions.
"""

from __future__ import annotations

import logging
import logging.handlers
import sys
import time
from typing import Self

from etils import epath
from tqdm import tqdm

from spvit_jax import distributed, paths
from spvit_jax.append_only import AppendOnlyFile
from spvit_jax.errors import InputError

log = logging.getLogger("spvit_jax")

# Each process reads its own part of the data and logs what is wrong with it.
_DATA = "spvit_jax.data"
_LINE_EVERY = 10.0  # seconds between lines of progress
_FORMAT = logging.Formatter("%(asctime)s %(message)s", "%Y-%m-%d %H:%M:%S")


class _Screen(logging.Handler):
    """Handler that writes lines above the progress bar, if there is one."""

    def __init__(self, level: int):
        super().__init__(level)
        self.setFormatter(_FORMAT)
        self.addFilter(_is_logged)

    def emit(self, record: logging.LogRecord) -> None:
        tqdm.write(self.format(record), file=sys.stderr)


class _File(logging.Handler):
    """Handler of a log file that stops, with one warning, once the file cannot be written.

    That of a bucket goes on: what it cannot write now is written with what comes later.
    """

    def __init__(self, path: epath.Path):
        super().__init__()
        self._file = AppendOnlyFile(path)

    def emit(self, record: logging.LogRecord) -> None:
        try:
            self._file.write((self.format(record) + "\n").encode(errors="backslashreplace"))
        except OSError as error:
            self._give_up(error)

    def flush(self) -> None:
        self.acquire()
        try:
            self._file.flush()
        except OSError as error:
            self._give_up(error)
        finally:
            self.release()

    def _give_up(self, error: OSError) -> None:
        if paths.is_remote(self._file.path):
            log.warning("warning: %s cannot be written yet: %s", self._file.path, error)
            return
        log.removeHandler(self)
        log.warning("warning: %s goes no further: %s", self._file.path, error)


class Progress:
    """Progress of a loop: a bar on a terminal, else a line at intervals; a context manager.

    Of several processes the first one shows it.
    """

    def __init__(self, name: str, total: int, unit: str):
        """Begins at 0.

        Args:
          name: what goes on, the beginning of each line.
          total: number of advances until the end.
          unit: what is counted, in the singular.
        """
        self._name, self._total, self._unit, self._done = name, total, unit, 0
        self._shows = distributed.is_primary()
        self._next_line = time.monotonic() + _LINE_EVERY

    def __enter__(self) -> Self:
        on_terminal = self._shows and sys.stderr.isatty()
        self._bar = tqdm(
            total=self._total,
            desc=self._name,
            unit=self._unit,
            disable=not on_terminal,
            dynamic_ncols=True,
            leave=False,
        )
        self._shows = self._shows and not on_terminal
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def advance(self) -> None:
        """Counts one more."""
        self._done += 1
        self._bar.update()
        now = time.monotonic()
        if self._shows and now >= self._next_line:
            self._next_line = now + _LINE_EVERY
            distributed.say(f"{self._name}: {self._unit} {self._done} of {self._total}")


def start() -> None:
    """Sends warnings to the standard error, and buffers them for the `train.log` of a later run."""
    buffer = logging.handlers.MemoryHandler(sys.maxsize, flushLevel=sys.maxsize)
    buffer.setLevel(logging.WARNING)
    _send_to(_Screen(logging.WARNING), buffer)


def start_run(workdir: epath.Path | None) -> None:
    """Sends all lines to the standard error and to `train.log` in the workdir, if there is one.

    On a terminal the progress bar replaces the line per interval (level DEBUG). The file begins
    with the warnings since `start`.

    Raises:
      InputError: `train.log` cannot be written.
    """
    buffers = [h for h in log.handlers if isinstance(h, logging.handlers.MemoryHandler)]
    screen = _Screen(logging.INFO if sys.stderr.isatty() else logging.DEBUG)
    if workdir is None or not distributed.is_primary():
        _send_to(screen)
        return
    try:
        file = _File(workdir / "train.log")
    except OSError as error:
        raise InputError(f"cannot write to workdir {workdir}: {error}") from error
    file.setFormatter(_FORMAT)
    for buffer in buffers:
        buffer.setTarget(file)
    _send_to(screen, file)  # closes the other handlers, which flushes them


def flush() -> None:
    """Puts what has been logged where it survives this machine."""
    for handler in list(log.handlers):
        if isinstance(handler, _File):
            handler.flush()


def _send_to(*handlers: logging.Handler) -> None:
    """Makes these the only handlers of this project's logger."""
    log.setLevel(logging.DEBUG)
    # The root logger is absl's, and off: orbax warns of its own defaults at every call.
    log.propagate = False
    for handler in list(log.handlers):
        log.removeHandler(handler)
        handler.close()
    for handler in handlers:
        log.addHandler(handler)


def _is_logged(record: logging.LogRecord) -> bool:
    """Returns whether this process logs a record; the primary process logs what all have alike."""
    own = record.levelno >= logging.WARNING and record.name.startswith(_DATA)
    return own or distributed.is_primary()
