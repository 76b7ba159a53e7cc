"""The subnet manager that needs nothing but etcd: flannel's leases, side by side with flannel's nodes.

Only the holder of a key may use its subnet, and only until its lease runs out by the node's own clock, which is never later
than in etcd. So no two nodes ever hold one subnet, whoever is cut off from whom. What the node has meanwhile told its pods
stands: they go on, and as soon as etcd answers, the node holds the same subnet again, or (if somebody else has it) a new one.
"""

import asyncio
import logging
import time
from collections.abc import Callable, Mapping
from contextlib import aclosing, suppress
from dataclasses import replace
from math import inf
from random import Random
from types import MappingProxyType

from podwire.agent.subnets.port import Holding, OwnLease, SubnetCounters, SubnetListener
from podwire.agent.subnets.registry import DEFAULT_PREFIX, DEFAULT_TTL, Etcd, LeaseRegistry, Snapshot, Taken
from podwire.client.backoff import Backoff
from podwire.client.etcdmessages import EtcdCompacted, EtcdError, EtcdEvent
from podwire.model.addr import IPNetwork
from podwire.model.errors import InvalidInput, Unsupported
from podwire.model.netconf import NetConfig, parse_net_config
from podwire.plan.leasechoice import Create, Remove, Reuse, StoredLease, SubnetsExhausted, choose, conflict, fits
from podwire.plan.leases import Lease, LeaseAttrs

log = logging.getLogger(__name__)

DEFAULT_MARGIN = 3600.0
"""Seconds before the end at which a lease is renewed; flannel's."""

LONGEST_SLEEP = 60.0
"""The event loop's clock stands while the machine sleeps: so often the real one is looked at."""

QUIET = 300.0
"""Seconds of silence after which a watch is opened anew: a member that hangs keeps its connections."""


