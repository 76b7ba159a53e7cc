"""The node's own network: peers, Services, and what others break."""

import asyncio
import errno
import ipaddress
from functools import partial
from typing import Any

import pytest

from podwire.model.addr import Family
from podwire.model.ids import pod_netns
from podwire.model.kernelstate import Route
from podwire.model.meta import Json
from podwire.model.nft import Afterwards, Batch, DelTable
from podwire.model.ops import CommitNft, DelAddress, DelLink, DelNeighbour, DelRoute, Op, SetRoute, SetSysctl
from podwire.model.resources import ENDPOINTSLICES, LEASES, NODES, SERVICECIDRS, SERVICES
from podwire.plan.naming import host_veth
from podwire.testing.fakekernel import FakeKernel
from podwire.testing.memorycluster import CLUSTER, DUAL, Machine, MemoryCluster, condition

TABLE = "podwire"


async def routes(machine: Machine[FakeKernel]) -> dict[str, str]:
    return {str(route.dst): route.dev for route in (await machine.kernel.observe()).routes}


async def test_nodes_that_come_and_go_are_reached_and_forgotten(cluster: MemoryCluster) -> None:
    one, two = cluster.machine(1), cluster.machine(2)
    async with cluster.agent(one), cluster.agent(two):
        await cluster.until(lambda: _has(routes(one), "10.244.2.0/24"))
        assert await routes(one) == {"10.244.2.0/24": "flannel.1", "fd00:10:244:2::/64": "flannel-v6.1"}
        state = await one.kernel.observe()
        assert {str(entry.dst) for entry in state.fdb} == {"198.18.0.12", "2001:db8:1::12"}
        assert {str(n.ip) for n in state.neighbours} == {"10.244.2.0", "fd00:10:244:2::"}
        await cluster.until(lambda: _has(routes(two), "10.244.1.0/24"))
    async with cluster.agent(one):
        await cluster.client.delete(NODES, "n2")
        await cluster.until(lambda: _empty(routes(one)))
        state = await one.kernel.observe()
        assert (state.fdb, state.neighbours) == (frozenset(), frozenset())


async def test_a_node_deleted_while_no_agent_ran_is_forgotten_by_the_next(cluster: MemoryCluster) -> None:
    one, two = cluster.machine(1), cluster.machine(2)
    async with cluster.agent(one), cluster.agent(two):
        await cluster.until(lambda: _has(routes(one), "10.244.2.0/24"))
    await cluster.client.delete(NODES, "n2")
    async with cluster.agent(one):
        assert await routes(one) == {}


async def test_a_peer_that_the_kernel_refuses_is_programmed_later(cluster: MemoryCluster) -> None:
    one, two = cluster.machine(1, (Family.IPV4,)), cluster.machine(2, (Family.IPV4,))
    async with cluster.agent(one):
        one.kernel.fail_next("SetRoute", errno.ENOBUFS, times=2)
        async with cluster.agent(two):
            await cluster.until(lambda: _has(routes(one), "10.244.2.0/24"))


@pytest.mark.parametrize("what", ["route", "neighbour", "address", "bridge", "tunnel", "veth", "changed route"])
async def test_what_someone_else_breaks_is_put_back_within_a_second(cluster: MemoryCluster, what: str) -> None:
    one, two = cluster.machine(1), cluster.machine(2)
    async with cluster.agent(one) as agent, cluster.agent(two):
        pod = await cluster.create_pod("web", "n1")
        await cluster.until_running("web")
        await cluster.until(lambda: _has(routes(one), "10.244.2.0/24"))
        whole = _content(one)
        state = await one.kernel.observe()
        route = next(r for r in state.routes if r.dst.version == 4)
        broken: dict[str, Any] = {
            "route": DelRoute(route),
            "neighbour": DelNeighbour(next(iter(state.neighbours))),
            "address": DelAddress(next(a for a in state.addresses if str(a.interface) == "10.244.1.1/24")),
            "bridge": DelLink("cni0"),
            "tunnel": DelLink("flannel.1"),
            "veth": DelLink(host_veth(pod["metadata"]["uid"])),
            "changed route": SetRoute(Route(route.dst, dev="cni0")),
        }
        one.kernel.drift(broken[what])
        assert _content(one) != whole
        async with asyncio.timeout(1.5):  # a second, and something for a busy test machine
            await cluster.until(lambda: _content(one) == whole)
        assert agent.status().repairs >= 1


