"""Notifications of one namespace: links, addresses, routes, neighbours, forwarding entries, nftables, kernel switches."""

import asyncio
import ctypes
import errno
import socket
import struct
import sys
from collections import deque
from collections.abc import Collection, Iterator, Mapping
from typing import Self

from podwire.kernel.exchange import RECEIVE_BYTES
from podwire.kernel.netns import run_in_netns
from podwire.kernel.port import KernelEvent
from podwire.kernel.rtnlsocket import RtnlSocket, netlink_socket
from podwire.kernel.switchwatch import SwitchWatch
from podwire.model.ids import NetnsName
from podwire.wire import rtnl, rtnlread
from podwire.wire.netlink import NETLINK_NETFILTER, NETLINK_ROUTE, Message, NetlinkError, as_str, parse_attrs, parse_messages

_RTNLGRP_LINK, _RTNLGRP_NEIGH = 1, 3
_RTNLGRP_IPV4_IFADDR, _RTNLGRP_IPV4_ROUTE = 5, 7
_RTNLGRP_IPV6_IFADDR, _RTNLGRP_IPV6_ROUTE = 9, 11
_ROUTE_GROUPS = (
    _RTNLGRP_LINK,
    _RTNLGRP_NEIGH,
    _RTNLGRP_IPV4_IFADDR,
    _RTNLGRP_IPV4_ROUTE,
    _RTNLGRP_IPV6_IFADDR,
    _RTNLGRP_IPV6_ROUTE,
)
_NFNLGRP_NFTABLES = 7

_NFNL_SUBSYS_NFTABLES = 10
_NFGENMSG_BYTES = 4
_NFTA_TABLE = 1  # NFTA_TABLE_NAME, NFTA_CHAIN_TABLE, NFTA_RULE_TABLE, …: all of them 1
_NFT_NAMES = {0: "table", 3: "chain", 6: "rule", 9: "set", 12: "element", 18: "object", 22: "flowtable"}
_NFT_REMOVALS = {2: 0, 5: 3, 8: 6, 11: 9, 14: 12, 20: 18, 24: 22}
"""NFT_MSG_DEL… → the NFT_MSG_NEW… of the same thing (linux/netfilter/nf_tables.h)."""

_SO_ATTACH_FILTER = 26
_BPF = struct.Struct("=HBBI")
_BPF_LOAD_WORD, _BPF_JUMP_IF_EQUAL, _BPF_RETURN = 0x20, 0x15, 0x06
_NLMSG_PID_OFFSET = 12

_RECEIVE_BUFFER = 1 << 20
_DATAGRAMS_PER_TURN = 64
_SWITCHES_SECONDS = 0.25
"""Time between two looks at the switches, for which the kernel has no notices: 15 µs a node each."""


