"""Joining a cluster: how several processes that train as one find each other."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import socket
import threading
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import PartitionSpec as P

from spvit_jax.distributed import failure
from spvit_jax.distributed.coordination import gather, is_formed, rank_and_size, say
from spvit_jax.distributed.versions import code_version
from spvit_jax.errors import InputError

# A process is lost when it has not been heard of for so long. JAX's 100 s would let a pod stand
# still for longer; its heartbeats have a thread of their own, which compiling does not hold up.
_HEARTBEAT_TIMEOUT = 30  # seconds


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
    threading.Thread(target=failure.watch, args=(done,), daemon=True).start()
    try:
        rank, size = rank_and_size()
        here, everywhere = jax.local_device_count(), jax.device_count()
        say(
            f"cluster         process {rank} of {size}, "
            f"code {code_version()}, {here} of {everywhere} devices"
        )
        yield
    except BaseException as error:
        failure.fail(error)
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


def _form(address: Address) -> None:
    """Starts or finds the coordination service and waits for all processes."""
    where = address.coordinator or "of this pod"
    if address.process_id == 0:
        _check_port(where)

    def give_up() -> None:
        # JAX itself would abort the process, with a page from its C++ side. No mistake of the user
        # for certain: a machine may have been preempted before all had come.
        failure.end(1, f"error: {_absent(address)}")

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
    failure.name_what_aborts()


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
