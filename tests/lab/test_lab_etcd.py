"""A lab whose nodes lease their subnets from a real etcd of three members: faults, and what must hold under them."""

import base64
import ipaddress
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator

import pytest
from labcommand import PODWIRE, ROOT, Lab, Podwire, until

from podwire.trace.overlaycheck import KEPT, MAPPED, UNIQUE

pytestmark = [
    pytest.mark.lab,
    pytest.mark.timeout(120),
    pytest.mark.skipif(shutil.which("etcd") is None, reason="etcd is not installed (Debian package etcd-server)"),
]

PODS = ipaddress.ip_network("10.244.0.0/16")

TALK = """
import select, socket, sys, time
sock = socket.create_connection((sys.argv[1], 8080), 3)
sock.settimeout(3)
sock.sendall(b"not http\\n")
data = b""
while data.count(b"\\n") < 2:
    data += sock.recv(4096)
print("connected", flush=True)
rounds = 0
while not select.select([sys.stdin], [], [], 0.01)[0]:
    sock.sendall(b"ping\\n")
    assert sock.recv(4096) == b"ping\\n"
    rounds += 1
print(rounds)
"""
"""Keep one connection to a pod talking until stdin has something."""


@pytest.fixture(scope="module")
def leased(podwire: Podwire) -> Iterator[Lab]:
    options = ("--nodes", "2", "--subnet-manager", "etcd", "--etcd-members", "3", "--backend", "host-gw")
    podwire.ok("lab", "up", "--name", "leased", *options)
    lab = Lab(podwire, "leased", podwire.ok("lab", "kubeconfig", "leased", "--path").strip())
    for index in (1, 2):
        place = json.dumps({"spec": {"nodeName": f"node-{index}"}})
        lab.kubectl("run", f"pod-{index}", "--image=web", "--port=8080", f"--overrides={place}")
    lab.kubectl("wait", "--for=condition=Ready", "pod/pod-1", "pod/pod-2", "--timeout=20s")
    yield lab
    podwire.ok("lab", "down", "leased")


def fault(lab: Lab, verb: str, *arguments: str) -> None:
    lab.podwire.ok("lab", "fault", verb, "--name", lab.name, *arguments)


def broken(lab: Lab, *conditions: str) -> list[str]:
    """What does not hold, or of these conditions, with the evidence."""
    found = json.loads(lab.podwire("verify", "overlay", "--name", lab.name, "-o", "json").out)["findings"]
    return [
        f"{one['condition']}: {one['subject']}: {one['evidence']}"
        for one in found
        if not one["ok"] and (not conditions or one["condition"] in conditions)
    ]


def becomes_sound(lab: Lab, seconds: float = 10.0) -> None:
    deadline = time.monotonic() + seconds
    while wrong := broken(lab):
        assert time.monotonic() < deadline, wrong


def leases(lab: Lab) -> dict[str, dict[str, str]]:
    """Key → value of every lease in etcd, as etcd's own client says."""
    arguments = ("--endpoints", "http://198.18.3.2:2379", "get", "--prefix", "/coreos.com/network/subnets", "-w", "json")
    script = "import os, sys; os.environ['ETCDCTL_API'] = '3'; os.execvp('etcdctl', ['etcdctl', *sys.argv[1:]])"
    found = json.loads(lab.exec("world", sys.executable, "-c", script, *arguments).out)["kvs"]
    return {base64.b64decode(kv["key"]).decode(): json.loads(base64.b64decode(kv["value"])) for kv in found}


def routed(lab: Lab, node: str) -> set[str]:
    """The pod subnets (IPv4) that a node's kernel has a gateway for."""
    found = set()
    for line in lab.exec(node, "cat", "/proc/net/route").out.splitlines()[1:]:
        _, destination, gateway, *_ = line.split()
        address = ipaddress.ip_address(int.from_bytes(bytes.fromhex(destination), "little"))
        if int(gateway, 16) and address in PODS:
            found.add(f"{address}/24")
    return found


def leaks(lab: Lab, nodes: Iterable[str]) -> dict[str, set[str]]:
    """By node: what its kernel has and no lease asks for, or lacks."""
    held = {value["PublicIP"]: key.rpartition("/")[2].partition("&")[0].replace("-", "/") for key, value in leases(lab).items()}
    found = {}
    for node in nodes:
        own = f"198.18.0.{10 + int(node.removeprefix('node-'))}"
        found[node] = routed(lab, node) ^ {subnet for address, subnet in held.items() if address != own}
    return {node: routes for node, routes in found.items() if routes}


