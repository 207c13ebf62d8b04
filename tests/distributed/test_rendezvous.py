"""Before the cluster is formed: who has not come, and who was lost, is named to all."""

import concurrent.futures
import contextlib
import socket
import threading
import time

import pytest

from spvit_jax.distributed import rendezvous
from spvit_jax.distributed.rendezvous import Lost, Rendezvous
from spvit_jax.errors import InputError


@pytest.fixture
def coordinator():
    with socket.create_server(("127.0.0.1", 0)) as server:
        return f"127.0.0.1:{server.getsockname()[1]}"


@pytest.fixture
def meet(coordinator):
    """Starts the rendezvous of a process of three; returns the future of what it raises."""
    with concurrent.futures.ThreadPoolExecutor() as pool:

        def start(rank, size=3, timeout=10.0):
            here = Rendezvous(coordinator, size, rank, timeout)
            return here, pool.submit(here.meet)

        yield start


def test_all_meet_and_the_port_is_free_for_jax(meet, coordinator):
    pairs = [meet(rank) for rank in (2, 0, 1)]  # who comes before process 0 waits for it
    for _, met in pairs:
        met.result()
    host, port = coordinator.split(":")
    with socket.create_server((host, int(port))):
        pass
    lost = []
    with contextlib.ExitStack() as stack:
        for here, _ in pairs:
            stack.enter_context(here.watched(lost.append))
    assert lost == []


def test_who_does_not_come_is_named_by_all_that_do(meet, monkeypatch, capfd):
    monkeypatch.setattr(rendezvous, "REPORT_EVERY", 0.2)
    pairs = [meet(rank, 4, timeout=1.5) for rank in (0, 2)]
    for _, met in pairs:
        with pytest.raises(Lost, match=r"processes 1, 3 have not come within 1.5 seconds"):
            met.result()
    said = capfd.readouterr().err
    assert said.count("cluster         process 0 waits: processes 1, 3 have not come yet\n") >= 4


def test_without_process_0_all_name_it(meet):
    _, met = meet(1, timeout=0.5)
    with pytest.raises(Lost, match=r"process 0 has not come within 0.5 seconds .* refused"):
        met.result()


def test_who_is_lost_while_others_are_waited_for_is_named_at_once(meet):
    start = time.monotonic()
    _, first = meet(0)
    dying, _ = meet(1)
    while 0 not in dying._peers:
        time.sleep(0.01)
    dying._peers[0].connection.shutdown(socket.SHUT_RDWR)
    with pytest.raises(Lost, match="process 1 was lost before the cluster was formed"):
        first.result()
    assert time.monotonic() - start < 5


@pytest.mark.parametrize("rank", [0, 2])
def test_who_is_lost_while_jax_forms_the_cluster_is_named(meet, rank):
    """All have come; then one dies before JAX has them all."""
    pairs = dict(zip((0, 1, 2), [meet(rank) for rank in (0, 1, 2)], strict=True))
    for _, met in pairs.values():
        met.result()
    said, done = {}, threading.Event()

    def form(index):
        with pairs[index][0].watched(lambda message: said.update({index: message})):
            done.wait(5)

    survivors = {0, 1, 2} - {rank}
    threads = [threading.Thread(target=form, args=(index,)) for index in survivors]
    for thread in threads:
        thread.start()
    for peer in pairs[rank][0]._peers.values():
        peer.connection.shutdown(socket.SHUT_RDWR)
    deadline = time.monotonic() + 5
    while said.keys() != survivors and time.monotonic() < deadline:
        time.sleep(0.01)
    done.set()
    for thread in threads:
        thread.join()
    assert said == dict.fromkeys(
        survivors, f"process {rank} was lost before the cluster was formed"
    )


def test_another_number_of_processes_is_wrong_input(meet):
    _, first = meet(0, 2)
    _, other = meet(1, 3)
    with pytest.raises(InputError, match="process 1 was started with --num_processes=3, process 0"):
        first.result()
    with pytest.raises(Lost):
        other.result()


def test_what_else_knows_the_port_does_no_harm(meet, coordinator):
    _, first = meet(0, 2)
    host, port = coordinator.split(":")
    with socket.create_connection((host, int(port))) as stranger:
        stranger.sendall(b"GET / HTTP/1.1\n\n")
        assert stranger.recv(100) == b""
    _, second = meet(1, 2)
    first.result()
    second.result()
