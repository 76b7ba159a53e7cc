"""When is a cluster ready? What still keeps it from being so, as pure functions, and waiting until nothing does."""

import asyncio
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from typing import Any, TypeVar

from podwire.client.api import ApiClient
from podwire.client.informer import Informer
from podwire.lab.errors import LabError
from podwire.model.ids import ObjectKey
from podwire.model.meta import matches_labels
from podwire.model.objects import ApiObject, EndpointSlice, Node, Pod, Service, View
from podwire.model.resources import DEPLOYMENTS, ENDPOINTSLICES, NODES, PODS, REPLICASETS, SERVICES

OnChange = Callable[[Sequence[str]], None]
T = TypeVar("T", bound=ApiObject)


class WorkloadSpec(View, frozen=True):
    replicas: int = 1


class WorkloadStatus(View, frozen=True):
    ready_replicas: int = 0
    observed_generation: int = 0


class Workload(ApiObject, frozen=True):
    """What Deployment and ReplicaSet have in common."""

    spec: WorkloadSpec = WorkloadSpec()
    status: WorkloadStatus = WorkloadStatus()


def node_obstacle(node: Node) -> str:
    """Why this object keeps the cluster from being ready; empty when it does not. (So for the functions below.)"""
    return "" if node.ready else f"node {node.metadata.name} is not ready"


def pod_obstacle(pod: Pod) -> str:
    if pod.finished or pod.metadata.deletion_timestamp or pod.ready:
        return ""
    where = f"on {pod.spec.node_name}" if pod.spec.node_name else "not scheduled"
    return f"pod {pod.key} is not ready ({where}, {pod.status.phase or 'Pending'})"


def workload_obstacle(workload: Workload) -> str:
    status, wanted = workload.status, workload.spec.replicas
    if status.observed_generation < workload.metadata.generation or status.ready_replicas < wanted:
        return f"{workload.key} has {status.ready_replicas} of {wanted} pods ready"
    return ""


def service_obstacle(service: Service) -> str:
    if service.spec.type == "LoadBalancer" and not service.status.load_balancer.ingress:
        return f"service {service.key} has no load-balancer address"
    return ""


def endpoint_obstacles(pods: Iterable[Pod], services: Iterable[Service], slices: Iterable[EndpointSlice]) -> list[str]:
    """Services that do not yet have all their ready pods as endpoints."""
    known: dict[ObjectKey, set[str]] = {}
    for piece in slices:
        uids = known.setdefault(ObjectKey(piece.metadata.namespace, piece.service), set())
        uids.update(e.target_ref.uid for e in piece.endpoints if e.target_ref is not None and e.conditions.ready is not False)
    ready = [pod for pod in pods if pod.ready and not pod.metadata.deletion_timestamp]
    found = []
    for service in services:
        if not service.spec.selector or service.spec.type == "ExternalName":
            continue
        wanted = {
            pod.metadata.uid
            for pod in ready
            if pod.metadata.namespace == service.metadata.namespace
            and matches_labels(service.spec.selector, pod.metadata.labels)
        }
        missing = len(wanted - known.get(service.key, set()))
        if missing:
            found.append(f"service {service.key} lacks {missing} of {len(wanted)} endpoints")
    return found


async def await_nodes(client: ApiClient, within: float) -> None:
    """Return when every node is ready. Raises LabError after `within` seconds."""
    nodes = Informer(client, NODES, Node)
    await _await_all([nodes], lambda: _each(nodes, node_obstacle), within, lambda _: None)


async def await_ready(client: ApiClient, within: float, on_change: OnChange = lambda _: None) -> None:
    """Return when nothing keeps the cluster from being ready; `on_change` hears of what still does.

    Raises LabError after `within` seconds, naming it."""
    nodes, pods = Informer(client, NODES, Node), Informer(client, PODS, Pod)
    deployments, replicasets = Informer(client, DEPLOYMENTS, Workload), Informer(client, REPLICASETS, Workload)
    services, slices = Informer(client, SERVICES, Service), Informer(client, ENDPOINTSLICES, EndpointSlice)

    def obstacles() -> list[str]:
        found = [
            *_each(nodes, node_obstacle),
            *_each(deployments, workload_obstacle),
            *_each(replicasets, workload_obstacle),
            *_each(pods, pod_obstacle),
            *_each(services, service_obstacle),
        ]
        # The last question costs most: it is asked when all others are answered.
        return found or endpoint_obstacles(pods.items().values(), services.items().values(), slices.items().values())

    await _await_all([nodes, deployments, replicasets, pods, services, slices], obstacles, within, on_change)


def _each(informer: Informer[T], obstacle: Callable[[T], str]) -> list[str]:
    return [text for obj in informer.items().values() if (text := obstacle(obj))]


async def _await_all(
    informers: Sequence[Informer[Any]], judge: Callable[[], list[str]], within: float, on_change: OnChange
) -> None:
    changed = asyncio.Event()
    obstacles: list[str] = []
    tasks = [asyncio.create_task(informer.run()) for informer in informers]
    for informer in informers:
        informer.subscribe(lambda _: changed.set())
    try:
        async with asyncio.timeout(within):
            for informer in informers:
                await informer.synced()
            while True:
                changed.clear()
                obstacles = judge()
                on_change(obstacles)
                if not obstacles:
                    return
                await changed.wait()
    except TimeoutError:
        shown = "; ".join(obstacles[:5]) or "the API server does not answer"
        more = f"; and {len(obstacles) - 5} more" if len(obstacles) > 5 else ""
        raise LabError(f"not ready after {within:g} s: {shown}{more}; `podwire lab logs` may say why") from None
    finally:
        for task in tasks:
            task.cancel()
        for task in tasks:
            with suppress(asyncio.CancelledError):
                await task
