"""Probing an overlay with UDP datagrams to a closed port. If one arrives, the other end says that nobody listens; no program is
needed there. For the path MTU they are forbidden to be cut: one byte more must be refused by the sender's own device."""

import asyncio
import errno
import os
import secrets
import socket
from dataclasses import dataclass
from typing import Self

from podwire.kernel.capture import Capture
from podwire.kernel.netns import in_netns
from podwire.model.addr import IPAddress
from podwire.model.errors import InvalidInput
from podwire.wire.packet import parse_frame

CLOSED_PORT = 9
"""The discard protocol's: nothing on a node or in a pod serves it."""
MOST_AT_ONCE = 64
"""So many probes are under way together: each waits for seconds where nothing answers, and these must not add up."""
_TRIES = 3
_MARK_BYTES = 16
_ANSWER_SECONDS = 0.7
_IP_MTU_DISCOVER, _IPV6_MTU_DISCOVER, _PMTUDISC_PROBE = 10, 23, 3
"""linux/in.h, linux/in6.h: don't fragment, and don't believe what was learnt of the path before."""


@dataclass(frozen=True, slots=True)
class MtuResult:
    """What became of a datagram of `size` bytes (with its IP and UDP headers): "arrived", "too big" or "lost"."""

    size: int
    outcome: str


@dataclass(frozen=True, slots=True)
class SourceResult:
    """What became of a datagram from an address: as which it left, by the device that was last, and whether it was answered."""

    left_as: frozenset[IPAddress]
    device: str
    answered: bool


class SourceProbes:
    """Datagrams to a closed port, watched as they leave this host: nothing on the way out may change where they come from.
    An asynchronous context manager. Raises InvalidInput for whom the kernel does not let capture."""

    def __init__(self, netns: int) -> None:
        self._netns, self._capture = netns, Capture()
        self._mark = secrets.token_bytes(_MARK_BYTES)

    async def __aenter__(self) -> Self:
        try:
            await self._capture.open({"host": self._netns})
        except PermissionError as error:
            raise InvalidInput(
                "packets are watched as they leave this host, which needs the right to: run it as root"
            ) from error
        self._capture.expect(self._mark)
        return self

    async def __aexit__(self, *_: object) -> None:
        self._capture.close()

    async def probe(self, source: IPAddress, address: IPAddress) -> SourceResult:
        """From `source`, an address of this host, to `address`."""
        payload = self._mark + secrets.token_bytes(_MARK_BYTES)
        with await in_netns(self._netns, lambda: _open(address, source)) as sock:
            outcome = await _send(sock, payload)
        frames = [frame for frame in self._capture.collect() if frame.outgoing and payload in frame.data]
        packets = [parsed.packet.innermost for frame in frames if (parsed := parse_frame(frame.data)) and parsed.packet]
        return SourceResult(
            frozenset(packet.src for packet in packets if payload in packet.payload),
            frames[-1].device if frames else "",
            outcome == "arrived",
        )


async def probe_mtu(netns: int, address: IPAddress, mtu: int, source: IPAddress | None = None) -> tuple[MtuResult, MtuResult]:
    """From namespace `netns` to `address`: at `mtu` bytes, and one byte over.

    source: whom to answer. Better not a subnet's own address, which a tunnel's device has: where the route to it is on-link,
    Linux takes it for an anycast address (`ipv6_anycast_destination`), and sends no ICMPv6 error to one."""
    sock = await in_netns(netns, lambda: _open(address, source))
    with sock:
        results = [MtuResult(size, await _send(sock, bytes(size - _headers(address)))) for size in (mtu, mtu + 1)]
        return results[0], results[1]


def _headers(address: IPAddress) -> int:
    """Bytes of an IP and a UDP header."""
    return 28 if address.version == 4 else 48


def _open(address: IPAddress, source: IPAddress | None = None) -> socket.socket:
    sock = socket.socket(socket.AF_INET if address.version == 4 else socket.AF_INET6, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
    try:
        if address.version == 4:
            sock.setsockopt(socket.IPPROTO_IP, _IP_MTU_DISCOVER, _PMTUDISC_PROBE)
        else:
            sock.setsockopt(socket.IPPROTO_IPV6, _IPV6_MTU_DISCOVER, _PMTUDISC_PROBE)
        if source is not None:
            sock.bind((str(source), 0))
        sock.connect((str(address), CLOSED_PORT))
    except OSError:
        sock.close()
        raise
    return sock


async def _send(sock: socket.socket, payload: bytes) -> str:
    """What became of it: "arrived", "too big", "lost", or another refusal in the kernel's words."""
    loop = asyncio.get_running_loop()
    for _ in range(_TRIES):
        try:
            sock.send(payload)
            async with asyncio.timeout(_ANSWER_SECONDS):
                await loop.sock_recv(sock, 1)
        except TimeoutError:
            continue
        except OSError as error:
            if error.errno == errno.ECONNREFUSED:
                return "arrived"
            if error.errno == errno.EMSGSIZE:
                return "too big"
            return os.strerror(error.errno or 0)
    return "lost"
