"""flannel's leases in etcd: what is there, and the few transactions on them. Each keeps at most one owner a subnet.

<prefix>/config                          the network configuration
<prefix>/subnets/10.5.34.0-24[&v6-len]   a lease: attributes as JSON; bound to an etcd lease, or (a reservation) to none
"""

from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from math import inf
from typing import Protocol

from podwire.client.etcdmessages import (
    Compare,
    DeleteKeys,
    EtcdError,
    EtcdKeyValue,
    EtcdLeaseNotFound,
    EtcdUnavailable,
    LeaseResponse,
    Operation,
    PutKey,
    RangeResponse,
    ReadKeys,
    TxnResponse,
    WatchResponse,
)
from podwire.model.addr import IPNetwork
from podwire.plan.leasechoice import StoredLease
from podwire.plan.leases import Lease, LeaseAttrs, decode_lease, encode_attrs, parse_subnet_key, subnet_key

DEFAULT_PREFIX = "/coreos.com/network"
DEFAULT_TTL = 86400
"""Seconds; flannel's."""

DRIFT = 0.01
"""Two clocks may differ by this part: so much earlier than etcd a lease counts as run out here."""


class Etcd(Protocol):
    """What is used of `podwire.client.etcd.EtcdClient`."""

    async def get(self, key: str) -> EtcdKeyValue | None: ...

    async def range(self, request: ReadKeys) -> RangeResponse: ...

    async def txn(
        self, compare: Sequence[Compare], success: Sequence[Operation], failure: Sequence[Operation] = ()
    ) -> TxnResponse: ...

    async def grant(self, ttl: int) -> LeaseResponse: ...

    async def keep_alive(self, lease: int) -> int: ...

    async def revoke(self, lease: int) -> None: ...

    def watch(
        self, key: str, *, prefix: bool = False, start_revision: int = 0, prev_kv: bool = False
    ) -> AsyncGenerator[WatchResponse, None]: ...


@dataclass(frozen=True, slots=True)
class Snapshot:
    """All leases as they were at `revision`."""

    leases: tuple[StoredLease, ...]
    revision: int


@dataclass(frozen=True, slots=True)
class Taken:
    """A lease that is ours until `deadline` (the node's clock; infinite for a reservation) unless renewed.

    `seen`: all leases at the moment at which it became ours, or shortly before."""

    stored: StoredLease
    deadline: float
    seen: Snapshot


