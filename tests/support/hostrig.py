"""Machines for `podwire server` and `podwire join`: network namespaces on one bridge, in which the real commands run."""

import asyncio
import contextlib
import json
import os
import signal
import socket
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from ipaddress import ip_interface
from pathlib import Path
from typing import Any

from podwire.client.api import ApiClient
from podwire.client.errors import ApiError
from podwire.client.kubeconfig import client_from_kubeconfig
from podwire.kernel.linux import LinuxKernel
from podwire.kernel.netns import create_netns, run_in_netns
from podwire.model.errors import InvalidInput
from podwire.model.ids import HOST, NetnsName
from podwire.model.kernelstate import Address, Bridge, Device, Link, NetState, Veth
from podwire.model.meta import Json
from podwire.model.ops import DelLink
from podwire.model.resources import Resource
from podwire.plan.diff import diff
from podwire.runtime.shimclient import join_shim

BRIDGE = "machines"

PODWIRE = (sys.executable, "-m", "podwire.cli.main")


class Host:
    """One machine: its namespace, its directories, and the command that runs on it."""

    def __init__(self, name: str, address: str, root: Path, netns: int) -> None:
        self.name, self.address, self.netns = name, address, netns
        self.address6 = f"2001:db8:7::{address.rpartition('.')[2]}"
        self.state, self.run, self.cni_socket = root / "state", root / "run", root / "cni.sock"
        self.log = root / "log"
        root.mkdir()
        self.process: asyncio.subprocess.Process | None = None

    @property
    def directories(self) -> tuple[str, ...]:
        return ("--state-dir", str(self.state), "--run-dir", str(self.run))

    async def start(self, *arguments: str) -> None:
        """Run `podwire …` here, beside what follows."""
        await self.begin(*PODWIRE, *arguments)

    async def begin(self, *command: str, env: dict[str, str] | None = None) -> None:
        """Run a command here, beside what follows."""
        with self.log.open("ab") as log:
            self.process = await self._execute(*command, stdout=log, stderr=log, env=env)

    async def join(self, *arguments: str) -> None:
        await self.start("join", *arguments, *self.directories, "--cni-socket", str(self.cni_socket))

    async def end(self, how: signal.Signals = signal.SIGTERM) -> int:
        assert self.process is not None
        if self.process.returncode is None:
            self.process.send_signal(how)
        code = await asyncio.wait_for(self.process.wait(), 15)
        self.process = None
        return code

    async def call(self, *command: str, env: dict[str, str] | None = None, within: float = 30.0) -> str:
        """Run a command here to its end; its output. Fails where it fails."""
        done = await self._execute(*command, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE, env=env)
        out, err = await asyncio.wait_for(done.communicate(), within)
        assert done.returncode == 0, f"{self.name}: {command}: {(out + err).decode()}\n{self.log.read_text()[-3000:]}"
        return (out + err).decode()

    async def podwire(self, *arguments: str, within: float = 30.0) -> str:
        return await self.call(*PODWIRE, *arguments, within=within)

    def fetch(self, address: str, port: int, timeout: float = 2.0) -> str:
        """What an HTTP server answers to a process of this host; empty without an answer."""
        return run_in_netns(self.netns, lambda: http_get(address, port, timeout))

    async def _execute(self, *command: str, **options: Any) -> asyncio.subprocess.Process:
        enter = ("nsenter", f"--net=/proc/self/fd/{self.netns}", "--")
        return await asyncio.create_subprocess_exec(*enter, *command, pass_fds=(self.netns,), **options)


def http_get(address: str, port: int, timeout: float = 2.0) -> str:
    try:
        with socket.create_connection((address, port), timeout) as sock:
            sock.sendall(b"GET / HTTP/1.0\r\nHost: x\r\n\r\n")
            data = b""
            while block := sock.recv(65536):
                data += block
            return data.decode(errors="replace")
    except OSError:
        return ""


