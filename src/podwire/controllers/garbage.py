"""The garbage collector: dependents follow their owners, in the background, in the foreground, or are let go as orphans."""

import asyncio
import logging
from typing import Any, ClassVar

from podwire.client.api import PatchKind
from podwire.client.discovery import served_kinds
from podwire.client.errors import ApiError, Conflict, NotFound
from podwire.client.informer import Change, Informer
from podwire.client.workqueue import WorkQueue
from podwire.controllers.base import Context, all_of
from podwire.controllers.ownership import FOREGROUND, ORPHAN, Item, OwnerGraph, Presence, blockers, judge, owner_namespace
from podwire.model.meta import Json, OwnerReference
from podwire.model.objects import ApiObject
from podwire.model.resources import EVENTS, Resource

log = logging.getLogger(__name__)

NEEDED = frozenset(("list", "watch", "delete", "patch"))
WORKERS = 16


class GarbageCollector:
    """Watches the metadata of every kind the server has (at start), except Events. Keys of its queue are uids."""

    name: ClassVar[str] = "garbage"

    def __init__(self, context: Context) -> None:
        self._context, self._client = context, context.client
        self._graph = OwnerGraph()
        self._queue: WorkQueue[str] = WorkQueue(context.rng, name=self.name)
        self._kinds: dict[tuple[str, str], Resource] = {}
        # Owners that the server, asked directly, does not have: uids never come back.
        self._absent: set[str] = set()

    async def run(self) -> None:
        kinds = [k.resource for k in await served_kinds(self._client) if k.verbs >= NEEDED]
        kinds = [r for r in kinds if r.plural != EVENTS.plural]
        self._kinds = {(r.group, r.kind): r for r in kinds}
        shared = {informer.resource: informer for informer in self._context.cluster.informers if not informer.selects}
        own = [Informer(self._client, r, ApiObject, rng=self._context.rng) for r in kinds if r not in shared]
        informers: list[Informer[Any]] = [*own, *(shared[r] for r in kinds if r in shared)]
        stops = []
        try:
            async with asyncio.TaskGroup() as group:
                for informer in own:
                    group.create_task(informer.run())
                for informer in informers:
                    await informer.synced()
                    stops.append(informer.subscribe(_handler(self, informer.resource)))
                await self._queue.run(self._sync, expected=(ApiError,), workers=WORKERS)
        finally:
            self._queue.close()
            for stop in stops:
                stop()

    def changed(self, resource: Resource, change: Change[ApiObject]) -> None:
        if change.new is None:
            uid = change.object.metadata.uid
            dependents = self._graph.dependents(uid)
            self._graph.remove(uid)
            self._absent.discard(uid)
            for dependent in dependents:
                self._queue.add(dependent.meta.uid)
            for owner in change.object.metadata.owner_references:
                # It may have waited for this one.
                self._look_if_waiting(owner.uid)
            return
        item = Item(resource, change.new.metadata)
        before = self._graph.get(item.meta.uid)
        self._graph.put(item)
        if item.waits_for_dependents or item.orphans_dependents:
            self._queue.add(item.meta.uid)
        if before is None or before.meta.owner_references != item.meta.owner_references:
            if item.meta.owner_references:
                self._queue.add(item.meta.uid)
            for owner in before.meta.owner_references if before is not None else ():
                self._look_if_waiting(owner.uid)

    def _look_if_waiting(self, uid: str) -> None:
        owner = self._graph.get(uid)
        if owner is not None and (owner.waits_for_dependents or owner.orphans_dependents):
            self._queue.add(uid)

    # --- one object -----------------------------------------------------------------------------------------------

    async def _sync(self, uid: str) -> None:
        item = self._graph.get(uid)
        if item is None:
            return
        if item.orphans_dependents:
            await self._let_go(item)
        elif item.waits_for_dependents:
            await self._delete_in_foreground(item)
        elif item.meta.owner_references and not item.deleting:
            owners = {o.uid: await self._presence(item, o) for o in item.meta.owner_references}
            verdict = judge(item, owners, has_dependents=bool(self._graph.dependents(uid)))
            if verdict.delete:
                await self._delete(item, verdict.propagation)
            elif verdict.drop_owners:
                await self._drop_owners(item, verdict.drop_owners)

    async def _presence(self, item: Item, reference: OwnerReference) -> Presence:
        known = self._graph.get(reference.uid)
        if known is not None:
            if known.meta.namespace not in ("", item.meta.namespace):
                return Presence.ABSENT
            return Presence.WAITING if known.waits_for_dependents else Presence.SOLID
        if reference.uid in self._absent:
            return Presence.ABSENT
        return await self._ask(item, reference)

    async def _ask(self, item: Item, reference: OwnerReference) -> Presence:
        """The copies do not have that owner. Only the server's own word makes an object garbage."""
        group = reference.api_version.rpartition("/")[0]
        resource = self._kinds.get((group, reference.kind))
        if resource is None:
            log.warning("%s: its owner's kind %s %s is not known", item, reference.api_version, reference.kind)
            return Presence.SOLID
        namespace = owner_namespace(item, reference, resource)
        if namespace is None:
            return Presence.SOLID
        try:
            found = await self._client.get(resource, reference.name, namespace)
        except NotFound:
            pass
        else:
            if found["metadata"].get("uid") == reference.uid:
                return Presence.SOLID
        self._absent.add(reference.uid)
        return Presence.ABSENT

    async def _delete(self, item: Item, propagation: str) -> None:
        try:
            await self._client.delete(
                item.resource, item.meta.name, item.meta.namespace or None, uid=item.meta.uid, propagation=propagation
            )
        except (NotFound, Conflict):
            return
        log.info("%s deleted: its owners are gone", item)

    async def _delete_in_foreground(self, owner: Item) -> None:
        dependents = self._graph.dependents(owner.meta.uid)
        waited_for = blockers(owner, dependents)
        if not waited_for:
            await self._remove_finalizer(owner, FOREGROUND)
            return
        # Each dependent is judged on its own (it may have another owner that keeps it).
        for dependent in dependents:
            if not dependent.deleting:
                self._queue.add(dependent.meta.uid)

    async def _let_go(self, owner: Item) -> None:
        await all_of(self._drop_owners(dependent, [owner.meta.uid]) for dependent in self._graph.dependents(owner.meta.uid))
        await self._remove_finalizer(owner, ORPHAN)

    async def _drop_owners(self, item: Item, uids: list[str]) -> None:
        left = [reference for reference in item.meta.owner_references if reference.uid not in uids]
        patch: Json = {
            "metadata": {
                "uid": item.meta.uid,
                "resourceVersion": item.meta.resource_version,
                "ownerReferences": [_reference(reference) for reference in left] or None,
            }
        }
        await self._patch(item, patch)

    async def _remove_finalizer(self, item: Item, finalizer: str) -> None:
        left = [name for name in item.meta.finalizers if name != finalizer]
        meta: Json = {"uid": item.meta.uid, "resourceVersion": item.meta.resource_version, "finalizers": left or None}
        await self._patch(item, {"metadata": meta})

    async def _patch(self, item: Item, patch: Json) -> None:
        """A Conflict is raised and retried: by then the graph has the newer state."""
        try:
            await self._client.patch(item.resource, item.meta.name, patch, item.meta.namespace or None, kind=PatchKind.MERGE)
        except NotFound:
            return


def _handler(collector: GarbageCollector, resource: Resource) -> Any:
    return lambda change: collector.changed(resource, change)


def _reference(reference: OwnerReference) -> Json:
    document: Json = {
        "apiVersion": reference.api_version,
        "kind": reference.kind,
        "name": reference.name,
        "uid": reference.uid,
    }
    if reference.controller:
        document["controller"] = True
    if reference.block_owner_deletion:
        document["blockOwnerDeletion"] = True
    return document
