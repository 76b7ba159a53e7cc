"""Case files of Services: short manifests → API objects, and packets with what must become of them. One address plan for all.

    n1 is the node under test, 198.18.0.11; its pods 10.244.1.0/24, the cluster's 10.244.0.0/16, Services 10.96.0.0/12,
    balancer addresses 203.0.113.0/24, outside 198.18.1.1, a friend outside 192.0.2.9.

Every case also exists with each address turned into IPv6 (`to_ipv6`), unless it names its `families`.

    - name: what it is about
      node: {zone: z2}                # how the node differs from `FACTS`
      objects:
        - service: {name: web, clusterIP: 10.96.0.10, ports: [{port: 80, targetPort: 8080}], ...}
          endpoints: [{ip: 10.244.1.2, node: n1, ready: true, zones: [z1]}]        # one slice with all ports; or
          slices: [{ports: [{name: http, port: 8080}], endpoints: [...]}]
        - pod: {name: edge, ip: 10.244.1.9, ports: [{containerPort: 8080, hostPort: 80}]}
      packets:
        - {from: local-pod, to: 10.96.0.10 80/TCP, reaches: [10.244.1.2 8080], source: kept}
        - {from: node, to: 10.96.0.10 81/TCP, fate: tcp reset}
        - {from: outside, to: 203.0.113.1 81/TCP, reaches: [203.0.113.1 81], ipvs: tcp reset}     # IPVS differs by design

`endpoints: {count: 1000}` stands for 10.244.1.1, 10.244.1.2, …, and so does `reaches: {count: 1000, port: 8080}`.
"""

import ipaddress
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import msgspec
import yaml

from podwire.model.addr import Family
from podwire.model.ids import ObjectKey
from podwire.model.objects import EndpointSlice, Pod, Service
from podwire.model.servicetable import NodeFacts
from podwire.plan.services_table import PROTOCOLS
from podwire.trace.journey import Packet

CASES = Path(__file__).parents[1] / "cases" / "services"

PARTS = ("packets", "steps", "asks", "flows", "changes")
"""What a case can be: packets through one state; packets and changes with memory (`Story`); and `service_histories`."""

SOURCES = {
    "local-pod": "10.244.1.5",
    "other-local-pod": "10.244.1.6",
    "remote-pod": "10.244.2.5",
    "node": "198.18.0.11",
    "outside": "198.18.1.1",
    "friend": "192.0.2.9",
}
LOOPBACK = {"loopback": "127.0.0.1"}
INTERFACES = {"local-pod": "cni0", "other-local-pod": "cni0", "remote-pod": "far0", "outside": "eth0", "friend": "eth0"}
"""By which of the node's devices their packets come in."""

FACTS = NodeFacts(
    name="n1",
    node_ips=(ipaddress.ip_address("198.18.0.11"), ipaddress.ip_address("2001:db8:1::b")),
    pod_cidrs=(ipaddress.ip_network("10.244.1.0/24"), ipaddress.ip_network("fd00:10:244:1::/64")),
    cluster_cidrs=(ipaddress.ip_network("10.244.0.0/16"), ipaddress.ip_network("fd00:10:244::/56")),
    service_cidrs=(ipaddress.ip_network("10.96.0.0/12"), ipaddress.ip_network("fd00:10:96::/112")),
    zone="z1",
)


def to_ipv6(text: str) -> str:
    """The plan's IPv4 addresses and prefixes → its IPv6 ones; a /24 becomes /120."""

    def turned(match: re.Match[str]) -> str:
        a, b, c, d = (int(n) for n in match.group(1).split("."))
        address = {
            (10, 244): f"fd00:10:244:{c:x}::{d:x}",
            (10, 96): f"fd00:10:96::{c:x}:{d:x}" if c else f"fd00:10:96::{d:x}",
            (198, 18): f"2001:db8:1::{c:x}:{d:x}" if c else f"2001:db8:1::{d:x}",
            (203, 0): f"2001:db8:2::{d:x}",
            (192, 0): f"2001:db8:3::{d:x}",
            (239, 1): f"ff0e::{d:x}",
            (127, 0): f"0::{d:x}",
        }[a, b]
        return address + (f"/{int(match.group(2)) + 96}" if match.group(2) else "")

    return re.sub(r"\b(\d+\.\d+\.\d+\.\d+)(?:/(\d+))?\b", turned, text)


