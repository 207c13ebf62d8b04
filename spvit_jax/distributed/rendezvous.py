"""Rendezvous of the processes before JAX forms their cluster, so that who is missing has a name.

JAX's own registration waits without saying for whom, and ends by abort(). Here every process first
connects to process 0, at the port that JAX's coordinator then takes over, and says who it is. The
connections stay open until the cluster is formed: the end of one is the loss of its process.
"""

from __future__ import annotations

import contextlib
import selectors
import socket
import threading
import time
from collections.abc import Callable, Iterator

from spvit_jax.distributed.coordination import say
from spvit_jax.errors import InputError

REPORT_EVERY = 20.0  # seconds between lines that name the processes that are waited for
_RETRY = 0.2  # seconds between tries to connect
_POLL = 0.5  # seconds between looks at the clock
_GO, _FORMED = "go", "formed"  # lines from process 0: JAX may connect; the cluster is there
_LONGEST = 4096  # bytes of a line


class Lost(Exception):
    """A process that is missing, or was lost before the cluster was formed."""


class _Peer:
    """Another process at the other end of a connection, which lines of text are sent over."""

    def __init__(self, connection: socket.socket):
        self.connection = connection
        self.rank: int | None = None  # as it says
        self._received = b""
        connection.setblocking(False)
        # A machine that vanishes closes nothing: it is asked, and lost within half a minute.
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for option, seconds in (("TCP_KEEPIDLE", 10), ("TCP_KEEPINTVL", 5), ("TCP_KEEPCNT", 3)):
            if hasattr(socket, option):
                connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), seconds)

    def fileno(self) -> int:
        return self.connection.fileno()

    def send(self, line: str) -> None:
        with contextlib.suppress(OSError):  # its loss is seen in reading
            self.connection.send(line.encode() + b"\n")

    def lines(self) -> list[str] | None:
        """Returns the lines that have come; None if the connection has ended."""
        try:
            received = self.connection.recv(_LONGEST)
        except BlockingIOError:
            return []
        except OSError:
            received = b""
        if not received or len(self._received) > _LONGEST:
            return None
        *lines, self._received = (self._received + received).split(b"\n")
        return [line.decode(errors="replace") for line in lines]


