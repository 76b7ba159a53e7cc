"""The current objects and their recent changes in memory, and the fan-out of changes to watchers.

One task follows the store; everything that is read goes through here. An object is encoded once per version and its bytes
are shared by every answer; a change is matched once per group of watchers that ask for the same thing, and its line is
encoded once per form. Groups whose field selector pins one field to one value (pods of a node, a node by its name) are found
by that value, so fifty agents that each watch their own pods cost no more than one.
"""

import asyncio
import contextlib
import logging
from bisect import bisect_left, insort
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Protocol

import msgspec

from podwire.apiserver import tables
from podwire.apiserver.kinds.base import Kind
from podwire.apiserver.selectors import EVERYTHING, Selector
from podwire.apiserver.storage import ROOT, encode, from_value, prefix_of
from podwire.model.meta import Json
from podwire.model.resources import Resource
from podwire.store.port import Compacted, Event, KeyValue, Store, StoreClosed, StoreError

_log = logging.getLogger(__name__)

BACKLOG_LIMIT = 50_000
"""Lines that may wait for one client before its watch is ended (it resumes from where it was)."""

RETRY_SECONDS = 1.0
"""Between attempts to follow a store that fails."""


class Entry:
    """One object at one version."""

    __slots__ = ("fields", "key", "labels", "name", "namespace", "raw", "revision")

    def __init__(self, kind: Kind, key: str, value: bytes, revision: int) -> None:
        obj = from_value(value, revision)
        meta = obj["metadata"]
        self.key, self.revision = key, revision
        self.namespace, self.name = str(meta.get("namespace", "")), str(meta.get("name", ""))
        self.labels: dict[str, str] = meta.get("labels") or {}
        self.fields = kind.selectable_fields(obj)
        self.raw: bytes = encode(obj)

    def document(self, kind: Kind) -> Json:
        """The object in `kind`'s version, freshly decoded: the caller's own."""
        obj: Json = msgspec.json.decode(self.raw)
        return kind.from_storage(obj)

    def raw_in(self, kind: Kind) -> bytes:
        return self.raw if kind.storage == kind.resource else encode(self.document(kind))

    def fields_in(self, kind: Kind) -> dict[str, str]:
        return self.fields if kind.storage == kind.resource else kind.selectable_fields(self.document(kind))


@dataclass(frozen=True, slots=True)
class Form:
    """How objects are written: whole, as PartialObjectMetadata, or as Table rows with `include`d objects."""

    shape: str = "object"
    include: str = ""

    def encode(self, kind: Kind, entry: Entry, now: datetime) -> bytes:
        """One object as it stands in a watch event."""
        if self.shape == "object":
            return entry.raw_in(kind)
        obj = entry.document(kind)
        if self.shape == "metadata":
            return encode(tables.partial_metadata(obj))
        meta = {"resourceVersion": str(entry.revision)}
        return encode(tables.table(kind, [obj], meta, now, include=self.include))


@dataclass(frozen=True, slots=True)
class Interest:
    """Which objects someone asks for, and in which form. Equal interests share all the work."""

    namespace: str = ""
    labels: Selector = EVERYTHING
    fields: Selector = EVERYTHING
    form: Form = Form()

    def matches(self, kind: Kind, entry: Entry) -> bool:
        return (
            (not self.namespace or self.namespace == entry.namespace)
            and (not self.fields.terms or self.fields.matches(entry.fields_in(kind)))
            and (not self.labels.terms or self.labels.matches(entry.labels))
        )

    def pinned(self) -> tuple[str, str] | None:
        """The field and the one value it must have, if there is such a field."""
        for term in self.fields.terms:
            if term.operator == "in" and len(term.values) == 1:
                return term.key, next(iter(term.values))
        return None


