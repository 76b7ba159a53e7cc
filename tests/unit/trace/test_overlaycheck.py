"""Ways looked up in observed state: what is whole is found whole, and each missing or wrong piece is named."""

import base64
import ipaddress
from collections.abc import Callable
from dataclasses import replace

import plannodes
import pytest

from podwire.model.addr import Family
from podwire.model.ids import HOST
from podwire.model.kernelstate import Device, FdbEntry, Link, NetState
from podwire.model.netconf import parse_net_config
from podwire.plan.backends import Underlay, WireguardKeys, make_backend
from podwire.plan.leases import Lease, lease_of_node
from podwire.plan.node import plan_node
from podwire.plan.states import union
from podwire.trace.overlaycheck import (
    NodeView,
    PodAddress,
    check_devices,
    check_mapping,
    check_own,
    check_uniqueness,
    check_ways,
)

NODES = (1, 2, 3)


def leases() -> dict[str, Lease]:
    found = [lease_of_node(plannodes.node(index)) for index in NODES]
    return {lease.node: lease for lease in found if lease is not None}


def view(index: int) -> NodeView:
    peers = [peer for other in NODES if other != index for peer in plannodes.peers(other)]
    state = plan_node(plannodes.network(index), peers, [])[HOST]
    return NodeView(f"n{index}", frozenset(plannodes.node_ip(index, family) for family in Family), state)


def views() -> dict[str, NodeView]:
    return {f"n{index}": view(index) for index in NODES}


def test_what_is_planned_is_found_whole() -> None:
    found = [*check_ways(leases(), views()), *(f for v in views().values() for f in check_own(v, leases()[v.name]))]
    assert [finding for finding in found if not finding.ok] == []
    assert len(found) == 3 * 2 * 2 + 3 * 2
    assert found[0].evidence == (
        "route 10.244.2.0/24 via 10.244.2.0 dev flannel.1, neighbour "
        f"{plannodes.peers(2)[0].mac}, forwarded to 198.18.0.12, received by flannel.1 with {plannodes.peers(2)[0].mac}"
    )


DAMAGES: list[tuple[str, Callable[[NetState], NetState]]] = [
    ("there is no route to 10.244.2.1", lambda s: replace(s, routes=frozenset())),
    ("10.244.2.0 has no neighbour entry on flannel.1", lambda s: replace(s, neighbours=frozenset())),
    ("has no forwarding entry on flannel.1", lambda s: replace(s, fdb=frozenset())),
    (
        "198.18.0.99 is none of the node's addresses",
        lambda s: replace(s, fdb=frozenset(FdbEntry(e.dev, e.mac, ipaddress.ip_address("198.18.0.99")) for e in s.fdb)),
    ),
    (
        "device flannel.1 is not there, or down",
        lambda s: replace(s, links={**s.links, "flannel.1": replace(s.links["flannel.1"], up=False)}),
    ),
]


@pytest.mark.parametrize(("words", "damage"), DAMAGES, ids=[words for words, _ in DAMAGES])
def test_each_missing_piece_is_named(words: str, damage: Callable[[NetState], NetState]) -> None:
    broken = views()
    broken["n1"] = replace(broken["n1"], state=damage(broken["n1"].state))
    found = {finding.subject: finding for finding in check_ways(leases(), broken)}
    assert words in found["n1 → n2 (10.244.2.0/24)"].evidence
    assert not found["n1 → n2 (10.244.2.0/24)"].ok
    assert all(finding.ok for subject, finding in found.items() if "n1" not in subject)


def test_a_peer_that_changed_its_mac_without_telling_is_found_at_both_ends() -> None:
    changed = views()
    state = changed["n2"].state
    link = replace(state.links["flannel.1"], mac="02:00:00:00:00:01")
    changed["n2"] = replace(changed["n2"], state=replace(state, links={**state.links, "flannel.1": link}))
    wrong = {f.subject for f in check_ways(leases(), changed) if not f.ok}
    assert wrong == {"n1 → n2 (10.244.2.0/24)", "n3 → n2 (10.244.2.0/24)"}
    assert [f.ok for f in check_own(changed["n2"], leases()["n2"])] == [False, True]


