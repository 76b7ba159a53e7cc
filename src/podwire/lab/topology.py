"""Where everything in a lab is: names, addresses, MACs and routes of fabric, nodes, world and balancer. Pure.

    world ── eth0 ┐                     198.18.1.1   2001:db8:1::1:1   clients; the nodes' default gateway
    balancer eth0 ┤  fabric (bridge)    198.18.2.1   2001:db8:1::2:1   picks a node for each LoadBalancer connection
    node-<i> eth0 ┘  198.18.0.1         198.18.0.(10+i)  2001:db8:1::(10+i)

The bridge is in the lab's own namespace, where API server and controllers are: the place `api`.

A node's place follows from its index alone, so nodes come and go without moving another.
"""

import ipaddress
import re
from collections.abc import Mapping
from dataclasses import dataclass

from podwire.lab.spec import MAX_NODES, UNDERLAY
from podwire.model.addr import Family, IPAddress, IPInterface, IPNetwork, mac_for
from podwire.model.ids import HOST, NetnsName
from podwire.model.kernelstate import OWNER_ALIAS, Address, Bridge, Device, Link, Neighbour, Route, Veth
from podwire.model.ops import AddAddress, AddLink, ChangeLink, Op, Plan, SetNeighbour, SetRoute, SetSysctl

FABRIC = "fabric"
WORLD = "world"
BALANCER = "balancer"
API = "api"
UPLINK = "eth0"
FABRIC_MTU = 1500
API_PORT = 6443
NODES_PORT = 8080
"""Where the API server listens for the lab's own nodes, without TLS."""

_FABRIC = {Family.IPV4: "198.18.0.1", Family.IPV6: "2001:db8:1::1"}
_WORLD = {Family.IPV4: "198.18.1.1", Family.IPV6: "2001:db8:1::1:1"}
_BALANCER = {Family.IPV4: "198.18.2.1", Family.IPV6: "2001:db8:1::2:1"}
_RTPROT_BOOT = 3
"""rtm_protocol of routes that were set when the machine started (linux/rtnetlink.h)."""
_NODE_NAME = re.compile(r"node-([1-9][0-9]{0,2})")


def node_name(index: int) -> str:
    """The name of the node with this index (from 1)."""
    if not 1 <= index <= MAX_NODES:
        raise ValueError(f"node index {index} is not within 1 to {MAX_NODES}")
    return f"node-{index}"


def node_index(name: str) -> int | None:
    """The inverse of `node_name`; None for a name that is not a lab node's."""
    match = _NODE_NAME.fullmatch(name)
    return int(match[1]) if match and int(match[1]) <= MAX_NODES else None


@dataclass(frozen=True, slots=True)
class Place:
    """A namespace on the fabric. `netns` is its label at the fabric's kernel port; the port on the bridge is named `name`.

    `at_bridge`: the lab's own namespace, which needs no cable."""

    name: str
    addresses: Mapping[Family, IPAddress]
    at_bridge: bool = False

    @property
    def netns(self) -> NetnsName:
        return HOST if self.at_bridge else NetnsName(f"place/{self.name}")

    @property
    def device(self) -> str:
        return FABRIC if self.at_bridge else UPLINK

    @property
    def mac(self) -> str:
        return mac_for(next(iter(self.addresses.values())))


