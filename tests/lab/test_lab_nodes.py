"""Nodes come, go and lose their agents while traffic runs."""

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from labcommand import PODWIRE, ROOT, SHOP, Done, Lab, Podwire, until

from podwire.kernel.iptables import Flavour, find_programs

pytestmark = [pytest.mark.lab, pytest.mark.timeout(120)]

CONNECTIONS = """
import json, select, socket, sys, time
socks = [socket.create_connection((host, int(port)), 3) for host, _, port in (a.rpartition(":") for a in sys.argv[1:])]
for sock in socks:
    sock.settimeout(3)
    sock.sendall(b"not http\\n")
    data = b""
    while data.count(b"\\n") < 2:
        data += sock.recv(4096)
print("connected", flush=True)
rounds, longest = 0, 0.0
while not select.select([sys.stdin], [], [], 0.005)[0]:
    started = time.monotonic()
    for sock in socks:
        sock.sendall(b"ping\\n")
        assert sock.recv(4096) == b"ping\\n"
    rounds, longest = rounds + 1, max(longest, time.monotonic() - started)
print(json.dumps({"rounds": rounds, "longest": longest}))
"""
"""Open a connection to each address and keep all of them talking, until stdin has something."""

HTTP = """
import socket, sys
for address in sys.argv[1:]:
    host, _, port = address.rpartition(":")
    with socket.create_connection((host, int(port)), 3) as sock:
        sock.sendall(b"GET / HTTP/1.0\\r\\n\\r\\n")
        data = b""
        while piece := sock.recv(4096):
            data += piece
    print(data.partition(b"\\r\\n\\r\\n")[2].split(b"\\n")[0].decode())
"""
"""One request to each address; prints the names of the pods that answered."""


def python(lab: Lab, target: str, script: str, *arguments: str) -> Done:
    return lab.exec(target, sys.executable, "-c", script, *arguments)


@pytest.fixture(scope="module")
def own_lab(podwire: Podwire) -> Iterator[Lab]:
    podwire.ok("lab", "up", "--name", "nodes", "--nodes", "2", "-f", str(SHOP), "--wait")
    yield Lab(podwire, "nodes", podwire.ok("lab", "kubeconfig", "nodes", "--path").strip())
    podwire.ok("lab", "down", "nodes")


def pods(lab: Lab) -> dict[str, tuple[str, int]]:
    """name → (uid, restarts) of the shop's pods."""
    listed = json.loads(lab.kubectl("get", "pods", "-n", "shop", "-o", "json"))["items"]
    return {
        pod["metadata"]["name"]: (
            pod["metadata"]["uid"],
            sum(status["restartCount"] for status in pod["status"]["containerStatuses"]),
        )
        for pod in listed
    }


def devices(lab: Lab, node: str) -> str:
    return python(lab, node, "import socket; print(socket.if_nameindex())").out


ADDRESSES = ["198.18.0.11:30080", "2001:db8:1::11:30080", "198.18.0.12:30080", "203.0.113.1:80", "2001:db8:2::1:80"]


@contextmanager
def talking(lab: Lab) -> Iterator[None]:
    """Connections from outside to `ADDRESSES`, of which none may break or stall while the block runs."""
    command = ["lab", "exec", "--name", lab.name, "world", "--", sys.executable, "-c", CONNECTIONS, *ADDRESSES]
    traffic = subprocess.Popen(
        [*PODWIRE, *command],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=lab.podwire.environment, cwd=ROOT,
    )  # fmt: skip
    assert traffic.stdin is not None
    assert traffic.stdout is not None
    with traffic:
        assert traffic.stdout.readline() == "connected\n"
        yield
        traffic.stdin.write("enough\n")
        traffic.stdin.close()
        result = json.loads(traffic.stdout.read())
    assert traffic.returncode == 0
    assert result["rounds"] > 10
    assert result["longest"] < 1.0


def new_connections_work(lab: Lab) -> None:
    answered = python(lab, "world", HTTP, "198.18.0.11:30080", "198.18.0.12:30080", "203.0.113.1:80")
    assert len(answered.out.split()) == 3, answered.err


