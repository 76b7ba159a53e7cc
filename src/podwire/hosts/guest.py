"""podwire as the network of a real Kubernetes node: the agent beside a kubelet, in a DaemonSet or as a service."""

import asyncio
import contextlib
import ipaddress
import logging
import os
import signal
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from podwire.agent.cniserver import DEFAULT_SOCKET
from podwire.agent.config import AgentConfig
from podwire.agent.guest import NoRuntime
from podwire.agent.node import NodeAgent
from podwire.client.api import ApiClient
from podwire.client.errors import ApiError
from podwire.client.kubeconfig import client_from_kubeconfig, in_cluster_client
from podwire.hosts.node import uplink_of
from podwire.hosts.systemd import notify
from podwire.kernel.linux import LinuxKernel
from podwire.kernel.port import Kernel
from podwire.model.addr import IPAddress, IPNetwork
from podwire.model.kernelstate import NetState
from podwire.model.meta import Json
from podwire.model.resources import NODES

log = logging.getLogger(__name__)

STATE_DIR = Path("/var/lib/podwire/cluster")
_NODE_SECONDS = 2.0


@dataclass(frozen=True, slots=True, kw_only=True)
class GuestOptions:
    """`kubeconfig` None: the pod's own account. `addresses` empty: the Node's InternalIPs. `services`: False where a kube-proxy
    serves them. `cluster_cidrs`: the pods' networks, all nodes' together."""

    node: str
    cluster_cidrs: tuple[IPNetwork, ...]
    service_cidrs: tuple[IPNetwork, ...]
    kubeconfig: Path | None = None
    addresses: tuple[IPAddress, ...] = ()
    services: bool = True
    state: Path = STATE_DIR
    cni_socket: Path = DEFAULT_SOCKET
    vni: int = 1
    vxlan_port: int = 8472


async def run_guest(options: GuestOptions, *, on_ready: Callable[[], None] = lambda: None) -> None:
    """Serve until SIGTERM or SIGINT: what runs on the node keeps its network. Raises PodwireError where it cannot go on."""
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    async with contextlib.AsyncExitStack() as stack:
        client = _client(options)
        stack.push_async_callback(client.close)
        kernel = LinuxKernel()
        stack.push_async_callback(kernel.close)
        addresses = options.addresses or await _node_addresses(client, options, kernel)
        uplink, mtu = await uplink_of(kernel, addresses[0])
        agent = NodeAgent(_config(options, addresses, uplink, mtu), kernel, client, NoRuntime())
        running = asyncio.create_task(agent.run(), name="agent")
        told = asyncio.create_task(_tell(agent, on_ready), name="ready")
        stopping = asyncio.create_task(stop.wait(), name="stop")
        try:
            await asyncio.wait((running, stopping), return_when=asyncio.FIRST_COMPLETED)
            if running.done():
                running.result()
        finally:
            notify("STOPPING=1")
            for task in (running, told, stopping):
                task.cancel()
            await asyncio.gather(running, told, stopping, return_exceptions=True)


async def _tell(agent: NodeAgent, on_ready: Callable[[], None]) -> None:
    await agent.ready()
    notify("READY=1")
    on_ready()


def _client(options: GuestOptions) -> ApiClient:
    agent = f"podwire/{options.node}"
    if options.kubeconfig is not None:
        return client_from_kubeconfig(options.kubeconfig, user_agent=agent)
    return in_cluster_client(os.environ, user_agent=agent)


async def _node_addresses(client: ApiClient, options: GuestOptions, kernel: Kernel) -> tuple[IPAddress, ...]:
    """The Node's InternalIPs, at most one of each family, once the kubelet has said them; where the API does not answer, those
    that it gave an earlier agent, if the machine still has them."""
    node, file = options.node, options.state / "node-addresses"
    while True:
        try:
            found = _internal_ips(await client.get(NODES, node))
            if found:
                _remember(file, found)
                return found
            log.info("node %s has no address in the API yet", node)
        except ApiError as error:
            remembered = _still_held(_recall(file), await kernel.observe())
            if remembered:
                log.warning("node %s cannot be read: %s; its addresses are %s, as remembered", node, error, remembered)
                return remembered
            log.warning("node %s cannot be read: %s; tried again", node, error)
        await asyncio.sleep(_NODE_SECONDS)


def _remember(file: Path, addresses: tuple[IPAddress, ...]) -> None:
    try:
        file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        partial = file.with_suffix(".new")
        partial.write_text("".join(f"{address}\n" for address in addresses), encoding="ascii")
        partial.replace(file)
    except OSError as error:
        log.warning("the node's addresses cannot be kept for a start without the API: %s", error)


def _recall(file: Path) -> tuple[IPAddress, ...]:
    try:
        return tuple(map(ipaddress.ip_address, file.read_text(encoding="ascii").split()))
    except (OSError, ValueError):
        return ()


def _still_held(addresses: tuple[IPAddress, ...], machine: NetState) -> tuple[IPAddress, ...]:
    """None of them where the machine does not have all any more."""
    return addresses if {address.interface.ip for address in machine.addresses}.issuperset(addresses) else ()


def _internal_ips(node: Json) -> tuple[IPAddress, ...]:
    entries = (node.get("status") or {}).get("addresses") or ()
    found = [ipaddress.ip_address(entry["address"]) for entry in entries if entry.get("type") == "InternalIP"]
    first = {address.version: address for address in reversed(found)}
    return tuple(address for address in found if first[address.version] == address)


def _config(options: GuestOptions, addresses: tuple[IPAddress, ...], uplink: str, mtu: int) -> AgentConfig:
    return AgentConfig(
        node_name=options.node,
        node_ips=addresses,
        cluster_cidrs=options.cluster_cidrs,
        # Beside another proxy most of the range is that one's: nothing may be said of addresses that no Service here has.
        service_cidrs=options.service_cidrs if options.services else (),
        state_dir=options.state / "agent",
        uplink=uplink,
        underlay_mtu=mtu,
        vni=options.vni,
        vxlan_port=options.vxlan_port,
        service_route=options.services,
        cni_socket=options.cni_socket,
        guest=True,
        services=options.services,
    )
