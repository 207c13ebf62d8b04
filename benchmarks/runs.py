"""Training runs of benchmarks: what a run is, running those that are missing, and their records.

A run is the project's command with a recipe on digits, as a user types it. Commands are forked from
one process that has the imports done, one at a time on each core, and share their compiled
programs. A run that is complete has a record and is not repeated; one that was cut off goes on
where it stopped. Which runs there are, and what is made of them, is up to each benchmark.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import fcntl
import importlib
import json
import multiprocessing
import os
import pathlib
import queue
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

SEEDS = (0, 1, 2, 3, 4)
_EVALUATIONS = 10  # of a run, at equal intervals

_FORKED = multiprocessing.get_context("forkserver")
_FORKED.set_forkserver_preload(["spvit_jax.train", "matplotlib.pyplot"])


@dataclasses.dataclass(frozen=True)
class Run:
    """A training run on digits.

    Attributes:
      recipe: argument of `configs/digits.py`, such as "spvit" or "mait,100".
      seed: seed of the weights, the order and everything else.
      steps: training steps of 64 images.
      changes: further fields of the configuration, such as "model.spatial_layers=2".
      package: module that the command imports first, which registers a model.
      start: run whose weights it starts from; None for random ones.
    """

    recipe: str
    seed: int
    steps: int
    changes: tuple[str, ...] = ()
    package: str | None = None
    start: Run | None = None

    def __str__(self) -> str:
        words = [self.recipe, f"{self.steps} steps", *self.changes, f"seed {self.seed}"]
        return ", ".join(words)

    @property
    def folder(self) -> str:
        """Name of the run's folder: its differences from the recipe."""
        start = [] if self.start is None else [f"from {self.start.folder}"]
        words = [self.recipe, str(self.steps), *self.changes, *start, str(self.seed)]
        return re.sub(r"[^\w.=]+", "-", " ".join(words)).strip("-")

    def arguments(self, output: pathlib.Path) -> list[str]:
        """Returns the arguments of the training command, for a folder of all runs' folders."""
        interval = f"{-(-self.steps // _EVALUATIONS)} steps"
        fields = {
            "seed": self.seed,
            "schedule.total": f"{self.steps} steps",
            "eval_every": interval,
            "eval_raw": True,
            "checkpoint.every": interval,
        }
        return [
            f"--config=configs/digits.py:{self.recipe}",
            *(f"--config.{name}={value}" for name, value in fields.items()),
            *(f"--config.{change}" for change in self.changes),
            *([] if self.package is None else [f"--import={self.package}"]),
            *([] if self.start is None else [f"--config.init_from={output / self.start.folder}"]),
            f"--workdir={output / self.folder}",
        ]


@dataclasses.dataclass(frozen=True)
class Record:
    """What remains of a complete run.

    Attributes:
      run: the run.
      steps: numbers of steps after which it was evaluated.
      top1: test accuracy of the moving average at each, between 0 and 1.
      raw: the same of the weights themselves.
      seconds: duration of its last command, which is that of all of it if nothing cut it off.
      commit: commit of the code.
    """

    run: Run
    steps: tuple[int, ...]
    top1: tuple[float, ...]
    raw: tuple[float, ...]
    seconds: float
    commit: str

    @classmethod
    def from_json(cls, line: str) -> Record:
        """Reads what `to_json` wrote."""
        fields: dict[str, Any] = json.loads(line)
        tuples = {name: tuple(fields[name]) for name in ("steps", "top1", "raw")}
        return cls(**fields | tuples | {"run": _read_run(fields["run"])})

    def to_json(self) -> str:
        """Returns the record as one line of JSON."""
        return json.dumps(dataclasses.asdict(self))


def _read_run(fields: dict[str, Any]) -> Run:
    start = None if fields["start"] is None else _read_run(fields["start"])
    return Run(**fields | {"changes": tuple(fields["changes"]), "start": start})


def read_records(path: pathlib.Path) -> dict[Run, Record]:
    """Reads a file of records; there are none where there is no file."""
    lines = path.read_text().splitlines() if path.exists() else []
    return {record.run: record for record in map(Record.from_json, lines)}


