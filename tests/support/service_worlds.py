"""Random clusters, and every connection worth trying in them.

Addresses come from the plan of `service_cases`. With `real=True` endpoints are only those of `servicerig`, on the port where
its servers listen, so that the same worlds can be tried with packets.
"""

import ipaddress
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import hypothesis.strategies as st
import msgspec
from hypothesis import HealthCheck, Phase, given, settings
from service_cases import FACTS, INTERFACES, SOURCES, Fed, to_ipv6

from podwire.model.addr import Family, IPAddress
from podwire.model.nft import Ruleset, TableRef, TableState
from podwire.model.objects import EndpointSlice, Pod, Service
from podwire.model.servicetable import NodeFacts
from podwire.plan.services import ServicePlanner
from podwire.trace.oracle import Cluster, Connection

FRIENDS, STRANGERS, NODES = "198.18.1.0/24", "192.0.2.0/24", "198.18.0.0/24"
UNREADABLE = "198.18.1/24"

IMAGINED = (
    ("10.244.1.5", "n1", "z1"),
    ("10.244.1.7", "n1", "z1"),
    ("10.244.2.5", "n2", "z2"),
    ("10.244.3.7", "n3", "z1"),
    ("10.244.4.7", "n4", "z4"),
    ("198.18.0.11", "n1", "z1"),
    ("198.18.1.77", "", ""),
)
REAL = (
    ("10.244.1.2", "n1", "z1"),
    ("10.244.1.3", "n1", "z1"),
    ("10.244.1.4", "n1", "z1"),
    ("10.244.2.2", "n2", "z2"),
    ("198.18.0.11", "n1", "z1"),
)

LOOPBACK = ipaddress.IPv4Address("127.0.0.1")

_LEAVING = {"ready": False, "serving": True, "terminating": True}
_CONDITIONS: tuple[dict[str, bool], ...] = (
    {},
    {"ready": True},
    {"ready": True, "serving": True, "terminating": False},
    {"ready": False},
    _LEAVING,
    {"ready": False, "serving": False, "terminating": True},
    {"ready": False, "terminating": True},
    {"ready": True, "serving": True, "terminating": True},  # publishNotReadyAddresses
)
_PORTS = (("TCP", 80), ("UDP", 53), ("TCP", 443), ("SCTP", 36412))


_SHARED = "203.0.113.99"
"""An external address that several Services may claim, as they may claim the node's."""
_BALANCERS: tuple[Callable[[str], list[dict[str, str]]], ...] = (
    lambda own: [{"ip": own}],
    lambda own: [{"ip": own, "ipMode": "VIP"}, {"ip": _SHARED}],
    lambda own: [{"ip": own, "ipMode": "Proxy"}],
    lambda own: [{"hostname": "balancer.example"}],
)
_NOT_FOR_NODES: tuple[dict[str, Any], ...] = (
    {"spec": {"clusterIP": "None"}},
    {"spec": {"type": "ExternalName", "externalName": "elsewhere.example"}},
    {"metadata": {"labels": {"service.kubernetes.io/service-proxy-name": "another"}}},
)
_AFFINITIES: tuple[dict[str, Any], ...] = (
    {},
    {"sessionAffinity": "None"},
    {"sessionAffinity": "ClientIP"},
    {"sessionAffinity": "ClientIP", "sessionAffinityConfig": {"clientIP": {"timeoutSeconds": 600}}},
)


@st.composite
def endpoints(draw: st.DrawFn, places: Sequence[tuple[str, str, str]], hinted: str, leaving: str) -> list[dict[str, Any]]:
    """`hinted`: "none", "zones", "nodes" (and zones), "some" of them. `leaving`: the node whose endpoints terminate."""
    found = []
    least = draw(st.sampled_from((3, 2, 0)))
    for ip, node, zone in draw(st.lists(st.sampled_from(places), unique=True, min_size=least, max_size=5)):
        endpoint: dict[str, Any] = {"addresses": [ip], "conditions": draw(st.sampled_from(_CONDITIONS))}
        if node:
            endpoint |= {"nodeName": node, "zone": zone}
        if leaving in (node, "all"):
            endpoint["conditions"] = _LEAVING
        if hinted in ("zones", "nodes") or (hinted == "some" and draw(st.booleans())):
            endpoint["hints"] = {"forZones": [{"name": zone or "z2"}]}
            if hinted == "nodes":
                endpoint["hints"]["forNodes"] = [{"name": node or "n2"}]
        found.append(endpoint)
    return found


