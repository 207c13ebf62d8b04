"""Watchdog: ends a run that stands still, with the stacks of its threads and the reason.

A loss of power or a kill is seen by missing heartbeats. What is watched here has a heartbeat and
makes no progress: an input that blocks, a device that never answers, a file system that hangs. In
a cluster the others wait in a collective for the process that stands still, so that all of them
are late; they tell each other where they are, and name the one that is behind.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import threading
import time
from collections.abc import Callable, Mapping
from typing import NamedTuple, Self

import jax

from spvit_jax.distributed import failure
from spvit_jax.distributed.coordination import PREFIX, is_formed, rank_and_size, store
from spvit_jax.errors import FAILED, START_AGAIN

_POLL = 1.0  # seconds between looks
_ANSWER_TIMEOUT = 15.0  # seconds in which the other processes say where they are
_ASK_AGAIN = 5.0  # seconds after which they are asked again, if one of them still had time
# Seconds beyond the limit after which a thread that needs no Python ends the process: it works
# where C code holds Python's lock, and then says no more than the stacks.
_NATIVE_GRACE = 60.0

_WAITS_FOR = {
    "start": "before the first step",
    "compile": "in compiling or taking its first step",
    "input": "waiting for input",
    "step": "waiting for the devices to take a step",
    "evaluation": "in an evaluation",
    "checkpoint": "in saving a checkpoint",
    "report": "in writing its records",
}


class Activity(NamedTuple):
    """What a process does, and for how long it may.

    Attributes:
      phase: name of the phase, a key of `_WAITS_FOR`.
      step: number of steps begun.
      elapsed: seconds since the phase began, or the last step or batch ended.
      limit: seconds after which the process stands still; infinite for never.
      has_saved: whether this process has saved a checkpoint since its start.
    """

    phase: str
    step: int
    elapsed: float
    limit: float
    has_saved: bool = False

    @property
    def left(self) -> float:
        """Seconds left until the limit; negative beyond it."""
        return self.limit - self.elapsed


class Watchdog:
    """Watchdog over the process in a thread of its own; a context manager.

    It ends the process with exit code 75 if this process has saved a checkpoint, from which the run
    goes on, and else with 1: what stands still each time before that is not started for ever.
    """

    def __init__(self, activity: Callable[[], Activity]):
        """Prepares to watch what `activity` returns."""
        self._activity = activity
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._asked: tuple[int, float] | None = None  # round of questions, and when it ends
        self._next_round, self._ask_from = 0, 0.0

    def __enter__(self) -> Self:
        current = self._activity()
        if current.limit < float("inf"):
            self._arm(current)
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        if self._thread.is_alive():
            self._thread.join()
        faulthandler.cancel_dump_traceback_later()

    def _watch(self) -> None:
        while not self._done.wait(_POLL):
            current = self._activity()
            self._arm(current)
            message = None
            if is_formed():
                with contextlib.suppress(jax.errors.JaxRuntimeError):  # the coordinator is lost
                    message = self._consult(current)
            elif current.left <= 0:
                message = verdict({0: current}, 1)
            if message is not None:
                code = START_AGAIN if current.has_saved else FAILED
                failure.stop(code, message, stacks=True)

    def _arm(self, current: Activity) -> None:
        """Has the process end, with stacks and exit code 1, if this is not called again in time."""
        seconds = max(current.left, 0) + _NATIVE_GRACE
        faulthandler.dump_traceback_later(seconds, exit=True, file=2)

    def _consult(self, current: Activity) -> str | None:
        """Answers the other processes, and asks them if this one is late.

        Returns:
          Why the run has to end, or None.
        """
        client, (rank, size) = store(), rank_and_size()
        rounds: dict[int, dict[int, Activity]] = {}
        for key, text in client.key_value_dir_get(f"{PREFIX}/activity/"):
            number, process = map(int, key.split("/")[-2:])
            rounds.setdefault(number, {})[process] = Activity(*json.loads(text))
        for number, answers in rounds.items():
            if rank not in answers:
                client.key_value_set(_key(number, rank), json.dumps(current))
        now = time.monotonic()
        if current.left > 0:
            self._asked = None
        elif self._asked is None and now >= self._ask_from:
            # That of another process that is late too, if this one has not judged it yet.
            number = max(self._next_round, max(rounds, default=0))
            self._asked = number, now + _ANSWER_TIMEOUT
            if number not in rounds:
                client.key_value_set(_key(number, rank), json.dumps(current))
        elif self._asked is not None:
            number, ends = self._asked
            answers = rounds.get(number, {})
            if len(answers) == size or now >= ends:
                self._asked, self._next_round = None, number + 1
                self._ask_from = now + _ASK_AGAIN
                return verdict(answers, size)
        return None


def verdict(answers: Mapping[int, Activity], size: int) -> str | None:
    """Returns why a run has to end, naming the processes that stand still; None if it has not to.

    Args:
      answers: what the processes do, by rank; one that does not answer is not there.
      size: number of processes.
    """
    if any(answer.left > 0 for answer in answers.values()):
        return None
    silent = [rank for rank in range(size) if rank not in answers]
    first = min(answer.step for answer in answers.values())
    behind = {rank: answer for rank, answer in answers.items() if answer.step == first}
    # A process that waits for the devices waits for the others, where there are some.
    stuck = {rank: answer for rank, answer in behind.items() if answer.phase != "step"} or behind
    waited = max(answer.elapsed for answer in answers.values())
    line = f"the run stands still: no step has ended for {waited:.0f} s (config.stall_timeout)"
    if silent:
        return f"{line}; {_processes(silent)} not even answer, and the others wait"
    of_each = [
        f"{f'process {rank}' if size > 1 else 'it'} is {_WAITS_FOR[answer.phase]}"
        for rank, answer in sorted(stuck.items())
    ]
    more = f" and {len(of_each) - 4} more" if len(of_each) > 4 else ""
    others = "; the others wait" if len(stuck) < size else ""
    return f"{line}; after {first} steps {', '.join(of_each[:4])}{more}{others}"


def _processes(ranks: list[int]) -> str:
    if len(ranks) == 1:
        return f"process {ranks[0]} does"
    return f"processes {', '.join(map(str, ranks[:8]))}{'…' if len(ranks) > 8 else ''} do"


def _key(number: int, rank: int) -> str:
    return f"{PREFIX}/activity/{number}/{rank}"
