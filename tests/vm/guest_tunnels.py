"""Back ends whose devices this machine's kernel lacks, run inside the virtual machine by test_tunnels_vm.py."""

import asyncio
import ipaddress
from contextlib import AsyncExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from overlayrig import OverlayHost, carries, config_text, overlay_hosts, until

from podwire.agent.overlayd.agent import OverlayAgent
from podwire.kernel.linux import LinuxKernel
from podwire.model.addr import Family
from podwire.model.kernelstate import Link, Wireguard
from podwire.model.ops import ChangeLink, DelLink, DelWireguardPeer, SetWireguardPeer

pytestmark = pytest.mark.kernel

DUAL = (Family.IPV4, Family.IPV6)
PSK = "cHJlc2hhcmVkLXByZXNoYXJlZC1wcmVzaGFyZWQtMTI="
BACKENDS: dict[str, tuple[dict[str, Any], tuple[Family, ...], int]] = {
    "ipip": ({"Type": "ipip"}, (Family.IPV4,), 1480),
    "ipip-direct": ({"Type": "ipip", "DirectRouting": True}, (Family.IPV4,), 1480),
    "wireguard": ({"Type": "wireguard", "PSK": PSK, "PersistentKeepaliveInterval": 25}, DUAL, 1420),
    "wireguard-auto": ({"Type": "wireguard", "Mode": "auto", "ListenPort": 4500}, DUAL, 1420),
    "wireguard-ipv4": ({"Type": "wireguard", "Mode": "ipv4"}, DUAL, 1420),
    "wireguard-ipv6": ({"Type": "wireguard", "Mode": "ipv6"}, DUAL, 1420),
}
UNDERLAYS = {"wireguard-ipv4": (Family.IPV4,), "wireguard-ipv6": (Family.IPV6,)}
"""Where the hosts have one family, and pods nevertheless both."""
SLOW = 60.0


async def two_hosts(
    stack: AsyncExitStack, folder: Path, config: str, underlay: tuple[Family, ...] = DUAL
) -> tuple[list[OverlayHost], list[OverlayAgent]]:
    hosts = await stack.enter_async_context(overlay_hosts(folder, config, families=underlay))
    agents = [await stack.enter_async_context(host.running()) for host in hosts]
    await until(lambda: all(agent.status().peers == 1 and agent.idle for agent in agents), SLOW)
    return hosts, agents


@pytest.mark.parametrize("name", BACKENDS)
async def test_a_back_end_carries_tcp_and_udp_between_pods(tmp_path: Path, name: str) -> None:
    backend, families, mtu = BACKENDS[name]
    async with AsyncExitStack() as stack:
        (one, two), _ = await two_hosts(stack, tmp_path, config_text(backend, families), UNDERLAYS.get(name, DUAL))
        assert one.mtu == mtu
        await one.add_pod()
        await two.add_pod()
        for family in families:
            await carries(one, two, family)
        if backend["Type"] == "wireguard":
            assert (one.folder / "wgkey").stat().st_mode & 0o777 == 0o600


async def test_wireguard_is_put_back(tmp_path: Path) -> None:
    """The device by notification; peers, of which the kernel tells nobody, by looking (an audit would take five minutes)."""
    backend, families, _ = BACKENDS["wireguard"]
    async with AsyncExitStack() as stack:
        (one, two), (agent, _) = await two_hosts(stack, tmp_path, config_text(backend, families))
        await one.add_pod()
        await two.add_pod()
        stranger = LinuxKernel(one.netns)
        stack.push_async_callback(stranger.close)
        whole = await stranger.observe()
        (peer,) = (peer for peer in whole.wireguard if peer.dev == "flannel-wg")
        for damage in (
            (DelLink("flannel-wg"),),
            (DelWireguardPeer(peer),),
            (SetWireguardPeer(replace(peer, allowed=(ipaddress.ip_network("10.99.0.0/16"),))),),
            (DelWireguardPeer(peer), ChangeLink(Link("flannel-wg", Wireguard(7, PSK), mtu=1300, alias="podwire"))),
        ):
            before = agent.status().repaired
            assert (await stranger.apply(damage)).ok
            await until(partial(_repaired, agent, before), SLOW)
            await until(lambda: _same(stranger, whole.wireguard, whole.links["flannel-wg"]), SLOW)
        for family in DUAL:
            await carries(one, two, family)


def _repaired(agent: OverlayAgent, before: object) -> bool:
    return agent.status().repaired != before


async def _same(kernel: LinuxKernel, peers: object, link: Link) -> bool:
    await asyncio.sleep(0)
    state = await kernel.observe()
    return state.wireguard == peers and state.links.get("flannel-wg") == link
