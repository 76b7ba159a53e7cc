"""etcd in memory: revisions, transactions, leases that run out, watches with history and compaction; and a network to it that
fails in named ways. Time is the event loop's, so under a loop with virtual time days pass in milliseconds.
"""

import asyncio
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from random import Random
from types import TracebackType
from typing import Self, TypeVar

from podwire.client.etcdmessages import (
    Compare,
    DeleteKeys,
    DeleteResponse,
    EtcdCompacted,
    EtcdEvent,
    EtcdFutureRevision,
    EtcdKeyValue,
    EtcdLeaseNotFound,
    EtcdUnavailable,
    Header,
    LeaseResponse,
    Operation,
    OpResponse,
    PutKey,
    PutResponse,
    RangeResponse,
    ReadKeys,
    TxnResponse,
    WatchResponse,
)

T = TypeVar("T")

NO_LEASE = "etcdserver: requested lease not found"


@dataclass(slots=True)
class _Lease:
    ttl: int
    timer: asyncio.TimerHandle


class FakeEtcd:
    """The cluster. `lazy`: how many seconds later than promised a lease runs out (etcd after a change of leader); ≥ 0."""

    def __init__(self, *, lazy: Callable[[], float] = lambda: 0.0) -> None:
        self.revision = 1
        self.compacted = 0
        self.requests = 0
        self.keys: dict[str, EtcdKeyValue] = {}
        self._history: list[EtcdEvent] = []
        self._leases: dict[int, _Lease] = {}
        self._next_lease = 7587000
        self._lazy = lazy
        self._grown = asyncio.Event()

    # --- what a member does, at once and as a whole ---------------------------------------------------------------

    def txn(self, compare: Sequence[Compare], success: Sequence[Operation], failure: Sequence[Operation]) -> TxnResponse:
        holds = all(map(self._holds, compare))
        operations = success if holds else failure
        for operation in operations:
            if isinstance(operation, PutKey) and operation.lease and operation.lease not in self._leases:
                raise EtcdLeaseNotFound(5, NO_LEASE)
        self.revision += 1  # provisionally: of what is written now
        events: list[EtcdEvent] = []
        answers = [self._do(operation, events) for operation in operations]
        if events:
            self._commit(events)
        else:
            self.revision -= 1
        return TxnResponse(Header(self.revision), holds, tuple(answers))

    def grant(self, ttl: int) -> LeaseResponse:
        self._next_lease += 1
        self._leases[self._next_lease] = _Lease(ttl, self._timer(self._next_lease, ttl))
        return LeaseResponse(Header(self.revision), self._next_lease, ttl, ttl)

    def keep_alive(self, lease: int) -> int:
        if lease not in self._leases:
            raise EtcdLeaseNotFound(5, NO_LEASE)
        held = self._leases[lease]
        held.timer.cancel()
        held.timer = self._timer(lease, held.ttl)
        return held.ttl

    def revoke(self, lease: int) -> None:
        held = self._leases.pop(lease, None)
        if held is None:
            raise EtcdLeaseNotFound(5, NO_LEASE)
        held.timer.cancel()
        keys = [key for key, kv in self.keys.items() if kv.lease == lease]
        if keys:
            self.txn([], [DeleteKeys(key) for key in keys], [])

    def extend_all(self) -> None:
        """A new leader gives every lease its whole time again."""
        for lease in self._leases:
            self.keep_alive(lease)

    def compact(self, revision: int) -> None:
        if revision <= self.compacted:
            raise EtcdCompacted("required revision has been compacted")
        if revision > self.revision:
            raise EtcdFutureRevision(11, "required revision is a future revision")
        self.compacted = revision
        self._history = [event for event in self._history if event.kv.mod_revision >= revision]

    def since(self, revision: int, key: str, prefix: bool) -> list[EtcdEvent]:
        if revision < self.compacted:
            raise EtcdCompacted("the watched revision has been compacted", self.compacted)
        found = [e for e in self._history if e.kv.mod_revision >= revision]
        return [e for e in found if (e.kv.key.startswith(key) if prefix else e.kv.key == key)]

    @property
    def growth(self) -> asyncio.Event:
        """Will be set by the next commit."""
        return self._grown

    def _timer(self, lease: int, ttl: int) -> asyncio.TimerHandle:
        return asyncio.get_running_loop().call_later(ttl + self._lazy(), self.revoke, lease)

    def _commit(self, events: list[EtcdEvent]) -> None:
        self._history += events
        self._grown.set()
        self._grown = asyncio.Event()

    def _holds(self, compare: Compare) -> bool:
        missing = EtcdKeyValue(raw_key=compare.key.encode())
        found = [kv for key, kv in self.keys.items() if compare.prefix and key.startswith(compare.key)]
        if not compare.prefix and compare.key in self.keys:
            found = [self.keys[compare.key]]
        return all(_compares(compare, kv) for kv in found or [missing])

    def _do(self, operation: Operation, events: list[EtcdEvent]) -> OpResponse:
        header = Header(self.revision)
        match operation:
            case PutKey(key, value, lease):
                old = self.keys.get(key)
                self.keys[key] = EtcdKeyValue(
                    raw_key=key.encode(),
                    value=value,
                    create_revision=old.create_revision if old else self.revision,
                    mod_revision=self.revision,
                    version=old.version + 1 if old else 1,
                    lease=lease,
                )
                events.append(EtcdEvent(self.keys[key], "PUT", old))
                return OpResponse(response_put=PutResponse(header))
            case DeleteKeys(key, prefix):
                gone = [k for k in sorted(self.keys) if (k.startswith(key) if prefix else k == key)]
                for name in gone:
                    mark = EtcdKeyValue(raw_key=name.encode(), mod_revision=self.revision)
                    events.append(EtcdEvent(mark, "DELETE", self.keys.pop(name)))
                return OpResponse(response_delete_range=DeleteResponse(header, len(gone)))
            case ReadKeys():
                return OpResponse(response_range=self.range(operation))

    def range(self, request: ReadKeys) -> RangeResponse:
        """Of the current revision only."""
        names = [k for k in sorted(self.keys) if _in_range(k, request)]
        count = len(names)
        if request.limit:
            names = names[: request.limit]
        return RangeResponse(Header(self.revision), tuple(self.keys[name] for name in names), len(names) < count, count)


