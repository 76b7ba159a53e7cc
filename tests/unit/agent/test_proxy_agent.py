"""`podwire proxy`'s agent against the real API server and a kernel that executes: rules, word in the API, health, metrics."""

import asyncio
import contextlib
import ipaddress
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

import aiohttp
import msgspec
import pytest
from aiohttp.test_utils import TestClient, TestServer

from podwire.agent.proxy.agent import ProxyAgent, ProxyEnvironment
from podwire.agent.proxy.nodename import likely_names, node_name
from podwire.agent.proxy.status import health_app, metrics_app
from podwire.agent.proxymodes.nft import NftRules
from podwire.client.api import ApiClient, RawList
from podwire.kernel.port import KernelError
from podwire.model.acknowledgement import NAMESPACE, Acknowledgement, lease_name, read_lease
from podwire.model.addr import Family
from podwire.model.errors import InvalidInput
from podwire.model.flow import Flow, FlowTuple
from podwire.model.ids import HOST, NetnsName, ObjectKey
from podwire.model.kernelstate import Address, Dummy, Link
from podwire.model.nft import Batch, DelTable, TableRef
from podwire.model.objects import EndpointSlice, Lease, Service
from podwire.model.ops import AddAddress, AddLink, Applied, CommitNft, DelAddress, Plan
from podwire.model.proxyconfig import parse_proxy_config
from podwire.model.resources import ENDPOINTSLICES, LEASES, NODES, SERVICES, Resource
from podwire.plan.services import TABLE
from podwire.testing import FakeKernel
from podwire.testing.memorycluster import MemoryCluster, memory_cluster

WEB = ObjectKey("default", "web")
LOCAL = {"type": "LoadBalancer", "externalTrafficPolicy": "Local", "healthCheckNodePort": 30999}


@pytest.fixture
async def cluster(tmp_path: Path) -> AsyncIterator[MemoryCluster]:
    async with memory_cluster(tmp_path) as made:
        node = {"apiVersion": "v1", "kind": "Node", "metadata": {"name": "n1"}, "spec": {"podCIDR": "10.244.1.0/24"}}
        await made.client.create(NODES, node)
        addresses = [{"type": "InternalIP", "address": "198.18.0.11"}]
        await made.client.patch(NODES, "n1", {"status": {"addresses": addresses}}, subresource="status")
        await service(made)
        await endpoints(made, 1, 2)
        yield made


async def service(cluster: MemoryCluster, name: str = "web", **spec: Any) -> None:
    spec = {"ports": [{"port": 80, "name": "http"}], **spec}
    document = {"apiVersion": "v1", "kind": "Service", "metadata": {"name": name, "namespace": "default"}, "spec": spec}
    await cluster.client.create(SERVICES, document)


async def endpoints(cluster: MemoryCluster, *nodes: int, service: str = "web") -> None:
    piece = {
        "apiVersion": "discovery.k8s.io/v1",
        "kind": "EndpointSlice",
        "metadata": {"name": f"{service}-1", "namespace": "default", "labels": {"kubernetes.io/service-name": service}},
        "addressType": "IPv4",
        "endpoints": [{"addresses": [f"10.244.{n}.2"], "nodeName": f"n{n}"} for n in nodes],
        "ports": [{"name": "http", "port": 8080, "protocol": "TCP"}],
    }
    if await cluster.exists(ENDPOINTSLICES, f"{service}-1", "default"):
        await cluster.client.patch(ENDPOINTSLICES, f"{service}-1", piece, "default")
    else:
        await cluster.client.create(ENDPOINTSLICES, piece)


@asynccontextmanager
async def proxy(
    cluster: MemoryCluster, kernel: FakeKernel, config: str = "", client: ApiClient | None = None, **more: Any
) -> AsyncIterator[ProxyAgent]:
    async with client or ApiClient(cluster.url) as client:
        agent = ProxyAgent(
            ProxyEnvironment(
                node="n1",
                config=parse_proxy_config(config, "test")[0],
                kernel=kernel,
                client=client,
                make_rules=lambda facts: NftRules(kernel, facts),
                rng=Random(1),
                **more,
            )
        )
        task = asyncio.create_task(agent.run())
        try:
            async with asyncio.timeout(10):
                await agent.programmed()
            yield agent
        finally:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task


def elements(kernel: FakeKernel, name: str) -> int:
    table = kernel.host.ruleset.tables.get(TableRef(Family.IPV4, TABLE))
    return len(table.sets[name].elements) if table else 0