class LeaseRegistry:
    """`clock`: seconds that go on while the machine sleeps. Raises EtcdError where etcd does not answer or refuses."""

    def __init__(self, etcd: Etcd, prefix: str, ttl: int, clock: Callable[[], float]) -> None:
        self.prefix = prefix.rstrip("/")
        self._etcd, self._ttl, self._clock = etcd, ttl, clock
        self._subnets = f"{self.prefix}/subnets/"
        self._config = f"{self.prefix}/config"
        self._doubtful: set[int] = set()
        """Leases granted for writes of which nobody knows whether they happened, or will."""

    async def look(self) -> tuple[bytes | None, Snapshot]:
        """The network configuration's text (None where there is none) and all leases, of one moment and by one request."""
        done = await self._etcd.txn([], [ReadKeys(key=self._config), ReadKeys(key=self._subnets, prefix=True)])
        config, leases = [answer.response_range for answer in done.responses if answer.response_range]
        return (config.kvs[0].value if config.kvs else None), self._snapshot(leases, done.header.revision)

    async def config_at(self) -> tuple[bytes | None, int]:
        """The network configuration's text (None where there is none), and the revision at which it was so."""
        page = await self._etcd.range(ReadKeys(key=self._config))
        return (page.kvs[0].value if page.kvs else None), page.header.revision

    def watch_config(self, after_revision: int) -> AsyncGenerator[WatchResponse, None]:
        return self._etcd.watch(self._config, start_revision=after_revision + 1)

    async def list(self) -> Snapshot:
        page = await self._etcd.range(ReadKeys(key=self._subnets, prefix=True))
        return self._snapshot(page, page.header.revision)

    def _snapshot(self, page: RangeResponse, revision: int) -> Snapshot:
        return Snapshot(tuple(filter(None, map(self.decode, page.kvs))), revision)

    def decode(self, kv: EtcdKeyValue) -> StoredLease | None:
        """None for what flannel would skip."""
        lease = decode_lease(kv.key.removeprefix(self._subnets), kv.value)
        return StoredLease(lease, kv.create_revision, kv.mod_revision, kv.lease) if lease else None

    def subnets_of(self, kv: EtcdKeyValue) -> tuple[str, tuple[IPNetwork, ...]]:
        """A lease's name and subnets by its key alone (a deletion's event has no more)."""
        name = kv.key.removeprefix(self._subnets)
        return name, parse_subnet_key(name)

    async def settle(self, snapshot: Snapshot) -> None:
        """End leases of doubtful writes: what was not written by now is never written any more."""
        in_use = {stored.lease_id for stored in snapshot.leases}
        for lease_id in tuple(self._doubtful):
            if lease_id not in in_use:
                with suppress(EtcdLeaseNotFound):
                    await self._etcd.revoke(lease_id)
            self._doubtful.discard(lease_id)

    async def create(self, subnets: tuple[IPNetwork, ...], attrs: LeaseAttrs) -> Taken | None:
        """Lease free subnets. None: somebody was faster."""
        name = subnet_key(subnets)
        key, first = self._subnets + name, self._subnets + name.partition("&")[0]
        # The first family's subnet alone decides: with another of the second family it must not be leased either.
        free = [Compare(key, "VERSION", 0)]
        if not name.startswith("0.0.0.0-0&"):
            free.append(Compare(first, "CREATE", 0, prefix=True))
        return await self._write(free, key, Lease(name, subnets, attrs))

    async def reuse(self, stored: StoredLease, attrs: LeaseAttrs) -> Taken | None:
        """Go on with a lease of ours for its whole time again. None: it was changed meanwhile."""
        attrs = replace(attrs, extra=stored.lease.attrs.extra)
        key = self._subnets + stored.lease.node
        unchanged = [Compare(key, "MOD", stored.modified)]
        return await self._write(unchanged, key, replace(stored.lease, attrs=attrs), permanent=stored.lease_id == 0)

    async def _write(self, compare: Sequence[Compare], key: str, lease: Lease, permanent: bool = False) -> Taken | None:
        since = self._clock()
        granted = LeaseResponse() if permanent else await self._etcd.grant(self._ttl)
        write = PutKey(key, encode_attrs(lease.attrs), granted.id)
        # The list is read in the same transaction: who overlaps us and is not in it came later, and gives way.
        everything = ReadKeys(key=self._subnets, prefix=True)
        try:
            done = await self._etcd.txn(compare, [write, everything])
        except EtcdUnavailable as error:
            if error.sent and granted.id:
                self._doubtful.add(granted.id)
            raise
        if not done.succeeded:
            if granted.id:
                with suppress(EtcdError):
                    await self._etcd.revoke(granted.id)
            return None
        page = next(answer.response_range for answer in done.responses if answer.response_range)
        seen = self._snapshot(page, done.header.revision)
        stored = next(found for found in seen.leases if found.lease.node == lease.node)
        return Taken(stored, inf if permanent else self._deadline(since, granted.ttl), seen)

    async def confirm(self, taken: Taken) -> Taken | None:
        """What we took, as of a later revision (of which `seen` has no more than the number); None if it is lost already."""
        page = await self._etcd.range(ReadKeys(key=self._subnets + taken.stored.lease.node))
        kv = page.kvs[0] if page.kvs else None
        if kv is None or kv.lease != taken.stored.lease_id or kv.create_revision != taken.stored.created:
            return None
        return replace(taken, seen=Snapshot((), page.header.revision))

    async def renew(self, stored: StoredLease) -> float | None:
        """Give our lease its whole time again; returns the new deadline. None: it is not ours any more."""
        since, ttl = self._clock(), 0
        if stored.lease_id:
            try:
                ttl = await self._etcd.keep_alive(stored.lease_id)
            except EtcdLeaseNotFound:
                return None
        # The etcd lease may outlive our hold on the key: somebody can have written over it.
        if await self.current(stored) is None:
            return None
        return self._deadline(since, ttl) if stored.lease_id else inf

    async def rewrite(self, stored: StoredLease, attrs: LeaseAttrs) -> StoredLease | None:
        """Say other attributes of a lease of ours, whose time goes on. None: it was changed meanwhile (see `current`)."""
        attrs = replace(attrs, extra=stored.lease.attrs.extra)
        key = self._subnets + stored.lease.node
        write = PutKey(key, encode_attrs(attrs), stored.lease_id)
        done = await self._etcd.txn([Compare(key, "MOD", stored.modified)], [write])
        if not done.succeeded:
            return None
        return replace(stored, lease=replace(stored.lease, attrs=attrs), modified=done.header.revision)

    async def current(self, stored: StoredLease) -> StoredLease | None:
        """A lease of ours as it is now; None: it is not ours any more."""
        kv = await self._etcd.get(self._subnets + stored.lease.node)
        if kv is None or kv.lease != stored.lease_id or kv.create_revision != stored.created:
            return None
        return self.decode(kv)

    async def remove(self, stored: StoredLease) -> bool:
        """Delete a lease if it is still as we know it."""
        key = self._subnets + stored.lease.node
        done = await self._etcd.txn([Compare(key, "MOD", stored.modified)], [DeleteKeys(key)])
        return done.succeeded

    def watch(self, after_revision: int) -> AsyncGenerator[WatchResponse, None]:
        return self._etcd.watch(self._subnets, prefix=True, start_revision=after_revision + 1)

    def _deadline(self, since: float, ttl: int) -> float:
        """etcd counts from when it was asked, which was not before `since`."""
        return since + ttl * (1 - DRIFT)
