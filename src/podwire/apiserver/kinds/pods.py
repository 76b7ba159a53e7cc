"""Pod: lifecycle and columns. The spec's defaults and rules are in podspecdefaults.py and podspecrules.py."""

from datetime import datetime
from typing import Any

from podwire.apiserver.kinds.base import AGE, NAME, STATUS, Column, Kind, Subresource
from podwire.apiserver.kinds.podspecdefaults import admit_pod, default_pod, default_pod_spec
from podwire.apiserver.kinds.podspecrules import check_pod_spec, check_pod_update
from podwire.apiserver.tables import age
from podwire.apiserver.validation import FieldError, Path
from podwire.model import resources
from podwire.model.meta import Json


class PodKind(Kind):
    resource = resources.PODS
    message = "k8s.io.api.core.v1.Pod"
    short_names = ("po",)
    categories = ("all",)
    subresources = (
        STATUS,
        Subresource("binding", ("create",), "Binding", "v1"),
        Subresource("eviction", ("create",), "Eviction", "policy/v1"),
        Subresource("log", ("get",)),
        Subresource("exec", ("create", "get"), "PodExecOptions", "v1"),
    )
    columns = (
        NAME,
        Column("Ready", "The aggregate readiness state of this pod for accepting traffic."),
        Column("Status", "The aggregate status of the containers in this pod."),
        Column("Restarts", "The number of times the containers in this pod have been restarted."),
        AGE,
        Column("IP", "Address allocated to the pod.", priority=1),
        Column("Node", "The node the pod runs on.", priority=1),
        Column("Nominated Node", "The node on which the pod is to run once room has been made.", priority=1),
        Column("Readiness Gates", "The readiness gates that hold, of those of the pod.", priority=1),
    )
    counts_generation = True

    def default(self, obj: Json) -> None:
        spec = obj.setdefault("spec", {})
        default_pod_spec(spec)
        default_pod(spec)

    def initialise(self, obj: Json, now: datetime) -> None:
        admit_pod(obj["spec"])
        obj["status"] = {"phase": "Pending", "qosClass": qos_class(obj["spec"])}

    def check(self, obj: Json, root: Path) -> list[FieldError]:
        return check_pod_spec(obj.get("spec") or {}, root / "spec")

    def check_update(self, new: Json, old: Json, root: Path) -> list[FieldError]:
        return check_pod_update(new.get("spec") or {}, old.get("spec") or {}, root / "spec")

    def take_status(self, new: Json, old: Json) -> Json:
        merged = super().take_status(new, old)
        if merged.get("status"):
            merged["status"] = dict(merged["status"])
            for one, many in (("podIP", "podIPs"), ("hostIP", "hostIPs")):
                _pair_addresses(merged["status"], one, many)
        return merged

    def grace_seconds(self, obj: Json, requested: int | None) -> int:
        """The pod's own grace period unless one is requested; none for a pod that no node has or that has ended."""
        spec, status = obj.get("spec") or {}, obj.get("status") or {}
        if not spec.get("nodeName") or status.get("phase") in ("Succeeded", "Failed"):
            return 0
        own = spec.get("terminationGracePeriodSeconds", 30)
        return max(0, int(own if requested is None else requested))

    def selectable_fields(self, obj: Json) -> dict[str, str]:
        spec, status = obj.get("spec") or {}, obj.get("status") or {}
        return {
            **super().selectable_fields(obj),
            "spec.nodeName": spec.get("nodeName", ""),
            "spec.restartPolicy": spec.get("restartPolicy", ""),
            "spec.schedulerName": spec.get("schedulerName", ""),
            "spec.serviceAccountName": spec.get("serviceAccountName", ""),
            "spec.hostNetwork": "true" if spec.get("hostNetwork") else "false",
            "status.phase": status.get("phase", ""),
            "status.podIP": status.get("podIP", ""),
            "status.nominatedNodeName": status.get("nominatedNodeName", ""),
        }

    def row(self, obj: Json, now: datetime) -> list[Any]:
        meta, spec, status = obj.get("metadata", {}), obj.get("spec") or {}, obj.get("status") or {}
        ready, total, word, restarts = pod_summary(obj, now)
        ips = [p.get("ip", "") for p in status.get("podIPs") or []]
        return [
            meta.get("name", ""),
            f"{ready}/{total}",
            word,
            restarts,
            age(meta.get("creationTimestamp"), now),
            (ips[0] if ips else status.get("podIP")) or "<none>",
            spec.get("nodeName") or "<none>",
            status.get("nominatedNodeName") or "<none>",
            _gates(spec, status),
        ]


