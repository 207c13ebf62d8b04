"""Many training runs by the command that a user types, one at a time on each core."""

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
      RuntimeError: it failed.
    """
    words = [sys.executable, "-m", f"spvit_jax.{name}", *args]
    # A program for one core does not depend on how many there are, and two fit on two cores.
    result = subprocess.run(
        words,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: os.sched_setaffinity(0, {core}),
    )
    if result.returncode:
        raise RuntimeError(f"{' '.join(words)} failed:\n{result.stderr[-2000:]}")


def train(args: Sequence[str], workdir: pathlib.Path, steps: int, core: int) -> float:
    """Trains, unless that is done, and returns the accuracy of the last evaluation."""
    every = [f"--config.{key}={steps} steps" for key in ("eval_every", "checkpoint.every")]
    total = f"--config.schedule.total={steps} steps"
    command("train", [*args, f"--workdir={workdir}", total, *every], core)
    records = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [record["eval/top1"] for record in records if "eval/top1" in record][-1]


def measure(runs: Sequence[Run], train_one: Callable[[Run, int], float]) -> dict[Run, float]:
    """Returns what each run came to, by `train_one` on a run and a core."""
    cores: queue.Queue[int] = queue.Queue()
    for core in os.sched_getaffinity(0):
        cores.put(core)

    def on_a_free_core(run: Run) -> float:
        core = cores.get()
        try:
            value = train_one(run, core)
        finally:
            cores.put(core)
        print(f"{run}: {value:.4f}", flush=True)
        return value

    with concurrent.futures.ThreadPoolExecutor(cores.qsize()) as pool:
        return dict(zip(runs, pool.map(on_a_free_core, runs), strict=True))


def mean_and_error(values: Sequence[float]) -> str:
    """Returns accuracies in percent, as their mean ± its standard error."""
    error = 100 * statistics.stdev(values) / len(values) ** 0.5
    return f"{100 * statistics.mean(values):.1f} ± {error:.1f}"
