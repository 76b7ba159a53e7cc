"""Is a node there? From its Lease and its conditions to conditions, taints and what becomes of its pods. Pure."""

from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime

import msgspec

from podwire.controllers.placement import tolerates
from podwire.model.meta import Json
from podwire.model.objects import Node, Pod, Taint
from podwire.model.timestamps import format_time

NOT_READY = "node.kubernetes.io/not-ready"
UNREACHABLE = "node.kubernetes.io/unreachable"
_EFFECTS = ("NoSchedule", "NoExecute")
_KUBELET_CONDITIONS = ("Ready", "MemoryPressure", "DiskPressure", "PIDPressure")


@dataclass(frozen=True, slots=True)
class NodeVerdict:
    """The patches that a Node needs (None: is as it should be), and whether its pods are to be marked as not Ready.

    `status` is a strategic merge patch, `spec` a merge patch.
    """

    status: Json | None
    spec: Json | None
    pods_lost: bool


def judge_node(node: Node, *, silent: bool, now: datetime) -> NodeVerdict:
    """`silent`: neither the Lease nor the Node's own status has been renewed for longer than the grace period."""
    ready = _ready_status(node)
    status = None
    if silent and ready != "Unknown":
        ready = "Unknown"
        status = {"status": {"conditions": _silenced(node, now)}}
    wanted = {"Unknown": UNREACHABLE, "False": NOT_READY}.get(ready)
    others = [taint for taint in node.spec.taints if taint.key not in (NOT_READY, UNREACHABLE)]
    mine = [taint for taint in node.spec.taints if taint.key in (NOT_READY, UNREACHABLE)]
    right = [Taint(key=wanted, effect=effect) for effect in _EFFECTS] if wanted else []
    spec = None
    if {(t.key, t.effect) for t in mine} != {(t.key, t.effect) for t in right}:
        stamp = format_time(now)
        timed = [{"key": t.key, "effect": t.effect, "timeAdded": stamp} for t in right]
        # A list is replaced whole: only the one that was seen, or somebody's taint of this very moment would be lost.
        meta = {"resourceVersion": node.metadata.resource_version}
        spec = {"metadata": meta, "spec": {"taints": [*msgspec.to_builtins(others), *timed] or None}}
    return NodeVerdict(status, spec, pods_lost=ready == "Unknown")


def _ready_status(node: Node) -> str:
    """A node that has not said anything yet is not called unready: it is starting."""
    return next((c.status for c in node.status.conditions if c.type == "Ready"), "")


def _silenced(node: Node, now: datetime) -> list[Json]:
    stamp = format_time(now)
    unknown = {
        "status": "Unknown",
        "reason": "NodeStatusUnknown",
        "message": "Kubelet stopped posting node status.",
        "lastTransitionTime": stamp,
    }
    present = {condition.type for condition in node.status.conditions} | {"Ready"}
    return [{"type": type} | unknown for type in _KUBELET_CONDITIONS if type in present]


def not_ready_patch(pod: Pod, now: datetime) -> Json | None:
    """A strategic merge patch that takes Ready off a pod of a node that is not heard of; None if it is not Ready."""
    if not pod.ready:
        return None
    stamp = format_time(now)
    condition = {
        "type": "Ready",
        "status": "False",
        "reason": "NodeNotReady",
        "message": "Node is not ready",
        "lastTransitionTime": stamp,
    }
    return {"metadata": {"uid": pod.metadata.uid}, "status": {"conditions": [condition]}}


def eviction_delay(pod: Pod, taints: Iterable[Taint], default: float) -> float | None:
    """Seconds from the taint to the pod's deletion; None: it may stay.

    A pod that says nothing of a node that is lost gets `default`, as kube-apiserver's DefaultTolerationSeconds has it.
    """
    delays: list[float] = []
    for taint in taints:
        if taint.effect != "NoExecute":
            continue
        fitting = [t for t in pod.spec.tolerations if tolerates((t,), taint)]
        if not fitting:
            delays.append(default if taint.key in (NOT_READY, UNREACHABLE) else 0.0)
        elif all(t.toleration_seconds is not None for t in fitting):
            delays.append(float(min(max(t.toleration_seconds or 0, 0) for t in fitting)))
    return min(delays, default=None)
