"""Training runs of benchmarks, by the project's command, one at a time on each core."""

from __future__ import annotations

import concurrent.futures
import json
import os
import pathlib
import queue
import statistics
import subprocess
import sys
from collections.abc import Callable, Hashable, Sequence
from typing import TypeVar

Run = TypeVar("Run", bound=Hashable)


def command(name: str, args: Sequence[str], core: int) -> None:
    """Runs one of the project's commands on one core.

    Raises:
      RuntimeError: the command failed.
    """
    arguments = [sys.executable, "-m", f"spvit_jax.{name}", *args]
    # A program for one core does not depend on how many there are, and two fit on two cores.
    result = subprocess.run(
        arguments,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: os.sched_setaffinity(0, {core}),
    )
    if result.returncode:
        raise RuntimeError(f"{' '.join(arguments)} failed:\n{result.stderr[-2000:]}")


def train(args: Sequence[str], workdir: pathlib.Path, steps: int, core: int) -> float:
    """Trains, unless the run is complete, and returns the top-1 of the last evaluation."""
    intervals = [f"--config.{key}={steps} steps" for key in ("eval_every", "checkpoint.every")]
    total = f"--config.schedule.total={steps} steps"
    command("train", [*args, f"--workdir={workdir}", total, *intervals], core)
    records = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [record["eval/top1"] for record in records if "eval/top1" in record][-1]


def measure(runs: Sequence[Run], train_one: Callable[[Run, int], float]) -> dict[Run, float]:
    """Returns the accuracy of each run, from `train_one` of the run and a free core."""
    cores: queue.Queue[int] = queue.Queue()
    for core in os.sched_getaffinity(0):
        cores.put(core)

    def train_on_free_core(run: Run) -> float:
        core = cores.get()
        try:
            value = train_one(run, core)
        finally:
            cores.put(core)
        print(f"{run}: {value:.4f}", flush=True)
        return value

    with concurrent.futures.ThreadPoolExecutor(cores.qsize()) as pool:
        return dict(zip(runs, pool.map(train_on_free_core, runs), strict=True))


def mean_and_error(values: Sequence[float]) -> str:
    """Returns the mean ± standard error of accuracies, in percent."""
    error = 100 * statistics.stdev(values) / len(values) ** 0.5
    return f"{100 * statistics.mean(values):.1f} ± {error:.1f}"
