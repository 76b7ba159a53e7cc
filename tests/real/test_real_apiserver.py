"""Against Kubernetes' own API server with RBAC on: agents and proxy with the rights of their manifests, and its bad days."""

import asyncio
import json
import os
import shutil
import signal
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path

import pytest
import pytest_asyncio
from hostrig import PODWIRE, Host, machines, until
from kuberig import ADDRESS, MANIFESTS, PORT, SLICES, Kubernetes, kubernetes, register
from sandboxrig import Container, cni_ready, end_listener, serve_word, start_cluster_agent

from podwire.client.api import WatchEvent
from podwire.client.errors import Unauthorized
from podwire.client.kubeconfig import client_from_kubeconfig
from podwire.model.meta import Json
from podwire.model.resources import NODES, SERVICES, Resource

pytestmark = [
    pytest.mark.kernel,
    pytest.mark.needs("VXLAN devices", "bridge devices", "nftables"),
    pytest.mark.timeout(180),
    pytest.mark.asyncio(loop_scope="module"),
]

ACCOUNTS = Resource("", "v1", "serviceaccounts", "ServiceAccount")
WEB = "10.96.0.80"
FLANNEL_RIGHTS = """
apiVersion: rbac.authorization.k8s.io/v1
kind: ClusterRole
metadata: {name: flannel}
rules:
  - {apiGroups: [""], resources: [pods], verbs: [get]}
  - {apiGroups: [""], resources: [nodes], verbs: [get, list, watch]}
  - {apiGroups: [""], resources: [nodes/status], verbs: [patch]}
---
apiVersion: v1
kind: ServiceAccount
metadata: {name: flannel, namespace: kube-system}
---
apiVersion: rbac.authorization.k8s.io/v1
kind: ClusterRoleBinding
metadata: {name: flannel}
roleRef: {apiGroup: rbac.authorization.k8s.io, kind: ClusterRole, name: flannel}
subjects: [{kind: ServiceAccount, name: flannel, namespace: kube-system}]
"""


class Site:
    """`agents`: two nodes with `podwire cluster-agent`; `proxied`: one with `podwire proxy`; `overlaid`: two, `podwire agent`.

    `tokens` are files, replaced as the kubelet replaces them."""

    def __init__(self, hosts: list[Host], kube: Kubernetes) -> None:
        self.agents, self.proxied, self.overlaid = hosts[:2], hosts[2], hosts[3:]
        self.hosts, self.kube = hosts, kube
        self.tokens = {host.name: kube.folder / f"{host.name}.token" for host in hosts}

    def config(self, host: Host) -> Path:
        """A kubeconfig that names the host's token file."""
        path = self.kube.account_config(host.name, "none")
        path.write_text(path.read_text().replace("token: none", f"tokenFile: {self.tokens[host.name]}"))
        return path

    async def write_token(self, host: Host, account: str) -> None:
        """As the kubelet replaces one."""
        path = self.tokens[host.name]
        fresh = path.with_suffix(".new")
        await asyncio.to_thread(fresh.write_text, await self.kube.token(account))
        await asyncio.to_thread(fresh.rename, path)

    async def start_agent(self, host: Host) -> None:
        await start_cluster_agent(host, self.config(host))

    async def programmed(self, service: str) -> str:
        """Waits until every node that is ready has acknowledged the Service."""
        where = ("--kubeconfig", str(self.kube.admin_config), "--timeout", "60")
        return await self.hosts[1].podwire("wait", "--programmed", f"svc/{service}", *where, within=70.0)

    async def endpoint(self, ip: str, node: str = "", *, service: str = "web") -> None:
        place = {"kubernetes.io/hostname": node} if node else {}
        await self.kube.client.patch(SLICES, service, {"endpoints": [{"addresses": [ip], "topology": place}]}, "default")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def site(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Site]:
    root = tmp_path_factory.mktemp("real")
    async with AsyncExitStack() as stack:
        hosts = await stack.enter_async_context(machines(root, 5))
        kube = await stack.enter_async_context(kubernetes(root / "kube"))
        site = Site(hosts, kube)
        for overlay in ("both", "kube-proxy"):
            await kube.kubectl("apply", "-k", str(MANIFESTS / "overlays" / overlay))
        for number, host in enumerate(site.agents, 1):
            await register(kube.client, host.name, host.address, f"10.244.{number}.0/24")
            await site.write_token(host, "podwire")
            await site.start_agent(host)
        await _service(site, "web", WEB)
        yield site