def test_nodes_hold_leases_as_flannel_writes_them(leased: Lab) -> None:
    becomes_sound(leased)
    held = leases(leased)
    assert {value["PublicIP"]: value for value in held.values()} == {
        f"198.18.0.{10 + index}": {
            "PublicIP": f"198.18.0.{10 + index}",
            "PublicIPv6": f"2001:db8:1::{10 + index}",
            "BackendType": "host-gw",
        }
        for index in (1, 2)
    }
    assert json.loads(leased.kubectl("get", "node", "node-1", "-o", "json"))["spec"].get("podCIDR") is None
    routes = leased.exec("node-1", "ip", "route").out if shutil.which("ip") else "via 198.18.0.12 dev eth0"
    assert "via 198.18.0.12 dev eth0" in routes


def test_a_host_verifies_itself_against_etcd(leased: Lab) -> None:
    """As on a bare host: nothing is asked of the lab."""
    command = (*PODWIRE, "verify", "overlay", "--all", "--etcd-endpoints", "http://198.18.3.1:2379")
    done = leased.exec("node-1", *command)
    assert done.status == 0, done.out
    assert "eth0 says 1500: 1500 bytes to" in done.out
    stranger = leased.exec("world", *command)
    assert stranger.status == 1
    assert "no lease names an address of this host" in stranger.out


def test_faults_leave_pods_alone_and_nobody_gets_anothers_subnet(leased: Lab) -> None:
    """A member killed, a node cut off from the others, agents killed, a node that joins: all at once."""
    before = leases(leased)
    target = leased.kubectl("get", "pod", "pod-2", "-o", "jsonpath={.status.podIP}")
    command = ["lab", "exec", "--name", leased.name, "default/pod-1", "--", sys.executable, "-c", TALK, target]
    talk = subprocess.Popen(
        [*PODWIRE, *command],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=leased.podwire.environment, cwd=ROOT,
    )  # fmt: skip
    assert talk.stdin is not None
    assert talk.stdout is not None
    with talk:
        assert talk.stdout.readline() == "connected\n"
        try:
            fault(leased, "stop", "etcd-1")
            fault(leased, "partition", "node-1", "--from", "etcd-2", "--from", "etcd-3")
            fault(leased, "kill", "node-2")
            fault(leased, "remove", "node-1", "routes")
            assert leased.podwire.ok("lab", "node", "add", "--name", leased.name) == "node-3\n"
            assert not broken(leased, UNIQUE, MAPPED, KEPT)
        finally:
            fault(leased, "heal")
        becomes_sound(leased, 20)
        talk.stdin.write("enough\n")
        talk.stdin.close()
        assert int(talk.stdout.read()) > 10
    assert talk.returncode == 0
    after = leases(leased)
    assert before.items() <= after.items()
    assert len(after) == 3
    until(lambda: not leaks(leased, ("node-1", "node-2", "node-3")))


def test_a_node_that_leaves_is_forgotten_when_its_lease_is_gone(leased: Lab) -> None:
    """The machine is gone for good; somebody removes its lease, as it would end by itself in a day."""
    if "node-3" not in leased.kubectl("get", "nodes", "-o", "name"):
        leased.podwire.ok("lab", "node", "add", "--name", leased.name)
    key = next(key for key, value in leases(leased).items() if value["PublicIP"] == "198.18.0.13")
    leased.podwire.ok("lab", "node", "rm", "--name", leased.name, "node-3")
    script = "import os, sys; os.environ['ETCDCTL_API'] = '3'; os.execvp('etcdctl', ['etcdctl', *sys.argv[1:]])"
    assert leased.exec("world", sys.executable, "-c", script, "--endpoints", "http://198.18.3.2:2379", "del", key).status == 0
    becomes_sound(leased)
    until(lambda: not leaks(leased, ("node-1", "node-2")))


def test_a_node_whose_subnet_somebody_takes_moves_its_pods_to_another(leased: Lab) -> None:
    """As a flannel node does that comes back after its lease expired: it writes over the key without a look."""
    key = next(key for key, value in leases(leased).items() if value["PublicIP"] == "198.18.0.11")
    before = json.loads(leased.kubectl("get", "pod", "pod-1", "-o", "json"))["status"]
    stranger = '{"PublicIP":"198.18.0.99","PublicIPv6":"2001:db8:1::99","BackendType":"vxlan"}'
    script = "import os, sys; os.environ['ETCDCTL_API'] = '3'; os.execvp('etcdctl', ['etcdctl', *sys.argv[1:]])"
    etcdctl = (sys.executable, "-c", script, "--endpoints", "http://198.18.3.2:2379")
    assert leased.exec("world", *etcdctl, "put", key, stranger).status == 0

    def moved() -> bool:
        status = json.loads(leased.kubectl("get", "pod", "pod-1", "-o", "json"))["status"]
        ready = {c["type"]: c["status"] for c in status["conditions"]}["Ready"] == "True"
        return bool(ready and status["podIP"] != before["podIP"])

    until(moved, 20)
    after = json.loads(leased.kubectl("get", "pod", "pod-1", "-o", "json"))["status"]
    assert after["containerStatuses"][0]["restartCount"] == 0
    assert leased.exec("world", *etcdctl, "del", key).status == 0
    becomes_sound(leased, 20)
