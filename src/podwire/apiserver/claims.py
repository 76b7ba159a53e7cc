"""The addresses and node ports of Services, taken and given back in the same commit as the Service itself."""

import asyncio
import contextlib
import logging
import uuid
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from datetime import datetime

import msgspec

from podwire.apiserver import status
from podwire.apiserver.addressranges import Source
from podwire.apiserver.allocation import IP_PREFIX, PORT_PREFIX, Allocation, AllocationFailed, RangeFull, ServiceAllocator, held
from podwire.apiserver.hub import Ledger
from podwire.apiserver.kinds import REGISTRY
from podwire.apiserver.kinds.networking import DEFAULT
from podwire.apiserver.objects import Claim
from podwire.apiserver.storage import ROOT, encode, from_item, prefix_of
from podwire.model.meta import Json
from podwire.model.resources import SERVICECIDRS, SERVICES
from podwire.model.servicecidr import IPAddressObject, ServiceCIDR, address_document
from podwire.model.timestamps import format_time
from podwire.store.port import ABSENT, Check, Conflict, Delete, Event, KeyValue, Put, Store, Write

_log = logging.getLogger(__name__)

REPAIRS_AT_ONCE = 100

OLD_IP_PREFIX = "/registry/ranges/serviceips/"
"""Where addresses were kept before there were IPAddress objects."""
_RANGES = prefix_of(SERVICECIDRS)


class _ServiceClaim:
    document: Json
    writes: Sequence[Write]

    def __init__(self, claims: "ServiceClaims", allocation: Allocation) -> None:
        self._claims, self._allocation = claims, allocation
        self.document = allocation.service
        meta = self.document.get("metadata", {})
        holder = str(meta.get("namespace", "")), str(meta.get("name", ""))
        self.writes = (
            *(claims.taking(key, *holder) for key in allocation.acquire),
            *(Delete(key) for key in allocation.release),
            *(Check(_RANGES + source.name, source.revision) for source in allocation.sources),
        )

    def close(self, *, done: bool, lost: str = "") -> None:
        self._claims.close(self._allocation, done=done, lost=lost)


class ServiceClaims:
    """`objects.Claims` for Services. `catch_up` waits until the allocator knows what other servers have done by now."""

    def __init__(
        self, allocator: ServiceAllocator, catch_up: Callable[[], Awaitable[object]], now: Callable[[], datetime]
    ) -> None:
        self._allocator, self._catch_up, self._now = allocator, catch_up, now
        self._behind = False

    async def plan(self, new: Json | None, old: Json | None) -> Claim:
        if new is None:
            return _ServiceClaim(self, self._allocator.release(old or {}))
        if self._behind:
            self._behind = False
            await self._catch_up()
        try:
            return _ServiceClaim(self, self._allocator.plan(new, old))
        except (AllocationFailed, RangeFull):
            await self._catch_up()  # what is in the way may have gone
        try:
            return _ServiceClaim(self, self._allocator.plan(new, old))
        except AllocationFailed as error:
            name = str(new.get("metadata", {}).get("name", ""))
            raise status.invalid(SERVICES, name, error.errors) from error
        except RangeFull as error:
            raise status.internal(str(error)) from error

    def taking(self, key: str, namespace: str, name: str) -> Put:
        """What says that the Service has the address or port of `key`."""
        return Put(key, _value(key, namespace, name, self._now()), ABSENT)

    def close(self, allocation: Allocation, *, done: bool, lost: str) -> None:
        if done:
            self._allocator.settle(allocation)
            return
        self._allocator.abandon(allocation)
        if lost in allocation.acquire:
            self._allocator.load([lost])
        self._behind = self._behind or lost.startswith(_RANGES)


def _value(key: str, namespace: str, name: str, now: datetime) -> bytes:
    if not key.startswith(IP_PREFIX):
        return encode({"service": f"{namespace}/{name}"})
    document = address_document(key.removeprefix(IP_PREFIX), namespace, name)
    document["metadata"] |= {"uid": str(uuid.uuid4()), "creationTimestamp": format_time(now)}
    return encode(document)