@st.composite
def slices(draw: st.DrawFn, name: str, ports: list[dict[str, Any]], real: bool) -> list[dict[str, Any]]:
    """Up to three, in any order; one may repeat what another lists, lack a port, have it elsewhere, or be for no node."""
    pieces = []
    hinted, leaving = (
        draw(st.sampled_from(("zones", "none", "nodes", "some", "zones"))),
        draw(st.sampled_from(("", "", "", "n1", "all"))),
    )
    for number in range(draw(st.sampled_from((1, 2, 3, 0)))):
        resolved = [
            {"name": p["name"], "protocol": p["protocol"], "port": 8080 if real else draw(st.sampled_from((8080, 9090)))}
            for p in ports
            if draw(st.integers(0, 9))
        ]
        piece: dict[str, Any] = {
            "metadata": {
                "name": f"{name}-{number}",
                "namespace": "shop",
                "labels": {"kubernetes.io/service-name": name},
            },
            "addressType": "IPv4",
            "endpoints": draw(endpoints(REAL if real else IMAGINED, hinted, leaving)),
            "ports": resolved,
        }
        match draw(st.integers(0, 11)):
            case 10:
                piece["metadata"]["labels"]["service.kubernetes.io/headless"] = ""
            case 11:
                piece |= {"addressType": "FQDN", "endpoints": [{"addresses": ["pod.example"]}]}
        pieces.append(piece)
    return draw(st.permutations(pieces))


@st.composite
def services(draw: st.DrawFn, number: int, real: bool) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """A Service and its slices, as documents in IPv4. `number` keeps its addresses apart from the others'."""
    name = f"s{number}"
    kind = draw(st.sampled_from(("ClusterIP", "NodePort", "LoadBalancer", "LoadBalancer")))
    ports = []
    for index, (protocol, port) in enumerate(
        draw(st.lists(st.sampled_from(_PORTS[: 2 if real else 4]), unique=True, min_size=1))
    ):
        node_port = 30000 + 10 * number + index if kind != "ClusterIP" and draw(st.integers(0, 4)) else 0
        ports.append({"name": f"p{index}", "protocol": protocol, "port": port, "nodePort": node_port})
    service = {
        "metadata": {"name": name, "namespace": "shop"},
        "spec": {
            "type": kind,
            "clusterIP": f"10.96.0.{10 + number}",
            "ports": ports,
            "internalTrafficPolicy": draw(st.sampled_from(("Cluster", "Cluster", "Local"))),
            "externalTrafficPolicy": draw(st.sampled_from(("Local", "Cluster"))),
            "externalIPs": draw(st.sampled_from(([], [], [f"203.0.113.{100 + number}"], [_SHARED], ["198.18.0.11"]))),
            **draw(st.sampled_from(_AFFINITIES)),
            "loadBalancerSourceRanges": draw(
                st.sampled_from(([], [], [FRIENDS], [STRANGERS], [STRANGERS, NODES], [UNREADABLE]))
            ),
        },
        "status": {"loadBalancer": {"ingress": draw(st.sampled_from(_BALANCERS))(f"203.0.113.{10 + number}")}},
    }
    if draw(st.integers(0, 11)) == 11:
        for part, fields in draw(st.sampled_from(_NOT_FOR_NODES)).items():
            service[part] |= fields
    return service, draw(slices(name, ports, real))