def boot_time() -> float:
    """Seconds since boot, those asleep included; nobody can set it."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


class EtcdSubnets:
    """See `port.SubnetManager`. The client is the caller's to close.

    last: the subnets that this node had before, if it remembers. ttl, margin: seconds. clock: of the node, see `boot_time`."""

    def __init__(
        self,
        etcd: Etcd,
        *,
        prefix: str = DEFAULT_PREFIX,
        last: tuple[IPNetwork, ...] = (),
        ttl: int = DEFAULT_TTL,
        margin: float = DEFAULT_MARGIN,
        clock: Callable[[], float] = boot_time,
        rng: Random | None = None,
    ) -> None:
        self._registry = LeaseRegistry(etcd, prefix, ttl, clock)
        self._last, self._clock, self._rng = last, clock, rng or Random()
        self._margin = min(margin, ttl / 2)
        self._attrs = LeaseAttrs()
        self._stored: StoredLease | None = None
        """Our lease as etcd had it last; None when it is known to be lost."""
        self._lease: Lease | None = None
        self._why = ""
        self._deadline = self._due = 0.0
        """When the lease runs out, and when to renew it."""
        self._released = False
        self._strangers: frozenset[int] = frozenset()
        self._peers: dict[str, Lease] = {}
        self._revision = 0
        self._config_text: bytes | None = None
        self._config_revision = 0
        """The configuration as it was read last, and when."""
        self._looked: tuple[bytes, Snapshot] | None = None
        """What was read with it, for the first try to get a lease: each of our writes fails where that is not true any more."""
        self._listeners: list[SubnetListener] = []
        self._told = OwnLease()
        self._changed = asyncio.Event()
        """Our hold on the lease, or its deadline."""
        self.counters = SubnetCounters()

    # --- reading --------------------------------------------------------------------------------------------------

    @property
    def own(self) -> OwnLease:
        if self._lease is None:
            return OwnLease(why=self._why)
        if self._stored is not None and self._clock() < self._deadline:
            return OwnLease(self._lease, Holding.HELD, until=self._deadline)
        return OwnLease(self._lease, Holding.LAPSED, self._why or "it ran out, and etcd did not answer in time to renew it")

    @property
    def peers(self) -> Mapping[str, Lease]:
        return MappingProxyType(self._peers)

    def subscribe(self, listener: SubnetListener) -> None:
        self._listeners.append(listener)
        for node, lease in self._peers.items():
            listener.peer_changed(node, lease)
        if self._told.lease is not None:
            listener.own_changed(self._told)

    async def network_config(self) -> NetConfig:
        backoff = Backoff(self._rng, initial=0.2, maximum=10.0)
        while True:
            try:
                text, seen = await self._registry.look()
            except EtcdError as error:
                await self._wait(backoff, f"the network configuration cannot be read: {error}")
                continue
            self._config_revision = seen.revision
            if text is not None:
                self._config_text, self._looked = text, (text, seen)
                return self._parsed(text)
            await self._wait(
                backoff, f"there is no network configuration yet in etcd: put one at {self._registry.prefix}/config"
            )

    async def next_config(self) -> NetConfig:
        backoff = Backoff(self._rng, initial=0.5, maximum=10.0)
        while True:
            try:
                await self._config_touched()
                text, self._config_revision = await self._registry.config_at()
            except EtcdCompacted:
                self._config_revision = 0
                continue
            except EtcdError as error:
                log.debug("the network configuration cannot be watched: %s", error)  # as the leases cannot, which is told
                await asyncio.sleep(backoff.next())
                continue
            if text is None:
                log.warning("the network configuration was deleted from etcd: this node goes on with what it said")
            elif text != self._config_text:
                self._config_text = text
                return self._parsed(text)

    async def _config_touched(self) -> None:
        """Wait until somebody has written the configuration, or so long that it should be read again anyway."""
        if not self._config_revision:
            return
        with suppress(TimeoutError):
            async with asyncio.timeout(QUIET), aclosing(self._registry.watch_config(self._config_revision)) as changes:
                async for change in changes:
                    if change.events:
                        return

    def _parsed(self, text: bytes) -> NetConfig:
        return parse_net_config(text, source=f"etcd key {self._registry.prefix}/config")

    def suits(self, config: NetConfig) -> bool:
        return self._lease is None or fits(config, self._lease.subnets)

    # --- getting a lease ------------------------------------------------------------------------------------------

    async def acquire(self, attrs: LeaseAttrs) -> Lease:
        self._attrs = attrs
        taken = await self._acquire()
        self._reset_peers(taken.seen)
        return taken.stored.lease

    async def _acquire(self) -> Taken:
        backoff = Backoff(self._rng, initial=0.1, maximum=30.0)
        while True:
            try:
                taken = await self._try_acquire()
                while taken is not None and taken.seen.revision < self._revision:
                    # The watch went past our write before we knew of it: what it told of our key was not understood.
                    taken = await self._registry.confirm(taken)
            except (EtcdError, SubnetsExhausted, InvalidInput, Unsupported) as error:
                await self._wait(backoff, f"no subnet can be leased: {error}")
                continue
            if taken is not None:
                self._take(taken)
                return taken
            self.counters.races += 1
            await asyncio.sleep(min(backoff.next(), 1.0))

    async def _try_acquire(self) -> Taken | None:
        """None: others changed something meanwhile, or something had to be cleared away first; again at once."""
        text, seen = self._looked or await self._registry.look()
        self._looked = None
        if text is None:
            raise InvalidInput(f"there is no network configuration in etcd at {self._registry.prefix}/config: put one there")
        config = self._parsed(text)
        await self._registry.settle(seen)
        match choose(config, seen.leases, self._attrs, self._last, self._rng.randrange, self._strangers):
            case Reuse(stored):
                return await self._registry.reuse(stored, self._attrs)
            case Remove(stored, why):
                log.warning("lease %s is given up: %s", stored.lease.node, why)
                await self._registry.remove(stored)
                return None
            case Create(subnets):
                taken = await self._registry.create(subnets, self._attrs)
        if taken is None:
            return None
        if earlier := conflict(taken.stored, taken.seen.leases):
            log.info("lease %s is given up: %s was faster", taken.stored.lease.node, earlier.lease.node)
            await self._registry.remove(taken.stored)
            return None
        return taken

    def _take(self, taken: Taken) -> None:
        self._stored, self._lease = taken.stored, taken.stored.lease
        self._last = taken.stored.lease.subnets
        self.counters.acquired += 1
        log.info("leased %s", ", ".join(map(str, self._last)))
        self._put_peer(taken.stored.lease.node, None)
        self._hold_until(taken.deadline)

    async def _wait(self, backoff: Backoff, why: str) -> None:
        delay = backoff.next()
        self._why = why
        log.warning("%s; again in %.1f s", why, delay)
        if self._lease is None:
            self._announce()
        await asyncio.sleep(delay)

    # --- keeping it -----------------------------------------------------------------------------------------------

    async def run(self) -> None:
        async with asyncio.TaskGroup() as group:
            group.create_task(self._keep())
            group.create_task(self._tell_when_it_lapses())
            group.create_task(self._follow())

    async def update(self, attrs: LeaseAttrs) -> None:
        self._attrs = attrs
        backoff = Backoff(self._rng, initial=0.1, maximum=10.0)
        while self._stored is not None and not self._says(attrs):
            stored = self._stored
            try:
                now = await self._registry.rewrite(stored, attrs) or await self._registry.current(stored)
            except EtcdError as error:
                self.counters.renew_failures += 1
                delay = backoff.next()
                log.warning(
                    "lease %s cannot say how this node is reached: %s; again in %.1f s", stored.lease.node, error, delay
                )
                await asyncio.sleep(delay)
                continue
            own = self._stored
            if now is not None and own is not None and own.created == now.created and own.modified < now.modified:
                self._stored = now
            elif own is stored:
                await asyncio.sleep(backoff.next())  # it is lost, and the watch, or the next renewal, will say so
        if self._stored is not None and self._lease is not None:
            self._lease = self._stored.lease
            log.info("lease %s says %s now", self._lease.node, attrs.public_ip or attrs.public_ipv6)
            self._announce()

    def _says(self, attrs: LeaseAttrs) -> bool:
        return self._stored is not None and replace(self._stored.lease.attrs, extra=()) == attrs

    async def release(self) -> None:
        stored, self._released = self._stored, True
        if stored is not None:
            self._stored = None
            self._lapse("it was given up")
            await self._registry.remove(stored)

    async def _keep(self) -> None:
        """Renew in time, and get a new lease when there is none any more."""
        backoff = Backoff(self._rng, initial=0.5, maximum=60.0)
        while True:
            if self._released:
                return
            if self._stored is None:
                await self._acquire()
            elif self._clock() < self._due:
                await self._sleep_until(self._due)
            elif await self._renew(self._stored):
                backoff.reset()
            elif self._stored is not None:
                self._due = self._clock() + backoff.next()

    def _hold_until(self, deadline: float) -> None:
        self._deadline, self._due, self._why = deadline, deadline - self._margin, ""
        self._announce()

    async def _renew(self, stored: StoredLease) -> bool:
        try:
            deadline = await self._registry.renew(stored)
        except EtcdError as error:
            self.counters.renew_failures += 1
            log.warning("lease %s cannot be renewed: %s", stored.lease.node, error)
            return False
        if self._stored is not stored:
            return False  # it was lost while we asked
        if deadline is None:
            self._lose("it ran out or was revoked")
            return False
        self.counters.renewed += 1
        self._hold_until(deadline)
        return True

    async def _tell_when_it_lapses(self) -> None:
        while True:
            held = self.own.holding is Holding.HELD
            await self._sleep_until(self._deadline if held else inf)
            if held and self.own.holding is not Holding.HELD:
                self._announce()

    async def _sleep_until(self, moment: float) -> None:
        """Sleep until the clock says `moment` or our hold on the lease changes; or for LONGEST_SLEEP, if that is shorter."""
        changed = self._changed
        try:
            async with asyncio.timeout(min(max(moment - self._clock(), 0.0), LONGEST_SLEEP)):
                await changed.wait()
        except TimeoutError:
            pass

    def _lose(self, why: str) -> None:
        """Our lease is not ours any more."""
        assert self._lease is not None
        self.counters.lost += 1
        log.error("lease %s is lost: %s; getting one again", self._lease.node, why)
        self._stored = None
        self._lapse(why)

    def _lapse(self, why: str) -> None:
        self._why = why
        self._announce()

    def _announce(self) -> None:
        """Tell the listeners if it is news, and wake who waits for it."""
        self._changed.set()
        self._changed = asyncio.Event()
        own = self.own
        if own.holding is Holding.LAPSED and self._told.holding is Holding.LAPSED and own.lease == self._told.lease:
            return
        if own == self._told:
            return
        self._told = own
        for listener in self._listeners:
            listener.own_changed(own)

    # --- the peers ------------------------------------------------------------------------------------------------

    async def _follow(self) -> None:
        backoff = Backoff(self._rng, initial=0.1, maximum=5.0)
        relist = False
        while True:
            try:
                if relist:
                    self.counters.relists += 1
                    self._reset_peers(await self._registry.list())
                    relist = False
                await self._watch(backoff)
            except EtcdCompacted:
                log.info("the history of leases is gone, listing them again")
                relist = True
            except EtcdError as error:
                delay = backoff.next()
                log.warning("leases cannot be watched: %s; again in %.1f s", error, delay)
                await asyncio.sleep(delay)

    async def _watch(self, backoff: Backoff) -> None:
        async with aclosing(self._registry.watch(self._revision)) as changes:
            while True:
                try:
                    async with asyncio.timeout(QUIET):
                        change = await anext(changes)
                except (TimeoutError, StopAsyncIteration):
                    return
                backoff.reset()
                for event in change.events:
                    self._event(event)
                if change.events:
                    # Not the header's: a long backlog comes in pieces, all with the revision of the end.
                    self._revision = change.events[-1].kv.mod_revision
                elif not change.created:
                    self._revision = max(self._revision, change.header.revision)

    def _event(self, event: EtcdEvent) -> None:
        name, subnets = self._registry.subnets_of(event.kv)
        if not subnets:
            return
        stored = self._registry.decode(event.kv) if event.type == "PUT" else None
        own = self._stored
        if own is not None and name == own.lease.node:
            if event.kv.mod_revision <= own.modified:
                return  # from before it was ours
            self._own_event(own, stored)
        self._put_peer(name, stored.lease if stored else None)

    def _own_event(self, own: StoredLease, stored: StoredLease | None) -> None:
        """What others did to our key (a renewal of ours changes no key)."""
        if stored is None:
            self._lose("its key was deleted, or it ran out")
            return
        theirs = stored.lease.attrs
        as_we_say = theirs == own.lease.attrs or replace(theirs, extra=()) == self._attrs
        if stored.lease_id == own.lease_id != 0 or (stored.lease_id == 0 and as_we_say):
            self._stored = stored
            if stored.lease_id == 0:
                self._hold_until(inf)  # somebody made it a reservation
        elif theirs.same_node(self._attrs):
            self._strangers |= {stored.created}
            self._lose(f"another node says that it has our address, {self._attrs.public_ip or self._attrs.public_ipv6}, too")
        else:
            self._lose(f"{theirs.public_ip or theirs.public_ipv6} took it")

    def _reset_peers(self, seen: Snapshot) -> None:
        """Make the peers what a list says. It also tells whether our own lease is still there."""
        self._revision = seen.revision
        found = {stored.lease.node: stored for stored in seen.leases}
        own = self._stored
        if own is not None and seen.revision > own.modified:
            now = found.get(own.lease.node)
            if now is None or now.modified != own.modified:
                self._own_event(own, now)
        for name in [name for name in self._peers if name not in found]:
            self._put_peer(name, None)
        for name, stored in found.items():
            self._put_peer(name, stored.lease)

    def _put_peer(self, name: str, lease: Lease | None) -> None:
        if lease is not None:
            own = self._stored
            if (own is not None and own.lease.node == name) or lease.attrs.same_node(self._attrs):
                lease = None  # our own, or one that we had
        if self._peers.get(name) == lease:
            return
        if lease is None:
            del self._peers[name]
        else:
            self._peers[name] = lease
        for listener in self._listeners:
            listener.peer_changed(name, lease)