def _in_range(key: str, request: ReadKeys) -> bool:
    if request.end:
        return request.key <= key < request.end
    return key.startswith(request.key) if request.prefix else key == request.key


def _compares(compare: Compare, kv: EtcdKeyValue) -> bool:
    values = {"VERSION": kv.version, "CREATE": kv.create_revision, "MOD": kv.mod_revision, "LEASE": kv.lease}
    if compare.target == "VALUE":
        assert isinstance(compare.value, bytes)
        return _ordered(compare.result, (kv.value > compare.value) - (kv.value < compare.value))
    assert isinstance(compare.value, int)
    return _ordered(compare.result, values[compare.target] - compare.value)


def _ordered(result: str, difference: int) -> bool:
    return {"EQUAL": difference == 0, "NOT_EQUAL": difference != 0, "GREATER": difference > 0, "LESS": difference < 0}[result]


# --- the way there ------------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class Link:
    """One client's way to the cluster.

    up: False cuts it. delay: the longest time a message needs one way, in seconds. lost: the part of requests that are done
    but never answered; late: the part of which the client has given up when they are done."""

    up: bool = True
    delay: float = 0.0
    lost: float = 0.0
    late: float = 0.0
    rng: Random = field(default_factory=lambda: Random(0))
    timeout: float = 5.0
    silence: float = 14.0
    """Seconds after which a watch notices that nobody is there."""

    async def travel(self) -> None:
        if self.delay:
            await asyncio.sleep(self.rng.uniform(0, self.delay))


class FakeEtcdClient:
    """`podwire.client.etcd.EtcdClient`, for a FakeEtcd."""

    def __init__(self, server: FakeEtcd, link: Link | None = None) -> None:
        self._server, self.link = server, link or Link()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Nothing to close."""

    async def get(self, key: str) -> EtcdKeyValue | None:
        page = await self.range(ReadKeys(key=key))
        return page.kvs[0] if page.kvs else None

    async def range(self, request: ReadKeys) -> RangeResponse:
        return await self._ask(lambda: self._server.range(request))

    async def read(self, key: str, *, prefix: bool = False, limit: int = 0) -> RangeResponse:
        return await self.range(ReadKeys(key=key, prefix=prefix, limit=limit))

    async def put(self, key: str, value: bytes, lease: int = 0) -> PutResponse:
        done = await self.txn([], [PutKey(key, value, lease)])
        return PutResponse(done.header)

    async def delete(self, key: str, *, prefix: bool = False) -> DeleteResponse:
        answer = (await self.txn([], [DeleteKeys(key, prefix)])).responses[0].response_delete_range
        assert answer is not None
        return answer

    async def txn(
        self, compare: Sequence[Compare], success: Sequence[Operation], failure: Sequence[Operation] = ()
    ) -> TxnResponse:
        return await self._ask(lambda: self._server.txn(compare, success, failure))

    async def compact(self, revision: int) -> None:
        await self._ask(lambda: self._server.compact(revision))

    async def grant(self, ttl: int) -> LeaseResponse:
        return await self._ask(lambda: self._server.grant(ttl))

    async def keep_alive(self, lease: int) -> int:
        return await self._ask(lambda: self._server.keep_alive(lease))

    async def revoke(self, lease: int) -> None:
        await self._ask(lambda: self._server.revoke(lease))

    async def watch(
        self, key: str, *, prefix: bool = False, start_revision: int = 0, prev_kv: bool = False
    ) -> AsyncGenerator[WatchResponse, None]:
        await self._ask(lambda: None)
        server, link = self._server, self.link
        position = start_revision or server.revision + 1
        yield WatchResponse(Header(server.revision), created=True)
        while True:
            growth = server.growth
            events = server.since(position, key, prefix)
            position = max(position, server.revision + 1)
            if events:
                await link.travel()
            if not link.up:
                await asyncio.sleep(link.silence)
                raise EtcdUnavailable("silence", "etcd does not send anything any more", sent=True)
            if events:
                yield WatchResponse(Header(server.revision), events=tuple(events))
            while link.up and not growth.is_set():
                with suppress(TimeoutError):
                    async with asyncio.timeout(link.silence):
                        await growth.wait()

    async def _ask(self, do: Callable[[], T]) -> T:
        server, link = self._server, self.link
        server.requests += 1
        if not link.up:
            await asyncio.sleep(link.timeout)
            raise EtcdUnavailable("timeout", "etcd cannot be reached", sent=False)
        await link.travel()
        fate = link.rng.random()
        if fate < link.late:
            asyncio.get_running_loop().call_later(link.rng.uniform(0, 3 * link.timeout), _quietly, do)
            await asyncio.sleep(link.timeout)
            raise EtcdUnavailable("timeout", "etcd did not answer in time", sent=True)
        if not link.up:
            raise EtcdUnavailable("reset", "etcd cannot be reached", sent=True)
        answer = do()
        await link.travel()
        if not link.up or fate < link.late + link.lost:
            raise EtcdUnavailable("reset", "the connection to etcd broke", sent=True)
        return answer


def _quietly(do: Callable[[], object]) -> None:
    with suppress(EtcdLeaseNotFound, EtcdCompacted):
        do()
