"""The Linux kernel behind `port.Kernel`: rtnetlink, nftables, /proc/sys, in namespaces held by descriptor."""

import asyncio
import errno
import os
import socket
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field, replace
from itertools import chain, groupby
from typing import TypeVar

from podwire.kernel import opcodes
from podwire.kernel.conntrack import ConntrackClient, forget_flows
from podwire.kernel.events import EventStream
from podwire.kernel.netns import current_netns, in_netns
from podwire.kernel.nftclient import NftClient
from podwire.kernel.port import KernelError
from podwire.kernel.rtnlsocket import RtnlSocket, open_netlink
from podwire.kernel.sysctl import read_sysctls, write_sysctls
from podwire.kernel.tun import make_tun
from podwire.kernel.vethremoval import VethRemoval
from podwire.kernel.wireguard import WireguardClient
from podwire.model.addr import IPAddress
from podwire.model.errors import Unsupported
from podwire.model.flow import Flow
from podwire.model.ids import HOST, NetnsName
from podwire.model.kernelstate import Address, Link, NetState, Route, Tun, Veth, Vxlan, Wireguard, WireguardPeer
from podwire.model.nft import Data, NftSet, Ruleset, TableRef
from podwire.model.ops import (
    AddLink,
    Applied,
    ChangeLink,
    CommitNft,
    DelLink,
    DelWireguardPeer,
    Failure,
    Op,
    Plan,
    SetSysctl,
    SetWireguardPeer,
)
from podwire.wire import rtnl, rtnlread
from podwire.wire.netlink import NETLINK_NETFILTER

T = TypeVar("T")


@dataclass(slots=True)
class _Space:
    """One namespace: its descriptor and what was opened in it, each at first use.

    A pod's sockets are closed after each request: a node with hundreds of pods would hold as many, each for a single use."""

    label: NetnsName
    fd: int
    switches: dict[str, str] = field(default_factory=dict)
    """The kernel switches that were set, and to what."""
    _rtnl: RtnlSocket | None = None
    _netfilter: socket.socket | None = None
    _nft: NftClient | None = None
    _conntrack: socket.socket | None = None
    _wireguard: WireguardClient | None = None

    @property
    def rtnl(self) -> RtnlSocket:
        if self._rtnl is None:
            self._rtnl = RtnlSocket(self.fd)
        return self._rtnl

    @property
    def netfilter(self) -> socket.socket:
        if self._netfilter is None:
            self._netfilter = open_netlink(self.fd, NETLINK_NETFILTER)
        return self._netfilter

    @property
    def nft(self) -> NftClient:
        if self._nft is None:
            self._nft = NftClient(self.netfilter)
        return self._nft

    @property
    def conntrack(self) -> ConntrackClient:
        if self._conntrack is None:
            self._conntrack = open_netlink(self.fd, NETLINK_NETFILTER)
        return ConntrackClient(self._conntrack)

    @property
    def wireguard(self) -> WireguardClient:
        if self._wireguard is None:
            self._wireguard = WireguardClient(self.fd)
        return self._wireguard

    def own_ports(self) -> tuple[int, int]:
        """The numbers by which the kernel's notices name our sockets."""
        address: tuple[int, int] = self.netfilter.getsockname()
        return self.rtnl.port_id, address[0]

    def release(self) -> None:
        """Close the sockets; the next use opens them again."""
        for sock in (self._rtnl, self._netfilter, self._conntrack, self._wireguard):
            if sock is not None:
                sock.close()
        self._rtnl = self._netfilter = self._nft = self._conntrack = self._wireguard = None

    def close(self) -> None:
        self.release()
        os.close(self.fd)


