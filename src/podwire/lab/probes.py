"""Which packets to send to show the paths of a cluster: from API objects to `Probe` values, pure.

The paths are those of the report: container→container, pod→pod on one node, pod→pod across nodes, pod→Service,
outside→NodePort, outside→LoadBalancer, outside→hostPort, outside→hostNetwork.
"""

import contextlib
import enum
import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from ipaddress import ip_address

from podwire.model.addr import IPAddress
from podwire.model.errors import InvalidInput
from podwire.model.objects import Container, ContainerPort, EndpointSlice, Node, Pod, Service, ServicePort
from podwire.wire.packet import endpoint

WORLD, BALANCER = "world", "balancer"
"""The names of the two places outside the cluster: where clients are, and the balancer that picks a node."""

MOST_SERVICES = 20
"""So many Services are probed when nobody names one; a bigger lab is shown by example."""


class Path(enum.StrEnum):
    """A way that packets take, named as the report names it."""

    CONTAINER = "container→container"
    SAME_NODE = "pod→pod, one node"
    ACROSS = "pod→pod, across nodes"
    SERVICE = "pod→Service"
    NODE_PORT = "outside→NodePort"
    LOAD_BALANCER = "outside→LoadBalancer"
    HOST_PORT = "outside→hostPort"
    HOST_NETWORK = "outside→hostNetwork"
    CHOSEN = "chosen"


@dataclass(frozen=True, slots=True)
class Probe:
    """One exchange to try. `origin` is the place it starts from (a node's name, `namespace/pod`, `world`).

    `ends_at`: the places that may answer; `keeps_source`: no address may be rewritten on the way."""

    path: Path
    origin: str
    sender: str
    target: str
    address: IPAddress
    port: int
    protocol: str
    ends_at: frozenset[str]
    keeps_source: bool = False
    crosses_nodes: bool = False
    passes: str = ""


@dataclass(frozen=True, slots=True)
class Snapshot:
    """The objects of a cluster at about one moment."""

    nodes: tuple[Node, ...]
    pods: tuple[Pod, ...]
    services: tuple[Service, ...]
    slices: tuple[EndpointSlice, ...]

    @property
    def running(self) -> list[Pod]:
        """Pods that can send and receive now, by name."""
        return sorted((p for p in self.pods if p.ready and p.ips and not p.metadata.deletion_timestamp), key=lambda p: p.key)

    def node(self, name: str) -> Node | None:
        return next((node for node in self.nodes if node.metadata.name == name), None)


def place_of(pod: Pod) -> str:
    """The place in which a pod's packets are seen: its own namespace, or its node's."""
    return pod.spec.node_name if pod.spec.host_network else str(pod.key)


def choose_probes(snapshot: Snapshot) -> list[Probe]:
    """A probe or more for each path that the cluster's objects make possible, for every family in use."""
    return [
        *_container_probes(snapshot),
        *_pod_probes(snapshot),
        *_service_probes(snapshot),
        *_node_port_probes(snapshot),
        *_load_balancer_probes(snapshot),
        *_host_port_probes(snapshot),
        *_host_network_probes(snapshot),
    ]


def _tcp_port(container: Container) -> ContainerPort | None:
    return next((port for port in container.ports if port.protocol == "TCP"), None)


def _first_port(pod: Pod) -> ContainerPort | None:
    ports = (port for container in pod.spec.containers for port in container.ports)
    return next(iter(sorted(ports, key=lambda port: port.protocol != "TCP")), None)


def _addresses(pod: Pod) -> list[IPAddress]:
    return [ip_address(text) for text in pod.ips]


def _container_probes(snapshot: Snapshot) -> Iterator[Probe]:
    for pod in snapshot.running:
        for server, client in itertools.permutations(pod.spec.containers, 2):
            port = _tcp_port(server)
            if port is not None:
                place = place_of(pod)
                yield Probe(
                    path=Path.CONTAINER,
                    origin=place,
                    sender=f"{pod.key}/{client.name}",
                    target=f"{pod.key}/{server.name} (localhost:{port.container_port})",
                    address=ip_address("127.0.0.1" if _addresses(pod)[0].version == 4 else "::1"),
                    port=port.container_port,
                    protocol="TCP",
                    ends_at=frozenset({place}),
                    keeps_source=True,
                )
                break


def _pod_probes(snapshot: Snapshot) -> Iterator[Probe]:
    pods = [pod for pod in snapshot.running if not pod.spec.host_network]
    served = [pod for pod in pods if _first_port(pod)]
    pairs = [(a, b) for a in pods for b in served if a is not b]
    same = next((pair for pair in pairs if pair[0].spec.node_name == pair[1].spec.node_name), None)
    across = next((pair for pair in pairs if pair[0].spec.node_name != pair[1].spec.node_name), None)
    for pair in (same, across):
        if pair is not None:
            yield from pod_to_pod(*pair)


