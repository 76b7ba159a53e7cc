"""Namespaces at both ends of their lives: what each is born with, and emptying it before it goes."""

import asyncio
import logging
from typing import ClassVar

from podwire.client.discovery import ServedKind, served_kinds
from podwire.client.errors import AlreadyExists, ApiError, Conflict, Forbidden, NotFound
from podwire.client.informer import Change, Informer
from podwire.controllers.base import Context, Controller, all_of
from podwire.controllers.documents import NamespaceDoc, WorkloadPod
from podwire.model.ids import ObjectKey
from podwire.model.meta import Json
from podwire.model.objects import ApiObject, ConfigMap
from podwire.model.resources import CONFIGMAPS, NAMESPACES, SERVICEACCOUNTS

log = logging.getLogger(__name__)

FINALIZER = "kubernetes"
ROOT_CA = "kube-root-ca.crt"
RECHECK = 1.0
"""Seconds between looks at a namespace whose rest goes by others' doing; its pods' ends are seen at once."""


class NamespaceContents(Controller[str]):
    """Every namespace has the ServiceAccount `default` and the ConfigMap `kube-root-ca.crt`, also after one is deleted."""

    name: ClassVar[str] = "namespace-contents"

    def __init__(self, context: Context) -> None:
        super().__init__(context)
        only = "metadata.name="
        rng = context.rng
        self._accounts = Informer(self.client, SERVICEACCOUNTS, ApiObject, field_selector=f"{only}default", rng=rng)
        self._bundles = Informer(self.client, CONFIGMAPS, ConfigMap, field_selector=f"{only}{ROOT_CA}", rng=rng)
        self.on(self.cluster.namespaces, self._namespace_changed)
        self.on(self._accounts, self._content_changed)
        self.on(self._bundles, self._content_changed)

    def _namespace_changed(self, change: Change[NamespaceDoc]) -> None:
        if change.old is None and change.new is not None:
            self.queue.add(change.key.name)

    def _content_changed(self, change: Change[ApiObject] | Change[ConfigMap]) -> None:
        if change.old is not None:
            self.queue.add(change.key.namespace)

    async def run(self) -> None:
        async with asyncio.TaskGroup() as group:
            group.create_task(self._accounts.run())
            group.create_task(self._bundles.run())
            await self._accounts.synced()
            await self._bundles.synced()
            await super().run()

    async def sync(self, key: str) -> None:
        namespace = self.cluster.namespaces.get(ObjectKey("", key))
        if namespace is None or namespace.metadata.deletion_timestamp is not None:
            return
        if self._accounts.get(ObjectKey(key, "default")) is None:
            await self._create_account(key)
        certificate = self.context.config.ca_certificate
        if not certificate:
            return
        bundle = self._bundles.get(ObjectKey(key, ROOT_CA))
        if bundle is None:
            await self._create_bundle(key, certificate)
        elif bundle.data != {"ca.crt": certificate}:
            await self.client.patch(CONFIGMAPS, ROOT_CA, {"data": {"ca.crt": certificate}}, key)

    async def _create_account(self, namespace: str) -> None:
        account: Json = {"apiVersion": "v1", "kind": "ServiceAccount", "metadata": {"name": "default", "namespace": namespace}}
        try:
            await self.client.create(SERVICEACCOUNTS, account)
        except (AlreadyExists, NotFound, Forbidden):
            return  # made by someone else, or the namespace is on its way out

    async def _create_bundle(self, namespace: str, certificate: str) -> None:
        text = "Contains a CA bundle that can be used to verify the kube-apiserver when using internal endpoints."
        meta: Json = {"name": ROOT_CA, "namespace": namespace, "annotations": {"kubernetes.io/description": text}}
        bundle: Json = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": meta, "data": {"ca.crt": certificate}}
        try:
            await self.client.create(CONFIGMAPS, bundle)
        except (AlreadyExists, NotFound, Forbidden):
            return


class NamespaceDeletion(Controller[str]):
    """Deletes everything in a namespace that is being deleted, then gives it free by removing its finalizer `kubernetes`."""

    name: ClassVar[str] = "namespace-deletion"

    def __init__(self, context: Context) -> None:
        super().__init__(context)
        self.on(self.cluster.namespaces, self._namespace_changed)
        self.on(self.cluster.pods, self._pod_changed)

    def _namespace_changed(self, change: Change[NamespaceDoc]) -> None:
        if change.new is not None and _ending(change.new):
            self.queue.add(change.key.name)

    def _pod_changed(self, change: Change[WorkloadPod]) -> None:
        if change.new is None:
            namespace = self.cluster.namespaces.get(ObjectKey("", change.key.namespace))
            if namespace is not None and _ending(namespace):
                self.queue.add(namespace.metadata.name)

    async def sync(self, key: str) -> None:
        namespace = self.cluster.namespaces.get(ObjectKey("", key))
        if namespace is None or not _ending(namespace):
            return
        # Asked anew each time: a kind may have come since (a CustomResourceDefinition).
        kinds = [k for k in await served_kinds(self.client) if k.resource.namespaced and {"list", "delete"} <= k.verbs]
        remaining = [name for name in await all_of(self._empty(kind, key) for kind in kinds) if name]
        if remaining:
            log.info("namespace %s still has %s", key, ", ".join(remaining))
            self.queue.add_after(key, RECHECK)
            return
        finalizers = [name for name in namespace.spec.finalizers if name != FINALIZER]
        meta = {"name": key, "uid": namespace.metadata.uid, "resourceVersion": namespace.metadata.resource_version}
        document: Json = {"apiVersion": "v1", "kind": "Namespace", "metadata": meta, "spec": {"finalizers": finalizers}}
        try:
            await self.client.request("PUT", NAMESPACES.path(name=key, subresource="finalize"), body=document)
        except NotFound:
            return

    async def _empty(self, kind: ServedKind, namespace: str) -> str:
        """Deletes what there is of one kind; returns "plural (count)" of what remains, or nothing."""
        resource = kind.resource
        found = await self.client.list(resource, namespace)
        await all_of(self._delete(kind, item) for item in found.items if not item["metadata"].get("deletionTimestamp"))
        if not found.items:
            return ""
        remaining = len((await self.client.list(resource, namespace)).items)
        return f"{resource.plural} ({remaining})" if remaining else ""

    async def _delete(self, kind: ServedKind, item: Json) -> None:
        meta = item["metadata"]
        try:
            await self.client.delete(
                kind.resource, meta["name"], meta["namespace"], uid=meta.get("uid"), propagation="Background"
            )
        except (NotFound, Conflict):
            return
        except ApiError as error:
            log.warning("%s %s/%s cannot be deleted: %s", kind.resource.plural, meta["namespace"], meta["name"], error)


def _ending(namespace: NamespaceDoc) -> bool:
    return namespace.metadata.deletion_timestamp is not None and FINALIZER in namespace.spec.finalizers
