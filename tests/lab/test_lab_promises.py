"""What the API's objects promise, worked out by the oracle from what the API server answers, and what clients in a lab see."""

import ipaddress
import json
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import msgspec
import pytest
from labcommand import Lab, until

from podwire.kernel.iptables import Flavour, find_programs
from podwire.model.addr import IPAddress
from podwire.model.objects import EndpointSlice, Node, Pod, Service
from podwire.model.servicetable import NodeFacts
from podwire.trace.oracle import Cluster, Connection, Outcome, promise

pytestmark = [pytest.mark.lab, pytest.mark.timeout(120)]

CLUSTER = tuple(map(ipaddress.ip_network, ("10.244.0.0/16", "fd00:10:244::/56")))
SERVICES = tuple(map(ipaddress.ip_network, ("10.96.0.0/12", "fd00:10:96::/112")))
UNUSED = "10.96.200.200"

PROBE = """
import json, socket, sys
from concurrent.futures import ThreadPoolExecutor
def ask(target):
    try:
        socket.create_connection(target, timeout=0.7).close()
    except ConnectionRefusedError:
        return "REFUSED"
    except OSError:
        return "DROPPED"
    return "SERVED"
targets = json.loads(sys.argv[1])
with ThreadPoolExecutor(64) as pool:
    print(json.dumps(list(pool.map(ask, map(tuple, targets)))))
"""


def service(name: str, **spec: Any) -> dict[str, Any]:
    meta = {"name": name, "namespace": "promises"}
    body = {"type": "NodePort", "ipFamilyPolicy": "SingleStack", "ports": [{"port": 80, "targetPort": 8080}], **spec}
    return {"apiVersion": "v1", "kind": "Service", "metadata": meta, "spec": body}


def piece(name: str, *pods: dict[str, Any], **conditions: bool) -> dict[str, Any]:
    """A slice made by hand."""
    meta = {"name": f"{name}-1", "namespace": "promises", "labels": {"kubernetes.io/service-name": name}}
    endpoints = [
        {"addresses": [p["status"]["podIP"]], "nodeName": p["spec"]["nodeName"], "conditions": conditions} for p in pods
    ]
    return {
        "apiVersion": "discovery.k8s.io/v1",
        "kind": "EndpointSlice",
        "metadata": meta,
        "addressType": "IPv4",
        "endpoints": endpoints,
        "ports": [{"port": 8080, "protocol": "TCP"}],
    }


def listed(lab: Lab, kind: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(lab.kubectl("get", kind, "-A", "-o", "json"))["items"]
    return found


@pytest.fixture
def promises(lab: Lab) -> Iterator[list[dict[str, Any]]]:
    """Services of every sort over the shop's `web` pods; gives the pods."""
    pods = [p for p in listed(lab, "pods") if p["metadata"]["name"].startswith("web-")]
    leaving = {"ready": False, "serving": True, "terminating": True}
    balancer: dict[str, Any] = {"type": "LoadBalancer"}
    objects = [
        {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "promises"}},
        *(service("all"), piece("all", *pods)),
        *(service("one-local", externalTrafficPolicy="Local"), piece("one-local", pods[0])),
        *(service("one-inside", internalTrafficPolicy="Local"), piece("one-inside", pods[0])),
        service("nobody"),
        *(service("leaving"), piece("leaving", pods[0], **leaving)),
        *(service("not-serving"), piece("not-serving", pods[0], ready=False)),
        *(service("friends", **balancer, loadBalancerSourceRanges=["192.0.2.0/24"]), piece("friends", *pods)),
        *(service("nodes", **balancer, loadBalancerSourceRanges=["198.18.0.0/24"]), piece("nodes", *pods)),
    ]
    lab.kubectl("apply", "-f", "-", stdin=json.dumps({"apiVersion": "v1", "kind": "List", "items": objects}))
    until(lambda: all(s["status"].get("loadBalancer", {}).get("ingress") for s in _balanced(lab)))
    yield pods
    lab.kubectl("delete", "namespace", "promises", "--wait=true")


def _balanced(lab: Lab) -> list[dict[str, Any]]:
    return [s for s in listed(lab, "services") if s["spec"]["type"] == "LoadBalancer"]


