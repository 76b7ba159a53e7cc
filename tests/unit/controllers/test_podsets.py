from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

import msgspec
import pytest

from podwire.controllers.documents import ReplicaSetDoc, WorkloadPod
from podwire.controllers.podsets import deletion_order, is_available, plan_pod_set, pod_from_template

if TYPE_CHECKING:
    from podwire.model.meta import Json

NOW = datetime(2026, 1, 1, 12, tzinfo=UTC)


def replica_set(replicas: int, *, deleted: bool = False, **spec: Any) -> ReplicaSetDoc:
    template = {"metadata": {"labels": {"app": "web"}, "annotations": {"a": "b"}}, "spec": {"containers": [{"name": "c"}]}}
    meta: Json = {"name": "web-1", "namespace": "shop", "uid": "rs", "generation": 4}
    if deleted:
        meta["deletionTimestamp"] = "2026-01-01T00:00:00Z"
    document = {
        "metadata": meta,
        "spec": {"replicas": replicas, "selector": {"matchLabels": {"app": "web"}}, "template": template} | spec,
    }
    return msgspec.convert(document, ReplicaSetDoc)


def pod(
    name: str, *, ready: int | None = 0, phase: str = "Running", node: str = "n1", app: str = "web", **meta: Any
) -> WorkloadPod:
    """`ready`: seconds for which it has been Ready; None: it is not."""
    condition: Json = {"type": "Ready", "status": "False"}
    if ready is not None:
        since = (NOW - timedelta(seconds=ready)).strftime("%Y-%m-%dT%H:%M:%SZ")
        condition = {"type": "Ready", "status": "True", "lastTransitionTime": since}
    restarts = meta.pop("restarts", 0)
    document = {
        "metadata": {"name": name, "namespace": "shop", "uid": name, "labels": {"app": app}} | meta,
        "spec": {"nodeName": node},
        "status": {"phase": phase, "conditions": [condition], "containerStatuses": [{"restartCount": restarts}]},
    }
    return msgspec.convert(document, WorkloadPod)


def test_missing_pods_are_made_and_superfluous_ones_deleted() -> None:
    assert plan_pod_set(replica_set(3), [pod("a")], [], NOW).create == 2
    plan = plan_pod_set(replica_set(1), [pod("a"), pod("b", ready=None)], [], NOW)
    assert [p.metadata.name for p in plan.delete] == ["b"]


def test_finished_and_terminating_pods_do_not_count() -> None:
    gone = pod("gone", deletionTimestamp="2026-01-01T00:00:00Z")
    plan = plan_pod_set(replica_set(2), [pod("a"), pod("done", phase="Succeeded"), gone], [], NOW)
    assert (plan.create, plan.delete) == (1, [])
    assert plan.status["replicas"] == 1


def test_orphans_are_adopted_and_strangers_released() -> None:
    plan = plan_pod_set(replica_set(2), [pod("mine"), pod("stranger", app="other")], [pod("orphan")], NOW)
    assert [p.metadata.name for p in plan.adopt] == ["orphan"]
    assert [p.metadata.name for p in plan.release] == ["stranger"]
    assert (plan.create, plan.delete) == (0, [])


def test_a_set_that_is_being_deleted_touches_nothing() -> None:
    plan = plan_pod_set(replica_set(2, deleted=True), [pod("a"), pod("b"), pod("c")], [pod("orphan")], NOW)
    assert (plan.create, plan.delete, plan.adopt) == (0, [], [])


def test_status_counts() -> None:
    pods = [pod("a", ready=100), pod("b", ready=5), pod("c", ready=None)]
    plan = plan_pod_set(replica_set(3, minReadySeconds=10), pods, [], NOW)
    assert plan.status == {
        "replicas": 3,
        "fullyLabeledReplicas": 3,
        "readyReplicas": 2,
        "availableReplicas": 1,
        "observedGeneration": 4,
    }
    assert plan.check_at == NOW + timedelta(seconds=5)


def test_availability() -> None:
    assert is_available(pod("a"), timedelta(), NOW)
    assert not is_available(pod("a", ready=None), timedelta(), NOW)
    assert is_available(pod("a", ready=10), timedelta(seconds=10), NOW)
    assert not is_available(pod("a", ready=9), timedelta(seconds=10), NOW)


COST = "controller.kubernetes.io/pod-deletion-cost"


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (pod("z", node=""), pod("a", node="n1", ready=None)),
        (pod("z", phase="Pending", ready=None), pod("a", ready=None)),
        (pod("z", ready=None), pod("a")),
        (pod("z", annotations={COST: "-5"}), pod("a")),
        (pod("z", ready=1), pod("a", ready=2)),
        (pod("z", restarts=3), pod("a")),
        (pod("z", creationTimestamp="2026-01-02T00:00:00Z"), pod("a", creationTimestamp="2026-01-01T00:00:00Z")),
        (pod("a"), pod("z")),
        (pod("a", annotations={COST: "no number"}), pod("z")),
    ],
)
def test_who_goes_first(first: WorkloadPod, second: WorkloadPod) -> None:
    assert deletion_order([second, first]) == [first, second]


def test_the_crowded_node_gives_first() -> None:
    order = deletion_order([pod("a", node="n1"), pod("b", node="n2"), pod("c", node="n2")])
    assert [p.metadata.name for p in order] == ["b", "c", "a"]


def test_a_pod_is_made_from_the_template() -> None:
    made = pod_from_template(replica_set(1))
    assert made["metadata"]["generateName"] == "web-1-"
    assert made["metadata"]["labels"] == {"app": "web"}
    assert made["metadata"]["annotations"] == {"a": "b"}
    assert made["metadata"]["ownerReferences"][0]["uid"] == "rs"
    assert made["spec"] == {"containers": [{"name": "c"}]}
