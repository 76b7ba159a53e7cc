"""Packets with descriptors over a SOCK_SEQPACKET Unix socket, on asyncio. Both ends use it."""

import array
import asyncio
import contextlib
import json
import os
import socket
from collections import deque
from collections.abc import Callable, Sequence

from podwire.runtime.shim.messages import Message

MAX_PACKET = 1 << 18
_MAX_DESCRIPTORS = 8
_PACKETS_A_TURN = 64


class PacketSocket:
    """One end of a connection. `on_packet(message, fds)` owns the descriptors it gets; `on_close` comes once.

    Sending never blocks: what the peer does not take yet waits here.
    """

    def __init__(
        self, sock: socket.socket, on_packet: Callable[[Message, list[int]], None], on_close: Callable[[], None]
    ) -> None:
        sock.setblocking(False)
        with contextlib.suppress(OSError):
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 2 * MAX_PACKET)
        self._sock = sock
        self._on_packet, self._on_close = on_packet, on_close
        self._loop = asyncio.get_running_loop()
        self._waiting: deque[tuple[bytes, tuple[int, ...]]] = deque()
        self._closed = False
        self._loop.add_reader(sock, self._readable)

    def send(self, message: Message, fds: Sequence[int] = ()) -> None:
        """Queue a packet; `fds` are duplicated by the kernel as it goes out, or by us if it has to wait.

        Raises ValueError for a message that no packet can hold."""
        raw = json.dumps(message, separators=(",", ":")).encode()
        if len(raw) > MAX_PACKET - 4096:
            raise ValueError(f"a message of {len(raw)} bytes is too large for the shim (command and environment too long)")
        if self._closed:
            return
        if not self._waiting and self._send_now(raw, fds):
            return
        if not self._waiting and not self._closed:
            self._loop.add_writer(self._sock, self._writable)
        self._waiting.append((raw, tuple(os.dup(fd) for fd in fds)))

    def close(self) -> None:
        """Close without telling `on_close`."""
        if self._closed:
            return
        self._closed = True
        self._loop.remove_reader(self._sock)
        self._loop.remove_writer(self._sock)
        for _, fds in self._waiting:
            for fd in fds:
                os.close(fd)
        self._waiting.clear()
        self._sock.close()

    def _send_now(self, raw: bytes, fds: Sequence[int]) -> bool:
        try:
            socket.send_fds(self._sock, [raw], list(fds))
        except BlockingIOError:
            return False
        except OSError:
            self._lost()
        return True

    def _writable(self) -> None:
        while self._waiting:
            raw, fds = self._waiting[0]
            if not self._send_now(raw, fds):
                return
            if self._closed:
                return
            self._waiting.popleft()
            for fd in fds:
                os.close(fd)
        self._loop.remove_writer(self._sock)

    def _readable(self) -> None:
        for _ in range(_PACKETS_A_TURN):
            try:
                raw, fds = self._receive()
            except BlockingIOError:
                return
            except OSError:
                raw, fds = b"", []
            if not raw:
                self._lost()
                return
            self._on_packet(json.loads(raw), fds)
            if self._closed:
                return

    def _receive(self) -> tuple[bytes, list[int]]:
        # Not socket.recv_fds: Python 3.11's forgets its flags, and the descriptors would leak into every container.
        fds = array.array("i")
        space = socket.CMSG_SPACE(_MAX_DESCRIPTORS * fds.itemsize)
        raw, control, _, _ = self._sock.recvmsg(MAX_PACKET, space, socket.MSG_CMSG_CLOEXEC)
        for level, kind, data in control:
            if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
                fds.frombytes(data[: len(data) - len(data) % fds.itemsize])
        return raw, fds.tolist()

    def _lost(self) -> None:
        if not self._closed:
            self.close()
            self._on_close()
