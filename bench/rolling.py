"""A Deployment of 500 pods behind a Service is rolled to a new version, with clients on five of 20 nodes all the while.

Every pod is a real address that answers; the old ones serve on for their preStop's time, as a careful user has it. Counted
are connections through the ClusterIP that did not bring an answer (aim: none). For each written EndpointSlice: how long until
the last node said that its kernel has it. Nodes gather such words for a second, so this is the most that it took.
"""

import asyncio
import contextlib
import json
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from bench.labs import PODWIRE, ROOT, lab
from bench.report import Figures, main, percentiles, say, table
from podwire.client.api import ApiClient, PatchKind
from podwire.client.informer import Change, Informer
from podwire.client.kubeconfig import client_from_kubeconfig
from podwire.model.acknowledgement import LABEL, LABEL_VALUE, NAMESPACE, Acknowledgement, read_lease
from podwire.model.meta import Json
from podwire.model.objects import EndpointSlice, Lease
from podwire.model.resources import DEPLOYMENTS, ENDPOINTSLICES, LEASES, SERVICES

NODES, PODS, SURGE = 20, 500, "20%"
CLIENT_NODES = tuple(f"node-{number}" for number in range(1, 6))
RATE = 20
"""Connections a second from each of the client's nodes."""
PRESTOP_SECONDS = 15
PATIENCE_SECONDS = 170.0
ANSWER_SECONDS = 20.0
"""Long enough for a machine that is busy: what is led to a pod that is gone never gets an answer."""
NAME = "rolling"


def manifest(pods: int, version: int) -> str:
    """The Service and its Deployment. Old pods go one by one as new ones are ready: never fewer than `pods` serve."""
    container = {
        "name": "web",
        "image": f"bench/web:{version}",
        "ports": [{"containerPort": 8080}],
        "lifecycle": {"preStop": {"sleep": {"seconds": PRESTOP_SECONDS}}},
    }
    labels = {"app": NAME}
    deployment = {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": {"name": NAME, "namespace": "default"},
        "spec": {
            "replicas": pods,
            "selector": {"matchLabels": labels},
            "strategy": {"rollingUpdate": {"maxSurge": SURGE, "maxUnavailable": 0}},
            "template": {"metadata": {"labels": labels}, "spec": {"containers": [container]}},
        },
    }
    service = {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": NAME, "namespace": "default"},
        "spec": {"selector": labels, "ports": [{"port": 80, "targetPort": 8080}]},
    }
    return yaml.safe_dump_all([deployment, service])


def run() -> Figures:
    """{"nodes", "pods", "connections", "failed", "answer_ms": …, "rollout_s", "converged_ms": …}.

    `rollout_s` is null where patience ended first."""
    with tempfile.TemporaryDirectory() as folder:
        first = Path(folder) / "rolling.yaml"
        first.write_text(manifest(PODS, 1))
        with lab("bench-rolling", "--nodes", str(NODES), "-f", str(first)) as running:
            stop = Path(folder) / "stop"
            address = asyncio.run(_cluster_ip(Path(running.kubeconfig)))
            with clients(running.name, CLIENT_NODES, address, stop, running.environment) as outcomes:
                found = asyncio.run(roll(Path(running.kubeconfig), NODES))
            answered = [ms for outcome in outcomes for ms in outcome["answered"]]
            failed: Counter[str] = sum((Counter(outcome["failed"]) for outcome in outcomes), Counter())
    answer_ms, converged_ms = percentiles(answered), percentiles(found.converged)
    connections = len(answered) + failed.total()
    took = f"> {PATIENCE_SECONDS:g}: not finished" if found.seconds is None else found.seconds
    table(
        [
            ("nodes", "pods", "rollout s", "connections", "failed", "answer p50 ms", "p99 ms", "max ms"),
            (NODES, PODS, took, connections, failed.total(), answer_ms["p50"], answer_ms["p99"], answer_ms["max"]),
        ]
    )
    table(
        [
            ("slices written", "last node p50 ms", "p95 ms", "max ms"),
            (len(found.converged), converged_ms["p50"], converged_ms["p95"], converged_ms["max"]),
        ]
    )
    say(f"  (aim: none failed; failures: {dict(failed) or 'none'}; all nodes, pods and clients share this machine)")
    return {
        "nodes": NODES, "pods": PODS, "connections": connections, "failed": dict(failed), "answer_ms": answer_ms,
        "rollout_s": found.seconds, "converged_ms": converged_ms,
    }  # fmt: skip


# --- the rollout, and how the nodes follow ------------------------------------------------------------------------------


@dataclass
class Rollout:
    """`seconds`: None where patience ended first. `converged`: for each EndpointSlice that was written, milliseconds until all
    nodes had said so."""

    seconds: float | None = None
    converged: list[float] = field(default_factory=list)


