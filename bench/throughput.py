"""TCP throughput (iperf3) and round trip of each path, as ratios to node→node in the same run."""

import asyncio
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from bench.labs import Lab, lab
from bench.report import Figures, main, say, table
from podwire.client.kubeconfig import client_from_kubeconfig
from podwire.model.meta import Json
from podwire.model.resources import PODS, SERVICES

SECONDS = 2
ATTEMPTS = 3
MANIFEST = """\
apiVersion: v1
kind: Pod
metadata: {name: near}
spec: {nodeName: node-1, containers: [{name: sh, image: bench/sh:1, command: [sleep, infinity]}]}
---
apiVersion: v1
kind: Pod
metadata: {name: same}
spec: {nodeName: node-1, containers: [{name: iperf, image: bench/iperf:1, command: [iperf3, -s]}]}
---
apiVersion: v1
kind: Pod
metadata: {name: far, labels: {app: far}}
spec:
  nodeName: node-2
  containers:
    - name: iperf
      image: bench/iperf:1
      command: [iperf3, -s]
      ports: [{containerPort: 5201, hostPort: 5301}, {containerPort: 9, hostPort: 5309}]
---
apiVersion: v1
kind: Pod
metadata: {name: host}
spec: {nodeName: node-2, hostNetwork: true, containers: [{name: iperf, image: bench/iperf:1, command: [iperf3, -s]}]}
---
apiVersion: v1
kind: Service
metadata: {name: far}
spec:
  type: LoadBalancer
  selector: {app: far}
  ports:
    - {name: iperf, port: 5201, targetPort: 5201, nodePort: 30201}
    - {name: closed, port: 9, targetPort: 9, nodePort: 30209}
"""

ROUND_TRIP = """\
import socket, statistics, sys, time
host, port, times = sys.argv[1], int(sys.argv[2]), []
for _ in range(300):
    with socket.socket() as sock:
        started = time.perf_counter()
        try:
            sock.connect((host, port))
        except ConnectionRefusedError:
            times.append(time.perf_counter() - started)
print(statistics.median(times) * 1e6)
"""
"""A SYN to a closed port and its RST: a round trip between kernels, with no program at the far end to wait for."""


class Way(NamedTuple):
    """One measured path: from a place of the lab to an address, its iperf3 port and a port that nobody listens on."""

    name: str
    source: str
    address: str
    iperf: int = 5201
    closed: int = 9


def run() -> Figures:
    with tempfile.TemporaryDirectory() as folder:
        manifest = Path(folder) / "throughput.yaml"
        manifest.write_text(MANIFEST)
        with lab("bench-throughput", "--nodes", "3", "-f", str(manifest)) as running:
            pods, service = asyncio.run(_objects(running.kubeconfig))
            figures = {way.name: _measure(running, way) for way in _ways(pods, service)}
    base = figures["node→node"]
    rows: list[tuple[object, ...]] = [("path", "Gbit/s", "of node→node", "round trip µs", "of node→node")]
    for name, figure in figures.items():
        figure["throughput_ratio"] = figure["gbit_s"] / base["gbit_s"]
        figure["rtt_ratio"] = figure["rtt_us"] / base["rtt_us"]
        rows.append((name, figure["gbit_s"], figure["throughput_ratio"], figure["rtt_us"], figure["rtt_ratio"]))
    table(rows)
    say(f"  (iperf3, one stream, {SECONDS} s, best of {ATTEMPTS}; round trip: median of 300 refused connections)")
    return figures


async def _objects(kubeconfig: str) -> tuple[dict[str, Json], Json]:
    async with client_from_kubeconfig(Path(kubeconfig)) as api:
        pods = await api.list(PODS, "default")
        return {pod["metadata"]["name"]: pod for pod in pods.items}, await api.get(SERVICES, "far", "default")


def _ways(pods: dict[str, Json], service: Json) -> Iterator[Way]:
    ip = {name: pod["status"]["podIP"] for name, pod in pods.items()}
    node_1, node_2 = pods["near"]["status"]["hostIP"], pods["far"]["status"]["hostIP"]
    yield Way("node→node", "node-1", node_2)
    yield Way("container→container", "same", "127.0.0.1")
    yield Way("pod→pod, one node", "near", ip["same"])
    yield Way("pod→pod, across nodes", "near", ip["far"])
    yield Way("pod→Service", "near", service["spec"]["clusterIP"])
    yield Way("outside→NodePort", "world", node_1, 30201, 30209)
    yield Way("outside→LoadBalancer", "world", service["status"]["loadBalancer"]["ingress"][0]["ip"])
    yield Way("outside→hostPort", "world", node_2, 5301, 5309)
    yield Way("outside→hostNetwork", "world", node_2)


def _measure(running: Lab, way: Way) -> Figures:
    rtt = float(running.exec(way.source, sys.executable, "-c", ROUND_TRIP, way.address, str(way.closed)))
    return {"gbit_s": max(_iperf(running, way) for _ in range(ATTEMPTS)), "rtt_us": rtt}


def _iperf(running: Lab, way: Way) -> float:
    command = ("iperf3", "-c", way.address, "-p", str(way.iperf), "-t", str(SECONDS), "-J")
    try:
        result = json.loads(running.exec(way.source, *command))
    except (RuntimeError, subprocess.TimeoutExpired) as error:
        raise RuntimeError(f"{way.name}: {error}") from error
    return float(result["end"]["sum_received"]["bits_per_second"]) / 1e9


if __name__ == "__main__":
    main(run)
