"""The addresses and node ports of Services, taken and given back in the same commit as the Service itself."""

from collections.abc import Sequence

from podwire.apiserver import status
from podwire.apiserver.allocation import PREFIX, Allocation, AllocationFailed, RangeFull, ServiceAllocator
from podwire.apiserver.kinds import REGISTRY
from podwire.apiserver.objects import Claim
from podwire.apiserver.storage import encode, from_item, prefix_of
from podwire.model.meta import Json
from podwire.model.resources import SERVICES
from podwire.store.port import ABSENT, Delete, Put, Store, Write


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
    """`objects.Claims` for Services."""

    def __init__(self, allocator: ServiceAllocator) -> None:
        self._allocator = allocator

    def plan(self, new: Json | None, old: Json | None) -> Claim:
        if new is None:
            return _ServiceClaim(self._allocator, self._allocator.release(old or {}))
        try:
            return _ServiceClaim(self._allocator, self._allocator.plan(new, old))
        except AllocationFailed as error:
            name = str(new.get("metadata", {}).get("name", ""))
            raise status.invalid(SERVICES, name, error.errors) from error
        except RangeFull as error:
            raise status.internal(str(error)) from error


async def repair_claims(store: Store, allocator: ServiceAllocator) -> None:
    """Load what is taken, and make the allocation keys agree with the Services that are there."""
    kind = REGISTRY.by_kind(SERVICES.api_version, SERVICES.kind)
    assert kind is not None
    keys = [item.key for item in (await store.list(PREFIX)).items]
    allocator.load(keys)
    services = [from_item(kind, item) for item in (await store.list(prefix_of(SERVICES))).items]
    missing, stale = allocator.repair(keys, services)
    if missing or stale:
        await store.commit([*(Put(key, b"{}") for key in missing), *(Delete(key) for key in stale)])
