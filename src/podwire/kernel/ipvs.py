"""IPVS of one namespace, over generic netlink. Blocking: call it off the event loop."""

import errno
import os
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

from podwire.kernel.port import KernelError
from podwire.kernel.rtnlsocket import RtnlSocket
from podwire.model.errors import Unsupported
from podwire.model.ipvs import DelReal, DelVirtual, IpvsOp, VirtualKey, VirtualServer
from podwire.model.servicetable import Backend
from podwire.wire import ipvs

_ABSENT = (errno.ESRCH, errno.ENOENT)
"""The refusals that say that what was to go is not there."""


@dataclass(slots=True)
class IpvsState:
    """`servers`: virtual servers with their real ones; `connections`: how many each real server has, ending ones too;
    `accepted`: how many it was ever given."""

    servers: dict[VirtualKey, VirtualServer] = field(default_factory=dict)
    connections: dict[tuple[VirtualKey, Backend], int] = field(default_factory=dict)
    accepted: dict[tuple[VirtualKey, Backend], int] = field(default_factory=dict)


class IpvsClient:
    """Sets and reads virtual servers in the namespace behind `fd`. Raises Unsupported where the kernel has no IPVS."""

    def __init__(self, fd: int) -> None:
        self._sock = RtnlSocket(fd, ipvs.NETLINK_GENERIC)
        outcome = self._sock.execute([ipvs.get_family()])
        if 0 not in outcome.answers:
            self._sock.close()
            raise Unsupported("IPVS", "run `sudo modprobe ip_vs`, or use --proxy-mode nftables")
        self._family = ipvs.read_family(outcome.answers[0])

    def execute(self, ops: Sequence[IpvsOp]) -> None:
        """Carry out all. Raises KernelError for the first that was refused; the others are done."""
        outcome = self._sock.execute([ipvs.encode(self._family, op) for op in ops])
        for index, ack in sorted(outcome.errors.items()):
            op = ops[index]
            if isinstance(op, DelVirtual | DelReal) and ack.errno in _ABSENT:
                continue
            raise KernelError(f"IPVS refused {op}: {ack.message or os.strerror(ack.errno)}", ack.errno)

    def observe(self, keys: Collection[VirtualKey] | None = None) -> IpvsState:
        """All virtual servers; with `keys`, only those."""
        state = IpvsState()
        for held in ipvs.read_virtual(self._sock.dump(ipvs.dump_virtual(self._family))):
            if keys is not None and held.key not in keys:
                continue
            real = ipvs.read_real(held.key, self._sock.dump(ipvs.dump_real(self._family, held.key)))
            servers = {r.server: r.weight for r in real}
            state.servers[held.key] = VirtualServer(held.scheduler, held.persistence_s, servers)
            state.connections |= {(held.key, r.server): r.connections for r in real}
            state.accepted |= {(held.key, r.server): r.accepted for r in real}
        return state

    def close(self) -> None:
        self._sock.close()