async def _service(site: Site, name: str, address: str) -> None:
    """With a slice of no endpoints, as the real controller writes them."""
    meta = {"name": name, "namespace": "default"}
    await site.kube.client.create(SERVICES, {"metadata": meta, "spec": {"clusterIP": address, "ports": [{"port": 80}]}})
    labels = {"kubernetes.io/service-name": name}
    ports = [{"name": "", "port": 80, "protocol": "TCP"}]
    await site.kube.client.create(
        SLICES, {"metadata": meta | {"labels": labels}, "addressType": "IPv4", "endpoints": None, "ports": ports}
    )


def _network_is_there(node: Json) -> bool:
    conditions = {c["type"]: c["status"] for c in node["status"]["conditions"]}
    notes = node["metadata"].get("annotations", {})
    return bool(conditions["NetworkUnavailable"] == "False" and notes.get("flannel.alpha.coreos.com/backend-type") == "vxlan")


async def _two_pods(site: Site, *names: str) -> tuple[Container, Container]:
    for host in site.agents:
        await cni_ready(host)
    one, two = (Container(host, name) for host, name in zip(site.agents, names, strict=True))
    for container in (one, two):
        await asyncio.to_thread(container.add)
    return one, two


async def test_nodes_pods_and_services_with_the_rights_of_the_manifests_alone(site: Site) -> None:
    await until(site.kube.client, NODES, lambda nodes: all(map(_network_is_there, nodes)))
    one, two = await _two_pods(site, "one", "two")
    listener = two.serve("two")
    assert await one.word_of(two.ip) == "two"
    await site.endpoint(two.ip, site.agents[1].name)
    assert "host-1, host-2" in await site.programmed("web")
    assert await one.word_of(WEB) == "two"
    rows = json.loads(
        await site.hosts[0].podwire("status", "services", "--kubeconfig", str(site.kube.admin_config), "-o", "json")
    )
    assert {row["name"]: row["programmed"] for row in rows} == {"web": ["host-1", "host-2"], "kubernetes": ["host-1", "host-2"]}
    # The API server's own Service, as every pod finds it: it wants TLS, and says so.
    assert "Client sent an HTTP request to an HTTPS server" in await asyncio.to_thread(one.fetch, "10.96.0.1", 443)
    end_listener(listener)
    for container in (one, two):
        await asyncio.to_thread(container.delete)
    for host in site.agents:
        assert "forbidden" not in host.log.read_text()
        assert "may not" not in host.log.read_text()


async def test_the_api_server_is_killed_and_comes_back(site: Site) -> None:
    """Pods are added meanwhile, with what is known; then the agents list again, for the new one's memory begins with itself."""
    one, two = await _two_pods(site, "three", "four")
    await site.kube.server.end(signal.SIGKILL)
    late = Container(site.agents[0], "five")
    assert await asyncio.to_thread(late.add) != one.ip
    listener = late.serve("late")
    assert await two.word_of(late.ip) == "late"
    await site.kube.server.start()
    await site.kube.answers()
    await site.endpoint(late.ip, site.agents[0].name)
    assert "host-1, host-2" in await site.programmed("web")
    assert await two.word_of(WEB) == "late"
    end_listener(listener)
    for container in (one, two, late):
        await asyncio.to_thread(container.delete)


