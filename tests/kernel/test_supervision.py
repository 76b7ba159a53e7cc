"""Restarts, back-off and probes, with real processes and the tests' own time."""

import asyncio
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from podrig import Rig, Watched, make_pod, rig, shell

from podwire.model.objects import Pod
from podwire.model.podruntime import PodReport

pytestmark = pytest.mark.kernel


class HeldClock:
    """The machine's time plus what was advanced; sleeping ends by `advance` only."""

    def __init__(self) -> None:
        self._offset = 0.0
        self._sleepers: list[tuple[float, asyncio.Future[None]]] = []

    def now(self) -> float:
        return time.time() + self._offset

    async def sleep(self, seconds: float) -> None:
        woken: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._sleepers.append((self.now() + seconds, woken))
        await woken

    def advance(self, seconds: float) -> None:
        self._offset += seconds
        due = [sleeper for sleeper in self._sleepers if sleeper[0] <= self.now()]
        self._sleepers = [sleeper for sleeper in self._sleepers if sleeper[0] > self.now()]
        for _, woken in due:
            if not woken.done():
                woken.set_result(None)


@pytest_asyncio.fixture
async def shim(tmp_path: Path) -> AsyncIterator[Rig]:
    async with rig(tmp_path) as made:
        yield made


def state(report: PodReport) -> dict[str, Any]:
    status = report.container_statuses[0]
    (kind,) = status["state"]
    return {"kind": kind, "restarts": status["restartCount"], "ready": status["ready"], **status["state"][kind]}


async def has(node: Watched, pod: Pod, **wanted: Any) -> PodReport:
    """Wait until the first container's state has these."""
    return await node.report(pod, lambda report: wanted.items() <= state(report).items())


async def test_a_crashing_container_is_restarted_at_once_and_then_held_back(shim: Rig) -> None:
    clock = HeldClock()
    node = shim.node(clock=clock)
    pod = make_pod("web", shell("echo run; exit 4"))
    await node.run(pod)
    report = await has(node, pod, kind="waiting", reason="CrashLoopBackOff", restarts=1)
    assert state(report)["message"] == "back-off 10s restarting failed container=main"
    last = report.container_statuses[0]["lastState"]["terminated"]
    assert (last["exitCode"], last["reason"]) == (4, "Error")
    assert report.phase == "Running"
    clock.advance(12)
    report = await has(node, pod, kind="waiting", restarts=2)
    assert state(report)["message"] == "back-off 20s restarting failed container=main"
    assert shim.log(pod, attempt=1) == shim.log(pod, attempt=2) == "run\n"
    assert not (shim.root / "node-1/pods" / pod.metadata.uid / "logs/main/0.log").exists()
    assert len(node.events("BackOff")) == 2
    await node.end(pod)


@pytest.mark.parametrize(("policy", "phase"), [("OnFailure", "Succeeded"), ("Never", "Failed")])
async def test_restart_policies(shim: Rig, policy: str, phase: str) -> None:
    node = shim.node()
    script = "test -e /shared/x && exit 0; touch /shared/x; exit 1"
    container = shell(script, volumeMounts=[{"name": "v", "mountPath": "/shared"}])
    pod = make_pod("job", container, restartPolicy=policy, volumes=[{"name": "v", "emptyDir": {}}])
    await node.run(pod)
    report = await node.report(pod, lambda report: report.phase in ("Succeeded", "Failed"))
    assert (report.phase, state(report)["restarts"]) == (phase, 1 if policy == "OnFailure" else 0)
    await node.end(pod)


async def test_a_failing_init_container_keeps_the_pod_pending(shim: Rig) -> None:
    node = shim.node()
    pod = make_pod("web", shell("sleep 1000"), initContainers=[shell("exit 1", "setup")])
    await node.run(pod)
    report = await node.report(pod, lambda r: r.init_container_statuses[0]["state"].get("waiting") is not None)
    report = await node.report(pod, lambda r: r.init_container_statuses[0]["restartCount"] == 1)
    assert report.phase == "Pending"
    assert state(report)["reason"] == "PodInitializing"
    await node.end(pod)


async def test_readiness_follows_its_probe(shim: Rig) -> None:
    node = shim.node()
    probe = {"exec": {"command": ["test", "-e", "/shared/ready"]}, "periodSeconds": 1, "failureThreshold": 1}
    container = shell("sleep 1000", readinessProbe=probe, volumeMounts=[{"name": "v", "mountPath": "/shared"}])
    pod = make_pod("web", container, volumes=[{"name": "v", "emptyDir": {}}])
    await node.run(pod)
    await node.until(lambda: bool(node.events("Unhealthy")))
    assert not node.latest[pod.metadata.uid].ready
    marker = shim.root / "node-1/pods" / pod.metadata.uid / "volumes/v/ready"
    marker.touch()
    await node.ready(pod)
    marker.unlink()
    report = await node.report(pod, lambda report: not report.ready)
    assert state(report)["kind"] == "running"
    assert node.events("Unhealthy")[0].message == "Readiness probe failed: "
    await node.end(pod)


