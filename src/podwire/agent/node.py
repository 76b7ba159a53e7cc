"""The node's agent: what the API promises for this node becomes what its kernel holds and its runtime runs.

    register → own subnets → adopt what is there → peers, pods, Services, host ports; and repair, from then on

An agent that ends takes nothing with it: pods, links and rules stay, and the next agent adopts them untouched.
"""

import asyncio
import logging
import sqlite3
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import replace
from datetime import UTC, datetime
from random import Random

from podwire.agent.acknowledge import Acknowledger
from podwire.agent.attachments import AttachmentEnvironment, Attachments
from podwire.agent.cniserver import CniServer
from podwire.agent.cnispool import Spool
from podwire.agent.config import AgentConfig
from podwire.agent.guest import GuestPresence
from podwire.agent.health import AgentStatus, Health
from podwire.agent.healthchecks import HealthCheckPorts
from podwire.agent.memory import NetworkMemory
from podwire.agent.mirror import Mirror
from podwire.agent.nodelock import NodeLock
from podwire.agent.nodeoverlay import NodeOverlay, Overlay, SubnetsChanged
from podwire.agent.peers import PeerSync
from podwire.agent.plumbing import Plumbing
from podwire.agent.pods import Pods
from podwire.agent.podworker import PodEnvironment
from podwire.agent.ports import PodRuntime
from podwire.agent.presence import Presence
from podwire.agent.proxymodes.modes import ProxyModes
from podwire.agent.registration import NodeState, own_attrs, read_machine
from podwire.agent.repair import Repair
from podwire.agent.reservations import Reservations
from podwire.agent.serviceranges import ServiceRanges
from podwire.agent.services import BY_NAME_SELECTOR, SERVICE_SELECTOR, SLICE_SELECTOR, ServiceSync
from podwire.agent.source import ApiConfigSource
from podwire.agent.subnets.kube import KubeSubnets
from podwire.client.api import ApiClient
from podwire.client.backoff import Backoff
from podwire.client.events import EventRecorder
from podwire.client.informer import Change, Informer
from podwire.kernel.port import Kernel
from podwire.model.acknowledgement import Speaker
from podwire.model.addr import IPNetwork
from podwire.model.errors import PodwireError, Unsupported
from podwire.model.ids import ObjectKey
from podwire.model.netconf import NetConfig, VxlanBackend
from podwire.model.objects import EndpointSlice, Node, Pod, Service
from podwire.model.proxymode import ProxyMode
from podwire.model.resources import ENDPOINTSLICES, NODES, PODS, SERVICES, Resource
from podwire.model.servicetable import NodeFacts
from podwire.plan.node import NodeNetwork, bridge_switches, plan_base

log = logging.getLogger(__name__)

ZONE_LABEL = "topology.kubernetes.io/zone"


def utc_now() -> datetime:
    return datetime.now(UTC)


