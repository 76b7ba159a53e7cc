"""Binds pods to nodes, as many at a time as wait."""

import asyncio
import logging
from contextlib import ExitStack
from typing import TYPE_CHECKING, ClassVar

import msgspec

from podwire.client.api import PatchKind
from podwire.client.backoff import Backoff
from podwire.client.errors import ApiError, Conflict, NotFound
from podwire.client.informer import Change
from podwire.controllers.base import Context, all_of
from podwire.controllers.documents import WorkloadPod
from podwire.controllers.placement import Placement, place_pods
from podwire.model.ids import ObjectKey
from podwire.model.objects import Node
from podwire.model.resources import PODS
from podwire.model.timestamps import format_time

if TYPE_CHECKING:
    from podwire.model.meta import Json

log = logging.getLogger(__name__)

SCHEDULER = "default-scheduler"


class Scheduler:
    """One loop: all pods that wait are placed in one pass over the nodes, then bound side by side."""

    name: ClassVar[str] = "scheduler"

    def __init__(self, context: Context) -> None:
        self._context = context
        self._client, self._cluster, self._events = context.client, context.cluster, context.events
        self._waiting: dict[ObjectKey, WorkloadPod] = {}
        # Pods that were told to wait, with the reason; looked at again when something changes that could help them.
        self._hopeless: dict[ObjectKey, str] = {}
        # Bound by us, not yet seen bound: they count as running on their node.
        self._assumed: dict[ObjectKey, WorkloadPod] = {}
        self._wake = asyncio.Event()

    async def run(self) -> None:
        await self._cluster.synced()
        backoff = Backoff(self._context.rng)
        with ExitStack() as stack:
            stack.callback(self._cluster.pods.subscribe(self._pod_changed))
            stack.callback(self._cluster.nodes.subscribe(self._node_changed))
            while True:
                await self._wake.wait()
                self._wake.clear()
                try:
                    await self._schedule()
                except ApiError as error:
                    delay = backoff.next()
                    log.warning("scheduling: %s; next attempt in %.2f s", error, delay)
                    await asyncio.sleep(delay)
                    self._wake.set()
                else:
                    backoff.reset()

    # --- what wakes it --------------------------------------------------------------------------------------------

    def _pod_changed(self, change: Change[WorkloadPod]) -> None:
        pod = change.new
        if pod is not None and _pending(pod):
            self._waiting[change.key] = pod
            if change.old is None or change.old.spec != pod.spec:
                self._hopeless.pop(change.key, None)
            if change.key not in self._hopeless and change.key not in self._assumed:
                self._wake.set()
            return
        self._waiting.pop(change.key, None)
        self._hopeless.pop(change.key, None)
        self._assumed.pop(change.key, None)
        if pod is None or pod.finished or any(self._waits_for_company(key) for key in self._hopeless):
            self._retry_hopeless()

    def _waits_for_company(self, key: ObjectKey) -> bool:
        pod = self._waiting.get(key)
        return pod is not None and bool(pod.spec.affinity.pod_affinity.required)

    def _node_changed(self, change: Change[Node]) -> None:
        if change.new is not None and (change.old is None or _relevant(change.old) != _relevant(change.new)):
            self._retry_hopeless()

    def _retry_hopeless(self) -> None:
        if self._hopeless:
            self._wake.set()

    # --- a pass ---------------------------------------------------------------------------------------------------

    async def _schedule(self) -> None:
        pending = [pod for key, pod in self._waiting.items() if key not in self._assumed]
        pending.sort(key=lambda pod: (pod.metadata.creation_timestamp or "", pod.key))
        if not pending:
            return
        running = [pod for pod in self._cluster.pods.items().values() if pod.spec.node_name]
        placements = place_pods(pending, self._cluster.nodes.items().values(), [*running, *self._assumed.values()])
        work = []
        for pod, placement in zip(pending, placements, strict=True):
            if placement.node:
                spec = msgspec.structs.replace(pod.spec, node_name=placement.node)
                self._assumed[pod.key] = msgspec.structs.replace(pod, spec=spec)
                work.append(self._bind(pod, placement))
            elif self._hopeless.get(pod.key) != placement.reason:
                self._hopeless[pod.key] = placement.reason
                work.append(self._tell(pod, placement.reason))
        await all_of(work)

    async def _bind(self, pod: WorkloadPod, placement: Placement) -> None:
        binding: Json = {
            "apiVersion": "v1",
            "kind": "Binding",
            "metadata": {"name": pod.metadata.name, "namespace": pod.metadata.namespace, "uid": pod.metadata.uid},
            "target": {"apiVersion": "v1", "kind": "Node", "name": placement.node},
        }
        try:
            await self._client.create(PODS, binding, subresource="binding")
        except (NotFound, Conflict):
            # Deleted, replaced or bound by someone else meanwhile: the watch tells which.
            self._assumed.pop(pod.key, None)
            return
        except ApiError:
            # After Unavailable it may have been bound all the same: the watch or the next attempt (a Conflict) tells.
            self._assumed.pop(pod.key, None)
            raise
        self._hopeless.pop(pod.key, None)
        message = f"Successfully assigned {pod.metadata.namespace}/{pod.metadata.name} to {placement.node}"
        self._events.record(PODS, pod.metadata, "Normal", "Scheduled", message)

    async def _tell(self, pod: WorkloadPod, reason: str) -> None:
        self._events.record(PODS, pod.metadata, "Warning", "FailedScheduling", reason)
        condition: Json = {
            "type": "PodScheduled",
            "status": "False",
            "reason": "Unschedulable",
            "message": reason,
            "lastTransitionTime": format_time(self._context.now()),
        }
        meta = pod.metadata
        patch: Json = {"metadata": {"uid": meta.uid}, "status": {"conditions": [condition]}}
        kind = PatchKind.STRATEGIC  # merges conditions by their type
        try:
            await self._client.patch(PODS, meta.name, patch, meta.namespace, subresource="status", kind=kind)
        except (NotFound, Conflict):
            self._hopeless.pop(pod.key, None)


def _pending(pod: WorkloadPod) -> bool:
    return (
        not pod.spec.node_name
        and not pod.spec.scheduling_gates
        and not pod.finished
        and pod.metadata.deletion_timestamp is None
        and pod.spec.scheduler_name == SCHEDULER
    )


def _relevant(node: Node) -> tuple[object, ...]:
    """All of a node that placement looks at."""
    return node.ready, node.spec.unschedulable, node.spec.taints, node.metadata.labels, node.status.allocatable
