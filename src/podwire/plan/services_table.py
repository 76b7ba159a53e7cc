"""Service + EndpointSlices (or a Pod's host ports) → `ServiceTable`: kube-proxy's semantics by name (compat.md D5)."""

import ipaddress
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from podwire.model.addr import Family
from podwire.model.objects import Endpoint, EndpointSlice, Pod, Service, ServicePort
from podwire.model.servicetable import Backend, Frontend, FrontendKind, NodeFacts, Pool, ServiceTable

PROTOCOLS = {"TCP": 6, "UDP": 17, "SCTP": 132}

_PROXY_NAME_LABEL = "service.kubernetes.io/service-proxy-name"
_HEADLESS_LABEL = "service.kubernetes.io/headless"

_NOTHING = ServiceTable()


def pack_address(text: str) -> bytes:
    """An address → its 4 or 16 bytes. Raises ValueError."""
    if ":" in text:
        return ipaddress.IPv6Address(text).packed
    # int() also takes "+1" and " 1"; isdigit does not. Plain splitting is four times as fast as ipaddress.
    parts = text.split(".")
    if len(parts) != 4 or not all(p.isdigit() for p in parts):
        raise ValueError(f"{text!r} is no IP address")
    return bytes(map(int, parts))


def _packed_or_none(text: str) -> bytes | None:
    try:
        return pack_address(text)
    except ValueError:
        return None


def ignored(service: Service) -> bool:
    """Whether no node ever programs anything for it: headless, an alias, or another proxy's."""
    spec = service.spec
    return service.headless or spec.type == "ExternalName" or _PROXY_NAME_LABEL in service.metadata.labels


# --- endpoints ----------------------------------------------------------------------------------------------------


class _Candidate(NamedTuple):
    """One endpoint of one slice. `usable`: ready; `last_resort`: not ready, but serving while it terminates."""

    address: bytes
    usable: bool
    last_resort: bool
    local: bool
    endpoint: Endpoint


def _candidates(slices: Sequence[EndpointSlice], node: str) -> Iterator[tuple[EndpointSlice, list[_Candidate]]]:
    for piece in slices:
        length = 4 if piece.address_type == "IPv4" else 16 if piece.address_type == "IPv6" else 0
        if not length or _HEADLESS_LABEL in piece.metadata.labels:
            continue
        found = []
        for endpoint in piece.endpoints:
            if not endpoint.addresses or not (address := _packed_or_none(endpoint.addresses[0])) or len(address) != length:
                continue
            conditions = endpoint.conditions
            ready = conditions.ready is not False
            serving = ready if conditions.serving is None else conditions.serving
            last_resort = not ready and serving and conditions.terminating is True
            if ready or last_resort:
                found.append(_Candidate(address, ready, last_resort, endpoint.node_name == node, endpoint))
        yield piece, found


class _Found(NamedTuple):
    """One backend and what speaks for or against it."""

    backend: Backend
    candidate: _Candidate


def _choose(found: list[_Found]) -> list[_Found]:
    """The ready ones; if there are none, those that still serve while they terminate."""
    return [f for f in found if f.candidate.usable] or [f for f in found if f.candidate.last_resort]


def _by_topology(found: list[_Found], facts: NodeFacts) -> list[_Found]:
    """PreferSameNode, else PreferSameZone, else all. Only ever for the whole list: every ready endpoint must have a hint."""
    ready = [f for f in found if f.candidate.usable]
    hints = [f.candidate.endpoint.hints for f in ready]
    if not hints or any(h is None for h in hints):
        return found
    for value, names in (
        (facts.name, [[n.name for n in h.for_nodes] for h in hints if h]),
        (facts.zone, [[z.name for z in h.for_zones] for h in hints if h]),
    ):
        if value and all(names) and any(value in n for n in names):
            return [f for f, n in zip(ready, names, strict=True) if value in n]
    return found


def _pool(found: list[_Found], *, drop: bool = False) -> Pool:
    # Sorted: the order must not depend on the order of slices.
    return Pool(tuple(sorted({f.backend for f in found})), drop=drop)


