"""Capturing frames in several network namespaces at once, without libpcap, tcpdump or root.

One AF_PACKET socket a namespace, opened by a thread that has entered it, sees every device there. The kernel's receive
time stamps put the frames of all namespaces in order: it is one kernel, hence one clock.
"""

import asyncio
import contextlib
import socket
import struct
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Self

from podwire.kernel.netns import in_netns

_ETH_P_ALL = 3
_SO_TIMESTAMPNS = 35
_PACKET_OUTGOING = 4
_WITHOUT_FRAMES = (65534, 768)
"""linux/if_arp.h: ARPHRD_NONE (TUN, WireGuard) and ARPHRD_TUNNEL (IPIP). What they carry begins with its IP header."""
_NO_MACS = bytes(12)
_TIMESPEC = struct.Struct("@qq")
_SNAPLEN = 65536
_RECEIVE_BUFFER = 4 << 20
_BATCH = 256
"""Frames read from one socket before the event loop gets its turn."""
_STAMPS_SECONDS = 10.0
_MOMENT_SECONDS = 0.001


@dataclass(frozen=True, slots=True)
class Captured:
    """One frame on one device (with an empty Ethernet header where the device has none). `at` is in nanoseconds of the kernel's
    clock; `outgoing` as the device sees it."""

    at: int
    place: str
    device: str
    outgoing: bool
    data: bytes = field(repr=False)


class Capture:
    """An open capture: keeps the frames that hold the bytes last given to `expect`, drops all others.

    Closing packet sockets makes the kernel wait for a grace period each: open one capture and use it for many packets."""

    def __init__(self) -> None:
        self._frames: list[Captured] = []
        self._expected = b""
        self._sockets: list[tuple[str, socket.socket]] = []

    async def open(self, places: Mapping[str, int]) -> Self:
        """Start capturing in every namespace of `places` (a name for reports → descriptor). Raises OSError, also where neither
        the caller's namespace nor any of these has its `lo` up."""
        try:
            for place, fd in places.items():
                sock = await in_netns(fd, _packet_socket)
                self._sockets.append((place, sock))
                asyncio.get_running_loop().add_reader(sock, self._drain, place, sock)
            await _stamps_have_begun(places)
        except BaseException:
            self.close()
            raise
        return self

    def expect(self, payload: bytes) -> None:
        """Forget what was captured and from now on keep the frames that hold `payload` (a tunnelled packet's too)."""
        self._expected = payload
        self._frames.clear()

    def collect(self) -> list[Captured]:
        """What was captured since `expect`, by time. Reads what the sockets still hold: nothing sent before is missing."""
        for place, sock in self._sockets:
            self._drain(place, sock, limit=1 << 20)
        return sorted(self._frames, key=lambda frame: frame.at)

    def close(self) -> None:
        for _, sock in self._sockets:
            asyncio.get_running_loop().remove_reader(sock)
            sock.close()
        self._sockets.clear()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        self.close()

    def _drain(self, place: str, sock: socket.socket, limit: int = _BATCH) -> None:
        for _ in range(limit):
            try:
                data, ancillary, _, address = sock.recvmsg(_SNAPLEN, 64)
            except BlockingIOError:
                return
            except OSError:  # ENETDOWN: a device went away under the capture; the others go on
                continue
            if self._expected and self._expected in data:
                device, ethertype, packet_type, kind = address[:4]
                if kind in _WITHOUT_FRAMES:
                    data = _NO_MACS + struct.pack("!H", ethertype) + data
                self._frames.append(Captured(_stamp(ancillary), place, device, packet_type == _PACKET_OUTGOING, data))


def _packet_socket() -> socket.socket:
    sock = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(_ETH_P_ALL))
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _RECEIVE_BUFFER)
    sock.setsockopt(socket.SOL_SOCKET, _SO_TIMESTAMPNS, 1)
    sock.setblocking(False)
    return sock


async def _stamps_have_begun(places: Mapping[str, int]) -> None:
    """Returns when the kernel stamps frames, which it begins to do a moment after the first socket has asked for it. A frame
    without a stamp gets one when it is read, and hops would be in the order of our reading."""
    with await _own_line(places) as sock:
        async with asyncio.timeout(_STAMPS_SECONDS):
            while True:
                sock.send(b"?")
                sent = time.time_ns()
                await asyncio.sleep(_MOMENT_SECONDS)
                with contextlib.suppress(BlockingIOError):
                    if _stamp(sock.recvmsg(1, 64)[1]) <= sent:
                        return


async def _own_line(places: Mapping[str, int]) -> socket.socket:
    """A UDP socket that sends to itself, through some namespace's `lo`."""
    try:
        return _to_itself()
    except OSError as error:
        refused = error
    for fd in places.values():
        with contextlib.suppress(OSError):
            return await in_netns(fd, _to_itself)
    raise refused


def _to_itself() -> socket.socket:
    sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
    try:
        sock.setsockopt(socket.SOL_SOCKET, _SO_TIMESTAMPNS, 1)
        sock.bind(("127.0.0.1", 0))
        sock.connect(sock.getsockname())
    except OSError:
        sock.close()
        raise
    return sock


def _stamp(ancillary: list[tuple[int, int, bytes]]) -> int:
    """The SCM_TIMESTAMPNS control message as nanoseconds; 0 where the kernel gave none."""
    for level, kind, data in ancillary:
        if level == socket.SOL_SOCKET and kind == _SO_TIMESTAMPNS:
            seconds, nanoseconds = _TIMESPEC.unpack_from(data)
            return int(seconds) * 1_000_000_000 + int(nanoseconds)
    return 0
