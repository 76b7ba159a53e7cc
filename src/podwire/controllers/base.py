"""What the controllers share: the informers, and the loop `dirty key → sync(key)`."""

import asyncio
import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Iterable
from contextlib import ExitStack
from datetime import datetime
from random import Random
from typing import Any, ClassVar, Generic, TypeVar

from podwire.client.api import ApiClient
from podwire.client.errors import ApiError
from podwire.client.events import EventRecorder
from podwire.client.informer import Change, Informer
from podwire.client.workqueue import WorkQueue
from podwire.controllers.config import ControllersConfig
from podwire.controllers.documents import DeploymentDoc, NamespaceDoc, ReplicaSetDoc, SliceDoc, WorkloadPod
from podwire.controllers.index import Index
from podwire.model.objects import ApiObject, Lease, Node, Service
from podwire.model.resources import (
    DEPLOYMENTS,
    ENDPOINTSLICES,
    IPADDRESSES,
    LEASES,
    NAMESPACES,
    NODES,
    PODS,
    REPLICASETS,
    SERVICECIDRS,
    SERVICES,
)
from podwire.model.servicecidr import IPAddressObject, ServiceCIDR

log = logging.getLogger(__name__)

K = TypeVar("K", bound=Hashable)
T = TypeVar("T", bound=ApiObject)


class Cluster:
    """The controllers' common copy of the cluster: one informer per kind, shared by all, and indexes over them."""

    def __init__(self, client: ApiClient, rng: Random) -> None:
        self.nodes = Informer(client, NODES, Node, rng=rng)
        self.pods = Informer(client, PODS, WorkloadPod, rng=rng)
        self.services = Informer(client, SERVICES, Service, rng=rng)
        self.slices = Informer(client, ENDPOINTSLICES, SliceDoc, rng=rng)
        self.deployments = Informer(client, DEPLOYMENTS, DeploymentDoc, rng=rng)
        self.replica_sets = Informer(client, REPLICASETS, ReplicaSetDoc, rng=rng)
        self.namespaces = Informer(client, NAMESPACES, NamespaceDoc, rng=rng)
        self.service_cidrs = Informer(client, SERVICECIDRS, ServiceCIDR, rng=rng)
        self.ip_addresses = Informer(client, IPADDRESSES, IPAddressObject, rng=rng)
        self.leases = Informer(client, LEASES, Lease, namespace="kube-node-lease", rng=rng)
        self.pods_by_controller = Index(self.pods, _controller_uid)
        self.pods_by_label = Index(self.pods, _label_values)
        self.pods_by_node = Index(self.pods, lambda pod: (pod.spec.node_name,) if pod.spec.node_name else ())
        self.replica_sets_by_controller = Index(self.replica_sets, _controller_uid)
        self.replica_sets_by_namespace = Index(self.replica_sets, lambda rs: (rs.metadata.namespace,))
        self.services_by_selector = Index(self.services, _selector_pair)
        self.slices_by_service = Index(self.slices, lambda s: ((s.metadata.namespace, s.service),) if s.service else ())

    @property
    def informers(self) -> tuple[Informer[Any], ...]:
        return (
            self.nodes,
            self.pods,
            self.services,
            self.slices,
            self.deployments,
            self.replica_sets,
            self.namespaces,
            self.service_cidrs,
            self.ip_addresses,
            self.leases,
        )

    async def synced(self) -> None:
        for informer in self.informers:
            await informer.synced()


def _controller_uid(obj: ApiObject) -> tuple[str, ...]:
    owner = obj.metadata.controller
    return (owner.uid,) if owner is not None else ()


def _label_values(obj: ApiObject) -> list[tuple[str, str, str]]:
    """An entry per label, and one (with an empty label) for the namespace as such."""
    namespace = obj.metadata.namespace
    return [(namespace, "", ""), *((namespace, key, value) for key, value in obj.metadata.labels.items())]


def _selector_pair(service: Service) -> tuple[tuple[str, str, str], ...]:
    """One pair of the selector stands for it: a pod without that label is not selected."""
    if not service.spec.selector:
        return ()
    return ((service.metadata.namespace, *min(service.spec.selector.items())),)


class Context:
    """What every controller is given. `now` tells the wall-clock time (aware)."""

    def __init__(self, client: ApiClient, config: ControllersConfig, now: Callable[[], datetime], rng: Random) -> None:
        self.client, self.config, self.now, self.rng = client, config, now, rng
        self.cluster = Cluster(client, rng)
        self.events = EventRecorder(client, "podwire-controllers", now=now)


class Controller(ABC, Generic[K]):
    """A queue of dirty keys and the `sync` that makes one of them right. A new instance starts over with all that exists.

    `sync` raises ApiError to be called again, after a back-off.
    """

    name: ClassVar[str]
    workers: ClassVar[int] = 4

    def __init__(self, context: Context) -> None:
        self.context = context
        self.client, self.cluster, self.events = context.client, context.cluster, context.events
        self.queue: WorkQueue[K] = WorkQueue(context.rng, name=self.name)
        self._inputs: list[Callable[[], Callable[[], None]]] = []

    def on(self, informer: Informer[T], handler: Callable[[Change[T]], None]) -> None:
        """Call `handler` for every change while the controller runs (from its start: for all that exists)."""
        self._inputs.append(lambda: informer.subscribe(handler))

    @abstractmethod
    async def sync(self, key: K) -> None: ...

    async def run(self) -> None:
        await self.cluster.synced()
        with ExitStack() as stack:
            stack.callback(self.queue.close)
            for subscribe in self._inputs:
                stack.callback(subscribe())
            await self.queue.run(self.sync, expected=(ApiError,), workers=self.workers)


async def all_of(calls: Iterable[Any], *, at_once: int = 32) -> list[Any]:
    """Awaits all coroutines, at most `at_once` at a time; raises the first ApiError after all have ended."""
    limit = asyncio.Semaphore(at_once)

    async def one(call: Any) -> Any:
        async with limit:
            return await call

    results = await asyncio.gather(*(one(call) for call in calls), return_exceptions=True)
    for result in results:
        if isinstance(result, BaseException):
            raise result
    return results
