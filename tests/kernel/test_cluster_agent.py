"""`podwire cluster-agent` beside a kubelet: Nodes and pods are somebody else's, and its rights are those of its manifest."""

import asyncio
import json
import os
import socket
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from datetime import UTC, datetime
from ipaddress import ip_network
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from aiohttp import web
from hostrig import Host, machines, until
from rbacrig import Right, right_for, rights_of
from sandboxrig import Container, cni_ready, end_listener, start_cluster_agent

from podwire.apiserver.app import create_app
from podwire.apiserver.auth import ADMIN, User
from podwire.apiserver.config import ServerConfig
from podwire.apiserver.pki import Authority, kubeconfig
from podwire.apiserver.server import ApiServer, Listener
from podwire.client.api import ApiClient
from podwire.controllers.config import ControllersConfig, default_cluster_cidr
from podwire.controllers.nodeipam import NodeIpam
from podwire.controllers.run import NAMES, run_controllers
from podwire.kernel.commands import find_program
from podwire.model.meta import Json
from podwire.model.resources import ENDPOINTSLICES, NODES, SERVICES
from podwire.model.timestamps import format_time
from podwire.store.memory import MemoryStore

pytestmark = [
    pytest.mark.kernel,
    pytest.mark.needs("VXLAN devices", "bridge devices", "nftables"),
    pytest.mark.timeout(90),
    pytest.mark.asyncio(loop_scope="module"),
]

ADDRESS = "198.18.7.254"
Labels = dict[str, str]


class Site:
    def __init__(self, hosts: list[Host], client: ApiClient, config: Path) -> None:
        self.hosts, self.client, self.config = hosts, client, config
        self.requests: set[Right] = set()
        self.third = hosts[0]

    def note(self, request: web.Request) -> None:
        if request.headers.get("User-Agent", "").startswith("podwire/host-"):
            right = right_for(request)
            assert right is not None, request.path
            self.requests.add(right)

    async def start(self, host: Host, *arguments: str) -> None:
        await start_cluster_agent(host, self.config, *arguments, service_cidr="10.96.0.0/12")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def site(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Site]:
    root = tmp_path_factory.mktemp("cluster")
    async with AsyncExitStack() as stack:
        hosts = await stack.enter_async_context(machines(root, 3))
        authority = Authority.create("kubernetes", datetime.now(UTC))
        path = root / "kubeconfig"
        path.write_text(kubeconfig("test", f"https://{ADDRESS}:6443", authority.pair.certificate, "agent"))
        client = await stack.enter_async_context(
            ApiClient(f"https://{ADDRESS}:6443", token="admin", ssl=authority.client_context())
        )
        site = Site(hosts[:2], client, path)
        site.third = hosts[2]
        await _serve(site, authority, stack)
        for host in site.hosts:
            await register(client, host)
            await site.start(host)
        yield site


async def register(client: ApiClient, host: Host) -> None:
    """As the kubelet of `host` does."""
    await client.create(NODES, _node(host.name))
    addresses = [{"type": "InternalIP", "address": host.address}, {"type": "Hostname", "address": host.name}]
    conditions = [_condition("Ready", "True"), _condition("NetworkUnavailable", "True")]
    status = {"status": {"addresses": addresses, "conditions": conditions}}
    await client.patch(NODES, host.name, status, subresource="status")


async def _serve(site: Site, authority: Authority, stack: AsyncExitStack) -> None:
    """An API server and, of the controllers, what gives the nodes their subnets."""
    store = MemoryStore()
    stack.push_async_callback(store.close)
    users = {"admin": ADMIN, "agent": User("system:serviceaccount:kube-system:podwire")}
    app = create_app(store, ServerConfig(tokens=users, service_cidrs=(ip_network("10.96.0.0/12"),)))

    @web.middleware
    async def record(request: web.Request, handler: Any) -> web.StreamResponse:
        site.note(request)
        response: web.StreamResponse = await handler(request)
        return response

    app.middlewares.append(record)
    server = ApiServer(app)
    stack.push_async_callback(server.stop)
    tls = authority.server_context(authority.issue("kube-apiserver", [ADDRESS], datetime.now(UTC)))
    await server.start([Listener(socket.create_server((ADDRESS, 6443)), tls)])
    config = ControllersConfig((default_cluster_cidr("10.244.0.0/16"),), disabled=NAMES - {NodeIpam.name})
    controllers = asyncio.create_task(run_controllers(site.client, config))
    stack.push_async_callback(_end, controllers)


