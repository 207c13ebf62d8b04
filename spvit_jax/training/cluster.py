"""Several processes that train as one: how they find each other, agree, and end together.

What goes through here are short texts, by the key-value store of JAX's coordination service, which
needs no device and no compilation; arrays are JAX's business. The service runs in process 0, the
coordinator. This is the only file that reaches into `jax._src.distributed`: JAX has no public way
to that store. Without a cluster, everything here holds for the one process there is.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import hashlib
import importlib.metadata
import itertools
import json
import os
import pathlib
import platform
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
import uuid
from collections.abc import Iterator, Mapping
from typing import Any, NoReturn

import jax
import numpy as np
from jax._src import distributed as jax_distributed
from jax.sharding import PartitionSpec as P

import spvit_jax
from spvit_jax.errors import InputError, exit_code

# A process is lost when it has not been heard of for so long. JAX's 100 s would let a pod stand
# still for longer; its heartbeats have a thread of their own, which compiling does not hold up.
_HEARTBEAT_TIMEOUT = 30  # seconds
_POLL = 1.0  # seconds between looks at whether another process has failed
_GOODBYE = 10.0  # seconds in which a failing process lets the others read why
_PATIENCE = 60  # seconds until the processes that are waited for are named
_SEEN_WITHIN = 30  # seconds in which a network file system shows a file to all
_PREFIX = "spvit_jax"
# Versions that change numbers, or what is in a checkpoint.
_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", "tensorflow-cpu")
# What each machine may have its own of.
_LOCAL = ("config.data.data_dir", "config.data.threads")

_rounds = itertools.count()
_ending = threading.Lock()  # so that one reason is said: the own one or another process's
_kept: list[Any] = []  # what C calls must live as long as the process


@dataclasses.dataclass(frozen=True)
class Address:
    """Where a process belongs.

    Attributes:
      coordinator: HOST:PORT at which process 0 can be reached; None on a pod, which knows.
      num_processes: of the cluster.
      process_id: this one, in 0 … num_processes-1.
      timeout: seconds to wait until all have come.
    """

    coordinator: str | None = None
    num_processes: int | None = None
    process_id: int | None = None
    timeout: float = 300

    def __post_init__(self) -> None:
        given = self.coordinator, self.num_processes, self.process_id
        if self.timeout <= 0:
            raise InputError(f"--cluster_timeout is {self.timeout:g}; expected seconds above 0")
        if given == (None, None, None):
            return
        if self.coordinator is None or self.num_processes is None or self.process_id is None:
            raise InputError(
                "--coordinator, --num_processes and --process_id go together; given were "
                f"{self.coordinator}, {self.num_processes} and {self.process_id}"
            )
        host, _, port = self.coordinator.rpartition(":")
        if not host or not port.isdecimal() or not 0 < int(port) < 65536:
            raise InputError(f"--coordinator is {self.coordinator!r}; expected HOST:PORT")
        if not 0 <= self.process_id < self.num_processes:
            raise InputError(
                f"--process_id is {self.process_id} of --num_processes={self.num_processes}; "
                "processes are numbered from 0"
            )


def is_pod(environment: Mapping[str, str] = os.environ) -> bool:
    """Returns whether the environment is that of one of several TPU hosts, as GKE sets it."""
    hosts = environment.get("TPU_PROCESS_ADDRESSES") or environment.get("TPU_WORKER_HOSTNAMES", "")
    return "," in hosts or int(environment.get("MEGASCALE_NUM_SLICES") or 1) > 1


@contextlib.contextmanager
def joined(address: Address | None, *, notices: bool = False) -> Iterator[None]:
    """Makes this process part of a cluster; to be entered before anything else touches JAX.

    An exception inside ends all processes: this one with a line that says why and exit code 2 for
    an `InputError`, 1 for any other; the others with the same code, naming this one. If one is
    lost without a word, the rest end with exit code 1 within half a minute.

    Args:
      address: None for a process on its own.
      notices: whether a SIGTERM is a notice of preemption, for `interrupt.Interrupt`, rather than
        the end of the process.

    Raises:
      InputError: the port is taken, or the cluster cannot be found on this machine.
    """
    if address is None:
        yield
        return
    jax.config.update("jax_enable_preemption_service", notices)
    _form(address)
    done = threading.Event()
    threading.Thread(target=_watch, args=(done,), daemon=True).start()
    try:
        rank, size = _place()
        here, everywhere = jax.local_device_count(), jax.device_count()
        _say(
            f"cluster         process {rank} of {size}, "
            f"code {code_version()}, {here} of {everywhere} devices"
        )
        yield
    except BaseException as error:
        _fail(error)
    finally:
        done.set()


def connect(mesh: jax.sharding.Mesh) -> None:
    """Connects the devices of CPU processes along each axis, while the processes are in step.

    Gloo, which carries their sums, otherwise connects at the first step, and gives up if one
    process has compiled it half a minute later than another.
    """
    if not is_formed() or jax.default_backend() != "cpu":
        return
    gather("")
    axes = mesh.axis_names

    def sums(x: jax.Array) -> list[jax.Array]:
        return [jax.lax.psum(x, over) for over in (*axes, axes)]

    specs = [P(*(None if axis == over else axis for axis in axes)) for over in axes]
    summed = jax.shard_map(sums, mesh=mesh, in_specs=P(*axes), out_specs=[*specs, P()])
    jax.block_until_ready(jax.jit(summed)(np.ones(mesh.devices.shape, np.float32)))


def is_formed() -> bool:
    """Returns whether this process is part of a cluster."""
    return _client() is not None


def is_primary() -> bool:
    """Returns whether this is process 0, the one that writes what only one should."""
    return _place()[0] == 0


def gather(text: str) -> list[str]:
    """Returns the texts of all processes, in their order; all must call it equally often."""
    client = _client()
    if client is None:
        return [text]
    key, (rank, size) = f"{_PREFIX}/{next(_rounds)}", _place()
    client.key_value_set(f"{key}/{rank}", text)
    if rank == 0:  # one reads all and the others one, rather than all reading all
        texts = [_wait_for(f"{key}/{other}", other) for other in range(size)]
        client.key_value_set(f"{key}/all", json.dumps(texts))
    return json.loads(_wait_for(f"{key}/all", 0))


def broadcast(text: str) -> str:
    """Returns process 0's text; all processes must call it equally often."""
    return gather(text if is_primary() else "")[0]


