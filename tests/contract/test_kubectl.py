"""What a newcomer types first: the real kubectl against the server over TLS, on memory and on SQLite."""

import asyncio
import json
import os
import shutil
import socket
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from podwire.apiserver.app import create_app
from podwire.apiserver.auth import ADMIN
from podwire.apiserver.config import KubeletAccess, ServerConfig
from podwire.apiserver.pki import Authority, kubeconfig
from podwire.apiserver.server import ApiServer, Listener
from podwire.client.api import ApiClient
from podwire.lab.manifests import LAST_APPLIED, apply_manifests, load_manifests
from podwire.model.resources import CONFIGMAPS, DEPLOYMENTS, NAMESPACES, NODES, PODS
from podwire.store.memory import MemoryStore
from podwire.store.port import Store
from podwire.store.sqlite import SqliteStore

KUBECTL = shutil.which("kubectl", path=str(Path(sys.executable).parent)) or shutil.which("kubectl") or ""
pytestmark = [
    pytest.mark.skipif(not KUBECTL, reason="kubectl is not installed"),
    pytest.mark.timeout(120),
]

AUTHORITY = Authority.create("podwire test", datetime.now(UTC))
TLS = AUTHORITY.server_context(AUTHORITY.issue("kube-apiserver", ["127.0.0.1"], datetime.now(UTC)))

MANIFEST = """
apiVersion: v1
kind: Namespace
metadata: {name: shop}
---
apiVersion: v1
kind: ConfigMap
metadata: {name: settings, namespace: shop, labels: {app: web}}
data: {color: blue}
---
apiVersion: apps/v1
kind: Deployment
metadata: {name: web, namespace: shop, labels: {app: web}}
spec:
  replicas: 2
  selector: {matchLabels: {app: web}}
  template:
    metadata: {labels: {app: web}}
    spec: {containers: [{name: web, image: "nginx:1.25", ports: [{containerPort: 80}]}]}
---
apiVersion: v1
kind: Service
metadata: {name: web, namespace: shop, labels: {app: web}}
spec: {selector: {app: web}, ports: [{port: 80}]}
"""


@dataclass
class Cluster:
    """One API server, its kubeconfig, and a client of ours to play the controllers with."""

    home: Path
    client: ApiClient
    restart: Callable[[], Awaitable[None]]
    processes: list[asyncio.subprocess.Process] = field(default_factory=list)

    async def start(self, *arguments: str) -> asyncio.subprocess.Process:
        process = await asyncio.create_subprocess_exec(
            KUBECTL,
            f"--kubeconfig={self.home}/kubeconfig",
            f"--cache-dir={self.home}/cache",
            *arguments,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            env={"HOME": str(self.home), "PATH": os.defpath},
        )
        self.processes.append(process)
        return process

    async def run(self, *arguments: str, stdin: str = "") -> tuple[int, str, str]:
        process = await self.start(*arguments)
        async with asyncio.timeout(60):
            out, err = await process.communicate(stdin.encode())
        return process.returncode or 0, out.decode(), err.decode()

    async def __call__(self, line: str, stdin: str = "") -> str:
        code, out, err = await self.run(*line.split(), stdin=stdin)
        assert code == 0, f"kubectl {line}: {out}{err}"
        return out

    async def fails(self, line: str, stdin: str = "") -> str:
        code, out, err = await self.run(*line.split(), stdin=stdin)
        assert code != 0, f"kubectl {line} succeeded: {out}"
        return err


@asynccontextmanager
async def cluster_on(open_store: Callable[[], Store], home: Path, config: ServerConfig) -> AsyncIterator[Cluster]:
    listening = socket.create_server(("127.0.0.1", 0))
    url = f"https://127.0.0.1:{listening.getsockname()[1]}"
    running: list[tuple[ApiServer, Store]] = []

    async def start() -> None:
        store = open_store()
        server = ApiServer(create_app(store, config))
        await server.start([Listener(listening.dup(), TLS)])
        running.append((server, store))

    async def stop() -> None:
        server, store = running.pop()
        await server.stop()
        await store.close()

    async def restart() -> None:
        await stop()
        await start()

    await start()
    (home / "kubeconfig").write_text(kubeconfig("test", url, AUTHORITY.pair.certificate, "the-token"))
    async with ApiClient(url, token="the-token", ssl=AUTHORITY.client_context()) as client:
        cluster = Cluster(home, client, restart)
        yield cluster
        for process in cluster.processes:
            if process.returncode is None:
                process.kill()
                await process.communicate()
    await stop()
    listening.close()


