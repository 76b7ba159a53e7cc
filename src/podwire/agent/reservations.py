"""The node's own record of which pod has which address, on disk before an address is used.

Garbage collection asks this record, never the API alone: a pod's status is written after its address is in use, so whoever
frees "addresses that no pod in the API has" gives one address to two pods.

Crash-safe by order: reserve, then plumb; unplumb, then release. What a killed agent leaves behind is a reservation too many,
which the next start finds by comparing with the sandboxes that exist.
"""

import asyncio
import contextlib
import ipaddress
import sqlite3
import threading
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import NamedTuple

from podwire.model.addr import IPAddress, IPNetwork
from podwire.model.errors import PodwireError
from podwire.plan.ipam import AddressesExhausted, pick_address, pod_range

_SCHEMA = """
CREATE TABLE IF NOT EXISTS reservation (
    address TEXT PRIMARY KEY, uid TEXT NOT NULL, namespace TEXT NOT NULL, name TEXT NOT NULL, since TEXT NOT NULL
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS last_given (prefix TEXT PRIMARY KEY, address TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS attachment (uid TEXT PRIMARY KEY, record BLOB NOT NULL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS network (one INTEGER PRIMARY KEY CHECK (one = 1), record BLOB NOT NULL);
"""

_GIVEN = "INSERT OR REPLACE INTO last_given VALUES (?, ?)"
_ATTACHED = "INSERT OR REPLACE INTO attachment VALUES (?, ?)"

_Statement = tuple[str, tuple[str | bytes, ...]]


class RecordUnusable(PodwireError):
    """The file cannot be opened as what it should be."""

    def __init__(self, path: Path, error: Exception) -> None:
        super().__init__(f"the node's record of addresses {path} cannot be used ({error}): is there room on its disk?")


class AddressTaken(PodwireError):
    """An address that was asked for has another holder, or is none that a pod may have."""


@dataclass(frozen=True, slots=True)
class Reservation:
    """Who has `address`, and since when (RFC 3339)."""

    address: IPAddress
    uid: str
    namespace: str
    name: str
    since: str


class Owner(NamedTuple):
    """Who holds addresses; `namespace` and `name` are for people."""

    uid: str
    namespace: str
    name: str


class AddressesWithheld(PodwireError):
    """The node does not hold its subnets at present, so that nobody may be given a new address out of them."""

    def __init__(self, why: str) -> None:
        super().__init__(f"no address can be given: the node does not hold its subnet ({why})")