async def word(cluster: MemoryCluster) -> Acknowledgement | None:
    lease = await cluster.exists(LEASES, lease_name("n1"), NAMESPACE)
    return read_lease(msgspec.convert(lease, Lease)) if lease else None


async def acknowledged(cluster: MemoryCluster, name: str = "web") -> bool:
    ack = await word(cluster)
    subject = msgspec.convert(await cluster.client.get(SERVICES, name, "default"), Service)
    slices = [msgspec.convert(i, EndpointSlice) for i in (await cluster.client.list(ENDPOINTSLICES, "default")).items]
    return ack is not None and ack.covers(subject, [piece for piece in slices if piece.service == name])


async def test_services_are_programmed_and_acknowledged(cluster: MemoryCluster) -> None:
    kernel = FakeKernel()
    async with proxy(cluster, kernel) as agent:
        assert elements(kernel, "endpoints") == 2
        assert elements(kernel, "hairpin") == 1
        await cluster.until(lambda: acknowledged(cluster))
        ack = await word(cluster)
        assert ack is not None
        assert (ack.node, ack.mode) == ("n1", "nftables")
        assert ack.at is not None
        await endpoints(cluster, 1, 2, 3)
        assert not await acknowledged(cluster)
        await cluster.until(lambda: acknowledged(cluster))
        assert elements(kernel, "endpoints") == 3
        text = await agent.metrics_text()
        assert 'kubeproxy_sync_full_proxy_rules_duration_seconds_count{ip_family="IPv4"} 1\n' in text, "only at the start"
        assert "podwire_proxy_commands_total 0\n" not in text
    assert elements(kernel, "endpoints") == 3, "rules stay when the proxy ends"


class Withholding(ApiClient):
    """Gets no list of one kind for as long as `given` is not set. `asked`: for which kinds it was asked."""

    def __init__(self, url: str, kind: Resource) -> None:
        super().__init__(url)
        self._kind, self.given = kind, asyncio.Event()
        self.asked: set[Resource] = set()

    async def list_raw(self, resource: Resource, namespace: str | None = None, **options: Any) -> RawList:
        self.asked.add(resource)
        if resource is self._kind:
            await self.given.wait()
        return await super().list_raw(resource, namespace, **options)


@pytest.mark.parametrize("kind", [SERVICES, ENDPOINTSLICES], ids=lambda kind: kind.plural)
async def test_until_services_and_slices_were_listed_what_an_earlier_life_made_stays(
    cluster: MemoryCluster, kind: Resource
) -> None:
    """Half of what there is would take away what serves."""
    kernel = FakeKernel()
    async with proxy(cluster, kernel):
        pass
    held = kernel.host.ruleset
    await endpoints(cluster, 1)
    client = Withholding(cluster.url, kind)
    starting = asyncio.create_task(_start(cluster, kernel, client))
    await cluster.until(lambda: client.asked >= {SERVICES, ENDPOINTSLICES, NODES})
    await acknowledged(cluster)  # the server has had time to answer all but that
    assert kernel.host.ruleset == held
    assert not starting.done()
    client.given.set()
    await starting
    assert elements(kernel, "endpoints") == 1


async def test_no_word_is_given_for_what_the_kernel_lost(cluster: MemoryCluster) -> None:
    kernel = FakeKernel()
    async with proxy(cluster, kernel) as agent:
        await cluster.until(lambda: acknowledged(cluster))
        # Nothing told the proxy of it: only reading back shows it.
        kernel.host.ruleset = kernel.host.ruleset.apply(Batch((DelTable(TableRef(Family.IPV4, TABLE)),)))
        await endpoints(cluster, 1)
        await cluster.until(lambda: acknowledged(cluster))
        assert elements(kernel, "endpoints") == 1
        assert "podwire_proxy_repairs_total 1" in await agent.metrics_text()


async def test_what_others_remove_is_put_back_and_counted(cluster: MemoryCluster, caplog: pytest.LogCaptureFixture) -> None:
    kernel = FakeKernel()
    async with proxy(cluster, kernel) as agent:
        kernel.drift(CommitNft(Batch((DelTable(TableRef(Family.IPV4, TABLE)),))))
        await cluster.until(lambda: elements(kernel, "endpoints") == 2)
        assert 'podwire_proxy_repaired_total{kind="rules"} 1' in await agent.metrics_text()
        assert "rules were not as left (element in table podwire)" in caplog.text
        assert caplog.text.count("put them back: table ip podwire\n") == 1