async def _end(task: "asyncio.Task[None]") -> None:
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


def _node(name: str) -> Json:
    taints = [{"key": "podwire.io/agent-not-ready", "effect": "NoSchedule"}, {"key": "mine", "effect": "NoExecute"}]
    return {"metadata": {"name": name}, "spec": {"taints": taints}}


def _condition(kind: str, status: str) -> Json:
    return {"type": kind, "status": status, "reason": "Test", "lastTransitionTime": format_time(datetime.now(UTC))}


def _state(node: Json) -> tuple[dict[str, str], set[str]]:
    conditions = {c["type"]: c["status"] for c in node["status"]["conditions"]}
    return conditions, {taint["key"] for taint in node["spec"].get("taints", ())}


def _up(nodes: list[Json]) -> bool:
    return all(_state(n) == ({"Ready": "True", "NetworkUnavailable": "False"}, {"mine"}) for n in nodes)


async def test_nodes_and_pods_of_a_kubelet_have_a_network(site: Site) -> None:
    nodes = await until(site.client, NODES, _up)
    assert all(n["metadata"]["annotations"]["flannel.alpha.coreos.com/backend-type"] == "vxlan" for n in nodes)
    one, two = (Container(host, f"c{n}") for n, host in enumerate(site.hosts))
    for container in (one, two):
        await asyncio.to_thread(container.add)
    listener = two.serve("two")
    assert "two" in await asyncio.to_thread(one.fetch, two.ip, 80)
    await _service(site, "web", two.ip)
    assert await one.word_of("10.96.0.80") == "two"
    # The agent goes, and what runs keeps its network; the next one finds all of it.
    host = site.hosts[0]
    assert await host.end() == 0
    assert "two" in await asyncio.to_thread(one.fetch, two.ip, 80)
    await site.start(host)
    await _node_again(site, host)
    three = Container(host, "c3")
    assert await asyncio.to_thread(three.add) != one.ip
    assert "two" in await asyncio.to_thread(three.fetch, "10.96.0.80", 80)
    for container in (one, two, three):
        await asyncio.to_thread(container.delete)
    end_listener(listener)


async def _service(site: Site, name: str, endpoint: str, address: str = "10.96.0.80", labels: Labels | None = None) -> None:
    """Its slice has its labels, as the controller makes them, and names no node."""
    meta, labels = {"name": name, "namespace": "default"}, labels or {}
    spec = {"clusterIP": address, "ports": [{"port": 80}]}
    await site.client.create(SERVICES, {"metadata": meta | {"labels": labels}, "spec": spec})
    labels = labels | {"kubernetes.io/service-name": name}
    endpoints = [{"addresses": [endpoint], "conditions": {"ready": True}}]
    document = {"metadata": meta | {"labels": labels}, "addressType": "IPv4", "endpoints": endpoints, "ports": [{"port": 80}]}
    await site.client.create(ENDPOINTSLICES, document)


async def _node_again(site: Site, host: Host) -> None:
    """What a cloud's controller says of a node is set right by the agent, once it is up."""
    wrong = {"status": {"conditions": [_condition("Ready", "True"), _condition("NetworkUnavailable", "True")]}}
    await site.client.patch(NODES, host.name, wrong, subresource="status")
    await until(site.client, NODES, _up)
    await cni_ready(host)


