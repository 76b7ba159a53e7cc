"""Keeps as many pods as each ReplicaSet asks for."""

import logging
from typing import Any, ClassVar

from podwire.client.api import PatchKind
from podwire.client.errors import ApiError, Conflict, NotFound
from podwire.client.informer import Change
from podwire.controllers.base import Context, Controller, all_of
from podwire.controllers.documents import ReplicaSetDoc, WorkloadPod, owner_reference
from podwire.controllers.podsets import PodSetPlan, plan_pod_set, pod_from_template
from podwire.model.ids import ObjectKey
from podwire.model.meta import Json
from podwire.model.resources import PODS, REPLICASETS

log = logging.getLogger(__name__)

FIRST_BATCH = 8
"""Pods created at first; each batch that succeeds doubles it, so that a quota or a webhook that refuses is not stormed."""


class ReplicaSets(Controller[ObjectKey]):
    name: ClassVar[str] = "replicasets"
    workers: ClassVar[int] = 16

    def __init__(self, context: Context) -> None:
        super().__init__(context)
        self.on(self.cluster.replica_sets, self._replica_set_changed)
        self.on(self.cluster.pods, self._pod_changed)

    def _replica_set_changed(self, change: Change[ReplicaSetDoc]) -> None:
        if change.new is not None and (change.old is None or _relevant(change.old) != _relevant(change.new)):
            self.queue.add(change.key)

    def _pod_changed(self, change: Change[WorkloadPod]) -> None:
        for pod in (change.old, change.new):
            if pod is None:
                continue
            owner = pod.metadata.controller
            if owner is not None:
                if owner.kind == "ReplicaSet":
                    self.queue.add(ObjectKey(pod.metadata.namespace, owner.name))
            elif pod is change.new and (change.old is None or _orphan_facts(change.old) != _orphan_facts(pod)):
                for key, replica_set in self.cluster.replica_sets_by_namespace.get(pod.metadata.namespace).items():
                    if _selects(replica_set, pod):
                        self.queue.add(key)

    async def sync(self, key: ObjectKey) -> None:
        replica_set = self.cluster.replica_sets.get(key)
        if replica_set is None:
            return
        owned = self.cluster.pods_by_controller.get(replica_set.metadata.uid).values()
        plan = plan_pod_set(replica_set, owned, self._orphans(replica_set), self.context.now())
        if plan.check_at is not None:
            self.queue.add_after(key, (plan.check_at - self.context.now()).total_seconds() + 0.001)
        await self._claim(replica_set, plan)
        # The status first: what the pods are now is known, and whoever waits for it should not wait for the writes below.
        await self._write_status(replica_set, plan.status)
        last = await self._create(replica_set, plan.create) or await self._delete(replica_set, plan.delete)
        if last is not None:
            await self.cluster.pods.caught_up(last)

    def _orphans(self, replica_set: ReplicaSetDoc) -> list[WorkloadPod]:
        namespace, labels = replica_set.metadata.namespace, replica_set.spec.selector.match_labels
        pairs = list(labels.items()) or [("", "")]
        pods = min((self.cluster.pods_by_label.get((namespace, *pair)) for pair in pairs), key=len)
        return [pod for pod in pods.values() if pod.metadata.controller is None and _selects(replica_set, pod)]

    async def _claim(self, replica_set: ReplicaSetDoc, plan: PodSetPlan) -> None:
        last: Json | None = None
        if plan.adopt:
            # A deleted set must not adopt what its successor of the same name should have.
            live = await self.client.get(REPLICASETS, replica_set.metadata.name, replica_set.metadata.namespace)
            if live["metadata"]["uid"] != replica_set.metadata.uid or live["metadata"].get("deletionTimestamp"):
                plan.adopt = []
        for pod in plan.adopt:
            meta = {"uid": pod.metadata.uid, "ownerReferences": [owner_reference(REPLICASETS, replica_set.metadata)]}
            last = await self._patch_pod(pod, {"metadata": meta}) or last
        for pod in plan.release:
            gone = {"$patch": "delete", "uid": replica_set.metadata.uid}
            meta = {"uid": pod.metadata.uid, "ownerReferences": [gone]}
            last = await self._patch_pod(pod, {"metadata": meta}) or last
        if last is not None:
            await self.cluster.pods.caught_up(last)

    async def _patch_pod(self, pod: WorkloadPod, patch: Json) -> Json | None:
        meta = pod.metadata
        try:
            return await self.client.patch(PODS, meta.name, patch, meta.namespace, kind=PatchKind.STRATEGIC)
        except NotFound:
            return None

    async def _create(self, replica_set: ReplicaSetDoc, count: int) -> Json | None:
        pod = pod_from_template(replica_set)
        meta, batch = replica_set.metadata, FIRST_BATCH
        last: Json | None = None
        while count > 0:
            size = min(batch, count)
            try:
                made = await all_of(self.client.create(PODS, pod) for _ in range(size))
            except ApiError as error:
                if not _namespace_ends(error):
                    self.events.record(REPLICASETS, meta, "Warning", "FailedCreate", f"Error creating: {error}")
                raise
            for document in made:
                message = f"Created pod: {document['metadata']['name']}"
                self.events.record(REPLICASETS, meta, "Normal", "SuccessfulCreate", message)
            last = max(made, key=_revision)
            count -= size
            batch *= 2
        return last

    async def _delete(self, replica_set: ReplicaSetDoc, pods: list[WorkloadPod]) -> Json | None:
        answers = [answer for answer in await all_of(self._delete_pod(replica_set, pod) for pod in pods) if answer]
        return max(answers, key=_revision, default=None)

    async def _delete_pod(self, replica_set: ReplicaSetDoc, pod: WorkloadPod) -> Json | None:
        try:
            answer = await self.client.delete(PODS, pod.metadata.name, pod.metadata.namespace, uid=pod.metadata.uid)
        except (NotFound, Conflict):
            return None
        message = f"Deleted pod: {pod.metadata.name}"
        self.events.record(REPLICASETS, replica_set.metadata, "Normal", "SuccessfulDelete", message)
        return answer

    async def _write_status(self, replica_set: ReplicaSetDoc, status: Json) -> None:
        now = replica_set.status
        same = (
            now.replicas == status["replicas"]
            and now.ready_replicas == status["readyReplicas"]
            and now.available_replicas == status["availableReplicas"]
            and now.fully_labeled_replicas == status["fullyLabeledReplicas"]
            and now.observed_generation == status["observedGeneration"]
        )
        if same:
            return
        meta = replica_set.metadata
        patch = {"metadata": {"uid": meta.uid}, "status": status}
        try:
            written = await self.client.patch(REPLICASETS, meta.name, patch, meta.namespace, subresource="status")
        except NotFound:
            return
        await self.cluster.replica_sets.caught_up(written)


def _selects(replica_set: ReplicaSetDoc, pod: WorkloadPod) -> bool:
    return replica_set.spec.selector.matches(pod.metadata.labels)


def _relevant(replica_set: ReplicaSetDoc) -> tuple[object, ...]:
    meta = replica_set.metadata
    return meta.generation, meta.deletion_timestamp, meta.uid


def _orphan_facts(pod: WorkloadPod) -> tuple[object, ...]:
    return pod.metadata.labels, pod.metadata.controller, pod.metadata.deletion_timestamp


def _revision(document: Any) -> int:
    text = str(document.get("metadata", {}).get("resourceVersion", ""))
    return int(text) if text.isdecimal() else 0


def _namespace_ends(error: ApiError) -> bool:
    return error.code == 403 and any(cause.get("reason") == "NamespaceTerminating" for cause in error.details.get("causes", ()))