@pytest.fixture(params=["memory", "sqlite"])
async def cluster(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Cluster]:
    def open_store() -> Store:
        return MemoryStore() if request.param == "memory" else SqliteStore.open(tmp_path / "store.db")

    async with cluster_on(open_store, tmp_path, ServerConfig(tokens={"the-token": ADMIN})) as made:
        yield made


async def line_of(process: asyncio.subprocess.Process) -> list[str]:
    """The next line that it prints, in words."""
    assert process.stdout is not None
    line = await asyncio.wait_for(process.stdout.readline(), 20)
    return line.decode().split()


async def test_apply_get_scale_label_patch_delete(cluster: Cluster) -> None:
    created = await cluster("apply -f -", MANIFEST)
    assert created.splitlines()[-1] == "service/web created"
    assert set((await cluster("apply -f -", MANIFEST)).split()) >= {"namespace/shop", "unchanged", "deployment.apps/web"}
    assert "created" not in await cluster("apply -f -", MANIFEST)

    assert await cluster("get all -n shop -o name") == "service/web\ndeployment.apps/web\n"
    assert (await cluster("get deploy -n shop")).splitlines()[0].split() == ["NAME", "READY", "UP-TO-DATE", "AVAILABLE", "AGE"]
    assert "nginx:1.25" in await cluster("get deploy -n shop -o wide")
    assert json.loads(await cluster("get deploy web -n shop -o json"))["spec"]["replicas"] == 2
    assert "color: blue" in await cluster("get configmap settings -n shop -o yaml")
    assert await cluster("get svc -A -l app=web -o name") == "service/web\n"
    assert "No resources found" in (await cluster.run("get", "pods", "-n", "shop"))[2]

    await cluster("scale deploy/web --replicas=5 -n shop")
    await cluster("label deploy/web tier=front -n shop")
    await cluster("annotate deploy/web note=hello -n shop")
    patch = '{"spec":{"template":{"spec":{"containers":[{"name":"web","image":"nginx:1.26"}]}}}}'
    assert (await cluster.run("patch", "deploy/web", "-n", "shop", "-p", patch))[0] == 0
    document = json.loads(await cluster("get deploy web -n shop -o json"))
    assert (document["spec"]["replicas"], document["metadata"]["labels"]["tier"]) == (5, "front")
    assert document["spec"]["template"]["spec"]["containers"][0]["image"] == "nginx:1.26"
    assert "5 desired" in await cluster("describe deploy web -n shop")

    assert await cluster("delete deploy,svc -l app=web -n shop") != ""
    assert await cluster("get all -n shop -o name") == ""


async def test_apply_goes_on_from_what_a_lab_applied(cluster: Cluster, tmp_path: Path) -> None:
    """Without a warning or a conflict, in either way and after one another."""
    shop = Path(__file__).parents[2] / "examples" / "shop"
    large = tmp_path / "large.json"
    data = {"text": "x" * 300_000}
    large.write_text(json.dumps({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "large"}, "data": data}))
    made = await apply_manifests(cluster.client, load_manifests([shop, large]))
    assert [LAST_APPLIED in obj["metadata"].get("annotations", {}) for obj in made] == [True] * (len(made) - 1) + [False]
    for way in ([], ["--server-side"], []):
        code, out, err = await cluster.run("apply", *way, "-f", str(shop))
        assert (code, err) == (0, "")
    assert "service/api unchanged" in out
    assert "pod/cart unchanged" in out
    code, _, err = await cluster.run("apply", "--server-side", "-f", str(large))
    assert (code, err) == (0, "")


async def test_create_twice_and_what_is_not_there(cluster: Cluster) -> None:
    await cluster("create -f -", MANIFEST)
    assert "AlreadyExists" in await cluster.fails("create -f -", MANIFEST)
    assert 'Error from server (NotFound): pods "nope" not found' in await cluster.fails("get pod nope")
    assert "the server doesn't have a resource type" in await cluster.fails("get ingresses")
    foreign = MANIFEST + "---\napiVersion: networking.k8s.io/v1\nkind: Ingress\nmetadata: {name: web}\n"
    assert 'no matches for kind "Ingress" in version "networking.k8s.io/v1"' in await cluster.fails("apply -f -", foreign)


