"""The kernel as the rest of podwire sees it: observe, apply, listen. Two implementations: `linux.LinuxKernel`,
and `podwire.testing.FakeKernel`, which really executes the operations in memory."""

import socket
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, Self

from podwire.model.addr import IPAddress
from podwire.model.errors import PodwireError
from podwire.model.flow import Flow
from podwire.model.ids import HOST, NetnsName
from podwire.model.kernelstate import NetState, Wireguard, WireguardPeer
from podwire.model.nft import Data, NftSet, Ruleset, TableRef
from podwire.model.ops import Applied, Plan


class KernelError(PodwireError):
    """A request that the kernel refused. `errno` is the kernel's."""

    def __init__(self, message: str, errno: int = 0) -> None:
        super().__init__(message)
        self.errno = errno


@dataclass(frozen=True, slots=True)
class KernelEvent:
    """Something in a namespace changed.

    `what` is "link", "address", "route", "neighbour", "fdb", "sysctl" (a switch that was set through this port) or "nft";
    `subject` names it for a log line. "lost": notices came faster than they were read, so anything may have changed.
    `ours`: the kernel says that this port did it
    (it says so for routes, neighbours and IPv4 addresses, never for links and fdb)."""

    ns: NetnsName
    what: str
    subject: str
    removed: bool
    ours: bool = False


class KernelEvents(Protocol):
    """A stream of events; whoever asked for it closes it."""

    def __aiter__(self) -> Self: ...

    async def __anext__(self) -> KernelEvent: ...

    async def aclose(self) -> None: ...


class Kernel(Protocol):
    """One node's kernel: its own namespace (HOST) and those of its pods, by label."""

    def attach(self, ns: NetnsName, fd: int) -> None:
        """Register the namespace behind `fd` (duplicated: the caller may close its own); replaces one of that label."""
        ...

    def detach(self, ns: NetnsName) -> None:
        """Forget a namespace and close what was opened in it; unknown labels are ignored."""
        ...

    async def observe(self, ns: NetnsName = HOST) -> NetState:
        """All links and their addresses; routes with ROUTE_PROTOCOL, and flannel's over VXLAN devices; permanent neighbours;
        FDB entries with a destination.
        `sysctls` has the current value of every key that was ever set through this port in `ns`.
        A link without a master has `master` "", a veth whose other end is in another namespace `peer` ""."""
        ...

    async def observe_devices(self, ns: NetnsName = HOST) -> NetState:
        """Of what `observe` gives the links and their addresses alone: a few milliseconds, however many peers there are. A
        WireGuard device is shown without its settings."""
        ...

    async def observe_wireguard(self, devices: Sequence[str]) -> Mapping[str, tuple[Wireguard, tuple[WireguardPeer, ...]]]:
        """The settings and peers of these devices of HOST, as `observe` has them; those that are not there are left out."""
        ...

    async def observe_nft(self, table: str, ns: NetnsName = HOST) -> Ruleset:
        """What the named table holds in both families; an empty ruleset where there is none."""
        ...

    async def lookup_nft(self, table: TableRef, of: NftSet, keys: Sequence[bytes]) -> Mapping[bytes, Data]:
        """Those elements that HOST's table has under `keys` in a set or map without intervals; none where there is no table."""
        ...

    async def count_nft(self, table: TableRef, of: NftSet) -> Mapping[bytes, tuple[Data, tuple[int, int]]]:
        """HOST's elements of the set: what each leads to, and the (packets, bytes) counted at it. Empty where there is none."""
        ...

    async def read_sysctl(self, key: str, ns: NetnsName = HOST) -> str:
        """The present value of a switch (`net/ipv4/ip_forward`); "" for one that this kernel lacks."""
        ...

    async def forget_flows(self, wanted: Callable[[Flow], bool], ns: NetnsName = HOST) -> int:
        """Remove the tracked connections for which `wanted` is true (it runs in a thread); returns how many.
        Their next packet is judged by the rules anew: a UDP client of an endpoint that is gone finds another."""
        ...

    async def carries(self, name: str, ns: NetnsName = HOST) -> bool:
        """Whether the link is operationally up. The kernel says so a while after the link was switched on (a work queue sees
        to it); until then what is sent to it is dropped. False for a link that does not exist."""
        ...

    async def apply(self, plan: Plan) -> Applied:
        """Execute in order; see `Applied`. Adding an address, route, neighbour or entry again, and removing what is not there
        (also with its device), is done, not failed. AddLink of a name in use fails (EEXIST) and leaves that link as it is;
        one that fails leaves nothing."""
        ...

    async def listen(self, port: int, address: IPAddress) -> socket.socket | None:
        """A TCP socket that listens in HOST on `address`, be it there yet or not; 0.0.0.0 and ::, on all of that family. The
        caller's to close. None: HOST has no such family. Raises OSError where the port is taken."""
        ...

    def events(self) -> KernelEvents:
        """Changes in HOST made by anyone, ourselves included (but for `CommitNft`), from the moment of the call."""
        ...

    async def close(self) -> None: ...