class Change:
    """One object's step from one version to the next; either may be None."""

    __slots__ = ("_gone", "_value", "kind", "new", "old", "revision")

    def __init__(self, kind: Kind, revision: int, old: Entry | None, new: Entry | None) -> None:
        self.kind, self.revision, self.old, self.new = kind, revision, old, new
        self._gone: Entry | None = None

    @property
    def gone(self) -> Entry:
        """The old version under the revision at which it went: what a DELETED event shows."""
        if self._gone is None:
            old = self.old or self.new
            assert old is not None
            self._gone = Entry(self.kind, old.key, old.raw, self.revision)
        return self._gone

    def seen_by(self, kind: Kind, interest: Interest) -> tuple[str, Entry] | None:
        """The event that this is to someone with `interest`: entering a selection is a creation, leaving it a deletion."""
        before = self.old is not None and interest.matches(kind, self.old)
        after = self.new is not None and interest.matches(kind, self.new)
        if after and self.new is not None:
            return ("MODIFIED" if before else "ADDED"), self.new
        return ("DELETED", self.gone) if before else None


def event_line(type_: str, document: bytes) -> bytes:
    """One line of a watch stream."""
    return b'{"type":"' + type_.encode() + b'","object":' + document + b"}\n"


class Watcher:
    """One client's queue of lines that are ready to be sent."""

    def __init__(self, lines: Iterable[bytes] = ()) -> None:
        self._lines: deque[bytes] = deque(lines)
        self._wakeup = asyncio.Event()
        self.ended = False

    def put(self, line: bytes) -> None:
        if len(self._lines) >= BACKLOG_LIMIT:
            self.end()
            return
        self._lines.append(line)
        self._wakeup.set()

    def end(self) -> None:
        self.ended = True
        self._wakeup.set()

    @property
    def idle(self) -> bool:
        return not self._lines

    async def take(self, deadline: float) -> bytes:
        """All lines that wait, joined; empty at `deadline` (loop time) or when the watch has ended."""
        if not self._lines and not self.ended:
            self._wakeup.clear()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout_at(deadline):
                    await self._wakeup.wait()
        data = b"".join(self._lines)
        self._lines.clear()
        return data


class _Group:
    """The watchers of one kind with one interest."""

    __slots__ = ("interest", "kind", "watchers")

    def __init__(self, kind: Kind, interest: Interest) -> None:
        self.kind, self.interest = kind, interest
        self.watchers: set[Watcher] = set()


_GroupKey = tuple[str, Interest]


