import msgspec
import plannodes
import pytest
from hypothesis import given
from hypothesis import strategies as st

from podwire.model.addr import Family
from podwire.model.kernelstate import Vxlan
from podwire.model.meta import ObjectMeta
from podwire.model.objects import Node, NodeSpec
from podwire.plan.leases import ANNOTATION_PREFIX
from podwire.plan.naming import host_veth, pod_alias, vtep_mac
from podwire.plan.overlay import plan_peer, plan_tunnel

PREFIX = f"{ANNOTATION_PREFIX}/"


def test_a_peer_is_neighbour_entry_and_route_per_family() -> None:
    four, six = plannodes.peers(2)
    state = plan_peer(four)
    mac = vtep_mac("n2", Family.IPV4)
    (neighbour,) = state.neighbours
    assert (neighbour.dev, str(neighbour.ip), neighbour.mac) == ("flannel.1", "10.244.2.0", mac)
    (entry,) = state.fdb
    assert (entry.dev, entry.mac, str(entry.dst)) == ("flannel.1", mac, "198.18.0.12")
    (route,) = state.routes
    assert (str(route.dst), route.dev, str(route.via), route.onlink) == ("10.244.2.0/24", "flannel.1", "10.244.2.0", True)
    (route,) = plan_peer(six).routes
    assert (str(route.dst), route.dev) == ("fd00:10:244:2::/64", "flannel-v6.1")


def test_tunnel_devices_leave_room_for_the_encapsulation() -> None:
    four, six = plannodes.network().tunnels
    assert plan_tunnel(four).links["flannel.1"].mtu == 1450
    assert plan_tunnel(six).links["flannel-v6.1"].mtu == 1430
    kind = plan_tunnel(four).links["flannel.1"].kind
    assert isinstance(kind, Vxlan)
    assert (kind.vni, kind.port, str(kind.local), kind.learning) == (1, 8472, "198.18.0.11", False)
    assert plannodes.network().pod_mtu == 1430
    assert plannodes.network(families=[Family.IPV4]).pod_mtu == 1450


def test_a_node_that_real_flannel_registered_is_a_peer() -> None:
    node = Node(
        metadata=ObjectMeta(
            name="old",
            annotations={
                PREFIX + "kube-subnet-manager": "true",
                PREFIX + "backend-type": "vxlan",
                PREFIX + "backend-data": '{"VNI":1,"VtepMAC":"C6:D2:32:6F:8F:44"}',
                PREFIX + "public-ip": "192.168.64.3",
                PREFIX + "public-ip-overwrite": "203.0.113.9",
            },
        ),
        spec=NodeSpec(pod_cidr="10.244.7.0/24"),
    )
    (peer,) = plannodes.peers_of(node)
    assert (str(peer.public_ip), peer.mac, str(peer.subnet)) == ("203.0.113.9", "c6:d2:32:6f:8f:44", "10.244.7.0/24")


@pytest.mark.parametrize(
    "change",
    [
        {"backend-type": "host-gw"},
        {"kube-subnet-manager": "false"},
        {"backend-data": "null"},
        {"backend-data": "{"},
        {"backend-data": '{"VNI":2,"VtepMAC":"c6:d2:32:6f:8f:44"}'},
        {"backend-data": '{"VNI":1,"VtepMAC":"nonsense"}'},
        {"public-ip": "2001:db8::1"},
        {"public-ip": ""},
    ],
)
def test_a_node_that_says_nothing_usable_is_no_peer(change: dict[str, str]) -> None:
    node = plannodes.node(2, [Family.IPV4])
    told = node.metadata.annotations | {PREFIX + key: value for key, value in change.items()}
    meta = msgspec.structs.replace(node.metadata, annotations=told)
    assert plannodes.peers_of(msgspec.structs.replace(node, metadata=meta)) == ()


@given(st.dictionaries(st.sampled_from(["backend-data", "public-ip", "backend-v6-data"]), st.text()), st.text())
def test_no_annotation_and_no_subnet_breaks_the_planner(told: dict[str, str], cidr: str) -> None:
    base = {PREFIX + "kube-subnet-manager": "true", PREFIX + "backend-type": "vxlan"}
    meta = ObjectMeta(name="x", annotations=base | {PREFIX + key: value for key, value in told.items()})
    for cidrs in ((cidr,), ("10.244.1.0/24", "fd00::/64")):
        for peer in plannodes.peers_of(Node(metadata=meta, spec=NodeSpec(pod_cidrs=cidrs))):
            plan_peer(peer)


@given(st.text(min_size=1), st.text(max_size=300), st.text(max_size=300))
def test_names_fit_the_kernel(uid: str, namespace: str, name: str) -> None:
    assert len(host_veth(uid)) <= 15
    assert len(pod_alias(namespace, name)) <= 255
    mac = bytes.fromhex(vtep_mac(uid, Family.IPV6).replace(":", ""))
    assert len(mac) == 6
    assert mac[0] & 3 == 2  # locally administered, unicast


def test_macs_differ_between_nodes_and_families() -> None:
    macs = {vtep_mac(f"n{n}", family) for n in range(200) for family in Family}
    assert len(macs) == 400
