"""What a node remembers of its network: with it, an agent that starts while the API is away can serve container engines.

A hold on subnets that has an end (a lease in etcd) is good until then, by the clock that counts since boot: after a reboot it
is not known how late it is. A hold without one (a Node's podCIDRs) is good until the API says otherwise.
"""

import asyncio
import ipaddress
import logging
import sqlite3
from collections.abc import Callable
from dataclasses import dataclass
from math import inf

import msgspec

from podwire.agent.reservations import Reservations
from podwire.agent.subnets.etcd import boot_time
from podwire.agent.subnets.port import Holding, OwnLease
from podwire.model.addr import IPNetwork

log = logging.getLogger(__name__)

LOOK_SECONDS = 60.0
"""Between looks at whether the hold ends at another time now."""

_MTU_RANGE = range(576, 65536)


class _Record(msgspec.Struct, frozen=True, omit_defaults=True):
    """As it is on disk (JSON). `until`: seconds since the boot `boot`."""

    subnets: tuple[str, ...]
    mtu: int
    boot: str
    until: float | None = None


@dataclass(frozen=True, slots=True)
class Remembered:
    """`mtu`: of containers' links. `until`: `boot_time` at which the hold ends; infinite where it has no end."""

    subnets: tuple[IPNetwork, ...]
    mtu: int
    until: float = inf


class NetworkMemory:
    """Kept with the node's reservations. `boot`: this boot's id."""

    def __init__(self, reservations: Reservations, boot: str, clock: Callable[[], float] = boot_time) -> None:
        self._reservations, self._boot, self._clock = reservations, boot, clock
        self._changed = asyncio.Event()

    def recall(self) -> Remembered | None:
        """What can be relied on; None: nothing."""
        raw = self._reservations.remembered
        if raw is None:
            return None
        try:
            record = msgspec.json.decode(raw, type=_Record)
            subnets = tuple(map(ipaddress.ip_network, record.subnets))
        except ValueError as error:
            log.warning("what this node remembers of its network cannot be read: %s", error)
            return None
        if not subnets or len({s.version for s in subnets}) < len(subnets) or record.mtu not in _MTU_RANGE:
            log.warning("what this node remembers of its network makes no sense: %s", record)
            return None
        if record.until is not None and (record.boot != self._boot or self._clock() >= record.until):
            return None
        return Remembered(subnets, record.mtu, inf if record.until is None else record.until)

    def withheld(self, remembered: Remembered, own: OwnLease) -> str:
        """Why no address may be given by what is remembered; "" where it may. `own`: what the subnet manager says. That nobody
        answers is no reason while the hold lasts; whoever has no lease that ends says no such thing."""
        if own.held is not None:
            return "" if own.held.subnets == remembered.subnets else "it has other subnets now"
        if own.holding is Holding.NONE and remembered.until < inf:
            return "" if self._clock() < remembered.until else "its lease has run out, and nobody could be asked"
        return own.why

    async def forget(self) -> None:
        """The node has other subnets now. What the disk does not take is told."""
        try:
            await self._reservations.remember(None)
        except sqlite3.Error as error:
            log.warning("that this node has other subnets now cannot be written to disk: %s", error)

    def touched(self) -> None:
        """The hold has changed: do not wait to look."""
        self._changed.set()

    async def follow(self, own: Callable[[], OwnLease], mtu: int) -> None:
        """Remember what the node holds, until cancelled."""
        while True:
            self._changed.clear()
            try:
                await self._reservations.remember(self._record(own(), mtu))
            except sqlite3.Error as error:
                log.warning("the node's subnets cannot be written to disk: %s; tried again", error)
            try:
                async with asyncio.timeout(LOOK_SECONDS):
                    await self._changed.wait()
            except TimeoutError:
                continue

    def _record(self, own: OwnLease, mtu: int) -> bytes | None:
        if own.holding is not Holding.HELD or own.lease is None:
            return None
        until = None if own.until == inf else own.until
        return msgspec.json.encode(_Record(tuple(map(str, own.lease.subnets)), mtu, self._boot, until))
