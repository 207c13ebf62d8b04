"""Measures the papers' claim that a spatial prior helps most where there is little data.

    python -m benchmarks.low_data --output=runs/low_data

Trains `configs/digits.py` for each model, training size and seed, by the very command that a user
types but for 640 steps, and prints the test accuracy after the last step as a table: mean ±
standard error over the seeds. The seed decides the weights, the order and which images are drawn.
Runs that are complete are not repeated.
"""

from __future__ import annotations

import concurrent.futures
import itertools
import json
import os
import pathlib
import queue
import statistics
import subprocess
import sys

from absl import app, flags

MODELS = ("vit", "lvvit", "spvit", "mait")
SIZES = (100, 300, 1297)
SEEDS = (0, 1, 2, 3, 4)
STEPS = 640  # of 64 images, whatever the training size

Run = tuple[str, int, int]  # model, training size, seed


def accuracy(run: Run, output: pathlib.Path, core: int) -> float:
    """Trains one model on one core unless that is done, and returns its final test accuracy."""
    model, size, seed = run
    workdir = output / f"{model}-{size}-{seed}"
    command = [
        sys.executable,
        "-m",
        "spvit_jax.train",
        f"--config=configs/digits.py:model={model},train_size={size}",
        f"--workdir={workdir}",
        f"--config.seed={seed}",
        f"--config.schedule.total={STEPS} steps",
        f"--config.eval_every={STEPS} steps",
        f"--config.checkpoint.every={STEPS} steps",
    ]
    # A program for one core does not depend on how many there are, and two fit on two cores.
    result = subprocess.run(
        command,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: os.sched_setaffinity(0, {core}),
    )
    if result.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{result.stderr[-2000:]}")
    records = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [record["eval/top1"] for record in records if "eval/top1" in record][-1]


def measure(runs: list[Run], output: pathlib.Path) -> dict[Run, float]:
    """Trains all runs, one at a time on each core."""
    cores: queue.Queue[int] = queue.Queue()
    for core in os.sched_getaffinity(0):
        cores.put(core)

    def train(run: Run) -> float:
        core = cores.get()
        try:
            value = accuracy(run, output, core)
        finally:
            cores.put(core)
        print(f"{run[0]} on {run[1]} images, seed {run[2]}: {value:.4f}", flush=True)
        return value

    with concurrent.futures.ThreadPoolExecutor(cores.qsize()) as pool:
        return dict(zip(runs, pool.map(train, runs), strict=True))


def table(results: dict[Run, float]) -> str:
    """Returns the results as a Markdown table, in percent."""
    lines = ["| images | " + " | ".join(MODELS) + " |", "|---|" + "---|" * len(MODELS)]
    for size in SIZES:
        cells = []
        for model in MODELS:
            values = [100 * results[model, size, seed] for seed in SEEDS]
            error = statistics.stdev(values) / len(values) ** 0.5
            cells.append(f"{statistics.mean(values):.1f} ± {error:.1f}")
        lines.append(f"| {size} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main(argv: list[str]) -> None:
    """Trains, prints the table and writes it beside the numbers."""
    del argv
    output = pathlib.Path(flags.FLAGS.output)
    output.mkdir(parents=True, exist_ok=True)
    results = measure(list(itertools.product(MODELS, SIZES, SEEDS)), output)
    rows = [{"model": m, "size": n, "seed": s, "top1": v} for (m, n, s), v in results.items()]
    (output / "results.json").write_text(json.dumps(rows, indent=2) + "\n")
    (output / "table.md").write_text(table(results) + "\n")
    print(table(results))


if __name__ == "__main__":
    flags.DEFINE_string("output", "runs/low_data", "Folder of the runs and of their results.")
    app.run(main)