class _Pools(NamedTuple):
    """The two answers to "where to?": to the cluster's endpoints, or only to this node's."""

    cluster: Pool
    local: Pool


def _pools(
    port: ServicePort, sources: list[tuple[EndpointSlice, list[_Candidate]]], facts: NodeFacts, needs_local: bool
) -> _Pools:
    found: list[_Found] = []
    for piece, candidates in sources:
        for number in [p.port for p in piece.ports if p.name == port.name and p.port]:
            found += [_Found(Backend(c.address, number), c) for c in candidates]
    chosen = _choose(found)
    cluster = _pool(_by_topology(chosen, facts))
    if not needs_local:
        return _Pools(cluster, cluster)
    local = _choose([f for f in found if f.candidate.local])
    return _Pools(cluster, _pool(local, drop=bool(chosen)))


# --- frontends ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Context:
    """What all frontends of one Service have in common."""

    service: Service
    facts: NodeFacts
    affinity_s: int
    inside_local: bool
    outside_local: bool


def service_table(service: Service | None, slices: Sequence[EndpointSlice], facts: NodeFacts) -> ServiceTable:
    """All that `facts`' node has to serve for one Service. Nothing for None and for what nodes ignore."""
    if service is None or ignored(service):
        return _NOTHING
    spec = service.spec
    context = _Context(
        service,
        facts,
        affinity_s=spec.session_affinity_config.client_ip.timeout_seconds if spec.session_affinity == "ClientIP" else 0,
        inside_local=spec.internal_traffic_policy == "Local",
        outside_local=spec.external_traffic_policy == "Local" and _reached_from_outside(service),
    )
    sources = list(_candidates(slices, facts.name))
    frontends: dict[tuple[bytes, int, int], Frontend] = {}
    for length in _address_lengths(service):
        of_family = [(piece, found) for piece, found in sources if found and len(found[0].address) == length]
        addresses = _Addresses.of(context, length)
        for port in spec.ports:
            pools = _pools(port, of_family, facts, context.inside_local or context.outside_local)
            for frontend in _frontends(context, port, pools, addresses):
                frontends.setdefault((frontend.address, frontend.protocol, frontend.port), frontend)
    local = frozenset(c.address for _, found in sources for c in found if c.local)
    return ServiceTable(tuple(frontends.values()), local)


def _reached_from_outside(service: Service) -> bool:
    return service.spec.type in ("NodePort", "LoadBalancer") or bool(service.spec.external_ips)


