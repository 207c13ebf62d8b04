"""Event files of TensorBoard, written without TensorFlow, on this machine or in a bucket."""

from __future__ import annotations

import io
import os
import socket
import time
from collections.abc import Mapping

from etils import epath
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter

from spvit_jax.append_only import AppendOnlyFile


class EventFile:
    """Event file of one process; a run that goes on has several, which TensorBoard joins."""

    def __init__(self, folder: epath.Path):
        """Begins a new file in a folder that exists.

        Raises:
          OSError: the file cannot be written.
        """
        now = time.time()
        name = f"events.out.tfevents.{now:017.6f}.{socket.gethostname()}.{os.getpid()}"
        self._file = AppendOnlyFile(folder / name)
        self._append(Event(wall_time=now, file_version="brain.Event:2"))

    def write_scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Writes numbers by name, all of one step.

        Raises:
          OSError: the file cannot be written.
        """
        scalars = [Summary.Value(tag=name, simple_value=value) for name, value in values.items()]
        self._append(Event(wall_time=time.time(), step=step, summary=Summary(value=scalars)))

    def flush(self) -> None:
        """Puts what has been written where it survives this machine, as `AppendOnlyFile.flush`."""
        self._file.flush()

    def close(self) -> None:
        """Puts all that has been written in its place, as `flush`."""
        self.flush()

    def _append(self, event: Event) -> None:
        record = io.BytesIO()
        RecordWriter(record).write(event.SerializeToString())
        self._file.write(record.getvalue())
