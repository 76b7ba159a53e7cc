import ipaddress
from datetime import UTC, datetime
from pathlib import Path

import plannodes

from podwire.agent.config import AgentConfig
from podwire.agent.registration import (
    Machine,
    NodeState,
    conditions,
    lease_document,
    node_document,
    node_status,
    read_machine,
)
from podwire.model.meta import ObjectMeta
from podwire.model.objects import Condition, Node, NodeSpec

NOW = datetime(2026, 1, 2, 3, 4, 5, 600, tzinfo=UTC)
CONFIG = AgentConfig(
    node_name="n1",
    node_ips=(ipaddress.ip_address("198.18.0.11"), ipaddress.ip_address("2001:db8:1::11")),
    cluster_cidrs=(ipaddress.ip_network("10.244.0.0/16"),),
    service_cidrs=(ipaddress.ip_network("10.96.0.0/12"),),
    state_dir=Path("/nowhere"),
    labels={"kubernetes.io/hostname": "named-otherwise"},
)


def test_what_a_node_says_of_itself_is_what_its_peers_need() -> None:
    document = node_document(CONFIG, Machine(architecture="amd64"))
    meta = document["metadata"]
    assert meta["labels"]["kubernetes.io/hostname"] == "named-otherwise"
    node = Node(
        metadata=ObjectMeta(name=meta["name"], annotations=meta["annotations"]),
        spec=NodeSpec(pod_cidrs=("10.244.1.0/24", "fd00:10:244:1::/64")),
    )
    assert [str(peer.public_ip) for peer in plannodes.peers_of(node)] == ["198.18.0.11", "2001:db8:1::11"]


def test_conditions_keep_their_times_and_those_of_others() -> None:
    before = [
        Condition(type="Ready", status="False", last_transition_time="2025-01-01T00:00:00Z"),
        Condition(type="NetworkUnavailable", status="False", last_transition_time="2025-01-01T00:00:00Z"),
        Condition(type="example.com/Disk", status="Unknown", reason="NoIdea"),
    ]
    found = {c["type"]: c for c in conditions(NodeState(network=True, ready=True), before, NOW)}
    assert found["Ready"]["lastTransitionTime"] == "2026-01-02T03:04:05Z"
    assert found["NetworkUnavailable"]["lastTransitionTime"] == "2025-01-01T00:00:00Z"
    assert found["example.com/Disk"]["reason"] == "NoIdea"
    down = {c["type"]: c for c in conditions(NodeState(message="the kernel refused X"), [], NOW)}
    assert (down["Ready"]["status"], down["Ready"]["message"]) == ("False", "the kernel refused X")
    assert down["NetworkUnavailable"]["status"] == "True"


def test_status_and_lease() -> None:
    status = node_status(CONFIG, Machine(kernel_version="6.18"), NodeState(), [], NOW)["status"]
    assert status["allocatable"] == status["capacity"]
    assert status["capacity"]["pods"] == "110"
    assert status["nodeInfo"]["kernelVersion"] == "6.18"
    lease = lease_document(CONFIG, "uid-1", NOW)
    assert lease["spec"]["renewTime"] == "2026-01-02T03:04:05.000600Z"
    assert lease["metadata"]["ownerReferences"][0]["uid"] == "uid-1"


def test_this_machine_can_be_read() -> None:
    machine = read_machine()
    assert machine.kernel_version
    assert machine.os_image
    assert machine.architecture not in ("", "x86_64", "aarch64")
