"""A netlink socket that belongs to the namespace it was opened in. Blocking: `LinuxKernel` calls it off the event loop."""

import errno
import socket
from collections.abc import Sequence
from dataclasses import dataclass, field

from podwire.kernel.exchange import Exchange
from podwire.kernel.netns import run_in_netns
from podwire.wire import netlink
from podwire.wire.netlink import Ack, Message

_BATCH_COUNT = 128
"""Requests per datagram. If all are refused, their answers (about 1 KiB of buffer each) still fit the default SO_RCVBUF."""

_BATCH_BYTES = 1 << 15
_TIMEOUT_S = 30.0
"""A request waits for the kernel's rtnl lock, which a large namespace's destruction can hold for seconds."""


@dataclass(slots=True)
class Outcome:
    """What became of requests, by their index: `errors` has those refused, `answers` the objects that a GET returned."""

    errors: dict[int, Ack] = field(default_factory=dict)
    answers: dict[int, Message] = field(default_factory=dict)


def open_netlink(fd: int, protocol: int) -> socket.socket:
    """A bound netlink socket in the namespace behind `fd`, with extended acks. Blocks ~0.1 ms."""
    return run_in_netns(fd, lambda: netlink_socket(protocol))


def netlink_socket(protocol: int, groups: Sequence[int] = ()) -> socket.socket:
    """A bound netlink socket in the calling thread's namespace, with extended acks; joins the multicast `groups`."""
    sock = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, protocol)
    try:
        for option in (netlink.NETLINK_EXT_ACK, netlink.NETLINK_CAP_ACK):
            sock.setsockopt(netlink.SOL_NETLINK, option, 1)
        sock.bind((0, 0))  # before joining: binding resets the groups
        for group in groups:
            sock.setsockopt(netlink.SOL_NETLINK, netlink.NETLINK_ADD_MEMBERSHIP, group)
    except BaseException:
        sock.close()
        raise
    return sock


class RtnlSocket:
    """Requests to one namespace's rtnetlink (or another `protocol` of the same manners). Not for use by two threads at once.
    Errors other than a refused request (no answer, a broken message) raise KernelError."""

    def __init__(self, fd: int, protocol: int = netlink.NETLINK_ROUTE) -> None:
        self._sock = open_netlink(fd, protocol)
        # Strict checking makes the kernel honour the filters of a dump, and refuse what it does not understand.
        self._sock.setsockopt(netlink.SOL_NETLINK, netlink.NETLINK_GET_STRICT_CHK, 1)
        self._exchange = Exchange(self._sock, "netlink", timeout=_TIMEOUT_S)

    @property
    def port_id(self) -> int:
        """The number by which the kernel's notifications name who caused them."""
        address: tuple[int, int] = self._sock.getsockname()
        return address[0]

    def execute(self, requests: Sequence[bytes]) -> Outcome:
        """Send all in as few datagrams as fit; later ones go on after a refusal."""
        outcome = Outcome()
        start = 0
        for group in netlink.chunks(requests, max_bytes=_BATCH_BYTES, max_count=_BATCH_COUNT):
            batch = self._exchange.execute(group)
            outcome.errors.update({start + index: ack for index, ack in batch.errors.items()})
            outcome.answers.update({start + index: msg for index, msg in batch.answers.items()})
            start += len(group)
        return outcome

    def dump(self, request: bytes) -> list[Message]:
        """All messages of a dump, consistent: one that the kernel says was changed under way is read again.

        A family that this kernel lacks, or a routing table that does not exist yet, gives an empty list."""
        return self._exchange.dump(request, absent=(errno.EOPNOTSUPP, errno.EAFNOSUPPORT, errno.ENOENT))

    def close(self) -> None:
        self._sock.close()