class Runner:
    """Runner of the project's commands, as many at a time as this process may use cores.

    Attributes:
      output: folder of the runs' folders.
    """

    def __init__(
        self, output: pathlib.Path, records: pathlib.Path, *, minutes: float | None = None
    ):
        """Creates the folders.

        Args:
          output: folder of the runs' folders.
          records: file to which the record of each run is appended.
          minutes: time after which no further run begins; None for no end.
        """
        self.output, self._path = output, records
        self._deadline = None if minutes is None else time.monotonic() + 60 * minutes
        self._cores: queue.Queue[int] = queue.Queue()
        for core in os.sched_getaffinity(0):
            self._cores.put(core)
        self._num_cores = self._cores.qsize()
        for folder in (output, records.parent):
            folder.mkdir(parents=True, exist_ok=True)
        self._lock = (output / "lock").open("w")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            sys.exit(f"error: another benchmark trains in {output}; wait, or take another --output")
        # Seeds of one model run the same programs.
        os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(output.absolute() / "programs"))
        os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")
        self._commit = _commit()

    def records(self) -> dict[Run, Record]:
        """Returns the records of all complete runs, of other benchmarks too."""
        return read_records(self._path)

    def measure(self, runs: Iterable[Run]) -> dict[Run, Record]:
        """Trains the runs that have no record, in order; returns the records that there are."""
        known, runs = self.records(), list(dict.fromkeys(runs))
        missing = [run for run in runs if run not in known]

        def train(run: Run) -> None:
            if not self._is_late():
                record = self._train(run)
                self._append(record)
                print(f"{run}: {record.top1[-1]:.4f} in {record.seconds:.0f} s", flush=True)

        # Once each, however many start from them.
        starts = dict.fromkeys(run.start for run in missing if run.start is not None)
        self.each(lambda run: self._is_late() or self.trained(run), list(starts))
        self.each(train, missing)
        known = self.records()
        return {run: known[run] for run in runs if run in known}

    def each(self, function: Callable[[Run], object], runs: Sequence[Run]) -> None:
        """Calls a function for each run, as many at a time as there are cores."""
        with concurrent.futures.ThreadPoolExecutor(self._num_cores) as pool:
            for _ in pool.map(function, runs):
                pass

    def trained(self, run: Run) -> pathlib.Path:
        """Returns the folder of a run, trained again if there is its record alone."""
        folder = self.output / run.folder
        if not self._is_complete(run):
            self._train(run)
        return folder

    def command(self, name: str, arguments: Sequence[str]) -> None:
        """Runs one of the project's commands on one core, once one is free.

        Raises:
          RuntimeError: the command failed.
        """
        log = self.output / "commands.log"
        with self._core() as core:
            process = _FORKED.Process(target=_execute, args=(name, arguments, core, log))
            process.start()
            process.join()
        if process.exitcode:
            words = " ".join([f"python -m spvit_jax.{name}", *arguments])
            raise RuntimeError(f"{words} failed; what it said is at the end of {log}")

    @contextlib.contextmanager
    def _core(self) -> Iterator[int]:
        core = self._cores.get()
        try:
            yield core
        finally:
            self._cores.put(core)

    def _train(self, run: Run) -> Record:
        """Trains a run, or the rest of it; the one that it starts from is complete."""
        start = time.monotonic()
        self.command("train", run.arguments(self.output))
        seconds = round(time.monotonic() - start, 1)
        steps, top1, raw = zip(*_evaluations(self.output / run.folder), strict=True)
        return Record(run, steps, top1, raw, seconds, self._commit)

    def _is_complete(self, run: Run) -> bool:
        return any(step == run.steps for step, *_ in _evaluations(self.output / run.folder))

    def _append(self, record: Record) -> None:
        with self._path.open("a") as file:
            file.write(record.to_json() + "\n")

    def _is_late(self) -> bool:
        return self._deadline is not None and time.monotonic() > self._deadline


def _execute(name: str, arguments: Sequence[str], core: int, log: pathlib.Path) -> None:
    """Becomes a command of the project; runs in a process of its own."""
    # A program for one core does not depend on how many there are, and two fit on two cores.
    os.sched_setaffinity(0, {core})
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for descriptor in (1, 2):
        os.dup2(file, descriptor)
    sys.argv = [f"spvit_jax.{name}", *arguments]
    importlib.import_module(f"spvit_jax.{name}").main()


def _evaluations(folder: pathlib.Path) -> list[tuple[int, float, float]]:
    """Returns the steps of a run's evaluations so far, and both accuracies at each."""
    path, found = folder / "metrics.jsonl", []
    for line in path.read_text().splitlines() if path.exists() else []:
        # A line that a kill has cut off is the last, and no JSON.
        with contextlib.suppress(json.JSONDecodeError):
            record = json.loads(line)
            if "eval/top1" in record:
                found.append((record["step"], record["eval/top1"], record["eval_raw/top1"]))
    return found


def _commit() -> str:
    """Returns the commit of the code, with "-dirty" behind it if the code differs from it."""

    def git(*arguments: str) -> str:
        command = ["git", *arguments]
        return subprocess.check_output(command, text=True, stderr=subprocess.DEVNULL).strip()

    try:
        changes = git("status", "--porcelain", "--", "spvit_jax", "configs", "benchmarks")
        return git("rev-parse", "--short", "HEAD") + ("-dirty" if changes else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