async def test_cluster_info_version_and_can_i(cluster: Cluster) -> None:
    assert "Kubernetes control plane" in await cluster("cluster-info")
    assert "Server Version: v1." in await cluster("version")
    assert await cluster("auth can-i create pods") == "yes\n"
    assert "Username" in await cluster("auth whoami")


async def test_a_wrong_token_is_refused(cluster: Cluster) -> None:
    error = await cluster.fails("get pods --token=wrong")
    assert "must be logged in to the server" in error or "Unauthorized" in error


async def test_get_watch_shows_every_change(cluster: Cluster) -> None:
    await cluster("apply -f -", MANIFEST)
    watching = await cluster.start("get", "deploy", "-n", "shop", "-w")
    assert (await line_of(watching))[:2] == ["NAME", "READY"]
    assert (await line_of(watching))[:2] == ["web", "0/2"]
    await cluster("scale deploy/web --replicas=3 -n shop")
    assert (await line_of(watching))[:2] == ["web", "0/3"]
    watching.kill()
    await watching.communicate()


async def test_a_long_list_comes_in_pages(cluster: Cluster) -> None:
    head = {"apiVersion": "v1", "kind": "ConfigMap"}
    await asyncio.gather(
        *(cluster.client.create(CONFIGMAPS, {**head, "metadata": {"name": f"c{n:03}"}}, "default") for n in range(120))
    )
    whole = (await cluster("get cm -o name")).splitlines()
    assert len(whole) == 120
    assert (await cluster("get cm -o name --chunk-size=50")).splitlines() == whole
    assert len((await cluster("get cm --chunk-size=7 --no-headers")).splitlines()) == 120


async def test_wait_for_a_condition_a_field_and_a_deletion(cluster: Cluster) -> None:
    await cluster("run web --image=nginx")
    waiting = [
        await cluster.start("wait", "--for=condition=Ready", "pod/web", "--timeout=30s"),
        await cluster.start("wait", "--for=jsonpath={.status.phase}=Running", "pod/web", "--timeout=30s"),
        await cluster.start("wait", "--for=delete", "pod/web", "--timeout=30s"),
    ]
    status = {"status": {"phase": "Running", "conditions": [{"type": "Ready", "status": "True"}]}}
    await cluster.client.patch(PODS, "web", status, "default", subresource="status")
    for process in waiting[:2]:
        out, err = await asyncio.wait_for(process.communicate(), 30)
        assert out == b"pod/web condition met\n", err
    assert await cluster("delete pod web") == 'pod "web" deleted from default namespace\n'
    await asyncio.wait_for(waiting[2].communicate(), 30)
    assert [process.returncode for process in waiting] == [0, 0, 0]


async def test_rollout_status_follows_to_the_end(cluster: Cluster) -> None:
    await cluster("apply -f -", MANIFEST)
    rollout = await cluster.start("rollout", "status", "deploy/web", "-n", "shop", "--timeout=30s")
    assert (await line_of(rollout))[:2] == ["Waiting", "for"]
    done = {"observedGeneration": 1, "replicas": 2, "updatedReplicas": 2, "readyReplicas": 2, "availableReplicas": 2}
    await cluster.client.patch(DEPLOYMENTS, "web", {"status": done}, "shop", subresource="status")
    out, err = await asyncio.wait_for(rollout.communicate(), 30)
    assert out.endswith(b'deployment "web" successfully rolled out\n'), err


async def test_deleting_a_namespace_waits_until_it_is_gone(cluster: Cluster) -> None:
    await cluster("create namespace shop")
    deleting = await cluster.start("delete", "namespace", "shop")
    namespace: dict[str, Any] = {}
    async with asyncio.timeout(20):
        while "deletionTimestamp" not in namespace.get("metadata", {}):
            namespace = await cluster.client.get(NAMESPACES, "shop")
    assert "Terminating" in await cluster("get ns shop")
    await cluster.client.replace(NAMESPACES, {**namespace, "spec": {"finalizers": []}}, subresource="finalize")
    out, err = await asyncio.wait_for(deleting.communicate(), 30)
    assert (deleting.returncode, out) == (0, b'namespace "shop" deleted\n'), err


async def test_edit_replace_and_create_token(cluster: Cluster) -> None:
    await cluster("create configmap c --from-literal=a=1")
    document = json.loads(await cluster("get cm c -o json"))
    await cluster("replace -f -", json.dumps({**document, "data": {"a": "2"}}))
    assert "object has been modified" in await cluster.fails("replace -f -", json.dumps({**document, "data": {"a": "3"}}))
    await cluster("create serviceaccount robot")
    token = (await cluster("create token robot")).strip()
    assert "system:serviceaccount:default:robot" in await cluster(f"auth whoami --token={token}")


