"""What a proxy makes of a Node, its interfaces and kube-proxy's configuration."""

import ipaddress
from typing import Any

import msgspec
import pytest

from podwire.model.addr import Family, IPNetwork
from podwire.model.kernelstate import Address, NetState
from podwire.model.objects import Node
from podwire.model.proxyconfig import parse_proxy_config
from podwire.model.servicetable import NodeFacts
from podwire.plan.ipvs import DEVICE
from podwire.plan.proxyfacts import EVERYWHERE, depends_on_interfaces, listening_places, proxy_facts, untold_families

PRIMARY, SECOND, V6 = "198.18.0.11", "192.0.2.7", "2001:db8:1::b"
ALL = [PRIMARY, "10.244.1.1", SECOND, V6]
ADDRESSES = (
    ("lo", "127.0.0.1/8"),
    ("lo", "::1/128"),
    ("eth0", f"{PRIMARY}/16"),
    ("eth0", f"{V6}/48"),
    ("eth0", "fe80::1/64"),
    ("eth1", f"{SECOND}/24"),
    ("cni0", "10.244.1.1/24"),
    (DEVICE, "10.96.0.10/32"),
)
STATE = NetState(addresses=frozenset(Address(dev, ipaddress.ip_interface(text)) for dev, text in ADDRESSES))
SERVICE_CIDRS: tuple[IPNetwork, ...] = (ipaddress.ip_network("10.96.0.0/12"),)


def node(**spec: Any) -> Node:
    document = {
        "metadata": {"name": "n1", "labels": {"topology.kubernetes.io/zone": "z1"}},
        "spec": {"podCIDR": "10.244.1.0/24", "podCIDRs": ["10.244.1.0/24", "fd00:10:244:1::/64"], **spec},
        "status": {"addresses": [{"type": "InternalIP", "address": ip} for ip in (PRIMARY, V6)]},
    }
    return msgspec.convert(document, Node)


def facts(text: str = "", of: Node | None = None) -> NodeFacts:
    return proxy_facts(parse_proxy_config(text, "f")[0], of or node(), STATE, SERVICE_CIDRS)


def node_ips(text: str) -> list[str]:
    return [str(ip) for ip in facts(text).node_ips]


def test_the_node_and_its_zone() -> None:
    found = facts()
    assert (found.name, found.zone, found.service_cidrs) == ("n1", "z1", SERVICE_CIDRS)
    assert (found.pod_cidrs, found.cluster_cidrs) == ((), ()), "no pod's traffic to the outside is a proxy's business"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", [PRIMARY, V6]),
        ("mode: nftables", [PRIMARY, V6]),
        ("mode: iptables", ALL),
        ("mode: ipvs", ALL),
        ("nodePortAddresses: [primary]", [PRIMARY, V6]),
        ("bindAddress: 0.0.0.0", [PRIMARY, V6]),
        ("bindAddress: '::'", [PRIMARY, V6]),
        ("bindAddress: 127.0.0.1", [PRIMARY, V6]),
        (f"bindAddress: {SECOND}", [SECOND, V6]),
        ("bindAddress: '2001:db8:1::7'", [PRIMARY, "2001:db8:1::7"]),
        ("{mode: iptables, nodePortAddresses: [primary]}", [PRIMARY, V6]),
        ("nodePortAddresses: [192.0.2.0/24, 198.18.0.0/15, 'fd00::/8']", [SECOND, PRIMARY]),
        ("nodePortAddresses: [203.0.113.0/24, '2001:db8::/32', '::1/128']", [V6]),
        ("nodePortAddresses: [10.96.0.0/12, 127.0.0.0/8, 'fe80::/10']", []),  # virtual servers' addresses are Services'
        ("nodePortAddresses: [192.0.2.0/24]", [SECOND, V6]),  # CIDRs of one family say nothing of the other
        ("nodePortAddresses: ['2001:db8:1::b/128']", ALL),
        ("nodePortAddresses: [0.0.0.0/0, 192.0.2.0/24]", ALL),
        ("nodePortAddresses: ['::/0']", ALL),
        ("nodePortAddresses: [all]", ALL),
        ("nodePortAddresses: [localhost, all]", ALL),
        ("nodePortAddresses: [localhost]", []),
        ("nodePortAddresses: [primary, localhost]", [PRIMARY, V6]),
        ("nodePortAddresses: [192.0.2.0/24, primary]", [PRIMARY, SECOND, V6]),
        ("nodePortAddresses: [primary, 198.18.0.0/15]", [PRIMARY, V6]),
    ],
)
def test_which_addresses_serve_node_ports(text: str, expected: list[str]) -> None:
    assert node_ips(text) == expected