async def test_rules_that_someone_flushes_come_back(cluster: MemoryCluster) -> None:
    machine = cluster.machine(1, (Family.IPV4,))
    async with cluster.agent(machine) as agent:
        whole = await machine.kernel.observe_nft(TABLE)
        assert whole.tables
        tables = tuple(DelTable(table) for table in whole.tables)
        machine.kernel.drift(CommitNft(Batch(tables)))
        assert not (await machine.kernel.observe_nft(TABLE)).tables
        await cluster.until(lambda: _same_rules(machine, whole))
        assert agent.status().degraded == {}


async def test_where_cluster_ips_come_from_is_followed(cluster: MemoryCluster) -> None:
    machine = cluster.machine(1, service_route=True)
    default = {"10.96.0.0/12": "cni0", "fd00:10:96::/112": "cni0"}
    async with cluster.agent(machine):
        assert await routes(machine) == default
        await cluster.client.create(SERVICECIDRS, {"metadata": {"name": "more"}, "spec": {"cidrs": ["10.112.0.0/24"]}})
        await cluster.until(lambda: _has(routes(machine), "10.112.0.0/24"))
        await cluster.until(lambda: _range_is_closed(machine, "10.112.0.0/24"))
        machine.kernel.fail_next("SetRoute", errno.ENOBUFS, times=2)
        await cluster.client.create(SERVICECIDRS, {"metadata": {"name": "third"}, "spec": {"cidrs": ["10.113.0.0/24"]}})
        await cluster.until(lambda: _has(routes(machine), "10.113.0.0/24"))
    machine.kernel.applied.clear()
    async with cluster.agent(machine) as agent:
        assert not [op for op in machine.kernel.applied if isinstance(op, DelRoute)], "not even for a moment"
        assert set(await routes(machine)) == {*default, "10.112.0.0/24", "10.113.0.0/24"}
        assert await _range_is_closed(machine, "10.112.0.0/24")
        assert agent.status().commits == 0, "all was there already"
        for name in ("more", "third"):
            await cluster.client.patch(SERVICECIDRS, name, {"metadata": {"finalizers": None}})
            await cluster.client.delete(SERVICECIDRS, name)
        await cluster.until(lambda: _are(routes(machine), default))
        await cluster.until(lambda: _range_is_open(machine, "10.112.0.0/24"))


async def test_a_service_is_programmed_and_follows_its_endpoints(cluster: MemoryCluster) -> None:
    machine = cluster.machine(1, (Family.IPV4,))
    async with cluster.agent(machine) as agent:
        await create_service(cluster, "web", "10.96.0.50")
        await create_slice(cluster, "web", "10.244.1.9")
        await cluster.until(lambda: _rules_name(machine, "10.244.1.9"))
        assert await _rules_name(machine, "10.96.0.50")
        before = agent.status().commits
        await cluster.client.patch(ENDPOINTSLICES, "web-1", {"endpoints": [{"addresses": ["10.244.1.7"]}]}, "default")
        await cluster.until(lambda: _rules_name(machine, "10.244.1.7"))
        assert not await _rules_name(machine, "10.244.1.9")
        assert agent.status().commits == before + 1
        await cluster.client.delete(SERVICES, "web", "default")
        await cluster.until(lambda: _no_rules_name(machine, "10.96.0.50"))


