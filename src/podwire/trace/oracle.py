"""What the Kubernetes API promises a new connection: worked out from the API's documentation, one connection at a time.

Nothing here knows of tables, maps or chains, and nothing is shared with the planner: an oracle that had the planner's mistakes
would prove nothing. It is written to be read beside the documentation, not to be fast. Sources: "Virtual IPs and Service
Proxies", "EndpointSlices", "Topology Aware Routing", the field comments of core/v1 and discovery/v1, and, where those are
silent, kube-proxy's behaviour (docs/reference/services.md says where).
"""

import enum
import ipaddress
import re
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

from podwire.model.addr import IPAddress, IPNetwork
from podwire.model.objects import Endpoint, EndpointSlice, Pod, Service, ServicePort
from podwire.model.servicetable import NodeFacts

Target = tuple[IPAddress, int]
"""Where a connection arrives: address and port."""


@dataclass(frozen=True, slots=True)
class Cluster:
    """All that decides about connections on one node. `pods`: those of this node, for their host ports."""

    node: NodeFacts
    services: tuple[tuple[Service, tuple[EndpointSlice, ...]], ...] = ()
    pods: tuple[Pod, ...] = ()


@dataclass(frozen=True, slots=True)
class Connection:
    """A connection's first packet as it is sent. `protocol` is the API's word. `made_here`: by a process of the node itself;
    `interface`: else the node's device that it comes in by."""

    src: IPAddress
    dst: IPAddress
    protocol: str
    port: int
    made_here: bool = False
    interface: str = ""


class Outcome(enum.Enum):
    SERVED = "goes to an endpoint"
    REFUSED = "is refused"
    DROPPED = "is dropped"
    UNTOUCHED = "goes where it is addressed to"


@dataclass(frozen=True, slots=True)
class Promise:
    """`targets`: where it may arrive, each as likely as the others. `masqueraded`: those of them that see the node's address
    as its source. `memory`: under which name the client is remembered, for its next connections to go where this one went; ""
    if it is not. `why`: the rule of the API that decides, for humans."""

    outcome: Outcome
    targets: frozenset[Target] = frozenset()
    masqueraded: frozenset[Target] = frozenset()
    why: str = ""
    memory: str = ""

    def to_one_who_knows(self, visited: Collection[Target]) -> frozenset[Target]:
        """Where the connection may arrive if the client's earlier ones of the same `memory` did at `visited`."""
        return (self.memory and self.targets.intersection(visited)) or self.targets


def promise(cluster: Cluster, connection: Connection) -> Promise:
    """What must become of the connection on `cluster.node`."""
    if cluster.node.loopback and connection.dst.version == 4 and connection.dst.is_loopback and not connection.made_here:
        return Promise(Outcome.DROPPED, why="a loopback address is nobody else's business")
    claims = sorted(_claims(cluster, connection), key=lambda claim: (claim.rank, claim.owner))
    if claims:
        return claims[0].answer()
    used = {ip for service, _ in cluster.services if _served(service) for ip in _cluster_ips(service)}
    if connection.dst in used:
        return Promise(Outcome.REFUSED, why="the Service at this ClusterIP has no such port")
    if _within(connection.dst, cluster.node.service_cidrs):
        return Promise(Outcome.DROPPED, why="no Service has this ClusterIP")
    return _served_by(cluster.node, connection, [(connection.dst, connection.port)], set(), "no Service", Outcome.UNTOUCHED)


# --- who claims an address ----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Claim:
    """Something that answers at the connection's address, protocol and port."""

    rank: int
    owner: str
    node: NodeFacts
    connection: Connection

    def answer(self) -> Promise:
        raise TypeError("a claim is one of its subclasses")


@dataclass(frozen=True, slots=True)
class _HostPort(_Claim):
    pod_ip: IPAddress
    container_port: int

    def answer(self) -> Promise:
        target = (self.pod_ip, self.container_port)
        seen = {target} if self.connection.dst.is_loopback else set()
        return _served_by(self.node, self.connection, [target], seen, f"host port of {self.owner}")


@dataclass(frozen=True, slots=True)
class _ClusterIP(_Claim):
    service: Service
    port: ServicePort
    listed: tuple["_Listed", ...]

    def answer(self) -> Promise:
        local_only = self.service.spec.internal_traffic_policy == "Local"
        pool = _local(self.listed, self.node) if local_only else _anywhere(self.listed, self.node)
        known_outsider = self.node.tells_pods(self.connection.dst.version) and not _of_a_pod_here(self.node, self.connection)
        everyone = self.node.masquerade_all or known_outsider
        return self._to(pool, set(pool) if everyone else set(), f"ClusterIP of {self.owner}")

    def _to(self, pool: Sequence[Target], seen: set[Target], why: str) -> Promise:
        if pool:
            served = _served_by(self.node, self.connection, pool, seen, why)
            return replace(served, memory=self._memory())
        if _usable(self.listed):
            return Promise(Outcome.DROPPED, why=f"{why}: endpoints, but none on this node")
        return Promise(Outcome.REFUSED, why=f"{why}: no endpoints")

    def _memory(self) -> str:
        """A client stays with its endpoint of a port, whichever of the Service's addresses it uses: affinity is a property of
        the Service; only ports may have different endpoints."""
        if self.service.spec.session_affinity != "ClientIP":
            return ""
        return f"{self.owner} {self.port.protocol} {self.port.name}"


