"""A cluster in one process: podwire's real API server on memory, nodes with fake kernels (or others), pods without processes.

The fakes execute: an agent is tested by what the API and the kernel hold afterwards, never by what it called.
"""

import asyncio
import ipaddress
import socket
from collections import deque
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass, field, replace
from datetime import datetime
from pathlib import Path
from typing import Any, Generic, TypeVar

from podwire.agent.config import AgentConfig
from podwire.agent.node import NodeAgent, utc_now
from podwire.agent.nodeoverlay import Overlay
from podwire.agent.ports import ConfigSource
from podwire.apiserver.app import create_app
from podwire.apiserver.config import ServerConfig
from podwire.apiserver.server import ApiServer, Listener
from podwire.client.api import ApiClient
from podwire.client.errors import NotFound
from podwire.kernel.port import Kernel
from podwire.model.addr import Family, IPAddress
from podwire.model.errors import PodwireError
from podwire.model.kernelstate import Device, Link
from podwire.model.meta import Json
from podwire.model.objects import Pod
from podwire.model.podruntime import PodEvent, PodNetwork, PodReport, Sandbox
from podwire.model.resources import NODES, PODS, Resource
from podwire.store.memory import MemoryStore
from podwire.testing.fakekernel import FakeKernel

DEADLINE = 10.0
CLUSTER = {Family.IPV4: ipaddress.ip_network("10.244.0.0/16"), Family.IPV6: ipaddress.ip_network("fd00:10:244::/56")}
SERVICES = {Family.IPV4: ipaddress.ip_network("10.96.0.0/12"), Family.IPV6: ipaddress.ip_network("fd00:10:96::/112")}
DUAL = (Family.IPV4, Family.IPV6)


class MemoryRuntime:
    """`PodRuntime` without processes: a sandbox is an entry, a started pod runs and is ready at once. Outlives agents.

    `fail_next` makes the next calls of a method fail; with `hold_stop`, stopping takes until it is asked for without grace."""

    def __init__(self) -> None:
        self.boxes: dict[str, Sandbox] = {}
        self.started: dict[str, PodNetwork] = {}
        self.reported: dict[str, PodReport] = {}
        self.created: list[str] = []
        self.stops: list[tuple[str, int]] = []
        self.hold_stop = False
        self._stop_held = asyncio.Event()
        self._faults: deque[str] = deque()
        self._queues: list[asyncio.Queue[PodReport | PodEvent]] = []

    def fail_next(self, method: str, times: int = 1) -> None:
        self._faults.extend([method] * times)

    async def sandboxes(self) -> tuple[Sandbox, ...]:
        return tuple(self.boxes.values())

    async def create_sandbox(self, pod: Pod) -> Sandbox:
        self._fault("create_sandbox")
        uid = pod.metadata.uid
        if uid not in self.boxes:
            self.boxes[uid] = Sandbox(uid, pod.metadata.namespace, pod.metadata.name, 1, "/proc/self/ns/net")
            self.created.append(uid)
        return self.boxes[uid]

    async def start(self, pod: Pod, network: PodNetwork, source: ConfigSource) -> None:
        self._fault("start")
        uid = pod.metadata.uid
        self.started[uid] = network
        running = {"state": {"running": {}}, "ready": True, "started": True, "restartCount": 0}
        statuses = tuple({"name": c.name, "image": c.image, "imageID": "", **running} for c in pod.spec.containers)
        self.say(PodReport(uid, "Running", True, statuses))

    async def stop(self, uid: str, grace_seconds: int) -> None:
        self.stops.append((uid, grace_seconds))
        if self.hold_stop and grace_seconds:
            await self._stop_held.wait()
        self._stop_held.set()
        self.started.pop(uid, None)

    async def remove(self, uid: str) -> None:
        self.boxes.pop(uid, None)
        self.reported.pop(uid, None)

    async def reports(self) -> AsyncIterator[PodReport | PodEvent]:
        queue: asyncio.Queue[PodReport | PodEvent] = asyncio.Queue()
        for report in self.reported.values():
            queue.put_nowait(report)
        self._queues.append(queue)
        try:
            while True:
                yield await queue.get()
        finally:
            self._queues.remove(queue)

    async def close(self) -> None:
        return

    def say(self, report: PodReport) -> None:
        self.reported[report.uid] = report
        for queue in self._queues:
            queue.put_nowait(report)

    def finish(self, uid: str, phase: str = "Succeeded") -> None:
        """The pod's containers end."""
        done = {"state": {"terminated": {"exitCode": 0}}, "ready": False, "started": False}
        statuses = tuple({**status, **done} for status in self.reported[uid].container_statuses)
        self.say(replace(self.reported[uid], phase=phase, ready=False, container_statuses=statuses))

    def lose_sandbox(self, uid: str) -> None:
        """The pod's pause process is killed from outside."""
        del self.boxes[uid]
        self.say(PodReport(uid, "Failed", False, reason="SandboxLost", message="the sandbox was killed from outside"))

    def _fault(self, method: str) -> None:
        if self._faults and self._faults[0] == method:
            self._faults.popleft()
            raise PodwireError(f"injected: {method}")


K = TypeVar("K", bound=Kernel)


@dataclass
class Machine(Generic[K]):
    """What outlives an agent: kernel, runtime, disk."""

    config: AgentConfig
    kernel: K
    runtime: MemoryRuntime = field(default_factory=MemoryRuntime)


def node_address(index: int, family: Family) -> IPAddress:
    """The underlay address of `n<index>`."""
    base = ipaddress.ip_address("198.18.0.10" if family is Family.IPV4 else "2001:db8:1::10")
    return base + index


