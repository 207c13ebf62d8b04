"""Where this project's log lines go: the standard error, and the `train.log` of a run.

All commands begin with `start`, so that no warning is lost; training goes on to `start_run` when
it has a workdir. What libraries log is not shown: what goes wrong in them they raise.
"""

from __future__ import annotations

import logging
import logging.handlers
import pathlib
import sys

from tqdm import tqdm

from spvit_jax import distributed
from spvit_jax.errors import InputError

log = logging.getLogger("spvit_jax")

# Of several processes each reads its own part of the data, and says what is wrong with it.
_DATA = "spvit_jax.data"
_FORMAT = logging.Formatter("%(asctime)s %(message)s", "%Y-%m-%d %H:%M:%S")


class _Screen(logging.Handler):
    """Writes lines above the progress bar, if there is one."""

    def __init__(self, level: int):
        super().__init__(level)
        self.setFormatter(_FORMAT)
        self.addFilter(_is_said)

    def emit(self, record: logging.LogRecord) -> None:
        tqdm.write(self.format(record), file=sys.stderr)


class _File(logging.FileHandler):
    """A log file that is given up, in one line, once it cannot be written."""

    def handleError(self, record: logging.LogRecord) -> None:
        del record
        log.removeHandler(self)
        log.warning("warning: %s goes no further: %s", self.baseFilename, sys.exc_info()[1])


def start() -> None:
    """Sends warnings to the standard error, and keeps them for the log of a run to come."""
    early = logging.handlers.MemoryHandler(sys.maxsize, flushLevel=sys.maxsize)
    early.setLevel(logging.WARNING)
    _send_to(_Screen(logging.WARNING), early)


def start_run(workdir: pathlib.Path | None) -> None:
    """Sends all lines to the standard error and to `train.log` in the workdir, if there is one.

    On a terminal the progress bar stands for the line per interval (level DEBUG). The file begins
    with the warnings since `start`.

    Raises:
      InputError: the file cannot be written.
    """
    early = [h for h in log.handlers if isinstance(h, logging.handlers.MemoryHandler)]
    screen = _Screen(logging.INFO if sys.stderr.isatty() else logging.DEBUG)
    if workdir is None or not distributed.is_primary():
        _send_to(screen)
        return
    try:
        file = _File(workdir / "train.log")
    except OSError as error:
        raise InputError(f"cannot write to workdir {workdir}: {error}") from error
    file.setFormatter(_FORMAT)
    for kept in early:
        kept.setTarget(file)
    _send_to(screen, file)  # closes the other handlers, which flushes them


def _send_to(*handlers: logging.Handler) -> None:
    """Sends what this project logs to these handlers alone."""
    log.setLevel(logging.DEBUG)
    # The root logger is absl's, and mute: orbax warns of its own defaults at every turn.
    log.propagate = False
    for handler in list(log.handlers):
        log.removeHandler(handler)
        handler.close()
    for handler in handlers:
        log.addHandler(handler)


def _is_said(record: logging.LogRecord) -> bool:
    """Returns whether this process says a line: what all know alike, only the first one does."""
    own = record.levelno >= logging.WARNING and record.name.startswith(_DATA)
    return own or distributed.is_primary()