@dataclass(frozen=True, slots=True)
class _External(_ClusterIP):
    """A NodePort, a balancer's address or an external IP."""

    ranges: tuple[str, ...] = ()

    def answer(self) -> Promise:
        why = f"an external address of {self.owner}"
        if not self._let_in():
            return Promise(Outcome.DROPPED, why=f"{why}: source not in loadBalancerSourceRanges")
        if self.service.spec.external_traffic_policy != "Local":
            pool = _anywhere(self.listed, self.node)
            return self._to(pool, set(pool), why)
        if self.connection.made_here:
            pool = _anywhere(self.listed, self.node)
            return self._to(pool, set(pool), f"{why}, from the node itself")
        if _of_a_pod_here(self.node, self.connection):
            return self._to(_anywhere(self.listed, self.node), set(), f"{why}, from a pod of this node")
        return self._to(_local(self.listed, self.node), set(), f"{why}, policy Local")

    def _let_in(self) -> bool:
        read = [_network(text) for text in self.ranges]
        networks = [n for n in read if n is not None and n.version == self.connection.dst.version]
        if not networks:
            return None not in read
        if _within(self.connection.src, networks):
            return True
        # A node that holds the balancer's address may use it as its source: it counts as the node itself.
        return self.connection.src == self.connection.dst and any(_within(ip, networks) for ip in self.node.node_ips)


def _of_a_pod_here(node: NodeFacts, connection: Connection) -> bool:
    """As the node is told to tell: by the device that packets come in by, or by their address."""
    if not node.local_interfaces:
        return _within(connection.src, node.local_pods)
    names = [(name.rstrip("*"), name.endswith("*")) for name in node.local_interfaces]
    return any(connection.interface.startswith(n) if any_end else connection.interface == n for n, any_end in names)


def _claims(cluster: Cluster, connection: Connection) -> Iterator[_Claim]:
    for service, slices in cluster.services:
        if _served(service) and f"IPv{connection.dst.version}" in _families(service):
            for port in service.spec.ports:
                if port.protocol == connection.protocol:
                    yield from _service_claims(cluster.node, connection, service, port, slices)
    for pod in cluster.pods:
        yield from _host_port_claims(cluster.node, connection, pod)


def _service_claims(
    node: NodeFacts, connection: Connection, service: Service, port: ServicePort, slices: Sequence[EndpointSlice]
) -> Iterator[_Claim]:
    dst, spec = connection.dst, service.spec
    owner = f"{service.metadata.namespace}/{service.metadata.name}"
    listed = tuple(_listed(port, slices, dst.version))
    fixed = (owner, node, connection, service, port, listed)
    if connection.port == port.node_port and spec.type in ("NodePort", "LoadBalancer") and dst in _node_addresses(node):
        yield _External(1, *fixed)
    if connection.port != port.port:
        return
    if dst in _cluster_ips(service):
        yield _ClusterIP(0, *fixed)
    ingress = service.status.load_balancer.ingress if spec.type == "LoadBalancer" else ()
    if any(_address(i.ip) == dst and i.ip_mode != "Proxy" for i in ingress):
        yield _External(2, *fixed, ranges=spec.load_balancer_source_ranges)
    if any(_address(ip) == dst for ip in spec.external_ips):
        yield _External(3, *fixed)


def _host_port_claims(node: NodeFacts, connection: Connection, pod: Pod) -> Iterator[_Claim]:
    if pod.spec.host_network or pod.finished:
        return
    for container in pod.spec.containers:
        for port in container.ports:
            if (port.protocol, port.host_port) != (connection.protocol, connection.port):
                continue
            wanted = _address(port.host_ip)
            anywhere = wanted is None or (wanted.is_unspecified and wanted.version == connection.dst.version)
            if connection.dst == wanted or (anywhere and connection.dst in _node_addresses(node)):
                for ip in map(_address, pod.ips):
                    if ip is not None and ip.version == connection.dst.version:
                        yield _HostPort(4, f"pod {pod.key}", node, connection, ip, port.container_port)


def _served(service: Service) -> bool:
    """Whether nodes have to do anything: headless Services and aliases are DNS's, and a label names another proxy."""
    labels = service.metadata.labels
    return not (
        service.spec.cluster_ip == "None"
        or service.spec.type == "ExternalName"
        or labels.get("service.kubernetes.io/service-proxy-name", "podwire") != "podwire"
    )