def pod_to_pod(source: Pod, target: Pod) -> Iterator[Probe]:
    """Probes from `source` to the first port of `target`, one a family. None where it declares no port."""
    port = _first_port(target)
    crosses = source.spec.node_name != target.spec.node_name
    host = source.spec.host_network or target.spec.host_network
    for address in _addresses(target) if port is not None else ():
        assert port is not None
        yield Probe(
            path=Path.ACROSS if crosses else Path.SAME_NODE,
            origin=place_of(source),
            sender=str(source.key),
            target=f"{target.key} ({endpoint(address, port.container_port)})",
            address=address,
            port=port.container_port,
            protocol=port.protocol,
            ends_at=frozenset({place_of(target)}),
            keeps_source=not host,
            crosses_nodes=crosses and not host,
        )


def _ready_endpoints(snapshot: Snapshot, service: Service) -> list[Pod]:
    """The running pods behind a Service, as its EndpointSlices have them."""
    uids = {
        endpoint.target_ref.uid
        for piece in snapshot.slices
        if piece.service == service.metadata.name and piece.metadata.namespace == service.metadata.namespace
        for endpoint in piece.endpoints
        if endpoint.target_ref is not None and endpoint.conditions.ready is not False
    }
    return [pod for pod in snapshot.running if pod.metadata.uid in uids]


def _served(snapshot: Snapshot) -> list[tuple[Service, list[Pod]]]:
    """Services with ready endpoints of ours, at most MOST_SERVICES."""
    pairs = ((s, _ready_endpoints(snapshot, s)) for s in sorted(snapshot.services, key=lambda s: s.key))
    return list(itertools.islice(((s, pods) for s, pods in pairs if pods), MOST_SERVICES))


def _service_probes(snapshot: Snapshot) -> Iterator[Probe]:
    senders = [pod for pod in snapshot.running if not pod.spec.host_network]
    for service, backends in _served(snapshot):
        # Somebody else's pod makes the better witness: no hairpin, and mostly another node.
        sender = next((pod for pod in senders if pod not in backends), next(iter(senders), None))
        if sender is not None:
            yield from pod_to_service(sender, service, backends)


def pod_to_service(source: Pod, service: Service, backends: Iterable[Pod]) -> Iterator[Probe]:
    """Probes from `source` to every port and cluster address of a Service; none for a headless one."""
    ends = frozenset(place_of(pod) for pod in backends)
    addresses = [ip_address(text) for text in service.spec.cluster_ips if text and text != "None"]
    for address, port in itertools.product(addresses, service.spec.ports):
        yield _to_service(Path.SERVICE, place_of(source), str(source.key), service, (address, port.port), port, ends)


def _to_service(
    path: Path,
    origin: str,
    sender: str,
    service: Service,
    where: tuple[IPAddress, int],
    port: ServicePort,
    ends: frozenset[str],
) -> Probe:
    return Probe(
        path=path,
        origin=origin,
        sender=sender,
        target=f"{service.key} ({endpoint(*where)}/{port.protocol.lower()})",
        address=where[0],
        port=where[1],
        protocol=port.protocol,
        ends_at=ends,
        passes=BALANCER if path is Path.LOAD_BALANCER else "",
    )


def _outside(path: Path, service: Service, where: tuple[IPAddress, int], port: ServicePort, ends: frozenset[str]) -> Probe:
    return _to_service(path, WORLD, WORLD, service, where, port, ends)


def _node_port_probes(snapshot: Snapshot) -> Iterator[Probe]:
    for service, backends in _served(snapshot):
        local = service.spec.external_traffic_policy == "Local"
        homes = {pod.spec.node_name for pod in backends}
        # A node without an endpoint of its own shows more of the way; with policy Local only its nodes answer.
        nodes = sorted(snapshot.nodes, key=lambda node: (not node.ready, (node.metadata.name in homes) != local))
        for node, port in itertools.product(nodes[:1], service.spec.ports):
            near = [pod for pod in backends if not local or pod.spec.node_name == node.metadata.name]
            for address in map(ip_address, node.internal_ips if port.node_port else ()):
                if f"IPv{address.version}" in service.spec.ip_families:
                    ends = frozenset(place_of(pod) for pod in near)
                    yield _outside(Path.NODE_PORT, service, (address, port.node_port), port, ends)


def _load_balancer_probes(snapshot: Snapshot) -> Iterator[Probe]:
    for service, backends in _served(snapshot):
        ends = frozenset(place_of(pod) for pod in backends)
        addresses = [ip_address(ingress.ip) for ingress in service.status.load_balancer.ingress if ingress.ip]
        for address, port in itertools.product(addresses, service.spec.ports):
            yield _outside(Path.LOAD_BALANCER, service, (address, port.port), port, ends)


def _host_port_probes(snapshot: Snapshot) -> Iterator[Probe]:
    for pod in snapshot.running:
        for container in pod.spec.containers if not pod.spec.host_network else ():
            for port in container.ports:
                if port.host_port:
                    yield from _to_node(Path.HOST_PORT, snapshot, pod, port, port.host_port)


def _host_network_probes(snapshot: Snapshot) -> Iterator[Probe]:
    for pod in snapshot.running:
        port = _first_port(pod) if pod.spec.host_network else None
        if port is not None:
            yield from _to_node(Path.HOST_NETWORK, snapshot, pod, port, port.container_port)


