"""`podwire proxy` as a process on a node that is somebody else's, with an API server beside it."""

import asyncio
import signal
import socket
import subprocess
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from labcommand import PODWIRE
from servicerig import FACTS, ServiceRig, service_rig

from podwire.apiserver.app import create_app
from podwire.apiserver.config import ServerConfig
from podwire.apiserver.server import ApiServer, Listener
from podwire.client.api import ApiClient
from podwire.kernel.linux import LinuxKernel
from podwire.kernel.netns import run_in_netns
from podwire.kernel.syscalls import CLONE_NEWNET, setns
from podwire.model.addr import Family
from podwire.model.nft import Batch, DelTable, TableRef
from podwire.model.ops import CommitNft
from podwire.model.resources import ENDPOINTSLICES, NODES, SERVICES
from podwire.plan.services import TABLE
from podwire.store.memory import MemoryStore

HEALTH, METRICS = 10256, 10249
WEB = "10.96.0.80"
PATIENCE_SECONDS = 20.0


@dataclass
class Site:
    """The node, an API server that its loopback reaches, and an administrator's client."""

    rig: ServiceRig
    client: ApiClient
    port: int

    @asynccontextmanager
    async def proxy(self, *arguments: str, seconds: float = PATIENCE_SECONDS) -> AsyncIterator["subprocess.Popen[str]"]:
        """`podwire proxy …` in the node's namespace, once it is healthy, which may take so many seconds."""
        server = ("--master", f"http://127.0.0.1:{self.port}", "--hostname-override", FACTS.name)
        process = self.command(*server, *arguments)
        try:
            await until(self.healthy, process, seconds)
            yield process
        finally:
            if process.poll() is None:
                process.kill()
            with process:
                pass

    def command(self, *arguments: str) -> "subprocess.Popen[str]":
        fd = self.rig.fds["node"]
        command = [*PODWIRE, "proxy", *arguments]
        return subprocess.Popen(command, stderr=subprocess.PIPE, text=True, preexec_fn=lambda: setns(fd, CLONE_NEWNET))

    async def end(self, process: "subprocess.Popen[str]", number: int = signal.SIGTERM) -> tuple[int, str]:
        """Its exit status and what it said."""
        process.send_signal(number)
        return await self.outcome(process)

    async def outcome(self, process: "subprocess.Popen[str]") -> tuple[int, str]:
        """Exit status and words of one that ends by itself."""
        _, said = await asyncio.to_thread(process.communicate, None, 20)
        return process.returncode, said

    async def healthy(self) -> bool:
        try:
            return (await self.get("node", "127.0.0.1", HEALTH, "/healthz"))[0] == 200
        except OSError:
            return False

    async def metric(self, name: str, path: str = "/metrics") -> float:
        """The sum of its samples."""
        status, text = await self.get("node", "127.0.0.1", METRICS, path)
        assert status == 200
        return sum(float(line.rpartition(" ")[2]) for line in text.splitlines() if line.startswith(name))

    async def answers(self) -> bool:
        try:
            await self.rig.ask("p2", WEB, 80)
        except (OSError, TimeoutError):
            return False
        return True

    async def get(self, where: str, host: str, port: int, path: str) -> tuple[int, str]:
        """HTTP by hand: (status, body)."""
        with self.rig.open(where, socket.SOCK_STREAM, host) as sock:
            loop = asyncio.get_running_loop()
            async with asyncio.timeout(max(2.0, self.rig.patience_s)):
                await loop.sock_connect(sock, (host, port))
                await loop.sock_sendall(sock, f"GET {path} HTTP/1.0\r\nHost: x\r\n\r\n".encode())
                data = b""
                while piece := await loop.sock_recv(sock, 65536):
                    data += piece
        head, _, body = data.decode().partition("\r\n\r\n")
        return int(head.split()[1]), body


@asynccontextmanager
async def proxy_site(tmp_path: Path) -> AsyncIterator[Site]:
    async with service_rig() as rig:
        await remove_rules(rig)
        inside = run_in_netns(rig.fds["node"], _listening)
        store = MemoryStore()
        server = ApiServer(create_app(store, ServerConfig(service_cidrs=FACTS.service_cidrs)))
        path = str(tmp_path / "api")
        outside = socket.socket(socket.AF_UNIX)
        outside.bind(path)
        outside.listen()
        await server.start([Listener(inside), Listener(outside)])
        try:
            async with ApiClient("http://api", unix_socket=path) as client:
                made = Site(rig, client, inside.getsockname()[1])
                await _objects(client)
                yield made
        finally:
            await server.stop()
            await store.close()


def _listening() -> socket.socket:
    return socket.create_server(("127.0.0.1", 0))


async def remove_rules(rig: ServiceRig) -> None:
    """As a stranger would: with another socket."""
    kernel = LinuxKernel(rig.fds["node"])
    try:
        applied = await kernel.apply((CommitNft(Batch(tuple(DelTable(TableRef(f, TABLE)) for f in Family))),))
        assert applied.ok, applied.failures
    finally:
        await kernel.close()


async def _objects(client: ApiClient) -> None:
    """The node, and a Service of all kinds with two pods here and one elsewhere."""
    node = {"apiVersion": "v1", "kind": "Node", "metadata": {"name": FACTS.name}, "spec": {"podCIDR": "10.244.1.0/24"}}
    await client.create(NODES, node)
    addresses = [{"type": "InternalIP", "address": str(ip)} for ip in FACTS.node_ips]
    await client.patch(NODES, FACTS.name, {"status": {"addresses": addresses}}, subresource="status")
    spec: dict[str, Any] = {
        "type": "LoadBalancer",
        "clusterIP": WEB,
        "externalTrafficPolicy": "Local",
        "healthCheckNodePort": 30999,
        "ports": [{"name": "http", "port": 80, "nodePort": 30080}, {"name": "dns", "port": 53, "protocol": "UDP"}],
    }
    meta = {"name": "web", "namespace": "default"}
    await client.create(SERVICES, {"apiVersion": "v1", "kind": "Service", "metadata": meta, "spec": spec})
    piece = {
        "apiVersion": "discovery.k8s.io/v1",
        "kind": "EndpointSlice",
        "metadata": {"name": "web-1", "namespace": "default", "labels": {"kubernetes.io/service-name": "web"}},
        "addressType": "IPv4",
        "endpoints": [
            {"addresses": ["10.244.1.2"], "nodeName": FACTS.name},
            {"addresses": ["10.244.1.3"], "nodeName": FACTS.name},
            {"addresses": ["10.244.2.2"], "nodeName": "n2"},
        ],
        "ports": [{"name": "http", "port": 8080}, {"name": "dns", "port": 8080, "protocol": "UDP"}],
    }
    await client.create(ENDPOINTSLICES, piece)


async def until(
    probe: Callable[[], Awaitable[bool]], process: "subprocess.Popen[str] | None" = None, seconds: float = PATIENCE_SECONDS
) -> float:
    """Ask again and again until the answer is yes; the seconds it took."""
    started = time.monotonic()
    async with asyncio.timeout(seconds):
        while not await probe():
            assert process is None or process.poll() is None, process.communicate()[1]
            await asyncio.sleep(0.01)
    return time.monotonic() - started
