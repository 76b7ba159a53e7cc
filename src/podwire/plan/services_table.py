"""Service + EndpointSlices (or a Pod's host ports) → `ServiceTable`: kube-proxy's semantics by name (compat.md D5)."""

import ipaddress
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache

import msgspec

from podwire.model.addr import IPNetwork
from podwire.model.objects import EndpointHints, EndpointSlice, Pod, Service, ServicePort, ServiceSpec
from podwire.model.servicetable import Backend, Frontend, FrontendKind, NodeFacts, Pool, ServiceTable, backend

PROTOCOLS = {"TCP": 6, "UDP": 17, "SCTP": 132}

_PROXY_NAME_LABEL = "service.kubernetes.io/service-proxy-name"
PROXY_NAME = "podwire"
"""The label's value that stands for podwire. Any other is another proxy's, and kube-proxy serves none that has the label."""

_HEADLESS_LABEL = "service.kubernetes.io/headless"

_NOTHING = ServiceTable()
_NOBODY: frozenset[bytes] = frozenset()
_ADDRESS_BYTES = {"IPv4": 4, "IPv6": 16}
LOOPBACK = bytes((127, 0, 0, 1))
"""A frontend on it serves the node's own processes, whose source (127.0.0.1 too) must not leave the node."""
_OCTETS = {str(n): bytes((n,)) for n in range(256)}


@lru_cache(maxsize=1 << 14)
def _pack_network(text: str) -> bytes:
    """The first three numbers of an IPv4 address."""
    a, b, c = text.split(".")
    return _OCTETS[a] + _OCTETS[b] + _OCTETS[c]


def pack_address(text: str) -> bytes | None:
    """An address → its 4 or 16 bytes; None for anything else (one bad object must not stop the others)."""
    # A dictionary of the 256 spellings is ten times as fast as ipaddress, and takes neither " 1" nor "01".
    try:
        if ":" in text:
            return ipaddress.IPv6Address(text).packed
        network, _, last = text.rpartition(".")
        return _pack_network(network) + _OCTETS[last]
    except (KeyError, ValueError):
        plain = without_leading_zeros(text)
        return pack_address(plain) if plain != text else None


def without_leading_zeros(text: str) -> str:
    """010.0.0.1 is 10.0.0.1 to Kubernetes, which has such addresses from before they were refused, and to kube-proxy
    (ParseIPSloppy); to others it is octal, or no address. The same at an IPv6 address's end, and for networks."""
    address, slash, length = text.partition("/")
    head, colon, tail = address.rpartition(":")
    if "." not in tail:
        return text
    return head + colon + ".".join(number.lstrip("0") or number[-1:] for number in tail.split(".")) + slash + length


@lru_cache(maxsize=1 << 12)
def _pack_port(port: int) -> bytes:
    """What a backend's bytes end with."""
    return backend(b"", port)


def ignored(service: Service) -> bool:
    """Whether no node ever programs anything for it: headless, an alias, or another proxy's."""
    spec = service.spec
    return (
        service.headless
        or spec.type == "ExternalName"
        or service.metadata.labels.get(_PROXY_NAME_LABEL, PROXY_NAME) != PROXY_NAME
    )


# --- endpoints ----------------------------------------------------------------------------------------------------


class _Source(msgspec.Struct, frozen=True, gc=False):
    """One slice: the addresses of its endpoints that are ready, and of those that are not but still serve while they terminate;
    which of both are `here`, on this node; those of both that no node is named for; and the hints of the ready ones that have
    any."""

    piece: EndpointSlice
    length: int
    ready: list[bytes]
    leaving: list[bytes]
    ready_here: list[bytes]
    leaving_here: list[bytes]
    anywhere: list[bytes]
    hints: list[EndpointHints]