def _to_node(path: Path, snapshot: Snapshot, pod: Pod, port: ContainerPort, number: int) -> Iterator[Probe]:
    """From the world to a port of the pod's node, in every family that both have."""
    node = snapshot.node(pod.spec.node_name)
    versions = {address.version for address in _addresses(pod)}
    for address in map(ip_address, node.internal_ips if node is not None else ()):
        if address.version in versions:
            yield Probe(
                path=path,
                origin=WORLD,
                sender=WORLD,
                target=f"{pod.key} ({endpoint(address, number)} on {pod.spec.node_name})",
                address=address,
                port=number,
                protocol=port.protocol,
                ends_at=frozenset({place_of(pod)}),
                keeps_source=path is Path.HOST_NETWORK,
            )


# --- a pair that somebody names -----------------------------------------------------------------------------------


def probes_between(snapshot: Snapshot, source: str, target: str) -> list[Probe]:
    """Probes for `podwire paths --pod SOURCE --to TARGET`.

    SOURCE: `[namespace/]pod`, a node's name or `world`. TARGET: `[namespace/]pod`, `[namespace/]svc/name`, or `address:port`.
    Raises InvalidInput for what does not exist, is ambiguous, not ready, or has no port."""
    origin, sender, pod = _find_source(snapshot, source)
    found = _find_target(snapshot, target)
    if isinstance(found, Pod):
        probes = list(pod_to_pod(pod, found)) if pod is not None else _plain(origin, sender, found)
    elif isinstance(found, Service):
        probes = _named_service(snapshot, origin, sender, pod, found)
    else:
        address, port = found
        probes = [Probe(Path.CHOSEN, origin, sender, endpoint(address, port), address, port, "TCP", frozenset())]
    if not probes:
        raise InvalidInput(f"{target}: nothing to send to: it declares no port, or has no ready endpoint")
    return probes


def _plain(origin: str, sender: str, target: Pod) -> list[Probe]:
    port = _first_port(target)
    ends = frozenset({place_of(target)})
    return [
        Probe(Path.CHOSEN, origin, sender, f"{target.key} ({endpoint(a, port.container_port)})", a, port.container_port,
              port.protocol, ends)
        for a in _addresses(target) if port is not None
    ]  # fmt: skip


def _named_service(snapshot: Snapshot, origin: str, sender: str, pod: Pod | None, service: Service) -> list[Probe]:
    backends = _ready_endpoints(snapshot, service)
    if pod is not None:
        return list(pod_to_service(pod, service, backends))
    if origin != WORLD:
        ends = frozenset(place_of(backend) for backend in backends)
        addresses = [ip_address(text) for text in service.spec.cluster_ips if text and text != "None"]
        return [
            _to_service(Path.CHOSEN, origin, sender, service, (address, port.port), port, ends)
            for address, port in itertools.product(addresses, service.spec.ports)
        ]
    only = Snapshot(snapshot.nodes, snapshot.pods, (service,), snapshot.slices)
    return [*_node_port_probes(only), *_load_balancer_probes(only)]


def _find_source(snapshot: Snapshot, text: str) -> tuple[str, str, Pod | None]:
    if text == WORLD or snapshot.node(text) is not None:
        return text, text, None
    pod = _find_pod(snapshot, text)
    return place_of(pod), str(pod.key), pod


def _find_target(snapshot: Snapshot, text: str) -> Pod | Service | tuple[IPAddress, int]:
    parts = text.split("/")
    if len(parts) >= 2 and parts[-2] in ("svc", "service", "services"):
        return _find_service(snapshot, parts[-1], parts[0] if len(parts) == 3 else "")
    host, _, port = text.rpartition(":")
    try:
        return ip_address(host.strip("[]")), int(port)
    except ValueError:
        _refuse_bare_address(text)
        return _find_pod(snapshot, text)


def _refuse_bare_address(text: str) -> None:
    with contextlib.suppress(ValueError):
        example = endpoint(ip_address(text.strip("[]")), 80)
        raise InvalidInput(f"{text}: an address needs a port, e.g. {example}")


def _find_pod(snapshot: Snapshot, text: str) -> Pod:
    namespace, _, name = text.rpartition("/")
    found = [p for p in snapshot.pods if p.metadata.name == name and namespace in ("", p.metadata.namespace)]
    if not found:
        raise InvalidInput(f"no pod {text!r} in this cluster: name one as `kubectl get pods -A` lists it")
    if len(found) > 1:
        raise InvalidInput(f"pod {text!r} is in several namespaces: say which, e.g. {found[0].key}")
    if not found[0].ips:
        raise InvalidInput(f"pod {found[0].key} has no address yet (phase {found[0].status.phase or 'Pending'})")
    return found[0]


def _find_service(snapshot: Snapshot, name: str, namespace: str) -> Service:
    found = [s for s in snapshot.services if s.metadata.name == name and namespace in ("", s.metadata.namespace)]
    if len(found) != 1:
        raise InvalidInput(
            f"Service {name!r} " + ("is in several namespaces: say which" if found else "does not exist in this cluster")
        )
    return found[0]
