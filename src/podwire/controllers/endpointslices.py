"""Keeps the EndpointSlices of every Service with a selector."""

import asyncio
from collections.abc import Iterable
from typing import ClassVar

from podwire.client.errors import NotFound
from podwire.client.informer import Change
from podwire.controllers.base import Context, Controller
from podwire.controllers.documents import SliceDoc, WorkloadPod
from podwire.controllers.slices import MANAGED_BY, MANAGER, ZONE, SliceWrites, plan_slices
from podwire.model.ids import ObjectKey
from podwire.model.meta import matches_labels
from podwire.model.objects import Node, Pod, Service
from podwire.model.resources import ENDPOINTSLICES
from podwire.model.timestamps import format_micro_time


class EndpointSlices(Controller[ObjectKey]):
    """Keys are Services. A burst of pod changes is written at most every `slice_interval` seconds; the first at once."""

    name: ClassVar[str] = "endpointslices"
    workers: ClassVar[int] = 8

    def __init__(self, context: Context) -> None:
        super().__init__(context)
        self._zones: dict[str, str] = {}
        self._triggered: dict[ObjectKey, str] = {}
        self._written: dict[ObjectKey, float] = {}
        self.on(self.cluster.nodes, self._node_changed)
        self.on(self.cluster.services, self._service_changed)
        self.on(self.cluster.pods, self._pod_changed)
        self.on(self.cluster.slices, self._slice_changed)

    # --- what makes a Service dirty -------------------------------------------------------------------------------

    def _dirty(self, key: ObjectKey) -> None:
        self._triggered.setdefault(key, format_micro_time(self.context.now()))
        last = self._written.get(key)
        if last is None:
            self.queue.add(key)
        else:
            now = asyncio.get_running_loop().time()
            self.queue.add_after(key, last + self.context.config.slice_interval - now)

    def _service_changed(self, change: Change[Service]) -> None:
        if change.new is None:
            self._written.pop(change.key, None)
            self._triggered.pop(change.key, None)
            # The slices go with their owner (garbage collection).
            return
        if change.old is None or _relevant_service(change.old) != _relevant_service(change.new):
            self._dirty(change.key)

    def _pod_changed(self, change: Change[WorkloadPod]) -> None:
        if change.old is not None and change.new is not None and _relevant(change.old) == _relevant(change.new):
            return
        for pod in (change.old, change.new):
            if pod is not None:
                for key in self._services_of(pod):
                    self._dirty(key)

    def _slice_changed(self, change: Change[SliceDoc]) -> None:
        item = change.object
        if item.service and item.metadata.labels.get(MANAGED_BY) == MANAGER:
            self._dirty(ObjectKey(item.metadata.namespace, item.service))

    def _node_changed(self, change: Change[Node]) -> None:
        name = change.key.name
        zone = change.new.metadata.labels.get(ZONE, "") if change.new is not None else ""
        if self._zones.get(name, "") == zone:
            return
        self._zones[name] = zone
        for pod in self.cluster.pods_by_node.get(name).values():
            for key in self._services_of(pod):
                self._dirty(key)

    def _services_of(self, pod: Pod) -> Iterable[ObjectKey]:
        namespace, labels = pod.metadata.namespace, pod.metadata.labels
        for pair in labels.items():
            for key, service in self.cluster.services_by_selector.get((namespace, *pair)).items():
                if matches_labels(service.spec.selector, labels):
                    yield key

    # --- making it right ------------------------------------------------------------------------------------------

    async def sync(self, key: ObjectKey) -> None:
        service = self.cluster.services.get(key)
        triggered = self._triggered.pop(key, "")
        if service is None or service.metadata.deletion_timestamp is not None:
            return
        if not service.spec.selector or service.spec.type == "ExternalName":
            return
        existing = [
            item
            for item in self.cluster.slices_by_service.get((key.namespace, key.name)).values()
            if item.metadata.labels.get(MANAGED_BY) == MANAGER and item.metadata.deletion_timestamp is None
        ]
        writes = plan_slices(service, self._pods_of(service), existing, self._zones, triggered)
        if writes:
            try:
                await self._write(writes)
            except BaseException:
                self._triggered[key] = triggered
                raise
            self._written[key] = asyncio.get_running_loop().time()

    def _pods_of(self, service: Service) -> Iterable[WorkloadPod]:
        """By the label of the selector that the fewest pods have."""
        namespace, selector = service.metadata.namespace, service.spec.selector
        pods = min((self.cluster.pods_by_label.get((namespace, *pair)) for pair in selector.items()), key=len)
        return [pod for pod in pods.values() if matches_labels(selector, pod.metadata.labels)]

    async def _write(self, writes: SliceWrites) -> None:
        last = None
        for document in writes.create:
            last = await self.client.create(ENDPOINTSLICES, document)
        for item, patch in writes.update:
            last = await self.client.patch(ENDPOINTSLICES, item.metadata.name, patch, item.metadata.namespace)
        for item in writes.delete:
            try:
                last = await self.client.delete(
                    ENDPOINTSLICES, item.metadata.name, item.metadata.namespace, uid=item.metadata.uid
                )
            except NotFound:
                continue
        if last is not None:
            await self.cluster.slices.caught_up(last)


def _relevant_service(service: Service) -> tuple[object, ...]:
    return service.spec, service.metadata.labels, service.metadata.deletion_timestamp, service.metadata.uid


def _relevant(pod: Pod) -> tuple[object, ...]:
    """All of a pod that an endpoint shows."""
    return (
        pod.metadata.labels,
        pod.metadata.deletion_timestamp is not None,
        pod.ips,
        pod.ready,
        pod.finished,
        pod.spec.node_name,
    )
