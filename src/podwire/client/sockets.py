"""Sockets to servers. Who watches one may hear nothing for minutes: the kernel asks whether it is still there."""

import socket
from collections.abc import Callable

import aiohttp

SocketFactory = Callable[[aiohttp.AddrInfoType], socket.socket]
"""Makes the socket for an address; a lab makes it in the namespace of a node."""

GONE_SECONDS = 15
"""A server that has acknowledged nothing for so long, data or a probe, counts as gone."""

_PROBES = ((socket.TCP_KEEPIDLE, 5), (socket.TCP_KEEPINTVL, 3), (socket.TCP_USER_TIMEOUT, GONE_SECONDS * 1000))


def open_socket(address: aiohttp.AddrInfoType) -> socket.socket:
    """A TCP socket, not connected, that fails when the other end is gone."""
    sock = socket.socket(address[0], address[1], address[2])
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in _PROBES:
        sock.setsockopt(socket.IPPROTO_TCP, option, value)
    return sock