def _pair_addresses(status: Json, one: str, many: str) -> None:
    """podIP is podIPs[0]; whoever writes only the one gets the other with it."""
    if status.get(one) and not status.get(many):
        status[many] = [{"ip": status[one]}]
    elif status.get(many) and not status.get(one):
        status[one] = status[many][0].get("ip", "")


def qos_class(spec: Json) -> str:
    """Guaranteed, Burstable or BestEffort, by what the containers request of CPU and memory."""
    wanted = [c.get("resources") or {} for c in (*(spec.get("containers") or []), *(spec.get("initContainers") or []))]
    asked = [{k: r.get(k) or {} for k in ("limits", "requests")} for r in wanted]
    if not any(a[k].get(name) for a in asked for k in a for name in ("cpu", "memory")):
        return "BestEffort"
    full = all(
        a["limits"].get(name) and a["limits"][name] == a["requests"].get(name) for a in asked for name in ("cpu", "memory")
    )
    return "Guaranteed" if full else "Burstable"


def _gates(spec: Json, status: Json) -> str:
    gates = [gate.get("conditionType") for gate in spec.get("readinessGates") or []]
    if not gates:
        return "<none>"
    true = {c.get("type") for c in status.get("conditions") or [] if c.get("status") == "True"}
    return f"{sum(gate in true for gate in gates)}/{len(gates)}"


def pod_summary(obj: Json, now: datetime) -> tuple[int, int, str, str]:
    """Ready containers, all containers, the status word and the restarts cell, as k8s.io/kubernetes printers give them."""
    spec, status = obj.get("spec") or {}, obj.get("status") or {}
    sidecars = [c for c in spec.get("initContainers") or [] if c.get("restartPolicy") == "Always"]
    total = len(spec.get("containers") or []) + len(sidecars)
    word = status.get("reason") or status.get("phase", "")
    init_word, initialising = _init_word(spec, status)
    states = status.get("containerStatuses") or []
    side_names = {c.get("name") for c in sidecars}
    side_states = [s for s in status.get("initContainerStatuses") or [] if s.get("name") in side_names]
    ready = sum(bool(s.get("ready")) and "running" in (s.get("state") or {}) for s in [*states, *side_states])
    counted = [*states, *side_states]
    if initialising:
        word = init_word
        counted = [*(status.get("initContainerStatuses") or []), *states]
    else:
        word = _container_word(word, states, status)
    if obj.get("metadata", {}).get("deletionTimestamp"):
        word = "Unknown" if status.get("reason") == "NodeLost" else "Terminating"
        if status.get("phase") in ("Succeeded", "Failed") and not status.get("reason"):
            word = _container_word(status["phase"], states, status)
    return ready, total, word, _restarts(counted, now)


def _init_word(spec: Json, status: Json) -> tuple[str, bool]:
    inits = {c.get("name"): c for c in spec.get("initContainers") or []}
    for i, state in enumerate(status.get("initContainerStatuses") or []):
        current = state.get("state") or {}
        ended = current.get("terminated")
        if ended and ended.get("exitCode", 0) == 0:
            continue
        sidecar = inits.get(state.get("name"), {}).get("restartPolicy") == "Always"
        if sidecar and state.get("started"):
            continue
        if ended:
            return "Init:" + _ended_word(ended), True
        reason = (current.get("waiting") or {}).get("reason", "")
        if reason and reason != "PodInitializing":
            return f"Init:{reason}", True
        return f"Init:{i}/{len(inits)}", True
    return "", False


def _ended_word(ended: Json) -> str:
    if ended.get("reason"):
        return str(ended["reason"])
    if ended.get("signal"):
        return f"Signal:{ended['signal']}"
    return f"ExitCode:{ended.get('exitCode', 0)}"


def _container_word(word: str, states: list[Json], status: Json) -> str:
    running = False
    for state in reversed(states):
        current = state.get("state") or {}
        if (current.get("waiting") or {}).get("reason"):
            word = current["waiting"]["reason"]
        elif current.get("terminated"):
            word = _ended_word(current["terminated"])
        elif state.get("ready") and "running" in current:
            running = True
    if word == "Completed" and running:
        ready = any(c.get("type") == "Ready" and c.get("status") == "True" for c in status.get("conditions") or [])
        word = "Running" if ready else "NotReady"
    return word


def _restarts(states: list[Json], now: datetime) -> str:
    count = sum(int(s.get("restartCount", 0)) for s in states)
    ends = [((s.get("lastState") or {}).get("terminated") or {}).get("finishedAt") for s in states]
    last = max((e for e in ends if e), default=None)
    return f"{count} ({age(last, now)} ago)" if count and last else str(count)
