"""The store in one SQLite file (WAL), for one process.

Every version of every key is a row; `superseded` is the revision that replaced it, so the state at any kept revision is one
range scan. Writes go through one thread, all that wait in one SQLite transaction (group commit): the event loop never waits
for the disk, and the more writers there are, the cheaper each is. Reads are short and run where they are asked for.
"""

import asyncio
import fcntl
import logging
import sqlite3
from collections.abc import AsyncGenerator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Literal

from podwire.store.broadcast import Broadcast
from podwire.store.port import (
    ABSENT,
    Compacted,
    Conflict,
    Delete,
    Event,
    FutureRevision,
    KeyValue,
    Page,
    Put,
    StoreClosed,
    StoreError,
    Write,
)

_log = logging.getLogger(__name__)

Durability = Literal["process", "power"]
"""What an acknowledged write survives: the death of the process (synchronous=NORMAL), or also a power cut (FULL: an fsync)."""

_SCHEMA = """
CREATE TABLE IF NOT EXISTS versions (
    id INTEGER PRIMARY KEY,
    revision INTEGER NOT NULL,
    key TEXT NOT NULL,
    value BLOB,                     -- NULL: deleted at this revision
    create_revision INTEGER NOT NULL,
    superseded INTEGER              -- NULL: current; a deletion supersedes itself
);
CREATE UNIQUE INDEX IF NOT EXISTS current ON versions (key) WHERE superseded IS NULL;
CREATE INDEX IF NOT EXISTS by_key ON versions (key, revision);
CREATE INDEX IF NOT EXISTS by_revision ON versions (revision);
CREATE INDEX IF NOT EXISTS by_superseded ON versions (superseded) WHERE superseded IS NOT NULL;
CREATE TABLE IF NOT EXISTS compacted (revision INTEGER NOT NULL);
"""

_AFTER_ALL_TEXT = "\U0010ffff"


@dataclass(slots=True)
class _Waiting:
    writes: Sequence[Write]
    done: asyncio.Future[int]


_Outcome = list[Event] | Conflict