class Shelf:
    """All objects of one stored resource, their changes since the last compaction, and who watches them."""

    def __init__(self, kind: Kind, now: Callable[[], datetime]) -> None:
        self.kind = kind
        self._now = now
        self._entries: dict[str, Entry] = {}
        self._keys: list[str] = []
        self._changes: deque[Change] = deque()
        self._groups: dict[_GroupKey, _Group] = {}
        self._pinned: dict[str, dict[str, dict[_GroupKey, _Group]]] = defaultdict(dict)
        self._unpinned: dict[_GroupKey, _Group] = {}

    def reset(self, items: Iterable[KeyValue]) -> None:
        """Start over from `items`; every watch ends."""
        self.end_watches()
        self._entries, self._keys = {}, []
        self._changes.clear()
        for item in items:
            self._place(item.key, self._entry(item.key, item.value, item.mod_revision))

    def end_watches(self) -> None:
        for group in self._groups.values():
            for watcher in group.watchers:
                watcher.end()

    def apply(self, event: Event) -> None:
        """Take over one change and tell the watchers."""
        old = self._entries.get(event.key)
        new = None if event.value is None else self._entry(event.key, event.value, event.revision)
        if old is None and new is None:
            return
        self._place(event.key, new)
        change = Change(self.kind, event.revision, old, new)
        self._changes.append(change)
        self._tell(change)

    def trim(self, revision: int) -> None:
        """Forget changes up to `revision`."""
        while self._changes and self._changes[0].revision <= revision:
            self._changes.popleft()

    def get(self, key: str) -> Entry | None:
        return self._entries.get(key)

    def all(self) -> Iterable[Entry]:
        """Every object, in no particular order."""
        return self._entries.values()

    def select(self, kind: Kind, interest: Interest) -> Iterator[Entry]:
        """Matching objects in key order."""
        prefix = prefix_of(self.kind.resource, interest.namespace)
        for index in range(bisect_left(self._keys, prefix), len(self._keys)):
            entry = self._entries[self._keys[index]]
            if not entry.key.startswith(prefix):
                return
            if interest.matches(kind, entry):
                yield entry

    def watch(self, kind: Kind, interest: Interest, after: int | None) -> Watcher:
        """A watcher whose queue starts with the changes after revision `after`, or with all objects as ADDED if it is None."""
        watcher = Watcher(self._initial(kind, interest) if after is None else self._history(kind, interest, after))
        key = (kind.resource.api_version, interest)
        group = self._groups.get(key)
        if group is None:
            group = self._groups[key] = _Group(kind, interest)
            self._place_of(key, interest)[key] = group
        group.watchers.add(watcher)
        return watcher

    def unwatch(self, kind: Kind, interest: Interest, watcher: Watcher) -> None:
        key = (kind.resource.api_version, interest)
        group = self._groups.get(key)
        if group is None:
            return
        group.watchers.discard(watcher)
        if not group.watchers:
            del self._groups[key]
            del self._place_of(key, interest)[key]
            self._forget_pin(interest)

    def _place_of(self, key: _GroupKey, interest: Interest) -> dict[_GroupKey, _Group]:
        pin = interest.pinned()
        # A second version of the same objects may have other field names: its watchers are not found by value.
        if pin is None or key[0] != self.kind.resource.api_version:
            return self._unpinned
        return self._pinned[pin[0]].setdefault(pin[1], {})

    def _forget_pin(self, interest: Interest) -> None:
        pin = interest.pinned()
        if pin is None or pin[0] not in self._pinned:
            return
        values = self._pinned[pin[0]]
        if not values.get(pin[1], True):
            del values[pin[1]]
        if not values:
            del self._pinned[pin[0]]

    def _entry(self, key: str, value: bytes, revision: int) -> Entry | None:
        try:
            return Entry(self.kind, key, value, revision)
        except (msgspec.DecodeError, KeyError, TypeError) as error:
            _log.error("the stored object %s cannot be read and is left out: %s", key, error)
            return None

    def _place(self, key: str, entry: Entry | None) -> None:
        if entry is None:
            if self._entries.pop(key, None) is not None:
                del self._keys[bisect_left(self._keys, key)]
        else:
            if key not in self._entries:
                insort(self._keys, key)
            self._entries[key] = entry

    def _tell(self, change: Change) -> None:
        lines: dict[tuple[str, str, Form], bytes] = {}
        for group in self._concerned(change):
            seen = change.seen_by(group.kind, group.interest)
            if seen is None:
                continue
            cache_key = (seen[0], group.kind.resource.api_version, group.interest.form)
            line = lines.get(cache_key)
            if line is None:
                line = lines[cache_key] = self._line(group.kind, group.interest, seen)
            for watcher in group.watchers:
                watcher.put(line)

    def _concerned(self, change: Change) -> Iterator[_Group]:
        yield from self._unpinned.values()
        for field, by_value in self._pinned.items():
            values = {entry.fields.get(field, "") for entry in (change.old, change.new) if entry is not None}
            for value in values:
                yield from by_value.get(value, {}).values()

    def _line(self, kind: Kind, interest: Interest, seen: tuple[str, Entry]) -> bytes:
        return event_line(seen[0], interest.form.encode(kind, seen[1], self._now()))

    def _initial(self, kind: Kind, interest: Interest) -> Iterator[bytes]:
        for entry in self.select(kind, interest):
            yield self._line(kind, interest, ("ADDED", entry))

    def _history(self, kind: Kind, interest: Interest, after: int) -> Iterator[bytes]:
        newer: list[Change] = []
        for change in reversed(self._changes):
            if change.revision <= after:
                break
            newer.append(change)
        for change in reversed(newer):
            seen = change.seen_by(kind, interest)
            if seen is not None:
                yield self._line(kind, interest, seen)


class Ledger(Protocol):
    """Something else that is kept up with a part of the store."""

    def reset(self, items: Iterable[KeyValue]) -> None: ...

    def apply(self, event: Event) -> None: ...


