import ipaddress
from typing import Any

import pytest

from podwire.agent.admission import refuse
from podwire.agent.podstatus import status_patch, without_times
from podwire.model.meta import Json, ObjectMeta
from podwire.model.objects import Condition, Container, ContainerPort, Pod, PodSpec, PodStatus
from podwire.model.podruntime import PodReport

NOW = "2026-01-02T03:04:05Z"
EARLIER = "2026-01-01T00:00:00Z"
IPS = (ipaddress.ip_address("10.244.1.2"), ipaddress.ip_address("fd00:10:244:1::2"))
HOST_IPS = (ipaddress.ip_address("198.18.0.11"),)


def pod(*conditions: Condition, init: tuple[Container, ...] = (), **spec: Any) -> Pod:
    containers = spec.pop("containers", (Container(name="app"),))
    return Pod(
        metadata=ObjectMeta(name="web", namespace="shop"),
        spec=PodSpec(containers=containers, init_containers=init, **spec),
        status=PodStatus(phase="Running", conditions=conditions),
    )


def running(ready: bool = True) -> PodReport:
    return PodReport("u", "Running", ready, ({"name": "app", "ready": ready},))


def conditions(patch: Json) -> dict[str, Json]:
    return {c["type"]: c for c in patch["status"]["conditions"]}


def test_a_ready_pod() -> None:
    status = status_patch(pod(), running(), IPS, HOST_IPS, NOW)["status"]
    assert status["phase"] == "Running"
    assert (status["podIP"], status["podIPs"]) == ("10.244.1.2", [{"ip": "10.244.1.2"}, {"ip": "fd00:10:244:1::2"}])
    assert (status["hostIP"], status["hostIPs"]) == ("198.18.0.11", [{"ip": "198.18.0.11"}])
    assert {c["type"]: c["status"] for c in status["conditions"]} == dict.fromkeys(
        ["PodReadyToStartContainers", "Initialized", "Ready", "ContainersReady", "PodScheduled"], "True"
    )


def test_an_unready_pod_names_its_containers() -> None:
    found = conditions(status_patch(pod(), running(ready=False), IPS, HOST_IPS, NOW))
    assert found["Ready"]["status"] == found["ContainersReady"]["status"] == "False"
    assert found["Ready"]["reason"] == "ContainersNotReady"
    assert found["Ready"]["message"] == "containers with unready status: [app]"


def test_times_of_unchanged_conditions_and_foreign_conditions_stay() -> None:
    before = (
        Condition(type="Ready", status="True", last_transition_time=EARLIER),
        Condition(type="ContainersReady", status="False", last_transition_time=EARLIER),
        Condition(type="example.com/gate", status="True", reason="Open", last_transition_time=EARLIER),
    )
    patch = status_patch(pod(*before), running(), IPS, HOST_IPS, NOW)
    found = conditions(patch)
    assert found["Ready"]["lastTransitionTime"] == EARLIER
    assert found["ContainersReady"]["lastTransitionTime"] == NOW
    assert found["example.com/gate"] == {
        "type": "example.com/gate",
        "status": "True",
        "reason": "Open",
        "lastTransitionTime": EARLIER,
    }
    later = status_patch(pod(*before), running(), IPS, HOST_IPS, "2027-01-01T00:00:00Z")
    assert later != patch
    assert without_times(later) == without_times(patch)


@pytest.mark.parametrize(
    ("restart", "status", "done"),
    [
        ("", {"state": {"running": {}}}, "False"),
        ("", {"state": {"terminated": {"exitCode": 1}}}, "False"),
        ("", {"state": {"terminated": {"exitCode": 0}}}, "True"),
        ("Always", {"state": {"running": {}}, "started": False}, "False"),
        ("Always", {"state": {"running": {}}, "started": True}, "True"),
    ],
)
def test_initialized_waits_for_init_containers_and_sidecars(restart: str, status: Json, done: str) -> None:
    report = PodReport("u", "Pending", False, (), ({"name": "first", **status},))
    subject = pod(init=(Container(name="first", restart_policy=restart),))
    found = conditions(status_patch(subject, report, IPS, HOST_IPS, NOW))
    assert found["Initialized"]["status"] == done
    if done == "False":
        assert found["Initialized"]["message"] == "containers with incomplete status: [first]"


@pytest.mark.parametrize(("phase", "reason"), [("Succeeded", "PodCompleted"), ("Failed", "PodFailed")])
def test_a_finished_pod_is_not_ready_for_that_reason(phase: str, reason: str) -> None:
    found = conditions(status_patch(pod(), PodReport("u", phase, False), IPS, HOST_IPS, NOW))
    assert (found["Ready"]["status"], found["Ready"]["reason"]) == ("False", reason)
    assert found["PodReadyToStartContainers"]["status"] == "False"


def holding(name: str, *ports: ContainerPort, host_network: bool = False) -> Pod:
    return Pod(
        metadata=ObjectMeta(name=name, namespace="shop"),
        spec=PodSpec(containers=(Container(name="app", ports=ports),), host_network=host_network),
    )


def port(host: int, protocol: str = "TCP", ip: str = "") -> ContainerPort:
    return ContainerPort(container_port=80, host_port=host, protocol=protocol, host_ip=ip)


@pytest.mark.parametrize(
    ("held", "wanted", "clash"),
    [
        (port(8080), port(8080), True),
        (port(8080), port(8081), False),
        (port(8080), port(8080, "UDP"), False),
        (port(8080, ip="10.0.0.1"), port(8080, ip="10.0.0.2"), False),
        (port(8080, ip="10.0.0.1"), port(8080), True),
        (port(8080, ip="0.0.0.0"), port(8080, ip="10.0.0.2"), True),
        (port(0), port(0), False),
    ],
)
def test_host_ports_clash_by_protocol_port_and_address(held: ContainerPort, wanted: ContainerPort, clash: bool) -> None:
    rejection = refuse(holding("new", wanted), [holding("old", held)], 110)
    assert (rejection is not None) == clash
    if rejection:
        assert rejection.reason == "NodePorts"
        assert "shop/old" in rejection.message


def test_all_ports_of_a_host_network_pod_count() -> None:
    old = holding("old", ContainerPort(container_port=80), host_network=True)
    assert refuse(holding("new", port(80)), [old], 110)
    assert not refuse(holding("new", port(8080)), [old], 110)


def test_a_full_node_refuses() -> None:
    rejection = refuse(holding("new"), [holding("a"), holding("b")], 2)
    assert rejection
    assert rejection.reason == "OutOfpods"
