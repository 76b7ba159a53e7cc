"""A cluster of podwire's own with a container engine on each node: what tests of engines have in common."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

from hostrig import Host, answering, machines, ready, until

from podwire.client.api import ApiClient
from podwire.kernel.linux import LinuxKernel
from podwire.model.kernelstate import Veth
from podwire.model.meta import Json
from podwire.model.resources import ENDPOINTSLICES, NODES, SERVICES

Engine = TypeVar("Engine")


@dataclass
class Site(Generic[Engine]):
    """`engines[i]` is that of `nodes[i]`, host-2 and host-3."""

    server: Host
    nodes: list[Host]
    client: ApiClient
    kubeconfig: Path
    engines: list[Engine]


@asynccontextmanager
async def engine_site(
    root: Path, engine_on: Callable[[Host, Path], AbstractAsyncContextManager[Engine]]
) -> AsyncIterator[Site[Engine]]:
    """`engine_on` starts a host's engine, with its files in the folder that it is given."""
    data = root / "server"
    async with AsyncExitStack() as stack:
        hosts = await stack.enter_async_context(machines(root, 3))
        server, *nodes = hosts
        cidrs = ("--pod-cidr", "10.244.0.0/16", "--pod-cidr", "fd00:10:244::/56")
        await server.start("server", "--data-dir", str(data), "--advertise", server.address, *cidrs)
        client = await stack.enter_async_context(await answering(data / "admin.kubeconfig"))
        token = (await server.podwire("token", "--data-dir", str(data), "--only")).strip()
        engines = []
        for node in nodes:
            own = ("--name", node.name, "--address", node.address, "--address", node.address6)
            await node.join(f"https://{server.address}:6443", "--token", token, *own)
            engines.append(await stack.enter_async_context(engine_on(node, root / f"engine-{node.name}")))
        await until(client, NODES, lambda found: len(found) == 2 and all(map(ready, found)))
        yield Site(server, nodes, client, data / "admin.kubeconfig", engines)


async def said(host: Host, address: str, port: int) -> str:
    """The body of what a server says to a process of the host itself."""
    return (await asyncio.to_thread(host.fetch, address, port)).rpartition("\r\n\r\n")[2].strip()


def shown(pods: list[Json], *names: str) -> bool:
    """Exactly these, and they are ready."""
    return sorted(pod["metadata"]["name"] for pod in pods) == sorted(names) and all(map(ready, pods))


async def web_service(site: Site[Engine]) -> str:
    """Make the Service `web` of what has the label app=web; its cluster IP, once every node has both endpoints."""
    spec = {"selector": {"app": "web"}, "ports": [{"port": 80}]}
    service = await site.client.create(SERVICES, {"metadata": {"name": "web", "namespace": "default"}, "spec": spec})
    await until(site.client, ENDPOINTSLICES, lambda found: _endpoints(found) == 2)
    await site.server.podwire("wait", "--kubeconfig", str(site.kubeconfig), "--programmed", "svc/web")
    return str(service["spec"]["clusterIP"])


def _endpoints(slices: list[Json]) -> int:
    """How many the Service `web` has."""
    web_slices = [s for s in slices if s["metadata"]["labels"].get("kubernetes.io/service-name") == "web"]
    return sum(len(s.get("endpoints") or ()) for s in web_slices)


async def left_on(host: Host) -> list[str]:
    """Containers' links that are on the host."""
    kernel = LinuxKernel(host.netns)
    try:
        state = await kernel.observe()
    finally:
        await kernel.close()
    return [name for name, link in state.links.items() if isinstance(link.kind, Veth) and link.owned]
