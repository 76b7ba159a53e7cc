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
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from podwire.model.addr import IPAddress, IPNetwork
from podwire.plan.ipam import pick_address

_SCHEMA = """
CREATE TABLE IF NOT EXISTS reservation (
    address TEXT PRIMARY KEY, uid TEXT NOT NULL, namespace TEXT NOT NULL, name TEXT NOT NULL, since TEXT NOT NULL
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS last_given (prefix TEXT PRIMARY KEY, address TEXT NOT NULL) WITHOUT ROWID;
"""

_Statement = tuple[str, tuple[str, ...]]


@dataclass(frozen=True, slots=True)
class Reservation:
    """Who has `address`, and since when (RFC 3339)."""

    address: IPAddress
    uid: str
    namespace: str
    name: str
    since: str


class Reservations:
    """Addresses by pod uid, in memory for reading and in SQLite (WAL, synchronous=FULL) for good.

    Reads are immediate. Writes return when they are on disk; those that wait at the same time share one transaction.
    """

    def __init__(self, path: Path) -> None:
        """Opens or makes the file at `path`. Raises sqlite3.Error where that cannot be done."""
        self._db = sqlite3.connect(path, check_same_thread=False, isolation_level=None)
        self._db.execute("PRAGMA journal_mode=WAL")
        self._db.execute("PRAGMA synchronous=FULL")
        self._db.executescript(_SCHEMA)
        rows = self._db.execute("SELECT address, uid, namespace, name, since FROM reservation").fetchall()
        self._by_address = {r.address: r for r in (Reservation(ipaddress.ip_address(row[0]), *row[1:]) for row in rows)}
        given = self._db.execute("SELECT prefix, address FROM last_given").fetchall()
        self._last = {ipaddress.ip_network(prefix): ipaddress.ip_address(address) for prefix, address in given}
        self._pending: list[tuple[Sequence[_Statement], asyncio.Future[None]]] = []
        self._writing = asyncio.Lock()
        self._in_use = threading.Lock()
        """Held by whoever uses the connection in another thread: it may not be closed under a transaction."""
        self._closed = False

    def of(self, uid: str) -> tuple[IPAddress, ...]:
        """The pod's addresses, in the order of their reservation; empty where it has none."""
        return tuple(r.address for r in self._by_address.values() if r.uid == uid)

    def all(self) -> tuple[Reservation, ...]:
        return tuple(self._by_address.values())

    async def reserve(
        self, uid: str, namespace: str, name: str, prefixes: Collection[IPNetwork], now: datetime
    ) -> tuple[IPAddress, ...]:
        """One address out of each prefix for the pod; the same ones on repeat. On disk when this returns.

        Raises AddressesExhausted. A pod's addresses outside `prefixes` (the node's subnet has changed) are given up.
        """
        held = [r for r in self._by_address.values() if r.uid == uid]
        by_prefix = {prefix: r for prefix in prefixes for r in held if r.address in prefix}
        statements: list[_Statement] = []
        fresh: list[Reservation] = []
        since = now.isoformat()
        for prefix in prefixes:
            if prefix in by_prefix:
                continue
            address = pick_address(prefix, self._by_address, self._last.get(prefix))
            fresh.append(Reservation(address, uid, namespace, name, since))
            statements.append(("INSERT OR REPLACE INTO last_given VALUES (?, ?)", (str(prefix), str(address))))
            statements.append(("INSERT INTO reservation VALUES (?, ?, ?, ?, ?)", (str(address), uid, namespace, name, since)))
        stale = [r for r in held if r not in by_prefix.values()]
        statements += [("DELETE FROM reservation WHERE address = ?", (str(r.address),)) for r in stale]
        # In memory first, before anything is awaited: nobody else may pick these addresses meanwhile.
        for reservation in fresh:
            self._by_address[reservation.address] = reservation
        self._last |= {prefix: r.address for prefix in prefixes for r in fresh if r.address in prefix}
        try:
            await self._write(statements)
        except sqlite3.Error:
            for reservation in fresh:
                self._by_address.pop(reservation.address, None)
            raise
        for reservation in stale:
            self._by_address.pop(reservation.address, None)
        mine = self.of(uid)
        return tuple(ip for prefix in prefixes for ip in mine if ip in prefix)

    async def release(self, uid: str) -> None:
        """Give up the pod's addresses. Call it when no link has them any more. Unknown uid: nothing."""
        held = self.of(uid)
        if not held:
            return
        await self._write([("DELETE FROM reservation WHERE uid = ?", (uid,))])
        for address in held:
            self._by_address.pop(address, None)

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


def _retrieve(written: asyncio.Future[None]) -> None:
    if not written.cancelled():
        written.exception()
