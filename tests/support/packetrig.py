"""One packet at a time through a node's rules: sent from where the case says, seen where it comes out. No servers, so an
address plan of any size needs four namespaces beside the node's.

    world (all of the outside) ── eth0 node cni0 ── pod (10.244.1.5), pods (the node's other pods)
                                       far0 ── far (all pods of other nodes)

Addresses are those of `service_cases`.
"""

import errno
import ipaddress
import os
import select
import socket
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import ExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass
from itertools import count

from service_cases import LOOPBACK, SOURCES, Expectation, to_ipv6

from podwire.kernel.linux import LinuxKernel
from podwire.kernel.netns import create_netns, run_in_netns
from podwire.model.addr import Family
from podwire.model.ids import HOST, NetnsName
from podwire.model.kernelstate import Address, Bridge, Device, Link, Route, Veth
from podwire.model.ops import AddAddress, AddLink, ChangeLink, Op, SetRoute, SetSysctl
from podwire.wire.packet import TCP, UDP, Packet, parse_frame

PLACES = tuple(map(NetnsName, ("world", "far", "pod", "pods")))
_HOLDERS = {
    "world": ("198.18.1.1", "192.0.2.9"),
    "far": ("10.244.2.5",),
    "pod": ("10.244.1.5",),
    "pods": ("10.244.1.2", "10.244.1.6", "10.244.1.9"),
}
_FROM = {
    "local-pod": "pod",
    "other-local-pod": "pods",
    "remote-pod": "far",
    "outside": "world",
    "friend": "world",
    "node": "node",
    "loopback": "node",
}
_NODE = ("198.18.0.11", "198.18.0.99", "10.244.1.1", "172.31.0.1")
_FAR_GATEWAY = {Family.IPV4: ("172.31.0.1", "172.31.0.2"), Family.IPV6: ("fd00:ffff::1", "fd00:ffff::2")}
_MOST_PODS = 10
_CONVERSATION_S = 2.0
_OUTGOING = 4
_ETH_P_ALL = 3
_SYN_ONLY, _SYN_ACK_RST = 0x02, 0x16


def _in(family: Family, text: str) -> str:
    return text if family is Family.IPV4 else to_ipv6(text)


def _host(family: Family, dev: str, text: str, ns: NetnsName = HOST) -> AddAddress:
    return AddAddress(Address(dev, ipaddress.ip_interface(f"{text}/{family.bits}")), ns)


def _route(dst: str, dev: str, via: str, ns: NetnsName = HOST) -> SetRoute:
    return SetRoute(Route(ipaddress.ip_network(dst), dev, ipaddress.ip_address(via), onlink=True), ns)


def _network() -> Iterator[Op]:
    for ns in (HOST, *PLACES):
        yield ChangeLink(Link("lo", Device()), ns)
        yield SetSysctl("net/ipv6/conf/default/accept_dad", "0", ns)
        for which in ("all", "default"):
            yield SetSysctl(f"net/ipv4/conf/{which}/rp_filter", "0", ns)
            yield SetSysctl(f"net/ipv4/conf/{which}/send_redirects", "0", ns)
    yield SetSysctl("net/ipv4/conf/all/route_localnet", "1")
    for key in ("net/ipv4/ip_forward", "net/ipv6/conf/all/forwarding"):
        yield SetSysctl(key, "1")
    for key in ("net/bridge/bridge-nf-call-iptables", "net/bridge/bridge-nf-call-ip6tables"):
        yield SetSysctl(key, "1")
    yield AddLink(Link("cni0", Bridge()))
    for dev, place, master in (
        ("eth0", "world", None),
        ("far0", "far", None),
        ("veth1", "pod", "cni0"),
        ("veth2", "pods", "cni0"),
    ):
        hairpin = True if master else None
        yield AddLink(Link(dev, Veth("eth0", NetnsName(place)), master=master, hairpin=hairpin), Link("eth0", Veth()))
    for family in Family:
        yield from _addresses(family)


def _addresses(family: Family) -> Iterator[Op]:
    gateway = _in(family, "10.244.1.1")
    ours, theirs = _FAR_GATEWAY[family]
    bits = 24 if family is Family.IPV4 else 64
    yield AddAddress(Address("cni0", ipaddress.ip_interface(f"{gateway}/{bits}")))
    for text in _NODE[:2]:
        yield _host(family, "eth0", _in(family, text))
    yield _host(family, "far0", ours)
    for place, texts in _HOLDERS.items():
        for text in texts:
            yield _host(family, "eth0", _in(family, text), NetnsName(place))
    yield _host(family, "eth0", theirs, NetnsName("far"))
    everything = str(family.any)
    yield _route(everything, "eth0", _in(family, "198.18.1.1"))
    yield _route("10.244.0.0/16" if family is Family.IPV4 else "fd00:10:244::/56", "far0", theirs)
    yield _route(everything, "eth0", _in(family, "198.18.0.11"), NetnsName("world"))
    yield _route(everything, "eth0", ours, NetnsName("far"))
    for place in ("pod", "pods"):
        # Like a bridged pod: its neighbours are on the link, the rest goes through the gateway.
        on_link = ipaddress.ip_interface(f"{gateway}/{bits}").network
        yield SetRoute(Route(on_link, "eth0"), NetnsName(place))
        yield _route(everything, "eth0", gateway, NetnsName(place))