@st.composite
def host_pods(draw: st.DrawFn, real: bool) -> list[dict[str, Any]]:
    """Up to two, which may want the same ports, of pods that may be finished, on the host's network, or of both families."""
    pods = []
    for name, (ip, *_) in zip(("edge", "rim"), REAL if real else IMAGINED, strict=False):
        if draw(st.integers(0, 2)):
            continue
        ports = [
            {
                "containerPort": 8080,
                "hostPort": draw(st.sampled_from((8888, 8888, 80, 30000))),
                "hostIP": draw(st.sampled_from(("", "0.0.0.0", "198.18.0.11"))),
                "protocol": protocol,
            }
            for protocol in draw(st.lists(st.sampled_from(("TCP", "UDP")), min_size=1, unique=True))
        ]
        ips = draw(st.sampled_from(([ip], [ip, to_ipv6(ip)])))
        pods.append(
            {
                "metadata": {"name": name, "namespace": "shop", "uid": name},
                "spec": {"containers": [{"name": "main", "ports": ports}], "hostNetwork": draw(st.integers(0, 5)) == 5},
                "status": {
                    "podIP": ip,
                    "podIPs": [{"ip": one} for one in ips],
                    "phase": draw(st.sampled_from(("Running", "Running", "Running", "Succeeded"))),
                },
            }
        )
    return pods


@st.composite
def node_facts(draw: st.DrawFn) -> NodeFacts:
    """The node of the address plan, as it may be set up."""
    return replace(
        FACTS,
        zone=draw(st.sampled_from(("z1", "z1", "z1", "z3", ""))),
        local_sources=draw(st.sampled_from(((), (), FACTS.cluster_cidrs, FACTS.cluster_cidrs[:1]))),
        masquerade_all=draw(st.integers(0, 4)) == 4,
        local_interfaces=draw(st.sampled_from(((), (), (), ("cni0",), ("veth*", "cni*")))),
        loopback=draw(st.booleans()),
        cluster_cidrs=draw(st.sampled_from((FACTS.cluster_cidrs, FACTS.cluster_cidrs, ()))),
        service_cidrs=draw(st.sampled_from((FACTS.service_cidrs, FACTS.service_cidrs, ()))),
    )


@st.composite
def clusters(draw: st.DrawFn, family: Family, *, real: bool = False, facts: NodeFacts | None = None) -> Cluster:
    """Up to three Services and perhaps a pod with a host port, all in one family; half of the Services have both."""
    found = []
    for number in range(draw(st.integers(1, 3))):
        service, pieces = draw(services(number, real))
        if family is Family.IPV6:
            service, pieces = _turned(service), _turned(pieces)
        spec, v6 = (
            service["spec"],
            [{**_turned(p), "metadata": {**p["metadata"], "name": p["metadata"]["name"] + "-v6"}} for p in pieces],
        )
        if family is Family.IPV4 and draw(st.booleans()):
            spec |= {"clusterIPs": [spec["clusterIP"], to_ipv6(spec["clusterIP"])], "ipFamilies": ["IPv4", "IPv6"]}
            spec["externalIPs"] = [*spec["externalIPs"], *_turned(spec["externalIPs"])]
            pieces = [*pieces, *v6]
        else:
            spec |= {"clusterIPs": [spec["clusterIP"]], "ipFamilies": [family.value]}
        found.append((msgspec.convert(service, Service), tuple(msgspec.convert(p, EndpointSlice) for p in pieces)))
    pods = draw(host_pods(real))
    if family is Family.IPV6:
        pods = [_turned(p) for p in pods]
    return Cluster(facts or draw(node_facts()), tuple(found), tuple(msgspec.convert(p, Pod) for p in pods))


