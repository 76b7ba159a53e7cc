"""The store in an etcd cluster, for any number of processes at once.

A commit is one transaction whose comparisons are the writes' expectations. etcd's revision counts the changes of everyone
who uses the cluster, also of keys that are not ours; all that this store promises about revisions holds nevertheless.

A member that dies or loses its leader is waited out (`patience`): reads are asked again elsewhere, watches go on after the
last revision they saw. So that a commit whose answer was lost can be sent again without being done twice, each one also writes
a mark of its own, and expects its predecessor's (COMMITS).
"""

import asyncio
import itertools
import logging
import secrets
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import aclosing, suppress
from dataclasses import dataclass
from random import Random
from typing import Final, TypeVar

from podwire.client.backoff import Backoff
from podwire.client.etcd import EtcdClient
from podwire.client.etcdmessages import (
    Compare,
    DeleteKeys,
    EtcdCompacted,
    EtcdError,
    EtcdEvent,
    EtcdFutureRevision,
    EtcdKeyValue,
    EtcdLeaseNotFound,
    EtcdUnavailable,
    Operation,
    PutKey,
    ReadKeys,
    TxnResponse,
    prefix_end,
)
from podwire.store.broadcast import Subscription
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
    StoreError,
    Write,
)

_log = logging.getLogger(__name__)

T = TypeVar("T")

PROGRESS_KEY: Final = "/registry/podwire.progress"
"""Written when a watch has to be shown that it has seen everything: changes of keys that it does not watch are not told."""

PROGRESS_SECONDS = 0.2
"""How long a watch may be behind before the reason is taken to be such changes."""

COMMITS: Final = "podwire/commits/"
"""Below it each store keeps the marks of its last commits, one key for each that is under way at a time, on a lease."""

COMMITS_TTL = 3600
"""Seconds that the marks stay after their store has gone."""

PATIENCE = 10.0
"""Seconds that a call waits for etcd to answer: electing a leader takes one to three."""

PAGE_KEYS = 2000
"""Keys in one answer of etcd, which has to fit into its memory and the client's time-out."""