@asynccontextmanager
async def machines(root: Path, count: int) -> AsyncIterator[list[Host]]:
    """`count` hosts: 198.18.7.1, 198.18.7.2, … on one Ethernet with the tests' own namespace. All on them ends with them."""
    fabric = LinuxKernel()
    hosts = [Host(f"host-{n}", f"198.18.7.{n}", root / f"host-{n}", create_netns()) for n in range(1, count + 1)]
    try:
        await _wire(fabric, hosts)
        yield hosts
    finally:
        for host in hosts:
            if host.process is not None:
                await host.end(signal.SIGKILL)
            await _end_shim(host)
        await fabric.apply(tuple(DelLink(name) for name in (BRIDGE, *(f"h{n}" for n in range(count)))))
        await fabric.close()
        for host in hosts:
            os.close(host.netns)


async def _wire(fabric: LinuxKernel, hosts: list[Host]) -> None:
    links: dict[str, Link] = {BRIDGE: Link(BRIDGE, Bridge(), alias="machine")}
    states: dict[NetnsName, NetState] = {}
    for number, host in enumerate(hosts):
        label = NetnsName(host.name)
        fabric.attach(label, host.netns)
        links[f"h{number}"] = Link(f"h{number}", Veth("eth0", label), master=BRIDGE, alias="machine")
        eth0 = Link("eth0", Veth(f"h{number}", HOST), alias="machine")
        lo = Link("lo", Device())
        own = {Address("eth0", ip_interface(text)) for text in (f"{host.address}/16", f"{host.address6}/64")}
        states[label] = NetState(links={"eth0": eth0, "lo": lo}, addresses=frozenset(own))
    states[HOST] = NetState(links=links, addresses=frozenset({Address(BRIDGE, ip_interface("198.18.7.254/16"))}))
    observed = {ns: await fabric.observe(ns) for ns in states}
    applied = await fabric.apply(diff(states, observed))
    assert not applied.failures, applied.failures


async def _end_shim(host: Host) -> None:
    """The shim lives on without its agent; a test's must not."""
    path = host.run / "shim" / "shim.sock"
    if path.exists():
        shim = join_shim(host.run / "shim")
        with contextlib.suppress(OSError):
            await asyncio.to_thread(shim.stop)


async def answering(kubeconfig: Path, within: float = 20.0) -> ApiClient:
    """A client of the server that writes `kubeconfig`, once it answers. Its owner is the caller."""
    async with asyncio.timeout(within):
        while True:
            with contextlib.suppress(InvalidInput):
                client = client_from_kubeconfig(kubeconfig)
                try:
                    await client.request("GET", "/readyz", accept="*/*")
                    return client
                except ApiError:
                    await client.close()
            await asyncio.sleep(0.05)


async def until(
    client: ApiClient, resource: Resource, condition: Callable[[list[Json]], bool], *, within: float = 30.0, **selectors: str
) -> list[Json]:
    """The objects once `condition` holds of them."""
    items: list[Json] = []
    try:
        async with asyncio.timeout(within):
            while True:
                items = (await client.list(resource, **selectors)).items  # type: ignore[arg-type]
                if condition(items):
                    return items
                await asyncio.sleep(0.1)
    except TimeoutError:
        raise AssertionError(f"{resource.plural}: {json.dumps(items)[:4000]}") from None


def deployment(name: str, replicas: int) -> Json:
    """Of web servers on port 8080 that say their pod's name."""
    labels = {"app": name}
    container = {"name": "web", "image": "web:1", "ports": [{"containerPort": 8080}]}
    return {
        "metadata": {"name": name, "namespace": "default"},
        "spec": {
            "replicas": replicas,
            "selector": {"matchLabels": labels},
            "template": {"metadata": {"labels": labels}, "spec": {"containers": [container]}},
        },
    }


def ready(node_or_pod: Json) -> bool:
    return any(c["type"] == "Ready" and c["status"] == "True" for c in node_or_pod.get("status", {}).get("conditions", ()))
