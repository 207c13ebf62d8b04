"""Profiles of a run: traces of some of its steps, for xprof and TensorBoard.

A trace begins at a step that the configuration names, or when somebody touches the file `profile`
in the workdir of a run that goes on. It is written beside the TensorBoard files in the workdir, in
one folder for each process.
"""

from __future__ import annotations

import logging
import pathlib
import tempfile
from contextlib import AbstractContextManager
from typing import Self

import jax
from etils import epath

from spvit_jax import paths
from spvit_jax.errors import first_line

log = logging.getLogger("spvit_jax")

_REQUEST = "profile"  # file in the workdir


class Profiler:
    """Profiler of some steps of a run, where asked for; a context manager."""

    def __init__(self, workdir: epath.Path, *, start: int | None, steps: int):
        """Prepares to trace.

        Args:
          workdir: folder of the run.
          start: number of steps after which a trace begins; None for none.
          steps: number of steps in a trace.
        """
        self._workdir, self._start, self._steps = workdir, start, steps
        self._answered = self._request()
        self._wanted = False
        self._trace: tempfile.TemporaryDirectory | None = None
        self._stop = 0  # step after which the present trace ends

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._trace is not None:
            self.end()

    def look(self) -> None:
        """Looks whether somebody has asked for a trace, which then begins at the next step."""
        request = self._request()
        self._wanted |= request is not None and request != self._answered
        self._answered = request

    def step(self, step: int) -> AbstractContextManager[object]:
        """Returns a context in which a step is to begin, for its number in the trace.

        Args:
          step: number of steps taken before.
        """
        if self._trace is None and (self._wanted or step == self._start):
            self._begin(step)
        return jax.profiler.StepTraceAnnotation("train", step_num=step)

    def ends_at(self, step: int) -> bool:
        """Returns whether a step, counted from 1, is the last of a trace."""
        return self._trace is not None and step >= self._stop

    def end(self) -> None:
        """Writes the trace to the workdir; what cannot be written there does not end the run."""
        assert self._trace is not None
        source = pathlib.Path(self._trace.name)
        try:
            jax.profiler.stop_trace()
            for path in source.rglob("*.xplane.pb"):
                target = self._workdir / str(path.relative_to(source))
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(path.read_bytes())
                log.info("profile         of %d steps in %s", self._steps, target.parent)
        except (OSError, RuntimeError) as error:
            log.warning("warning: the profile cannot be written: %s", first_line(error))
        self._trace.cleanup()
        self._trace = None

    def _request(self) -> float | None:
        """Returns when the file that asks for a trace was touched; None if there is none."""
        try:
            return paths.modified(self._workdir / _REQUEST)
        except OSError:
            return None

    def _begin(self, step: int) -> None:
        options = jax.profiler.ProfileOptions()
        options.python_tracer_level = 0  # every call of Python would make it slow and large
        options.session_id = f"step_{step}-process_{jax.process_index()}"
        self._trace, self._stop = tempfile.TemporaryDirectory(), step + self._steps
        self._wanted = False
        jax.profiler.start_trace(self._trace.name, profiler_options=options)