def test_what_is_held_twice_is_named() -> None:
    held = leases()
    held["n3"] = replace(held["n3"], subnets=(ipaddress.ip_network("10.244.2.128/25"),))
    ip = ipaddress.ip_address("10.244.2.130")
    pods = [PodAddress("shop/a", "n2", ip), PodAddress("shop/b", "n3", ip)]
    assert [finding.evidence for finding in check_uniqueness(held, pods)] == [
        "10.244.2.0/24 of n2 overlaps 10.244.2.128/25 of n3",
        "10.244.2.130 is held by shop/a and shop/b",
    ]
    assert [finding.ok for finding in check_mapping(held, pods)] == [False, False]


def test_a_pod_with_a_foreign_address_is_named() -> None:
    pods = [
        PodAddress("shop/a", "n1", ipaddress.ip_address("10.244.2.7")),
        PodAddress("shop/b", "n1", ipaddress.ip_address("::7")),
    ]
    assert [finding.evidence for finding in check_mapping(leases(), pods)] == [
        "10.244.2.7 lies in the subnet of n2; the pod runs on n1",
        "::7 lies in the subnet of nobody; the pod runs on n1",
    ]


def test_a_bridge_that_kept_another_nodes_subnet_is_found() -> None:
    sound = list(check_devices(view(1), leases()))
    assert [f.ok for f in sound] == [True] * len(sound)
    assert "cni0 has 10.244.1.1/24, which lies in the subnet of n1" in [f.evidence for f in sound]
    moved = {**leases(), "n1": replace(leases()["n3"], node="n1")}
    moved["n3"] = replace(leases()["n1"], node="n3")
    wrong = list(check_devices(view(1), moved))
    assert not any(f.ok for f in wrong)
    assert "cni0 has 10.244.1.1/24, which lies in the subnet of n3" in [f.evidence for f in wrong]


KEYS = [base64.b64encode(bytes([8 * number, *range(30), 0x40])).decode() for number in range(4)]
CONFIGS = {
    "host-gw": '{"Type": "host-gw"}',
    "ipip": '{"Type": "ipip"}',
    "udp": '{"Type": "udp"}',
    "wireguard": '{"Type": "wireguard"}',
}


def two_hosts(type_: str) -> tuple[dict[str, Lease], NodeView]:
    """Their leases, and the first one's kernel as its back end plans it."""
    config = parse_net_config(f'{{"Network": "10.5.0.0/16", "Backend": {CONFIGS[type_]}}}')
    held, backends = {}, []
    for number in (1, 2):
        address = ipaddress.ip_interface(f"192.0.2.{number}/24")
        underlay = Underlay(device="eth0", mtu=1500, interfaces=(address,), public=(address.ip,))
        backends.append(make_backend(config, underlay, f"h{number}", WireguardKeys(KEYS[number], KEYS[number + 1])))
        subnet = (ipaddress.ip_network(f"10.5.{number}.0/24"),)
        held[f"h{number}"] = Lease(f"h{number}", subnet, backends[-1].attrs())
    uplink = NetState(links={"eth0": Link("eth0", Device(), mtu=1500)})
    state = union([uplink, backends[0].plan_base(held["h1"].subnets), backends[0].plan_lease(held["h2"])])
    return held, NodeView("h1", frozenset({ipaddress.ip_address("192.0.2.1")}), state)


@pytest.mark.parametrize("type_", CONFIGS)
def test_the_ways_of_every_back_end_are_found_whole(type_: str) -> None:
    held, here = two_hosts(type_)
    found = list(check_ways(held, {"h1": here}))
    assert [(f.ok, f.subject) for f in found] == [(True, "h1 → h2 (10.5.2.0/24)")], found


def test_another_key_than_the_lease_tells_is_named() -> None:
    held, here = two_hosts("wireguard")
    (peer,) = here.state.wireguard
    broken = replace(here, state=replace(here.state, wireguard=frozenset({replace(peer, public_key=KEYS[0])})))
    (found,) = check_ways(held, {"h1": broken})
    assert not found.ok
    assert "that is another key than the lease tells" in found.evidence
