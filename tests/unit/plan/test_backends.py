"""Back ends: what a node says of itself, the devices it makes, what it programs for a peer, and whom it objects to.

One network for all: pods 10.5.0.0/16 and fd05::/48; this node 192.0.2.1 on a /24, the near peer .2, the far one 198.51.100.2.
"""

import ipaddress
import json
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest

from podwire.model.errors import InvalidInput
from podwire.model.kernelstate import Ipip, NetState, Route, Tun, Vxlan, Wireguard
from podwire.model.netconf import parse_net_config
from podwire.plan.backends import Backend, UdpTunnel, Underlay, WireguardKeys, make_backend
from podwire.plan.leases import Lease, LeaseAttrs

if TYPE_CHECKING:
    from podwire.model.addr import IPAddress, IPNetwork

net = ipaddress.ip_network
ip = ipaddress.ip_address

OWN = (net("10.5.1.0/24"), net("fd05:0:0:1::/64"))
KEYS = WireguardKeys("cHJpdmF0ZS1wcml2YXRlLXByaXZhdGUtcHJpdmF0ZTE=", "cHVibGljcHVibGljcHVibGljcHVibGljcHVibGljMTI=")
THEIR_KEY = "dGhlaXJrZXl0aGVpcmtleXRoZWlya2V5dGhlaXJrZXk="
UNDERLAY = Underlay(
    device="eth1",
    mtu=1500,
    interfaces=(ipaddress.ip_interface("192.0.2.1/24"), ipaddress.ip_interface("2001:db8::1/64")),
    public=(ip("192.0.2.1"), ip("2001:db8::1")),
)
BEHIND_NAT = Underlay(device="eth1", mtu=1500, interfaces=UNDERLAY.interfaces, public=(ip("203.0.113.9"), ip("2001:db8::1")))


def backend(type_: str, *, dual: bool = False, underlay: Underlay = UNDERLAY, **keys: Any) -> Backend:
    document: dict[str, Any] = {"Network": "10.5.0.0/16", "Backend": {"Type": type_} | keys}
    if dual:
        document |= {"EnableIPv6": True, "IPv6Network": "fd05::/48"}
    return make_backend(parse_net_config(json.dumps(document)), underlay, "n1", KEYS)


def lease(
    type_: str = "vxlan",
    *,
    data: Any = None,
    v6_data: Any = None,
    at: str = "192.0.2.2",
    at6: str = "2001:db8::2",
    dual: bool = False,
) -> Lease:
    subnets: tuple[IPNetwork, ...] = (net("10.5.2.0/24"), net("fd05:0:0:2::/64"))
    attrs = LeaseAttrs(
        public_ip=ipaddress.IPv4Address(at) if at else None,
        public_ipv6=ipaddress.IPv6Address(at6) if at6 else None,
        backend_type=type_,
        backend_data=json.dumps(data) if data else "",
        backend_v6_data=json.dumps(v6_data) if v6_data else "",
    )
    return Lease("n2", subnets if dual else subnets[:1], attrs)


def base(of: Backend, *, dual: bool = False) -> NetState:
    return of.plan_base(OWN if dual else OWN[:1])


def ways(state: NetState) -> set[tuple[str, str, str, bool]]:
    return {(str(r.dst), r.dev, str(r.via or ""), r.onlink) for r in state.routes}


VTEP = {"VNI": 1, "VtepMAC": "02:00:00:00:00:02"}
VTEP6 = {"VNI": 1, "VtepMAC": "02:00:00:00:00:06"}


# --- vxlan ------------------------------------------------------------------------------------------------------------


def test_vxlan_options_reach_the_device() -> None:
    mine = backend("vxlan", VNI=4096, Port=4789, GBP=True, MTU=1400)
    (link,) = base(mine).links.values()
    assert (link.name, link.mtu) == ("flannel.4096", 1350)
    assert link.kind == Vxlan(4096, 4789, UNDERLAY.interfaces[0].ip, "eth1", learning=False, gbp=True)


def test_vxlan_has_a_device_a_family_with_its_own_mtu_and_mac() -> None:
    mine = backend("vxlan", dual=True)
    links = base(mine, dual=True).links
    assert {name: link.mtu for name, link in links.items()} == {"flannel.1": 1450, "flannel-v6.1": 1430}
    assert mine.mtu == 1430
    said = mine.attrs()
    assert json.loads(said.backend_data) == {"VNI": 1, "VtepMAC": links["flannel.1"].mac}
    assert json.loads(said.backend_v6_data) == {"VNI": 1, "VtepMAC": links["flannel-v6.1"].mac}
    assert ": " not in said.backend_data  # flannel cuts the text at `:"`
    assert {str(a.interface) for a in base(mine, dual=True).addresses} == {"10.5.1.0/32", "fd05:0:0:1::/128"}


