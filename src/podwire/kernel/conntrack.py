"""A namespace's tracked connections over netlink: read, look up, forget. Blocking parts run off the event loop."""

import errno
import os
import socket
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

from podwire.kernel.exchange import Exchange
from podwire.kernel.netns import in_netns
from podwire.kernel.port import KernelError
from podwire.kernel.rtnlsocket import netlink_socket
from podwire.model.addr import Family
from podwire.model.flow import Flow, FlowTuple
from podwire.wire import conntrack, netlink
from podwire.wire.netlink import NETLINK_NETFILTER, Batch
from podwire.wire.packet import Packet

T = TypeVar("T")

_TIMEOUT_S = 10.0
_BATCH_COUNT = 128
_BATCH_BYTES = 1 << 15


class ConntrackClient:
    """Requests over `sock`, a NETLINK_NETFILTER socket with extended acks, opened in the namespace; it stays the caller's.
    Blocking; not for use by two threads at once."""

    def __init__(self, sock: socket.socket) -> None:
        # Numbers apart from those of another client on the same socket: its left-overs are not taken for ours.
        self._exchange = Exchange(sock, "conntrack", timeout=_TIMEOUT_S, first=1 << 29)

    def flows(self, family: Family | None = None) -> Iterator[Flow]:
        """All flows, of one family or of both, as they are read."""
        for af in Family if family is None else (family,):
            yield from map(conntrack.read_flow, self._exchange.dump(conntrack.dump_flows(af)))

    def lookup(self, original: FlowTuple) -> Flow | None:
        """The flow with that tuple in either direction, in zone 0."""
        batch = self._exchange.execute((conntrack.get_flow(original),))
        if 0 in batch.answers:
            return conntrack.read_flow(batch.answers[0])
        self._check(batch, allowed=errno.ENOENT)
        return None

    def forget(self, flows: Sequence[Flow]) -> int:
        """Remove them: their next packet is judged by the rules anew. Returns how many were still there."""
        gone = 0
        requests = [conntrack.del_flow(flow) for flow in flows]
        for group in netlink.chunks(requests, max_bytes=_BATCH_BYTES, max_count=_BATCH_COUNT):
            batch = self._exchange.execute(group)
            self._check(batch, allowed=errno.ENOENT)
            gone += len(group) - len(batch.errors)
        return gone

    def _check(self, batch: Batch, *, allowed: int) -> None:
        for ack in batch.errors.values():
            if ack.errno != allowed:
                raise KernelError(f"conntrack refused a request: {ack.message or os.strerror(ack.errno)}", ack.errno)


def forget_flows(client: ConntrackClient, wanted: Callable[[Flow], bool], family: Family | None = None) -> int:
    """Forget every flow for which `wanted` is true. Returns how many."""
    return client.forget([flow for flow in client.flows(family) if wanted(flow)])


async def read_flows(fd: int, wanted: Callable[[Flow], bool] = lambda _: True) -> tuple[Flow, ...]:
    """The flows of the namespace behind `fd` for which `wanted` is true."""
    return await in_netns(fd, lambda: _with_client(lambda client: tuple(filter(wanted, client.flows()))))


async def lookup(fd: int, packet: Packet) -> str:
    """conntrack's record of the connection that `packet` (as it came in) belongs to, as text; empty where it has none."""
    innermost = packet.innermost
    original = FlowTuple(innermost.src, innermost.dst, innermost.protocol, innermost.sport, innermost.dport)
    flow = await in_netns(fd, lambda: _with_client(lambda client: client.lookup(original)))
    return str(flow) if flow is not None else ""


def _with_client(fn: Callable[[ConntrackClient], T]) -> T:
    with netlink_socket(NETLINK_NETFILTER) as sock:
        return fn(ConntrackClient(sock))
