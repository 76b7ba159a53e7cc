"""Phases and ContainerStatus documents, as kubelet computes them (pkg/kubelet: getPhase, convertToAPIContainerStatuses)."""

from dataclasses import replace

import pytest

from podwire.runtime.shim.messages import ContainerRecord
from podwire.runtime.status import ContainerView, container_status, phase, should_restart

RUNNING = ContainerRecord("u", "c1", "web", 0, "/log", False, 7, started_at=1000.0)
DONE = replace(RUNNING, finished_at=1010.0)
FAILED = replace(DONE, exit_code=3)
KILLED = replace(DONE, exit_code=137, signal=9)


def view(record: ContainerRecord | None, **fields: object) -> ContainerView:
    return replace(ContainerView("web", "nginx", current=record), **fields)  # type: ignore[arg-type]


def test_a_running_container() -> None:
    assert container_status(view(RUNNING, ready=True, started=True)) == {
        "name": "web",
        "image": "nginx",
        "imageID": "",
        "ready": True,
        "started": True,
        "restartCount": 0,
        "state": {"running": {"startedAt": "1970-01-01T00:16:40Z"}},
        "lastState": {},
        "containerID": "podwire://c1",
    }


def test_a_killed_container_tells_its_signal() -> None:
    assert container_status(view(KILLED))["state"]["terminated"] == {
        "exitCode": 137,
        "signal": 9,
        "reason": "Error",
        "startedAt": "1970-01-01T00:16:40Z",
        "finishedAt": "1970-01-01T00:16:50Z",
        "containerID": "podwire://c1",
    }


def test_one_that_is_held_back_keeps_its_end_as_last_state() -> None:
    status = container_status(view(replace(FAILED, attempt=4), waiting="CrashLoopBackOff", message="back-off 40s"))
    assert status["state"] == {"waiting": {"reason": "CrashLoopBackOff", "message": "back-off 40s"}}
    assert status["lastState"]["terminated"]["exitCode"] == 3
    assert status["restartCount"] == 4
    assert not status["ready"]


def test_one_that_was_never_started_waits() -> None:
    assert container_status(view(None))["state"] == {"waiting": {"reason": "ContainerCreating"}}
    assert "containerID" not in container_status(view(None))


@pytest.mark.parametrize(
    ("policy", "records", "expected"),
    [
        ("Always", [RUNNING, RUNNING], "Running"),
        ("Always", [RUNNING, None], "Pending"),
        ("Always", [RUNNING, FAILED], "Running"),
        ("Always", [DONE, DONE], "Running"),
        ("OnFailure", [DONE, DONE], "Succeeded"),
        ("OnFailure", [DONE, FAILED], "Running"),
        ("OnFailure", [DONE, RUNNING], "Running"),
        ("Never", [DONE, DONE], "Succeeded"),
        ("Never", [DONE, FAILED], "Failed"),
        ("Never", [RUNNING, FAILED], "Running"),
        ("Never", [None, None], "Pending"),
    ],
)
def test_phase_follows_from_the_containers(policy: str, records: list[ContainerRecord | None], expected: str) -> None:
    assert phase([], [view(record) for record in records], policy, terminal=False) == expected


@pytest.mark.parametrize(
    ("records", "expected"),
    [([DONE, DONE], "Succeeded"), ([DONE, KILLED], "Failed"), ([RUNNING, DONE], "Running"), ([None], "Failed")],
)
def test_phase_of_a_pod_that_is_being_stopped(records: list[ContainerRecord | None], expected: str) -> None:
    assert phase([], [view(record) for record in records], "Always", terminal=True) == expected


def test_a_pod_is_pending_until_its_init_containers_are_done() -> None:
    init, waiting = view(RUNNING, init=True), view(None)
    assert phase([init], [waiting], "Always", terminal=False) == "Pending"
    assert phase([view(FAILED, init=True)], [waiting], "Always", terminal=False) == "Pending"
    assert phase([view(FAILED, init=True)], [waiting], "Never", terminal=False) == "Failed"
    assert phase([view(DONE, init=True)], [view(RUNNING)], "Always", terminal=False) == "Running"


def test_a_sidecar_need_only_have_started() -> None:
    sidecar = view(RUNNING, init=True, sidecar=True, started=True)
    assert phase([sidecar], [view(RUNNING)], "Always", terminal=False) == "Running"
    assert phase([sidecar], [view(DONE)], "Never", terminal=False) == "Succeeded"


@pytest.mark.parametrize(
    ("policy", "code", "expected"),
    [("Always", 0, True), ("Always", 1, True), ("OnFailure", 0, False), ("OnFailure", 1, True), ("Never", 1, False)],
)
def test_restart_policy(policy: str, code: int, expected: bool) -> None:
    assert should_restart(policy, code) is expected