class SqliteStore:
    """`port.Store` on SQLite. Make it with `open`."""

    def __init__(self, writer: sqlite3.Connection, reader: sqlite3.Connection, lock: IO[bytes]) -> None:
        self._writer, self._reader, self._lock = writer, reader, lock
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="podwire-store")
        self._waiting: list[_Waiting] = []
        self._writing: asyncio.Task[None] | None = None
        self._broadcast = Broadcast()
        self._closed = False
        self._compacted: int = reader.execute("SELECT coalesce(max(revision), 0) FROM compacted").fetchone()[0]
        self._revision = _last_revision(reader)

    @classmethod
    def open(cls, path: Path, durability: Durability = "process") -> "SqliteStore":
        """Open or make the file. Raises StoreError when it is another process's, or not a store."""
        lock = path.with_name(path.name + ".lock").open("wb")
        opened: list[sqlite3.Connection] = []
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            opened.append(_connect(path, durability))
            opened[0].executescript(_SCHEMA)
            opened.append(_connect(path, durability))
            return cls(opened[0], opened[1], lock)
        except (BlockingIOError, sqlite3.Error) as error:
            for connection in opened:
                connection.close()
            lock.close()
            why = "is in use by another process" if isinstance(error, BlockingIOError) else f"cannot be opened: {error}"
            raise StoreError(f"the store {path} {why}") from error

    async def revision(self) -> int:
        self._check_open()
        return self._revision

    async def get(self, key: str) -> KeyValue | None:
        self._check_open()
        return _current(self._reader, key)

    async def list(self, prefix: str, *, limit: int = 0, start_after: str = "", revision: int = 0) -> Page:
        self._check_open()
        self._reader.execute("BEGIN")
        try:
            latest = _last_revision(self._reader)
            at = revision or latest
            if at > latest:
                raise FutureRevision(revision, latest)
            if at < self._compacted:
                raise Compacted(revision, self._compacted)
            alive = "superseded IS NULL" if at == latest else "revision <= :at AND coalesce(superseded, :at + 1) > :at"
            rows = self._reader.execute(
                f"SELECT key, value, create_revision, revision FROM versions"
                f" WHERE key >= :start AND key < :end AND key > :after AND {alive} ORDER BY key LIMIT :limit",
                {
                    "start": prefix,
                    "end": prefix + _AFTER_ALL_TEXT,
                    "after": start_after,
                    "at": at,
                    "limit": limit + 1 if limit else -1,
                },
            ).fetchall()
        finally:
            self._reader.execute("COMMIT")
        more = bool(limit) and len(rows) > limit
        return Page(tuple(map(KeyValue._make, rows[:limit] if more else rows)), at, more)

    async def commit(self, writes: Sequence[Write]) -> int:
        self._check_open()
        waiting = _Waiting(writes, asyncio.get_running_loop().create_future())
        self._waiting.append(waiting)
        if self._writing is None:
            self._writing = asyncio.create_task(self._write_waiting(), name="store writer")
        return await waiting.done

    def watch(self, prefix: str, from_revision: int) -> AsyncGenerator[Sequence[Event], None]:
        self._check_open()
        return self._broadcast.follow(prefix, from_revision, self._replay)

    async def compact(self, revision: int) -> None:
        self._check_open()
        if revision > self._revision:
            raise FutureRevision(revision, self._revision)
        if revision > self._compacted:
            self._compacted = revision
            await self._in_thread(lambda: _compact(self._writer, revision))

    async def close(self) -> None:
        """Finish what waits, then close the file."""
        if self._closed:
            return
        self._closed = True
        if self._writing is not None:
            await self._writing
        self._broadcast.close()
        await asyncio.get_running_loop().run_in_executor(self._thread, self._writer.close)
        self._thread.shutdown()
        self._reader.close()
        self._lock.close()

    def _check_open(self) -> None:
        if self._closed:
            raise StoreClosed("the store is closed")

    async def _in_thread(self, work: Callable[[], None]) -> None:
        try:
            await asyncio.get_running_loop().run_in_executor(self._thread, work)
        except sqlite3.Error as error:
            raise StoreError(f"the store cannot be written: {error}") from error

    async def _write_waiting(self) -> None:
        """Commit everything that waits, again and again until nothing does."""
        loop = asyncio.get_running_loop()
        while self._waiting:
            batch, self._waiting = self._waiting, []
            try:
                outcomes = await loop.run_in_executor(self._thread, _write, self._writer, [w.writes for w in batch])
            except sqlite3.Error as error:
                _log.error("the store could not commit %d writes: %s", len(batch), error)
                for waiting in batch:
                    _fail(waiting, StoreError(f"the store cannot be written: {error}"))
                continue
            for waiting, outcome in zip(batch, outcomes, strict=True):
                self._finish(waiting, outcome)
        self._writing = None

    def _finish(self, waiting: _Waiting, outcome: _Outcome) -> None:
        if isinstance(outcome, Conflict):
            _fail(waiting, outcome)
            return
        if outcome:
            self._revision = outcome[-1].revision
            self._broadcast.publish(outcome)
        if not waiting.done.done():
            waiting.done.set_result(self._revision)

    def _replay(self, prefix: str, from_revision: int) -> Sequence[Event]:
        if from_revision <= self._compacted:
            raise Compacted(from_revision, self._compacted + 1)
        rows = self._reader.execute(
            "SELECT new.key, new.revision, new.value, new.create_revision, old.value, old.create_revision, old.revision"
            " FROM versions new LEFT JOIN versions old"
            " ON old.key = new.key AND old.superseded = new.revision AND old.revision < new.revision"
            " WHERE new.revision >= ? AND new.key >= ? AND new.key < ? ORDER BY new.id",
            (from_revision, prefix, prefix + _AFTER_ALL_TEXT),
        )
        return [
            Event(key, revision, value, None if old_value is None else KeyValue(key, old_value, old_create, old_mod), create)
            for key, revision, value, create, old_value, old_create, old_mod in rows
        ]