class Hub:
    """Every kind's shelf, and `ledgers` by their prefix below ROOT (`ranges/servicenodeports`; a shelf may be there, too),
    kept up with the store by `run`."""

    def __init__(
        self,
        store: Store,
        kinds: Iterable[Kind],
        now: Callable[[], datetime],
        ledgers: Mapping[str, Ledger] | None = None,
    ) -> None:
        self._store = store
        self._shelves = {_shelf_name(k.resource): Shelf(k, now) for k in kinds if k.storage == k.resource}
        self._followers: dict[str, list[Ledger]] = defaultdict(list)
        for name, part in (*self._shelves.items(), *(ledgers or {}).items()):
            self._followers[name].append(part)
        self._waiting: list[tuple[int, asyncio.Future[None]]] = []
        self.revision = 0
        self.oldest = 0
        """Watches can resume after this revision, or any later one."""

    async def run(self) -> None:
        """Follow the store until it is closed."""
        try:
            while True:
                if not await self._follow_once():
                    return
                await asyncio.sleep(RETRY_SECONDS)
        finally:
            self.end_watches()
            for _, known in self._waiting:
                if not known.done():
                    known.set_exception(StoreClosed("the API server no longer follows its store"))
            self._waiting.clear()

    async def _follow_once(self) -> bool:
        """Load the state and follow the changes; whether to try again after that ended."""
        try:
            await self._load()
            await self._follow()
        except StoreClosed:
            return False
        except StoreError as error:
            _log.error("the store cannot be followed, trying again: %s", error)
        except Exception:
            # The task's boundary: without it, one odd change would leave every reader waiting for good.
            _log.exception("following the store failed, trying again")
        else:
            return False
        self.end_watches()
        return True

    def shelf(self, kind: Kind) -> Shelf:
        return self._shelves[_shelf_name(kind.storage)]

    def trim(self, revision: int) -> None:
        """Forget changes up to `revision`, which the store has compacted."""
        self.oldest = max(self.oldest, revision)
        for shelf in self._shelves.values():
            shelf.trim(revision)

    def end_watches(self) -> None:
        for shelf in self._shelves.values():
            shelf.end_watches()

    async def at_least(self, revision: int) -> None:
        """Wait until the hub knows everything up to `revision`."""
        if self.revision >= revision:
            return
        await self._store.revision()  # a store with other users learns by this that someone waits
        if self.revision >= revision:
            return
        await self._known(revision)

    async def _known(self, revision: int) -> None:
        known: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append((revision, known))
        await known

    async def up_to_date(self) -> int:
        """Wait until the hub knows everything that was committed before this call; the revision it knows then."""
        revision = await self._store.revision()
        if self.revision < revision:
            await self._known(revision)
        return self.revision

    async def _load(self) -> None:
        """Start from the oldest state that the store has, so that the history is there for those who resume."""
        try:
            page = await self._store.list(ROOT, revision=1)
        except Compacted as error:
            page = await self._store.list(ROOT, revision=error.oldest)
        by_shelf: dict[str, list[KeyValue]] = defaultdict(list)
        for item in page.items:
            by_shelf[self._name_for(item.key)].append(item)
        for name, parts in self._followers.items():
            for part in parts:
                part.reset(by_shelf.get(name, ()))
        self.oldest = page.revision
        self._advance(page.revision)

    async def _follow(self) -> None:
        async with contextlib.aclosing(self._store.watch(ROOT, self.oldest + 1)) as batches:
            async for batch in batches:
                self._apply(batch)

    def _apply(self, batch: Sequence[Event]) -> None:
        for event in batch:
            for part in self._followers.get(self._name_for(event.key), ()):
                part.apply(event)
        self._advance(batch[-1].revision)

    def _advance(self, revision: int) -> None:
        self.revision = revision
        still: list[tuple[int, asyncio.Future[None]]] = []
        for wanted, known in self._waiting:
            if wanted > revision:
                still.append((wanted, known))
            elif not known.done():
                known.set_result(None)
        self._waiting = still

    def _name_for(self, key: str) -> str:
        first, _, rest = key.removeprefix(ROOT).partition("/")
        return first if first in self._shelves else f"{first}/{rest.partition('/')[0]}"


def _shelf_name(resource: Resource) -> str:
    return prefix_of(resource).removeprefix(ROOT).removesuffix("/")
