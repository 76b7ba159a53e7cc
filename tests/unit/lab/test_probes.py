"""Which probes a cluster's objects lead to. One address plan: node-1 198.18.0.10, node-2 198.18.0.11; pods 10.244.<n>.x."""

from typing import Any

import msgspec
import pytest

from podwire.lab.probes import Path, Probe, Snapshot, choose_probes, probes_between
from podwire.model.errors import InvalidInput
from podwire.model.objects import EndpointSlice, Node, Pod, Service

Document = dict[str, Any]


def node(name: str, *addresses: str) -> Node:
    status: Document = {
        "addresses": [{"type": "InternalIP", "address": address} for address in addresses],
        "conditions": [{"type": "Ready", "status": "True"}],
    }
    return msgspec.convert({"metadata": {"name": name}, "status": status}, Node)


def pod(name: str, on: str, *ips: str, containers: list[Document] | None = None, host: bool = False) -> Pod:
    document: Document = {
        "metadata": {"name": name, "namespace": "shop", "uid": f"uid-{name}"},
        "spec": {
            "nodeName": on,
            "hostNetwork": host,
            "containers": containers or [{"name": "app", "ports": [{"containerPort": 8080}]}],
        },
        "status": {
            "phase": "Running",
            "podIPs": [{"ip": ip} for ip in ips],
            "conditions": [{"type": "Ready", "status": "True"}],
        },
    }
    return msgspec.convert(document, Pod)


def service(name: str, spec: Document, *ingress: str) -> Service:
    document = {
        "metadata": {"name": name, "namespace": "shop"},
        "spec": {"ipFamilies": ["IPv4"], **spec},
        "status": {"loadBalancer": {"ingress": [{"ip": ip} for ip in ingress]}},
    }
    return msgspec.convert(document, Service)


def endpoints(of: str, *pods: Pod) -> EndpointSlice:
    document = {
        "metadata": {"name": f"{of}-1", "namespace": "shop", "labels": {"kubernetes.io/service-name": of}},
        "addressType": "IPv4",
        "endpoints": [
            {"addresses": list(p.ips), "conditions": {"ready": True}, "targetRef": {"kind": "Pod", "uid": p.metadata.uid}}
            for p in pods
        ],
        "ports": [{"name": "", "port": 8080, "protocol": "TCP"}],
    }
    return msgspec.convert(document, EndpointSlice)


NODES = (node("node-1", "198.18.0.10"), node("node-2", "198.18.0.11"))
A, B, C = pod("a", "node-1", "10.244.0.2"), pod("b", "node-1", "10.244.0.3"), pod("c", "node-2", "10.244.1.2")


def snapshot(*pods: Pod, services: tuple[Service, ...] = (), slices: tuple[EndpointSlice, ...] = ()) -> Snapshot:
    return Snapshot(NODES, pods, services, slices)


def by_path(probes: list[Probe], path: Path) -> list[tuple[str, str, int]]:
    return [(p.origin, str(p.address), p.port) for p in probes if p.path is path]


def test_pods_on_one_node_and_across() -> None:
    probes = choose_probes(snapshot(A, B, C))
    assert by_path(probes, Path.SAME_NODE) == [("shop/a", "10.244.0.3", 8080)]
    assert by_path(probes, Path.ACROSS) == [("shop/a", "10.244.1.2", 8080)]
    across = next(p for p in probes if p.path is Path.ACROSS)
    assert (across.ends_at, across.keeps_source, across.crosses_nodes) == (frozenset({"shop/c"}), True, True)


def test_a_dual_stack_pair_is_probed_in_both_families() -> None:
    pods = (pod("a", "node-1", "10.244.0.2", "fd00::2"), pod("b", "node-1", "10.244.0.3", "fd00::3"))
    assert [p.address.version for p in choose_probes(snapshot(*pods))] == [4, 6]


def test_containers_of_one_pod_use_localhost() -> None:
    both: list[Document] = [{"name": "cart", "ports": [{"containerPort": 7070}]}, {"name": "exporter"}]
    (probe,) = choose_probes(snapshot(pod("cart", "node-1", "10.244.0.2", containers=both)))
    assert (probe.path, probe.sender, str(probe.address), probe.port) == (
        Path.CONTAINER,
        "shop/cart/exporter",
        "127.0.0.1",
        7070,
    )


def test_the_sender_to_a_service_is_not_one_of_its_endpoints() -> None:
    web = service("web", {"clusterIPs": ["10.96.0.20"], "ports": [{"port": 80}]})
    probes = choose_probes(snapshot(A, C, services=(web,), slices=(endpoints("web", A),)))
    assert by_path(probes, Path.SERVICE) == [("shop/c", "10.96.0.20", 80)]


