"""Moves every Deployment a step at a time towards its template and size."""

import logging
from collections.abc import Sequence
from typing import ClassVar

from podwire.client.api import PatchKind
from podwire.client.errors import AlreadyExists, NotFound
from podwire.client.informer import Change
from podwire.controllers.base import Context, Controller
from podwire.controllers.documents import DeploymentDoc, ReplicaSetDoc, WorkloadPod, owner_reference
from podwire.controllers.rollout import REVISION, RolloutPlan, find_new, plan_rollout, same_template
from podwire.controllers.rolloutstatus import rollout_status
from podwire.model.ids import ObjectKey
from podwire.model.meta import Json
from podwire.model.resources import DEPLOYMENTS, REPLICASETS

log = logging.getLogger(__name__)


class Deployments(Controller[ObjectKey]):
    name: ClassVar[str] = "deployments"
    workers: ClassVar[int] = 8

    def __init__(self, context: Context) -> None:
        super().__init__(context)
        self.on(self.cluster.deployments, self._deployment_changed)
        self.on(self.cluster.replica_sets, self._replica_set_changed)
        self.on(self.cluster.pods, self._pod_changed)

    def _deployment_changed(self, change: Change[DeploymentDoc]) -> None:
        if change.new is not None and (change.old is None or _relevant(change.old) != _relevant(change.new)):
            self.queue.add(change.key)

    def _replica_set_changed(self, change: Change[ReplicaSetDoc]) -> None:
        for replica_set in (change.old, change.new):
            owner = replica_set.metadata.controller if replica_set is not None else None
            if owner is not None and owner.kind == "Deployment":
                self.queue.add(ObjectKey(change.key.namespace, owner.name))
        if change.new is not None and change.new.metadata.controller is None:
            for key, deployment in self.cluster.deployments.items().items():
                if key.namespace == change.key.namespace and _selects(deployment, change.new):
                    self.queue.add(key)

    def _pod_changed(self, change: Change[WorkloadPod]) -> None:
        """A Deployment of strategy Recreate waits for the last old pod to be gone."""
        if change.new is not None and not change.new.finished:
            return
        owner = change.object.metadata.controller
        if owner is None or owner.kind != "ReplicaSet":
            return
        replica_set = self.cluster.replica_sets.get(ObjectKey(change.key.namespace, owner.name))
        above = replica_set.metadata.controller if replica_set is not None else None
        if above is not None and above.kind == "Deployment":
            key = ObjectKey(change.key.namespace, above.name)
            deployment = self.cluster.deployments.get(key)
            if deployment is not None and deployment.spec.strategy.type == "Recreate":
                self.queue.add(key)

    async def sync(self, key: ObjectKey) -> None:
        deployment = self.cluster.deployments.get(key)
        if deployment is None:
            return
        if deployment.metadata.deletion_timestamp is None:
            await self._claim(deployment)
        sets = list(self.cluster.replica_sets_by_controller.get(deployment.metadata.uid).values())
        new = find_new(deployment, sets)
        plan = plan_rollout(deployment, sets, old_pods=any(self._has_pods(rs) for rs in sets if rs is not new))
        created = await self._carry_out(deployment, sets, plan)
        await self._write_status(deployment, sets, plan, created)

    def _has_pods(self, replica_set: ReplicaSetDoc) -> bool:
        return any(not pod.finished for pod in self.cluster.pods_by_controller.get(replica_set.metadata.uid).values())

    async def _claim(self, deployment: DeploymentDoc) -> None:
        """Adopt sets that the selector matches and nobody owns; let go of those that it does not match any more."""
        last: Json | None = None
        for replica_set in list(self.cluster.replica_sets_by_namespace.get(deployment.metadata.namespace).values()):
            owner = replica_set.metadata.controller
            mine = owner is not None and owner.uid == deployment.metadata.uid
            if replica_set.metadata.deletion_timestamp or mine == _selects(deployment, replica_set):
                continue
            if mine:
                reference: Json = {"$patch": "delete", "uid": deployment.metadata.uid}
            elif owner is None:
                reference = owner_reference(DEPLOYMENTS, deployment.metadata)
            else:
                continue
            patch = {"metadata": {"uid": replica_set.metadata.uid, "ownerReferences": [reference]}}
            last = await self._patch_set(replica_set, patch, PatchKind.STRATEGIC) or last
        if last is not None:
            await self.cluster.replica_sets.caught_up(last)

    async def _carry_out(self, deployment: DeploymentDoc, sets: Sequence[ReplicaSetDoc], plan: RolloutPlan) -> str:
        """Returns the name of the set that was created, if one was."""
        created, last = "", None
        if plan.create is not None:
            last = await self._create(deployment, plan.create)
            if last is None:
                return ""
            created = last["metadata"]["name"]
        for replica_set in sets:
            name = replica_set.metadata.name
            patch: Json = {"metadata": {"uid": replica_set.metadata.uid}}
            if name in plan.annotate:
                patch["metadata"]["annotations"] = plan.annotate[name]
            if name in plan.scale:
                patch["spec"] = {"replicas": plan.scale[name]}
            if name in plan.annotate or name in plan.scale:
                last = await self._patch_set(replica_set, patch, PatchKind.MERGE) or last
            if name in plan.scale:
                self._tell_scaled(deployment, name, replica_set.spec.replicas, plan.scale[name])
        for replica_set in plan.delete:
            meta = replica_set.metadata
            try:
                await self.client.delete(REPLICASETS, meta.name, meta.namespace, uid=meta.uid, propagation="Background")
            except NotFound:
                continue
        if last is not None:
            await self.cluster.replica_sets.caught_up(last)
        return created

    async def _create(self, deployment: DeploymentDoc, document: Json) -> Json | None:
        name = document["metadata"]["name"]
        try:
            made = await self.client.create(REPLICASETS, document)
        except AlreadyExists:
            await self._resolve_collision(deployment, document)
            return None
        self._tell_scaled(deployment, name, 0, document["spec"]["replicas"])
        return made

    async def _resolve_collision(self, deployment: DeploymentDoc, document: Json) -> None:
        """The name is taken: by our own set that the copy does not show yet, or by another; then the hash must change."""
        meta = deployment.metadata
        found = await self.client.get(REPLICASETS, document["metadata"]["name"], meta.namespace)
        owners = found["metadata"].get("ownerReferences", ())
        ours = any(owner.get("uid") == meta.uid for owner in owners)
        if ours and same_template(found["spec"]["template"], document["spec"]["template"]):
            await self.cluster.replica_sets.caught_up(found)
            self.queue.add(deployment.key)
            return
        count = (deployment.status.collision_count or 0) + 1
        patch = {"metadata": {"uid": meta.uid}, "status": {"collisionCount": count}}
        written = await self.client.patch(DEPLOYMENTS, meta.name, patch, meta.namespace, subresource="status")
        await self.cluster.deployments.caught_up(written)
        self.queue.add(deployment.key)

    async def _patch_set(self, replica_set: ReplicaSetDoc, patch: Json, kind: PatchKind) -> Json | None:
        meta = replica_set.metadata
        try:
            return await self.client.patch(REPLICASETS, meta.name, patch, meta.namespace, kind=kind)
        except NotFound:
            return None

    def _tell_scaled(self, deployment: DeploymentDoc, name: str, old: int, new: int) -> None:
        way = "up" if new >= old else "down"
        message = f"Scaled {way} replica set {name} from {old} to {new}"
        self.events.record(DEPLOYMENTS, deployment.metadata, "Normal", "ScalingReplicaSet", message)

    async def _write_status(
        self, deployment: DeploymentDoc, sets: Sequence[ReplicaSetDoc], plan: RolloutPlan, created: str
    ) -> None:
        meta, now = deployment.metadata, self.context.now()
        last: Json | None = None
        try:
            if plan.revision and meta.annotations.get(REVISION) != plan.revision and meta.deletion_timestamp is None:
                patch: Json = {"metadata": {"uid": meta.uid, "annotations": {REVISION: plan.revision}}}
                last = await self.client.patch(DEPLOYMENTS, meta.name, patch, meta.namespace)
            status = rollout_status(deployment, find_new(deployment, sets), sets, now, created=created)
            if status.check_at is not None:
                self.queue.add_after(deployment.key, (status.check_at - now).total_seconds() + 0.001)
            if status.changed:
                patch = {"metadata": {"uid": meta.uid}, "status": status.document}
                last = await self.client.patch(DEPLOYMENTS, meta.name, patch, meta.namespace, subresource="status")
        except NotFound:
            return
        if last is not None:
            await self.cluster.deployments.caught_up(last)


def _selects(deployment: DeploymentDoc, replica_set: ReplicaSetDoc) -> bool:
    return deployment.spec.selector.matches(replica_set.metadata.labels)


def _relevant(deployment: DeploymentDoc) -> tuple[object, ...]:
    meta = deployment.metadata
    return meta.generation, meta.annotations, meta.deletion_timestamp, meta.uid, deployment.status.collision_count
