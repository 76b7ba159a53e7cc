"""A proxy: Services into one node's kernel, kube-proxy's job, with no pods and no overlay.

    Node, Services, EndpointSlices → facts → rules; repair, health-check ports, acknowledgements, metrics

One that ends leaves its rules; the next one goes on from there.
"""

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from random import Random

from podwire.agent.acknowledge import Acknowledger
from podwire.agent.clientmetrics import ClientMetrics
from podwire.agent.health import Health
from podwire.agent.healthchecks import HealthCheckPorts
from podwire.agent.localnet import concerns_rules
from podwire.agent.process import process_text
from podwire.agent.proxy.connections import endpoint_connections, invalid_packets, localhost_connections, service_connections
from podwire.agent.proxy.metrics import ProxyMetrics, rule_counts
from podwire.agent.proxy.nodename import likely_names
from podwire.agent.proxy.status import ProxyHealth
from podwire.agent.proxymodes.port import CountsRules, MakeRules, OtherModes, ServiceRules
from podwire.agent.serviceranges import ServiceRanges
from podwire.agent.services import SERVICE_SELECTOR, SLICE_SELECTOR, ServiceSync
from podwire.client.api import ApiClient
from podwire.client.informer import Change, Informer
from podwire.kernel.port import Kernel, KernelError
from podwire.model.acknowledgement import Speaker
from podwire.model.addr import IPNetwork
from podwire.model.errors import InvalidInput
from podwire.model.ids import ObjectKey
from podwire.model.meta import ObjectMeta
from podwire.model.objects import EndpointSlice, Node, Service
from podwire.model.ops import SetSysctl
from podwire.model.proxyconfig import ProxyConfig, conntrack_switches
from podwire.model.resources import ENDPOINTSLICES, NODES, SERVICES
from podwire.model.servicetable import NodeFacts
from podwire.plan.proxyfacts import (
    depends_on_interfaces,
    listening_places,
    own_addresses,
    primary_addresses,
    proxy_facts,
    untold_families,
)

log = logging.getLogger(__name__)

TO_BE_DELETED = "ToBeDeletedByClusterAutoscaler"
"""A taint: the node is about to go, and balancers shall look elsewhere."""

SETTLE_SECONDS = 0.2
"""How long changes of the node gather: addresses come in groups."""
TOLERATED_SECONDS = 60.0
"""So long rules may be wrong before the proxy calls itself unhealthy: twice kube-proxy's sync period."""
NODE_PATIENCE_SECONDS = 30.0
"""So long a Node is waited for that is not there yet, or has no address: kube-proxy's."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ProxyEnvironment:
    """What a proxy works with; all of it stays the caller's to close. `make_rules` and `others`: see `ServiceSync`.

    service_cidrs: where the API server has no ServiceCIDR objects. `boot`: the machine's boot id."""

    node: str
    config: ProxyConfig
    kernel: Kernel
    client: ApiClient
    make_rules: MakeRules
    others: OtherModes | None = None
    service_cidrs: tuple[IPNetwork, ...] = ()
    cpus: int = 1
    boot: str = ""
    tolerated_seconds: float = TOLERATED_SECONDS
    node_patience_seconds: float = NODE_PATIENCE_SECONDS
    clock: Callable[[], datetime] = field(default=lambda: datetime.now(UTC))
    rng: Random = field(default_factory=Random)


