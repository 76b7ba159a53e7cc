"""Anything may happen in any order; in the end the cluster is what its objects say."""

import asyncio
import gc
from contextlib import suppress
from random import Random
from typing import TYPE_CHECKING

import pytest
from live_cluster import LiveCluster, live_cluster

from podwire.client.api import PatchKind
from podwire.client.errors import AlreadyExists, Conflict, NotFound
from podwire.controllers.base import Cluster
from podwire.controllers.documents import DeploymentDoc
from podwire.model.resources import DEPLOYMENTS, ENDPOINTSLICES, NODES, PODS, REPLICASETS, SERVICES

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

NAMES = ("a", "b", "c")
IMAGES = ("web:1", "web:2", "web:3")
MAX_NODES = 5


class Chaos:
    """Random deeds on three Deployments with a Service each, and on nodes."""

    def __init__(self, cluster: LiveCluster, rng: Random) -> None:
        self._cluster, self._client, self._rng = cluster, cluster.client, rng
        self._nodes = 0

    async def step(self) -> None:
        deeds: tuple[Callable[[str], Awaitable[object]], ...] = (
            self.deploy,
            self.scale,
            self.scale,
            self.change_image,
            self.change_image,
            self.delete_deployment,
            self.delete_pod,
            self.delete_replica_set,
            self.toggle_service,
            self.steal_pod,
            self.delete_slice,
            self.add_node,
            self.delete_node,
            self.restart_server,
        )
        with suppress(NotFound, Conflict, AlreadyExists):
            await self._rng.choice(deeds)(self._rng.choice(NAMES))

    async def deploy(self, name: str) -> None:
        await self._cluster.deploy(name, self._rng.randrange(6), image=self._rng.choice(IMAGES))

    async def scale(self, name: str) -> None:
        await self._client.patch(DEPLOYMENTS, name, {"spec": {"replicas": self._rng.randrange(8)}}, "default")

    async def change_image(self, name: str) -> None:
        patch = [{"op": "replace", "path": "/spec/template/spec/containers/0/image", "value": self._rng.choice(IMAGES)}]
        await self._client.patch(DEPLOYMENTS, name, patch, "default", kind=PatchKind.JSON)

    async def delete_deployment(self, name: str) -> None:
        propagation = self._rng.choice(("Background", "Foreground"))
        await self._client.delete(DEPLOYMENTS, name, "default", propagation=propagation)

    async def delete_pod(self, name: str) -> None:
        pods = await self._cluster.items(PODS)
        if pods:
            await self._client.delete(PODS, self._rng.choice(pods)["metadata"]["name"], "default")

    async def delete_replica_set(self, name: str) -> None:
        sets = await self._cluster.items(REPLICASETS)
        if sets:
            await self._client.delete(REPLICASETS, self._rng.choice(sets)["metadata"]["name"], "default")

    async def toggle_service(self, name: str) -> None:
        service = {
            "apiVersion": "v1",
            "kind": "Service",
            "metadata": {"name": name, "namespace": "default"},
            "spec": {"selector": {"app": name}, "type": "LoadBalancer", "ports": [{"port": 80, "targetPort": "http"}]},
        }
        try:
            await self._client.delete(SERVICES, name, "default")
        except NotFound:
            await self._client.create(SERVICES, service)

    async def steal_pod(self, name: str) -> None:
        """Take a pod out of its set; it is nobody's from then on, and goes."""
        pods = await self._cluster.items(PODS)
        if pods:
            stolen = self._rng.choice(pods)["metadata"]["name"]
            await self._client.patch(PODS, stolen, {"metadata": {"labels": {"app": "stolen"}}}, "default")
            await self._client.delete(PODS, stolen, "default")

    async def delete_slice(self, name: str) -> None:
        slices = [
            s["metadata"]["name"] for s in await self._cluster.items(ENDPOINTSLICES) if s["metadata"]["name"] != "kubernetes"
        ]
        if slices:
            await self._client.delete(ENDPOINTSLICES, self._rng.choice(slices), "default")

    async def add_node(self, name: str) -> None:
        if len(await self._cluster.items(NODES)) < MAX_NODES:
            self._nodes += 1
            await self._cluster.add_node(f"node{self._nodes}")

    async def restart_server(self, name: str) -> None:
        await self._cluster.stop_server()
        await self._cluster.start_server()

    async def delete_node(self, name: str) -> None:
        nodes = await self._cluster.items(NODES)
        if len(nodes) > 1:
            await self._client.delete(NODES, self._rng.choice(nodes)["metadata"]["name"])


