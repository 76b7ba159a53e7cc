"""What `podwire proxy` weighs: the real process, following an API server that has so many Services with five endpoints each.

The server is a few lines that answer lists (in pages) and leave watches open: what is measured is the process beside it, once
it has everything in the kernel.
"""

import asyncio
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import msgspec
from aiohttp import web

from bench.labs import PODWIRE
from bench.serviceobjects import FACTS, NODE, item, service_object, slice_object
from podwire.kernel.linux import LinuxKernel
from podwire.kernel.netns import current_netns, enter_user_namespace
from podwire.kernel.nftclient import NftClient
from podwire.kernel.rtnlsocket import open_netlink
from podwire.model.addr import Family
from podwire.model.kernelstate import Device, Link
from podwire.model.nft import TableRef
from podwire.model.ops import ChangeLink
from podwire.plan.services import TABLE
from podwire.plan.services_maps import frontend_key
from podwire.plan.services_rules import sets_of
from podwire.plan.services_table import service_table
from podwire.wire.netlink import NETLINK_NETFILTER

METRICS = "127.0.0.1:10249"
PATIENCE_SECONDS = 240.0
_PAUSE_SECONDS = 3.0
Figures = dict[str, float]


def weigh(size: int) -> Figures:
    """{"rss_mb", "pss_mb", "ready_s"} of a proxy with `size` Services. Enters new namespaces: for a process of its own."""
    enter_user_namespace()
    return asyncio.run(_weigh(size))


async def _weigh(size: int) -> Figures:
    kernel = LinuxKernel(fd := current_netns())
    applied = await kernel.apply((ChangeLink(Link("lo", Device(), up=True)),))
    assert applied.ok, applied.failures
    await kernel.close()
    os.close(fd)
    runner = web.AppRunner(_server(size), shutdown_timeout=0.1)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    started = time.monotonic()
    process = _start(f"http://127.0.0.1:{runner.addresses[0][1]}")
    try:
        async with asyncio.timeout(PATIENCE_SECONDS):
            await _programmed(process, size)
            ready = time.monotonic() - started
            await _settled(process.pid)
        return {**_weight(process.pid), "ready_s": ready}
    finally:
        process.send_signal(signal.SIGTERM)
        await asyncio.to_thread(process.wait)
        await runner.cleanup()


def _start(server: str) -> "subprocess.Popen[bytes]":
    flags = ("--master", server, "--hostname-override", NODE, "--conntrack-max-per-core=0", "--metrics-bind-address", METRICS)
    return subprocess.Popen([*PODWIRE, "proxy", *flags], stdout=subprocess.DEVNULL)


async def _programmed(process: "subprocess.Popen[bytes]", size: int) -> None:
    """Waits until the kernel holds the last Service."""
    table, of = TableRef(Family.IPV4, TABLE), sets_of(Family.IPV4).services
    last = service_table(item(size - 1).service, (), FACTS).frontends[0]
    fd = current_netns()
    try:
        with open_netlink(fd, NETLINK_NETFILTER) as sock:
            while not NftClient(sock).lookup(table, of, [frontend_key(last)]):
                assert process.poll() is None, f"the proxy ended with status {process.returncode}"
                await asyncio.sleep(0.2)
    finally:
        os.close(fd)


async def _settled(pid: int) -> None:
    """Waits until the process has nothing more to do: it reads everything back before it acknowledges."""
    used = -1.0
    while (now := _processor_seconds(pid)) - used > 0.02 * _PAUSE_SECONDS:
        used = now
        await asyncio.sleep(_PAUSE_SECONDS)


def _processor_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _weight(pid: int) -> Figures:
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    kilobytes = {words[0]: int(words[1]) for line in lines[1:] if (words := line.split())}
    return {"rss_mb": kilobytes["Rss:"] / 1024, "pss_mb": kilobytes["Pss:"] / 1024}


# --- the server -----------------------------------------------------------------------------------------------------


def _server(size: int) -> web.Application:
    node = {
        "metadata": {"name": NODE},
        "spec": {"podCIDRs": ["10.244.1.0/24"]},
        "status": {"addresses": [{"type": "InternalIP", "address": "198.18.0.11"}]},
    }
    cidr = {"metadata": {"name": "kubernetes"}, "spec": {"cidrs": ["10.96.0.0/12"]}}
    kinds: dict[str, list[Any]] = {
        "/api/v1/nodes": [node],
        "/api/v1/services": [service_object(n) for n in range(size)],
        "/apis/discovery.k8s.io/v1/endpointslices": [slice_object(n) for n in range(size)],
        "/apis/networking.k8s.io/v1/servicecidrs": [cidr],
    }
    encoded = {path: [msgspec.Raw(msgspec.json.encode(o)) for o in objects] for path, objects in kinds.items()}

    async def answer(request: web.Request) -> web.StreamResponse:
        if request.method != "GET":
            return web.json_response({}, status=201)
        if request.query.get("watch"):
            response = web.StreamResponse()
            await response.prepare(request)
            await asyncio.Event().wait()
        objects = encoded.get(request.path)
        if objects is None:
            return web.json_response({"kind": "Status", "code": 404, "reason": "NotFound"}, status=404)
        first = int(request.query.get("continue") or 0)
        last = first + int(request.query.get("limit") or len(objects))
        meta = {"resourceVersion": "1", "continue": str(last) if last < len(objects) else ""}
        return web.Response(body=msgspec.json.encode({"metadata": meta, "items": objects[first:last]}))

    app = web.Application(client_max_size=1 << 26)
    app.router.add_route("*", "/{tail:.*}", answer)
    return app


if __name__ == "__main__":
    sys.stdout.write(msgspec.json.encode(weigh(int(sys.argv[1]))).decode())