async def test_the_agent_asked_for_nothing_that_its_manifest_does_not_allow(site: Site) -> None:
    allowed = rights_of("agent/account.yaml")
    allowed.add(("patch", "", "nodes"))  # components/startup-taint, for the taint of these nodes
    assert site.requests <= allowed
    assert allowed - site.requests <= {("create", "", "events"), ("patch", "", "events"), ("watch", "", "nodes")}


async def test_a_node_that_flannels_plugins_served_before(site: Site, tmp_path: Path) -> None:
    """Its pods keep their links and addresses, and nobody gets those a second time."""
    bridge_plugin = Path("/usr/lib/cni/bridge")
    if not os.access(bridge_plugin, os.X_OK):
        pytest.skip("the bridge plugin is not installed (Debian package containernetworking-plugins)")
    host = site.third
    await register(site.client, host)
    nodes = await until(site.client, NODES, lambda found: len(found) == 3 and all("podCIDR" in n["spec"] for n in found))
    cidr = next(n["spec"]["podCIDR"] for n in nodes if n["metadata"]["name"] == host.name)
    old = Container(host, "old")
    ipam = {
        "type": "host-local",
        "dataDir": str(tmp_path),
        "ranges": [[{"subnet": cidr}]],
        "routes": [{"dst": "10.244.0.0/16"}],
    }
    config = {
        "cniVersion": "0.3.1",
        "name": "cbr0",
        "type": "bridge",
        "isDefaultGateway": True,
        "hairpinMode": True,
        "ipam": ipam,
    }
    environment = {
        "PATH": os.environ["PATH"], "CNI_COMMAND": "ADD", "CNI_CONTAINERID": "old", "CNI_IFNAME": "eth0",
        "CNI_NETNS": f"/proc/{os.getpid()}/fd/{old.netns}", "CNI_PATH": "/usr/lib/cni",
    }  # fmt: skip
    path = tmp_path / "config"
    path.write_text(json.dumps(config))
    answer = json.loads(await host.call("sh", "-c", f"exec {bridge_plugin} < {path}", env=environment))
    old.ip = answer["ips"][0]["address"].partition("/")[0]
    listener = old.serve("old")
    assert "1 address taken over" in await host.podwire(
        "ipam", "import", "--state-dir", str(host.state), str(tmp_path / "cbr0")
    )
    await site.start(host)
    await until(site.client, NODES, _up)
    new, far = Container(host, "new"), Container(site.hosts[0], "far")
    for container in (new, far):
        assert await asyncio.to_thread(container.add) != old.ip
        assert "old" in await asyncio.to_thread(container.fetch, old.ip, 80)
    for container in (new, far, old):
        await asyncio.to_thread(container.delete)
    end_listener(listener)


OTHER_PROXY = """
table ip other-proxy {
  chain prerouting {
    type nat hook prerouting priority dstnat + 5
    ip daddr 10.96.0.80 dnat to %s
  }
}
"""


@pytest.mark.skipif(not find_program("nft"), reason="the nft program is not installed")
async def test_beside_another_proxy_only_what_asks_for_this_one(site: Site) -> None:
    """Its Services are not dropped as unused addresses of their range, even where its rules come after these."""
    host = site.hosts[1]
    await host.end()
    await site.start(host, "--no-services")
    client, server = Container(host, "c8"), Container(host, "c9")
    await cni_ready(host)
    for container in (client, server):
        await asyncio.to_thread(container.add)
    listener = server.serve("nine")
    await _service(site, "ours", server.ip, "10.96.0.90", {"service.kubernetes.io/service-proxy-name": "podwire"})
    await _service(site, "others", server.ip, "10.96.0.91", {"service.kubernetes.io/service-proxy-name": "else"})
    assert await client.word_of("10.96.0.90") == "nine"
    assert await server.word_of("10.96.0.90") == "nine"
    rules = await host.call("nft", "list", "ruleset")
    assert "10.96.0.80" not in rules
    assert "10.96.0.91" not in rules
    await host.call("nft", OTHER_PROXY % server.ip)
    assert await client.word_of("10.96.0.80") == "nine"
    end_listener(listener)
    for container in (client, server):
        await asyncio.to_thread(container.delete)
