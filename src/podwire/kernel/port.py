"""The kernel as the rest of podwire sees it: observe, apply, listen. Two implementations: `linux.LinuxKernel`,
and `podwire.testing.FakeKernel`, which really executes the operations in memory."""

from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Protocol

from podwire.model.errors import PodwireError
from podwire.model.ids import HOST, NetnsName
from podwire.model.kernelstate import NetState
from podwire.model.nft import Ruleset
from podwire.model.ops import Applied, Plan


class KernelError(PodwireError):
    """A request that the kernel refused. `errno` is the kernel's."""

    def __init__(self, message: str, errno: int = 0) -> None:
        super().__init__(message)
        self.errno = errno


@dataclass(frozen=True, slots=True)
class KernelEvent:
    """Something in a namespace changed.

    `what` is "link", "address", "route", "neighbour", "fdb" or "nft"; `subject` names it for a log line."""

    ns: NetnsName
    what: str
    subject: str
    removed: bool


class Kernel(Protocol):
    """One node's kernel: its own namespace (HOST) and those of its pods, by label."""

    def attach(self, ns: NetnsName, fd: int) -> None:
        """Register the namespace behind `fd` (duplicated: the caller may close its own); replaces one of that label."""
        ...

    def detach(self, ns: NetnsName) -> None:
        """Forget a namespace and close what was opened in it; unknown labels are ignored."""
        ...

    async def observe(self, ns: NetnsName = HOST) -> NetState:
        """All links and their addresses; routes with ROUTE_PROTOCOL; permanent neighbours; FDB entries with a destination.
        `sysctls` has the current value of every key that was ever set through this port in `ns`."""
        ...

    async def observe_nft(self, table: str, ns: NetnsName = HOST) -> Ruleset:
        """What the named table holds in both families; an empty ruleset where there is none."""
        ...

    async def apply(self, plan: Plan) -> Applied:
        """Execute in order; see `Applied`."""
        ...

    def events(self) -> AsyncIterator[KernelEvent]:
        """Changes in HOST made by anyone, ourselves included, from the moment of the call."""
        ...

    async def close(self) -> None: ...