class AllocationLedger:
    """Tells the allocator what is taken and what is free, whoever did it: several servers can share a store."""

    def __init__(self, allocator: ServiceAllocator, prefix: str) -> None:
        self._allocator, self._prefix = allocator, prefix

    def reset(self, items: Iterable[KeyValue]) -> None:
        self._allocator.start_over(self._prefix, [item.key for item in items])

    def apply(self, event: Event) -> None:
        self._allocator.follow(event.key, taken=event.value is not None)


class RangeLedger:
    """Tells the allocator which ServiceCIDRs addresses may be given out of: those that are ready and not about to go."""

    def __init__(self, allocator: ServiceAllocator) -> None:
        self._allocator = allocator

    def reset(self, items: Iterable[KeyValue]) -> None:
        self._allocator.drop_ranges()
        for item in items:
            self._set(item.key, item.value, item.mod_revision)

    def apply(self, event: Event) -> None:
        self._set(event.key, event.value, event.revision)

    def _set(self, key: str, value: bytes | None, revision: int) -> None:
        name = key.removeprefix(_RANGES)
        try:
            found = msgspec.json.decode(value, type=ServiceCIDR) if value is not None else ServiceCIDR()
        except msgspec.MsgspecError as error:
            _log.error("no address comes from ServiceCIDR %s, which cannot be read: %s", name, error)
            found = ServiceCIDR()
        rank = (name != DEFAULT, found.metadata.creation_timestamp or "", name)
        self._allocator.set_range(Source(name, revision, rank), found.networks if found.serves else ())


def ledgers(allocator: ServiceAllocator) -> dict[str, Ledger]:
    """For `Hub`, by the places that they follow."""
    found: dict[str, Ledger] = {prefix: AllocationLedger(allocator, prefix) for prefix in (IP_PREFIX, PORT_PREFIX)}
    found[_RANGES] = RangeLedger(allocator)
    return {prefix.removeprefix(ROOT).removesuffix("/"): ledger for prefix, ledger in found.items()}


async def repair_claims(store: Store, now: datetime) -> None:
    """Make what is kept of addresses and ports agree with the Services that are there: also where an earlier version kept it.

    All is read at one revision, and a key that another server has changed since then is left alone."""
    kind = REGISTRY.by_kind(SERVICES.api_version, SERVICES.kind)
    assert kind is not None
    stored = await store.list(prefix_of(SERVICES))
    holders: dict[str, tuple[str, str]] = {}
    for item in stored.items:
        service = from_item(kind, item)
        meta = service["metadata"]
        holders |= dict.fromkeys(held(service), (meta["namespace"], meta["name"]))
    kept = {p: (await store.list(p, revision=stored.revision)).items for p in (IP_PREFIX, PORT_PREFIX, OLD_IP_PREFIX)}
    known = {item.key for items in kept.values() for item in items}
    writes: list[Write] = [Put(key, _value(key, *holders[key], now), ABSENT) for key in sorted(holders.keys() - known)]
    writes += [Delete(item.key, item.mod_revision) for item in _stale(kept, holders.keys())]
    for start in range(0, len(writes), REPAIRS_AT_ONCE):
        await asyncio.gather(*(_repair(store, write) for write in writes[start : start + REPAIRS_AT_ONCE]))


def _stale(kept: dict[str, tuple[KeyValue, ...]], wanted: Iterable[str]) -> Iterator[KeyValue]:
    """What no Service holds. An IPAddress that is not managed is somebody's own reservation."""
    held_keys = set(wanted)
    for prefix, items in kept.items():
        for item in items:
            if prefix == OLD_IP_PREFIX or (item.key not in held_keys and (prefix != IP_PREFIX or _managed(item))):
                yield item


def _managed(item: KeyValue) -> bool:
    try:
        return msgspec.json.decode(item.value, type=IPAddressObject).managed
    except msgspec.MsgspecError:
        return False


async def _repair(store: Store, write: Write) -> None:
    with contextlib.suppress(Conflict):
        await store.commit([write])
