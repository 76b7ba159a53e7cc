"""The real API server over the memory store, the real controllers, and nodes whose pods run at once — in one process."""

import asyncio
import itertools
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing, asynccontextmanager
from datetime import UTC, datetime
from ipaddress import ip_network
from random import Random
from typing import Any

from podwire.apiserver.app import create_app
from podwire.apiserver.config import ServerConfig
from podwire.apiserver.server import ApiServer, Listener
from podwire.client.api import ApiClient
from podwire.client.errors import ApiError
from podwire.client.informer import Change, Informer
from podwire.client.workqueue import WorkQueue
from podwire.controllers.config import ControllersConfig, default_cluster_cidr
from podwire.controllers.run import run_controllers
from podwire.model.ids import ObjectKey
from podwire.model.meta import Json
from podwire.model.objects import Pod
from podwire.model.resources import DEPLOYMENTS, NODES, PODS, Resource
from podwire.model.timestamps import format_time
from podwire.store.memory import MemoryStore

CONFIG = ControllersConfig(
    cluster_cidrs=(default_cluster_cidr("10.244.0.0/16"), default_cluster_cidr("fd00:10:244::/56")),
    load_balancer_pools=(ip_network("203.0.113.0/24"), ip_network("2001:db8:2::/112")),
    ca_certificate="CERTIFICATE",
)


class FakeKubelet:
    """Runs the pods of all nodes: Ready with an address as soon as they are bound, gone as soon as they are deleted.

    Pods with the label `stays: pending` never get ready; those with `stays: terminating` take `release` to go.
    """

    def __init__(self, client: ApiClient) -> None:
        self._client = client
        self._pods = Informer(client, PODS, Pod, rng=Random(1))
        self._queue: WorkQueue[ObjectKey] = WorkQueue(Random(1))
        self._numbers = itertools.count(1)
        self._pods.subscribe(self._changed)

    async def run(self) -> None:
        async with asyncio.TaskGroup() as group:
            group.create_task(self._pods.run())
            group.create_task(self._queue.run(self._sync, expected=(ApiError,), workers=8))

    def _changed(self, change: Change[Pod]) -> None:
        if change.new is not None and change.new.spec.node_name:
            self._queue.add(change.key)

    async def _sync(self, key: ObjectKey) -> None:
        pod = self._pods.get(key)
        if pod is None:
            return
        stays = pod.metadata.labels.get("stays")
        if pod.metadata.deletion_timestamp is not None:
            if stays != "terminating":
                await self._client.delete(PODS, key.name, key.namespace, grace_period_seconds=0, uid=pod.metadata.uid)
            return
        if pod.status.phase == "Running" or stays == "pending":
            return
        number = next(self._numbers)
        now, ip = format_time(datetime.now(UTC)), f"10.244.{number >> 8}.{number & 255}"
        status = {
            "phase": "Running",
            "podIP": ip,
            "podIPs": [{"ip": ip}, {"ip": f"fd00:10:244::{number:x}"}],
            "conditions": [{"type": "Ready", "status": "True", "lastTransitionTime": now}],
        }
        await self._client.patch(PODS, key.name, {"status": status}, key.namespace, subresource="status")


class LiveCluster:
    def __init__(self, client: ApiClient, store: MemoryStore, port: int) -> None:
        self.client = client
        self.url = client.base_url
        self._store, self._port = store, port
        self._server: ApiServer | None = None

    async def start_server(self) -> None:
        families = (ip_network("10.96.0.0/16"), ip_network("fd00:10:96::/112"))
        self._server = ApiServer(create_app(self._store, ServerConfig(service_cidrs=families)))
        await self._server.start([Listener(socket.create_server(("127.0.0.1", self._port)))])

    async def stop_server(self) -> None:
        if self._server is not None:
            await self._server.stop()
            self._server = None

    async def add_node(self, name: str, **labels: str) -> Json:
        labels = {"kubernetes.io/hostname": name} | labels
        node = await self.client.create(
            NODES, {"apiVersion": "v1", "kind": "Node", "metadata": {"name": name, "labels": labels}}
        )
        await self.set_ready(name, "True")
        return node

    async def set_ready(self, name: str, status: str) -> None:
        condition = {"type": "Ready", "status": status, "lastTransitionTime": format_time(datetime.now(UTC))}
        patch = {"status": {"conditions": [condition], "allocatable": {"pods": "110"}}}
        await self.client.patch(NODES, name, patch, subresource="status")

    async def deploy(self, name: str, replicas: int, *, namespace: str = "default", image: str = "web:1", **spec: Any) -> Json:
        labels = {"app": name} | spec.pop("labels", {})
        pod = spec.pop("pod", {})
        container = {"name": "web", "image": image, "ports": [{"name": "http", "containerPort": 8080}]}
        document = {
            "apiVersion": "apps/v1",
            "kind": "Deployment",
            "metadata": {"name": name, "namespace": namespace},
            "spec": {
                "replicas": replicas,
                "selector": {"matchLabels": {"app": name}},
                "template": {"metadata": {"labels": labels}, "spec": {"containers": [container]} | pod},
                **spec,
            },
        }
        return await self.client.create(DEPLOYMENTS, document)

    async def items(self, resource: Resource, namespace: str | None = None) -> list[Json]:
        return (await self.client.list(resource, namespace)).items

    async def until(
        self,
        resource: Resource,
        condition: Callable[[list[Json]], bool],
        *,
        namespace: str | None = None,
        seconds: float = 10,
        each: Callable[[list[Json]], None] = lambda items: None,
    ) -> list[Json]:
        """Waits until `condition` holds of all objects of the kind; calls `each` with every state on the way."""
        found = await self.client.list(resource, namespace)
        state = {item["metadata"]["uid"]: item for item in found.items}
        try:
            async with asyncio.timeout(seconds):
                each(list(state.values()))
                if condition(list(state.values())):
                    return list(state.values())
                watch = self.client.watch(resource, namespace, resource_version=found.resource_version)
                async with aclosing(watch) as events:
                    async for event in events:
                        if event.type == "BOOKMARK":
                            continue
                        document = event.json()
                        uid = document["metadata"]["uid"]
                        state[uid] = document
                        if event.type == "DELETED":
                            del state[uid]
                        each(list(state.values()))
                        if condition(list(state.values())):
                            return list(state.values())
        except TimeoutError:
            pass
        raise AssertionError(f"{resource.plural} never got there; they are {str(list(state.values()))[:4000]}")


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port: int = probe.getsockname()[1]
        return port


@asynccontextmanager
async def live_cluster(config: ControllersConfig = CONFIG, *, nodes: int = 0) -> AsyncIterator[LiveCluster]:
    store, port = MemoryStore(), free_port()
    async with ApiClient(f"http://127.0.0.1:{port}") as client:
        cluster = LiveCluster(client, store, port)
        await cluster.start_server()
        synced = asyncio.Event()
        running = [
            asyncio.create_task(run_controllers(client, config, rng=Random(1), on_synced=synced.set)),
            asyncio.create_task(FakeKubelet(client).run()),
        ]
        try:
            async with asyncio.timeout(10):
                await synced.wait()
            for number in range(nodes):
                await cluster.add_node(f"node{number + 1}")
            yield cluster
        finally:
            for task in running:
                task.cancel()
            await asyncio.gather(*running, return_exceptions=True)
            await client.close()
            await cluster.stop_server()
            await store.close()
