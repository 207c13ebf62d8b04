"""Joining a cluster: how the processes of a training run find each other."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import threading
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import PartitionSpec as P

from spvit_jax.distributed import failure
from spvit_jax.distributed.coordination import detect, gather, is_formed, rank_and_size, say
from spvit_jax.distributed.rendezvous import Lost, Rendezvous
from spvit_jax.distributed.versions import code_version
from spvit_jax.errors import FAILED, InputError

# A process without heartbeats for so long is lost. JAX's 100 s would keep a pod idle for longer;
# heartbeats have a thread of their own, which compiling does not block.
_HEARTBEAT_TIMEOUT = 30  # seconds
_FORM_TIMEOUT = 60  # seconds in which JAX forms the cluster once all processes are there


@dataclasses.dataclass(frozen=True)
class Address:
    """Address of a cluster, and the index of this process in it.

    Attributes:
      coordinator: HOST:PORT at which process 0 can be reached; None on a pod, where JAX finds it.
      num_processes: number of processes of the cluster; None on a pod.
      process_id: index of this process, in 0 … num_processes-1; None on a pod.
      timeout: seconds to wait until all processes have joined.
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
    """Returns whether this is one of several TPU hosts, by the variables that GKE sets."""
    hosts = environment.get("TPU_PROCESS_ADDRESSES") or environment.get("TPU_WORKER_HOSTNAMES", "")
    return "," in hosts or int(environment.get("MEGASCALE_NUM_SLICES") or 1) > 1


@contextlib.contextmanager
def joined(address: Address | None, *, notices: bool = False) -> Iterator[None]:
    """Makes this process part of a cluster; to be entered before JAX initialises its devices.

    An exception inside ends all processes: this one with a line that says why and exit code 2 for
    an `InputError`, 1 for any other; the others with the same code, naming this one. If one is
    lost without an error, the rest end with exit code 75 within half a minute.

    Args:
      address: address of the cluster; None for a single process.
      notices: whether a SIGTERM is a notice of preemption, for `preemption.Interrupt`, rather than
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
    """Connects the devices of CPU processes along each axis of a mesh ahead of the first step.

    Gloo, which computes their sums, otherwise connects at the first step, and fails if one process
    has compiled it half a minute later than another.
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
    """Starts or finds JAX's coordination service, and waits for all processes."""
    settings: dict[str, Any] = {"cluster_detection_method": "deactivate"}
    if address.coordinator is None:
        address, settings = _detected(address), {}
    coordinator, size, rank = address.coordinator, address.num_processes, address.process_id
    assert coordinator is not None
    assert size is not None
    assert rank is not None
    rendezvous = Rendezvous(coordinator, size, rank, address.timeout)

    def on_loss(message: str) -> None:
        # JAX itself would abort the process, with pages of C++ logs. The exit code is not that of
        # wrong input: a machine may have been preempted before all had joined.
        failure.end(FAILED, f"error: {message}")

    try:
        rendezvous.meet()
    except Lost as error:
        on_loss(str(error))
    late = f"JAX's coordinator {coordinator} has not formed the cluster in {_FORM_TIMEOUT} seconds"
    timer = threading.Timer(_FORM_TIMEOUT, on_loss, [late])
    timer.daemon = True
    timer.start()
    with rendezvous.watched(on_loss):
        try:
            jax.distributed.initialize(
                coordinator_address=coordinator,
                num_processes=size,
                process_id=rank,
                initialization_timeout=2 * _FORM_TIMEOUT,  # the timer comes first
                heartbeat_timeout_seconds=_HEARTBEAT_TIMEOUT,
                **settings,
            )
        finally:
            timer.cancel()
    failure.name_what_aborts()


def _detected(address: Address) -> Address:
    """Returns the address that JAX finds on a pod."""
    try:
        coordinator, size, rank = detect(round(address.timeout))
    except Exception as error:  # JAX raises any kind where a pod's metadata is missing
        raise InputError(
            f"the cluster of this pod cannot be formed: {error}. Off a pod, give --coordinator, "
            "--num_processes and --process_id"
        ) from error
    return dataclasses.replace(
        address, coordinator=coordinator, num_processes=size, process_id=rank
    )
