"""What this machine's kernel can do, found by trying it once in a namespace of its own: never guessed from a version."""

import enum
import errno
import ipaddress
import os
from dataclasses import dataclass

from podwire.kernel.netns import create_netns, run_in_netns
from podwire.kernel.port import KernelError
from podwire.kernel.rtnlsocket import RtnlSocket, netlink_socket
from podwire.kernel.tun import TUN_DEVICE
from podwire.model.errors import Unsupported
from podwire.model.kernelstate import Bridge, Ipip, Link, Shaper, Veth, Vxlan, Wireguard
from podwire.wire import rtnl, rtnlread
from podwire.wire.netlink import NETLINK_NETFILTER, NLM_F_ACK, NLM_F_REQUEST, Batch, message

_GET_GENERATION = 10 << 8 | 16  # NFNL_SUBSYS_NFTABLES, NFT_MSG_GETGEN
_GET_CONNTRACK_STATS = 1 << 8 | 5  # NFNL_SUBSYS_CTNETLINK, IPCTNL_MSG_CT_GET_STATS
_NFGENMSG = b"\0\0\0\0"


class Feature(enum.StrEnum):
    """Something podwire needs or can use. The value is its name in messages."""

    NAMESPACES = "network namespaces"
    IPV6 = "IPv6"
    BRIDGE = "bridge devices"
    VETH = "veth devices"
    VXLAN = "VXLAN devices"
    IPIP = "IPIP devices"
    WIREGUARD = "WireGuard devices"
    TUN = "TUN devices"
    NFTABLES = "nftables"
    CONNTRACK = "conntrack over netlink"
    BRIDGE_NETFILTER = "netfilter on bridges (br_netfilter)"
    SHAPING = "bandwidth limits (sch_tbf)"


_ADVICE = {
    Feature.NAMESPACES: "enter a user namespace first, or run as root",
    Feature.IPV6: "boot without ipv6.disable=1, or use --ip-family ipv4",
    Feature.BRIDGE: "run `sudo modprobe bridge`",
    Feature.VETH: "run `sudo modprobe veth`",
    Feature.VXLAN: "run `sudo modprobe vxlan`",
    Feature.IPIP: "run `sudo modprobe ipip`",
    Feature.WIREGUARD: "run `sudo modprobe wireguard`",
    Feature.TUN: "run `sudo modprobe tun` and allow access to /dev/net/tun",
    Feature.NFTABLES: "run `sudo modprobe nf_tables nft_nat`",
    Feature.CONNTRACK: "run `sudo modprobe nf_conntrack_netlink`",
    Feature.SHAPING: "run `sudo modprobe sch_tbf`",
    Feature.BRIDGE_NETFILTER: "run `sudo modprobe br_netfilter`",
}


@dataclass(frozen=True, slots=True)
class Features:
    present: frozenset[Feature]

    @property
    def missing(self) -> tuple[Feature, ...]:
        return tuple(feature for feature in Feature if feature not in self.present)

    def require(self, *wanted: Feature) -> None:
        """Raise Unsupported, with advice, for the first that is missing."""
        for feature in wanted:
            if feature not in self.present:
                raise Unsupported(str(feature), _ADVICE[feature])


def probe_features() -> Features:
    """Try each feature in a new namespace. Blocks some milliseconds; call it once, at start."""
    try:
        fd = create_netns()
    except OSError:
        return Features(frozenset())
    try:
        present = {Feature.NAMESPACES} | _probe_links(fd) | run_in_netns(fd, _probe_inside)
    finally:
        os.close(fd)
    return Features(frozenset(present))


def _probe_links(fd: int) -> set[Feature]:
    found: set[Feature] = set()
    sock = RtnlSocket(fd)
    try:
        for feature, link in (
            (Feature.BRIDGE, Link("b", Bridge())),
            (Feature.VETH, Link("v", Veth(peer="w"))),
            (Feature.IPIP, Link("i", Ipip(ipaddress.IPv4Address("192.0.2.1")))),
            (Feature.WIREGUARD, Link("g", Wireguard(1, ""))),
        ):
            if not sock.execute([rtnl.new_link(link, indices={})]).errors:
                found.add(feature)
        if Feature.BRIDGE in found:
            index = rtnlread.read_link(sock.execute([rtnl.get_link("b")]).answers[0]).index
            vxlan = Link("x", Vxlan(1, 8472, ipaddress.IPv4Address("192.0.2.1"), "b"))
            if not sock.execute([rtnl.new_link(vxlan, indices={"b": index})]).errors:
                found.add(Feature.VXLAN)
        if Feature.VETH in found:
            index = rtnlread.read_link(sock.execute([rtnl.get_link("v")]).answers[0]).index
            if not sock.execute([rtnl.set_shaper(Shaper(1_000_000, 100_000), index)]).errors:
                found.add(Feature.SHAPING)
    finally:
        sock.close()
    return found


def _probe_inside() -> set[Feature]:
    found: set[Feature] = set()
    if os.path.exists("/proc/sys/net/ipv6/conf/all"):
        found.add(Feature.IPV6)
    if _tun_is_there():
        found.add(Feature.TUN)
    if os.path.exists("/proc/sys/net/bridge/bridge-nf-call-iptables"):
        found.add(Feature.BRIDGE_NETFILTER)
    if _answers(_GET_GENERATION):
        found.add(Feature.NFTABLES)
    if _answers(_GET_CONNTRACK_STATS):
        found.add(Feature.CONNTRACK)
    return found


def _tun_is_there() -> bool:
    """Opening it makes no device yet."""
    try:
        os.close(os.open(TUN_DEVICE, os.O_RDWR | os.O_CLOEXEC))
    except OSError:
        return False
    return True


def _answers(type_: int) -> bool:
    """Whether nfnetlink knows the request. The kernel loads the subsystem's module for it where it may."""
    try:
        sock = netlink_socket(NETLINK_NETFILTER)
    except OSError as error:
        if error.errno in (errno.EPROTONOSUPPORT, errno.ESOCKTNOSUPPORT, errno.EPERM):
            return False
        raise
    with sock:
        sock.settimeout(5)
        batch = Batch(1, (message(type_, NLM_F_REQUEST | NLM_F_ACK, 0, _NFGENMSG),))
        sock.send(batch.encode())
        try:
            while not batch.done:
                batch.feed(sock.recv(1 << 16))
        except TimeoutError as error:
            raise KernelError("nfnetlink gave no answer", errno.ETIMEDOUT) from error
        return not batch.errors
