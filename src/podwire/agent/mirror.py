"""Shows the containers of the node's engines as Pods, so that Services select them and `kubectl get pods` lists them.

The API's answer is never waited for by an engine: what cannot be written now is written when the API is there again.
"""

import logging
from collections.abc import Callable
from datetime import datetime
from random import Random

from podwire.agent.attachrecord import AttachmentRecord
from podwire.agent.config import AgentConfig
from podwire.agent.mirrorpod import (
    DEFAULT_NAMESPACE,
    Mirrored,
    claimed_uid,
    labels_of,
    mirror_uid,
    pod_document,
    pod_status,
    says,
    stands_for,
)
from podwire.client.api import ApiClient
from podwire.client.errors import AlreadyExists, ApiError, Conflict, NotFound
from podwire.client.informer import Change, Informer
from podwire.client.workqueue import WorkQueue
from podwire.model.addr import IPAddress
from podwire.model.cni import CNI_UID
from podwire.model.errors import PodwireError
from podwire.model.meta import Json
from podwire.model.objects import Pod
from podwire.model.resources import PODS
from podwire.model.timestamps import format_time

log = logging.getLogger(__name__)

WORKERS = 8


class NameTaken(PodwireError):
    """Another Pod has the name under which a container would be shown."""


class Mirror:
    """`run` it; `attached` is what `Attachments.subscribe` wants. `informer` has the node's own pods."""

    def __init__(
        self, config: AgentConfig, client: ApiClient, informer: Informer[Pod], clock: Callable[[], datetime], rng: Random
    ) -> None:
        self._config, self._client, self._informer, self._clock = config, client, informer, clock
        self._here: dict[str, Mirrored] = {}
        self._by_claim: dict[str, str] = {}
        """The attachment whose engine says that it is of the Pod with this uid."""
        self._queue: WorkQueue[str] = WorkQueue(rng, name="mirror pods")

    def attached(self, record: AttachmentRecord, ips: tuple[IPAddress, ...] | None) -> None:
        """A container has these addresses, or (None) is gone."""
        claim = claimed_uid(record)
        if ips is None:
            self._here.pop(record.uid, None)
            if self._by_claim.get(claim) == record.uid:
                del self._by_claim[claim]
        else:
            self._here[record.uid] = Mirrored(record, ips)
            if claim:
                self._by_claim[claim] = record.uid
        self._queue.add(record.uid)

    async def run(self) -> None:
        """Until cancelled. All attachments must have been told before, or those that were not lose their Pods."""
        await self._informer.synced()
        unsubscribe = self._informer.subscribe(self._changed)
        try:
            await self._queue.run(self._sync, expected=(ApiError, NameTaken), workers=WORKERS)
        finally:
            unsubscribe()

    def _changed(self, change: Change[Pod]) -> None:
        pod = change.object
        shown = mirror_uid(pod)
        ours = shown if shown.startswith(CNI_UID) else self._by_claim.get(shown)  # else a kubelet's static pod
        for uid in (ours, self._by_claim.get(pod.metadata.uid)):
            if uid:
                self._queue.add(uid)

    async def _sync(self, uid: str) -> None:
        mirrored = self._here.get(uid)
        known = self._informer.items().values()
        if mirrored is not None and any(stands_for(pod, claimed_uid(mirrored.record)) for pod in known):
            mirrored = None  # a kubelet's: it is in the API already
        pods = [pod for pod in known if mirror_uid(pod) == uid]
        for pod in pods:
            # One that somebody deletes comes again, as a kubelet's mirror pods do, for its container is there still.
            if mirrored is None or pod.metadata.deletion_timestamp or pod is not pods[0]:
                await self._delete(pod)
                return
        if mirrored is None:
            return
        if not pods:
            await self._show(mirrored)
        elif not says(pods[0], mirrored):
            await self._correct(pods[0], mirrored)

    async def _show(self, mirrored: Mirrored) -> None:
        try:
            made = await self._create(mirrored)
        except AlreadyExists as error:
            raise NameTaken(f"container {mirrored.record.container[:12]} cannot be shown: {error}") from error
        await self._patch_status(made["metadata"]["name"], made["metadata"]["namespace"], made["metadata"]["uid"], mirrored)

    async def _create(self, mirrored: Mirrored) -> Json:
        node = self._config.node_name
        try:
            made = await self._client.create(PODS, pod_document(mirrored, node))
        except NotFound:  # the engine's namespaces need not be the API's
            made = await self._client.create(PODS, pod_document(mirrored, node, DEFAULT_NAMESPACE))
        await self._informer.caught_up(made)
        return made

    async def _correct(self, pod: Pod, mirrored: Mirrored) -> None:
        meta, wanted = pod.metadata, labels_of(mirrored.record)
        if dict(meta.labels) != wanted:
            labels = {key: None for key in meta.labels if key not in wanted} | wanted
            await self._client.patch(PODS, meta.name, {"metadata": {"uid": meta.uid, "labels": labels}}, meta.namespace)
        await self._patch_status(meta.name, meta.namespace, meta.uid, mirrored)

    async def _patch_status(self, name: str, namespace: str, uid: str, mirrored: Mirrored) -> None:
        patch = pod_status(mirrored, self._config.node_ips, format_time(self._clock()))
        await self._client.patch(PODS, name, {"metadata": {"uid": uid}, **patch}, namespace, subresource="status")

    async def _delete(self, pod: Pod) -> None:
        meta = pod.metadata
        try:
            await self._client.delete(PODS, meta.name, meta.namespace, grace_period_seconds=0, uid=meta.uid)
        except (NotFound, Conflict):
            log.debug("pod %s was deleted by someone else", pod.key)