def test_vxlan_peers() -> None:
    state = backend("vxlan", dual=True).plan_lease(lease(data=VTEP, v6_data=VTEP6, dual=True))
    assert ways(state) == {
        ("10.5.2.0/24", "flannel.1", "10.5.2.0", True),
        ("fd05:0:0:2::/64", "flannel-v6.1", "fd05:0:0:2::", True),
    }
    assert {(e.dev, e.mac, str(e.dst)) for e in state.fdb} == {
        ("flannel.1", VTEP["VtepMAC"], "192.0.2.2"),
        ("flannel-v6.1", VTEP6["VtepMAC"], "2001:db8::2"),
    }


def test_direct_routing_goes_by_the_link() -> None:
    mine = backend("vxlan", DirectRouting=True)
    assert ways(mine.plan_lease(lease(data=VTEP))) == {("10.5.2.0/24", "eth1", "192.0.2.2", False)}
    assert mine.plan_lease(lease(data=VTEP)).fdb == frozenset()
    assert ways(mine.plan_lease(lease(data=VTEP, at="198.51.100.2"))) == {("10.5.2.0/24", "flannel.1", "10.5.2.0", True)}


@pytest.mark.parametrize(
    ("peer", "words"),
    [
        (lease("host-gw"), "its backend is host-gw, not vxlan"),
        (lease(""), "its backend is none"),
        (lease(data={"VNI": 7, "VtepMAC": VTEP["VtepMAC"]}), "its VNI is 7, not 1"),
        (lease(data={"VNI": 1}), "tells no MAC"),
        (lease(), "its VNI is None"),
        (lease(data=VTEP, at=""), "tells no IPv4 address"),
        (lease(data=VTEP, v6_data=VTEP6, dual=True), "this node has no IPv6 subnet"),
    ],
)
def test_objections_of_vxlan(peer: Lease, words: str) -> None:
    mine = backend("vxlan")
    assert words in mine.objection(peer)
    reached = {str(route.dst) for route in mine.plan_lease(peer).routes}
    assert reached == ({"10.5.2.0/24"} if len(peer.subnets) > 1 else set())


# --- without encapsulation --------------------------------------------------------------------------------------------


def test_host_gw_routes_to_neighbours_only() -> None:
    mine = backend("host-gw", dual=True)
    assert mine.mtu == 1500
    assert base(mine, dual=True) == NetState()
    assert ways(mine.plan_lease(lease("host-gw", dual=True))) == {
        ("10.5.2.0/24", "eth1", "192.0.2.2", False),
        ("fd05:0:0:2::/64", "eth1", "2001:db8::2", False),
    }
    far = lease("host-gw", at="198.51.100.2", dual=True)
    assert "198.51.100.2 is not on the link of eth1" in mine.objection(far)
    assert ways(mine.plan_lease(far)) == {("fd05:0:0:2::/64", "eth1", "2001:db8::2", False)}


def test_host_gw_cannot_be_behind_a_nat() -> None:
    with pytest.raises(InvalidInput, match=r"203\.0\.113\.9 is not eth1's own \(192\.0\.2\.1\)"):
        backend("host-gw", underlay=BEHIND_NAT)
    assert str(backend("vxlan", underlay=BEHIND_NAT).attrs().public_ip) == "203.0.113.9"


def test_alloc_programs_nothing() -> None:
    mine = backend("alloc")
    assert (mine.attrs().backend_type, base(mine), mine.plan_lease(lease("alloc"))) == ("alloc", NetState(), NetState())


# --- ipip, udp --------------------------------------------------------------------------------------------------------


def test_ipip() -> None:
    mine = backend("ipip")
    (link,) = base(mine).links.values()
    assert (link.name, link.mtu, link.kind) == ("flannel.ipip", 1480, Ipip(UNDERLAY.interfaces[0].ip))
    assert ways(mine.plan_lease(lease("ipip"))) == {("10.5.2.0/24", "flannel.ipip", "192.0.2.2", True)}
    assert ways(backend("ipip", DirectRouting=True).plan_lease(lease("ipip"))) == {("10.5.2.0/24", "eth1", "192.0.2.2", False)}
    assert "is vxlan, not ipip" in mine.objection(lease("vxlan"))


def test_udp_says_nothing_of_itself_and_takes_any_lease() -> None:
    mine = backend("udp")
    assert isinstance(mine, UdpTunnel)
    assert mine.attrs() == LeaseAttrs(public_ip=ipaddress.IPv4Address("192.0.2.1"))
    state = base(mine)
    (link,) = state.links.values()
    assert (link.name, link.mtu, link.kind) == ("flannel0", 1472, Tun())
    assert state.routes == {Route(net("10.5.0.0/16"), dev="flannel0")}
    assert mine.endpoint(lease("vxlan")) == (net("10.5.2.0/24"), ip("192.0.2.2"))
    assert mine.plan_lease(lease("")) == NetState()


# --- wireguard --------------------------------------------------------------------------------------------------------


