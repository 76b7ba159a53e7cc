"""The process half of the udp back end: between a TUN device and a UDP socket, in a thread of its own.

Packets are taken in batches: all that waits at one end, up to a bound, before the other end is looked at; so one call to poll
serves many packets under load, and neither direction starves the other. Datagrams go to and come from the kernel many in
one call where they are alike (UDP_SEGMENT, UDP_GRO).
"""

import asyncio
import errno
import logging
import os
import select
import socket
import struct
import threading
from collections.abc import Callable
from contextlib import suppress
from ipaddress import IPv4Address, IPv4Network

from podwire.kernel.netns import run_in_netns
from podwire.kernel.tun import attach_tun
from podwire.wire.udptunnel import RouteTable, is_ipv4, net_unreachable, spend_hop

log = logging.getLogger(__name__)

BATCH = 128
"""Packets taken from one end before the other has its turn."""

_SOCKET_BUFFER = 4 << 20
_LARGEST = 1 << 16
_SEGMENTS = 64
_MOST_BYTES = 65000
"""What one call with UDP_SEGMENT takes (linux/udp.h: UDP_MAX_SEGMENTS was 64 before 6.9), and a UDP datagram's payload."""

_SOL_UDP, _UDP_SEGMENT, _UDP_GRO = 17, 103, 104
_U16, _U32 = struct.Struct("=H"), struct.Struct("=i")
_ANCILLARY_BYTES = socket.CMSG_SPACE(4)
_NOBODY = ("", 0)
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
        self._view = memoryview(bytearray(3 * _LARGEST))
        self._segments = True
        self._failed: OSError | None = None
        self._ended = ended
        self.sent = self.received = 0
        """Packets to and from other hosts."""
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
        """Packets of one size for one peer go out in one call, which the kernel cuts into datagrams (UDP_SEGMENT): on the wire
        that is the same. The last of them may be shorter."""
        view, tun, lookup = self._view, self._tun, self._routes.lookup
        start = end = size = count = 0
        to = _NOBODY
        for _ in range(BATCH):
            if end > len(view) - _LARGEST:
                self._send(start, end, size, to)
                start = end = count = 0
            try:
                length = os.readv(tun, (view[end : end + _LARGEST],))
            except BlockingIOError:
                break
            packet = view[end : end + length]
            if not is_ipv4(packet, length):
                self.dropped += 1
                continue
            endpoint = lookup(int.from_bytes(packet[16:20], "big"))
            if endpoint is None or not spend_hop(packet):
                self.dropped += 1
                if endpoint is None:
                    self._refuse(bytes(packet))
                continue
            if not count or endpoint is not to or length > size or count == _SEGMENTS or end + length - start > _MOST_BYTES:
                self._send(start, end, size, to)
                start, size, to, count = end, length, endpoint, 0
            end += length
            count += 1
            if length < size:
                self._send(start, end, size, to)
                start, count = end, 0
        self._send(start, end, size, to)

    def _send(self, start: int, end: int, size: int, to: tuple[str, int]) -> None:
        """The packets of `size` bytes (the last may have fewer) that stand from `start` to `end`."""
        if start == end:
            return
        self.sent += -(-(end - start) // size)
        try:
            if end - start > size and self._segments:
                self._socket.sendmsg((self._view[start:end],), ((_SOL_UDP, _UDP_SEGMENT, _U16.pack(size)),), 0, to)
                return
            for at in range(start, end, size):
                self._socket.sendto(self._view[at : min(at + size, end)], to)
        except OSError as error:
            if error.errno in (errno.EIO, errno.EINVAL, errno.ENOPROTOOPT) and self._segments:
                log.info("udp tunnel %s: the kernel does not cut datagrams here (%s): one call each", self._device, error)
                self._segments = False
                self.sent -= -(-(end - start) // size)
                self._send(start, end, size, to)
            elif error.errno not in _PASSING:
                raise

    def _inwards(self) -> None:
        view, tun = self._view, self._tun
        receive, into = self._socket.recvmsg_into, (self._view[:_LARGEST],)
        for _ in range(BATCH):
            try:
                length, said, _, _ = receive(into, _ANCILLARY_BYTES)
            except BlockingIOError:
                return
            except ConnectionRefusedError:
                continue  # an ICMP answer to what was sent to a peer that is not there (yet)
            size = _U32.unpack(said[0][2])[0] if said else length  # UDP_GRO: several datagrams of that size in one
            for at in range(0, length, max(size, 1)):
                packet = view[at : min(at + size, length)]
                if not is_ipv4(packet, len(packet)) or not spend_hop(packet):
                    self.dropped += 1
                    continue
                self.received += 1
                try:
                    os.write(tun, packet)
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
        with suppress(OSError):  # a kernel before 5.0 gives them one by one
            sock.setsockopt(_SOL_UDP, _UDP_GRO, 1)
        sock.bind((str(local), port))
    except BaseException:
        sock.close()
        raise
    return sock