class EventStream:
    """The notifications since it was made, but for nftables transactions from one of `own_ports`. An asynchronous iterator;
    `close` ends it. Needs a running loop. `switches`: kernel switches to watch, and the values they were set to.

    When the kernel drops notices because they came faster than they were read, one event with `what` "lost" says so:
    observe everything again."""

    def __init__(self, ns: NetnsName, fd: int, own_ports: Collection[int], switches: Mapping[str, str] | None = None) -> None:
        self._ns, self._own_ports = ns, own_ports
        self._ready: deque[KernelEvent] = deque()
        self._wake = asyncio.Event()
        self._closed = False
        self._sockets, self._names = run_in_netns(fd, lambda: _open(fd, own_ports))
        self._loop = asyncio.get_running_loop()
        for sock in self._sockets:
            self._loop.add_reader(sock, self._drain, sock)
        self._switches = SwitchWatch(fd, switches) if switches is not None else None
        self._timer = self._loop.call_later(_SWITCHES_SECONDS, self._look) if self._switches else None

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> KernelEvent:
        while not self._ready:
            if self._closed:
                raise StopAsyncIteration
            self._wake.clear()
            await self._wake.wait()
        return self._ready.popleft()

    async def aclose(self) -> None:
        self.close()

    def close(self) -> None:
        """Stop listening. What has been read can still be taken."""
        if self._closed:
            return
        self._closed = True
        for sock in self._sockets:
            self._loop.remove_reader(sock)
            sock.close()
        if self._timer is not None:
            self._timer.cancel()
        if self._switches is not None:
            self._switches.close()
        self._wake.set()

    def _look(self) -> None:
        assert self._switches is not None
        for key, value in self._switches.look():
            self._add(KernelEvent(self._ns, "sysctl", f"{key} is {value}", removed=False))
        self._timer = self._loop.call_later(_SWITCHES_SECONDS, self._look)
        if self._ready:
            self._wake.set()

    def _drain(self, sock: socket.socket) -> None:
        for _ in range(_DATAGRAMS_PER_TURN):
            try:
                data = sock.recv(RECEIVE_BYTES)
            except BlockingIOError:
                break
            except OSError as error:
                if error.errno != errno.ENOBUFS:
                    raise
                self._add(KernelEvent(self._ns, "lost", "notices were dropped", removed=False))
                continue
            for event in self._read(data):
                self._add(event)
        if self._ready:
            self._wake.set()

    def _add(self, event: KernelEvent) -> None:
        # A load of 50,000 elements makes as many notices; one after another of the same kind tell nothing new.
        if not self._ready or self._ready[-1] != event:
            self._ready.append(event)

    def _read(self, data: bytes) -> Iterator[KernelEvent]:
        try:
            for msg in parse_messages(data):
                notice = self._nft_notice(msg) if msg.type >> 8 == _NFNL_SUBSYS_NFTABLES else self._rtnl_notice(msg)
                if notice is not None:
                    yield KernelEvent(self._ns, *notice, ours=msg.pid in self._own_ports)
        except NetlinkError:
            yield KernelEvent(self._ns, "lost", "a notice could not be read", removed=False)

    def _rtnl_notice(self, msg: Message) -> rtnlread.Notice | None:
        notice = rtnlread.read_notice(msg, self._names)
        if msg.type in (rtnl.RTM_NEWLINK, rtnl.RTM_DELLINK) and notice is not None:
            raw = rtnlread.read_link(msg)
            if notice.removed:
                self._names.pop(raw.index, None)
            else:
                self._names[raw.index] = raw.name
        return notice

    def _nft_notice(self, msg: Message) -> rtnlread.Notice | None:
        kind = msg.type & 0xFF
        added = _NFT_REMOVALS.get(kind, kind)
        if added not in _NFT_NAMES:
            return None  # NFT_MSG_NEWGEN and traces
        attrs = parse_attrs(msg.payload, _NFGENMSG_BYTES)
        table = as_str(attrs.get(_NFTA_TABLE, b""))
        return rtnlread.Notice("nft", f"{_NFT_NAMES[added]} in table {table}", removed=kind in _NFT_REMOVALS)


def _open(fd: int, own_ports: Collection[int]) -> tuple[tuple[socket.socket, ...], dict[int, str]]:
    """Runs in the namespace: the two sockets, and the devices' names by index as they are after listening began."""
    opened: list[socket.socket] = []
    try:
        for protocol, groups in ((NETLINK_ROUTE, _ROUTE_GROUPS), (NETLINK_NETFILTER, (_NFNLGRP_NFTABLES,))):
            sock = netlink_socket(protocol, groups)
            opened.append(sock)
            sock.setblocking(False)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _RECEIVE_BUFFER)
            if protocol == NETLINK_NETFILTER:
                _ignore(sock, own_ports)
        requests = RtnlSocket(fd)
        try:
            raws = [rtnlread.read_link(msg) for msg in requests.dump(rtnl.dump_links())]
        finally:
            requests.close()
    except BaseException:
        for sock in opened:
            sock.close()
        raise
    return tuple(opened), {raw.index: raw.name for raw in raws}


def _ignore(sock: socket.socket, ports: Collection[int]) -> None:
    """Have the kernel drop what `ports` caused: a load of 50,000 elements would overrun the buffer with notices of itself.

    A classic BPF program over the datagram's first header; all notices of one transaction name the same port."""
    program = [_BPF.pack(_BPF_LOAD_WORD, 0, 0, _NLMSG_PID_OFFSET)]
    for port in ports:
        loaded = int.from_bytes(port.to_bytes(4, sys.byteorder), "big")  # BPF loads big-endian, the header is in host order
        program += [_BPF.pack(_BPF_JUMP_IF_EQUAL, 0, 1, loaded), _BPF.pack(_BPF_RETURN, 0, 0, 0)]
    program.append(_BPF.pack(_BPF_RETURN, 0, 0, 0xFFFFFFFF))
    code = ctypes.create_string_buffer(b"".join(program))
    sock.setsockopt(socket.SOL_SOCKET, _SO_ATTACH_FILTER, struct.pack("@HP", len(program), ctypes.addressof(code)))
