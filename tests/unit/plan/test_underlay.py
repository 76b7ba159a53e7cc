"""Which interface carries the overlay: flannel's order, and words that help where nothing fits."""

import ipaddress

import pytest

from podwire.model.addr import Family
from podwire.model.errors import InvalidInput
from podwire.model.kernelstate import Address, Bridge, Device, Link, NetState
from podwire.plan.backends.contract import Underlay
from podwire.plan.underlay import Routing, Wish, choose_underlay

DUAL = (Family.IPV4, Family.IPV6)
NOWHERE = Routing(devices={})
BY_ROUTE = Wish()


def host(*interfaces: tuple[str, str], mtu: int = 1500, down: tuple[str, ...] = ()) -> NetState:
    """(device, address/length) …; `cni0` is ours."""
    names = {name for name, _ in interfaces} | {"lo", "cni0", *down}
    links = {name: Link(name, Device(), mtu=mtu, up=name not in down) for name in names}
    links["cni0"] = Link("cni0", Bridge(), mtu=mtu, alias="podwire")
    return NetState(links=links, addresses=frozenset(Address(name, ipaddress.ip_interface(text)) for name, text in interfaces))


VAGRANT = host(
    ("lo", "127.0.0.1/8"),
    ("eth0", "10.0.2.15/24"),
    ("eth1", "192.168.56.11/24"),
    ("eth1", "fe80::1/64"),
    ("eth1", "2001:db8::11/64"),
    ("cni0", "10.5.1.1/24"),
    ("eth2", "198.51.100.7/24"),
    down=("eth9",),
)


def chosen(
    wish: Wish = BY_ROUTE, routing: Routing = NOWHERE, *, state: NetState = VAGRANT, families: tuple[Family, ...] = DUAL[:1]
) -> tuple[str, list[str]]:
    found = choose_underlay(state, wish, routing, families)
    return found.device, [str(i) for i in found.interfaces]


@pytest.mark.parametrize(
    ("wish", "device"),
    [
        (Wish(names=("eth1",)), "eth1"),
        (Wish(names=("192.168.56.11",)), "eth1"),
        (Wish(names=("nope0", "eth2", "eth1")), "eth2"),
        (Wish(patterns=(r"^192\.168\.",)), "eth1"),
        (Wish(patterns=(r"eth[12]",)), "eth1"),
        (Wish(names=("nope0",), patterns=("eth2",)), "eth2"),
    ],
)
def test_what_the_user_names(wish: Wish, device: str) -> None:
    assert chosen(wish, Routing(devices={Family.IPV4: "eth0"}))[0] == device


def test_the_default_route_decides_otherwise() -> None:
    assert chosen(routing=Routing(devices={Family.IPV4: "eth0"})) == ("eth0", ["10.0.2.15/24"])
    assert chosen(routing=Routing(devices={Family.IPV4: "eth0", Family.IPV6: "eth1"}), families=DUAL) == (
        "eth1",
        ["192.168.56.11/24", "2001:db8::11/64"],
    )


def test_one_address_of_several() -> None:
    state = host(("eth0", "10.0.0.3/32"), ("eth0", "10.0.0.9/24"), ("eth0", "10.0.0.10/24"))
    by_route = Routing(devices={Family.IPV4: "eth0"})
    assert chosen(routing=by_route, state=state)[1] == ["10.0.0.9/24"]  # a lone address is mostly somebody's virtual one
    preferred = Routing(devices={Family.IPV4: "eth0"}, sources=(ipaddress.ip_address("10.0.0.10"),))
    assert chosen(routing=preferred, state=state)[1] == ["10.0.0.10/24"]
    assert chosen(Wish(names=("10.0.0.3",)), state=state)[1] == ["10.0.0.3/32"]


def test_public_addresses_replace_what_is_told_and_nothing_else() -> None:
    wish = Wish(names=("eth1",), public=(ipaddress.ip_address("203.0.113.4"),))
    found = choose_underlay(VAGRANT, wish, NOWHERE, DUAL)
    assert [str(a) for a in found.public] == ["203.0.113.4", "2001:db8::11"]
    assert str(found.local(Family.IPV4)) == "192.168.56.11"


def test_some_back_ends_do_with_one_family() -> None:
    found = choose_underlay(VAGRANT, Wish(names=("eth0",)), NOWHERE, DUAL, all_needed=False)
    assert isinstance(found, Underlay)
    assert found.public == (ipaddress.ip_address("10.0.2.15"),)


@pytest.mark.parametrize(
    ("wish", "families", "words"),
    [
        (Wish(names=("eth9",)), DUAL[:1], "IPv4 address fits --iface eth9; there are eth0 (10.0.2.15/24), eth1 ("),
        (Wish(names=("cni0",)), DUAL[:1], "fits --iface cni0"),
        (Wish(patterns=("wlan",)), DUAL[:1], "fits --iface-regex wlan"),
        (Wish(names=("eth0",)), DUAL, "IPv4 and IPv6 address"),
        (Wish(), DUAL[:1], "fits the default route"),
        (Wish(patterns=("(",)), DUAL[:1], "is no regular expression"),
    ],
)
def test_what_does_not_fit_is_said_with_what_there_is(wish: Wish, families: tuple[Family, ...], words: str) -> None:
    with pytest.raises(InvalidInput) as caught:
        choose_underlay(VAGRANT, wish, NOWHERE, families)
    assert words in str(caught.value)
