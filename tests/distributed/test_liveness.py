"""Which processes are lost, by their counts in the store and by the coordinator's port."""

import os
import socket
import subprocess
import sys
import types

import jax
import pytest

from spvit_jax.distributed import failure, liveness
from tests.helpers import REPOSITORY


class Store(dict):
    """A key-value store as JAX's client has it, as far as it is used here."""

    def key_value_set(self, key, value, allow_overwrite=False):
        assert allow_overwrite or key not in self
        self[key] = value

    def key_value_dir_get(self, folder):
        return [(key, value) for key, value in self.items() if key.startswith(folder)]


@pytest.fixture
def cluster(monkeypatch):
    """Process 1 of 3, with a clock to set and a coordinator that listens."""
    server = socket.create_server(("127.0.0.1", 0))
    cluster = types.SimpleNamespace(store=Store(), now=100.0, server=server)
    monkeypatch.setattr(liveness, "_counts", {})
    monkeypatch.setattr(liveness, "store", lambda: cluster.store)
    monkeypatch.setattr(liveness, "rank_and_size", lambda: (1, 3))
    address = f"127.0.0.1:{server.getsockname()[1]}"
    monkeypatch.setattr(liveness, "coordinator", lambda: address)
    monkeypatch.setattr(liveness.time, "monotonic", lambda: cluster.now)
    yield cluster
    server.close()


def go_on(cluster, *ranks, seconds):
    """Lets time pass in which only some processes count; their clocks are not ours."""
    for second in range(seconds):
        for rank in ranks:
            cluster.store[f"spvit_jax/alive/{rank}"] = f"{rank * 1000 + cluster.now + second}"
        cluster.now += 1
        liveness.exchange()


def test_who_counts_no_longer_is_lost(cluster):
    assert liveness.lost() == []
    go_on(cluster, 0, 2, seconds=5)
    assert liveness.lost() == []
    go_on(cluster, 0, seconds=9)
    assert liveness.lost() == []
    go_on(cluster, 0, seconds=3)
    assert liveness.lost() == [2]


def test_a_process_that_comes_back_is_not_lost(cluster):
    go_on(cluster, 0, 2, seconds=2)
    go_on(cluster, 0, seconds=15)
    go_on(cluster, 0, 2, seconds=1)
    assert liveness.lost() == []


def test_a_coordinator_that_does_not_listen_is_lost_at_once(cluster):
    go_on(cluster, 0, 2, seconds=5)
    cluster.server.close()
    assert liveness.lost() == [0]


def test_a_pause_of_this_process_is_not_the_loss_of_others(cluster):
    """As when it is stopped and goes on: what was counted meanwhile is read before it is judged."""
    go_on(cluster, 0, 2, seconds=3)
    cluster.now += 60
    assert liveness.lost() == []
    go_on(cluster, 0, 2, seconds=1)
    assert liveness.lost() == []


@pytest.mark.parametrize("alive", [(0,), (0, 2)])
def test_an_error_waits_for_the_silence_of_a_process(alive, cluster, monkeypatch):
    """Its loss is noticed by a collective at once, and by its count only later."""
    go_on(cluster, 0, 2, seconds=5)
    begun = cluster.now
    monkeypatch.setattr(liveness.time, "sleep", lambda _: go_on(cluster, *alive, seconds=1))
    assert liveness.wait_for_loss() == ([] if 2 in alive else [2])
    assert cluster.now - begun <= 15


@pytest.mark.parametrize(("lost", "code"), [([], 1), ([2], 75)])
def test_an_error_of_jax_is_to_be_started_again_only_if_a_process_is_lost(lost, code, monkeypatch):
    stopped = []
    monkeypatch.setattr(failure, "stop", lambda *said, **_: stopped.append(said))
    monkeypatch.setattr(liveness, "wait_for_loss", lambda: lost)
    failure.fail(jax.errors.JaxRuntimeError("UNAVAILABLE: a slice does not answer"))
    [(given, message)] = stopped
    assert given == code
    assert message.startswith("another process of the cluster was lost") == bool(lost)


ABORTS = """
import os
from spvit_jax.distributed import failure, liveness
failure._HEAD_START = 0.0
for lost in [], [2, 5]:
    if not os.fork():
        liveness.wait_for_loss = lambda: lost
        failure.name_what_aborts()
        os.abort()
    print(os.waitstatus_to_exitcode(os.wait()[1]), flush=True)
"""


def test_an_abort_is_to_be_started_again_only_if_another_process_is_lost():
    result = subprocess.run(
        [sys.executable, "-c", ABORTS],
        cwd=REPOSITORY,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert result.stdout.split() == ["1", "75"]
    alone, other = result.stderr.splitlines()
    assert alone.startswith("error: JAX has ended this process, and the others of the cluster are")
    assert other.startswith("error: another process of the cluster was lost (process 2, process 5)")