async def test_a_new_agent_leaves_the_rules_alone(cluster: MemoryCluster) -> None:
    machine = cluster.machine(1, (Family.IPV4,))
    ports = [{"name": "app", "image": "web", "ports": [{"containerPort": 80, "hostPort": 8080}]}]
    async with cluster.agent(machine):
        await create_service(cluster, "web", "10.96.0.50")
        await create_slice(cluster, "web", "10.244.1.9")
        await cluster.create_pod("front", "n1", containers=ports)
        front = await cluster.until_running("front")
        for address in ("10.244.1.9", front["status"]["podIP"]):
            await cluster.until(partial(_rules_name, machine, address))
    rules = await machine.kernel.observe_nft(TABLE)
    machine.kernel.applied.clear()
    async with cluster.agent(machine):
        assert [op for op in machine.kernel.applied if not isinstance(op, SetSysctl) and not _sweeps(op)] == []
        assert await machine.kernel.observe_nft(TABLE) == rules


def _sweeps(op: Op) -> bool:
    """Whether it takes away no more than packets may have left."""
    return isinstance(op, CommitNft) and all(isinstance(command, Afterwards) for command in op.batch.commands)


async def test_a_refused_transaction_is_planned_again_in_full(cluster: MemoryCluster) -> None:
    machine = cluster.machine(1, (Family.IPV4,))
    async with cluster.agent(machine) as agent:
        machine.kernel.fail_next("CommitNft", errno.ENOBUFS)
        await create_service(cluster, "web", "10.96.0.50")
        await create_slice(cluster, "web", "10.244.1.9")
        await cluster.until(lambda: _rules_name(machine, "10.244.1.9"))
        await cluster.until(lambda: not agent.status().degraded)


async def test_a_switch_that_the_machine_lacks_is_told_and_the_node_is_ready(cluster: MemoryCluster) -> None:
    machine = cluster.machine(1, (Family.IPV4,))
    async with cluster.agent(machine, subnets=False) as agent:
        await cluster.until(lambda: cluster.exists(NODES, "n1"))
        await machine.kernel.apply((SetSysctl("net/bridge/bridge-nf-call-iptables", "1"),))
        machine.kernel.fail_next("SetSysctl", errno.ENOENT, message="there is no such switch", times=2)
        await cluster.give_subnets(machine)
        await asyncio.wait_for(agent.ready(), 5)
        assert list(agent.status().degraded.values()) == ["there is no such switch"]


async def test_without_netfilter_on_bridges_pods_are_routed(cluster: MemoryCluster) -> None:
    machine = cluster.machine(1)
    machine.kernel.fail_next("SetSysctl", errno.ENOENT, message="br_netfilter is not loaded", times=2)
    async with cluster.agent(machine) as agent:
        assert agent.status().routed_pods
        assert agent.status().degraded == {}
        pod = await cluster.create_pod("web", "n1")
        await cluster.until_running("web")
        inside = machine.kernel.space(pod_netns(pod["metadata"]["uid"])).state()
        held = {str(a.interface) for a in inside.addresses if a.dev == "eth0" and not a.interface.is_link_local}
        assert held == {"10.244.1.2/32", "fd00:10:244:1::2/128"}
        assert all(route.onlink for route in inside.routes)
        assert inside.sysctls == {"net/ipv6/conf/eth0/accept_redirects": "0"}


async def test_the_truth_answers_a_verdict_of_unknown(cluster: MemoryCluster) -> None:
    """The node life-cycle controller marks a node whose heartbeats were late; the agent, alive, says so."""
    machine = cluster.machine(1)
    async with cluster.agent(machine):
        await cluster.until(lambda: _ready_is(cluster, "True"))
        unknown = {"status": {"conditions": [{"type": "Ready", "status": "Unknown", "reason": "NodeStatusUnknown"}]}}
        await cluster.client.patch(NODES, "n1", unknown, subresource="status")
        await cluster.until(lambda: _ready_is(cluster, "True"))


