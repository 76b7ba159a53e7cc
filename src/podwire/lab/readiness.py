"""When is a cluster ready? What still keeps it from being so, as pure functions, and waiting until nothing does."""

import asyncio
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

from podwire.client.api import ApiClient
from podwire.client.informer import Informer
from podwire.lab.errors import LabError
from podwire.model.objects import ApiObject, Node, Pod, Service, View
from podwire.model.resources import DEPLOYMENTS, NODES, PODS, REPLICASETS, SERVICES

OnChange = Callable[[Sequence[str]], None]
Watched = tuple[Informer[Any], Callable[[Any], str]]
"""A kind, and what tells for each object of it how it keeps the cluster from being ready."""


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


async def await_nodes(client: ApiClient, within: float) -> None:
    """Return when every node is ready. Raises LabError after `within` seconds."""
    await _await_all([(Informer(client, NODES, Node), node_obstacle)], within, lambda _: None)


async def await_ready(client: ApiClient, within: float, on_change: OnChange = lambda _: None) -> None:
    """Return when nothing keeps the cluster from being ready; `on_change` hears of what still does.

    Raises LabError after `within` seconds, naming it."""
    watched: list[Watched] = [
        (Informer(client, NODES, Node), node_obstacle),
        (Informer(client, DEPLOYMENTS, Workload), workload_obstacle),
        (Informer(client, REPLICASETS, Workload), workload_obstacle),
        (Informer(client, PODS, Pod), pod_obstacle),
        (Informer(client, SERVICES, Service), service_obstacle),
    ]
    await _await_all(watched, within, on_change)


async def _await_all(watched: Sequence[Watched], within: float, on_change: OnChange) -> None:
    changed = asyncio.Event()
    obstacles: list[str] = []
    tasks = [asyncio.create_task(informer.run()) for informer, _ in watched]
    for informer, _ in watched:
        informer.subscribe(lambda _: changed.set())
    try:
        async with asyncio.timeout(within):
            for informer, _ in watched:
                await informer.synced()
            while True:
                changed.clear()
                obstacles = [text for informer, judge in watched for obj in informer.items().values() if (text := judge(obj))]
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