def _connect(path: Path, durability: Durability) -> sqlite3.Connection:
    connection = sqlite3.connect(path, isolation_level=None, check_same_thread=False, cached_statements=64)
    connection.execute("PRAGMA journal_mode = WAL")
    connection.execute(f"PRAGMA synchronous = {'NORMAL' if durability == 'process' else 'FULL'}")
    connection.execute("PRAGMA cache_size = -8000")
    return connection


def _last_revision(connection: sqlite3.Connection) -> int:
    """The compaction's revision counts: what it removed may have been the last."""
    row = connection.execute(
        "SELECT max(1, (SELECT coalesce(max(revision), 0) FROM versions), (SELECT coalesce(max(revision), 0) FROM compacted))"
    ).fetchone()
    return int(row[0])


def _current(connection: sqlite3.Connection, key: str) -> KeyValue | None:
    row = connection.execute(
        "SELECT key, value, create_revision, revision FROM versions WHERE key = ? AND superseded IS NULL", (key,)
    ).fetchone()
    return None if row is None else KeyValue._make(row)


def _write(connection: sqlite3.Connection, commits: Sequence[Sequence[Write]]) -> list[_Outcome]:
    """Several commits in one SQLite transaction; a conflict fails only its own. Runs in the writer's thread."""
    connection.execute("BEGIN IMMEDIATE")
    try:
        revision = _last_revision(connection)
        outcomes: list[_Outcome] = []
        for writes in commits:
            outcome = _write_one(connection, writes, revision + 1)
            outcomes.append(outcome)
            if isinstance(outcome, list) and outcome:
                revision += 1
        connection.execute("COMMIT")
    except BaseException:
        if connection.in_transaction:
            connection.execute("ROLLBACK")
        raise
    return outcomes


def _write_one(connection: sqlite3.Connection, writes: Sequence[Write], revision: int) -> _Outcome:
    before = [_current(connection, write.key) for write in writes]
    for write, previous in zip(writes, before, strict=True):
        actual = previous.mod_revision if previous else ABSENT
        if write.expected_revision is not None and write.expected_revision != actual:
            return Conflict(write.key, write.expected_revision, actual)
    events = [
        Event(write.key, revision, None if isinstance(write, Delete) else write.value, previous, _created(previous, revision))
        for write, previous in zip(writes, before, strict=True)
        if isinstance(write, Put) or (isinstance(write, Delete) and previous is not None)
    ]
    connection.executemany(
        "UPDATE versions SET superseded = ? WHERE key = ? AND superseded IS NULL",
        [(revision, event.key) for event in events if event.previous],
    )
    connection.executemany(
        "INSERT INTO versions (revision, key, value, create_revision, superseded) VALUES (?, ?, ?, ?, ?)",
        [(revision, e.key, e.value, e.create_revision, revision if e.value is None else None) for e in events],
    )
    return events


def _created(previous: KeyValue | None, revision: int) -> int:
    return previous.create_revision if previous else revision


def _compact(connection: sqlite3.Connection, revision: int) -> None:
    connection.execute("BEGIN IMMEDIATE")
    try:
        connection.execute("DELETE FROM versions WHERE superseded <= ?", (revision,))
        connection.execute("DELETE FROM compacted")
        connection.execute("INSERT INTO compacted VALUES (?)", (revision,))
        connection.execute("COMMIT")
    except BaseException:
        if connection.in_transaction:
            connection.execute("ROLLBACK")
        raise


def _fail(waiting: _Waiting, error: StoreError) -> None:
    if not waiting.done.done():
        waiting.done.set_exception(error)
