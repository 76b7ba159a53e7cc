"""One node of a lab: its namespace on the fabric, and what a real machine would run there: agent, pod runtime, kubelet API."""

import asyncio
import contextlib
import logging
import shutil
import socket
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from random import Random

import aiohttp

from podwire.agent.config import AgentConfig
from podwire.agent.node import NodeAgent
from podwire.agent.nodeoverlay import Overlay
from podwire.agent.overlayd.host import LinuxHost
from podwire.agent.proxymodes.modes import ProxyModes
from podwire.client.api import ApiClient
from podwire.client.backoff import Backoff
from podwire.client.etcd import EtcdClient
from podwire.client.sockets import SocketFactory, open_socket
from podwire.kernel.linux import LinuxKernel
from podwire.kernel.netns import in_netns, open_netns, run_in_netns
from podwire.lab.credentials import Credentials
from podwire.lab.nodeoverlay import node_overlay
from podwire.lab.spec import LabSpec
from podwire.lab.topology import FABRIC_MTU, Place
from podwire.model.proxymode import ProxyMode
from podwire.runtime.kubelet import PORT, KubeletServer
from podwire.runtime.pods import NodeRuntime

log = logging.getLogger(__name__)

_STABLE = timedelta(seconds=30).total_seconds()
"""An agent that ran so long before it failed starts again without delay."""


@dataclass(frozen=True, slots=True)
class LabEnvironment:
    """What all nodes of a lab share. `connect(user agent, sockets)` makes a client of the API server, to be closed by whoever
    asked for it."""

    spec: LabSpec
    root: Path
    shim_socket: Path
    connect: Callable[[str, SocketFactory], ApiClient]
    credentials: Credentials = field(repr=False)
    etcd_urls: tuple[str, ...] = ()


class LabNode:
    """A machine that can be started, stopped as by `kill -9` of its agent, and removed.

    `netns` is its namespace (ours to use, not to close), `netns_path` where the pods' shim finds it."""

    loses_cable = True

    def __init__(self, place: Place, netns: int, netns_path: str, env: LabEnvironment) -> None:
        self.place = place
        self._netns, self._netns_path, self._env = netns, netns_path, env
        self._root = env.root / "nodes" / place.name
        self._tls = env.credentials.node_context(place)
        self._agent: NodeAgent | None = None
        self._runtime: NodeRuntime | None = None
        self._mode = ProxyMode(env.spec.proxy_mode)
        self._task: asyncio.Task[None] | None = None
        self._started = asyncio.Event()

    @property
    def name(self) -> str:
        return self.place.name

    @property
    def agent(self) -> NodeAgent | None:
        """The agent that runs now; None between two lives."""
        return self._agent

    def start(self) -> None:
        """Run an agent, and after a failure another one, until `stop`."""
        if self._task is None:
            self._task = asyncio.create_task(self._keep_running(), name=f"node {self.name}")

    async def stop(self) -> None:
        """End the agent and what belongs to it at once; pods, devices and rules stay as they are."""
        task, self._task = self._task, None
        if task is not None:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task

    async def ready(self) -> None:
        """Returns once an agent of this node has programmed everything."""
        while True:
            await self._started.wait()
            agent = self._agent
            if agent is None:
                continue
            await agent.ready()
            return

    async def set_proxy_mode(self, mode: ProxyMode) -> None:
        """Serve Services by another back end, from now on and in later lives of the agent. Raises KernelError, Unsupported."""
        if self._agent is not None:
            await self._agent.set_proxy_mode(mode)
        self._mode = mode

    async def remove_pods(self) -> None:
        """End every pod's processes and delete the node's files, once the node is stopped."""
        runtime = self._new_runtime()
        try:
            for sandbox in await runtime.sandboxes():
                await runtime.remove(sandbox.uid)
        finally:
            await runtime.close()
        await asyncio.to_thread(shutil.rmtree, self._root, ignore_errors=True)

    async def open_pod(self, uid: str) -> int | None:
        """A descriptor, the caller's to close, of a pod's network namespace; None for a pod that is not here."""
        if self._runtime is None:
            return None
        for sandbox in await self._runtime.sandboxes():
            if sandbox.uid == uid:
                with contextlib.suppress(FileNotFoundError):
                    return open_netns(sandbox.netns)
        return None

    async def _keep_running(self) -> None:
        rng = Random()
        backoff = Backoff(rng, initial=0.1, maximum=10.0)
        loop = asyncio.get_running_loop()
        while True:
            born = loop.time()
            try:
                await self._run_once()
            except Exception:  # the boundary of a node: a defect of one agent must not take the lab with it
                log.exception("the agent of %s ended by an error and is started again", self.name)
            if loop.time() - born > _STABLE:
                backoff.reset()
            await asyncio.sleep(backoff.next())

    async def _run_once(self) -> None:
        """One life of an agent, with all that it owns; nothing is shared with the life before but kernel, shim and disk."""
        async with contextlib.AsyncExitStack() as stack:
            kernel = LinuxKernel(self._netns)
            stack.push_async_callback(kernel.close)
            client = self._env.connect(f"podwire/{self.name}", self._open_socket)
            stack.push_async_callback(client.close)
            runtime = self._new_runtime()
            stack.push_async_callback(runtime.close)
            kubelet = KubeletServer(runtime, self._env.credentials.kubelet_token)
            stack.push_async_callback(kubelet.stop)
            await kubelet.start(await in_netns(self._netns, self._listen), self._tls)
            overlay = self._overlay(client, stack)
            modes = ProxyModes(kernel, self._netns)
            self._runtime = runtime
            self._agent = NodeAgent(self._config(), kernel, client, runtime, overlay=overlay, modes=modes)
            stack.callback(self._forget)
            self._started.set()
            await self._agent.run()

    def _overlay(self, client: ApiClient, stack: contextlib.AsyncExitStack) -> Overlay | None:
        env = self._env
        self._root.mkdir(parents=True, exist_ok=True, mode=0o700)
        etcd = None
        if env.etcd_urls:
            etcd = EtcdClient(env.etcd_urls, socket_factory=self._open_socket)
            stack.push_async_callback(etcd.close)
        return node_overlay(env.spec, self.place, LinuxHost(self._netns), self._root, client, etcd)

    def _open_socket(self, address: aiohttp.AddrInfoType) -> socket.socket:
        """What the node asks of API server and etcd goes over its cable, as everything else that it sends."""
        return run_in_netns(self._netns, lambda: open_socket(address))

    def _listen(self) -> socket.socket:
        """The kubelet API's socket, on the address by which the API server knows the node."""
        address = next(iter(self.place.addresses.values()))
        family = socket.AF_INET6 if address.version == 6 else socket.AF_INET
        return socket.create_server((str(address), PORT), family=family, backlog=128)

    def _forget(self) -> None:
        self._started.clear()
        self._agent = self._runtime = None

    def _new_runtime(self) -> NodeRuntime:
        return NodeRuntime(self.name, shim_socket=self._env.shim_socket, netns=self._netns_path, root=self._root / "runtime")

    def _config(self) -> AgentConfig:
        spec = self._env.spec
        return AgentConfig(
            node_name=self.name,
            node_ips=tuple(self.place.addresses.values()),
            cluster_cidrs=tuple(spec.pod_prefixes.values()),
            service_cidrs=tuple(spec.service_prefixes.values()),
            state_dir=self._root / "agent",
            underlay_mtu=FABRIC_MTU,
            proxy_mode=self._mode,
        )