async def test_a_node_that_is_cut_off_during_a_compaction_lists_again(site: Site) -> None:
    """It is not told that the server is another one: that it does not answer any more must be enough."""
    one, two = await _two_pods(site, "six", "seven")
    listener = two.serve("seven")
    await _service(site, "gone", "10.96.0.81")
    await site.endpoint(two.ip, service="gone")
    await site.programmed("gone")
    assert await one.word_of("10.96.0.81") == "seven"
    cut_off = site.agents[0]
    log = len(cut_off.log.read_text())
    await _connect(cut_off, "down")
    await site.kube.restarted()  # else what follows would wait in the connection
    await site.kube.client.delete(SERVICES, "gone", "default")
    await site.kube.client.delete(SLICES, "gone", "default")
    await site.endpoint(two.ip, site.agents[1].name)
    await site.kube.compact()
    await site.kube.restarted()  # what it kept in memory of the history is gone too
    await _connect(cut_off, "up")
    assert "host-1, host-2" in await site.programmed("web")
    assert await one.word_of(WEB) == "seven"
    assert await asyncio.to_thread(one.fetch, "10.96.0.81", 80) == ""
    assert "endpointslices: history is gone, listing again" in cut_off.log.read_text()[log:]
    end_listener(listener)
    for container in (one, two):
        await asyncio.to_thread(container.delete)


async def _connect(host: Host, state: str) -> None:
    """The host's cable: its end at the bridge, which is in the tests' own namespace."""
    port = f"h{int(host.name.removeprefix('host-')) - 1}"
    command = await asyncio.create_subprocess_exec("ip", "link", "set", port, state)
    assert await command.wait() == 0


async def _new_account(site: Site, name: str) -> None:
    """Tokens of the account are good no more: not even for those who were let in with one, for the server begins anew."""
    await site.kube.client.delete(ACCOUNTS, name, "kube-system")
    await site.kube.client.create(ACCOUNTS, {"metadata": {"name": name, "namespace": "kube-system"}})
    await site.kube.restarted()


async def test_a_token_that_is_replaced_while_the_agent_runs(site: Site) -> None:
    """The old one stops being good when its account goes; the file has the next one some time later."""
    host = site.agents[0]
    one, two = await _two_pods(site, "eight", "nine")
    listener = two.serve("nine")
    await _new_account(site, "podwire")
    with pytest.raises(Unauthorized):
        async with client_from_kubeconfig(site.config(host)) as old:
            await old.list(NODES)
    async with asyncio.timeout(20):
        while "Unauthorized" not in await asyncio.to_thread(host.log.read_text):  # noqa: ASYNC110 - another process writes it
            await asyncio.sleep(0.05)
    assert await one.word_of(two.ip) == "nine"
    for agent in site.agents:
        await site.write_token(agent, "podwire")
    await site.endpoint(two.ip, site.agents[1].name)
    assert "host-1, host-2" in await site.programmed("web")
    assert await one.word_of(WEB) == "nine"
    end_listener(listener)
    for container in (one, two):
        await asyncio.to_thread(container.delete)


async def test_a_watch_has_bookmarks_and_an_end(site: Site) -> None:
    """What the agents' watches build on: a selection hears how far the rest has come, and the server's own end is no error."""
    client = site.kube.client
    found = await client.list(SERVICES)
    watch = client.watch(SERVICES, resource_version=found.resource_version, label_selector="some=such", timeout_seconds=6)
    hearing = asyncio.create_task(_heard(watch))
    for number in range(5):  # it says nothing of what it knew when the watch began
        await _service(site, f"noted-{number}", f"10.96.1.{number}")
        await asyncio.wait((hearing,), timeout=1)
    events = await asyncio.wait_for(hearing, 15)
    assert {event.type for event in events} == {"BOOKMARK"}
    assert int(events[-1].json()["metadata"]["resourceVersion"]) > int(found.resource_version)


async def _heard(watch: AsyncIterator[WatchEvent]) -> list[WatchEvent]:
    return [event async for event in watch]