def test_a_headless_service_and_one_without_endpoints_are_not_probed() -> None:
    headless = service("db", {"clusterIP": "None", "clusterIPs": ["None"], "ports": [{"port": 80}]})
    empty = service("none", {"clusterIPs": ["10.96.0.21"], "ports": [{"port": 80}]})
    probes = choose_probes(snapshot(A, C, services=(headless, empty), slices=(endpoints("db", A),)))
    assert by_path(probes, Path.SERVICE) == []


@pytest.mark.parametrize(("policy", "address"), [("Cluster", "198.18.0.11"), ("Local", "198.18.0.10")])
def test_node_ports_are_tried_where_they_show_most(policy: str, address: str) -> None:
    ports = [{"port": 80, "nodePort": 30080}]
    web = service("web", {"type": "NodePort", "externalTrafficPolicy": policy, "ports": ports})
    probes = choose_probes(snapshot(A, services=(web,), slices=(endpoints("web", A),)))
    assert by_path(probes, Path.NODE_PORT) == [("world", address, 30080)]


def test_a_load_balancer_address_leads_through_the_balancer() -> None:
    web = service("web", {"type": "LoadBalancer", "ports": [{"port": 80}]}, "203.0.113.1")
    probes = choose_probes(snapshot(A, services=(web,), slices=(endpoints("web", A),)))
    assert [(p.origin, p.passes) for p in probes if p.path is Path.LOAD_BALANCER] == [("world", "balancer")]


def test_host_ports_and_host_network() -> None:
    gateway = pod("gw", "node-2", "10.244.1.9", containers=[{"name": "gw", "ports": [{"containerPort": 8080, "hostPort": 88}]}])
    probes = choose_probes(snapshot(gateway, pod("mon", "node-1", "198.18.0.10", host=True)))
    assert by_path(probes, Path.HOST_PORT) == [("world", "198.18.0.11", 88)]
    assert by_path(probes, Path.HOST_NETWORK) == [("world", "198.18.0.10", 8080)]
    assert next(p for p in probes if p.path is Path.HOST_NETWORK).ends_at == {"node-1"}


def test_a_pod_that_is_not_ready_sends_and_gets_nothing() -> None:
    leaving = msgspec.convert(
        {**msgspec.to_builtins(B), "metadata": {"name": "b", "namespace": "shop", "deletionTimestamp": "2026-01-01T00:00:00Z"}},
        Pod,
    )
    assert choose_probes(snapshot(A, leaving)) == []


WEB = service("web", {"clusterIPs": ["10.96.0.20"], "ports": [{"port": 80}]})
SHOP = snapshot(A, B, C, services=(WEB,), slices=(endpoints("web", A, C),))


@pytest.mark.parametrize(
    ("source", "target", "expected"),
    [
        ("a", "c", ("shop/a", "10.244.1.2", 8080)),
        ("shop/a", "shop/b", ("shop/a", "10.244.0.3", 8080)),
        ("node-1", "c", ("node-1", "10.244.1.2", 8080)),
        ("b", "svc/web", ("shop/b", "10.96.0.20", 80)),
        ("node-2", "shop/svc/web", ("node-2", "10.96.0.20", 80)),
        ("b", "10.244.1.2:9999", ("shop/b", "10.244.1.2", 9999)),
        ("world", "[fd00::1]:80", ("world", "fd00::1", 80)),
    ],
)
def test_a_named_pair(source: str, target: str, expected: tuple[str, str, int]) -> None:
    (probe,) = probes_between(SHOP, source, target)
    assert (probe.origin, str(probe.address), probe.port) == expected


@pytest.mark.parametrize(
    ("source", "target", "complaint"),
    [
        ("nobody", "a", "no pod 'nobody'"),
        ("a", "nobody", "no pod 'nobody'"),
        ("a", "svc/nothing", "'nothing' does not exist"),
        ("world", "svc/web", "nothing to send to"),
        ("a", "10.0.0.1", "needs a port, e.g. 10.0.0.1:80"),
        ("a", "fd00::1", r"needs a port, e.g. \[fd00::1\]:80"),
    ],
)
def test_what_cannot_be_probed_says_why(source: str, target: str, complaint: str) -> None:
    with pytest.raises(InvalidInput, match=complaint):
        probes_between(SHOP, source, target)


def test_an_ambiguous_pod_name_is_refused() -> None:
    other = msgspec.convert({**msgspec.to_builtins(A), "metadata": {"name": "a", "namespace": "other"}}, Pod)
    with pytest.raises(InvalidInput, match="several namespaces"):
        probes_between(snapshot(A, other), "a", "a")