def _address_lengths(service: Service) -> tuple[int, ...]:
    families = service.spec.ip_families
    if not families:
        ips = service.spec.cluster_ips or (service.spec.cluster_ip,)
        families = tuple(dict.fromkeys("IPv6" if ":" in ip else "IPv4" for ip in ips if ip))
    return tuple(Family(f).bits // 8 for f in families if f in ("IPv4", "IPv6"))


class _Addresses(NamedTuple):
    """A Service's own addresses of one family, by kind."""

    cluster: tuple[bytes, ...]
    node: tuple[bytes, ...]
    external: tuple[bytes, ...]
    balancer: tuple[bytes, ...]
    source_ranges: Callable[[bytes], tuple[tuple[bytes, bytes], ...] | None]

    @classmethod
    def of(cls, context: _Context, length: int) -> "_Addresses":
        service = context.service
        spec = service.spec

        def pick(texts: Sequence[str]) -> tuple[bytes, ...]:
            packed = (_packed_or_none(t) for t in texts if t)
            return tuple(p for p in packed if p is not None and len(p) == length)

        balancer: tuple[bytes, ...] = ()
        if spec.type == "LoadBalancer":
            # ipMode Proxy: the balancer itself answers on that address, so packets to it have to leave the node.
            balancer = pick([i.ip for i in service.status.load_balancer.ingress if i.ip_mode != "Proxy"])
        return cls(
            cluster=pick(spec.cluster_ips or (spec.cluster_ip,)),
            node=tuple(ip.packed for ip in context.facts.node_ips if ip.max_prefixlen == 8 * length),
            external=pick(spec.external_ips),
            balancer=balancer,
            source_ranges=lambda address: _source_ranges(context, address),
        )


def _frontends(context: _Context, port: ServicePort, pools: _Pools, addresses: _Addresses) -> Iterator[Frontend]:
    protocol = PROTOCOLS.get(port.protocol)
    if protocol is None:
        return
    inside = pools.local if context.inside_local else pools.cluster
    for address in addresses.cluster:
        yield Frontend(address, protocol, port.port, FrontendKind.CLUSTER_IP, inside, affinity_s=context.affinity_s)
    outside = pools.local if context.outside_local else None

    def external(address: bytes, number: int, kind: FrontendKind) -> Frontend:
        ranges = addresses.source_ranges(address) if kind is FrontendKind.LOAD_BALANCER else None
        return Frontend(
            address, protocol, number, kind, pools.cluster, outside,
            masquerade=outside is None, affinity_s=context.affinity_s, source_ranges=ranges,
        )  # fmt: skip

    if port.node_port and context.service.spec.type in ("NodePort", "LoadBalancer"):
        for address in addresses.node:
            yield external(address, port.node_port, FrontendKind.NODE_PORT)
    for address in addresses.balancer:
        yield external(address, port.port, FrontendKind.LOAD_BALANCER)
    for address in addresses.external:
        yield external(address, port.port, FrontendKind.EXTERNAL_IP)


def _source_ranges(context: _Context, address: bytes) -> tuple[tuple[bytes, bytes], ...] | None:
    """The family's loadBalancerSourceRanges without overlaps; None: not restricted. The node itself, whose address is
    among them, may also use the balancer's address as its source."""
    texts = context.service.spec.load_balancer_source_ranges
    if not texts:
        return None
    version = 4 if len(address) == 4 else 6
    networks = []
    for text in texts:
        try:
            network = ipaddress.ip_network(text.strip(), strict=False)
        except ValueError:
            continue
        if network.version == version:
            networks.append(network)
    if not networks:
        return None
    if any(ip in network for ip in context.facts.node_ips for network in networks):
        networks.append(ipaddress.ip_network(address))
    merged: Iterator[ipaddress.IPv4Network | ipaddress.IPv6Network] = ipaddress.collapse_addresses(networks)  # type: ignore[type-var]
    return tuple((n.network_address.packed, n.broadcast_address.packed) for n in merged)


# --- host ports ---------------------------------------------------------------------------------------------------


def host_port_table(pod: Pod | None, facts: NodeFacts) -> ServiceTable:
    """The host ports of a pod of this node: to the pod alone, its clients' addresses kept."""
    if pod is None or pod.spec.host_network or pod.finished:
        return _NOTHING
    addresses = [a for a in map(_packed_or_none, pod.ips) if a]
    frontends: dict[tuple[bytes, int, int], Frontend] = {}
    for container in pod.spec.containers:
        for port in container.ports:
            protocol = PROTOCOLS.get(port.protocol)
            if not port.host_port or protocol is None:
                continue
            for pod_address in addresses:
                pool = Pool((Backend(pod_address, port.container_port),))
                for address in _host_addresses(port.host_ip, len(pod_address), facts):
                    key = (address, protocol, port.host_port)
                    frontends.setdefault(key, Frontend(*key, FrontendKind.HOST_PORT, pool))
    return ServiceTable(tuple(frontends.values()), frozenset(addresses) if frontends else frozenset())


def _host_addresses(host_ip: str, length: int, facts: NodeFacts) -> tuple[bytes, ...]:
    """Where a host port listens: on the address it names, or on all of the node's of the pod address's family."""
    packed = _packed_or_none(host_ip) if host_ip else None
    if packed is not None and any(packed):
        return (packed,) if len(packed) == length else ()
    if packed is not None and len(packed) != length:
        return ()  # 0.0.0.0 and :: mean one family
    return tuple(ip.packed for ip in facts.node_ips if ip.max_prefixlen == 8 * length)