def agree(facts: Mapping[str, Any]) -> None:
    """Compares what must be the same on all processes, code and package versions included.

    Args:
      facts: by name; values are compared as JSON. Those in `_LOCAL` may differ.

    Raises:
      InputError: on all processes, if one differs from process 0; says which, and in what.
    """
    if _client() is None:
        return
    ours = {name: value for name, value in _facts(facts).items() if name not in _LOCAL}
    theirs = json.loads(broadcast(json.dumps(ours)))
    different = [
        f"{name}={ours.get(name)}, process 0 has {theirs.get(name)}"
        for name in sorted(ours.keys() | theirs.keys())
        if ours.get(name) != theirs.get(name)
    ]
    _raise_together(different, "start the same command with the same code on all of them")


def check_shared(folder: pathlib.Path) -> None:
    """Checks that all processes see the same folder, in which they write a checkpoint together.

    Raises:
      InputError: on all processes, if one does not see what process 0 writes there.
    """
    if _client() is None:
        return
    name = broadcast(f".shared-{uuid.uuid4().hex}")
    if is_primary():
        (folder / name).touch()
    gather("")  # it is there now
    deadline = time.monotonic() + _SEEN_WITHIN
    while not (seen := (folder / name).exists()) and time.monotonic() < deadline:
        time.sleep(_POLL)
    problem = [f"another folder {folder} than process 0"] if not seen else []
    try:
        _raise_together(problem, "--workdir must be on a file system that all share")
    finally:
        if is_primary():
            (folder / name).unlink(missing_ok=True)


def code_version(root: pathlib.Path = pathlib.Path(spvit_jax.__file__).parent.parent) -> str:
    """Returns the commit of the checkout, with `-dirty` if changed; without git, what VERSION says.

    Args:
      root: of the checkout.
    """
    if (root / ".git").exists():
        # Never a tag: the abbreviated commit, as `git rev-parse --short` has it.
        describe = ["git", "describe", "--always", "--dirty", "--exclude=*"]
        with contextlib.suppress(OSError):
            result = subprocess.run(describe, cwd=root, capture_output=True, text=True)
            if result.returncode == 0:
                return result.stdout.strip()
    version = root / "VERSION"
    return version.read_text().strip() if version.is_file() else spvit_jax.__version__


def _form(address: Address) -> None:
    """Starts or finds the coordination service and waits for all processes."""
    where = address.coordinator or "of this pod"
    if address.process_id == 0:
        _check_port(where)

    def give_up() -> None:
        # JAX itself would abort the process, with a page from its C++ side. No mistake of the user
        # for certain: a machine may have been preempted before all had come.
        _end(1, f"error: {_absent(address)}")

    timer = threading.Timer(address.timeout, give_up)
    timer.daemon = True
    timer.start()
    settings: dict[str, Any] = {}
    if address.coordinator is not None:
        settings = {
            "coordinator_address": address.coordinator,
            "num_processes": address.num_processes,
            "process_id": address.process_id,
            "cluster_detection_method": "deactivate",
        }
    try:
        jax.distributed.initialize(
            **settings,
            initialization_timeout=round(address.timeout) + 60,  # `give_up` comes first
            heartbeat_timeout_seconds=_HEARTBEAT_TIMEOUT,
        )
    except Exception as error:  # whatever looking for a pod's metadata raises
        raise InputError(
            f"the cluster {where} cannot be formed: {error}. Off a pod, give --coordinator, "
            "--num_processes and --process_id"
        ) from error
    finally:
        timer.cancel()
    _name_what_aborts()


