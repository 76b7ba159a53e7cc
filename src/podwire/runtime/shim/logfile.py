"""A container's log in the CRI's format: `2026-01-02T03:04:05.000000006Z stdout F text`, P for a part of a longer line."""

import asyncio
import os
import time
from collections.abc import Callable

MAX_LINE = 16384
MAX_FILE = 10 << 20
"""A log that grows beyond this (kubelet's default) is begun anew; the one before is kept beside it as `.1`."""

_READ = 65536


def timestamp(nanoseconds: int) -> str:
    """RFC 3339 with nine digits, as the CRI writes it; `nanoseconds` since 1970."""
    seconds, rest = divmod(nanoseconds, 1_000_000_000)
    return f"{time.strftime('%Y-%m-%dT%H:%M:%S', time.gmtime(seconds))}.{rest:09d}Z"


class LogFile:
    """Appends to one file; `on_write` is called after each write (followers wait for it)."""

    def __init__(self, path: str, on_write: Callable[[], None]) -> None:
        os.makedirs(os.path.dirname(path), exist_ok=True)
        self._path, self._on_write = path, on_write
        self._fd, self._size = -1, 0
        self._open()

    def write(self, stream: str, lines: list[bytes], tag: str = "F") -> None:
        """Append lines (without their newline) of `stream` ("stdout", "stderr"), all with the time of now."""
        if self._fd < 0:
            return
        head = f"{timestamp(time.time_ns())} {stream} {tag} ".encode()
        self._size += os.write(self._fd, b"".join(head + line + b"\n" for line in lines))
        if self._size > MAX_FILE:
            self.close()
            os.replace(self._path, f"{self._path}.1")
            self._open()
        self._on_write()

    def _open(self) -> None:
        self._fd = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o640)
        self._size = os.fstat(self._fd).st_size

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


class LogPipe:
    """Reads one of a container's output pipes into its log file."""

    def __init__(self, fd: int, stream: str, log: LogFile) -> None:
        os.set_blocking(fd, False)
        self._fd, self._stream, self._log = fd, stream, log
        self._rest = b""
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(fd, self._readable)

    def finish(self) -> None:
        """Take what is still in the pipe and close it."""
        while self._fd >= 0 and self._readable():
            pass
        self._end()

    def _readable(self) -> bool:
        try:
            data = os.read(self._fd, _READ)
        except BlockingIOError:
            return False
        except OSError:
            data = b""
        if not data:
            self._end()
            return False
        *lines, self._rest = (self._rest + data).split(b"\n")
        whole = [line for line in lines if len(line) <= MAX_LINE]
        if len(whole) == len(lines):
            if lines:
                self._log.write(self._stream, lines)
        else:
            for line in lines:
                self._long_line(line)
        while len(self._rest) > MAX_LINE:
            self._log.write(self._stream, [self._rest[:MAX_LINE]], "P")
            self._rest = self._rest[MAX_LINE:]
        return True

    def _long_line(self, line: bytes) -> None:
        while len(line) > MAX_LINE:
            self._log.write(self._stream, [line[:MAX_LINE]], "P")
            line = line[MAX_LINE:]
        self._log.write(self._stream, [line])

    def _end(self) -> None:
        if self._fd < 0:
            return
        if self._rest:
            self._log.write(self._stream, [self._rest])
        self._loop.remove_reader(self._fd)
        os.close(self._fd)
        self._fd = -1
