import asyncio
import os
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from podwire.runtime.logs import LogOptions, read_log, tail_offset
from podwire.runtime.shim.logfile import MAX_LINE, LogFile, LogPipe, timestamp

LINES = [f"2026-01-02T03:04:0{second}.000000000Z stdout F line {second}\n" for second in range(6)]


async def no_growth() -> AsyncIterator[None]:
    yield


async def read(path: Path, options: LogOptions) -> str:
    pieces = [piece async for piece in read_log(str(path), options, no_growth, lambda: False)]
    return b"".join(pieces).decode()


@pytest.fixture
def log(tmp_path: Path) -> Path:
    path = tmp_path / "0.log"
    path.write_text("".join(LINES))
    return path


def test_timestamps_have_nine_digits() -> None:
    assert timestamp(1_767_323_045_000_000_006) == "2026-01-02T03:04:05.000000006Z"


async def test_shows_text_alone_or_with_its_time(log: Path) -> None:
    assert await read(log, LogOptions()) == "".join(f"line {n}\n" for n in range(6))
    assert (await read(log, LogOptions(timestamps=True))).startswith("2026-01-02T03:04:00.000000000Z line 0\n")


async def test_tail_since_and_limit(log: Path) -> None:
    assert await read(log, LogOptions(tail_lines=2)) == "line 4\nline 5\n"
    assert await read(log, LogOptions(tail_lines=0)) == ""
    assert await read(log, LogOptions(tail_lines=99)) == "".join(f"line {n}\n" for n in range(6))
    assert await read(log, LogOptions(since="2026-01-02T03:04:05.000000000Z")) == "line 5\n"
    assert await read(log, LogOptions(limit_bytes=10)) == "line 0\nlin"


@settings(max_examples=30, deadline=None)
@given(lengths=st.lists(st.integers(0, 40_000), max_size=12), wanted=st.integers(0, 14))
def test_the_tail_begins_at_a_record(tmp_path_factory: pytest.TempPathFactory, lengths: list[int], wanted: int) -> None:
    path = tmp_path_factory.mktemp("tail") / "log"
    path.write_bytes(b"".join(b"x" * length + b"\n" for length in lengths))
    fd = os.open(path, os.O_RDONLY)
    try:
        rest = os.pread(fd, path.stat().st_size, tail_offset(fd, wanted))
    finally:
        os.close(fd)
    assert rest.count(b"\n") == min(wanted, len(lengths))


async def test_follows_until_the_container_has_ended(log: Path) -> None:
    grown, running = asyncio.Event(), True

    async def growth() -> AsyncIterator[None]:
        while True:
            yield
            await grown.wait()
            grown.clear()

    pieces = aiter(read_log(str(log), LogOptions(follow=True, tail_lines=1), growth, lambda: running))
    assert await anext(pieces) == b"line 5\n"
    with log.open("a") as file:
        file.write("2026-01-02T03:04:09.000000000Z stdout F more\n")
    grown.set()
    assert await anext(pieces) == b"more\n"
    with log.open("a") as file:
        file.write("2026-01-02T03:04:09.500000000Z stderr F last\n")
    running = False
    grown.set()
    assert [piece async for piece in pieces] == [b"last\n"]


async def test_a_pipe_becomes_records_and_long_lines_become_parts(tmp_path: Path) -> None:
    path = tmp_path / "c" / "0.log"
    log = LogFile(str(path), lambda: None)
    reading, writing = os.pipe()
    pipe = LogPipe(reading, "stderr", log)
    os.write(writing, b"one\ntwo\n" + b"x" * (MAX_LINE + 5) + b"\nno newline")
    os.close(writing)
    pipe.finish()
    log.close()
    records = [line.split(b" ", 3)[1:] for line in path.read_bytes().splitlines()]
    assert records == [
        [b"stderr", b"F", b"one"],
        [b"stderr", b"F", b"two"],
        [b"stderr", b"P", b"x" * MAX_LINE],
        [b"stderr", b"F", b"xxxxx"],
        [b"stderr", b"F", b"no newline"],
    ]
    text = await read(path, LogOptions())
    assert text == "one\ntwo\n" + "x" * (MAX_LINE + 5) + "\nno newline\n"
