"""A ReplicaSet and its pods → pods to make, delete, adopt, release, and the status. Pure."""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta

from podwire.controllers.documents import ReplicaSetDoc, WorkloadPod, owner_reference
from podwire.model.meta import Json
from podwire.model.objects import Pod
from podwire.model.resources import REPLICASETS
from podwire.model.timestamps import parse_time

DELETION_COST = "controller.kubernetes.io/pod-deletion-cost"


@dataclass(slots=True)
class PodSetPlan:
    """`create` pods of the template are missing. `check_at` is when a pod becomes available by the mere passing of time."""

    create: int = 0
    delete: list[WorkloadPod] = field(default_factory=list)
    adopt: list[WorkloadPod] = field(default_factory=list)
    release: list[WorkloadPod] = field(default_factory=list)
    status: Json = field(default_factory=dict)
    check_at: datetime | None = None


def plan_pod_set(
    replica_set: ReplicaSetDoc, owned: Iterable[WorkloadPod], orphans: Iterable[WorkloadPod], now: datetime
) -> PodSetPlan:
    """`owned` are the pods whose controller it is; `orphans` pods in its namespace that have none and match its selector."""
    plan = PodSetPlan()
    mine: list[WorkloadPod] = []
    deleting = replica_set.metadata.deletion_timestamp is not None
    for pod in owned:
        if replica_set.spec.selector.matches(pod.metadata.labels):
            mine.append(pod)
        elif pod.metadata.deletion_timestamp is None:
            plan.release.append(pod)
    if not deleting:
        plan.adopt = [pod for pod in orphans if pod.metadata.deletion_timestamp is None and not pod.finished]
    active = [pod for pod in mine if not pod.finished and pod.metadata.deletion_timestamp is None] + plan.adopt
    missing = replica_set.spec.replicas - len(active)
    if not deleting and missing > 0:
        plan.create = missing
    elif not deleting and missing < 0:
        plan.delete = deletion_order(active)[:-missing]
    plan.status = _status(replica_set, active, now)
    plan.check_at = _next_available(replica_set, active, now)
    return plan


def _status(replica_set: ReplicaSetDoc, active: Sequence[WorkloadPod], now: datetime) -> Json:
    wait = timedelta(seconds=replica_set.spec.min_ready_seconds)
    template_labels = replica_set.spec.template.get("metadata", {}).get("labels") or {}
    return {
        "replicas": len(active),
        "fullyLabeledReplicas": sum(template_labels.items() <= pod.metadata.labels.items() for pod in active),
        "readyReplicas": sum(pod.ready for pod in active),
        "availableReplicas": sum(is_available(pod, wait, now) for pod in active),
        "observedGeneration": replica_set.metadata.generation,
    }


def ready_since(pod: Pod) -> datetime | None:
    for condition in pod.status.conditions:
        if condition.type == "Ready" and condition.status == "True":
            return parse_time(condition.last_transition_time) if condition.last_transition_time else None
    return None


def is_available(pod: Pod, min_ready: timedelta, now: datetime) -> bool:
    """Ready, and for as long as minReadySeconds."""
    if not pod.ready or not min_ready:
        return pod.ready
    since = ready_since(pod)
    return since is not None and since + min_ready <= now


def _next_available(replica_set: ReplicaSetDoc, active: Iterable[WorkloadPod], now: datetime) -> datetime | None:
    wait = timedelta(seconds=replica_set.spec.min_ready_seconds)
    if not wait:
        return None
    times = [since + wait for pod in active if (since := ready_since(pod)) is not None and since + wait > now]
    return min(times, default=None)


def deletion_order(pods: Sequence[WorkloadPod]) -> list[WorkloadPod]:
    """Who goes first when there are too many, as kube-controller-manager decides it.

    Not on a node, then Pending, then not Ready, then lower deletion cost, then on a node with more of its like, then Ready for
    a shorter time, then more restarts, then younger.
    """
    per_node = Counter(pod.spec.node_name for pod in pods)

    def rank(pod: WorkloadPod) -> tuple[object, ...]:
        since = ready_since(pod)
        restarts = max((status.restart_count for status in pod.status.container_statuses), default=0)
        return (
            bool(pod.spec.node_name),
            {"Pending": 0, "": 0, "Unknown": 1}.get(pod.status.phase, 2),
            pod.ready,
            _cost(pod),
            -per_node[pod.spec.node_name],
            -(since.timestamp() if since else 0.0),
            -restarts,
            _Reversed(pod.metadata.creation_timestamp or ""),
            pod.metadata.name,
        )

    return sorted(pods, key=rank)


class _Reversed(str):
    """A string that sorts the other way round."""

    __slots__ = ()

    def __lt__(self, other: str) -> bool:
        return str.__gt__(self, other)


def _cost(pod: Pod) -> int:
    text = pod.metadata.annotations.get(DELETION_COST, "0")
    try:
        return int(text)
    except ValueError:
        return 0


def pod_from_template(replica_set: ReplicaSetDoc) -> Json:
    """A new pod as the ReplicaSet's template has it; its name is the API server's to choose."""
    template = replica_set.spec.template
    meta = template.get("metadata") or {}
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {
            "generateName": f"{replica_set.metadata.name}-",
            "namespace": replica_set.metadata.namespace,
            "labels": dict(meta.get("labels") or {}),
            "annotations": dict(meta.get("annotations") or {}),
            "finalizers": list(meta.get("finalizers") or ()),
            "ownerReferences": [owner_reference(REPLICASETS, replica_set.metadata)],
        },
        "spec": template.get("spec") or {},
    }
