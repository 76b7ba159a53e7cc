"""`podwire lab fault` on real packets: what is cut is cut, what is removed comes back, and healing leaves nothing."""

import json
import sys

import pytest
from labcommand import Lab, until

pytestmark = [pytest.mark.lab, pytest.mark.timeout(120)]

CONNECTS = """
import socket, sys
for address in sys.argv[1:]:
    try:
        socket.create_connection((address, 10250), 0.7).close()
        print("yes")
    except OSError:
        print("no")
"""
"""Whether each node's kubelet API answers."""

FETCH = """
import sys, urllib.request
try:
    urllib.request.urlopen(sys.argv[1], timeout=1).read()
except OSError:
    sys.exit(1)
"""

ADDRESSES = {"node-1": "198.18.0.11", "node-2": "198.18.0.12", "node-3": "198.18.0.13"}


def fault(lab: Lab, verb: str, *arguments: str) -> str:
    return lab.podwire.ok("lab", "fault", verb, "--name", lab.name, *arguments)


def reached(lab: Lab, place: str) -> set[str]:
    """The nodes that `place` can connect to."""
    done = lab.exec(place, sys.executable, "-c", CONNECTS, *ADDRESSES.values())
    return {node for node, answer in zip(ADDRESSES, done.out.split(), strict=True) if answer == "yes"}


def log_has(lab: Lab, *words: str) -> bool:
    text = lab.podwire.ok("lab", "logs", "--name", lab.name)
    return any(all(word in line for word in words) for line in text.splitlines())


def test_partitions_and_stops_last_until_they_are_healed(lab: Lab) -> None:
    try:
        assert fault(lab, "partition", "node-1", "--from", "node-2") == "node-1 cut off from node-2\n"
        assert reached(lab, "node-1") == {"node-1", "node-3"}
        assert reached(lab, "node-2") == {"node-2", "node-3"}
        assert reached(lab, "world") == set(ADDRESSES)
        fault(lab, "stop", "node-3")
        assert reached(lab, "world") == {"node-1", "node-2"}
        fault(lab, "stop", "node-3")  # as it is already
        killed = lab.podwire("lab", "fault", "kill", "--name", lab.name, "node-3")
        assert killed.status == 1
        assert "node-3 is stopped, so no agent runs there" in killed.err
        assert [f["kind"] for f in json.loads(fault(lab, "ls", "-o", "json"))] == ["partition", "stop"]
        assert fault(lab, "heal", "node-2") == "1 faults healed\n"
        assert reached(lab, "node-1") == {"node-1", "node-2"}
    finally:
        fault(lab, "heal")
    until(lambda: reached(lab, "node-1") == set(ADDRESSES))
    assert fault(lab, "ls") == "none\n"
    until(lambda: lab.podwire("paths", "--name", lab.name).status == 0)


def test_everything_lost_is_nothing_received(lab: Lab) -> None:
    try:
        fault(lab, "drop", "node-1", "--percent", "100")
        assert reached(lab, "world") == {"node-2", "node-3"}
    finally:
        fault(lab, "heal")
    assert reached(lab, "world") == set(ADDRESSES)


def test_what_is_removed_is_put_back_and_named(lab: Lab) -> None:
    fault(lab, "remove", "node-2", "routes", "neighbours", "switches", "rules")
    until(lambda: log_has(lab, "put back what somebody changed", "route 10.244."), 5)
    until(lambda: log_has(lab, "rules were not as left"), 5)
    until(lambda: log_has(lab, "put back what somebody changed", "net/ipv4/ip_forward=1"), 5)
    fault(lab, "remove", "node-2", "flannel.1", "cni0")
    until(lambda: log_has(lab, "put back what somebody changed", "link cni0"), 5)
    until(lambda: lab.podwire("paths", "--name", lab.name).status == 0)


def test_a_node_that_the_api_server_cannot_be_reached_from_goes_on_alone_and_catches_up(lab: Lab) -> None:
    """Its agent hears of nothing; its pods answer as before, also on a node that is cut off from everybody."""
    place = json.dumps({"spec": {"nodeName": "node-1"}})
    run = ("--image=web", "--port=8080", f"--overrides={place}")
    lab.kubectl("run", "before", *run)
    lab.kubectl("wait", "--for=condition=Ready", "pod/before", "--timeout=20s")
    address = lab.kubectl("get", "pod", "before", "-o", "jsonpath={.status.podIP}")
    fetch = (sys.executable, "-c", FETCH, f"http://{address}:8080/")
    try:
        fault(lab, "partition", "node-1", "--from", "api")
        lab.kubectl("run", "meanwhile", *run)
        elsewhere = json.dumps({"spec": {"nodeName": "node-2"}})
        lab.kubectl("run", "elsewhere", "--image=web", "--port=8080", f"--overrides={elsewhere}")
        lab.kubectl("wait", "--for=condition=Ready", "pod/elsewhere", "--timeout=20s")
        assert lab.kubectl("get", "pod", "meanwhile", "-o", "jsonpath={.status.podIP}") == ""
        assert lab.exec("node-2", *fetch).status == 0
        fault(lab, "partition", "node-1")
        assert lab.exec("node-2", *fetch).status == 1
        assert lab.exec("node-1", *fetch).status == 0
    finally:
        fault(lab, "heal")
    lab.kubectl("wait", "--for=condition=Ready", "pod/meanwhile", "--timeout=20s")
    restarts = "jsonpath={.status.containerStatuses[0].restartCount}"
    assert lab.kubectl("get", "pod", "before", "-o", restarts) == "0"
    until(lambda: lab.podwire("paths", "--name", lab.name).status == 0)
    lab.kubectl("delete", "pod", "before", "meanwhile", "elsewhere", "--wait=false")


def test_what_cannot_be_broken_is_named(lab: Lab) -> None:
    for arguments, words in (
        (("delay", "api", "--ms", "5"), "api has no cable of its own"),
        (("partition", "node-9"), "there is no node-9 in this lab"),
        (("stop", "world"), "world cannot be stopped"),
        (("remove", "node-1", "eth0"), "node-1 has no eth0 of an agent's"),
        (("partition", "node-1", "node-2", "--from", "node-2"), "node-2 cannot be cut off from itself"),
    ):
        done = lab.podwire("lab", "fault", arguments[0], "--name", lab.name, *arguments[1:])
        assert done.status == 1
        assert words in done.err
