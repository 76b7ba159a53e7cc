"""The proof's random worlds have what is worth trying: each of these in one of a hundred at least."""

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from service_worlds import LOOPBACK, clusters

from podwire.model.addr import Family
from podwire.model.objects import Endpoint, Service
from podwire.model.servicetable import Frontend, FrontendKind, Pool
from podwire.plan.services_maps import frontend_key
from podwire.plan.services_table import PROTOCOLS, host_port_table, ignored, service_table
from podwire.trace.oracle import Cluster

COUNT = 200
KIND = FrontendKind
Trait = Callable[[Cluster], bool]


def served(test: Callable[[Service, Frontend], object]) -> Trait:
    """Whether a frontend of some Service is like that."""
    return lambda cluster: any(
        test(service, frontend)
        for service, pieces in cluster.services
        for frontend in service_table(service, pieces, cluster.node).frontends
    )


def listed(test: Callable[[Cluster, Endpoint], object]) -> Trait:
    return lambda cluster: any(test(cluster, e) for _, pieces in cluster.services for piece in pieces for e in piece.endpoints)


def hinted(here: dict[str, Any], there: dict[str, Any]) -> Trait:
    """Whether it matters to a Service's traffic if the node is the one or the other. A policy of Local heeds no hints."""

    def decides(cluster: Cluster) -> bool:
        one, other = (replace(cluster.node, **facts) for facts in (here, there))
        return any(
            service_table(service, pieces, one).frontends[:1] != service_table(service, pieces, other).frontends[:1]
            for service, pieces in cluster.services
            if service.spec.internal_traffic_policy != "Local"
        )

    return decides


def leaving_only(cluster: Cluster) -> bool:
    """A Service whose endpoints all terminate, and serve."""
    return any(
        frontend.inside.backends and not any(e.conditions.ready is not False for piece in pieces for e in piece.endpoints)
        for service, pieces in cluster.services
        for frontend in service_table(service, pieces, cluster.node).frontends
    )


def host_ports(test: Callable[[Frontend], object]) -> Trait:
    return lambda cluster: any(test(f) for pod in cluster.pods for f in host_port_table(pod, cluster.node).frontends)


def rivals(cluster: Cluster) -> bool:
    keys = [
        frontend_key(frontend)
        for service, pieces in cluster.services
        for frontend in service_table(service, pieces, cluster.node).frontends
    ]
    return len(set(keys)) < len(keys)


def local(kind: FrontendKind, frontend: Frontend) -> Pool:
    """Whom its clients outside are led to by policy Local; nobody where it is of another kind or policy."""
    return frontend.outside if frontend.kind is kind and frontend.outside is not None else Pool()


TRAITS: dict[str, Trait] = {
    "a node port, policy Local, endpoints here": served(lambda s, f: local(KIND.NODE_PORT, f).backends),
    "a node port, policy Local, endpoints elsewhere": served(lambda s, f: local(KIND.NODE_PORT, f).drop),
    "a balancer's address, policy Local": served(lambda s, f: local(KIND.LOAD_BALANCER, f).backends),
    "an external IP, policy Local": served(lambda s, f: local(KIND.EXTERNAL_IP, f).backends),
    "internal policy Local, endpoints elsewhere": served(lambda s, f: f.kind is KIND.CLUSTER_IP and f.inside.drop),
    "only endpoints that terminate": leaving_only,
    "hints for zones decide": hinted({}, {"zone": ""}),
    "hints for nodes decide": hinted({"zone": ""}, {"zone": "", "name": "nobody"}),
    "source ranges": served(lambda s, f: f.source_ranges and f.inside.backends),
    "source ranges that nobody can read": served(lambda s, f: f.source_ranges == ()),
    "affinity with a choice": served(lambda s, f: f.affinity_s and len(f.inside.backends) > 1),
    "affinity with a choice, policy Local": served(lambda s, f: f.affinity_s and f.outside and len(f.outside.backends) > 1),
    "two families": served(lambda s, f: len(s.spec.ip_families) > 1 and f.inside.backends),
    "ipMode Proxy": lambda c: any(i.ip_mode == "Proxy" for s, _ in c.services for i in s.status.load_balancer.ingress),
    "127.0.0.1": served(lambda s, f: f.address == LOOPBACK.packed and f.inside.backends),
    "127.0.0.1, policy Local": served(lambda s, f: f.address == LOOPBACK.packed and f.outside),
    "UDP": served(lambda s, f: f.protocol == PROTOCOLS["UDP"] and f.inside.backends),
    "SCTP": served(lambda s, f: f.protocol == PROTOCOLS["SCTP"] and f.inside.backends),
    "an endpoint on the node itself": listed(lambda c, e: e.addresses[0] in map(str, c.node.node_ips)),
    "two Services at one address and port": rivals,
    "nobody serves": served(lambda s, f: not f.inside.backends and not f.inside.drop),
    "a Service that is not for nodes": lambda c: any(ignored(service) for service, _ in c.services),
    "a slice that is not for nodes": lambda c: any(p.address_type == "FQDN" for _, pieces in c.services for p in pieces),
    "host ports": host_ports(lambda f: True),
    "host ports of UDP": host_ports(lambda f: f.protocol == PROTOCOLS["UDP"]),
    "host ports of 127.0.0.1": host_ports(lambda f: f.address == LOOPBACK.packed),
    "devices tell who is local": lambda c: bool(c.node.local_interfaces),
    "nobody tells who is local": lambda c: not all(c.node.tells_pods(version) for version in (4, 6)),
    "everyone is masqueraded": lambda c: c.node.masquerade_all,
}


@pytest.mark.timeout(120)
def test_everything_worth_trying_is_tried() -> None:
    seen: Counter[str] = Counter()

    @settings(max_examples=COUNT, derandomize=True, database=None, deadline=None, phases=[Phase.generate],
              suppress_health_check=list(HealthCheck))  # fmt: skip
    @given(st.sampled_from(Family).flatmap(clusters))
    def gather(cluster: Cluster) -> None:
        seen.update(name for name, trait in TRAITS.items() if trait(cluster))

    gather()
    assert not {name: seen[name] for name in TRAITS if seen[name] < COUNT // 100}
