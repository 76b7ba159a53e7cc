"""What a back end for Services is to the agent: fed with objects, it plans; told to, it brings the kernel up to date."""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

from podwire.model.addr import Family
from podwire.model.ids import ObjectKey
from podwire.model.objects import EndpointSlice, Pod, Service
from podwire.model.proxymode import ProxyMode
from podwire.model.servicetable import Backend, Frontend, NodeFacts, ServiceTable


@dataclass(frozen=True, slots=True)
class Connections:
    """New connections that the kernel has counted: by frontend's key (`services_maps.frontend_key`), and by that and the
    endpoint. `invalid_dropped`: packets of no known connection, where the back end drops those. Counters of rules that are
    made anew start again."""

    frontends: Mapping[bytes, int] = field(default_factory=dict)
    endpoints: Mapping[tuple[bytes, Backend], int] = field(default_factory=dict)
    invalid_dropped: int = 0


class ServiceRules(Protocol):
    """One node's Service rules in one back end. Every back end gives the same verdict for the same packet.

    Feeding (`set_…`) only plans. `program` and `compare` raise KernelError where the kernel refuses; then, and at the
    start, `compare` has to follow, since what the kernel holds is not known."""

    @property
    def mode(self) -> ProxyMode: ...

    def set_facts(self, facts: NodeFacts) -> None:
        """The node changed: everything is planned again. `compare` has to follow."""
        ...

    def set_service(self, key: ObjectKey, service: Service | None, slices: Sequence[EndpointSlice] = ()) -> None:
        """A Service with all of its slices as they are now; None: it is gone."""
        ...

    def set_host_ports(self, uid: str, pod: Pod | None) -> None:
        """A pod of this node that has addresses and may have host ports; None: it is gone."""
        ...

    def table(self, key: ObjectKey) -> ServiceTable:
        """What is planned for a Service; empty for one that is not known."""
        ...

    def served_at(self, key: bytes) -> Frontend | None:
        """What is planned under a frontend's key (`services_maps.frontend_key`), whoever has precedence there."""
        ...

    async def program(self) -> int:
        """Bring the kernel from what was last programmed to what is planned. Returns how many commands that took."""
        ...

    async def compare(self) -> int:
        """Bring the kernel from what it holds to what is planned. Returns how many commands that took: 0 is all well."""
        ...

    async def served(self) -> Collection[bytes]:
        """The keys (`services_maps.frontend_key`) of all frontends that the kernel serves by this back end, planned or not.
        Raises KernelError."""
        ...

    async def changed(self) -> None:
        """Returns when somebody else may have changed these rules, where the kernel does not announce it (`KernelEvent`)."""
        ...

    async def remove(self) -> None:
        """Take everything of this back end out of the kernel. Tracked connections go on while anybody else's rules
        translate and look at connections: else the kernel does neither."""
        ...

    async def connections(self, *, endpoints: bool) -> Connections:
        """What the kernel has counted, by frontend; with `endpoints` by endpoint instead. Raises KernelError."""
        ...


@runtime_checkable
class ReadsBack(Protocol):
    """A back end that can look at single Services. Others have to be compared as a whole."""

    async def holds(self, keys: Sequence[ObjectKey]) -> bool | None:
        """Whether the kernel, read back, serves these Services as is planned; None where comparing everything is cheaper than
        to look at so many. Raises KernelError."""
        ...


@dataclass(frozen=True, slots=True)
class RuleCount:
    """Rules of ours in one table: `total` that are planned, `last` that were written by the last round."""

    total: int
    last: int


@runtime_checkable
class CountsRules(Protocol):
    """A back end that has rules for each Service."""

    def rule_counts(self) -> Mapping[tuple[Family, str], RuleCount]:
        """By family and table."""
        ...


@runtime_checkable
class NamesDifferences(Protocol):
    """A back end that can tell what a comparison found."""

    @property
    def differences(self) -> Sequence[str]:
        """What the last comparison had to change: a few sets or chains, and whose."""
        ...


class OtherModes(Protocol):
    """What back ends other than the one in use have in the kernel, left by earlier lives of this program."""

    async def served_by_others(self, used: ServiceRules) -> Collection[bytes]:
        """The keys of all frontends that they serve still, as `ServiceRules.served` has them."""
        ...

    async def clean_up(self, used: ServiceRules) -> object:
        """Take all of theirs out of the kernel. Raises KernelError where something stays."""
        ...


MakeRules = Callable[[NodeFacts], ServiceRules]
