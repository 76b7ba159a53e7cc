"""Tunnel devices under the kernel port's contract: the fake and Linux. IPIP and WireGuard run where the kernel has them
(`make test-vm`); the fake always."""

import base64
import errno
import ipaddress
from collections.abc import AsyncIterator
from dataclasses import replace

import pytest
import pytest_asyncio

from podwire.kernel.features import Feature, probe_features
from podwire.kernel.linux import LinuxKernel
from podwire.kernel.port import Kernel
from podwire.model.kernelstate import Address, Bridge, Ipip, Link, LinkKind, Route, Tun, Vxlan, Wireguard, WireguardPeer
from podwire.model.ops import (
    AddAddress,
    AddLink,
    ChangeLink,
    DelLink,
    DelWireguardPeer,
    Op,
    SetRoute,
    SetWireguardPeer,
)
from podwire.testing.fakekernel import FakeKernel

net = ipaddress.ip_network
LOCAL = ipaddress.ip_address("192.0.2.1")
KEYS = [base64.b64encode(bytes([number * 8, *range(30), 0x40])).decode() for number in range(4)]
"""With the three bits set that the kernel sets in a private key."""
KINDS: dict[str, LinkKind] = {
    "gbp": Vxlan(7, 8472, LOCAL, "br0", gbp=True),
    "tun": Tun(),
    "ipip": Ipip(LOCAL),
    "wireguard": Wireguard(51820, KEYS[0]),
}
_NEEDED = {"ipip": Feature.IPIP, "wireguard": Feature.WIREGUARD, "tun": Feature.TUN, "gbp": Feature.VXLAN}


@pytest_asyncio.fixture(params=["fake", pytest.param("linux", marks=pytest.mark.kernel)])
async def kernel(request: pytest.FixtureRequest) -> AsyncIterator[Kernel]:
    """With a bridge that is up, for a VXLAN to lie upon. Linux without the device in question is the fake once more: what this
    machine lacks, `make test-vm` has."""
    wanted = request.node.callspec.params.get("name", "wireguard")
    lacks = request.param == "linux" and _NEEDED[wanted] not in probe_features().present
    made: Kernel = FakeKernel() if request.param == "fake" or lacks else LinuxKernel(request.getfixturevalue("netns"))
    try:
        await ok(made, AddLink(Link("br0", Bridge(), mtu=1500)))
        yield made
    finally:
        await made.close()


async def ok(kernel: Kernel, *ops: Op) -> None:
    applied = await kernel.apply(ops)
    assert applied.failures == ()


@pytest.mark.parametrize("name", KINDS)
async def test_a_tunnel_device_is_observed_as_made(kernel: Kernel, name: str) -> None:
    link = Link("t0", KINDS[name], mtu=1300, alias="podwire")
    await ok(kernel, AddLink(link))
    seen = (await kernel.observe()).links["t0"]
    assert replace(seen, mac=None) == replace(link, master="", hairpin=False)
    await ok(kernel, ChangeLink(replace(link, mtu=1200)))
    assert (await kernel.observe()).links["t0"].mtu == 1200
    applied = await kernel.apply((AddLink(link),))
    assert [failure.errno for failure in applied.failures] == [errno.EEXIST]
    assert (await kernel.observe()).links["t0"].mtu == 1200
    await ok(kernel, DelLink("t0"))
    assert "t0" not in (await kernel.observe()).links


@pytest.mark.parametrize("name", KINDS)
async def test_routes_go_through_it(kernel: Kernel, name: str) -> None:
    own = Address("t0", ipaddress.ip_interface("10.5.1.0/32"))
    plain = Route(net("10.5.0.0/16"), dev="t0")
    through = Route(net("10.6.0.0/24"), dev="t0", via=ipaddress.ip_address("192.0.2.9"), onlink=True)
    await ok(kernel, AddLink(Link("t0", KINDS[name], mtu=1300)), AddAddress(own), SetRoute(plain), SetRoute(through))
    state = await kernel.observe()
    assert own in state.addresses
    assert state.routes == {plain, through}


def peer(key: str, *allowed: str, port: int = 51820) -> WireguardPeer:
    networks = tuple(net(text) for text in allowed)
    return WireguardPeer("wg0", key, networks, endpoint=(ipaddress.ip_address("192.0.2.2"), port), keepalive=25, psk=KEYS[3])


async def seen(kernel: Kernel) -> dict[str, tuple[str, ...]]:
    peers = (await kernel.observe()).wireguard
    assert all(p.endpoint is None and p.keepalive == 25 and p.psk == KEYS[3] for p in peers)
    return {p.public_key: tuple(map(str, p.allowed)) for p in peers}


async def test_wireguard_peers(kernel: Kernel) -> None:
    """A network belongs to the peer that was given it last; removing who is not there is done."""
    await ok(kernel, AddLink(Link("wg0", Wireguard(51820, KEYS[0]))))
    await ok(
        kernel, SetWireguardPeer(peer(KEYS[1], "10.5.1.0/24", "fd05::/64")), SetWireguardPeer(peer(KEYS[2], "10.5.2.0/24"))
    )
    assert await seen(kernel) == {KEYS[1]: ("10.5.1.0/24", "fd05::/64"), KEYS[2]: ("10.5.2.0/24",)}
    await ok(kernel, SetWireguardPeer(peer(KEYS[2], "10.5.1.0/24", port=9)))
    assert await seen(kernel) == {KEYS[1]: ("fd05::/64",), KEYS[2]: ("10.5.1.0/24",)}
    await ok(kernel, ChangeLink(Link("wg0", Wireguard(7, KEYS[1]))))
    state = await kernel.observe()
    assert state.links["wg0"].kind == Wireguard(7, KEYS[1])
    gone = DelWireguardPeer(peer(KEYS[2]))
    await ok(kernel, gone, gone)
    await ok(kernel, DelLink("wg0"), gone)
    assert await seen(kernel) == {}


async def test_a_peer_of_no_wireguard_device_is_refused(kernel: Kernel) -> None:
    applied = await kernel.apply((SetWireguardPeer(replace(peer(KEYS[1]), dev="br0")),))
    assert [failure.errno for failure in applied.failures] == [errno.EOPNOTSUPP]