@dataclass(frozen=True)
class Seen:
    """What became of a packet. `fate` "pass": it came out, to `reached`, from `source`."""

    fate: str
    reached: tuple[str, int] = ("", 0)
    source: str = ""


@dataclass(frozen=True)
class Conversation:
    """The two ends of a connection."""

    client: socket.socket
    server: socket.socket

    def goes_on(self) -> bool:
        """Whether both hear each other."""
        try:
            for sender, receiver in ((self.client, self.server), (self.server, self.client)):
                sender.sendall(b"!")
                if receiver.recv(1) != b"!":
                    return False
        except OSError:
            return False
        return True

    def close(self) -> None:
        self.client.close()
        self.server.close()


class PacketRig:
    """The namespaces, and what can be sent through them. `patience_s`: how long nothing has to be seen to mean "dropped"."""

    def __init__(self, kernel: LinuxKernel, fds: dict[str, int], patience_s: float) -> None:
        self.kernel, self.fds, self._patience_s = kernel, fds, patience_s
        self._ports = count(20_000)
        self._captures = [run_in_netns(fds[place], _packet_socket) for place in PLACES]

    @property
    def node(self) -> int:
        """The descriptor of the node's namespace."""
        return self.fds["node"]

    def send(self, expected: Expectation) -> Seen:
        """Send the packet of a case and look what becomes of it."""
        packet = expected.packet
        family = packet.family
        place = _FROM.get(_name_of(expected), "world")
        kind = socket.SOCK_STREAM if packet.protocol == TCP else socket.SOCK_DGRAM
        with ExitStack() as stack:
            mine = {_in(family, text) for text in _NODE[:2]} | {"127.0.0.1"}
            listeners = [self._listen(stack, kind, a, p) for a, p in expected.reaches if a in mine]
            sock = stack.enter_context(run_in_netns(self.fds[place], lambda: socket.socket(_domain(family), kind)))
            sock.setblocking(False)
            # Never a port that was used before: its connection may still be tracked, and would go where it went then.
            bound = place != "node" or packet.src.is_loopback
            sock.bind((str(packet.src) if bound else "", next(self._ports)))
            for capture in self._captures:
                _drain(capture)
            error = sock.connect_ex((str(packet.dst), packet.dport))
            if kind == socket.SOCK_DGRAM and not error:
                error = _send(sock)
            client = str(packet.src), sock.getsockname()[1]
            return self._look(sock, listeners, packet.protocol, client, error)

    def connect(self, opened: Expectation) -> "Conversation":
        """A TCP connection to a pod of this node that listens for it."""
        family, (address, port) = opened.packet.family, min(opened.reaches)
        holder = next(place for place, texts in _HOLDERS.items() if address in {_in(family, text) for text in texts})
        listener = run_in_netns(self.fds[holder], lambda: socket.create_server((address, port), family=_domain(family)))
        place = _FROM.get(_name_of(opened), "world")
        client = run_in_netns(self.fds[place], lambda: socket.socket(_domain(family), socket.SOCK_STREAM))
        with listener:
            for end in (listener, client):
                end.settimeout(_CONVERSATION_S)
            if place != "node":
                client.bind((str(opened.packet.src), 0))
            client.connect((str(opened.packet.dst), opened.packet.dport))
            server, _ = listener.accept()
        server.settimeout(_CONVERSATION_S)
        return Conversation(client, server)

    def _listen(self, stack: ExitStack, kind: socket.SocketKind, address: str, port: int) -> socket.socket:
        def opened() -> socket.socket:
            sock = socket.socket(_domain(Family.IPV6 if ":" in address else Family.IPV4), kind)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sock.setblocking(False)
            sock.bind((address, port))
            if kind == socket.SOCK_STREAM:
                sock.listen()
            return sock

        return stack.enter_context(run_in_netns(self.node, opened))

    def _look(
        self, sock: socket.socket, listeners: Sequence[socket.socket], protocol: int, client: tuple[str, int], error: int
    ) -> Seen:
        deadline = time.monotonic() + self._patience_s
        refused = error == errno.ECONNREFUSED
        while (left := deadline - time.monotonic()) > 0:
            ready, _, _ = select.select([*self._captures, *listeners, sock], [], [], left)
            for capture in self._captures:
                for found in _drain(capture):
                    packet = found[0]
                    if _is_first(found, protocol, client):
                        return Seen("pass", (str(packet.dst), packet.dport), str(packet.src))
            for listener in listeners:
                if listener in ready:
                    source = _source(listener)
                    return Seen("pass", listener.getsockname()[:2], source)
            if sock in ready or refused:
                code = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
                if refused or code in (errno.ECONNREFUSED, errno.EPERM):
                    return Seen("tcp reset" if protocol == TCP else "port unreachable")
                time.sleep(0.001)  # a connection was made, or data came: the first packet is about to be seen
        return Seen("drop")

    def fits(self, expected: Expectation, seen: Seen) -> bool:
        """Whether that is what the case says."""
        if expected.fate != seen.fate:
            return False
        if expected.fate != "pass":
            return True
        if expected.reaches and seen.reached not in expected.reaches:
            return False
        family = expected.packet.family
        node = {_in(family, text) for text in _NODE[:3]} | {_FAR_GATEWAY[family][0]}
        if expected.locally_made:
            return seen.source in node or seen.source == str(expected.packet.src) == "127.0.0.1"
        return {"kept": seen.source == str(expected.packet.src), "masqueraded": seen.source in node}.get(expected.source, True)

    def close(self) -> None:
        for capture in self._captures:
            capture.close()