@pytest.mark.parametrize(
    ("addresses", "expected"),
    [
        ([("ExternalIP", SECOND), ("InternalIP", PRIMARY), ("InternalIP", V6)], [PRIMARY, V6]),
        ([("InternalIP", PRIMARY), ("ExternalIP", V6), ("ExternalIP", "2001:db8:1::7")], [PRIMARY, V6]),
        ([("InternalIP", SECOND), ("InternalIP", PRIMARY), ("InternalIP", V6)], [SECOND, V6]),  # the first is the primary one
        ([("ExternalIP", SECOND), ("Hostname", "n1")], [SECOND, V6]),
        ([("InternalIP", V6)], ["10.244.1.1", SECOND, PRIMARY, V6]),
        ([("Hostname", "n1")], ["10.244.1.1", SECOND, PRIMARY, V6]),
    ],
)
def test_the_nodes_primary_addresses(addresses: list[tuple[str, str]], expected: list[str]) -> None:
    """Of a family that has none, all serve node ports."""
    assert [str(ip) for ip in facts(of=addressed(*addresses)).node_ips] == expected


def addressed(*addresses: tuple[str, str]) -> Node:
    status = {"addresses": [{"type": kind, "address": ip} for kind, ip in addresses]}
    return msgspec.convert({"metadata": {"name": "n1"}, "status": status}, Node)


@pytest.mark.parametrize(
    ("text", "ipv4", "ipv6"),
    [
        ("", [PRIMARY], [V6]),
        ("{mode: iptables, nodePortAddresses: [primary]}", [PRIMARY], [V6]),
        (f"bindAddress: {SECOND}", [SECOND], [V6]),
        ("nodePortAddresses: [192.0.2.0/24, 198.18.0.0/15, 'fd00::/8']", [SECOND, PRIMARY], []),
        ("nodePortAddresses: [127.0.0.0/8, 10.96.0.0/12, '::1/128', 'fe80::/10']", ["127.0.0.1"], ["::1"]),
        ("nodePortAddresses: [192.0.2.0/24]", [SECOND], ["::"]),
        ("nodePortAddresses: [localhost]", ["127.0.0.1"], ["::1"]),
        ("nodePortAddresses: [localhost, primary]", [PRIMARY, "127.0.0.1"], [V6, "::1"]),
        ("nodePortAddresses: ['2001:db8::/32', 0.0.0.0/0, 192.0.2.0/24]", ["0.0.0.0"], [V6]),
    ],
)
def test_where_health_check_ports_listen(text: str, ipv4: list[str], ipv6: list[str]) -> None:
    places = listening_places(parse_proxy_config(text, "f")[0], node(), STATE)
    assert places == {
        family: frozenset(map(ipaddress.ip_address, listed)) for family, listed in ((Family.IPV4, ipv4), (Family.IPV6, ipv6))
    }


@pytest.mark.parametrize(
    "text",
    [
        "mode: iptables",
        "mode: ipvs",
        "nodePortAddresses: [all]",
        "nodePortAddresses: [0.0.0.0/0]",
        "nodePortAddresses: ['::/0']",
    ],
)
def test_health_check_ports_listen_everywhere_where_nothing_is_chosen(text: str) -> None:
    assert listening_places(parse_proxy_config(text, "f")[0], node(), STATE) is EVERYWHERE


def test_without_primary_addresses_health_check_ports_listen_everywhere() -> None:
    assert listening_places(parse_proxy_config("", "f")[0], addressed(("Hostname", "n1")), STATE) is EVERYWHERE


@pytest.mark.parametrize(
    ("text", "of", "follows"),
    [
        ("", node(), False),
        ("{mode: ipvs, nodePortAddresses: [primary]}", node(), False),
        ("", addressed(("InternalIP", PRIMARY)), True),
        ("mode: iptables", node(), True),
        ("nodePortAddresses: [192.0.2.0/24, 'fd00::/8']", node(), True),
    ],
)
def test_interfaces_are_followed_where_they_count(text: str, of: Node, follows: bool) -> None:
    assert depends_on_interfaces(parse_proxy_config(text, "f")[0], of) is follows