class EtcdStore:
    """`port.Store` on etcd. The client is the store's from now on, and closed with it."""

    def __init__(self, client: EtcdClient, *, patience: float = PATIENCE, rng: Random | None = None) -> None:
        self._client, self._patience, self._rng = client, patience, rng or Random()
        self._watches: set[_Watch] = set()
        self._progress: asyncio.Task[None] | None = None
        self._name = secrets.token_hex(8)
        self._numbers = itertools.count(1)
        self._marks: list[_Mark] = []
        self._made = 0
        self._lease, self._lease_until, self._leasing = 0, 0.0, asyncio.Lock()
        self._closed = False

    async def revision(self) -> int:
        self._check_open()
        page = await self._ask(lambda: self._client.range(ReadKeys(key=PROGRESS_KEY, count_only=True)))
        revision = page.header.revision
        if self._progress is None and self._behind(revision):
            self._progress = asyncio.create_task(self._show_progress(revision), name="etcd store: progress")
        return revision

    async def get(self, key: str) -> KeyValue | None:
        self._check_open()
        found = await self._ask(lambda: self._client.get(key))
        return None if found is None else _key_value(found)

    async def list(self, prefix: str, *, limit: int = 0, start_after: str = "", revision: int = 0) -> Page:
        self._check_open()
        end = prefix_end(prefix.encode()).decode(errors="surrogateescape")
        start, at, more = max(prefix, f"{start_after}\0" if start_after else ""), revision, True
        items: list[KeyValue] = []
        while more and (not limit or len(items) < limit):
            wanted = min(PAGE_KEYS, limit - len(items)) if limit else PAGE_KEYS
            request = ReadKeys(key=start, end=end, limit=wanted, revision=at)
            try:
                page = await self._ask(lambda request=request: self._client.range(request))  # type: ignore[misc]
            except EtcdCompacted as error:
                raise Compacted(at, await self._oldest(at)) from error
            except EtcdFutureRevision as error:
                raise FutureRevision(revision, await self.revision()) from error
            items.extend(map(_key_value, page.kvs))
            at, more = at or page.header.revision, page.more
            start = f"{items[-1].key}\0" if items else start
        return Page(tuple(items), at, more)

    async def commit(self, writes: Sequence[Write]) -> int:
        self._check_open()
        if not writes:
            return await self.revision()
        if not any(isinstance(w, Put) or (isinstance(w, Delete) and w.expected_revision) for w in writes):
            return await self._commit(writes)  # it may change nothing, so it must leave no mark
        mark = self._marks.pop() if self._marks else self._new_mark()
        mark.value = str(next(self._numbers)).encode()
        try:
            return await self._commit(writes, mark)
        finally:
            self._marks.append(mark)

    def watch(self, prefix: str, from_revision: int) -> AsyncGenerator[Sequence[Event], None]:
        self._check_open()
        return self._follow(_Watch(prefix, from_revision))

    async def compact(self, revision: int) -> None:
        self._check_open()
        with suppress(EtcdCompacted):  # another server was first
            try:
                await self._ask(lambda: self._client.compact(revision))
            except EtcdFutureRevision as error:
                raise FutureRevision(revision, await self.revision()) from error

    async def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        for watch in self._watches:
            watch.subscription.close()
        await _end(*(watch.pump for watch in self._watches), self._progress)
        await self._client.close()

    # --- asking ---------------------------------------------------------------------------------------------------

    def _check_open(self) -> None:
        if self._closed:
            raise StoreClosed("the store is closed")

    async def _ask(self, call: Callable[[], Awaitable[T]]) -> T:
        """`call`, which does no harm when done twice, until it is answered. EtcdCompacted and EtcdFutureRevision pass."""
        backoff, deadline = self._backoff(), self._deadline()
        while True:
            try:
                return await call()
            except EtcdUnavailable as error:
                await self._wait(backoff, deadline, error)
            except (EtcdCompacted, EtcdFutureRevision):
                raise
            except EtcdError as error:
                raise StoreError(str(error)) from error

    async def _commit(self, writes: Sequence[Write], mark: "_Mark | None" = None) -> int:
        """Send until there is an answer. Without a `mark` a commit that may have been done is not sent again."""
        checked = {w.key: w.expected_revision for w in writes if w.expected_revision is not None}
        done = [operation for write in writes if (operation := _operation(write)) is not None]
        backoff, deadline = self._backoff(), self._deadline()
        while True:
            expected = checked if mark is None else checked | {mark.key: mark.revision}
            compare = [Compare(key, "MOD", revision) for key, revision in expected.items()]
            read = [ReadKeys(key=key) for key in expected]
            try:
                marking = [] if mark is None else [PutKey(mark.key, mark.value, await self._leased())]
                answer = await self._client.txn(compare, [*done, *marking], read)
            except EtcdLeaseNotFound:
                self._lease_until = 0.0
                continue
            except EtcdUnavailable as error:
                if error.sent and mark is None:
                    raise StoreError(f"{error}; whether the write was done is not known") from error
                await self._wait(backoff, deadline, error)
                continue
            except EtcdError as error:
                raise StoreError(str(error)) from error
            if answer.succeeded:
                if mark is not None:
                    mark.revision = answer.header.revision
                return answer.header.revision
            found = _read_by(answer)
            if mark is not None and mark.look(found.get(mark.key)):
                return mark.revision
            for key, revision in checked.items():
                actual = found[key].mod_revision if key in found else ABSENT
                if actual != revision:
                    raise Conflict(key, revision, actual)

    def _new_mark(self) -> "_Mark":
        self._made += 1
        return _Mark(f"{COMMITS}{self._name}/{self._made}")

    async def _leased(self) -> int:
        """The lease for marks, renewed by a new one at half its time."""
        async with self._leasing:
            now = asyncio.get_running_loop().time()
            if now > self._lease_until:
                self._lease = (await self._client.grant(COMMITS_TTL)).id
                self._lease_until = now + COMMITS_TTL / 2
            return self._lease

    def _backoff(self) -> Backoff:
        return Backoff(self._rng, initial=0.02, maximum=1.0)

    def _deadline(self) -> float:
        return asyncio.get_running_loop().time() + self._patience

    async def _wait(self, backoff: Backoff, deadline: float, error: EtcdError) -> None:
        """Raises StoreError at the deadline, StoreClosed where nobody waits for the answer any more."""
        self._check_open()
        delay = backoff.next()
        if asyncio.get_running_loop().time() + delay > deadline:
            raise StoreError(f"{error}; given up after {self._patience:g} s") from error
        await asyncio.sleep(delay)

    async def _oldest(self, revision: int) -> int:
        """The oldest revision that can be read, given that `revision` cannot: etcd tells it to watchers only."""

        async def first_answer() -> int:
            async with aclosing(self._client.watch(PROGRESS_KEY, start_revision=revision)) as responses:
                try:
                    async for response in responses:
                        if not response.created:
                            break
                except EtcdCompacted as error:
                    return error.oldest
            return revision + 1

        return await self._ask(first_answer)

    # --- watching -------------------------------------------------------------------------------------------------

    async def _follow(self, watch: "_Watch") -> AsyncGenerator[Sequence[Event], None]:
        if self._closed:
            return
        self._watches.add(watch)
        watch.pump = asyncio.create_task(self._pump(watch), name=f"etcd store: watch {watch.prefix}")
        try:
            while (batch := await watch.subscription.take()) is not None:
                yield batch
            if watch.error is not None:
                raise watch.error
        finally:
            self._watches.discard(watch)
            await _end(watch.pump)

    async def _pump(self, watch: "_Watch") -> None:
        """etcd's stream into the watch's queue, taken up again when it breaks, until it cannot go on."""
        backoff = self._backoff()
        while True:
            try:
                await self._read_stream(watch, backoff)
            except EtcdUnavailable as error:
                delay = backoff.next()
                _log.warning("a watch of etcd has ended (%s) and goes on after revision %d", error, watch.seen)
                await asyncio.sleep(delay)
            except EtcdCompacted as error:
                watch.fail(Compacted(watch.seen + 1, error.oldest + 1))
                return
            except EtcdError as error:
                watch.fail(StoreError(str(error)))
                return

    async def _read_stream(self, watch: "_Watch", backoff: Backoff) -> None:
        # From one revision earlier than wanted: etcd would serve the compacted revision itself, with what is left of it.
        stream = self._client.watch(watch.prefix, prefix=True, start_revision=max(watch.seen, 1), prev_kv=True)
        async with aclosing(stream) as responses:
            async for response in responses:
                backoff.reset()
                batch = [_event(event) for event in response.events if event.kv.mod_revision > watch.seen]
                if batch:
                    watch.seen = batch[-1].revision
                    watch.subscription.put(batch)

    def _behind(self, revision: int) -> bool:
        return any(watch.seen < revision for watch in self._watches)

    async def _show_progress(self, revision: int) -> None:
        """A change that all watches see, if by then they have not come as far as `revision` by themselves."""
        try:
            await asyncio.sleep(PROGRESS_SECONDS)
            if self._behind(revision):
                await self._client.put(PROGRESS_KEY, b"{}")
        except EtcdError as error:
            _log.warning("etcd does not take the key by which watches are told that nothing has happened: %s", error)
        finally:
            self._progress = None


