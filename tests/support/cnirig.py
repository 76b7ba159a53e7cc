"""A node that serves container engines, without an API: kernel, record on disk, socket. And the executed plugin to call it."""

import asyncio
import ipaddress
import json
import os
import subprocess
import sys
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from podwire.agent.attachments import AttachmentEnvironment, Attachments
from podwire.agent.cniserver import CniServer
from podwire.agent.cnispool import Spool
from podwire.agent.health import Health
from podwire.agent.plumbing import Plumbing
from podwire.agent.reservations import Reservations
from podwire.kernel.port import Kernel
from podwire.model.addr import IPNetwork
from podwire.model.objects import Pod
from podwire.plan.node import NodeNetwork, plan_base

PLUGIN = Path(__file__).parents[2] / "src/podwire/cni/plugin.py"
CIDRS: tuple[IPNetwork, ...] = (ipaddress.ip_network("10.244.1.0/24"), ipaddress.ip_network("fd00:10:244:1::/64"))
NODE_IPS = (ipaddress.ip_address("198.18.0.11"), ipaddress.ip_address("2001:db8:1::11"))


@dataclass
class CniNode:
    """A node as its agent sees it while `serving` runs."""

    socket: Path
    attachments: Attachments
    plumbing: Plumbing
    reservations: Reservations
    health: Health
    host_ports: dict[str, Pod | None] = field(default_factory=dict)


def node_network(cidrs: Iterable[IPNetwork] = CIDRS, **settings: Any) -> NodeNetwork:
    return NodeNetwork(name="n1", node_ips=NODE_IPS, pod_cidrs=tuple(cidrs), **settings)


async def make_node(
    directory: Path,
    kernel: Kernel,
    network: NodeNetwork | None,
    *,
    boot: str = "boot-1",
    tunnels: bool = True,
    nsfs: Path = Path("/proc/self/ns/net"),
) -> CniNode:
    """Start as the agent does: adopt what is there, work off the spool. Without `network` the node does not have one yet."""
    os.makedirs(directory, exist_ok=True)
    reservations = Reservations(directory / "reservations.db")
    plumbing, health = Plumbing(kernel), Health()
    host_ports: dict[str, Pod | None] = {}
    socket = directory / "cni.sock"

    async def programmed() -> None:
        return

    env = AttachmentEnvironment(
        kernel=kernel,
        plumbing=plumbing,
        reservations=reservations,
        set_host_ports=host_ports.__setitem__,
        host_ports_programmed=programmed,
        services_known=lambda: True,
        spool=Spool(directory / "cni.sock.spool"),
        health=health,
        clock=lambda: datetime.now(UTC),
        boot=boot,
        nsfs=nsfs,
    )
    attachments = Attachments(env)
    node = CniNode(socket, attachments, plumbing, reservations, health, host_ports)
    if network is not None:
        await give_network(node, network, tunnels=tunnels)
    return node


async def give_network(node: CniNode, network: NodeNetwork, *, tunnels: bool = True) -> None:
    base = plan_base(network if tunnels else replace(network, node_ips=()))
    async with node.attachments.opening(network):
        await node.plumbing.adopt(base, {}, (), await node.attachments.adoptable(network))
    await node.attachments.sweep()
    await node.attachments.work_off()


@asynccontextmanager
async def serving(node: CniNode) -> AsyncIterator[CniNode]:
    server = CniServer(node.socket, node.attachments)
    server.listen()
    task = asyncio.create_task(server.run())
    try:
        yield node
    finally:
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task
        node.reservations.close()


# --- the engine's side --------------------------------------------------------------------------------------------


def config(version: str = "1.1.0", **more: Any) -> dict[str, Any]:
    return {"cniVersion": version, "name": "podwire", "type": "podwire", **more}


def environment(
    socket: Path, command: str, container: str = "", netns: str = "", ifname: str = "eth0", **more: str
) -> dict[str, str]:
    variables = {"CNI_COMMAND": command, "CNI_PATH": "/opt/cni/bin", "PODWIRE_CNI_SOCKET": str(socket)} | more
    if container:
        variables |= {"CNI_CONTAINERID": container, "CNI_IFNAME": ifname}
    return variables | ({"CNI_NETNS": netns} if netns else {})


@dataclass(frozen=True)
class Outcome:
    status: int
    document: Any

    @property
    def code(self) -> int:
        return int(self.document["code"]) if self.status else 0


async def execute(variables: dict[str, str], document: Any, plugin: Path = PLUGIN, fds: tuple[int, ...] = ()) -> Outcome:
    """Run the plugin as an engine does."""
    command = [sys.executable, "-IS", str(plugin)] if plugin.suffix == ".py" else [str(plugin)]
    process = await asyncio.create_subprocess_exec(
        *command,
        env=variables,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        pass_fds=fds,
    )
    raw = document if isinstance(document, bytes) else json.dumps(document).encode()
    out, err = await process.communicate(raw)
    assert not err, err.decode()
    return Outcome(process.returncode or 0, json.loads(out) if out else None)


def own_netns() -> str:
    return f"/proc/{os.getpid()}/ns/net"
