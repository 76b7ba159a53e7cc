"""An agent whose subnet comes from etcd: set up, cut off, and moved to another subnet, with its pods."""

import asyncio
import ipaddress
from dataclasses import dataclass, field
from ipaddress import IPv4Address
from random import Random

from podwire.agent.nodeoverlay import Overlay
from podwire.agent.subnets.etcd import EtcdSubnets
from podwire.agent.subnets.kube import KubeSubnets
from podwire.client.informer import Informer
from podwire.model.addr import Family
from podwire.model.kernelstate import Address
from podwire.model.netconf import NetConfig, parse_net_config
from podwire.model.objects import Node
from podwire.model.ops import AddAddress
from podwire.model.resources import NODES
from podwire.plan.backends import Backend, Underlay, make_backend
from podwire.plan.leases import LeaseAttrs, encode_attrs
from podwire.testing.fakeetcd import FakeEtcd, FakeEtcdClient, Link
from podwire.testing.fakekernel import FakeKernel
from podwire.testing.memorycluster import Machine, MemoryCluster, condition

PREFIX = "/coreos.com/network"
VXLAN = b'{"Network":"10.244.0.0/16","Backend":{"Type":"vxlan"}}'
HOST_GW = b'{"Network":"10.244.0.0/16","Backend":{"Type":"host-gw"}}'
ONLY_V4 = (Family.IPV4,)


@dataclass
class Site:
    """An etcd, the agents' ways to it, and the last manager of each machine."""

    server: FakeEtcd = field(default_factory=FakeEtcd)
    links: dict[str, Link] = field(default_factory=dict)
    managers: dict[str, EtcdSubnets] = field(default_factory=dict)

    def overlay(self, machine: Machine[FakeKernel], ttl: int = 100) -> Overlay:
        name = machine.config.node_name
        link = self.links.setdefault(name, Link(timeout=0.05, silence=0.05))
        client = FakeEtcdClient(self.server, link)

        def subnets(nodes: Informer[Node]) -> EtcdSubnets:
            self.managers[name] = EtcdSubnets(client, prefix=PREFIX, ttl=ttl, margin=ttl / 2, rng=Random(1))
            return self.managers[name]

        return Overlay(subnets=subnets, backend=lambda config: backend_of(machine, config))


def backend_of(machine: Machine[FakeKernel], config: NetConfig) -> Backend:
    ips = machine.config.node_ips
    underlay = Underlay(device="eth0", mtu=1500, interfaces=tuple(ipaddress.ip_interface(f"{ip}/15") for ip in ips), public=ips)
    return make_backend(config, underlay, machine.config.node_name)


async def on_the_link(cluster: MemoryCluster, index: int) -> Machine[FakeKernel]:
    """A machine whose uplink has its address, so that others on the link can be gateways."""
    machine = cluster.machine(index, ONLY_V4)
    address = ipaddress.ip_interface(f"{machine.config.node_ips[0]}/15")
    assert (await machine.kernel.apply((AddAddress(Address("eth0", address)),))).ok
    return machine


async def ready_site(config: bytes = VXLAN) -> Site:
    site = Site()
    await FakeEtcdClient(site.server).put(f"{PREFIX}/config", config)
    return site


async def routes(machine: Machine[FakeKernel]) -> dict[str, str]:
    """Destination → device and gateway."""
    return {str(r.dst): f"{r.dev} {r.via}" for r in (await machine.kernel.observe()).routes}


def subnet(site: Site, machine: Machine[FakeKernel]) -> str:
    held = site.managers[machine.config.node_name].own.held
    return str(held.subnets[0]) if held else ""


async def test_subnets_and_peers_come_from_etcd(cluster: MemoryCluster) -> None:
    site = await ready_site()
    one, two = cluster.machine(1, ONLY_V4), cluster.machine(2, ONLY_V4)
    async with cluster.agent(one, overlay=site.overlay(one)), cluster.agent(two, overlay=site.overlay(two)):
        theirs = subnet(site, two)
        own = theirs.partition("/")[0]

        async def reached() -> bool:
            return await routes(one) == {theirs: f"flannel.1 {own}"}

        await cluster.until(reached)
        await cluster.create_pod("web", "n1")
        pod = await cluster.until_running("web")
        assert ipaddress.ip_address(pod["status"]["podIP"]) in ipaddress.ip_network(subnet(site, one))


async def test_the_back_end_is_what_the_configuration_says(cluster: MemoryCluster) -> None:
    site = await ready_site(HOST_GW)
    one, two = await on_the_link(cluster, 1), await on_the_link(cluster, 2)
    async with cluster.agent(one, overlay=site.overlay(one)), cluster.agent(two, overlay=site.overlay(two)):

        async def reached() -> bool:
            return (await routes(one)).get(subnet(site, two)) == "eth0 198.18.0.12"

        await cluster.until(reached)
        assert not {link for link in (await one.kernel.observe()).links if link.startswith("flannel")}


