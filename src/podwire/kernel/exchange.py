"""Numbered requests over a netlink socket, and what comes back. Blocking: called off the event loop."""

import errno
import os
import socket

from podwire.kernel.port import KernelError
from podwire.wire import netlink
from podwire.wire.netlink import Batch, Dump

RECEIVE_BYTES = 1 << 16
"""Datagrams of a dump are at most 32 KiB (the kernel's own choice)."""

_SEQ_LIMIT = 0x7FFFFFFF
_DUMP_ATTEMPTS = 20


class Exchange:
    """One socket's requests; the socket stays the caller's. Not for use by two threads at once. Whatever goes wrong beside a
    refusal is a KernelError that names `subject`."""

    def __init__(self, sock: socket.socket, subject: str, *, timeout: float | None = None, first: int = 1) -> None:
        """timeout: seconds to wait for an answer. first: number of the first request."""
        self._sock, self._subject, self._seq = sock, subject, first
        sock.settimeout(timeout)

    def number(self, count: int) -> int:
        """The first of `count` numbers in a row."""
        if self._seq + count > _SEQ_LIMIT:
            self._seq = 1
        first = self._seq
        self._seq += count
        return first

    def send(self, data: bytes) -> None:
        try:
            self._sock.send(data)
        except OSError as error:
            words = f"sending {len(data)} bytes to {self._subject}: {error.strerror or error}"
            raise KernelError(words, error.errno or errno.EIO) from error

    def receive(self) -> bytes:
        try:
            return self._sock.recv(RECEIVE_BYTES)
        except TimeoutError as error:
            waited = self._sock.gettimeout() or 0
            raise KernelError(f"{self._subject} gave no answer within {waited:.0f} s", errno.ETIMEDOUT) from error
        except OSError as error:
            raise KernelError(f"reading from {self._subject}: {error.strerror or error}", error.errno or errno.EIO) from error

    def execute(self, requests: tuple[bytes, ...]) -> Batch:
        """Requests in one datagram, and what became of each."""
        batch = Batch(self.number(len(requests)), requests)
        self.send(batch.encode())
        while not batch.done:
            batch.feed(self.receive())
        return batch

    def dump(self, request: bytes, *, absent: tuple[int, ...] = ()) -> list[netlink.Message]:
        """All messages of a dump, consistent: one that the kernel says was changed under way is read again.

        absent: errors that mean that there is nothing to read."""
        for _ in range(_DUMP_ATTEMPTS):
            dump = Dump(self.number(1))
            self.send(netlink.with_seq(request, dump.seq))
            while not dump.done:
                dump.feed(self.receive())
            if dump.errno in absent:
                return []
            if dump.errno:
                raise KernelError(f"reading {self._subject}: {dump.text or os.strerror(dump.errno)}", dump.errno)
            if not dump.interrupted:
                return dump.messages
        raise KernelError(f"{self._subject} changed during each of {_DUMP_ATTEMPTS} readings", errno.EAGAIN)
