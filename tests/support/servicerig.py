"""A node with three pods and the outside world, in namespaces of their own; servers in the pods, clients anywhere.

    world 198.18.1.1 ── eth0 198.18.0.11 node, cni0 10.244.1.1 ── p2, p3, p4
                                         └─ far0 ── far 10.244.2.2, as if it were a pod of another node

Pod p<n> has 10.244.1.<n>. The same in IPv6, by the address plan of the unit tests' case files.
"""

import asyncio
import contextlib
import ipaddress
import os
import socket
import subprocess
import tempfile
from collections.abc import AsyncIterator
from dataclasses import dataclass, field

from podwire.kernel.linux import LinuxKernel
from podwire.kernel.netns import create_netns, run_in_netns
from podwire.model.addr import Family, IPAddress
from podwire.model.ids import HOST, NetnsName
from podwire.model.kernelstate import Address, Bridge, Device, Link, Route, Veth
from podwire.model.ops import AddAddress, AddLink, ChangeLink, CommitNft, Op, SetRoute, SetSysctl
from podwire.model.servicetable import NodeFacts
from podwire.plan.services import TABLE, ServicePlanner
from podwire.wire.packet import Frame, Packet, build_frame

WORLD, FAR = NetnsName("world"), NetnsName("far")
PODS = ("p2", "p3", "p4")
PATIENCE_S = 0.4
"""Everything here is one machine: answers come within a millisecond."""

FACTS = NodeFacts(
    name="n1",
    node_ips=(ipaddress.ip_address("198.18.0.11"), ipaddress.ip_address("2001:db8:1::b")),
    pod_cidrs=(ipaddress.ip_network("10.244.1.0/24"), ipaddress.ip_network("fd00:10:244:1::/64")),
    cluster_cidrs=(ipaddress.ip_network("10.244.0.0/16"), ipaddress.ip_network("fd00:10:244::/56")),
    service_cidrs=(ipaddress.ip_network("10.96.0.0/12"), ipaddress.ip_network("fd00:10:96::/112")),
)

_SYSCTLS = {
    "net/ipv4/ip_forward": "1",
    "net/ipv6/conf/all/forwarding": "1",
    "net/bridge/bridge-nf-call-iptables": "1",
    "net/bridge/bridge-nf-call-ip6tables": "1",
}
_NO_DAD = "net/ipv6/conf/default/accept_dad"


def _address(dev: str, text: str, ns: NetnsName) -> AddAddress:
    return AddAddress(Address(dev, ipaddress.ip_interface(text)), ns)


def _route(dst: str, dev: str, via: str, ns: NetnsName) -> SetRoute:
    return SetRoute(Route(ipaddress.ip_network(dst), dev, ipaddress.ip_address(via)), ns)


def _network() -> list[Op]:
    ops: list[Op] = [SetSysctl(_NO_DAD, "0", ns) for ns in (HOST, WORLD, FAR, *map(NetnsName, PODS))]
    ops += [SetSysctl(key, value) for key, value in _SYSCTLS.items()]
    ops += [
        ChangeLink(Link("lo", Device())),
        AddLink(Link("cni0", Bridge())),
        _address("cni0", "10.244.1.1/24", HOST),
        _address("cni0", "fd00:10:244:1::1/64", HOST),
        AddLink(Link("eth0", Veth("eth0", WORLD)), Link("eth0", Veth())),
        _address("eth0", "198.18.0.11/16", HOST),
        _address("eth0", "2001:db8:1::b/48", HOST),
        AddLink(Link("far0", Veth("eth0", FAR)), Link("eth0", Veth())),
        _address("far0", "10.244.2.1/24", HOST),
        _address("far0", "fd00:10:244:2::1/64", HOST),
        _route("0.0.0.0/0", "eth0", "198.18.1.1", HOST),
        _route("::/0", "eth0", "2001:db8:1::1:1", HOST),
        ChangeLink(Link("lo", Device()), WORLD),
        *(_address("eth0", text, WORLD) for text in ("198.18.1.1/16", "2001:db8:1::1:1/48")),
        _route("0.0.0.0/0", "eth0", "198.18.0.11", WORLD),
        _route("::/0", "eth0", "2001:db8:1::b", WORLD),
    ]
    ops += [
        *(_address("eth0", text, FAR) for text in ("10.244.2.2/24", "fd00:10:244:2::2/64")),
        _route("0.0.0.0/0", "eth0", "10.244.2.1", FAR),
        _route("::/0", "eth0", "fd00:10:244:2::1", FAR),
    ]
    for name in PODS:
        ops += _pod(name, int(name[1:]))
    return ops


def _pod(name: str, number: int) -> list[Op]:
    ns = NetnsName(name)
    return [
        AddLink(Link(f"veth{number}", Veth("eth0", ns), master="cni0", hairpin=True), Link("eth0", Veth())),
        ChangeLink(Link("lo", Device()), ns),
        _address("eth0", f"10.244.1.{number}/24", ns),
        _address("eth0", f"fd00:10:244:1::{number}/64", ns),
        _route("0.0.0.0/0", "eth0", "10.244.1.1", ns),
        _route("::/0", "eth0", "fd00:10:244:1::1", ns),
    ]