def clusters(lab: Lab) -> dict[str, Cluster]:
    """Node → the cluster as it looks from there."""
    services = [msgspec.convert(s, Service) for s in listed(lab, "services")]
    slices = [msgspec.convert(s, EndpointSlice) for s in listed(lab, "endpointslices")]
    pods = [msgspec.convert(p, Pod) for p in listed(lab, "pods")]
    found = {}
    for item in listed(lab, "nodes"):
        node = msgspec.convert(item, Node)
        name = node.metadata.name
        facts = NodeFacts(
            name=name,
            node_ips=tuple(
                ipaddress.ip_address(a["address"]) for a in item["status"]["addresses"] if a["type"] == "InternalIP"
            ),
            pod_cidrs=tuple(ipaddress.ip_network(c) for c in item["spec"]["podCIDRs"]),
            cluster_cidrs=CLUSTER,
            service_cidrs=SERVICES,
            loopback=True,
        )
        served = tuple(
            (s, tuple(p for p in slices if (p.metadata.namespace, p.service) == (s.key.namespace, s.key.name)))
            for s in services
        )
        found[name] = Cluster(facts, served, tuple(p for p in pods if p.spec.node_name == name))
    return found


def connections(cluster: Cluster, src: IPAddress, *, made_here: bool) -> Iterator[Connection]:
    """To every IPv4 address and TCP port of the test's Services, and to some that nobody has."""
    mine = str(cluster.node.node_ips[0])
    for svc, _ in cluster.services:
        if svc.metadata.namespace != "promises":
            continue
        for port in svc.spec.ports:
            targets = [(svc.spec.cluster_ip, port.port), (svc.spec.cluster_ip, 4711), (mine, port.node_port)]
            targets += [(ingress.ip, port.port) for ingress in svc.status.load_balancer.ingress]
            targets += [("127.0.0.1", port.node_port)] if made_here else []
            for address, number in targets:
                yield Connection(_source(src, address), ipaddress.ip_address(address), "TCP", number, made_here)
    yield Connection(src, ipaddress.ip_address(UNUSED), "TCP", 80, made_here)


def _source(src: IPAddress, dst: str) -> IPAddress:
    return ipaddress.ip_address("127.0.0.1") if dst == "127.0.0.1" else src


def broken(lab: Lab, where: str, cluster: Cluster, asked: list[Connection]) -> list[str]:
    """The promises that are not kept for a client at `where`."""
    targets = json.dumps([(str(c.dst), c.port) for c in asked])
    done = lab.exec(where, sys.executable, "-c", PROBE, targets)
    assert done.status == 0, done.err
    found = []
    for connection, seen in zip(asked, json.loads(done.out), strict=True):
        promised = promise(cluster, connection)
        if promised.outcome.name != seen:
            found.append(
                f"{where} → {connection.dst}:{connection.port}: {seen}, promised: {promised.outcome.name} ({promised.why})"
            )
    return found


@pytest.fixture
def mode(lab: Lab, request: pytest.FixtureRequest) -> Iterator[str]:
    """The lab's proxy mode for one test; afterwards it is what it was."""
    wanted: str = request.param
    if wanted == "iptables" and not any(map(find_programs, Flavour)):
        pytest.skip("iptables is not installed")
    lab.podwire.ok("lab", "node", "proxy-mode", "--name", lab.name, wanted)
    yield wanted
    lab.podwire.ok("lab", "node", "proxy-mode", "--name", lab.name, "nftables")


@pytest.mark.parametrize("mode", ["nftables", "iptables"], indirect=True)
def test_clients_in_a_lab_get_what_the_api_promises(lab: Lab, promises: list[dict[str, Any]], mode: str) -> None:
    by_node = clusters(lab)
    clients = {p["spec"]["nodeName"]: p for p in promises}
    for name in ("friends", "nodes"):  # the latest: what nodes acknowledge is everything up to a revision
        lab.podwire.ok("wait", "--name", lab.name, "-n", "promises", "--programmed", f"svc/{name}")
    asked = []
    for name, cluster in by_node.items():
        node_ip, pod = cluster.node.node_ips[0], clients[name]
        source = ipaddress.ip_address(pod["status"]["podIP"])
        outside = connections(cluster, ipaddress.ip_address("198.18.1.1"), made_here=False)
        asked += [
            (name, cluster, list(connections(cluster, node_ip, made_here=True))),
            (f"shop/{pod['metadata']['name']}", cluster, list(connections(cluster, source, made_here=False))),
            ("world", cluster, [c for c in outside if c.dst == node_ip]),
        ]
    with ThreadPoolExecutor(4) as pool:
        found = [text for texts in pool.map(lambda one: broken(lab, *one), asked) for text in texts]
    assert not found, f"{mode}:\n" + "\n".join(found)
    outcomes = {promise(c, x).outcome for c in by_node.values() for x in connections(c, c.node.node_ips[0], made_here=True)}
    assert outcomes >= {Outcome.SERVED, Outcome.REFUSED, Outcome.DROPPED}
