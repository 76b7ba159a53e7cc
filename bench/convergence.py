"""One endpoint of a Service of 500 changes: how long until the last of 20 nodes has read it back from its kernel and said so.

From the write of the EndpointSlice to the last node's acknowledgement in the API, as a watch sees it.
"""

import asyncio
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec

from bench.labs import lab
from bench.report import Figures, main, say, table
from podwire.client.api import ApiClient
from podwire.client.informer import Informer
from podwire.client.kubeconfig import client_from_kubeconfig
from podwire.model.acknowledgement import LABEL, LABEL_VALUE, NAMESPACE, read_lease
from podwire.model.objects import EndpointSlice, Lease, Service
from podwire.model.resources import ENDPOINTSLICES, LEASES, SERVICES

NODES, ENDPOINTS, SLICE, CHANGES = 20, 500, 100, 8
PAUSE_SECONDS = 1.5
"""Between changes: nodes gather acknowledgements for a second, and that is not what is measured."""


def run() -> Figures:
    """{"nodes", "endpoints", "p50_ms", "max_ms"}."""
    with lab("bench-convergence", "--nodes", str(NODES)) as running:
        times = asyncio.run(_measure(running.kubeconfig))
    figures = {"nodes": NODES, "endpoints": ENDPOINTS, "p50_ms": statistics.median(times), "max_ms": max(times)}
    table([["nodes", "endpoints", "last node p50 ms", "max ms"], list(figures.values())])
    say(f"  ({CHANGES} changes of one endpoint; all nodes and the API server share this machine)")
    return figures


async def _measure(kubeconfig: str) -> list[float]:
    async with client_from_kubeconfig(Path(kubeconfig)) as client:
        service = {"metadata": {"name": "big", "namespace": "default"}, "spec": {"ports": [{"port": 80, "name": "http"}]}}
        made = msgspec.convert(await client.create(SERVICES, {"apiVersion": "v1", "kind": "Service", **service}), Service)
        for number in range(ENDPOINTS // SLICE):
            piece = await client.create(ENDPOINTSLICES, _piece(number, SLICE))
        leases = Informer(client, LEASES, Lease, namespace=NAMESPACE, label_selector=f"{LABEL}={LABEL_VALUE}")
        changed = asyncio.Event()
        leases.subscribe(lambda _: changed.set())
        running = asyncio.create_task(leases.run())
        try:
            await leases.synced()
            await _everywhere(leases, changed, made, piece)
            return [await _change(client, leases, changed, made, number) for number in range(CHANGES)]
        finally:
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)


async def _change(client: ApiClient, leases: Informer[Lease], changed: asyncio.Event, service: Service, number: int) -> float:
    await asyncio.sleep(PAUSE_SECONDS)
    loop = asyncio.get_running_loop()
    started = loop.time()
    patch = {"endpoints": _piece(0, SLICE - 1 + number % 2)["endpoints"]}
    piece = await client.patch(ENDPOINTSLICES, "big-0", patch, "default")
    await _everywhere(leases, changed, service, piece)
    return (loop.time() - started) * 1000


async def _everywhere(leases: Informer[Lease], changed: asyncio.Event, service: Service, piece: Mapping[str, Any]) -> None:
    newest = msgspec.convert(piece, EndpointSlice)
    async with asyncio.timeout(60):
        while True:
            changed.clear()
            words = [ack for lease in leases.items().values() if (ack := read_lease(lease)) is not None]
            if sum(ack.covers(service, [newest]) for ack in words) == NODES:
                return
            await changed.wait()


def _piece(number: int, count: int) -> dict[str, Any]:
    return {
        "apiVersion": "discovery.k8s.io/v1",
        "kind": "EndpointSlice",
        "metadata": {"name": f"big-{number}", "namespace": "default", "labels": {"kubernetes.io/service-name": "big"}},
        "addressType": "IPv4",
        "endpoints": [{"addresses": [f"10.244.{200 + number}.{n + 1}"], "nodeName": "node-1"} for n in range(count)],
        "ports": [{"name": "http", "port": 8080, "protocol": "TCP"}],
    }


if __name__ == "__main__":
    main(run)