async def test_a_slice_that_is_given_to_another_service_serves_the_first_no_more(cluster: MemoryCluster) -> None:
    kernel = FakeKernel()
    async with proxy(cluster, kernel):
        for owner, endpoints_held in (("nobody", 0), ("web", 2)):
            labels = {"metadata": {"labels": {"kubernetes.io/service-name": owner}}}
            await cluster.client.patch(ENDPOINTSLICES, "web-1", labels, "default")
            await cluster.until(lambda wanted=endpoints_held: elements(kernel, "endpoints") == wanted)  # type: ignore[misc]  # bound now
        await cluster.client.delete(ENDPOINTSLICES, "web-1", "default")
        await cluster.until(lambda: elements(kernel, "endpoints") == 0)


async def test_an_outage_of_the_api_server(cluster: MemoryCluster) -> None:
    kernel = FakeKernel()
    async with proxy(cluster, kernel) as agent:
        async with cluster.outage():
            assert elements(kernel, "endpoints") == 2
            assert agent.health().healthy
        await endpoints(cluster, 1)
        await cluster.until(lambda: elements(kernel, "endpoints") == 1)
        await cluster.until(lambda: acknowledged(cluster))


async def test_a_round_that_hangs_is_unhealthy_after_a_while(cluster: MemoryCluster) -> None:
    class Hanging(FakeKernel):
        gate: asyncio.Event | None = None

        async def apply(self, plan: Plan) -> Applied:
            if self.gate is not None:
                await self.gate.wait()
            return await super().apply(plan)

    kernel = Hanging()
    async with proxy(cluster, kernel, tolerated_seconds=0.3) as agent:
        assert agent.health().healthy
        kernel.gate = asyncio.Event()
        await endpoints(cluster, 1)
        await cluster.until(lambda: not agent.health().healthy)
        assert "changes have waited for" in agent.health().why
        kernel.gate.set()
        await cluster.until(lambda: agent.health().healthy and elements(kernel, "endpoints") == 1)


async def test_stale_connections_that_could_not_be_forgotten_are_tried_again(cluster: MemoryCluster) -> None:
    """kubernetes issue 112604. Nothing else happens meanwhile that would wake the proxy."""

    class Interrupted(FakeKernel):
        refusals = 0

        async def forget_flows(self, wanted: Callable[[Flow], bool], ns: NetnsName = HOST) -> int:
            if self.refusals:
                self.refusals -= 1
                raise KernelError("conntrack: interrupted", 4)
            return await super().forget_flows(wanted, ns)

    kernel = Interrupted()
    await service(cluster, "dns", clusterIP="10.96.0.53", ports=[{"name": "http", "port": 53, "protocol": "UDP"}])
    async with proxy(cluster, kernel) as agent:
        client, server, pod = (ipaddress.ip_address(text) for text in ("10.244.1.9", "10.96.0.53", "10.244.1.2"))
        flow = Flow(FlowTuple(client, server, 17, 4000, 53), FlowTuple(pod, client, 17, 8080, 4000))
        await cluster.until(lambda: elements(kernel, "pools") == 3)
        kernel.host.flows.append(flow)
        kernel.refusals = 2
        await cluster.client.delete(SERVICES, "dns", "default")
        await cluster.until(lambda: not kernel.host.flows)
        assert kernel.refusals == 0
        await cluster.until(lambda: not agent.health().why)


async def test_at_the_start_udp_clients_of_node_ports_that_went_are_forgotten(cluster: MemoryCluster) -> None:
    kernel = FakeKernel()
    spec = {"type": "NodePort", "ports": [{"name": "http", "port": 53, "nodePort": 30053, "protocol": "UDP"}]}
    await service(cluster, "dns", **spec)
    async with proxy(cluster, kernel):
        pass
    await cluster.client.delete(SERVICES, "dns", "default")
    client, node, pod = (ipaddress.ip_address(text) for text in ("198.18.1.1", "198.18.0.11", "10.244.1.2"))
    gone = Flow(FlowTuple(client, node, 17, 4000, 30053), FlowTuple(pod, client, 17, 8080, 4000))
    others = Flow(FlowTuple(client, node, 17, 4000, 30054), FlowTuple(pod, client, 17, 8080, 4000))
    kernel.host.flows += [gone, others]
    async with proxy(cluster, kernel):
        await cluster.until(lambda: kernel.host.flows == [others])


