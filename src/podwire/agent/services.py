"""Services in the kernel: dirty keys in, one small change of the rules out, whatever the back end."""

import asyncio
import contextlib
import errno
import logging
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import fields
from functools import partial
from random import Random

from podwire.agent.health import Health
from podwire.agent.localnet import LocalhostSwitch
from podwire.agent.proxymodes.nft import NftRules
from podwire.agent.proxymodes.port import MakeRules, NamesDifferences, OtherModes, ReadsBack, ServiceRules
from podwire.agent.rounds import OnRound, Round, Served, Versions
from podwire.client.backoff import Backoff
from podwire.client.informer import Change, Informer
from podwire.kernel.port import Kernel, KernelError
from podwire.model.addr import Family, family_of
from podwire.model.errors import Unsupported
from podwire.model.flow import Flow
from podwire.model.ids import ObjectKey
from podwire.model.objects import EndpointSlice, Pod, Service
from podwire.model.proxymode import ProxyMode
from podwire.model.servicetable import NodeFacts, ServiceTable
from podwire.plan.services_maps import place_of
from podwire.plan.services_table import PROXY_NAME, cluster_ips_of_others, host_port_table, unreadable
from podwire.plan.staleflows import UDP, StaleFlows

log = logging.getLogger(__name__)

SERVICE_SELECTOR = ""
"""All: which of them name another proxy is seen here (`services_table.ignored`), for those that name this one are served."""
SLICE_SELECTOR = "!service.kubernetes.io/headless"
"""What is not for nodes, as kube-proxy has it."""

BY_NAME_SELECTOR = f"service.kubernetes.io/service-proxy-name={PROXY_NAME}"
"""Beside another proxy: only what asks for this one. EndpointSlices have their Service's labels."""

WATCH_AGAIN_SECONDS = 0.2
"""Between hearing of a change of unannounced rules and listening again: the comparison it asked for takes its time."""

_MOST_NAMED = 5
MIN_INTERVAL = 0.01
"""Seconds between two commits in a burst. The first change after a pause is committed at once."""


