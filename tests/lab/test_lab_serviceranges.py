"""A cluster whose ClusterIPs are used up gets another range while it runs, and gives it back."""

import ipaddress
import json
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from labcommand import Lab, Podwire, until

pytestmark = [pytest.mark.lab, pytest.mark.timeout(90)]

NAME = "ranges"
MORE = ipaddress.ip_network("10.200.0.0/28")
SMALL = 14
"""Addresses of the first range."""

PROBE = """
import socket, sys
data = b""
with socket.create_connection((sys.argv[1], 80), timeout=10) as connection:
    connection.sendall(b"GET / HTTP/1.0\\r\\n\\r\\n")
    while b"web-" not in data and (more := connection.recv(4096)):
        data += more
print("a pod of web" if b"web-" in data else data)
"""
"""Stand-ins say their pod's name: in HTTP, or, to a client that is slow to speak, at once."""

CLOSED = """
import asyncio, ipaddress, sys
from podwire.kernel.linux import LinuxKernel
async def rules():
    kernel = LinuxKernel()
    try:
        return (await kernel.observe_nft("podwire")).tables
    finally:
        await kernel.close()
print(repr(ipaddress.ip_network(sys.argv[1]).network_address.packed) in repr(asyncio.run(rules())))
"""


def service(name: str) -> dict[str, Any]:
    spec = {"selector": {"app": "web"}, "ports": [{"port": 80, "targetPort": 8080}]}
    return {"apiVersion": "v1", "kind": "Service", "metadata": {"name": name}, "spec": spec}


def objects() -> list[dict[str, Any]]:
    container = {"name": "web", "image": "test/web:1", "ports": [{"containerPort": 8080}]}
    labels = {"app": "web"}
    spread = {"maxSkew": 1, "topologyKey": "kubernetes.io/hostname", "whenUnsatisfiable": "DoNotSchedule"}
    pod = {"containers": [container], "topologySpreadConstraints": [{**spread, "labelSelector": {"matchLabels": labels}}]}
    template = {"metadata": {"labels": labels}, "spec": pod}
    spec = {"replicas": 2, "selector": {"matchLabels": labels}, "template": template}
    web = {"apiVersion": "apps/v1", "kind": "Deployment", "metadata": {"name": "web"}, "spec": spec}
    return [web, *(service(f"fill-{n}") for n in range(SMALL - 1))]


@pytest.fixture
def small(podwire: Podwire) -> Iterator[Lab]:
    """A lab in which all ClusterIPs of the range are taken."""
    podwire.ok("lab", "up", "--name", NAME, "--nodes", "2", "--service-cluster-ip-range", "10.96.0.0/28,fd00:10:96::/112")
    lab = Lab(podwire, NAME, podwire.ok("lab", "kubeconfig", NAME, "--path").strip())
    lab.kubectl("apply", "-f", "-", stdin=json.dumps({"apiVersion": "v1", "kind": "List", "items": objects()}))
    lab.kubectl("rollout", "status", "deployment/web", "--timeout=30s")
    yield lab
    podwire.ok("lab", "down", NAME)


def test_a_range_is_added_used_and_given_back(small: Lab) -> None:
    def ask(where: str, address: str) -> str:
        return small.exec(where, sys.executable, "-c", PROBE, address).out.strip()

    def closed() -> bool:
        """Whether a node drops what goes to the unused addresses of the range."""
        return small.exec("node-2", sys.executable, "-c", CLOSED, str(MORE)).out.strip() == "True"

    with pytest.raises(AssertionError, match="range is full"):
        small.kubectl("create", "-f", "-", stdin=json.dumps(service("web")))
    cidr = {"apiVersion": "networking.k8s.io/v1", "kind": "ServiceCIDR", "metadata": {"name": "more"}}
    small.kubectl("create", "-f", "-", stdin=json.dumps({**cidr, "spec": {"cidrs": [str(MORE)]}}))
    small.kubectl("wait", "--for=condition=Ready", "servicecidr/more", "--timeout=10s")
    made = small.kubectl("create", "-o", "json", "-f", "-", stdin=json.dumps(service("web")))
    address = json.loads(made)["spec"]["clusterIP"]
    assert ipaddress.ip_address(address) in MORE
    assert f"{address} services/default/web" in " ".join(small.kubectl("get", "ipaddress", address).split())
    small.podwire.ok("wait", "--name", NAME, "--programmed", "svc/web")
    pods = json.loads(small.kubectl("get", "pods", "-l", "app=web", "-o", "json"))["items"]
    assert {pod["spec"]["nodeName"] for pod in pods} == {"node-1", "node-2"}
    places = ["node-1", "node-2", *(f"default/{pod['metadata']['name']}" for pod in pods)]
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(lambda where: ask(where, address), places)) == ["a pod of web"] * 4
    until(closed)

    small.kubectl("delete", "servicecidr", "more", "--wait=false")
    reason = "jsonpath={.status.conditions[?(@.type=='Ready')].reason}"
    until(lambda: small.kubectl("get", "servicecidr", "more", "-o", reason) == "Terminating")
    assert ask(places[-1], address) == "a pod of web", "who has an address of it is served"
    small.kubectl("delete", "service", "web")
    small.kubectl("wait", "--for=delete", "servicecidr/more", "--timeout=10s")
    until(lambda: not closed())
    assert len(json.loads(small.kubectl("get", "ipaddresses", "-o", "json"))["items"]) == SMALL
