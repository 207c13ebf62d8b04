"""The project's commands as a user starts them, and a model small enough to train in a test."""

import atexit
import functools
import json
import os
import pathlib
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence

import jax
import numpy as np
import orbax.checkpoint as ocp
from flax import traverse_util

from tests.helpers import REPOSITORY

CONFIG = "--config=configs/digits.py"
# Small and quick, but with everything that has a state: drop path, BatchNorm, an average.
SMALL = [
    "--config.model.depth=2",
    "--config.model.dim=24",
    "--config.model.spatial_layers=1",
    "--config.model.stem_width=8",
    "--config.data.batch_size=16",
    "--config.data.train_size=200",
    "--config.schedule.total=120 steps",
    "--config.schedule.warmup=10 steps",
    "--config.log_every=7 steps",
    "--config.eval_every=40 steps",
    "--config.checkpoint.every=10 steps",
]


def command(name: str, *args: object) -> list[str]:
    return [sys.executable, "-m", f"spvit_jax.{name}", *map(str, args)]


@functools.cache
def _server() -> subprocess.Popen[str]:
    """The process that forks commands."""
    server = subprocess.Popen(
        [sys.executable, "-m", "tests.helpers.command_server"],
        cwd=REPOSITORY,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    atexit.register(server.communicate)  # it ends when there is nothing more to read
    return server


def _ask(request: object) -> int:
    server = _server()
    assert server.stdin is not None
    assert server.stdout is not None
    server.stdin.write(json.dumps(request) + "\n")
    server.stdin.flush()
    return int(server.stdout.readline())


class Command:
    """A command in a process of its own, without the seconds that its imports take.

    Attributes:
      pid: of the process, which is no child of this one.
    """

    def __init__(self, environment: dict[str, str], module: str, *args: object):
        # Read to the end of this object, and gone with it.
        self._outputs = [tempfile.NamedTemporaryFile("r") for _ in range(2)]  # noqa: SIM115
        outputs = [file.name for file in self._outputs]
        self.pid = _ask([module, [*map(str, args)], environment, *outputs])
        self._process = os.pidfd_open(self.pid)
        self._end = select.poll()
        self._end.register(self._process)
        self._code: int | None = None

    def said(self) -> tuple[str, str]:
        """What it has written so far to the standard output and error."""
        output, error = (pathlib.Path(file.name).read_text() for file in self._outputs)
        return output, error

    def send_signal(self, number: int) -> None:
        signal.pidfd_send_signal(self._process, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def poll(self, seconds: float = 0) -> int | None:
        """The exit code, or None if it still runs after so many seconds."""
        if self._code is None and self._end.poll(1000 * seconds):
            self._code = _ask(self.pid)
            os.close(self._process)
        return self._code

    def wait(self, timeout: float = 300) -> int:
        code = self.poll(timeout)
        if code is None:
            self.kill()
            raise AssertionError(f"it still runs after {timeout} seconds: {self.said()[1][-4000:]}")
        return code


def run(
    environment: dict[str, str], name: str, *args: object, check: bool = True
) -> subprocess.CompletedProcess[str]:
    """Runs one of the package's commands to its end."""
    process = Command(environment, f"spvit_jax.{name}", *args)
    code = process.wait()
    result = subprocess.CompletedProcess(command(name, *args), code, *process.said())
    assert not check or result.returncode == 0, result.stderr[-3000:]
    return result


def records_of(workdir: pathlib.Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def wait_until(condition: Callable[[], object], process: Command, seconds: float = 240) -> None:
    """Looks every few milliseconds; fails if the process ends first."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, "the run ended before it could be disturbed"
        assert time.monotonic() < deadline
        time.sleep(0.004)


def truncate_checkpoint(workdir: pathlib.Path, step: int) -> None:
    """Cuts the two largest files of a checkpoint in half, as a full disk might."""
    files = [path for path in (workdir / "checkpoints" / str(step)).rglob("*") if path.is_file()]
    for path in sorted(files, key=lambda path: path.stat().st_size)[-2:]:
        os.truncate(path, path.stat().st_size // 2)


def saved_arrays(workdir: pathlib.Path, step: int) -> dict[str, np.ndarray]:
    directory = workdir / "checkpoints" / str(step) / "default"
    with ocp.PyTreeCheckpointer() as checkpointer:
        # As NumPy's, whatever the devices were that it was saved from.
        names = checkpointer.metadata(directory).item_metadata.tree
        kinds = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), names)
        tree = checkpointer.restore(directory, restore_args=kinds)
    return traverse_util.flatten_dict(tree, sep="/")


def assert_same_run(
    workdir: pathlib.Path,
    reference: pathlib.Path,
    step: int = 120,
    names: Sequence[str] = ("ema/", "opt_state/"),
) -> None:
    """Bit for bit: the last state, and the records of how it was reached."""
    ours, theirs = saved_arrays(workdir, step), saved_arrays(reference, step)
    assert ours.keys() == theirs.keys()
    for prefix in names:
        assert any(name.startswith(prefix) for name in ours), prefix
    for name in ours:
        assert np.asarray(ours[name]).tobytes() == np.asarray(theirs[name]).tobytes(), name
    records = [(path / "metrics.jsonl").read_bytes() for path in (workdir, reference)]
    assert records[0] == records[1]


def newest_step(workdir: pathlib.Path) -> int:
    folder = workdir / "checkpoints"
    steps = [int(path.name) for path in folder.glob("*") if path.name.isdigit()]
    return max(steps, default=0)
