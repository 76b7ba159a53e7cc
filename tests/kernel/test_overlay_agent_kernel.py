"""An overlay agent on a host that was there before it: masquerade, forwarding, take-over from flannel, restarts, repair."""

import asyncio
import ipaddress
import json
import shutil
from contextlib import AsyncExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from echoes import tcp_call, tcp_echo
from overlayrig import OverlayHost, carries, config_text, overlay_hosts, subnets_of, until

from podwire.agent.overlayd.agent import OverlayAgent
from podwire.agent.overlayd.rules import CHAIN, commands_in
from podwire.kernel.features import Feature, probe_features
from podwire.kernel.linux import LinuxKernel
from podwire.model.addr import Family
from podwire.model.errors import Unsupported
from podwire.model.kernelstate import Address, Device, FdbEntry, Link, Neighbour, Route, Tun, Vxlan
from podwire.model.nft import Batch, DelTable, TableRef
from podwire.model.ops import AddAddress, AddLink, ChangeLink, CommitNft, DelLink, Op, SetFdb, SetNeighbour, SetRoute
from podwire.plan.ipmasq import TABLE
from podwire.testing.fakeetcd import FakeEtcdClient

pytestmark = [pytest.mark.kernel, pytest.mark.needs("VXLAN devices", "bridge devices", "IPv6", "nftables")]

NEEDS_TUN = pytest.mark.needs("TUN devices")

DUAL = (Family.IPV4, Family.IPV6)
VXLAN = config_text({"Type": "vxlan"}, DUAL)


async def joined(
    stack: AsyncExitStack, folder: Path, config: str = VXLAN, *, count: int = 2, **options: Any
) -> tuple[list[OverlayHost], list[OverlayAgent]]:
    """Two hosts with agents and pods; more of `count` are without."""
    hosts = await stack.enter_async_context(overlay_hosts(folder, config, count))
    agents = [await stack.enter_async_context(host.running(**options)) for host in hosts[:2]]
    await until(lambda: all(agent.status().peers == 1 and agent.idle for agent in agents))
    for host in hosts[:2]:
        await host.add_pod()
    return hosts, agents


async def stranger_on(stack: AsyncExitStack, host: OverlayHost) -> LinuxKernel:
    kernel = LinuxKernel(host.netns)
    stack.push_async_callback(kernel.close)
    return kernel


@pytest.mark.parametrize("family", DUAL)
async def test_masquerade(tmp_path: Path, family: Family) -> None:
    """To the outside with the host's address, between pods with one's own; put back when somebody flushes it."""
    async with AsyncExitStack() as stack:
        (one, two, outside), (agent, _) = await joined(stack, tmp_path, count=3, masquerade=True)
        here = ipaddress.ip_address("192.0.2.1" if family is Family.IPV4 else "2001:db8::1")
        there = ipaddress.ip_address("192.0.2.3" if family is Family.IPV4 else "2001:db8::3")
        stack.enter_context(tcp_echo(outside.netns, there))
        stack.enter_context(tcp_echo(two.pod, two.pod_address(family)))
        assert await asyncio.to_thread(tcp_call, one.pod, there) == str(here)
        assert await asyncio.to_thread(tcp_call, one.pod, two.pod_address(family)) == str(one.pod_address(family))
        assert one.subnet_env["FLANNEL_IPMASQ"] == "true"
        stranger = await stranger_on(stack, one)
        assert (await stranger.apply((CommitNft(Batch((DelTable(TableRef(family, TABLE)),))),))).ok
        await until(lambda: agent.status().repaired.get("rules") == 1)
        assert await asyncio.to_thread(tcp_call, one.pod, there) == str(here)


async def test_masquerade_is_taken_away_again(tmp_path: Path) -> None:
    async with AsyncExitStack() as stack:
        (host,) = await stack.enter_async_context(overlay_hosts(tmp_path, VXLAN, 1))
        for masquerade in (True, False):
            async with host.running(masquerade=masquerade):
                observed = await host.kernel.observe_nft(TABLE)
                assert any(table.chains for table in observed.tables.values()) is masquerade


@pytest.mark.skipif(shutil.which("iptables") is None, reason="iptables is not installed")
async def test_forwarding_is_accepted_where_iptables_drops_it(tmp_path: Path) -> None:
    """Docker sets the policy of FORWARD to DROP."""
    async with AsyncExitStack() as stack:
        (one, two), agents = await joined(stack, tmp_path, forward_rules=True, resync=0.2)
        for host in (one, two):
            run = commands_in(host.netns)
            await until(partial(_has_jump, host))
            assert (await run(("iptables", "-P", "FORWARD", "DROP"), "")).status == 0
        await carries(one, two, Family.IPV4)
        run = commands_in(one.netns)
        assert (await run(("iptables", "-F"), "")).status == 0
        await until(lambda: bool(agents[0].status().repaired.get("rules")))
        await carries(one, two, Family.IPV4)
        listed = (await run(("iptables", "-S", CHAIN), "")).out
        assert listed.count("10.5.0.0/16") == 2


