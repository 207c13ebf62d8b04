"""A process that stands still is ended in time, says where it stood, and whose fault it was."""

import subprocess
import sys

import pytest

from spvit_jax.distributed.watchdog import Activity, verdict
from tests.helpers import REPOSITORY

STANDS = """
import ctypes, threading, time
from spvit_jax import distributed
from spvit_jax.distributed import watchdog

watchdog._NATIVE_GRACE = 1.0
start = time.monotonic()

def activity():
    return distributed.Activity("input", 57, time.monotonic() - start, 0.5, {saved})

def read_from_a_disk_that_hangs():
    {wait}

with distributed.Watchdog(activity):
    read_from_a_disk_that_hangs()
"""


@pytest.mark.parametrize(
    ("saved", "wait", "code", "line"),
    [
        (
            True,
            "threading.Event().wait()",
            75,
            "error: the run stands still: no step has ended for 1 s (config.stall_timeout); "
            "after 57 steps it is waiting for input",
        ),
        (False, "threading.Event().wait()", 1, "after 57 steps it is waiting for input"),
        # A function of C that keeps Python's lock: no thread of Python runs any more.
        (True, "ctypes.PyDLL(None).sleep(60)", 1, ""),
    ],
    ids=["after a checkpoint", "before any checkpoint", "with Python's lock"],
)
def test_a_process_that_stands_still_ends_with_its_stacks(saved, wait, code, line):
    program = STANDS.format(saved=saved, wait=wait)
    result = subprocess.run(
        [sys.executable, "-c", program],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=30,
    )
    assert result.returncode == code, result.stderr
    assert "in read_from_a_disk_that_hangs" in result.stderr
    assert line in result.stderr.splitlines()[-1]


def states(**of_each):
    """As the processes answer, the phase's name and the number of steps, and seconds if not 300."""
    return {
        int(name[1:]): Activity(phase, step, *(rest or (300.0,)), 300.0)
        for name, (phase, step, *rest) in of_each.items()
    }


@pytest.mark.parametrize(
    ("answers", "size", "words"),
    [
        ({"p0": ("input", 5)}, 1, "after 5 steps it is waiting for input"),
        (
            {"p0": ("step", 7), "p1": ("input", 6), "p2": ("step", 7)},
            3,
            "after 6 steps process 1 is waiting for input; the others wait",
        ),
        (
            {"p0": ("report", 6), "p1": ("step", 6)},
            2,
            "after 6 steps process 0 is in writing its records; the others wait",
        ),
        # The devices: all wait for each other.
        (
            {"p0": ("step", 6), "p1": ("step", 6)},
            2,
            "process 0 is waiting for the devices to take a step, process 1 is waiting for the dev",
        ),
        ({"p0": ("step", 6)}, 2, "process 1 does not even answer, and the others wait"),
        ({"p1": ("step", 6)}, 4, "processes 0, 2, 3 do not even answer"),
    ],
)
def test_who_is_named(answers, size, words):
    assert words in verdict(states(**answers), size)


def test_a_process_that_still_has_time_is_waited_for():
    """The others wait for its checkpoint, which may take longer than their step."""
    assert verdict(states(p0=("checkpoint", 6, 299.0), p1=("step", 6)), 2) is None