class ServiceSync:
    """Keeps the node's rules in step with Services, EndpointSlices and the host ports of the node's pods.

    Changes gather while a commit runs. After a failure, and at the start, the plan is compared with what the kernel holds;
    so rules that are right already, their counters and affinities, are never touched."""

    def __init__(
        self,
        kernel: Kernel,
        services: Informer[Service],
        slices: Informer[EndpointSlice],
        health: Health,
        rng: Random,
        make_rules: MakeRules | None = None,
        others: OtherModes | None = None,
    ) -> None:
        self._kernel, self._health, self._rng = kernel, health, rng
        self._make_rules: MakeRules = make_rules or (lambda facts: NftRules(kernel, facts))
        self._others = others
        """None once they are being removed."""
        self._services, self._slice_informer = services, slices
        self._slices: dict[ObjectKey, dict[ObjectKey, EndpointSlice]] = {}
        self._dirty: dict[ObjectKey, None] = {}
        self._dirty_ports: dict[str, Pod | None] = {}
        self._wake = asyncio.Event()
        self._resync = True
        self._heard: dict[str, None] = {}
        """What the kernel said that others changed, since the last comparison."""
        self._new_facts: NodeFacts | None = None
        """What the back end in use has still to be told."""
        self._differs = False
        """The kernel is not as planned, and it is our own doing."""
        self._localhost = LocalhostSwitch(kernel, health)
        self._busy = True
        self._put_back = False
        self._waiting: float | None = None
        self._working: float | None = None
        self._stale = StaleFlows()
        self._ports: dict[str, tuple[Pod, ServiceTable]] = {}
        self._switches: list[tuple[MakeRules, asyncio.Future[None]]] = []
        self._removals: dict[ProxyMode | None, asyncio.Task[None]] = {}
        """Work on back ends that were in use; None: on what earlier lives of this program have left."""
        self._programmed = asyncio.Event()
        self._queued: float | None = None
        self._reached: dict[ObjectKey, Served] = {}
        """Services that were fed since the last success."""
        self._versions = Versions()
        self._unread: dict[ObjectKey, None] = {}
        """Services that changed since the kernel was last read back."""
        self._readers: list[asyncio.Future[Versions]] = []
        self._observers: list[OnRound] = []
        self._mode: ProxyMode | None = None
        self._host_ports_asked: list[asyncio.Future[None]] = []
        services.subscribe(self._service_changed)
        slices.subscribe(self._slice_changed)

    def set_host_ports(self, uid: str, pod: Pod | None) -> None:
        """A pod of this node with its addresses in `status.podIPs`, or None when it is gone."""
        self._dirty_ports[uid] = pod
        self._want()

    async def host_ports_programmed(self) -> None:
        """Returns once the kernel has the host ports that were set before this call."""
        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._host_ports_asked.append(done)
        self._wake.set()
        await done

    @property
    def mode(self) -> ProxyMode | None:
        """The back end in use; None before there is one."""
        return self._mode

    def subscribe(self, observer: OnRound) -> None:
        """Calls `observer` after each round from now on."""
        self._observers.append(observer)

    @property
    def versions(self) -> Versions:
        """What has been heard of."""
        slices = self._slice_informer
        return Versions(self._services.resource_version, slices.changed_version, slices.resource_version)

    async def read_back(self) -> Versions:
        """Returns once every Service that changed since the last call has been found in the kernel as it shall be."""
        done: asyncio.Future[Versions] = asyncio.get_running_loop().create_future()
        self._readers.append(done)
        self._wake.set()
        return await done

    def request_resync(self, because: str = "") -> None:
        """Compare with the kernel at the next opportunity: somebody may have changed the rules, as `because` says."""
        self._resync = True
        if because and len(self._heard) < _MOST_NAMED:
            self._heard[because] = None
        self._want()

    def set_facts(self, facts: NodeFacts) -> None:
        """The node changed (its zone, its addresses) while this runs: everything is planned again, what differs programmed."""
        self._new_facts = facts
        self._want()

    async def switch(self, make_rules: MakeRules) -> None:
        """Change the back end while running: the new one is programmed in full, then the old one removed. In between both
        lead to the same endpoints, and established connections are the connection tracker's, so none is dropped.

        Returns once the new one is in use. Raises KernelError or Unsupported where it cannot be; then the old one stays."""
        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._switches.append((make_rules, done))
        self._wake.set()
        await done

    async def programmed(self) -> None:
        """Returns once the rules have been brought up to date for the first time."""
        await self._programmed.wait()

    @property
    def idle(self) -> bool:
        """Whether the kernel holds the rules for all that has been heard of."""
        return not self._busy and not self._wake.is_set()

    @property
    def pending_since(self) -> float | None:
        """Since when (loop time) something waits to be programmed, be it that programming hangs; None: nothing does."""
        return self._working if self._working is not None else self._waiting

    def _want(self) -> None:
        if self._waiting is None:
            self._waiting = asyncio.get_running_loop().time()
        self._wake.set()

    async def run(self, facts: NodeFacts) -> None:
        """Program until cancelled. Call it when the informers are synced and the host ports of adopted pods are set:
        until then nothing is touched, because an incomplete plan would take away what an earlier agent made."""
        async with asyncio.TaskGroup() as group:
            await self._keep(facts, group)

    async def _keep(self, facts: NodeFacts, group: asyncio.TaskGroup) -> None:
        rules = self._make_rules(facts)
        watch = group.create_task(self._watch(rules))
        backoff = Backoff(self._rng, initial=0.05, maximum=30.0)
        flows = Backoff(self._rng, initial=0.1, maximum=30.0)
        loop = asyncio.get_running_loop()
        while True:
            self._busy = True
            self._wake.clear()
            started = loop.time()
            if self._working is None:
                self._working = self._waiting if self._waiting is not None else started
            self._waiting = None
            asked, self._host_ports_asked = self._host_ports_asked, []
            facts = self._refit(rules, facts)
            try:
                await self._sync(rules, facts)
                if (new := await self._switched(rules, facts)) is not None:
                    self._remove(rules.mode, rules.remove, group)
                    rules = new
                    watch.cancel()
                    watch = group.create_task(self._watch(rules))
                self._mode = rules.mode
                await self._answer_readers(rules)
            except (KernelError, Unsupported) as error:
                self._tell(Round(changed={}, full=self._resync, seconds=0.0, queued=started, error=str(error)))
                self._host_ports_asked += asked
                self._resync = True
                # Where the kernel lacks what was to be changed, it was others who took it away.
                self._differs |= not (isinstance(error, KernelError) and error.errno == errno.ENOENT)
                self._health.failed("services", error)
                delay = backoff.next()
                log.warning("services: %s; planning in full again in %.2f s", error, delay)
                await asyncio.sleep(delay)
                continue
            backoff.reset()
            for waiting in asked:
                if not waiting.done():
                    waiting.set_result(None)
            self._health.works("services")
            self._health.services_ready = True
            self._programmed.set()
            self._busy, self._working = False, None
            if self._others is not None:
                self._remove(None, partial(self._others.clean_up, rules), group)
                self._others = None
            if not self._stale:
                flows.reset()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(flows.next() if self._stale else None):
                    await self._wake.wait()
            await asyncio.sleep(max(0.0, started + MIN_INTERVAL - loop.time()))

    async def _answer_readers(self, rules: ServiceRules) -> None:
        readers, self._readers = [future for future in self._readers if not future.done()], []
        if not readers:
            return
        keys = tuple(self._unread)
        try:
            held = (await rules.holds(keys) if isinstance(rules, ReadsBack) else None) if keys else True
            if held is None:
                commands = await rules.compare()
                held = not commands
                self._put_back |= self._repaired(rules, commands)
        except KernelError:
            self._readers += readers
            raise
        if not held:
            self._readers += readers
            self.request_resync()
            return
        self._unread = {}
        for future in readers:
            if not future.done():
                future.set_result(self._versions)

    def _tell(self, done: Round) -> None:
        for observer in self._observers:
            observer(done)

    async def _switched(self, rules: ServiceRules, facts: NodeFacts) -> ServiceRules | None:
        """Carry out what `switch` was first asked for. The back end that is in use now, if it is another."""
        if not self._switches:
            return None
        make, done = self._switches.pop(0)
        if self._switches:
            self._wake.set()
        try:
            new = await self._take_over(make(facts), rules)
        except (KernelError, Unsupported) as error:
            log.warning("services: %s stays in use: %s", rules.mode, error)
            if not done.done():
                done.set_exception(error)
            return None
        self._make_rules = make
        if not done.done():
            done.set_result(None)
        return new if new is not rules else None

    async def _take_over(self, new: ServiceRules, old: ServiceRules) -> ServiceRules:
        """Program all that is known in another back end; the same if it is of the same mode."""
        if new.mode is old.mode:
            return old
        for key, service in self._services.items().items():
            new.set_service(key, service, tuple(self._slices.get(key, {}).values()))
        for uid, (pod, _) in self._ports.items():
            new.set_host_ports(uid, pod)
        for mode in (new.mode, None):
            if mode in self._removals:
                removal = self._removals.pop(mode)
                removal.cancel()
                await asyncio.wait((removal,))
        try:
            await new.compare()
        except (KernelError, Unsupported):
            with contextlib.suppress(KernelError, Unsupported):
                await new.remove()
            raise
        log.info("services: %s has taken over from %s", new.mode, old.mode)
        return new

    def _remove(self, mode: ProxyMode | None, remove: Callable[[], Awaitable[object]], group: asyncio.TaskGroup) -> None:
        """In the background, until it is done: IPVS has to wait for its connections' ends."""

        async def work() -> None:
            backoff = Backoff(self._rng, initial=0.2, maximum=60.0)
            while True:
                try:
                    await remove()
                except (KernelError, Unsupported) as error:
                    self._health.failed("other modes", error)
                    log.warning("services: rules of another proxy mode stay for now: %s", error)
                    await asyncio.sleep(backoff.next())
                else:
                    self._health.works("other modes")
                    self._removals.pop(mode, None)
                    return

        self._removals[mode] = group.create_task(work())

    @property
    def others_removed(self) -> bool:
        """Whether nothing is left of other proxy modes."""
        return self._others is None and not self._removals

    async def _watch(self, rules: ServiceRules) -> None:
        """Ask for a comparison when somebody may have changed rules of which the kernel sends no notice."""
        while True:
            try:
                await rules.changed()
            except (KernelError, Unsupported) as error:
                log.debug("watching %s rules: %s", rules.mode, error)
                await asyncio.sleep(WATCH_AGAIN_SECONDS)
                continue
            self.request_resync()
            await asyncio.sleep(WATCH_AGAIN_SECONDS)

    def _refit(self, rules: ServiceRules, facts: NodeFacts) -> NodeFacts:
        """The facts that hold now; the back end is told of new ones."""
        new, self._new_facts = self._new_facts, None
        if new is None or new == facts:
            return facts
        changed = ", ".join(field.name for field in fields(new) if getattr(new, field.name) != getattr(facts, field.name))
        log.info("services: planned anew, since for node %s this changed: %s", new.name, changed.replace("_", " "))
        rules.set_facts(new)
        self._ports = {uid: (pod, host_port_table(pod, new)) for uid, (pod, _) in self._ports.items()}
        self._resync = self._differs = True
        return new

    async def _sync(self, rules: ServiceRules, facts: NodeFacts) -> None:
        started = asyncio.get_running_loop().time()
        self._feed(rules, facts)
        if not self._programmed.is_set():
            await self._note_what_was_served(rules, facts)
        repaired, self._put_back, full = self._put_back, False, self._resync
        if full:
            if not facts.loopback:
                await self._localhost.forbid()
            expected, self._resync, self._differs = self._differs, False, False
            commands = await rules.compare()
            if not expected:
                repaired |= self._repaired(rules, commands)
        else:
            commands = await rules.program()
        if commands:
            self._health.commits += 1
        programmed = asyncio.get_running_loop().time()
        forgotten = await self._forget_stale(rules) if self._stale else {}
        reached, self._reached = self._reached, {}
        queued, self._queued = self._queued if self._queued is not None else started, None
        self._tell(
            Round(
                changed=reached,
                full=full,
                seconds=programmed - started,
                queued=queued,
                commands=commands,
                repaired=repaired,
                forgotten=forgotten,
                forget_seconds=asyncio.get_running_loop().time() - programmed,
            )
        )
        if facts.loopback and full:
            await self._localhost.allow()

    async def _note_what_was_served(self, rules: ServiceRules, facts: NodeFacts) -> None:
        """Before anything is changed: what is in the kernel tells which Services there were, whatever mode served them."""
        keys = set(await rules.served())
        if self._others is not None:
            keys.update(await self._others.served_by_others(rules))
        served = ((p.address, p.port) for p in map(place_of, keys) if p.protocol == UDP)
        self._stale.note_all(facts.service_cidrs, served, cluster_ips_of_others(self._services.items().values()))

    def _feed(self, rules: ServiceRules, facts: NodeFacts) -> None:
        """Give the back end what changed, and note whose UDP clients may have lost their endpoint."""
        for key in self._dirty:
            slices = tuple(self._slices.get(key, {}).values())
            before = rules.table(key)
            rules.set_service(key, self._services.get(key), slices)
            table = rules.table(key)
            self._stale.note(before, table, slices)
            self._reached[key] = Served(self._services.get(key), slices, table)
        self._unread |= self._dirty
        self._dirty = {}
        self._versions = self.versions
        for uid, pod in self._dirty_ports.items():
            _, before = self._ports.pop(uid, (None, ServiceTable()))
            after = host_port_table(pod, facts)
            rules.set_host_ports(uid, pod)
            if pod is not None and after.frontends:
                self._ports[uid] = (pod, after)
            self._stale.note(before, after)
        self._dirty_ports = {}

    def _repaired(self, rules: ServiceRules, commands: int) -> bool:
        """Take note that comparing took so many commands. Whether that was a repair."""
        heard, self._heard = self._heard, {}
        if not commands or not self._health.services_ready:
            return False
        self._health.repairs += 1
        self._health.repaired["rules"] += 1
        why = f" ({', '.join(heard)})" if heard else ""
        named = ": " + ", ".join(rules.differences) if isinstance(rules, NamesDifferences) else ""
        log.warning("services: rules were not as left%s; %d commands put them back%s", why, commands, named)
        return True

    async def _forget_stale(self, rules: ServiceRules) -> Mapping[Family, int]:
        """After the rules have changed: before, a client's next packet would lead to the old endpoint again."""
        stale = self._stale.take()
        stale.settle(rules.served_at)
        families: Counter[Family] = Counter()

        def wanted(flow: Flow) -> bool:
            if stale.matches(flow):
                families[family_of(flow.original.dst)] += 1
                return True
            return False

        try:
            forgotten = await self._kernel.forget_flows(wanted)
        except KernelError as error:
            self._stale.restore(stale)
            self._health.failed("conntrack", error)
            log.warning("services: stale UDP connections stay for now: %s", error)
            return {}
        self._health.works("conntrack")
        if forgotten:
            log.info("services: %d UDP connections to endpoints that are gone were forgotten", forgotten)
        return families

    def _service_changed(self, change: Change[Service]) -> None:
        unread = unreadable(change.new) if change.new else ()
        if unread and (change.old is None or unread != unreadable(change.old)):
            log.warning("Service %s: left out, since it is no address or range: %s", change.key, "; ".join(unread))
        self._touch(change.key)

    def _slice_changed(self, change: Change[EndpointSlice]) -> None:
        for version in (change.old, change.new):
            if version is None or not version.service:
                continue
            key = ObjectKey(change.key.namespace, version.service)
            if version is change.new:
                self._slices.setdefault(key, {})[change.key] = version
            else:
                self._forget(key, change.key)
            self._touch(key)

    def _forget(self, service: ObjectKey, slice_key: ObjectKey) -> None:
        held = self._slices.get(service, {})
        held.pop(slice_key, None)
        if not held:
            self._slices.pop(service, None)

    def _touch(self, key: ObjectKey) -> None:
        self._dirty[key] = None
        if self._queued is None:
            self._queued = asyncio.get_running_loop().time()
        self._want()
