"""Services in the kernel: dirty keys in, one small change of the rules out, whatever the back end."""

import asyncio
import logging
from random import Random

from podwire.agent.health import Health
from podwire.agent.proxymodes.nft import NftRules
from podwire.agent.proxymodes.port import MakeRules, ServiceRules
from podwire.client.backoff import Backoff
from podwire.client.informer import Change, Informer
from podwire.kernel.port import Kernel, KernelError
from podwire.model.ids import ObjectKey
from podwire.model.objects import EndpointSlice, Pod, Service
from podwire.model.servicetable import NodeFacts, ServiceTable
from podwire.plan.services_table import host_port_table
from podwire.plan.staleflows import StaleFlows

log = logging.getLogger(__name__)

SERVICE_SELECTOR = "!service.kubernetes.io/service-proxy-name"
SLICE_SELECTOR = "!service.kubernetes.io/headless"
"""What a proxy has to leave alone, as kube-proxy asks for it."""

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
    ) -> None:
        self._kernel, self._health, self._rng = kernel, health, rng
        self._make_rules: MakeRules = make_rules or (lambda facts: NftRules(kernel, facts))
        self._services = services
        self._slices: dict[ObjectKey, dict[ObjectKey, EndpointSlice]] = {}
        self._dirty: dict[ObjectKey, None] = {}
        self._dirty_ports: dict[str, Pod | None] = {}
        self._wake = asyncio.Event()
        self._resync = True
        self._busy = True
        self._stale = StaleFlows()
        self._port_tables: dict[str, ServiceTable] = {}
        self._programmed = asyncio.Event()
        self._host_ports_asked: list[asyncio.Future[None]] = []
        services.subscribe(self._service_changed)
        slices.subscribe(self._slice_changed)

    def set_host_ports(self, uid: str, pod: Pod | None) -> None:
        """A pod of this node with its addresses in `status.podIPs`, or None when it is gone."""
        self._dirty_ports[uid] = pod
        self._wake.set()

    async def host_ports_programmed(self) -> None:
        """Returns once the kernel has the host ports that were set before this call."""
        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._host_ports_asked.append(done)
        self._wake.set()
        await done

    def request_resync(self) -> None:
        """Compare with the kernel at the next opportunity: somebody may have changed the rules."""
        self._resync = True
        self._wake.set()

    async def programmed(self) -> None:
        """Returns once the rules have been brought up to date for the first time."""
        await self._programmed.wait()

    @property
    def idle(self) -> bool:
        """Whether the kernel holds the rules for all that has been heard of."""
        return not self._busy and not self._wake.is_set()

    async def run(self, facts: NodeFacts) -> None:
        """Program until cancelled. Call it when the informers are synced and the host ports of adopted pods are set:
        until then nothing is touched, because an incomplete plan would take away what an earlier agent made."""
        rules = self._make_rules(facts)
        backoff = Backoff(self._rng, initial=0.05, maximum=30.0)
        loop = asyncio.get_running_loop()
        while True:
            self._busy = True
            self._wake.clear()
            started = loop.time()
            asked, self._host_ports_asked = self._host_ports_asked, []
            try:
                await self._sync(rules, facts)
            except KernelError as error:
                self._host_ports_asked += asked
                self._resync = True
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
            self._busy = False
            await self._wake.wait()
            await asyncio.sleep(max(0.0, started + MIN_INTERVAL - loop.time()))

    async def _sync(self, rules: ServiceRules, facts: NodeFacts) -> None:
        self._feed(rules, facts)
        if self._resync:
            self._resync = False
            commands = await rules.compare()
            if commands and self._health.services_ready:
                self._health.repairs += 1
                self._health.repaired["rules"] += 1
                log.warning("services: rules were not as left; %d commands put them back", commands)
        else:
            commands = await rules.program()
        if commands:
            self._health.commits += 1
        if self._stale:
            await self._forget_stale()

    def _feed(self, rules: ServiceRules, facts: NodeFacts) -> None:
        """Give the back end what changed, and note whose UDP clients may have lost their endpoint."""
        for key in self._dirty:
            slices = tuple(self._slices.get(key, {}).values())
            before = rules.table(key)
            rules.set_service(key, self._services.get(key), slices)
            self._stale.note(before, rules.table(key), slices)
        self._dirty = {}
        for uid, pod in self._dirty_ports.items():
            before = self._port_tables.pop(uid, ServiceTable())
            after = host_port_table(pod, facts)
            rules.set_host_ports(uid, pod)
            if after.frontends:
                self._port_tables[uid] = after
            self._stale.note(before, after)
        self._dirty_ports = {}

    async def _forget_stale(self) -> None:
        """After the rules have changed: before, a client's next packet would lead to the old endpoint again."""
        stale = self._stale.take()
        try:
            forgotten = await self._kernel.forget_flows(stale.matches)
        except KernelError as error:
            self._stale.restore(stale)
            self._health.failed("conntrack", error)
            log.warning("services: stale UDP connections stay for now: %s", error)
            return
        self._health.works("conntrack")
        if forgotten:
            log.info("services: %d UDP connections to endpoints that are gone were forgotten", forgotten)

    def _service_changed(self, change: Change[Service]) -> None:
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
        self._wake.set()