class NodeAgent:
    """One node. `run` until cancelled; the kernel, the client and the runtime are the caller's to close.

    `clock` gives the time (aware) for what is written to the API; `rng` spreads retries. `overlay`: without it the node's
    subnets are its Node's podCIDRs, and the back end is VXLAN as the configuration says."""

    def __init__(
        self,
        config: AgentConfig,
        kernel: Kernel,
        client: ApiClient,
        runtime: PodRuntime,
        clock: Callable[[], datetime] = utc_now,
        *,
        rng: Random | None = None,
        overlay: Overlay | None = None,
        modes: ProxyModes | None = None,
    ) -> None:
        self.config = config
        self._modes, self._mode = modes, config.proxy_mode
        self._overlay = overlay
        self._kernel, self._client, self._runtime = kernel, client, runtime
        self._clock, self._rng = clock, rng or Random()
        self._health = Health()
        self._ready = asyncio.Event()
        self._memory: NetworkMemory | None = None
        self._presence: Presence | GuestPresence
        if config.guest:
            self._presence = GuestPresence(config, client, clock, self._rng)
        else:
            self._presence = Presence(config, client, read_machine(), clock, self._rng, annotate=overlay is None)
        self._begin()

    async def set_proxy_mode(self, mode: ProxyMode) -> None:
        """Have Services served by another back end; see `ServiceSync.switch`. Raises KernelError or Unsupported."""
        if self._modes is None or self._sync is None:
            raise Unsupported(f"the proxy mode {mode}", "wait until the node is ready")
        await self._sync.switch(self._modes.make(mode))
        self._mode = mode

    def _new_sync(self) -> ServiceSync:
        sources = (self._services, self._slices, self._health, self._rng)
        if self._modes is None:
            return ServiceSync(self._kernel, *sources)
        return ServiceSync(self._kernel, *sources, self._modes.make(self._mode), self._modes)

    def _begin(self) -> None:
        """All that depends on the node's subnets, or on being told everything from the start."""
        client = self._client
        self._ready.clear()
        self._health.network_ready = False
        self._plumbing = Plumbing(self._kernel)
        self._peers = PeerSync(self._plumbing)
        self._sync: ServiceSync | None = None
        self._served: NodeNetwork | None = None
        self._adopted = False
        mine = f"spec.nodeName={self.config.node_name}"
        self._nodes = Informer(client, NODES, Node, rng=self._rng)
        self._pod_informer = Informer(client, PODS, Pod, field_selector=mine, rng=self._rng)
        services, slices = (SERVICE_SELECTOR, SLICE_SELECTOR) if self.config.services else (BY_NAME_SELECTOR, BY_NAME_SELECTOR)
        self._services = Informer(client, SERVICES, Service, label_selector=services, rng=self._rng)
        self._slices = Informer(client, ENDPOINTSLICES, EndpointSlice, label_selector=slices, rng=self._rng)
        self._ranges_changed = asyncio.Event()
        self._ranges = ServiceRanges(client, self.config.service_cidrs, self._rng, self._ranges_changed.set)

    async def ready(self) -> None:
        """Returns once the node's network and Services are programmed for the first time."""
        await self._ready.wait()

    def has_programmed(self, objects: Mapping[Resource, Mapping[ObjectKey, str]]) -> bool:
        """Whether the kernel holds what follows from these Services, EndpointSlices and Nodes (key → resourceVersion).

        Not so while other versions of them are known here: ask again with newer ones. Nodes count by name alone."""
        if self._sync is None or not self._sync.idle or not self._peers.idle:
            return False
        if self._nodes.items().keys() != objects.get(NODES, {}).keys():
            return False
        return all(
            {key: obj.metadata.resource_version for key, obj in informer.items().items()} == objects.get(informer.resource, {})
            for informer in (self._services, self._slices)
        )

    def status(self) -> AgentStatus:
        return AgentStatus(
            node=self.config.node_name,
            network_ready=self._health.network_ready,
            services_ready=self._health.services_ready,
            pods=len(self._plumbing.pods),
            commits=self._health.commits,
            repairs=self._health.repairs,
            routed_pods=self._health.routed_pods,
            degraded=self._health.degraded | self._plumbing.refused_sysctls,
            repaired=dict(self._health.repaired),
        )

    async def run(self) -> None:
        """Serve the node until cancelled. Raises AnotherAgent where it has an agent already, else only what nobody expected."""
        self.config.state_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
        with ExitStack() as stack:
            stack.callback(NodeLock(self.config.state_dir).close)
            reservations = Reservations(self.config.state_dir / "reservations.db")
            stack.callback(reservations.close)
            self._memory = NetworkMemory(reservations, read_machine().boot_id)
            while True:
                try:
                    await self._run(reservations)
                except* SubnetsChanged as changed:
                    log.warning("node %s begins anew: %s", self.config.node_name, changed.exceptions[0])
                    await self._memory.forget()
                self._begin()

    async def _run(self, reservations: Reservations) -> None:
        events = EventRecorder(self._client, "podwire", host=self.config.node_name, now=self._clock)
        sync = self._new_sync()
        network: asyncio.Future[NodeNetwork] = asyncio.get_running_loop().create_future()
        overlay = self._make_overlay()
        reservations.withheld = overlay.withheld
        env = PodEnvironment(
            config=self.config,
            client=self._client,
            runtime=self._runtime,
            plumbing=self._plumbing,
            reservations=reservations,
            source=ApiConfigSource(self._client),
            events=events,
            network=network,
            set_host_ports=sync.set_host_ports,
            clock=self._clock,
            rng=self._rng,
        )
        self._sync = sync
        engines = self._engines(env, sync)
        self._nodes.subscribe(self._node_changed)
        server = CniServer(self.config.cni_socket, engines) if self.config.cni_socket else None
        if server is not None:
            server.listen()
        async with asyncio.TaskGroup() as group:
            if server is not None:
                group.create_task(server.run())
            pods = Pods(env, self._pod_informer, group)
            for informer in (self._nodes, self._services, self._slices):
                group.create_task(informer.run())
            if not self.config.guest:
                group.create_task(self._pod_informer.run())
            if self.config.services:
                group.create_task(self._ranges.run())
            group.create_task(events.run())
            group.create_task(pods.follow_reports())
            group.create_task(self._serve(env, pods, engines, sync, overlay))

    def _make_overlay(self) -> NodeOverlay:
        config = self.config
        if self._overlay is not None:
            manager, make_tunnel = self._overlay.subnets(self._nodes), self._overlay.tunnel
            tunnel = (lambda backend: make_tunnel(backend, self._health)) if make_tunnel else None
            return NodeOverlay(manager, self._peers, config.vni, self._hold_changed, tunnel)
        vxlan = NetConfig(networks=(), ranges={}, backend=VxlanBackend(vni=config.vni, port=config.vxlan_port))
        kube = KubeSubnets(self._nodes, config.node_name, vxlan, client=self._client, rng=self._rng)
        return NodeOverlay(kube, self._peers, config.vni, self._hold_changed)

    def _hold_changed(self, why: str) -> None:
        """The node holds its subnets, or (`why`) does not at present: what runs goes on, but the peers may not send here."""
        if self._memory is not None:
            self._memory.touched()
        if why:
            self._health.failed("subnets", why)
            self._health.network_ready = False
            self._presence.set_state(NodeState(message=why))
        elif "subnets" in self._health.degraded:
            self._health.works("subnets")
            if self._adopted:
                self._health.network_ready = True
                ready = self._ready.is_set()
                self._presence.set_state(NodeState(network=True, ready=ready, message="Services are not programmed yet"))

    def _engines(self, env: PodEnvironment, sync: ServiceSync) -> Attachments:
        """What container engines have here; known also where none is served now, for what earlier agents attached."""
        socket = self.config.cni_socket or self.config.state_dir / "cni.sock"
        return Attachments(
            AttachmentEnvironment(
                kernel=self._kernel,
                plumbing=self._plumbing,
                reservations=env.reservations,
                set_host_ports=sync.set_host_ports,
                host_ports_programmed=sync.host_ports_programmed,
                services_known=lambda: sync.mode is not None,
                spool=Spool(socket.with_name(socket.name + ".spool")),
                health=self._health,
                clock=self._clock,
                boot=read_machine().boot_id,
            )
        )

    async def _serve(
        self, env: PodEnvironment, pods: Pods, engines: Attachments, sync: ServiceSync, overlay: NodeOverlay
    ) -> None:
        async with asyncio.TaskGroup() as group:
            group.create_task(engines.run())
            joining = group.create_task(self._join(overlay, group))
            await self._begin_by_memory(joining, env.reservations, engines, overlay)
            network = await joining
            group.create_task(overlay.run())
            if self.config.services:
                await self._ranges.known()
            network = await self._adopt(replace(network, service_cidrs=self._ranges.networks), pods, engines)
            group.create_task(overlay.carry())
            env.reservations.withheld = overlay.withheld
            env.network.set_result(network)
            self._adopted = True
            if self._memory is not None:
                group.create_task(self._memory.follow(lambda: overlay.manager.own, network.pod_mtu))
            if self.config.mirror:
                mirror = Mirror(self.config, self._client, self._pod_informer, self._clock, self._rng)
                engines.subscribe(mirror.attached)
                group.create_task(mirror.run())
            self._health.network_ready = True
            self._presence.set_state(NodeState(network=True, message="Services are not programmed yet"))
            repair = Repair(self._kernel, self._plumbing, sync, self._health, self._rng)
            group.create_task(repair.run())
            group.create_task(self._follow_ranges(network, repair))
            group.create_task(self._peers.run(repair))
            await self._services.synced()
            await self._slices.synced()
            self._served = network
            speaker = Speaker(self.config.node_name, read_machine().boot_id)
            group.create_task(Acknowledger(self._client, speaker, sync, self._clock, self._rng).run())
            group.create_task(HealthCheckPorts(sync, self._kernel, self._services_right).run())
            group.create_task(sync.run(self._facts(network)))
            await sync.programmed()
            engines.services_programmed()
            self._presence.set_state(NodeState(network=True, ready=True))
            self._ready.set()

    # --- the node's own network -----------------------------------------------------------------------------------

    async def _join(self, overlay: NodeOverlay, group: asyncio.TaskGroup) -> NodeNetwork:
        await self._presence.register()
        group.create_task(self._presence.run())
        return await self._own_network(overlay)

    async def _own_network(self, overlay: NodeOverlay) -> NodeNetwork:
        """Wait until the node holds its subnets, those of all families at once."""
        cidrs = await overlay.join(self._overlay.backend if self._overlay else own_attrs(self.config))
        return replace(self._network(cidrs), backend=overlay.backend)

    def _network(self, cidrs: tuple[IPNetwork, ...]) -> NodeNetwork:
        config = self.config
        return NodeNetwork(
            name=config.node_name,
            node_ips=config.node_ips,
            pod_cidrs=cidrs,
            service_cidrs=self._ranges.networks,
            uplink=config.uplink,
            underlay_mtu=config.underlay_mtu,
            vni=config.vni,
            port=config.vxlan_port,
            service_route=config.service_route,
        )

    async def _begin_by_memory(
        self, joining: asyncio.Task[NodeNetwork], reservations: Reservations, engines: Attachments, overlay: NodeOverlay
    ) -> None:
        """Serve container engines by what the node remembers, where nobody says soon which subnets it has. All that stands
        stays as it is: the API alone knows the peers and the pods. Host ports wait for the Services."""
        memory, remembered = self._memory, self._memory.recall() if self._memory else None
        if memory is None or remembered is None:
            return
        await asyncio.wait((joining,), timeout=self.config.patience_seconds)
        if joining.done():
            return
        network = replace(self._network(remembered.subnets), node_ips=(), known_mtu=remembered.mtu)
        reservations.withheld = lambda: memory.withheld(remembered, overlay.manager.own)
        try:
            network = await self._bridged_or_routed(network)
            async with engines.opening(network, provisional=True):
                attached = await engines.adoptable(network)
                await self._plumbing.adopt(plan_base(network), {}, (), attached, remove=False)
        except PodwireError as error:
            log.warning("node %s cannot serve container engines before the API answers: %s", self.config.node_name, error)
            return
        subnets = ", ".join(map(str, remembered.subnets))
        log.warning("node %s: nobody answers, containers get addresses of %s as remembered", self.config.node_name, subnets)
        self._health.failed("subnets", f"nobody answers; containers get addresses of {subnets} as remembered")

    async def _adopt(self, network: NodeNetwork, pods: Pods, engines: Attachments) -> NodeNetwork:
        """Take the node over; tries until the kernel agrees. Returns the network as it could be had."""
        backoff = Backoff(self._rng, initial=0.1, maximum=10.0)
        if not self.config.guest:
            await self._pod_informer.synced()
        while True:
            try:
                network = await self._bridged_or_routed(network)
                known = self._peers.wanted()
                adopted = await pods.adoptable(network)
                async with engines.opening(network):
                    attached = await engines.adoptable(network)
                    await self._plumbing.adopt(plan_base(network), known, adopted, attached)
                await pods.clean_up()
                await engines.sweep()
                await engines.work_off()
            except (PodwireError, sqlite3.Error) as error:
                self._health.failed("links", error)
                self._presence.set_state(NodeState(message=str(error)))
                delay = backoff.next()
                log.warning("node %s cannot be programmed: %s; again in %.2f s", self.config.node_name, error, delay)
                await asyncio.sleep(delay)
            else:
                self._peers.adopted(known)
                self._health.works("links")
                return network

    async def _bridged_or_routed(self, network: NodeNetwork) -> NodeNetwork:
        """Whether the bridge can show its traffic to conntrack; if not, the node's pods are routed."""
        refused = await self._plumbing.try_switches(bridge_switches(network))
        if refused and not self._health.routed_pods:
            log.warning("pods are routed, since the bridge's traffic does not meet netfilter: %s", next(iter(refused.values())))
        self._health.routed_pods = bool(refused) or self.config.routed_pods
        return replace(network, routed_pods=self._health.routed_pods)

    def _services_right(self) -> bool:
        return "services" not in self._health.degraded

    def _facts(self, network: NodeNetwork) -> NodeFacts:
        node = self._nodes.get(ObjectKey("", self.config.node_name))
        labels = node.metadata.labels if node else self.config.labels
        return NodeFacts(
            name=self.config.node_name,
            node_ips=self.config.node_ips,
            pod_cidrs=network.pod_cidrs,
            cluster_cidrs=self.config.cluster_cidrs,
            service_cidrs=self._ranges.networks,
            zone=labels.get(ZONE_LABEL, ""),
            loopback=True,
        )

    async def _follow_ranges(self, network: NodeNetwork, repair: Repair) -> None:
        """Where ClusterIPs come from may change: the way to them follows, and what becomes of packets to unused ones."""
        while True:
            await self._ranges_changed.wait()
            self._ranges_changed.clear()
            old, network = network, replace(network, service_cidrs=self._ranges.networks)
            if network == old:
                continue
            log.info("node %s: ClusterIPs come from %s now", self.config.node_name, ", ".join(map(str, network.service_cidrs)))
            if self._sync is not None and self._served is not None:
                self._sync.set_facts(self._facts(network))
            try:
                await self._plumbing.set_base(plan_base(network))
            except PodwireError as error:
                log.warning("node %s: %s", self.config.node_name, error)
                self._health.failed("links", error)
                repair.request_check()

    def _node_changed(self, change: Change[Node]) -> None:
        name = change.key.name
        if name != self.config.node_name:
            return
        if change.new is None:
            log.warning("node %s was deleted from the API; its agent goes on with what it knows", name)
            self._presence.gone()
            return
        self._presence.seen(change.new)
        moved = change.old is not None and change.old.metadata.labels != change.new.metadata.labels
        if moved and self._sync is not None and self._served is not None:
            self._sync.set_facts(self._facts(self._served))
