"""The addresses and node ports of Services, taken and given back in the same commit as the Service itself."""

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Iterable, Sequence

from podwire.apiserver import status
from podwire.apiserver.allocation import IP_PREFIX, PORT_PREFIX, Allocation, AllocationFailed, RangeFull, ServiceAllocator
from podwire.apiserver.kinds import REGISTRY
from podwire.apiserver.objects import Claim
from podwire.apiserver.storage import ROOT, encode, from_item, prefix_of
from podwire.model.meta import Json
from podwire.model.resources import SERVICES
from podwire.store.port import ABSENT, Conflict, Delete, Event, KeyValue, Put, Store, Write

REPAIRS_AT_ONCE = 100


class _ServiceClaim:
    document: Json
    writes: Sequence[Write]

    def __init__(self, allocator: ServiceAllocator, allocation: Allocation) -> None:
        self._allocator, self._allocation = allocator, allocation
        self.document = allocation.service
        meta = self.document.get("metadata", {})
        holder = encode({"service": f"{meta.get('namespace', '')}/{meta.get('name', '')}"})
        self.writes = (
            *(Put(key, holder, ABSENT) for key in allocation.acquire),
            *(Delete(key) for key in allocation.release),
        )

    def close(self, *, done: bool, lost: str = "") -> None:
        if done:
            self._allocator.settle(self._allocation)
            return
        self._allocator.abandon(self._allocation)
        if lost in self._allocation.acquire:
            self._allocator.load([lost])


class ServiceClaims:
    """`objects.Claims` for Services. `catch_up` waits until the allocator knows what other servers have done by now."""

    def __init__(self, allocator: ServiceAllocator, catch_up: Callable[[], Awaitable[object]]) -> None:
        self._allocator, self._catch_up = allocator, catch_up

    async def plan(self, new: Json | None, old: Json | None) -> Claim:
        if new is None:
            return _ServiceClaim(self._allocator, self._allocator.release(old or {}))
        try:
            return _ServiceClaim(self._allocator, self._allocator.plan(new, old))
        except (AllocationFailed, RangeFull):
            await self._catch_up()  # what is in the way may have gone
        try:
            return _ServiceClaim(self._allocator, self._allocator.plan(new, old))
        except AllocationFailed as error:
            name = str(new.get("metadata", {}).get("name", ""))
            raise status.invalid(SERVICES, name, error.errors) from error
        except RangeFull as error:
            raise status.internal(str(error)) from error


class AllocationLedger:
    """Tells the allocator what is taken and what is free, whoever did it: several servers can share a store."""

    def __init__(self, allocator: ServiceAllocator, prefix: str) -> None:
        self._allocator, self._prefix = allocator, prefix

    def reset(self, items: Iterable[KeyValue]) -> None:
        self._allocator.start_over(self._prefix, [item.key for item in items])

    def apply(self, event: Event) -> None:
        self._allocator.follow(event.key, taken=event.value is not None)


def ledgers(allocator: ServiceAllocator) -> dict[str, AllocationLedger]:
    """For `Hub`, by the places that they follow."""
    return {p.removeprefix(ROOT).removesuffix("/"): AllocationLedger(allocator, p) for p in (IP_PREFIX, PORT_PREFIX)}


async def repair_claims(store: Store, allocator: ServiceAllocator) -> None:
    """Load what is taken, and make the allocation keys agree with the Services that are there.

    Both are read at one revision, and a key that another server has changed since then is left alone."""
    kind = REGISTRY.by_kind(SERVICES.api_version, SERVICES.kind)
    assert kind is not None
    stored = await store.list(prefix_of(SERVICES))
    keys = {
        item.key: item.mod_revision
        for prefix in (IP_PREFIX, PORT_PREFIX)
        for item in (await store.list(prefix, revision=stored.revision)).items
    }
    allocator.load(keys)
    missing, stale = allocator.repair(keys, [from_item(kind, item) for item in stored.items])
    writes: list[Write] = [*(Put(key, b"{}", ABSENT) for key in missing), *(Delete(key, keys[key]) for key in stale)]
    for start in range(0, len(writes), REPAIRS_AT_ONCE):
        await asyncio.gather(*(_repair(store, write) for write in writes[start : start + REPAIRS_AT_ONCE]))


async def _repair(store: Store, write: Write) -> None:
    with contextlib.suppress(Conflict):
        await store.commit([write])
