"""The process half of the udp back end: between a TUN device and a UDP socket, in a thread of its own.

Packets are taken in batches: all that waits at one end, up to a bound, before the other end is looked at; so one call to poll
serves many packets under load, and neither direction starves the other.
"""

import asyncio
import errno
import logging
import os
import select
import socket
import threading
from collections.abc import Callable
from ipaddress import IPv4Address, IPv4Network

from podwire.kernel.netns import run_in_netns
from podwire.kernel.tun import attach_tun
from podwire.wire.udptunnel import RouteTable, is_ipv4, net_unreachable, spend_hop

log = logging.getLogger(__name__)

BATCH = 128
"""Packets taken from one end before the other has its turn."""

_SOCKET_BUFFER = 4 << 20
_LARGEST = 1 << 16
_PASSING = (errno.EAGAIN, errno.ENOBUFS, errno.EPERM, errno.ECONNREFUSED, errno.ENETUNREACH, errno.EHOSTUNREACH, errno.EMSGSIZE)
"""The packet is lost, as packets are; the tunnel goes on."""


class UdpProxy:
    """Carries packets until `close`. Routes may be changed at any time, from the loop.

    ended: called, in the proxy's thread, when
    it stops by itself. Raises OSError if the device or the port
    cannot be had, Unsupported without TUN."""

    def __init__(self, netns_fd: int, device: str, local: IPv4Address, port: int, ended: Callable[[], object]) -> None:
        self._device, self._port = device, port
        self._routes = RouteTable()
        self._socket = run_in_netns(netns_fd, lambda: _open_socket(local, port))
        try:
            self._tun = attach_tun(netns_fd, device)
        except BaseException:
            self._socket.close()
            raise
        self._wake_read, self._wake_write = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        self._buffer = bytearray(_LARGEST)
        self._view = memoryview(self._buffer)
        self._failed: OSError | None = None
        self._ended = ended
        self.dropped = 0
        """Packets without a route, without hops left, or that were none."""
        self._thread = threading.Thread(target=self._run, name=f"udp-{device}", daemon=True)
        self._thread.start()

    def set_route(self, subnet: IPv4Network, address: IPv4Address | None) -> None:
        """Where a peer's subnet is reached from now on; None: nowhere. The table is replaced entry by entry, which the other
        thread may see at any point."""
        self._routes.set(subnet, (str(address), self._port) if address is not None else None)

    @property
    def failure(self) -> OSError | None:
        """Why it stopped by itself: mostly that somebody removed the device."""
        return self._failed

    async def close(self) -> None:
        os.write(self._wake_write, b"x")
        await asyncio.get_running_loop().run_in_executor(None, self._thread.join)
        os.close(self._tun)
        self._socket.close()
        os.close(self._wake_read)
        os.close(self._wake_write)

    # --- the thread -----------------------------------------------------------------------------------------------

    def _run(self) -> None:
        poll = select.poll()
        udp = self._socket.fileno()
        for fd in (self._tun, udp, self._wake_read):
            poll.register(fd, select.POLLIN)
        try:
            while True:
                ready = dict(poll.poll())
                if self._wake_read in ready:
                    return
                if self._tun in ready:
                    self._outwards()
                if udp in ready:
                    self._inwards()
        except OSError as error:
            self._failed = error
            log.warning("udp tunnel %s stopped: %s", self._device, error)
            self._ended()

    def _outwards(self) -> None:
        buffer, view, tun = self._buffer, self._view, self._tun
        lookup, send = self._routes.lookup, self._socket.sendto
        for _ in range(BATCH):
            try:
                length = os.readv(tun, (buffer,))
            except BlockingIOError:
                return
            if not is_ipv4(buffer, length):
                self.dropped += 1
                continue
            endpoint = lookup(int.from_bytes(view[16:20], "big"))
            if endpoint is None:
                self.dropped += 1
                self._refuse(bytes(view[:length]))
            elif not spend_hop(buffer):
                self.dropped += 1
            else:
                try:
                    send(view[:length], endpoint)
                except OSError as error:
                    if error.errno not in _PASSING:
                        raise

    def _inwards(self) -> None:
        buffer, view, tun = self._buffer, self._view, self._tun
        receive = self._socket.recv_into
        for _ in range(BATCH):
            try:
                length = receive(buffer)
            except BlockingIOError:
                return
            except ConnectionRefusedError:
                continue  # an ICMP answer to what was sent to a peer that is not there (yet)
            if not is_ipv4(buffer, length) or not spend_hop(buffer):
                self.dropped += 1
                continue
            try:
                os.write(tun, view[:length])
            except OSError as error:
                if error.errno not in (*_PASSING, errno.EINVAL):
                    raise

    def _refuse(self, packet: bytes) -> None:
        answer = net_unreachable(packet)
        if answer:
            try:
                os.write(self._tun, answer)
            except OSError as error:
                if error.errno not in (*_PASSING, errno.EINVAL):
                    raise


def _open_socket(local: IPv4Address, port: int) -> socket.socket:
    sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
    try:
        for option in (socket.SO_RCVBUF, socket.SO_SNDBUF):
            sock.setsockopt(socket.SOL_SOCKET, option, _SOCKET_BUFFER)
        sock.bind((str(local), port))
    except BaseException:
        sock.close()
        raise
    return sock
