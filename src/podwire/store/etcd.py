"""The store in an etcd cluster, for any number of processes at once.

A commit is one transaction whose comparisons are the writes' expectations. etcd's revision counts the changes of everyone
who uses the cluster, also of keys that are not ours; all that this store promises about revisions holds nevertheless.

A member that dies or loses its leader is waited out (`patience`): reads are asked again elsewhere, watches go on after the
last revision they saw, and a commit of unknown outcome is sent again where its own expectations keep it from being done twice.
"""

import asyncio
import logging
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from contextlib import aclosing, suppress
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
        checked = [write for write in writes if write.expected_revision is not None]
        compare = [Compare(write.key, "MOD", write.expected_revision or ABSENT) for write in checked]
        done = [operation for write in writes if (operation := _operation(write)) is not None]
        read = [ReadKeys(key=write.key) for write in checked]
        answer, repeated = await self._transact(compare, done, read)
        if answer.succeeded:
            return answer.header.revision
        found = _read_by(answer)
        if repeated and (revision := _done_before(writes, found)):
            return revision
        for write in checked:
            actual = found[write.key].mod_revision if write.key in found else ABSENT
            if write.expected_revision is not None and actual != write.expected_revision:
                raise Conflict(write.key, write.expected_revision, actual)
        raise StoreError("etcd refused a transaction whose comparisons all hold")

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

    async def _transact(
        self, compare: Sequence[Compare], success: Sequence[Operation], failure: Sequence[Operation]
    ) -> tuple[TxnResponse, bool]:
        """The answer, and whether the transaction may have been done already by an attempt that was not answered."""
        backoff, deadline = self._backoff(), self._deadline()
        writing = {operation.key for operation in success}
        guarded = not success or any(comparison.key in writing for comparison in compare)
        repeated = False
        while True:
            try:
                return await self._client.txn(compare, success, failure), repeated
            except EtcdUnavailable as error:
                if error.sent and not guarded:
                    raise StoreError(f"{error}; whether the write was done is not known") from error
                repeated = repeated or error.sent
                await self._wait(backoff, deadline, error)
            except EtcdError as error:
                raise StoreError(str(error)) from error

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


def _done_before(writes: Sequence[Write], found: Mapping[str, EtcdKeyValue]) -> int:
    """The revision at which `writes` were done by an attempt whose answer was lost; 0 if something else is there."""
    revisions: set[int] = set()
    for write in writes:
        if write.expected_revision is None or isinstance(write, Check):
            continue
        kv = found.get(write.key)
        if isinstance(write, Delete) != (kv is None):
            return 0
        if isinstance(write, Put) and kv is not None:
            if kv.value != write.value:
                return 0
            revisions.add(kv.mod_revision)
    return revisions.pop() if len(revisions) == 1 else 0