async def _has_jump(host: OverlayHost) -> bool:
    return f"-j {CHAIN}" in (await commands_in(host.netns)(("iptables", "-S", "FORWARD"), "")).out


async def test_a_host_that_ran_flannel_is_taken_over(tmp_path: Path) -> None:
    """Its device with other settings is made anew, its routes become ours, the lease is kept."""
    async with AsyncExitStack() as stack:
        one, two = await stack.enter_async_context(overlay_hosts(tmp_path, VXLAN))
        flannel = await stranger_on(stack, one)
        old = Vxlan(1, 4789, ipaddress.ip_address("192.0.2.1"), "eth0")
        route = Route(
            ipaddress.ip_network("10.5.99.0/24"),
            dev="flannel.1",
            via=ipaddress.ip_address("10.5.99.0"),
            onlink=True,
            protocol=3,
        )
        assert (await flannel.apply((AddLink(Link("flannel.1", old)), SetRoute(route)))).ok
        value = json.dumps({"PublicIP": "192.0.2.1", "PublicIPv6": "2001:db8::1", "BackendType": "vxlan", "Unknown": 1})
        await FakeEtcdClient(one.etcd).put("/coreos.com/network/subnets/10.5.7.0-24&fd05:0:0:7::-64", value.encode())
        agents = [await stack.enter_async_context(host.running()) for host in (one, two)]
        await until(lambda: all(agent.status().peers == 1 and agent.idle for agent in agents))
        assert [str(subnet) for subnet in subnets_of(one)] == ["10.5.7.0/24", "fd05:0:0:7::/64"]
        kind = (await flannel.observe()).links["flannel.1"].kind
        assert isinstance(kind, Vxlan)
        assert kind.port == 8472
        for host in (one, two):
            await host.add_pod()
        for family in DUAL:
            await carries(one, two, family)


async def test_what_flannel_left_of_hosts_that_are_gone_goes_with_its_device_kept(tmp_path: Path) -> None:
    """flanneld never removes the routes of hosts that left while it was down. A stranger's tunnel is left alone."""
    async with AsyncExitStack() as stack:
        (host,) = await stack.enter_async_context(overlay_hosts(tmp_path, VXLAN, 1))
        flannel = await stranger_on(stack, host)
        local = ipaddress.ip_address("192.0.2.1")
        gone = ipaddress.ip_network("10.5.99.0/24")
        left = [
            Route(gone, dev=name, via=gone.network_address, onlink=True, metric=metric, protocol=3)
            for name, metric in (("flannel.1", 0), ("theirs", 50))
        ]
        devices = (
            AddLink(Link("flannel.1", Vxlan(1, 8472, local, "eth0"))),
            AddLink(Link("theirs", Vxlan(9, 4789, local, "eth0"))),
        )
        entries = (
            SetNeighbour(Neighbour("flannel.1", gone.network_address, "02:00:00:00:00:01")),
            SetFdb(FdbEntry("flannel.1", "02:00:00:00:00:01", ipaddress.ip_address("192.0.2.99"))),
        )
        assert (await flannel.apply((*devices, *entries, *map(SetRoute, left)))).ok
        async with host.running():
            state = await flannel.observe()
            assert {(str(route.dst), route.dev) for route in state.routes} == {("10.5.99.0/24", "theirs")}
            assert (state.fdb, {n for n in state.neighbours if n.dev == "flannel.1"}) == (frozenset(), set())
            assert state.links["flannel.1"].owned


async def test_an_agent_that_starts_again_touches_nothing(tmp_path: Path) -> None:
    async with AsyncExitStack() as stack:
        hosts = await stack.enter_async_context(overlay_hosts(tmp_path, VXLAN))
        one, two = hosts
        async with one.running(masquerade=True) as first, two.running() as second:
            await until(lambda: first.status().peers == second.status().peers == 1 and first.idle)
            before = await one.kernel.observe()
            env = one.subnet_env
        async with one.running(masquerade=True) as again:
            assert again.status().peers == 1
            assert again.status().repaired == {}
            assert one.subnet_env == env
            after = await one.kernel.observe()
            assert (after.links, after.routes, after.neighbours, after.fdb) == (
                before.links,
                before.routes,
                before.neighbours,
                before.fdb,
            )


