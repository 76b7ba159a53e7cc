"""Random Services against an oracle that knows nothing of maps: what the API promises, worked out per packet."""

import ipaddress
from dataclasses import dataclass
from typing import Any

import hypothesis.strategies as st
from hypothesis import HealthCheck, given, settings
from service_cases import FACTS, SOURCES, service_of, slice_of, to_ipv6

from podwire.model.addr import Family
from podwire.plan.services import ServicePlanner
from podwire.trace.netfilter import Fate, Machine, Packet, Result, follow

FRIENDS, STRANGERS, NODES = "198.18.1.0/24", "192.0.2.0/24", "198.18.0.0/24"


@dataclass(frozen=True)
class World:
    """One Service, type LoadBalancer, in plain terms. `endpoints`: (address, node, conditions)."""

    inside_local: bool
    outside_local: bool
    ranges: tuple[str, ...]
    endpoints: tuple[tuple[str, str, frozenset[str]], ...]

    def manifest(self) -> dict[str, Any]:
        service = {
            "name": "web",
            "type": "LoadBalancer",
            "clusterIP": "10.96.0.10",
            "ports": [{"port": 80, "targetPort": 8080, "nodePort": 30080}],
            "internalTrafficPolicy": "Local" if self.inside_local else "Cluster",
            "externalTrafficPolicy": "Local" if self.outside_local else "Cluster",
            "ingress": [{"ip": "203.0.113.1"}],
            "loadBalancerSourceRanges": list(self.ranges),
        }
        flags = ("ready", "serving", "terminating")
        endpoints = [{"ip": ip, "node": node, **{f: f in said for f in flags}} for ip, node, said in self.endpoints]
        return {"service": service, "endpoints": endpoints}


FRONTENDS = {"cluster": ("10.96.0.10", 80), "node port": ("198.18.0.11", 30080), "balancer": ("203.0.113.1", 80)}

conditions = st.sampled_from(
    [
        frozenset({"ready", "serving"}),
        frozenset({"ready", "serving"}),
        frozenset({"serving", "terminating"}),
        frozenset({"terminating"}),
        frozenset[str](),
    ]
)
places = [("10.244.1.5", "n1"), ("10.244.1.7", "n1"), ("10.244.2.7", "n2"), ("10.244.3.7", "n3")]
worlds = st.builds(
    World,
    st.booleans(),
    st.booleans(),
    st.sampled_from([(), (FRIENDS,), (STRANGERS,), (STRANGERS, NODES)]),
    st.lists(st.tuples(st.sampled_from(places), conditions), unique_by=lambda e: e[0], max_size=4).map(
        lambda found: tuple((ip, node, said) for (ip, node), said in found)
    ),
)


def usable(endpoints: list[tuple[str, str, frozenset[str]]]) -> set[str]:
    ready = {ip for ip, _, said in endpoints if "ready" in said}
    return ready or {ip for ip, _, said in endpoints if {"serving", "terminating"} <= said}


def promised(world: World, source: str, frontend: str) -> tuple[Fate, set[str]]:
    """(fate, the endpoints that it may reach)."""
    if frontend == "balancer" and world.ranges:
        address = ipaddress.ip_address(SOURCES[source])
        if not any(address in ipaddress.ip_network(r) for r in world.ranges):
            return Fate.DROP, set()
    everyone = usable(list(world.endpoints))
    pool = everyone
    if world.inside_local if frontend == "cluster" else world.outside_local and source == "outside":
        pool = usable([e for e in world.endpoints if e[1] == "n1"])
    if not pool:
        return (Fate.DROP if everyone else Fate.RESET), set()
    return Fate.PASS, pool


def masqueraded(world: World, source: str, frontend: str, backend: str) -> bool:
    if backend == SOURCES[source]:
        return True
    if frontend == "cluster":
        return source != "local-pod"
    return not world.outside_local or source == "node"


def send(planner: ServicePlanner, world: World, source: str, frontend: str, family: Family) -> list[Result]:
    def turn(text: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address:
        return ipaddress.ip_address(text if family is Family.IPV4 else to_ipv6(text))

    address, port = FRONTENDS[frontend]
    packet = Packet(turn(SOURCES[source]), turn(address), 6, 40000, port)
    ruleset = planner.desired()

    def draw(number: int) -> Result:
        machine = Machine(frozenset(FACTS.node_ips), lambda n: number % n)
        return follow(ruleset, packet, machine, locally_made=source == "node")

    return [draw(number) for number in range(max(1, len(world.endpoints)) * 2)]


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow], max_examples=100)
@given(worlds, st.sampled_from(Family))
def test_every_packet_is_treated_as_the_api_promises(world: World, family: Family) -> None:
    manifest = world.manifest()
    if family is Family.IPV6:
        manifest = _turned(manifest)
    planner = ServicePlanner(FACTS)
    service = service_of(manifest["service"], family)
    planner.set_service(service.key, service, (slice_of(manifest, family),))
    for source in ("local-pod", "node", "outside"):
        for frontend in FRONTENDS:
            fate, pool = promised(world, source, frontend)
            results = send(planner, world, source, frontend, family)
            label = f"{source} → {frontend}"
            assert {r.fate for r in results} == {fate}, label
            if fate is Fate.PASS:
                expected = {ip if family is Family.IPV4 else to_ipv6(ip): ip for ip in pool}
                assert {str(r.packet.dst) for r in results} == {str(ipaddress.ip_address(ip)) for ip in expected}, label
                back = {str(ipaddress.ip_address(turned)): ip for turned, ip in expected.items()}
                for r in results:
                    assert r.masquerade == masqueraded(world, source, frontend, back[str(r.packet.dst)]), label


def _turned(value: Any) -> Any:
    """Every text in a document, its addresses turned into IPv6."""
    if isinstance(value, dict):
        return {k: _turned(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_turned(v) for v in value]
    return to_ipv6(value) if isinstance(value, str) else value
