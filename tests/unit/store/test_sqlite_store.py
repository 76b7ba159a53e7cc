"""What only the SQLite driver has: a file that outlives kill -9, group commit, a lock."""

import asyncio
import os
import signal
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

from podwire.store.port import Put, StoreError
from podwire.store.sqlite import SqliteStore

WRITER = """
import asyncio, os, sys
from pathlib import Path
from podwire.store.port import Put, ABSENT
from podwire.store.sqlite import SqliteStore

async def one(store, start, n):
    key = f"/k/{start}/{n}"
    # Three keys in one commit: after the kill either all of them are there or none.
    revision = await store.commit([Put(key + s, b"v" * 200, ABSENT) for s in ("/x", "/y", "/z")])
    os.write(1, f"{key} {revision}\\n".encode())

async def main():
    store = SqliteStore.open(Path(sys.argv[1]))
    start, n = sys.argv[2], 0
    os.write(1, b"ready\\n")
    while True:
        await asyncio.gather(*(one(store, start, n + i) for i in range(8)))
        n += 8

asyncio.run(main())
"""


def acknowledged_until_killed(path: Path, round_: int) -> list[tuple[str, int]]:
    """Let a process write, kill it while it does, and return what it had been told was written."""
    process = subprocess.Popen([sys.executable, "-c", WRITER, str(path), str(round_)], stdout=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.readline() == b"ready\n"
    read = 0
    lines: list[bytes] = []
    while read < 5 + 7 * round_:
        lines.append(process.stdout.readline())
        read += 1
    os.kill(process.pid, signal.SIGKILL)
    lines += process.stdout.read().splitlines(keepends=True)
    process.stdout.close()
    process.wait()
    whole = [line.decode().split() for line in lines if line.endswith(b"\n")]
    return [(key, int(revision)) for key, revision in whole]


@pytest.mark.timeout(60)
async def test_kill_9_loses_no_acknowledged_write(tmp_path: Path) -> None:
    path = tmp_path / "store.db"
    told: list[tuple[str, int]] = []
    for round_ in range(12):
        told += acknowledged_until_killed(path, round_)
        store = SqliteStore.open(path)
        items = {item.key: item for item in (await store.list("/k/")).items}
        for key, revision in told:
            assert {items[key + suffix].mod_revision for suffix in ("/x", "/y", "/z")} == {revision}
        # Nothing half done either: whatever is there is there whole.
        assert len(items) % 3 == 0
        assert await store.revision() >= max(revision for _, revision in told)
        await store.close()


async def test_what_waits_is_committed_together(tmp_path: Path) -> None:
    store = SqliteStore.open(tmp_path / "store.db")
    statements: list[str] = []
    store._writer.set_trace_callback(statements.append)
    await asyncio.gather(*(store.commit([Put(f"/{n}", b"")]) for n in range(100)))
    assert sum(s == "COMMIT" for s in statements) <= 3
    await store.close()


async def test_a_file_has_one_owner(tmp_path: Path) -> None:
    store = SqliteStore.open(tmp_path / "store.db")
    with pytest.raises(StoreError, match="in use by another process"):
        SqliteStore.open(tmp_path / "store.db")
    await store.close()
    await SqliteStore.open(tmp_path / "store.db").close()


async def test_a_file_that_is_no_store_is_refused(tmp_path: Path) -> None:
    (tmp_path / "store.db").write_bytes(b"not a database at all, " * 100)
    with pytest.raises(StoreError, match="cannot be opened"):
        SqliteStore.open(tmp_path / "store.db")


async def test_a_failed_write_is_an_error_and_not_the_end(tmp_path: Path) -> None:
    store = SqliteStore.open(tmp_path / "store.db")
    await store.commit([Put("/a", b"1")])
    store._writer.execute("PRAGMA query_only = ON")
    with pytest.raises(StoreError, match="cannot be written"):
        await store.commit([Put("/a", b"2")])
    store._writer.execute("PRAGMA query_only = OFF")
    await store.commit([Put("/a", b"3")])
    item = await store.get("/a")
    assert item is not None
    assert item.value == b"3"
    await store.close()


@pytest.mark.parametrize(("durability", "synchronous"), [("process", 1), ("power", 2)])
async def test_durability_is_sqlites_synchronous(tmp_path: Path, durability: str, synchronous: int) -> None:
    store = SqliteStore.open(tmp_path / "store.db", "power" if durability == "power" else "process")
    assert store._writer.execute("PRAGMA synchronous").fetchone() == (synchronous,)
    assert store._writer.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    await store.close()


async def test_compaction_shrinks_the_history(tmp_path: Path) -> None:
    store = SqliteStore.open(tmp_path / "store.db")
    for n in range(50):
        await store.commit([Put("/a", str(n).encode())])
    await store.compact(await store.revision())
    await store.close()
    connection = sqlite3.connect(tmp_path / "store.db")
    assert connection.execute("SELECT count(*) FROM versions").fetchone() == (1,)
    connection.close()