def _source(piece: EndpointSlice, here: str) -> _Source | None:
    """None for a slice that is not for nodes."""
    # A node plans for all endpoints of the cluster: this and `_pools` are most of the time that it takes.
    length = _ADDRESS_BYTES.get(piece.address_type, 0)
    if not length or _HEADLESS_LABEL in piece.metadata.labels:
        return None
    pack = pack_address
    ready: list[bytes] = []
    leaving: list[bytes] = []
    ready_here: list[bytes] = []
    leaving_here: list[bytes] = []
    anywhere: list[bytes] = []
    hints: list[EndpointHints] = []
    for endpoint in piece.endpoints:
        addresses = endpoint.addresses
        if not addresses or not (address := pack(addresses[0])) or len(address) != length:
            continue
        conditions, node = endpoint.conditions, endpoint.node_name
        if conditions.ready is not False:
            ready.append(address)
            if node == here:
                ready_here.append(address)
            if endpoint.hints is not None:
                hints.append(endpoint.hints)
        elif conditions.serving and conditions.terminating:
            leaving.append(address)
            if node == here:
                leaving_here.append(address)
        else:
            continue
        if not node:
            anywhere.append(address)
    return _Source(piece, length, ready, leaving, ready_here, leaving_here, anywhere, hints)


def _by_topology(ready: list[Backend], hints: list[EndpointHints], facts: NodeFacts) -> list[Backend]:
    """PreferSameNode, else PreferSameZone, else all."""
    for value, names in (
        (facts.name, [[n.name for n in h.for_nodes] for h in hints]),
        (facts.zone, [[z.name for z in h.for_zones] for h in hints]),
    ):
        if value and all(names) and any(value in n for n in names):
            return [b for b, n in zip(ready, names, strict=True) if value in n]
    return ready


def _pool(backends: Iterable[Backend], *, drop: bool = False) -> Pool:
    # Sorted: the order must not depend on the order of slices. A set: slices may overlap while they are reshuffled.
    return Pool(tuple(sorted(set(backends))), drop=drop)


class _Pools(msgspec.Struct, frozen=True, gc=False):
    """The two answers to "where to?": to the cluster's endpoints, or only to this node's."""

    cluster: Pool
    local: Pool


def _pools(port: ServicePort, sources: list[_Source], facts: NodeFacts, needs_local: bool) -> _Pools:
    offers = [
        (source, _pack_port(target.port))
        for source in sources
        for target in source.piece.ports
        if target.name == port.name and target.protocol == port.protocol and target.port
    ]
    chosen = [address + tail for source, tail in offers for address in source.ready]
    if chosen:
        hints = [hint for source, _ in offers for hint in source.hints]
        chosen = _by_topology(chosen, hints, facts) if len(hints) == len(chosen) else chosen
    else:
        chosen = [address + tail for source, tail in offers for address in source.leaving]
    cluster = _pool(chosen)
    if not needs_local:
        return _Pools(cluster, cluster)
    local = [address + tail for source, tail in offers for address in source.ready_here]
    if not local:
        local = [address + tail for source, tail in offers for address in source.leaving_here]
    return _Pools(cluster, _pool(local, drop=bool(chosen)))


# --- frontends ----------------------------------------------------------------------------------------------------


class _Place(msgspec.Struct, frozen=True, gc=False):
    """One address that a Service is reached at, and how."""

    address: bytes
    kind: FrontendKind
    source_ranges: tuple[tuple[bytes, bytes], ...] | None = None