@dataclass
class ServiceRig:
    """The node's kernel and planner, and the sockets of the servers. `patience_s`: how long silence is silence."""

    kernel: LinuxKernel
    planner: ServicePlanner
    fds: dict[str, int]
    patience_s: float = PATIENCE_S
    _closing: contextlib.AsyncExitStack = field(default_factory=contextlib.AsyncExitStack)

    async def program(self) -> None:
        """Commit what changed in the planner."""
        batch = self.planner.take_batch()
        if batch:
            applied = await self.kernel.apply((CommitNft(batch),))
            assert applied.ok, applied.failures
        assert await self.kernel.observe_nft(TABLE) == self.planner.desired()

    async def serve(self, where: str, family: Family, port: int, host: str = "") -> None:
        """TCP and UDP servers in `where` that answer with its name and the client's address as they see it. `host`: the address
        to answer at, where there are several that datagrams might be answered from."""
        any_host = host or ("0.0.0.0" if family is Family.IPV4 else "::")

        async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            while await reader.readline():
                writer.write(f"{where} {writer.get_extra_info('peername')[0]}\n".encode())
            writer.close()

        server = await asyncio.start_server(answer, sock=self.open(where, socket.SOCK_STREAM, any_host, port))
        self._closing.callback(server.close)
        await self._serve_udp(where, any_host, port)

    async def _serve_udp(self, where: str, host: str, port: int) -> None:
        class Echo(asyncio.DatagramProtocol):
            def connection_made(self, transport: asyncio.BaseTransport) -> None:
                self.transport = transport

            def datagram_received(self, data: bytes, addr: tuple[str, int]) -> None:
                self.transport.sendto(f"{where} {addr[0]}".encode(), addr)  # type: ignore[attr-defined]  # a DatagramTransport

        transport, _ = await asyncio.get_running_loop().create_datagram_endpoint(
            Echo, sock=self.open(where, socket.SOCK_DGRAM, host, port)
        )
        self._closing.callback(transport.close)

    def open(self, where: str, kind: socket.SocketKind, address: str, bound_to: int | None = None) -> socket.socket:
        """A socket in `where` of the address's family; `bound_to` that port of the address."""

        def make() -> socket.socket:
            sock = socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET, kind)
            sock.setblocking(False)
            if bound_to is not None:
                if ":" in address:
                    sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                sock.bind((address, bound_to))
            return sock

        return run_in_netns(self.fds[where], make)

    async def ask(
        self, where: str, address: str, port: int, *, udp: bool = False, patience_s: float | None = None
    ) -> tuple[str, str]:
        """(who answered, the source address they saw). TimeoutError: silence; ConnectionRefusedError: refused."""
        loop = asyncio.get_running_loop()
        with self.open(where, socket.SOCK_DGRAM if udp else socket.SOCK_STREAM, address) as sock:
            async with asyncio.timeout(patience_s or self.patience_s):
                await loop.sock_connect(sock, (address, port))
                try:
                    await loop.sock_sendall(sock, b"who?\n")
                except PermissionError as error:  # what a rejected datagram of one's own machine gives
                    raise ConnectionRefusedError from error
                name, source = (await loop.sock_recv(sock, 200)).decode().split()
        return name, source

    async def who(self, where: str, address: str, port: int, *, times: int = 1, udp: bool = False) -> set[str]:
        return {(await self.ask(where, address, port, udp=udp))[0] for _ in range(times)}

    async def close(self) -> None:
        await self._closing.aclose()
        await self.kernel.close()
        for fd in self.fds.values():
            os.close(fd)


@contextlib.asynccontextmanager
async def service_rig(port: int = 8080, *, patience_s: float = PATIENCE_S) -> AsyncIterator[ServiceRig]:
    """Everything up, with servers on `port` everywhere but on the node."""
    fds = {name: create_netns() for name in ("node", WORLD, FAR, *PODS)}
    kernel = LinuxKernel(fds["node"])
    for name in (WORLD, FAR, *PODS):
        kernel.attach(NetnsName(name), fds[name])
    rig = ServiceRig(kernel, ServicePlanner(FACTS), fds, patience_s)
    try:
        applied = await kernel.apply(tuple(_network()))
        assert applied.ok, applied.failures
        for name in (*PODS, FAR, WORLD):
            for family in Family:
                await rig.serve(name, family, port)
        await rig.program()
        yield rig
    finally:
        await rig.close()


def pick(family: Family, ipv4: str, ipv6: str) -> str:
    return ipv4 if family is Family.IPV4 else ipv6


def address(text: str) -> IPAddress:
    return ipaddress.ip_address(text)


def stranger_iptables(fd: int, *arguments: str, program: str = "/usr/sbin/iptables-legacy") -> None:
    """What somebody else does to the tables of `fd`'s namespace. With a lock of its own: the machine's is root's."""
    with tempfile.NamedTemporaryFile() as lock:
        env = {**os.environ, "XTABLES_LOCKFILE": lock.name}
        run_in_netns(fd, lambda: subprocess.run([program, *arguments], check=True, capture_output=True, env=env))


async def neighbour_reaches(rig: ServiceRig, listener: socket.socket) -> bool:
    """Whether a datagram that a neighbour (the world) addresses to 127.0.0.1 arrives at a UDP socket there."""
    port = listener.getsockname()[1]
    packet = Packet(address("198.18.1.1"), address("127.0.0.1"), protocol=17, sport=4000, dport=port, payload=b"who?\n")
    frame = build_frame(Frame(_mac(rig, "world", "eth0"), _mac(rig, "node", "eth0"), 0x0800, packet))

    def send() -> None:
        with socket.socket(socket.AF_PACKET, socket.SOCK_RAW) as sock:
            sock.bind(("eth0", 0))
            sock.send(frame)

    run_in_netns(rig.fds["world"], send)
    try:
        async with asyncio.timeout(PATIENCE_S):
            await asyncio.get_running_loop().sock_recv(listener, 100)
    except TimeoutError:
        return False
    return True


def _mac(rig: ServiceRig, where: str, dev: str) -> str:
    def read() -> bytes:
        with socket.socket(socket.AF_PACKET, socket.SOCK_RAW) as sock:
            sock.bind((dev, 0))
            return bytes(sock.getsockname()[4])

    return run_in_netns(rig.fds[where], read).hex(":")