@dataclass(frozen=True)
class Expectation:
    """A packet, and its fate: where it may arrive, or how it is refused. `source`: "kept", "masqueraded", or "": either.
    `ipvs`: its fate there, where that is another by design."""

    label: str
    packet: Packet
    locally_made: bool
    reaches: frozenset[tuple[str, int]]
    fate: str
    source: str
    ipvs: str = ""

    @property
    def in_ipvs(self) -> "Expectation":
        return replace(self, fate=self.ipvs, reaches=frozenset()) if self.ipvs else self


class Fed(Protocol):
    """Whoever plans Services: a planner, or a back end."""

    def set_service(self, key: ObjectKey, service: Service | None, slices: Sequence[EndpointSlice] = ()) -> None: ...

    def set_host_ports(self, uid: str, pod: Pod | None) -> None: ...


@dataclass(frozen=True)
class Case:
    name: str
    family: Family
    objects: tuple[dict[str, Any], ...]
    packets: tuple[Expectation, ...]
    facts: NodeFacts = FACTS

    def feed(self, planner: Fed) -> None:
        for item in self.objects:
            feed(planner, item, self.family)


Step = tuple[tuple[dict[str, Any], ...], Expectation | None, int]
"""Objects that change, a packet, and the number that decides where a new client goes."""


@dataclass(frozen=True)
class Story:
    """Packets and changes in a row, where what a packet finds depends on those before it. `back_ends`: those it is true of."""

    name: str
    family: Family
    facts: NodeFacts
    steps: tuple[Step, ...]
    back_ends: tuple[str, ...]

    def feed_one(self, planner: Fed, item: dict[str, Any]) -> None:
        feed(planner, item, self.family)


def feed(planner: Fed, item: dict[str, Any], family: Family) -> None:
    """One of a case's objects; `gone: web` and `gone-pod: edge` take one away."""
    if "gone" in item:
        planner.set_service(key(item["gone"]), None)
    elif "gone-pod" in item:
        planner.set_host_ports(item["gone-pod"], None)
    elif "service" in item:
        service = service_of(item["service"], family)
        planner.set_service(service.key, service, slices_of(item, family))
    else:
        planner.set_host_ports(item["pod"]["name"], pod_of(item["pod"]))


def load_cases(*, special: bool = False) -> Iterator[Case]:
    """Every case of every file, in both families. `special`: also those of a node that is set up in another way, or with
    packets of SCTP, for which a machine may have no sockets."""
    for name, family, item in cases_with("packets"):
        packets = tuple(expectation(p, family) for p in item["packets"])
        case = Case(name, family, tuple(item["objects"]), packets, facts_of(item.get("node", {})))
        if special or (case.facts == FACTS and all(p.packet.protocol != PROTOCOLS["SCTP"] for p in packets)):
            yield case


def load_stories() -> Iterator[Story]:
    """The cases that have `steps`, which are either `objects` or a packet with the number (`draw`) for a new client."""
    for name, family, item in cases_with("steps"):
        steps = tuple(
            (tuple(s.get("objects", ())), expectation(s, family) if "to" in s else None, s.get("draw", 0))
            for s in item["steps"]
        )
        back_ends = tuple(item.get("back_ends", ("nftables", "iptables", "ipvs")))
        yield Story(name, family, facts_of(item.get("node", {})), steps, back_ends)


def cases_with(part: str) -> Iterator[tuple[str, Family, dict[str, Any]]]:
    """(name, family, document) of all cases of that sort: which of `PARTS` it has."""
    return ((name, family, item) for name, family, item in all_cases() if part in item)


def all_cases() -> Iterator[tuple[str, Family, dict[str, Any]]]:
    for file in sorted(CASES.glob("*.yaml")):
        text = file.read_text()
        for family, variant in ((Family.IPV4, text), (Family.IPV6, to_ipv6(text))):
            for item in yaml.safe_load(variant):
                if family.value in item.get("families", ("IPv4", "IPv6")):
                    yield f"{file.stem}: {item['name']} ({family.value})", family, item


def facts_of(short: dict[str, Any]) -> NodeFacts:
    """`FACTS` with what a case says otherwise. `local_sources: cluster`: every pod counts as one of this node."""
    changed = {**short, "local_sources": FACTS.cluster_cidrs} if short.get("local_sources") == "cluster" else {**short}
    if "node_ips" in changed:
        changed["node_ips"] = tuple(map(ipaddress.ip_address, changed["node_ips"]))
    if "pod_cidrs" in changed:
        changed["pod_cidrs"] = tuple(map(ipaddress.ip_network, changed["pod_cidrs"]))
    if "local_interfaces" in changed:
        changed["local_interfaces"] = tuple(changed["local_interfaces"])
    return replace(FACTS, **changed)