async def test_a_node_that_loses_its_subnet_gets_another_and_its_pods_new_addresses(cluster: MemoryCluster) -> None:
    site = await ready_site()
    one, two = cluster.machine(1, ONLY_V4), cluster.machine(2, ONLY_V4)
    async with cluster.agent(one, overlay=site.overlay(one)) as agent, cluster.agent(two, overlay=site.overlay(two)):
        await cluster.create_pod("web", "n1")
        before = await cluster.until_running("web")
        first = subnet(site, one)
        started = list(one.runtime.created)
        thief = LeaseAttrs(public_ip=IPv4Address("198.18.0.99"), backend_type="vxlan", backend_data='{"VNI":1}')
        lost = site.managers["n1"].own.lease
        assert lost is not None
        await FakeEtcdClient(site.server).put(f"{PREFIX}/subnets/{lost.node}", encode_attrs(thief))

        async def moved() -> bool:
            pod = await cluster.pod("web")
            address = ipaddress.ip_address(pod["status"]["podIP"])
            return address not in ipaddress.ip_network(first) and condition(pod, "Ready") == "True"

        await cluster.until(moved)
        await asyncio.wait_for(agent.ready(), 5)
        pod = await cluster.pod("web")
        assert ipaddress.ip_address(pod["status"]["podIP"]) in ipaddress.ip_network(subnet(site, one))
        assert one.runtime.created == started, "the pod itself went on"
        assert pod["metadata"]["uid"] == before["metadata"]["uid"]

        async def followed() -> bool:
            return list(await routes(two)) == [subnet(site, one)]

        await cluster.until(followed)
        assert "subnets" not in agent.status().degraded


async def test_a_node_cut_off_for_longer_than_its_lease_gives_out_no_address_until_it_is_back(cluster: MemoryCluster) -> None:
    site = await ready_site()
    one = cluster.machine(1, ONLY_V4)
    async with cluster.agent(one, overlay=site.overlay(one, ttl=1)) as agent:
        await cluster.create_pod("old", "n1")
        old = await cluster.until_running("old")
        site.links["n1"].up = False
        await cluster.until(lambda: "subnets" in agent.status().degraded)
        assert not agent.status().network_ready
        await cluster.until(lambda: not [key for key in site.server.keys if "/subnets/" in key])
        await cluster.create_pod("new", "n1")
        await cluster.until(lambda: _refused(cluster))
        assert (await cluster.pod("old"))["status"] == old["status"], "what runs goes on"
        first = site.managers["n1"].own.lease
        site.links["n1"].up = True
        new = await cluster.until_running("new")
        assert site.managers["n1"].own.held == first
        assert ipaddress.ip_address(new["status"]["podIP"]) in ipaddress.ip_network(subnet(site, one))
        assert agent.status().network_ready


async def _refused(cluster: MemoryCluster) -> bool:
    events = await cluster.client.request("GET", "/api/v1/namespaces/default/events")
    return b"does not hold its subnet" in events


async def test_annotations_of_another_back_end_are_written_for_the_peers(cluster: MemoryCluster) -> None:
    """The kube manager with host-gw: peers read the type and the address, and route without a tunnel."""
    config = parse_net_config(HOST_GW, leased=False)

    def overlay(machine: Machine[FakeKernel]) -> Overlay:
        def subnets(nodes: Informer[Node]) -> KubeSubnets:
            return KubeSubnets(nodes, machine.config.node_name, config, client=cluster.client)

        return Overlay(subnets=subnets, backend=lambda net: backend_of(machine, net))

    one, two = await on_the_link(cluster, 1), await on_the_link(cluster, 2)
    async with (
        cluster.agent(one, overlay=overlay(one), subnets=False) as first,
        cluster.agent(two, overlay=overlay(two), subnets=False),
    ):
        await cluster.give_subnets(one)
        await cluster.give_subnets(two)
        await asyncio.wait_for(first.ready(), 10)

        async def reached() -> bool:
            return (await routes(one)).get("10.244.2.0/24") == "eth0 198.18.0.12"

        await cluster.until(reached)
        told = (await cluster.client.get(NODES, "n2"))["metadata"]["annotations"]
        assert told == {
            "flannel.alpha.coreos.com/kube-subnet-manager": "true",
            "flannel.alpha.coreos.com/backend-type": "host-gw",
            "flannel.alpha.coreos.com/backend-data": "null",
            "flannel.alpha.coreos.com/public-ip": "198.18.0.12",
        }


async def test_a_node_that_was_deleted_and_is_back_with_another_subnet(cluster: MemoryCluster) -> None:
    """Its old one is somebody else's by then. While its Node is not there, it gives out no address."""
    one, two = cluster.machine(1, ONLY_V4), cluster.machine(2, ONLY_V4)
    async with cluster.agent(one) as agent:
        await cluster.create_pod("web", "n1")
        await cluster.until_running("web")
        await cluster.client.delete(NODES, "n1")
        await cluster.until(lambda: "deleted" in agent.status().degraded.get("subnets", ""))
        await cluster.create_pod("new", "n1")
        await cluster.until(lambda: _refused(cluster))
        async with cluster.agent(two, subnets=False):
            await cluster.until(lambda: cluster.exists(NODES, "n2"))
            await cluster.client.patch(NODES, "n2", {"spec": {"podCIDR": "10.244.1.0/24", "podCIDRs": ["10.244.1.0/24"]}})
            again = {"podCIDR": "10.244.9.0/24", "podCIDRs": ["10.244.9.0/24"]}
            await cluster.client.create(NODES, {"apiVersion": "v1", "kind": "Node", "metadata": {"name": "n1"}, "spec": again})

            async def moved() -> bool:
                pods = [await cluster.pod(name) for name in ("web", "new")]
                return all(pod["status"].get("podIP", "").startswith("10.244.9.") for pod in pods)

            await cluster.until(moved)

            async def reached() -> bool:
                return await routes(two) == {"10.244.9.0/24": "flannel.1 10.244.9.0"}

            await cluster.until(reached)  # the new Node says how it is reached, too
            assert list(await routes(one)) == ["10.244.1.0/24"]
