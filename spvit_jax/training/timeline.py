"""Timeline of a run: seconds by phase, times of steps, and whether it makes progress.

The main thread says what it does (`phase`); what is in no phase is the steps themselves. JAX
returns from a step before the devices have taken it, so a thread of its own waits for each.
"""

from __future__ import annotations

import collections
import contextlib
import queue
import statistics
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Self

import jax
import jax.numpy as jnp

from spvit_jax.distributed import Activity

START, COMPILE, INPUT, STEP = "start", "compile", "input", "step"
EVALUATION, CHECKPOINT, REPORT = "evaluation", "checkpoint", "report"
PHASES = (START, COMPILE, INPUT, STEP, EVALUATION, CHECKPOINT, REPORT)

_STILL = 30  # median steps without the end of one, after which a run stands still
_LONGER = 6  # times the limit of a step that compiling, evaluating and saving may take
_RECENT = 50  # steps whose median counts for the limit


class Timeline:
    """Times of a run since its start; a context manager that waits for the ends of steps.

    Each second is that of one phase: compiling, in whatever phase it happens; waiting for input
    only while the devices have nothing to do; steps; evaluation; saving; writing records; and the
    start, all before the first step.
    """

    def __init__(
        self,
        stall_timeout: float = 0.0,
        *,
        start_step: int = 0,
        clock: Callable[[], float] = time.monotonic,
    ):
        """Starts in the phase `start`.

        Args:
          stall_timeout: least seconds without the end of a step after which the run stands still;
            0 for never.
          start_step: number of steps taken before.
          clock: function that returns the time in seconds.
        """
        self._stall_timeout, self._clock = stall_timeout, clock
        self._lock = threading.RLock()
        self._phase, self._since = START, clock()
        self._progress = self._resumed = self._since
        self._seconds = dict.fromkeys(PHASES, 0.0)
        self._compiled: list[tuple[float, float]] = []  # intervals in the present phase
        self._step, self._running = start_step, 0  # steps begun; of them not ended
        self._step_seconds: list[float] = []  # since `take_step_seconds`
        self._recent: collections.deque[float] = collections.deque(maxlen=_RECENT)
        self._has_saved = False
        self._counters: queue.SimpleQueue[jax.Array | None] = queue.SimpleQueue()
        self._waiter = threading.Thread(target=self._note_ends, daemon=True)
        self._thread = threading.get_ident()

    def __enter__(self) -> Self:
        jax.monitoring.register_event_duration_secs_listener(self._on_event)
        self._waiter.start()
        return self

    def __exit__(self, *_: object) -> None:
        jax.monitoring.unregister_event_duration_listener(self._on_event)
        self._counters.put(None)
        self._waiter.join(timeout=1)  # not for ever: the devices may have failed

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Counts the time inside as that of a phase; profiles show it under the same name."""
        outer = self._switch(name)
        try:
            with jax.profiler.TraceAnnotation(name):
                yield
        finally:
            self._switch(outer)
        self._has_saved |= name == CHECKPOINT

    def begin_steps(self, step: int) -> None:
        """Ends the phase `start`: from here on, what is in no phase is steps."""
        self._step = step
        self._switch(STEP)

    def follow(self, counter: jax.Array) -> None:
        """Notes that a step has begun, and when the devices will have taken it.

        Args:
          counter: scalar that the step computes, which the next step may donate.
        """
        copy = jnp.copy(counter.addressable_data(0))
        with self._lock:
            self._step += 1
            self._running += 1
        self._counters.put(copy)

    def tick(self) -> None:
        """Notes progress within a phase, as the end of a batch of evaluation."""
        self._progress = self._clock()

    def seconds(self) -> dict[str, float]:
        """Returns the seconds of each phase until now, which add up to the time since the start."""
        with self._lock:
            self._switch(self._phase)
            return dict(self._seconds)

    def take_step_seconds(self) -> list[float]:
        """Returns the seconds of each step that has ended since the last call.

        A step begins when the one before it ends, and after an interruption (compiling, an
        evaluation, saving) when that does. Waiting for its input is part of it.
        """
        with self._lock:
            taken, self._step_seconds = self._step_seconds, []
        return taken

    def activity(self) -> Activity:
        """Returns what the main thread does, for the watchdog."""
        with self._lock:
            compiling = not self._recent and self._phase == STEP
            limit = max(self._stall_timeout, _STILL * _median(self._recent))
            if self._phase not in (STEP, INPUT) or not self._recent:
                limit *= _LONGER
            return Activity(
                COMPILE if compiling else self._phase,
                self._step,
                self._clock() - max(self._since, self._progress),
                limit if self._stall_timeout else float("inf"),
                self._has_saved,
            )

    def _switch(self, name: str) -> str:
        """Ends the present phase and begins another; returns the name of the one that ends."""
        with self._lock:
            now, ended = self._clock(), self._phase
            elapsed = now - self._since
            compiled = sum(end - max(start, self._since) for start, end in self._compiled)
            rest = elapsed - compiled
            if ended == INPUT:
                # Before the end of the last step the devices were not waiting.
                busy = now if self._running else max(self._progress, self._since)
                hidden = min(busy - self._since, rest)
                self._seconds[STEP] += hidden
                rest -= hidden
            self._seconds[COMPILE] += compiled
            self._seconds[ended] += rest
            if ended not in (STEP, INPUT):
                self._resumed = now
            self._phase, self._since, self._compiled = name, now, []
            return ended

    def _on_event(self, event: str, duration_secs: float, **_: str | int) -> None:
        """Notes the seconds that JAX says it took to trace, lower or compile on the main thread."""
        if "/compile/" in event and threading.get_ident() == self._thread:
            now = self._clock()
            start = now - duration_secs
            # What was traced within a trace is a part of it.
            self._compiled = [span for span in self._compiled if span[0] < start] + [(start, now)]
            self._resumed = now

    def wait_for_steps(self) -> None:
        """Waits for the steps that have begun and notes when each ends, without the thread."""
        self._counters.put(None)
        self._note_ends()

    def _note_ends(self) -> None:
        """Waits for one step after the other, until there is None in place of its counter."""
        while (counter := self._counters.get()) is not None:
            try:
                counter.block_until_ready()
            except Exception:
                return  # the main thread meets it too, and reports it
            with self._lock:
                now = self._clock()
                seconds = now - max(self._progress, self._resumed)
                self._progress = now
                self._running -= 1
                self._step_seconds.append(seconds)
                self._recent.append(seconds)


def spread(seconds: Sequence[float]) -> dict[str, float]:
    """Returns the median, the 90th percentile and the maximum of the seconds of steps."""
    ordered = sorted(seconds)
    p90 = ordered[min(len(ordered) * 9 // 10, len(ordered) - 1)]
    return {"median": statistics.median(ordered), "p90": p90, "max": ordered[-1]}


def _median(seconds: Sequence[float]) -> float:
    return statistics.median(seconds) if seconds else 0.0
