"""`podwire agent` as a process on hosts in namespaces, with Debian's etcd or our API server on the first of them."""

import asyncio
import os
import socket
import subprocess
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from functools import partial

from etcdrig import Member, answers, need_etcd
from labcommand import PODWIRE
from overlayrig import OverlayHost

from podwire.apiserver.app import create_app
from podwire.apiserver.config import ServerConfig
from podwire.apiserver.server import ApiServer, Listener
from podwire.client.api import ApiClient
from podwire.client.etcd import EtcdClient
from podwire.kernel.netns import run_in_netns
from podwire.kernel.syscalls import CLONE_NEWNET, setns
from podwire.store.memory import MemoryStore

ETCD, API, HEALTH = 2379, 6443, 9999
CONFIG_KEY = "/coreos.com/network/config"
URL = f"http://192.0.2.1:{ETCD}"


@asynccontextmanager
async def etcd_on(host: OverlayHost, config: str) -> AsyncIterator[EtcdClient]:
    """etcd on the host's own address, with the configuration in it."""
    need_etcd()
    peer = "http://127.0.0.1:2380"
    member = Member(host.folder, "solo", URL, peer, ("--initial-cluster", f"solo={peer}"), netns=host.netns)
    await member.start()
    try:
        async with EtcdClient([URL], socket_factory=partial(socket_in, host.netns)) as client:
            await answers(client)
            await client.put(CONFIG_KEY, config.encode())
            yield client
    finally:
        await member.end()


def socket_in(netns: int, info: tuple[int, int, int, str, tuple[object, ...]]) -> socket.socket:
    return run_in_netns(netns, lambda: socket.socket(info[0], info[1], info[2]))


@contextmanager
def agent_on(
    host: OverlayHost, *arguments: str, environment: Mapping[str, str] | None = None
) -> Iterator["subprocess.Popen[str]"]:
    """The command in the host's namespace, its options half in the environment."""
    variables = {
        **os.environ,
        **(environment or {}),
        "FLANNELD_ETCD_ENDPOINTS": URL,
        "FLANNELD_IFACE": "eth0",
        "FLANNELD_SUBNET_FILE": str(host.folder / "subnet.env"),
        "FLANNELD_IPTABLES_FORWARD_RULES": "false",
    }
    process = subprocess.Popen(
        [*PODWIRE, "agent", "--node-name", f"n{host.index}", "--healthz-port", str(HEALTH), *arguments],
        env=variables, stderr=subprocess.PIPE, text=True, preexec_fn=lambda: setns(host.netns, CLONE_NEWNET),
    )  # fmt: skip
    try:
        yield process
    finally:
        if process.poll() is None:
            process.kill()
        process.communicate()


def ask(host: OverlayHost, path: str) -> tuple[int, str]:
    """(status, body); status 0 while nobody listens."""
    with run_in_netns(host.netns, socket.socket) as sock:
        sock.settimeout(5)
        try:
            sock.connect(("127.0.0.1", HEALTH))
        except OSError:
            return 0, ""
        sock.sendall(f"GET {path} HTTP/1.0\r\nHost: x\r\n\r\n".encode())
        answer = b""
        while data := sock.recv(65536):
            answer += data
    head, _, body = answer.decode().partition("\r\n\r\n")
    return int(head.split()[1]), body


async def ready(host: OverlayHost, peers: int) -> bool:
    status, _ = await asyncio.to_thread(ask, host, "/readyz")
    return status == 200 and f"podwire_overlay_peers {peers}" in (await asyncio.to_thread(ask, host, "/metrics"))[1]


@asynccontextmanager
async def api_on(host: OverlayHost) -> AsyncIterator[ApiClient]:
    """An API server on the host's own address; the client reaches it over the tests' loopback."""
    store = MemoryStore()
    server = ApiServer(create_app(store, ServerConfig()))
    inside = run_in_netns(host.netns, lambda: socket.create_server(("192.0.2.1", API)))
    outside = socket.create_server(("127.0.0.1", 0))
    await server.start([Listener(inside), Listener(outside)])
    try:
        async with ApiClient(f"http://127.0.0.1:{outside.getsockname()[1]}") as client:
            yield client
    finally:
        await server.stop()
        await store.close()