@dataclass(slots=True)
class _Mark:
    """A key that only one commit at a time writes. `value` is that commit's own; `revision` where the key was last seen."""

    key: str
    value: bytes = b""
    revision: int = ABSENT

    def look(self, kv: EtcdKeyValue | None) -> bool:
        """Take over what a refused transaction found; whether it is this commit's own mark: it has been done before."""
        self.revision = ABSENT if kv is None else kv.mod_revision
        return kv is not None and kv.value == self.value


class _Watch:
    """One watcher: its queue, and the revision up to which it has been told everything."""

    def __init__(self, prefix: str, from_revision: int) -> None:
        self.prefix, self.seen = prefix, from_revision - 1
        self.subscription = Subscription()
        self.pump: asyncio.Task[None] | None = None
        self.error: StoreError | None = None

    def fail(self, error: StoreError) -> None:
        self.error = error
        self.subscription.close()


async def _end(*tasks: asyncio.Task[None] | None) -> None:
    running = [task for task in tasks if task is not None]
    for task in running:
        task.cancel()
    await asyncio.gather(*running, return_exceptions=True)


def _operation(write: Write) -> Operation | None:
    match write:
        case Put(key, value):
            return PutKey(key, value)
        case Delete(key):
            return DeleteKeys(key)
        case Check():
            return None


def _key_value(kv: EtcdKeyValue) -> KeyValue:
    return KeyValue(kv.key, kv.value, kv.create_revision, kv.mod_revision)


def _event(event: EtcdEvent) -> Event:
    kv, previous = event.kv, None if event.prev_kv is None else _key_value(event.prev_kv)
    if event.type == "DELETE":
        return Event(kv.key, kv.mod_revision, None, previous, previous.create_revision if previous else 0)
    return Event(kv.key, kv.mod_revision, kv.value, previous, kv.create_revision)


def _read_by(answer: TxnResponse) -> dict[str, EtcdKeyValue]:
    """What a transaction's reads found, by key."""
    return {kv.key: kv for one in answer.responses if one.response_range for kv in one.response_range.kvs}
