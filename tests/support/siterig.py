"""Two nodes on one underlay in namespaces of their own, with the API; pods without processes, servers and clients in them."""

import ipaddress
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from echoes import tcp_call

from podwire.kernel.linux import LinuxKernel
from podwire.kernel.netns import create_netns
from podwire.model.addr import Family, IPAddress
from podwire.model.ids import HOST, NetnsName
from podwire.model.kernelstate import Address, Bridge, Link, NetState, Veth
from podwire.model.objects import Pod
from podwire.model.podruntime import Sandbox
from podwire.plan.diff import diff
from podwire.testing.memorycluster import DUAL, Machine, MemoryCluster, MemoryRuntime, memory_cluster, node_address

Node = Machine[LinuxKernel]


class NetnsRuntime(MemoryRuntime):
    """Sandboxes are real network namespaces, without processes in them."""

    def __init__(self) -> None:
        super().__init__()
        self.fds: dict[str, int] = {}

    async def create_sandbox(self, pod: Pod) -> Sandbox:
        uid = pod.metadata.uid
        if uid not in self.fds:
            self.fds[uid] = create_netns()
        sandbox = await super().create_sandbox(pod)
        self.boxes[uid] = Sandbox(uid, sandbox.namespace, sandbox.name, 1, f"/proc/self/fd/{self.fds[uid]}")
        return self.boxes[uid]

    async def remove(self, uid: str) -> None:
        await super().remove(uid)
        if uid in self.fds:
            os.close(self.fds.pop(uid))

    async def close(self) -> None:
        for uid in list(self.fds):
            await self.remove(uid)


@dataclass
class Site:
    """Nodes n1 and n2 on one underlay, and the API."""

    cluster: MemoryCluster
    nodes: tuple[Node, Node]
    netns: tuple[int, int]

    async def pod(self, name: str, node: str) -> "RunningPod":
        await self.cluster.create_pod(name, node)
        document = await self.cluster.until_running(name)
        uid = document["metadata"]["uid"]
        machine = self.nodes[int(node.removeprefix("n")) - 1]
        assert isinstance(machine.runtime, NetnsRuntime)
        ips = [ipaddress.ip_address(entry["ip"]) for entry in document["status"]["podIPs"]]
        return RunningPod(uid, {DUAL[ip.version == 6]: ip for ip in ips}, machine.runtime.fds[uid])


@dataclass
class RunningPod:
    uid: str
    ips: dict[Family, IPAddress]
    netns: int


async def underlay(nodes: list[tuple[int, int]]) -> LinuxKernel:
    """A namespace with a bridge to which the `eth0` of each node (index, namespace) is plugged."""
    fabric = LinuxKernel(create_netns())
    links: dict[str, Link] = {"fabric": Link("fabric", Bridge(), alias="podwire")}
    states: dict[NetnsName, NetState] = {}
    for index, fd in nodes:
        label = NetnsName(f"n{index}")
        fabric.attach(label, fd)
        links[f"port{index}"] = Link(f"port{index}", Veth("eth0", label), master="fabric", alias="podwire")
        held = frozenset(
            Address("eth0", ipaddress.ip_interface(f"{node_address(index, family)}/{15 if family is Family.IPV4 else 48}"))
            for family in DUAL
        )
        states[label] = NetState(links={"eth0": Link("eth0", Veth(f"port{index}", HOST))}, addresses=held)
    applied = await fabric.apply(diff({HOST: NetState(links=links), **states}, {}))
    assert applied.ok, applied.failures
    return fabric


@asynccontextmanager
async def two_nodes(directory: Path, netns: tuple[int, int], **settings: Any) -> AsyncIterator[Site]:
    """Nodes in these namespaces; `settings` go into the AgentConfig of the first."""
    fds = dict(enumerate(netns, start=1))
    fabric = await underlay(list(fds.items()))
    async with memory_cluster(directory) as cluster:
        configs = [cluster.config(1, **settings), cluster.config(2)]
        nodes = [Machine(config, LinuxKernel(fd), NetnsRuntime()) for config, fd in zip(configs, netns, strict=True)]
        try:
            yield Site(cluster, (nodes[0], nodes[1]), netns)
        finally:
            for node in nodes:
                await node.runtime.close()
                await node.kernel.close()
            await fabric.close()


def call(netns: int, target: IPAddress, port: int = 8080) -> str:
    """The client's address as the server saw it. Raises OSError where the server cannot be reached."""
    return tcp_call(netns, target, port, size=4096, timeout=3)
