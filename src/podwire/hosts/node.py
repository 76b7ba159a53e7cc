"""A machine as a node: its agent, the pods' shim, the kubelet API and the socket for container engines, until it leaves."""

import asyncio
import contextlib
import ipaddress
import logging
import os
import signal
import socket
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from podwire.agent.cniserver import DEFAULT_SOCKET
from podwire.agent.config import AgentConfig
from podwire.agent.node import NodeAgent
from podwire.agent.nodelock import NodeLock
from podwire.client.errors import ApiError
from podwire.hosts.errors import HostError
from podwire.hosts.membership import Membership
from podwire.hosts.systemd import notify
from podwire.kernel.linux import LinuxKernel
from podwire.kernel.port import Kernel
from podwire.model.addr import IPAddress
from podwire.runtime.kubelet import PORT, KubeletServer
from podwire.runtime.pods import NodeRuntime
from podwire.runtime.shimclient import join_shim

log = logging.getLogger(__name__)

OWN_NETNS = "/proc/self/ns/net"
RUN_DIR = Path("/run/podwire/node")
RUN_NAMES = ("shim", "pods")
"""What a node has in its --run-dir."""
_RENEW_SECONDS = 6 * 3600.0


@dataclass(frozen=True, slots=True)
class NodeOptions:
    """`run`: for what does not outlive the machine (sockets, pods' files). `cni_socket`: where engines are served."""

    run: Path = RUN_DIR
    cni_socket: Path | None = DEFAULT_SOCKET


def default_addresses() -> tuple[str, ...]:
    """The address with which this machine goes out. Raises HostError."""
    try:
        return own_addresses("https://192.0.2.1:443")
    except HostError as error:
        raise HostError("this machine has no default route: say its address with --advertise") from error


def own_addresses(server: str) -> tuple[str, ...]:
    """The address from which this machine reaches `server` (a URL's host and port). Raises HostError."""
    host, port = _endpoint(server)
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind, protocol) as sock:
            sock.connect(address)  # nothing is sent
            return (str(sock.getsockname()[0]).partition("%")[0],)
    except OSError as error:
        raise HostError(f"this machine has no way to {host} ({error}); say its own address with --address") from error


def _endpoint(server: str) -> tuple[str, int]:
    parts = urlsplit(server)
    if not parts.hostname:
        raise HostError(f"{server!r} is no URL of a server; it looks like https://192.0.2.1:6443")
    return parts.hostname, parts.port or 443


async def run_node(membership: Membership, options: NodeOptions, *, on_ready: Callable[[], None] = lambda: None) -> None:
    """Serve as a node until SIGTERM or SIGINT; pods, links and rules stay. Raises PodwireError where it cannot go on."""
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    async with contextlib.AsyncExitStack() as stack:
        agent = await _start(membership, options, stack)
        tasks: list[asyncio.Task[Any]] = [
            asyncio.create_task(agent.run(), name="agent"),
            asyncio.create_task(_keep_valid(membership), name="certificate"),
            asyncio.create_task(_tell(agent, on_ready), name="ready"),
            asyncio.create_task(stop.wait(), name="stop"),
        ]
        try:
            await _first_end(tasks)
        finally:
            notify("STOPPING=1")
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)


async def _first_end(tasks: "list[asyncio.Task[Any]]") -> None:
    """Until told to stop, or a part fails, whose error is raised. That a part is done (told that the node is ready) is fine."""
    agent, _, _, stop = tasks
    pending = set(tasks)
    while agent in pending and stop in pending:
        done, pending = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            task.result()


async def _tell(agent: NodeAgent, on_ready: Callable[[], None]) -> None:
    await agent.ready()
    notify("READY=1")
    on_ready()


async def _start(membership: Membership, options: NodeOptions, stack: contextlib.AsyncExitStack) -> NodeAgent:
    _check_alone(membership.state / "agent")
    kernel = LinuxKernel()
    stack.push_async_callback(kernel.close)
    config = await _config(membership, options, kernel)
    client = membership.client(f"podwire/{membership.record.name}")
    stack.push_async_callback(client.close)
    # Not stopped at our end: the pods live on in it, and the next agent finds them there.
    shim = join_shim(options.run / "shim")
    stack.callback(os.close, shim.pidfd)
    runtime = pod_runtime(membership, options, shim.socket_path)
    stack.push_async_callback(runtime.close)
    kubelet = KubeletServer(runtime, membership.record.kubelet_token)
    stack.push_async_callback(kubelet.stop)
    await kubelet.start(_listen(config.node_ips[0]), membership.kubelet_tls)
    return NodeAgent(config, kernel, client, runtime)


def _check_alone(state: Path) -> None:
    """Raises AnotherAgent, before anything else here meets that agent's sockets. (Its own agent makes sure of it again.)"""
    state.mkdir(parents=True, exist_ok=True, mode=0o700)
    NodeLock(state).close()


def pod_runtime(membership: Membership, options: NodeOptions, shim_socket: Path) -> NodeRuntime:
    return NodeRuntime(membership.record.name, shim_socket=shim_socket, netns=OWN_NETNS, root=options.run / "pods")


async def _config(membership: Membership, options: NodeOptions, kernel: Kernel) -> AgentConfig:
    record = membership.record
    addresses = tuple(ipaddress.ip_address(text) for text in record.addresses)
    uplink, mtu = await uplink_of(kernel, addresses[0])
    return AgentConfig(
        node_name=record.name,
        node_ips=addresses,
        cluster_cidrs=tuple(map(ipaddress.ip_network, record.cluster.pod_cidrs)),
        service_cidrs=tuple(map(ipaddress.ip_network, record.cluster.service_cidrs)),
        state_dir=membership.state / "agent",
        uplink=uplink,
        underlay_mtu=mtu,
        vni=record.cluster.vni,
        vxlan_port=record.cluster.vxlan_port,
        service_route=True,
        cni_socket=options.cni_socket,
        mirror=True,
        cpus=os.cpu_count() or 1,
        memory_bytes=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
    )


async def uplink_of(kernel: Kernel, address: IPAddress) -> tuple[str, int]:
    """The interface with `address`, and its MTU. Raises HostError."""
    state = await kernel.observe()
    device = next((a.dev for a in state.addresses if a.interface.ip == address), None)
    link = state.links.get(device) if device else None
    if link is None:
        raise HostError(f"no interface of this machine has the node's address {address}: has it changed? Leave and join again")
    return link.name, link.mtu or 1500


async def _keep_valid(membership: Membership) -> None:
    while True:
        try:
            await membership.renew_if_due(datetime.now(UTC))
        except (ApiError, HostError) as error:
            log.warning("the node's certificate could not be renewed: %s; tried again later", error)
        await asyncio.sleep(_RENEW_SECONDS)


def _listen(address: IPAddress) -> socket.socket:
    """The kubelet API's socket. Raises HostError."""
    family = socket.AF_INET6 if address.version == 6 else socket.AF_INET
    try:
        return socket.create_server((str(address), PORT), family=family, backlog=128)
    except OSError as error:
        raise HostError(f"the node's API cannot listen on {address} port {PORT}: {error.strerror}") from error
