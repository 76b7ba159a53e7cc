"""A whole Kubernetes of its own programs (API server, controllers, scheduler, kubelets, containerd) with podwire as network."""

import asyncio
import json
import shutil
import signal
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from ipaddress import ip_address, ip_network
from pathlib import Path

import pytest
import pytest_asyncio
from cririg import IMAGE
from hostrig import Host, machines, ready, until
from kubeletrig import Kubelet, kubelet_on
from kuberig import MANIFESTS, Kubernetes, controllers, kubernetes, scheduler
from sandboxrig import start_cluster_agent

from podwire.model.meta import Json
from podwire.model.resources import NODES, PODS, SERVICES, Resource

pytestmark = [
    pytest.mark.kernel,
    pytest.mark.needs("VXLAN devices", "bridge devices", "nftables"),
    pytest.mark.timeout(240),
    pytest.mark.asyncio(loop_scope="module"),
]

DAEMONSETS = Resource("apps", "v1", "daemonsets", "DaemonSet")
HOST_PORT, NODE_PORT = 8080, 30080


class Site:
    """Two nodes. `tokens`: files with their agents' tokens."""

    def __init__(self, hosts: list[Host], kube: Kubernetes, kubelets: list[Kubelet]) -> None:
        self.hosts, self.kube, self.kubelets = hosts, kube, kubelets

    async def start_agent(self, number: int) -> None:
        host = self.hosts[number]
        config = self.kube.account_config(host.name, await self.kube.token("podwire"))
        await start_cluster_agent(host, config)

    async def pods(self, **selectors: str) -> dict[str, Json]:
        """By the name of their node."""
        found = (await self.kube.client.list(PODS, "default", **selectors)).items  # type: ignore[arg-type]
        return {pod["spec"].get("nodeName", ""): pod for pod in found}

    async def fetch(self, pod: Json, address: str) -> str:
        """What a web server says to a process in the pod."""
        name = pod["metadata"]["name"]
        return (await self.kube.kubectl("exec", name, "--", "wget", "-q", "-O", "-", f"http://{address}/")).strip()


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def site(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Site]:
    root = tmp_path_factory.mktemp("kubelet")
    async with AsyncExitStack() as stack:
        hosts = await stack.enter_async_context(machines(root, 2))
        kube = await stack.enter_async_context(kubernetes(root / "kube"))
        await stack.enter_async_context(controllers(kube))
        await stack.enter_async_context(scheduler(kube))
        await kube.kubectl("apply", "-k", await asyncio.to_thread(_manifests, root))
        kubelets = [await stack.enter_async_context(kubelet_on(host, root / f"box-{host.name}", kube)) for host in hosts]
        site = Site(hosts, kube, kubelets)
        for number in range(len(hosts)):
            await site.start_agent(number)
        await kube.client.create(DAEMONSETS, _web(), "default")
        yield site


def _manifests(root: Path) -> str:
    """podwire in flannel's and kube-proxy's place, and nodes tainted until it is there."""
    shutil.copytree(MANIFESTS, root / "manifests")
    mine = root / "manifests/mine"
    mine.mkdir()
    (mine / "kustomization.yaml").write_text("resources: [../overlays/both]\ncomponents: [../components/startup-taint]\n")
    return str(mine)


def _container(script: str) -> Json:
    return {
        "name": "web",
        "image": IMAGE,
        "imagePullPolicy": "Never",
        "command": ["sh", "-c", script],
        "env": [{"name": "NODE", "valueFrom": {"fieldRef": {"fieldPath": "spec.nodeName"}}}],
    }


def _web() -> Json:
    """On every node a server that says where it runs."""
    container = _container("echo $NODE > /tmp/index.html; exec httpd -f -p 80 -h /tmp") | {
        "ports": [{"containerPort": 80, "hostPort": HOST_PORT}],
        "readinessProbe": {"httpGet": {"path": "/", "port": 80}, "periodSeconds": 1},
    }
    labels = {"app": "web"}
    template = {"metadata": {"labels": labels}, "spec": {"containers": [container], "terminationGracePeriodSeconds": 0}}
    return {"metadata": {"name": "web"}, "spec": {"selector": {"matchLabels": labels}, "template": template}}


