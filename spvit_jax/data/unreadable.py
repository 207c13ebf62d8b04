"""Count and log of images that cannot be read; too many end the run."""

from __future__ import annotations

import logging
import re

import numpy as np

from spvit_jax.data.sources import Source
from spvit_jax.errors import InputError

_MAX_NAMED = 10  # files in the last message

_NODES = re.compile(r"\{\{.*?\}\}|\[Op:.*?\]")  # in TensorFlow's error messages

log = logging.getLogger("spvit_jax.data")


class UnreadableExamples:
    """Count of the examples of a source that cannot be read.

    Attributes:
      count: number of unreadable examples so far, each counted once.
    """

    def __init__(self, source: Source, limit: int):
        """Starts the count at 0; more than `limit` unreadable examples are an error."""
        self._source, self._limit = source, limit
        self._names: dict[int, str] = {}

    @property
    def count(self) -> int:
        """Number of unreadable examples so far, each counted once."""
        return len(self._names)

    def record(self, index: int, error: Exception) -> None:
        """Counts an unreadable example, and logs it the first time.

        Raises:
          InputError: the count is now above the limit; names the files.
        """
        if index in self._names:
            return
        name = self._names[index] = self._name_of(index)
        reason = _NODES.sub("", str(error)).strip().partition("\n")[0][:200]
        log.warning("unreadable      %s: %s", name, reason or type(error).__name__)
        if self.count > self._limit or self.count == len(self._source):
            names = list(self._names.values())
            rest = f" and {len(names) - _MAX_NAMED} more" if len(names) > _MAX_NAMED else ""
            raise InputError(
                f"{len(names)} images cannot be read, more than data.max_unreadable="
                f"{self._limit}: {', '.join(names[:_MAX_NAMED])}{rest}; replace these files, or "
                "allow more of them"
            )

    def _name_of(self, index: int) -> str:
        try:
            return f"{self._source.file_names(np.array([index]))[0]} (example {index})"
        except Exception:  # the file's name may be unreadable too
            return f"example {index}"