@pytest.mark.parametrize(
    ("text", "loopback"),
    [
        ("", False),
        ("mode: ipvs", False),
        ("mode: iptables", True),
        ("{mode: iptables, iptables: {localhostNodePorts: false}}", False),
        ("{mode: iptables, nodePortAddresses: [192.0.2.0/24]}", False),
        ("{mode: iptables, nodePortAddresses: [primary]}", False),
        ("{mode: iptables, nodePortAddresses: [127.0.0.0/8]}", True),
        ("{mode: iptables, nodePortAddresses: [0.0.0.0/0]}", True),
        ("{mode: iptables, nodePortAddresses: ['2001:db8::/32']}", True),
        ("{mode: nftables, nodePortAddresses: [127.0.0.0/8]}", False),
        ("{mode: iptables, nodePortAddresses: [localhost]}", True),
        ("{mode: iptables, nodePortAddresses: [primary, localhost]}", True),
        ("{mode: iptables, iptables: {localhostNodePorts: false}, nodePortAddresses: [localhost]}", False),
        ("nodePortAddresses: [primary, localhost]", True),
        ("nodePortAddresses: [all]", False),
        ("{mode: ipvs, nodePortAddresses: [all, localhost]}", True),
    ],
)
def test_who_listens_on_127_0_0_1(text: str, loopback: bool) -> None:
    assert facts(text).loopback is loopback


@pytest.mark.parametrize(
    ("text", "sources", "interfaces"),
    [
        ("", ["10.244.1.0/24", "fd00:10:244:1::/64"], ()),
        ("clusterCIDR: 10.244.0.0/16", ["10.244.0.0/16"], ()),
        (
            "{detectLocalMode: ClusterCIDR, clusterCIDR: '10.244.0.0/16,fd00:10:244::/56'}",
            ["10.244.0.0/16", "fd00:10:244::/56"],
            (),
        ),
        ("{detectLocalMode: NodeCIDR, clusterCIDR: 10.244.0.0/16}", ["10.244.1.0/24", "fd00:10:244:1::/64"], ()),
        ("{detectLocalMode: BridgeInterface, detectLocal: {bridgeInterface: cni0}}", None, ("cni0",)),
        ("{detectLocalMode: InterfaceNamePrefix, detectLocal: {interfaceNamePrefix: veth}}", None, ("veth*",)),
    ],
)
def test_who_counts_as_a_pod_of_the_node(text: str, sources: list[str] | None, interfaces: tuple[str, ...]) -> None:
    found = facts(text)
    assert found.local_interfaces == interfaces
    assert [str(network) for network in found.local_pods] == (sources or [])


@pytest.mark.parametrize(
    ("text", "of", "untold"),
    [
        ("", node(), ""),
        ("clusterCIDR: 10.244.0.0/16", node(), "IPv6"),
        ("clusterCIDR: 10.244.0.0/16", addressed(("InternalIP", PRIMARY)), ""),
        ("", addressed(("InternalIP", PRIMARY), ("InternalIP", V6)), "IPv4 IPv6"),
        ("{detectLocalMode: BridgeInterface, detectLocal: {bridgeInterface: cni0}}", addressed(("InternalIP", PRIMARY)), ""),
    ],
)
def test_families_in_which_nothing_tells_pods_from_others(text: str, of: Node, untold: str) -> None:
    config = parse_proxy_config(text, "f")[0]
    found = untold_families(config, of, proxy_facts(config, of, STATE, SERVICE_CIDRS))
    assert " ".join(family.value for family in found) == untold


def test_a_node_of_before_dual_stack() -> None:
    assert [str(n) for n in facts(of=node(podCIDRs=[])).local_pods] == ["10.244.1.0/24"]
    assert facts(of=node(podCIDR="", podCIDRs=[])).local_pods == ()


@pytest.mark.parametrize(
    ("text", "everyone"),
    [
        ("", False),
        ("nftables: {masqueradeAll: true}", True),
        ("iptables: {masqueradeAll: true}", False),
        ("{mode: iptables, iptables: {masqueradeAll: true}}", True),
        ("{mode: ipvs, iptables: {masqueradeAll: true}}", True),
        ("{mode: ipvs, nftables: {masqueradeAll: true}}", False),
    ],
)
def test_masquerade_all_is_of_the_modes_section(text: str, everyone: bool) -> None:
    assert facts(text).masquerade_all is everyone