class ProxyAgent:
    """`run` until cancelled."""

    def __init__(self, env: ProxyEnvironment) -> None:
        self._env = env
        self._health = Health()
        client, rng = env.client, env.rng
        self._nodes = Informer(client, NODES, Node, field_selector=f"metadata.name={env.node}", rng=rng)
        self._services = Informer(client, SERVICES, Service, label_selector=SERVICE_SELECTOR, rng=rng)
        self._slices = Informer(client, ENDPOINTSLICES, EndpointSlice, label_selector=SLICE_SELECTOR, rng=rng)
        self._sync = ServiceSync(
            env.kernel, self._services, self._slices, self._health, rng, make_rules=self._make_rules, others=env.others
        )
        self._rules: ServiceRules | None = None
        self.metrics = ProxyMetrics(
            wall=lambda: env.clock().timestamp(),
            loop_time=time.monotonic,
            mode=lambda: self._sync.mode or env.config.proxy_mode,
        )
        self._sync.subscribe(self.metrics.round)
        self._services.subscribe(self.metrics.service_heard)
        self._slices.subscribe(self.metrics.slice_heard)
        self._requests = ClientMetrics()
        client.subscribe(self._requests.asked)
        self._ports = HealthCheckPorts(self._sync, env.kernel, lambda: self.health().healthy)
        self._acknowledger = Acknowledger(client, Speaker(env.node, env.boot), self._sync, env.clock, rng)
        self._node = Node(metadata=ObjectMeta(name=env.node))
        """As it was last seen whole; until then as much of it as there is."""
        self._node_was_whole = False
        self._node_seen = asyncio.Event()
        self._ranges = ServiceRanges(client, env.service_cidrs, rng, self._node_seen.set)
        self._by_node_cidr = env.config.detect_local_mode == "NodeCIDR"
        self._nodes.subscribe(self._node_changed)

    # --- what it says of itself -----------------------------------------------------------------------------------

    async def programmed(self) -> None:
        """Returns once the rules are right for the first time."""
        await self._sync.programmed()

    @property
    def mode(self) -> str:
        """The mode in use, or the one that is about to be."""
        return str(self.metrics.mode())

    @property
    def health_check_ports(self) -> dict[int, ObjectKey]:
        return self._ports.ports

    def health(self) -> ProxyHealth:
        success = self.metrics.last_success
        updated = datetime.fromtimestamp(success, UTC) if success else None
        pending = self._sync.pending_since
        waited = asyncio.get_running_loop().time() - pending if pending is not None else 0.0
        healthy = updated is not None and waited < self._env.tolerated_seconds
        why = "; ".join(f"{subject}: {reason}" for subject, reason in sorted(self._health.degraded.items()))
        if updated is not None and not healthy and not why:
            why = f"changes have waited for {waited:.0f} s"
        return ProxyHealth(healthy, self._eligible(), updated, why or ("" if updated else "nothing is programmed yet"))

    async def metrics_text(self) -> str:
        """For /metrics. Raises KernelError."""
        text = self.metrics.text(self._health.repaired, self._health.degraded, self._acknowledger.last)
        text += self._requests.text() + process_text()
        if self._rules is None:
            return text
        counted, tables = await self._rules.connections(endpoints=False), self.metrics.tables
        text += service_connections(counted, tables)
        if isinstance(self._rules, CountsRules):
            text += rule_counts(self._rules.rule_counts()) + localhost_connections(counted, tables) + invalid_packets(counted)
        return text

    async def endpoints_text(self) -> str:
        """For /metrics/endpoints. Raises KernelError."""
        if self._rules is None:
            return ""
        return endpoint_connections(await self._rules.connections(endpoints=True), self.metrics.tables)

    def _make_rules(self, facts: NodeFacts) -> ServiceRules:
        self._rules = self._env.make_rules(facts)
        return self._rules

    def _eligible(self) -> bool:
        node = self._nodes.get(ObjectKey("", self._env.node))
        if node is None:
            return True  # not known (yet): as kube-proxy has it
        return node.metadata.deletion_timestamp is None and not any(taint.key == TO_BE_DELETED for taint in node.spec.taints)

    # --- running --------------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Until cancelled. Raises InvalidInput where the configuration does not fit this node."""
        async with asyncio.TaskGroup() as group:
            for informer in (self._nodes, self._services, self._slices):
                group.create_task(informer.run())
            await self._set_switches()
            group.create_task(self._ranges.run())
            await self._ranges.known()
            self._node = await self._first_node()
            facts = await self._facts()
            group.create_task(self._listen())
            group.create_task(self._ports.run())
            group.create_task(self._acknowledger.run())
            await self._services.synced()
            await self._slices.synced()
            group.create_task(self._sync.run(facts))
            await self._follow_node(facts)

    async def _set_switches(self) -> None:
        """The connection tracker's, as configured. Those that may not be written here are left as they are."""
        switches = conntrack_switches(self._env.config.conntrack, cpus=self._env.cpus)
        applied = await self._env.kernel.apply(tuple(SetSysctl(key, value) for key, value in switches.items()))
        for failure in applied.failures:
            log.info("left as it is: %s", failure.message)

    async def _first_node(self) -> Node:
        """The Node, once it has what is needed of it. After a while without, as kube-proxy has it, as much of it as there is:
        but where its pod CIDRs tell which pods are this node's, there is no going on without."""
        await self._nodes.synced()
        patience = None if self._by_node_cidr else self._env.node_patience_seconds
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(patience):
                while True:
                    self._node_seen.clear()
                    if await self._node_is_known():
                        return self._node
                    await self._node_seen.wait()
        served = ", ".join(map(str, primary_addresses(self._env.config, self._node)))
        log.warning(
            "going on without what is not known of node %s, whose own addresses are taken to be %s",
            self._env.node,
            served or "none (see --bind-address)",
        )
        return self._node

    async def _node_is_known(self) -> bool:
        """Whether the Node is there, with what is needed of it; said, when that changes. It is kept for when it goes."""
        node = self._nodes.get(ObjectKey("", self._env.node))
        lacking = self._lacking(node)
        if node is not None and not (lacking and self._node_was_whole):
            self._node = node
        if not lacking:
            self._node_was_whole = True
            self._health.works("node")
            return True
        reason = f"node {self._env.node} {lacking}"
        if self._health.degraded.get("node") != reason:
            self._health.failed("node", reason)
            log.warning("%s (yet)%s", reason, await self._advice() if node is None else "")
        return False

    def _lacking(self, node: Node | None) -> str:
        """In words; empty where nothing is."""
        if node is None:
            return "does not exist"
        if not primary_addresses(self._env.config, node):
            return "has no InternalIP or ExternalIP"
        if self._by_node_cidr and not (node.spec.pod_cidr or node.spec.pod_cidrs):
            return "has no podCIDR, which detectLocalMode NodeCIDR needs"
        return ""

    async def _advice(self) -> str:
        likely = await likely_names(self._env.client, own_addresses(await self._env.kernel.observe()))
        return f"; is it this host's? --hostname-override says which{f': {likely}' if likely else ''}"

    async def _facts(self) -> NodeFacts:
        """What rules depend on; health-check ports are told where to listen. Raises InvalidInput."""
        config, state = self._env.config, await self._env.kernel.observe()
        self._ports.set_places(listening_places(config, self._node, state))
        facts = proxy_facts(config, self._node, state, self._ranges.networks)
        if untold := untold_families(config, self._node, facts):
            log.warning(
                "%s: nothing tells this node's pods from other clients (see --cluster-cidr, --detect-local-mode): users of a "
                "ClusterIP are seen with their own addresses, so answers to those that are no pods may not find the way back",
                ", ".join(family.value for family in untold),
            )
        return facts

    async def _follow_node(self, facts: NodeFacts) -> None:
        """Zone, addresses and pod CIDRs may change, and where ClusterIPs come from. A Node that goes is remembered."""
        while True:
            await self._node_seen.wait()
            await asyncio.sleep(SETTLE_SECONDS)
            self._node_seen.clear()
            try:
                await self._node_is_known()
                new = await self._facts()
            except (InvalidInput, KernelError) as error:
                log.warning("node %s changed, and its rules cannot follow: %s", self._env.node, error)
                self._health.failed("node", error)
                continue
            if new != facts:
                facts = new
                self._sync.set_facts(facts)

    def _node_changed(self, change: Change[Node]) -> None:
        if change.old is None or change.new is None or _differ(change.old, change.new):
            self._node_seen.set()

    async def _listen(self) -> None:
        """Compare the rules with the kernel whenever somebody else changed some. The node's addresses count too."""
        while True:
            events = self._env.kernel.events()
            try:
                async for event in events:
                    if concerns_rules(event):
                        self._sync.request_resync(event.subject)
                    if event.what in ("address", "lost") and depends_on_interfaces(self._env.config, self._node):
                        self._node_seen.set()
            except KernelError as error:
                log.warning("kernel notifications: %s; comparing everything", error)
            finally:
                await events.aclose()
            self._sync.request_resync()
            await asyncio.sleep(1.0)


def _differ(old: Node, new: Node) -> bool:
    """Whether anything changed that rules depend on: most changes of Nodes are heartbeats."""
    return _facts_of(old) != _facts_of(new)


def _facts_of(node: Node) -> tuple[object, ...]:
    return node.spec.pod_cidr, node.spec.pod_cidrs, node.status.addresses, node.metadata.labels