def expectation(item: dict[str, Any], family: Family) -> Expectation:
    source = (SOURCES | LOOPBACK).get(item["from"], item["from"])
    address, port = item["to"].split()
    number, protocol = port.split("/")
    src = ipaddress.ip_address(source if family is Family.IPV4 or ":" in source else to_ipv6(source))
    packet = Packet(src, ipaddress.ip_address(address), PROTOCOLS[protocol], 40000, int(number), item.get("mark", 0),
                    INTERFACES.get(item["from"], ""))  # fmt: skip
    reaches = item.get("reaches", ())
    if isinstance(reaches, dict):
        reaches = [f"{ip} {reaches['port']}" for ip in _many(reaches["count"], family)]
    arrives = frozenset((a, int(p)) for a, p in (text.split() for text in reaches))
    label = f"{item['from']} → {item['to']}"
    made_here = item["from"] in ("node", "loopback")
    return Expectation(
        label, packet, made_here, arrives, item.get("fate", "pass"), item.get("source", ""), item.get("ipvs", "")
    )


def service_of(short: dict[str, Any], family: Family) -> Service:
    spec = {k: v for k, v in short.items() if k not in ("name", "namespace", "labels", "ingress")}
    cluster_ip = spec.get("clusterIP", "")
    document = {
        "metadata": {"name": short["name"], "namespace": short.get("namespace", "shop"), "labels": short.get("labels", {})},
        "spec": {"clusterIPs": [cluster_ip], "ipFamilies": [family.value], **spec},
        "status": {"loadBalancer": {"ingress": short.get("ingress", [])}},
    }
    return msgspec.convert(document, Service)


def slices_of(item: dict[str, Any], family: Family) -> tuple[EndpointSlice, ...]:
    """The slices that a case spells out, or the one that its endpoints make."""
    if "slices" not in item:
        return (slice_of(item, family),)
    return tuple(slice_of({"service": item["service"], **short}, family) for short in item["slices"])


def slice_of(item: dict[str, Any], family: Family) -> EndpointSlice:
    service = item["service"]
    ports = item.get("ports") or [
        {"name": p.get("name", ""), "port": p.get("targetPort", p["port"]), "protocol": p.get("protocol", "TCP")}
        for p in service["ports"]
    ]
    endpoints = item["endpoints"]
    if isinstance(endpoints, dict):
        endpoints = [{"ip": ip} for ip in _many(endpoints["count"], family)]
    document = {
        "metadata": {
            "name": service["name"] + "-x",
            "namespace": service.get("namespace", "shop"),
            "labels": {"kubernetes.io/service-name": service["name"], **item.get("labels", {})},
        },
        "addressType": item.get("addressType", family.value),
        "endpoints": [_endpoint(e) for e in endpoints],
        "ports": ports,
    }
    return msgspec.convert(document, EndpointSlice)


def _many(count: int, family: Family) -> list[str]:
    addresses = [f"10.244.{1 + n // 250}.{1 + n % 250}" for n in range(count)]
    return addresses if family is Family.IPV4 else [to_ipv6(ip) for ip in addresses]


def _endpoint(short: dict[str, Any]) -> dict[str, Any]:
    conditions = {k: short[k] for k in ("ready", "serving", "terminating") if k in short}
    endpoint: dict[str, Any] = {"addresses": [short["ip"]], "nodeName": short.get("node", ""), "conditions": conditions}
    hints = {
        name: [{"name": n} for n in short[key]] for name, key in (("forZones", "zones"), ("forNodes", "nodes")) if key in short
    }
    return {**endpoint, "hints": hints} if hints else endpoint


def pod_of(short: dict[str, Any]) -> Pod:
    document = {
        "metadata": {"name": short["name"], "namespace": "shop", "uid": short["name"]},
        "spec": {"hostNetwork": short.get("hostNetwork", False), "containers": [{"name": "main", "ports": short["ports"]}]},
        "status": {"phase": short.get("phase", "Running"), "podIP": short["ip"], "podIPs": [{"ip": short["ip"]}]},
    }
    return msgspec.convert(document, Pod)


def key(name: str) -> ObjectKey:
    return ObjectKey("shop", name)