async def test_a_failed_liveness_probe_restarts_the_container(shim: Rig) -> None:
    node = shim.node()
    probe = {"exec": {"command": ["test", "-e", "/shared/alive"]}, "periodSeconds": 1, "failureThreshold": 1}
    script = "if test -e /shared/again; then touch /shared/alive; fi; touch /shared/again; exec sleep 1000"
    container = shell(script, livenessProbe=probe, volumeMounts=[{"name": "v", "mountPath": "/shared"}])
    pod = make_pod("web", container, terminationGracePeriodSeconds=0, volumes=[{"name": "v", "emptyDir": {}}])
    await node.run(pod)
    report = await has(node, pod, kind="running", restarts=1)
    assert report.container_statuses[0]["lastState"]["terminated"]["exitCode"] == 137
    (event,) = node.events("Killing")
    assert event.message == "Container main failed liveness probe, will be restarted"
    await node.end(pod)


async def test_nothing_is_ready_before_it_has_started(shim: Rig) -> None:
    node = shim.node()
    startup = {"exec": {"command": ["test", "-e", "/shared/up"]}, "periodSeconds": 1, "failureThreshold": 100}
    container = shell("sleep 1000", startupProbe=startup, volumeMounts=[{"name": "v", "mountPath": "/shared"}])
    pod = make_pod("web", container, volumes=[{"name": "v", "emptyDir": {}}])
    await node.run(pod)
    report = await has(node, pod, kind="running")
    assert (report.ready, report.container_statuses[0]["started"]) == (False, False)
    (shim.root / "node-1/pods" / pod.metadata.uid / "volumes/v/up").touch()
    report = await node.ready(pod)
    assert report.container_statuses[0]["started"]
    await node.end(pod)


@pytest.mark.parametrize(
    ("probe", "ready"),
    [
        ({"httpGet": {"port": "http", "path": "/healthz"}}, True),
        ({"httpGet": {"port": 8080, "httpHeaders": [{"name": "X-A", "value": "b"}]}}, True),
        ({"tcpSocket": {"port": "http"}}, True),
        ({"tcpSocket": {"port": 8081}}, True),
        ({"httpGet": {"port": 8080, "scheme": "HTTPS"}}, True),
        ({"exec": {"command": ["pg_isready"]}}, True),
        ({"grpc": {"port": 9000}}, True),
        ({"httpGet": {"port": "nameless"}}, False),
    ],
)
async def test_a_stand_in_passes_the_probes_that_its_image_would(shim: Rig, probe: dict[str, Any], ready: bool) -> None:
    node = shim.node()
    web = {"name": "web", "image": "nginx", "ports": [{"containerPort": 8080, "name": "http"}], "readinessProbe": probe}
    pod = make_pod("web", web, hostNetwork=True)
    await node.run(pod)
    if ready:
        await node.ready(pod)
    else:
        await node.until(lambda: bool(node.events("Unhealthy")))
        assert not node.latest[pod.metadata.uid].ready
    await node.end(pod)


async def test_network_probes_tell_what_does_not_answer(shim: Rig) -> None:
    node = shim.node()
    probes: dict[str, dict[str, object]] = {
        "tcp": {"tcpSocket": {"port": 8081}},
        "http": {"httpGet": {"port": 8081}},
        "not-http": {"httpGet": {"port": 8080}},
        "not-tls": {"httpGet": {"port": 8080, "scheme": "HTTPS"}},
    }
    echo = (
        "import socket; s = socket.create_server(('127.0.0.1', 8080))\nwhile True: c, _ = s.accept(); c.recv(99); c.send(b'no')"
    )
    container = {"name": "echo", "command": ["python3", "-c", echo], "readinessProbe": {"tcpSocket": {"port": 8080}}}
    others = [shell("sleep 1000", name, readinessProbe={**probe, "periodSeconds": 100}) for name, probe in probes.items()]
    pod = make_pod("web", container, *others, hostNetwork=True)
    await node.run(pod)
    await node.until(lambda: {event.container for event in node.events("Unhealthy")} >= set(probes))
    told = {event.container: event.message for event in node.events("Unhealthy")}
    assert told["tcp"] == "Readiness probe failed: dial tcp 127.0.0.1:8081: Connection refused"
    assert told["http"] == "Readiness probe failed: dial tcp 127.0.0.1:8081: Connection refused"
    await node.end(pod)


async def test_an_init_container_of_which_only_the_image_is_known_completes(shim: Rig) -> None:
    node = shim.node()
    pod = make_pod("web", {"name": "web", "image": "app"}, initContainers=[{"name": "migrate", "image": "app"}])
    await node.run(pod)
    report = await node.ready(pod)
    assert report.init_container_statuses[0]["state"]["terminated"]["reason"] == "Completed"
    await node.end(pod)