class Followers:
    """What each node has said of its kernel, held against what was written. A newer revision takes an older one with it."""

    def __init__(self, nodes: int) -> None:
        self._nodes = nodes
        self._words: dict[str, Acknowledgement] = {}
        self._waiting: dict[str, float] = {}
        self.converged: list[float] = []
        self.quiet = asyncio.Event()
        self.quiet.set()

    def slice_changed(self, change: Change[EndpointSlice]) -> None:
        if change.new is not None and change.new.service == NAME:
            self._waiting[change.new.metadata.resource_version] = time.perf_counter()
            self.quiet.clear()

    def lease_changed(self, change: Change[Lease]) -> None:
        word = read_lease(change.new) if change.new is not None else None
        if word is None:
            return
        self._words[word.node] = word
        now = time.perf_counter()
        for revision in [revision for revision in self._waiting if self._everywhere(revision)]:
            self.converged.append((now - self._waiting.pop(revision)) * 1000)
        if not self._waiting:
            self.quiet.set()

    def _everywhere(self, revision: str) -> bool:
        said = sum(bool(word.slices) and int(word.slices) >= int(revision) for word in self._words.values())
        return said == self._nodes


async def roll(kubeconfig: Path, nodes: int) -> Rollout:
    """Roll to the second version, and wait until that is done and the last node has it in its kernel."""
    async with client_from_kubeconfig(kubeconfig) as client:
        followers = Followers(nodes)
        slices = Informer(client, ENDPOINTSLICES, EndpointSlice, namespace="default")
        leases = Informer(client, LEASES, Lease, namespace=NAMESPACE, label_selector=f"{LABEL}={LABEL_VALUE}")
        tasks = [asyncio.create_task(informer.run()) for informer in (slices, leases)]
        try:
            await slices.synced()
            await leases.synced()
            slices.subscribe(followers.slice_changed)
            leases.subscribe(followers.lease_changed)
            started, seconds = time.perf_counter(), None
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(PATIENCE_SECONDS):
                    await _roll(client)
                    seconds = time.perf_counter() - started
                    await asyncio.sleep(PRESTOP_SECONDS + 1)  # the last old pods go
                    await followers.quiet.wait()
            return Rollout(seconds, followers.converged)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)


async def _roll(client: ApiClient) -> None:
    made = await client.patch(
        DEPLOYMENTS, NAME, [{"op": "replace", "path": "/spec/template/spec/containers/0/image", "value": "bench/web:2"}],
        "default", kind=PatchKind.JSON,
    )  # fmt: skip
    watch = client.watch(DEPLOYMENTS, "default", resource_version=made["metadata"]["resourceVersion"])
    async with contextlib.aclosing(watch) as events:
        async for event in events:
            if event.type == "MODIFIED" and _rolled(event.json()):
                return


def _rolled(deployment: Json) -> bool:
    status, wanted = deployment["status"], deployment["spec"]["replicas"]
    counts = [status.get(name) for name in ("replicas", "updatedReplicas", "availableReplicas")]
    return status.get("observedGeneration") == deployment["metadata"]["generation"] and counts == [wanted] * 3


# --- the clients --------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def clients(
    lab_name: str, nodes: Iterable[str], address: str, stop: Path, environment: Mapping[str, str]
) -> Iterator[list[Figures]]:
    """Connections to port 80 of `address` from `nodes` while the body runs, `RATE` a second from each. What became of them
    is in the list afterwards, as `client` prints it. The file `stop` is made at the end."""
    outcomes: list[Figures] = []
    command = [sys.executable, "-m", "bench.rolling", "--client", address, str(stop)]
    started = [
        subprocess.Popen(
            [*PODWIRE, "lab", "exec", "--name", lab_name, node, "--", *command],
            stdout=subprocess.PIPE, text=True, cwd=ROOT, env=environment,
        )
        for node in nodes
    ]  # fmt: skip
    try:
        for process in started:
            assert process.stdout is not None
            process.stdout.readline()  # it has begun
        yield outcomes
    finally:
        stop.touch()
        texts = [process.communicate(timeout=60)[0] for process in started]
    outcomes += [json.loads(text) for text in texts]


async def _cluster_ip(kubeconfig: Path) -> str:
    async with client_from_kubeconfig(kubeconfig) as client:
        found: str = (await client.get(SERVICES, NAME, "default"))["spec"]["clusterIP"]
        return found


async def client(address: str, stop: Path) -> None:
    """Runs on a node: prints a line when it begins, and at the end {"answered": [ms…], "failed": {what: how often}}."""
    answered: list[float] = []
    failed: Counter[str] = Counter()

    async def once() -> None:
        started = time.perf_counter()
        try:
            async with asyncio.timeout(ANSWER_SECONDS):
                reader, writer = await asyncio.open_connection(address, 80)
                writer.write(b"GET / HTTP/1.0\r\n\r\n")
                line = await reader.readline()
                writer.close()
        except (OSError, TimeoutError) as error:
            failed[type(error).__name__] += 1
            return
        if line:
            answered.append((time.perf_counter() - started) * 1000)
        else:
            failed["closed without an answer"] += 1

    print("started", flush=True)
    async with asyncio.TaskGroup() as group:
        while not await asyncio.to_thread(stop.exists):
            group.create_task(once())
            await asyncio.sleep(1 / RATE)
    json.dump({"answered": answered, "failed": failed}, sys.stdout)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--client"]:
        asyncio.run(client(sys.argv[2], Path(sys.argv[3])))
    else:
        main(run)