class Reservations:
    """Addresses by pod uid, in memory for reading and in SQLite (WAL, synchronous=FULL) for good.

    Reads are immediate. Writes return when they are on disk; those that wait at the same time share one transaction.
    """

    def __init__(self, path: Path) -> None:
        """Opens or makes the file at `path`. Raises RecordUnusable."""
        self._db = sqlite3.connect(path, check_same_thread=False, isolation_level=None)
        try:
            self._db.execute("PRAGMA journal_mode=WAL")
            self._db.execute("PRAGMA synchronous=FULL")
            self._db.executescript(_SCHEMA)
        except sqlite3.Error as error:
            self._db.close()
            raise RecordUnusable(path, error) from error
        rows = self._db.execute("SELECT address, uid, namespace, name, since FROM reservation").fetchall()
        self._by_address = {r.address: r for r in (Reservation(ipaddress.ip_address(row[0]), *row[1:]) for row in rows)}
        given = self._db.execute("SELECT prefix, address FROM last_given").fetchall()
        self._last = {ipaddress.ip_network(prefix): ipaddress.ip_address(address) for prefix, address in given}
        self._records: dict[str, bytes] = dict(self._db.execute("SELECT uid, record FROM attachment").fetchall())
        self._network: bytes | None = next((row[0] for row in self._db.execute("SELECT record FROM network")), None)
        self._pending: list[tuple[Sequence[_Statement], asyncio.Future[None]]] = []
        self._writing = asyncio.Lock()
        self._in_use = threading.Lock()
        """Held by whoever uses the connection in another thread: it may not be closed under a transaction."""
        self._closed = False
        self.withheld: Callable[[], str] = lambda: ""
        """Why no address may be given at present, "" where it may: the node's hold on its subnets can lapse."""

    def of(self, uid: str) -> tuple[IPAddress, ...]:
        """The pod's addresses, in the order of their reservation; empty where it has none."""
        return tuple(r.address for r in self._by_address.values() if r.uid == uid)

    def all(self) -> tuple[Reservation, ...]:
        return tuple(self._by_address.values())

    def holder(self, address: IPAddress) -> Reservation | None:
        return self._by_address.get(address)

    def has_room(self, prefix: IPNetwork) -> bool:
        """Whether an address of `prefix` is free."""
        first, last = pod_range(prefix)
        return last - first >= sum(r.address in prefix for r in self._by_address.values())

    @property
    def records(self) -> Mapping[str, bytes]:
        """What was written down beside the addresses, by uid; for those alone that gave a record."""
        return self._records

    @property
    def remembered(self) -> bytes | None:
        """What `remember` was given last."""
        return self._network

    async def remember(self, network: bytes | None) -> None:
        """Keep what the node knows of its own network (see `memory`); None: forget it. On disk when this returns."""
        if network == self._network:
            return
        statement: _Statement = ("DELETE FROM network", ())
        if network is not None:
            statement = ("INSERT OR REPLACE INTO network VALUES (1, ?)", (network,))
        await self._write([statement])
        self._network = network

    async def reserve(
        self,
        owner: Owner,
        prefixes: Collection[IPNetwork],
        now: datetime,
        *,
        wanted: Collection[IPAddress] = (),
        record: bytes | None = None,
    ) -> tuple[IPAddress, ...]:
        """One address out of each prefix for the owner; the same ones on repeat. On disk when this returns.

        `wanted`: the address to have out of the prefix that it is in. `record`: to be kept with the addresses, in the same
        transaction. Raises AddressesExhausted, AddressesWithheld, and AddressTaken for a wanted one that cannot be had. An
        owner's addresses outside `prefixes` (the node's subnet has changed) are given up.
        """
        uid = owner.uid
        for address in wanted:
            self._check_wanted(address, uid, prefixes)
        held = [r for r in self._by_address.values() if r.uid == uid and not _ousted(r.address, wanted)]
        kept = {prefix: r for prefix in prefixes for r in held if r.address in prefix}
        fresh = {
            prefix: Reservation(_within(prefix, wanted) or self._pick(prefix), *owner, now.isoformat())
            for prefix in prefixes
            if prefix not in kept
        }
        if fresh and (why := self.withheld()):
            raise AddressesWithheld(why)
        picked = {prefix: r.address for prefix, r in fresh.items() if r.address not in wanted}
        stale = [r for r in self._by_address.values() if r.uid == uid and r not in kept.values()]
        statements: list[_Statement] = [(_GIVEN, (str(prefix), str(address))) for prefix, address in picked.items()]
        statements += [_insertion(r) for r in fresh.values()]
        statements += [("DELETE FROM reservation WHERE address = ?", (str(r.address),)) for r in stale]
        if record is not None and self._records.get(uid) != record:
            statements.append((_ATTACHED, (uid, record)))
        # In memory first, before anything is awaited: nobody else may pick these addresses meanwhile.
        self._by_address |= {r.address: r for r in fresh.values()}
        self._last |= picked
        try:
            await self._write(statements)
        except sqlite3.Error:
            for reservation in fresh.values():
                self._by_address.pop(reservation.address, None)
            raise
        for reservation in stale:
            self._by_address.pop(reservation.address, None)
        if record is not None:
            self._records[uid] = record
        mine = self.of(uid)
        return tuple(ip for prefix in prefixes for ip in mine if ip in prefix)

    async def take_over(self, owner: Owner, addresses: Collection[IPAddress], now: datetime, record: bytes) -> None:
        """Write down what another plugin has given to the owner. Raises AddressTaken where someone else has it here."""
        for address in addresses:
            holder = self._by_address.get(address)
            if holder is not None and holder.uid != owner.uid:
                raise AddressTaken(f"address {address} is held by {holder.namespace}/{holder.name} since {holder.since}")
        fresh = [Reservation(address, *owner, now.isoformat()) for address in addresses if address not in self._by_address]
        await self._write([(_ATTACHED, (owner.uid, record)), *map(_insertion, fresh)])
        self._by_address |= {r.address: r for r in fresh}
        self._records[owner.uid] = record

    async def release(self, uid: str) -> None:
        """Give up the pod's addresses. Call it when no link has them any more. Unknown uid: nothing."""
        held = self.of(uid)
        if not held and uid not in self._records:
            return
        statements: list[_Statement] = [("DELETE FROM reservation WHERE uid = ?", (uid,))]
        if uid in self._records:
            statements.append(("DELETE FROM attachment WHERE uid = ?", (uid,)))
        await self._write(statements)
        for address in held:
            self._by_address.pop(address, None)
        self._records.pop(uid, None)

    def _pick(self, prefix: IPNetwork) -> IPAddress:
        """The next free address; when there is none, the error names holders."""
        try:
            return pick_address(prefix, self._by_address, self._last.get(prefix))
        except AddressesExhausted as error:
            holders = [r for r in self._by_address.values() if r.address in prefix]
            some = ", ".join(f"{r.address} {r.namespace}/{r.name}" for r in sorted(holders, key=lambda r: r.since)[:5])
            raise AddressesExhausted(prefix, f"its {len(holders)} addresses are held, the longest by {some}") from error

    def _check_wanted(self, address: IPAddress, uid: str, prefixes: Collection[IPNetwork]) -> None:
        prefix = next((prefix for prefix in prefixes if address in prefix), None)
        if prefix is None:
            raise AddressTaken(f"address {address} is in none of this node's subnets {', '.join(map(str, prefixes))}")
        first, last = pod_range(prefix)
        if not first <= int(address) <= last:
            raise AddressTaken(f"address {address} is not one for pods: it is the subnet's own, the gateway or the broadcast")
        holder = self._by_address.get(address)
        if holder is not None and holder.uid != uid:
            raise AddressTaken(f"address {address} is held by {holder.namespace}/{holder.name} since {holder.since}")

    def close(self) -> None:
        """Waits for a transaction that runs, and lets none begin any more."""
        with self._in_use:
            self._closed = True
            self._db.close()

    async def _write(self, statements: Sequence[_Statement]) -> None:
        if not statements:
            return
        written: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        written.add_done_callback(_retrieve)  # whoever waits for it may have been cancelled
        self._pending.append((statements, written))
        async with self._writing:
            batch, self._pending = self._pending, []
            if batch:
                # Shielded: a cancelled caller must not leave the others of its batch without an answer.
                await asyncio.shield(self._commit(batch))
        await written

    async def _commit(self, batch: list[tuple[Sequence[_Statement], asyncio.Future[None]]]) -> None:
        try:
            await asyncio.to_thread(self._transact, [s for statements, _ in batch for s in statements])
        except sqlite3.Error as error:
            for _, written in batch:
                if not written.done():
                    written.set_exception(error)
        else:
            for _, written in batch:
                if not written.done():
                    written.set_result(None)

    def _transact(self, statements: Sequence[_Statement]) -> None:
        with self._in_use:
            if self._closed:
                raise sqlite3.ProgrammingError("the record of reservations is closed")
            self._db.execute("BEGIN IMMEDIATE")
            try:
                for sql, values in statements:
                    self._db.execute(sql, values)
                self._db.execute("COMMIT")
            except sqlite3.Error:
                with contextlib.suppress(sqlite3.Error):
                    self._db.execute("ROLLBACK")
                raise


def _insertion(r: Reservation) -> _Statement:
    return "INSERT INTO reservation VALUES (?, ?, ?, ?, ?)", (str(r.address), r.uid, r.namespace, r.name, r.since)


def _within(prefix: IPNetwork, addresses: Collection[IPAddress]) -> IPAddress | None:
    return next((address for address in addresses if address in prefix), None)


def _ousted(address: IPAddress, wanted: Collection[IPAddress]) -> bool:
    """Whether the owner wants another address than this in its place."""
    same_family = [other for other in wanted if other.version == address.version]
    return bool(same_family) and address not in same_family


def _retrieve(written: asyncio.Future[None]) -> None:
    if not written.cancelled():
        written.exception()