async def test_direct_routing_on_one_side_only(tmp_path: Path) -> None:
    """Only the sender decides (compat.md D3): one direction is routed, the other tunnelled, and both arrive."""
    async with AsyncExitStack() as stack:
        one, two = await stack.enter_async_context(overlay_hosts(tmp_path, VXLAN))
        first = await stack.enter_async_context(one.running(follows=False))
        direct = config_text({"Type": "vxlan", "DirectRouting": True}, DUAL)
        await FakeEtcdClient(two.etcd).put("/coreos.com/network/config", direct.encode())
        second = await stack.enter_async_context(two.running())
        await until(lambda: first.status().peers == second.status().peers == 1 and first.idle and second.idle)
        ways = [{route.dev for route in (await host.kernel.observe()).routes} for host in (one, two)]
        assert ways == [{"flannel.1", "flannel-v6.1"}, {"eth0"}]
        for host in (one, two):
            await host.add_pod()
        for family in DUAL:
            await carries(one, two, family)


@pytest.mark.parametrize("type_", ["vxlan", pytest.param("udp", marks=NEEDS_TUN)])
async def test_a_removed_device_comes_back_and_carries(tmp_path: Path, type_: str) -> None:
    config = config_text({"Type": type_}, DUAL if type_ == "vxlan" else DUAL[:1])
    async with AsyncExitStack() as stack:
        (one, two), (agent, _) = await joined(stack, tmp_path, config)
        stranger = await stranger_on(stack, one)
        device = "flannel.1" if type_ == "vxlan" else "flannel0"
        assert (await stranger.apply((DelLink(device),))).ok
        async with asyncio.timeout(1.5):  # a second, and something for a machine that does other things
            await until(partial(_is_back, stranger, agent, device))
        await carries(one, two, Family.IPV4)


async def _is_back(kernel: LinuxKernel, agent: OverlayAgent, device: str) -> bool:
    state = await kernel.observe()
    return device in state.links and any(route.dev == device for route in state.routes) and not agent.status().degraded


@NEEDS_TUN
async def test_a_packet_to_nobody_is_refused_by_the_udp_tunnel(tmp_path: Path) -> None:
    async with AsyncExitStack() as stack:
        (one, _), _ = await joined(stack, tmp_path, config_text({"Type": "udp"}, DUAL[:1]))
        with pytest.raises(OSError, match="Network is unreachable"):
            await asyncio.to_thread(tcp_call, one.pod, ipaddress.ip_address("10.5.255.9"))


@pytest.mark.parametrize(("type_", "feature"), [("wireguard", Feature.WIREGUARD), ("ipip", Feature.IPIP)])
async def test_what_the_kernel_lacks_is_named(tmp_path: Path, type_: str, feature: Feature) -> None:
    """Where it does not lack it, the agent begins."""
    config = config_text({"Type": type_}, DUAL[:1])
    async with AsyncExitStack() as stack:
        (host,) = await stack.enter_async_context(overlay_hosts(tmp_path, config, 1))
        if feature in probe_features().present:
            await stack.enter_async_context(host.running())
            return
        with pytest.raises(Unsupported, match=rf"^this machine lacks {feature}: run `sudo modprobe {type_}`"):
            await stack.enter_async_context(host.running())


@NEEDS_TUN
async def test_a_stranger_with_our_tunnels_name_is_replaced(tmp_path: Path) -> None:
    """A TUN device where a VXLAN shall be."""
    async with AsyncExitStack() as stack:
        (host,) = await stack.enter_async_context(overlay_hosts(tmp_path, VXLAN, 1))
        stranger = await stranger_on(stack, host)
        made: tuple[Op, ...] = (AddLink(Link("flannel.1", Tun())),)
        assert (await stranger.apply(made)).ok
        assert not (await stranger.apply(made)).ok  # EEXIST, and not attached to the one that is there
        async with host.running():
            assert isinstance((await stranger.observe()).links["flannel.1"].kind, Vxlan)


async def test_the_underlay_goes_and_comes_back(tmp_path: Path) -> None:
    """A restart of the host's network service: the interface is down for a while, and with it what hung on it is gone."""
    async with AsyncExitStack() as stack:
        (one, two), (agent, _) = await joined(stack, tmp_path, config_text({"Type": "host-gw"}, DUAL))
        stranger = await stranger_on(stack, one)
        uplink = Link("eth0", Device())
        assert (await stranger.apply((ChangeLink(replace(uplink, up=False)),))).ok
        await until(partial(_ways, stranger, 0))
        address = Address("eth0", ipaddress.ip_interface("2001:db8::1/64"))  # the kernel dropped it
        assert (await stranger.apply((ChangeLink(uplink), AddAddress(address)))).ok
        await until(partial(_ways, stranger, 2))
        await until(lambda: not agent.status().degraded)
        for family in DUAL:
            await carries(one, two, family)


async def _ways(kernel: LinuxKernel, count: int) -> bool:
    return len((await kernel.observe()).routes) == count
