"""What the API is told of a pod's containers, computed as kubelet does: pure."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

from podwire.model.meta import Json
from podwire.runtime.shim.messages import ContainerRecord

ID_PREFIX = "podwire://"


@dataclass(frozen=True, slots=True)
class ContainerView:
    """A container as it stands: its present run (if any), the one before, and why it waits if it does."""

    name: str
    image: str
    current: ContainerRecord | None = None
    previous: ContainerRecord | None = None
    waiting: str = ""
    message: str = ""
    ready: bool = False
    started: bool = False
    init: bool = False
    sidecar: bool = False

    @property
    def running(self) -> bool:
        return not self.waiting and self.current is not None and self.current.running

    @property
    def ended(self) -> ContainerRecord | None:
        """The run that is over, where no other has begun and none will at once."""
        return self.current if not self.waiting and self.current is not None and not self.current.running else None


def rfc3339(seconds: float) -> str:
    """Unix seconds as metav1.Time."""
    return datetime.fromtimestamp(int(seconds), UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def _terminated(record: ContainerRecord) -> Json:
    document: Json = {
        "exitCode": record.exit_code,
        "reason": record.reason or ("Completed" if record.exit_code == 0 else "Error"),
        "startedAt": rfc3339(record.started_at),
        "finishedAt": rfc3339(record.finished_at),
        "containerID": ID_PREFIX + record.cid,
    }
    if record.signal:
        document["signal"] = record.signal
    if record.message:
        document["message"] = record.message
    return {"terminated": document}


def _state(view: ContainerView) -> Json:
    if view.waiting:
        waiting = {"reason": view.waiting}
        return {"waiting": {**waiting, "message": view.message} if view.message else waiting}
    if view.current is None:
        return {"waiting": {"reason": "ContainerCreating"}}
    if view.current.running:
        return {"running": {"startedAt": rfc3339(view.current.started_at)}}
    return _terminated(view.current)


def container_status(view: ContainerView) -> Json:
    """corev1.ContainerStatus."""
    last = view.current if view.waiting else view.previous
    latest = view.current or view.previous
    return {
        "name": view.name,
        "image": view.image,
        "imageID": "",
        "ready": view.ready and (view.running or (view.init and view.ended is not None)),
        "started": view.started and view.running,
        "restartCount": latest.attempt if latest is not None else 0,
        "state": _state(view),
        "lastState": _terminated(last) if last is not None and not last.running else {},
        **({"containerID": ID_PREFIX + latest.cid} if latest is not None else {}),
    }


def initialized(init_views: Sequence[ContainerView]) -> bool:
    """Whether every init container is done, and every sidecar has started."""
    return all(
        (view.running and view.started) if view.sidecar else (view.ended is not None and view.ended.exit_code == 0)
        for view in init_views
    )


def phase(init_views: Sequence[ContainerView], views: Sequence[ContainerView], restart_policy: str, terminal: bool) -> str:
    """The pod's phase; `terminal`: nothing will be started again (the pod is being stopped)."""
    for view in init_views:
        failed = view.ended is not None and view.ended.exit_code != 0 and not view.sidecar
        if failed and (restart_policy == "Never" or terminal):
            return "Failed"
    started = any(view.current is not None for view in views)
    if not initialized(init_views) and not started:
        return "Failed" if terminal else "Pending"
    waiting = sum(1 for v in views if not v.running and v.ended is None and (v.current or v.previous) is None)
    if waiting:
        return "Failed" if terminal else "Pending"
    if any(view.running for view in views):
        return "Running"
    ends = [view.ended for view in views]
    if not terminal and (restart_policy == "Always" or not all(ends)):
        return "Running"
    if all(end is not None and end.exit_code == 0 for end in ends):
        return "Succeeded"
    return "Running" if restart_policy == "OnFailure" and not terminal else "Failed"


def should_restart(policy: str, exit_code: int) -> bool:
    """Whether a container that ended so is to be started again."""
    return policy == "Always" or (policy == "OnFailure" and exit_code != 0)
