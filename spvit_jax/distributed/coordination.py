"""Exchange of short texts between the processes of a cluster, over JAX's key-value store.

It needs no device and no compilation, and is not for arrays. The service runs in process 0, the
coordinator. This is the only file that imports JAX's private modules: there is no public access to
that store, nor to what JAX knows of a pod before its cluster is formed. Without a cluster, every
function works for the single process.
"""

from __future__ import annotations

import itertools
import json
import sys
from typing import Any

import jax
from jax._src import clusters
from jax._src import distributed as jax_distributed

PREFIX = "spvit_jax"  # of all keys in the store
_REPORT_EVERY = 60  # seconds between messages that name the process that is waited for
_GIVE_UP = 1800  # seconds after which it is waited for no longer

_rounds = itertools.count()


def is_formed() -> bool:
    """Returns whether this process is part of a cluster."""
    return jax.distributed.is_initialized()


def is_primary() -> bool:
    """Returns whether this is process 0, the one that writes logs and files."""
    return rank_and_size()[0] == 0


def gather(text: str) -> list[str]:
    """Returns the texts of all processes by rank; a barrier, which all must call equally often."""
    client = store()
    if client is None:
        return [text]
    key, (rank, size) = f"{PREFIX}/{next(_rounds)}", rank_and_size()
    client.key_value_set(f"{key}/{rank}", text)
    if rank == 0:  # process 0 reads all texts and the others one, rather than each reading all
        texts = [_wait_for(f"{key}/{other}", other) for other in range(size)]
        client.key_value_set(f"{key}/all", json.dumps(texts))
    return json.loads(_wait_for(f"{key}/all", 0))


def broadcast(text: str) -> str:
    """Returns process 0's text on all processes, which must all call it equally often."""
    return gather(text if is_primary() else "")[0]


def store() -> Any:
    """Returns JAX's client of the key-value store; None without a cluster."""
    return jax_distributed.global_state.client


def rank_and_size() -> tuple[int, int]:
    """Returns this process's index and their number; unlike `jax.process_index` uses no device."""
    return jax_distributed.global_state.process_id, jax_distributed.global_state.num_processes


def coordinator() -> str:
    """Returns the HOST:PORT of process 0's service."""
    return str(jax_distributed.global_state.coordinator_address)


def detect(timeout: int) -> tuple[str, int, int]:
    """Returns the coordinator's HOST:PORT, the number of processes and this one's index on a pod.

    Args:
      timeout: seconds to wait until the coordinator's name can be resolved.

    Raises:
      ValueError: this is no pod.
    """
    unknown = None, None, None, None, None
    detected = clusters.ClusterEnv.auto_detect_unset_distributed_params(*unknown, timeout)
    coordinator, size, rank, _ = detected
    if coordinator is None or size is None or rank is None:
        raise ValueError("this machine names no other processes")
    return coordinator, size, rank


def say(line: str) -> None:
    """Writes a line to standard error in one call, so that processes do not mix theirs."""
    sys.stderr.write(line + "\n")
    sys.stderr.flush()


def _wait_for(key: str, process: int) -> str:
    """Returns the text under a key; reports at intervals which process has not written it yet.

    Raises:
      TimeoutError: it has not in `_GIVE_UP` seconds.
    """
    for _ in range(_GIVE_UP // _REPORT_EVERY):
        try:
            return store().blocking_key_value_get(key, _REPORT_EVERY * 1000)
        except jax.errors.JaxRuntimeError as error:
            if "DEADLINE_EXCEEDED" not in str(error):
                raise
            say(f"cluster         process {rank_and_size()[0]} waits for process {process}")
    raise TimeoutError(f"process {process} stands still: it has been waited for {_GIVE_UP} seconds")