def sendable(expected: Expectation) -> bool:
    """Whether the rig can send it. Marks do not pass from one namespace to the next, multicast is not routed, a machine may
    have no sockets for SCTP, 127.0.0.1 is everybody's own, and not every pod of a large Service is there to be asked for its
    MAC."""
    packet = expected.packet
    if len(expected.reaches) > _MOST_PODS:
        return False
    if packet.mark or packet.dst.is_multicast or packet.protocol not in (TCP, UDP):
        return False
    return expected.locally_made or not (packet.dst.is_loopback or packet.src.is_loopback)


def _name_of(expected: Expectation) -> str:
    """Who sends it, in the words of the address plan."""
    packet = expected.packet
    for name, text in (SOURCES | LOOPBACK).items():
        if _in(packet.family, text) == str(packet.src):
            return name
    return ""


def _domain(family: Family) -> socket.AddressFamily:
    return socket.AF_INET if family is Family.IPV4 else socket.AF_INET6


def _send(sock: socket.socket) -> int:
    try:
        sock.send(b"who?")
    except OSError as error:
        # What a refused datagram of one's own machine gives.
        return errno.ECONNREFUSED if error.errno == errno.EPERM else error.errno or 0
    return 0


def _source(listener: socket.socket) -> str:
    if listener.type == socket.SOCK_STREAM:
        sock, peer = listener.accept()
        sock.close()
    else:
        _, peer = listener.recvfrom(100)
    return str(peer[0])


def _packet_socket() -> socket.socket:
    sock = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(_ETH_P_ALL))
    sock.setblocking(False)
    return sock


def _drain(capture: socket.socket) -> list[tuple[Packet, int]]:
    found: list[tuple[Packet, int]] = []
    while True:
        try:
            data, address = capture.recvfrom(65536)
        except BlockingIOError:
            return found
        frame = parse_frame(data)
        if address[2] != _OUTGOING and frame is not None and frame.packet is not None:
            header = 14 + (20 if frame.packet.src.version == 4 else 40)
            found.append((frame.packet, data[header + 13] if len(data) > header + 13 else 0))


def _is_first(found: tuple[Packet, int], protocol: int, client: tuple[str, int]) -> bool:
    """Whether it is the client's packet, not an answer, nor the machines' own talk."""
    packet, flags = found
    if packet.protocol != protocol or (str(packet.dst), packet.dport) == client:
        return False
    return flags & _SYN_ACK_RST == _SYN_ONLY if protocol == TCP else packet.payload == b"who?"


@contextmanager
def _opened() -> Iterator[dict[str, int]]:
    fds = {name: create_netns() for name in ("node", *PLACES)}
    try:
        yield fds
    finally:
        for fd in fds.values():
            os.close(fd)


@asynccontextmanager
async def packet_rig(patience_s: float = 0.06) -> AsyncIterator[PacketRig]:
    """Everything up, no rules yet."""
    with _opened() as fds:
        kernel = LinuxKernel(fds["node"])
        try:
            for place in PLACES:
                kernel.attach(place, fds[place])
            applied = await kernel.apply(tuple(_network()))
            assert applied.ok, applied.failures
            rig = PacketRig(kernel, fds, patience_s)
            try:
                yield rig
            finally:
                rig.close()
        finally:
            await kernel.close()
