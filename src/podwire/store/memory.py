"""The store in memory: every version of every key since the last compaction. Nothing survives the process."""

from bisect import bisect_left, bisect_right, insort
from collections.abc import AsyncGenerator, Iterator, Sequence
from dataclasses import dataclass, field

from podwire.store.broadcast import Broadcast
from podwire.store.port import (
    ABSENT,
    Check,
    Compacted,
    Conflict,
    Delete,
    Event,
    FutureRevision,
    KeyValue,
    Page,
    Put,
    StoreClosed,
    Write,
)


@dataclass(slots=True)
class _Versions:
    """One key's past: parallel lists of revisions and states (None: deleted at that revision)."""

    revisions: list[int] = field(default_factory=list)
    states: list[KeyValue | None] = field(default_factory=list)

    def at(self, revision: int) -> KeyValue | None:
        index = bisect_right(self.revisions, revision)
        return self.states[index - 1] if index else None

    def drop_before(self, revision: int) -> None:
        """Forget what cannot be read at `revision` or later."""
        index = bisect_right(self.revisions, revision) - 1
        if index >= 0 and self.states[index] is None:
            index += 1
        if index > 0:
            del self.revisions[:index], self.states[:index]


class MemoryStore:
    """`port.Store` on dictionaries."""

    def __init__(self) -> None:
        self._revision = 1
        self._compacted = 0
        self._keys: list[str] = []
        self._versions: dict[str, _Versions] = {}
        self._log: list[Event] = []
        self._broadcast = Broadcast()
        self._closed = False

    async def revision(self) -> int:
        self._check_open()
        return self._revision

    async def get(self, key: str) -> KeyValue | None:
        self._check_open()
        return self._current(key)

    async def list(self, prefix: str, *, limit: int = 0, start_after: str = "", revision: int = 0) -> Page:
        self._check_open()
        if revision > self._revision:
            raise FutureRevision(revision, self._revision)
        if revision and revision < self._compacted:
            raise Compacted(revision, self._compacted)
        at = revision or self._revision
        items: list[KeyValue] = []
        for key in self._range(prefix, start_after):
            state = self._versions[key].at(at)
            if state is None:
                continue
            if limit and len(items) == limit:
                return Page(tuple(items), at, more=True)
            items.append(state)
        return Page(tuple(items), at)

    async def commit(self, writes: Sequence[Write]) -> int:
        self._check_open()
        for write in writes:
            current = self._current(write.key)
            actual = current.mod_revision if current else ABSENT
            if write.expected_revision is not None and write.expected_revision != actual:
                raise Conflict(write.key, write.expected_revision, actual)
        events = [event for write in writes if (event := self._event(write, self._revision + 1)) is not None]
        if events:
            self._revision += 1
            for event in events:
                self._record(event)
            self._broadcast.publish(events)
        return self._revision

    def watch(self, prefix: str, from_revision: int) -> AsyncGenerator[Sequence[Event], None]:
        self._check_open()
        return self._broadcast.follow(prefix, from_revision, self._replay)

    async def compact(self, revision: int) -> None:
        self._check_open()
        if revision > self._revision:
            raise FutureRevision(revision, self._revision)
        if revision <= self._compacted:
            return
        self._compacted = revision
        del self._log[: bisect_right(self._log, revision, key=lambda event: event.revision)]
        for versions in self._versions.values():
            versions.drop_before(revision)
        self._versions = {key: versions for key, versions in self._versions.items() if versions.states}
        self._keys = sorted(self._versions)

    async def close(self) -> None:
        self._closed = True
        self._broadcast.close()

    def _check_open(self) -> None:
        if self._closed:
            raise StoreClosed("the store is closed")

    def _current(self, key: str) -> KeyValue | None:
        versions = self._versions.get(key)
        return versions.states[-1] if versions else None

    def _range(self, prefix: str, start_after: str) -> Iterator[str]:
        start = bisect_left(self._keys, prefix)
        if start_after:
            start = max(start, bisect_right(self._keys, start_after))
        for index in range(start, len(self._keys)):
            if not self._keys[index].startswith(prefix):
                return
            yield self._keys[index]

    def _event(self, write: Write, revision: int) -> Event | None:
        previous = self._current(write.key)
        match write:
            case Put(key, value):
                return Event(key, revision, value, previous, previous.create_revision if previous else revision)
            case Delete(key):
                return Event(key, revision, None, previous, previous.create_revision) if previous else None
            case Check():
                return None

    def _record(self, event: Event) -> None:
        self._log.append(event)
        versions = self._versions.get(event.key)
        if versions is None:
            versions = self._versions[event.key] = _Versions()
            insort(self._keys, event.key)
        versions.revisions.append(event.revision)
        versions.states.append(
            None if event.value is None else KeyValue(event.key, event.value, event.create_revision, event.revision)
        )

    def _replay(self, prefix: str, from_revision: int) -> Sequence[Event]:
        if from_revision <= self._compacted:
            raise Compacted(from_revision, self._compacted + 1)
        start = bisect_left(self._log, from_revision, key=lambda event: event.revision)
        return [event for event in self._log[start:] if event.key.startswith(prefix)]
