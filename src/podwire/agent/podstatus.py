"""A pod's status document as the kubelet writes it, from what the runtime reports. Pure."""

from collections.abc import Sequence

from podwire.model.addr import IPAddress
from podwire.model.meta import Json
from podwire.model.objects import Condition, Container, Pod
from podwire.model.podruntime import PodReport

FINISHED = ("Succeeded", "Failed")
SANDBOX_LOST = "SandboxLost"
"""`PodReport.reason` of a pod whose pause process was killed from outside."""


def status_patch(pod: Pod, report: PodReport, ips: Sequence[IPAddress], host_ips: Sequence[IPAddress], now: str) -> Json:
    """A merge patch for pods/status. `pod` is the object as last read: conditions of others and the times of unchanged
    conditions come from it. `ips` is empty while the pod has no address; `now` is RFC 3339."""
    status: Json = {
        "phase": report.phase,
        "reason": report.reason or None,
        "message": report.message or None,
        "conditions": _conditions(pod, report, bool(ips), now),
        "containerStatuses": list(report.container_statuses),
        "hostIP": str(host_ips[0]),
        "hostIPs": [{"ip": str(ip)} for ip in host_ips],
    }
    if report.init_container_statuses:
        status["initContainerStatuses"] = list(report.init_container_statuses)
    if ips:
        status["podIP"] = str(ips[0])
        status["podIPs"] = [{"ip": str(ip)} for ip in ips]
    return {"status": status}


def rejection_patch(reason: str, message: str) -> Json:
    """The merge patch for a pod that this node refuses to run."""
    return {"status": {"phase": "Failed", "reason": reason, "message": f"Pod was rejected: {message}"}}


def without_times(patch: Json) -> Json:
    """The patch as it matters for "has anything changed": conditions without their times."""
    status = dict(patch["status"])
    status["conditions"] = [
        {key: value for key, value in condition.items() if key != "lastTransitionTime"}
        for condition in status.get("conditions", [])
    ]
    return {"status": status}


def _conditions(pod: Pod, report: PodReport, has_network: bool, now: str) -> list[Json]:
    initialized = _initialized(pod, report)
    ready = report.ready and report.phase == "Running"
    reason, message = ("", "") if ready else _why_not_ready(report)
    ours = [
        Condition(type="PodReadyToStartContainers", status=_truth(has_network and report.phase not in FINISHED)),
        Condition(
            type="Initialized",
            status=_truth(initialized),
            reason="" if initialized else "ContainersNotInitialized",
            message="" if initialized else "containers with incomplete status: " + _names(pod.spec.init_containers),
        ),
        Condition(type="Ready", status=_truth(ready), reason=reason, message=message),
        Condition(type="ContainersReady", status=_truth(ready), reason=reason, message=message),
        Condition(type="PodScheduled", status="True"),
    ]
    before = {condition.type: condition for condition in pod.status.conditions}
    foreign = [c for name, c in before.items() if name not in {condition.type for condition in ours}]
    return [_document(condition, before.get(condition.type), now) for condition in (*ours, *foreign)]


def _document(condition: Condition, before: Condition | None, now: str) -> Json:
    same = before is not None and before.status == condition.status and before.last_transition_time
    document: Json = {
        "type": condition.type,
        "status": condition.status,
        "lastTransitionTime": before.last_transition_time if same and before else now,
    }
    if condition.reason:
        document["reason"] = condition.reason
    if condition.message:
        document["message"] = condition.message
    return document


def _why_not_ready(report: PodReport) -> tuple[str, str]:
    if report.phase == "Succeeded":
        return "PodCompleted", ""
    if report.phase == "Failed":
        return "PodFailed", ""
    unready = [status["name"] for status in report.container_statuses if not status.get("ready")]
    return "ContainersNotReady", f"containers with unready status: [{' '.join(unready)}]"


def _initialized(pod: Pod, report: PodReport) -> bool:
    """Ordinary init containers have ended well, those that stay (restartPolicy Always: sidecars) have started."""
    if report.phase == "Succeeded":
        return True
    states = {status["name"]: status for status in report.init_container_statuses}
    for container in pod.spec.init_containers:
        status = states.get(container.name, {})
        if container.restart_policy == "Always":
            done = bool(status.get("started"))
        else:
            done = status.get("state", {}).get("terminated", {}).get("exitCode") == 0
        if not done:
            return False
    return True


def _names(containers: Sequence[Container]) -> str:
    return f"[{' '.join(container.name for container in containers)}]"


def _truth(value: bool) -> str:
    return "True" if value else "False"