class Rendezvous:
    """Rendezvous of the processes of a cluster at the port of its coordinator."""

    def __init__(self, coordinator: str, size: int, rank: int, timeout: float):
        """Prepares to meet the others.

        Args:
          coordinator: HOST:PORT of process 0.
          size: number of processes.
          rank: index of this process.
          timeout: seconds to wait for all processes.

        Raises:
          InputError: this is process 0, and the port is taken; JAX would end with a segfault.
        """
        host, _, port = coordinator.rpartition(":")
        self._coordinator, self._size, self._rank = coordinator, size, rank
        self._timeout, self._deadline = timeout, time.monotonic() + timeout
        self._host, self._port = host.strip("[]"), int(port)
        self._peers: dict[int, _Peer] = {}
        self._selector = selectors.DefaultSelector()
        self._server = self._listen() if rank == 0 else None
        self._formed = threading.Event()

    def meet(self) -> None:
        """Waits until all processes have come.

        Raises:
          Lost: one has not come in time, or was lost while this one waited; names it.
          InputError: one was started with another number of processes.
        """
        try:
            if self._server is not None:
                self._receive_all(self._server)
            else:
                self._visit()
        except (Lost, InputError) as error:
            self._tell(f"error {error}")
            raise

    @contextlib.contextmanager
    def watched(self, on_loss: Callable[[str], None]) -> Iterator[None]:
        """Watches that no process is lost while JAX forms the cluster; a context manager.

        Args:
          on_loss: function to call from another thread with the error, which names the process.
        """

        def watch() -> None:
            try:
                while not self._formed.is_set():
                    if self._next_lines(_FORMED):
                        return
            except Lost as error:
                if not self._formed.is_set():
                    self._tell(f"error {error}")
                    on_loss(str(error))

        thread = threading.Thread(target=watch, name="rendezvous", daemon=True)
        thread.start()
        yield
        self._formed.set()
        thread.join()
        self._tell(_FORMED)
        for peer in self._peers.values():
            peer.connection.close()
        self._selector.close()

    def _listen(self) -> socket.socket:
        try:
            if socket.has_dualstack_ipv6():
                address = ("::", self._port)
                return socket.create_server(address, family=socket.AF_INET6, dualstack_ipv6=True)
            return socket.create_server(("", self._port))
        except OSError as error:
            raise InputError(
                f"the port of --coordinator={self._coordinator} is taken on this machine: "
                f"{error.strerror}. Choose another, or end the run that has it"
            ) from error

    def _receive_all(self, server: socket.socket) -> None:
        """Waits in process 0 for all others, then gives the port free for JAX and tells them."""
        server.setblocking(False)
        self._selector.register(server, selectors.EVENT_READ)
        report = time.monotonic() + REPORT_EVERY
        while missing := [rank for rank in range(1, self._size) if rank not in self._peers]:
            now = time.monotonic()
            if now >= self._deadline:
                raise Lost(
                    f"{_named(missing)} not come within {self._timeout:g} seconds "
                    f"(--cluster_timeout) to coordinator {self._coordinator}; start all "
                    f"{self._size} processes"
                )
            if now >= report:
                report = now + REPORT_EVERY
                line = f"cluster         process 0 waits: {_named(missing)} not come yet"
                say(line)
                self._tell(f"says {line}")
            for key, _ in self._selector.select(_POLL):
                if key.fileobj is server:
                    with contextlib.suppress(OSError):
                        peer = _Peer(server.accept()[0])
                        self._selector.register(peer.connection, selectors.EVENT_READ, peer)
                else:
                    self._hear(key.data)
        self._selector.unregister(server)
        server.close()
        self._tell(_GO)

    def _hear(self, peer: _Peer) -> None:
        """Takes what a process says of itself, or its end."""
        lines = peer.lines()
        for line in lines or []:
            rank, _, size = line.partition(" of ")
            if not (rank.isdecimal() and size.isdecimal()):
                lines = None  # something else that knows this port
                break
            peer.rank = int(rank)
            # One whose machine was started anew comes again.
            if (before := self._peers.get(peer.rank)) is not None:
                self._drop(before)
            self._peers[peer.rank] = peer
            if int(size) != self._size:
                raise InputError(
                    f"process {rank} was started with --num_processes={size}, process 0 with "
                    f"{self._size}; start the same command on all of them"
                )
        if lines is None:
            self._drop(peer)
            if peer.rank is not None:
                raise Lost(f"process {peer.rank} was lost before the cluster was formed")

    def _drop(self, peer: _Peer) -> None:
        self._selector.unregister(peer.connection)
        peer.connection.close()

    def _visit(self) -> None:
        """Connects to process 0 and waits until it has met all."""
        report = time.monotonic() + REPORT_EVERY
        while True:
            left = self._deadline - time.monotonic()
            try:
                address = (self._host, self._port)
                connection = socket.create_connection(address, timeout=max(min(left, 5), 0.1))
                break
            except OSError as error:
                if left <= 0:
                    raise Lost(
                        f"process 0 has not come within {self._timeout:g} seconds "
                        f"(--cluster_timeout): coordinator {self._coordinator} does not answer: "
                        f"{error}. Start process 0 there, and let this machine reach that port"
                    ) from error
                if time.monotonic() >= report:
                    report = time.monotonic() + REPORT_EVERY
                    say(
                        f"cluster         process {self._rank} waits for process 0, which does not "
                        f"answer at {self._coordinator}: {error}"
                    )
                time.sleep(_RETRY)
        self._peers[0] = peer = _Peer(connection)
        peer.rank = 0
        self._selector.register(connection, selectors.EVENT_READ, peer)
        peer.send(f"{self._rank} of {self._size}")
        # Process 0 knows who is missing, and says so a little before this process gives up.
        self._deadline += 10
        while not self._next_lines(_GO):
            if time.monotonic() >= self._deadline:
                raise Lost("process 0 has connected, and says nothing more; look at its log")

    def _next_lines(self, awaited: str) -> bool:
        """Acts on what the others say within `_POLL`; returns whether it was what is awaited.

        Raises:
          Lost: a process was lost, or process 0 says so.
        """
        for key, _ in self._selector.select(_POLL):
            peer = key.data
            lines = peer.lines()
            for line in lines or []:
                kind, _, text = line.partition(" ")
                if kind == awaited:
                    return True
                if kind == "error":
                    raise Lost(text)
                if kind == "says":
                    say(text)
            if lines is None:
                self._drop(peer)
                raise Lost(f"process {peer.rank} was lost before the cluster was formed")
        return False

    def _tell(self, line: str) -> None:
        for peer in self._peers.values():
            peer.send(line)


def _named(ranks: list[int]) -> str:
    """Returns "process 3 has" or "processes 3, 5 have"."""
    if len(ranks) == 1:
        return f"process {ranks[0]} has"
    return f"processes {', '.join(map(str, ranks[:8]))}{'…' if len(ranks) > 8 else ''} have"