async def test_nodes_and_pods_get_ready(site: Site) -> None:
    """The agent takes the taint away, the scheduler places, kubelet and containerd make, the probe reaches."""
    client = site.kube.client
    await until(client, NODES, lambda nodes: len(nodes) == 2 and all(map(ready, nodes)))
    pods = await until(client, PODS, lambda pods: len(pods) == 2 and all(map(ready, pods)), within=60, namespace="default")
    nodes = await until(client, NODES, bool)
    cidrs = {node["metadata"]["name"]: ip_network(node["spec"]["podCIDR"]) for node in nodes}
    assert all(ip_address(pod["status"]["podIP"]) in cidrs[pod["spec"]["nodeName"]] for pod in pods)
    keys = {taint["key"] for node in nodes for taint in node["spec"].get("taints", ())}
    assert "podwire.io/agent-not-ready" not in keys


async def test_pods_reach_each_other_and_services(site: Site) -> None:
    pods = await site.pods()
    one, two = pods["host-1"], pods["host-2"]
    assert await site.fetch(one, two["status"]["podIP"]) == "host-2"
    assert await site.fetch(two, one["status"]["podIP"]) == "host-1"
    ports = [{"port": 80, "nodePort": NODE_PORT}]
    spec = {"type": "NodePort", "selector": {"app": "web"}, "ports": ports, "externalTrafficPolicy": "Local"}
    service = await site.kube.client.create(SERVICES, {"metadata": {"name": "web"}, "spec": spec}, "default")
    where = ("--kubeconfig", str(site.kube.admin_config), "--timeout", "20")
    assert "host-1, host-2" in await site.hosts[0].podwire("wait", "--programmed", "svc/web", *where)
    found = {await site.fetch(one, service["spec"]["clusterIP"]) for _ in range(20)}
    assert found == {"host-1", "host-2"}
    for port in (HOST_PORT, NODE_PORT):
        answer = await asyncio.to_thread(site.hosts[0].fetch, site.hosts[1].address, port)
        assert answer.rstrip().endswith("host-2"), port


async def test_an_agent_that_is_replaced(site: Site) -> None:
    """While it is away, what runs keeps its network, a new pod waits for it, and one that is deleted is gone all the same."""
    client, host = site.kube.client, site.hosts[0]
    before = await site.pods()
    assert await host.end(signal.SIGKILL) == -signal.SIGKILL
    assert await site.fetch(before["host-1"], before["host-2"]["status"]["podIP"]) == "host-2"
    assert await site.fetch(before["host-2"], before["host-1"]["status"]["podIP"]) == "host-1"
    late = {"metadata": {"name": "late"}, "spec": {"nodeName": "host-1", "containers": [_container("exec sleep 1000")]}}
    await until(client, Resource("", "v1", "serviceaccounts", "ServiceAccount"), bool, namespace="default")
    await client.create(PODS, late, "default")
    await client.delete(PODS, before["host-1"]["metadata"]["name"], "default")
    await _said_of(site, "late", "podwire's agent does not answer")
    await site.start_agent(0)
    await until(client, PODS, lambda pods: len(pods) == 3 and all(map(ready, pods)), within=60, namespace="default")
    after = await site.pods(label_selector="app=web")
    assert after["host-2"]["metadata"]["uid"] == before["host-2"]["metadata"]["uid"]
    assert await site.fetch(after["host-2"], after["host-1"]["status"]["podIP"]) == "host-1"
    mine = await client.list(PODS, "default", field_selector="spec.nodeName=host-1")
    assert await _addresses(site) == {pod["status"]["podIP"] for pod in mine.items}


async def _said_of(site: Site, pod: str, words: str) -> None:
    """Returns once the kubelet has said so in an Event."""
    about = ("get", "events", "--field-selector", f"involvedObject.name={pod}", "-o", "json")
    async with asyncio.timeout(30):
        while words not in await site.kube.kubectl(*about):  # noqa: ASYNC110 - another process says it
            await asyncio.sleep(0.2)


async def _addresses(site: Site) -> set[str]:
    """Of the pods of host-1, as its agent has them."""
    host = site.hosts[0]
    rows = json.loads(await host.podwire("ipam", "ls", "--state-dir", str(host.state), "-o", "json"))
    return {row["address"] for row in rows}


async def test_an_agent_that_is_removed_takes_nothing_with_it(site: Site) -> None:
    for host in site.hosts:
        assert await host.end() == 0
    pods = await site.pods(label_selector="app=web")
    assert await site.fetch(pods["host-1"], pods["host-2"]["status"]["podIP"]) == "host-2"
    service = await site.kube.client.get(SERVICES, "web", "default")
    assert {await site.fetch(pods["host-1"], service["spec"]["clusterIP"]) for _ in range(20)} == {"host-1", "host-2"}
