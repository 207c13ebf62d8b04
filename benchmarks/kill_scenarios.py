"""Runs that are killed, stopped or hang in each of their phases, and are started again.

    python -m benchmarks.kill_scenarios            all of them
    python -m benchmarks.kill_scenarios SIGSTOP    those whose name has the word

Small runs on the digits, of one, two and four processes with four simulated devices in all. In each
scenario one process sends itself a signal, or waits for its input for ever, in one phase; when all
have ended, the same command is started again. It has to go on from the newest checkpoint that there
was at the signal, or a newer one, and to end with the same bits as a run that nothing disturbed:
parameters, averages, optimizer state and records. Started again on another number of processes, the
sums over the devices are in another order, and the numbers have to agree to 10⁻⁵.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import pathlib
import signal
import subprocess
import sys
import tempfile
import threading
import time
from typing import Any

import numpy as np

from tests.helpers import REPOSITORY
from tests.helpers.commands import CONFIG, SMALL, newest_step, saved_arrays

STEPS = 12
DEVICES = 4
STALL_TIMEOUT = 8  # seconds
SETTINGS = [
    CONFIG,
    *SMALL,
    f"--config.schedule.total={STEPS} steps",
    "--config.schedule.warmup=2 steps",
    "--config.optim.name=sgd",  # linear in the gradient, as the comparison to 10⁻⁵ needs
    "--config.log_every=3 steps",
    "--config.checkpoint.every=3 steps",
    "--config.eval_every=6 steps",
    "--config.data.eval_batch_size=32",
    "--config.data.threads=1",
    f"--config.stall_timeout={STALL_TIMEOUT}",
]
# What the process does to itself, and whether it says so in the exit code.
HANG = "hang"
PHASES = ("import", "compile", "step", "evaluation", "save")


@dataclasses.dataclass(frozen=True)
class Scenario:
    """A disturbance of a run.

    Attributes:
      disturbance: name of a signal, or `HANG`.
      phase: phase of the run, one of `PHASES`, in which it comes.
      processes: number of processes of the run.
      rank: the one that it comes to.
      restarted: number of processes that go on.
    """

    disturbance: str
    phase: str
    processes: int = 1
    rank: int = 0
    restarted: int = 0

    def __str__(self) -> str:
        which = f"process {self.rank} of {self.processes}" if self.processes > 1 else "the one"
        return f"{self.disturbance} of {which}, {self.phase}"


SCENARIOS = (
    *(Scenario("SIGKILL", phase) for phase in PHASES),
    *(Scenario("SIGTERM", phase) for phase in ("compile", "step", "evaluation", "save")),
    *(Scenario("SIGKILL", phase, 2, 1) for phase in PHASES),
    *(Scenario("SIGKILL", phase, 2, 0, 1) for phase in ("step", "save")),
    *(Scenario("SIGTERM", phase, 2, 1) for phase in ("step", "evaluation")),
    Scenario("SIGSTOP", "step", 2, 1),
    Scenario(HANG, "step", 2, 1),
    Scenario("SIGKILL", "step", 4, 3, 4),
)


def main() -> None:
    """Runs the scenarios and prints a row for each."""
    if sys.argv[1:2] == ["--disturbed"]:
        disturbed(**json.loads(sys.argv.pop(2)))
        return
    chosen = [each for each in SCENARIOS if all(word in str(each) for word in sys.argv[1:])]
    with tempfile.TemporaryDirectory() as folder:
        root = pathlib.Path(folder)
        references = {}
        for count in sorted({each.restarted or each.processes for each in chosen}):
            references[count] = root / f"{count}"
            code, said = train(references[count], count)
            if code:
                sys.exit(said)
        print("| disturbance | exit code | seconds until all ended | went on from step | result |")
        print("|---|---|---|---|---|", flush=True)
        results = []
        for number, scenario in enumerate(chosen):
            workdir = root / f"scenario-{number}"
            reference = references[scenario.restarted or scenario.processes]
            *cells, result = play(scenario, workdir, reference)
            print(f"| {scenario} | {' | '.join(map(str, cells))} | {result} |", flush=True)
            results.append(result)
    bad = [result for result in results if not result.startswith("equal")]
    print(f"{len(results) - len(bad)} of {len(results)} scenarios ended as they must")
    sys.exit(1 if bad else 0)


def play(
    scenario: Scenario, workdir: pathlib.Path, reference: pathlib.Path
) -> tuple[int, str, str, str]:
    """Plays a scenario to its end.

    Returns:
      Exit code of the run that was disturbed, seconds until all its processes had ended, step at
      which the run went on, and what came of it: "equal" is good.
    """
    count = scenario.restarted or scenario.processes
    code, said = train(workdir, scenario.processes, scenario)
    ended = time.time()
    marker = workdir / "disturbed.json"
    if not marker.exists():
        return code, "", "", f"never came: {said[-300:]}"
    sent = json.loads(marker.read_text())
    newest = newest_step(workdir)
    seconds = f"{ended - sent['time']:.1f}"
    expected = {"SIGTERM": (75,), HANG: (75,)}.get(scenario.disturbance, (1,))
    restarted_code, restarted = train(workdir, count)
    went_on = f"at step {newest} of {STEPS}"
    if code not in expected:
        result = f"exit code {code}, expected {expected[0]}"
    elif newest < sent["newest"]:
        result = f"lost the checkpoint of step {sent['newest']}"
    elif restarted_code:
        result = f"started again it ended with {restarted_code}: {restarted[-300:]}"
    elif went_on not in restarted:
        result = "did not go on from its newest checkpoint"
    elif count == scenario.processes:
        result = "equal bits" if same_bits(workdir, reference) else "DIFFERENT BITS"
    else:
        result = "equal to 1e-5" if same_numbers(workdir, reference) else "DIFFERENT NUMBERS"
    return code, seconds, str(newest), result


def train(
    workdir: pathlib.Path, processes: int, scenario: Scenario | None = None
) -> tuple[int, str]:
    """Trains on several processes; returns the exit code and all that was said."""
    workdir.mkdir(exist_ok=True)
    python = [sys.executable, "-m", "spvit_jax.train"]
    if scenario is not None:
        asked = {
            "disturbance": scenario.disturbance,
            "phase": scenario.phase,
            "rank": scenario.rank,
            "marker": str(workdir / "disturbed.json"),
        }
        python = [sys.executable, "-m", "benchmarks.kill_scenarios", "--disturbed"]
        python.append(json.dumps(asked))
    result = subprocess.run(
        ["launch/local_pod.sh", str(processes), *python, *SETTINGS, f"--workdir={workdir}"],
        cwd=REPOSITORY,
        env={"JAX_DISABLE_MOST_OPTIMIZATIONS": "1", "GRACE": "45"}
        | {"JAX_COMPILATION_CACHE_DIR": str(workdir.parent / "compiled")}
        | {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
        | os.environ
        | {"DEVICES": str(DEVICES // processes)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    return result.returncode, result.stdout


def disturbed(disturbance: str, phase: str, rank: int, marker: str) -> None:
    """Trains as the command does; the process of a rank disturbs itself in a phase."""
    del sys.argv[1]
    path, workdir = pathlib.Path(marker), pathlib.Path(marker).parent
    is_it = f"--process_id={rank}" in sys.argv

    def disturb() -> None:
        path.write_text(json.dumps({"time": time.time(), "newest": newest_step(workdir)}))
        if disturbance == HANG:
            threading.Event().wait()
        os.kill(os.getpid(), signal.Signals[disturbance])

    def soon(seconds: float) -> None:
        timer = threading.Timer(seconds, disturb)
        timer.daemon = True
        timer.start()

    if is_it and phase == "import":
        soon(0.5)
    from spvit_jax import train as command
    from spvit_jax.training.report import Reporter
    from spvit_jax.training.timeline import CHECKPOINT, Timeline

    steps, batches, saves = itertools.count(1), itertools.count(1), itertools.count(1)
    step, tick, in_phase = Reporter.step, Timeline.tick, Timeline.phase

    def step_or_disturb(reporter: Reporter) -> Any:
        number = next(steps)
        if phase == "compile" and number == 1:
            soon(0.1)
        if phase == "step" and number == 8:
            disturb()
        return step(reporter)

    def tick_or_disturb(timeline: Timeline) -> None:
        tick(timeline)
        if phase == "evaluation" and next(batches) == 5:
            disturb()

    def phase_or_disturb(timeline: Timeline, name: str) -> Any:
        if phase == "save" and name == CHECKPOINT and next(saves) == 2:
            soon(0.02)  # while it is being written
        return in_phase(timeline, name)

    if is_it:
        for owner, name, function in (
            (Reporter, "step", step_or_disturb),
            (Timeline, "tick", tick_or_disturb),
            (Timeline, "phase", phase_or_disturb),
        ):
            setattr(owner, name, function)
    command.main()


def same_bits(workdir: pathlib.Path, reference: pathlib.Path) -> bool:
    """Returns whether two runs ended with the same state and records, bit for bit."""
    ours, theirs = saved_arrays(workdir, STEPS), saved_arrays(reference, STEPS)
    records = [(path / "metrics.jsonl").read_bytes() for path in (workdir, reference)]
    return (
        ours.keys() == theirs.keys()
        and all(np.array(ours[k]).tobytes() == np.array(theirs[k]).tobytes() for k in ours)
        and records[0] == records[1]
    )


def same_numbers(workdir: pathlib.Path, reference: pathlib.Path) -> bool:
    """Returns whether two runs ended with the same state, to the rounding of sums."""
    ours, theirs = saved_arrays(workdir, STEPS), saved_arrays(reference, STEPS)
    return ours.keys() == theirs.keys() and all(
        np.allclose(ours[k], theirs[k], rtol=1e-5, atol=1e-6) for k in ours
    )


if __name__ == "__main__":
    main()
