"""Compiles a run in a process of its own, which can be ended at once and whose crash is an error.

A compiler of TPUs does not see Ctrl-C, takes minutes without a word, keeps its memory, and may end
the process that it is in.
"""

from __future__ import annotations

import multiprocessing
import multiprocessing.connection
import os
import pathlib
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess

import jax

from spvit_jax.errors import first_line
from spvit_jax.preflight import libtpu
from spvit_jax.preflight.bundles import libtpu_options
from spvit_jax.preflight.compile import (
    EVAL_STEP,
    TRAIN_STEP,
    CompiledStep,
    CompilerError,
    DoesNotFitError,
)
from spvit_jax.preflight.roofline import compile_eval_step, compile_train_step
from spvit_jax.preflight.topology import Topology, get_topology
from spvit_jax.training.run import TrainingRun

# Returns the run on the devices of a topology; sent to the process by its name and arguments.
MakeRun = Callable[..., TrainingRun]
_SECONDS_BETWEEN_LINES = 60
_MESSAGES = "stderr.txt"


def compile_steps(
    make_run: MakeRun, topology: Topology, *, bundles: bool = False
) -> tuple[CompiledStep, CompiledStep]:
    """Compiles the train step and the eval step of a run, and shows that it is at work.

    Args:
      make_run: function of `devices` that returns the run, and that can be pickled.
      topology: chips to compile for.
      bundles: whether to time kernels by their instruction bundles; compiling takes three times as
        long.

    Raises:
      DoesNotFitError: the compiler ran out of the chip's memory.
      CompilerError: the compiler failed or crashed, or what it made cannot be read.
    """
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    with tempfile.TemporaryDirectory(prefix="preflight-") as folder:
        process = context.Process(
            target=_compile,
            args=(theirs, folder, bundles, make_run, topology.slice_name, topology.num_slices),
        )
        # A terminal's Ctrl-C goes to both processes; this one ends the other.
        before = signal.signal(signal.SIGINT, signal.SIG_IGN)
        try:
            process.start()
        finally:
            signal.signal(signal.SIGINT, before)
        theirs.close()
        try:
            return _wait(ours, process, pathlib.Path(folder))
        finally:
            process.kill()
            process.join()


def _wait(
    pipe: Connection, process: BaseProcess, folder: pathlib.Path
) -> tuple[CompiledStep, CompiledStep]:
    """Returns the compiled steps that a process sends, or raises what it sends instead."""
    stage, progress = "the program", _Progress()
    try:
        while True:
            while not pipe.poll(1.0):
                progress.show(stage)
            what, value = pipe.recv()
            if what == "stage":
                stage = value
            elif what == "error":
                raise value
            else:
                return value
    except EOFError:
        process.join()
        raise CompilerError(
            f"the compiler crashed at {stage}: {_ending(process)}{_keep_messages(folder)}"
        ) from None
    finally:
        progress.end()


def _ending(process: BaseProcess) -> str:
    """Returns how a process ended, in words."""
    code = process.exitcode or 0
    if code == -signal.SIGKILL:
        return "its process was killed, perhaps because this machine has too little memory"
    if code < 0:
        return f"its process ended by {signal.Signals(-code).name}"
    return f"its process ended with exit code {code}"


def _keep_messages(folder: pathlib.Path) -> str:
    """Keeps what a process wrote to its standard error, and returns where, in words."""
    messages = folder / _MESSAGES
    if not messages.exists() or not messages.stat().st_size:
        return ""
    kept = pathlib.Path(tempfile.mkdtemp(prefix="preflight-")) / _MESSAGES
    shutil.copyfile(messages, kept)
    return f"; what it wrote is in {kept}"


class _Progress:
    """Time that has passed: in place on a terminal, else a line of the report now and then."""

    def __init__(self) -> None:
        self._start = self._shown = time.monotonic()
        self._on_terminal = sys.stderr.isatty()

    def show(self, stage: str) -> None:
        """Shows what is being compiled, and for how long."""
        now = time.monotonic()
        minutes, seconds = divmod(int(now - self._start), 60)
        words = f"compiling {stage}, {minutes}:{seconds:02d}"
        if self._on_terminal:
            print(f"\r\033[K{words}", end="", file=sys.stderr, flush=True)
        elif now - self._shown >= _SECONDS_BETWEEN_LINES:
            self._shown = now
            print(words, flush=True)

    def end(self) -> None:
        """Removes what is in place on a terminal."""
        if self._on_terminal:
            print("\r\033[K", end="", file=sys.stderr, flush=True)


def _compile(
    pipe: Connection,
    folder: str,
    dump: bool,
    make_run: MakeRun,
    slice_name: str,
    num_slices: int,
) -> None:
    """Compiles both steps and sends them, or the error, through a pipe; runs in the process."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    written = pathlib.Path(folder)
    with open(written / _MESSAGES, "wb") as messages:  # a compiler that crashes writes pages
        os.dup2(messages.fileno(), sys.stderr.fileno())
    if dump:
        options = os.environ.get("LIBTPU_INIT_ARGS", ""), libtpu_options(written)
        os.environ["LIBTPU_INIT_ARGS"] = " ".join(options).strip()
    try:
        libtpu.prepare()
        # What is compiled for absent chips cannot be read back from JAX's cache.
        jax.config.update("jax_enable_compilation_cache", False)
        topology = get_topology(slice_name, num_slices)
        run = make_run(devices=topology.devices)
        pipe.send(("stage", f"the {TRAIN_STEP}"))
        train = compile_train_step(run, topology.chip, written if dump else None)
        pipe.send(("stage", f"the {EVAL_STEP}"))
        evaluation = compile_eval_step(run, topology.chip, written if dump else None)
        pipe.send(("done", (train, evaluation)))
    except (DoesNotFitError, CompilerError) as error:
        pipe.send(("error", error))
    except Exception as error:
        words = f"{type(error).__name__}: {first_line(error)}"
        pipe.send(("error", CompilerError(f"the run cannot be compiled: {words}")))


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None  # this is the other process
    multiprocessing.connection.wait([parent.sentinel])
    os._exit(1)