async def test_the_lease_is_renewed_and_made_anew(cluster: MemoryCluster) -> None:
    machine = cluster.machine(1, heartbeat_seconds=0.05)
    async with cluster.agent(machine):
        first = await cluster.until(lambda: cluster.exists(LEASES, "n1", "kube-node-lease"))
        await cluster.until(lambda: _lease_changed(cluster, first))
        await cluster.client.delete(LEASES, "n1", "kube-node-lease")
        await cluster.until(lambda: cluster.exists(LEASES, "n1", "kube-node-lease"))


async def test_a_node_taken_out_of_the_cluster_stays_out_until_it_is_put_back(cluster: MemoryCluster) -> None:
    machine = cluster.machine(1, heartbeat_seconds=0.05)
    async with cluster.agent(machine):
        node = await cluster.client.get(NODES, "n1")
        await cluster.client.delete(NODES, "n1")
        await cluster.client.delete(LEASES, "n1", "kube-node-lease")
        await asyncio.sleep(0.2)  # some heartbeats' time
        assert await cluster.exists(NODES, "n1") is None
        assert await cluster.exists(LEASES, "n1", "kube-node-lease") is None
        meta = {key: node["metadata"][key] for key in ("name", "labels", "annotations")}
        await cluster.client.create(NODES, {"metadata": meta, "spec": {"podCIDR": "10.244.1.0/24"}})
        await cluster.until(lambda: _ready_is(cluster, "True"))
        await cluster.until(lambda: cluster.exists(LEASES, "n1", "kube-node-lease"))


async def test_what_runs_goes_on_without_an_api_server_and_catches_up_later(cluster: MemoryCluster) -> None:
    machine = cluster.machine(1, heartbeat_seconds=0.05)
    async with cluster.agent(machine) as agent:
        created = await cluster.create_pod("web", "n1")
        await cluster.until_running("web")
        uid = created["metadata"]["uid"]
        async with cluster.outage():
            whole = _content(machine)
            machine.kernel.drift(DelLink(host_veth(uid)))
            await cluster.until(lambda: _content(machine) == whole)  # repair needs no API
            machine.runtime.finish(uid, "Failed")
        await cluster.until(lambda: _phase_is(cluster, "web", "Failed"))
        await create_service(cluster, "web", "10.96.0.50")
        await create_slice(cluster, "web", "10.244.1.9")
        await cluster.until(lambda: _rules_name(machine, "10.96.0.50"))
        assert agent.status().ready


async def test_a_node_without_subnets_waits_and_says_so(cluster: MemoryCluster) -> None:
    machine = cluster.machine(1)
    async with cluster.agent(machine, subnets=False) as agent:
        await cluster.until(lambda: _says(cluster, "no podCIDR"))
        assert not agent.status().ready
        await cluster.give_subnets(machine)
        await asyncio.wait_for(agent.ready(), 5)


async def test_a_packet_finds_its_way_between_pods_of_two_nodes(cluster: MemoryCluster) -> None:
    """Walked by hand over what the fake kernels hold: pod → bridge → tunnel → the other node's bridge → pod."""
    machines = cluster.machine(1), cluster.machine(2)
    async with cluster.agent(machines[0]), cluster.agent(machines[1]):
        one = await cluster.create_pod("one", "n1")
        two = await cluster.create_pod("two", "n2")
        await cluster.until_running("one")
        ips = [ipaddress.ip_address(entry["ip"]) for entry in (await cluster.until_running("two"))["status"]["podIPs"]]
        await cluster.until(lambda: _has(routes(machines[0]), "10.244.2.0/24"))
        inside = machines[0].kernel.space(pod_netns(one["metadata"]["uid"])).state()
        here, there = await machines[0].kernel.observe(), await machines[1].kernel.observe()
        target = machines[1].kernel.space(pod_netns(two["metadata"]["uid"])).state()
        for ip in ips:
            assert ip in CLUSTER[DUAL[ip.version == 6]]
            gateway = next(r.via for r in inside.routes if r.dst.version == ip.version)
            assert gateway in [a.interface.ip for a in here.addresses if a.dev == "cni0"]
            route = next(r for r in here.routes if ip in r.dst)
            mac = next(n.mac for n in here.neighbours if (n.dev, n.ip) == (route.dev, route.via))
            outer = next(e.dst for e in here.fdb if (e.dev, e.mac) == (route.dev, mac))
            assert outer in machines[1].config.node_ips
            assert there.links[route.dev].mac == mac
            final = next(n for n in there.neighbours if n.ip == ip)
            assert (final.dev, final.mac) == ("cni0", target.links["eth0"].mac)
            assert there.links[host_veth(two["metadata"]["uid"])].master == "cni0"


