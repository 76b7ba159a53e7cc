"""A shim and node runtimes for the kernel tests, and pods to run on them."""

import asyncio
import contextlib
import ipaddress
import os
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec

from podwire.kernel.linux import LinuxKernel
from podwire.kernel.netns import open_netns
from podwire.model.kernelstate import Device, Link
from podwire.model.objects import ConfigMap, Pod, Secret
from podwire.model.ops import ChangeLink
from podwire.model.podruntime import PodEvent, PodNetwork, PodReport, Sandbox
from podwire.runtime.pods import NodeRuntime
from podwire.runtime.shimclient import ShimProcess, start_shim

LOOPBACK = PodNetwork(ips=(ipaddress.ip_address("127.0.0.1"),), host_ips=(ipaddress.ip_address("127.0.0.1"),))
OWN_NETNS = "/proc/self/ns/net"


def make_pod(name: str, *containers: dict[str, Any], **spec: Any) -> Pod:
    """A pod of namespace `shop` whose uid follows from its name."""
    described = {"containers": list(containers), **spec}
    return msgspec.convert({"metadata": {"name": name, "namespace": "shop", "uid": f"uid-{name}"}, "spec": described}, Pod)


def shell(script: str, name: str = "main", **fields: Any) -> dict[str, Any]:
    return {"name": name, "image": "none", "command": ["sh", "-c", script], **fields}


@dataclass
class Objects:
    """The agent's ConfigSource, from dictionaries."""

    config_maps: dict[str, dict[str, str]] = field(default_factory=dict)
    secrets: dict[str, dict[str, str]] = field(default_factory=dict)

    async def config_map(self, namespace: str, name: str) -> ConfigMap | None:
        data = self.config_maps.get(name)
        return None if data is None else ConfigMap(data=data)

    async def secret(self, namespace: str, name: str) -> Secret | None:
        data = self.secrets.get(name)
        return None if data is None else Secret(data=data)


class Watched:
    """A node's runtime, and the latest that it said."""

    def __init__(self, runtime: NodeRuntime) -> None:
        self.runtime = runtime
        self.latest: dict[str, PodReport] = {}
        self.history: list[PodReport | PodEvent] = []
        self._news = asyncio.Event()
        self._task = asyncio.create_task(self._listen())

    async def _listen(self) -> None:
        async for item in self.runtime.reports():
            self.history.append(item)
            if isinstance(item, PodReport):
                self.latest[item.uid] = item
            self._news.set()

    async def until(self, condition: Callable[[], bool], seconds: float = 10) -> None:
        """Wait until the condition holds; it is looked at after each report."""
        async with asyncio.timeout(seconds):
            while not condition():
                self._news.clear()
                await self._news.wait()

    async def report(self, pod: Pod, condition: Callable[[PodReport], bool], seconds: float = 10) -> PodReport:
        """The first report on the pod, from now on, that the condition holds for."""
        uid = pod.metadata.uid
        await self.until(lambda: uid in self.latest and condition(self.latest[uid]), seconds)
        return self.latest[uid]

    def events(self, reason: str) -> list[PodEvent]:
        return [item for item in self.history if isinstance(item, PodEvent) and item.reason == reason]

    async def run(self, pod: Pod, objects: Objects | None = None, network: PodNetwork = LOOPBACK) -> Sandbox:
        """Sandbox, `lo` up, start."""
        sandbox = await self.runtime.create_sandbox(pod)
        if not pod.spec.host_network:
            await loopback_up(sandbox)
        await self.runtime.start(pod, network, objects or Objects())
        return sandbox

    async def ready(self, pod: Pod) -> PodReport:
        return await self.report(pod, lambda report: report.ready)

    async def end(self, pod: Pod, grace_seconds: int = 0) -> None:
        await self.runtime.stop(pod.metadata.uid, grace_seconds)
        await self.runtime.remove(pod.metadata.uid)

    async def close(self) -> None:
        self._task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._task
        await self.runtime.close()


async def loopback_up(sandbox: Sandbox) -> None:
    fd = open_netns(sandbox.netns)
    kernel = LinuxKernel(fd)
    try:
        await kernel.apply((ChangeLink(Link("lo", Device(), up=True)),))
    finally:
        await kernel.close()
        os.close(fd)


class Rig:
    """One shim; `node()` connects a runtime to it."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.shim: ShimProcess = start_shim(root)
        self._nodes: list[Watched] = []

    def node(self, name: str = "node-1", *, netns: str = OWN_NETNS, clock: Any = None) -> Watched:
        runtime = NodeRuntime(name, shim_socket=self.shim.socket_path, netns=netns, root=self.root / name, clock=clock)
        self._nodes.append(Watched(runtime))
        return self._nodes[-1]

    def log(self, pod: Pod, container: str = "main", attempt: int = 0, node: str = "node-1") -> str:
        """What the container wrote, without the times."""
        path = self.root / node / "pods" / pod.metadata.uid / "logs" / container / f"{attempt}.log"
        return "".join(f"{line.split(' ', 3)[3]}\n" for line in path.read_text().splitlines())

    async def close(self) -> None:
        for node in self._nodes:
            await node.close()
        self.shim.stop()


@contextlib.asynccontextmanager
async def rig(root: Path) -> AsyncIterator[Rig]:
    made = Rig(root)
    try:
        yield made
    finally:
        await made.close()


def children_of(pid: int) -> set[int]:
    """The processes whose parent is `pid`."""
    return {int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()}


async def until(condition: Callable[[], bool], seconds: float = 10) -> None:
    """Wait for something that nobody tells us of."""
    async with asyncio.timeout(seconds):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.005)