def _families(service: Service) -> set[str]:
    return set(service.spec.ip_families) or {f"IPv{ip.version}" for ip in _cluster_ips(service)}


def _cluster_ips(service: Service) -> list[IPAddress]:
    texts = service.spec.cluster_ips or (service.spec.cluster_ip,)
    return [ip for text in texts if (ip := _address(text)) is not None]


def _node_addresses(node: NodeFacts) -> set[IPAddress]:
    return {*node.node_ips, *([ipaddress.IPv4Address("127.0.0.1")] if node.loopback else [])}


# --- which endpoints ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Listed:
    """One mention of an endpoint, in some slice, for the Service's port."""

    target: Target
    endpoint: Endpoint

    @property
    def ready(self) -> bool:
        """nil means unknown, which consumers shall take for ready."""
        return self.endpoint.conditions.ready in (None, True)

    @property
    def leaving(self) -> bool:
        """Terminating, but still able to serve; a nil `serving` says what `ready` says."""
        conditions = self.endpoint.conditions
        serving = self.ready if conditions.serving is None else conditions.serving
        return not self.ready and serving and conditions.terminating is True


def _listed(port: ServicePort, slices: Iterable[EndpointSlice], version: int) -> Iterator[_Listed]:
    for piece in slices:
        if piece.address_type != f"IPv{version}" or "service.kubernetes.io/headless" in piece.metadata.labels:
            continue
        for target_port in piece.ports:
            if (target_port.name, target_port.protocol) != (port.name, port.protocol) or not target_port.port:
                continue
            for endpoint in piece.endpoints:
                # All addresses of an endpoint are alike, so the first is enough.
                ip = _address(endpoint.addresses[0]) if endpoint.addresses else None
                if ip is not None and ip.version == version:
                    yield _Listed((ip, target_port.port), endpoint)


def _usable(listed: Sequence[_Listed]) -> list[_Listed]:
    """Ready ones; if there are none at all, those that still serve while they terminate."""
    return [one for one in listed if one.ready] or [one for one in listed if one.leaving]


def _local(listed: Sequence[_Listed], node: NodeFacts) -> list[Target]:
    """For a policy of Local: hints do not count."""
    return [one.target for one in _usable([one for one in listed if one.endpoint.node_name == node.name])]


def _anywhere(listed: Sequence[_Listed], node: NodeFacts) -> list[Target]:
    """Of all usable ones: those meant for this node, else those meant for its zone, else all. Hints only count when every
    ready endpoint has them and some are for us."""
    usable = _usable(listed)
    if any(one.ready for one in usable):
        for_node = [_names(one, "for_nodes") for one in usable]
        for_zone = [_names(one, "for_zones") for one in usable]
        for mine, hints in ((node.name, for_node), (node.zone, for_zone)):
            if mine and all(hints) and any(mine in names for names in hints):
                return [one.target for one, names in zip(usable, hints, strict=True) if mine in names]
    return [one.target for one in usable]


def _names(one: _Listed, kind: str) -> set[str]:
    hints = one.endpoint.hints
    return {hint.name for hint in getattr(hints, kind)} if hints is not None else set()


# --- whom they see ------------------------------------------------------------------------------------------------------


def _served_by(
    node: NodeFacts,
    connection: Connection,
    targets: Sequence[Target],
    by_policy: set[Target],
    why: str,
    outcome: Outcome = Outcome.SERVED,
) -> Promise:
    """`by_policy`: the targets for which the Service's rules want the node's address as the source. Two more cases want it:
    a client of this node that is its own server (its answer would not come back this way; another node's pods have their own
    node for that), and a pod that leaves the cluster."""
    masqueraded = set()
    for target in targets:
        ip = target[0]
        if ip in node.node_ips and not connection.made_here:
            continue  # it arrives on this machine: there is no device for it to leave by
        of_this_node = _within(connection.src, node.pod_cidrs)
        itself = outcome is Outcome.SERVED and ip == connection.src and (of_this_node or connection.made_here)
        pod_leaves = of_this_node and not _within(ip, node.cluster_cidrs or node.pod_cidrs) and not ip.is_multicast
        if target in by_policy or itself or pod_leaves:
            masqueraded.add(target)
    return Promise(outcome, frozenset(targets), frozenset(masqueraded), why)


def _within(ip: IPAddress, networks: Iterable[IPNetwork]) -> bool:
    return any(ip in network for network in networks if network.version == ip.version)


def _address(text: str) -> IPAddress | None:
    try:
        return ipaddress.ip_address(_decimal(text))
    except ValueError:
        return None


def _network(text: str) -> IPNetwork | None:
    try:
        return ipaddress.ip_network(_decimal(text.strip()), strict=False)
    except ValueError:
        return None


def _decimal(text: str) -> str:
    """010 is ten, as Kubernetes reads addresses (to others it is octal, or none); in IPv6 it makes no difference."""
    return re.sub(r"(?<![0-9a-fA-F])0+(?=[0-9a-fA-F])", "", text)
