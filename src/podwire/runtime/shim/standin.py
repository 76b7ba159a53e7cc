"""The stand-in: what answers on the ports of a container of which only the image is named.

All stand-ins are served by the shim's own loop, on sockets that were opened in the pod's network namespace. HTTP gets 200 and
the pod's name; other TCP gets a line with the name and then an echo; so does UDP, name and echo in one datagram.
"""

import asyncio
import contextlib
import json
import re
import socket
from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

from podwire.runtime.shim.messages import StandInPort

BANNER_DELAY = 0.05
"""Seconds without a byte after which a TCP client is taken for one that waits to be spoken to."""

LINGER_SECONDS = 0.1
"""How long a stand-in that is told to end still takes new connections."""

DRAIN_SECONDS = 2.0
"""How long it waits for those that are open."""

_METHODS = (b"GET ", b"HEAD ", b"POST ", b"PUT ", b"DELETE ", b"PATCH ", b"OPTIONS ")
_LONGEST_METHOD = max(map(len, _METHODS))
_MAX_HEAD = 65536
_CONTENT_LENGTH = re.compile(rb"^content-length:[ \t]*(\d+)[ \t]*\r?$", re.IGNORECASE | re.MULTILINE)
_CHUNKED = re.compile(rb"^transfer-encoding:.*chunked[ \t]*\r?$", re.IGNORECASE | re.MULTILINE)
_EXPECT = re.compile(rb"^expect:[ \t]*100-continue", re.IGNORECASE | re.MULTILINE)
_CLOSE = re.compile(rb"^connection:[ \t]*close[ \t]*\r?$", re.IGNORECASE | re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Identity:
    """Whom a stand-in speaks for."""

    pod: str
    namespace: str
    node: str
    container: str


Log = Callable[[str], None]


class StandIn:
    """The servers of one container; `log` gets a line for each request."""

    def __init__(self, identity: Identity, log: Log) -> None:
        self.identity, self.log = identity, log
        self._servers: list[asyncio.Server] = []
        self._datagrams: list[asyncio.DatagramTransport] = []
        self.connections: set[asyncio.Transport] = set()
        self.draining = False

    async def serve(self, sockets: list[socket.socket]) -> None:
        """Serve on these bound sockets; they are the stand-in's from now on."""
        loop = asyncio.get_running_loop()
        for sock in sockets:
            if sock.type == socket.SOCK_DGRAM:
                transport, _ = await loop.create_datagram_endpoint(lambda: _Datagrams(self), sock=sock)
                self._datagrams.append(transport)
            else:
                self._servers.append(await loop.create_server(lambda: _Connection(self), sock=sock, backlog=512))

    def drain(self, ended: Callable[[], None]) -> None:
        """End as a well-behaved program does at SIGTERM: go on for a moment, since the network may still send clients, then
        take no new ones, let requests be answered; `ended` is called once all is over, DRAIN_SECONDS later at most."""
        if self.draining:
            return
        self.draining = True
        loop = asyncio.get_running_loop()
        deadline = loop.time() + DRAIN_SECONDS

        def look() -> None:
            for server in self._servers:
                server.close()
            if not self.connections or loop.time() >= deadline:
                ended()
            else:
                loop.call_later(LINGER_SECONDS, look)

        if self._servers:
            loop.call_later(LINGER_SECONDS, look)
        else:
            ended()

    def close(self) -> None:
        for server in self._servers:
            server.close()
        for transport in self._datagrams:
            transport.close()
        for connection in tuple(self.connections):
            connection.abort()
        self._servers.clear()
        self._datagrams.clear()


def open_sockets(ports: tuple[StandInPort, ...]) -> list[socket.socket]:
    """Bind every port, in the network namespace that the process is in now; one socket serves both families.

    Raises OSError (EADDRINUSE where another container of the pod has the port)."""
    with contextlib.ExitStack() as opened:
        sockets = [opened.enter_context(_bind(port)) for port in ports if port.protocol in ("TCP", "UDP")]
        opened.pop_all()
    return sockets


def _bind(port: StandInPort) -> socket.socket:
    kind = socket.SOCK_STREAM if port.protocol == "TCP" else socket.SOCK_DGRAM
    try:
        sock = socket.socket(socket.AF_INET6, kind)
    except OSError:  # a kernel without IPv6
        sock = socket.socket(socket.AF_INET, kind)
    try:
        if sock.family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        if kind == socket.SOCK_STREAM:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(("::" if sock.family == socket.AF_INET6 else "0.0.0.0", port.port))
        if kind == socket.SOCK_STREAM:
            sock.listen(512)
    except OSError as error:
        sock.close()
        raise OSError(error.errno, f"port {port.port}/{port.protocol}: {error.strerror}") from error
    sock.setblocking(False)
    return sock


def plain_address(address: tuple[str, int] | tuple[str, int, int, int]) -> tuple[str, int]:
    """Host and port as people write them: an IPv4 client of a dual-stack socket as IPv4."""
    return address[0].removeprefix("::ffff:"), address[1]


def joined(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


class _Datagrams(asyncio.DatagramProtocol):
    def __init__(self, owner: StandIn) -> None:
        self._owner = owner
        self._transport: asyncio.DatagramTransport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.DatagramTransport", transport)  # is one in all but its class in Python 3.11

    def datagram_received(self, data: bytes, addr: tuple[str, int]) -> None:
        if self._transport is not None:
            self._transport.sendto(self._owner.identity.pod.encode() + b"\n" + data, addr)
            self._owner.log(f"udp {joined(*plain_address(addr))} {len(data)} bytes")


class _Connection(asyncio.Protocol):
    """A TCP client: undecided until it speaks HTTP, speaks something else, or says nothing for BANNER_DELAY."""

    def __init__(self, owner: StandIn) -> None:
        self._owner = owner
        self._transport: asyncio.Transport | None = None
        self._peer = self._local = ("", 0)
        self._timer: asyncio.TimerHandle | None = None
        self._buffer = b""
        self._echoing = False
        self._skip = 0  # bytes of a request's body still to come
        self._chunks: _Chunks | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        if not isinstance(transport, asyncio.Transport):
            return
        self._transport = transport
        self._peer = plain_address(transport.get_extra_info("peername") or ("", 0))
        self._local = plain_address(transport.get_extra_info("sockname") or ("", 0))
        self._owner.connections.add(transport)
        self._timer = asyncio.get_running_loop().call_later(BANNER_DELAY, self._greet)

    def connection_lost(self, exc: Exception | None) -> None:
        if self._transport is not None:
            self._owner.connections.discard(self._transport)
        if self._timer is not None:
            self._timer.cancel()

    def data_received(self, data: bytes) -> None:
        if self._echoing:
            self._write(data)
            return
        self._buffer += data
        if self._timer is not None:
            if _may_become_http(self._buffer):
                return
            self._timer.cancel()
            self._timer = None
            if not self._buffer.startswith(_METHODS):
                self._greet()
                return
        self._serve_http()

    def pause_writing(self) -> None:
        if self._transport is not None:
            self._transport.pause_reading()

    def resume_writing(self) -> None:
        if self._transport is not None:
            self._transport.resume_reading()

    def _greet(self) -> None:
        self._timer = None
        self._echoing = True
        self._owner.log(f"tcp {joined(*self._peer)} connected")
        self._write(self._owner.identity.pod.encode() + b"\n" + self._buffer)
        self._buffer = b""

    def _serve_http(self) -> None:
        while True:
            if self._chunks is not None:
                self._buffer = self._chunks.feed(self._buffer)
                if not self._chunks.done:
                    return
                self._chunks = None
            if self._skip:
                taken = min(self._skip, len(self._buffer))
                self._skip -= taken
                self._buffer = self._buffer[taken:]
            end = self._buffer.find(b"\r\n\r\n")
            if self._skip or end < 0:
                if len(self._buffer) > _MAX_HEAD and self._transport is not None:
                    self._transport.abort()
                return
            head, self._buffer = self._buffer[:end], self._buffer[end + 4 :]
            self._answer(head)

    def _answer(self, head: bytes) -> None:
        if length := _CONTENT_LENGTH.search(head):
            self._skip = int(length[1])
        elif _CHUNKED.search(head):
            self._chunks = _Chunks()
        if (self._skip or self._chunks) and _EXPECT.search(head):
            self._write(b"HTTP/1.1 100 Continue\r\n\r\n")
        request = head.split(b"\r\n", 1)[0]
        method, _, rest = request.partition(b" ")
        path, _, version = rest.rpartition(b" ")
        kind, body = self._body(path.decode("latin-1").partition("?")[0])
        closing = bool(_CLOSE.search(head)) or version != b"HTTP/1.1" or self._owner.draining
        self._write(
            b"HTTP/1.1 200 OK\r\nContent-Type: %s\r\nContent-Length: %d\r\nConnection: %s\r\n\r\n%s"
            % (kind, len(body), b"close" if closing else b"keep-alive", b"" if method == b"HEAD" else body)
        )
        self._owner.log(f'{self._peer[0]} - "{request.decode("latin-1")}" 200 {len(body)}')
        if closing and self._transport is not None:
            self._transport.close()

    def _body(self, path: str) -> tuple[bytes, bytes]:
        identity = self._owner.identity
        if path == "/hostname":
            return b"text/plain", identity.pod.encode()
        if path == "/clientip":
            return b"text/plain", joined(*self._peer).encode()
        facts = {
            "pod": identity.pod,
            "namespace": identity.namespace,
            "node": identity.node,
            "container": identity.container,
            "client": joined(*self._peer),
            "server": joined(*self._local),
        }
        if path == "/json":
            return b"application/json", json.dumps(facts).encode() + b"\n"
        lines = [identity.pod, *(f"{key}: {value}" for key, value in facts.items() if key != "pod")]
        return b"text/plain; charset=utf-8", "\n".join(lines).encode() + b"\n"

    def _write(self, data: bytes) -> None:
        if self._transport is not None and not self._transport.is_closing():
            self._transport.write(data)


class _Chunks:
    """Skips a chunked body."""

    def __init__(self) -> None:
        self.done = False
        self._left = 0  # of the current chunk and the line end after it
        self._last = False

    def feed(self, data: bytes) -> bytes:
        """Consume what belongs to the body; returns what is left over."""
        while not self.done:
            taken = min(self._left, len(data))
            data = data[taken:]
            self._left -= taken
            line, found, rest = data.partition(b"\r\n")
            if self._left or not found:
                return data
            data = rest
            if self._last:
                self.done = not line  # trailers end with an empty line
                continue
            size = int(line.partition(b";")[0] or b"0", 16)
            self._last = size == 0
            self._left = size + 2 if size else 0
        return data


def _may_become_http(start: bytes) -> bool:
    return len(start) < _LONGEST_METHOD and any(method.startswith(start) for method in _METHODS if len(method) > len(start))