async def test_what_reading_back_puts_back_is_said_and_counted(
    cluster: MemoryCluster, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where everything is compared instead: for many Services at once, and in modes that cannot look at single ones."""
    monkeypatch.setattr("podwire.agent.proxymodes.nft._FEW", 0)
    kernel = FakeKernel()
    async with proxy(cluster, kernel) as agent:
        await cluster.until(lambda: acknowledged(cluster))
        kernel.host.ruleset = kernel.host.ruleset.apply(Batch((DelTable(TableRef(Family.IPV6, TABLE)),)))
        await endpoints(cluster, 1)
        await cluster.until(lambda: acknowledged(cluster))
        assert TableRef(Family.IPV6, TABLE) in kernel.host.ruleset.tables
        assert "podwire_proxy_repairs_total 1" in await agent.metrics_text()
        assert "rules were not as left" in caplog.text


async def test_health_and_metrics_over_http(cluster: MemoryCluster) -> None:
    kernel = FakeKernel()
    async with proxy(cluster, kernel) as agent:
        metrics = agent.metrics
        health = health_app(agent.health, lambda: metrics_now(agent), metrics.healthz, metrics.livez)
        more = metrics_app(lambda: agent.mode, agent.metrics_text, agent.endpoints_text, lambda: agent.health().healthy)
        async with TestClient(TestServer(health)) as probes, TestClient(TestServer(more)) as numbers:
            answer = await probes.get("/healthz")
            assert (answer.status, (await answer.json())["nodeEligible"]) == (200, True)
            taint = {"key": "ToBeDeletedByClusterAutoscaler", "effect": "NoSchedule"}
            await cluster.client.patch(NODES, "n1", {"spec": {"taints": [taint]}})
            await cluster.until(lambda: not agent.health().eligible)
            assert (await probes.get("/healthz")).status == 503
            assert (await probes.get("/livez")).status == 200
            assert await (await numbers.get("/proxyMode")).text() == "nftables"
            text = await (await numbers.get("/metrics")).text()
            assert 'kubeproxy_proxy_healthz_total{code="503"} 1' in text
            assert 'podwire_proxy_info{mode="nftables"} 1' in text
            assert 'podwire_service_connections_total{namespace="default",service="web",port_name="http"' in text
            assert "kubeproxy_sync_proxy_rules_duration_seconds_count" in text
            assert f'rest_client_requests_total{{code="200",host="{cluster.url.removeprefix("http://")}",method="GET"}}' in text
            assert "process_cpu_seconds_total " in text
            assert 'endpoint="10.244.1.2:8080"} 0' in await (await numbers.get("/metrics/endpoints")).text()


async def test_failures_are_counted_from_before_the_first_success(cluster: MemoryCluster) -> None:
    """A counter that appears with its first failure never rises."""
    kernel, config = FakeKernel(), parse_proxy_config("mode: iptables", "test")[0]
    async with ApiClient(cluster.url) as client:
        make = partial(NftRules, kernel)
        agent = ProxyAgent(ProxyEnvironment(node="n1", config=config, kernel=kernel, client=client, make_rules=make))
        text = await agent.metrics_text()
    for what in ("restore", "partial_restore"):
        assert f'kubeproxy_sync_proxy_rules_iptables_{what}_failures_total{{ip_family="IPv4"}} 0\n' in text


def metrics_now(agent: ProxyAgent) -> Any:
    return agent._env.clock()


async def test_a_refused_transaction_is_unhealthy_only_after_a_while(cluster: MemoryCluster) -> None:
    kernel = FakeKernel()
    async with proxy(cluster, kernel) as agent:
        kernel.fail_next("CommitNft", times=3)
        await endpoints(cluster, 1)
        await cluster.until(lambda: "services" in agent.health().why)
        assert agent.health().healthy
        await cluster.until(lambda: elements(kernel, "endpoints") == 1)
        text = await agent.metrics_text()
        assert 'kubeproxy_sync_proxy_rules_nftables_sync_failures_total{ip_family="IPv4"} 3' in text
        assert "podwire_proxy_repairs_total 0" in text, "it undid nobody's doing"


async def test_health_check_node_ports(cluster: MemoryCluster) -> None:
    kernel = FakeKernel()
    primary = ipaddress.ip_address("198.18.0.11")
    await service(cluster, "shop", **LOCAL)
    await endpoints(cluster, 1, 2, service="shop")
    async with proxy(cluster, kernel) as agent, aiohttp.ClientSession() as session:
        await cluster.until(lambda: agent.health_check_ports)
        assert agent.health_check_ports == {30999: ObjectKey("default", "shop")}

        async def ask() -> tuple[int, Any]:
            async with session.get(f"http://127.0.0.1:{kernel.listening[primary, 30999]}/") as response:
                assert response.headers["X-Load-Balancing-Endpoint-Weight"] in ("0", "1")
                return response.status, await response.json()

        assert await ask() == (
            200,
            {"service": {"namespace": "default", "name": "shop"}, "localEndpoints": 1, "serviceProxyHealthy": True},
        )

        async def gone() -> bool:
            return (await ask())[0] == 503

        await endpoints(cluster, 2, service="shop")
        await cluster.until(gone)
        await cluster.client.delete(SERVICES, "shop", "default")
        await cluster.until(lambda: not agent.health_check_ports)
        with pytest.raises(aiohttp.ClientError):
            await ask()


async def test_health_check_ports_follow_the_addresses_that_serve_node_ports(cluster: MemoryCluster) -> None:
    kernel = FakeKernel()
    await service(cluster, "shop", **LOCAL)
    eth1 = AddLink(Link("eth1", Dummy()))
    first, second, other = (ipaddress.ip_interface(f"{ip}/24") for ip in ("192.0.2.7", "192.0.2.8", "198.51.100.7"))
    assert (await kernel.apply((eth1, *(AddAddress(Address("eth1", ip)) for ip in (first, other))))).ok

    def listens() -> dict[str, int]:
        return {str(address): actual for (address, _), actual in kernel.listening.items()}

    async with proxy(cluster, kernel, "{mode: iptables, nodePortAddresses: [192.0.2.0/24]}") as agent:
        await cluster.until(lambda: agent.health_check_ports)
        assert listens().keys() == {"192.0.2.7"}
        before = listens()["192.0.2.7"]
        kernel.drift(AddAddress(Address("eth1", second)))
        await cluster.until(lambda: "192.0.2.8" in listens())
        assert listens()["192.0.2.7"] == before, "the one that stays goes on listening"
        kernel.drift(DelAddress(Address("eth1", first)), DelAddress(Address("eth1", second)))
        await cluster.until(lambda: not agent.health_check_ports)
        with pytest.raises(ConnectionRefusedError):
            await asyncio.open_connection("127.0.0.1", before)


async def test_a_proxy_waits_for_its_node(cluster: MemoryCluster, caplog: pytest.LogCaptureFixture) -> None:
    await cluster.client.delete(NODES, "n1")
    kernel = FakeKernel()
    starting = asyncio.create_task(_start(cluster, kernel))
    await cluster.until(lambda: "node n1 does not exist" in caplog.text)
    assert elements(kernel, "services") == 0
    await cluster.client.create(NODES, {"apiVersion": "v1", "kind": "Node", "metadata": {"name": "n1"}})
    await cluster.until(lambda: "node n1 has no InternalIP or ExternalIP (yet)" in caplog.text)
    await say_addresses(cluster, "n1", InternalIP="198.18.0.11")
    await starting
    assert elements(kernel, "services") == 2  # web, and kubernetes
    assert "going on" not in caplog.text


async def _start(cluster: MemoryCluster, kernel: FakeKernel, client: ApiClient | None = None) -> None:
    async with proxy(cluster, kernel, client=client):
        pass


async def say_addresses(cluster: MemoryCluster, node: str, **addresses: str) -> None:
    listed = [{"type": kind, "address": address} for kind, address in addresses.items()]
    await cluster.client.patch(NODES, node, {"status": {"addresses": listed}}, subresource="status")


async def test_without_its_node_a_proxy_goes_on_after_a_while_and_says_so(
    cluster: MemoryCluster, caplog: pytest.LogCaptureFixture
) -> None:
    """As kube-proxy does. What needs the Node follows when it is there."""
    await cluster.client.delete(NODES, "n1")
    await service(cluster, "open", type="NodePort", ports=[{"name": "http", "port": 80, "nodePort": 30080}])
    kernel = FakeKernel()
    async with proxy(cluster, kernel, node_patience_seconds=0.05) as agent:
        warnings = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
        assert warnings[0].startswith("node n1 does not exist (yet); is it this host's? --hostname-override says which: ")
        assert warnings[1].endswith("whose own addresses are taken to be none (see --bind-address)")
        assert elements(kernel, "services") == 3
        assert agent.health().healthy
        assert agent.health().why == "node: node n1 does not exist"
        await cluster.client.create(NODES, {"apiVersion": "v1", "kind": "Node", "metadata": {"name": "n1"}})
        await say_addresses(cluster, "n1", ExternalIP="198.18.0.11")
        await cluster.until(lambda: elements(kernel, "services") == 4)  # its node port
        assert agent.health().why == ""
        await cluster.client.delete(NODES, "n1")
        await cluster.until(lambda: agent.health().why == "node: node n1 does not exist")
        assert elements(kernel, "services") == 4, "a Node that goes is no reason to serve less"


async def test_a_node_without_addresses_is_used_as_far_as_it_is_known(
    cluster: MemoryCluster, caplog: pytest.LogCaptureFixture
) -> None:
    """A cloud's controller gives them, and may itself need Services for that."""
    await cluster.client.delete(NODES, "n1")
    bare = {"apiVersion": "v1", "kind": "Node", "metadata": {"name": "n1"}, "spec": {"podCIDR": "10.244.1.0/24"}}
    await cluster.client.create(NODES, bare)
    kernel = FakeKernel()
    async with proxy(cluster, kernel, node_patience_seconds=0.05) as agent:
        assert agent.health().why == "node: node n1 has no InternalIP or ExternalIP"
        assert "pods of this node are not known" not in caplog.text, "its podCIDR tells"
        assert elements(kernel, "services") == 2
        await say_addresses(cluster, "n1", InternalIP="198.18.0.11")
        await cluster.until(lambda: not agent.health().why)


async def test_pod_cidrs_that_tell_which_pods_are_here_are_waited_for(
    cluster: MemoryCluster, caplog: pytest.LogCaptureFixture
) -> None:
    await cluster.client.delete(NODES, "n1")
    await cluster.client.create(NODES, {"apiVersion": "v1", "kind": "Node", "metadata": {"name": "n1"}})
    await say_addresses(cluster, "n1", InternalIP="198.18.0.11")
    kernel = FakeKernel()
    starting = asyncio.create_task(_start_by_node_cidr(cluster, kernel))
    await cluster.until(lambda: "node n1 has no podCIDR, which detectLocalMode NodeCIDR needs (yet)" in caplog.text)
    await cluster.client.patch(NODES, "n1", {"spec": {"podCIDR": "10.244.1.0/24"}})
    await starting
    assert "going on" not in caplog.text


async def _start_by_node_cidr(cluster: MemoryCluster, kernel: FakeKernel) -> None:
    async with proxy(cluster, kernel, "detectLocalMode: NodeCIDR", node_patience_seconds=0.05):
        pass


async def test_the_node_that_could_be_meant_is_named(cluster: MemoryCluster) -> None:
    here = [ipaddress.ip_address("198.18.0.11"), ipaddress.ip_address("2001:db8:1::b")]
    assert await likely_names(cluster.client, here) == "n1 has this host's address 198.18.0.11"
    assert await likely_names(cluster.client, here[1:]) == "there are n1"
    for number in range(2, 8):
        await cluster.client.create(NODES, {"apiVersion": "v1", "kind": "Node", "metadata": {"name": f"n{number}"}})
    assert await likely_names(cluster.client, here[1:]) == "there are n1, n2, n3, n4, n5, …"
    await say_addresses(cluster, "n7", Hostname="n7", InternalIP="2001:0db8:0001::000b")
    assert await likely_names(cluster.client, here[1:]) == "n7 has this host's address 2001:0db8:0001::000b"
    async with cluster.outage():
        assert await likely_names(cluster.client, here) == ""


@pytest.mark.parametrize(
    ("override", "host", "name"),
    [("", "Worker-1", "worker-1"), (" N1.example.com\n", "x", "n1.example.com"), ("n2", "Bad_Name", "n2")],
)
def test_the_nodes_name_is_trimmed_and_in_lower_case(override: str, host: str, name: str) -> None:
    assert node_name(override, host) == name


@pytest.mark.parametrize(
    ("override", "host", "said"),
    [
        ("", "my_host", "this host's name 'my_host' is no name that a Node can have: give the Node's by --hostname-override"),
        ("", "", "this host's name '' is no name"),
        (" ", "n1", "--hostname-override ' ' is no name that a Node can have"),
        ("a,b", "n1", "--hostname-override 'a,b' is no name"),
        ("n" * 254, "n1", "is no name"),
    ],
)
def test_what_can_be_no_nodes_name_is_refused(override: str, host: str, said: str) -> None:
    with pytest.raises(InvalidInput) as caught:
        node_name(override, host)
    assert said in str(caught.value)
