"""Failing together: when a process of a cluster fails, all end, and each reports which and why."""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import json
import os
import signal
import sys
import threading
import time
import traceback
from typing import Any, NoReturn

import jax

from spvit_jax.distributed import liveness
from spvit_jax.distributed.coordination import PREFIX, is_formed, rank_and_size, say, store
from spvit_jax.errors import FAILED, START_AGAIN, exit_code

_POLL = 1.0  # seconds between looks at whether another process has failed
_READ_TIMEOUT = 10.0  # seconds that a failing process waits for the others to read its error
_HEAD_START = 5.0  # seconds for a lost process to be seen by its own exit code, if it has one

_ending = threading.RLock()  # one error is reported: this process's or another's
_callbacks: list[Any] = []  # functions that C calls, which must not be garbage-collected


def watch(done: threading.Event) -> None:
    """Ends this process when another process of the cluster reports that it has failed.

    Args:
      done: event that ends the watching; the function runs in a thread of its own.
    """
    client, (rank, _) = store(), rank_and_size()
    while not done.wait(_POLL):
        try:
            liveness.exchange()
            notices = client.key_value_dir_get(f"{PREFIX}/failed/")
        except jax.errors.JaxRuntimeError:
            return  # the coordinator is lost, which JAX handles itself
        for key, notice in sorted(notices):
            failed_rank, (code, message, stacks) = key.rpartition("/")[2], json.loads(notice)
            if int(failed_rank) != rank and _ending.acquire(blocking=False):
                with contextlib.suppress(jax.errors.JaxRuntimeError):
                    client.key_value_set(f"{PREFIX}/read/{rank}", "")
                if stacks:
                    faulthandler.dump_traceback(file=2)
                end(code, f"error: process {failed_rank} has stopped: {message}")


def fail(error: BaseException) -> NoReturn:
    """Ends this process for an error, after the other processes have read it.

    Args:
      error: exception; its exit code is that of `errors.exit_code`, 75 if it is the loss of another
        process, or 1.
    """
    code = exit_code(error)
    message = (str(error).strip() or repr(error)).splitlines()[0]
    is_loss = isinstance(error, jax.errors.JaxRuntimeError) and (
        "Gloo" in message or bool(liveness.wait_for_loss())
    )
    _ending.acquire()
    if is_loss:
        code = START_AGAIN
        message = f"another process of the cluster was lost ({message})"
    elif code is None and not isinstance(error, TimeoutError):
        traceback.print_exception(error)
        message = f"{type(error).__name__}: {message}"
    stop(code or FAILED, message, stacks=isinstance(error, TimeoutError))


def stop(code: int, message: str, *, stacks: bool = False) -> NoReturn:
    """Ends this process with an error line, after the other processes have read it.

    Args:
      code: exit code, also of the other processes.
      message: the error.
      stacks: whether this process and the others first print what each of their threads does.
    """
    _ending.acquire()
    if stacks:
        faulthandler.dump_traceback(file=2)
    say(f"error: {message}")
    if not is_formed():
        end(code)
    client, (rank, size) = store(), rank_and_size()
    others = {str(other) for other in range(size) if other != rank}
    deadline = time.monotonic() + _READ_TIMEOUT
    with contextlib.suppress(jax.errors.JaxRuntimeError):  # the coordinator may be gone
        client.key_value_set(f"{PREFIX}/failed/{rank}", json.dumps([code, message, stacks]))
        while others and time.monotonic() < deadline:
            time.sleep(_POLL / 10)
            for folder in ("read", "failed"):
                known = client.key_value_dir_get(f"{PREFIX}/{folder}/")
                others -= {key.rpartition("/")[2] for key, _ in known}
        if rank == 0:
            time.sleep(_POLL)  # the store ends with process 0, and others may still use it
    end(code)


def end(code: int, line: str = "") -> NoReturn:
    """Ends this process at once, without the usual shutdown, which waits for the other processes.

    Args:
      code: exit code.
      line: last line for standard error; empty for none.
    """
    if line:
        say(line)
    with contextlib.suppress(OSError, ValueError):
        sys.stdout.flush()
    os._exit(code)


def name_what_aborts() -> None:
    """Installs a handler of SIGABRT that ends the process with an error line, and with exit code 75
    if another process is lost, else 1.

    JAX's C++ code calls abort() when another process is lost, from a thread to which Python has no
    access, and the callback that its client takes for this does not work from Python. It also does
    so for errors of its own, which are no reason to start the command again for ever.
    """

    def on_abort(signum: int) -> None:
        del signum
        if lost := liveness.wait_for_loss():
            names = ", ".join(f"process {rank}" for rank in lost)
            message = f"another process of the cluster was lost ({names})"
            time.sleep(_HEAD_START)
        else:
            message = "JAX has ended this process, and the others of the cluster are alive"
        line = f"error: {message}; the lines above say why. Start the same command again to go on "
        os.write(2, f"{line}from the last checkpoint\n".encode())
        os._exit(START_AGAIN if lost else FAILED)

    callback = ctypes.CFUNCTYPE(None, ctypes.c_int)(on_abort)
    _callbacks.append(callback)
    ctypes.CDLL(None).signal(signal.SIGABRT, callback)
