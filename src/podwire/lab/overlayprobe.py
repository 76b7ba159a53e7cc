"""Probing an overlay's path MTU: a UDP datagram to a closed port, forbidden to be cut. If it arrives whole, the other end
says that nobody listens; no program is needed there. One byte more must be refused by the sender's own device."""

import asyncio
import errno
import os
import socket
from dataclasses import dataclass

from podwire.kernel.netns import in_netns
from podwire.model.addr import IPAddress

CLOSED_PORT = 9
"""The discard protocol's: nothing on a node or in a pod serves it."""
_TRIES = 3
_ANSWER_SECONDS = 0.7
_IP_MTU_DISCOVER, _IPV6_MTU_DISCOVER, _PMTUDISC_PROBE = 10, 23, 3
"""linux/in.h, linux/in6.h: don't fragment, and don't believe what was learnt of the path before."""


@dataclass(frozen=True, slots=True)
class MtuResult:
    """What became of a datagram of `size` bytes (with its IP and UDP headers): "arrived", "too big" or "lost"."""

    size: int
    outcome: str


async def probe_mtu(netns: int, address: IPAddress, mtu: int) -> tuple[MtuResult, MtuResult]:
    """From namespace `netns` to `address`: at `mtu` bytes, and one byte over."""
    sock = await in_netns(netns, lambda: _open(address))
    with sock:
        return await _send(sock, address, mtu), await _send(sock, address, mtu + 1)


def _open(address: IPAddress) -> socket.socket:
    sock = socket.socket(socket.AF_INET if address.version == 4 else socket.AF_INET6, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
    try:
        if address.version == 4:
            sock.setsockopt(socket.IPPROTO_IP, _IP_MTU_DISCOVER, _PMTUDISC_PROBE)
        else:
            sock.setsockopt(socket.IPPROTO_IPV6, _IPV6_MTU_DISCOVER, _PMTUDISC_PROBE)
        sock.connect((str(address), CLOSED_PORT))
    except OSError:
        sock.close()
        raise
    return sock


async def _send(sock: socket.socket, address: IPAddress, size: int) -> MtuResult:
    payload = bytes(size - (28 if address.version == 4 else 48))
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
                return MtuResult(size, "arrived")
            if error.errno == errno.EMSGSIZE:
                return MtuResult(size, "too big")
            return MtuResult(size, os.strerror(error.errno or 0))
    return MtuResult(size, "lost")
