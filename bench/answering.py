"""Pod created → its address answers: the time a user waits, in a lab of three nodes.

The client runs on a node of the lab, so that it reaches pod addresses. It creates image-only pods one after another and
tries each address as soon as the API tells it.
"""

import asyncio
import contextlib
import json
import sys
import time
from pathlib import Path

import yaml

from bench.labs import lab
from bench.report import Figures, main, percentiles, say, table
from podwire.client.api import ApiClient
from podwire.client.kubeconfig import client_from_kubeconfig
from podwire.model import resources

PODS = 60
PORT = 8080
DEADLINE_SECONDS = 10


def run() -> Figures:
    with lab("bench-answering", "--nodes", "3") as running:
        output = running.exec("node-1", sys.executable, "-m", "bench.answering", "--client", running.kubeconfig)
    times = json.loads(output)
    figures = {"address_known_ms": percentiles(times["known"]), "answering_ms": percentiles(times["answering"])}
    table(
        [
            ("from POST of the pod to", "p50 ms", "p95 ms", "p99 ms", "max ms"),
            *((name, *(values[k] for k in ("p50", "p95", "p99", "max"))) for name, values in figures.items()),
        ]
    )
    say("  (aim: answering p50 ≤ 50 ms, p99 ≤ 200 ms)")
    return figures


INSIDE = "https://198.18.0.1:6443"
"""The API server as the lab's nodes reach it: over the fabric."""


async def client(kubeconfig: Path) -> None:
    """Runs inside the lab: prints {"known": [ms…], "answering": [ms…]}."""
    known, answering = [], []
    async with client_from_kubeconfig(seen_from_inside(kubeconfig)) as api:
        for number in range(PODS):
            at_address, at_answer = await one_pod(api, f"bench-{number}")
            known.append(at_address * 1000)
            answering.append(at_answer * 1000)
    json.dump({"known": known, "answering": answering}, sys.stdout)


def seen_from_inside(kubeconfig: Path) -> Path:
    """A copy of the lab's kubeconfig, beside it, whose server is the fabric's address."""
    document = yaml.safe_load(kubeconfig.read_text())
    document["clusters"][0]["cluster"]["server"] = INSIDE
    copy = kubeconfig.with_suffix(".inside")
    copy.touch(mode=0o600)
    copy.write_text(yaml.safe_dump(document))
    return copy


async def one_pod(api: ApiClient, name: str) -> tuple[float, float]:
    """Seconds from the request to (address in the API, first answer from it)."""
    pod = {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": name},
        "spec": {"containers": [{"name": "web", "image": "bench/web:1", "ports": [{"containerPort": PORT}]}]},
    }
    listed = await api.list(resources.PODS, "default")
    watch = api.watch(
        resources.PODS, "default", resource_version=listed.resource_version, field_selector=f"metadata.name={name}"
    )
    started = time.perf_counter()
    await api.create(resources.PODS, pod, "default")
    address = ""
    async with contextlib.aclosing(watch) as events:
        async for event in events:
            address = event.json().get("status", {}).get("podIP", "")
            if address:
                break
    known = time.perf_counter() - started
    while not await answers(address):
        if time.perf_counter() - started > DEADLINE_SECONDS:
            raise TimeoutError(f"{name} at {address} did not answer within {DEADLINE_SECONDS} s")
    return known, time.perf_counter() - started


async def answers(address: str) -> bool:
    try:
        reader, writer = await asyncio.open_connection(address, PORT)
    except OSError:
        return False
    writer.write(b"GET / HTTP/1.0\r\n\r\n")
    line = await reader.readline()
    writer.close()
    return b"200" in line


if __name__ == "__main__":
    if sys.argv[1:2] == ["--client"]:
        asyncio.run(client(Path(sys.argv[2])))
    else:
        main(run)