def what_is_wrong(copy: Cluster) -> str:
    """The first thing that is not as the objects say; empty if all is right."""
    pods = list(copy.pods.items().values())
    nodes = {key.name for key in copy.nodes.items()}
    deployments = {d.metadata.uid: d for d in copy.deployments.items().values()}
    for pod in pods:
        if not pod.ready or pod.metadata.deletion_timestamp or pod.spec.node_name not in nodes:
            return f"pod {pod.key} is not ready, is being deleted or on no node"
    for replica_set in copy.replica_sets.items().values():
        owner = replica_set.metadata.controller
        if owner is None or owner.uid not in deployments:
            return f"ReplicaSet {replica_set.key} is nobody's"
    return next((wrong for d in deployments.values() if (wrong := wrong_with_deployment(copy, d))), "") or wrong_with_services(
        copy
    )


def wrong_with_deployment(copy: Cluster, deployment: DeploymentDoc) -> str:
    size, status = deployment.spec.replicas, deployment.status
    sets = copy.replica_sets_by_controller.get(deployment.metadata.uid).values()
    mine = [pod for rs in sets for pod in copy.pods_by_controller.get(rs.metadata.uid).values()]
    image = deployment.spec.template["spec"]["containers"][0]["image"]
    if len(mine) != size or any(pod.spec.containers[0].image != image for pod in mine):
        return f"{deployment.key} has {[(pod.key.name, pod.spec.containers[0].image) for pod in mine]}, not {size} of {image}"
    counts = {status.replicas, status.updated_replicas, status.ready_replicas, status.available_replicas}
    if counts != {size} or status.observed_generation != deployment.metadata.generation:
        return f"{deployment.key}'s status is {status}"
    return ""


def wrong_with_services(copy: Cluster) -> str:
    services = [s for s in copy.services.items().values() if s.spec.selector]
    expected = sorted(
        (service.metadata.name, pod.status.pod_ip)
        for service in services
        for pod in copy.pods.items().values()
        if pod.metadata.labels.get("app") == service.metadata.name
    )
    slices = [s for s in copy.slices.items().values() if s.metadata.name != "kubernetes"]
    found = sorted((s.service, endpoint["addresses"][0]) for s in slices for endpoint in s.endpoints)
    if found != expected:
        return f"endpoints are {found}, not {expected}"
    addresses = [entry.ip for service in services for entry in service.status.load_balancer.ingress]
    if not len(addresses) == len(set(addresses)) == len(services):
        return f"load-balancer addresses are {addresses}"
    ranges = [cidr for node in copy.nodes.items().values() for cidr in node.spec.pod_cidrs]
    return f"pod ranges are {ranges}" if len(ranges) != len(set(ranges)) else ""


async def all_right(cluster: LiveCluster) -> None:
    """Returns once nothing is wrong. Raises AssertionError if that takes too long."""
    copy, changed = Cluster(cluster.client, Random(1)), asyncio.Event()
    running = [asyncio.create_task(informer.run()) for informer in copy.informers]
    wrong = ""
    try:
        async with asyncio.timeout(30):
            await copy.synced()
            for informer in copy.informers:
                informer.subscribe(lambda _: changed.set())
            while wrong := what_is_wrong(copy):
                changed.clear()
                await changed.wait()
    except TimeoutError:
        raise AssertionError(f"it never came right: {wrong}") from None
    finally:
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)


# A connection that is accepted in the moment the server stops is left to the garbage collector (by aiohttp).
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.timeout(60)
@pytest.mark.parametrize("seed", range(4))
async def test_whatever_happens_the_cluster_ends_up_right(seed: int) -> None:
    async with live_cluster(nodes=0) as cluster:
        chaos = Chaos(cluster, Random(seed))
        await chaos.add_node("")
        for _ in range(60):
            await chaos.step()
        await all_right(cluster)
    gc.collect()