async def create_service(cluster: MemoryCluster, name: str, address: str) -> None:
    port = {"name": "http", "port": 80, "targetPort": 8080, "protocol": "TCP"}
    meta = {"name": name, "namespace": "default"}
    await cluster.client.create(SERVICES, {"metadata": meta, "spec": {"clusterIP": address, "ports": [port]}})


async def create_slice(cluster: MemoryCluster, service: str, *addresses: str) -> None:
    meta = {"name": f"{service}-1", "namespace": "default", "labels": {"kubernetes.io/service-name": service}}
    await cluster.client.create(
        ENDPOINTSLICES,
        {
            "metadata": meta,
            "addressType": "IPv4",
            "endpoints": [{"addresses": [address]} for address in addresses],
            "ports": [{"name": "http", "port": 8080, "protocol": "TCP"}],
        },
    )


def _content(machine: Machine[FakeKernel]) -> tuple[Any, ...]:
    """What the node's namespace holds of ours, without what the kernel chooses."""
    state = machine.kernel.host.state()
    links = {(link.name, link.up, link.mtu, link.master) for link in state.links.values()}
    addresses = {a for a in state.addresses if not a.interface.is_link_local}
    return links, addresses, state.routes, state.neighbours, state.fdb


async def _has(found: Any, key: str) -> bool:
    return key in await found


async def _empty(found: Any) -> bool:
    return not await found


async def _same_rules(machine: Machine[FakeKernel], rules: Any) -> bool:
    return bool(await machine.kernel.observe_nft(TABLE) == rules)


async def _rules_name(machine: Machine[FakeKernel], address: str) -> bool:
    """Whether an element of our tables holds the address, in its key or in its data."""
    packed = ipaddress.ip_address(address).packed
    rules = await machine.kernel.observe_nft(TABLE)
    elements = [e for table in rules.tables.values() for state in table.sets.values() for e in state.elements.items()]
    return any(packed in key or (isinstance(data, bytes) and packed in data) for key, data in elements)


async def _are(found: Any, wanted: dict[str, str]) -> bool:
    return bool(await found == wanted)


async def _range_is_closed(machine: Machine[FakeKernel], network: str) -> bool:
    """Whether rules speak of the range: packets to its unused addresses are dropped."""
    packed = ipaddress.ip_network(network).network_address.packed
    return repr(packed) in repr((await machine.kernel.observe_nft(TABLE)).tables)


async def _range_is_open(machine: Machine[FakeKernel], network: str) -> bool:
    return not await _range_is_closed(machine, network)


async def _no_rules_name(machine: Machine[FakeKernel], address: str) -> bool:
    return not await _rules_name(machine, address)


async def _says(cluster: MemoryCluster, words: str) -> bool:
    node = await cluster.exists(NODES, "n1")
    return node is not None and words in str(node.get("status", {}).get("conditions"))


async def _phase_is(cluster: MemoryCluster, name: str, phase: str) -> bool:
    return bool((await cluster.pod(name))["status"]["phase"] == phase)


async def _ready_is(cluster: MemoryCluster, status: str) -> bool:
    node = await cluster.exists(NODES, "n1")
    return node is not None and condition(node, "Ready") == status


async def _lease_changed(cluster: MemoryCluster, first: Json) -> bool:
    lease = await cluster.client.get(LEASES, "n1", "kube-node-lease")
    return bool(lease["spec"]["renewTime"] != first["spec"]["renewTime"])