class LinuxKernel:
    """One node's kernel. `netns_fd` is its own namespace (duplicated; None: that of the calling thread).

    Requests run one after another in a thread of its own, never on the loop: they wait for the kernel's rtnl lock, which the
    destruction of 100 pod namespaces held for 41 ms, where the thread costs 0.13 ms. A cancelled `apply` that has begun
    runs to its end."""

    def __init__(self, netns_fd: int | None = None) -> None:
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="kernel")
        self._removal = VethRemoval()
        host = _Space(HOST, current_netns() if netns_fd is None else os.dup(netns_fd))
        self._own_ports = host.own_ports()
        self._spaces = {HOST: host}
        self._streams: list[EventStream] = []

    def attach(self, ns: NetnsName, fd: int) -> None:
        if ns == HOST:
            raise KernelError("the node's own namespace cannot be attached a second time", errno.EINVAL)
        self._space(HOST)
        self.detach(ns)
        self._spaces[ns] = _Space(ns, os.dup(fd))

    def detach(self, ns: NetnsName) -> None:
        if ns != HOST and ns in self._spaces:
            # In its turn: requests made before may still use it, later ones do not find it.
            self._worker.submit(self._spaces.pop(ns).close)

    async def observe(self, ns: NetnsName = HOST) -> NetState:
        space = self._space(ns)
        return await self._off_loop(lambda: _observe(space))

    async def observe_devices(self, ns: NetnsName = HOST) -> NetState:
        space = self._space(ns)

        def read() -> NetState:
            raws, addresses = _observe_devices(space.rtnl)
            return NetState(links=rtnlread.links(raws), addresses=addresses)

        return await self._off_loop(read)

    async def observe_wireguard(self, devices: Sequence[str]) -> dict[str, tuple[Wireguard, tuple[WireguardPeer, ...]]]:
        space = self._space(HOST)

        def read() -> dict[str, tuple[Wireguard, tuple[WireguardPeer, ...]]]:
            found = {}
            for name in devices:
                with suppress(KernelError, Unsupported):
                    state = space.wireguard.read(name)
                    found[name] = state.device, state.peers
            return found

        return await self._off_loop(read)

    async def observe_nft(self, table: str, ns: NetnsName = HOST) -> Ruleset:
        space = self._space(ns)
        return await self._off_loop(lambda: space.nft.observe(table))

    async def lookup_nft(self, table: TableRef, of: NftSet, keys: Sequence[bytes]) -> dict[bytes, Data]:
        space = self._space(HOST)
        return await self._off_loop(lambda: space.nft.lookup(table, of, keys))

    async def count_nft(self, table: TableRef, of: NftSet) -> dict[bytes, tuple[Data, tuple[int, int]]]:
        space = self._space(HOST)

        def count() -> dict[bytes, tuple[Data, tuple[int, int]]]:
            try:
                return space.nft.elements(table, of.name)
            except KernelError as error:
                if error.errno == errno.ENOENT:
                    return {}
                raise

        return await self._off_loop(count)

    async def read_sysctl(self, key: str, ns: NetnsName = HOST) -> str:
        fd = self._space(ns).fd
        return (await self._off_loop(lambda: read_sysctls(fd, (key,)))).get(key, "")

    async def forget_flows(self, wanted: Callable[[Flow], bool], ns: NetnsName = HOST) -> int:
        space = self._space(ns)
        return await self._off_loop(lambda: forget_flows(space.conntrack, wanted))

    async def carries(self, name: str, ns: NetnsName = HOST) -> bool:
        space = self._space(ns)
        return await self._off_loop(lambda: _carries(space, name))

    async def apply(self, plan: Plan) -> Applied:
        if not plan:
            return Applied(0)
        self._space(HOST)
        spaces = dict(self._spaces)
        return await self._off_loop(lambda: _Run(spaces, self._removal).run(plan))

    async def listen(self, port: int, address: IPAddress) -> socket.socket | None:
        return await in_netns(self._space(HOST).fd, lambda: _listen(port, address))

    def events(self) -> EventStream:
        host = self._space(HOST)
        stream = EventStream(HOST, host.fd, self._own_ports, host.switches)
        self._streams.append(stream)
        return stream

    async def close(self) -> None:
        for stream in self._streams:
            stream.close()
        for space in self._spaces.values():
            self._worker.submit(space.close)
        self._streams.clear()
        self._spaces.clear()
        for shutdown in (self._worker.shutdown, self._removal.close):
            await asyncio.get_running_loop().run_in_executor(None, shutdown)

    def _space(self, ns: NetnsName) -> _Space:
        space = self._spaces.get(ns)
        if space is None:
            raise KernelError(f"no network namespace {ns!r} is attached" if ns else "the kernel port is closed", errno.ENOENT)
        return space

    async def _off_loop(self, fn: Callable[[], T]) -> T:
        pods = [space for ns, space in self._spaces.items() if ns != HOST]

        def work() -> T:
            try:
                return fn()
            finally:
                for space in pods:
                    space.release()

        return await asyncio.wrap_future(self._worker.submit(work))