def _turned(value: Any) -> Any:
    """Every text in a document, its addresses and families turned into IPv6."""
    if isinstance(value, dict):
        return {k: _turned(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_turned(v) for v in value]
    if value in ("IPv4", "0.0.0.0"):
        return {"IPv4": "IPv6", "0.0.0.0": "::"}[value]
    return to_ipv6(value) if isinstance(value, str) else value


def connections(
    cluster: Cluster, sources: dict[str, str] = SOURCES, interfaces: dict[str, str] = INTERFACES
) -> Iterator[Connection]:
    """From every kind of source to every address that means something, and to some that mean nothing. `sources`: in IPv4;
    the one called "node" is made by the node itself. `interfaces`: by which the others come in."""
    for dst, protocol, port in sorted(_destinations(cluster), key=str):
        for name, text in sources.items():
            src = ipaddress.ip_address(text if dst.version == 4 else to_ipv6(text))
            yield Connection(src, dst, protocol, port, made_here=name == "node", interface=interfaces.get(name, ""))
            if name == "node" and cluster.node.loopback and dst == cluster.node.node_ips[0]:
                yield Connection(LOOPBACK, LOOPBACK, protocol, port, made_here=True)
                yield Connection(src, LOOPBACK, protocol, port)


def _destinations(cluster: Cluster) -> set[tuple[IPAddress, str, int]]:
    found: set[tuple[IPAddress, str, int]] = set()
    for service, _ in cluster.services:
        spec = service.spec
        cluster_ips = [ip for ip in spec.cluster_ips if ip != "None"]
        externals = [*spec.external_ips, *(i.ip for i in service.status.load_balancer.ingress if i.ip)]
        for port in spec.ports:
            found |= {(ipaddress.ip_address(ip), port.protocol, port.port) for ip in (*cluster_ips, *externals)}
            if port.node_port:
                found |= {(ip, port.protocol, port.node_port) for ip in cluster.node.node_ips}
        found |= {(ipaddress.ip_address(ip), protocol, 4711) for ip in cluster_ips for protocol in ("TCP", "UDP")}
    for text in ("10.96.0.99", "10.244.2.9", "198.18.1.77"):
        found |= {(ipaddress.ip_address(text), "TCP", 80), (ipaddress.ip_address(to_ipv6(text)), "TCP", 80)}
    for opened in (opened for pod in cluster.pods for container in pod.spec.containers for opened in container.ports):
        found |= {(ip, opened.protocol, opened.host_port) for ip in cluster.node.node_ips}
    return found


def planned(cluster: Cluster) -> ServicePlanner:
    planner = ServicePlanner(cluster.node)
    change_to(planner, None, cluster)
    return planner


def change_to(rules: Fed, before: Cluster | None, after: Cluster) -> None:
    """Feed the cluster in place of the one before."""
    if before is not None:
        for key in {service.key for service, _ in before.services} - {service.key for service, _ in after.services}:
            rules.set_service(key, None)
        for pod in before.pods:
            rules.set_host_ports(pod.metadata.uid, None)
    for service, pieces in after.services:
        rules.set_service(service.key, service, pieces)
    for pod in after.pods:
        rules.set_host_ports(pod.metadata.uid, pod)


def canonical(ruleset: Ruleset) -> dict[TableRef, tuple[object, object]]:
    """A ruleset in which the order of a pool's backends does not matter."""

    def of(table: TableState) -> tuple[object, object]:
        sets: dict[str, object] = {}
        for name, state in table.sets.items():
            if name in ("endpoints", "local-endpoints"):
                keys = frozenset(state.elements)
                sets[name] = keys, frozenset((k[:-4], data) for k, data in state.elements.items())
            else:
                sets[name] = dict(state.elements)
        return dict(table.chains), sets

    return {ref: of(table) for ref, table in ruleset.tables.items()}


def some_clusters(family: Family, count: int, *, real: bool = False) -> list[Cluster]:
    """The same ones in each run, so that what is found does not depend on luck."""
    found: list[Cluster] = []

    @settings(max_examples=count, derandomize=True, database=None, deadline=None, phases=[Phase.generate],
              suppress_health_check=list(HealthCheck))  # fmt: skip
    @given(clusters(family, real=real))
    def gather(cluster: Cluster) -> None:
        found.append(cluster)

    gather()
    return found