def service_table(service: Service | None, slices: Sequence[EndpointSlice], facts: NodeFacts) -> ServiceTable:
    """All that `facts`' node has to serve for one Service. Nothing for None and for what nodes ignore."""
    if service is None or ignored(service):
        return _NOTHING
    spec = service.spec
    inside_local = spec.internal_traffic_policy == "Local"
    outside_local = spec.external_traffic_policy == "Local" and _reached_from_outside(service)
    sources = [source for piece in slices if (source := _source(piece, facts.name)) is not None]
    frontends: dict[tuple[bytes, int, int], Frontend] = {}
    cluster_ips: list[bytes] = []
    for length in _address_lengths(spec):
        of_family = [source for source in sources if source.length == length]
        own = _packed_of(spec.cluster_ips or (spec.cluster_ip,), length)
        cluster_ips += own
        places = [_Place(address, FrontendKind.CLUSTER_IP) for address in own]
        if spec.type != "ClusterIP" or spec.external_ips:
            places += _outside_places(service, facts, length)
        for port in spec.ports:
            pools = _pools(port, of_family, facts, inside_local or outside_local)
            for frontend in _frontends(spec, port, places, pools, inside_local, outside_local):
                frontends.setdefault((frontend.address, frontend.protocol, frontend.port), frontend)
    ready: set[bytes] = set()
    others: list[bytes] = []
    for source in sources:
        ready.update(source.ready_here)
        others += source.leaving_here
        others += source.anywhere
    return ServiceTable(
        tuple(frontends.values()),
        frozenset(ready.union(others)) if ready or others else _NOBODY,
        tuple(cluster_ips),
        health_check_port=spec.health_check_node_port if outside_local and spec.type == "LoadBalancer" else 0,
        # A pod of both families is listed in both.
        local_ready=max(map([len(address) for address in ready].count, _ADDRESS_BYTES.values())) if ready else 0,
    )


def _reached_from_outside(service: Service) -> bool:
    return service.spec.type in ("NodePort", "LoadBalancer") or bool(service.spec.external_ips)


def _address_lengths(spec: ServiceSpec) -> tuple[int, ...]:
    families = spec.ip_families
    if not families:
        ips = spec.cluster_ips or (spec.cluster_ip,)
        families = tuple(dict.fromkeys("IPv6" if ":" in ip else "IPv4" for ip in ips if ip))
    return _lengths_of(families)


@lru_cache(maxsize=16)
def _lengths_of(families: tuple[str, ...]) -> tuple[int, ...]:
    return tuple(_ADDRESS_BYTES[f] for f in families if f in _ADDRESS_BYTES)


def _outside_places(service: Service, facts: NodeFacts, length: int) -> Iterator[_Place]:
    """A Service's addresses of one family, but its ClusterIPs."""
    spec = service.spec
    if spec.type in ("NodePort", "LoadBalancer"):
        for address in _node_addresses(facts, length):
            yield _Place(address, FrontendKind.NODE_PORT)
    if spec.type == "LoadBalancer":
        # ipMode Proxy: the balancer itself answers on that address, so packets to it have to leave the node.
        texts = [i.ip for i in service.status.load_balancer.ingress if i.ip_mode != "Proxy"]
        for address in _packed_of(texts, length):
            yield _Place(address, FrontendKind.LOAD_BALANCER, _source_ranges(spec, facts, address))
    for address in _packed_of(spec.external_ips, length):
        yield _Place(address, FrontendKind.EXTERNAL_IP)


def _node_addresses(facts: NodeFacts, length: int) -> tuple[bytes, ...]:
    """Where the node itself listens, in one family."""
    addresses = tuple(ip.packed for ip in facts.node_ips if ip.max_prefixlen == 8 * length)
    return (*addresses, LOOPBACK) if facts.loopback and length == len(LOOPBACK) else addresses


def _packed_of(texts: Sequence[str], length: int) -> list[bytes]:
    return [packed for text in texts if (packed := pack_address(text)) is not None and len(packed) == length]


def _frontends(
    spec: ServiceSpec, port: ServicePort, places: list[_Place], pools: _Pools, inside_local: bool, outside_local: bool
) -> Iterator[Frontend]:
    protocol = PROTOCOLS.get(port.protocol)
    if protocol is None:
        return
    affinity = spec.session_affinity_config.client_ip.timeout_seconds if spec.session_affinity == "ClientIP" else 0
    for place in places:
        address, kind = place.address, place.kind
        if kind is FrontendKind.CLUSTER_IP:
            inside = pools.local if inside_local else pools.cluster
            yield Frontend(
                address, protocol, port.port, kind, inside, affinity_s=affinity, port_name=port.name, inside_local=inside_local
            )
            continue
        number = port.node_port if kind is FrontendKind.NODE_PORT else port.port
        if number:
            outside = pools.local if outside_local else None
            masquerade = not outside_local or address == LOOPBACK
            yield Frontend(
                address,
                protocol,
                number,
                kind,
                pools.cluster,
                outside=outside,
                masquerade=masquerade,
                affinity_s=affinity,
                source_ranges=place.source_ranges,
                port_name=port.name,
            )