async def test_a_proxy_by_its_pods_account(site: Site, tmp_path: Path) -> None:
    """In a pod of its DaemonSet: the account's folder, the address of the API server in the environment, kubeadm's file."""
    host, kube = site.proxied, site.kube
    await register(kube.client, host.name, host.address, "10.244.3.0/24")
    account = tmp_path / "account"
    account.mkdir()
    shutil.copy(kube.folder / "ca.crt", account)
    (account / "token").symlink_to(site.tokens[host.name])
    await site.write_token(host, "podwire-proxy")
    config = tmp_path / "config.conf"
    config.write_text(
        "apiVersion: kubeproxy.config.k8s.io/v1alpha1\nkind: KubeProxyConfiguration\nclusterCIDR: 10.244.0.0/16\nmode: ''\n"
    )
    script = (
        "mount -t tmpfs tmpfs /run && mkdir -p /run/secrets/kubernetes.io"
        f' && ln -s {account} /run/secrets/kubernetes.io/serviceaccount && exec "$@"'
    )
    await host.call("ip", "route", "add", "default", "via", ADDRESS)
    command = (*PODWIRE, "proxy", "--config", str(config), "--hostname-override", host.name)
    environment = {**os.environ, "KUBERNETES_SERVICE_HOST": ADDRESS, "KUBERNETES_SERVICE_PORT": str(PORT)}
    await host.begin("unshare", "-m", "sh", "-ec", script, "sh", *command, env=environment)
    server = Container(site.agents[0], "ten")
    await asyncio.to_thread(server.add)
    listener = server.serve("ten")
    await site.endpoint(server.ip, site.agents[0].name)
    assert "host-3" in await site.programmed("web")
    assert WEB in await host.call("nft", "list", "ruleset")
    # By the kubelet's way: the folder's content is replaced as a whole. The account's old tokens are good no more.
    await _new_account(site, "podwire-proxy")
    await site.write_token(host, "podwire-proxy")
    await _service(site, "later", "10.96.0.82")
    assert "host-3" in await site.programmed("later")
    assert "forbidden" not in host.log.read_text()
    end_listener(listener)
    await asyncio.to_thread(server.delete)


async def test_hosts_join_an_overlay_with_flannels_rights(site: Site, tmp_path: Path) -> None:
    kube = site.kube
    await asyncio.to_thread((tmp_path / "rights.yaml").write_text, FLANNEL_RIGHTS)
    await kube.kubectl("apply", "-f", str(tmp_path / "rights.yaml"))
    network = tmp_path / "net-conf.json"
    network.write_text('{"Network": "10.244.0.0/16", "Backend": {"Type": "vxlan"}}')
    for number, host in enumerate(site.overlaid, 4):
        await register(kube.client, host.name, host.address, f"10.244.{number}.0/24")
        await site.write_token(host, "flannel")
        await host.start(
            "agent", "--subnet-manager", "kube", "--kubeconfig-file", str(site.config(host)), "--node-name", host.name,
            "--net-config-path", str(network), "--subnet-file", str(host.run / "subnet.env"), "--iface", "eth0",
            "--iptables-forward-rules", "false",
        )  # fmt: skip
    mine = [host.name for host in site.overlaid]
    await until(
        kube.client, NODES, lambda nodes: all(_network_is_there(node) for node in nodes if node["metadata"]["name"] in mine)
    )
    one, two = site.overlaid
    listener = serve_word(two.netns, "five", "10.244.5.0")
    pod, other = await _two_pods(site, "twelve", "thirteen")
    assert "five" in await asyncio.to_thread(one.fetch, "10.244.5.0", 80)
    assert await pod.word_of("10.244.5.0") == "five"
    report = await one.podwire(
        "verify", "overlay", "--kubeconfig-file", str(site.config(one)), "--node-name", one.name, "--all"
    )
    assert f"{two.name} (10.244.5.0/24): flannel.1 says 1450: 1450 bytes to 10.244.5.0 arrived" in report, report
    end_listener(listener)
    for container in (pod, other):
        await asyncio.to_thread(container.delete)