def test_agents_are_killed_and_started_again_under_traffic(own_lab: Lab) -> None:
    """No connection is lost, no device is re-made, no pod notices."""
    pods_before, devices_before = pods(own_lab), devices(own_lab, "node-1")
    with talking(own_lab):
        for node in ("node-1", "node-2"):
            out = own_lab.podwire.ok("lab", "node", "restart", "--name", own_lab.name, node)
            assert out == f"the agent of {node} runs again\n"
            new_connections_work(own_lab)
    assert pods(own_lab) == pods_before
    assert devices(own_lab, "node-1") == devices_before


@pytest.mark.skipif(find_programs(Flavour.NFT) is None, reason="the package iptables is not installed")
def test_the_proxy_mode_changes_under_traffic(own_lab: Lab) -> None:
    """No connection is lost, new ones work all the time, and a restarted agent stays with the mode."""

    def rules(node: str) -> str:
        return own_lab.podwire.ok("lab", "exec", "--name", own_lab.name, node, "--", "nft", "list", "ruleset")

    with talking(own_lab):
        for mode, ours, other in (("iptables", "PODWIRE-SVC", "table ip podwire"), ("nftables", "table ip podwire", "PODWIRE")):
            own_lab.podwire.ok("lab", "node", "proxy-mode", "--name", own_lab.name, mode)
            new_connections_work(own_lab)
            until(lambda gone=other: gone not in rules("node-1"), 20)  # type: ignore[misc]
            own_lab.podwire.ok("lab", "node", "restart", "--name", own_lab.name, "node-1")
            assert ours in rules("node-1")
            new_connections_work(own_lab)


def test_a_restarted_agent_still_does_its_work(own_lab: Lab) -> None:
    own_lab.podwire.ok("lab", "node", "restart", "--name", own_lab.name, "node-2")
    own_lab.kubectl("scale", "-n", "shop", "deployment/web", "--replicas=6")
    own_lab.kubectl("rollout", "status", "-n", "shop", "deployment/web", "--timeout=20s")
    own_lab.kubectl("scale", "-n", "shop", "deployment/web", "--replicas=4")
    until(lambda: sum(name.startswith("web-") for name in pods(own_lab)) == 4)


def test_a_node_joins_takes_pods_and_leaves(own_lab: Lab) -> None:
    assert own_lab.podwire.ok("lab", "node", "add", "--name", own_lab.name) == "node-3\n"
    assert [lab["nodes"] for lab in own_lab.podwire.labs() if lab["name"] == own_lab.name] == [["node-1", "node-2", "node-3"]]
    overrides = json.dumps({"spec": {"nodeName": "node-3"}})
    own_lab.kubectl("run", "late", "--image=late", "--port=8080", f"--overrides={overrides}")
    own_lab.kubectl("wait", "--for=condition=Ready", "pod/late", "--timeout=20s")
    late = own_lab.kubectl("get", "pod", "late", "-o", "jsonpath={.status.podIPs[*].ip}").split()
    seen = python(own_lab, "cart/exporter", HTTP, *(f"{address}:8080" for address in late))
    assert seen.out.split() == ["late", "late"], "across the overlay, in both families"
    assert python(own_lab, "world", HTTP, "198.18.0.13:30080").out.startswith("web-"), "the new node has the node ports"

    own_lab.podwire.ok("lab", "node", "rm", "--name", own_lab.name, "node-3")
    assert "node-3" not in own_lab.kubectl("get", "nodes", "-o", "name")
    until(lambda: "late" not in own_lab.kubectl("get", "pods", "-o", "name"), 20)
    own_lab.kubectl("rollout", "status", "-n", "shop", "deployment/web", "--timeout=20s")
    refused = own_lab.podwire("lab", "exec", "--name", own_lab.name, "node-3", "--", "true")
    assert refused.status == 1
    answered = python(own_lab, "world", HTTP, *["203.0.113.1:80"] * 20)
    assert len(answered.out.split()) == 20, answered.err


def test_a_node_that_does_not_exist_is_named(own_lab: Lab) -> None:
    for verb in ("rm", "restart"):
        done = own_lab.podwire("lab", "node", verb, "--name", own_lab.name, "node-77")
        assert done.status == 1
        assert "there is no node 'node-77' in this lab: its nodes are node-1, node-2" in done.err