def _source_ranges(spec: ServiceSpec, facts: NodeFacts, address: bytes) -> tuple[tuple[bytes, bytes], ...] | None:
    """The family's loadBalancerSourceRanges without overlaps; None: not restricted. The node itself, whose address is
    among them, may also use the balancer's address as its source."""
    if not spec.load_balancer_source_ranges:
        return None
    version = 4 if len(address) == 4 else 6
    read = [_network(text) for text in spec.load_balancer_source_ranges]
    networks = [network for network in read if network is not None and network.version == version]
    if not networks:
        # One that cannot be read may have been meant for this family: then nobody is let in, rather than everybody.
        return () if None in read else None
    if any(ip in network for ip in facts.node_ips for network in networks):
        networks.append(ipaddress.ip_network(address))
    merged: Iterator[IPNetwork] = ipaddress.collapse_addresses(networks)  # type: ignore[type-var]
    return tuple((n.network_address.packed, n.broadcast_address.packed) for n in merged)


@lru_cache(maxsize=1 << 10)
def _network(text: str) -> IPNetwork | None:
    try:
        return ipaddress.ip_network(without_leading_zeros(text.strip()), strict=False)
    except ValueError:
        return None


def unreadable(service: Service) -> tuple[str, ...]:
    """What of a Service's addresses and ranges is none, in words."""
    if ignored(service):
        return ()
    spec = service.spec
    addresses = {
        "clusterIPs": spec.cluster_ips or tuple(filter(None, (spec.cluster_ip,))),
        "externalIPs": spec.external_ips,
        "status.loadBalancer": tuple(i.ip for i in service.status.load_balancer.ingress if i.ip),
    }
    found = [f"{field}: {text!r}" for field, texts in addresses.items() for text in texts if pack_address(text) is None]
    ranges = (text for text in spec.load_balancer_source_ranges if _network(text) is None)
    return (*found, *(f"loadBalancerSourceRanges: {text!r}" for text in ranges))


def cluster_ips_of_others(services: Iterable[Service]) -> frozenset[bytes]:
    """The packed ClusterIPs of those of these Services that another proxy serves."""
    texts = (text for s in services if ignored(s) for text in s.spec.cluster_ips or (s.spec.cluster_ip,))
    return frozenset(packed for text in texts if (packed := pack_address(text)) is not None)


# --- host ports ---------------------------------------------------------------------------------------------------


def host_port_table(pod: Pod | None, facts: NodeFacts) -> ServiceTable:
    """The host ports of a pod of this node: to the pod alone, its clients' addresses kept."""
    if pod is None or pod.spec.host_network or pod.finished:
        return _NOTHING
    addresses = [a for a in map(pack_address, pod.ips) if a]
    frontends: dict[tuple[bytes, int, int], Frontend] = {}
    for container in pod.spec.containers:
        for port in container.ports:
            protocol = PROTOCOLS.get(port.protocol)
            if not port.host_port or protocol is None:
                continue
            for pod_address in addresses:
                pool = Pool((backend(pod_address, port.container_port),))
                for address in _host_addresses(port.host_ip, len(pod_address), facts):
                    key = (address, protocol, port.host_port)
                    local = address == LOOPBACK
                    frontends.setdefault(key, Frontend(*key, FrontendKind.HOST_PORT, pool, masquerade=local))
    return ServiceTable(tuple(frontends.values()), frozenset(addresses) if frontends else frozenset())


def _host_addresses(host_ip: str, length: int, facts: NodeFacts) -> tuple[bytes, ...]:
    """Where a host port listens: on the address it names, or on all of the node's of the pod address's family."""
    packed = pack_address(host_ip) if host_ip else None
    if packed is not None and any(packed):
        return (packed,) if len(packed) == length else ()
    if packed is not None and len(packed) != length:
        return ()  # 0.0.0.0 and :: mean one family
    return _node_addresses(facts, length)
