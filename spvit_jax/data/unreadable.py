"""Images that cannot be read: each is logged and counted, and too many end the run."""

from __future__ import annotations

import logging
import re

import numpy as np

from spvit_jax.data.sources import Source
from spvit_jax.errors import InputError

_NAMED = 10  # files that the last message names

_NODES = re.compile(r"\{\{.*?\}\}|\[Op:.*?\]")  # where in its graph TensorFlow failed

log = logging.getLogger("spvit_jax.data")


class UnreadableExamples:
    """Keeps count of the examples of a source that cannot be read.

    Attributes:
      count: how many there were so far, each counted once.
    """

    def __init__(self, source: Source, limit: int):
        """Starts with none; more than `limit` of them are an error."""
        self._source, self._limit = source, limit
        self._names: dict[int, str] = {}

    @property
    def count(self) -> int:
        return len(self._names)

    def note(self, index: int, error: Exception) -> None:
        """Counts an example, and logs it the first time.

        Raises:
          InputError: there are now more than the limit; names the files.
        """
        if index in self._names:
            return
        name = self._names[index] = self._name_of(index)
        reason = _NODES.sub("", str(error)).strip().partition("\n")[0][:200]
        log.warning("unreadable      %s: %s", name, reason or type(error).__name__)
        if self.count > self._limit or self.count == len(self._source):
            names = list(self._names.values())
            rest = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
            raise InputError(
                f"{len(names)} images cannot be read, more than data.max_unreadable="
                f"{self._limit}: {', '.join(names[:_NAMED])}{rest}; replace these files, or allow "
                "more of them"
            )

    def _name_of(self, index: int) -> str:
        try:
            return f"{self._source.file_names(np.array([index]))[0]} (example {index})"
        except Exception:  # where the file's name is as unreadable as the image
            return f"example {index}"
