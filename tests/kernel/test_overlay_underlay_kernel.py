"""An overlay agent whose interface, or configuration, changes under it: real devices, and packets before and after."""

import asyncio
import ipaddress
import json
from contextlib import AsyncExitStack
from functools import partial
from pathlib import Path

import pytest
from echoes import tcp_call
from overlayrig import NETWORKS, OverlayHost, carries, config_text, overlay_hosts, udp_fits, until

from podwire.agent.overlayd.agent import OverlayAgent
from podwire.kernel.linux import LinuxKernel
from podwire.model.addr import Family, family_of
from podwire.model.kernelstate import Address, Device, Link, Neighbour, Vxlan
from podwire.model.ops import AddAddress, ChangeLink, DelAddress, DelLink, Op, SetNeighbour
from podwire.testing.fakeetcd import FakeEtcdClient

pytestmark = [pytest.mark.kernel, pytest.mark.needs("VXLAN devices", "bridge devices", "IPv6", "nftables")]

DUAL = (Family.IPV4, Family.IPV6)
VXLAN = config_text({"Type": "vxlan"}, DUAL)
CONFIG_KEY = "/coreos.com/network/config"


async def joined(stack: AsyncExitStack, folder: Path) -> tuple[list[OverlayHost], list[OverlayAgent], list[LinuxKernel]]:
    """Two hosts with agents and pods, and a stranger on each."""
    hosts = await stack.enter_async_context(overlay_hosts(folder, VXLAN))
    agents = [await stack.enter_async_context(host.running(blackhole=True)) for host in hosts]
    await until(lambda: all(agent.status().peers == 1 and agent.idle for agent in agents))
    strangers = []
    for host in hosts:
        await host.add_pod()
        strangers.append(LinuxKernel(host.netns))
        stack.push_async_callback(strangers[-1].close)
    return hosts, agents, strangers


@pytest.mark.parametrize("family", DUAL)
async def test_the_host_gets_another_address(tmp_path: Path, family: Family) -> None:
    """The lease goes on under it, the tunnel is made anew, the peers send there; the pods keep their addresses."""
    old, new = ("192.0.2.1/24", "192.0.2.77/24") if family is Family.IPV4 else ("2001:db8::1/64", "2001:db8::77/64")
    moved = ipaddress.ip_interface(new)
    async with AsyncExitStack() as stack:
        (one, two), agents, (here, there) = await joined(stack, tmp_path)
        before = one.subnet_env
        mac = (await here.observe_devices()).links["eth0"].mac
        assert mac is not None
        assert (await there.apply((SetNeighbour(Neighbour("eth0", moved.ip, mac)),))).ok
        ops: tuple[Op, ...] = (
            DelAddress(Address("eth0", ipaddress.ip_interface(old))),
            AddAddress(Address("eth0", moved)),
            SetNeighbour(Neighbour("eth0", ipaddress.ip_interface(old.replace("1/", "2/")).ip, "02:00:00:00:00:02")),
        )
        assert (await here.apply(ops)).ok
        await until(lambda: _tunnels_at(here, moved))
        await until(lambda: _sends_to(there, moved))
        await until(lambda: all(agent.idle and not agent.status().obstacles for agent in agents))
        assert one.subnet_env == before
        for each in DUAL:
            await carries(one, two, each)


async def _tunnels_at(kernel: LinuxKernel, address: ipaddress.IPv4Interface | ipaddress.IPv6Interface) -> bool:
    kinds = [link.kind for link in (await kernel.observe_devices()).links.values()]
    return any(isinstance(kind, Vxlan) and kind.local == address.ip for kind in kinds)


async def _sends_to(kernel: LinuxKernel, address: ipaddress.IPv4Interface | ipaddress.IPv6Interface) -> bool:
    """To that address alone, in its family: no entry of the old one is left."""
    state = await kernel.observe()
    return {entry.dst for entry in state.fdb if family_of(entry.dst) is family_of(address)} == {address.ip}