_FREEBIND = {4: (socket.IPPROTO_IP, 15), 6: (socket.IPPROTO_IPV6, 78)}
"""IP_FREEBIND and IPV6_FREEBIND (linux/in.h, linux/in6.h), by IP version."""


def _listen(port: int, address: IPAddress) -> socket.socket | None:
    try:
        sock = socket.socket(socket.AF_INET if address.version == 4 else socket.AF_INET6, socket.SOCK_STREAM)
    except OSError as error:
        if error.errno == errno.EAFNOSUPPORT:  # a host without IPv6
            return None
        raise
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if address.version == 6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        if not address.is_unspecified:
            sock.setsockopt(*_FREEBIND[address.version], 1)  # an address that is new may be in duplicate detection
        sock.bind((str(address), port))
        sock.listen(64)
    except OSError as error:
        sock.close()
        if error.errno == errno.EADDRNOTAVAIL and address.is_unspecified:
            return None
        raise
    return sock


def _carries(space: _Space, name: str) -> bool:
    answers = space.rtnl.execute([rtnl.get_link(name)]).answers
    return any(rtnlread.read_link(answer).running for answer in answers.values())


def _observe_devices(sock: RtnlSocket) -> tuple[list[rtnlread.RawLink], frozenset[Address]]:
    raws = [rtnlread.read_link(msg) for msg in sock.dump(rtnl.dump_links())]
    names = {raw.index: raw.name for raw in raws}
    addresses = (rtnlread.read_address(msg, names) for msg in sock.dump(rtnl.dump_addresses()))
    return raws, frozenset(filter(None, addresses))


def _observe(space: _Space) -> NetState:
    sock = space.rtnl
    raws, addresses = _observe_devices(sock)
    names = {raw.index: raw.name for raw in raws}
    links = rtnlread.links(raws)
    families = (rtnl.AF_INET, rtnl.AF_INET6)
    routes = (rtnlread.read_route(msg, names) for af in families for msg in sock.dump(rtnl.dump_routes(af)))
    tunnels = {raw.index: raw.name for raw in raws if isinstance(links[raw.name].kind, Vxlan)}
    neighbours = (rtnlread.read_neighbour(msg, names) for af in families for msg in sock.dump(rtnl.dump_neighbours(af)))
    secured = {link.name: space.wireguard.read(link.name) for link in links.values() if isinstance(link.kind, Wireguard)}
    links |= {name: replace(links[name], kind=state.device) for name, state in secured.items()}
    entries = (rtnlread.read_fdb(msg, names) for index in tunnels for msg in sock.dump(rtnl.dump_fdb(index)))
    return NetState(
        links=links,
        addresses=addresses,
        routes=frozenset([*filter(None, routes), *_left_by_flannel(sock, tunnels)]),
        neighbours=frozenset(filter(None, neighbours)),
        fdb=frozenset(filter(None, entries)),
        sysctls=read_sysctls(space.fd, sorted(space.switches)),
        wireguard=frozenset(peer for state in secured.values() for peer in state.peers),
    )


def _left_by_flannel(sock: RtnlSocket, tunnels: Mapping[int, str]) -> Iterator[Route]:
    """Onlink routes over VXLAN devices with the protocol that flannel (as `ip route`) leaves: taken over with the device, or,
    of peers that are gone, nobody's."""
    if not tunnels:
        return
    for af in (rtnl.AF_INET, rtnl.AF_INET6):
        for msg in sock.dump(rtnl.dump_routes(af, rtnl.RTPROT_BOOT)):
            route = rtnlread.read_route(msg, tunnels, rtnl.RTPROT_BOOT)
            if route is not None and route.onlink and route.dev:
                yield route


