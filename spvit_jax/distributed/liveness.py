"""Liveness of a cluster's processes, by a count that each keeps where the others can read it.

JAX watches heartbeats itself, and ends this process by abort() when one stops, as it does for its
own errors. What is known here tells the two apart: who has lost another process may be started
again as often as machines are lost, and who has failed may not.
"""

from __future__ import annotations

import socket
import time

from spvit_jax.distributed.coordination import PREFIX, coordinator, rank_and_size, store

_SILENCE = 10.0  # seconds without a new count after which a process is lost; JAX takes 30
_DELAY = 3.0  # seconds within which all others' counts have been read again
_CONNECT_TIMEOUT = 3.0  # seconds for the coordinator to take a connection

_counts: dict[int, tuple[str, float]] = {}  # by rank: the count, and when it was first seen


def exchange() -> None:
    """Counts this process once more, and reads the others' counts; to be called every second.

    Raises:
      jax.errors.JaxRuntimeError: the coordinator is lost.
    """
    client, (rank, _) = store(), rank_and_size()
    now = time.monotonic()
    client.key_value_set(f"{PREFIX}/alive/{rank}", f"{now:.3f}", allow_overwrite=True)
    for key, count in client.key_value_dir_get(f"{PREFIX}/alive/"):
        other = int(key.rpartition("/")[2])
        if _counts.get(other, ("", 0.0))[0] != count:
            _counts[other] = count, now


def lost() -> list[int]:
    """Returns the ranks of the processes that are lost: silent, or as coordinator unreachable."""
    rank, _ = rank_and_size()
    newest = max((seen for _, seen in _counts.values()), default=0.0)
    silent = {other for other, (_, seen) in _counts.items() if newest - seen > _SILENCE}
    if rank != 0 and not _takes_connections(coordinator()):
        silent.add(0)
    return sorted(silent - {rank})


def wait_for_loss() -> list[int]:
    """Returns the ranks of the processes that are lost, as `lost`, once their silence has shown it.

    An error that the loss of a process causes in the others may come long before.
    """
    deadline = time.monotonic() + _SILENCE + _DELAY
    while not (ranks := lost()) and time.monotonic() < deadline:
        time.sleep(1)
    return ranks


def _takes_connections(address: str) -> bool:
    """Returns whether a process listens at HOST:PORT."""
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), _CONNECT_TIMEOUT).close()
    except OSError:
        return False
    return True