@dataclass(frozen=True, slots=True)
class Topology:
    """The lab's addresses, by family. `families` are in the cluster's order."""

    families: tuple[Family, ...]
    balancer_pools: Mapping[Family, IPNetwork]

    @property
    def fabric(self) -> Mapping[Family, IPAddress]:
        return {f: ipaddress.ip_address(_FABRIC[f]) for f in self.families}

    @property
    def api(self) -> Place:
        return Place(API, self.fabric, at_bridge=True)

    @property
    def world(self) -> Place:
        return Place(WORLD, {f: ipaddress.ip_address(_WORLD[f]) for f in self.families})

    @property
    def balancer(self) -> Place:
        return Place(BALANCER, {f: ipaddress.ip_address(_BALANCER[f]) for f in self.families})

    def etcd(self, index: int) -> Place:
        """The machine of an etcd member (from 1)."""
        texts = {Family.IPV4: f"198.18.3.{index}", Family.IPV6: f"2001:db8:1::3:{index}"}
        return Place(f"etcd-{index}", {f: ipaddress.ip_address(texts[f]) for f in self.families})

    def node(self, index: int) -> Place:
        return Place(node_name(index), {f: _node_address(f, index) for f in self.families})

    # --- plans ----------------------------------------------------------------------------------------------------

    def plan_fabric(self) -> Plan:
        """The bridge in the lab's own namespace. Needs no other namespace."""
        ops: list[Op] = [ChangeLink(Link("lo", Device()))]
        ops.append(AddLink(Link(FABRIC, Bridge(), mtu=FABRIC_MTU, mac=self.api.mac, alias=OWNER_ALIAS)))
        ops += [AddAddress(Address(FABRIC, self._interface(ip))) for ip in self.fabric.values()]
        return tuple(ops)

    def plan_place(self, place: Place) -> Plan:
        """The cable from the bridge to `place`, whose namespace has been attached under its label."""
        ns = place.netns
        port = Link(place.name, Veth(UPLINK, ns), mtu=FABRIC_MTU, master=FABRIC, alias=f"{OWNER_ALIAS}:{place.name}")
        uplink = Link(UPLINK, Veth(place.name), mtu=FABRIC_MTU, mac=place.mac)
        ops: list[Op] = [ChangeLink(Link("lo", Device()), ns), *_quiet(self.families, ns)]
        ops.append(AddLink(port, uplink))
        ops += [AddAddress(Address(UPLINK, self._interface(ip)), ns) for ip in place.addresses.values()]
        return tuple(ops)

    def plan_node(self, place: Place) -> Plan:
        """A node's machine before any agent runs on it: its cable and a default route to the world.

        Neither is marked as podwire's: to the agent they are the machine's own, and it keeps its hands off."""
        gateways = self.world.addresses
        defaults = [Route(f.any, dev=UPLINK, via=gateways[f], protocol=_RTPROT_BOOT) for f in self.families]
        return (*self.plan_place(place), *(SetRoute(route, place.netns) for route in defaults))

    def plan_neighbours(self, fresh: tuple[Place, ...], everybody: tuple[Place, ...]) -> Plan:
        """Permanent neighbour entries between the places in `fresh` and `everybody` (which has them, too).

        Learnt ones would count against `gc_thresh3`, 1024 for all namespaces of a machine together, and nobody in a namespace
        may raise it: a lab of 50 nodes that all talk to each other needs 2450."""
        new = {place.name for place in fresh}
        return tuple(
            SetNeighbour(Neighbour(place.device, address, other.mac), place.netns)
            for place in everybody
            for other in (everybody if place.name in new else fresh)
            if other.name != place.name
            for address in other.addresses.values()
        )

    def plan_world(self) -> Plan:
        """The outside: reaches LoadBalancer addresses through the balancer. It passes nothing on: what a node does not know
        and sends to its default gateway ends here, and does not go round through the balancer again."""
        place = self.world
        switches = {Family.IPV4: "net/ipv4/ip_forward", Family.IPV6: "net/ipv6/conf/all/forwarding"}
        ops = [SetSysctl(switches[f], "0", place.netns) for f in self.families]
        routes = [Route(self.balancer_pools[f], dev=UPLINK, via=self.balancer.addresses[f]) for f in self.families]
        return (*self.plan_place(place), *ops, *(SetRoute(route, place.netns) for route in routes))

    def plan_balancer(self) -> Plan:
        """The balancer's machine; its routes follow the Services (`podwire.lab.balancer`).

        The kernel hashes each flow's addresses and ports, so a connection stays with one node."""
        ns = self.balancer.netns
        switches = {
            Family.IPV4: {"net/ipv4/ip_forward": "1", "net/ipv4/fib_multipath_hash_policy": "1"},
            Family.IPV6: {"net/ipv6/conf/all/forwarding": "1", "net/ipv6/fib_multipath_hash_policy": "1"},
        }
        ops = [SetSysctl(key, value, ns) for f in self.families for key, value in switches[f].items()]
        return (*self.plan_place(self.balancer), *ops)

    def _interface(self, address: IPAddress) -> IPInterface:
        family = Family.IPV4 if address.version == 4 else Family.IPV6
        return ipaddress.ip_interface(f"{address}/{UNDERLAY[family].prefixlen}")


def _node_address(family: Family, index: int) -> IPAddress:
    node_name(index)  # raises ValueError for an index out of range
    prefix = "198.18.0." if family is Family.IPV4 else "2001:db8:1::"
    return ipaddress.ip_address(f"{prefix}{10 + index}")


def _quiet(families: tuple[Family, ...], ns: NetnsName = HOST) -> list[Op]:
    """Switches that keep the underlay as simple as it looks, set before any device is there.

    Redirects: the balancer sends packets out where they came in, and IPv6 has no switch for sending. rp_filter: a new
    namespace inherits the machine's, and replies do not return by the balancer. DAD: seconds lost for addresses of our own.
    """
    switches = {
        Family.IPV4: {
            "net/ipv4/conf/all/rp_filter": "0",
            "net/ipv4/conf/default/rp_filter": "0",
            "net/ipv4/conf/all/send_redirects": "0",
            "net/ipv4/conf/default/send_redirects": "0",
            "net/ipv4/conf/all/accept_redirects": "0",
            "net/ipv4/conf/default/accept_redirects": "0",
        },
        Family.IPV6: {
            "net/ipv6/conf/all/accept_redirects": "0",
            "net/ipv6/conf/default/accept_redirects": "0",
            "net/ipv6/conf/default/accept_ra": "0",
            "net/ipv6/conf/default/accept_dad": "0",
        },
    }
    return [SetSysctl(key, value, ns) for f in families for key, value in switches[f].items()]