async def test_a_restart_keeps_everything_and_the_watch_goes_on(tmp_path: Path) -> None:
    config = ServerConfig(tokens={"the-token": ADMIN})
    async with cluster_on(lambda: SqliteStore.open(tmp_path / "store.db"), tmp_path, config) as cluster:
        await cluster("apply -f -", MANIFEST)
        before = json.loads(await cluster("get svc,deploy,cm -A -o json"))
        waiting = await cluster.start("wait", "--for=jsonpath={.data.color}=red", "cm/settings", "-n", "shop", "--timeout=30s")
        await cluster.restart()
        assert json.loads(await cluster("get svc,deploy,cm -A -o json")) == before
        await cluster('patch cm settings -n shop -p {"data":{"color":"red"}}')
        out, err = await asyncio.wait_for(waiting.communicate(), 40)
        assert out == b"configmap/settings condition met\n", err


class NodeAgent:
    """The node's side of logs and exec, in its simplest form."""

    async def log(self, request: web.Request) -> web.Response:
        return web.Response(text=f"log of {request.match_info['container']}, tail {request.query.get('tailLines')}\n")

    async def exec(self, request: web.Request) -> web.WebSocketResponse:
        near = web.WebSocketResponse(protocols=("v5.channel.k8s.io", "v4.channel.k8s.io"))
        await near.prepare(request)
        command = request.query.getall("command")
        if "stdin" in request.query:
            async for message in near:
                if message.data[:2] == b"\xff\x00":
                    break
                await near.send_bytes(b"\x01" + message.data[1:].upper())
        await near.send_bytes(b"\x01" + " ".join(command).encode() + b"\n")
        await near.send_bytes(b"\x02oops\n")
        status: dict[str, Any] = {"metadata": {}, "status": "Success"}
        if command[0] == "false":
            cause = {"reason": "ExitCode", "message": "3"}
            status = {
                "metadata": {},
                "status": "Failure",
                "reason": "NonZeroExitCode",
                "message": "command terminated with non-zero exit code",
                "details": {"causes": [cause]},
            }
        await near.send_bytes(b"\x03" + json.dumps(status).encode())
        await near.close()
        return near


async def test_logs_and_exec_reach_the_node(tmp_path: Path) -> None:
    agent, app = NodeAgent(), web.Application()
    app.router.add_get("/containerLogs/{ns}/{pod}/{container}", agent.log)
    app.router.add_get("/exec/{ns}/{pod}/{container}", agent.exec)
    listening = socket.create_server(("127.0.0.1", 0))
    runner = web.AppRunner(app, shutdown_timeout=1)
    await runner.setup()
    tls = AUTHORITY.server_context(AUTHORITY.issue("n1", ["127.0.0.1"], datetime.now(UTC)))
    await web.SockSite(runner, listening, ssl_context=tls).start()
    access = KubeletAccess("node-token", AUTHORITY.client_context())
    config = ServerConfig(tokens={"the-token": ADMIN}, kubelet=access)
    async with cluster_on(MemoryStore, tmp_path, config) as cluster:
        await cluster.client.create(NODES, {"metadata": {"name": "n1"}})
        status = {
            "addresses": [{"type": "InternalIP", "address": "127.0.0.1"}],
            "daemonEndpoints": {"kubeletEndpoint": {"Port": listening.getsockname()[1]}},
        }
        await cluster.client.patch(NODES, "n1", {"status": status}, subresource="status")
        pod = {"metadata": {"name": "web"}, "spec": {"nodeName": "n1", "containers": [{"name": "main", "image": "x"}]}}
        await cluster.client.create(PODS, pod, "default")
        assert await cluster("logs web --tail=5") == "log of main, tail 5\n"
        code, out, err = await cluster.run("exec", "web", "--", "echo", "a b")
        assert (code, out, err) == (0, "echo a b\n", "oops\n")
        code, out, err = await cluster.run("exec", "-i", "web", "--", "cat", stdin="hello")
        assert (code, out) == (0, "HELLOcat\n")
        code, _, err = await cluster.run("exec", "web", "--", "false")
        assert code == 3
        assert "exit code 3" in err
        assert "is not valid for pod web" in await cluster.fails("logs web -c nope")
    await runner.cleanup()
