"""Reading container logs (CRI format) as kubelet serves them: tail, since, limit, follow."""

import os
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass

_BLOCK = 65536
_READ = 1 << 20


@dataclass(frozen=True, slots=True)
class LogOptions:
    """corev1.PodLogOptions. `since` is an RFC 3339 time with nine digits, as the log has it; empty: from the start."""

    follow: bool = False
    timestamps: bool = False
    tail_lines: int | None = None
    limit_bytes: int | None = None
    since: str = ""


class _Renderer:
    """Log records to what the reader is shown."""

    def __init__(self, options: LogOptions) -> None:
        self._options = options
        self._rest = b""
        self._within_line = False
        self._left = options.limit_bytes

    @property
    def full(self) -> bool:
        """Whether the limit is reached."""
        return self._left == 0

    def feed(self, data: bytes) -> bytes:
        *records, self._rest = (self._rest + data).split(b"\n")
        shown = b"".join(map(self._render, records))
        if self._left is not None:
            shown = shown[: self._left]
            self._left -= len(shown)
        return shown

    def _render(self, record: bytes) -> bytes:
        time, _, rest = record.partition(b" ")
        _stream, _, rest = rest.partition(b" ")
        tag, _, text = rest.partition(b" ")
        if self._options.since and time.decode("ascii", "replace") < self._options.since:
            return b""
        head = time + b" " if self._options.timestamps and not self._within_line else b""
        self._within_line = tag == b"P"
        return head + text + (b"" if self._within_line else b"\n")


async def read_log(
    path: str, options: LogOptions, growth: Callable[[], AsyncIterator[None]], running: Callable[[], bool]
) -> AsyncIterator[bytes]:
    """Yield the log at `path` in pieces. `growth()` yields before each look at what may be new; `running` tells whether more
    can come. Raises FileNotFoundError where there is no log."""
    renderer = _Renderer(options)
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        if options.tail_lines is not None:
            os.lseek(fd, tail_offset(fd, options.tail_lines), os.SEEK_SET)
        for piece in _rest(fd, renderer):
            yield piece
        if not options.follow or renderer.full:
            return
        async for _ in growth():
            last = not running()  # asked before reading: what is written before the end is then read
            for piece in _rest(fd, renderer):
                yield piece
            if os.stat(path).st_ino != os.fstat(fd).st_ino:  # begun anew since
                os.close(fd)
                fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
                for piece in _rest(fd, renderer):
                    yield piece
            if last or renderer.full:
                return
    finally:
        os.close(fd)


def _rest(fd: int, renderer: _Renderer) -> Iterator[bytes]:
    while not renderer.full and (data := os.read(fd, _READ)):
        if shown := renderer.feed(data):
            yield shown


def tail_offset(fd: int, lines: int) -> int:
    """Where the last `lines` records begin."""
    end = os.fstat(fd).st_size
    wanted = lines + 1  # the newline before the first of them
    position = end
    while position > 0:
        start = max(0, position - _BLOCK)
        block = os.pread(fd, position - start, start)
        count = block.count(b"\n")
        if count >= wanted:
            at = len(block)
            for _ in range(wanted):
                at = block.rfind(b"\n", 0, at)
            return start + at + 1
        wanted -= count
        position = start
    return 0