async def test_the_interface_gets_another_mtu(tmp_path: Path) -> None:
    """Devices and files follow at once. Pods that are there keep theirs and learn of the smaller way as of any other."""
    async with AsyncExitStack() as stack:
        hosts, agents, strangers = await joined(stack, tmp_path)
        for stranger in strangers:
            assert (await stranger.apply((ChangeLink(Link("eth0", Device(), mtu=1400)),))).ok
        await until(lambda: all(host.mtu == 1330 for host in hosts))
        for stranger in strangers:
            links = (await stranger.observe_devices()).links
            assert (links["flannel.1"].mtu, links["flannel-v6.1"].mtu) == (1350, 1330)
        assert all(agent.status().obstacles == () for agent in agents)
        one, two = hosts
        for family, edge in ((Family.IPV4, 1350), (Family.IPV6, 1330)):
            source, target = one.pod_address(family), two.pod_address(family)
            sizes = [await asyncio.to_thread(udp_fits, one.pod, two.pod, source, target, edge + more) for more in (0, 1)]
            assert sizes == [True, False]


async def test_the_interface_vanishes_and_another_comes(tmp_path: Path) -> None:
    """With it the kernel removes the tunnels. Under the same name there is a new one, with a number of its own."""
    async with AsyncExitStack() as stack:
        (one, two), (agent, _), (here, _) = await joined(stack, tmp_path)
        assert (await here.apply((DelLink("eth0"),))).ok
        await until(lambda: "interface" in agent.status().degraded)
        await one.plug()
        await until(lambda: not agent.status().obstacles and agent.idle)
        await until(partial(_whole, here))
        for family in DUAL:
            await carries(one, two, family)


async def _whole(kernel: LinuxKernel) -> bool:
    state = await kernel.observe()
    ways = [route for route in state.routes if not route.blackhole]
    return {"flannel.1", "flannel-v6.1"} <= state.links.keys() and len(ways) == 2 and len(state.fdb) == 2


async def test_another_back_end(tmp_path: Path) -> None:
    """Every host hears of it by itself; nothing of the first one is left, and pods go on."""
    async with AsyncExitStack() as stack:
        (one, two), agents, strangers = await joined(stack, tmp_path)
        etcd = FakeEtcdClient(one.etcd)
        await etcd.put(CONFIG_KEY, config_text({"Type": "host-gw"}, DUAL).encode())
        await until(lambda: all(agent.status().backend == "host-gw" and agent.status().peers == 1 for agent in agents))
        for stranger in strangers:
            await until(lambda s=stranger: _routed(s))  # type: ignore[misc]
        for family in DUAL:
            source, target = one.pod_address(family), two.pod_address(family)
            assert await asyncio.to_thread(udp_fits, one.pod, two.pod, source, target, 1000)
        assert one.mtu == 1500


async def _routed(kernel: LinuxKernel) -> bool:
    state = await kernel.observe()
    ways = {route.dev for route in state.routes if not route.blackhole}
    return ways == {"eth0"} and not any(name.startswith("flannel") for name in state.links)


async def test_a_blackhole_behind_the_pods_bridge(tmp_path: Path) -> None:
    """The pods' device comes first; without it, their network leads nowhere, and not to the default route."""
    async with AsyncExitStack() as stack:
        (one, two), _, (here, _) = await joined(stack, tmp_path)
        for family in DUAL:
            await carries(one, two, family)
        holes = {str(route.dst) for route in (await here.observe()).routes if route.blackhole}
        assert len(holes) == 2
        assert (await here.apply((DelLink("pod0"),))).ok
        assert {str(route.dst) for route in (await here.observe()).routes if route.blackhole} == holes
        for family in DUAL:
            with pytest.raises(OSError, match="Invalid argument"):  # the kernel's word for a blackhole to a process of its own
                await asyncio.to_thread(tcp_call, one.netns, one.pod_address(family))


async def test_a_configuration_that_would_cost_the_subnet_waits(tmp_path: Path) -> None:
    async with AsyncExitStack() as stack:
        (one, two), agents, _ = await joined(stack, tmp_path)
        other = json.dumps(json.loads(VXLAN) | {"Network": "10.9.0.0/16"})
        await FakeEtcdClient(one.etcd).put(CONFIG_KEY, other.encode())
        await until(lambda: all("restart needed" in a.status().degraded.get("configuration", "") for a in agents))
        assert one.subnet_env["FLANNEL_NETWORK"] == NETWORKS[Family.IPV4]
        await carries(one, two, Family.IPV4)