class _Run:
    """One plan's execution: contiguous rtnetlink operations of one namespace go out together."""

    def __init__(self, spaces: Mapping[NetnsName, _Space], removal: VethRemoval) -> None:
        self._spaces, self._removal = spaces, removal
        self._indices: dict[NetnsName, dict[str, int]] = {}
        self._macs: dict[tuple[NetnsName, str], str] = {}
        self._failures: list[Failure] = []

    def run(self, plan: Plan) -> Applied:
        for (ns, kind), group in groupby(plan, key=lambda op: (op.ns, _kind(op))):
            ops = list(group)
            space = self._spaces.get(ns)
            if space is None:
                self._fail(ops, errno.ENOENT, f"no network namespace {ns!r} is attached")
                continue
            try:
                if kind is SetSysctl:
                    self._sysctls(space, [op for op in ops if isinstance(op, SetSysctl)])
                elif kind is CommitNft:
                    self._nft(space, [op for op in ops if isinstance(op, CommitNft)])
                elif kind is SetWireguardPeer:
                    self._wireguard_peers(space, [op for op in ops if isinstance(op, SetWireguardPeer | DelWireguardPeer)])
                else:
                    if kind is DelLink:
                        gone = self._removal.remove(space.fd, space.rtnl, [op.name for op in ops if isinstance(op, DelLink)])
                        ops = [op for op in ops if not (isinstance(op, DelLink) and op.name in gone)]
                        self._indices.clear()  # a veth's other end went too, wherever it was
                    self._links_and_routes(space, [op for op in ops if isinstance(op, opcodes.RtnlOp)])
            except Unsupported as error:
                self._fail(ops, errno.EOPNOTSUPP, str(error))
            except KernelError as error:
                self._fail(ops, error.errno or errno.EIO, str(error))
            except OSError as error:
                self._fail(ops, error.errno or errno.EIO, str(error.strerror or error))
        return Applied(done=len(plan) - len(self._failures), failures=tuple(self._failures))

    def _fail(self, ops: Iterable[Op], code: int, message: str) -> None:
        """Fail those of `ops` that have not failed yet."""
        known = {id(failure.op) for failure in self._failures}
        self._failures += [Failure(op, code, message) for op in ops if id(op) not in known]

    def _sysctls(self, space: _Space, ops: list[SetSysctl]) -> None:
        # A later value of one key wins; each keeps its place otherwise.
        refused = write_sysctls(space.fd, {op.key: op.value for op in ops})
        for op in ops:
            if op.key in refused:
                error = refused[op.key]
                self._fail([op], error.errno or errno.EIO, f"setting {op.key} to {op.value}: {error.strerror}")
            else:
                space.switches[op.key] = op.value

    def _nft(self, space: _Space, ops: list[CommitNft]) -> None:
        for op in ops:
            try:
                space.nft.commit(op.batch)
            except KernelError as error:
                self._fail([op], error.errno or errno.EIO, str(error))

    def _wireguard_peers(self, space: _Space, ops: list[SetWireguardPeer | DelWireguardPeer]) -> None:
        try:
            outcome = space.wireguard.change_peers([(op.peer, isinstance(op, SetWireguardPeer)) for op in ops])
        except ValueError as error:
            self._fail(ops, errno.EINVAL, str(error))
            return
        for position, ack in outcome.errors.items():
            if not (isinstance(ops[position], DelWireguardPeer) and ack.errno == errno.ENODEV):
                self._fail([ops[position]], ack.errno, ack.message or os.strerror(ack.errno))

    def _links_and_routes(self, space: _Space, ops: list[opcodes.RtnlOp]) -> None:
        pending: list[tuple[opcodes.RtnlOp, bytes]] = []
        for position, op in enumerate(ops):
            needed, known = opcodes.devices(op), self._known(space)
            missing = [name for name in needed if name not in known]
            if missing:
                self._flush(space, pending)
                self._resolve(space, chain.from_iterable(map(opcodes.devices, ops[position:])))
                missing = [name for name in needed if name not in known]
            if missing:
                if not opcodes.is_absent(op, errno.ENODEV):
                    self._fail([op], errno.ENODEV, f"there is no device {missing[0]}")
                continue
            try:
                if isinstance(op, AddLink):
                    self._flush(space, pending)
                    self._add_link(space, op)
                else:
                    pending += [(op, raw) for raw in opcodes.encode(self._without_needless_mac(op), known)]
                    if isinstance(op, ChangeLink) and isinstance(op.link.kind, Wireguard):
                        self._flush(space, pending)
                        self._key_and_port(space, op, op.link)
            except ValueError as error:
                self._fail([op], errno.EINVAL, str(error))
            if isinstance(op, DelLink):
                # A veth's other end goes too, and a VXLAN with its underlay: nothing known is certain any more.
                self._flush(space, pending)
                self._indices.clear()
        self._flush(space, pending)

    def _add_link(self, space: _Space, op: AddLink) -> None:
        """Made first, finished only if that succeeded: otherwise an existing link of that name would be changed."""
        peer_ns = op.link.kind.peer_ns if isinstance(op.link.kind, Veth) else space.label
        other = self._spaces.get(peer_ns)
        if other is None:
            self._fail([op], errno.ENOENT, f"no network namespace {peer_ns!r} is attached")
            return
        if op.peer is not None and op.peer.master:
            self._resolve(other, (op.peer.master,))
            if op.peer.master not in self._known(other):
                self._fail([op], errno.ENODEV, f"there is no device {op.peer.master}")
                return
        indices = self._known(space)
        if isinstance(op.link.kind, Tun):
            if not self._add_tun(space, op):
                return
        else:
            made = rtnl.new_link(op.link, indices=indices, peer=op.peer, peer_ns_fd=None if other is space else other.fd)
            if not self._flush(space, [(op, made)]):
                return
        if isinstance(op.link.kind, Wireguard) and not self._key_and_port(space, op, op.link):
            space.rtnl.execute([rtnl.del_link(op.link.name)])
            return
        settled = self._flush(space, [(op, raw) for raw in rtnl.settle_link(op.link, indices=indices)])
        if settled and op.peer is not None:
            settled = self._flush(other, [(op, raw) for raw in rtnl.settle_link(op.peer, indices=self._known(other))])
        if not settled:
            space.rtnl.execute([rtnl.del_link(op.link.name)])  # all of it or nothing

    def _add_tun(self, space: _Space, op: AddLink) -> bool:
        try:
            make_tun(space.fd, op.link.name)
        except OSError as error:
            self._fail([op], error.errno or errno.EIO, error.strerror or str(error))
            return False
        return self._flush(space, [(op, raw) for raw in rtnl.change_link(replace(op.link, up=False, master=None), indices={})])

    def _key_and_port(self, space: _Space, op: AddLink | ChangeLink, link: Link) -> bool:
        """Give a WireGuard device what rtnetlink cannot. Whether nothing was refused."""
        assert isinstance(link.kind, Wireguard)
        for ack in space.wireguard.set_device(link.name, link.kind).errors.values():
            self._fail([op], ack.errno, ack.message or os.strerror(ack.errno))
            return False
        return True

    def _known(self, space: _Space) -> dict[str, int]:
        return self._indices.setdefault(space.label, {})

    def _resolve(self, space: _Space, names: Iterable[str]) -> None:
        """Learn the indices of those devices that exist by now."""
        known = self._known(space)
        wanted = [name for name in dict.fromkeys(names) if name not in known]
        outcome = space.rtnl.execute([rtnl.get_link(name) for name in wanted])
        for position, name in enumerate(wanted):
            if position in outcome.answers:
                found = rtnlread.read_link(outcome.answers[position])
                known[name], self._macs[space.label, name] = found.index, found.mac

    def _without_needless_mac(self, op: opcodes.RtnlOp) -> opcodes.RtnlOp:
        """Setting the MAC that a device has already would flush its neighbours, permanent ones too."""
        if not isinstance(op, ChangeLink) or op.link.mac is None:
            return op
        present = self._macs.get((op.ns, op.link.name))
        self._macs[op.ns, op.link.name] = op.link.mac
        return replace(op, link=replace(op.link, mac=None)) if present == op.link.mac.lower() else op

    def _flush(self, space: _Space, pending: list[tuple[opcodes.RtnlOp, bytes]]) -> bool:
        """Send and clear `pending`. Whether nothing was refused."""
        if not pending:
            return True
        sent, pending[:] = pending[:], []
        outcome = space.rtnl.execute([raw for _, raw in sent])
        refused = [(sent[position][0], ack) for position, ack in sorted(outcome.errors.items())]
        real = [(op, ack) for op, ack in refused if not opcodes.is_absent(op, ack.errno)]
        for op, ack in real:
            self._fail([op], ack.errno, ack.message or os.strerror(ack.errno))
        return not real


def _kind(op: Op) -> type:
    if isinstance(op, SetWireguardPeer | DelWireguardPeer):
        return SetWireguardPeer
    return type(op) if isinstance(op, SetSysctl | CommitNft | DelLink) else AddLink
