"""The balancer outside the cluster: picks a node for each connection to a LoadBalancer address, by routing (decision 0008).

It has one multipath route per address, and what makes a node eligible is what cloud balancers go by: it is Ready, not
excluded by label, and for `externalTrafficPolicy: Local` it has a ready endpoint of its own.
"""

import asyncio
import ipaddress
import logging
from collections.abc import Iterable, Mapping, Sequence
from ipaddress import ip_address
from typing import Any

from podwire.client.api import ApiClient
from podwire.client.informer import Informer
from podwire.kernel.port import Kernel
from podwire.lab.topology import UPLINK
from podwire.model.addr import IPAddress, IPNetwork
from podwire.model.ids import NetnsName, ObjectKey
from podwire.model.kernelstate import NextHop, Route
from podwire.model.objects import EndpointSlice, Node, Service
from podwire.model.ops import DelRoute, Op, Plan, SetRoute
from podwire.model.resources import ENDPOINTSLICES, NODES, SERVICES

log = logging.getLogger(__name__)

EXCLUDE_LABEL = "node.kubernetes.io/exclude-from-external-load-balancers"
"""As the service controller reads it: the label counts, whatever its value."""

_RETRY_SECONDS = 1.0

Versions = Mapping[ObjectKey, str]
"""resourceVersion of each object of a kind."""


def plan_routes(
    services: Iterable[Service], slices: Iterable[EndpointSlice], nodes: Iterable[Node]
) -> Mapping[IPNetwork, Route]:
    """The balancer's routes by address. An address without an eligible node has none: its clients hear "unreachable"."""
    hops = {node.metadata.name: node.internal_ips for node in sorted(nodes, key=lambda n: n.metadata.name) if _eligible(node)}
    local = _nodes_with_endpoints(slices)
    routes: dict[IPNetwork, Route] = {}
    for service in sorted(services, key=lambda s: s.key):
        if service.spec.type != "LoadBalancer":
            continue
        only = local.get(service.key, set()) if service.spec.external_traffic_policy == "Local" else None
        candidates = [ips for name, ips in hops.items() if only is None or name in only]
        for ingress in service.status.load_balancer.ingress:
            if ingress.ip:
                address = ip_address(ingress.ip)
                dst = ipaddress.ip_network(address)
                route = _route(dst, [ip for ips in candidates if (ip := _of_version(ips, address.version)) is not None])
                if route is not None:
                    routes.setdefault(dst, route)
    return routes


def _eligible(node: Node) -> bool:
    return node.ready and EXCLUDE_LABEL not in node.metadata.labels and not node.metadata.deletion_timestamp


def _nodes_with_endpoints(slices: Iterable[EndpointSlice]) -> Mapping[ObjectKey, set[str]]:
    """Service → the nodes that have a ready endpoint of it."""
    found: dict[ObjectKey, set[str]] = {}
    for piece in slices:
        homes = found.setdefault(ObjectKey(piece.metadata.namespace, piece.service), set())
        homes.update(e.node_name for e in piece.endpoints if e.node_name and e.conditions.ready is not False)
    return found


def _of_version(addresses: Sequence[str], version: int) -> IPAddress | None:
    return next((ip for ip in map(ip_address, addresses) if ip.version == version), None)


def _route(dst: IPNetwork, hops: Sequence[IPAddress]) -> Route | None:
    if not hops:
        return None
    if len(hops) == 1:
        return Route(dst, dev=UPLINK, via=hops[0])
    return Route(dst, nexthops=tuple(NextHop(via, UPLINK) for via in hops))


def plan_changes(current: Mapping[IPNetwork, Route], wanted: Mapping[IPNetwork, Route], ns: NetnsName) -> Plan:
    """From the routes that are there to those that should be: new ways first, then what is no longer wanted."""
    ops: list[Op] = [SetRoute(route, ns) for dst, route in wanted.items() if current.get(dst) != route]
    ops += [DelRoute(route, ns) for dst, route in current.items() if dst not in wanted]
    return tuple(ops)


class Balancer:
    """Keeps the routes in the balancer's namespace current. `ns` is its label at `kernel`."""

    def __init__(self, client: ApiClient, kernel: Kernel, ns: NetnsName) -> None:
        self._kernel, self._ns = kernel, ns
        self._services = Informer(client, SERVICES, Service)
        self._slices = Informer(client, ENDPOINTSLICES, EndpointSlice)
        self._nodes = Informer(client, NODES, Node)
        self._routes: Mapping[IPNetwork, Route] = {}
        self._changed = asyncio.Event()

    def has_programmed(self, services: Versions, slices: Versions) -> bool:
        """Whether the routes in the kernel follow from these Services and EndpointSlices (key → resourceVersion)."""
        known = (self._services, services), (self._slices, slices)
        current = all({k: o.metadata.resource_version for k, o in i.items().items()} == wanted for i, wanted in known)
        return current and not self._changed.is_set() and self._routes == self._wanted()

    async def run(self) -> None:
        """Until cancelled."""
        informers: tuple[Informer[Any], ...] = (self._services, self._slices, self._nodes)
        async with asyncio.TaskGroup() as tasks:
            for informer in informers:
                informer.subscribe(lambda _: self._changed.set())
                tasks.create_task(informer.run())
            for informer in informers:
                await informer.synced()
            while True:
                await self._changed.wait()
                self._changed.clear()
                await self._program()

    def _wanted(self) -> Mapping[IPNetwork, Route]:
        return plan_routes(self._services.items().values(), self._slices.items().values(), self._nodes.items().values())

    async def _program(self) -> None:
        wanted = self._wanted()
        plan = plan_changes(self._routes, wanted, self._ns)
        if not plan:
            return
        applied = await self._kernel.apply(plan)
        if applied.ok:
            self._routes = wanted
            return
        failed = {failure.op for failure in applied.failures}
        log.warning("%d of %d routes of the balancer failed, first: %s", len(failed), len(plan), applied.failures[0])
        # A route that may or may not be there counts as not: SetRoute replaces, and a second DelRoute does no harm.
        self._routes = {dst: route for dst, route in wanted.items() if SetRoute(route, self._ns) not in failed}
        await asyncio.sleep(_RETRY_SECONDS)
        self._changed.set()
