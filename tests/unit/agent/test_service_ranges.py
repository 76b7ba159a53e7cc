"""A proxy follows the cluster's ServiceCIDRs, and does without where there are none."""

import asyncio
import ipaddress
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from random import Random
from typing import Any

from scripted_server import ScriptedServer

from podwire.agent.serviceranges import ServiceRanges

PATH = "/apis/networking.k8s.io/v1/servicecidrs"
CONFIGURED = (ipaddress.ip_network("10.0.0.0/24"),)


def cidr(name: str, revision: int, *cidrs: str) -> dict[str, Any]:
    meta = {"name": name, "uid": name, "resourceVersion": str(revision)}
    return {"apiVersion": "networking.k8s.io/v1", "kind": "ServiceCIDR", "metadata": meta, "spec": {"cidrs": list(cidrs)}}


def listed(revision: int, *items: dict[str, Any]) -> dict[str, Any]:
    meta = {"resourceVersion": str(revision)}
    return {"apiVersion": "networking.k8s.io/v1", "kind": "ServiceCIDRList", "metadata": meta, "items": list(items)}


@asynccontextmanager
async def followed() -> AsyncIterator[tuple[ScriptedServer, ServiceRanges, asyncio.Queue[None]]]:
    server = ScriptedServer()
    async with server.serve() as client:
        news: asyncio.Queue[None] = asyncio.Queue()
        ranges = ServiceRanges(client, CONFIGURED, Random(1), lambda: news.put_nowait(None))
        task = asyncio.create_task(ranges.run())
        try:
            yield server, ranges, news
        finally:
            task.cancel()
            await asyncio.wait((task,))


async def test_ranges_are_followed() -> None:
    async with followed() as (server, ranges, news), asyncio.timeout(5):
        first = cidr("kubernetes", 3, "10.96.0.0/12", "fd00:10:96::/112")
        for _ in range(2):  # whether it has such objects; what they are
            server.answer("GET", PATH, listed(5, first))
        renewed = cidr("kubernetes", 7, *first["spec"]["cidrs"])
        server.watch(PATH, ("MODIFIED", renewed), ("ADDED", cidr("more", 8, "10.200.0.0/16")), hold=True)
        await ranges.known()
        assert [str(n) for n in ranges.networks] == ["10.96.0.0/12", "fd00:10:96::/112"]
        for _ in range(2):
            await news.get()
        assert [str(n) for n in ranges.networks] == ["10.96.0.0/12", "10.200.0.0/16", "fd00:10:96::/112"]
        assert news.empty(), "a change that is none of its ranges' is no news"


async def test_a_server_that_has_none_or_does_not_show_them() -> None:
    for status, reason in ((404, "NotFound"), (403, "Forbidden")):
        async with followed() as (server, ranges, news), asyncio.timeout(5):
            server.answer("GET", PATH, {"kind": "Status", "reason": "ServiceUnavailable", "code": 503}, status=503)
            server.answer("GET", PATH, {"kind": "Status", "reason": reason, "code": status}, status=status)
            await ranges.known()
            assert ranges.networks == CONFIGURED
            assert news.empty()
