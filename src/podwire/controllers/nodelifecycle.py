"""Notices nodes that fall silent, come back or are deleted, and what that means for their pods."""

import asyncio
import logging
from typing import ClassVar

from podwire.client.api import PatchKind
from podwire.client.errors import Conflict, NotFound
from podwire.client.informer import Change
from podwire.controllers.base import Context, Controller, all_of
from podwire.controllers.documents import WorkloadPod
from podwire.controllers.nodehealth import NodeVerdict, eviction_delay, judge_node, not_ready_patch
from podwire.model.ids import ObjectKey
from podwire.model.objects import Lease, Node
from podwire.model.resources import NODES, PODS

log = logging.getLogger(__name__)

ORPHAN_GRACE = 40.0
"""Seconds that a pod may name a node that does not exist (it may be about to register) before the pod is deleted."""

MAX_DELETED = 1000
DEAF_SHARE = 0.5
"""Part of the grace period that is added when all nodes fall silent at once."""


class NodeLifecycle(Controller[str]):
    """Keys are node names, also of nodes that no longer exist. Times are the loop's own: nodes' clocks may be wrong."""

    name: ClassVar[str] = "nodelifecycle"
    workers: ClassVar[int] = 8

    def __init__(self, context: Context) -> None:
        super().__init__(context)
        self._heard: dict[str, float] = {}
        self._tainted: dict[str, float] = {}
        self._deaf_since: float | None = None
        # Nodes that were seen to go, the latest last: a pod may be bound to one in the very moment it goes.
        self._deleted: dict[str, None] = {}
        self.on(self.cluster.nodes, self._node_changed)
        self.on(self.cluster.leases, self._lease_changed)
        self.on(self.cluster.pods, self._pod_changed)

    # --- signs of life --------------------------------------------------------------------------------------------

    def _hear(self, name: str) -> None:
        self._heard[name] = asyncio.get_running_loop().time()

    def _node_changed(self, change: Change[Node]) -> None:
        name = change.key.name
        if change.new is None:
            self._heard.pop(name, None)
            self._tainted.pop(name, None)
            self._deleted[name] = None
            if len(self._deleted) > MAX_DELETED:
                del self._deleted[next(iter(self._deleted))]
            self.queue.add(name)
            return
        self._deleted.pop(name, None)
        if name not in self._heard:
            self._hear(name)
        if change.old is None or _facts(change.old) != _facts(change.new):
            self.queue.add(name)

    def _lease_changed(self, change: Change[Lease]) -> None:
        if change.new is None:
            return
        if change.old is None or change.old.spec.renew_time != change.new.spec.renew_time:
            name = change.key.name
            silent = self._silence(name) >= self.context.config.node_grace
            self._hear(name)
            if silent or change.old is None:
                self.queue.add(name)

    def _pod_changed(self, change: Change[WorkloadPod]) -> None:
        pod = change.new
        if pod is None or not pod.spec.node_name:
            return
        name = pod.spec.node_name
        node = self.cluster.nodes.get(ObjectKey("", name))
        if node is None:
            self._heard.setdefault(name, asyncio.get_running_loop().time())
            self.queue.add_after(name, 0 if name in self._deleted else ORPHAN_GRACE)
        elif name in self._tainted and (change.old is None or change.old.ready != pod.ready):
            self.queue.add(name)

    def _silence(self, name: str) -> float:
        """Seconds since the node was last heard of."""
        now = asyncio.get_running_loop().time()
        return now - self._heard.get(name, now)

    def _deaf(self, grace: float) -> bool:
        """Whether it is rather this side that hears nothing: all nodes fell silent together, and that only just now.

        So it is when the API server was away, or this process was stopped: the nodes get time to be heard again.
        """
        if any(self._silence(key.name) < grace for key in self.cluster.nodes.items()):
            self._deaf_since = None
            return False
        now = asyncio.get_running_loop().time()
        if self._deaf_since is None:
            self._deaf_since = now
        return now - self._deaf_since < grace * DEAF_SHARE

    # --- a node ---------------------------------------------------------------------------------------------------

    async def sync(self, key: str) -> None:
        node = self.cluster.nodes.get(ObjectKey("", key))
        if node is None:
            await self._remove_pods(key)
            return
        silence, grace = self._silence(key), self.context.config.node_grace
        silent = silence >= grace and not self._deaf(grace)
        if silence >= grace and not silent:
            self.queue.add_after(key, grace * DEAF_SHARE)
        verdict = judge_node(node, silent=silent, now=self.context.now())
        if verdict.status is not None:
            log.warning("node %s: not heard of for %.0f s", key, silence)
            self.events.record(NODES, node.metadata, "Normal", "NodeNotReady", f"Node {key} status is now: NodeNotReady")
        if verdict.status is not None or verdict.spec is not None:
            # What comes of it is for the next pass, which starts from the Node as it is then.
            await self._patch_node(key, verdict)
            self.queue.add(key)
            return
        if verdict.pods_lost:
            await self._mark_pods(key)
        await self._evict(key)
        if silence < grace:
            self.queue.add_after(key, grace - silence + 0.001)

    async def _patch_node(self, name: str, verdict: NodeVerdict) -> None:
        try:
            if verdict.status is not None:
                kind = PatchKind.STRATEGIC
                written = await self.client.patch(NODES, name, verdict.status, subresource="status", kind=kind)
            else:
                written = await self.client.patch(NODES, name, verdict.spec)
        except NotFound:
            return
        await self.cluster.nodes.caught_up(written)

    async def _mark_pods(self, name: str) -> None:
        await all_of(self._mark(pod) for pod in list(self.cluster.pods_by_node.get(name).values()))

    async def _mark(self, pod: WorkloadPod) -> None:
        patch = not_ready_patch(pod, self.context.now())
        if patch is None:
            return
        try:
            await self.client.patch(
                PODS, pod.metadata.name, patch, pod.metadata.namespace, subresource="status", kind=PatchKind.STRATEGIC
            )
        except (NotFound, Conflict):
            return

    async def _evict(self, name: str) -> None:
        """Deletes the pods whose time on a NoExecute-tainted node is over, and comes back for the next."""
        node = self.cluster.nodes.get(ObjectKey("", name))
        taints = [t for t in node.spec.taints if t.effect == "NoExecute"] if node is not None else []
        if not taints:
            self._tainted.pop(name, None)
            return
        now = asyncio.get_running_loop().time()
        since = self._tainted.setdefault(name, now)
        for pod in list(self.cluster.pods_by_node.get(name).values()):
            delay = eviction_delay(pod, taints, self.context.config.eviction_after)
            if delay is None or pod.metadata.deletion_timestamp is not None:
                continue
            if since + delay > now:
                self.queue.add_after(name, since + delay - now)
                continue
            self.events.record(PODS, pod.metadata, "Normal", "TaintManagerEviction", f"Marking for deletion Pod {pod.key}")
            await self._delete(pod, grace=None)

    async def _remove_pods(self, name: str) -> None:
        """Pods of a node that does not exist are nobody's to end: they go at once."""
        pods = list(self.cluster.pods_by_node.get(name).values())
        if not pods:
            return
        if name not in self._deleted and self._silence(name) < ORPHAN_GRACE:
            self.queue.add_after(name, ORPHAN_GRACE - self._silence(name))
            return
        try:
            await self.client.get(NODES, name)
        except NotFound:
            log.info("node %s is gone: %d pods are deleted", name, len(pods))
            await all_of(self._delete(pod, grace=0) for pod in pods)

    async def _delete(self, pod: WorkloadPod, *, grace: int | None) -> None:
        meta = pod.metadata
        try:
            await self.client.delete(PODS, meta.name, meta.namespace, grace_period_seconds=grace, uid=meta.uid)
        except (NotFound, Conflict):
            return


def _facts(node: Node) -> tuple[object, ...]:
    return node.status.conditions, node.spec.taints