def test_wireguard_separate_has_two_devices() -> None:
    mine = backend("wireguard", dual=True, PersistentKeepaliveInterval=25, PSK=THEIR_KEY)
    state = base(mine, dual=True)
    assert {name: link.kind for name, link in state.links.items()} == {
        "flannel-wg": Wireguard(51820, KEYS.private),
        "flannel-wg-v6": Wireguard(51821, KEYS.private),
    }
    assert {link.mtu for link in state.links.values()} == {1420}
    assert ways(state) == {("10.5.0.0/16", "flannel-wg", "", False), ("fd05::/48", "flannel-wg-v6", "", False)}
    assert json.loads(mine.attrs().backend_v6_data) == {"PublicKey": KEYS.public, "Port": 51821}
    peers = {p.dev: p for p in mine.plan_lease(told(dual=True)).wireguard}
    assert peers["flannel-wg"].endpoint == (ip("192.0.2.2"), 51820)
    assert peers["flannel-wg-v6"].endpoint == (ip("2001:db8::2"), 7)
    assert [str(n) for n in peers["flannel-wg-v6"].allowed] == ["fd05:0:0:2::/64"]
    assert (peers["flannel-wg"].keepalive, peers["flannel-wg"].psk) == (25, THEIR_KEY)


def told(*, at: str = "192.0.2.2", at6: str = "2001:db8::2", dual: bool = False) -> Lease:
    """A wireguard node's lease; its IPv4 part as an old flannel writes it, without a port."""
    return lease(
        "wireguard", data={"PublicKey": THEIR_KEY}, v6_data={"PublicKey": THEIR_KEY, "Port": 7}, at=at, at6=at6, dual=dual
    )


@pytest.mark.parametrize(
    ("mode", "peer", "endpoint"),
    [
        ("ipv4", told(dual=True), "192.0.2.2"),
        ("ipv6", told(dual=True), "2001:db8::2"),
        ("auto", told(dual=True, at="8.8.8.8"), "8.8.8.8"),
        ("auto", told(dual=True, at="10.0.0.2", at6="2600::2"), "10.0.0.2"),
        ("auto", told(dual=True, at=""), "2001:db8::2"),
    ],
)
def test_wireguard_with_one_device(mode: str, peer: Lease, endpoint: str) -> None:
    mine = backend("wireguard", dual=True, Mode=mode)
    assert list(base(mine, dual=True).links) == ["flannel-wg"]
    (found,) = mine.plan_lease(peer).wireguard
    assert found.endpoint is not None
    assert str(found.endpoint[0]) == endpoint
    assert [str(n) for n in found.allowed] == ["10.5.2.0/24", "fd05:0:0:2::/64"]


def test_wireguard_prefers_a_public_ipv6_to_a_private_ipv4() -> None:
    addresses: tuple[IPAddress, ...] = (ip("10.0.0.1"), ip("2600::1"))
    public = Underlay(
        device="eth1", mtu=1500, interfaces=tuple(ipaddress.ip_interface(f"{a}/24") for a in addresses), public=addresses
    )
    (found,) = (
        backend("wireguard", dual=True, Mode="auto", underlay=public)
        .plan_lease(told(dual=True, at="10.0.0.2", at6="2600::2"))
        .wireguard
    )
    assert found.endpoint is not None
    assert str(found.endpoint[0]) == "2600::2"


def test_wireguard_keys_are_checked_and_not_shown() -> None:
    with pytest.raises(InvalidInput, match="PSK is no WireGuard key"):
        backend("wireguard", PSK="short")
    assert "no public key" in backend("wireguard").objection(lease("wireguard", data={"PublicKey": "x"}))
    shown = repr(backend("wireguard", PSK=THEIR_KEY)) + repr(base(backend("wireguard"))) + repr(KEYS)
    assert KEYS.private not in shown
    assert THEIR_KEY not in shown


# --- all --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("type_", ["vxlan", "host-gw", "alloc", "ipip", "udp", "wireguard"])
def test_an_underlay_without_the_family_is_refused(type_: str) -> None:
    bare = Underlay(device="eth1", mtu=1500, interfaces=UNDERLAY.interfaces[1:], public=UNDERLAY.public[1:])
    with pytest.raises(InvalidInput, match="interface eth1 has no IPv4 address"):
        backend(type_, underlay=bare)


@pytest.mark.parametrize(("type_", "smallest"), [("vxlan", 1350), ("wireguard", 1360)])
def test_less_than_ipv6_needs_is_refused(type_: str, smallest: int) -> None:
    """The kernel would refuse each IPv6 address on such a device, for as long as the agent tries."""
    assert backend(type_, dual=True, MTU=smallest).mtu == 1280
    assert backend(type_, MTU=smallest - 1)
    with pytest.raises(InvalidInput, match="1279 bytes would be the largest between nodes, and IPv6 needs 1280"):
        backend(type_, dual=True, MTU=smallest - 1)
    with pytest.raises(InvalidInput, match="take an interface with a larger one"):
        backend(type_, dual=True, underlay=replace(UNDERLAY, mtu=smallest - 1))