class MemoryCluster:
    """The API and the machines. `client` is an administrator's."""

    def __init__(self, client: ApiClient, server: "_Server", directory: Path) -> None:
        self.client, self.directory = client, directory
        self._server = server

    @property
    def url(self) -> str:
        return self._server.url

    @asynccontextmanager
    async def outage(self) -> AsyncIterator[None]:
        """No API server while the block runs."""
        await self._server.stop()
        try:
            yield
        finally:
            await self._server.start()

    def machine(self, index: int, families: tuple[Family, ...] = DUAL, **settings: Any) -> Machine[FakeKernel]:
        """A machine named `n<index>` with a fake kernel; `settings` go into its AgentConfig."""
        uplink = Link("eth0", Device(), mtu=1500)
        return Machine(self.config(index, families, **settings), FakeKernel(uplink))

    def config(self, index: int, families: tuple[Family, ...] = DUAL, **settings: Any) -> AgentConfig:
        return AgentConfig(
            node_name=f"n{index}",
            node_ips=tuple(node_address(index, family) for family in families),
            cluster_cidrs=tuple(CLUSTER[family] for family in families),
            service_cidrs=tuple(SERVICES[family] for family in families),
            state_dir=self.directory / f"n{index}",
            **settings,
        )

    @asynccontextmanager
    async def agent(
        self,
        machine: Machine[Any],
        *,
        subnets: bool = True,
        overlay: Overlay | None = None,
        clock: Callable[[], datetime] = utc_now,
    ) -> AsyncIterator[NodeAgent]:
        """Run an agent on the machine until the block is left, which is as abrupt as killing it. With `subnets`, the node
        gets podCIDRs (as the controller would give; with `overlay`, from its subnet manager) and is ready when the block
        begins."""
        async with ApiClient(self.url) as client:
            agent = NodeAgent(machine.config, machine.kernel, client, machine.runtime, clock, overlay=overlay)
            task = asyncio.create_task(agent.run())
            try:
                if subnets:
                    if overlay is None:
                        await self.give_subnets(machine)
                    await within(agent.ready(), task)
                yield agent
                if task.done():
                    await task
            finally:
                task.cancel()
                with suppress(asyncio.CancelledError):
                    await task

    async def give_subnets(self, machine: Machine[Any]) -> None:
        name = machine.config.node_name
        index = int(name.removeprefix("n"))
        texts = {4: f"10.244.{index}.0/24", 6: f"fd00:10:244:{index:x}::/64"}
        cidrs = [texts[ip.version] for ip in machine.config.node_ips]
        await self.until(lambda: self.exists(NODES, name))
        await self.client.patch(NODES, name, {"spec": {"podCIDR": cidrs[0], "podCIDRs": cidrs}})

    async def exists(self, resource: Resource, name: str, namespace: str | None = None) -> Json | None:
        try:
            return await self.client.get(resource, name, namespace)
        except NotFound:
            return None

    async def create_pod(self, name: str, node: str, **spec: Any) -> Json:
        containers = spec.pop("containers", [{"name": "app", "image": "web", "ports": [{"containerPort": 80}]}])
        body = {
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": {"name": name, "namespace": "default"},
            "spec": {"nodeName": node, "containers": containers, **spec},
        }
        return await self.client.create(PODS, body)

    async def pod(self, name: str) -> Json:
        return await self.client.get(PODS, name, "default")

    async def until_running(self, name: str) -> Json:
        async def running() -> Json | None:
            pod = await self.pod(name)
            return pod if condition(pod, "Ready") == "True" else None

        pod: Json = await self.until(running)
        return pod

    async def until(self, probe: Callable[[], Any]) -> Any:
        """Ask again and again, with a deadline, until the answer is truthy."""
        try:
            async with asyncio.timeout(DEADLINE):
                while True:
                    answer = probe()
                    if asyncio.iscoroutine(answer):
                        answer = await answer
                    if answer:
                        return answer
                    await asyncio.sleep(0.01)
        except TimeoutError:
            raise AssertionError(f"did not come true within {DEADLINE} s") from None


async def within(what: Any, task: asyncio.Task[None]) -> None:
    """Await `what`, but not longer than the agent runs."""
    waiting = asyncio.ensure_future(what)
    async with asyncio.timeout(DEADLINE):
        await asyncio.wait((waiting, task), return_when=asyncio.FIRST_COMPLETED)
    if not waiting.done():
        waiting.cancel()
        await task
    await waiting


def condition(obj: Json, kind: str) -> str | None:
    found = [c["status"] for c in obj.get("status", {}).get("conditions", []) if c["type"] == kind]
    return found[0] if found else None


class _Server:
    """The API server on a port of its own, over a store that outlives it."""

    def __init__(self, store: MemoryStore) -> None:
        self._store = store
        self._port = 0
        self._server: ApiServer | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._port}"

    async def start(self) -> None:
        listener = socket.create_server(("127.0.0.1", self._port))
        self._port = listener.getsockname()[1]
        config = ServerConfig(service_cidrs=tuple(SERVICES.values()))
        self._server = ApiServer(create_app(self._store, config))
        await self._server.start([Listener(listener)])

    async def stop(self) -> None:
        if self._server is not None:
            await self._server.stop()
            self._server = None


@asynccontextmanager
async def memory_cluster(directory: Path) -> AsyncIterator[MemoryCluster]:
    """A cluster without nodes; machines keep their state below `directory`."""
    async with AsyncExitStack() as stack:
        store = MemoryStore()
        stack.push_async_callback(store.close)
        server = _Server(store)
        await server.start()
        stack.push_async_callback(server.stop)
        client = await stack.enter_async_context(ApiClient(server.url))
        yield MemoryCluster(client, server, directory)
