"""Ending together: when a process of a cluster fails, all end, and each says which and why."""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import signal
import sys
import threading
import time
import traceback
from typing import Any, NoReturn

import jax

from spvit_jax.distributed.coordination import PREFIX, rank_and_size, say, store
from spvit_jax.errors import exit_code

_POLL = 1.0  # seconds between looks at whether another process has failed
_GOODBYE = 10.0  # seconds in which a failing process lets the others read why

_ending = threading.Lock()  # so that one reason is said: the own one or another process's
_kept: list[Any] = []  # what C calls must live as long as the process


def watch(done: threading.Event) -> None:
    """Ends the process when another one says that it has failed."""
    client, (rank, _) = store(), rank_and_size()
    while not done.wait(_POLL):
        try:
            notices = client.key_value_dir_get(f"{PREFIX}/failed/")
        except jax.errors.JaxRuntimeError:
            return  # the coordinator is gone, which JAX notices by itself
        for key, notice in sorted(notices):
            culprit, (code, message) = key.rpartition("/")[2], json.loads(notice)
            if int(culprit) != rank and _ending.acquire(blocking=False):
                with contextlib.suppress(jax.errors.JaxRuntimeError):
                    client.key_value_set(f"{PREFIX}/read/{rank}", "")
                end(code, f"error: process {culprit} has stopped: {message}")


def fail(error: BaseException) -> NoReturn:
    """Ends this process, after the others have read why."""
    _ending.acquire()
    code = exit_code(error)
    message = (str(error).strip() or repr(error)).splitlines()[0]
    if isinstance(error, jax.errors.JaxRuntimeError) and "Gloo" in message:
        message = f"another process of the cluster was lost ({message})"
    elif code is None:
        traceback.print_exception(error)
        message = f"{type(error).__name__}: {message}"
    code = code or 1
    say(f"error: {message}")
    client, (rank, size) = store(), rank_and_size()
    others = {str(other) for other in range(size) if other != rank}
    deadline = time.monotonic() + _GOODBYE
    with contextlib.suppress(jax.errors.JaxRuntimeError):  # the coordinator may be gone
        client.key_value_set(f"{PREFIX}/failed/{rank}", json.dumps([code, message]))
        while others and time.monotonic() < deadline:
            time.sleep(_POLL / 10)
            for folder in ("read", "failed"):
                known = client.key_value_dir_get(f"{PREFIX}/{folder}/")
                others -= {key.rpartition("/")[2] for key, _ in known}
        if rank == 0:
            time.sleep(_POLL)  # with it goes the store, and the others may still be leaving
    end(code)


def end(code: int, line: str = "") -> NoReturn:
    """Ends the process at once: the usual way would wait for processes that do not come."""
    if line:
        say(line)
    with contextlib.suppress(OSError, ValueError):
        sys.stdout.flush()
    os._exit(code)


def name_what_aborts() -> None:
    """Ends the process with our own last line and code 1 where JAX's C++ side calls abort().

    It does so when another process is lost, from a thread to which Python has no access, and the
    callback that its client takes for this does not work from Python.
    """
    message = (
        b"error: JAX has ended this process, most often because another process of the cluster was "
        b"lost: the lines above name it. Start the same command again to go on from the last "
        b"checkpoint\n"
    )

    def on_abort(signum: int) -> None:
        del signum
        os.write(2, message)
        os._exit(1)

    callback = ctypes.CFUNCTYPE(None, ctypes.c_int)(on_abort)
    _kept.append(callback)
    ctypes.CDLL(None).signal(signal.SIGABRT, callback)