def _absent(address: Address) -> str:
    """Says who has not come; called when the time is up."""
    waited = f"for {address.timeout:g} seconds (--cluster_timeout)"
    if address.coordinator is None:
        return f"the processes of this pod have not all come {waited}; start them on all workers"
    host, _, port = address.coordinator.rpartition(":")
    if address.process_id != 0:
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()
        except OSError as error:
            return (
                f"coordinator {address.coordinator} has not answered {waited}: {error}. "
                "Start process 0 there, and let this machine reach that port"
            )
    return (
        f"process {address.process_id} has waited {waited} for the {address.num_processes} "
        f"processes to come to coordinator {address.coordinator}; start them all"
    )


def _check_port(coordinator: str) -> None:
    """Raises an `InputError` if the service cannot listen; JAX would end with a segfault."""
    port = int(coordinator.rpartition(":")[2])
    try:
        socket.create_server(("", port)).close()
    except OSError as error:
        raise InputError(
            f"the port of --coordinator={coordinator} is taken on this machine: {error.strerror}. "
            "Choose another, or end the run that has it"
        ) from error


def _name_what_aborts() -> None:
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


def _watch(done: threading.Event) -> None:
    """Ends the process when another one says that it has failed."""
    client, (rank, _) = _client(), _place()
    while not done.wait(_POLL):
        try:
            notices = client.key_value_dir_get(f"{_PREFIX}/failed/")
        except jax.errors.JaxRuntimeError:
            return  # the coordinator is gone, which JAX notices by itself
        for key, notice in sorted(notices):
            culprit, (code, message) = key.rpartition("/")[2], json.loads(notice)
            if int(culprit) != rank and _ending.acquire(blocking=False):
                with contextlib.suppress(jax.errors.JaxRuntimeError):
                    client.key_value_set(f"{_PREFIX}/read/{rank}", "")
                _end(code, f"error: process {culprit} has stopped: {message}")


def _fail(error: BaseException) -> NoReturn:
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
    _say(f"error: {message}")
    client, (rank, size) = _client(), _place()
    others = {str(other) for other in range(size) if other != rank}
    deadline = time.monotonic() + _GOODBYE
    with contextlib.suppress(jax.errors.JaxRuntimeError):  # the coordinator may be gone
        client.key_value_set(f"{_PREFIX}/failed/{rank}", json.dumps([code, message]))
        while others and time.monotonic() < deadline:
            time.sleep(_POLL / 10)
            for folder in ("read", "failed"):
                known = client.key_value_dir_get(f"{_PREFIX}/{folder}/")
                others -= {key.rpartition("/")[2] for key, _ in known}
        if rank == 0:
            time.sleep(_POLL)  # with it goes the store, and the others may still be leaving
    _end(code)


def _end(code: int, line: str = "") -> NoReturn:
    """Ends the process at once: the usual way would wait for processes that do not come."""
    if line:
        _say(line)
    with contextlib.suppress(OSError, ValueError):
        sys.stdout.flush()
    os._exit(code)


def _say(line: str) -> None:
    """Writes a line to the standard error in one piece, so that processes do not mix theirs."""
    sys.stderr.write(line + "\n")
    sys.stderr.flush()


def _wait_for(key: str, process: int) -> str:
    """Returns the text under a key, and says now and then which process has not given it yet."""
    while True:
        try:
            return _client().blocking_key_value_get(key, _PATIENCE * 1000)
        except jax.errors.JaxRuntimeError as error:
            if "DEADLINE_EXCEEDED" not in str(error):
                raise
            _say(f"cluster         process {_place()[0]} waits for process {process}")


def _raise_together(problems: list[str], advice: str) -> None:
    """Raises one `InputError` on all processes that lists what each of them has to say."""
    said = [json.loads(text) for text in gather(json.dumps(problems))]
    lines = [f"process {rank} has {'; '.join(has)}" for rank, has in enumerate(said) if has]
    if lines:
        rest = f" and {len(lines) - 4} processes more" if len(lines) > 4 else ""
        raise InputError(f"the processes disagree: {'. '.join(lines[:4])}{rest}; {advice}")


def _facts(facts: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the facts as JSON gives them back, with those about the code and its surroundings."""
    versions = {}
    for package in _PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    digest = hashlib.sha256()
    for path in sorted(pathlib.Path(spvit_jax.__file__).parent.rglob("*.py")):
        digest.update(path.read_bytes())
    code = f"{code_version()} ({digest.hexdigest()[:8]})"  # two dirty checkouts may differ
    python = platform.python_version()
    return json.loads(json.dumps({"code": code, "python": python, **versions, **facts}))


def _client() -> Any:
    return jax_distributed.global_state.client


def _place() -> tuple[int, int]:
    """Returns which process this is of how many; touches no device, as `jax.process_index` does."""
    return jax_distributed.global_state.process_id, jax_distributed.global_state.num_processes
